"""RandAugment (Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced search space").

The policy is named as in timm (Wightman 2019, "PyTorch Image Models", `timm.data.auto_augment`), e.g. `rand-m9-n2`,
and every operation has timm's strength at every magnitude (`rand_augment_graph.py` carries them out):

    mM      magnitude 0..10 (10)                nN      operations an image, 1..4 (2), drawn with replacement
    pP      chance of each to be done (0.5)     mstdS   magnitude ~ normal(M, S), cut to 0..10; over 100: uniform(0, M)
    inc1    operations whose strength falls with the magnitude, or does not turn at "unchanged", are made to rise

All of timm's default operations are here: AutoContrast, Equalize, Invert, Rotate, Posterize, Solarize, SolarizeAdd,
Color, Contrast, Brightness, Sharpness, ShearX, ShearY, TranslateXRel, TranslateYRel. What differs from timm and Pillow:

- Rotate, Shear and Translate interpolate linearly (timm draws linear or cubic). What comes in from outside has the
  dataset's mean colour, as in timm's training; at the seam it is interpolated too, where Pillow repeats half a pixel.
- Intensities are rounded to 8 bits, where Pillow cuts off: at most one grey level. Equalize follows DALI's rule: at
  most a few. Sharpness filters the outermost pixels too, which Pillow leaves as they are.
- Posterize keeps at least one bit: without any, timm's rule at the ends of its range, the image would be black.
- Other sets of operations (`tNAME`) and magnitudes over 10 (`mmaxM`) are not known here.

Legend: B samples, n operations an image.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MAX_LAYERS = 4
NUMBERS_PER_LAYER = 5
TOP_MAGNITUDE = 10

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
"""In timm's order; each is as likely as any other."""

_NUMBER = r"\d+\.?\d*|\.\d+"
_KEYS = {"m": r"\d+", "n": r"\d+", "p": _NUMBER, "mstd": _NUMBER, "inc": "[01]"}


@dataclass(frozen=True)
class RandPolicy:
    """A policy by its numbers."""

    magnitude: int = 10
    layers: int = 2
    probability: float = 0.5
    magnitude_std: float = 0.0
    increasing: bool = False


@dataclass(frozen=True, eq=False)
class RandParameters:
    """What is done to each image of a batch, layer by layer."""

    operation: np.ndarray
    """int32 [B, n]: 1 + place in `OPERATIONS`, 0 = nothing."""
    value: np.ndarray
    """float32 [B, n]: the operation's argument in timm's units: factor, bits, threshold, amount; else 0."""
    matrix: np.ndarray
    """float32 [B, n, 2, 3]: place of the output -> place of the input in pixels, corner = 0."""

    def __getitem__(self, rows: slice) -> RandParameters:
        """The parameters of some of the images."""
        return RandParameters(self.operation[rows], self.value[rows], self.matrix[rows])


def parse_policy(text: str) -> RandPolicy:
    """Read a policy's name.

    Raises:
        ValueError: It is none; the message says what is wrong with which part.
    """
    head, *parts = text.split("-")
    if head != "rand":
        raise ValueError(f"{text!r} must begin with 'rand', e.g. rand-m9-n2")
    found: dict[str, str] = {}
    for part in parts:
        key = re.match("[a-z]*", part)
        name, value = (key.group(), part[key.end() :]) if key else ("", part)
        if name not in _KEYS or name in found or not re.fullmatch(_KEYS[name], value):
            raise ValueError(_complaint(text, part, name, name in found))
        found[name] = value
    policy = RandPolicy(
        magnitude=int(found.get("m", 10)),
        layers=int(found.get("n", 2)),
        probability=float(found.get("p", 0.5)),
        magnitude_std=float(found.get("mstd", 0)),
        increasing=found.get("inc") == "1",
    )
    for part, number, low, high in (
        ("m", policy.magnitude, 0, TOP_MAGNITUDE),
        ("n", policy.layers, 1, MAX_LAYERS),
        ("p", policy.probability, 0, 1),
    ):
        if not low <= number <= high:
            raise ValueError(f"{part}{found[part]} in {text!r} must lie in {low}..{high}")
    return policy


