"""Freed memory stays while it is wanted, and is handed back afterwards."""

import platform
from pathlib import Path

import pytest
import torch

from onestepsr import allocator
from onestepsr.allocator import freed_memory_kept
from onestepsr.machine import resident_memory

BLOCK = 100_000_000
LINUX = Path("/proc/self/status").exists() and platform.libc_ver()[0] == "glibc"


def held_after_a_large_tensor() -> int:
    """Bytes that the process still holds of a tensor that is gone."""
    before = resident_memory()["now"]
    torch.ones(BLOCK, dtype=torch.uint8)
    return resident_memory()["now"] - before


@pytest.mark.skipif(not LINUX, reason="needs glibc and Linux")
def test_freed_memory_stays_inside_and_goes_afterwards() -> None:
    start = resident_memory()["now"]
    with freed_memory_kept():
        with freed_memory_kept():
            assert held_after_a_large_tensor() > 0.9 * BLOCK
        assert held_after_a_large_tensor() < 0.1 * BLOCK  # the same block again: it is still there
    assert resident_memory()["now"] - start < 0.1 * BLOCK
    assert held_after_a_large_tensor() < 0.1 * BLOCK
    with freed_memory_kept(wanted=False):
        assert held_after_a_large_tensor() < 0.1 * BLOCK


def test_the_usual_behaviour_returns_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    class Library:
        def mallopt(self, parameter: int, value: int) -> None:
            calls.append((parameter, value))

        def malloc_trim(self, pad: int) -> None:
            calls.append((pad,))

    monkeypatch.setattr(allocator, "_glibc", Library)
    with pytest.raises(ZeroDivisionError), freed_memory_kept():
        _ = 1 / 0
    assert calls[-4:] == [*allocator.USUAL.items(), (0,)]


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    with freed_memory_kept():
        pass
