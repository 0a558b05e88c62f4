"""Modules whose examples can't be run where an extra is not installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("transformers") else ["nestopt/models/hf.py"]
