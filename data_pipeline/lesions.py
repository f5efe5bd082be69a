"""One picture of the synthetic set: skin, a lesion of a given class, and all that makes two pictures of it differ.

Coordinates: pixels of a 96 x 96 picture, [96, 96]; "lesion frame" = origin in the lesion's middle, turned and scaled
with it, so that a second view shows the same texture. Colours are RGB in 0..1.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE_PX = 96
ROW, COLUMN = np.mgrid[:SIDE_PX, :SIDE_PX].astype(np.float32) - (SIDE_PX - 1) / 2
RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Family:
    """What look-alike classes share."""

    skin: RGB
    colour: RGB
    radius_px: float
    stretch: float
    """Longest axis over the shortest, at most."""
    lobes: float
    """Unevenness of the outline, as a share of the radius."""
    border_px: float
    """Width over which the lesion fades into skin."""


@dataclass(frozen=True)
class LesionClass:
    """One class: a family and the fine detail that is its own."""

    name: str
    family: Family
    texture: Literal["net", "ridges", "blotches", "spots", "streaks"]
    period_px: float
    """Spacing of the texture's elements."""
    sign: int
    """-1 = darker than the lesion, +1 = brighter."""
    rim: float = 0.0
    """Darkening of a ring along the border."""


BROWN = Family((0.87, 0.68, 0.60), (0.52, 0.33, 0.24), radius_px=27, stretch=1.4, lobes=0.13, border_px=4.0)
RED = Family((0.90, 0.73, 0.66), (0.74, 0.34, 0.33), radius_px=23, stretch=1.2, lobes=0.06, border_px=3.0)
GREY = Family((0.84, 0.69, 0.60), (0.60, 0.51, 0.43), radius_px=26, stretch=1.6, lobes=0.09, border_px=2.0)
PALE = Family((0.88, 0.71, 0.63), (0.84, 0.56, 0.50), radius_px=29, stretch=1.3, lobes=0.16, border_px=6.0)

# From the commonest to the rarest, the families in turn: each has common and rare members.
CLASSES = (
    LesionClass("brown_fine_net", BROWN, "net", 6.0, -1),
    LesionClass("red_small_lacunes", RED, "spots", 6.5, -1),
    LesionClass("grey_straight_ridges", GREY, "ridges", 6.5, -1),
    LesionClass("pale_fine_scale", PALE, "blotches", 6.0, +1),
    LesionClass("brown_coarse_net", BROWN, "net", 8.5, -1),
    LesionClass("red_large_lacunes", RED, "spots", 9.5, -1),
    LesionClass("grey_milia", GREY, "spots", 8.0, +1),
    LesionClass("pale_coarse_scale", PALE, "blotches", 9.0, +1),
    LesionClass("brown_globules", BROWN, "spots", 7.5, -1),
    LesionClass("red_mottled", RED, "blotches", 7.5, -1),
    LesionClass("grey_comedones", GREY, "spots", 8.0, -1),
    LesionClass("pale_lined", PALE, "ridges", 7.0, +1),
    LesionClass("brown_streaks", BROWN, "streaks", 7.0, -1),
    LesionClass("red_mottled_rim", RED, "blotches", 7.5, -1, rim=0.10),
    LesionClass("grey_mottled", GREY, "blotches", 7.0, -1),
    LesionClass("pale_net", PALE, "net", 7.5, +1),
)

# How strong the detail is against what hides it: tuned so that plain cross-entropy stays well under .85.
DETAIL = 0.045
PERIOD_JITTER = 0.08


@dataclass(frozen=True)
class _Lesion:
    """Random traits of one lesion, the same in all of its pictures."""

    skin: np.ndarray
    colour: np.ndarray
    radius_px: float
    stretch: float
    lobe_sizes: np.ndarray
    lobe_phases: np.ndarray
    period_px: float
    contrast: float
    texture_seed: int


