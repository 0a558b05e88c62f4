"""The continuum memory system: MLPs in a row, each on its own clock."""
