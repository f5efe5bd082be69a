"""The DALI graphs: encoded bytes and parameters in, tensors out; one graph for CPU and GPU, without randomness.

Training, each view:  crop -> resize to image_px, antialiased, and flips -> rotation -> RandAugment -> blur
                      -> saturation and hue -> contrast, brightness and normalisation -> cut-out.
Evaluation:           short side to image_px * resize_ratio (antialiased) -> centre crop -> normalisation.

- One view decodes no more than its crop window. Several are cut from one decoded image, and are then a batch of V * B
  images as any other: one run of each operator, and nothing to put together at the end.
- Rotation turns the crop about its centre; what comes in from outside repeats the border's pixels, no black corners.
- RandAugment and the blur are done to the images that they are drawn for, the others pass by.
- Saturation is Pillow's (`ImageEnhance.Color`), contrast is taken about mid-grey (128). These and brightness are done
  in floating point and not cut off at black and white: contrast and brightness are part of the normalisation and cost
  nothing. Hue turns the two chroma axes of YIQ, luma stays.
- Cut-out fills with the dataset's mean, which is 0 after normalisation.
- Operators that the configuration leaves without effect are not in the graph.
- Images are 8-bit up to the blur, and come out as float32 or float16, HWC.

All operators have a GPU version; their arguments (all that is not an image) stay on the CPU.

Legend: B samples, V views, px image side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.augment import ViewParameters
from data_pipeline.config import AugmentConfig
from data_pipeline.rand_augment_graph import grey_graph, rand_augment_graph

MID_GREY = 128.0

# Luma and the two chroma axes of NTSC's YIQ, of RGB (FCC 1953); the first row is ITU-R BT.601's luma.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


@dataclass(frozen=True)
class ImageSettings:
    """What the images come out as; `mean` and `std` in units of 0..1, RGB."""

    image_px: int
    resize_ratio: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def short_px(self) -> int:
        """Evaluation: short side before the centre crop; as even or odd as `image_px`, so that the crop is centred."""
        return self.image_px + 2 * round(self.image_px * (self.resize_ratio - 1) / 2)


def graph_inputs(image: ImageSettings, config: AugmentConfig, views: Sequence[ViewParameters]) -> dict[str, np.ndarray]:
    """What the training graph takes beside the encoded images: name -> [V * B, ...], view-major."""
    parts = [_view_inputs(image, config, view) for view in views]
    if len(parts) == 1:
        return parts[0]
    inputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    inputs["row"] = np.tile(np.arange(len(views[0].anchor), dtype=np.int32), len(views))
    return inputs


def _view_inputs(image: ImageSettings, config: AugmentConfig, view: ViewParameters) -> dict[str, np.ndarray]:
    flips = np.stack([view.upside_down, view.mirror], axis=1)
    inputs: dict[str, np.ndarray] = {
        "anchor": view.anchor,
        "shape": view.shape,
        "size": np.where(flips, -image.image_px, image.image_px).astype(np.float32),
    }
    if config.rotate_deg:
        inputs["angle"] = view.angle
    if config.rand_augment and view.rand is not None:
        for layer in range(view.rand.operation.shape[1]):
            inputs[f"operation_{layer}"] = np.ascontiguousarray(view.rand.operation[:, layer])
            inputs[f"value_{layer}"] = np.ascontiguousarray(view.rand.value[:, layer])
            inputs[f"matrix_{layer}"] = np.ascontiguousarray(view.rand.matrix[:, layer])
    if config.blur_sigma_max_px and view.sigma_px is not None:
        if config.blur_probability < 1:
            inputs["blurred"] = view.sigma_px > 0
        inputs["taps"] = _taps(config, view.sigma_px)
    if config.hue_deg:
        inputs["chroma"] = _chroma(view)
    elif config.saturation:
        inputs["saturation"] = view.saturation
    if config.brightness or config.contrast:
        inputs["mean"], inputs["std"] = _normalisation(image, view)
    if config.cutout_share and view.hole is not None:
        inputs["hole_anchor"] = view.hole[:, :2].astype(np.float32)
        inputs["hole_shape"] = (view.hole[:, 2:] - view.hole[:, :2]).astype(np.float32)
    return inputs


def has_conditions(inputs: dict[str, np.ndarray]) -> bool:
    """Whether some images pass an operator by, which takes a graph definition with conditionals."""
    return "blurred" in inputs or "operation_0" in inputs


def training_graph(image: ImageSettings, encoded: Any, inputs: dict[str, Any], mixed: bool, dtype: torch.dtype) -> Any:
    """The output, [V * B, px, px, 3].

    Args:
        image: Size and normalisation.
        encoded: The encoded images; of several views the B images and then anything that can be decoded.
        inputs: The nodes of `graph_inputs`, by name.
        mixed: Whether the GPU decodes.
        dtype: Of the output.
    """
    from nvidia.dali import fn, types

    device, window = "mixed" if mixed else "cpu", (inputs["anchor"], inputs["shape"])
    images: Any
    if "row" in inputs:
        whole = fn.permute_batch(fn.decoders.image(encoded, device=device), indices=inputs["row"])
        images = fn.slice(whole, *window, axis_names="HW")
    else:
        images = fn.decoders.image_slice(encoded, *window, axis_names="HW", device=device)
    images = fn.resize(
        images, size=inputs["size"], interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True
    )  # a negative size flips
    images = _normalise(image, _colour(_rotate_and_blur(image, images, inputs), inputs), dtype, inputs)
    if "hole_anchor" in inputs:
        images = fn.erase(images, anchor=inputs["hole_anchor"], shape=inputs["hole_shape"], axis_names="HW")
    return images


def evaluation_graph(image: ImageSettings, encoded: Any, mixed: bool, dtype: torch.dtype) -> Any:
    """The output, [B, px, px, 3]; arguments as of `training_graph`."""
    from nvidia.dali import fn, types

    images: Any = fn.decoders.image(encoded, device="mixed" if mixed else "cpu")
    images = fn.resize(
        images, resize_shorter=image.short_px, interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True
    )
    return _normalise(image, images, dtype, {}, crop=(image.image_px, image.image_px))


def _rotate_and_blur(image: ImageSettings, images: Any, inputs: dict[str, Any]) -> Any:
    """Rotation, RandAugment and blur: uint8 to uint8."""
    from nvidia.dali import fn

    if "angle" in inputs:
        images = fn.rotate(images, angle=inputs["angle"], keep_size=True)
    layer = 0
    while f"operation_{layer}" in inputs:
        operation, value, matrix = (inputs[f"{name}_{layer}"] for name in ("operation", "value", "matrix"))
        images = rand_augment_graph(images, operation, value, matrix, image.image_px, _mean_levels(image))
        layer += 1
    if "blurred" in inputs:
        if inputs["blurred"]:  # noqa: SIM108 - DALI knows no conditional expressions
            images = _blur(images, inputs["taps"])
        else:
            images = images  # noqa: PLW0127 - a DALI condition wants both branches to say what comes out
    elif "taps" in inputs:
        images = _blur(images, inputs["taps"])
    return images


def _blur(images: Any, taps: Any) -> Any:
    """Along rows, then columns: on a CPU a tenth of what `gaussian_blur` takes."""
    from nvidia.dali import fn

    return fn.filter(fn.filter(images, taps), fn.reshape(taps, src_dims=[1, 0]))


def _colour(images: Any, inputs: dict[str, Any]) -> Any:
    """Saturation and hue: uint8 to float32; without them as it is."""
    from nvidia.dali import fn, types

    if "chroma" in inputs:
        return fn.coord_transform(images, M=inputs["chroma"])
    if "saturation" in inputs:
        grey = fn.color_space_conversion(
            grey_graph(images), image_type=types.DALIImageType.GRAY, output_type=types.DALIImageType.RGB
        )  # three equal channels: DALI is slow where shapes differ
        return images * inputs["saturation"] + grey * (1.0 - inputs["saturation"])
    return images


def _normalise(image: ImageSettings, images: Any, dtype: torch.dtype, inputs: dict[str, Any], **options: Any) -> Any:
    """(x / 255 - mean) / std, kept HWC: a permuted view of it is channels_last."""
    from nvidia.dali import fn, types

    kinds = {torch.float32: types.DALIDataType.FLOAT, torch.float16: types.DALIDataType.FLOAT16}
    mean, std = ([255.0 * number for number in numbers] for numbers in (image.mean, image.std))
    return fn.crop_mirror_normalize(
        images,
        mean=inputs.get("mean", mean),
        std=inputs.get("std", std),
        dtype=kinds[dtype],
        output_layout="HWC",
        **options,
    )


# ---- numbers of the graph -------------------------------------------------------------------------------------------


def _normalisation(image: ImageSettings, view: ViewParameters) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std [B, 3] of 0..255 so that (x - mean) / std does brightness, contrast and the dataset's normalisation.

    With brightness b, contrast c and mid-grey g the image b (g + c (x - g)) less 255 m, over 255 s, is
    (x - (255 m - b (1 - c) g) / (b c)) / (255 s / (b c)).
    """
    bright, contrast = view.brightness.astype(np.float64)[:, None], view.contrast.astype(np.float64)[:, None]
    factor = bright * contrast
    mean = (255 * np.array(image.mean) - bright * (1 - contrast) * MID_GREY) / factor
    return mean.astype(np.float32), (255 * np.array(image.std) / factor).astype(np.float32)


def _chroma(view: ViewParameters) -> np.ndarray:
    """RGB -> RGB, float32 [B, 3, 3]: the chroma plane turned by the hue and stretched by the saturation."""
    angle, stretch = np.radians(view.hue.astype(np.float64)), view.saturation.astype(np.float64)
    turn = np.zeros((len(angle), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = stretch * np.cos(angle)
    turn[:, 1, 2], turn[:, 2, 1] = stretch * np.sin(angle), -stretch * np.sin(angle)
    return (np.linalg.inv(_YIQ) @ turn @ _YIQ).astype(np.float32)


def _taps(config: AugmentConfig, sigma_px: np.ndarray) -> np.ndarray:
    """The Gaussian, float32 [B, 1, taps], over three of the largest deviations to each side."""
    place = np.arange(np.ceil(3 * config.blur_sigma_max_px) + 1)
    place = np.concatenate([-place[:0:-1], place])
    weight = np.exp(-0.5 * (place / np.maximum(sigma_px, 1e-6)[:, None]) ** 2)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)[:, None]


def _mean_levels(image: ImageSettings) -> tuple[int, ...]:
    return tuple(round(255 * number) for number in image.mean)
