"""Attention: memories that keep every pair, or those of a window."""
