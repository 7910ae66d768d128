"""Weight files: ours, safetensors with architecture and configuration in the metadata, and foreign ones."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onestepsr.core.errors import UserError, first_line
from onestepsr.core.files import replacing
from onestepsr.weights.recognise import file_problem, network_name

Shapes = Mapping[str, Sequence[int]]
"""Shapes of tensors by name."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the header."""
ALIGNMENT = 8
"""Tensors start at a multiple of this many bytes."""
FORMAT = "onestepsr"
MAX_WEIGHT_BYTES = 20 * 2**30
PICKLES = (".pth", ".pt", ".ckpt")
NOT_OURS = f"not onestepsr weights (no 'format: {FORMAT}' in the file's metadata)"
RUNS = (
    "files of onestepsr, Real-ESRGAN x4plus (.pth, .bin) and the models of 'onestepsr models list' are; 'onestepsr "
    "models convert' takes Stable Diffusion 2.1-base, OSEDiff, SeeSR and the ResShift family (docs/models.md)"
)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` and ``metadata``, the same bytes for the same content every time.

    The library's own writer orders the metadata at random, and needs all tensors and their serialised copy in memory,
    which is too much for a model of several gigabytes; here a tensor is copied to the CPU only while it is written.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # so that all of them are aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for key in order:
        tensor = tensors[key]
        end = position + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            flat = tensors[key].detach().cpu().contiguous().reshape(-1)
            handle.write(flat.view(torch.uint8).numpy().data)


def read_weights(
    path: Path, wanted: Callable[[str], bool] = lambda key: True
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Architecture, configuration and state dict of one of our weight files; everything about the file is checked.

    Tensors that are not ``wanted`` are not read.
    """
    try:
        if path.stat().st_size > MAX_WEIGHT_BYTES:
            raise UserError(f"{path}: larger than {MAX_WEIGHT_BYTES >> 30} GiB")
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {key: handle.get_tensor(key) for key in handle.keys() if wanted(key)}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise UserError(f"{path}: {_unreadable(path, error)}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: {foreign_weights(tensors) or NOT_OURS}")
    try:
        config = json.loads(metadata["config"])
        architecture = metadata["architecture"]
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged metadata ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: damaged metadata (the configuration is no mapping)")
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path}: weight '{broken[0]}' holds values that are not finite; the file is damaged")
    return architecture, config, tensors


def read_shapes(path: Path) -> Shapes:
    """Shapes of the tensors in a safetensors file, none of which is read."""
    with reading(path), safe_open(path, framework="pt") as handle:
        return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118


def foreign_weights(keys: Iterable[str]) -> str:
    """Words for weights of a network that is not run here, by the names of its tensors; empty if it is not known."""
    name = network_name(keys)
    return f"{name}, which is not supported here; {RUNS}" if name else ""


def _unreadable(path: Path, error: SafetensorError) -> str:
    """Words for a file that safetensors refused."""
    problem = file_problem(path)
    if problem is not None:
        return problem
    if path.suffix not in PICKLES:
        return f"not a safetensors file ({error})"
    try:
        keys = set(open_weights(path))
    except UserError as refused:
        return str(refused).removeprefix(f"{path}: ")
    return foreign_weights(keys) or f"not a safetensors file ({error}); 'onestepsr models convert' makes one of it"


def architecture_of(path: str | Path) -> str:
    """The architecture that a weights file of ours names; empty for any other file, and for one that cannot be read."""
    if Path(path).suffix != ".safetensors":
        return ""
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
    except (OSError, SafetensorError):
        return ""
    return str(metadata.get("architecture", "unnamed")) if metadata.get("format") == FORMAT else ""


def save_model(
    path: Path,
    *,
    architecture: str,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write weights with their configuration; equal weights give equal files, complete or not there at all."""
    metadata = {
        "format": FORMAT,
        "architecture": architecture,
        "config": json.dumps(config, sort_keys=True),
        **(extra or {}),
    }
    with replacing(path) as temporary:
        write_safetensors(temporary, state_dict, metadata)


# ---- Foreign files ---------------------------------------------------------------------------------------------------

MAX_BYTES = 20 * 2**30
SMALL_WEIGHTS = 2**24
"""Limit in bytes on files of channel weights of a distance; the published ones have a few kB."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that data-parallel training and ``torch.compile`` put before the keys of the network itself."""
LazyTensors = Mapping[str, Callable[[], Tensor]]
"""By key, a function that reads the tensor."""


def open_weights(path: Path, *, limit: int = MAX_BYTES) -> LazyTensors:
    """Tensors of a safetensors file or of a PyTorch pickle (read with ``weights_only=True``, mapped into memory).

    Of a training checkpoint, the dictionary under ``state_dict``, ``model`` or BasicSR's ``params`` is taken.
    Raises :class:`UserError` in one line.
    """
    with reading(path):
        if path.stat().st_size > limit:
            raise UserError(f"{path}: larger than {limit / 2**20:,.0f} MiB")
        if path.suffix != ".safetensors":
            return _open_pickle(path)
        handle: Any = safe_open(path, framework="pt")  # it stays open as long as one of its readers lives
        return {key: partial(handle.get_tensor, key) for key in handle.keys()}  # noqa: SIM118


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever the block raises while it reads ``path`` into a :class:`UserError`, which says what the file is."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory; damaged, or made to do so") from error
    except Exception as error:  # the unpickler raises whatever the file makes it
        problem = file_problem(path)
        if problem is None and isinstance(error, OSError):
            problem = f"cannot be read ({error.strerror or error})"
        refused = f"no weights that can be read safely ({describe_read_error(error)})"
        raise UserError(f"{path}: {problem or refused}") from error


def describe_read_error(error: Exception) -> str:
    """The reason for which a file was refused, on one line: of a pickle, the function it would call (PyTorch's own
    message advises to load it all the same)."""
    text = str(error)
    called = re.search(r"\bGLOBAL (\S+)", text)
    if called is not None:
        return f"it would call '{called[1]}'"
    if "Weights only load failed" in text or isinstance(error, LookupError):
        return "it is no pickle of weights alone"
    return first_line(error)


def load_pickle(path: Path) -> Any:
    """The content of a PyTorch file, read with ``weights_only=True`` and, in its present format, mapped into memory.

    Raises ValueError for one that would take more memory than its size: PyTorch compresses nothing, and takes no
    bytearray of a length that the file names.
    """
    with path.open("rb") as handle:
        is_zip = handle.read(4) == b"PK\x03\x04"  # the present format is the only one that can be mapped
        program = handle.read(2**24)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("its parts are compressed, which PyTorch does not do")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError("its parts overlap")
            program = b"".join(archive.read(entry) for entry in entries if entry.filename.endswith(".pkl"))
    if b"builtin" in program and re.search(rb"builtins?__?\nbytearray|builtins\nbytearray", program):
        raise ValueError("it makes a bytearray")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _open_pickle(path: Path) -> LazyTensors:
    content = load_pickle(path)
    for inner in ("state_dict", "model", "params_ema", "params"):
        if isinstance(content, Mapping) and isinstance(content.get(inner), Mapping):
            content = content[inner]
    if not isinstance(content, Mapping):
        raise ValueError(f"a {type(content).__name__}, not a dictionary")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    check_tensors(tensors)
    return {key: partial(materialize, value) for key, value in tensors.items()}


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a tensor that is not a plain one with all its values in the file, but a view that repeats a
    few, a sparse one, or one without data."""
    for key, value in tensors.items():
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"tensor '{key[:100]}' has fewer values in the file than its shape says")


def materialize(value: Tensor) -> Tensor:
    """A tensor in memory as a reader of :data:`LazyTensors`: ``partial(materialize, tensor)``."""
    return value


def read_tensors(path: Path, *, limit: int = MAX_BYTES) -> dict[str, Tensor]:
    """All tensors of a file that :func:`open_weights` takes, at once; a file without any is refused."""
    tensors = {key: read() for key, read in open_weights(path, limit=limit).items()}
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


def read_wanted(path: Path, wanted: Iterable[str], *, limit: int, kind: str) -> dict[str, Tensor]:
    """The tensors called ``wanted`` of a file that may hold more, such as a classifier; :class:`UserError` if one is
    missing. ``kind`` names in the message what was expected."""
    names = list(wanted)
    tensors = read_tensors(path, limit=limit)
    missing = sorted(set(names) - tensors.keys())
    if missing:
        raise UserError(f"{path}: not {kind} (missing {missing[0]})")
    return {name: tensors[name] for name in names}


def canonical_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under the keys of the bare network: what lies under ``state_dict`` if that is there, without the prefixes
    of :data:`WRAPPERS`, however they are nested. Raises :class:`UserError` where two keys become one.
    """
    inner = content.get("state_dict")
    weights: Mapping[str, Any] = inner if isinstance(inner, Mapping) else content
    bare = {_without_wrappers(key): value for key, value in weights.items()}
    if len(bare) != len(weights):
        raise UserError(f"weights with and without one of the prefixes {', '.join(WRAPPERS)}: two networks in one")
    return bare


def _without_wrappers(key: str) -> str:
    while key.startswith(WRAPPERS):
        key = key.partition(".")[2]
    return key


# ---- filling networks one tensor at a time, so that loading half a file costs half the memory ------------------------

LISTED = 10
"""Most missing and unexpected keys that a message names."""


def fill(network: nn.Module, tensors: LazyTensors, where: str, ignored: Iterable[str] = ()) -> None:
    """Give ``network``, built on the meta device, exactly ``tensors``, in its own types; raises :class:`UserError`
    otherwise.

    Keys that begin with one of ``ignored`` may be there and are not read. ``where`` names the source in messages.
    """
    expected = network.state_dict()
    unknown = sorted(key for key in tensors.keys() - expected.keys() if not key.startswith(tuple(ignored)))
    missing = sorted(expected.keys() - tensors.keys())
    if missing or unknown:
        problems = [f"no weight {_listed(missing)}"] if missing else []
        problems += [f"unexpected weight {_listed(unknown)}"] if unknown else []
        raise UserError(f"{where}: {'; '.join(problems)} ({len(missing)} missing, {len(unknown)} unexpected)")
    state = {key: _checked(tensors[key](), like, f"{where}: weight '{key}'") for key, like in expected.items()}
    network.load_state_dict(state, assign=True)


def _listed(keys: list[str]) -> str:
    """The first of the keys, quoted."""
    return ", ".join(f"'{key}'" for key in keys[:LISTED]) + (", …" if len(keys) > LISTED else "")


def _checked(value: Tensor, like: Tensor, label: str) -> Tensor:
    if value.shape != like.shape:
        raise UserError(f"{label} has shape {tuple(value.shape)}, expected {tuple(like.shape)}")
    if not value.isfinite().all():
        raise UserError(f"{label} holds values that are not finite; the file is damaged")
    return value.to(like.dtype, copy=True)  # not a window on the file, which may be replaced meanwhile
