"""OSEDiff as the trainer sees it: what is trained, what the regulariser follows, every row of the paper's ablations."""

import math
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UserError
from onestepsr.losses.distillation import guided, variational_gradient
from onestepsr.methods import osediff
from onestepsr.methods.base import SampleRandom
from onestepsr.methods.osediff import ConditionConfig, OSEDiffConfig
from onestepsr.methods.shared.adversarial import GeneratorOutput
from onestepsr.methods.shared.vsd import AdapterConfig, GuidedTeacher, VariationalConfig, variational_term
from onestepsr.models import loading
from onestepsr.models.convert import convert_to_published
from onestepsr.models.lora import copy_sharing_weights
from onestepsr.models.osediff.checkpoints import collect, write_published
from onestepsr.models.stable_diffusion.config import (
    AutoencoderConfig,
    PromptConfig,
    StableDiffusionGeneratorConfig,
    UNetConfig,
)
from onestepsr.models.stable_diffusion.networks import stable_diffusion_generator
from onestepsr.prompts.embedder import EmbeddingCache
from onestepsr.prompts.hub import NotHere
from onestepsr.train.recipes import load_run
from onestepsr.train.run import prepare, write_exported
from onestepsr.weights import files
from small import small_generator

WIDTH = 16
FULL = {"tuning": "full", "vsd": VariationalConfig(tuning="full")}
"""Without adapters a step takes half the time."""
SMALL = StableDiffusionGeneratorConfig(
    unet=UNetConfig(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
    ),
    autoencoder=AutoencoderConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8),
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "sd.safetensors"
    state = stable_diffusion_generator(SMALL).state_dict()
    files.save_model(path, architecture="stable-diffusion", config=to_mapping(SMALL), state_dict=state)
    return str(path)


def pair() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {"hr": torch.rand(2, 3, 32, 32, generator=rng), "lr": torch.rand(2, 3, 8, 8, generator=rng)}


def every(method):
    return {**method.networks, **method.frozen}


def iterate(method, batch, step=0):
    """One iteration as the trainer makes it; returns the terms and the names of parameters with a gradient."""
    terms, moved = {}, {}
    for index, phase in enumerate(method.phases):
        if not phase.runs_at(step):
            continue
        for network in method.networks.values():
            network.zero_grad()
        for name, network in method.networks.items():
            for parameter in network.trained:
                parameter.requires_grad_(name == phase.network)
        found = phase.loss(every(method), batch, SampleRandom("loss", step, index, samples=range(len(batch["lr"]))))
        sum(found.values()).backward()
        for key, value in batch.items():
            batch[key] = value.detach()
        terms |= {f"{phase.network}.{key}": float(value.detach()) for key, value in found.items()}
        assert all(math.isfinite(value) for value in terms.values())
        for name, network in method.networks.items():
            keys = {key for key, p in network.named_parameters() if p.grad is not None and p.grad.any()}
            assert not keys or name == phase.network, "gradients of another network"
            moved.setdefault(name, set()).update(keys)
            for parameter in network.trained:
                parameter.requires_grad_(True)
    return terms, moved


def built(config: OSEDiffConfig):
    torch.manual_seed(0)
    method = osediff.build(config)
    for network in method.networks.values():
        network.trained = [p for p in network.parameters() if p.requires_grad]
        for name, parameter in network.named_parameters():
            if "lora_B" in name:  # both halves then get a gradient in the first step
                torch.nn.init.normal_(parameter, std=0.02)
    for network in method.frozen.values():
        network.requires_grad_(False).eval()
    return method


