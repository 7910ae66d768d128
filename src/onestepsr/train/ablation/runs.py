"""The runs of a suite: what of them is there already, and training the rest one after the other.

Each run is an ordinary one in a process of its own, in ``OUT/VARIANT/seed-N``. A finished run is left alone and an
interrupted one resumed, so the same command goes on after any interruption.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from onestepsr.core.config import read_mapping, to_mapping
from onestepsr.core.errors import UserError, error_context
from onestepsr.core.files import write_text
from onestepsr.core.signals import Interruption
from onestepsr.train.ablation.scoring import Candidate, refuse_training_photos
from onestepsr.train.ablation.suite import Suite, VariantRun, plan_runs
from onestepsr.train.checkpoint import Checkpoints
from onestepsr.train.recipes import RunConfig, check_resumable, load_run
from onestepsr.train.run import CONFIG, MODEL, config_text, prepare

MARK, LOCK = "suite.json", ".lock"
POLL_SECONDS = 0.2
"""How soon a request to leave is passed on to the running process."""
State = Literal["new", "interrupted", "finished"]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run and what is there of it."""

    run: VariantRun
    state: State
    folder: Path
    """Where its model is or will be: its own folder, or that of an equal run in a folder given for reuse."""
    step: int = 0
    """Step of the newest checkpoint."""

    @property
    def model(self) -> Path:
        """The trained generator."""
        return self.folder / MODEL


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A suite whose settings, folders and photos have been checked; nothing has been written."""

    suite: Suite
    variants: list[str]
    seeds: list[int]
    out: Path
    planned: list[PlannedRun]

    @property
    def models(self) -> dict[str, Candidate]:
        """By variant, those that are there already."""
        found = {name: self.suite.config.variants[name] for name in self.variants}
        return {name: Candidate(v.model, v.steps, v.sampler) for name, v in found.items() if v.model is not None}


def plan_ablation(
    suite: Suite, *, only: Sequence[str], seeds: Sequence[int], out: Path, reuse: Sequence[Path] = ()
) -> Ablation:
    """Check everything that can be wrong with any run of the suite, and find what is already there."""
    variants = suite.chosen(only)
    runs = plan_runs(suite, variants, seeds, out)
    _check_out(suite, out)
    others = _finished_runs(reuse)
    planned = [_look_up(run, others) for run in runs]
    for variant in suite.trained(variants):
        first = next(item.run for item in planned if item.run.variant == variant)
        refuse_training_photos(suite.config.evaluation.data, first.config.data)
        unfinished = next((i.run for i in planned if i.run.variant == variant and i.state != "finished"), None)
        if unfinished is not None:
            _check_run(unfinished)
    ablation = Ablation(suite=suite, variants=variants, seeds=list(seeds), out=out, planned=planned)
    for name, model in ablation.models.items():
        _check_model(name, model)
    return ablation


def train_all(
    ablation: Ablation,
    *,
    launcher: Sequence[str] = (),
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Train what is not finished; returns why, by run, for those that failed. A failure does not stop the others.

    ``launcher`` replaces the Python interpreter in front of ``-m onestepsr train``. Ctrl-C and SIGTERM let the run at
    work write a checkpoint and then raise KeyboardInterrupt.
    """
    failures: dict[str, str] = {}
    with claimed(ablation.out) as handles:
        _write_mark(ablation)
        for number, item in enumerate(ablation.planned, 1):
            if item.state == "finished":
                continue
            begins = f", resumed at step {item.step}" if item.step else ""
            announce(f"[{number}/{len(ablation.planned)}] {item.run.name}{begins}")
            code = run_process(train_command(item.run, launcher), handles)
            if code:
                failures[item.run.name] = f"training ended with exit code {code}"
            elif not _is_finished(item.folder, item.run.config):
                failures[item.run.name] = f"training left no {MODEL} of its last step"
            if item.run.name in failures:
                announce(f"{item.run.name}: {failures[item.run.name]}")
    return failures


def train_command(run: VariantRun, launcher: Sequence[str] = ()) -> list[str]:
    """The command of one run; its resolved settings are written beside its folder as a recipe."""
    recipe = run.config.out.with_suffix(".yaml")
    write_text(recipe, config_text(run.config))
    python = list(launcher) or [sys.executable]
    return [*python, "-m", "onestepsr", "train", run.config.method, "--recipe", str(recipe), "--resume"]


