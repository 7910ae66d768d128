"""The node by ComfyUI's older interface."""

from __future__ import annotations

from typing import Any

from .upscale import COLOR_FIXES, TOOLTIPS, model_names, upscale


class OneStepSRUpscale:
    """Enlarge images with one evaluation of a diffusion network."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "execute"
    CATEGORY = "image/upscaling"
    DESCRIPTION = "One-step diffusion super-resolution of real photos; colours and any size are kept."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (the host's name)
        """Inputs with their types and ranges."""
        numbers: dict[str, tuple[Any, dict[str, Any]]] = {
            "image": ("IMAGE", {}),
            "model": (model_names(), {"default": "d3sr-tiny"}),
            "scale": ("FLOAT", {"default": 4.0, "min": 1.0, "max": 8.0, "step": 0.25}),
            "fidelity": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.05}),
            "tile": ("INT", {"default": 0, "min": 0, "max": 4096, "step": 16}),
            "color_fix": (list(COLOR_FIXES), {"default": "auto"}),
            "seed": ("INT", {"default": 0, "min": 0, "max": 2**31 - 1}),
        }
        return {
            "required": {name: (kind, more | {"tooltip": TOOLTIPS[name]}) for name, (kind, more) in numbers.items()}
        }

    def execute(self, **values: Any) -> tuple[Any]:
        """The enlarged images."""
        return (upscale(**values),)


NODE_CLASS_MAPPINGS = {"OneStepSRUpscale": OneStepSRUpscale}
NODE_DISPLAY_NAME_MAPPINGS = {"OneStepSRUpscale": "Upscale (onestepsr)"}
