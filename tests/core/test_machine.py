"""Description of the machine, its instructions and its memory."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onestepsr.core import machine


def test_the_description_names_processor_cores_accelerators_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "processor", lambda: {"model name": "Some CPU"})
    monkeypatch.setattr(machine, "cores", lambda: 3)
    monkeypatch.setattr(machine, "accelerators", lambda: [{"device": "cuda:0", "model": "Some GPU", "memory_gb": 1.0}])
    assert machine.describe_machine() == "Some CPU (3 cores), Some GPU"
    assert machine.describe_machine(["torch"]).startswith("Some CPU (3 cores), Some GPU with Python 3.")
    assert ", torch 2." in machine.describe_machine(["torch"])


@pytest.mark.skipif("avx2" not in machine.instructions(), reason="names of x86, as Linux tells them")
@pytest.mark.parametrize("limit", [None, "AVX2", "AVX512_CORE"])
def test_instructions_for_bfloat16_are_those_that_onednn_says_it_uses(
    limit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import torch; from onestepsr.core import machine\n"
        "torch.nn.functional.conv2d(torch.ones(1, 64, 64, 64), torch.ones(64, 64, 3, 3))\n"
        "print('multiplies', machine.multiplies_bfloat16())"
    )
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    uses = next(line for line in said.splitlines() if ",cpu,isa:" in line)
    # AVX2 can have bfloat16 too (avx2_vnni_2), but to load and store it: products are float32's. AVX10 always has it.
    multiplies = ("AVX-512" in uses and "bfloat16" in uses) or re.search("AVX ?10", uses) is not None
    assert f"multiplies {multiplies}" in said


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_resident_memory_sees_what_is_written_to() -> None:
    script = (  # in a process of its own: in this one, memory that earlier tests have freed may serve again
        "from onestepsr.core import machine\n"
        "before = machine.resident_memory()['now']\n"
        "block = bytearray(b'x') * 50_000_000\n"
        "after = machine.resident_memory()\n"
        "print(after['now'] - before, after['peak'] - after['now'])"
    )
    grown, above = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(grown) > 30_000_000
    assert int(above) >= -5_000_000


def test_container_limits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, free = torch.device("cpu"), machine.free_memory(torch.device("cpu"))
    assert free > 1e7
    files = {
        "/proc/self/cgroup": "0::/box\n",
        "/sys/fs/cgroup/memory.max": "1500000\n",
        "/sys/fs/cgroup/memory.current": "500000\n",
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(str(path)))
    assert machine.free_memory(cpu) == 1e6
    files["/sys/fs/cgroup/memory.stat"] = "anon 100\ninactive_file 200000\nactive_file 7\n"
    assert machine.free_memory(cpu) == 1.2e6, "cached files can be dropped"
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.free_memory(cpu) > 1e7


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limited", ["", "pod", "pod/job", "pod/job/step"])
def test_the_limit_may_be_on_any_group_above(
    version: int, limited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs" if version == 2 else tmp_path / "fs" / "memory"
    own.write_text("0::/pod/job/step\n" if version == 2 else "5:cpu:/\n4:memory,hugetlb:/pod/job/step\n0::/\n")
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    unlimited = "max\n" if version == 2 else "9223372036854771712\n"
    for group in ("", "pod", "pod/job", "pod/job/step"):
        (root / group).mkdir(parents=True, exist_ok=True)
        (root / group / names[0]).write_text("1000000\n" if group == limited else unlimited)
        (root / group / names[1]).write_text("400000\n")
        (root / group / "memory.stat").write_text("inactive_file 7\n")
    monkeypatch.setattr(machine, "OWN_CONTROL_GROUPS", own)
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "fs")
    assert machine.free_memory(torch.device("cpu")) == 600_007


def test_what_pytorch_keeps_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every image would be planned with what the one before it has left in the driver's eyes."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000, 24_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5_000)
    assert machine.free_memory(torch.device("cuda")) == 16_000