def trainable(network) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_only_what_osediff_trains_gets_gradients(backbone):
    method = built(OSEDiffConfig(backbone=backbone))
    frozen = {key: value.clone() for key, value in method.frozen["teacher"].state_dict().items()}
    terms, moved = iterate(method, pair())
    assert set(terms) == {"generator.mse", "generator.lpips", "generator.vsd", "regularizer.eps"}
    generator = moved["generator"]
    assert generator == trainable(method.networks["generator"])
    assert moved["regularizer"] == trainable(method.networks["regularizer"])
    assert all("lora_" in key for key in moved["regularizer"])
    other = {key for key in generator if "lora_" not in key}
    assert {key.split("generator.", 1)[1] for key in other} == {
        "unet.unet.conv_in.base_layer.weight",
        "unet.unet.conv_in.base_layer.bias",
    }
    assert not any(".decoder." in key or "post_quant" in key for key in generator)
    assert any("vae.encoder" in key for key in generator)
    assert any("quant_conv.lora" in key for key in generator)
    after = method.frozen["teacher"].state_dict()
    assert all(torch.equal(value, after[key]) for key, value in frozen.items())


def test_parameters_are_as_many_as_published():
    with torch.device("meta"):
        method = osediff.build(OSEDiffConfig(backbone="random:sd21-base"))
    counts: dict[str, int] = {}
    for name, parameter in method.networks["generator"].named_parameters():
        if parameter.requires_grad:
            part = "vae" if "autoencoder" in name else "unet" if "lora_" in name else "conv_in"
            counts[part] = counts.get(part, 0) + parameter.numel()
    assert counts == {"unet": 4_055_712, "conv_in": 11_840, "vae": 369_356}
    regularizer = method.networks["regularizer"]
    assert sum(p.numel() for p in regularizer.parameters() if p.requires_grad) == 4_055_712
    held = {id(p): p.numel() for network in every(method).values() for p in network.parameters()}
    three = sum(p.numel() for network in every(method).values() for p in network.parameters())
    assert sum(held.values()) < 0.97e9, "one backbone is held"
    assert three > 2.6e9, "not three"


def test_shared_layers_change_no_number(backbone):
    configs = [OSEDiffConfig(backbone=backbone, share_frozen=share) for share in (True, False)]
    shared, apart = (iterate(built(config), pair())[0] for config in configs)
    assert shared == pytest.approx(apart, rel=1e-6)


def test_a_shared_copy_takes_adapters_alone_and_keeps_what_is_its_own():
    network = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2))
    copy = copy_sharing_weights(network, own=r"1")
    assert copy[0] is not network[0]
    assert copy[0][0] is network[0][0]
    assert copy[1] is not network[1]
    copy[0][0] = torch.nn.Identity()
    assert isinstance(network[0][0], torch.nn.Linear)


def test_distillation_term_is_the_published_gradient(backbone):
    """dL/dz of the generator's term, worked out once more from the networks' own predictions."""
    config = OSEDiffConfig(backbone=backbone, vsd=VariationalConfig(weight=0.5))
    method = built(config)
    generator = method.networks["generator"].generator
    judge = variational_term(generator, config.vsd)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    judge.generator_loss(every(method), GeneratorOutput(sr=z, z_sr=z), SampleRandom("x", samples=range(2))).backward()
    random = SampleRandom("x", samples=range(2))
    t = random.integers(20, 980)
    with torch.no_grad():
        z_t = generator.schedule.add_noise(z, random.normal(z), t)
        teacher, regularizer = (
            generator.schedule.x0_from_eps(z_t, every(method)[name](z_t, t, generator.prompt), t)
            for name in ("teacher", "regularizer")
        )
        expected = 0.5 * 2 * variational_gradient(z, teacher, regularizer) / z.numel()
    torch.testing.assert_close(z.grad, expected)


def test_steps_stay_in_their_ranges(backbone):
    settings = VariationalConfig(t_min=5, t_max=7, regularizer_t_min=2, regularizer_t_max=3, tuning="full")
    method = built(OSEDiffConfig(backbone=backbone, tuning="full", vsd=settings))
    seen: dict[str, list[int]] = {"teacher": [], "regularizer": []}
    for name, steps in seen.items():
        every(method)[name].register_forward_pre_hook(lambda _, a, steps=steps: steps.extend(a[1].tolist()))
    for step in range(4):
        iterate(method, pair(), step)
    assert set(seen["teacher"]) <= {5, 6, 7}
    assert set(seen["regularizer"]) <= {2, 3, 5, 6, 7}
    assert set(seen["regularizer"]) & {2, 3}


