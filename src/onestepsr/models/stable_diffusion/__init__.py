"""Stable Diffusion 2.1 and SDXL networks."""
