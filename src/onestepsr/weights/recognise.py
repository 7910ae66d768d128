"""Names for files that are no usable weights: incomplete downloads, other kinds of files, networks of other projects.

Only used to say what is wrong with a file that could not be read, or does not hold what was expected.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from rich.filesize import decimal

AGAIN = "download it again"
_BEGINNINGS = (
    (
        rb"(?i:(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body))",
        f"a web page, no weights (the address may be gone, or ask for a login): {AGAIN}",
    ),
    (rb"(?i:(\xef\xbb\xbf)?\s*(<\?xml|<error))", f"a server's message in XML, no weights: {AGAIN}"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself: 'git lfs pull' fetches it"),
    (rb"GGUF", "a GGUF file, which is not supported: take the safetensors file of the same model"),
    (rb"\x89HDF", "an HDF5 file (Keras), which is not supported"),
    (rb"\x93NUMPY", "a NumPy array, no weights"),
    (rb".{4}TFL3", "a TensorFlow Lite model, which is not supported"),
    (
        rb"\x08[\x01-\x20]\x12.{1,20}(pytorch|onnx|tf2onnx|keras)",
        "an ONNX model, which is not supported: take the weights it was exported from",
    ),
    (rb"7767517", "the description of an ncnn model: name the .bin file beside it"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar", "an archive: unpack it first"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF", "an image, no weights"),
    (rb"%PDF", "a PDF, no weights"),
)
_KINDS = [(re.compile(pattern, re.DOTALL), name) for pattern, name in _BEGINNINGS]
_NETWORKS = (
    (r"control_model\.|controlnet_|input_hint_block", "a ControlNet"),
    (r"lora_(unet|te)|.*\.lora_([AB]|up|down)\b|.*\.lora\.(up|down)\.", "a LoRA, which is added to another model"),
    (r"structcond_stage_model", "a StableSR checkpoint"),
    (r"(model\.)?(diffusion_model\.)?double_blocks\.0\.img_attn|single_transformer_blocks", "a FLUX checkpoint"),
    (r"(model\.diffusion_model\.)?joint_blocks\.0", "a Stable Diffusion 3 checkpoint"),
    (r"stylegan_decoder|.*final_conv\.modulated_conv|toRGB", "a GFPGAN checkpoint (faces)"),
    (r"position_emb$|fuse_convs_dict", "a CodeFormer checkpoint (faces)"),
    (r"(module\.)?layers\.\d+\.residual_group\.blocks\.\d+\.conv_block", "a HAT checkpoint"),
    (r"(module\.)?layers\.\d+\.residual_group", "a SwinIR checkpoint"),
    (r"(module\.)?layers\.\d+\.blocks\.\d+\.attn\.(attns|dwconv)", "a DAT checkpoint"),
    (r"(module\.)?(RRDB_trunk|trunk)\.\d+\.RDB|model\.1\.sub\.\d+\.RDB", "an ESRGAN checkpoint (RRDBNet)"),
    (r"(module\.)?body\.\d+\.rdb\d|conv_first\.weight$", "an ESRGAN checkpoint (RRDBNet)"),
    (r"(module\.)?head\.0\.weight$|(module\.)?body\.\d+\.body\.\d+\.weight$", "an EDSR or RCAN checkpoint"),
    (r"text_model\.encoder|visual\.transformer|vision_model", "a CLIP model"),
    (r"(decoder|encoder)\.mid(_block)?\.|first_stage_model\.", "an autoencoder by itself"),
    (r"model\.diffusion_model\.|down_blocks\.0\.resnets|input_blocks\.0\.0\.", "a diffusion UNet"),
    (r"layer1\.0\.conv1\.weight$|features\.0\.weight$", "an image classifier (ResNet, VGG or the like)"),
)  # fmt: skip
_MATCHES = [(re.compile(pattern), name) for pattern, name in _NETWORKS]
_HEADER_LIMIT = 100_000_000


def file_problem(path: Path) -> str | None:
    """The reason, in words, for which a file that could not be read is none of weights; None if it is not known."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            head = handle.read(1024)
    except OSError:
        return None
    if size == 0:
        return f"is empty (0 bytes): {AGAIN}"
    found = next((name for pattern, name in _KINDS if pattern.match(head)), None)
    if found is not None:
        return found
    if head.startswith(b"PK\x03\x04"):
        return None if zipfile.is_zipfile(path) else f"incomplete ({size:,} bytes without the end of the file): {AGAIN}"
    return _cut_safetensors(path, size)


def network_name(keys: Iterable[str]) -> str | None:
    """The network that tensors of these names belong to, as its project calls it; None if it is not known.

    >>> network_name(["RRDB_trunk.0.RDB1.conv1.weight"])
    'an ESRGAN checkpoint (RRDBNet)'
    """
    names = list(keys)
    plain = [key for key in names if re.fullmatch(r"(module\.)?body\.\d+\.(weight|bias)", key)]
    if names and len(plain) == len(names):
        return "a compact Real-ESRGAN checkpoint (SRVGGNet)"
    return next((name for pattern, name in _MATCHES if any(map(pattern.match, names))), None)


def _cut_safetensors(path: Path, size: int) -> str | None:
    """Words for a safetensors file that ends too early, with the size that its header asks for."""
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 2 <= length <= _HEADER_LIMIT or handle.read(1) != b"{":
            return None
        if size < 8 + length:
            return f"incomplete: {size:,} bytes, its header alone has {8 + length:,}: {AGAIN}"
        handle.seek(8)
        try:
            entries = json.loads(handle.read(length))
            ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
            return None
    there, wanted = decimal(size), decimal(whole)
    if there == wanted:
        there, wanted = f"{size:,}", f"{whole:,} bytes"
    return f"incomplete: {there} of {wanted}: {AGAIN}" if size < whole else None
