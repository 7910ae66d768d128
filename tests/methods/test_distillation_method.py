"""Distillation: what the teacher's pool holds, which terms there are, what each phase trains."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError
from onestepsr.data.datasets import DataConfig, build_dataset
from onestepsr.imaging.resize import bicubic
from onestepsr.losses.perceptual import DISTS, LPIPS
from onestepsr.methods import distillation
from onestepsr.methods.base import SampleRandom
from onestepsr.methods.distillation import DiscriminatorsConfig, DistillationConfig, StudentLoss, TeacherConfig
from onestepsr.methods.shared.adversarial import shifted, warped
from onestepsr.methods.shared.image_loss import PerceptualConfig
from onestepsr.methods.shared.taught import TAUGHT, TaughtPool, Teacher, taught
from onestepsr.models.generators import BicubicGenerator
from onestepsr.models.tiny.generator import Depth, TinyGeneratorConfig, tiny_generator
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
    sizes = {path.name: path.stat().st_size for path in pool.folder.iterdir()}
    assert sizes["hr.bin"] == 6 * 3 * 32 * 32
    again = taught(build_dataset(data, 5), Silent("bicubic", "float32"), data, 5)
    torch.testing.assert_close(again.entry(3), pool.entry(3), rtol=0, atol=0)
    assert {path.name: path.stat().st_size for path in pool.folder.iterdir()} == sizes, "never shortened"
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


def test_the_distances_see_a_part_of_the_images_warped(backbone: Path) -> None:
    config = config_for(backbone, pixel_photo=1.0, perceptual_photo=1.0, perceptual_warped=1.0)
    method = distillation.build(config)
    samples = batch()
    terms = losses(method, 0, samples)
    with torch.no_grad():
        sr = method.networks["generator"](samples["lr"])[0]
        random = SampleRandom("test", samples=range(2))
        seen = warped(shifted([sr, samples["hr"]], random), random, 1.0)
        features, lpips = method.frozen[distillation.FEATURES], method.frozen[distillation.LPIPS_NETWORK]
        expected = config.lpips_weight * lpips(features, *seen).mean()
    torch.testing.assert_close(terms["l1_photo"].detach(), (sr - samples["hr"]).abs().mean())
    torch.testing.assert_close(terms["lpips_photo"].detach(), expected)


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
        {"discriminators": DiscriminatorsConfig(real="taught", unet_weight=0.1)},
        {"discriminators": DiscriminatorsConfig(real="taught", projected_weight=0.1)},
    ):
        assert config_for(backbone, **photo | change).taught
    unused = config_for(backbone, **photo, discriminators=DiscriminatorsConfig(real="taught"))
    assert set(losses(distillation.build(unused), 0, samples)) == {"l1_photo", "lattice", "lpips_photo", "dists_photo"}
    assert samples.keys() == {"lr", "hr"}


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


# ---- Terms with numbers worked out by hand ---------------------------------------------------------------------------


class Ladder(torch.nn.Module):
    """Features that can be worked out by hand: the image, then twice, three, four and five times it."""

    channels = (3, 3, 3, 3, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [number * x for number in range(1, 6)]


def logits_of(*maps: Tensor) -> tuple[Tensor, ...]:
    """A projected discriminator whose logits are the means of its maps."""
    return tuple(one.mean(dim=(1, 2, 3), keepdim=True) for one in maps)


def five_means(x: Tensor) -> Tensor:
    """A U-Net whose one logit is five times the mean of the image."""
    return 5 * x.mean(dim=(1, 2, 3), keepdim=True)


def plane(value: float, samples: int = 2, side: int = 40) -> Tensor:
    return torch.full((samples, 3, side, side), value)


def by_hand(
    config: DistillationConfig, samples: dict[str, Tensor], sr: Tensor, **networks: object
) -> dict[str, Tensor]:
    """Terms of a student that answers ``sr``."""
    frozen: dict[str, torch.nn.Module] = {}
    if config.lpips_weight + config.dists_weight:
        frozen = {"features": Ladder(), "lpips": LPIPS(Ladder.channels[1:]), "dists": DISTS(Ladder.channels)}
    known = {"generator": lambda lr: (sr, torch.zeros(1)), **frozen, **networks}
    loss = StudentLoss(config, frozen, tuple(name for name in ("projected", "unet") if name in networks))
    return loss(known, samples, SampleRandom("test", samples=range(len(sr))))


PIXELS_ALONE = {"lpips_weight": 0.0, "dists_weight": 0.0}


def test_artifact_term_weighs_pixel_errors_with_a_map_that_has_no_gradient(backbone: Path) -> None:
    """Residuals of 0 and 0.4 in turn: 24 of the 49 places around a pixel, or 25, have the other value, so the local
    variance of the sum over colours is 1.2^2 24 25 / 49^2, and that of the whole image 0.36 1600 / 1599."""
    rows = torch.arange(40)
    board = ((rows[:, None] + rows) % 2).float().expand(2, 3, 40, 40)
    sr = (0.25 + 0.4 * board).requires_grad_()
    config = config_for(backbone, pixel_photo=1.0, artifact_weight=0.5, **PIXELS_ALONE)
    terms = by_hand(config, {"hr": plane(0.25), "lr": plane(0.0, side=10)}, sr)
    weight = 1.44 * 24 * 25 / 49**2 * (0.36 * 1600 / 1599) ** 0.2
    assert terms["artifacts"].item() == pytest.approx(0.5 * weight * 0.2, rel=1e-4)
    (gradient,) = torch.autograd.grad(terms["artifacts"], sr)
    torch.testing.assert_close(gradient[board > 0], torch.full((4800,), 0.5 * weight / 9600), rtol=1e-4, atol=0)
    assert not gradient[board == 0].any()


def test_lattice_term_is_measured_to_the_mixture_of_photo_and_teacher(backbone: Path) -> None:
    """One of 16 places differs: 0.9 where the mixture has 0.25 0.8 + 0.75 0.4 = 0.5, so e = 0.4. Less the error that
    all places share, e^2 (15/256) is left; 4, as images in [-1, 1] are meant."""
    place = torch.zeros(40, 40)
    place[::4, ::4] = 1
    sr = (0.9 * place.expand(2, 3, 40, 40)).requires_grad_()
    samples = {"hr": 0.8 * place.expand(2, 3, 40, 40), TAUGHT: 0.4 * place.expand(2, 3, 40, 40), "lr": plane(0.0)}
    config = config_for(backbone, pixel_photo=0.25, lattice_weight=0.5, **PIXELS_ALONE)
    terms = by_hand(config, samples, sr)
    assert terms["lattice"].item() == pytest.approx(0.5 * 4 * 0.16 * 15 / 256, rel=1e-4)
    (gradient,) = torch.autograd.grad(terms["lattice"], sr)
    assert gradient[:, :, ::4, ::4].sum() > 0
    torch.testing.assert_close(gradient.sum(), torch.tensor(0.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["l1_photo", "l1_taught", "lattice", "lpips_photo", "lpips_taught", "dists_photo"])
def test_gradients_of_the_terms_are_their_slopes(backbone: Path, name: str) -> None:
    config = config_for(backbone, lattice_weight=0.5)
    rng = torch.Generator().manual_seed(1)
    samples = {key: image.double() for key, image in batch().items()}
    sr, direction = (torch.rand(2, 3, 40, 40, generator=rng, dtype=torch.float64) for _ in range(2))
    (gradient,) = torch.autograd.grad(by_hand(config, dict(samples), sr.requires_grad_())[name], sr)
    ahead, behind = (by_hand(config, dict(samples), sr + step * direction)[name].item() for step in (1e-6, -1e-6))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / 2e-6, rel=1e-4)


def test_a_live_teachers_image_is_clamped_and_has_no_graph(backbone: Path) -> None:
    gain = torch.ones(1, requires_grad=True)
    answer = torch.cat([plane(value, samples=1) for value in (-0.5, 0.5, 1.5)])
    samples = {"hr": plane(0.0, 3), "lr": plane(0.0, 3, 10)}
    config = config_for(backbone, pixel_photo=0.0, **PIXELS_ALONE)
    terms = by_hand(config, samples, plane(0.25, 3), teacher=lambda lr: gain * answer)
    assert samples[TAUGHT][:, 0, 0, 0].tolist() == [0.0, 0.5, 1.0]
    assert not samples[TAUGHT].requires_grad
    assert terms["l1_taught"].item() == pytest.approx((0.25 + 0.25 + 0.75) / 3)


def test_a_live_teacher_keeps_the_layers_that_were_trained(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for inference on a CPU would stand in the way of mixed precision."""
    replaced: list[torch.nn.Module] = []
    monkeypatch.setattr(BicubicGenerator, "speed_up", replaced.append)
    method = distillation.build(config_for(backbone, teacher=TeacherConfig(model="bicubic", live=True)))
    assert isinstance(method.frozen["teacher"], BicubicGenerator)
    assert not replaced


