"""Published tables: complete, as printed, and never beside a result without what differs."""

from dataclasses import replace
from typing import Any

import pytest

from evaluation_results import NIQE, PSNR, make_result
from onestepsr.core.config import from_mapping
from onestepsr.core.errors import UserError
from onestepsr.core.tables import NOTHING, Grid
from onestepsr.evaluate.result import EvaluationResult, MetricRecord, ModelRecord, ProtocolRecord
from onestepsr.evaluate.tables import (
    MARK,
    PublishedSet,
    beside,
    counterpart,
    find_published,
    mismatches,
    published_tables,
)

HUNDRED = {f"p{number}": 25.0 + number / 100 for number in range(100)}


def grid_of(result: EvaluationResult, name: str) -> Grid:
    (grid,) = beside([result], name)
    return grid


def test_every_table_is_complete() -> None:
    tables = published_tables()
    assert {"d3sr-table1", "d3sr-table6", "osediff", "tadsr-table1", "tadsr-table2", "tadsr-table5"} <= set(tables)
    for name, table in tables.items():
        for rows in table.sets.values():
            assert set(rows.columns) <= set(table.metrics), name
            assert len(rows.rows) >= 1
    assert {"realsr", "realset65", "drealsr"} <= {name for table in tables.values() for name in table.sets}


@pytest.mark.parametrize(
    ("name", "method", "metric", "value"),
    [
        ("d3sr-table1/realsr", "D3SR-1", "niqe", 3.9255),
        ("d3sr-table1/drealsr", "D3SR-1", "musiq", 40.30),
        ("d3sr-table6/realsr", "D3SR, noise-aware, SDXL", "maniqa", 0.6870),
        ("d3sr-second-edition/realsr", "D3SR-1", "dists", 0.1782),
        ("d3sr-second-edition/div2k-val", "D3SR-1", "lpips", 0.3556),
        ("d3sr-second-edition/realset65", "D3SR-1", "clipiqa", 0.5481),
        ("d3sr-second-edition-ablation/realsr", "D3SR, EA-LPIPS", "lpips", 0.3173),
        ("osediff/realsr", "OSEDiff-1", "psnr", 25.15),
        ("osediff/drealsr", "OSEDiff-1", "fid", 135.30),
        ("osediff/drealsr", "SinSR-1", "niqe", 6.9907),
        ("osediff/div2k-val", "OSEDiff-1", "dists", 0.1976),
        ("d3sr-table2/realsr", "D3SR-1", "psnr", 24.60),
        ("d3sr-table2/drealsr", "OSEDiff-1", "ssim", 0.7355),
        ("tadsr-table1/imagenet-test", "ResShift-15", "seconds", 0.682),
        ("tadsr-table1/imagenet-test", "SinSR-1", "frozen", 55.32),
        ("tadsr-table1/imagenet-test", "SwinIR", "frozen", None),
        ("tadsr-table3/celeba-test", "TAD-SR-1", "unpaired_fid", 41.968),
        ("tadsr-table4/wider", "TAD-SR-1", "clipiqa", 0.770),
        ("tadsr-table4/lfw", "CodeFormer", "musiq", 75.480),
        ("tadsr-table2/realset65", "TAD-SR-1", "musiq", 67.500),
        ("tadsr-table3/celeba-test", "TAD-SR-1", "lpips", 0.341),
        ("tadsr-stable-diffusion/realsr", "TAD-SR-1", "psnr", 24.50),
    ],
)
def test_numbers_are_those_of_the_papers(name: str, method: str, metric: str, value: float | None) -> None:
    ((_, rows),) = find_published(name)
    assert rows.rows[method][rows.columns.index(metric)] == value


def test_numbers_have_the_digits_that_were_printed() -> None:
    rows = {row[0]: row[1:] for row in grid_of(make_result("x", HUNDRED), "osediff/realsr").rows}
    assert rows["OSEDiff-1"] == (
        "25.15", "0.7341", "0.2921", "0.2128", "123.49", "5.6476", "69.09", "0.6326", "0.6693"
    )  # fmt: skip
    assert rows["SinSR-1"][6:8] == ("60.80", "0.5385")


def test_the_same_protocol_has_nothing_to_flag() -> None:
    table, rows = find_published("osediff/realsr")[0]
    assert mismatches(make_result("x", HUNDRED, HUNDRED), table, rows) == []
    grid = grid_of(make_result("x", HUNDRED, HUNDRED), "osediff/realsr")
    assert grid.notes == ()
    assert grid.rows[0][:2] == ("x", "25.50")
    assert not any(MARK in column for column in grid.columns)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"protocol": "d3sr"}, "protocol 'd3sr'; theirs: crops of 128 to 512"),
        ({"settings": {"pictures": "whole"}}, "pictures whole against crops"),
        ({"settings": {"crop_border": 4}}, "crop_border 4 against 0"),
        ({"psnr_record": replace(PSNR, variant="RGB")}, "PSNR: 'RGB' against 'Y of BT.601 studio range, not rounded'"),
    ],
)
def test_what_differs_is_flagged(other: dict[str, Any], message: str) -> None:
    grid = grid_of(make_result("x", HUNDRED, **other), "osediff/realsr")
    assert any(message in note for note in grid.notes), grid.notes
    assert MARK in grid.columns[1]


def test_another_number_of_images_is_flagged() -> None:
    grid = grid_of(make_result("x", {"a": 25.0, "b": 26.0}), "osediff/realsr")
    assert grid.notes == ("† x: 2 images; RealSR has 100",)


