"""Applications: the command line."""
