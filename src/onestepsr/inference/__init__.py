"""Inference on images of any size: the upscaler, tiles and memory."""
