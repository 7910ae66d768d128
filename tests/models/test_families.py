"""One template for every family of generators: counts, weights files, sizes, conditions, stages and memory cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_diffusion import GENERATOR
from small_osediff import CONFIG as OSEDIFF
from small_seesr import CONFIG as SEESR
from torch import Tensor

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UserError
from onestepsr.models.architectures import ARCHITECTURES, build_network, describe, random_generator
from onestepsr.models.generators import BicubicGenerator, Generator, LatentGenerator
from onestepsr.models.loading import load_generator, load_network
from onestepsr.models.osediff.generator import OSEDiffGenerator, osediff_generator
from onestepsr.models.realesrgan.networks import RealESRGANConfig, RealESRGANGenerator
from onestepsr.models.resshift.config import TinyResidualShiftGeneratorConfig
from onestepsr.models.resshift.generator import residual_shift_generator, tiny_residual_shift_generator
from onestepsr.models.seesr.generator import seesr_generator
from onestepsr.models.stable_diffusion.networks import stable_diffusion_generator
from onestepsr.models.tiny.denoiser import TinyDenoiserConfig
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.weights.catalog import get_model
from onestepsr.weights.files import read_weights, save_model
from small import SMALL, SMALL_RESIDUAL
from weights_by_name import fill_by_name

PUBLISHED_COUNTS = {
    "random:sd21-base": 865_910_724 + 83_653_863 + 77 * 1024,
    "random:seesr": 1_126_760_324 + 489_031_440 + 83_653_863 + 2 * 77 * 1024,
    "random:resshift-realsr": 118_593_583 + 55_322_782,
    "random:sinsr": 118_593_583 + 55_322_782,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A small generator of a family."""

    build: Callable[[Any], Any]
    config: Any
    noise: bool = False
    """Whether it draws noise."""
    staged: bool = False
    """Whether its stages have tiles of their own."""

    def generator(self) -> LatentGenerator:
        """The same random weights at every call, which all matter."""
        torch.manual_seed(0)
        generator = self.build(self.config).eval().requires_grad_(False)
        fill_by_name(generator.unet if isinstance(generator, LatentGenerator) else generator)
        return generator


SMALL_TINY_RESIDUAL = TinyResidualShiftGeneratorConfig(
    denoiser=TinyDenoiserConfig(
        latent_channels=SMALL.latent_channels, widths=(8, 12), down_blocks=(1, 1), up_blocks=(1, 1), time_width=8
    ),
    autoencoder=SMALL,
)
AT_TWO = replace(GENERATOR, scale=2)  # one latent position per LR pixel
FAMILIES = {
    "tiny": Family(build=tiny_generator, config=TinyGeneratorConfig(model=SMALL, timestep=250)),
    "tiny noised": Family(
        build=tiny_generator, config=TinyGeneratorConfig(model=SMALL, timestep=500, noised=True), noise=True
    ),
    "stable diffusion": Family(build=stable_diffusion_generator, config=AT_TWO, staged=True),
    "stable diffusion x4": Family(build=stable_diffusion_generator, config=GENERATOR),
    "osediff": Family(build=osediff_generator, config=replace(OSEDIFF, scale=2), staged=True),
    "osediff sampled": Family(
        build=osediff_generator, config=replace(OSEDIFF, scale=2, posterior="sample"), noise=True, staged=True
    ),
    "seesr": Family(build=seesr_generator, config=replace(SEESR, scale=2), noise=True, staged=True),
    "resshift": Family(build=residual_shift_generator, config=SMALL_RESIDUAL, noise=True, staged=True),
    "realesrgan": Family(build=RealESRGANGenerator, config=RealESRGANConfig(blocks=1, width=8, growth=4)),
    "tiny resshift": Family(build=tiny_residual_shift_generator, config=SMALL_TINY_RESIDUAL, noise=True),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def image(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- sizes and counts ----


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_published_sizes_are_met_to_the_parameter(name: str) -> None:
    with torch.device("meta"):
        generator = random_generator(name)
    assert sum(parameter.numel() for parameter in generator.parameters()) == PUBLISHED_COUNTS[name]
    assert {parameter.device.type for parameter in generator.parameters()} == {"meta"}


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (17, 40)])
def test_any_size_gives_exactly_its_multiple(family: Family, size: tuple[int, int]) -> None:
    generator = family.generator()
    out = generator(image(*size))
    assert out.shape == (1, 3, *(generator.scale * side for side in size))
    assert out.dtype == torch.float32
    assert out.isfinite().all()


# ---- weights files ----


def test_a_file_gives_the_same_network_and_the_same_file(family: Family, tmp_path: Path) -> None:
    generator = family.generator()
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for source, path in ((generator, first), (None, second)):
        network = load_network(first) if source is None else source
        architecture, config = describe(network)
        save_model(path, architecture=architecture, config=config, state_dict=network.state_dict())
    assert first.read_bytes() == second.read_bytes()
    loaded = load_network(first)
    assert type(loaded) is type(generator)
    assert loaded.config == generator.config == from_mapping(ARCHITECTURES[architecture].config, config)
    lr = image(9, 6)
    assert torch.equal(loaded(lr), generator(lr))
    torch.testing.assert_close(load_generator(first)(lr), generator(lr), atol=1e-4, rtol=1e-3)


