"""The report's colours: who sees no red, no green or no blue tells them apart, and what is written on them is legible.

Red-green and blue-yellow blindness are simulated after Machado, Oliveira and Fernandes, A Physiologically-based Model
for Simulation of Color Vision Deficiency, IEEE TVCG 2009: matrices of severity 1, on linear RGB. Distances are CIE 1976
(Lab, D65): about 2 is just noticed.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from trainer.figures import FULLEST_CELL
from trainer.page import STYLE

LIGHT, DARK = (dict(re.findall(r"--(\w+):(#\w+)", block)) for block in re.findall(r":root\{([^}]*)\}", STYLE))
SCHEMES = {"light": LIGHT, "dark": LIGHT | DARK}
DEFICIENCIES = {
    "none": np.eye(3).tolist(),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
RGB_TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
D65 = (0.95047, 1.0, 1.08883)


def rgb(colour: str) -> np.ndarray:
    """`#0072b2` or `#fff` -> [3], 0 to 1."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    return np.array([int(digits[place : place + 2], 16) for place in (0, 2, 4)]) / 255


def linear(colour: np.ndarray) -> np.ndarray:
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    """CIE Lab of linear RGB."""
    share = np.array(RGB_TO_XYZ) @ light / D65
    x, y, z = np.where(share > 216 / 24389, np.cbrt(share), (24389 / 27 * share + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(matrix: list[list[float]], one: str, other: str) -> float:
    """Between two colours as they are seen with a deficiency."""
    first, second = (lab(np.clip(np.array(matrix) @ linear(rgb(colour)), 0, 1)) for colour in (one, other))
    return float(np.linalg.norm(first - second))


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """WCAG 2's ratio."""
    low, high = sorted(float(linear(colour) @ RGB_TO_XYZ[1]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_the_simulation_leaves_grey_alone_and_takes_red_from_green():
    for matrix in DEFICIENCIES.values():
        np.testing.assert_allclose(np.array(matrix).sum(axis=1), 1, atol=2e-6)
    apart = {name: distance(matrix, "#d05030", "#708030") for name, matrix in DEFICIENCIES.items()}
    assert max(apart["protanopia"], apart["deuteranopia"]) < 20 and min(apart["none"], apart["tritanopia"]) > 60


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_better_worse_and_before_are_told_apart(scheme, deficiency):
    for one, other in itertools.combinations(("blue", "vermillion", "grey"), 2):
        colours = SCHEMES[scheme][one], SCHEMES[scheme][other]
        assert distance(DEFICIENCIES[deficiency], *colours) >= 20, (one, other)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_coloured_text_and_numbers_on_coloured_cells_are_legible(scheme):
    colours = {name: rgb(colour) for name, colour in SCHEMES[scheme].items()}
    for name in ("blue", "fall", "muted"):
        for ground in ("paper", "soft"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for name in ("blue", "vermillion"):
        cell = FULLEST_CELL * colours[name] + (1 - FULLEST_CELL) * colours["paper"]
        assert contrast(cell, colours["ink"]) >= 4.5, name
