"""Image quality metrics, as functions of tensors."""
