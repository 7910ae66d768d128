"""OSEDiff's generator: its step, its prompts, its posterior, its sizes, and its weights file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_diffusion import GENERATOR
from small_osediff import CONFIG, photo, plain

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UserError
from onestepsr.diffusion.schedule import DiffusionSchedule
from onestepsr.inference.upscaler import Upscaler
from onestepsr.models.architectures import describe
from onestepsr.models.loading import load_network
from onestepsr.models.osediff.generator import (
    TIMESTEP,
    OSEDiffGenerator,
    OSEDiffGeneratorConfig,
    pillow_bicubic,
    sampled_latent,
)
from onestepsr.models.stable_diffusion.networks import stable_diffusion_generator
from onestepsr.weights.files import save_model

pytestmark = pytest.mark.numeric


def saved(generator: OSEDiffGenerator, path: Path) -> Path:
    architecture, config = describe(generator)
    save_model(path, architecture=architecture, config=config, state_dict=generator.state_dict())
    return path


def test_the_last_step_gives_the_published_x0():
    golden = np.load(Path(__file__).parents[2] / "golden" / "osediff_x0.npz")
    latent, eps = (torch.from_numpy(golden[name]) for name in ("latent", "model_pred"))
    x0 = DiffusionSchedule().x0_from_eps(latent, eps, TIMESTEP)
    assert np.abs(x0.numpy() - golden["x0_formula"]).max() < 1e-5 * np.abs(golden["x0_formula"]).max()
    generator = plain()
    assert generator.timestep == TIMESTEP == 999
    asked = []
    generator.unet.register_forward_pre_hook(lambda module, arguments: asked.append(arguments[1]))
    generator(photo())
    assert [t.tolist() for t in asked] == [[999]]


def test_sixteen_bits_are_for_the_networks_alone():
    generator = plain().to(torch.bfloat16)
    predictions = []
    generator.unet.register_forward_hook(lambda module, arguments, output: predictions.append(output))
    z_l = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    z_h = generator.step(z_l)
    assert predictions[0].dtype == torch.bfloat16
    expected = generator.schedule.x0_from_eps(z_l.double(), predictions[0].double(), TIMESTEP)
    assert (z_h - expected).abs().max() < 1e-4 * expected.abs().max()
    assert generator(photo().bfloat16()).dtype == torch.float32


def test_a_prompt_of_the_image_replaces_the_saved_one():
    generator = plain()
    own = generator(photo())
    assert torch.equal(generator(photo(), prompt=generator.prompt), own)
    other = torch.randn(1, 7, generator.prompt_width, generator=torch.Generator().manual_seed(3))
    assert generator.prompt_width == 16
    assert (generator(photo(), prompt=other) - own).abs().max() > 1e-5
    two = torch.cat([photo(), photo()])
    both = generator(two, prompt=torch.cat([other, torch.zeros_like(other)]))
    torch.testing.assert_close(both[:1], generator(photo(), prompt=other), rtol=0, atol=1e-5)
    generator.freeze_prompt()
    assert (generator(photo(), prompt=other) - own).abs().max() > 1e-5, "inference must not fold it in"


def test_samples_are_spread_around_the_mean_as_the_posterior_says():
    generator, lr = plain(), photo(16)
    x = generator.enlarge(lr) * 2 - 1
    posterior = generator.autoencoder.vae.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    z = sampled_latent(generator.autoencoder, x, noise)
    expected = (posterior.mean + posterior.std * noise) * generator.autoencoder.config.scaling_factor
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(
        sampled_latent(generator.autoencoder, x, 0 * noise), generator.encode(generator.enlarge(lr))
    )
    assert generator.latent_like(lr).shape == noise.shape


def test_the_face_model_keeps_the_size_of_the_image(tmp_path):
    path = saved(plain(scale=1), tmp_path / "face.safetensors")
    image = np.random.default_rng(0).integers(0, 255, (37, 50, 3), dtype=np.uint8)
    upscaler = Upscaler.from_pretrained(path, device="cpu", dtype="float32")
    assert upscaler(image, scale=1).size == (50, 37)
    assert upscaler(image, scale=2).size == (100, 74)


def test_a_backbone_becomes_one_without_a_copy():
    backbone = stable_diffusion_generator(GENERATOR)
    generator = OSEDiffGenerator.of(backbone, scale=1, posterior="sample")
    assert generator.unet is backbone.unet
    assert generator.prompt is backbone.prompt
    assert (generator.timestep, generator.scale) == (999, 1)
    with pytest.raises(ValueError, match=r"timestep T_L must be 0\.\.999, got 1000"):
        OSEDiffGenerator.of(backbone, timestep=1000)


def test_its_configuration_is_strict(tmp_path):
    values = to_mapping(CONFIG)
    assert from_mapping(OSEDiffGeneratorConfig, values) == CONFIG
    with pytest.raises(UserError, match="posterior: 'mode' is not one of 'mean', 'sample'"):
        from_mapping(OSEDiffGeneratorConfig, {**values, "posterior": "mode"})
    with pytest.raises(UserError, match="noised: OSEDiff starts from the latent itself"):
        from_mapping(OSEDiffGeneratorConfig, {**values, "noised": True})
    path = tmp_path / "model.safetensors"
    save_model(path, architecture="osediff", config=values, state_dict={})
    with pytest.raises(UserError, match="does not fit"):
        load_network(path)


def test_published_weights_see_the_image_enlarged_as_pillow_does_it():
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((200, 148)), dtype=np.float64)  # bicubic by default
    lr = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None] / 255
    levels = pillow_bicubic(lr, 4)[0].permute(1, 2, 0).double().numpy() * 255
    assert np.abs(levels - levels.round()).max() < 1e-4
    assert np.abs(levels - expected).max() < 1 + 1e-4
    assert (np.abs(levels - expected) > 0.5).mean() < 0.005
    ours, published = OSEDiffGenerator.of(plain()), OSEDiffGenerator.of(plain(), enlarging="pillow")
    assert (ours.config.enlarging, published.config.enlarging) == ("bicubic", "pillow")
    assert torch.equal(published.encode_lr(lr[..., :36, :]), ours.encode(pillow_bicubic(lr[..., :36, :], 4)))
    assert not torch.equal(published.encode_lr(lr[..., :36, :]), ours.encode_lr(lr[..., :36, :]))
