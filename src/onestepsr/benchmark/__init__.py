"""What the models cost: parameters and operations, counted without running anything."""
