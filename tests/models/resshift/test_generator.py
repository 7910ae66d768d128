"""ResShift's generator: one published path number for number; sizes, samplers and noise on small networks."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UserError
from onestepsr.diffusion.residual_shift import NoisePlane, ResidualShiftConfig
from onestepsr.imaging.read import from_array
from onestepsr.inference.upscaler import UpscaleOptions, Upscaler
from onestepsr.models.generators import pad_to
from onestepsr.models.resshift.config import ResidualShiftGeneratorConfig
from onestepsr.models.resshift.generator import ResidualShiftGenerator, conditioned, residual_shift_generator
from onestepsr.models.resshift.unet import SwinUNetConfig
from onestepsr.models.resshift.vqgan import VQConfig
from small import SMALL_RESIDUAL
from weights_by_name import fill_by_name

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parents[2] / "golden" / "sinsr_one_step.npz"


def small(**changes) -> ResidualShiftGenerator:
    """The same random networks every time, with a codebook and output convolutions that matter."""
    torch.manual_seed(0)
    generator = residual_shift_generator(replace(SMALL_RESIDUAL, **changes)).eval().requires_grad_(False)
    fill_by_name(generator)
    return generator


def restored(generator: ResidualShiftGenerator, lr: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Image and latent from a given noise."""
    predict = conditioned(generator.unet, lr.float())
    z_0 = generator.sample(predict, generator.encode_lr(lr), lambda draw, like: noise)
    return generator.decode(z_0), z_0


def low(*size, count=1) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.slow
@torch.no_grad()
def test_one_step_equals_published_code_from_image_to_image():
    golden = dict(np.load(GOLDEN))
    generator = residual_shift_generator(ResidualShiftGeneratorConfig(steps=1)).eval()
    fill_by_name(generator.autoencoder)
    fill_by_name(generator.unet)
    generator.to(memory_format=torch.channels_last)
    assert generator.lr_multiple == 64
    padded = pad_to(torch.from_numpy(golden["lr"]), 64, 64)
    noise = torch.from_numpy(golden["noise"])
    z_y = generator.encode(generator.enlarge(padded))
    assert np.abs(z_y.numpy() - golden["z_y"]).max() < 1e-4  # up to 3.7; channels_last sums in another order
    z_0 = generator.sample(conditioned(generator.unet, padded), z_y, lambda draw, like: noise)
    assert np.abs(z_0.numpy() - golden["z0"]).max() < 5e-5
    codes = generator.autoencoder.quantize.nearest(z_0).flatten().numpy()
    flipped = codes != golden["codes"]
    assert not flipped[golden["code_margin"] > 1e-4].any()
    image = generator.decode(z_0)[..., :192, :160].clamp(0, 1) * 2 - 1
    error = np.abs(image[..., 1::3, 1::3].numpy() - golden["img"])
    # Codes may differ where two are equally near; then the image does, around them much and elsewhere a little.
    assert error.max() < 1e-4 if not flipped.any() else np.median(error) < 1e-3


def test_one_step_is_the_network_at_the_last_step():
    generator = small(steps=1)
    lr, noise = low(16, 32), torch.randn(1, 3, 16, 32, generator=seeded())
    z_y = generator.encode(generator.enlarge(lr))
    start = (z_y + 2 * 0.99 * noise) / (1 + 4 * 0.99**2) ** 0.5
    expected = generator.unet(start, torch.tensor([3]), lr * 2 - 1)
    image, z_0 = restored(generator, lr, noise)
    assert torch.allclose(z_0, expected, atol=1e-5)
    codes = generator.autoencoder.quantize(z_0)
    assert torch.equal(image, generator.autoencoder.decode(codes, quantize=False) / 2 + 0.5)


@pytest.mark.parametrize("sampler", ["ancestral", "deterministic"])
@pytest.mark.parametrize(("steps", "told"), [(None, [3, 2, 1, 0]), (4, [3, 2, 1, 0]), (2, [3, 0]), (1, [3])])
def test_network_is_evaluated_once_per_step(sampler, steps, told):
    generator = small(sampler=sampler, steps=steps)
    seen = []
    generator.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].tolist()))
    generator(low(16, 16, count=2))
    assert seen == [[t, t] for t in told]


def test_samplers_agree_on_one_step_and_differ_on_more():
    lr = low(16, 16)
    one = [small(sampler=sampler, steps=1)(lr, rng=seeded()) for sampler in ("ancestral", "deterministic")]
    many = [small(sampler=sampler)(lr, rng=seeded()) for sampler in ("ancestral", "deterministic")]
    assert torch.equal(*one)
    assert not torch.allclose(*many, atol=1e-3)


def test_deterministic_sampling_draws_noise_once_and_ancestral_in_every_step():
    for sampler, expected in (("deterministic", [0]), ("ancestral", [0, 1, 2, 3])):
        draws = []

        def noise(draw, like, draws=draws):
            draws.append(draw)
            return torch.zeros_like(like)

        generator = small(sampler=sampler)
        generator.sample(conditioned(generator.unet, low(16, 16)), generator.encode_lr(low(16, 16)), noise)
        assert draws == expected


