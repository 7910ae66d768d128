"""Freed memory stays while it is wanted, and is handed back afterwards.

What the C library makes of it depends on the state of its heap, so that resident memory is no matter for a test here.
"""

import pytest

from onestepsr.inference import allocator
from onestepsr.inference.allocator import no_malloc_trim, separate_mmaps

Calls = list[tuple[int, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the C library is asked for."""
    made: Calls = []

    class Library:
        def mallopt(self, parameter: int, value: int) -> None:
            made.append((parameter, value))

        def malloc_trim(self, pad: int) -> None:
            made.append((pad,))

    monkeypatch.setattr(allocator, "_glibc", Library)
    return made


def test_only_the_outermost_user_hands_memory_back(calls: Calls) -> None:
    with no_malloc_trim():
        with no_malloc_trim():
            assert calls[:2] == [(0,), (allocator.MMAP_MAX, 0)]
        assert calls.count((0,)) == 1
    assert calls[-4:] == [*allocator.USUAL.items(), (0,)]


def test_small_work_settles_the_usual_behaviour_once(calls: Calls) -> None:
    allocator._settle.cache_clear()
    for _ in range(2):
        with no_malloc_trim(wanted=False):
            pass
    assert calls == [*allocator.USUAL.items()], "nothing is handed back, and the second time nothing is asked for"


def test_small_work_beside_large_work_changes_nothing(calls: Calls) -> None:
    allocator._settle.cache_clear()
    with no_malloc_trim():
        begun = list(calls)
        with no_malloc_trim(wanted=False):
            assert calls == begun


def test_the_usual_behaviour_returns_after_an_error(calls: Calls) -> None:
    with pytest.raises(ZeroDivisionError), no_malloc_trim():
        _ = 1 / 0
    assert calls[-4:] == [*allocator.USUAL.items(), (0,)]


def test_weights_get_pages_of_their_own(calls: Calls) -> None:
    with separate_mmaps():
        assert calls == [*allocator.APART.items()]
    assert calls[2:] == [*allocator.USUAL.items()]
    with no_malloc_trim():
        begun = list(calls)
        with separate_mmaps():  # a model loaded while another one works
            assert calls == begun


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    for wanted in (True, False):
        with no_malloc_trim(wanted), separate_mmaps():
            pass