@pytest.mark.parametrize(("real", "value"), [("photo", 0.5), ("taught", 0.8)])
def test_judges_see_the_finest_maps_with_their_weights(backbone: Path, real: str, value: float) -> None:
    """An image of 0.2: the maps after it are 0.4 and 0.6, so -0.1 (0.4 + 0.6) / 2, and the U-Net's logit is 1."""
    settings = DiscriminatorsConfig(real=real, projected_weight=0.1, projected_maps=2, unet_weight=0.3)
    samples = {"hr": plane(0.5), "lr": plane(0.0, side=10), TAUGHT: plane(0.8)}
    sr = plane(0.2).requires_grad_()
    config = config_for(backbone, discriminators=settings)
    terms = by_hand(config, samples, sr, projected=logits_of, unet=five_means)
    assert terms["adversarial_projected"].item() == pytest.approx(-0.1 * 0.5)
    assert terms["adversarial_unet"].item() == pytest.approx(-0.3)
    for name, share in (("adversarial_projected", 0.1 * 2.5), ("adversarial_unet", 0.3 * 5)):
        (gradient,) = torch.autograd.grad(terms[name], sr, retain_graph=True)
        assert gradient.sum().item() == pytest.approx(-share, rel=1e-4)
    left = {name: image for name, image in samples.items() if name not in ("hr", "lr", TAUGHT)}
    expected = {"seen_sr": 0.2, "seen_sr1": 0.4, "seen_sr2": 0.6}
    expected |= {"seen_real": value, "seen_real1": 2 * value, "seen_real2": 3 * value}
    assert {name: image.mean().item() for name, image in left.items()} == pytest.approx(expected, rel=1e-5)
    assert not any(image.requires_grad for image in left.values())


