"""The random numbers of augmentation, made apart from the images.

Every parameter is a pure function of (seed, epoch, position in the epoch, view). The generator is counter-based
(Philox; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a position owns a fixed stretch of the
counter, so that rank, world size, threads and resuming change nothing. `decode.py` carries the parameters out.

Legend: B samples of one view.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from data_pipeline.config import AugmentConfig

_CROP_TRIES = 5
_NUMBERS = 2 * _CROP_TRIES + 10  # uniform numbers that a position owns; a multiple of the 4 that a counter yields
_COUNTERS = _NUMBERS // 4


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """What happens to each image of a batch, in this order: crop, (resize), rotation, flips, colour."""

    anchor: np.ndarray
    """int32 [B, 2]: top left corner (y, x) of the crop, in pixels."""
    shape: np.ndarray
    """int32 [B, 2]: height and width of the crop, in pixels."""
    mirror: np.ndarray
    """int32 [B]: 1 = left and right change places."""
    upside_down: np.ndarray
    """int32 [B]: 1 = top and bottom change places."""
    angle: np.ndarray
    """float32 [B], degrees."""
    brightness: np.ndarray
    """float32 [B]: factor of the intensities."""
    contrast: np.ndarray
    """float32 [B]: factor of the distance from mid-grey."""
    saturation: np.ndarray
    """float32 [B]: factor of the chroma."""
    hue: np.ndarray
    """float32 [B]: rotation of the hue, degrees."""

    def select(self, rows: slice) -> ViewParameters:
        """The parameters of some of the images."""
        return ViewParameters(*(getattr(self, field.name)[rows] for field in fields(self)))


def uniform_numbers(seed: int, epoch: int, view: int, positions: np.ndarray) -> np.ndarray:
    """The uniform numbers in [0, 1) that belong to positions of an epoch.

    Args:
        seed: The run's seed.
        epoch: From 0.
        view: From 0.
        positions: Int [B], not empty, close to each other (what lies between is computed too).

    Returns:
        Float64 [B, 20].
    """
    first, last = int(positions.min()), int(positions.max())
    key = np.random.SeedSequence([seed, epoch, view]).generate_state(2, np.uint64)
    philox = np.random.Philox(key=key, counter=first * _COUNTERS)
    numbers = np.random.Generator(philox).random((last - first + 1, _NUMBERS))
    return numbers[positions - first]


def view_parameters(
    config: AugmentConfig, numbers: np.ndarray, widths: np.ndarray, heights: np.ndarray
) -> ViewParameters:
    """Turn uniform numbers into augmentation parameters.

    Args:
        config: Ranges of the parameters.
        numbers: Float [B, 20] of `uniform_numbers`.
        widths: Int [B], pixels.
        heights: Int [B], pixels.
    """
    tries, place, signed = numbers[:, : 2 * _CROP_TRIES], numbers[:, -10:-6], 2 * numbers[:, -6:] - 1
    anchor, shape = _crop_windows(config, tries, place[:, :2], widths, heights)
    flips = (place[:, 2:] < 0.5) & [config.flip_horizontal, config.flip_vertical]
    return ViewParameters(
        anchor=anchor,
        shape=shape,
        mirror=flips[:, 0].astype(np.int32),
        upside_down=flips[:, 1].astype(np.int32),
        angle=(config.rotate_deg * signed[:, 0]).astype(np.float32),
        brightness=(1 + config.brightness * signed[:, 1]).astype(np.float32),
        contrast=(1 + config.contrast * signed[:, 2]).astype(np.float32),
        saturation=(1 + config.saturation * signed[:, 3]).astype(np.float32),
        hue=(config.hue_deg * signed[:, 4]).astype(np.float32),
    )


def _crop_windows(
    config: AugmentConfig, tries: np.ndarray, place: np.ndarray, widths: np.ndarray, heights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Random resized crop (Szegedy et al. 2015, "Going deeper with convolutions", section 6).

    Area uniform in scale_min..1 of the image, logarithm of width / height uniform; the first of a few tries that fits
    is taken. Where none fits, the last is cut to the image.

    Returns:
        Anchors (y, x) and shapes (height, width), both int32 [B, 2].
    """
    area = (config.scale_min + (1 - config.scale_min) * tries[:, 0::2]) * (widths * heights.astype(np.float64))[:, None]
    aspect = np.exp(np.log(config.aspect_max) * (2 * tries[:, 1::2] - 1))
    width = np.maximum(np.rint(np.sqrt(area * aspect)), 1)
    height = np.maximum(np.rint(np.sqrt(area / aspect)), 1)
    fits = (width <= widths[:, None]) & (height <= heights[:, None])
    chosen = np.where(fits.any(axis=1), fits.argmax(axis=1), _CROP_TRIES - 1)
    row = np.arange(len(chosen))
    image = np.stack([heights, widths], axis=1)
    shape = np.minimum(np.stack([height[row, chosen], width[row, chosen]], axis=1), image)
    anchor = np.floor(place * (image - shape + 1))
    return anchor.astype(np.int32), shape.astype(np.int32)