def test_the_regularizer_learns_the_latents_from_before_the_update(backbone):
    method = built(OSEDiffConfig(backbone=backbone, **FULL))
    batch = pair()
    iterate(method, batch)
    with torch.no_grad():
        sr, z = method.networks["generator"](batch["lr"])
    torch.testing.assert_close(batch["z_sr"], z)
    assert not batch["z_sr"].requires_grad
    assert sr.shape == batch["hr"].shape


def prompt_file(path: Path, seed: int, tokens: int = 5) -> Path:
    embedding = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    save_file({"prompt": embedding}, path)
    return path


def test_guidance_needs_a_negative_prompt_and_takes_both_in_one_evaluation(backbone, tmp_path):
    kinds = ConditionConfig(kind="file", file=prompt_file(tmp_path / "a.safetensors", 1))
    without = built(OSEDiffConfig(backbone=backbone, prompt=kinds, **FULL))
    assert without.frozen["teacher"].negative is None
    with_negative = replace(kinds, negative_file=prompt_file(tmp_path / "b.safetensors", 2))
    method = built(OSEDiffConfig(backbone=backbone, prompt=with_negative, **FULL))
    teacher = method.frozen["teacher"]
    assert isinstance(teacher, GuidedTeacher)
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    prompt = method.networks["generator"].generator.prompt
    calls = []
    teacher.unet.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    with torch.no_grad():
        found = teacher(z, t, prompt)
        assert calls == [4]
        negative, positive = (teacher.unet(z, t, side) for side in (teacher.negative, prompt))
    torch.testing.assert_close(found, guided(negative, positive, 7.5), rtol=1e-3, atol=1e-4)
    assert prompt.shape == (1, 5, WIDTH)
    assert not prompt.requires_grad


