"""Models by name and from files: checkpoints, exported files, and the names of their classes."""
