"""Memory, speed and gradients of real training steps of a recipe, with random weights.

    python scripts/paper_scale_step.py --crop 128 --json step.json
    python scripts/paper_scale_step.py --recipe osediff-sd21 --crop 128

By default D3SR's: Stable Diffusion 2.1-base under adapters, half of SDXL-base as the discriminator, exactly as
``--recipe d3sr-sd21-sdxl`` trains them, but for the weights (random: nothing is downloaded), the photos (noise) and the
features of the perceptual distance (ours). OSEDiff's prompts are random embeddings too, a negative one among them, so
that its teacher is guided. Recipes of other methods run with the weights that ``KEY=VALUE`` names; settings given so
come last. On a GPU: ``--crop 512 --batch 4 --steps 5``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from onestepsr.core.machine import processor_name, resident_memory
from onestepsr.methods.base import get_method
from onestepsr.train.recipes import load_run, read_recipe
from onestepsr.train.trainer import Trainer

PROMPT_SHAPE = (77, 1024)
"""Tokens and width of a text's embedding for Stable Diffusion 2.1."""


class Noise:
    """Images of noise in place of photos: gradients and memory do not care."""

    def __init__(self, crop: int, scale: int) -> None:
        self.crop, self.scale = crop, scale

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One pair."""
        rng = torch.Generator().manual_seed(index)
        side = self.crop // self.scale
        return {
            "hr": torch.rand(3, self.crop, self.crop, generator=rng),
            "lr": torch.rand(3, side, side, generator=rng),
        }


def main() -> None:
    """Run the steps; print the report or write it."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        name = str(read_recipe(options.recipe)["method"])
        common = [
            "data.paths=[.]",
            f"data.crop={options.crop}",
            f"train.batch_size={options.batch}",
            "train.accumulation=1",
            f"train.steps={options.steps}",
            "train.mixed_precision=bf16",
            "train.frozen_dtype=bfloat16",
        ]
        run = load_run(
            name, options.recipe, [*common, *random_weights(name, options, Path(folder)), *options.overrides]
        )
        torch.manual_seed(0)
        method = get_method(name).build(run.config)
        source = Noise(options.crop, run.data.scale)
        trainer = Trainer(method, source, run.train, Path(folder))
        report = measure(trainer, source, options)
    text = json.dumps(report, indent=1)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


