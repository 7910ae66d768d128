"""A run as one strict configuration, and the recipes it is read from: packaged YAML files or the user's own."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from onestepsr import methods
from onestepsr.core.config import apply_overrides, from_mapping, merged, read_mapping, to_mapping
from onestepsr.core.errors import UserError, did_you_mean
from onestepsr.data.datasets import DataConfig
from onestepsr.methods.base import get_method

# ---- The training loop: everything under ``train:`` ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW on one network (Loshchilov & Hutter, "Decoupled Weight Decay Regularization"), or Muon."""

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """``muon`` orthogonalises the updates of convolution kernels (Jordan et al., "Muon: An optimizer for hidden layers
    in neural networks") and leaves the rest to AdamW; the learning rate of one suits the other. ``adamw8bit`` keeps the
    two running means in 8 bits per value, in blocks with a scale each (Dettmers et al., "8-bit Optimizers via
    Block-wise Quantization"): 2 bytes per parameter instead of 8. Needs bitsandbytes."""
    lr: float = 1e-4
    """Peak learning rate, scaled by the schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    weight_decay: float = 0.01
    """Decoupled weight decay, multiplied by the learning rate in each step."""
    eps: float = 1e-8
    """Added to the denominator."""
    momentum: float = 0.95
    """Decay of ``muon``'s running sum of gradients."""
    warmup_steps: int | None = None
    """Steps of this network's warm-up; null is the schedule's. TAD-SR's discriminator has none."""
    clipped: bool = True
    """Hold this network's gradient to ``train.gradient_clip``."""

    def __post_init__(self) -> None:
        if not self.lr > 0.0 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"need lr > 0 and betas in [0, 1), got lr={self.lr} betas={self.betas}")
        if self.weight_decay < 0.0 or self.eps <= 0.0:
            raise ValueError(f"need weight_decay >= 0 and eps > 0, got {self.weight_decay} and {self.eps}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"need momentum in [0, 1), got {self.momentum}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"need warmup_steps >= 0, got {self.warmup_steps}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Factor on every network's learning rate as a function of the step."""

    kind: Literal["constant", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the factor rises linearly to 1."""
    final_ratio: float = 0.0
    """Factor that ``cosine`` reaches in the last step; ``constant`` has no use for it."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0.0 <= self.final_ratio <= 1.0:
            raise ValueError(f"need warmup_steps >= 0 and final_ratio in [0, 1], got {self}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of the loop."""

    steps: int
    """Iterations in total; every phase of the method takes at most one optimiser step in each."""
    batch_size: int = 16
    """Samples per optimiser step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches per optimiser step: more of them need less memory for the same gradient."""
    seed: int = 0
    """Start of every random number of the run: initial weights, data, and noise inside the losses."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser of each network that ``optimizers`` does not name."""
    optimizers: dict[str, OptimizerConfig] = field(default_factory=dict)
    """Optimiser by network name; a recipe may give some of the fields, the rest comes from ``optimizer``."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule of all networks."""
    gradient_clip: float | None = 1.0
    """Largest gradient norm of a network; none leaves gradients as they are."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights."""
    ema_warmup: bool = True
    """Reach that decay by the warm-up min(decay, (1 + step) / (10 + step)), which forgets a random start quickly."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Type in which the forward passes are computed; weights, optimiser and average stay in float32."""
    frozen_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which linear and convolution layers that are not trained are kept, and computed in. What is trained
    (adapters, heads, prompts) stays in float32, and so does the feature network of a perceptual loss. 16 bits halve
    the memory of a frozen backbone."""
    channels_last: bool = False
    """Keep weights and images in NHWC memory order: faster convolutions with bf16 on recent hardware."""
    device: Literal["auto", "cpu"] = "auto"
    """Train on the accelerator when there is one, or on the CPU whatever there is."""
    threads: int = 0
    """CPU threads of the arithmetic; 0 leaves the choice to PyTorch. Bit-exact resume needs the same number."""
    num_workers: int = 0
    """Processes that prepare batches, each with one thread; 0 prepares them in the training process."""
    find_unused_parameters: bool = False
    """Needed with several processes when some trained parameters take no part in a step."""
    log_every: int = 50
    """Steps between two log records."""
    checkpoint_minutes: float = 15.0
    """Longest time between two checkpoints."""
    checkpoint_steps: int = 1000
    """Most steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Number of the newest checkpoints that stay on disk."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "threads", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.checkpoint_minutes <= 0 or not 0.0 <= self.ema_decay < 1.0:
            raise ValueError("need checkpoint_minutes > 0 and ema_decay in [0, 1)")
        if self.gradient_clip is not None and self.gradient_clip <= 0:
            raise ValueError(f"gradient_clip must be above 0 or null, got {self.gradient_clip}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}")

    def optimizer_of(self, network: str) -> OptimizerConfig:
        """Optimiser settings of ``network``."""
        return self.optimizers.get(network, self.optimizer)

    def micro_batch(self, processes: int) -> int:
        """Samples that one process handles at a time."""
        share = processes * self.accumulation
        if self.batch_size % share:
            raise UserError(
                f"train.batch_size: {self.batch_size} does not divide among {processes} processes "
                f"with {self.accumulation} micro-batches each; take a multiple of {share}"
            )
        return self.batch_size // share

    def check_networks(self, networks: Iterable[str]) -> None:
        """Refuse optimiser settings for a network that the method never trains."""
        known = sorted(networks)
        for name in self.optimizers:
            if name not in known:
                raise UserError(f"train.optimizers.{name}: no such network: {did_you_mean(name, known)}")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Frequency and size of validations; none of it changes the weights."""

    every: int = 1000
    """Steps between two validations; the last step is always followed by one."""
    images: int = 8
    """Validation samples, always the first ones."""
    rows: int = 4
    """Number of them that the preview image shows."""
    best: Literal["psnr_y", "ssim_y", "dists", "lpips"] | None = "psnr_y"
    """Score by which ``best.safetensors`` is chosen; null keeps the newest model alone, as adversarial training needs:
    the sharpest of its states is rarely the one with the highest PSNR. ``dists`` and ``lpips`` take published
    weights."""

    def __post_init__(self) -> None:
        for name in ("every", "images", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


# ---- A whole run -----------------------------------------------------------------------------------------------------


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
    """Validations during training."""


# ---- Reading recipes -------------------------------------------------------------------------------------------------

PACKAGED = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(file.stem for file in PACKAGED.glob("*.yaml"))


def read_recipe(recipe: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file, or in the packaged recipe of that name, on top of what it ``extends``.

    ``extends`` names another recipe: a path, relative to the recipe that names it, or a packaged name. The recipe's own
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


def load_methods() -> None:
    """Import every module of ``onestepsr.methods``, which registers its methods."""
    for module in pkgutil.iter_modules(methods.__path__, f"{methods.__name__}."):
        importlib.import_module(module.name)


def _complete(given: Mapping[str, Any]) -> RunConfig:
    load_methods()
    values = apply_overrides(given, ())
    values["config"] = from_mapping(get_method(values["method"]).config, values.get("config") or {}, "config")
    _complete_optimizers(values.get("train"))
    return from_mapping(RunConfig, values)


def _locate(recipe: str, folder: Path) -> Path:
    """The file of ``recipe``: a path, relative to ``folder``, or the name of a packaged one."""
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


# ---- Resuming --------------------------------------------------------------------------------------------------------

FREE_TO_CHANGE = frozenset(
    {"out", "validation"}
    | {f"train.{name}" for name in ("steps", "log_every", "checkpoint_minutes", "checkpoint_steps")}
    | {f"train.{name}" for name in ("keep_checkpoints", "num_workers", "threads")}
)
"""Settings that may differ when a run is resumed: its length, its reports, and the resources of the machine."""


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
        before = flatten(to_mapping(_complete(saved)))
    except UserError as error:
        raise UserError(f"{run.out}: the run was started with settings unknown to this version: {error}") from error
    now = flatten(to_mapping(run))
    for name in sorted(before.keys() | now.keys()):
        is_free = any(name == free or name.startswith(f"{free}.") for free in FREE_TO_CHANGE)
        may_change = is_free or (other_processes and name == "train.accumulation")
        if not may_change and before.get(name) != now.get(name):
            return SettingChange(name, before.get(name), now.get(name))
    return None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat
