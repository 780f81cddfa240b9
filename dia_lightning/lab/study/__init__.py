"""Studies: grids of runs from one file, continued where they stopped, and their report."""
