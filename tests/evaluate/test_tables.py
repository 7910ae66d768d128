"""Tables: digits, bold cells, escaping, and what a narrow terminal must not lose."""

import csv
import io

import pytest

from evaluation_results import PSNR, make_result
from onestepsr.core.tables import Grid
from onestepsr.evaluate.comparison import compare
from onestepsr.evaluate.result import summarize
from onestepsr.evaluate.tables import (
    cell,
    decimals_of,
    difference_grid,
    heading,
    method_grid,
    p_value,
    result_grid,
    values_csv,
)

FIRST = {"a": 25.0, "b": 27.0, "c": 29.0}


def test_one_result_has_mean_deviation_interval_and_count() -> None:
    grid = result_grid(make_result("x", FIRST, {"a": 5.0}))
    assert grid.rows[0] == ("PSNR-Y dB", "higher", "27.0000", "2.0000", "22.0317 to 31.9683", "3")
    assert grid.rows[1] == ("NIQE", "lower", "5.0000", "-", "-", "1")


def test_methods_are_rows_and_the_best_is_bold() -> None:
    better = {name: value + 0.5 for name, value in FIRST.items()}
    grid = method_grid(compare([make_result("x", FIRST, FIRST), make_result("y", better, better)]))
    assert grid.columns == ("method", "PSNR-Y (dB) ↑", "NIQE ↓", "images")
    assert grid.rows[0] == ("x", "27.00 ± 4.97", "27.00 ± 4.97", "3")
    assert grid.best == {(1, 1), (0, 2)}
    assert "| y | **27.50 ± 4.97** | 27.50 ± 4.97 | 3 |" in grid.markdown()
    assert r"y & \textbf{27.50 $\pm$ 4.97} & 27.50 $\pm$ 4.97 & 3 \\" in grid.latex()


def test_differences_count_wins_by_what_is_better() -> None:
    second = {"a": 24.0, "b": 27.0, "c": 28.0}
    grid = difference_grid(compare([make_result("x", FIRST, FIRST), make_result("y", second, second)]))
    assert [row[-1] for row in grid.rows] == ["0/1/2", "2/1/0"]
    assert grid.rows[0][3].startswith("-0.67 ± ")
    assert grid.notes


def test_names_stay_names_in_every_format() -> None:
    grid = Grid(title="", columns=("method", "x"), rows=(("[bold]a|b_<i>&%\x1b", "1"),))
    assert r"\[bold\]a\|b\_\<i\>&%" in grid.markdown()
    assert r"[bold]a|b\_<i>\&\%" in grid.latex()
    assert "\x1b" not in grid.markdown() + grid.latex()


def test_markup_in_names_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Grid(title="[red]t", columns=("m",), rows=(("[bold]a[/bold]",),)).show()
    assert "[bold]a[/bold]" in capsys.readouterr().out


def test_digits_survive_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    columns = ("method", *(f"column {number}" for number in range(8)))
    Grid(title="", columns=columns, rows=(("a long name of a method", *["123.4567"] * 8),)).show()
    assert capsys.readouterr().out.count("123.4567") == 8


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.00001, "<0.0001"), (0.0123, "0.012"), (0.5, "0.50"), (1.0, "1.00")]
)
def test_p_values(value: float | None, text: str) -> None:
    assert p_value(value) == text


@pytest.mark.parametrize(("values", "decimals"), [({"a": 5.6}, 4), ({"a": 69.1}, 2)])
def test_decimals_follow_size(values: dict[str, float], decimals: int) -> None:
    comparison = compare([make_result("x", {"a": 9.0}, values)])
    assert (decimals_of(comparison, "psnr"), decimals_of(comparison, "niqe")) == (2, decimals)
    assert heading(PSNR) == "PSNR-Y (dB) ↑"
    assert cell(None, 2) == "-"
    assert cell(summarize([1.0]), 2, "+") == "+1.00"


def test_csv_holds_every_value_exactly() -> None:
    text = values_csv([make_result("x", {"a": 0.1 + 0.2}, {"b,c": 5.0}), make_result("=cmd", {"-a": 1.0})])
    lines = list(csv.reader(io.StringIO(text)))
    assert lines == [
        ["method", "image", "psnr", "niqe"],
        ["x", "a", repr(0.1 + 0.2), ""],
        ["x", "b,c", "", "5.0"],
        ["'=cmd", "'-a", "1.0", ""],
    ]
