"""Teachers of one-step students: a multi-step latent generator, its diffusion and its sampler.

Two families share one interface: residual shifting, which TAD-SR is written for, and latent diffusion, to which its
appendix carries it over. Networks reach every function as arguments, because the loop may have wrapped them.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from onestepsr.core.errors import UserError, error_context
from onestepsr.diffusion.residual_shift import kept_steps
from onestepsr.losses.distillation import diffusion_weight, residual_shift_weight
from onestepsr.methods.base import SampleRandom
from onestepsr.methods.shared.residual_shift import whole_schedule, with_sampling
from onestepsr.models.backbones import load_backbone
from onestepsr.models.discriminators import (
    LatentDiffusionFeatures,
    PromptedUNet,
    ResidualShiftFeatures,
    SeeSRFeatures,
)
from onestepsr.models.generators import LatentUNet, NoisedLatentGenerator, OneStepLatentGenerator
from onestepsr.models.loading import load_network, load_residual_generator
from onestepsr.models.lora import copy_sharing_weights
from onestepsr.models.resshift.generator import ResidualShiftGenerator, conditioned
from onestepsr.models.seesr.generator import SeeSRGenerator
from onestepsr.models.seesr.networks import (
    IMAGE_TOKENS,
    IMAGE_WIDTH,
    TRAINED_BY_TADSR,
    SeeSRCondition,
    SeeSRUNet,
)
from onestepsr.models.stable_diffusion.config import PromptConfig
from onestepsr.prompts.ram import RamConfig, RamNetwork, RamTagger, tagger_pixels, usual_folder

Network = Callable[..., Any]
DDIM_STEPS = 50
"""Evaluations of a latent-diffusion teacher where none are asked for: as many as SeeSR's in the paper's appendix."""


RAM, LR_TOKENS, HR_TOKENS, TEXT = "ram", "lr_tokens", "hr_tokens", "text"
"""Name of SeeSR's tagger among the frozen networks, and what :meth:`Teacher.look` leaves in the batch."""


