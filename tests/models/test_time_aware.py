"""The time-aware discriminator: what the step changes, what is left without it, where gradients go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onestepsr.models.discriminators import HeadConfig, OfficialDiscriminator, TimeAwareDiscriminator
from onestepsr.models.tiny.denoiser import TinyDenoiser, TinyDenoiserConfig

pytestmark = pytest.mark.numeric

CHANNELS, TIME = (8, 16, 16), 12
HEAD = HeadConfig(width=6, norm_groups=4)


def discriminator(*, scales: tuple[int, ...] | None = None, time_aware: bool = True) -> TimeAwareDiscriminator:
    torch.manual_seed(0)
    return TimeAwareDiscriminator(CHANNELS, TIME, HEAD, scales=scales, time_aware=time_aware)


def learnt(network: TimeAwareDiscriminator) -> TimeAwareDiscriminator:
    """With a modulation that has left its start."""
    torch.manual_seed(1)
    for head in network.heads:
        torch.nn.init.normal_(head.modulation.weight, std=0.3)
        torch.nn.init.normal_(head.modulation.bias, std=0.3)
    return network


def features(samples: int = 2) -> list[Tensor]:
    rng = torch.Generator().manual_seed(2)
    return [torch.randn(samples, count, 8 >> k, 8 >> k, generator=rng) for k, count in enumerate(CHANNELS)]


def embedding(seed: int, samples: int = 2) -> Tensor:
    return torch.randn(samples, TIME, generator=torch.Generator().manual_seed(seed))


def test_the_step_alone_changes_the_verdict() -> None:
    network, seen = learnt(discriminator()), features()
    first, second, again = (network(embedding(seed), *seen) for seed in (3, 4, 3))
    for one, other, same in zip(first, second, again, strict=True):
        assert not torch.allclose(one, other, atol=1e-3)
        assert torch.equal(one, same)


def test_modulation_is_the_papers_formula() -> None:
    network, seen, emb = learnt(discriminator(scales=(1,))), features(), embedding(3)
    head = network.heads[0]
    gamma, beta = (emb @ head.modulation.weight.T + head.modulation.bias)[:, :, None, None].split(CHANNELS[1], dim=1)
    grouped = seen[1].reshape(2, 4, -1)
    mean, variance = grouped.mean(dim=2, keepdim=True), grouped.var(dim=2, keepdim=True, correction=0)
    normed = (grouped - mean) / (variance + 1e-5).sqrt()
    modulated = normed.reshape(seen[1].shape) * (1 + gamma) + beta
    expected = head.logit(torch.nn.functional.leaky_relu(head.features(modulated), 0.2))
    torch.testing.assert_close(network(emb, *seen)[0], expected)


def test_without_modulation_it_is_the_plain_one() -> None:
    aware, plain = discriminator(), discriminator(time_aware=False)
    assert not any("modulation" in name for name in plain.state_dict())
    plain.load_state_dict({key: value for key, value in aware.state_dict().items() if "modulation" not in key})
    seen = features()
    expected = plain(embedding(3), *seen)
    for verdict, other in zip(aware(embedding(3), *seen), expected, strict=True):
        assert torch.equal(verdict, other), "it starts there"
    learnt(aware)
    assert not torch.allclose(aware(embedding(3), *seen)[0], expected[0], atol=1e-3)
    for head in aware.heads:
        torch.nn.init.zeros_(head.modulation.weight)
        torch.nn.init.zeros_(head.modulation.bias)
    assert torch.equal(aware(embedding(3), *seen)[2], expected[2])
    assert torch.equal(plain(embedding(4), *seen)[0], expected[0]), "the plain one does not know the step"


def test_one_map_of_logits_for_each_chosen_scale() -> None:
    shapes = [tuple(logits.shape) for logits in discriminator()(embedding(3), *features())]
    assert shapes == [(2, 1, 8, 8), (2, 1, 4, 4), (2, 1, 2, 2)]
    chosen = discriminator(scales=(2, 0))
    assert [tuple(logits.shape) for logits in chosen(embedding(3), *features())] == [(2, 1, 2, 2), (2, 1, 8, 8)]
    assert len(chosen.heads) == 2


@pytest.mark.parametrize("scales", [(), (3,), (-1,), (0, 0)])
def test_scales_that_are_not_there_are_refused(scales: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="from 0 to 2"):
        discriminator(scales=scales)


def test_channels_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_groups is 5, but the features have \[8, 16, 16\]"):
        TimeAwareDiscriminator(CHANNELS, TIME, HeadConfig(norm_groups=5))
    with pytest.raises(ValueError, match="at least 1"):
        HeadConfig(width=0)


def test_frozen_features_carry_gradient_to_the_latent_and_do_not_learn() -> None:
    torch.manual_seed(0)
    config = TinyDenoiserConfig(latent_channels=4, widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=12)
    teacher = TinyDenoiser(config).requires_grad_(False)
    network = TimeAwareDiscriminator(teacher.feature_channels, teacher.time_channels, HEAD)
    z_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    t, lr = torch.tensor([0, 7]), torch.zeros(2, 3, 8, 8)
    logits = network(teacher.embed_time(t), *teacher.features(z_t, t, lr))
    sum(scale.mean() for scale in logits).backward()
    assert z_t.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
    heads = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert heads == {name for name, _ in network.named_parameters()}
    shared = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert not shared & {tensor.data_ptr() for tensor in network.state_dict().values()}, "checkpoints hold heads alone"


def test_the_published_heads_in_bfloat16_take_either_memory_order() -> None:
    """A group norm's backward ends the process where such features have no gradient themselves (PyTorch 2.13, CPU)."""
    channels, found = (64, 96), []
    for order in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        network = OfficialDiscriminator(channels)
        for layer in network.out_layers:
            torch.nn.init.normal_(layer[-1].weight, std=0.1)  # type: ignore[index, arg-type]
        features = [torch.randn(2, count, 12 >> k, 12 >> k) for k, count in enumerate(channels)]
        features = [feature.bfloat16().contiguous(memory_format=order) for feature in features]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(torch.tensor([3, 900]), *features)[0]
        logits.float().mean().backward()
        found.append((logits.float(), network.out_layers[0][-1].weight.grad))  # type: ignore[index]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(one.detach().std()))