def test_the_basicsr_niqe_is_not_taken_for_pyiqas() -> None:
    studio = replace(NIQE, variant="Y of BT.601 studio range, rounded")
    protocol = ProtocolRecord(name="osediff", metrics={"niqe_studio": studio})
    images = {name: {"niqe_studio": 5.0} for name in HUNDRED}
    grid = grid_of(EvaluationResult(label="x", protocol=protocol, images=images), "osediff/realsr")
    assert grid.rows[0][6] == "5.0000"
    assert "NIQE: 'Y of BT.601 studio range, rounded' against 'Y of YIQ, rounded'" in grid.notes[0]
    assert [MARK in column for column in grid.columns] == [index == 6 for index in range(10)]


def test_a_paper_that_does_not_say_is_flagged() -> None:
    grid = grid_of(make_result("x", {"a": 1.0}, {"a": 5.0}, protocol="d3sr"), "d3sr-table1/realsr")
    assert grid.notes == ("† x: NIQE: the paper does not say which variant, here it is 'Y of YIQ, rounded'",)


def test_the_variant_decides_between_namesakes() -> None:
    koniq, pipal = replace(NIQE, variant="koniq"), replace(NIQE, variant="maniqa-pipal")
    protocol = ProtocolRecord(name="p", metrics={"maniqa": koniq, "maniqa-pipal": pipal})
    result = EvaluationResult(label="x", protocol=protocol, images={"a": {"maniqa": 0.1, "maniqa-pipal": 0.2}})
    assert counterpart(result, "maniqa", "maniqa-pipal") == "maniqa-pipal"
    assert counterpart(result, "maniqa", "") == "maniqa"
    assert counterpart(result, "psnr", "") is None


def test_osediffs_variants_are_ours_where_we_have_them() -> None:
    from onestepsr.evaluate.metrics.catalog import METRICS

    for name, record in published_tables()["osediff"].metrics.items():
        own = METRICS["maniqa-pipal" if name == "maniqa" else name]
        assert (own.variant, own.higher_is_better) == (record.variant, record.higher_is_better), name


@pytest.mark.parametrize(("name", "place"), [("osediff", "osediff/realsr"), ("d3sr", "d3sr-table1/realset65")])
def test_our_protocols_are_the_papers(name: str, place: str) -> None:
    from onestepsr.evaluate.protocols import PROTOCOLS, applicable

    specs = applicable(PROTOCOLS[name], with_reference=True)
    ((table, rows),) = find_published(place)
    images = {f"p{number}": {"niqe": 5.0} for number in range(rows.images or 1)}
    result = EvaluationResult(label="x", protocol=PROTOCOLS[name].record(specs), images=images)
    assert "" not in dict(mismatches(result, table, rows))
    assert table.protocol.settings.items() <= result.protocol.settings.items()


def test_tables_without_a_common_metric_are_left_out() -> None:
    titles = [grid.title for grid in beside([make_result("x", HUNDRED)], "realsr")]
    assert len(titles) == 4
    assert {any(name in title for title in titles) for name in ("OSEDiff", "second edition", "TAD-SR")} == {True}
    with pytest.raises(UserError, match="no metric of these results is among those published on 'realset65'"):
        beside([make_result("x", HUNDRED)], "realset65")


def test_results_share_a_note_that_fits_both() -> None:
    (grid,) = beside(
        [make_result("x", HUNDRED, protocol="d3sr"), make_result("y", HUNDRED, protocol="d3sr")], "osediff/realsr"
    )
    assert len(grid.notes) == 1
    assert grid.notes[0].startswith("† x, y: protocol 'd3sr'")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("realsrr", "did you mean 'realsr'"),
        ("osedif/realsr", "no published table 'osedif': did you mean 'osediff'"),
        ("osediff/realset65", "no published numbers on 'realset65'"),
    ],
)
def test_unknown_names_suggest_the_near_one(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_published(name)


def test_a_short_row_is_refused() -> None:
    with pytest.raises(UserError, match="row 'a' has 1 numbers for 2 columns"):
        from_mapping(PublishedSet, {"title": "t", "columns": ["x", "y"], "rows": {"a": [1.0]}})


def test_table_1_of_tadsr_has_runtime_and_parameters_of_a_model_that_was_run() -> None:
    lpips = MetricRecord(title="LPIPS", higher_is_better=False, variant="AlexNet, v0.1")
    record = ProtocolRecord(name="tadsr", metrics={"lpips": lpips})
    images = {"a": {"lpips": 0.25}, "b": {"lpips": 0.35}}
    model = ModelRecord(name="sinsr", parameters=173_916_000, options={"device": "cuda"})
    ran = EvaluationResult(label="ours", protocol=record, images=images, model=model, seconds={"model": 0.5})
    grid = grid_of(ran, "tadsr-table1/imagenet-test")
    assert grid.rows[0] == ("ours", "0.300", NOTHING, NOTHING, "0.250", "173.92", NOTHING)
    assert next(row for row in grid.rows if row[0] == "SwinIR")[4:] == ("0.107", "28.01", NOTHING)
    assert any("runtime: on cuda, files and metrics left out" in note for note in grid.notes)
    alone = grid_of(replace(ran, model=None), "tadsr-table1/imagenet-test")
    assert alone.rows[0][4:] == (NOTHING, NOTHING, NOTHING)