def test_other_weights_are_refused_in_one_line(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    generator = family.generator()
    architecture, config = describe(generator)
    state = generator.state_dict()
    key = next(iter(state))
    save_model(path, architecture=architecture, config=config, state_dict={k: state[k] for k in state if k != key})
    with pytest.raises(UserError, match=r"weights do not match their configuration|more than the \d+ weights") as error:
        load_network(path)
    assert "\n" not in str(error.value)
    save_model(path, architecture=architecture, config=config | {"surprise": 1}, state_dict=state)
    with pytest.raises(UserError, match=r"configuration does not fit .* unknown setting 'surprise'"):
        load_network(path)


def test_every_architecture_builds_what_its_configuration_describes() -> None:
    for name, architecture in ARCHITECTURES.items():
        with torch.device("meta"):
            network = build_network(name, to_mapping(architecture.config()), name)
        assert describe(network) == (name, to_mapping(architecture.config()))


@pytest.mark.parametrize("name", ["d3sr-tiny", "d3sr-tiny-fidelity"])
def test_bundled_files_are_saved_again_as_they_are(name: str, tmp_path: Path) -> None:
    network, path = load_network(name), tmp_path / "again.safetensors"
    architecture, config = describe(network)
    save_model(path, architecture=architecture, config=config, state_dict=network.state_dict())
    (_, stored, tensors), (_, again, copies) = read_weights(get_model(name).path), read_weights(path)
    assert again == to_mapping(from_mapping(TinyGeneratorConfig, stored))
    assert all(torch.equal(tensors[key], copies[key].to(tensors[key])) for key in copies.keys() | tensors.keys())


# ---- noise, prompts and stages ----


def test_noise_follows_from_seed_and_origin(family: Family) -> None:
    generator, lr = family.generator(), image(12, 16)
    one, same, other = (generator(lr, rng=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert torch.equal(generator(lr), generator(lr))
    moved = generator(lr, rng=seeded(1), origin=(64, 32))
    for changed in (other, moved):
        assert torch.equal(one, changed) is not family.noise
    assert generator.takes_batches is not family.noise


def test_a_prompt_matters_where_text_is_read(family: Family) -> None:
    generator, lr = family.generator(), image(6, 6)
    if not generator.reads_text:
        assert not isinstance(generator, OSEDiffGenerator)
        return
    prompt = torch.randn(1, 5, generator.prompt_width, generator=seeded())
    assert not torch.equal(generator(lr), generator(lr, prompt=prompt))
    assert torch.equal(generator(lr), generator(lr, prompt=generator.prompt))


def test_stages_one_after_the_other_are_the_generator(family: Family) -> None:
    generator = family.generator()
    if not generator.stages:
        pytest.skip("a generator without stages")
    side = max(16, generator.lr_multiple)
    lr, where = image(side, 2 * side), {"origin": (64, 32)}
    z_l = generator.encode_lr(lr, rng=seeded(), **where)
    z_h = generator.restore_latent(z_l, lr, rng=seeded(), **where)
    assert z_h.shape == z_l.shape
    assert z_l.shape[1] == generator.latent_channels
    assert torch.equal(generator.decode(z_h), generator(lr, rng=seeded(), **where))


# ---- memory cost ----


def test_memory_cost_follows_dtype_and_stage(family: Family) -> None:
    generator = family.generator()
    full, half = generator.memory_cost(torch.float32), generator.memory_cost(torch.bfloat16)
    swin = isinstance(generator, LatentGenerator) and "Swin" in type(generator.unet).__name__
    assert 0 < half.bytes_per_pixel <= 0.6 * full.bytes_per_pixel or swin
    assert tuple(full.stages) == (generator.stages if family.staged else ())
    for stage, cost in full.stages.items():
        assert 0 < cost.bytes_per_pixel <= 1.01 * full.bytes_per_pixel
        assert generator.lr_multiple % cost.multiple == 0
        if cost.takes_batches:
            continue
        assert family.noise
        assert stage == generator.noise_stage
    draws = [stage for stage, cost in full.stages.items() if not cost.takes_batches]
    assert len(draws) == (family.noise and family.staged)


def test_a_generator_that_says_nothing_has_the_defaults() -> None:
    for generator in (Generator(), BicubicGenerator()):
        assert (generator.scale, generator.lr_multiple, generator.stages) == (4, 1, ())
        assert generator.takes_batches
        assert not generator.reads_text
        costs = [generator.memory_cost(dtype).bytes_per_pixel for dtype in (torch.float32, torch.bfloat16)]
        assert costs[0] == 2 * costs[1] > 0
    with pytest.raises(NotImplementedError, match="Generator has no forward"):
        Generator()(image(2, 2))


@pytest.mark.parametrize("faster", [False, True])
def test_stage_costs_of_the_published_networks_are_the_measured_ones(faster: bool) -> None:
    """Bytes per output pixel in bfloat16, measured as growth of the resident size."""
    measured = {
        "random:sd21-base": {"encode": 847 if faster else 1370, "unet": 585, "decode": 1543 if faster else 1866},
        "random:resshift-realsr": {"encode": 951, "decode": 1657},
    }
    for name, stages in measured.items():
        with torch.device("meta"):
            generator = random_generator(name)
        if faster:
            generator.speed_up()
        costs = generator.memory_cost(torch.bfloat16).stages
        for stage, figure in stages.items():
            assert 16 * figure <= costs[stage].bytes_per_pixel <= 16 * 1.1 * figure, (name, stage)
        assert costs["unet"].multiple == generator.lr_multiple
        assert costs["encode"].attention_breakeven < costs["decode"].attention_breakeven


def test_every_family_is_here() -> None:
    """A new architecture of generators gets into this template."""
    families = {type(family.config) for family in FAMILIES.values()}
    built = {architecture.config for architecture in ARCHITECTURES.values()}
    others = {ARCHITECTURES[name].config for name in ("tiny-autoencoder", "stable-diffusion-encoder")}
    assert families == built - others
    assert len(list(itertools.chain(families, others))) == len(built)