def run_process(command: Sequence[str], handles: Sequence[int] = ()) -> int:
    """Run ``command`` to its end and return its exit code (negative: the signal that ended it).

    A request to leave is passed on and the process waited for; then KeyboardInterrupt is raised. ``handles`` are file
    descriptors that the process inherits.
    """
    with Interruption() as interruption:
        try:
            process = subprocess.Popen(command, pass_fds=tuple(handles)) if handles else subprocess.Popen(command)
        except OSError as error:
            raise UserError(f"{command[0]}: cannot be started ({error.strerror})") from error
        try:
            code = _wait(process, interruption)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if interruption.requested:
            raise KeyboardInterrupt
    return code


def training_seconds(folder: Path) -> float | None:
    """Time that a run took, from its log; none if it cannot be told."""
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return max(float(json.loads(line)["seconds"]) for line in lines if '"kind": "train"' in line)
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def claimed(out: Path) -> Iterator[tuple[int, ...]]:
    """Hold ``out`` against a second ablation at work there; yields the descriptors that keep the hold.

    A process that inherits them keeps it too: a run that outlives its killed parent is still in the way.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("w")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    with file:
        if os.name != "posix":
            yield ()
            return
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{out}: another ablation is at work there, or a run that a killed one left; wait for it or end it"
            ) from error
        yield (file.fileno(),)


def _wait(process: subprocess.Popen[bytes], interruption: Interruption) -> int:
    passed_on = os.name != "posix"  # elsewhere Ctrl-C reaches all processes by itself, and terminating is no request
    while True:
        try:
            return process.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if interruption.requested and not passed_on:
                process.terminate()
                passed_on = True


def _check_out(suite: Suite, out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; choose another --out")
    if (out / MARK).is_file():
        other = read_mapping(out / MARK).get("suite")
        if other != suite.name:
            raise UserError(f"{out}: holds runs of suite '{other}', not of '{suite.name}'; choose another --out")
    elif any(path.name != LOCK for path in out.iterdir()):
        raise UserError(f"{out}: is not empty and holds no runs of a suite; choose another --out")


def _write_mark(ablation: Ablation) -> None:
    write_text(ablation.out / MARK, json.dumps({"suite": ablation.suite.name}) + "\n")


def _look_up(run: VariantRun, others: Sequence[tuple[Path, RunConfig]]) -> PlannedRun:
    own = run.config.out
    if (own / CONFIG).is_file():
        reason = _difference(load_saved(own), run.config)
        if reason:
            raise UserError(f"{own} holds a run with other settings ({reason}); remove it or choose another --out")
        if _is_finished(own, run.config):
            return PlannedRun(run=run, state="finished", folder=own, step=run.config.train.steps)
    for folder, config in others:
        if _difference(config, run.config) is None:
            return PlannedRun(run=run, state="finished", folder=folder, step=run.config.train.steps)
    checkpoint = Checkpoints(own / "checkpoints").latest()
    step = checkpoint.step if checkpoint else 0
    return PlannedRun(run=run, state="interrupted" if step else "new", folder=own, step=step)


def load_saved(folder: Path) -> RunConfig:
    """The resolved settings that a run left in its folder."""
    path = folder / CONFIG
    return load_run(str(read_mapping(path).get("method")), str(path))


def _finished_runs(folders: Sequence[Path]) -> list[tuple[Path, RunConfig]]:
    """Finished runs in, or up to two levels below, each of ``folders``."""
    found: list[tuple[Path, RunConfig]] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--reuse {folder}: no such folder")
        for pattern in (CONFIG, f"*/{CONFIG}", f"*/*/{CONFIG}"):
            for path in sorted(folder.glob(pattern)):
                try:
                    config = load_saved(path.parent)
                except UserError:
                    continue  # settings of another version: certainly no equal run
                if _is_finished(path.parent, config):
                    found.append((path.parent, config))
    return found


def _difference(saved: RunConfig, wanted: RunConfig) -> str | None:
    """Why two runs would not make the same weights; none if they would."""
    if saved.train.steps != wanted.train.steps:  # a learning-rate schedule ends with the run: longer is not the same
        return f"train.steps is {saved.train.steps} there and {wanted.train.steps} now"
    try:
        check_resumable(to_mapping(saved), wanted)
    except UserError as error:
        return str(error).partition("; ")[0]
    return None


def _is_finished(folder: Path, config: RunConfig) -> bool:
    """Whether the exported model is that of the last step."""
    try:
        with safe_open(folder / MODEL, framework="pt") as handle:
            metadata: dict[str, Any] = handle.metadata() or {}
    except (OSError, SafetensorError):
        return False
    return metadata.get("step") == str(config.train.steps)


def _check_model(name: str, model: Candidate) -> None:
    with error_context(f"variant '{name}'"):
        model.load()


def _check_run(run: VariantRun) -> None:
    """Find now what the run would refuse later: absent photos and backbones, sizes, networks that do not exist."""
    with error_context(f"variant '{run.variant}'"):
        prepare(run.config, resume=True, dry=True)
