"""Training methods: each one a configuration and a build function for the one loop in ``onestepsr.train``."""
