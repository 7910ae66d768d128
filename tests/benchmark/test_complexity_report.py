"""The complexity report as data, tables and Markdown."""

import json
from pathlib import Path

import pytest

from onestepsr.benchmark.complexity_report import Report, as_document, as_markdown, tables
from onestepsr.benchmark.networks import measure
from onestepsr.benchmark.tables import Table, billions, millions

PAGE = Path(__file__).parents[2] / "docs" / "results" / "complexity.md"


@pytest.fixture(scope="module")
def tiny() -> Report:
    return Report(side=64, networks=[measure("d3sr-tiny", 64)])


def test_document_is_plain_data_whose_totals_add_up(report: Report) -> None:
    document = json.loads(json.dumps(as_document(report), allow_nan=False))
    assert (document["schema"], document["size"]) == (1, 512)
    assert document["published"]["methods"][-1] == {
        "method": "D3SR",
        "steps": 1,
        "seconds": 0.11,
        "parameters_millions": 966.3,
        "macs_billions": 2132,
    }
    for network in document["networks"]:
        assert network["macs"] == sum(stage["times"] * stage["macs"] for stage in network["stages"])
        assert network["parameters"] == sum(network["parts"].values())


def test_published_figures_stand_beside_ours_only_at_their_size(report: Report, tiny: Report) -> None:
    assert [table.title.split(",")[0] for table in tables(tiny)] == ["Stages", "Parts"]
    methods = [row[0] for row in tables(report)[2].rows]
    assert methods[:2] == ["StableSR", "DiffBIR"]
    assert "d3sr-sd21, counted here" in methods
    steps = {row[0].partition(",")[0]: row[1] for row in tables(report)[2].rows}
    assert [steps[name] for name in ("resshift-realsr-v1", "resshift-realsr-v3", "sinsr")] == ["15", "4", "1"]
    assert "15 x unet" in {row[1] for row in tables(report)[0].rows}


def test_every_row_has_a_cell_for_every_column(report: Report) -> None:
    for table in tables(report):
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_page_in_the_documentation_is_what_the_command_prints(report: Report) -> None:
    """All but the line that names the machine; what is written below the tables by hand may follow."""
    command = "onestepsr benchmark complexity --markdown"
    fresh = as_markdown(report, command=command, machine="MACHINE")
    kept = PAGE.read_text(encoding="utf-8")

    def without_machine(page: str) -> list[str]:
        return [line for line in page.strip().splitlines() if not line.startswith("Made by")]

    expected = without_machine(fresh)
    assert without_machine(kept)[: len(expected)] == expected
    assert f"Made by `{command}` on " in kept


def test_numbers_read_well() -> None:
    assert millions(865_910_724) == "865.911"
    assert (billions(2_132_343_339_008), billions(638_582_784)) == ("2,132.3", "0.639")
    table = Table(title="T", columns=("a", "b"), rows=(("x", "1"),))
    assert table.markdown() == "## T\n\n| a | b |\n| --- | ---: |\n| x | 1 |"
