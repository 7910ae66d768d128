"""A run as one strict configuration, and the recipes it is read from: YAML files of ours or of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from onestepsr.config import apply_overrides, from_mapping, read_mapping, to_mapping
from onestepsr.data.datasets import DataConfig
from onestepsr.errors import UserError, did_you_mean
from onestepsr.methods.base import get_method
from onestepsr.methods.catalog import load_methods
from onestepsr.train.config import OptimizerConfig, PreviewConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(PreviewConfig):
    """Pictures and scores during training."""

    data: DataConfig | None = None
    """Held-out pictures; without them the first training samples are shown, whose scores say little."""


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
    """Training pictures."""
    train: TrainConfig
    """The loop."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """What is looked at on the way."""


FREE_TO_CHANGE = frozenset(
    {"out", "validation"}
    | {f"train.{name}" for name in ("steps", "log_every", "checkpoint_minutes", "checkpoint_steps")}
    | {f"train.{name}" for name in ("keep_checkpoints", "num_workers", "threads")}
)
"""Settings that may differ when a run is resumed: how long it is, how it reports, and what the machine lends it."""


def recipe_names() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(file.name.removesuffix(".yaml") for file in _packaged() if file.name.endswith(".yaml"))


def read_recipe(recipe: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file, or in the packaged recipe of that name."""
    if Path(recipe).is_file():
        return read_mapping(Path(recipe))
    if recipe in recipe_names():
        with as_file(files("onestepsr") / "recipes" / f"{recipe}.yaml") as path:
            return read_mapping(path)
    raise UserError(
        f"recipe '{recipe}' is neither a file nor a packaged recipe: {did_you_mean(recipe, recipe_names())}"
    )


def load_run(method: str, recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override, complete and check a run; errors name the setting and the near name."""
    load_methods()
    values = apply_overrides(read_recipe(recipe), overrides)
    named = values.setdefault("method", method)
    if named != method:
        raise UserError(f"recipe '{recipe}' is for method '{named}', not '{method}'")
    values.setdefault("out", str(Path("runs") / Path(recipe).stem))
    values["config"] = from_mapping(get_method(method).config, values.get("config") or {}, "config")
    _complete_optimizers(values.get("train"))
    return from_mapping(RunConfig, values)


def check_resumable(saved: Mapping[str, Any], run: RunConfig) -> None:
    """Refuse to resume with settings that would have led to other weights."""
    before, now = _flatten(saved), _flatten(to_mapping(run))
    for name in sorted(before.keys() | now.keys()):
        if _is_free(name) or before.get(name) == now.get(name):
            continue
        raise UserError(
            f"{name}: the run in {run.out} was started with {before.get(name)!r}, now it is {now.get(name)!r}; "
            "resume with the same settings or start anew with another --out"
        )


def _packaged() -> list[Any]:
    folder = files("onestepsr") / "recipes"
    return list(folder.iterdir()) if folder.is_dir() else []


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