class Lengths:
    """An embedder that needs no weights: the embedding of a text holds its length."""

    width = WIDTH

    def __init__(self, name_or_path: str, cache: EmbeddingCache | None, fetch: bool) -> None:
        assert (name_or_path, cache, fetch) == ("sd21-base", None, True)

    def embed(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([torch.full((77, WIDTH), float(len(text))) for text in texts])


def test_texts_are_embedded_once_before_training(backbone, monkeypatch):
    monkeypatch.setattr("onestepsr.prompts.embedder.PromptEmbedder", Lengths)
    condition = ConditionConfig(kind="text", text="a photo", negative="blurred")
    method = built(OSEDiffConfig(backbone=backbone, prompt=condition, **FULL))
    assert method.networks["generator"].generator.prompt[0, :, 0].tolist() == [7.0] * 77
    assert method.frozen["teacher"].negative.shape == (1, 77, WIDTH)
    assert "generator.prompt" not in iterate(method, pair())[1]["generator"]
    monkeypatch.setattr(Lengths, "width", 1024)
    with pytest.raises(UserError, match="'sd21-base' gives embeddings of width 1024, the backbone takes 16"):
        osediff.build(OSEDiffConfig(backbone=backbone, prompt=condition))
    monkeypatch.undo()
    monkeypatch.delenv("ONESTEPSR_OFFLINE", raising=False)
    with torch.device("meta"):  # a dry run fetches no text encoder
        planned = osediff.build(OSEDiffConfig(backbone="random:sd21-base", prompt=condition))
    assert planned.networks["generator"].generator.prompt.shape == (1, 77, 1024)


def test_a_prompt_starts_as_its_kind_says():
    start = PromptConfig(tokens=5, std=0.5)
    assert ConditionConfig(kind="learnable", start=start).initial == start
    assert ConditionConfig(start=start).initial.std == 0, "no text: zeros"


class Recorded:
    """An embedder that tells how it was asked for."""

    width = WIDTH
    made: ClassVar[list[tuple[str, EmbeddingCache | None, bool]]] = []
    checked: ClassVar[list[list[str]]] = []

    def __init__(self, name_or_path: str, cache: EmbeddingCache | None, fetch: bool) -> None:
        self.made.append((name_or_path, cache, fetch))
        if name_or_path == "elsewhere":
            raise NotHere("elsewhere is not on this machine")

    def check(self, texts: list[str]) -> None:
        self.checked.append(texts)


def test_texts_of_photos_are_checked_without_fetching_and_embedded_with(backbone, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("onestepsr.prompts.embedder.PromptEmbedder", Recorded)
    Recorded.made.clear()
    Recorded.checked.clear()
    cache = EmbeddingCache(tmp_path)
    method = osediff.build(OSEDiffConfig(backbone=backbone, regularization="none", **FULL))
    assert method.check_texts is not None
    assert method.embedder is not None
    method.check_texts(("a photo", "another"), cache)
    assert Recorded.checked == [["a photo", "another"]]
    assert isinstance(method.embedder(cache), Recorded)
    assert Recorded.made == [("sd21-base", cache, False), ("sd21-base", cache, True)]
    assert not caplog.messages
    absent = ConditionConfig(text_encoder="elsewhere")
    osediff.build(OSEDiffConfig(backbone=backbone, regularization="none", prompt=absent, **FULL)).check_texts([], cache)
    message = "config.prompt.text_encoder: elsewhere is not on this machine; training begins by fetching it"
    assert caplog.messages == [message]
    learnt = OSEDiffConfig(backbone=backbone, regularization="none", prompt=ConditionConfig(kind="learnable"), **FULL)
    method = osediff.build(learnt)
    assert (method.embedder, method.check_texts) == (None, None)


def test_a_dry_run_checks_its_own_texts(monkeypatch):
    monkeypatch.setattr("onestepsr.prompts.embedder.PromptEmbedder", Recorded)
    monkeypatch.setattr(Recorded, "width", 64)
    Recorded.checked.clear()
    generator = small_generator()
    condition = ConditionConfig(kind="text", text="a photo", negative="blurred")
    with torch.device("meta"):
        negative = condition.put_on(generator)
    assert Recorded.checked == [["a photo", "blurred"]]
    assert generator.prompt.shape == negative.shape == (1, 77, 64)


def test_prompts_are_fixed_learnt_or_of_each_image(backbone):
    null = built(OSEDiffConfig(backbone=backbone, regularization="none", **FULL)).networks["generator"].generator
    assert not null.prompt.requires_grad
    learnable = built(OSEDiffConfig(backbone=backbone, prompt=ConditionConfig(kind="learnable"), **FULL))
    assert "generator.prompt" in iterate(learnable, pair())[1]["generator"]
    method = built(OSEDiffConfig(backbone=backbone, **FULL))
    seen = []
    for name in ("teacher", "regularizer"):
        every(method)[name].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2].clone()))
    batch = pair() | {"prompt": torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(4))}
    given = batch["prompt"].clone()
    iterate(method, batch)
    assert len(seen) == 3
    assert all(torch.equal(prompt, given) for prompt in seen)
    assert method.preview is not None
    with torch.no_grad():
        shown = [method.preview(every(method), columns)["SR"] for columns in (batch, pair())]
        expected = method.networks["generator"](batch["lr"], batch["prompt"])[0]
    assert not torch.equal(*shown)
    assert torch.equal(shown[0], expected.clamp(0, 1))


@pytest.mark.parametrize(
    ("kind", "tuning"),
    [("vsd", "full"), ("vsd_image", "full"), ("vsd_image", "lora"), ("gan", "full"), ("gan", "lora"), ("none", "full")],
)
def test_every_kind_of_regularization_trains(backbone, kind, tuning):
    discriminator = osediff.DiscriminatorConfig(hidden=(8,), tuning=tuning)
    vsd = VariationalConfig(tuning=tuning)
    config = OSEDiffConfig(
        backbone=backbone, regularization=kind, tuning=tuning, discriminator=discriminator, vsd=vsd, posterior="sample"
    )
    method = built(config)
    terms, moved = iterate(method, pair())
    term = {"vsd": "vsd", "vsd_image": "vsd", "gan": "adversarial"}.get(kind)
    assert (f"generator.{term}" in terms) == (kind != "none")
    assert set(moved) == {"generator"} | ({"vsd": {"regularizer"}, "gan": {"discriminator"}}.get(kind[:3], set()))
    assert all(moved.values())
    assert ("encoder" in method.frozen) == (kind in ("vsd_image", "gan"))
    assert (tuning == "full") == any("resnets.0.norm1" in key for key in moved["generator"])


