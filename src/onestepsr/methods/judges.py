"""Networks that judge a generator while they learn: of its latents, as in D3SR, or of its pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from onestepsr.losses.adversarial import bce_discriminator_loss, bce_generator_loss
from onestepsr.methods.base import Batch, LossFn, Networks, Phase, SampleRandom
from onestepsr.methods.noising import LatentNoise

DISCRIMINATOR = "discriminator"
CRITIC = "critic"
LARGEST_SHIFT = 8
"""Pixels by which pictures are moved before a critic sees them: the critic's strides and the generator's latent cells
would else share one grid, and the critic would teach patterns that follow it."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What the generator has made in this iteration, with gradients."""

    sr: Tensor
    """Pictures (N, 3, H, W) in about [0, 1]."""
    z_sr: Tensor
    """Their latents (N, C, h, w)."""
    prompt: Tensor | None = None
    """Prompt embeddings (N, L, C) of the pictures, where each has its own."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """One judging network: its term in the generator's loss, and its own loss on what the generator left in the
    batch."""

    network: str
    """Key in the method's networks."""
    term: str
    """Name of the generator's term."""
    start: int
    """First iteration in which it judges and learns."""
    judge: Callable[[Networks, Made, SampleRandom], Tensor]
    """The generator's weighted loss."""
    learn: LossFn
    """Its own loss, from the batch's ``hr`` and ``sr``, or ``z_hr`` and ``z_sr``."""
    settle: Callable[[], None] = lambda: None
    """Called once at the start of every iteration."""


def latent_judge(noise: LatentNoise, weight: float, start: int) -> Judge:
    """D3SR's discriminator of noised latents (Eq. 2-4)."""

    def judge(networks: Networks, made: Made, random: SampleRandom) -> Tensor:
        return weight * bce_generator_loss(networks[DISCRIMINATOR](*noise(made.z_sr, random)))

    def learn(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        halves = [noise(batch[name], random) for name in ("z_hr", "z_sr")]
        z_t, t = (torch.cat(pair) for pair in zip(*halves, strict=True))  # one evaluation for both
        real, fake = networks[DISCRIMINATOR](z_t, t).chunk(2)
        noise.observe(real)
        return {"discriminator": bce_discriminator_loss(real, fake)}

    return Judge(network=DISCRIMINATOR, term="adversarial", start=start, judge=judge, learn=learn, settle=noise.settle)


def picture_judge(weight: float, start: int) -> Judge:
    """A critic of pictures, with the same losses on pictures cut at random places: no noise, no step."""

    def judge(networks: Networks, made: Made, random: SampleRandom) -> Tensor:
        return weight * bce_generator_loss(networks[CRITIC](shifted(made.sr, random)))

    def learn(networks: Networks, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        pictures = torch.cat([shifted(batch[name], random) for name in ("hr", "sr")])
        real, fake = networks[CRITIC](pictures).chunk(2)
        return {"critic": bce_discriminator_loss(real, fake)}

    return Judge(network=CRITIC, term="critic_adversarial", start=start, judge=judge, learn=learn)


def judged_phases(generator_loss: Callable[[list[Judge]], LossFn], judges: list[Judge]) -> tuple[Phase, ...]:
    """The generator alone, joined by each judge from its start on; then the judges.

    ``generator_loss`` makes the generator's loss for those judges that take part.
    """
    starts = sorted({0, *(judge.start for judge in judges)})
    phases = [
        Phase(
            network="generator",
            loss=generator_loss([judge for judge in judges if judge.start <= start]),
            start=start,
            stop=stop,
        )
        for start, stop in zip(starts, [*starts[1:], None], strict=True)
    ]
    return (*phases, *(Phase(network=judge.network, loss=judge.learn, start=judge.start) for judge in judges))


def shifted(x: Tensor, random: SampleRandom) -> Tensor:
    """Parts (N, C, H - 8, W - 8) of pictures (N, C, H, W), each cut at a place of its own."""
    height, width = x.shape[-2] - LARGEST_SHIFT, x.shape[-1] - LARGEST_SHIFT
    rows, columns = (random.integers(0, LARGEST_SHIFT + 1).tolist() for _ in range(2))
    places = zip(x, rows, columns, strict=True)
    return torch.stack([one[:, row : row + height, column : column + width] for one, row, column in places])
