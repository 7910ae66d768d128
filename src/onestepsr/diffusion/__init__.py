"""Diffusion arithmetic: noise schedules and residual shifting."""
