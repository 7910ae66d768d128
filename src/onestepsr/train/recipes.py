"""A run as one strict configuration, and the recipes it is read from: YAML files of ours or of the user's."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from onestepsr import methods
from onestepsr.core.config import apply_overrides, from_mapping, merged, read_mapping, to_mapping
from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.data.config import DataConfig
from onestepsr.methods.base import get_method
from onestepsr.train.config import OptimizerConfig, PreviewConfig, TrainConfig


def load_methods() -> None:
    """Import every module of ``onestepsr.methods``, which registers its methods."""
    for module in pkgutil.iter_modules(methods.__path__, f"{methods.__name__}."):
        importlib.import_module(module.name)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(PreviewConfig):
    """Images and scores during training."""

    data: DataConfig | None = None
    """Held-out images; without them the first training samples are shown, whose scores say little."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run does."""

    method: str
    """Name of the training method."""
    out: Path
    """Folder for checkpoints, previews, logs and the trained model."""
    config: Any
    """The method's own settings."""
    data: DataConfig
    """Training images."""
    train: TrainConfig
    """The loop."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """What is looked at on the way."""


PACKAGED = Path(__file__).parents[1] / "recipes"
FREE_TO_CHANGE = frozenset(
    {"out", "validation"}
    | {f"train.{name}" for name in ("steps", "log_every", "checkpoint_minutes", "checkpoint_steps")}
    | {f"train.{name}" for name in ("keep_checkpoints", "num_workers", "threads")}
)
"""Settings that may differ when a run is resumed: how long it is, how it reports, and what the machine lends it."""


def recipe_names() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(file.stem for file in PACKAGED.glob("*.yaml"))


def read_recipe(recipe: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file, or in the packaged recipe of that name, on top of what it ``extends``.

    ``extends`` names another recipe: a path, relative to the recipe that says so, or a packaged name. The recipe's own
    settings are merged over it key by key; its output folder is not inherited, so that two runs never share one.
    """
    return _read_extended(_locate(recipe, Path()), ())


def load_run(method: str, recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override, complete and check a run; errors name the setting and the near name."""
    values = apply_overrides(read_recipe(recipe), overrides)
    named = values.setdefault("method", method)
    if named != method:
        load_methods()
        get_method(method)  # a misspelt method is that, and no wrong recipe
        raise UserError(f"recipe '{recipe}' is for method '{named}', not '{method}'")
    values.setdefault("out", str(Path("runs") / Path(recipe).stem))
    return _complete(values)


class SettingChange(NamedTuple):
    """A setting with its values then and now."""

    name: str
    before: Any
    now: Any


def check_resumable(saved: Mapping[str, Any], run: RunConfig, *, other_processes: bool = False) -> None:
    """Refuse to resume with settings that would have led to other weights; see :func:`changed_setting`."""
    change = changed_setting(saved, run, other_processes=other_processes)
    if change is not None:
        raise UserError(
            f"{change.name}: the run in {run.out} was started with {change.before!r}, now it is {change.now!r}; "
            "resume with the same settings or start anew with another --out"
        )


def changed_setting(saved: Mapping[str, Any], run: RunConfig, *, other_processes: bool = False) -> SettingChange | None:
    """The first setting by which ``run`` would make other weights than ``saved``; none if they would be the same.

    ``saved`` is the run's configuration as its checkpoint has it; settings that this version added take their defaults.
    With ``other_processes``, fewer or more of them than before, the number of micro-batches may follow.
    """
    try:
        before = _flatten(to_mapping(_complete(saved)))
    except UserError as error:
        raise UserError(f"{run.out}: the run was started with settings unknown to this version: {error}") from error
    now = _flatten(to_mapping(run))
    for name in sorted(before.keys() | now.keys()):
        may_change = _is_free(name) or (other_processes and name == "train.accumulation")
        if not may_change and before.get(name) != now.get(name):
            return SettingChange(name, before.get(name), now.get(name))
    return None


def _complete(given: Mapping[str, Any]) -> RunConfig:
    load_methods()
    values = apply_overrides(given, ())
    values["config"] = from_mapping(get_method(values["method"]).config, values.get("config") or {}, "config")
    _complete_optimizers(values.get("train"))
    return from_mapping(RunConfig, values)


def _locate(recipe: str, folder: Path) -> Path:
    """Where ``recipe`` is: a path, relative to ``folder``, or the name of a packaged one."""
    if (folder / recipe).is_file():
        return folder / recipe
    if recipe in recipe_names():
        return PACKAGED / f"{recipe}.yaml"
    raise UserError(
        f"recipe '{recipe}' is neither a file nor a packaged recipe: {did_you_mean(recipe, recipe_names())}"
    )


def _read_extended(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """``path`` on top of what it extends; ``below`` are the recipes that led here, the first one first."""
    chain = (*below, path.resolve())
    if path.resolve() in below:
        raise UserError(f"{below[0]}: extends itself ({' -> '.join(step.name for step in chain)})")
    values = read_mapping(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends: expected the name or path of one recipe, got {parent!r}")
    base = _read_extended(_locate(parent, path.parent), chain)
    base.pop("out", None)
    return merged(base, values)


def _complete_optimizers(train: Any) -> None:
    """Let an optimiser by network name inherit what it does not set from the common one."""
    if not isinstance(train, dict) or not isinstance(train.get("optimizers"), dict):
        return
    common = to_mapping(from_mapping(OptimizerConfig, train.get("optimizer") or {}, "train.optimizer"))
    for name, given in train["optimizers"].items():
        if isinstance(given, dict):
            train["optimizers"][name] = {**common, **given}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE_TO_CHANGE)
