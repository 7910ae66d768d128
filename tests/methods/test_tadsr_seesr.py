"""TAD-SR with SeeSR as the teacher, as its published code has it, on networks of some ten thousand parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_seesr import CONFIG, small_seesr
from torch import Tensor

from onestepsr.core.config import from_mapping, to_mapping
from onestepsr.core.errors import UserError
from onestepsr.data.datasets import TAUGHT, DataConfig, build_dataset
from onestepsr.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss
from onestepsr.methods import tadsr
from onestepsr.methods.base import Batch, Method, SampleRandom
from onestepsr.methods.tadsr import TADSRConfig, build
from onestepsr.models.loading import load_generator
from onestepsr.models.seesr.generator import SeeSRGenerator
from onestepsr.models.seesr.networks import SeeSRCondition
from onestepsr.prompts.embedder import EmbeddingCache
from onestepsr.prompts.ram import tagger_pixels
from onestepsr.train.recipes import OptimizerConfig, load_run
from onestepsr.weights.files import save_model

OWN: dict[str, Any] = {
    "family": "seesr",
    "tuning": "image_branch",
    "distillation_weight": 0.2,
    "score_weight": 1.0,
    "adversarial_weight": 0.2,
    "seesr": {"tagger": "random"},
    "score": {"t_min": 20, "t_max": 880, "stride": 20},
    "discriminator": {"t_min": 20, "t_max": 880, "stride": 20, "official": {"logit_maps": 4, "norm_groups": 8}},
}
TOKENS = replace(CONFIG, image_tokens=5, image_width=12)  # the mean and 2 x 2 places


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seesr") / "seesr.safetensors"
    generator = small_seesr(TOKENS)
    save_model(path, architecture="seesr", config=to_mapping(TOKENS), state_dict=generator.state_dict())
    return path


def method_on(teacher: Path, **settings: Any) -> Method:
    torch.manual_seed(0)
    return build(from_mapping(TADSRConfig, {"teacher": str(teacher), **OWN, **settings}))


def batch_of(count: int = 2, texts: bool = True) -> Batch:
    rng = torch.Generator().manual_seed(1)
    batch = {
        name: torch.rand(count, 3, side, side, generator=rng) for name, side in (("hr", 32), ("lr", 8), (TAUGHT, 32))
    }
    return batch | ({"prompt": torch.randn(count, 5, 16, generator=rng)} if texts else {})


def iteration(method: Method, batch: Batch) -> list[dict[str, Tensor]]:
    """The terms of both phases, with gradients and without optimiser steps."""
    networks, terms = {**method.networks, **method.frozen}, []
    for index, phase in enumerate(method.phases):
        found = phase.loss(networks, batch, SampleRandom(index, samples=range(len(batch["hr"]))))
        own = [p for p in method.networks[phase.network].parameters() if p.requires_grad]
        sum(found.values()).backward(inputs=own)  # type: ignore[union-attr]
        terms.append(found)
    return terms


def test_one_iteration_is_the_published_one(teacher: Path) -> None:
    """Every value again, in the published code's order of calls: the student under the LR image from the noised photo,
    the teacher under the photo, the noises compared directly."""
    method, batch = method_on(teacher, seesr={"tagger": "random", "null_text": 0.0}), batch_of()
    given = dict(batch)
    networks = {**method.networks, **method.frozen}
    discriminator, student = method.networks["discriminator"], method.networks["student"]
    for layer in discriminator.out_layers:  # a start at zero would hide everything
        torch.nn.init.normal_(layer[-1].weight, std=0.1)
    state = {key: value.clone() for key, value in discriminator.state_dict().items()}
    terms = iteration(method, batch)
    steps = [SampleRandom(index, samples=range(2)) for index in (0, 1)]
    generator = small_seesr(TOKENS)
    schedule = generator.schedule
    with torch.no_grad():
        z_hr, z_taught = (generator.encode(given[name]) for name in ("hr", TAUGHT))
        noise = steps[0].normal(z_hr)
        ram = networks["ram"]
        text = given["prompt"]
        enlarged = generator.enlarge(given["lr"]).clamp(0, 1)
        seen = SeeSRCondition(enlarged, text, ram(tagger_pixels(enlarged, side=16)))
        judging = SeeSRCondition(given["hr"], text, ram(tagger_pixels(given["hr"], side=16)))
        steps[0].uniform()
        judged_noise = steps[0].normal(z_hr)
        t = 20 + 20 * steps[0].integers(0, 44)
        assert t.tolist() == batch["t"].tolist()
        z_T = schedule.add_noise(z_hr, noise, 999)
        z_0 = schedule.x0_from_eps(z_T, student(z_T, torch.full((2,), 999), seen), 999)
        network = networks["teacher"]
        real, fake = ((t, *network.features(schedule.add_noise(z, judged_noise, t), t, judging)) for z in (z_hr, z_0))
        discriminator.load_state_dict(state)
        hinge = hinge_discriminator_loss(discriminator(*real), discriminator(*fake))
        torch.testing.assert_close(terms[0]["hinge"], hinge, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            terms[1]["distillation"], 0.2 * (z_0 - z_taught).square().mean(), rtol=1e-4, atol=1e-5
        )
        t = 20 + 20 * steps[1].integers(0, 44)
        noise = steps[1].normal(z_hr)
        eps = [network(schedule.add_noise(z, noise, t), t, judging) for z in (z_0, z_taught)]
        hsd = ((eps[0] - eps[1]) * z_0).mean((1, 2, 3)).mean()
        torch.testing.assert_close(terms[1]["hsd"], hsd, rtol=2e-3, atol=1e-5)
        adversarial = 0.2 * hinge_generator_loss(discriminator(*fake))
        torch.testing.assert_close(terms[1]["adversarial"], adversarial, rtol=1e-3, atol=1e-5)


def test_only_the_image_branch_of_the_student_learns(teacher: Path) -> None:
    method, plain = method_on(teacher), method_on(teacher, gradient_checkpointing=True)
    for one in (method, plain):
        iteration(one, batch_of())
    student, network = method.networks["student"], method.frozen["teacher"]
    trained = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    assert all("image_attentions" in name or "controlnet_cond_embedding" in name for name in trained)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in trained.values())
    others = dict(plain.networks["student"].named_parameters())
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, others[name].grad, msg=name)
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    shared = {id(p) for p in network.parameters()} & {id(p) for p in student.parameters()}
    assert len(shared) == sum(not p.requires_grad for p in student.parameters())
    with torch.no_grad():
        before = network(*_inputs())
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        assert torch.equal(network(*_inputs()), before)
        assert not torch.allclose(student(*_inputs()), before, atol=1e-4)


def _inputs() -> tuple[Tensor, Tensor, SeeSRCondition]:
    rng = torch.Generator().manual_seed(0)
    z, control, text, image = (
        torch.randn(shape, generator=rng) for shape in ((1, 4, 8, 8), (1, 3, 16, 16), (1, 5, 16), (1, 5, 12))
    )
    return z, torch.tensor([500]), SeeSRCondition(control, text, image)


def test_half_of_the_texts_are_left_empty(teacher: Path) -> None:
    config = from_mapping(TADSRConfig, {"teacher": str(teacher), **OWN})
    loaded: Any = tadsr.load_teacher(config)
    batch = batch_of(64)
    empty = loaded.generator.prompt
    loaded.look(loaded.frozen, batch, SampleRandom(0, samples=range(64)))
    is_empty = (batch["text"] == empty).flatten(1).all(1)
    assert 20 <= int(is_empty.sum()) <= 44
    assert torch.equal(batch["text"][~is_empty], batch["prompt"][~is_empty])
    batch = batch_of(2, texts=False)
    loaded.look(loaded.frozen, batch, SampleRandom(0, samples=range(2)))
    assert torch.equal(batch["text"], empty.expand(2, -1, -1))
    for judge, key in (("hr", "hr_tokens"), ("lr", "lr_tokens")):
        loaded.config = replace(loaded.config, judge=judge)
        control, _, tokens = loaded.sees(batch, judging=True)
        assert torch.equal(tokens, batch[key])
        assert torch.equal(control, batch["hr"]) is (judge == "hr")


def test_tags_are_embedded_by_the_text_encoder_of_the_recipe_and_cut_off(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, ...]] = []

    def embedder(name: str, *, cache: EmbeddingCache, truncate: bool) -> None:
        made.append((name, cache, truncate))

    monkeypatch.setattr("onestepsr.prompts.embedder.PromptEmbedder", embedder)
    method, cache = (
        method_on(teacher, seesr={"tagger": "random", "text_encoder": "some/encoder"}),
        EmbeddingCache(tmp_path),
    )
    assert method.embedder is not None
    method.embedder(cache)
    assert made == [("some/encoder", cache, True)]


def test_the_student_is_exported_as_one_step_without_guidance(teacher: Path, tmp_path: Path) -> None:
    method = method_on(teacher)
    shown = method.preview({**method.networks, **method.frozen}, batch_of())  # type: ignore[misc]
    assert list(shown) == ["LR (bicubic)", "SR", "teacher", "HR"]
    untaught = {name: value for name, value in batch_of().items() if name != TAUGHT}
    assert list(method.preview({**method.networks, **method.frozen}, untaught)) == ["LR (bicubic)", "SR", "HR"]  # type: ignore[misc]
    exported = method.export(method.networks)  # type: ignore[misc]
    path = tmp_path / "model.safetensors"
    save_model(path, architecture=exported.architecture, config=exported.config, state_dict=exported.state_dict)
    generator: Any = load_generator(path)
    assert isinstance(generator, SeeSRGenerator)
    assert (generator.config.steps, generator.config.guidance) == (1, 1.0)
    original = small_seesr(TOKENS)
    assert torch.equal(generator.negative, original.negative)
    lr = torch.rand(1, 3, 4, 4)
    expected = small_seesr(replace(TOKENS, steps=1, guidance=1.0))(lr)
    torch.testing.assert_close(generator(lr), expected, rtol=1e-3, atol=1e-3)


def test_what_does_not_go_together(teacher: Path) -> None:
    for change, message in (
        ({"tuning": "full"}, "image_branch is for family seesr"),
        ({"family": "latent_diffusion"}, "image_branch is for family seesr"),
        ({"score": {"kind": "sds"}}, "hsd and discriminator"),
        ({"discriminator": {"architecture": "paper"}}, "hsd and discriminator"),
        ({"seesr": {"null_text": 2}}, "null_text is 2"),
    ):
        with pytest.raises(UserError, match=message):
            from_mapping(TADSRConfig, {"teacher": "x", **OWN, **change})
    with pytest.raises(UserError, match="expected SeeSR"):
        method_on(Path("d3sr-tiny"))
    with pytest.raises(UserError, match=r"DAPE: .* must hold"):
        method_on(teacher, seesr={"tagger": "nowhere"})
    method, batch = method_on(teacher), batch_of()
    del batch[TAUGHT]
    with pytest.raises(UserError, match=r"data.taught_paths: SeeSR's images .* made beforehand"):
        iteration(method, batch)


def test_images_of_a_teacher_are_cut_like_their_pair(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        for folder, image in (("hr", pixels), ("taught", 255 - pixels), ("lr", pixels[::4, ::4])):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / folder / f"{name}.png")
    folders: dict[str, Any] = {
        "paths": [tmp_path / "hr"],
        "lr_paths": [tmp_path / "lr"],
        "taught_paths": [tmp_path / "taught"],
    }
    config = from_mapping(DataConfig, {"kind": "pairs", **folders, "crop": 16, "rotations": True})
    dataset = build_dataset(config, 0)
    for index in range(6):
        sample = dataset[index]
        torch.testing.assert_close(sample[TAUGHT], 1 - sample["hr"])
        torch.testing.assert_close(sample["lr"].shape, (3, 4, 4))
    whole = build_dataset(replace(config, crop=0), 0)[1]
    torch.testing.assert_close(whole[TAUGHT], 1 - whole["hr"])
    Image.new("RGB", (32, 32)).save(tmp_path / "taught" / "a.png")
    with pytest.raises(UserError, match=r"a.png: 32x32, expected the size of the HR image, 64x48"):
        build_dataset(config, 0)
    with pytest.raises(UserError, match="taught_paths has 1 folders: expected one for each of 1 paths of pairs"):
        from_mapping(DataConfig, {"paths": [tmp_path], "taught_paths": [tmp_path]})


def test_the_recipe_has_the_published_settings() -> None:
    run = load_run("tadsr", "tadsr-sd2")
    config = run.config
    assert (config.distillation_weight, config.score_weight, config.adversarial_weight) == (0.2, 1.0, 0.2)
    for steps in (config.score, config.discriminator):
        drawn = tadsr.step_range(steps, 0, 999, "x")
        assert (drawn[0], drawn[-1], len(drawn)) == (20, 880, 44)
    assert config.discriminator.official.logit_maps == 320
    assert (config.seesr.start, config.seesr.judge, config.seesr.null_text) == ("hr", "hr", 0.5)
    optimizer = OptimizerConfig(lr=2e-5, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
    assert run.train.optimizer == optimizer
    assert run.train.optimizer_of("discriminator") == replace(optimizer, clipped=False)
    assert (run.train.batch_size, run.train.steps, run.train.gradient_clip, run.train.ema_decay) == (
        8,
        30000,
        1.0,
        0.99,
    )
    assert (run.train.schedule.kind, run.train.schedule.warmup_steps, run.train.ema_warmup) == ("constant", 0, False)
