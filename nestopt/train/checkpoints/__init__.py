"""Checkpoints: one file, several shards, and what of a run goes into them."""
