"""The ``upscale`` command."""
