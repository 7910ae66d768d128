"""SeeSR as a generator, in 50 steps, and the one-step student that TAD-SR distils from it; reading its published files.

z_T = F(E(enlarged LR), T), then ancestral steps of the guided denoiser down to z_0, SR = D(z_0). With ``steps: 1`` the
evaluation at T is the result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from onestepsr.core.config import read_mapping
from onestepsr.core.errors import UserError
from onestepsr.diffusion.residual_shift import Noise
from onestepsr.diffusion.schedule import DiffusionSchedule
from onestepsr.models.generators import LatentAutoencoder, LatentGenerator, Origin, Rng
from onestepsr.models.seesr.networks import IMAGE_TOKENS, IMAGE_WIDTH, SeeSRCondition, SeeSRUNet
from onestepsr.models.stable_diffusion import checkpoints
from onestepsr.models.stable_diffusion.config import PromptConfig, StableDiffusionGeneratorConfig
from onestepsr.models.stable_diffusion.networks import StableDiffusionAutoencoder, initial_prompt
from onestepsr.weights.files import fill

ADDED_PROMPT = "clean, high-resolution, 8k"
"""Words behind the tags, in SeeSR's published script."""
NEGATIVE_PROMPT = "dotted, noise, blur, lowres, smooth"
"""Text that guidance leads away from, in the same place."""
FIRST_STEP = 1
"""Smallest step of a sampling: the schedule of Stable Diffusion 2 is read with an offset of 1."""


@dataclass(frozen=True, kw_only=True)
class SeeSRConfig(StableDiffusionGeneratorConfig):
    """Everything that fixes a SeeSR generator, apart from its weights; the defaults are the published ones."""

    timestep: int = 999
    """Step to which the LR latent is noised."""
    noised: bool = True
    """Always: sampling starts from the noised LR latent."""
    steps: int = 50
    """Evaluations; 1 is the student of TAD-SR, which is evaluated at ``timestep`` itself."""
    guidance: float = 5.5
    """Scale of classifier-free guidance away from the negative prompt; 1 leaves it out."""
    condition_channels: tuple[int, ...] = (16, 32, 96, 256)
    """Channels of the layers that bring the control image to the latent's size, one per halving and one before."""
    image_tokens: int = IMAGE_TOKENS
    """Tokens of RAM's image encoder."""
    image_width: int = IMAGE_WIDTH
    """Their channels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noised:
            raise ValueError("noised: SeeSR starts from the noised latent")
        if not 1 <= self.steps <= self.schedule.steps - FIRST_STEP:
            raise ValueError(f"steps is {self.steps}: expected 1 to {self.schedule.steps - FIRST_STEP}")
        if self.guidance < 1:
            raise ValueError(f"guidance is {self.guidance:g}: expected 1 (none) or more")
        if len(self.condition_channels) != len(self.autoencoder.block_out_channels):
            raise ValueError("condition_channels and the autoencoder's block_out_channels must have one length")
        if self.image_width > self.unet.cross_attention_dim:
            raise ValueError("image_width must not be above the UNet's cross_attention_dim")


class SeeSRGenerator(LatentGenerator):
    """SeeSR, or its one-step student. Diffusion is computed in float32 whatever the dtype of the weights.

    Its ``prompt`` is the embedding of a text, followed by RAM's tokens of the image, filled up with zeros to the same
    width (:func:`~onestepsr.models.seesr.networks.joined_prompt`).
    """

    takes_batches = False
    takes_float32 = True
    noise_stage = "unet"
    prompt: nn.Parameter
    negative: nn.Parameter

    def __init__(self, autoencoder: LatentAutoencoder, unet: SeeSRUNet, config: SeeSRConfig) -> None:
        super().__init__(autoencoder, unet, config.scale)
        self.config = config
        self.schedule, self.steps = DiffusionSchedule(config.schedule), config.steps
        self.prompt_width = config.unet.cross_attention_dim
        self.image_tokens, self.added_prompt = config.image_tokens, ADDED_PROMPT
        # of the empty text and of the negative prompt; a file has them from where it was converted
        start = initial_prompt(config.unet, config.prompt)
        self.prompt = nn.Parameter(start)
        self.negative = nn.Parameter(torch.zeros_like(start))

    @property
    def denoiser(self) -> SeeSRUNet:
        """UNet and ControlNet."""
        return cast(SeeSRUNet, self.unet)

    def condition(self, lr: Tensor, prompt: Tensor | None) -> SeeSRCondition:
        """The denoiser's condition for LR images (N, 3, h, w); a ``prompt`` of at most K tokens is text alone, and
        RAM's tokens are zeros then."""
        prompt = self.prompt if prompt is None else prompt
        count, width = self.config.image_tokens, self.config.image_width
        if prompt.shape[1] > count:
            text, image = prompt[:, :-count], prompt[:, -count:, :width]
        else:
            text, image = prompt, prompt.new_zeros(1, count, width)
        return SeeSRCondition(control=self.enlarge(lr.float()).clamp(0, 1), text=text, image=image)

    def encode(self, x: Tensor) -> Tensor:
        """Latent (N, C, H/f, W/f), float32, of an image (N, 3, H, W) in [0, 1] whose sides are multiples of f."""
        latent: Tensor = self.autoencoder.encode((x.float() * 2 - 1).to(self.prompt.dtype))
        return latent.float()

    def decode(self, z: Tensor) -> Tensor:
        """Image (N, 3, H, W) in about [0, 1], float32, not clamped, of a latent."""
        image: Tensor = self.autoencoder.decode(z.to(self.prompt.dtype))
        return image.float() * 0.5 + 0.5

    def encode_lr(self, lr: Tensor, *, rng: Rng = None, origin: Origin = None) -> Tensor:
        """Latent (N, C, s h/f, s w/f), float32, of the enlarged LR (N, 3, h, w)."""
        return self.encode(self.enlarge(lr.float()))

    def restore_latent(
        self, z_l: Tensor, lr: Tensor, *, rng: Rng = None, origin: Origin = None, prompt: Tensor | None = None
    ) -> Tensor:
        """An estimate of z_0, float32, from the latent ``z_l`` of the enlarged LR image."""
        return self.sample(z_l.float(), self.condition(lr, prompt), self.noise_at(rng, origin))

    def sample(self, z_y: Tensor, condition: SeeSRCondition, noise: Noise) -> Tensor:
        """An estimate of z_0 (N, C, h, w), float32, by all steps from the latent ``z_y`` of the enlarged LR image."""
        steps, schedule = self.steps, self.schedule
        z = schedule.add_noise(z_y, noise(0, z_y), self.config.timestep)
        if steps == 1:
            return schedule.x0_from_eps(z, self.predict(z, self.config.timestep, condition), self.config.timestep)
        stride = schedule.steps // steps
        for count, step in enumerate(range((steps - 1) * stride + FIRST_STEP, -1, -stride), start=1):
            x0 = schedule.x0_from_eps(z, self.predict(z, step, condition), step)
            z = schedule.ancestral_step(z, x0, step, step - stride, noise(count, z))
        return z

    def predict(self, z: Tensor, step: int, condition: SeeSRCondition) -> Tensor:
        """Noise (N, C, h, w), float32, in the latent ``z`` at ``step``, guided; one evaluation for both texts."""
        dtype, count = self.prompt.dtype, len(z)
        control, text, image = (part.to(dtype) for part in condition)
        t = torch.full((count,), step, device=z.device)
        if self.config.guidance == 1:
            eps: Tensor = self.denoiser(z.to(dtype), t, SeeSRCondition(control, text, image))
            return eps.float()
        texts = torch.cat([side.expand(count, -1, -1) for side in _one_length(self.negative, text)])
        both = [torch.cat([part.expand(count, *part.shape[1:])] * 2) for part in (z.to(dtype), t, control, image)]
        eps = self.denoiser(both[0], both[1], SeeSRCondition(both[2], texts, both[3]))
        negative, positive = eps.float().chunk(2)
        return negative + self.config.guidance * (positive - negative)


