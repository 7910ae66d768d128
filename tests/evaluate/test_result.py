"""The file format of results: exact round trips, strict reading, one line for everything that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation_results import NIQE, PSNR, make_result
from onestepsr.core.errors import UserError
from onestepsr.core.tables import safe_text
from onestepsr.evaluate import result as module
from onestepsr.evaluate.result import (
    EvaluationResult,
    Files,
    ModelRecord,
    ProtocolRecord,
    WholeValue,
    read_result,
    write_result,
)


@pytest.fixture
def full() -> EvaluationResult:
    fid = module.MetricRecord(title="FID", higher_is_better=False)
    protocol = ProtocolRecord(
        name="osediff",
        settings={"resize": "never", "crop_border": 0, "share": 0.5, "strict": True, "note": None},
        metrics={"psnr": PSNR, "niqe": NIQE, "fid": fid},
    )
    return EvaluationResult(
        label="d3sr-tiny",
        protocol=protocol,
        images={"a/ü": {"psnr": 25.0, "niqe": 5.25}, "b": {"psnr": 27.0}},
        whole={"fid": WholeValue(value=120.5, count=2)},
        model=ModelRecord(name="d3sr-tiny", sha256="ab" * 32, options={"tile": "auto"}),
        folders=Files(sr="made", hr="true"),
        files={"b": Files(sr="b.png", hr="b.jpg")},
        failed={"c": "is damaged"},
        unavailable={"lpips": "no weights"},
        seconds={"measuring": 1.5},
        machine={"cores": 2},
        date="2026-01-01T00:00:00+00:00",
    )


def test_what_is_written_is_read_again(full: EvaluationResult, tmp_path: Path) -> None:
    write_result(tmp_path / "r.json", full)
    assert read_result(tmp_path / "r.json") == full
    assert list(tmp_path.glob(".*")) == []


def test_the_file_holds_what_other_programs_rely_on(full: EvaluationResult) -> None:
    content = full.to_mapping()
    assert content["schema"] == 2
    assert content["mean"] == {"psnr": 26.0, "niqe": 5.25, "fid": 120.5}
    assert content["images"] == {"a/ü": {"psnr": 25.0, "niqe": 5.25}, "b": {"psnr": 27.0}}
    assert content["count"] == {"psnr": 2, "niqe": 1, "fid": 2}
    assert set(content["std"]) == set(content["interval95"]) == {"psnr"}
    assert content["protocol"]["name"] == "osediff"
    assert content["protocol"]["resize"] == "never"
    assert content["protocol"]["metrics"]["psnr"]["variant"] == PSNR.variant


def test_only_what_was_measured_is_a_metric() -> None:
    assert list(make_result("x", {"a": 1.0}, {"b": 2.0}).metrics) == ["psnr", "niqe"]
    empty = EvaluationResult(label="x", protocol=ProtocolRecord(name="p", metrics={"psnr": PSNR}), images={})
    assert empty.metrics == {}
    assert empty.summaries() == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"schema": 2, "x": NaN}', "NaN is not a number"),
        ("{}", "schema None is not"),
        ('{"schema": true}', "schema True is not"),
        ('{"schema": 9}', "schema 9 is not"),
        ('{"schema": 2, "label": "x"}', "'protocol' is missing"),
        ('{"schema": 1, "mean": {}, "images": {}}', "schema 1 is not"),
    ],
)
def test_a_bad_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_result(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown setting 'surprise'"),
        ({"label": 3}, "label: expected str"),
        ({"label": ""}, "label is empty"),
        ({"images": {"a": {"psnr": "high"}}}, "images.a.psnr: expected float"),
        ({"images": {"a": {"psnr": "inf"}}}, "expected a finite number"),
        ({"images": {"a": {"magic": 1.0}}}, "which the protocol does not describe"),
        ({"images": {"a": {"psnr": 1e308}, "b": {"psnr": 1e308}}}, r"bad\.json: .* the psnr 1e\+308, expected"),
        ({"images": {"a": {"psnr": 10**400}}}, r"bad\.json: images\.a\.psnr: expected float"),
        ({"mean": {"psnr": 99.0}}, "changed by hand"),
        ({"mean": {"psnr": 10**400}}, r"bad\.json: mean\.psnr is 10{39} but the images give 1\.5: the file was"),
        ({"mean": {}}, "changed by hand"),
        ({"mean": None}, "mean: expected a mapping"),
        ({"protocol": {"name": "p", "metrics": {}, "list": [1]}}, "protocol.settings.list"),
        ({"protocol": []}, "protocol: expected a mapping"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**make_result("x", {"a": 1.0, "b": 2.0}).to_mapping(), **change}))
    with pytest.raises(UserError, match=message):
        read_result(path)


def test_unreadable_and_oversized_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_result(tmp_path / "absent.json")
    (tmp_path / "long.json").write_text(" " * 100)
    monkeypatch.setattr(module, "MAX_RESULT_BYTES", 99)
    with pytest.raises(UserError, match="larger than 99 bytes"):
        read_result(tmp_path / "long.json")


def test_values_have_to_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        make_result("x", {"a": float("nan")})


def test_names_cannot_command_the_terminal() -> None:
    assert safe_text("a\x1b[31m\u202eb\udc80") == "a\ufffd[31m\ufffdb\ufffd"
    assert safe_text("naïve 画像") == "naïve 画像"
