"""The ResShift family: Swin UNet, VQGAN autoencoder, generator, checkpoints."""
