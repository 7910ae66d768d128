"""Training of ResShift's networks: the loss in closed form, what gets gradients, what is shown and exported."""

from pathlib import Path

import pytest
import torch
from residual_pairs import MICRO, evaluations_of, filled, networks_of, pair, run_phase, saved, with_gradient

from onestepsr.core.config import from_mapping
from onestepsr.core.errors import UserError
from onestepsr.diffusion.residual_shift import ResidualShiftConfig
from onestepsr.methods.base import SampleRandom
from onestepsr.methods.resshift import ResShiftConfig, build
from onestepsr.methods.shared.image_loss import PerceptualConfig
from onestepsr.models.loading import load_generator, load_residual_generator
from onestepsr.models.tiny.networks import TinyAutoencoder, TinyConfig
from onestepsr.weights.files import save_model

ORIENTED = PerceptualConfig(distance="lpips", features="oriented")


def test_loss_is_the_squared_error_of_z_0_at_uniformly_drawn_steps():
    method, batch = filled(build(ResShiftConfig(model=MICRO, mse_weight=2.0))), pair()
    told = []
    method.networks["denoiser"].register_forward_pre_hook(lambda module, inputs: told.append(inputs))
    terms = run_phase(method, batch)

    random = SampleRandom("test", 0, samples=range(2))
    autoencoder = method.frozen["autoencoder"].autoencoder
    enlarged = torch.nn.functional.interpolate(batch["lr"], scale_factor=4, mode="bicubic")
    with torch.no_grad():
        z_0, z_y = (autoencoder.encode(2 * picture - 1) for picture in (batch["hr"], enlarged))
        t = random.integers(0, 4)
        noise = random.normal(z_0)
        root = 0.1 * 9.9 ** ((t / 3) ** 0.3)  # 4 steps: sqrt(eta) from 0.2 / 2 to 0.99
        eta = root.square()[:, None, None, None]
        z_t = z_0 + eta * (z_y - z_0) + 2 * eta.sqrt() * noise
        scaled = z_t / (1 + 4 * eta).sqrt()
        estimate = method.networks["denoiser"](scaled, t, 2 * batch["lr"] - 1)
    assert set(terms) == {"mse"}
    assert terms["mse"].item() == pytest.approx(2 * (estimate - z_0).square().mean().item(), rel=1e-4)
    (x, steps, lq), *_ = told
    assert torch.allclose(x, scaled, atol=1e-4)
    assert torch.equal(steps, t)
    assert torch.equal(lq, 2 * batch["lr"] - 1)


@pytest.mark.parametrize("perceptual_weight", [0.0, 10.0])
def test_only_the_denoiser_learns(perceptual_weight):
    config = ResShiftConfig(model=MICRO, perceptual_weight=perceptual_weight, perceptual=ORIENTED)
    method = filled(build(config))
    autoencoder = method.frozen["autoencoder"]
    assert not autoencoder.training
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())
    before = {key: value.clone() for key, value in autoencoder.state_dict().items()}
    terms = run_phase(method, pair())
    assert set(terms) == {"mse", "lpips"} if perceptual_weight else {"mse"}
    denoiser = method.networks["denoiser"]
    assert with_gradient(denoiser) == {name for name, _ in denoiser.named_parameters()}
    assert all(torch.equal(value, before[key]) for key, value in autoencoder.state_dict().items())


def test_perceptual_term_is_the_distance_of_the_clamped_decoded_estimate_and_carries_its_gradient():
    config = ResShiftConfig(model=MICRO, mse_weight=0.0, perceptual_weight=10.0, perceptual=ORIENTED)
    method, batch = filled(build(config)), pair()
    made = []
    method.networks["denoiser"].register_forward_hook(lambda module, inputs, output: made.append(output))
    terms = run_phase(method, batch)
    decoded = method.frozen["autoencoder"].autoencoder.decode(made[0])
    assert decoded.abs().max() > 1, "there is something to clamp"
    sr = decoded.clamp(-1, 1) / 2 + 0.5
    expected = method.frozen["distance"](method.frozen["features"], sr, batch["hr"]).mean()
    assert set(terms) == {"lpips"}
    assert terms["lpips"].item() == pytest.approx(10 * expected.item(), rel=1e-5)
    assert with_gradient(method.networks["denoiser"])


@pytest.mark.parametrize(
    ("steps", "sampler", "told"), [(None, "ancestral", [3, 2, 1, 0]), (2, "deterministic", [3, 0])]
)
def test_preview_and_export_take_the_steps_of_the_configuration(tmp_path, steps, sampler, told):
    method = filled(build(ResShiftConfig(model=MICRO, steps=steps, sampler=sampler)))
    seen = []
    method.networks["denoiser"].register_forward_pre_hook(lambda module, inputs: seen.append(int(inputs[1][0])))
    with torch.no_grad():
        columns = method.preview(networks_of(method), pair())
    assert list(columns) == ["LR (bicubic)", "SR", "HR"]
    assert seen == told
    assert {tuple(image.shape) for image in columns.values()} == {(2, 3, 64, 64)}
    loaded = load_generator(saved(method, tmp_path / "model.safetensors"))
    assert (loaded.schedule.timesteps.tolist(), loaded.sampler) == (told[::-1], sampler)
    with torch.no_grad():
        sr = loaded(pair()["lr"]).clamp(0, 1)
    assert torch.allclose(sr, columns["SR"], atol=1e-4), "the image of the preview, from the file"


