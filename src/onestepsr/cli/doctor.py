"""``onestepsr doctor``: what this machine and this installation can do, for bug reports and for choosing options."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onestepsr.core.errors import UserError, first_line
from onestepsr.core.machine import accelerators, cores, free_memory, instructions, processor_name, remember_speeds

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SCHEMA = 1
PACKAGES = ("onestepsr", "torch", "diffusers", "peft", "accelerate", "safetensors", "numpy", "pillow")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Names in /proc/cpuinfo of the instructions that matter for speed, x86 and ARM."""
DEVELOPMENT_EXTRAS = ("test",)
PROBE_SECONDS = 0.15
"""Time given to each dtype."""
PROBES = {"cpu": ((1, 64, 64),), "cuda": ((1, 64, 1024),)}
"""Samples, channels and side of the images that are convolved, by device type: those of "cuda" for all others."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor_command)


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Show versions, hardware, measured speed, models and optional parts of this installation."""
    findings = examine()
    if as_json:
        typer.echo(json.dumps(findings, indent=1))
    else:
        show(findings)


def examine() -> dict[str, Any]:
    """Everything the command shows, as plain data. The speeds are kept for ``--dtype auto``."""
    import torch

    from onestepsr.inference.upscaler import resolve_device, resolve_dtype

    device = resolve_device("auto")
    speeds = measure_speeds(device)
    return {
        "schema": SCHEMA,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": examine_cpu(),
        "devices": accelerators(),
        "chosen": {"device": str(device), "dtype": _name(resolve_dtype("auto", device))},
        "threads": torch.get_num_threads(),
        "tflops": speeds,
        "models": examine_models(),
        "extras": examine_extras(),
    }


def examine_cpu() -> dict[str, Any]:
    """Model, instruction sets that matter, cores this process may use and free memory in GB."""
    import torch

    flags = instructions()
    return {
        "model": processor_name(),
        "features": [name for name in FEATURES if name in flags],
        "cores": cores(),
        "free_memory_gb": round(free_memory(torch.device("cpu")) / 1e9, 1),
    }


def measure_speeds(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a 3 x 3 convolution, the operation that our networks mostly are, by dtype.

    Formats that the device does not compute with are left out; all are where it does not work at all. Those of a
    processor are kept in the cache folder, where ``--dtype auto`` finds them.
    """
    from onestepsr.benchmark.probes import convolution_speed
    from onestepsr.weights.download import cache_folder

    shapes, speeds = PROBES.get(device.type, PROBES["cuda"]), dict[str, float]()
    for dtype in _probed(device):
        try:
            speed = convolution_speed(device, dtype, shapes, seconds=PROBE_SECONDS)
        except RuntimeError as error:  # bfloat16 on an older GPU, a GPU that this PyTorch has no code for, no memory
            logger.warning("%s: no convolution in %s (%s)", device, _name(dtype), first_line(error))
            continue
        speeds[_name(dtype)] = float(f"{speed:.3g}")
    if device.type == "cpu":
        remember_speeds(cache_folder(), speeds)
    return speeds


def examine_models() -> list[dict[str, str]]:
    """Every named model and where its weights stand; only bundled ones are read, for downloads may be gigabytes."""
    from onestepsr.weights.catalog import list_models, verify

    found = []
    for spec in list_models():
        try:
            state = "verified" if spec.bundled and verify(spec.id) else spec.state
        except UserError as error:
            state = str(error)
        found.append({"id": spec.id, "summary": spec.summary, "licence": spec.licence, "state": state})
    return found


def examine_extras() -> dict[str, dict[str, Any]]:
    """The optional parts that the package declares: which distributions are missing and what installs them."""
    found: dict[str, dict[str, Any]] = {}
    for requirement in importlib.metadata.requires("onestepsr") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name is None or extra is None or extra[1] in DEVELOPMENT_EXTRAS:
            continue
        entry = found.setdefault(extra[1], {"missing": [], "install": f"pip install 'onestepsr[{extra[1]}]'"})
        if _version(name[0]) is None:
            entry["missing"].append(name[0])
    return found


def show(findings: Mapping[str, Any]) -> None:
    """Print the findings, one aligned line each: to be pasted into bug reports, so never wrapped."""
    rows = _rows(findings)
    width = max(len(title) for title, _ in rows)
    for title, text in rows:
        typer.echo(f"{title:<{width}}  {text}")


def _rows(findings: Mapping[str, Any]) -> list[tuple[str, str]]:
    cpu, chosen = findings["cpu"], findings["chosen"]
    rows = [(name, version or "missing") for name, version in findings["versions"].items()]
    rows += [
        ("platform", findings["platform"]),
        (
            "cpu",
            f"{cpu['model']}, {cpu['cores']} cores, {', '.join(cpu['features']) or 'no known vector instructions'}",
        ),
        ("free memory", f"{cpu['free_memory_gb']} GB"),
    ]
    rows += [(entry["device"], _device_text(entry)) for entry in findings["devices"]]
    speeds = ", ".join(f"{dtype} {speed:.3g}" for dtype, speed in findings["tflops"].items()) or "no"
    rows += [
        ("speed", f"{speeds} TFLOP/s (3 x 3 convolution on {chosen['device']}, {findings['threads']} threads)"),
        ("default", f"--device {chosen['device']} --dtype {chosen['dtype']}"),
    ]
    rows += [(f"model {model['id']}", f"{model['state']} ({model['licence']})") for model in findings["models"]]
    for name, entry in findings["extras"].items():
        missing = f"{', '.join(entry['missing'])} missing: {entry['install']}"
        rows.append((f"extra {name}", missing if entry["missing"] else "present"))
    return rows


def _device_text(entry: Mapping[str, Any]) -> str:
    return entry["model"] if entry["memory_gb"] is None else f"{entry['model']}, {entry['memory_gb']} GB"


def _probed(device: torch.device) -> list[torch.dtype]:
    import torch

    return [torch.float32, torch.bfloat16] + ([] if device.type == "cpu" else [torch.float16])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
