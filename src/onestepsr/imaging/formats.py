"""File formats: their endings, what of an image each can hold, how they are recognised, and limits checked beforehand.

A file is what its first bytes say, whatever its ending. Formats that are not read are refused by name; camera raw too,
since what general decoders find in it is the thumbnail. Limits on size and structure are those a file states itself,
so that nothing has been decoded, and no memory taken, when one is exceeded.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onestepsr.core.errors import TooLarge, UserError

if TYPE_CHECKING:
    import tifffile

MAX_PIXELS = 250_000_000
"""Headers that claim more pixels than this are refused before anything is decoded."""
MAX_SIDE = 1_000_000
"""Longest side that is read."""
MAX_BYTES = 2_000_000_000
"""Larger files are refused before they are read."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A file format that is read, and what of an image it can hold when it is written."""

    name: str
    endings: tuple[str, ...]
    pillow: tuple[str, ...]
    """Names of the Pillow plug-ins that read it; the first one writes it."""
    read_bits: str
    write_bits: str | None = None
    """None where the format is only read."""
    side_limit: int = 2**31 - 1
    alpha: bool = True
    profile: bool = True
    metadata: str = "EXIF, XMP"
    package: str | None = None
    """Distribution of the plug-in, where Pillow itself has none."""


FORMATS = {
    "jpeg": Format(
        name="JPEG",
        endings=(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg"),
        pillow=("JPEG", "MPO"),
        read_bits="8",
        write_bits="8",
        side_limit=65_535,
        alpha=False,
        metadata="EXIF, XMP, dpi, IPTC, comment",
    ),
    "png": Format(
        name="PNG",
        endings=(".png",),
        pillow=("PNG",),
        read_bits="1 to 16",
        write_bits="8, 16",
        metadata="EXIF, XMP, dpi, texts, cICP",
    ),
    "webp": Format(name="WebP", endings=(".webp",), pillow=("WEBP",), read_bits="8", write_bits="8", side_limit=16_383),
    "tiff": Format(
        name="TIFF",
        endings=(".tif", ".tiff"),
        pillow=("TIFF",),
        read_bits="1 to 16",
        write_bits="8, 16",
        metadata="EXIF, XMP, dpi, IPTC",
    ),
    "bmp": Format(
        name="BMP",
        endings=(".bmp",),
        pillow=("BMP",),
        read_bits="1 to 8",
        write_bits="8",
        alpha=False,
        profile=False,
        metadata="dpi",
    ),
    "avif": Format(
        name="AVIF", endings=(".avif",), pillow=("AVIF",), read_bits="8 to 12", write_bits="8", side_limit=65_535
    ),
    "heif": Format(
        name="HEIF",
        endings=(".heic", ".heif", ".hif"),
        pillow=("HEIF",),
        read_bits="8 to 12",
        write_bits="8, 10",
        side_limit=16_384,
        package="pillow-heif",
    ),
    "jxl": Format(
        name="JPEG XL",
        endings=(".jxl",),
        pillow=("JXL",),
        read_bits="8 to 16",
        write_bits="8",
        profile=False,
        package="pillow-jxl-plugin",
    ),
    "gif": Format(name="GIF", endings=(".gif",), pillow=("GIF",), read_bits="8", profile=False, metadata="comment"),
}
"""Every format that is read, by the name that options and results use."""
READABLE = {ending: key for key, entry in FORMATS.items() for ending in entry.endings}
"""File name endings that are read, and the format each stands for."""
EXTENSIONS = {ending: key for ending, key in READABLE.items() if FORMATS[key].write_bits}
"""File name endings that are both read and written, and the format each stands for."""
ACCEPTED = "accepted: " + ", ".join(entry.name for entry in FORMATS.values())


def format_named(name: str) -> str:
    """The format that ``name`` stands for, as an option gives it: by its name or one of its endings, in any case."""
    key = name.lower().lstrip(".")
    if key in FORMATS and FORMATS[key].write_bits:
        return key
    if f".{key}" in EXTENSIONS:
        return EXTENSIONS[f".{key}"]
    known = ", ".join(entry.endings[0][1:] for entry in FORMATS.values() if entry.write_bits)
    raise UserError(f"'{name}' is no image format that can be written; accepted: {known}")


def kept_format(read: str | None) -> str:
    """The format of an output that keeps that of its input, ``read``: PNG where that is none or is only read."""
    return read if read is not None and FORMATS[read].write_bits else "png"


# ---- Recognition ----

_RAW = "camera raw"
_SIGNATURES = (
    (rb"\xff\xd8\xff", "jpeg"),
    (rb"\x89PNG\r\n\x1a\n", "png"),
    (rb"RIFF....WEBP", "webp"),
    (rb"II\*\0.{4}CR", f"{_RAW} (CR2)"),
    (rb"II\x1a\0\0\0HEAPCCDR", f"{_RAW} (CRW)"),
    (rb"IIU\0", f"{_RAW} (RW2)"),
    (rb"IIR[OS]|MMOR", f"{_RAW} (ORF)"),
    (rb"FUJIFILMCCD-RAW", f"{_RAW} (RAF)"),
    (rb"FOVb", f"{_RAW} (X3F)"),
    (rb"\0MRM", f"{_RAW} (MRW)"),
    (rb"IIII....|MMMM....", f"{_RAW} (IIQ)"),
    (rb"....ftypcrx ", f"{_RAW} (CR3)"),
    (rb"(II\*\0|MM\0\*|II\+\0|MM\0\+)", "tiff"),
    (rb"BM", "bmp"),
    (rb"GIF8[79]a", "gif"),
    (rb"....ftyp(avif|avis|(mif1|miaf|msf1).{4}.{0,60}avi[fs])", "avif"),
    (rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", "heif"),
    (rb"....ftyp", "video (MP4, QuickTime or the like)"),
    (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "jxl"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"8BPS", "PSD (Photoshop)"),
    (rb"P[1-7FfH][\s#]", "PPM (Netpbm)"),
    (rb"\x76\x2f\x31\x01", "OpenEXR"),
    (rb"#\?RADIANCE|#\?RGBE", "Radiance HDR"),
    (rb"II\xbc", "JPEG XR"),
    (rb"DDS ", "DDS"),
    (rb"qoif", "QOI"),
    (rb"\0\0[\x02\x03\x0a\x0b]\0\0\0\0\0", "TGA"),
    (rb"\0\0[\x01\x02]\0", "ICO"),
    (rb"icns", "ICNS"),
    (rb"SIMPLE  =", "FITS"),
    (rb".{128}DICM", "DICOM"),
    (rb"\x1a\x45\xdf\xa3|RIFF....AVI ", "video"),
    (rb"%PDF", "PDF"),
    (rb"%!PS", "PostScript"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "gzip"),
    (rb".{257}ustar|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ", "an archive"),
    (rb"version https://git-lfs", "a pointer of Git LFS ('git lfs pull' fetches the file)"),
    (rb"\x0a[\0-\x05]\x01[\x01\x02\x04\x08]", "PCX"),
    (rb"[\x8a\x8b][MJ]NG", "MNG"),
    (rb"AT&TFORM", "DjVu"),
    (rb"FORM....ILBM", "ILBM"),
    (rb"\x01\xda[\0\x01][\x01\x02]", "SGI"),
    (rb"\x59\xa6\x6a\x95", "Sun Raster"),
    (rb"BPG\xfb", "BPG"),
    (rb"\xd7\xcd\xc6\x9a", "WMF"),
    (rb"gimp xcf", "XCF (GIMP)"),
    (rb"(?i:(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body))", "a web page (HTML)"),
    (rb"(?i:(\xef\xbb\xbf)?\s*(<\?xml.{0,500})?\s*<svg)", "SVG"),
    (rb"(\xef\xbb\xbf)?[\t\n\r\x20-\x7e]{16,}$", "a text file"),
)
_PATTERNS = [(re.compile(pattern, re.DOTALL), name) for pattern, name in _SIGNATURES]


def identify(data: bytes) -> str:
    """The key in :data:`FORMATS` of what ``data`` begins like; UserError that names any other kind of file."""
    for pattern, name in _PATTERNS:
        if pattern.match(data[:1024]):
            if name in FORMATS:
                return name
            if name.startswith(_RAW):
                raise UserError(raw_refusal(name))
            raise UserError(f"{name} is not supported; {ACCEPTED}")
    raise UserError(f"not an image that can be read, or its header is damaged; {ACCEPTED}")


def raw_refusal(kind: str) -> str:
    """The words in which camera raw is refused."""
    return f"{kind} is not supported: develop it to TIFF or JPEG first; {ACCEPTED}"


_DNG_VERSION, _SUB_DIRECTORIES, _PHOTOMETRIC, _COMPRESSION = 50706, 330, 262, 259
_RAW_PHOTOMETRIC = (32803, 34892)  # colour filter array, linear raw
_RAW_COMPRESSION = (32767, 32769, 32770, 34713, 65535)  # Sony, packed, Samsung, Nikon, Pentax
_RAW_TAGS = (34310, 50740, 50752, 46275)  # Leaf, DNG private data (SR2), CR2 slices, Hasselblad
_MOST_DIRECTORIES = 16


def check_tiff(file: tifffile.TiffFile, most_pixels: int) -> None:
    """Raise UserError for camera raw, for a first image that is a reduced copy, and for a structure beyond limits."""
    page = file.pages.first
    if _DNG_VERSION in page.tags:
        raise UserError(raw_refusal(f"{_RAW} (DNG)"))
    directories = [page.tags, *_further_directories(file)]
    for tags in directories:
        is_raw = tags.valueof(_PHOTOMETRIC) in _RAW_PHOTOMETRIC or tags.valueof(_COMPRESSION) in _RAW_COMPRESSION
        if is_raw or any(tag in tags for tag in _RAW_TAGS):
            raise UserError(raw_refusal(f"{_RAW} ({tags.valueof(271) or page.tags.valueof(271) or 'TIFF'})"))
    if int(page.tags.valueof(254, 0)) & 1 or page.tags.valueof(255, 1) == 2:
        raise UserError(
            "the first image of this TIFF is a reduced copy of another one, as the preview of camera raw is"
        )
    check_pixels(page.imagewidth, page.imagelength, most_pixels)
    segments = max(np.size(page.tags.valueof(tag, ())) for tag in (273, 324))
    width, height = page.tags.valueof(322, 16), page.tags.valueof(323, 16)
    if segments > _MOST_SEGMENTS or min(width, height) < _SMALLEST_TILE or width * height > most_pixels:
        raise UserError(
            f"{segments:,} strips or tiles, tiles of {width} x {height}; "
            f"accepted: at most {_MOST_SEGMENTS:,}, of at least {_SMALLEST_TILE} x {_SMALLEST_TILE}"
        )
    if page.samplesperpixel > _MOST_CHANNELS or page.imagedepth > 1:
        raise UserError(
            f"{page.samplesperpixel} channels, depth {page.imagedepth}; accepted: {_MOST_CHANNELS}, depth 1"
        )


def _further_directories(file: tifffile.TiffFile) -> Iterator[tifffile.TiffTags]:
    """The first directories below the first image, and after it."""
    import tifffile

    page = file.pages.first
    below = page.pages if page.subifds else None
    for pages, start in ((below, 0), (file.pages, 1)):
        for index in range(start, _MOST_DIRECTORIES):
            try:
                found = pages[index] if pages is not None else None
            except (IndexError, tifffile.TiffFileError, struct.error, ValueError):
                break
            if not isinstance(found, tifffile.TiffPage):
                break
            yield found.tags


# ---- Limits on what a file states ----

_MOST_SCANS = 200
_MOST_SEGMENTS = 300_000
_SMALLEST_TILE = 8
_MOST_CHANNELS = 32
_MOST_CHUNKS = 100_000
_DEFLATE_RATIO = 1032
"""The most bytes that one byte of a deflate stream can become."""
_SMALL_CANVAS = 50_000_000
_PIXELS_A_BYTE = 20_000
_RLE_PIXELS_A_BYTE = 128


def check_pixels(width: int, height: int, most_pixels: int) -> None:
    """Raise TooLarge for a size beyond the limits."""
    if width * height > most_pixels:
        raise TooLarge(f"claims {width} x {height} = {width * height:,} pixels, the limit is {most_pixels:,}")
    if max(width, height) > MAX_SIDE:
        raise TooLarge(f"claims {width} x {height} pixels, the limit is {MAX_SIDE:,} a side")


def check_structure(data: bytes, kind: str, most_pixels: int) -> None:
    """Raise UserError where the size stated in the header, or the number of parts, is beyond the limits.

    Only for formats whose decoder takes its memory or time at once; the size of the others is read from the opened
    image.
    """
    if kind == "jpeg":
        bits = _jpeg_bits(data)
        if bits > 8:
            raise UserError(f"JPEG of {bits} bits is not supported; {ACCEPTED}")
        scans = data.count(b"\xff\xda")
        if scans > _MOST_SCANS:
            raise UserError(f"{scans:,} scans; accepted: at most {_MOST_SCANS}")
    elif kind == "webp":
        _check_canvas(_webp_size(data), len(data), most_pixels)
    elif kind == "jxl":
        _check_canvas(jxl_header(data)[:2], len(data), most_pixels)
    elif kind == "bmp" and len(data) >= 34:
        width, height, compression = *struct.unpack_from("<ii", data, 18), struct.unpack_from("<I", data, 30)[0]
        most = _RLE_PIXELS_A_BYTE * len(data)
        if compression in (1, 2) and struct.unpack_from("<I", data, 14)[0] >= 40 and abs(width * height) > most:
            raise UserError(f"claims {width} x {abs(height)} pixels, more than {len(data):,} bytes can hold")


def _jpeg_bits(data: bytes) -> int:
    """Bits per sample by the frame header (ITU-T T.81, B.2.2); 0 if it has none."""
    offset = 2
    while offset + 5 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return data[offset + 4]
        if marker == 0xDA:
            break
        offset += 1 if marker == 0xFF else 2 + int.from_bytes(data[offset + 2 : offset + 4])
    return 0


def _check_canvas(size: tuple[int, int], length: int, most_pixels: int) -> None:
    width, height = size
    check_pixels(width, height, most_pixels)
    if width * height > max(_SMALL_CANVAS, _PIXELS_A_BYTE * length):
        raise TooLarge(f"claims {width} x {height} pixels in {length:,} bytes, which is no photo")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas, (0, 0) where the header is unusual."""
    chunk = data[12:16]
    if chunk == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def jxl_header(data: bytes) -> tuple[int, int, int]:
    """Width, height and bits of a JPEG XL codestream (ISO/IEC 18181-1, SizeHeader and ImageMetadata); 0 where unknown.

    A file may also be boxes, of which ``jxlc`` or the first ``jxlp`` holds the codestream.
    """
    box = None if data[:2] == b"\xff\x0a" else re.search(rb"jxl[cp]", data[:1_000_000])
    start = data.find(b"\xff\x0a", box.end() if box else 0, (box.end() if box else 0) + 8)
    if start < 0:
        return 0, 0, 0
    bits, position = int.from_bytes(data[start + 2 : start + 66], "little"), 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        return bits >> (position - count) & (1 << count) - 1

    def size() -> tuple[int, int]:
        small = take(1)
        height = (take(5) + 1) * 8 if small else take((9, 13, 18, 30)[take(2)]) + 1
        ratio = take(3)
        if ratio:
            across, down = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
            return height * across // down, height
        return ((take(5) + 1) * 8 if small else take((9, 13, 18, 30)[take(2)]) + 1), height

    width, height = size()
    if take(1):  # all defaults
        return width, height, 8
    if take(1):  # extra fields: orientation, intrinsic size, preview, animation
        take(3)
        if take(1):
            size()
        if take(1) or take(1):
            return width, height, 0
    if take(1):  # floating point
        return width, height, 0
    kind = take(2)
    return width, height, take(6) + 1 if kind == 3 else (8, 10, 12)[kind]


# ---- PNG chunks ----

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_HEADER = 33
"""Bytes of the signature and the first chunk, IHDR."""


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG: each one's type, and all its bytes with length and checksum; the last may be incomplete."""
    offset = len(PNG_MAGIC)
    while offset + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        yield kind, data[offset : offset + 12 + size]
        offset += 12 + size


def check_png(chunks: list[tuple[bytes, bytes]], most_pixels: int) -> None:
    """Raise UserError for a size or a number of chunks beyond the limits, or more samples than the data can hold."""
    if len(chunks) > _MOST_CHUNKS:
        raise UserError(f"{len(chunks):,} chunks; accepted: at most {_MOST_CHUNKS:,}")
    if not chunks or chunks[0][0] != b"IHDR" or len(chunks[0][1]) < 25:
        return  # the decoder says what is wrong
    width, height, bits, color = struct.unpack_from(">IIBB", chunks[0][1], 8)
    check_pixels(width, height, most_pixels)
    row = (width * bits * {2: 3, 4: 2, 6: 4}.get(color, 1) + 7) // 8
    compressed = sum(len(chunk) for kind, chunk in chunks if kind == b"IDAT")
    if height * row > _DEFLATE_RATIO * compressed + 1000:
        raise UserError(f"truncated or damaged: claims {width} x {height} pixels, too many for {compressed:,} bytes")
