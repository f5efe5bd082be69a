"""The random numbers of augmentation, made apart from the images.

Every parameter is a pure function of (seed, epoch, position in the epoch, view). The generator is counter-based
(Philox; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a position owns a fixed stretch of the
counter, so that rank, world size, threads and resuming change nothing. `graph.py` carries the parameters out.

Legend: B samples of one view, n operations of RandAugment an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np

from data_pipeline.config import AugmentConfig
from data_pipeline.rand_augment import MAX_LAYERS, NUMBERS_PER_LAYER, RandParameters, parse_policy, rand_parameters

_CROP_TRIES = 5
_NUMBERS = 2 * _CROP_TRIES + 14
_NUMBERS_A_COUNTER = 4  # what Philox yields at each


class Purpose(IntEnum):
    """What uniform numbers are for: each purpose has its own."""

    VIEW = 1
    RAND_AUGMENT = 2
    MIX = 3


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """What happens to each image of a batch, in this order; None = to no image."""

    anchor: np.ndarray
    """int32 [B, 2]: top left corner (y, x) of the crop, in pixels."""
    shape: np.ndarray
    """int32 [B, 2]: height and width of the crop, in pixels."""
    mirror: np.ndarray
    """bool [B]: left and right change places."""
    upside_down: np.ndarray
    """bool [B]: top and bottom change places."""
    angle: np.ndarray
    """float32 [B], degrees, counter-clockwise."""
    rand: RandParameters | None
    """RandAugment's operations, at the side that the network sees."""
    sigma_px: np.ndarray | None
    """float64 [B]: standard deviation of the Gaussian blur; 0 = not blurred."""
    saturation: np.ndarray
    """float32 [B]: factor of the distance from grey."""
    hue: np.ndarray
    """float32 [B]: rotation of the hue, degrees."""
    contrast: np.ndarray
    """float32 [B]: factor of the distance from mid-grey."""
    brightness: np.ndarray
    """float32 [B]: factor of the intensities."""
    hole: np.ndarray | None
    """int32 [B, 4]: top, left, bottom, right of what is cut out, in pixels of the side that the network sees."""

    def select(self, rows: slice) -> ViewParameters:
        """The parameters of some of the images."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: None if value is None else value[rows] for name, value in values.items()}
        return ViewParameters(**chosen)


def draw_views(
    config: AugmentConfig,
    image_px: int,
    key: tuple[int, int],
    positions: np.ndarray,
    views: int,
    sizes: tuple[np.ndarray, np.ndarray],
) -> list[ViewParameters]:
    """The augmentation of a batch.

    Args:
        config: Ranges of the parameters.
        image_px: Side that the network sees.
        key: Seed and epoch.
        positions: Int [B], not empty, of the samples in the epoch.
        views: V.
        sizes: Widths and heights of the images, int [B] each, pixels.

    Returns:
        A set of parameters for each view.
    """
    return [_draw_view(config, image_px, (*key, view), positions, *sizes) for view in range(views)]


def uniform_numbers(purpose: Purpose, key: Sequence[int], positions: np.ndarray, count: int) -> np.ndarray:
    """The uniform numbers in [0, 1) that belong to positions of an epoch.

    Args:
        purpose: What they are for.
        key: Seed, epoch, and what else tells one draw from another; not negative.
        positions: Int [B], not empty, close to each other (what lies between is computed too).
        count: Numbers a position, a multiple of 4.

    Returns:
        Float64 [B, count].
    """
    assert count % _NUMBERS_A_COUNTER == 0
    first, last = int(positions.min()), int(positions.max())
    words = np.random.SeedSequence([purpose, *key]).generate_state(2, np.uint64)
    philox = np.random.Philox(key=words, counter=first * (count // _NUMBERS_A_COUNTER))
    return np.random.Generator(philox).random((last - first + 1, count))[positions - first]


def _draw_view(
    config: AugmentConfig,
    image_px: int,
    key: tuple[int, ...],
    positions: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
) -> ViewParameters:
    numbers = uniform_numbers(Purpose.VIEW, key, positions, _NUMBERS)
    tries, others = numbers[:, : 2 * _CROP_TRIES], numbers[:, 2 * _CROP_TRIES :]
    down, turn, bright, contrast, saturation, hue = (2 * others[:, 3:9] - 1).T.astype(np.float32)
    anchor, shape = _crop_windows(config, tries, others[:, :2], widths, heights)
    return ViewParameters(
        anchor=anchor,
        shape=shape,
        mirror=(others[:, 2] < 0.5) & config.flip_horizontal,
        upside_down=(down < 0) & config.flip_vertical,
        angle=config.rotate_deg * turn,
        rand=_rand(config, image_px, key, positions),
        sigma_px=_sigmas(config, others[:, 9], others[:, 10]),
        saturation=1 + config.saturation * saturation,
        hue=config.hue_deg * hue,
        contrast=1 + config.contrast * contrast,
        brightness=1 + config.brightness * bright,
        hole=_holes(config, image_px, others[:, 11], others[:, 12:14]),
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


def _rand(config: AugmentConfig, image_px: int, key: tuple[int, ...], positions: np.ndarray) -> RandParameters | None:
    if config.rand_augment is None:
        return None
    numbers = uniform_numbers(Purpose.RAND_AUGMENT, key, positions, MAX_LAYERS * NUMBERS_PER_LAYER)
    return rand_parameters(parse_policy(config.rand_augment), numbers, image_px)


def _sigmas(config: AugmentConfig, chance: np.ndarray, place: np.ndarray) -> np.ndarray | None:
    """Uniform in the range, as in SimCLR (Chen et al. 2020, appendix A)."""
    if not (config.blur_sigma_max_px and config.blur_probability):
        return None
    low, high = config.blur_sigma_min_px, config.blur_sigma_max_px
    return np.where(chance < config.blur_probability, low + (high - low) * place, 0.0)


def _holes(config: AugmentConfig, image_px: int, chance: np.ndarray, centre: np.ndarray) -> np.ndarray | None:
    """A square with its centre anywhere in the image, cut at the border.

    DeVries and Taylor 2017, "Improved regularization of convolutional neural networks with cutout", section 3.2.
    """
    if not (config.cutout_share and config.cutout_probability):
        return None
    side = max(1, round(image_px * config.cutout_share**0.5))
    top_left = np.floor(centre * image_px - side / 2 + 0.5)
    hole = np.clip(np.concatenate([top_left, top_left + side], axis=1), 0, image_px)
    return np.where((chance < config.cutout_probability)[:, None], hole, 0).astype(np.int32)
