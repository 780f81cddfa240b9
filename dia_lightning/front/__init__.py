"""The front door in Python: one call from arguments to texts."""
