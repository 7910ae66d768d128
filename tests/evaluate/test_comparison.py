"""Results side by side: common images, verdicts, and everything that keeps numbers from being comparable."""

from dataclasses import replace

import pytest

from evaluation_results import NIQE, PSNR, make_result
from onestepsr.core.errors import UserError
from onestepsr.evaluate.comparison import MAX_METHODS, compare
from onestepsr.evaluate.result import EvaluationResult, MetricRecord, ProtocolRecord, WholeValue

NAMES = [f"p{number}" for number in range(12)]
BASE = {name: 20.0 + number for number, name in enumerate(NAMES)}
JITTER = {name: 0.01 * (number % 5) for number, name in enumerate(NAMES)}


def shifted(change: float, names: list[str] = NAMES) -> dict[str, float]:
    return {name: BASE[name] + change + JITTER[name] for name in names}


def test_means_are_over_the_common_images() -> None:
    found = compare([make_result("a", BASE), make_result("b", shifted(1, NAMES[2:]))])
    assert found.common("psnr") == NAMES[2:]
    first, second = (row["psnr"] for row in found.summaries)
    assert (first.count, second.count) == (10, 10)
    assert first.mean == pytest.approx(26.5)
    assert found.warnings == ["a and b: only a has the images p0, p1; they are left out"]


def test_verdicts_know_what_is_better() -> None:
    first = make_result("a", BASE, BASE)
    found = compare([first, make_result("b", shifted(1), shifted(1)), make_result("c", BASE, shifted(-1))])
    verdicts = {(item.metric, found.labels[item.method]): item.verdict for item in found.differences}
    assert verdicts == {
        ("psnr", "b"): "better",
        ("psnr", "c"): "undecided",
        ("niqe", "b"): "worse",
        ("niqe", "c"): "better",
    }
    assert found.best("psnr") == {1}
    assert found.best("niqe") == {2}


def test_p_values_are_adjusted_for_their_number() -> None:
    found = compare([make_result("a", BASE, BASE), make_result("b", shifted(1), shifted(1))])
    smallest = 2 / 2 ** len(NAMES)
    assert [item.paired.p_wilcoxon for item in found.differences] == pytest.approx([smallest, smallest])
    assert [item.adjusted for item in found.differences] == pytest.approx([2 * smallest, 2 * smallest])


def test_few_images_decide_nothing() -> None:
    few = NAMES[:4]
    found = compare([make_result("a", {n: BASE[n] for n in few}), make_result("b", shifted(5, few))])
    assert found.differences[0].verdict == "undecided"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"protocol": "d3sr"}, "protocol 'osediff' against 'd3sr'"),
        ({"settings": {"crop_border": 4}}, "crop_border 0 against 4"),
        ({"psnr_record": replace(PSNR, variant="RGB")}, "against 'RGB'"),
        ({"psnr_record": replace(PSNR, higher_is_better=False)}, "better when higher in one and lower in the other"),
        ({"niqe": BASE}, "only one has NIQE"),
    ],
)
def test_other_rules_are_flagged(other: dict, message: str) -> None:
    found = compare([make_result("a", BASE), make_result("b", BASE, **other)])
    assert any(message in line for line in found.warnings), found.warnings
    assert compare([make_result("a", BASE), make_result("b", BASE)]).warnings == []


def test_metrics_of_whole_sets_stand_without_a_test() -> None:
    fid = MetricRecord(title="FID", higher_is_better=False)

    def of(label: str, value: float, names: list[str]) -> EvaluationResult:
        protocol = ProtocolRecord(name="p", metrics={"psnr": PSNR, "fid": fid})
        images = {name: {"psnr": BASE[name]} for name in names}
        whole = {"fid": WholeValue(value=value, count=len(names))}
        return EvaluationResult(label=label, protocol=protocol, images=images, whole=whole)

    found = compare([of("a", 100.0, NAMES), of("b", 90.0, NAMES[1:])])
    assert [row["fid"].mean for row in found.summaries] == [100.0, 90.0]
    assert {item.metric for item in found.differences} == {"psnr"}
    assert any("FID is of different sets (12 and 11 images)" in line for line in found.warnings)


def test_a_metric_of_one_result_only_keeps_its_own_images() -> None:
    found = compare([make_result("a", BASE), make_result("b", BASE, {"p3": 4.0})])
    assert "niqe" not in found.summaries[0]
    assert found.summaries[1]["niqe"].mean == 4.0
    assert found.metrics["niqe"] == NIQE


def test_equal_labels_are_numbered() -> None:
    found = compare([make_result("a", BASE), make_result("a", BASE), make_result("a", BASE)])
    assert found.labels == ["a", "a (2)", "a (3)"]


def test_nothing_in_common_is_one_line() -> None:
    with pytest.raises(UserError, match=r"no image is in all results .*'p0' and 'p5'"):
        compare([make_result("a", {"p0": 1.0}), make_result("b", {"p5": 1.0})])
    with pytest.raises(UserError, match="has no values"):
        compare([make_result("a", {})])
    with pytest.raises(UserError, match="expected 1 to 20"):
        compare([make_result(str(number), BASE) for number in range(MAX_METHODS + 1)])