def test_padding_is_the_published_one_where_that_can_reflect():
    generator, lr = small(steps=1), low(12, 10)
    padded = torch.nn.functional.pad(lr, (0, 6, 0, 4), mode="reflect")
    assert torch.equal(generator(lr, rng=seeded()), generator(padded, rng=seeded())[..., :48, :40])


@pytest.mark.parametrize("draw", [0, 2])
def test_every_window_of_the_noise_plane_is_a_part_of_the_whole(draw):
    whole = NoisePlane(5)(draw, torch.empty(2, 3, 150, 140))
    for top, left, height, width in ((0, 0, 150, 140), (64, 0, 64, 64), (13, 70, 60, 70), (130, 128, 20, 12)):
        window = NoisePlane(5, (top, left))(draw, torch.empty(2, 3, height, width))
        assert torch.equal(window, whole[..., top : top + height, left : left + width])


def test_noise_is_normal_and_new_for_every_seed_draw_and_sample():
    noise = torch.stack([NoisePlane(seed)(draw, torch.empty(2, 3, 128, 128)) for seed in (0, 1) for draw in (0, 1)])
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    blocks = noise.reshape(4, 2, 3, 2, 64, 2, 64).permute(0, 1, 3, 5, 2, 4, 6).reshape(32, -1)
    correlations = torch.corrcoef(blocks) - torch.eye(32)
    assert correlations.abs().max() < 0.05


def test_a_tile_gets_the_noise_of_its_place():
    generator, seen = small(steps=1), []
    generator.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    flat = torch.full((1, 3, 48, 64), 0.5)
    generator(flat, rng=seeded())
    generator(flat[..., :16, :32], rng=seeded(), origin=(32, 16))
    whole, tile = (z * (1 + 4 * 0.99**2) ** 0.5 for z in seen)
    inside = slice(2, -2)  # at the borders the encoder sees zeros instead of the flat image
    difference = tile[..., inside, inside] - whole[..., 32:48, 16:48][..., inside, inside]
    assert difference.std() < 0.5 * tile.std()
    elsewhere = tile[..., inside, inside] - whole[..., :16, 16:48][..., inside, inside]
    assert elsewhere.std() > tile.std()


def test_upscaler_gives_tiles_one_generator_and_their_places():
    generator, seen = small(steps=1), []
    restore = generator.restore_latent

    def record(z_y: Tensor, lr: Tensor, *, rng=None, origin=None, prompt=None) -> Tensor:
        seen.append((origin, rng.initial_seed()))
        return restore(z_y, lr, rng=rng, origin=origin)

    forward, copies = generator.forward, []
    generator.forward = lambda lr, **materialize: (copies.append((len(seen), lr.shape)), forward(lr, **materialize))[1]
    generator.restore_latent = record
    image = from_array(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    result = Upscaler(generator, "cpu", "float32").upscale_image(image, UpscaleOptions(tile=32, seed=7))
    assert result.pixels.shape == (200, 240, 3)
    assert copies == [(0, (1, 3, 16, 16))], "for the norms, before the tiles"
    assert [origin for origin, _ in seen] == [(0, 0), *product((0, 16, 32), repeat=2)]
    assert len({seed for _, seed in seen}) == 1


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_keeps_the_diffusion_in_float32(dtype, limit):
    lr, noise = low(16, 16), torch.randn(1, 3, 16, 16, generator=seeded())
    image, z_0 = restored(small(sampler="deterministic").to(dtype), lr.to(dtype), noise)
    assert (image.dtype, z_0.dtype) == (torch.float32, torch.float32)
    expected = restored(small(sampler="deterministic"), lr.to(dtype).float(), noise)[1]
    assert (z_0 - expected).std() < limit * expected.std()


def test_face_sizes_fit_together():
    with torch.device("meta"):
        generator = residual_shift_generator(FACES)
    assert (generator.lr_multiple, generator.largest_tile, generator.latent_channels) == (512, 2048, 8)
    cost = generator.memory_cost(torch.float32)
    assert cost.bytes_per_pixel == generator.autoencoder.memory_per_pixel(torch.float32)


FACES = ResidualShiftGeneratorConfig(
    unet=SwinUNetConfig(latent_channels=8, lq_size=512),
    autoencoder=VQConfig(width=64, multipliers=(1, 2, 4, 8), blocks=(1, 2, 3, 4), latent_channels=8, codes=4096),
    schedule=ResidualShiftConfig(steps=4, min_noise=0.2),
    scale=1,
)


def test_configuration_survives_a_mapping():
    assert from_mapping(ResidualShiftGeneratorConfig, to_mapping(FACES)) == FACES


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 5}, "5 steps: this schedule has 4, accepted: 1 to 4"),
        ({"steps": 1, "respacing": "published"}, "1 steps: this schedule has 4, accepted: 2 to 4"),
        ({"sampler": "euler"}, "'euler' is not one of"),
        ({"scale": 2}, "the LR image is 2 times as large as the latent, but the UNet takes one that is 1 times"),
        ({"autoencoder": {"latent_channels": 4}}, "UNet have 3 channels, those of the autoencoder 4"),
        ({"unet": {"lq_channels": 4}}, "3 channels, the UNet takes 4"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(change, said):
    with pytest.raises(UserError, match=said):
        from_mapping(ResidualShiftGeneratorConfig, {"schedule": {"steps": 4, "min_noise": 0.2}} | change)
