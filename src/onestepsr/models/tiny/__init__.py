"""The tiny latent-diffusion backbone, small enough for a CPU."""