class Teacher(ABC):
    """A generator F from which one step is distilled.

    Latents are (N, C, h, w), the condition ``y`` is mostly the LR image (N, 3, H, W) in [0, 1], steps ``t`` are
    integers (N,) from 0 to :attr:`steps` - 1, which is where sampling starts. ``network`` is the teacher's network, a
    student of the same shape, or, for :meth:`evaluate`, :attr:`features`.
    """

    generator: ResidualShiftGenerator | OneStepLatentGenerator | SeeSRGenerator
    """The loaded generator: autoencoder, enlargement and sizes."""
    network: nn.Module
    """Its network, called with the arguments that :meth:`evaluate` gives it. A copy of it is the student."""
    features: ResidualShiftFeatures | LatentDiffusionFeatures | SeeSRFeatures
    """Encoder half on the same weights: called alike, gives the time embedding and the features of every level."""
    steps: int
    """T: the diffusion's steps, up to the one at which sampling starts."""
    largest_score_step: int
    """Largest step of score distillation where none is given."""
    starts_from_hr: bool = False
    """In training, start from the noised HR latent instead of the LR latent."""
    frozen: Mapping[str, nn.Module] = MappingProxyType({})
    """Further networks without training, by name, that the conditions are made with."""

    def look(  # noqa: B027 (most teachers need nothing)
        self, networks: Mapping[str, Network], batch: dict[str, Tensor], random: SampleRandom
    ) -> None:
        """Leave in ``batch`` what :meth:`sees` needs, once per iteration."""

    def sees(self, batch: dict[str, Tensor], *, judging: bool) -> Any:
        """The condition ``y`` of the networks; ``judging`` where the teacher looks at noised results, in the features
        of the discriminator and in score distillation."""
        return batch["lr"]

    def student(self) -> nn.Module:
        """A trainable copy of the network; to be made before the teacher is frozen or converted."""
        return copy.deepcopy(self.network).requires_grad_(True)

    @abstractmethod
    def start(self, z_y: Tensor, noise: Tensor) -> Tensor:
        """z_T, where teacher and student start, from the latent ``z_y`` of the enlarged LR image."""

    @abstractmethod
    def noised(self, z_0: Tensor, z_y: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t of ``z_0``: the forward process."""

    @abstractmethod
    def scale_input(self, z_t: Tensor, t: Tensor) -> Tensor:
        """``z_t`` as the network sees it."""

    @abstractmethod
    def score_weight(self, t: Tensor) -> Tensor:
        """Factor (N,) between a difference of estimates of z_0 and the difference of the noises they stand for."""

    @abstractmethod
    def evaluate(self, network: Network, z_t: Tensor, t: Tensor, y: Any) -> Any:
        """Output of ``network`` at (z_t, t, y)."""

    @abstractmethod
    def estimate(self, network: Network, z_t: Tensor, t: Tensor, y: Any) -> Tensor:
        """F(z_t, t, y), the estimate of z_0 by one evaluation."""

    @abstractmethod
    def sample(self, network: Network, z_T: Tensor, z_y: Tensor, y: Any) -> Tensor:
        """F(z_T, T, y), the estimate of z_0 by all deterministic steps; without a graph."""

    @abstractmethod
    def student_generator(self, student: nn.Module) -> nn.Module:
        """The one-step generator around a student, as it is exported."""


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig:
    """Settings of a plain latent-diffusion backbone as a teacher; without effect on residual shifting."""

    start: int | None = None
    """Step T to which the LR latent is noised and at which sampling starts; null is the last of the schedule, as in the
    paper's appendix. There a ControlNet shows the LR image to the teacher. A backbone without one sees only as much of
    it as the noise leaves, so that a lower step keeps more of the image and improves less of it."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """Start of the prompt embedding on a backbone that brings none."""
    prompt_file: Path | None = None
    """Safetensors file with a prompt embedding (L, C) to use instead."""


class ResidualShiftTeacher(Teacher):
    """A ResShift model and its deterministic sampler (TAD-SR, Eq. 1-3)."""

    def __init__(self, name: str, steps: int | None, *, official: bool = False, capped: bool = False) -> None:
        """``name`` is that of a model or file; ``steps`` are the evaluations of one sampling, None takes all.
        ``official`` is for the features; ``capped`` limits sqrt(eta) of step 0 as the published code does."""
        self.generator = load_residual_generator(name)
        self.network = self.generator.unet
        self.features = ResidualShiftFeatures(self.network, official=official)
        self.schedule = whole_schedule(self.generator, capped=capped)
        self.steps = self.schedule.steps
        self.largest_score_step = min(2, self.steps - 1)  # 1 to 3 in the paper's counting, whatever T is
        with error_context("config.teacher_steps"):
            self._sampling = self.schedule if steps is None else self.schedule.respaced(steps)

    def start(self, z_y: Tensor, noise: Tensor) -> Tensor:
        """N(z_y, kappa^2 eta_T): without the share 1 - eta_T of z_0, which inference does not know (Eq. 6)."""
        return self.schedule.prior(z_y, noise)

    def noised(self, z_0: Tensor, z_y: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 1."""
        return self.schedule.q_sample(z_0, z_y, noise, t)

    def scale_input(self, z_t: Tensor, t: Tensor) -> Tensor:
        """To about unit variance."""
        return self.schedule.scale_input(z_t, t)

    def score_weight(self, t: Tensor) -> Tensor:
        """omega_2 / omega of Eq. 8."""
        return residual_shift_weight(self.schedule, t)

    def evaluate(self, network: Network, z_t: Tensor, t: Tensor, y: Any) -> Any:
        """The network under the LR image, its input scaled."""
        return conditioned(network, y)(self.scale_input(z_t, t), t)

    def estimate(self, network: Network, z_t: Tensor, t: Tensor, y: Any) -> Tensor:
        """The network's own prediction."""
        return cast(Tensor, self.evaluate(network, z_t, t, y))

    @torch.no_grad()
    def sample(self, network: Network, z_T: Tensor, z_y: Tensor, y: Any) -> Tensor:
        """Eq. 3 from T on."""
        return self._sampling.sample_deterministic(conditioned(network, y), z_y, z_T)

    def student_generator(self, student: nn.Module) -> ResidualShiftGenerator:
        """The teacher's autoencoder and schedule, of which the last step alone is run."""
        return with_sampling(cast(ResidualShiftGenerator, self.generator), 1, "deterministic", unet=student)


class LatentDiffusionTeacher(Teacher):
    """A latent-diffusion backbone that starts from the noised LR latent, and DDIM (Song et al., ICLR 2021)."""

    def __init__(self, name: str, steps: int | None, config: LatentDiffusionConfig, *, official: bool = False) -> None:
        """``name`` is anything that a backbone loads from; ``steps`` are the evaluations of one sampling.
        ``official`` is for the features."""
        self.generator = load_backbone(name, prompt=config.prompt, prompt_file=config.prompt_file, for_training=True)
        self.network = PromptedUNet(self.generator.unet, self.generator.prompt)
        self.features = LatentDiffusionFeatures(self.network, official=official)
        self.schedule = self.generator.schedule
        last = self.schedule.steps - 1
        start = last if config.start is None else config.start
        if not 0 < start <= last:
            raise UserError(f"config.latent_diffusion.start: {start}, but {name} has steps from 1 to {last}")
        self.steps = start + 1
        self.largest_score_step = self.steps // 5 - 1  # U(0, T/5) of Algorithm 1
        with error_context("config.teacher_steps"):
            self._sampling: Sequence[int] = kept_steps(self.steps, DDIM_STEPS if steps is None else steps)

    def start(self, z_y: Tensor, noise: Tensor) -> Tensor:
        """The LR latent, noised to T."""
        return self.schedule.add_noise(z_y, noise, self.steps - 1)

    def noised(self, z_0: Tensor, z_y: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 4 of D3SR; the LR latent has no part in it."""
        return self.schedule.add_noise(z_0, noise, t)

    def scale_input(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Not scaled."""
        return z_t

    def score_weight(self, t: Tensor) -> Tensor:
        """sqrt(alpha_bar) / sqrt(1 - alpha_bar)."""
        return diffusion_weight(self.schedule, t)

    def evaluate(self, network: Network, z_t: Tensor, t: Tensor, y: Any) -> Any:
        """The network under its prompt; it does not see the LR image."""
        return network(z_t, t)

    def estimate(self, network: Network, z_t: Tensor, t: Tensor, y: Any) -> Tensor:
        """z_0 by the predicted noise."""
        return self.schedule.x0_from_eps(z_t, cast(Tensor, network(z_t, t)), t)

    @torch.no_grad()
    def sample(self, network: Network, z_T: Tensor, z_y: Tensor, y: Any) -> Tensor:
        """From T down: z_s = sqrt(alpha_bar_s) z_0 + sqrt(1 - alpha_bar_s) eps for each next step s."""
        z = z_T
        for step, following in pairwise([*reversed(self._sampling), None]):
            t = torch.full((len(z),), cast(int, step), device=z.device)
            eps = cast(Tensor, network(z, t))
            z_0 = self.schedule.x0_from_eps(z, eps, t)
            z = z_0 if following is None else self.schedule.add_noise(z_0, eps, following)
        return z

    def student_generator(self, student: nn.Module) -> NoisedLatentGenerator:
        """The teacher's autoencoder around the student's UNet and prompt, evaluated at T on the noised LR latent."""
        trained = cast(PromptedUNet, student)
        config = replace(cast(OneStepLatentGenerator, self.generator).config, noised=True, timestep=self.steps - 1)
        unet = cast(LatentUNet, trained.unet)
        return NoisedLatentGenerator(self.generator.autoencoder, unet, trained.prompt, config)


@dataclass(frozen=True, kw_only=True)
class SeeSRTeacherConfig:
    """Settings of SeeSR as a teacher; without effect on other families."""

    tagger: str = "dape"
    """RAM, whose image encoder's tokens SeeSR attends to: ``dape`` or a folder with its files (docs/prompts.md); or
    ``random``, which needs no file and is untrained."""
    text_encoder: str = "sd21-base"
    """Encoder of ``data.prompts``, the tags of the photos: a diffusers folder, an alias, or a name of the hub. Without
    texts all photos have the empty one."""
    null_text: float = 0.5
    """Share of the samples whose text is left empty."""
    start: Literal["hr", "lr"] = "hr"
    """Latent that is noised to the last step in training: of the photo, as published, or of the LR image, as at
    inference."""
    judge: Literal["hr", "lr"] = "hr"
    """Image that the teacher sees, in ControlNet and RAM, where it looks at noised results: the photo, as published, or
    the LR image."""

    def __post_init__(self) -> None:
        if not 0 <= self.null_text <= 1:
            raise ValueError(f"null_text is {self.null_text:g}: expected 0 to 1")


class SeeSRTeacher(Teacher):
    """SeeSR (TAD-SR's published code for Stable Diffusion). What its 50 steps make of LR images is made beforehand."""

    generator: SeeSRGenerator
    network: SeeSRUNet

    def __init__(self, name: str, config: SeeSRTeacherConfig) -> None:
        """``name`` is a file that ``models convert`` has made of SeeSR's, or ``random:seesr``."""
        network = load_network(name)
        if not isinstance(network, SeeSRGenerator):
            raise UserError(f"{name}: holds a {type(network).__name__}, expected SeeSR")
        self.generator, self.network, self.config = network, network.denoiser, config
        self.features = SeeSRFeatures(self.network)
        self.schedule = network.schedule
        self.steps = network.config.timestep + 1
        self.largest_score_step = self.steps // 5 - 1
        ram = _random_ram(network) if config.tagger == "random" else RamTagger(_ram_folder(config.tagger)).network()
        self.side = ram.config.side
        self.frozen = {RAM: _RamLook(ram)}
        self.starts_from_hr = config.start == "hr"

    def student(self) -> SeeSRUNet:
        """A copy that shares with the teacher whatever TAD-SR does not train."""
        trained = "|".join(TRAINED_BY_TADSR)
        student = copy_sharing_weights(self.network, own=rf"(.*\.)?({trained})\..*")
        student.train_only()
        return student

    @torch.no_grad()
    def look(self, networks: Mapping[str, Network], batch: dict[str, Tensor], random: SampleRandom) -> None:
        """RAM's tokens of both images and the text, left empty in some samples."""
        enlarged = self.generator.enlarge(batch["lr"]).clamp(0, 1)
        images = {LR_TOKENS: enlarged}
        if self.config.judge == "hr":
            images[HR_TOKENS] = batch["hr"]
        for name, image in images.items():
            batch[name] = networks[RAM](tagger_pixels(image, side=self.side))
        empty = self.generator.prompt.detach().to(enlarged.device)
        text = batch.get("prompt")
        if text is None:
            batch[TEXT] = empty.expand(len(enlarged), -1, -1)
        else:
            is_empty = (random.uniform() < self.config.null_text).to(text.device)
            batch[TEXT] = torch.where(is_empty[:, None, None], empty.to(text), text)

    def sees(self, batch: dict[str, Tensor], *, judging: bool) -> SeeSRCondition:
        """Control image, text and image tokens: of the LR image, for the judging teacher of the photo."""
        if judging and self.config.judge == "hr":
            return SeeSRCondition(batch["hr"], batch[TEXT], batch[HR_TOKENS])
        return SeeSRCondition(self.generator.enlarge(batch["lr"]).clamp(0, 1), batch[TEXT], batch[LR_TOKENS])

    def start(self, z_y: Tensor, noise: Tensor) -> Tensor:
        """The latent, noised to T."""
        return self.schedule.add_noise(z_y, noise, self.steps - 1)

    def noised(self, z_0: Tensor, z_y: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 4 of D3SR; the LR latent has no part in it."""
        return self.schedule.add_noise(z_0, noise, t)

    def scale_input(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Not scaled."""
        return z_t

    def score_weight(self, t: Tensor) -> Tensor:
        """sqrt(alpha_bar) / sqrt(1 - alpha_bar): the difference of the predicted noises themselves, as published."""
        return diffusion_weight(self.schedule, t)

    def evaluate(self, network: Network, z_t: Tensor, t: Tensor, y: Any) -> Any:
        """The network under all conditions, without guidance."""
        return network(z_t, t, y)

    def estimate(self, network: Network, z_t: Tensor, t: Tensor, y: Any) -> Tensor:
        """z_0 by the predicted noise."""
        return self.schedule.x0_from_eps(z_t, cast(Tensor, network(z_t, t, y)), t)

    def sample(self, network: Network, z_T: Tensor, z_y: Tensor, y: Any) -> Tensor:
        """Not while training: 100 evaluations for each image."""
        raise UserError(
            "data.taught_paths: SeeSR's images of the LR images are made beforehand ('onestepsr upscale --model'); "
            "name their folders"
        )

    def student_generator(self, student: nn.Module) -> SeeSRGenerator:
        """One step without guidance from the noised LR latent."""
        config = replace(self.generator.config, steps=1, guidance=1.0)
        generator = SeeSRGenerator(self.generator.autoencoder, cast(SeeSRUNet, student), config)
        generator.prompt, generator.negative = self.generator.prompt, self.generator.negative
        return generator


class _RamLook(nn.Module):
    """RAM's image encoder as one callable."""

    def __init__(self, ram: RamNetwork) -> None:
        super().__init__()
        self.ram = ram.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """Tokens (N, K, W) of images in ImageNet's statistics."""
        return self.ram.look(image).float()


def _ram_folder(name: str) -> Path:
    return usual_folder() if name == "dape" else Path(name)


def _random_ram(generator: SeeSRGenerator) -> RamNetwork:
    """An untrained RAM with as many tokens, of the same width, as ``generator`` reads."""
    config, tokens = generator.config, generator.config.image_tokens
    if (tokens, config.image_width) == (IMAGE_TOKENS, IMAGE_WIDTH):
        return RamNetwork(RamConfig())
    side = round((tokens - 1) ** 0.5)
    small = RamConfig(side=8 * side, width=8, depths=(1, 1), heads=(1, 1), window=side, text_width=config.image_width)
    return RamNetwork(replace(small, tags=2, head_width=8, head_layers=1))
