"""Distillation: what the teacher's pool holds, which terms there are, what each phase trains."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from onestepsr.core.config import to_mapping
from onestepsr.data.datasets import DataConfig, build_dataset
from onestepsr.imaging.resize import bicubic
from onestepsr.methods import distillation
from onestepsr.methods.base import SampleRandom
from onestepsr.methods.distillation import DiscriminatorsConfig, DistillationConfig, TeacherConfig
from onestepsr.methods.shared.image_loss import PerceptualConfig
from onestepsr.methods.shared.taught import TAUGHT, TaughtPool, Teacher, taught
from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyConfig
from onestepsr.weights.files import save_model

SMALL = TinyConfig(
    encoder_width=8, decoder_width=8, widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16
)
PYRAMID = PerceptualConfig(features="oriented")


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = TinyGeneratorConfig(model=SMALL)
    generator = tiny_generator(config)
    torch.nn.init.normal_(generator.unet.conv_out.weight, std=0.1)
    path = tmp_path / "backbone.safetensors"
    save_model(path, architecture="tiny-latent-diffusion", config=to_mapping(config), state_dict=generator.state_dict())
    return path


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    for number in range(3):
        pixels = torch.randint(0, 256, (48, 40, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return DataConfig(paths=(folder,), crop=32, degradation="camera", pool_size=4, cache_dir=tmp_path / "cache")


def config_for(backbone: Path, **changes: object) -> DistillationConfig:
    plain = DistillationConfig(backbone=str(backbone), teacher=TeacherConfig(model="bicubic"), perceptual=PYRAMID)
    return replace(plain, **changes)


def batch(side: int = 40) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hr, target = (torch.rand(2, 3, side, side, generator=rng) for _ in range(2))
    return {"hr": hr, "lr": torch.rand(2, 3, side // 4, side // 4, generator=rng), TAUGHT: target}


def losses(method, phase: int, samples: dict[str, Tensor]) -> dict[str, Tensor]:
    networks = {**method.networks, **method.frozen}
    return method.phases[phase].loss(networks, samples, SampleRandom("test", samples=range(2)))


def test_the_pool_keeps_the_teachers_answer_to_the_very_lr_image(data: DataConfig) -> None:
    pool = taught(build_dataset(data, 5), Teacher("bicubic", "float32"), data, 5)
    assert isinstance(pool, TaughtPool)
    pool.fill()
    entry = pool.entry(2)
    expected = (bicubic(entry["lr"][None], 4)[0].clamp(0, 1) * 255).round() / 255
    torch.testing.assert_close(entry[TAUGHT], expected, rtol=0, atol=1e-6)
    sample = pool[7]  # turned or mirrored, all three alike
    turned = (bicubic(sample["lr"][None], 4)[0].clamp(0, 1) * 255).round() / 255
    assert (sample[TAUGHT] - turned).abs().max() <= 1.01 / 255


def test_a_larger_pool_goes_on_where_a_smaller_one_ends(data: DataConfig) -> None:
    small = taught(build_dataset(data, 5), Teacher("bicubic", "float32"), data, 5)
    small.fill()

    class Silent(Teacher):
        def __call__(self, lr: Tensor) -> Tensor:
            raise AssertionError("asked again")

    larger = replace(data, pool_size=6)
    pool = taught(build_dataset(larger, 5), Silent("bicubic", "float32"), larger, 5)
    pool.fill(range(4))
    torch.testing.assert_close(pool.entry(3), small.entry(3), rtol=0, atol=0)
    with pytest.raises(AssertionError, match="asked again"):
        pool.entry(4)
    torch.testing.assert_close(small.entry(3), pool.entry(3), rtol=0, atol=0)  # never shortened
    other = taught(build_dataset(data, 5), Teacher("bicubic", "bfloat16"), data, 5)
    assert other.folder != small.folder


def test_shares_of_photo_and_teacher_are_terms_of_their_own(backbone: Path) -> None:
    method = distillation.build(config_for(backbone, pixel_photo=0.25, perceptual_photo=1.0))
    samples = batch()
    terms = losses(method, 0, samples)
    assert set(terms) == {"l1_photo", "l1_taught", "lpips_photo", "dists_photo"}
    with torch.no_grad():
        sr = method.networks["generator"](samples["lr"])[0]
    torch.testing.assert_close(terms["l1_photo"].detach(), 0.25 * (sr - samples["hr"]).abs().mean())
    torch.testing.assert_close(terms["l1_taught"].detach(), 0.75 * (sr - samples[TAUGHT]).abs().mean())


def test_a_student_that_equals_its_teacher_has_no_loss(backbone: Path) -> None:
    method = distillation.build(config_for(backbone, pixel_photo=0.0, perceptual_photo=0.0))
    samples = batch()
    with torch.no_grad():
        samples[TAUGHT] = method.networks["generator"](samples["lr"])[0]
    terms = losses(method, 0, samples)
    assert set(terms) == {"l1_taught", "lpips_taught", "dists_taught"}
    assert all(value.abs().item() < 1e-5 for value in terms.values())


def test_a_live_teacher_is_asked_for_every_batch(backbone: Path) -> None:
    teacher = TeacherConfig(model="bicubic", live=True)
    method = distillation.build(config_for(backbone, teacher=teacher, lpips_weight=0.0, dists_weight=0.0))
    assert method.targets is None
    samples = batch()
    del samples[TAUGHT]
    terms = losses(method, 0, samples)
    torch.testing.assert_close(samples[TAUGHT], bicubic(samples["lr"], 4).clamp(0, 1))
    with torch.no_grad():
        sr = method.networks["generator"](samples["lr"])[0]
    torch.testing.assert_close(terms["l1_taught"].detach(), 0.5 * (sr - samples[TAUGHT]).abs().mean())


@pytest.mark.parametrize("live", [False, True])
def test_without_a_part_for_the_teacher_it_is_never_asked(backbone: Path, live: bool) -> None:
    photo = {"pixel_photo": 1.0, "perceptual_photo": 1.0, "lattice_weight": 2.0}
    method = distillation.build(config_for(backbone, teacher=TeacherConfig(model="bicubic", live=live), **photo))
    assert method.targets is None
    assert distillation.TEACHER not in method.frozen
    samples = batch()
    del samples[TAUGHT]
    assert set(losses(method, 0, samples)) == {"l1_photo", "lattice", "lpips_photo", "dists_photo"}
    for change in (
        {"pixel_photo": 0.5},
        {"perceptual_photo": 0.5},
        {"discriminators": DiscriminatorsConfig(real="taught")},
    ):
        assert config_for(backbone, **photo | change).taught


def test_discriminators_join_at_their_start_and_learn_before(backbone: Path) -> None:
    settings = DiscriminatorsConfig(
        projected_weight=0.1, projected_maps=2, unet_weight=0.2, unet_widths=(4, 8), start=3, lead=2
    )
    method = distillation.build(config_for(backbone, discriminators=settings))
    assert [(phase.network, phase.start, phase.stop) for phase in method.phases] == [
        ("generator", 0, 3),
        ("generator", 3, None),
        ("projected", 1, None),
        ("unet", 1, None),
    ]
    for first in (0, 1):  # with and without judges, the student leaves what they learn from
        samples = batch()
        terms = losses(method, first, samples)
        assert {name for name in terms if name.startswith("adversarial")} == (
            {"adversarial_projected", "adversarial_unet"} if first else set()
        )
        for phase, name in ((2, "projected"), (3, "unet")):
            (value,) = losses(method, phase, samples).values()
            value.backward()
            trained = [p for p in method.networks[name].parameters() if p.requires_grad]
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        assert all(p.grad is None for p in method.networks["generator"].parameters())


def test_bad_weights_are_refused() -> None:
    for changes in (
        {"pixel_photo": 1.5},
        {"lpips_weight": -1.0},
        {"pixel_weight": 0, "lpips_weight": 0, "dists_weight": 0},
    ):
        with pytest.raises(ValueError, match=r"weight|photo"):
            DistillationConfig(backbone="x", **changes)
