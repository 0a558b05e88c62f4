"""The programs are run by `test_cases.py`, and not imported for their examples."""

collect_ignore_glob = ["programs/*"]