def draw_picture(seed: int, label: int, lesion: int, view: int) -> bytes:
    """One JPEG of 96 x 96 px.

    Args:
        seed: Of the set.
        label: Into `CLASSES`.
        lesion: Number of the lesion.
        view: Number of its picture.
    """
    kind = CLASSES[label]
    traits = _grow(kind, np.random.default_rng([seed, label, lesion]))
    rng = np.random.default_rng([seed, label, lesion, view + 1])
    x, y = _lesion_frame(rng)
    inside, depth = _outline(x, y, kind.family, traits)
    shown = inside > 0.01
    texture = np.zeros_like(x)
    texture[shown] = _texture(kind, x[shown], y[shown], depth[shown], traits)
    skin = traits.skin + 0.02 * _clouds(rng, 30.0)[..., None]
    body = traits.colour + 0.05 * _clouds(rng, 24.0)[..., None]
    ring = np.exp(-(((depth - 0.12) / 0.10) ** 2)) * kind.rim
    body = body + (kind.sign * traits.contrast * texture - ring)[..., None]
    picture = skin + inside[..., None] * (body - skin)
    return _photograph(picture, rng)


def _grow(kind: LesionClass, rng: np.random.Generator) -> _Lesion:
    family = kind.family
    shade = rng.normal(0, 0.05)
    return _Lesion(
        skin=(np.array(family.skin) + rng.normal(0, 0.045) + rng.normal(0, 0.012, 3)).astype(np.float32),
        colour=(np.array(family.colour) + shade + rng.normal(0, 0.02, 3)).astype(np.float32),
        radius_px=family.radius_px * rng.uniform(0.8, 1.2),
        stretch=rng.uniform(1.0, family.stretch),
        lobe_sizes=family.lobes * rng.uniform(0.3, 1.0, 4) / np.arange(1, 5) ** 0.5,
        lobe_phases=rng.uniform(0, 2 * np.pi, 4),
        period_px=kind.period_px * rng.uniform(1 - PERIOD_JITTER, 1 + PERIOD_JITTER),
        contrast=DETAIL * rng.uniform(0.6, 1.2),
        texture_seed=int(rng.integers(2**32)),
    )


def _lesion_frame(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of every pixel in the lesion frame: the view's shift, turn and scale."""
    across, down = rng.normal(0, 6.0, 2).clip(-14, 14).tolist()
    angle, scale = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.18)
    column, row = (COLUMN - across) / scale, (ROW - down) / scale
    return column * math.cos(angle) + row * math.sin(angle), row * math.cos(angle) - column * math.sin(angle)


def _outline(x: np.ndarray, y: np.ndarray, family: Family, traits: _Lesion) -> tuple[np.ndarray, np.ndarray]:
    """How much lesion a pixel shows (0..1), and its depth: 1 in the middle, 0 on the border, negative outside."""
    stretched = x / traits.stretch**0.5, y * traits.stretch**0.5
    angle = np.arctan2(stretched[1], stretched[0])
    lobes = sum(
        size * np.cos((k + 2) * angle + np.float32(phase))
        for k, (size, phase) in enumerate(zip(traits.lobe_sizes.tolist(), traits.lobe_phases.tolist(), strict=True))
    )
    radius = traits.radius_px * (1 + lobes)
    depth = 1 - np.hypot(*stretched) / radius
    steepness = 4 * traits.radius_px / family.border_px
    return 1 / (1 + np.exp((-steepness * depth).clip(max=30))), depth


