"""A suite from its runs to its report: resuming, reusing, refusing, measuring. Runs are trained in this process."""

from __future__ import annotations

import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

from onestepsr.core.errors import UserError
from onestepsr.data.datasets import build_dataset
from onestepsr.evaluate.metrics.fidelity import as_eight_bit, psnr_y
from onestepsr.models.loading import BICUBIC, load_generator
from onestepsr.prompts.embedder import EmbeddingCache
from onestepsr.train import ablation, ablation_report
from onestepsr.train.ablation import (
    Ablation,
    EvaluationConfig,
    Suite,
    load_suite,
    plan_ablation,
    run_process,
    train_all,
)
from onestepsr.train.ablation_report import HeldOut, compare, find_metric, over_seeds, training_seconds
from onestepsr.train.recipes import load_run
from onestepsr.train.run import execute, prepare


def train_here(command: Sequence[str]) -> int:
    method, recipe = command[4], command[6]
    execute(prepare(load_run(method, recipe), resume="--resume" in command))
    return 0


@pytest.fixture
def suite(micro_suite: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setattr(ablation, "run_process", train_here)
    return load_suite(str(micro_suite), [f"validation={micro_suite.parent / 'held-out'}"])


def plan(suite: Suite, out: Path, only: Sequence[str] = (), reuse: Sequence[Path] = (), seeds: int = 1) -> Ablation:
    return plan_ablation(suite, only=only, seeds=range(seeds), out=out, reuse=reuse)


def states(planned: Ablation) -> dict[str, str]:
    return {run.name: run.state for run in planned.runs}


def test_finished_runs_are_left_alone_and_interrupted_ones_resumed(suite: Suite, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert states(plan(suite, out)) == {"mse/seed-0": "new", "dists/seed-0": "new"}
    assert not out.exists(), "planning writes nothing"
    assert train_all(plan(suite, out, only=["dists"])) == {}
    model = out / "dists" / "seed-0" / "model.safetensors"
    before = model.stat().st_mtime_ns

    interrupt_after_one_step(plan(suite, out, only=["mse"]))
    planned = plan(suite, out)
    assert states(planned) == {"mse/seed-0": "interrupted", "dists/seed-0": "finished"}
    assert planned.runs[0].step == 1
    said: list[str] = []
    assert train_all(planned, announce=said.append) == {}
    assert said == ["[1/2] mse/seed-0, resumed at step 1"]
    assert states(plan(suite, out)) == {"mse/seed-0": "finished", "dists/seed-0": "finished"}
    assert model.stat().st_mtime_ns == before
    assert training_seconds(model.parent) is not None


def interrupt_after_one_step(planned: Ablation) -> None:
    """Leave a run as a killed process would: the checkpoint of step 1 and no model of the last step."""
    run = planned.runs[0]
    config = run.config
    train_all(planned)
    (run.folder / "model.safetensors").unlink()
    short = load_run(config.method, str(run.folder / "config.yaml"), ["train.steps=1", f"out={run.folder}-short"])
    execute(prepare(short, resume=False))
    checkpoints = run.folder / "checkpoints"
    for path in checkpoints.iterdir():
        path.rename(path.with_name(".writing_old"))
    (Path(f"{run.folder}-short") / "checkpoints" / "step_000000001").rename(checkpoints / "step_000000001")


def test_a_run_in_the_suite_is_the_ordinary_run(suite: Suite, tmp_path: Path) -> None:
    planned = plan(suite, tmp_path / "out", only=["mse"])
    train_all(planned)
    alone = load_run("d3sr", str(tmp_path / "out" / "mse" / "seed-0.yaml"), [f"out={tmp_path / 'alone'}"])
    execute(prepare(alone, resume=False))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (planned.runs[0].folder, alone.out))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_equal_runs_of_another_folder_are_reused(suite: Suite, tmp_path: Path) -> None:
    train_all(plan(suite, tmp_path / "first", only=["dists"]))
    second = plan(suite, tmp_path / "second", reuse=[tmp_path / "first"])
    assert states(second) == {"mse/seed-0": "new", "dists/seed-0": "finished"}
    assert second.runs[1].folder == tmp_path / "first" / "dists" / "seed-0"
    other_seed = plan_ablation(suite, only=["dists"], seeds=[1], out=tmp_path / "second", reuse=[tmp_path / "first"])
    assert states(other_seed) == {"dists/seed-1": "new"}
    with pytest.raises(UserError, match="no such folder"):
        plan(suite, tmp_path / "second", reuse=[tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.steps=3", r"mse.seed-0 holds a run with other settings \(train\.steps is 2 there and 3 now\)"),
        ("config.mse_weight=7", r"other settings \(config\.mse_weight is 1\.0 there and 7\.0 now\)"),
    ],
)
def test_other_settings_are_refused(suite: Suite, tmp_path: Path, setting: str, message: str) -> None:
    train_all(plan(suite, tmp_path / "out", only=["mse"]))
    changed = load_suite(str(tmp_path / "micro-suite.yaml"), [f"validation={tmp_path / 'held-out'}", setting])
    with pytest.raises(UserError, match=message):
        plan(changed, tmp_path / "out")


def test_folders_of_others_are_refused(suite: Suite, tmp_path: Path) -> None:
    train_all(plan(suite, tmp_path / "out", only=["mse"]))
    other = Suite(name="other", config=suite.config)
    with pytest.raises(UserError, match="holds runs of suite 'micro-suite', not of 'other'"):
        plan(other, tmp_path / "out")
    with pytest.raises(UserError, match="not empty and holds no runs of a suite"):
        plan(suite, tmp_path / "photos")
    with pytest.raises(UserError, match="is a file"):
        plan(suite, tmp_path / "micro.yaml")


def test_what_a_run_would_refuse_is_found_first(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "backbone.safetensors").unlink()
    with pytest.raises(UserError, match=r"variant 'mse': .*backbone\.safetensors"):
        plan(suite, tmp_path / "out")


def test_held_out_photos_must_not_be_training_photos(suite: Suite, tmp_path: Path) -> None:
    leaking = load_suite(str(tmp_path / "micro-suite.yaml"), [f"validation={tmp_path / 'photos'}"])
    with pytest.raises(UserError, match="are among the training photos"):
        plan(leaking, tmp_path / "out")
    assert plan(suite, tmp_path / "out").runs


def test_a_failed_run_does_not_stop_the_others(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_first(command: Sequence[str]) -> int:
        return 2 if "mse" in command[6] else train_here(command)

    monkeypatch.setattr(ablation, "run_process", fail_first)
    failures = train_all(plan(suite, tmp_path / "out"))
    assert failures == {"mse/seed-0": "training ended with exit code 2"}
    assert states(plan(suite, tmp_path / "out"))["dists/seed-0"] == "finished"


@pytest.mark.skipif(os.name != "posix", reason="file locks of Unix")
def test_a_second_ablation_in_the_same_folder_is_refused(suite: Suite, tmp_path: Path) -> None:
    planned = plan(suite, tmp_path / "out")
    (tmp_path / "out").mkdir()
    hold = "import sys; from pathlib import Path; from onestepsr.core.files import locked\n"
    hold += "with locked(Path(sys.argv[1]), wait=True): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "out" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another ablation trains there"):
            train_all(planned)
    assert train_all(planned) == {}


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
def test_a_request_to_leave_reaches_the_run_and_is_waited_for(tmp_path: Path) -> None:
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    code = f"""
import pathlib, signal, sys, time
def leave(number, frame):
    time.sleep(0.3)
    pathlib.Path({str(saved)!r}).write_text("checkpoint")
    sys.exit(130)
signal.signal(signal.SIGTERM, leave)
pathlib.Path({str(ready)!r}).touch()
time.sleep(60)
"""

    def ask() -> None:
        while not ready.exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ask).start()
    with pytest.raises(KeyboardInterrupt):
        run_process([sys.executable, "-c", code])
    assert saved.read_text() == "checkpoint"
    assert run_process([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    with pytest.raises(UserError, match="cannot be started"):
        run_process([str(tmp_path / "no-such-program")])


def evaluation(suite: Suite, **changes: object) -> EvaluationConfig:
    return EvaluationConfig(**{**vars(suite.config.evaluation), **changes})  # type: ignore[arg-type]


def test_values_are_those_of_the_metrics_on_fixed_pairs(suite: Suite) -> None:
    held_out, again = HeldOut(suite.config.evaluation), HeldOut(suite.config.evaluation)
    assert [metric.name for metric in held_out.metrics] == ["psnr", "ssim", "dists_oriented", "lpips_oriented", "grid"]
    assert "NIQE was not measured" in held_out.notes[0]
    values = held_out.measure(load_generator(BICUBIC)).values
    for index in range(3):
        pair = again.pairs[index]
        enlarged = functional.interpolate(pair["lr"][None], scale_factor=4, mode="bicubic")
        assert values["psnr"][index] == pytest.approx(psnr_y(as_eight_bit(enlarged), pair["hr"][None]).item(), abs=1e-4)
    assert all(len(column) == 3 for column in values.values())
    assert set(held_out.measure(None).values) == {"grid"}, "an HR image is not compared with itself"
    other = HeldOut(evaluation(suite, seed=1))
    assert not torch.equal(other.pairs[0]["lr"], held_out.pairs[0]["lr"])


def test_whole_pairs_of_any_size_are_each_used_once(suite: Suite, tmp_path: Path) -> None:
    for folder, scale in (("HR", 4), ("LR", 1)):
        (tmp_path / folder).mkdir()
        for number in range(2):
            Image.new("RGB", (10 * scale, (9 + number) * scale), (90, 50, 20)).save(tmp_path / folder / f"{number}.png")
    places = [f"validation={tmp_path / 'HR'}", f"evaluation.data.lr_paths=[{tmp_path / 'LR'}]"]
    pairs = load_suite(
        str(tmp_path / "micro-suite.yaml"), [*places, "evaluation.data.kind=pairs", "evaluation.data.crop=0"]
    )
    assert plan(pairs, tmp_path / "out").runs[0].config.validation.data is None
    held_out = HeldOut(pairs.config.evaluation)
    measured = held_out.measure(load_generator(BICUBIC))
    assert [len(column) for column in measured.values.values()] == [2, 2, 2, 2, 2]
    assert [image.shape for image in measured.images] == [(3, 24, 24), (3, 24, 24)]


def test_held_out_pairs_are_no_samples_of_a_training_stream(suite: Suite) -> None:
    data = suite.config.evaluation.data
    pairs, stream = HeldOut(suite.config.evaluation).pairs, build_dataset(data, 0)
    assert not any(torch.equal(pairs[i]["lr"], stream[j]["lr"]) for i in range(3) for j in range(9))


def test_perceptual_metrics_tell_their_features_and_order_blur(suite: Suite) -> None:
    perceptual = suite.config.evaluation.perceptual
    hr = HeldOut(suite.config.evaluation).pairs[0]["hr"][None]
    blurred = [functional.avg_pool2d(functional.pad(hr, [k // 2] * 4, mode="reflect"), k, 1) for k in (1, 3, 7)]
    for name, title in (("dists", "DISTS (oriented)"), ("lpips", "LPIPS (oriented)")):
        metric = find_metric(name, perceptual)
        distances = [float(metric.load()(image, hr)) for image in blurred]
        assert metric.title == title
        assert distances[0] == pytest.approx(0, abs=1e-5)
        assert distances[0] < distances[1] < distances[2]
    with pytest.raises(UserError, match="unknown metric 'lpisp': did you mean 'lpips'"):
        find_metric("lpisp", perceptual)


def test_means_and_deviations_are_over_seeds() -> None:
    runs = [{"psnr": [20.0, 22.0], "niqe": [4.0, None]}, {"psnr": [23.0, 25.0], "niqe": [None, None]}]
    scores = over_seeds(runs)
    assert scores["psnr"] == {"mean": 22.5, "std": pytest.approx(statistics.stdev([21, 24]))}
    assert scores["niqe"] == {"mean": 4.0, "std": None}
    assert over_seeds([]) == {}


def test_a_model_that_is_there_is_measured_and_not_trained(
    micro_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "run_process", train_here)
    values = yaml.safe_load(micro_suite.read_text())
    shifting = {"title": "many steps", "model": "random:resshift-micro", "steps": 3, "sampler": "deterministic"}
    values["variants"] = {"before": {"title": "before", "model": "bicubic"}, **values["variants"], "shifting": shifting}
    micro_suite.write_text(yaml.safe_dump(values, sort_keys=False))
    suite = load_suite(str(micro_suite), [f"validation={tmp_path / 'held-out'}"])
    planned = plan(suite, tmp_path / "out")
    assert list(states(planned)) == ["mse/seed-0", "dists/seed-0"]
    assert planned.variants == ["before", "mse", "dists", "shifting"]
    generator = suite.config.variants["shifting"].load()
    assert (generator.schedule.steps, generator.sampler) == (3, "deterministic")
    held_out = HeldOut(suite.config.evaluation)
    before, enlarged = suite.config.variants["before"].load(), load_generator(BICUBIC)
    assert held_out.measure(before).values == held_out.measure(enlarged).values
    trained = [run for run in planned.runs if run.variant == "mse"]
    train_all(dataclasses.replace(planned, runs=trained))
    failures = {"dists/seed-0": "not trained here"}
    results, (_, _, sheet) = compare(planned, held_out, failures, tmp_path / "report", command="")
    assert [row["name"] for row in results["rows"]] == ["bicubic", "before", "mse", "dists", "shifting", "hr"]
    assert [len(row["runs"]) for row in results["rows"]] == [1, 1, 1, 0, 1, 1]
    with Image.open(sheet) as image:
        assert image.width == 5 * (24 + 4) + 4, "every model but the one that is missing"
    with pytest.raises(UserError, match="nothing to train: before are existing models"):
        plan(suite, tmp_path / "out", only=["before"])
    settings = [f"validation={tmp_path / 'held-out'}", "variants.shifting.steps=9"]
    with pytest.raises(UserError, match="variant 'shifting': 9 steps: this schedule has 4"):
        plan(load_suite(str(micro_suite), settings), tmp_path / "out")


class NamedGrays:
    """An embedder whose embedding of a text is its length, in a file of the text's name."""

    def __init__(self, encoder: str, *, cache: EmbeddingCache) -> None:
        assert encoder == "an encoder"
        self.folder = cache.folder

    def path(self, text: str) -> Path:
        return self.folder / f"{text}.pt"

    def embed(self, texts: list[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for text in texts:
            torch.save(torch.full((1, 1), float(len(text))), self.path(text))

    def find(self, text: str) -> torch.Tensor:
        return torch.load(self.path(text))  # type: ignore[no-any-return]


class PromptedGray(torch.nn.Module):
    """A generator whose result is as bright as its prompt says."""

    def forward(self, lr: torch.Tensor, *, prompt: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 3, 4 * lr.shape[2], 4 * lr.shape[3]), prompt.item() / 10)


def test_a_variant_with_texts_is_measured_under_those_of_the_photos(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation_report, "PromptEmbedder", NamedGrays)
    config = evaluation(suite, shown=3)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=tmp_path / "cache"))
    held_out = HeldOut(config)
    texts = {}
    for number, name in enumerate(held_out.pairs.names()):  # type: ignore[union-attr]
        texts[Path(name).stem] = "x" * (1 + number)
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{Path(name).stem}.txt").write_text(texts[Path(name).stem])
    pairs = held_out.prompted(tmp_path / "texts", "an encoder")
    measured = held_out.measure(PromptedGray(), pairs=pairs)
    expected = [pairs[index]["prompt"].item() / 10 for index in range(3)]
    assert [image.mean().item() for image in measured.images] == pytest.approx(expected, abs=1 / 255)
    for index in range(3):
        assert torch.equal(pairs[index]["lr"], held_out.pairs[index]["lr"]), "the same pairs as without texts"


def test_texts_for_networks_that_read_none_are_refused(suite: Suite, tmp_path: Path) -> None:
    variants = {n: dataclasses.replace(v, prompts=tmp_path) for n, v in suite.config.variants.items()}
    prompted = dataclasses.replace(suite, config=dataclasses.replace(suite.config, variants=variants))
    with pytest.raises(UserError, match=r"variants.mse.prompts: networks of method d3sr read no texts"):
        plan(prompted, tmp_path / "out")
