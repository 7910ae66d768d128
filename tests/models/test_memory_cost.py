"""Generators in three parts: the parts are the whole, and each says what it takes of a tile."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_diffusion import GENERATOR
from small_osediff import CONFIG as OSEDIFF

from onestepsr.imaging.read import LoadedImage
from onestepsr.inference.generator_cost import InputSize, MemoryCost
from onestepsr.inference.memory_plan import Planner
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
from onestepsr.models.loading import load_generator
from onestepsr.models.osediff.generator import osediff_generator
from onestepsr.models.resshift.config import (
    ResidualShiftGeneratorConfig,
    random_residual_generator,
    residual_shift_generator,
)
from onestepsr.models.stable_diffusion.config import StableDiffusionGeneratorConfig
from onestepsr.models.stable_diffusion.networks import stable_diffusion_generator

PLACE: dict[str, Any] = {"origin": (64, 32)}
LR = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = replace(GENERATOR, scale=2)


def prompt() -> dict[str, Any]:
    return {"prompt_embedding": torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))}


def generators() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """With what their encoder and their UNet stage take besides images and latents."""
    torch.manual_seed(0)
    sampled = osediff_generator(replace(OSEDIFF, scale=2, posterior="sample"))
    return {
        "d3sr": (stable_diffusion_generator(SMALL), {}, {}),
        "noised": (stable_diffusion_generator(replace(SMALL, noised=True)), {}, PLACE),
        "osediff": (sampled, PLACE, prompt()),
        "resshift": (random_residual_generator("resshift-micro"), {}, PLACE),
    }


def seeded(materialize: dict[str, Any]) -> dict[str, Any]:
    """Where a place is needed, the seed of the noise is too; every call draws from a generator of its own."""
    return {**materialize, "rng": torch.Generator().manual_seed(7)} if "origin" in materialize else materialize


@pytest.mark.parametrize("name", ["d3sr", "noised", "osediff", "resshift"])
def test_the_parts_one_after_the_other_are_the_generator(name: str) -> None:
    generator, encoding, restoring = generators()[name]
    generator.eval()
    with torch.inference_mode():
        whole = generator(LR, **seeded({**encoding, **restoring}))
        z_l = generator.encode_lr(LR, **seeded(encoding))
        parts = generator.decode(generator.restore_latent(z_l, LR, **seeded(restoring)))
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0.0)
        if restoring:
            other = generator.restore_latent(
                z_l, LR, **seeded({**restoring, "origin": (0, 0)} if encoding == {} else {})
            )
            assert not torch.allclose(generator.decode(other), whole, atol=1e-3)


@pytest.mark.parametrize("name", ["d3sr", "noised", "osediff", "resshift"])
def test_the_upscaler_gives_the_parts_what_they_take(name: str) -> None:
    """Of one tile after the other, each part is given what the whole is given; other noise or another prompt shows."""
    generator, encoding, restoring = generators()[name]
    seen: dict[str, list[dict[str, Any]]] = {"encode_lr": [], "restore_latent": []}
    for method, calls in seen.items():
        setattr(generator, method, recording(getattr(generator, method), calls))
    options = UpscaleOptions(
        scale=2.0, seed=3, color_fix="none", tile=96, prompt_embedding=restoring.get("prompt_embedding")
    )
    upscaler = Upscaler(generator, "cpu", "float32", name)
    image = LoadedImage(pixels=np.random.default_rng(0).integers(0, 256, (64, 150, 3), dtype=np.uint8))
    first, again = (upscaler.upscale_image(image, replace(options, tile_norms="tile")).pixels for _ in range(2))
    assert upscaler.last_plan is not None
    assert upscaler.last_plan.stages is not None
    assert np.array_equal(first, again)
    for method, wanted in (("encode_lr", encoding), ("restore_latent", restoring)):
        places = [materialize.get("origin") for materialize in seen[method][:2]]
        assert (places[0] == (0, 0) and places[1] not in (None, (0, 0))) is ("origin" in wanted)
        assert len({materialize["rng"].initial_seed() for materialize in seen[method] if "rng" in materialize}) == (
            "origin" in wanted
        )
        assert all(
            materialize.get("prompt_embedding") is wanted.get("prompt_embedding") for materialize in seen[method]
        )


def recording(method: Any, calls: list[dict[str, Any]]) -> Any:
    """``method``, which notes what it is given by name."""

    @functools.wraps(method)
    def call(*args: Any, **materialize: Any) -> Any:
        calls.append(materialize)
        return method(*args, **materialize)

    return call


def test_memory_and_attention_of_the_published_networks() -> None:
    with torch.device("meta"):
        diffusion = stable_diffusion_generator(StableDiffusionGeneratorConfig())
        resshift = residual_shift_generator(ResidualShiftGeneratorConfig())
    demands = diffusion.stage_costs(torch.bfloat16)
    assert demands is not None
    for stage, measured in (("encode", 1370), ("unet", 585), ("decode", 1866)):  # bytes per pixel of the output
        assert 16 * measured <= demands[stage].per_pixel <= 16 * 1.1 * measured
        assert demands[stage].multiple == (16 if stage == "unet" else 2)
    assert demands["unet"].balance < demands["encode"].balance < demands["decode"].balance
    diffusion.speed_up()
    lean = diffusion.stage_costs(torch.bfloat16)
    assert lean is not None
    for stage, measured in (("encode", 847), ("unet", 585), ("decode", 1543)):
        assert 16 * measured <= lean[stage].per_pixel <= 16 * 1.1 * measured
    shifted = resshift.stage_costs(torch.bfloat16)
    assert shifted is not None
    assert [shifted[stage].multiple for stage in shifted] == [1, 64, 1]
    assert [shifted[stage].balance for stage in shifted] == [28_000, math.inf, 62_000]
    for stage, measured in (("encode", 951), ("decode", 1657)):
        assert 16 * measured <= shifted[stage].per_pixel <= 16 * 1.1 * measured


@pytest.mark.parametrize(
    ("name", "together"),
    [("d3sr", (8, 8, 8)), ("noised", (8, 1, 8)), ("osediff", (1, 8, 8)), ("resshift", (8, 1, 8))],
)
def test_only_tiles_with_noise_of_their_own_go_one_by_one(name: str, together: tuple[int, ...]) -> None:
    demand = MemoryCost.of(generators()[name][0], torch.bfloat16, name)
    options = UpscaleOptions(tile=64, tile_batch=8)
    plan = Planner(InputSize(height=230, width=640), demand, options, torch.device("cpu")).plan()
    assert plan.stages is not None
    assert tuple(plan.stages[stage].batch for stage in ("encode", "unet", "decode")) == together


def test_small_networks_of_our_own_keep_to_one_tile_for_all() -> None:
    assert load_generator("random:d3sr-tiny").stage_costs(torch.float32) is None
    assert load_generator("random:resshift-tiny").stage_costs(torch.float32) is None
    coarse = stable_diffusion_generator(GENERATOR)
    assert coarse.stage_costs(torch.float32) is None, "two latent positions per LR pixel"