def _texture(kind: LesionClass, x: np.ndarray, y: np.ndarray, depth: np.ndarray, traits: _Lesion) -> np.ndarray:
    """The detail at the points x, y, depth [n]: mean 0 and deviation 1, counted more towards the middle."""
    rng = np.random.default_rng(traits.texture_seed)
    bend = rng.uniform(0, 2 * np.pi, 2)
    x, y = x + 2.5 * np.sin(y / 8 + bend[0]), y + 2.5 * np.sin(x / 8 + bend[1])
    frequency = 2 * np.pi / traits.period_px
    if kind.texture == "net":
        angles = rng.uniform(0, np.pi) + np.arange(3) * np.pi / 3
        waves = [np.cos(frequency * (x * np.cos(a) + y * np.sin(a)) + rng.uniform(0, 2 * np.pi)) for a in angles]
        field = np.max(waves, axis=0)
    elif kind.texture == "ridges":
        angle = rng.uniform(0, np.pi)
        field = np.cos(frequency * (x * np.cos(angle) + y * np.sin(angle)))
    elif kind.texture == "blotches":
        angles = rng.uniform(0, 2 * np.pi, 10)
        bands = frequency * rng.uniform(0.8, 1.2, 10)
        phases = rng.uniform(0, 2 * np.pi, 10)
        field = sum(
            np.cos(k * (x * np.cos(a) + y * np.sin(a)) + p) for a, k, p in zip(angles, bands, phases, strict=True)
        )
    elif kind.texture == "spots":
        field = _spots(x, y, traits.period_px, rng)
    else:
        rays = max(6, round(2 * np.pi * traits.radius_px / traits.period_px))
        field = np.cos(rays * np.arctan2(y, x) + bend[0]) * np.exp(-((depth / 0.35) ** 2))
    weight = np.clip(depth, 0, None) + 1e-6
    field = field - np.average(field, weights=weight)
    return field / np.sqrt(np.average(field**2, weights=weight))


def _spots(x: np.ndarray, y: np.ndarray, period_px: float, rng: np.random.Generator) -> np.ndarray:
    """Round spots on a jittered hexagonal grid: each pixel's distance to the nearest of them."""
    reach = np.arange(-6, 7) * period_px
    columns, rows = np.meshgrid(reach, reach * 3**0.5 / 2)
    columns = columns + (np.arange(13)[:, None] % 2) * period_px / 2
    centres = np.stack([columns.ravel(), rows.ravel()]) + rng.normal(0, 0.16 * period_px, (2, 169))
    centres = centres[:, np.hypot(*centres) < np.hypot(x, y).max() + period_px, None]
    squared = (x - centres[0]) ** 2 + (y - centres[1]) ** 2
    return np.exp(-squared.min(axis=0) / (0.28 * period_px) ** 2)


def _clouds(rng: np.random.Generator, size_px: float) -> np.ndarray:
    """Smooth noise of deviation about 1, with features of about `size_px`."""
    nodes = round(SIDE_PX / size_px) + 2
    coarse = Image.fromarray(rng.normal(0, 1.3, (nodes, nodes)).astype(np.float32))
    return np.asarray(coarse.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC))


def _photograph(picture: np.ndarray, rng: np.random.Generator) -> bytes:
    """Light, white balance, hairs, blur, noise and compression."""
    direction, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.25 / SIDE_PX)
    light = rng.uniform(0.88, 1.1) + slope * (COLUMN * math.cos(direction) + ROW * math.sin(direction))
    picture = picture * light[..., None] * rng.normal(1, 0.025, 3).astype(np.float32)
    hairs = _hairs(rng)[..., None]
    picture = picture * (1 - hairs) + hairs * np.array([0.16, 0.11, 0.09], dtype=np.float32)
    picture = picture + 0.02 * rng.standard_normal((SIDE_PX, SIDE_PX, 1), dtype=np.float32)
    image = Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.9)))
    pixels = np.asarray(image) + rng.uniform(2, 6) * rng.standard_normal((SIDE_PX, SIDE_PX, 3), dtype=np.float32)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=int(rng.integers(70, 93)))
    return buffer.getvalue()


def _hairs(rng: np.random.Generator) -> np.ndarray:
    """Opacity of a few bent hairs, drawn at twice the size."""
    canvas = Image.new("L", (2 * SIDE_PX, 2 * SIDE_PX))
    pen = ImageDraw.Draw(canvas)
    steps = np.linspace(-1, 1, 12)
    for _ in range(rng.poisson(1.5)):
        middle, angle = rng.uniform(0, 2 * SIDE_PX, 2), rng.uniform(0, np.pi)
        length, bow = rng.uniform(40, 140), rng.uniform(-25, 25)
        along, across = length * steps, bow * steps**2
        x = middle[0] + along * np.cos(angle) - across * np.sin(angle)
        y = middle[1] + along * np.sin(angle) + across * np.cos(angle)
        pen.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=int(rng.integers(120, 220)), width=2)
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255
