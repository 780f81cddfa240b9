"""From YAML and the command line to objects, and what is said of mistakes in them."""
