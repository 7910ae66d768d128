"""What Pillow's codecs lose: 16 bits per channel of colour PNG and TIFF, the scale of fewer, and the EXIF of a
compressed TIFF.

Reading leans on Pillow's own decoders. Its raw mode ``RGB;16B`` unpacks the high byte of big-endian samples, and
``RGB;16L`` that of little-endian ones; decoding the same file once with each yields the high and the low byte of every
sample. So no second decoder has to be trusted, and compressions, interlacing and damaged files are handled as for 8
bits.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from onestepsr.core.errors import UserError

logger = logging.getLogger(__name__)

Reopen = Callable[[], Image.Image]
"""Opens the same image anew."""
_BAND_ROWS = 64
_TIFF_LIMIT = 4_000_000_000
_BITS, _PHOTOMETRIC, _PLANAR, _FORMAT = 258, 262, 284, 339
_UNSIGNED, _SIGNED = 1, 2
_KINDS = {_SIGNED: " with a sign", 3: " in floating point"}
_USUAL_BITS = (1, 2, 4, 8, 16)
ACCEPTED_SAMPLES = "accepted: whole numbers of 8 or 16 bits per channel"


def read_deep(image: Image.Image, reopen: Reopen | None) -> NDArray[np.uint16] | None:
    """Samples (H, W, C) uint16, C = 1 (gray), 2 (gray, alpha), 3 or 4, or None when ``image`` is not a 16-bit image.

    ``image`` is not loaded yet; without ``reopen``, which opens it once more, only gray is read with 16 bits. UserError
    for layouts that Pillow would misread.
    """
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (8,))
    if tags.get(_PLANAR) == 2 and len(bits) > 1 and max(bits) > 8:
        raise UserError(
            "16-bit colours in separate planes are not supported; accepted: the samples of a pixel together"
        )
    if tags.get(_FORMAT, (_UNSIGNED,))[0] == _SIGNED and max(bits) <= 16:  # Pillow would take -1 for the brightest
        raise UserError(f"samples of {max(bits)} bits with a sign are not supported; {ACCEPTED_SAMPLES}")
    if image.mode.startswith("I;16"):
        samples = np.array(image).astype(np.uint16)
        return _white_is_high(image, (_of_twelve_bits(samples) if tuple(bits) == (12,) else samples)[..., None])
    if image.mode == "I":
        values = np.array(image)
        darkest, brightest = int(values.min()), int(values.max())
        if darkest < 0 or brightest > 65535:
            raise UserError(f"32-bit samples from {darkest} to {brightest}, beyond 0 to 65535; {ACCEPTED_SAMPLES}")
        return values.astype(np.uint16)[..., None]
    raw_modes = {_raw_mode(tile) for tile in getattr(image, "tile", ()) if reopen}
    if reopen and raw_modes == {"LA;16B"}:
        return _read_gray_alpha(reopen)
    if reopen and raw_modes and all(mode.startswith(("RGB;16", "RGBA;16")) for mode in raw_modes):
        high, low = np.array(image), _read_low_bytes(reopen)
        return _joined(high, low)
    if any(";16" in mode for mode in raw_modes):
        logger.warning("this layout of 16-bit samples is read with 8 bits")
    return None


def strange_samples(data: bytes) -> str | None:
    """What the samples of a TIFF are, if that is why Pillow does not open it; raises what Pillow does if damaged."""
    directory = ImageFileDirectory_v2(data[: 16 if data[2:3] == b"+" else 8])  # BigTIFF has the longer header
    stream = io.BytesIO(data)
    stream.seek(directory.next)
    directory.load(stream)
    bits, kind = directory.get(_BITS, (1,)), directory.get(_FORMAT, (_UNSIGNED,))[0]
    if kind == _UNSIGNED and len(set(bits)) == 1 and bits[0] in _USUAL_BITS:
        return None
    return f"TIFF samples of {'/'.join(str(int(count)) for count in bits[:4])} bits{_KINDS.get(kind, '')}"


def _of_twelve_bits(samples: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Samples in 0..4095 as ones in 0..65535, rounded to nearest: 65535 / 4095 = 16 + 1 / 273."""
    return samples * np.uint16(16) + (samples + np.uint16(136)) // np.uint16(273)


def sample_bits(image: Image.Image) -> int:
    """Bits of a sample in the file, 1, 2, 4 or 8, of an image that is not loaded yet; once it is, 1 or 8."""
    if image.mode == "1":
        return 1
    modes = [_raw_mode(tile) for tile in getattr(image, "tile", ())]
    return {"L;2": 2, "L;4": 4}.get(modes[0], 8) if modes else 8


def _white_is_high(image: Image.Image, samples: NDArray[np.uint16]) -> NDArray[np.uint16]:
    tags = getattr(image, "tag_v2", {})
    return ~samples if tags.get(_PHOTOMETRIC) == 0 else samples


def _raw_mode(tile: Any) -> str:
    arguments = tile.args
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _with_raw_mode(reopen: Reopen, change: Any) -> NDArray[np.uint8]:
    with reopen() as image:
        assert isinstance(image, ImageFile.ImageFile)
        image.tile = [
            tile._replace(
                args=(change(tile.args[0]), *tile.args[1:]) if isinstance(tile.args, tuple) else change(tile.args)
            )
            for tile in image.tile
        ]
        return np.array(image)


def _read_low_bytes(reopen: Reopen) -> NDArray[np.uint8]:
    # libtiff hands out samples in the machine's order ("N"), which is little-endian wherever PyTorch runs.
    swapped = {"B": "L", "L": "B", "N": "B"}
    return _with_raw_mode(reopen, lambda mode: mode[:-1] + swapped[mode[-1]])