def _complaint(text: str, part: str, name: str, again: bool) -> str:
    if again:
        return f"{part!r} in {text!r} sets {name} again; keep one of them"
    if name in _KEYS:
        return f"{part!r} in {text!r} must be {name} and its number, e.g. rand-m9-n2-p0.5-mstd0.5-inc1"
    nearest = difflib.get_close_matches(name, _KEYS, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{part!r} in {text!r} is unknown{hint} (known: {', '.join(_KEYS)}, e.g. rand-m9-n2-mstd0.5-inc1)"


def rand_parameters(policy: RandPolicy, numbers: np.ndarray, image_px: int) -> RandParameters:
    """Turn uniform numbers into operations and their arguments.

    Args:
        policy: Of n operations an image.
        numbers: Float [B, 20]: five for each of four layers: choice, whether, sign, two for the magnitude.
        image_px: Side of the image that the operations are done to.
    """
    choice, chance, sign, *spread = np.moveaxis(
        numbers.reshape(len(numbers), MAX_LAYERS, NUMBERS_PER_LAYER)[:, : policy.layers], 2, 0
    )
    done = chance < policy.probability
    operation = np.where(done, 1 + np.floor(choice * len(OPERATIONS)), 0).astype(np.int32)
    sign = np.where(sign < 0.5, 1.0, -1.0)
    level = _levels(policy, *spread) / TOP_MAGNITUDE
    value, matrix = np.zeros(level.shape), np.broadcast_to(np.eye(2, 3), (*level.shape, 2, 3)).copy()
    for number, name in enumerate(OPERATIONS, start=1):
        here = operation == number
        if not here.any():
            continue
        if name in WARPS:
            matrix[here] = WARPS[name](level[here] * sign[here], image_px)
        elif name in _VALUES:
            value[here] = _VALUES[name](level[here], sign[here], policy.increasing)
    return RandParameters(operation, value.astype(np.float32), matrix.astype(np.float32))


def _levels(policy: RandPolicy, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Magnitudes, 0..10."""
    if policy.magnitude_std > 100:
        return policy.magnitude * first
    # Box and Muller 1958: 1 - first lies in (0, 1].
    normal = np.sqrt(-2 * np.log(1 - first)) * np.cos(2 * np.pi * second)
    return np.clip(policy.magnitude + policy.magnitude_std * normal, 0, TOP_MAGNITUDE)


# ---- arguments: of level 0..1 (times the sign, for matrices) -------------------------------------------------------


def _rotation(level: np.ndarray, px: int) -> np.ndarray:
    """By up to 30 degrees, counter-clockwise, about the centre."""
    angle, centre = np.radians(30 * level), px / 2
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = centre - cos * centre + sin * centre, centre - sin * centre - cos * centre
    return np.stack([cos, -sin, x, sin, cos, y], axis=-1).reshape(-1, 2, 3)


def _moved(level: np.ndarray, row: int, column: int, scale: float) -> np.ndarray:
    """The identity with `scale * level` added at one place."""
    matrix = np.broadcast_to(np.eye(2, 3), (len(level), 2, 3)).copy()
    matrix[:, row, column] += scale * level
    return matrix


WARPS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "Rotate": _rotation,
    "ShearX": lambda level, px: _moved(level, 0, 1, 0.3),
    "ShearY": lambda level, px: _moved(level, 1, 0, 0.3),
    "TranslateXRel": lambda level, px: _moved(level, 0, 2, 0.45 * px),
    "TranslateYRel": lambda level, px: _moved(level, 1, 2, 0.45 * px),
}


def _enhancement(level: np.ndarray, sign: np.ndarray, increasing: bool) -> np.ndarray:
    """Factor; 1 = unchanged."""
    return np.maximum(0.1, 1 + 0.9 * level * sign) if increasing else 1.8 * level + 0.1


def _bits(level: np.ndarray, sign: np.ndarray, increasing: bool) -> np.ndarray:
    """Bits that are kept."""
    bits = np.floor(4 * level)
    return np.maximum(1, 4 - bits if increasing else bits)


def _threshold(level: np.ndarray, sign: np.ndarray, increasing: bool) -> np.ndarray:
    """Grey level from which on intensities are inverted."""
    threshold = np.floor(256 * level)
    return 256 - threshold if increasing else threshold


def _amount(level: np.ndarray, sign: np.ndarray, increasing: bool) -> np.ndarray:
    """Grey levels that are added to intensities below 128."""
    return np.floor(110 * level)


_VALUES = {
    "Posterize": _bits,
    "Solarize": _threshold,
    "SolarizeAdd": _amount,
    "Color": _enhancement,
    "Contrast": _enhancement,
    "Brightness": _enhancement,
    "Sharpness": _enhancement,
}
