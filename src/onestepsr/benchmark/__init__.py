"""Cost of the models: parameters, operations, time and memory."""
