"""Distillation: any model that enlarges teaches a one-step generator, beside the photo and in any mixture with it.

A deterministic teacher's answer to an LR image is a target without ambiguity: regression to it comes out sharp where
regression to photos, of which many fit one LR image, comes out blurred. The teacher's images are made once, before
training, and kept on disk (:mod:`onestepsr.methods.shared.taught`); the student sees exactly the teacher's LR image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError
from onestepsr.data.datasets import TAUGHT, DataConfig
from onestepsr.imaging.resize import bicubic
from onestepsr.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss
from onestepsr.losses.perceptual import DISTS, LPIPS, artifact_map, lattice_loss
from onestepsr.methods.base import (
    Batch,
    Exported,
    LossFn,
    Method,
    Networks,
    Phase,
    SampleRandom,
    check_timestep,
    exported,
    register,
)
from onestepsr.methods.shared.adversarial import shifted, warped
from onestepsr.methods.shared.image_loss import PerceptualConfig, build_perceptual
from onestepsr.methods.shared.taught import Teacher, taught
from onestepsr.models.backbones import load_backbone
from onestepsr.models.generators import OneStepLatentGenerator, TrainableGenerator
from onestepsr.models.image_discriminators import ProjectedDiscriminator, UNetDiscriminator
from onestepsr.models.loading import load_generator
from onestepsr.models.tiny.generator import Depth, deepened, equalize_subpixel_contrast

FEATURES, LPIPS_NETWORK, DISTS_NETWORK, TEACHER = "features", "lpips", "dists", "teacher"
PROJECTED, UNET = "projected", "unet"
SEEN_SR, SEEN_REAL = "seen_sr", "seen_real"
"""Keys in the batch of what the student's phase leaves for the discriminators: images cut at one random place, and,
with a number behind, the maps of their features."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model that makes the targets."""

    model: str = "realesrgan-x4plus"
    """Name or file of any model that enlarges as many times as the student."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype it computes in; a live teacher computes as ``train.mixed_precision`` says."""
    live: bool = False
    """Ask it for every batch, on the device of the training, instead of once beforehand: on a GPU that takes no longer
    than the student's own step, and no crop is ever seen twice."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorsConfig:
    """Discriminators of images; the student's images are fake, and the loss is the hinge loss."""

    real: Literal["photo", "taught"] = "photo"
    """Whose images are real. The teacher's are sharp and free of the noise and compression that photos have, which a
    small student can only imitate by patterns."""
    projected_weight: float = 0.0
    """Weight of the adversarial term of a projected discriminator on the maps of ``perceptual``'s features; 0 leaves it
    out."""
    projected_maps: int = 4
    """Number of those maps that it sees, the finest first."""
    unet_weight: float = 0.0
    """Weight of the adversarial term of a U-Net with a logit per pixel; 0 leaves it out."""
    unet_widths: tuple[int, ...] = (32, 64, 96)
    """Its channels at a half, a quarter, ... of the image's resolution."""
    start: int = 0
    """First iteration in which they judge."""
    lead: int = 0
    """Iterations before ``start`` in which they learn already, on images that they have no part in yet."""

    def __post_init__(self) -> None:
        if min(self.projected_weight, self.unet_weight) < 0 or not 0 <= self.lead <= self.start:
            raise ValueError(f"need weights of at least 0 and 0 <= lead <= start, got {self}")
        if self.projected_maps < 1 or not self.unet_widths:
            raise ValueError(f"need at least one map and one width, got {self}")

    @property
    def used(self) -> bool:
        """True if there is any."""
        return self.projected_weight + self.unet_weight > 0


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Student, teacher and loss weights."""

    backbone: str
    """The student to start from: a name or a file of ours, as for the method ``d3sr``."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The model that makes the targets."""
    deepen: Depth | None = None
    """Residual blocks that a tiny student shall have; new ones start as the identity."""
    even_contrast: bool = False
    """Train a tiny student through :class:`onestepsr.models.tiny.networks.EvenContrast`."""
    timestep: int = 399
    """T_L, the fixed step of the UNet evaluation."""
    train_encoder: bool = False
    """Also train the autoencoder's encoder."""
    pixel_weight: float = 1.0
    """Weight of the mean absolute error of images in [0, 1]."""
    pixel_photo: float = 0.5
    """Part of that error which is measured against the photo; the rest is against the teacher's image."""
    lpips_weight: float = 0.1
    """Weight of LPIPS over the features that ``perceptual`` names; its ``distance`` is not used."""
    dists_weight: float = 0.1
    """Weight of DISTS over the same features."""
    perceptual: PerceptualConfig = field(default_factory=lambda: PerceptualConfig(features="efficientnet-lite0"))
    """Features of both distances."""
    perceptual_photo: float = 0.5
    """Part of both distances which is measured to the photo; the rest is to the teacher's image."""
    perceptual_warped: float = 0.0
    """Part of the samples that the features see turned and enlarged by chance, so that no pattern of single pixels can
    flatter them (:func:`onestepsr.methods.shared.adversarial.warped`)."""
    lattice_weight: float = 0.0
    """Weight of the penalty on patterns locked to the latent grid, in [-1, 1]."""
    artifact_weight: float = 0.0
    """Weight of the photo's pixel errors multiplied with the map of likely artefacts
    (:func:`onestepsr.losses.perceptual.artifact_map`)."""
    discriminators: DiscriminatorsConfig = field(default_factory=DiscriminatorsConfig)
    """Discriminators of images."""

    def __post_init__(self) -> None:
        weights = (self.pixel_weight, self.lpips_weight, self.dists_weight, self.lattice_weight, self.artifact_weight)
        if min(weights) < 0 or not sum(weights[:3]):
            raise ValueError("loss weights must not be negative, and one of pixel, LPIPS and DISTS must be positive")
        for name in ("pixel_photo", "perceptual_photo", "perceptual_warped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0..1, got {getattr(self, name)}")

    @property
    def taught(self) -> bool:
        """True if any term looks at the teacher's images; without one they are not made."""
        pixel = (self.pixel_weight + self.lattice_weight) * (1 - self.pixel_photo)
        perceptual = (self.lpips_weight + self.dists_weight) * (1 - self.perceptual_photo)
        return pixel + perceptual > 0 or (self.discriminators.used and self.discriminators.real == "taught")


