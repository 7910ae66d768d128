"""The methods as the trainer sees them: phases, gradients, what stays frozen, what is exported."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from onestepsr.core.config import to_mapping
from onestepsr.core.errors import UserError
from onestepsr.methods import d3sr, pretraining
from onestepsr.methods.base import (
    Method,
    Phase,
    SampleRandom,
    check_timestep,
    get_method,
    method_names,
    preview_columns,
    register,
)
from onestepsr.methods.shared import adversarial
from onestepsr.methods.shared.image_loss import PerceptualConfig
from onestepsr.models import loading
from onestepsr.models.lora import LoraConfig
from onestepsr.models.tiny.generator import Depth, TinyGeneratorConfig, tiny_generator
from onestepsr.models.tiny.networks import TinyConfig
from onestepsr.train.recipes import load_methods
from onestepsr.weights import files

SMALL = TinyConfig(
    encoder_width=8, decoder_width=8, widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16
)


def pair() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {"hr": torch.rand(2, 3, 32, 32, generator=rng), "lr": torch.rand(2, 3, 8, 8, generator=rng)}


def random_of(samples: int) -> SampleRandom:
    return SampleRandom("test", samples=range(samples))


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(0)
    config = TinyGeneratorConfig(model=SMALL)
    generator = tiny_generator(config)
    torch.nn.init.normal_(generator.unet.conv_out.weight, std=0.1)
    path = tmp_path / "backbone.safetensors"
    files.save_model(
        path, architecture="tiny-latent-diffusion", config=to_mapping(config), state_dict=generator.state_dict()
    )
    return path


def all_networks(method):
    return {**method.networks, **method.frozen}


def with_gradient(network):
    return {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def trainable(network):
    return {name for name, p in network.named_parameters() if p.requires_grad}


def run_phase(method, phase, batch):
    for network in method.networks.values():
        network.zero_grad()
    terms = phase.loss(all_networks(method), batch, random_of(2))
    sum(terms.values()).backward()
    return terms


def test_every_method_is_registered():
    load_methods()
    assert {"autoencoder", "diffusion", "d3sr"} <= set(method_names())
    needs_lr = {name: get_method(name).needs_lr for name in method_names()}
    assert {name for name, needed in needs_lr.items() if not needed} == {"autoencoder", "diffusion"}
    with pytest.raises(UserError, match="did you mean 'd3sr'"):
        get_method("d3rs")
    with pytest.raises(ValueError, match="registered twice"):
        register("d3sr", d3sr.D3SRConfig)(d3sr.build)


def test_phases_start_stop_and_skip():
    phase = Phase(network="x", loss=lambda *_: {}, every=3, start=4, stop=11)
    assert [step for step in range(15) if phase.runs_at(step)] == [4, 7, 10]


def test_without_settings_a_phase_always_runs_and_a_method_takes_photos_of_any_size():
    method = Method(networks={}, phases=(Phase(network="x", loss=lambda *_: {}),))
    assert all(method.phases[0].runs_at(step) for step in range(3))
    assert (method.scale, method.hr_multiple) == (None, 1)


def test_preview_shows_lr_enlarged_beside_sr_and_hr():
    """Between 0 and 1, a cubic of a = -0.75 gives 29/128 and 99/128 at a quarter of a pixel from the middle; its
    overshoot and undershoot beside them are clamped."""
    lr = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 3, 4, 4)
    sr = torch.tensor([-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]).expand(1, 3, 8, 8)
    hr = torch.rand(1, 3, 8, 8)
    shown = preview_columns(sr, {"lr": lr, "hr": hr}, 2)
    assert list(shown) == ["LR (bicubic)", "SR", "HR"]
    enlarged = torch.tensor([0.0, 0.0, 0.0, 29 / 128, 99 / 128, 1.0, 1.0, 1.0])
    torch.testing.assert_close(shown["LR (bicubic)"], enlarged.expand(1, 3, 8, 8))
    assert shown["SR"][0, 0, 0].tolist() == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert torch.equal(shown["HR"], hr)


def test_a_sample_draws_the_same_numbers_in_whatever_company():
    whole = SampleRandom(3, "loss", samples=range(4))
    parts = [SampleRandom(3, "loss", samples=range(start, start + 2)) for start in (0, 2)]
    z = torch.zeros(4, 2, 3)
    for draw in (
        lambda random, like: random.normal(like),
        lambda random, like: random.uniform_noise(like),
        lambda random, _: random.integers(0, 1000),
        lambda random, _: random.uniform(),
    ):
        halves = [draw(random, half) for random, half in zip(parts, z.chunk(2), strict=True)]
        assert torch.equal(draw(whole, z), torch.cat(halves))
    later = SampleRandom(3, "loss", samples=[7]).integers(5, 900)
    assert not torch.equal(later, SampleRandom(4, "loss", samples=[7]).integers(5, 900))
    noise = SampleRandom(0, samples=range(2)).normal(torch.zeros(2, 50_000))
    assert noise.mean().abs() < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    even = SampleRandom(0, samples=range(2)).uniform_noise(torch.zeros(2, 50_000, dtype=torch.float64))
    assert (even.shape, even.dtype) == ((2, 50_000), torch.float64)
    assert (even.min() >= 0, even.max() < 1) == (True, True)
    assert abs(float(even.mean()) - 0.5) < 0.01


def test_a_step_that_the_diffusion_does_not_have_is_refused():
    generator = tiny_generator(TinyGeneratorConfig(model=SMALL))
    for step in (0, 999):
        check_timestep(step, generator, "x")
    for step in (-1, 1000):
        with pytest.raises(UserError, match=f"config.timestep: {step}, but x has steps from 0 to 999"):
            check_timestep(step, generator, "x")


def test_autoencoder_trains_all_of_itself():
    torch.manual_seed(0)
    method = pretraining.build_autoencoder(pretraining.AutoencoderConfig(model=SMALL))
    network = method.networks["autoencoder"].train()
    torch.nn.init.normal_(network.decoder.conv_out.weight, std=0.1)
    torch.nn.init.normal_(network.encoder[-1].weight, std=0.1)
    terms = run_phase(method, method.phases[0], pair())
    assert set(terms) == {"l1", "kl"}
    assert with_gradient(network) == trainable(network)


def test_diffusion_trains_unet_and_prompt_and_exports_a_whole_backbone(tmp_path):
    torch.manual_seed(0)
    source = pretraining.build_autoencoder(pretraining.AutoencoderConfig(model=SMALL))
    exported = source.export(source.networks)
    path = tmp_path / "autoencoder.safetensors"
    files.save_model(path, architecture=exported.architecture, config=exported.config, state_dict=exported.state_dict)
    other_sizes = TinyGeneratorConfig(model=replace(SMALL, luma_channels=9))
    method = pretraining.build_diffusion(pretraining.DiffusionConfig(autoencoder=path, backbone=other_sizes))
    torch.nn.init.normal_(method.networks["unet"].unet.conv_out.weight, std=0.1)
    assert set(run_phase(method, method.phases[0], pair())) == {"eps"}
    assert with_gradient(method.networks["unet"]) == trainable(method.networks["unet"])
    whole = method.export(method.networks)
    files.save_model(path, architecture=whole.architecture, config=whole.config, state_dict=whole.state_dict)
    assert loading.load_generator(path)(torch.rand(1, 3, 5, 7)).shape == (1, 3, 20, 28)


@pytest.mark.parametrize(
    "changes", [{"decoder_blocks": 1, "refine_width": 4, "refine_blocks": 2}, {"even_contrast": True}]
)
def test_diffusion_takes_every_setting_of_its_autoencoder(tmp_path, changes):
    torch.manual_seed(0)
    sizes = replace(SMALL, luma_channels=9, chroma_channels=2, encoder_width=12, decoder_width=16, **changes)
    source = pretraining.build_autoencoder(pretraining.AutoencoderConfig(model=sizes))
    exported = source.export(source.networks)
    path = tmp_path / "autoencoder.safetensors"
    files.save_model(path, architecture=exported.architecture, config=exported.config, state_dict=exported.state_dict)
    unet = {"widths": (4, 12), "down_blocks": (2, 1), "up_blocks": (1, 2), "time_width": 24}
    unet |= {"prompt_tokens": 3, "prompt_width": 20}
    wanted = TinyGeneratorConfig(model=replace(SMALL, **unet))
    method = pretraining.build_diffusion(pretraining.DiffusionConfig(autoencoder=path, backbone=wanted))
    assert method.frozen["autoencoder"].config == replace(sizes, **unet)
    assert method.networks["unet"].unet.config == replace(sizes, **unet)
    own, frozen = (
        network.requires_grad_(False).eval()
        for network in (source.networks["autoencoder"], method.frozen["autoencoder"])
    )
    z = own.encode(pair()["hr"] * 2 - 1)
    torch.testing.assert_close(frozen.decode(z), own.decode(z))
    assert run_phase(method, method.phases[0], pair())["eps"].isfinite()
    whole = method.export(method.networks)
    files.save_model(path, architecture=whole.architecture, config=whole.config, state_dict=whole.state_dict)
    assert loading.load_generator(path)(torch.rand(1, 3, 5, 7)).shape == (1, 3, 20, 28)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_d3sr_phases_touch_only_what_they_train(backbone, tuning):
    torch.manual_seed(0)
    settings = d3sr.DiscriminatorConfig(tuning=tuning, lora=LoraConfig(rank=2, alpha=2.0))
    config = d3sr.D3SRConfig(
        backbone=backbone, tuning=tuning, lora=LoraConfig(rank=2, alpha=2.0), discriminator=settings
    )
    method = d3sr.build(config)
    generator_phase, discriminator_phase = (p for p in method.phases if p.runs_at(0))
    batch = pair()
    assert set(run_phase(method, generator_phase, batch)) == {"mse", "ea_dists", "adversarial"}
    generator = method.networks["generator"]
    names = trainable(generator)
    assert not any("autoencoder" in name for name in names)
    assert "generator.prompt" in names
    assert all("lora" in name for name in names if ".unet." in name) == (tuning == "lora")
    assert any("unet" in name for name in with_gradient(generator))
    assert with_gradient(generator) <= names
    assert set(run_phase(method, discriminator_phase, batch)) == {"discriminator"}
    assert not with_gradient(generator)
    judge = method.networks["discriminator"]
    assert with_gradient(judge)
    encoder = {name for name in trainable(judge) if name.startswith("encoder.")}
    assert encoder == {
        name
        for name, _ in judge.named_parameters()
        if name.startswith("encoder.") and (tuning == "full" or "lora" in name)
    }


def test_discriminator_joins_when_it_is_told_to(backbone):
    settings = d3sr.DiscriminatorConfig(start=5)
    method = d3sr.build(d3sr.D3SRConfig(backbone=backbone, discriminator=settings))
    early = [p for p in method.phases if p.runs_at(4)]
    assert [p.network for p in early] == ["generator"]
    assert "adversarial" not in run_phase(method, early[0], pair())
    assert [p.network for p in method.phases if p.runs_at(5)] == ["generator", "discriminator"]
    without = d3sr.build(d3sr.D3SRConfig(backbone=backbone, adversarial_weight=0.0))
    assert set(without.networks) == {"generator"}


def test_critic_of_images_joins_beside_the_discriminator(backbone):
    extras = d3sr.ExtrasConfig(train_decoder=True, critic=d3sr.CriticConfig(weight=0.1, widths=(8, 12), start=3))
    settings = d3sr.DiscriminatorConfig(start=5, tuning="full")
    config = d3sr.D3SRConfig(backbone=backbone, tuning="full", discriminator=settings, extras=extras)
    method = d3sr.build(config)
    terms = {step: set() for step in (2, 3, 5)}
    for step, seen in terms.items():
        batch = pair()
        for phase in (p for p in method.phases if p.runs_at(step)):
            seen |= set(run_phase(method, phase, batch))
            assert with_gradient(method.networks[phase.network])
    spatial = {"mse", "ea_dists"}
    assert terms[2] == spatial
    assert terms[3] == spatial | {"critic_adversarial", "critic"}
    assert terms[5] == terms[3] | {"adversarial", "discriminator"}


def test_a_critic_sees_every_image_from_a_place_of_its_own():
    x = torch.arange(2 * 3 * 20 * 24, dtype=torch.float32).reshape(2, 3, 20, 24)
    places = set()
    for number in range(6):
        parts, other = adversarial.shifted([x, -x], SampleRandom("test", number, samples=range(2)))
        assert parts.shape == (2, 3, 12, 16)
        assert torch.equal(parts, -other), "the same place in every image of a sample"
        for part, whole in zip(parts, x, strict=True):
            row, column = divmod(int(part[0, 0, 0] - whole[0, 0, 0]), 24)
            assert torch.equal(part, whole[:, row : row + 12, column : column + 16])
            places.add((row, column))
    assert len(places) > 6


def test_lattice_planes_name_every_place_in_an_input_pixel():
    planes = adversarial.lattice_planes(torch.zeros(1, 3, 8, 12), 4)[0]
    codes = [planes[:, row, column] for row in range(4) for column in range(4)]
    assert all(torch.dist(a, b) > 0.5 for a, b in combinations(codes, 2))
    assert torch.allclose(planes[:, 4:], planes[:, :4], atol=1e-6)
    assert torch.allclose(planes[:, :, 4:], planes[:, :, :8], atol=1e-6)
    assert planes.min() >= 0
    assert planes.max() <= 1


def test_a_critic_told_of_the_lattice_sees_planes_from_the_place_of_the_image():
    seen = []

    def network(images, condition):
        seen.append((images, condition))
        return (images.mean().reshape(1, 1, 1, 1).expand(len(images), 1, 1, 1),)

    judge = adversarial.ImageCritic(adversarial.CriticConfig(weight=1.0, conditional=True, lattice=True))
    planes = adversarial.lattice_planes(torch.zeros(6, 3, 32, 32), 4)[
        :, :3
    ]  # what stands for the images tells the place
    batch = {"hr": planes, "sr": planes, "lr": torch.zeros(6, 3, 8, 8)}
    judge.discriminator_loss({adversarial.CRITIC: network}, batch, random_of(6))
    ((images, condition),) = seen
    assert condition.shape[1] == judge.condition_channels == 9
    assert torch.equal(condition[:, 3:6], images)
    assert any(not torch.equal(images[0], other) for other in images[1:6]), "every sample has a place of its own"


@pytest.mark.parametrize("views", [{}, {"contrast_floor": 0.05, "conditional": True, "lattice": True, "matching": 1.0}])
def test_critic_learns_to_tell_images_and_teaches_the_generator(backbone, views):
    extras = d3sr.ExtrasConfig(critic=d3sr.CriticConfig(weight=1.0, **views))
    config = d3sr.D3SRConfig(backbone=backbone, adversarial_weight=0.0, extras=extras, tuning="full")
    method = d3sr.build(config)
    generator_phase, critic_phase = method.phases
    critic = method.networks["critic"]
    batch = pair()
    terms = run_phase(method, generator_phase, batch)
    assert terms["critic_adversarial"].item() > 0
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
    first = run_phase(method, critic_phase, batch)["critic"].item()
    for _ in range(60):
        run_phase(method, critic_phase, batch)
        optimizer.step()
    assert run_phase(method, critic_phase, batch)["critic"].item() < 0.7 * first


@pytest.mark.parametrize("kind", ["noise_aware", "vanilla", "diffusion_gan"])
@pytest.mark.parametrize("distance", ["ea_dists", "dists", "lpips"])
def test_every_row_of_tables_five_and_six_trains(backbone, kind, distance):
    settings = d3sr.DiscriminatorConfig(kind=kind, lora=LoraConfig(rank=2, alpha=2.0))
    perceptual = PerceptualConfig(distance=distance)
    config = d3sr.D3SRConfig(backbone=str(backbone), tuning="full", discriminator=settings, perceptual=perceptual)
    method = d3sr.build(config)
    batch = pair()
    for phase in method.phases:
        terms = run_phase(method, phase, batch)
        assert all(torch.isfinite(value) for value in terms.values())
        gradients = with_gradient(method.networks[phase.network])
        assert gradients
    assert batch["z_hr"].shape == batch["z_sr"].shape
    assert not batch["z_hr"].requires_grad
    assert not batch["z_sr"].requires_grad


def test_decoder_trains_only_on_request(backbone):
    method = d3sr.build(d3sr.D3SRConfig(backbone=backbone, tuning="full", extras=d3sr.ExtrasConfig(train_decoder=True)))
    names = {name for name in trainable(method.networks["generator"]) if "autoencoder" in name}
    assert names
    assert all(".decoder" in name for name in names)


def test_d3srs_generator_is_changed_only_as_asked(backbone):
    plain = d3sr.build(d3sr.D3SRConfig(backbone=backbone, adversarial_weight=0.0))
    model = plain.networks["generator"].generator.config.model
    assert (model.even_contrast, model.decoder_blocks) == (False, SMALL.decoder_blocks)
    assert (plain.scale, plain.hr_multiple) == (4, 8)
    extras = d3sr.ExtrasConfig(deepen=Depth(decoder_blocks=SMALL.decoder_blocks + 1), even_contrast=True)
    changed = d3sr.build(d3sr.D3SRConfig(backbone=backbone, adversarial_weight=0.0, extras=extras))
    model = changed.networks["generator"].generator.config.model
    assert (model.even_contrast, model.decoder_blocks) == (True, SMALL.decoder_blocks + 1)
    with pytest.raises(UserError, match="gradient_checkpointing: a TinyUNet is too small to offer it"):
        d3sr.build(d3sr.D3SRConfig(backbone=backbone, gradient_checkpointing=True))


def test_exported_generator_equals_the_trained_one_with_adapters_merged(backbone, tmp_path):
    torch.manual_seed(0)
    method = d3sr.build(d3sr.D3SRConfig(backbone=backbone, timestep=250, lora=LoraConfig(rank=2, alpha=2.0)))
    for name, parameter in method.networks["generator"].named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    exported = method.export(method.networks)
    assert exported.beside == {}
    path = tmp_path / "model.safetensors"
    files.save_model(path, architecture=exported.architecture, config=exported.config, state_dict=exported.state_dict)
    lr = pair()["lr"]
    loaded = loading.load_generator(path)
    with torch.no_grad():
        assert torch.allclose(loaded(lr), method.networks["generator"].eval()(lr)[0], atol=1e-4)
    assert loaded.timestep == 250
    assert method.preview is not None
    shown = method.preview(all_networks(method), pair())
    assert set(shown) == {"LR (bicubic)", "SR", "HR"}
    assert torch.allclose(shown["SR"], loaded(lr).clamp(0, 1), atol=1e-4)


def test_what_is_missing_or_wrong_is_said(backbone, tmp_path):
    nowhere = PerceptualConfig(features="vgg16", vgg16_weights=str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match=r"none\.pth"):
        d3sr.build(d3sr.D3SRConfig(backbone=backbone, perceptual=nowhere))
    with pytest.raises(UserError, match="expected a tiny autoencoder"):
        pretraining.build_diffusion(pretraining.DiffusionConfig(autoencoder=backbone))
    with pytest.raises(ValueError, match="nothing ties"):
        d3sr.D3SRConfig(backbone=backbone, mse_weight=0.0, perceptual_weight=0.0)
    with pytest.raises(ValueError, match="negative"):
        d3sr.D3SRConfig(backbone=backbone, mse_weight=-1.0)
