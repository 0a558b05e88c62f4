"""Benchmarks of nestopt beside its peers; `README.md` says how to run them. Not part of the installed package."""
