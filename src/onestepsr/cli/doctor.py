"""``onestepsr doctor``: report of this machine and installation, for bug reports and for choosing options."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onestepsr.core.errors import UserError, first_line
from onestepsr.core.machine import accelerators, cores, free_memory, instructions, processor_name
from onestepsr.weights.catalog import require_upscaler

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SCHEMA = 1
PACKAGES = ("onestepsr", "torch", "diffusers", "peft", "accelerate", "safetensors", "numpy", "pillow")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Names in /proc/cpuinfo of the instructions that matter for speed, x86 and ARM."""
PROBE_SECONDS = 0.15
"""Time given to each dtype."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor_command)


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
    model: Annotated[str, typer.Option(help="Model, or file, with which the engines are measured.")] = "d3sr-tiny",
) -> None:
    """Show versions, hardware, measured speed, models and optional parts of this installation.

    Measures the installed engines with the model and keeps the fastest that gives the same image: upscale, video and
    serve take it from then on (--engine auto).
    """
    require_upscaler(model)
    findings = examine(model)
    typer.echo(json.dumps(findings, indent=1) if as_json else as_text(findings))


def examine(model: str) -> dict[str, Any]:
    """Everything the command shows, as plain data; engines are measured with ``model``."""
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
        "engines": examine_engines(model),
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
    """TFLOP/s by dtype of a 3 x 3 convolution, which takes most of the time of our networks.

    Dtypes that the device cannot compute with are left out.
    """
    import torch

    from onestepsr.benchmark.probes import convolution_speed

    on_cpu = device.type == "cpu"
    speeds: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16, *(() if on_cpu else (torch.float16,))):
        try:
            shapes = ((1, 64, 64 if on_cpu else 1024),)  # samples, channels, side
            speeds[_name(dtype)] = float(f"{convolution_speed(device, dtype, shapes, seconds=PROBE_SECONDS):.3g}")
        except RuntimeError as error:  # bfloat16 on an older GPU, a GPU that this PyTorch has no code for, no memory
            logger.warning("%s: no convolution in %s (%s)", device, _name(dtype), first_line(error))
    return speeds


def examine_engines(model: str) -> dict[str, Any]:
    """The engine that ``model`` runs in from now on, what each one took, and the reason if nothing was measured."""
    from onestepsr.inference.engines import SIDE, measure_engines

    try:
        chosen, found = measure_engines(model)
    except UserError as error:
        return {"model": model, "chosen": "torch", "side": SIDE, "measured": [], "reason": str(error)}
    return {"model": model, "chosen": chosen, "side": SIDE, "measured": [asdict(one) for one in found], "reason": None}


def examine_models() -> list[dict[str, str]]:
    """Every named model and the state of its weights; only bundled ones are read, for downloads may be gigabytes."""
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
    """The optional parts that the package declares: missing distributions, and the command that installs them."""
    found: dict[str, dict[str, Any]] = {}
    for requirement in importlib.metadata.requires("onestepsr") or []:
        match = re.match(r"([\w.-]+).*extra == ['\"](?!test)([\w-]+)['\"]", requirement)  # "test" is for development
        if match is not None:
            name, extra = match.groups()
            entry = found.setdefault(extra, {"missing": [], "install": f"pip install 'onestepsr[{extra}]'"})
            entry["missing"] += [name] if _version(name) is None else []
    return found


def as_text(findings: Mapping[str, Any]) -> str:
    """The findings as aligned lines; to be pasted into bug reports, so never wrapped."""
    cpu, chosen = findings["cpu"], findings["chosen"]
    features = ", ".join(cpu["features"]) or "no known vector instructions"
    speeds = ", ".join(f"{dtype} {speed:.3g}" for dtype, speed in findings["tflops"].items()) or "no"
    rows = [(name, version or "missing") for name, version in findings["versions"].items()]
    rows += [
        ("platform", findings["platform"]),
        ("cpu", f"{cpu['model']}, {cpu['cores']} cores, {features}"),
        ("free memory", f"{cpu['free_memory_gb']} GB"),
    ]
    for entry in findings["devices"]:
        memory = "" if entry["memory_gb"] is None else f", {entry['memory_gb']} GB"
        rows.append((entry["device"], f"{entry['model']}{memory}"))
    rows += [
        ("speed", f"{speeds} TFLOP/s (3 x 3 convolution on {chosen['device']}, {findings['threads']} threads)"),
        ("default", f"--device {chosen['device']} --dtype {chosen['dtype']}"),
        ("engine", engines_as_text(findings["engines"])),
        *((f"model {model['id']}", f"{model['state']} ({model['licence']})") for model in findings["models"]),
    ]
    for name, entry in findings["extras"].items():
        missing = f"{', '.join(entry['missing'])} missing: {entry['install']}"
        rows.append((f"extra {name}", missing if entry["missing"] else "present"))
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"{title:<{width}}  {text}" for title, text in rows)


def engines_as_text(engines: Mapping[str, Any]) -> str:
    """The engine that was chosen, and the time of each."""
    if engines["reason"]:
        return f"{engines['chosen']} ({engines['reason']})"
    times = ", ".join(f"{one['engine']} {one['dtype']} {one['seconds']:.3g} s" for one in engines["measured"])
    return f"{engines['chosen']} for {engines['model']} ({engines['side']} x {engines['side']} pixels: {times})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