@register("distillation", DistillationConfig)
def build(config: DistillationConfig) -> Method:
    """The student's phase, alone at first, then with its discriminators; then theirs."""
    generator = _prepare_student(config)
    frozen = _perceptual_networks(config)
    networks: dict[str, nn.Module] = {"generator": TrainableGenerator(generator)} | _discriminators(config, frozen)
    teacher = Teacher(config.teacher.model, config.teacher.dtype)
    if config.teacher.live and config.taught:
        frozen[TEACHER] = load_generator(config.teacher.model, faster=False)

    def targets(source: Any, data: DataConfig, seed: int) -> Any:
        return taught(source, teacher, data, seed)

    return Method(
        networks=networks,
        frozen=frozen,
        phases=_phases(config, frozen, tuple(name for name in (PROJECTED, UNET) if name in networks)),
        ema=("generator",),
        preview=partial(_preview, generator.scale),
        export=_export,
        targets=targets if config.taught and not config.teacher.live else None,
        scale=generator.scale,
        hr_multiple=generator.scale * generator.lr_multiple,
    )


def _discriminators(config: DistillationConfig, frozen: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    settings = config.discriminators
    networks: dict[str, nn.Module] = {}
    if settings.projected_weight:
        if FEATURES not in frozen:
            raise UserError(
                "config.discriminators.projected_weight: needs features, so an lpips_weight or dists_weight"
            )
        channels = cast(Sequence[int], frozen[FEATURES].channels)[1:]
        if settings.projected_maps > len(channels):
            raise UserError(
                f"config.discriminators.projected_maps: {settings.projected_maps}, but '{config.perceptual.features}' "
                f"has {len(channels)} maps"
            )
        networks[PROJECTED] = ProjectedDiscriminator(channels[: settings.projected_maps])
    if settings.unet_weight:
        networks[UNET] = UNetDiscriminator(settings.unet_widths)
    return networks


def _phases(config: DistillationConfig, frozen: Mapping[str, nn.Module], judges: tuple[str, ...]) -> tuple[Phase, ...]:
    settings = config.discriminators
    alone = StudentLoss(config, frozen, ())
    if not judges:
        return (Phase(network="generator", loss=alone),)
    phases = [Phase(network="generator", loss=StudentLoss(config, frozen, judges), start=settings.start)]
    if settings.start:
        phases.insert(0, Phase(network="generator", loss=alone, stop=settings.start))
    learn: dict[str, LossFn] = {PROJECTED: partial(_projected_loss, settings.projected_maps), UNET: _unet_loss}
    first = settings.start - settings.lead
    return (*phases, *(Phase(network=name, loss=learn[name], start=first) for name in judges))


def _prepare_student(config: DistillationConfig) -> OneStepLatentGenerator:
    generator = load_backbone(config.backbone, for_training=True)
    check_timestep(config.timestep, generator, config.backbone)
    generator = deepened(generator, config.deepen) if config.deepen else generator
    generator = equalize_subpixel_contrast(generator) if config.even_contrast else generator
    generator.config = replace(generator.config, timestep=config.timestep)
    for name, parameter in generator.autoencoder.named_parameters():
        parameter.requires_grad_(config.train_encoder or name.startswith("decoder"))
    return generator


def _perceptual_networks(config: DistillationConfig) -> dict[str, nn.Module]:
    """Feature network and distances, for :attr:`Method.frozen`; empty without such a term."""
    if not config.lpips_weight + config.dists_weight:
        return {}
    features, dists = build_perceptual(_with_distance(config.perceptual, "dists"))
    _, lpips = build_perceptual(_with_distance(config.perceptual, "lpips"))
    return {FEATURES: features, DISTS_NETWORK: dists, LPIPS_NETWORK: lpips}


def _with_distance(config: PerceptualConfig, distance: Literal["dists", "lpips"]) -> PerceptualConfig:
    return replace(config, distance=distance)


class StudentLoss:
    """The student's loss as long as the discriminators ``judges`` take part."""

    def __init__(self, config: DistillationConfig, frozen: Mapping[str, nn.Module], judges: tuple[str, ...]) -> None:
        self.config, self.frozen, self.judges = config, frozen, judges

    def __call__(self, networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """Weighted terms, those against photo and teacher as ``TERM_photo`` and ``TERM_taught``."""
        config = self.config
        sr = networks["generator"](batch["lr"])[0]
        targets = {"photo": batch["hr"]}
        if config.taught:
            if TAUGHT not in batch:
                with torch.no_grad():
                    batch[TAUGHT] = networks[TEACHER](batch["lr"]).clamp(0, 1)
            targets["taught"] = batch[TAUGHT]
        terms: dict[str, Tensor] = {}
        for name, share in _shares(config.pixel_weight, config.pixel_photo).items():
            terms[f"l1_{name}"] = share * (sr - targets[name]).abs().mean()
        if config.artifact_weight:
            weights = artifact_map(sr, batch["hr"])
            terms["artifacts"] = config.artifact_weight * (weights * (sr - batch["hr"]).abs()).mean()
        if config.lattice_weight:
            mixed = config.pixel_photo * batch["hr"] + (1 - config.pixel_photo) * targets.get("taught", batch["hr"])
            terms["lattice"] = config.lattice_weight * 4 * lattice_loss(sr, mixed)
        # Feature networks and discriminators have strides: at one place, they would teach patterns that follow those.
        views = shifted([sr, *targets.values()], random)
        seen_sr, *cut = warped(views, random, config.perceptual_warped) if config.perceptual_warped else views
        seen = dict(zip(targets, cut, strict=True))
        if config.discriminators.used:
            batch |= {SEEN_SR: seen_sr.detach(), SEEN_REAL: seen[config.discriminators.real]}
        maps: list[Tensor] = []
        if FEATURES in self.frozen:
            maps = cast(Callable[[Tensor], list[Tensor]], networks[FEATURES])(seen_sr)  # once for all that look at them
            terms |= self._perceptual(networks, maps, seen, batch)
        return terms | self._adversarial(networks, maps, seen_sr)

    def _perceptual(
        self, networks: Networks, maps: list[Tensor], targets: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Distances of ``maps`` to those of the targets; maps that a discriminator will want are left in ``batch``."""
        config, settings = self.config, self.config.discriminators
        features = cast(Callable[[Tensor], list[Tensor]], networks[FEATURES])
        lpips, dists = cast(LPIPS, self.frozen[LPIPS_NETWORK]), cast(DISTS, self.frozen[DISTS_NETWORK])
        by_lpips = _shares(config.lpips_weight, config.perceptual_photo)
        by_dists = _shares(config.dists_weight, config.perceptual_photo)
        terms: dict[str, Tensor] = {}
        for name, target in targets.items():
            wanted = name == settings.real and settings.projected_weight
            if not wanted and name not in {*by_lpips, *by_dists}:
                continue
            goal = features(target)  # without a graph, as neither photos nor the frozen features have one
            if name in by_lpips:
                terms[f"lpips_{name}"] = by_lpips[name] * lpips.compare(maps, goal).mean()
            if name in by_dists:
                terms[f"dists_{name}"] = by_dists[name] * dists.compare(maps, goal).mean()
            if wanted:
                for number in range(1, settings.projected_maps + 1):
                    batch |= {f"{SEEN_SR}{number}": maps[number].detach(), f"{SEEN_REAL}{number}": goal[number]}
        return terms

    def _adversarial(self, networks: Networks, maps: list[Tensor], seen_sr: Tensor) -> dict[str, Tensor]:
        settings = self.config.discriminators
        terms: dict[str, Tensor] = {}
        if PROJECTED in self.judges:
            logits = networks[PROJECTED](*maps[1 : settings.projected_maps + 1])
            terms["adversarial_projected"] = settings.projected_weight * hinge_generator_loss(logits)
        if UNET in self.judges:
            terms["adversarial_unet"] = settings.unet_weight * hinge_generator_loss([networks[UNET](seen_sr)])
        return terms


def _shares(weight: float, photo: float) -> dict[str, float]:
    """Weights of a term by target, those of 0 left out."""
    shares = {"photo": weight * photo, "taught": weight * (1 - photo)}
    return {name: share for name, share in shares.items() if share}


def _projected_loss(count: int, networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
    real, fake = (
        networks[PROJECTED](*(batch[f"{seen}{number}"] for number in range(1, count + 1)))
        for seen in (SEEN_REAL, SEEN_SR)
    )
    return {"projected": hinge_discriminator_loss(real, fake)}


def _unet_loss(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
    real, fake = networks[UNET](torch.cat([batch[SEEN_REAL], batch[SEEN_SR]])).chunk(2)  # one evaluation for both
    return {"unet": hinge_discriminator_loss([real], [fake])}


def _preview(scale: int, networks: Networks, batch: Batch) -> dict[str, Tensor]:
    columns = {"LR (bicubic)": bicubic(batch["lr"], scale), "SR": networks["generator"](batch["lr"])[0]}
    columns |= {"teacher": batch[TAUGHT]} if TAUGHT in batch else {}
    return {title: image.clamp(0, 1) for title, image in columns.items()} | {"HR": batch["hr"]}


def _export(networks: Mapping[str, nn.Module]) -> Exported:
    return exported(cast(TrainableGenerator, networks["generator"]).generator)
