"""Synthetic degradation of photos: Real-ESRGAN's second order, faces, a mild camera."""
