"""A nest whose parameters lie in pieces over several processes: entry by entry as they lie, or whole at an owner."""
