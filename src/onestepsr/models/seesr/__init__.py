"""SeeSR: networks, generator, checkpoints."""
