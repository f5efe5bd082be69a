"""DICOM -> what the modality means to be seen: 8-bit grey or RGB. Needs pydicom, the extra `dicom`.

In the order of the standard (PS3.3, C.11 and C.7.6.3.1.2):

1. Stored values -> modality values: modality LUT, or rescale slope and intercept.
2. Modality values -> 0..1: VOI LUT, or window centre and width (the first, where the header offers several), linear,
   exactly linear or sigmoid. Without either, the full range of the stored bits.
3. MONOCHROME1 is turned round, so that high is bright everywhere. 0..1 -> round(255 x).

RGB, YBR and palette colour become RGB; samples of more than 8 bits by their full range. Of several frames the first is
taken.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image

from cluster.errors import UserError

MAGIC, MAGIC_OFFSET = b"DICM", 128
DEFLATED = b"1.2.840.10008.1.2.1.99"
"""UID of the transfer syntax."""


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are a DICOM file (part 10: with its preamble)."""
    return data[MAGIC_OFFSET : MAGIC_OFFSET + len(MAGIC)] == MAGIC


def bits_of_dicom(data: bytes) -> int:
    """Bits that a channel of a DICOM image uses, by its header; 0 where it does not say.

    Args:
        data: The bytes of a file that `dicom_image` has read.
    """
    import pydicom

    return int(pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True).get("BitsStored") or 0)


def dicom_image(data: bytes, max_pixels: int) -> Image.Image:
    """The image of a DICOM file, mode L or RGB.

    Args:
        data: The file's bytes.
        max_pixels: A larger image is refused by its header, before any pixel is decoded.

    Raises:
        UserError: pydicom is not installed.
        ValueError: The file cannot be read; the message is the reason.
    """
    try:
        import pydicom
        from pydicom.pixels import pixel_array
    except ModuleNotFoundError:
        raise UserError(
            "DICOM files need pydicom, which is not installed; install it with `pip install 'rarelens[dicom]'`"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd values in headers, many a file
        try:
            if DEFLATED in data:  # it would be inflated whole, to whatever size
                raise ValueError("a deflated DICOM file; write it uncompressed")
            header = pydicom.dcmread(io.BytesIO(data))
            _check_size(header, max_pixels)
            stored = pixel_array(header, index=0)
            return _shown(_first_frame(header), stored)
        except (ValueError, UserError):
            raise
        except Exception as error:  # pydicom raises what its decoders, its readers and broken headers raise
            raise ValueError(" ".join(str(error).split()).partition(". ")[0] or type(error).__name__) from None


def _check_size(header: Any, max_pixels: int) -> None:
    rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    if rows * columns == 0:
        raise ValueError("a DICOM file without an image")
    if rows * columns > max_pixels:
        raise ValueError(f"{columns} x {rows} pixels, more than the {max_pixels} that are read")


def _first_frame(header: Any) -> Any:
    """The header with what an enhanced, multi-frame one says of its first frame (PS3.3, C.7.6.16)."""
    shared, frames = header.get("SharedFunctionalGroupsSequence"), header.get("PerFrameFunctionalGroupsSequence")
    for groups in (shared, frames):
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence") if groups else ():
            for item in groups[0].get(name) or ():
                header.update(item)
    return header


def _shown(header: Any, stored: np.ndarray) -> Image.Image:
    kind = str(header.get("PhotometricInterpretation", ""))
    if stored.dtype.kind == "f":
        raise ValueError("floating-point pixels have no known range")
    if kind in ("MONOCHROME1", "MONOCHROME2"):
        share = _grey(header, stored)
        return _to_image(1 - share if kind == "MONOCHROME1" else share)
    if kind == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        stored = apply_color_lut(stored, header)
        return _to_image(stored / np.iinfo(stored.dtype).max)
    if stored.ndim != 3 or stored.shape[2] != 3:
        raise ValueError(f"photometric interpretation {kind!r} is not read")
    return _to_image(stored / (2 ** int(header.BitsStored) - 1))


def _grey(header: Any, stored: np.ndarray) -> np.ndarray:
    """Stored values [H, W] as shares of full brightness, 0..1."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(stored, header)
    if header.get("VOILUTSequence"):
        return apply_voi(values, header) / (2 ** int(header.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    if header.get("WindowCenter") is not None and header.get("WindowWidth") is not None:
        return _window(
            values.astype(np.float64),
            _first_of(header.WindowCenter),
            _first_of(header.WindowWidth),
            str(header.get("VOILUTFunction") or "LINEAR").upper(),
        )
    low, high = _range(header)
    return (values - low) / (high - low)


def _window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """PS3.3, C.11.2.1.2 (LINEAR), C.11.2.1.3.2 (LINEAR_EXACT), C.11.2.1.3.1 (SIGMOID), for an output of 0..1."""
    if function == "LINEAR":
        # Its width counts values, so that 1 is a threshold.
        center, width = center - 0.5, width - 1
    if width < 0 or (width == 0 and function != "LINEAR"):
        raise ValueError("the width of the header's window is not positive")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function not in ("LINEAR", "LINEAR_EXACT"):
        raise ValueError(f"VOI LUT function {function!r} is not known")
    if width == 0:
        return (values > center).astype(np.float64)
    return np.clip((values - center) / width + 0.5, 0, 1)


def _range(header: Any) -> tuple[float, float]:
    """Lowest and highest modality value that the stored bits can express."""
    if header.get("ModalityLUTSequence"):
        return 0, 2 ** int(header.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    bits = int(header.BitsStored)
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if header.PixelRepresentation else [0, 2**bits - 1])
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    if slope is not None and intercept is not None:
        ends = ends * float(slope) + float(intercept)
    return float(ends.min()), float(ends.max())


def _first_of(value: Any) -> float:
    return float(value if isinstance(value, str | int | float) or not hasattr(value, "__getitem__") else value[0])


def _to_image(share: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8))
