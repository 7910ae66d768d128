"""Protocols, and measuring images of which some cannot be measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sample_images import noisy, samples, scene
from torch import Tensor

from onestepsr.core.errors import UserError
from onestepsr.evaluate.metrics.catalog import METRICS, MetricSpec, select_metrics
from onestepsr.evaluate.metrics.fidelity import psnr_y, ssim_y
from onestepsr.evaluate.protocols import PROTOCOLS, Protocol, applicable, get_protocol
from onestepsr.evaluate.run import Problem, Scorer

BASIC = PROTOCOLS["basic"]
ALL = Protocol(name="test", summary="", metrics=("psnr", "ssim", "grid"))


def scorer(protocol: Protocol = ALL, *extra: MetricSpec) -> Scorer:
    return Scorer([*(METRICS[name] for name in protocol.metrics), *extra], protocol)


def failing(error: Exception, *, when: str) -> MetricSpec:
    """A metric that fails when loaded or when used."""

    def use(sr: Tensor) -> Tensor:
        raise error

    def load() -> object:
        if when == "loading":
            raise error
        return use

    return MetricSpec(name="broken", title="broken", higher_is_better=True, alone=load)  # type: ignore[arg-type]


def test_values_are_those_of_the_functions() -> None:
    hr = scene(40, 44)
    sr = (noisy(hr, 0.05) * 255).round() / 255
    score = scorer().score("a", samples(sr), samples(hr))
    assert score.values["psnr"] == pytest.approx(psnr_y(sr, hr).item(), abs=1e-9)
    assert score.values["ssim"] == pytest.approx(ssim_y(sr, hr).item(), abs=1e-9)
    assert (list(score.values), score.problems) == (["psnr", "ssim", "grid"], [])


def test_a_border_and_a_crop_are_cut_from_both() -> None:
    hr = scene(48, 60)
    sr = torch.zeros_like(hr)
    sr[..., 3:-3, 3:-3] = hr[..., 3:-3, 3:-3]
    border = scorer(replace(ALL, crop_border=3)).score("a", samples(sr), samples(hr))
    assert border.values["psnr"] == pytest.approx(80.0)
    centre = scorer(replace(ALL, crop=40)).score("a", samples(sr), samples(hr))
    assert centre.values["psnr"] == pytest.approx(80.0)
    whole = scorer().score("a", samples(sr), samples(hr))
    assert whole.values["psnr"] < 40


def test_what_is_too_small_for_a_crop_or_border_is_told() -> None:
    small = samples(scene(20, 30))
    crop = scorer(replace(ALL, crop=24)).score("a", small, small, "a.png")
    assert list(map(str, crop.problems)) == ["a.png: 30 x 20: protocol test measures 24 x 24 pixels"]
    border = scorer(replace(ALL, crop_border=10)).score("a", small, small, "a.png")
    assert "border of 10" in border.problems[0].reason


def test_different_sizes_are_told_or_made_equal_as_asked() -> None:
    hr = scene(40, 44)
    shorter = samples(hr[..., :38, :])
    refused = scorer().score("a", shorter, samples(hr), "sr/a.png against hr/a.png")
    assert refused.values == {}
    assert str(refused.problems[0]).startswith("sr/a.png against hr/a.png: SR is 44 x 38 but HR is 44 x 40")
    cut = scorer(replace(ALL, resize="crop")).score("a", shorter, samples(hr))
    assert cut.values["psnr"] == pytest.approx(80.0)
    for resize in ("sr-to-hr", "hr-to-sr"):
        resized = scorer(replace(ALL, resize=resize)).score("a", shorter, samples(hr))
        assert 10 < resized.values["psnr"] < 60


def test_gray_is_not_compared_with_colour() -> None:
    hr = samples(scene(24, 24))
    gray = hr[..., :1]
    one, other = scorer().score("a", gray, hr), scorer().score("a", hr, gray)
    assert "SR is gray but HR has colour" in one.problems[0].reason
    assert "SR has colour but HR is gray" in other.problems[0].reason
    in_three = np.repeat(gray, 3, axis=2)
    assert scorer().score("a", gray, in_three).values["psnr"] == pytest.approx(80.0)


def test_one_metric_that_fails_leaves_the_others() -> None:
    small = samples(scene(9, 9))
    score = scorer().score("a", small, small, "a.png")
    assert list(score.values) == ["psnr", "grid"]
    reason = "SSIM needs at least 11 x 11 pixels, got 9 x 9"
    assert score.problems == [Problem(files="a.png", metric="ssim", reason=reason)]
    assert str(score.problems[0]) == f"a.png: ssim: {reason}"
    lack = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")
    for error, message in (
        (UserError("no good"), "no good"),
        *((e, "not enough memory") for e in (MemoryError(), lack)),
    ):
        score = scorer(ALL, failing(error, when="using")).score("a", small, small)
        assert message in score.problems[-1].reason
        assert "psnr" in score.values
    defect = scorer(ALL, failing(RuntimeError("a defect"), when="using"))
    with pytest.raises(RuntimeError, match="a defect"):
        defect.score("a", small, small)


def test_values_that_are_no_numbers_are_problems() -> None:
    nan = MetricSpec(
        name="broken", title="", higher_is_better=True, alone=lambda: lambda sr: torch.tensor([float("nan")])
    )
    score = scorer(ALL, nan).score("a", *[samples(scene(20, 20))] * 2)
    assert "gives nan" in score.problems[0].reason
    assert "broken" not in score.values


def test_what_cannot_be_loaded_is_kept_with_the_reason() -> None:
    broken = failing(UserError("install it"), when="loading")
    several = scorer(ALL, broken)
    assert several.unavailable == {"broken": "install it"}
    assert list(several.score("a", *[samples(scene(20, 20))] * 2).values) == ["psnr", "ssim", "grid"]
    with pytest.raises(UserError, match=r"nothing can be measured here \(broken: install it"):
        Scorer([broken], BASIC)


def test_values_do_not_depend_on_the_number_of_threads() -> None:
    names = ("psnr", "psnr_rgb", "ssim", "ssim_rgb", "ssim_basicsr", "ms_ssim", "overshoot", "grid")
    several = Scorer([METRICS[name] for name in names], BASIC)
    pair = [samples(scene(190, 210, seed)) for seed in range(2)]
    before, values = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            values.append(several.score("a", *pair).values)
    finally:
        torch.set_num_threads(before)
    assert set(values[0]) == set(names)
    assert values[0] == values[1]


class MeanDifference:
    """A metric of sets: by how much the mean levels differ."""

    def features(self, image: Tensor) -> Tensor:
        return image.mean(dim=(2, 3)).double()

    def distance(self, sr: Tensor, hr: Tensor) -> float:
        if len(sr) < 2:
            raise UserError("needs two")
        return float((sr.mean(0) - hr.mean(0)).abs().sum())


def test_metrics_of_sets_have_one_value_for_all_images() -> None:
    spec = MetricSpec(name="sets", title="sets", higher_is_better=False, of_sets=MeanDifference)
    several = scorer(ALL, spec)
    first = several.score("a", *[samples(torch.full((1, 3, 16, 16), level)) for level in (0.2, 0.4)])
    assert "sets" not in first.values
    assert several.whole([first]) == ({}, {"sets": "needs two"})
    second = several.score("b", *[samples(torch.full((1, 3, 16, 16), level)) for level in (0.6, 1.0)])
    values, unavailable = several.whole([first, second])
    assert (values["sets"].count, unavailable) == (2, {})
    assert values["sets"].value == pytest.approx(0.9, abs=1e-6)


def test_protocols_say_what_they_are() -> None:
    for name, protocol in PROTOCOLS.items():
        assert (protocol.name, get_protocol(name)) == (name, protocol)
        assert set(protocol.metrics) <= METRICS.keys()
        alone = [metric.name for metric in applicable(protocol, with_reference=False)]
        assert alone == [name for name in protocol.metrics if not METRICS[name].needs_reference]
    osediff = PROTOCOLS["osediff"].record(applicable(PROTOCOLS["osediff"], with_reference=True), scale=4)
    assert osediff.settings["pictures"] == "crops"
    assert (osediff.settings["crop"], osediff.settings["scale"]) == (512, 4)
    assert osediff.metrics["psnr"].variant == "Y of BT.601 studio range, not rounded"
    assert PROTOCOLS["d3sr"].record([]).settings["pictures"] == "whole"
    with pytest.raises(UserError, match="did you mean 'osediff'"):
        get_protocol("osedif")
    with pytest.raises(UserError, match="accepted: never, crop"):
        replace(BASIC, resize="always")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="0 pixels and more"):
        replace(BASIC, crop_border=-1)


def test_metrics_are_chosen_by_name() -> None:
    assert [spec.name for spec in select_metrics(["grid", "psnr", "grid"], with_reference=True)] == ["grid", "psnr"]
    with pytest.raises(UserError, match="did you mean 'psnr'"):
        select_metrics(["pnsr"], with_reference=True)
    with pytest.raises(UserError, match="give --hr, or choose from niqe"):
        select_metrics(["psnr"], with_reference=False)
    with pytest.raises(UserError, match="no metric chosen"):
        select_metrics([], with_reference=True)


def test_every_metric_is_keyed_by_its_own_name_and_has_one_function() -> None:
    for name, spec in METRICS.items():
        assert spec.name == name
        assert [spec.against, spec.alone, spec.of_sets].count(None) == 2
        assert spec.record.variant
    variants = [(spec.title, spec.variant) for spec in METRICS.values()]
    assert len(set(variants)) == len(variants)