def _one_length(negative: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both embeddings with the tokens of ``text``: text encoders give all texts one length."""
    if negative.shape[1] < text.shape[1]:
        raise UserError(f"a prompt of {text.shape[1]} tokens, the negative prompt has {negative.shape[1]}")
    return negative[:, : text.shape[1]], text


def seesr_generator(config: SeeSRConfig) -> SeeSRGenerator:
    """Autoencoder, UNet and ControlNet, freshly initialised, as one generator."""
    unet = SeeSRUNet(config.unet, config.condition_channels, config.image_width)
    return SeeSRGenerator(StableDiffusionAutoencoder(config.autoencoder), unet, config)


# ---- the published files: unet/ and controlnet/ in one folder, beside the folder of Stable Diffusion 2 --------------


def looks_published(folder: str | Path) -> bool:
    """True for a folder with ``unet`` and ``controlnet``, of which the first attends to images."""
    parts = [Path(folder) / part / "config.json" for part in ("unet", "controlnet")]
    return all(part.is_file() for part in parts) and bool(read_mapping(parts[0]).get("use_image_cross_attention"))


def read_published(
    folder: Path, backbone: Path, *, prompt: Tensor | None = None, negative: Tensor | None = None
) -> SeeSRGenerator:
    """The generator of SeeSR's ``folder`` and the autoencoder and schedule of ``backbone``, the diffusers folder of
    Stable Diffusion 2 or 2.1-base, in float32 on the CPU, in eval mode.

    ``prompt`` and ``negative`` (1, L, C) are the embeddings of the empty text and of :data:`NEGATIVE_PROMPT`; zeros
    stand in for one that is missing. Every key and shape must be the published one; UserError in one line otherwise.
    """
    if not looks_published(folder):
        raise UserError(f"{folder}: no SeeSR, whose unet and controlnet attend to images")
    base = checkpoints.read_generator_config(backbone)
    sizes = read_mapping(folder / "controlnet" / "config.json").get("conditioning_embedding_out_channels")
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    values |= {"unet": checkpoints.read_unet_config(folder), "noised": True}
    if sizes is not None:
        values["condition_channels"] = tuple(sizes)
    values |= {"prompt": PromptConfig(tokens=77 if prompt is None else prompt.shape[1], std=0.0)}
    for name in ("timestep", "scale"):
        del values[name]
    try:
        config = SeeSRConfig(**values)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        generator = seesr_generator(config)
    for network, path, part in (
        (generator.denoiser.unet, folder, "unet"),
        (generator.denoiser.controlnet, folder, "controlnet"),
        (generator.autoencoder.get_submodule("vae"), backbone, "vae"),
    ):
        fill(network, checkpoints.read_folder_weights(path / part), f"{path}: {part}")
    zeros = torch.zeros(1, config.prompt.tokens, config.unet.cross_attention_dim)
    generator.prompt = nn.Parameter(zeros if prompt is None else prompt)
    generator.negative = nn.Parameter(zeros.clone() if negative is None else negative)
    return generator.eval()
