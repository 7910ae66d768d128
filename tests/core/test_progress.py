"""Progress bars: on a terminal, in the first process of a run."""

import pytest

from onestepsr.core import progress


@pytest.mark.parametrize(("rank", "terminal", "shown"), [("0", "1", True), ("1", "1", False), ("0", "", False)])
def test_bars_show_on_a_terminal_in_the_first_process(
    rank: str, terminal: str, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("FORCE_COLOR", terminal)  # by which rich is told that it writes to a terminal
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    assert list(progress.progress(iter("abc"), "[items]", 3)) == ["a", "b", "c"]
    with progress.byte_progress("net.bin", 10) as advance:
        advance(4)
    err = capsys.readouterr().err
    assert [title in err for title in ("[items]", "net.bin")] == [shown, shown]


def test_no_bar_appears_for_what_takes_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(progress.progress([1, 2], "items")) == [1, 2]
    assert capsys.readouterr().err == ""