@pytest.mark.parametrize(("tuning", "share"), [("lora", True), ("lora", False), ("full", True)])
@pytest.mark.parametrize(("kind", "name"), [("vsd", "teacher"), ("vsd_image", "encoder")])
def test_only_layers_that_no_one_trains_are_shared(backbone, tuning, share, kind, name):
    """Sharing saves memory; what the generator trains must not be the frozen networks' too."""
    config = OSEDiffConfig(backbone=backbone, tuning=tuning, share_frozen=share, regularization=kind)
    method = osediff.build(config)
    generator = method.networks["generator"]
    own = {id(parameter) for parameter in generator.parameters()}
    shared = [p for p in method.frozen[name].parameters() if id(p) in own]
    assert bool(shared) == (share and tuning == "lora")
    assert not any(parameter.requires_grad for parameter in shared)


@pytest.mark.parametrize("kind", ["vsd", "vsd_image", "gan"])
def test_before_its_start_a_regularization_costs_nothing(backbone, kind):
    settings = osediff.DiscriminatorConfig(start=3, tuning="full")
    vsd = VariationalConfig(start=3, tuning="full")
    config = OSEDiffConfig(
        backbone=backbone, tuning="full", regularization=kind, vsd=vsd, discriminator=settings, adversarial_weight=0.25
    )
    method = built(config)
    assert [(phase.start, phase.stop) for phase in method.phases] == [(0, 3), (3, None), (3, None)]
    asked = []
    for network in method.frozen.values():
        if network is not method.frozen.get("features") and network is not method.frozen.get("distance"):
            network.register_forward_hook(lambda *_: asked.append(1))
    batch = pair()
    assert set(iterate(method, batch, 2)[0]) == {"generator.mse", "generator.lpips"}
    assert not asked
    assert set(batch) == {"hr", "lr"}


@pytest.mark.parametrize("kind", ["vsd", "vsd_image", "gan"])
def test_what_a_judge_learns_from_has_no_graph(backbone, kind):
    settings = osediff.DiscriminatorConfig(tuning="full")
    method = built(OSEDiffConfig(backbone=backbone, regularization=kind, discriminator=settings, **FULL))
    batch = pair()
    method.phases[0].loss(every(method), batch, SampleRandom("x", samples=range(2)))
    assert set(batch) == {"hr", "lr", "z_sr"} | ({"z_hr"} if kind == "gan" else set())
    assert not any(image.requires_grad for image in batch.values())


@pytest.mark.parametrize("kind", ["gan", "none"])
def test_one_setting_replaces_the_regularization_of_a_recipe(backbone, tmp_path, kind):
    """The recipe names an optimiser for the regulariser, which then is not trained."""
    Image.effect_noise((160, 160), 60).convert("RGB").save(tmp_path / "photo.png")
    changes = [f"config.regularization={kind}", f"config.backbone={backbone}", "config.discriminator.tuning=full"]
    run = load_run("osediff", "osediff-tiny", [*changes, f"data.paths=[{tmp_path}]", f"out={tmp_path / 'run'}"])
    assert "regularizer" in run.train.optimizers
    trained = set(prepare(run, resume=False, dry=True).method.networks)
    assert trained == {"generator", "discriminator"} - (set() if kind == "gan" else {"discriminator"})


@pytest.mark.parametrize(
    ("parts", "tuning"),
    [
        (("encoder",), "lora"),
        (("decoder",), "lora"),
        (("encoder", "unet", "decoder"), "lora"),
        (("encoder",), "full"),
        (("unet",), "full"),
        (("decoder", "unet"), "full"),
    ],
)
def test_parts_carry_adapters_as_asked(backbone, parts, tuning):
    config = OSEDiffConfig(backbone=backbone, parts=parts, tuning=tuning, regularization="none")
    names = trainable(built(config).networks["generator"])
    found = {
        "encoder" if ".vae.encoder" in key or ".vae.quant" in key else "unet" if ".unet." in key else "decoder"
        for key in names
    }
    assert found == set(parts)


