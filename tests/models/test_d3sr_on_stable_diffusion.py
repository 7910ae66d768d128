"""D3SR as at paper scale, on a Stable Diffusion of a few ten thousand parameters judged by half of a small XL."""

from dataclasses import replace

import pytest
import torch
from small_diffusion import write_folder

from onestepsr.core.errors import UserError
from onestepsr.methods import d3sr
from onestepsr.methods.base import SampleRandom
from onestepsr.models import loading
from onestepsr.weights import files

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("diffusers")
    write_folder(root / "sd")
    write_folder(root / "xl", xl=True)
    return root


def config_of(folders, **changes):
    settings = d3sr.DiscriminatorConfig(backbone=str(folders / "xl"), hidden=(8,))
    return replace(d3sr.D3SRConfig(backbone=str(folders / "sd"), discriminator=settings), **changes)


def pair():
    rng = torch.Generator().manual_seed(0)
    return {"hr": torch.rand(2, 3, 32, 32, generator=rng), "lr": torch.rand(2, 3, 8, 8, generator=rng)}


def train(method, steps):
    """Plain iterations; returns the losses and, by network, the parameters whose gradient was not zero once."""
    optimizers = {
        name: torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=1e-2)
        for name, net in method.networks.items()
    }
    moved = {name: set() for name in method.networks}
    losses = []
    for step in range(steps):
        batch = pair()
        for index, phase in enumerate(method.phases):
            for network in method.networks.values():
                network.zero_grad()
            random = SampleRandom("loss", step, index, samples=range(2))
            terms = phase.loss({**method.networks, **method.frozen}, batch, random)
            sum(terms.values()).backward()
            network = method.networks[phase.network]
            gradients = {key: p.grad for key, p in network.named_parameters() if p.requires_grad}
            assert all(g is not None and g.isfinite().all() for g in gradients.values())
            moved[phase.network] |= {key for key, g in gradients.items() if g.any()}
            optimizers[phase.network].step()
            losses.append(float(sum(terms.values()).detach()))
    return losses, moved


def test_every_trained_parameter_learns_and_no_frozen_one_moves(folders):
    torch.manual_seed(0)
    method = d3sr.build(config_of(folders))
    frozen = {
        (name, key): p.clone()
        for name, net in method.networks.items()
        for key, p in net.named_parameters()
        if not p.requires_grad
    }
    _, moved = train(method, 3)
    for name, network in method.networks.items():
        assert moved[name] == {key for key, p in network.named_parameters() if p.requires_grad}
    parameters = {name: dict(network.named_parameters()) for name, network in method.networks.items()}
    assert all(torch.equal(parameters[name][key], value) for (name, key), value in frozen.items())
    assert {key.split(".")[1] for key in moved["generator"]} == {"prompt", "unet"}


def test_gradient_checkpointing_changes_no_number(folders):
    losses = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        method = d3sr.build(config_of(folders, gradient_checkpointing=checkpointing))
        for network in method.networks.values():
            network.train()
        losses.append(train(method, 2)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_exported_generator_is_merged_and_loads_as_any_other(folders, tmp_path):
    torch.manual_seed(0)
    method = d3sr.build(config_of(folders))
    train(method, 2)
    exported = method.export(method.networks)
    assert not any("lora" in key for key in exported.state_dict)
    path = tmp_path / "model.safetensors"
    files.save_model(path, architecture=exported.architecture, config=exported.config, state_dict=exported.state_dict)
    lr = pair()["lr"]
    with torch.no_grad():
        expected = method.networks["generator"].eval()(lr)[0]
        torch.testing.assert_close(loading.load_generator(path)(lr), expected, rtol=0, atol=2e-4)


def test_backbones_of_other_latents_are_refused(folders, tmp_path):
    from onestepsr.core.config import to_mapping
    from onestepsr.models.tiny.generator import TinyGeneratorConfig, tiny_generator
    from onestepsr.models.tiny.networks import TinyConfig

    sizes = TinyConfig(widths=(8, 16), down_blocks=(1, 1), up_blocks=(1, 1), time_width=16)
    config = TinyGeneratorConfig(model=sizes)
    path = tmp_path / "tiny.safetensors"
    state = tiny_generator(config).state_dict()
    files.save_model(path, architecture="tiny-latent-diffusion", config=to_mapping(config), state_dict=state)
    settings = d3sr.DiscriminatorConfig(backbone=str(path))
    with pytest.raises(UserError, match=r"takes latents of 20 channels, those of .*sd have 4"):
        d3sr.build(config_of(folders, discriminator=settings))
