"""A kit for authors of plugins: `nestopt plugins new` and `nestopt plugins check`."""