def test_adapters_can_be_put_on_named_layers_alone(backbone):
    config = OSEDiffConfig(
        backbone=backbone,
        regularization="none",
        parts=("encoder", "unet"),
        lora=AdapterConfig(targets=r".*\.to_q"),
        autoencoder_lora=AdapterConfig(targets=r"vae\.encoder\.conv_out"),
    )
    names = {key for key in trainable(built(config).networks["generator"]) if "lora_" in key}
    assert {key.partition(".lora_")[0].rpartition(".")[2] for key in names if "unet" in key} == {"to_q"}
    assert {key.partition(".lora_")[0] for key in names if "autoencoder" in key} == {
        "generator.autoencoder.vae.encoder.conv_out"
    }


@pytest.mark.parametrize("changes", [{"parts": ("unet", "decoder")}, {"tuning": "full"}])
def test_what_the_published_file_has_no_place_for_is_exported_merged_alone(backbone, changes):
    method = built(OSEDiffConfig(backbone=backbone, regularization="none", **changes))
    assert method.export is not None
    assert not method.export(method.networks).beside


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_ranks_of_the_encoder(backbone, rank):
    config = OSEDiffConfig(
        backbone=backbone, parts=("encoder",), autoencoder_lora=AdapterConfig(rank=rank), regularization="none"
    )
    halves = [p for name, p in built(config).networks["generator"].named_parameters() if "lora_A" in name]
    assert {half.shape[0] for half in halves} == {rank}


def test_exported_model_is_the_trained_one_and_starts_another_run(backbone, tmp_path):
    method = built(OSEDiffConfig(backbone=backbone))
    assert method.export is not None
    exported = method.export(method.networks)
    assert exported.architecture == "osediff"
    path = tmp_path / "model.safetensors"
    files.save_model(path, architecture=exported.architecture, config=exported.config, state_dict=exported.state_dict)
    loaded = loading.load_generator(path)
    lr = pair()["lr"]
    with torch.no_grad():
        expected = method.networks["generator"].eval()(lr)[0]
        torch.testing.assert_close(loaded(lr), expected, rtol=0, atol=2e-4)
    assert (loaded.timestep, loaded.scale) == (999, 4)
    write_published(tmp_path / "mine.pkl", collect(method.networks["generator"].generator))
    write_exported(exported, tmp_path / "run.safetensors", {"step": "1"})
    done = convert_to_published(tmp_path / "run.adapters.safetensors", tmp_path / "run.pkl")
    assert done.file.read_bytes() == (tmp_path / "mine.pkl").read_bytes()
    again = osediff.build(OSEDiffConfig(backbone=backbone, adapters=tmp_path / "mine.pkl"))
    with torch.no_grad():
        torch.testing.assert_close(again.networks["generator"].eval()(lr)[0], expected, rtol=0, atol=1e-5)


def test_faces_keep_their_size(backbone):
    method = built(OSEDiffConfig(backbone=backbone, scale=1, **FULL))
    assert (method.scale, method.hr_multiple) == (1, 4)
    batch = {"hr": pair()["hr"], "lr": pair()["hr"]}
    iterate(method, batch)
    assert method.preview is not None
    assert {image.shape for image in method.preview(every(method), batch).values()} == {(2, 3, 32, 32)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": 1000}, "config.timestep: 1000, but .* has steps from 0 to 999"),
        ({"vsd": {"t_max": 1000}}, "config.vsd: steps up to 1000, the last one is 999"),
        ({"vsd": {"t_min": 9, "t_max": 3}}, "need 0 <= t_min <= t_max, got 9 and 3"),
        ({"vsd": {"weight": -1}}, "must not be negative"),
        ({"scale": 0}, "scale is 0: expected 1 to 16"),
        ({"scale": 17}, "scale is 17: expected 1 to 16"),
        ({"backbone": "random:d3sr-tiny", "gradient_checkpointing": True}, "a TinyUNet is too small to offer it"),
        ({"parts": []}, r"parts is \[\]: expected one or more"),
        ({"parts": ["unet", "unet"]}, "each once"),
        ({"parts": ["text"]}, "'text' is not one of 'encoder', 'unet', 'decoder'"),
        ({"prompt": {"kind": "file"}}, "a file belongs to the kind 'file', and only to it"),
        ({"prompt": {"kind": "file", "file": "none.safetensors"}}, "none.safetensors: cannot be read"),
        ({"prompt": {"negative": "blurred"}}, "negative: belongs to the kind 'text', not to 'none'"),
        ({"mse_weight": 0, "perceptual_weight": 0}, "nothing ties the output"),
        ({"tuning": "full", "adapters": "x.pkl"}, "published weights need tuning 'lora'"),
        ({"adapters": "none.pkl"}, "none.pkl: cannot be read"),
        ({"regularization": "sds"}, "'sds' is not one of 'vsd', 'vsd_image', 'gan', 'none'"),
    ],
)
def test_mistakes_are_said_in_one_line(backbone, changes, message):
    with pytest.raises(UserError, match=message) as refusal:
        osediff.build(from_mapping(OSEDiffConfig, {"backbone": backbone, **changes}, "config"))
    assert "\n" not in str(refusal.value)


