"""What a latent discriminator is shown: clean, evenly noised, or adaptively noised latents."""

import pytest
import torch

from onestepsr.core.errors import UserError
from onestepsr.diffusion.schedule import DiffusionSchedule
from onestepsr.methods.base import SampleRandom
from onestepsr.methods.shared.adversarial import AdaptiveConfig, AdaptiveNoise, LatentNoise, NoiseConfig

SCHEDULE = DiffusionSchedule()


def random_of(samples: int, step: int = 0) -> SampleRandom:
    return SampleRandom("test", step, samples=range(samples))


def test_noise_aware_follows_the_forward_process_evenly_over_the_range():
    z = torch.ones(4000, 1, 4, 4)
    z_t, t = LatentNoise.of(SCHEDULE, NoiseConfig(t_min=100, t_max=299))(z, random_of(4000))
    assert t.min() == 100
    assert t.max() == 299
    assert abs(float(t.double().mean()) - 199.5) < 4 * 57.7 / 4000**0.5
    signal = SCHEDULE.alpha_bar[t].sqrt().reshape(-1, 1, 1, 1)
    noise = (z_t - signal * z) / (1 - signal**2).sqrt()
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


def test_vanilla_shows_clean_latents_at_step_zero():
    z = torch.randn(3, 4, 8, 8)
    z_t, t = LatentNoise.of(SCHEDULE, NoiseConfig(kind="vanilla"))(z, random_of(3))
    assert torch.equal(z_t, z)
    assert t.tolist() == [0, 0, 0]


def test_gain_comes_before_the_noise():
    z = torch.randn(2, 4, 8, 8)
    plain = LatentNoise.of(SCHEDULE, NoiseConfig())(3 * z, random_of(2))
    gained = LatentNoise.of(SCHEDULE, NoiseConfig(), 3.0)(z, random_of(2))
    assert torch.equal(plain[0], gained[0])


def adaptive(**changes) -> AdaptiveNoise:
    settings = AdaptiveConfig(**{"t_initial": 10, "images": 100, **changes})
    return LatentNoise.of(SCHEDULE, NoiseConfig(kind="diffusion_gan", adaptive=settings))


def test_adaptive_noise_grows_while_the_discriminator_is_too_sure_and_shrinks_again():
    noise = adaptive()
    sure, unsure = torch.ones(4, 1, 2, 2), torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(4, 1, 1, 1)
    noise.step()  # nothing seen yet
    assert float(noise.largest) == 10
    for _ in range(5):
        noise.update(sure)
        noise.step()
    assert float(noise.largest) == pytest.approx(10 + 20 / 100 * 989)
    noise.update(unsure)
    noise.step()
    assert float(noise.largest) == pytest.approx(10 + 16 / 100 * 989)
    noise.update(torch.tensor([1.0, 1.0, 1.0, -1.0]).reshape(4, 1, 1, 1))  # a half is below the target too
    noise.step()
    assert float(noise.largest) == pytest.approx(10 + 12 / 100 * 989)
    for _ in range(100):
        noise.update(unsure)
    noise.step()
    assert float(noise.largest) == 10


def test_one_real_latent_moves_the_largest_step():
    noise = adaptive()
    noise.update(torch.ones(1, 1, 2, 2))
    noise.step()
    assert float(noise.largest) == pytest.approx(10 + 1 / 100 * 989)


def test_observing_logits_keeps_nothing_of_their_graph():
    noise = adaptive()
    noise.update(torch.ones(2, 1, 2, 2, requires_grad=True))
    assert not noise.observed.requires_grad


def test_adaptive_strength_does_not_depend_on_micro_batches():
    whole, parts = adaptive(), adaptive()
    logits = torch.randn(8, 1, 3, 3) + 2
    whole.update(logits)
    for part in logits.split(2):
        parts.update(part)
    whole.step()
    parts.step()
    assert float(whole.largest) == float(parts.largest) != 10


def test_adaptive_draws_have_a_clean_share_and_prefer_strong_noise():
    noise = adaptive(clean_share=0.25)
    noise.largest.fill_(400.0)
    z = torch.randn(4000, 1, 2, 2)
    z_t, t = noise(z, random_of(4000))
    clean = t == 0
    assert 0.22 < float(clean.float().mean()) < 0.28
    assert torch.equal(z_t[clean], z[clean])
    assert t.max() <= 400
    # p(t) in proportion to t has its mean at two thirds, an even one at the middle
    assert float(t[~clean].double().mean()) == pytest.approx(400 * 2 / 3, rel=0.03)
    even = adaptive(clean_share=0.0, prior="uniform")
    even.largest.fill_(400.0)
    assert float(even(z, random_of(4000))[1].double().mean()) == pytest.approx(200, rel=0.04)


class Drawn(SampleRandom):
    """Draws these numbers, the same for every sample."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(samples=range(2))
        self.numbers = list(numbers)

    def uniform(self) -> torch.Tensor:
        return torch.full((2,), self.numbers.pop(0))


@pytest.mark.parametrize(("prior", "steps"), [("priority", 200), ("uniform", 100)])
def test_a_clean_share_of_nothing_leaves_no_sample_clean(prior, steps):
    noise = adaptive(clean_share=0.0, prior=prior)
    noise.largest.fill_(400.0)
    assert noise.draw(Drawn(0.0, 0.25)).tolist() == [steps, steps]


def test_clean_samples_pass_the_gradient_on():
    z = torch.ones(2, 1, 2, 2, requires_grad=True)
    z_t, _ = adaptive(clean_share=1.0)(z, random_of(2))
    z_t.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_adaptive_state_travels_in_the_state_dict():
    noise, other = adaptive(), adaptive()
    noise.update(torch.ones(4, 1, 2, 2))
    noise.step()
    noise.update(torch.ones(4, 1, 2, 2))
    other.load_state_dict(noise.state_dict())
    noise.step()
    other.step()
    assert float(noise.largest) == float(other.largest) > 80


def test_every_kind_works_without_data_on_the_meta_device():
    for kind in ("noise_aware", "vanilla", "diffusion_gan"):
        noise = LatentNoise.of(SCHEDULE, NoiseConfig(kind=kind)).to("meta")
        noise.step()
        z_t, t = noise(torch.randn(2, 4, 8, 8, device="meta"), random_of(2))
        noise.update(z_t[:, :1])
        assert (z_t.device.type, t.device.type) == ("meta", "meta")
        assert t.shape == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t_min": 5, "t_max": 4}, "0 <= t_min <= t_max"),
        ({"kind": "diffusion_gan", "t_max": 3}, "t_initial must be at most"),
    ],
)
def test_wrong_ranges_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        NoiseConfig(**changes)
    with pytest.raises(UserError, match=r"discriminator\.t_max: 1000, but the diffusion has 1000 steps from 0"):
        LatentNoise.of(SCHEDULE, NoiseConfig(t_max=1000))
