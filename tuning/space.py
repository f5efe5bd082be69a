"""What stage two's search tries: configuration and seed -> the list of heads."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.sampling import generator
from trainer.head_training import kind_of
from trainer.heads import KNOBS, PRIOR_AWARE_FAMILIES, TRAINED_FAMILIES, HeadSpec
from tuning.config import HeadFamily, SpaceConfig, StageTwoConfig

GRID_POINTS = 21  # tau in steps of .1 over 0..2, as in Kang et al. 2020
POWERS = 11  # heads of one power share their minibatches, so powers come from a grid
HEADS_PER_POWER = 8

# The published or plainly sensible setting of each knob; moved into the range that is searched where it lies outside.
DEFAULTS = {
    "power": 0.0,
    "tau": 1.0,
    "lr": 3.0,
    "weight_decay": 1e-4,
    "epochs": 10,
    "beta": 0.9999,
    "smoothing": 0.4,
    "smoothing_tail": 0.1,
    "over_smoothing": 0.98,
    "margin": 0.5,
    "scale": 30.0,
}
NEAREST_TO_ONE = 1e-7
"""Beta is drawn down to this distance from 1; there its weights are 1 / n but for classes of millions of images."""
LOGARITHMIC = ("lr", "weight_decay", "scale")


def draw_specs(config: StageTwoConfig, seed: int) -> list[HeadSpec]:
    """The heads to try, a pure function of its arguments.

    Families in closed form get a grid: 21 values of tau, nearest class mean by Euclidean distance and by cosine; beside
    trained families at most a quarter of the budget, with a coarser grid. Trained families share the rest evenly, their
    knobs drawn by Latin hypercube; sampling powers, and the lengths of progressive sampling, come from a grid, so that
    heads can share their minibatches. Every family's default is always there: cRT with q = 0, logit adjustment and
    tau-norm with tau = 1. So there are as many heads as `config.heads` says, or fewer with closed forms alone, or one a
    family where that is more.

    Args:
        config: Families, budget and ranges.
        seed: The run's seed.

    Returns:
        Closed forms first; then the trained ones in an order that puts those side by side which are trained together.
    """
    families = tuple(dict.fromkeys(config.families))
    trained = [family for family in families if family in TRAINED_FAMILIES]
    closed = [family for family in families if family not in TRAINED_FAMILIES]
    budget = config.heads // 4 if trained else config.heads
    specs = [spec for family in closed for spec in _closed_form(family, config.space, budget // max(1, len(closed)))]
    left = max(config.heads - len(specs), len(trained))
    sampled = sum("power" in _knobs(family, config) for family in trained)
    powers = int(np.clip(left * sampled // max(1, len(trained)) // HEADS_PER_POWER, 2, POWERS))
    drawn: list[HeadSpec] = []
    for i, family in enumerate(trained):
        count = left // len(trained) + (i < left % len(trained))
        drawn += _trained(family, count, config, powers, seed)
    return specs + sorted(
        drawn, key=lambda spec: (kind_of(spec.family), spec.family == "progressive", spec.sampling_power)
    )


def blocks_of(specs: list[HeadSpec], heads_per_trial: int) -> list[list[HeadSpec]]:
    """The heads cut into blocks, one for each trial, in order."""
    return [specs[first : first + heads_per_trial] for first in range(0, len(specs), heads_per_trial)]


def _closed_form(family: HeadFamily, space: SpaceConfig, budget: int) -> list[HeadSpec]:
    if family == "nearest_class_mean":
        return [HeadSpec(family), HeadSpec(family, normalise=True)][: max(1, budget)]
    grid = np.linspace(*space.tau, min(GRID_POINTS, max(1, budget)))
    default = _within(DEFAULTS["tau"], space.tau)
    grid[np.argmin(np.abs(grid - default))] = default
    return [HeadSpec(family, tau=round(float(tau), 6)) for tau in grid]


def _trained(family: HeadFamily, count: int, config: StageTwoConfig, powers: int, seed: int) -> list[HeadSpec]:
    """The default and `count - 1` drawn heads of a trained family."""
    rng = generator(seed, f"stage two space {family}")
    knobs = [knob for knob in _knobs(family, config) if knob in DEFAULTS]
    values = {knob: _values(family, knob, count - 1, config.space, powers, rng) for knob in knobs}
    fixed: dict[str, Any] = {"batch_size": config.batch_size, "seed": seed}
    fixed["double_correction"] = config.double_correction and family in PRIOR_AWARE_FAMILIES
    return [HeadSpec(family, **{knob: values[knob][i] for knob in knobs}, **fixed) for i in range(count)]


def _knobs(family: HeadFamily, config: StageTwoConfig) -> tuple[str, ...]:
    twice = config.double_correction and family in PRIOR_AWARE_FAMILIES
    return ("power", *KNOBS[family]) if twice else KNOBS[family]


def _values(
    family: HeadFamily, knob: str, drawn: int, space: SpaceConfig, powers: int, rng: np.random.Generator
) -> list[Any]:
    """A knob's default, and `drawn` values from its range."""
    name = "over_smoothing" if (family, knob) == ("over_smoothing", "smoothing") else knob
    low, high = getattr(space, name)
    default = _within(DEFAULTS[name], (low, high))
    if knob == "epochs":
        if family == "progressive":  # its minibatches depend on its length: few lengths, so that heads share them
            values = rng.permutation(np.resize(np.linspace(low, high, 3), drawn))
        else:
            values = np.floor(_stratified(rng, drawn, low, high + 1)).clip(max=high)
        return [int(default), *(int(value) for value in values)]
    if knob == "power":
        if family == "progressive":  # where it ends: as balanced as the range allows
            return [low] * (1 + drawn)
        values = rng.permutation(np.resize(np.linspace(low, high, powers).round(6), drawn))
    elif knob == "beta":
        nearest, farthest = max(1 - high, NEAREST_TO_ONE), max(1 - low, NEAREST_TO_ONE)
        values = 1 - np.exp(_stratified(rng, drawn, np.log(nearest), np.log(farthest)))
        if high == 1 and drawn:  # 1 / n itself, which no draw of a logarithm meets
            values[values.argmax()] = 1.0
    elif knob in LOGARITHMIC:
        values = np.exp(_stratified(rng, drawn, np.log(low), np.log(high)))
    else:
        values = _stratified(rng, drawn, low, high)
    return [default, *values.clip(low, high).tolist()]


def _stratified(rng: np.random.Generator, count: int, low: float, high: float) -> np.ndarray:
    """One uniform draw from each of `count` equal stretches of [low, high], in random order (Latin hypercube)."""
    return low + (high - low) * (rng.permutation(count) + rng.random(count)) / max(1, count)


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