def test_features_of_what_is_real_are_left_where_no_distance_looks_at_it(backbone: Path) -> None:
    settings = DiscriminatorsConfig(projected_weight=0.1, projected_maps=1)
    samples = {"hr": plane(0.5), "lr": plane(0.0, side=10), TAUGHT: plane(0.8)}
    config = config_for(backbone, discriminators=settings, pixel_photo=0.0, perceptual_photo=0.0)
    assert set(by_hand(config, samples, plane(0.2))) == {"l1_taught", "lpips_taught", "dists_taught"}
    assert samples["seen_real1"].mean().item() == pytest.approx(1.0)


def test_defaults_leave_every_addition_out() -> None:
    config = DistillationConfig(backbone="x")
    assert (config.teacher.model, config.teacher.dtype, config.teacher.live) == ("realesrgan-x4plus", "auto", False)
    assert (config.timestep, config.deepen, config.even_contrast, config.train_encoder) == (399, None, False, False)
    assert (config.pixel_weight, config.lpips_weight, config.dists_weight) == (1.0, 0.1, 0.1)
    assert (config.pixel_photo, config.perceptual_photo) == (0.5, 0.5)
    assert (config.lattice_weight, config.artifact_weight) == (0.0, 0.0)
    settings = config.discriminators
    assert (settings.projected_weight, settings.projected_maps, settings.unet_weight) == (0.0, 4, 0.0)
    assert (settings.unet_widths, settings.start, settings.lead) == ((32, 64, 96), 0, 0)


