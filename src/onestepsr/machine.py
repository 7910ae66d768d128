"""What the machine is, as far as choices depend on it."""

from __future__ import annotations

from pathlib import Path


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
