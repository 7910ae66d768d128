"""Networks of a method made ready for the loop: device, wrapper, optimiser, moving average and state in checkpoints.

Each trainable network is a wrapper of its own and is only ever called. While one network's phase runs, the parameters
of the others gather no gradients, yet every network stays differentiable through its input.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from onestepsr.core.errors import MissingExtra, UserError
from onestepsr.methods.base import Method, Networks
from onestepsr.train.checkpoint import Checkpoint
from onestepsr.train.muon import Muon
from onestepsr.train.recipes import OptimizerConfig, TrainConfig

# ---- Optimiser, learning rate, moving average ------------------------------------------------------------------------

EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4096, 256
"""The 8-bit optimiser keeps smaller tensors in float32; the others have a scale per block of values."""


def trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with ``requires_grad``, by name, shared ones once."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser that ``config`` names, over ``parameters``."""
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "eps": config.eps,
    }
    trained = list(parameters.values())
    if config.kind == "adamw":  # the fused kernel does the whole step in one pass over memory
        return torch.optim.AdamW(trained, fused=True, **settings)
    if config.kind == "muon":
        return Muon(trained, momentum=config.momentum, **settings)
    for parameter in trained:  # its kernels count values in memory order, which must not change under them
        parameter.data = parameter.data.contiguous()
    optimizer: torch.optim.Optimizer = _eight_bit_adamw()(trained, **settings)
    return optimizer


def require_optimizer(config: OptimizerConfig) -> None:
    """Report a missing package before anything long starts."""
    if config.kind == "adamw8bit":
        _eight_bit_adamw()


def optimizer_bytes(config: OptimizerConfig, shape: torch.Size) -> int:
    """Memory of the optimiser's state for a parameter tensor of that shape."""
    values = shape.numel()
    if config.kind == "muon":
        return 4 * values if len(shape) == 4 else 8 * values
    if config.kind == "adamw" or values < EIGHT_BIT_FROM:
        return 8 * values
    return 2 * values + 8 * math.ceil(values / EIGHT_BIT_BLOCK)


def _eight_bit_adamw() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingExtra("train.optimizer.kind 'adamw8bit'", "eightbit") from error
    return AdamW8bit


def learning_rate_factor(config: TrainConfig, step: int, network: str = "") -> float:
    """Factor on the learning rate of ``network`` in iteration ``step`` (0-based): linear warm-up, then constant or half
    a cosine."""
    schedule, own = config.schedule, config.optimizer_of(network).warmup_steps
    warmup = schedule.warmup_steps if own is None else own
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.kind == "constant":
        return 1.0
    span = max(1, config.steps - 1 - warmup)
    progress = min(1.0, (step - warmup) / span)
    return schedule.final_ratio + (1.0 - schedule.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def ema_decay(decay: float, step: int) -> float:
    """Decay after iteration ``step`` (0-based): a young average forgets its random start quickly."""
    return min(decay, (1 + step) / (10 + step))


class MovingAverage:
    """Float32 average of a network's trainable parameters; everything else is taken from the network itself."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, *, warmup: bool = True) -> None:
        self.decay, self.warmup = decay, warmup
        self._parameters = dict(parameters)
        self.values = {name: parameter.detach().clone().float() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- d * average + (1 - d) * weights, with d of :func:`ema_decay` or, without warm-up, constant."""
        weight = 1.0 - (ema_decay(self.decay, step) if self.warmup else self.decay)
        current = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.values.values()), current, weight)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Replace the average by saved values."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the network carry the averaged weights for a while."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._write(self.values)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


# ---- Frozen layers in a 16-bit type: half the memory of a backbone, without touching what is trained -----------------

CONVERTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def keep_frozen_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the layers of ``network`` that have no trained parameter in ``dtype``, in place.

    Such a layer computes in ``dtype`` and returns float32; under autocast its dtype is autocast's. A network whose
    attribute ``keeps_float32`` is true stays as it is.
    """
    if dtype == torch.float32 or getattr(network, "keeps_float32", False):
        return
    for module in network.modules():
        parameters = list(module.parameters(recurse=False))
        if not isinstance(module, CONVERTED) or any(parameter.requires_grad for parameter in parameters):
            continue
        if all(parameter.dtype == dtype for parameter in parameters):  # a layer that two networks share
            continue
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        module.register_forward_pre_hook(_to_stored_type)
        module.register_forward_hook(_to_float32)


def as_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` on the CPU, floating-point ones in float32: how a model is exported, whatever it was kept in."""
    return {
        name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }


