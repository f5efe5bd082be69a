"""One image: read it whole or say why not, turn it into what a packed dataset holds, and hash what it shows.

A packed image is an upright 8-bit JPEG or PNG, grey or RGB. Bytes that are this already are kept, all else is
converted:

- EXIF orientation is applied and dropped.
- 16-bit grey: round(value / 257), the full range 0..65535 onto 0..255. 16-bit colour: value // 256, as Pillow has it.
- DICOM: as its header wants it seen, see `dicom.py`.
- Transparency is laid over white; palettes, CMYK, YCbCr, Lab and 1-bit become RGB or grey. ICC profiles are ignored.
- Of several frames (TIFF, WebP) the first is taken.
- What came as JPEG is stored as JPEG, all else as PNG, which loses nothing.

An image of more than `MAX_PIXELS` is refused by its header, undecoded.

With a short side given, larger images are shrunk to it with antialiasing and stored as JPEG of quality 95, chroma not
subsampled; smaller ones are never enlarged.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageOps

from cluster.errors import UserError
from data_pipeline.dicom import dicom_image, is_dicom

MAX_PIXELS = 80_000_000
"""Decoded, an image takes three bytes a pixel, and some conversions hold it three times."""
JPEG_QUALITY = 95
HASH_SIDE_PX = 32
FLAT_STD = 1.0
"""Grey levels of 255: the hash of an image with less structure would be noise."""

JPEG_END = b"\xff\xd9"
JPEG_TRAILER_BYTES = 1024
"""Some cameras write a few bytes behind the end."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_EXIF_MARKS = (b"eXIf", b"Raw profile type")
ORIENTATION_TAG = 0x0112
UPRIGHT = 1
WHITE = (255, 255, 255, 255)
SUFFIX = {"JPEG": "jpg", "PNG": "png"}
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000")
"""What is read of those that Pillow knows, whatever a file is called: for EPS it would start Ghostscript, a program.
A JPEG of several pictures (MPO) is a JPEG here."""

# It would be said of images that `MAX_PIXELS` refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DamagedImage(Exception):
    """The image cannot be read; the message is the reason, in a few words."""


@dataclass(frozen=True)
class PackedImage:
    """An encoded image as it is stored, with what decoding it showed."""

    data: bytes
    suffix: str
    width: int
    height: int
    phash: int
    mean: tuple[float, ...]
    """RGB, of the pixels in units of 0..1."""
    mean_square: tuple[float, ...]
    """RGB, of the squared pixels."""


def prepare_image(data: bytes, short_side_px: int | None = None) -> PackedImage:
    """Decode, convert where needed, and measure one image.

    Args:
        data: The file's bytes.
        short_side_px: Shrink to this short side; None = keep the size.

    Raises:
        DamagedImage: The bytes are empty, cut off, too large, or no image that can be read.
        UserError: They are DICOM, and pydicom is not installed.
    """
    with _told_as_damage(), _open(data) as opened:
        opened.load()
        source = opened.format or ""
        kept = source in SUFFIX and _is_plain(opened, data)
        image = opened if kept else _to_8_bit(opened)
        image, shrunk = _shrink(image, short_side_px)
        if not kept or shrunk:
            data, source = _encode(image, "JPEG" if shrunk or source in ("JPEG", "MPO") else "PNG")
        mean, mean_square = _moments(image)
        return PackedImage(data, SUFFIX[source], *image.size, perceptual_hash(image), mean, mean_square)


def decodable(data: bytes) -> bytes:
    """What the decoder is given of an image file: itself where its header shows that, else what packing makes of it.

    Several times as fast as `prepare_image`, since pixels that the decoder will see are not decoded here; it may still
    find them damaged.

    Raises:
        DamagedImage: As in `prepare_image`.
    """
    with _told_as_damage(), _open(data) as opened:
        # The end of a JPEG tells whether it was cut off: then Pillow says by how much, and the decoder never meets it.
        if opened.format == "PNG" or (opened.format == "JPEG" and JPEG_END in data[-JPEG_TRAILER_BYTES:]):
            ready = _is_plain(opened, data)
        else:
            ready = False
    return data if ready else prepare_image(data).data


def thumbnail(data: bytes, long_side_px: int, quality: int) -> bytes:
    """A small copy for people: an upright JPEG, RGB or grey, without metadata.

    Args:
        data: The file's bytes.
        long_side_px: What it is shrunk to; smaller images keep their size.
        quality: Of the JPEG, 1 to 95.

    Raises:
        DamagedImage: As in `prepare_image`.
    """
    with _told_as_damage(), _open(data) as opened:
        opened.load()
        image = _to_8_bit(opened)
        image.thumbnail((long_side_px, long_side_px))
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(buffer, "JPEG", quality=quality, optimize=True)  # its pixels alone
        return buffer.getvalue()


