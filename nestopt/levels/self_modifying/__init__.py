"""Self-modifying Titans: memories that also make their own keys, values and gates."""
