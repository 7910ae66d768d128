"""Processor and accelerators, and memory: free and used."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

OWN_CONTROL_GROUPS = Path("/proc/self/cgroup")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
"""Folder where the kernel shows control groups: version 2 itself, version 1 in one folder for each controller."""
BFLOAT16_INSTRUCTIONS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Names in /proc/cpuinfo of the instructions that multiply bfloat16: two of x86, one of ARM."""
LIMITS_WITHOUT_BFLOAT16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
"""Values of ``ONEDNN_MAX_CPU_ISA`` that keep oneDNN from using them."""
LIMITS_WITHOUT_AMX = ("avx512_core_bf16", "avx512_core_fp16", "avx10_1_512")
"""Further values that leave those of AVX-512 and keep it from using AMX."""


@functools.cache
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


def multiplies_bfloat16() -> bool:
    """True if the processor has instructions that multiply bfloat16, as far as oneDNN may use them.

    Without them bfloat16 is slower than float32: 2.7 times with AVX-512, where oneDNN converts every operand, and 5 to
    15 times with AVX2, for which oneDNN has no kernels and PyTorch's own loops compute.
    """
    if onednn_limit() in LIMITS_WITHOUT_BFLOAT16:
        return False
    known = instructions()
    if not known:  # not Linux
        import torch

        return bool(torch.cpu._is_avx512_bf16_supported())
    return not BFLOAT16_INSTRUCTIONS.isdisjoint(known)


def prefers_bfloat16() -> bool:
    """True if bfloat16 takes less time than float32 on this processor.

    AMX takes a tenth, AVX-512 BF16 of AMD half of the time. That of Intel without AMX (a virtual machine may hide it)
    takes 1.4 times as long, and ARM's has not been measured.
    """
    known = instructions()
    if not known:  # not Linux
        return multiplies_bfloat16()
    amx = "amx_bf16" in known and onednn_limit() not in LIMITS_WITHOUT_AMX
    amd = "avx512_bf16" in known and processor().get("vendor_id") != "GenuineIntel"
    return multiplies_bfloat16() and (amx or amd)


def onednn_limit() -> str:
    """The newest instruction set that the environment lets oneDNN use, in lower case; empty without a limit."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").lower()


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
    """True if this process belongs to a group that trains together."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def describe_machine(packages: Sequence[str] = ()) -> str:
    """Processor, cores and accelerators; with ``packages``, the versions of Python and of these too. One phrase."""
    parts = [f"{processor_name()} ({cores()} cores)", *(device["model"] for device in accelerators())]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    software = f" with Python {platform.python_version()}, {', '.join(versions)}" if versions else ""
    return ", ".join(parts) + software


# ---- memory ---------------------------------------------------------------------------------------------------------


def resident_memory() -> dict[str, int]:
    """Bytes that this process holds in memory ("now") and the most that it has held so far ("peak")."""
    sizes = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", _read(Path("/proc/self/status")) or ""))
    if len(sizes) == 2:  # Linux; getrusage would count what the parent process held before exec
        return {"now": int(sizes["VmRSS"]) << 10, "peak": int(sizes["VmHWM"]) << 10}
    memory = psutil.Process().memory_info()
    if sys.platform == "win32":
        return {"now": memory.rss, "peak": memory.peak_wset}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"now": memory.rss, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def peak_memory() -> dict[str, float]:
    """Largest memory of this process so far, and of its accelerator where there is one, in MB."""
    import torch

    peaks = {"peak_memory_mb": round(resident_memory()["peak"] / 1e6, 1)}
    if torch.cuda.is_available():
        peaks["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return peaks


def largest_peak_memory(accelerator: Accelerator) -> dict[str, float]:
    """:func:`peak_memory` of the process that needed most; all processes have to call it together."""
    import torch

    peaks = peak_memory()
    if accelerator.num_processes == 1:
        return peaks
    every = accelerator.gather(torch.tensor([list(peaks.values())], device=accelerator.device))  # (processes, values)
    return {name: round(value, 1) for name, value in zip(peaks, every.amax(dim=0).tolist(), strict=True)}


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated: on the GPU, or in the machine within the limits of its container.

    Memory of freed tensors that PyTorch keeps on a GPU is not free to the driver, but is free to us.
    """
    if device.type == "cuda":
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return min([float(psutil.virtual_memory().available), *_container_headroom()])


def _container_headroom() -> Iterator[float]:
    """Bytes that the control groups of this process (version 2, then 1), and all groups above them, still allow."""
    lines = (_read(OWN_CONTROL_GROUPS) or "").splitlines()
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            root, names = CONTROL_GROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = CONTROL_GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # Inside a container the group is mounted as the root, and its name may begin with "/../" or not exist there.
        parts = [part for part in name.split("/") if part not in ("", "..")]
        for folder in [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]:
            limit, used = (_read(folder / file) for file in names)
            if limit and used and limit.strip().isdigit():
                yield max(0.0, float(limit) - float(used) + _droppable(folder))


def _droppable(group: Path) -> float:
    """Bytes of cached files that count as used by a control group and can be dropped."""
    entries = dict(line.split() for line in (_read(group / "memory.stat") or "").splitlines() if line.count(" ") == 1)
    return float(entries.get("total_inactive_file", entries.get("inactive_file", 0)))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
