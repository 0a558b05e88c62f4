"""What a run shows: its log, its pictures, its samples, and what it should beat."""
