"""RandAugment's operations in a DALI graph; `rand_augment.py` says which there are and draws their arguments.

`images` are uint8 HWC on either device, all other nodes are numbers and stay on the CPU. The definition needs DALI's
conditionals: each operation is done to the images that it is drawn for, and costs the others nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.rand_augment import OPERATIONS, WARPS


def rand_augment_graph(
    images: Any, operation: Any, value: Any, matrix: Any, image_px: int, fill: tuple[int, ...]
) -> Any:
    """One layer in a DALI graph whose definition has conditionals; images that an operation skips cost it nothing.

    Args:
        images: uint8 HWC.
        operation: int32, `RandParameters.operation` of the layer.
        value: float32 of the layer.
        matrix: float32 [2, 3] of the layer.
        image_px: Side of the images.
        fill: RGB levels of what a warp brings in from outside.
    """
    if operation == 0:
        out = images
    else:
        warps = [1 + OPERATIONS.index(name) for name in WARPS]
        if (operation == warps[0]) | (operation >= warps[1]):
            out = _warp(images, matrix, image_px, fill)
        else:
            out = _one_of(list(_GRAPHS), images, operation, value)
    return out


def _one_of(names: list[str], images: Any, operation: Any, value: Any) -> Any:
    """The operation out of `names` (in the order of `OPERATIONS`) that each image asks for."""
    if len(names) == 1:
        out = _GRAPHS[names[0]](images, value)
    else:
        middle = len(names) // 2
        if operation <= 1 + OPERATIONS.index(names[middle - 1]):
            out = _one_of(names[:middle], images, operation, value)
        else:
            out = _one_of(names[middle:], images, operation, value)
    return out


def _warp(images: Any, matrix: Any, image_px: int, fill: tuple[int, ...]) -> Any:
    """By a frame of one pixel, repeated outwards: DALI's own fill is slower and the same for all channels."""
    from nvidia.dali import fn, types

    framed = fn.slice(
        images,
        start=[-1, -1],
        shape=[image_px + 2, image_px + 2],
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=list(fill),
    )
    frame = types.Constant(np.array([[0, 0, 1], [0, 0, 1]], dtype=np.float32), device="cpu")
    return fn.warp_affine(framed, matrix + frame, size=[image_px, image_px], inverse_map=True)


def _auto_contrast(images: Any, value: Any) -> Any:
    """Each channel stretched onto 0..255; a flat one stays."""
    from nvidia.dali import fn, types

    low = fn.cast(fn.reductions.min(images, axis_names="HW", keep_dims=True), dtype=types.DALIDataType.FLOAT)
    high = fn.cast(fn.reductions.max(images, axis_names="HW", keep_dims=True), dtype=types.DALIDataType.FLOAT)
    flat = high == low
    scale = (255.0 - 254.0 * flat) / (high - low + flat)
    return fn.cast((images - low * (high != low)) * scale, dtype=types.DALIDataType.UINT8)


def _equalize(images: Any, value: Any) -> Any:
    from nvidia.dali import fn

    return fn.equalize(images)


def _invert(images: Any, value: Any) -> Any:
    from nvidia.dali import types

    return images ^ types.Constant(255, dtype=types.DALIDataType.UINT8)


def _posterize(images: Any, bits: Any) -> Any:
    from nvidia.dali import fn, types

    return images & fn.cast(256.0 - 2.0 ** (8.0 - bits), dtype=types.DALIDataType.UINT8)


def _solarize(images: Any, threshold: Any) -> Any:
    from nvidia.dali import types

    return images ^ ((images >= threshold) * types.Constant(255, dtype=types.DALIDataType.UINT8))


def _solarize_add(images: Any, amount: Any) -> Any:
    from nvidia.dali import fn, types

    return images + (images < 128) * fn.cast(amount, dtype=types.DALIDataType.UINT8)


def _color(images: Any, factor: Any) -> Any:
    return _blend(grey_graph(images), images, factor)


def _contrast(images: Any, factor: Any) -> Any:
    from nvidia.dali import fn

    return _blend(fn.reductions.mean(grey_graph(images), keep_dims=True), images, factor)


def _brightness(images: Any, factor: Any) -> Any:
    from nvidia.dali import fn

    return fn.brightness_contrast(images, brightness=factor)


def _sharpness(images: Any, factor: Any) -> Any:
    """Away from, or towards, the image smoothed by Pillow's 3 x 3 kernel."""
    from nvidia.dali import fn, types

    smooth = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
    centre = np.zeros((3, 3), dtype=np.float32)
    centre[1, 1] = 1
    kernel = types.Constant(smooth, device="cpu") + types.Constant(centre - smooth, device="cpu") * factor
    return fn.filter(images, kernel, border="clamp")


_GRAPHS = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
}


def grey_graph(images: Any) -> Any:
    """Luma by ITU-R BT.601 (.299 R + .587 G + .114 B), uint8 [H, W, 1]."""
    from nvidia.dali import fn, types

    return fn.color_space_conversion(images, image_type=types.DALIImageType.RGB, output_type=types.DALIImageType.GRAY)


def _blend(first: Any, second: Any, factor: Any) -> Any:
    """`first` for 0, `second` for 1, and on along the line; uint8, cut to its range."""
    from nvidia.dali import fn, types

    return fn.cast(first * (1.0 - factor) + second * factor, dtype=types.DALIDataType.UINT8)
