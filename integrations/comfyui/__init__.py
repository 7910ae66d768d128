"""onestepsr in ComfyUI: one node that enlarges images, by the present node interface (V3) or the older one (V1)."""

from __future__ import annotations

try:
    from comfy_api.latest import ComfyExtension, io  # noqa: F401
except ImportError:  # a host from before mid-2025
    from .nodes_v1 import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
else:  # a host takes the older mappings first where a module has both, so that it gets one only
    from .nodes_v3 import comfy_entrypoint

    __all__ = ["comfy_entrypoint"]
