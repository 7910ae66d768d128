"""What the machine is, what was measured on it, and how much memory a process takes."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onestepsr.core.files import replacing

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

SPEEDS_FILE = "processor.json"
"""Name of the file in the cache folder that keeps what was measured on this processor."""
SPEEDS_SCHEMA = 1
_FALLBACK_BYTES = 2_000_000_000


def processor() -> dict[str, str]:
    """Key and value of the first processor in /proc/cpuinfo; empty where there is none (not Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def instructions() -> frozenset[str]:
    """Names of the instruction sets that the processor offers, x86 or ARM; empty where they are not known."""
    described = processor()
    return frozenset((described.get("flags") or described.get("Features") or "").split())


def processor_name() -> str:
    """Model of the processor, or as much as is known of it."""
    return processor().get("model name") or platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def accelerators() -> list[dict[str, Any]]:
    """Device name, model and memory in GB (None if unknown) of every accelerator that PyTorch can use."""
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = round(properties.total_memory / 1e9, 1)
        found.append({"device": f"cuda:{index}", "model": properties.name, "memory_gb": memory})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "model": "Apple GPU", "memory_gb": None})
    return found


def is_one_of_several() -> bool:
    """Whether this process belongs to a group that trains together."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def describe_machine(packages: Sequence[str] = ()) -> str:
    """Processor, cores and accelerators; with ``packages``, the versions of Python and of these too. One phrase."""
    parts = [f"{processor_name()} ({cores()} cores)", *(device["model"] for device in accelerators())]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    software = f" with Python {platform.python_version()}, {', '.join(versions)}" if versions else ""
    return ", ".join(parts) + software


def remember_speeds(folder: Path, speeds: Mapping[str, float]) -> bool:
    """Keep TFLOP/s by dtype, as measured on this processor, in ``folder``; False where it cannot be written."""
    content = {"schema": SPEEDS_SCHEMA, **_circumstances(), "tflops": dict(speeds)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / SPEEDS_FILE) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError:
        return False
    return True


def recall_speeds(folder: Path) -> dict[str, float]:
    """What :func:`remember_speeds` kept in ``folder``; empty if nothing, or for another processor or PyTorch."""
    path = folder / SPEEDS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < 2**16 else None
    except (OSError, ValueError):
        return {}
    known = {"schema": SPEEDS_SCHEMA, **_circumstances()}
    if not isinstance(content, dict) or {key: content.get(key) for key in known} != known:
        return {}
    speeds = content.get("tflops")
    if not isinstance(speeds, dict) or not all(isinstance(speed, (int, float)) for speed in speeds.values()):
        return {}
    return {str(name): float(speed) for name, speed in speeds.items()}


def _circumstances() -> dict[str, str]:
    return {"processor": processor_name(), "torch": importlib.metadata.version("torch")}


def resident_memory() -> dict[str, int]:
    """Bytes that this process holds in memory ("now") and the most that it has held so far ("peak").

    Where the system tells the peak only, both are that; empty where it tells neither.
    """
    sizes = dict(_linux_sizes())
    if len(sizes) == len(_SIZES):
        return sizes
    if sys.platform == "win32":
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"now": peak, "peak": peak}


_SIZES = {"VmRSS": "now", "VmHWM": "peak"}


def _linux_sizes() -> Iterator[tuple[str, int]]:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return
    for key, _, value in (line.partition(":") for line in lines):
        if key in _SIZES and value.split()[1:] == ["kB"]:
            yield _SIZES[key], int(value.split()[0]) << 10


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated: of the GPU, or of the machine within the limits of its container.

    What PyTorch keeps on a GPU of the tensors that it has freed is the driver's no more, but ours to allocate again.
    """
    if device.type == "cuda":
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    known = [value for value in (_available_memory(), *_container_headroom()) if value is not None]
    return min(known, default=_FALLBACK_BYTES)


def _available_memory() -> float | None:
    text = _read(Path("/proc/meminfo"))
    for line in (text or "").splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    if sys.platform == "win32":
        return _available_on_windows()
    try:  # macOS and others: what is installed, of which half is taken to be free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (AttributeError, ValueError, OSError):
        return None


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("physical", "available", "pages", "free_pages", "virtual", "unused")),
        ("extended", ctypes.c_uint64),
    )


def _available_on_windows() -> float | None:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    library: Any = vars(ctypes)["windll"].kernel32
    return float(status.available) if library.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def _container_headroom() -> Iterator[float]:
    """What the control groups of this process (version 2, then 1) still allow."""
    lines = (_read(Path("/proc/self/cgroup")) or "").splitlines()
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for folder in {root / name.lstrip("/"), root}:  # inside a container the group is mounted as the root
            limit, used = (_read(folder / file) for file in names)
            if limit and used and limit.strip().isdigit():
                yield max(0.0, float(limit) - float(used) + _droppable(folder))


def _droppable(group: Path) -> float:
    """Bytes of files that count as used by a control group and would be dropped for want of memory."""
    entries = dict(line.split() for line in (_read(group / "memory.stat") or "").splitlines() if line.count(" ") == 1)
    return float(entries.get("total_inactive_file", entries.get("inactive_file", 0)))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


# How much memory a run has needed so far ------------------------------------------------------------------------------


def peak_memory() -> dict[str, float]:
    """Largest memory of this process so far, and of its accelerator where there is one, in MB."""
    import torch

    peaks: dict[str, float] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
    if torch.cuda.is_available():
        peaks["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return peaks


def largest_peak_memory(accelerator: Accelerator) -> dict[str, float]:
    """:func:`peak_memory` of the process that needed most; all processes have to ask together."""
    import torch

    peaks = peak_memory()
    if accelerator.num_processes == 1 or not peaks:
        return peaks
    every = accelerator.gather(torch.tensor([list(peaks.values())], device=accelerator.device))  # (processes, values)
    return {name: round(value, 1) for name, value in zip(peaks, every.amax(dim=0).tolist(), strict=True)}