def test_what_no_discriminator_will_see_is_not_kept(backbone: Path) -> None:
    samples = batch()
    by_hand(config_for(backbone), samples, plane(0.2))
    assert set(samples) == {"hr", "lr", TAUGHT}
    settings = DiscriminatorsConfig(unet_weight=0.1)
    by_hand(config_for(backbone, discriminators=settings), samples, plane(0.2), unet=five_means)
    assert set(samples) == {"hr", "lr", TAUGHT, "seen_sr", "seen_real"}, "no maps without a projected one"


def test_both_discriminators_learn_by_the_hinge(backbone: Path) -> None:
    """The projected one: (1 + 0.25) + (1 - 0.5), and (1 + 0) + (1 + 0.5), in the mean; the U-Net, whose
    logits on restored images are 1, -0.5 and -2: (2 + 0.5 + 0) / 3 + 0.5."""
    settings = DiscriminatorsConfig(projected_weight=0.1, projected_maps=2, unet_weight=0.2)
    _, projected, unet = distillation.build(config_for(backbone, discriminators=settings)).phases
    samples = {"seen_real1": plane(0.5), "seen_real2": plane(-0.5), "seen_sr1": plane(0.25), "seen_sr2": plane(0.0)}
    samples |= {
        "seen_real": plane(0.1, 3),
        "seen_sr": -0.1 * torch.tensor([-2.0, 1, 4])[:, None, None, None] * plane(1.0, 3),
    }
    random = SampleRandom("test", samples=range(3))
    terms = projected.loss({"projected": logits_of}, samples, random)
    terms |= unet.loss({"unet": five_means}, samples, random)
    expected = {"projected": (1.75 + 2.5) / 2, "unet": (2 + 0.5 + 0) / 3 + 0.5}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)


def test_every_term_teaches_the_student(backbone: Path) -> None:
    settings = DiscriminatorsConfig(projected_weight=0.1, projected_maps=2, unet_weight=0.2, unet_widths=(4, 8))
    torch.manual_seed(0)
    method = distillation.build(config_for(backbone, artifact_weight=0.5, lattice_weight=0.5, discriminators=settings))
    student = method.networks["generator"]
    terms = losses(method, 0, batch())
    assert len(terms) == 10
    for name, term in terms.items():
        student.zero_grad()
        term.backward(retain_graph=True)
        assert any(p.grad is not None and p.grad.any() for p in student.generator.unet.parameters()), name


# ---- What is built ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "taught"),
    [
        ({"pixel_weight": 0.2}, True),
        ({"pixel_weight": 0.0, "dists_weight": 0.0}, True),
        ({"pixel_photo": 1.0, "dists_weight": 0.0}, True),
        ({"pixel_weight": 0.0, "perceptual_photo": 1.0, "lattice_weight": 0.1}, True),
        ({"pixel_weight": 0.0, "perceptual_photo": 1.0}, False),
        ({"pixel_photo": 1.0, **PIXELS_ALONE}, False),
    ],
)
def test_the_teacher_is_asked_where_a_weight_remains_for_it(
    backbone: Path, changes: dict[str, float], taught: bool
) -> None:
    assert config_for(backbone, **changes).taught == taught
    assert (distillation.build(config_for(backbone, **changes)).targets is not None) == taught


