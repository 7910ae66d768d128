"""Other people's models: any single-image network that the package spandrel knows, as a generator.

spandrel tells the architecture and its sizes from the names and shapes of the weights (ESRGAN, Compact, SPAN, SwinIR,
HAT, DAT, RealPLKSR and some forty more). Files are opened by this package, which executes nothing that is in them.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onestepsr.core.errors import MissingExtra, UserError, first_line
from onestepsr.models.generators import Generator, MemoryCost, Origin, Rng, pad_to
from onestepsr.weights.files import FORMAT, canonical_keys, foreign_weights, open_weights
from onestepsr.weights.recognise import network_name

PICKLES = (".pth", ".pt")
ENLARGING = ("an ESRGAN", "a compact", "a SwinIR", "a HAT", "a DAT", "an EDSR", "a GFPGAN")
"""Beginnings of the names of networks that spandrel may know."""
LARGEST_SCALE = 8
MAX_BYTES = 2 * 2**30
MEMORY_PER_PIXEL = 30_000.0
"""Bytes per input pixel in float32 that are assumed: networks differ, and attention takes more than convolutions."""


class CommunityGenerator(Generator):
    """RGB (N, 3, h, w) in [0, 1] to (N, 3, s h, s w), for any size from 1x1 on; gray networks get luma and give
    gray."""

    def __init__(self, descriptor: Any, name: str) -> None:
        """``descriptor`` is a ``spandrel.ImageModelDescriptor``; :class:`UserError` for one that does not enlarge
        single images 1 to 8 times."""
        super().__init__()
        architecture = descriptor.architecture.name
        if descriptor.purpose == "FaceSR":
            raise UserError(f"{name}: {architecture} restores aligned faces of one size; whole photos it cannot take")
        if not 1 <= descriptor.scale <= LARGEST_SCALE:
            raise UserError(f"{name}: {architecture} enlarges {descriptor.scale} times, accepted: 1 to {LARGEST_SCALE}")
        channels = (descriptor.input_channels, descriptor.output_channels)
        if channels not in ((3, 3), (1, 1)):
            raise UserError(
                f"{name}: {architecture} takes {channels[0]} channels and gives {channels[1]}: no RGB images"
            )
        self.architecture = architecture
        """Name of the architecture in spandrel."""
        self.scale = int(descriptor.scale)
        self.network = descriptor.model
        self._call, self._gray = descriptor._call_fn, channels == (1, 1)
        needs = descriptor.size_requirements
        self.lr_multiple, self._least, self._square = int(needs.multiple_of), int(needs.minimum), bool(needs.square)
        self._dtypes = {torch.float32}
        self._dtypes |= {torch.bfloat16} if descriptor.supports_bfloat16 else set()
        self._dtypes |= {torch.float16} if descriptor.supports_half else set()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Weights stay in float32 where the network does not work in the dtype that is asked for."""

        def accepted(tensor: Tensor) -> Tensor:
            made = cast(Tensor, fn(tensor))
            return made if not made.is_floating_point() or made.dtype in self._dtypes else made.to(torch.float32)

        return super()._apply(accepted, recurse)  # type: ignore[no-untyped-call]

    def memory_cost(self, dtype: torch.dtype) -> MemoryCost:
        """An assumption on the safe side; where it was not, the upscaler begins again with smaller tiles."""
        kind = dtype if dtype in self._dtypes else torch.float32
        return MemoryCost(bytes_per_pixel=MEMORY_PER_PIXEL * kind.itemsize / 4)

    def forward(self, lr: Tensor, *, rng: Rng = None, origin: Origin = None, prompt: Tensor | None = None) -> Tensor:
        """Enlarged image, not clamped."""
        height, width = lr.shape[-2:]
        multiple = self.lr_multiple
        rows, columns = (max(self._least, -(-side // multiple) * multiple) for side in (height, width))
        if self._square:
            rows = columns = max(rows, columns)
        x = pad_to(lr, rows, columns).to(next(self.network.parameters()).dtype)
        if self._gray:
            x = (x * x.new_tensor((0.299, 0.587, 0.114))[:, None, None]).sum(dim=1, keepdim=True)
        sr = cast(Tensor, self._call(self.network, x))
        return sr[..., : self.scale * height, : self.scale * width].expand(-1, 3, -1, -1).to(lr.dtype)


def is_foreign(path: Path) -> bool:
    """True for a pickle of weights, and for a safetensors file that is not ours; nothing is read but its header."""
    if not path.is_file() or path.suffix.lower() not in (*PICKLES, ".safetensors"):
        return False
    if path.suffix.lower() in PICKLES:
        return True
    try:
        with safe_open(path, framework="pt") as handle:
            return (handle.metadata() or {}).get("format") != FORMAT
    except (OSError, SafetensorError):
        return False


def load_community(path: Path) -> CommunityGenerator:
    """The generator in a foreign file, in float32 on the CPU, in eval mode.

    Raises :class:`MissingExtra` without spandrel, and :class:`UserError` in one line for files that cannot be read
    safely and for architectures that it does not know.
    """
    tensors = {key: read() for key, read in open_weights(path, limit=MAX_BYTES).items()}
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    wide = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    state: dict[str, Tensor] = canonical_keys(wide)
    name = network_name(state)
    if name is not None and not name.startswith(ENLARGING):
        raise UserError(f"{path}: {foreign_weights(state)}")
    seen = f"{path}: {name}, which is not supported here" if name else f"{path}: not onestepsr weights"
    try:
        import spandrel
    except (ImportError, RuntimeError) as error:  # torchvision beside another build of PyTorch ends in a RuntimeError
        if isinstance(error, ModuleNotFoundError) and error.name in (None, "spandrel"):
            raise MissingExtra(f"{seen} by itself; a model of another project", "community") from error
        raise UserError(f"{seen}: spandrel cannot be loaded ({first_line(error)})") from error
    with suppress(ImportError):  # FeMaSR and others of licences that are not permissive, where they are installed
        importlib.import_module("spandrel_extra_arches").install(ignore_duplicates=True)
    try:
        descriptor = spandrel.ModelLoader(device="cpu").load_from_state_dict(state)
    except spandrel.UnsupportedModelError as error:
        some = ", ".join(f"'{key}' {tuple(state[key].shape)}" for key in list(state)[:3])
        merged = any(".rbr_reparam." in key or "eval_conv" in key for key in state)
        hint = "; it looks re-parameterised: the file from before that step may be known" if merged else ""
        words = f"no architecture that spandrel knows: {len(state)} weights, first {some}{hint}"
        raise UserError(f"{seen}, and {words}") from error
    except Exception as error:  # whatever an architecture makes of weights that only look like its own
        raise UserError(f"{seen}: weights do not fit their architecture ({first_line(error)})") from error
    if not isinstance(descriptor, spandrel.ImageModelDescriptor):
        raise UserError(f"{path}: {descriptor.architecture.name} takes more than an image (such as a mask)")
    return CommunityGenerator(descriptor, str(path)).eval()