def random_weights(method: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Settings that put random weights in the place of downloads."""
    ours = ["config.backbone=random:sd21-base", "config.perceptual.features=oriented"]
    if method == "d3sr":
        return [*ours, f"config.discriminator.backbone=random:{options.discriminator}"]
    if method == "osediff":
        files = {"file": folder / "prompt.safetensors", "negative_file": folder / "negative.safetensors"}
        for seed, path in enumerate(files.values()):
            rng = torch.Generator().manual_seed(seed)
            save_file({"prompt": torch.randn(PROMPT_SHAPE, generator=rng)}, path)
        settings = ", ".join(f"{key}: {json.dumps(str(path))}" for key, path in files.items())
        return [*ours, f"config.prompt={{kind: file, {settings}}}"]
    return []


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="d3sr-sd21-sdxl")
    parser.add_argument("--crop", type=int, default=128, help="side of the HR crop")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--discriminator", default="sdxl-base", choices=("sdxl-base", "sd21-base"), help="of D3SR")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return parser.parse_args()


def measure(trainer: Trainer, source: Noise, options: argparse.Namespace) -> dict[str, Any]:
    """Steps, with every gradient watched and frozen weights compared at the end.

    One half of each adapter gets a gradient of zero in the first step, because the other half starts at zero.
    """
    networks = trainer.networks.modules
    before = {name: frozen_sums(network) for name, network in networks.items()}
    frozen = trainer.method.frozen
    frozen_before = {name: frozen_sums(network) for name, network in frozen.items()}
    device = trainer.accelerator.device
    batches = [batch(source, options, step, device) for step in range(options.steps)]
    seconds = []
    whole_life = peak_memory(device)
    forget_peak(device)
    with watched(networks) as seen:
        for one in batches:
            started = time.perf_counter()
            record = trainer.iterate([one])
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    steady = min(seconds)
    return {
        "schema": 1,
        "machine": f"{machine(device)}, torch {torch.__version__}",
        "recipe": options.recipe,
        "overrides": options.overrides,
        "crop": options.crop,
        "batch": options.batch,
        "losses": record.losses,
        "networks": {name: summary(networks[name], seen[name], before[name]) for name in networks},
        "frozen_networks": {name: frozen_summary(network, frozen_before[name]) for name, network in frozen.items()},
        "seconds_first": round(seconds[0], 2),
        "seconds_best": round(steady, 3),
        "images_per_second": round(options.batch / steady, 3),
        "peak_memory_gb": round(max(whole_life, peak_memory(device)), 2),
        "peak_memory_of_steps_gb": round(peak_memory(device), 2),
        "held_gb": round(held_bytes(trainer) / 1e9, 3),
    }


def batch(source: Noise, options: argparse.Namespace, step: int, device: torch.device) -> dict[str, Tensor]:
    """One batch of noise."""
    pairs = [source[step * options.batch + k] for k in range(options.batch)]
    return {key: torch.stack([pair[key] for pair in pairs]).to(device) for key in pairs[0]}


@contextmanager
def watched(networks: dict[str, nn.Module]) -> Iterator[dict[str, dict[str, tuple[bool, bool]]]]:
    """For every parameter that gets a gradient: always finite, and not zero at least once."""
    seen: dict[str, dict[str, tuple[bool, bool]]] = {name: {} for name in networks}
    handles = []
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            if parameter.requires_grad:

                def note(p: Tensor, name: str = name, key: str = key) -> None:
                    if p.grad is not None:
                        finite, nonzero = seen[name].get(key, (True, False))
                        seen[name][key] = (finite and bool(p.grad.isfinite().all()), nonzero or bool(p.grad.any()))

                handles.append(parameter.register_post_accumulate_grad_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def frozen_sums(network: nn.Module) -> dict[str, int]:
    """A sum over the bits of every frozen parameter."""
    sums = {}
    for key, parameter in network.named_parameters():
        if not parameter.requires_grad:
            sums[key] = int(parameter.detach().contiguous().view(torch.int16).sum(dtype=torch.long))
    return sums


def summary(network: nn.Module, gradients: dict[str, tuple[bool, bool]], before: dict[str, int]) -> dict[str, Any]:
    """Counts of parameters, of their gradients, and of frozen parameters that changed."""
    trainable = {key: p for key, p in network.named_parameters() if p.requires_grad}
    after = frozen_sums(network)
    return {
        "trainable_parameters": sum(p.numel() for p in trainable.values()),
        "frozen_parameters": sum(p.numel() for p in network.parameters() if not p.requires_grad),
        "trainable_tensors": len(trainable),
        "with_finite_gradient": sum(finite for finite, _ in gradients.values()),
        "with_nonzero_gradient": sum(nonzero for _, nonzero in gradients.values()),
        "always_zero": sorted(key for key, (_, nonzero) in gradients.items() if not nonzero),
        "without_gradient": sorted(trainable.keys() - gradients.keys()),
        "frozen_tensors_changed": [key for key in before if before[key] != after[key]],
    }


def frozen_summary(network: nn.Module, before: dict[str, int]) -> dict[str, Any]:
    """Size of a network that is never trained, and its tensors that changed or got a gradient all the same."""
    after = frozen_sums(network)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "tensors_changed": [key for key in before if before[key] != after[key]],
        "with_gradient": [key for key, p in network.named_parameters() if p.grad is not None],
    }


def machine(device: torch.device) -> str:
    """Device of the steps."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def held_bytes(trainer: Trainer) -> int:
    """Bytes that all networks hold between two steps: weights, buffers, optimisers, averages; shared tensors once."""
    networks = [*trainer.networks.modules.values(), *trainer.method.frozen.values()]
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    for state in trainer.networks.states.values():
        tensors += [v for values in state.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        tensors += state.average.values.values() if state.average else []
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def forget_peak(device: torch.device) -> None:
    """Reset the peak to the present memory: building networks takes more than training them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # only Linux can
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> float:
    """GB: of the GPU's allocator, or of the whole process with Python and the libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resident_memory()["peak"] / 1e9


if __name__ == "__main__":
    main()
