"""Which level gets which parameter, seen how, and at which rate."""
