"""Deep memories of tokens: MLPs that learn as they read (TTT, Titans, DLA)."""