def _to_stored_type(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first, *others = arguments
    if _autocast_is_on(first):
        return arguments
    return (first.to(next(module.parameters(recurse=False)).dtype), *others)


def _to_float32(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output if _autocast_is_on(output) else output.float()


def _autocast_is_on(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return torch.is_autocast_enabled("cpu" if kind == "meta" else kind)  # the meta device has no switch of its own


# ---- The networks of one run -----------------------------------------------------------------------------------------


@dataclass
class NetworkState:
    """One trainable network with its optimiser and, where kept, its moving average."""

    network: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None


class NetworkSet:
    """All networks of one run."""

    def __init__(self, method: Method, config: TrainConfig, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.states: dict[str, NetworkState] = {}
        self.optimizers: dict[str, Any] = {}
        self._wrapped: dict[str, nn.Module] = {}
        for network in method.frozen.values():
            network.requires_grad_(False).eval()
        self.fingerprints = fingerprints({**method.networks, **method.frozen})
        """Digests of the frozen weights, taken before their conversion."""
        for network in (*method.networks.values(), *method.frozen.values()):
            keep_frozen_in(network, getattr(torch, config.frozen_dtype))
            network.to(accelerator.device)
            if config.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, network in method.networks.items():
            self._add(name, network, name in method.ema, config)
        self._frozen: dict[str, Callable[..., Any]] = {
            name: self._freeze(network) for name, network in method.frozen.items()
        }

    @property
    def callables(self) -> Networks:
        """Every network as losses call it."""
        return {**self._wrapped, **self._frozen}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The trainable networks themselves, without wrappers."""
        return {name: state.network for name, state in self.states.items()}

    @contextmanager
    def training(self, name: str) -> Iterator[None]:
        """Let gradients reach the parameters of network ``name`` alone."""
        self._set_gradients(lambda other: other == name)
        try:
            yield
        finally:
            self._set_gradients(lambda other: True)

    @contextmanager
    def synchronizing(self, name: str | None) -> Iterator[None]:
        """Average gradients over processes for network ``name`` alone; for none when several micro-batches add up.

        The wrappers of the other networks need it too: they would wait for gradients that never come.
        """
        with ExitStack() as stack:
            for other, wrapped in self._wrapped.items():
                if other != name:
                    stack.enter_context(self._accelerator.no_sync(wrapped))
            yield

    @contextmanager
    def evaluating(self) -> Iterator[Networks]:
        """Averaged weights, eval mode, no gradients, no wrappers; everything is put back afterwards."""
        modes = {module: module.training for network in self.modules.values() for module in network.modules()}
        with ExitStack() as stack, torch.no_grad():
            for state in self.states.values():
                state.network.eval()
                if state.average is not None:
                    stack.enter_context(state.average.swapped_in())
            try:
                yield {**self.modules, **self._frozen}
            finally:
                for module, mode in modes.items():
                    module.training = mode

    def update_averages(self, step: int) -> None:
        """Take the weights after iteration ``step`` into the moving averages."""
        for state in self.states.values():
            if state.average is not None:
                state.average.update(step)

    def _add(self, name: str, network: nn.Module, averaged: bool, config: TrainConfig) -> None:
        parameters = trainable_parameters(network)
        optimizer = build_optimizer(parameters, config.optimizer_of(name))
        self._wrapped[name], self.optimizers[name] = self._accelerator.prepare(network.train(), optimizer)
        # Taken after wrapping: with several processes that is where the first one's initial weights reach the others.
        average = MovingAverage(parameters, config.ema_decay, warmup=config.ema_warmup) if averaged else None
        self.states[name] = NetworkState(network, parameters, optimizer, average)

    def _freeze(self, network: nn.Module) -> Callable[..., Any]:
        if self._accelerator.mixed_precision == "no":
            return network

        def evaluate(*arguments: Any, **options: Any) -> Any:
            with self._accelerator.autocast():
                return network(*arguments, **options)

        return convert_outputs_to_fp32(evaluate)  # type: ignore[no-any-return]

    def _set_gradients(self, wanted: Callable[[str], bool]) -> None:
        for name, state in self.states.items():
            for parameter in state.parameters.values():
                parameter.requires_grad_(wanted(name))


# ---- State in checkpoints: everything that changes while a run trains ------------------------------------------------

FINGERPRINT_VALUES = 64
"""Values taken from each frozen parameter, evenly spaced."""
NUMBERS: dict[type, torch.dtype] = {int: torch.int64, float: torch.float64, bool: torch.bool}
"""Plain numbers that an optimiser may keep, and the tensors they are stored as."""


def collect(states: Mapping[str, NetworkState]) -> dict[str, dict[str, Tensor]]:
    """Tensors by group: ``NAME.weights``, ``NAME.optimizer`` and ``NAME.average``."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, state in states.items():
        groups[f"{name}.weights"] = _weights(state)
        groups[f"{name}.optimizer"] = _optimizer_tensors(state)
        if state.average is not None:
            groups[f"{name}.average"] = dict(state.average.values)
    return groups


def restore(states: Mapping[str, NetworkState], checkpoint: Checkpoint) -> None:
    """Put a checkpoint's tensors back, bit for bit."""
    for name, state in states.items():
        weights, saved = _weights(state), checkpoint.tensors(f"{name}.weights")
        _check_names(checkpoint, f"{name}.weights", saved, weights)
        with torch.no_grad():
            for key, tensor in weights.items():
                tensor.copy_(saved[key])
        _restore_optimizer(state, checkpoint.tensors(f"{name}.optimizer"), f"{checkpoint.path}: {name}.optimizer")
        if state.average is not None:
            saved = checkpoint.tensors(f"{name}.average")
            _check_names(checkpoint, f"{name}.average", saved, state.average.values)
            state.average.load(saved)


def fingerprints(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """A short digest of each network's frozen parameters, as they are before a run keeps them in a smaller type."""
    return {name: _fingerprint(network) for name, network in networks.items()}


def check_fingerprints(checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
    """Refuse to continue from other frozen weights than the checkpoint was trained with.

    Checkpoints of older versions have no digests of networks that are frozen as a whole, such as a teacher.
    """
    saved = checkpoint.record.get("frozen_weights", {})
    for name, digest in digests.items():
        if saved.get(name, digest) != digest:
            raise UserError(f"{checkpoint.path}: the frozen weights of '{name}' are not those this run started with")


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // FINGERPRINT_VALUES)].double().cpu()
            digest.update(name.encode() + picked.numpy().tobytes())
    return digest.hexdigest()


def _weights(state: NetworkState) -> dict[str, Tensor]:
    kept = set(state.network.state_dict(keep_vars=True))
    buffers = {name: buffer for name, buffer in state.network.named_buffers() if name in kept}
    return {**{name: parameter.detach() for name, parameter in state.parameters.items()}, **buffers}


def _optimizer_tensors(state: NetworkState) -> dict[str, Tensor]:
    """Whatever the optimiser keeps for each parameter; plain numbers become 0-dim tensors named by their type."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in state.parameters.items():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            elif type(value) in NUMBERS:
                tensors[f"{name}/{key}:{type(value).__name__}"] = torch.tensor(value, dtype=NUMBERS[type(value)])
            else:
                raise TypeError(f"{type(state.optimizer).__name__} keeps '{key}' as a {type(value).__name__}")
    return tensors


def _restore_optimizer(state: NetworkState, saved: Mapping[str, Tensor], where: str) -> None:
    state.optimizer.state.clear()
    numbers = {kind.__name__ for kind in NUMBERS}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition("/")
        if name not in state.parameters:
            raise UserError(f"{where} holds the unknown tensor '{full_name}'; the method's networks have changed")
        parameter = state.parameters[name]
        key, _, number = key.partition(":")
        if number in numbers:
            state.optimizer.state[parameter][key] = value.item()
            continue
        # What has the parameter's shape takes its memory order, as it would have in the uninterrupted run.
        if value.shape == parameter.shape:
            state.optimizer.state[parameter][key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:
            state.optimizer.state[parameter][key] = value.to(parameter.device)


def _check_names(checkpoint: Checkpoint, group: str, saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name in sorted(saved.keys() ^ wanted.keys()):
        side = "lacks" if name in wanted else "holds the unknown"
        raise UserError(f"{checkpoint.path}: {group} {side} tensor '{name}'; the method's networks have changed")
    for name, tensor in wanted.items():
        if saved[name].shape != tensor.shape:
            shapes = f"{tuple(saved[name].shape)} instead of {tuple(tensor.shape)}"
            raise UserError(f"{checkpoint.path}: {group} has '{name}' of shape {shapes}")
