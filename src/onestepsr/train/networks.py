"""The networks of a method made ready for the loop: on their device, wrapped, with optimiser and moving average.

Each trainable network is a wrapper of its own and is only ever called. While one network's phase runs, the parameters
of the others gather no gradients, yet every network stays differentiable through its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from onestepsr.methods.base import Method, Networks
from onestepsr.train.checkpoint import NetworkState, fingerprints
from onestepsr.train.config import TrainConfig
from onestepsr.train.optimization import MovingAverage, build_optimizer, trainable_parameters

# Frozen layers in a 16-bit type: half the memory of a backbone, without touching what is trained ----------------------

CONVERTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def keep_frozen_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the layers of ``network`` that have no trained parameter in ``dtype``, in place.

    Such a layer computes in ``dtype`` and returns float32; under autocast it does what autocast says. A network whose
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
        """Digests of the frozen weights, taken before they are converted."""
        for network in (*method.networks.values(), *method.frozen.values()):
            keep_frozen_in(network, getattr(torch, config.frozen_dtype))
            _place(network, accelerator.device, config.channels_last)
        for name, network in method.networks.items():
            self._add(name, network, name in method.ema, config)
        self._frozen: dict[str, Callable[..., Any]] = {
            name: self._freeze(network) for name, network in method.frozen.items()
        }

    @property
    def callables(self) -> Networks:
        """Every network as losses see it."""
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

        The wrappers of the other networks are told too, because they would wait for gradients that never come.
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
        average = MovingAverage(parameters, config.ema_decay) if averaged else None
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


def _place(network: nn.Module, device: torch.device, channels_last: bool) -> None:
    network.to(device)
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