@contextmanager
def _told_as_damage() -> Iterator[None]:
    """What Pillow raises on an image that cannot be read, as `DamagedImage`."""
    try:
        yield
    except UserError:  # of the machine, not of the image
        raise
    except Image.UnidentifiedImageError:
        raise DamagedImage("no image format that is known") from None
    except Image.DecompressionBombError:
        raise DamagedImage(f"more than the {MAX_PIXELS} pixels that are read") from None
    except (OSError, ValueError, TypeError, SyntaxError, EOFError, IndexError, struct.error, zlib.error) as error:
        # Pillow's decoders raise all of these on damaged files.
        raise DamagedImage(" ".join(str(error).split()) or type(error).__name__) from None


def perceptual_hash(image: Image.Image) -> int:
    """64-bit pHash: signs of the low frequencies of a 32 x 32 grey copy, row by row from the highest bit.

    The copy's DCT-II is cut to its 8 x 8 lowest frequencies; the constant term is replaced by that of (8, 8), so that
    brightness does not count; a bit is set where a coefficient lies above the median (Zauner, "Implementation and
    benchmarking of perceptual image hash functions", 2010, section 3.2). Half of the bits are set, hence 0 is free to
    say "none": an image without structure, whose hash would be noise and match anything.

    Returns:
        The hash as an unsigned integer, or 0 for a flat image.
    """
    grey = image.convert("L").resize((HASH_SIDE_PX, HASH_SIDE_PX), Image.Resampling.BOX)
    pixels = np.asarray(grey, dtype=np.float64)
    if pixels.std() < FLAT_STD:
        return 0
    basis = _dct_basis(HASH_SIDE_PX)
    low = basis[:8] @ pixels @ basis[:8].T
    low[0, 0] = basis[8] @ pixels @ basis[8]
    bits = (low > np.median(low)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@cache
def _dct_basis(size: int) -> np.ndarray:
    """Orthonormal DCT-II, [frequency, position]."""
    frequency, position = np.mgrid[:size, :size]
    basis = np.cos(np.pi * (2 * position + 1) * frequency / (2 * size)) * np.sqrt(2 / size)
    basis[0] /= np.sqrt(2)
    return basis


def _open(data: bytes) -> Image.Image:
    """The image, its header read and its size looked at."""
    if not data:
        raise DamagedImage("the file is empty")
    if is_dicom(data):
        return dicom_image(data, MAX_PIXELS)
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise DamagedImage(f"{width} x {height} pixels, more than the {MAX_PIXELS} that are read")
    if data.startswith(PNG_SIGNATURE):
        image.verify()  # the checksums of a PNG: its decoder alone lets wrong bytes pass
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    return image


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether the encoded bytes are an upright 8-bit grey or RGB image already."""
    if image.mode not in ("L", "RGB") or _orientation(image, data) != UPRIGHT:
        return False
    # Pillow opens PNGs of 2, 4 and 16 bits a channel in the same modes: byte 24 of the header tells the depth.
    return image.format == "JPEG" or (data[24] == 8 and "transparency" not in image.info)


def _orientation(image: Image.Image, data: bytes) -> int:
    # Pillow decodes a whole PNG to look for EXIF behind its pixels.
    if image.format == "PNG" and not any(mark in data for mark in PNG_EXIF_MARKS):
        return UPRIGHT
    return image.getexif().get(ORIENTATION_TAG, UPRIGHT)


def _to_8_bit(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise DamagedImage(f"grey values {pixels.min()}..{pixels.max()} are not within 16 bits")
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise DamagedImage("floating-point pixels have no known range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, WHITE), rgba)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _shrink(image: Image.Image, short_side_px: int | None) -> tuple[Image.Image, bool]:
    short = min(image.size)
    if short_side_px is None or short <= short_side_px:
        return image, False
    width, height = (max(1, round(side * short_side_px / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS), True


def _encode(image: Image.Image, kind: str) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    if kind == "JPEG":
        image.save(buffer, kind, quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, kind)
    return buffer.getvalue(), kind


def _moments(image: Image.Image) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and mean square of R, G and B from the histogram: exact, and all of it in C."""
    histogram = np.asarray(image.histogram(), dtype=np.float64).reshape(-1, 256)
    histogram = np.broadcast_to(histogram, (3, 256)) / (image.width * image.height)
    level = np.arange(256) / 255
    return tuple((histogram @ level).tolist()), tuple((histogram @ level**2).tolist())
