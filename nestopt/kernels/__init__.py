"""Fast exact forms. Each has a slow twin in the reference machine that it is tested against."""