def _read_gray_alpha(reopen: Reopen) -> NDArray[np.uint16]:
    # Two 16-bit samples are four bytes per pixel: read them as if they were 8-bit RGBA.
    octets = _with_raw_mode(reopen, lambda _: "RGBA")
    return _joined(octets[..., 0::2], octets[..., 1::2])


def _joined(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint16]:
    samples = high.astype(np.uint16)
    samples *= 256
    samples += low
    return samples


def write_png(stream: BinaryIO, samples: NDArray[np.uint16], chunks: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Write (H, W, 1|2|3|4) uint16 samples as a 16-bit PNG; ``chunks`` (type, data) go before the image data."""
    height, width, channels = samples.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    stream.write(b"\x89PNG\r\n\x1a\n")
    _write_chunk(stream, b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    for kind, data in chunks:
        _write_chunk(stream, kind, data)
    packer = zlib.compressobj(6)
    for rows in _filtered_rows(samples):
        packed = packer.compress(rows)
        if packed:
            _write_chunk(stream, b"IDAT", packed)
    _write_chunk(stream, b"IDAT", packer.flush())
    _write_chunk(stream, b"IEND", b"")


def _write_chunk(stream: BinaryIO, kind: bytes, data: bytes) -> None:
    stream.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def _filtered_rows(samples: NDArray[np.uint16]) -> Iterator[bytes]:
    """Rows of a PNG stream, each with whichever of the filters none, Sub, Up and Paeth leaves the smallest residue."""
    height, width, channels = samples.shape
    step = 2 * channels
    above = np.zeros((1, step * (width + 1)), np.uint8)
    for top in range(0, height, _BAND_ROWS):
        band = samples[top : top + _BAND_ROWS].astype(">u2").view(np.uint8).reshape(-1, step * width)
        current = np.pad(band, ((0, 0), (step, 0)))  # a pixel of zeros stands left of every row
        padded = np.concatenate([above, current])
        left, up, corner = current[:, :-step], padded[:-1, step:], padded[:-1, :-step]
        candidates = (band, band - left, band - up, band - _paeth(left, up, corner))
        kinds = np.array([0, 1, 2, 4], np.uint8)
        costs = np.stack([np.abs(c.view(np.int8).astype(np.int16)).sum(axis=1, dtype=np.int64) for c in candidates])
        best = costs.argmin(axis=0)
        chosen = np.empty_like(band)
        for index, candidate in enumerate(candidates):
            chosen[best == index] = candidate[best == index]
        yield np.concatenate([kinds[best][:, None], chosen], axis=1).tobytes()
        above = current[-1:]


def _paeth(left: NDArray[np.uint8], up: NDArray[np.uint8], corner: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The Paeth predictor (PNG specification, section 9.4)."""
    a, b, c = left.astype(np.int16), up.astype(np.int16), corner.astype(np.int16)
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    return np.where((to_a <= to_b) & (to_a <= to_c), left, np.where(to_b <= to_c, up, corner))


def write_tiff(stream: BinaryIO, samples: NDArray[Any], tags: dict[int, Any]) -> None:
    """Write (H, W, 1|2|3|4) uint8 or uint16 samples as a little-endian TIFF, deflate with horizontal differencing (TIFF
    6.0, 14).

    ``tags`` are further entries of the directory, a dict as value being a directory of its own (EXIF, GPS).
    """
    height, width = samples.shape[:2]
    if samples.nbytes > _TIFF_LIMIT:
        raise UserError(f"{width} x {height} pixels do not fit into a TIFF (4 GB): choose --format png")
    # The directory comes first: its length depends on the number of strips only, so it is written again once they are
    # known.
    count = -(-height // _BAND_ROWS)
    stream.write(struct.pack("<2sHI", b"II", 42, 8))
    stream.write(_tiff_directory(samples, [0] * count, [0] * count, tags).tobytes(8))
    start = stream.tell()
    offsets, lengths = [], []
    for top in range(0, height, _BAND_ROWS):
        strip = samples[top : top + _BAND_ROWS].astype(samples.dtype.newbyteorder("<"))
        strip[:, 1:] -= strip[:, :-1].copy()
        packed = zlib.compress(strip.tobytes(), 6)
        offsets.append(stream.tell() - start)  # Pillow adds the end of the directory
        lengths.append(len(packed))
        stream.write(packed)
    stream.seek(8)
    stream.write(_tiff_directory(samples, offsets, lengths, tags).tobytes(8))


def _tiff_directory(
    samples: NDArray[Any], offsets: list[int], lengths: list[int], tags: dict[int, Any]
) -> ImageFileDirectory_v2:
    height, width, channels = samples.shape
    directory = ImageFileDirectory_v2(b"II*\0\0\0\0\0")
    entries: dict[int, Any] = {256: width, 257: height, 258: (8 * samples.itemsize,) * channels, 259: 8}
    entries[_PHOTOMETRIC] = 1 if channels <= 2 else 2  # black is zero, or RGB
    entries |= {273: tuple(offsets), 277: channels, 278: _BAND_ROWS, 279: tuple(lengths), 284: 1, 317: 2}
    if channels in (2, 4):
        entries[338] = (2,)  # unassociated alpha
    for tag, value in {**tags, **entries}.items():
        directory[tag] = value
    for tag in (273, 279):
        directory.tagtype[tag] = 4  # 32 bits even when all values are small
    return directory