def test_defaults_are_the_published_codes():
    config = from_mapping(
        OSEDiffConfig, {"backbone": "x", "perceptual": {"features": "vgg16"}, "lora": {"targets": "a"}}
    )
    assert (config.mse_weight, config.perceptual_weight, config.perceptual.distance) == (1.0, 2.0, "lpips")
    assert (config.lora.rank, config.lora.alpha, config.vsd.guidance) == (4, 8.0, 7.5)
    assert (config.vsd.t_min, config.vsd.t_max, config.vsd.regularizer_t_max) == (20, 979, 999)


PUBLISHED = {
    "scale": 4,
    "timestep": 999,
    "posterior": "sample",
    "parts": ("encoder", "unet"),
    "tuning": "lora",
    "clamp_output": True,
    "mse_weight": 1.0,
    "perceptual_weight": 2.0,
    "regularization": "vsd",
}


@pytest.mark.parametrize("name", ["osediff-sd21", "osediff-sd21-24gb", "osediff-face"])
def test_recipes_say_what_was_published(name):
    run = load_run("osediff", name)
    face = name == "osediff-face"
    assert {key: getattr(run.config, key) for key in PUBLISHED} == PUBLISHED | ({"scale": 1} if face else {})
    assert (run.config.lora, run.config.autoencoder_lora, run.config.vsd.lora) == (AdapterConfig(),) * 3
    assert (run.config.perceptual.distance, run.config.perceptual.features) == ("lpips", "vgg16")
    assert run.config.prompt.negative is not None
    assert run.config.prompt.negative.startswith("blurring, dirty" if face else "painting, oil painting, illustration")
    assert run.config.prompt.negative.endswith("deformed, lowres, over-smooth")
    assert (run.data.crop, run.data.scale) == (512, 1 if face else 4)
    assert run.data.degradation == ("face_osediff" if face else "real_esrgan")
    optimizer = run.train.optimizer_of("regularizer")
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.eps) == (5e-5, (0.9, 0.999), 0.01, 1e-8)
    assert (run.train.batch_size, run.train.gradient_clip, run.train.ema_decay) == (16, 1.0, 0.0)


def test_the_tiny_recipe_differs_from_d3srs_in_the_losses_alone():
    ours, theirs = load_run("osediff", "osediff-tiny"), load_run("d3sr", "d3sr-tiny-single-stage")
    assert ours.data == theirs.data
    assert replace(ours.train, optimizers={}) == replace(theirs.train, optimizers={})
    assert ours.train.optimizer_of("generator") == theirs.train.optimizer_of("generator")
    assert ours.config.vsd.start == theirs.config.discriminator.start
    same = ("backbone", "timestep", "tuning", "mse_weight")
    assert all(getattr(ours.config, key) == getattr(theirs.config, key) for key in same)
    assert ("decoder" in ours.config.parts, "encoder" in ours.config.parts) == (
        theirs.config.extras.train_decoder,
        False,
    )
    assert ours.config.lattice_weight == theirs.config.extras.lattice_weight
