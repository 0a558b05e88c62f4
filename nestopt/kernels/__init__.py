"""Fast exact forms. Each has a slow twin in the generic machine that it is tested against."""
