"""The node by ComfyUI's present interface."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .upscale import COLOR_FIXES, TOOLTIPS, model_names, upscale


class OneStepSRUpscale(io.ComfyNode):
    """Enlarge images with one evaluation of a diffusion network."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Name, inputs and outputs."""
        return io.Schema(
            node_id="OneStepSRUpscale",
            display_name="Upscale (onestepsr)",
            category="image/upscaling",
            description="One-step diffusion super-resolution of real photos; colours and any size are kept.",
            inputs=[
                io.Image.Input("image", tooltip=TOOLTIPS["image"]),
                io.Combo.Input("model", options=model_names(), default="d3sr-tiny", tooltip=TOOLTIPS["model"]),
                io.Float.Input("scale", default=4.0, min=1.0, max=8.0, step=0.25, tooltip=TOOLTIPS["scale"]),
                io.Float.Input("fidelity", default=0.0, min=0.0, max=1.0, step=0.05, tooltip=TOOLTIPS["fidelity"]),
                io.Int.Input("tile", default=0, min=0, max=4096, step=16, tooltip=TOOLTIPS["tile"]),
                io.Combo.Input("color_fix", options=list(COLOR_FIXES), default="auto", tooltip=TOOLTIPS["color_fix"]),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, tooltip=TOOLTIPS["seed"]),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, **values: object) -> io.NodeOutput:
        """The enlarged images."""
        return io.NodeOutput(upscale(**values))  # type: ignore[arg-type]


class OneStepSRExtension(ComfyExtension):
    """The package's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """One node."""
        return [OneStepSRUpscale]


async def comfy_entrypoint() -> OneStepSRExtension:
    """Called by the host."""
    return OneStepSRExtension()
