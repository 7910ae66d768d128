"""OSEDiff: generator, adapters, checkpoints."""