@pytest.mark.parametrize(("lpips", "dists"), [(0.1, 0.0), (0.0, 0.1), (0.2, 0.1)])
def test_one_distance_alone_can_be_used(backbone: Path, lpips: float, dists: float) -> None:
    method = distillation.build(
        config_for(backbone, lpips_weight=lpips, dists_weight=dists, pixel_photo=1.0, perceptual_photo=1.0)
    )
    expected = {"l1_photo"} | ({"lpips_photo"} if lpips else set()) | ({"dists_photo"} if dists else set())
    assert set(losses(method, 0, batch())) == expected


def test_targets_are_the_pool_of_the_configured_teacher(backbone: Path, data: DataConfig) -> None:
    method = distillation.build(config_for(backbone, teacher=TeacherConfig(model="bicubic", dtype="bfloat16")))
    assert method.targets is not None
    pool = method.targets(build_dataset(data, 5), data, 5)
    assert isinstance(pool, TaughtPool)
    assert pool.folder == taught(build_dataset(data, 5), Teacher("bicubic", "bfloat16"), data, 5).folder


def test_a_student_is_changed_only_as_asked(backbone: Path) -> None:
    plain = distillation.build(config_for(backbone)).networks["generator"].generator
    assert (plain.config.model.even_contrast, plain.config.model.decoder_blocks) == (False, SMALL.decoder_blocks)
    assert plain.timestep == 399
    changes = {"deepen": Depth(decoder_blocks=SMALL.decoder_blocks + 1), "even_contrast": True, "timestep": 250}
    changed = distillation.build(config_for(backbone, **changes)).networks["generator"].generator
    assert (changed.config.model.even_contrast, changed.config.model.decoder_blocks) == (True, SMALL.decoder_blocks + 1)
    assert changed.timestep == 250


@pytest.mark.parametrize("encoder", [False, True])
def test_the_encoder_is_trained_only_on_request(backbone: Path, encoder: bool) -> None:
    method = distillation.build(config_for(backbone, train_encoder=encoder))
    trained = {name for name, p in method.networks["generator"].generator.named_parameters() if p.requires_grad}
    assert any(name.startswith("autoencoder.decoder") for name in trained)
    assert any(name.startswith("unet.") for name in trained)
    assert any(name.startswith("autoencoder.encoder") for name in trained) == encoder
    assert (method.scale, method.hr_multiple) == (4, 8)


def test_a_projected_discriminator_has_a_head_for_each_of_its_maps(backbone: Path) -> None:
    for count in (1, 3, 4):
        settings = DiscriminatorsConfig(projected_weight=0.1, projected_maps=count)
        method = distillation.build(config_for(backbone, discriminators=settings))
        assert len(method.networks["projected"].heads) == count
    settings = DiscriminatorsConfig(projected_weight=0.1, projected_maps=5)
    with pytest.raises(UserError, match="projected_maps: 5, but 'oriented' has 4 maps"):
        distillation.build(config_for(backbone, discriminators=settings))
    with pytest.raises(UserError, match="needs features"):
        distillation.build(config_for(backbone, discriminators=settings, **PIXELS_ALONE))


def test_the_preview_shows_the_teacher_where_there_is_one(backbone: Path) -> None:
    method = distillation.build(config_for(backbone))
    assert method.preview is not None
    samples = batch()
    samples["lr"] = samples["lr"].round()  # black and white: bicubic enlargement goes beyond both
    sr = torch.cat([plane(-0.5, 1), plane(1.5, 1)])
    networks = {"generator": lambda lr: (sr, torch.zeros(2, 4, 10, 10))}
    shown = method.preview(networks, samples)
    assert list(shown) == ["LR (bicubic)", "SR", "teacher", "HR"]
    torch.testing.assert_close(shown["LR (bicubic)"], bicubic(samples["lr"], 4).clamp(0, 1))
    torch.testing.assert_close(shown["SR"], torch.cat([plane(0.0, 1), plane(1.0, 1)]))
    assert torch.equal(shown["teacher"], samples[TAUGHT])
    assert torch.equal(shown["HR"], samples["hr"])
    del samples[TAUGHT]
    assert list(method.preview(networks, samples)) == ["LR (bicubic)", "SR", "HR"]