def test_trained_steps_are_all_of_the_schedule_though_the_model_runs_fewer():
    method = build(ResShiftConfig(model=MICRO, steps=1))
    told = set()
    method.networks["denoiser"].register_forward_pre_hook(lambda module, inputs: told.update(inputs[1].tolist()))
    for seed in range(6):
        run_phase(method, pair(), seed)
    assert told == {0, 1, 2, 3}


@pytest.fixture
def autoencoder(tmp_path: Path) -> str:
    network = TinyAutoencoder(TinyConfig(encoder_width=8, decoder_width=8))
    save_tiny(network, tmp_path / "autoencoder.safetensors")
    return str(tmp_path / "autoencoder.safetensors")


def save_tiny(network: TinyAutoencoder, path: Path) -> None:
    from onestepsr.models.architectures import describe

    architecture, config = describe(network)
    save_model(path, architecture=architecture, config=config, state_dict=network.state_dict())


def test_a_new_teacher_on_a_tiny_autoencoder(autoencoder, tmp_path):
    sizes = {"widths": [8, 16], "down_blocks": [1, 1], "up_blocks": [1, 1], "time_width": 16}
    values = {"autoencoder": autoencoder, "denoiser": sizes, "schedule": {"steps": 3}}
    config = from_mapping(ResShiftConfig, values)
    torch.manual_seed(0)
    method = build(config)
    assert (method.scale, method.hr_multiple) == (4, 8)
    assert set(run_phase(method, pair(8))) == {"mse"}
    loaded = load_residual_generator(saved(method, tmp_path / "teacher.safetensors"))
    assert loaded.schedule.config == ResidualShiftConfig(steps=3)
    first = {key: value.clone() for key, value in method.networks["denoiser"].state_dict().items()}
    again, other = (weights_after(seed, config) for seed in (0, 1))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(other["conv_in.weight"], first["conv_in.weight"]), "the run's seed decides"


def weights_after(seed: int, config: ResShiftConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build(config).networks["denoiser"].state_dict()


def test_from_scratch_keeps_everything_but_the_denoiser():
    given = load_residual_generator(MICRO)
    torch.manual_seed(5)
    config = ResShiftConfig(model=MICRO, from_scratch=True, schedule=ResidualShiftConfig(steps=6))
    method, kept = build(config), build(ResShiftConfig(model=MICRO))
    own, other = (m.networks["denoiser"].state_dict() for m in (method, kept))
    assert own.keys() == other.keys()
    assert not torch.equal(own["input_blocks.0.0.weight"], other["input_blocks.0.0.weight"])
    assert torch.equal(other["input_blocks.0.0.weight"], given.unet.state_dict()["input_blocks.0.0.weight"])
    autoencoder = method.frozen["autoencoder"].autoencoder.state_dict()
    assert all(torch.equal(value, autoencoder[key]) for key, value in given.autoencoder.state_dict().items())
    assert method.export(method.networks).config["schedule"]["steps"] == 6


def test_gradient_checkpointing_changes_no_gradient():
    gradients, evaluated = [], []
    for again in (False, True):
        method = filled(build(ResShiftConfig(model=MICRO, gradient_checkpointing=again)))
        count = evaluations_of(method.networks["denoiser"])
        run_phase(method, pair())
        gradients.append({name: p.grad for name, p in method.networks["denoiser"].named_parameters()})
        evaluated.append(len(count))
    assert evaluated == [1, 2], "in the backward pass again, where asked for"
    assert all(torch.allclose(value, gradients[1][name], atol=1e-6) for name, value in gradients[0].items())


def test_defaults_are_the_loss_of_versions_one_and_two():
    config = ResShiftConfig(model=MICRO)
    assert (config.mse_weight, config.perceptual_weight, config.steps, config.sampler) == (1.0, 0.0, None, "ancestral")
    assert (config.from_scratch, config.gradient_checkpointing) == (False, False)


def test_what_does_not_fit_is_one_line(autoencoder):
    cases = {
        "config.steps: 5 steps: this schedule has 4, accepted: 1 to 4": {"model": MICRO, "steps": 5},
        "give either model": {},
        "either model, a generator to start from, or": {"model": MICRO, "autoencoder": autoencoder},
        "from_scratch: there is no model": {"autoencoder": autoencoder, "from_scratch": True},
        "must not be negative, nor both be 0": {"model": MICRO, "mse_weight": 0.0},
        "'euler' is not one of": {"model": MICRO, "sampler": "euler"},
        "expected a model of the ResShift family": {"model": "d3sr-tiny"},
        "too small to offer it": {"autoencoder": autoencoder, "gradient_checkpointing": True},
        "latents of 20 channels, the denoiser is for 7": {
            "autoencoder": autoencoder,
            "denoiser": {"latent_channels": 7},
        },
    }
    for said, values in cases.items():
        with pytest.raises(UserError, match=said) as caught:
            build(from_mapping(ResShiftConfig, values, "config"))
        assert "\n" not in str(caught.value)
