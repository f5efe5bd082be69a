"""What stage two's search tries: configuration and seed -> the list of heads."""

from __future__ import annotations

import numpy as np

from data_pipeline.sampling import generator
from trainer.heads import TRAINED_FAMILIES, HeadSpec
from tuning.config import HeadFamily, SpaceConfig, StageTwoConfig

GRID_POINTS = 21  # tau in steps of .1 over 0..2, as in Kang et al. 2020
POWERS = 11  # heads of one power share their minibatches, so powers come from a grid
HEADS_PER_POWER = 8

# The published or plainly sensible setting of each knob; moved into the range that is searched where it lies outside.
DEFAULT_POWER, DEFAULT_TAU, DEFAULT_LR, DEFAULT_WEIGHT_DECAY, DEFAULT_EPOCHS = 0.0, 1.0, 3.0, 1e-4, 10


def draw_specs(config: StageTwoConfig, seed: int) -> list[HeadSpec]:
    """The heads to try, a pure function of its arguments.

    Families in closed form get a grid: 21 values of tau, nearest class mean by Euclidean distance and by cosine; beside
    trained families at most half the budget, with a coarser grid. Trained families share the rest evenly, their knobs
    drawn by Latin hypercube. Every family's default is always there: cRT with q = 0, logit adjustment and tau-norm
    with tau = 1. So there are as many heads as `config.heads` says, or fewer with closed forms alone, or one a family
    where that is more.

    Args:
        config: Families, budget and ranges.
        seed: The run's seed.

    Returns:
        Closed forms first; then the trained ones by sampling power, so that neighbours can be trained together.
    """
    families = tuple(dict.fromkeys(config.families))
    trained = [family for family in families if family in TRAINED_FAMILIES]
    closed = [family for family in families if family not in TRAINED_FAMILIES]
    budget = config.heads // 2 if trained else config.heads
    specs = [spec for family in closed for spec in _closed_form(family, config.space, budget // max(1, len(closed)))]
    left = max(config.heads - len(specs), len(trained))
    drawn: list[HeadSpec] = []
    for i, family in enumerate(trained):
        count = left // len(trained) + (i < left % len(trained))
        drawn += _trained(family, count, config, seed)
    return specs + sorted(drawn, key=lambda spec: spec.sampling_power)


def blocks_of(specs: list[HeadSpec], heads_per_trial: int) -> list[list[HeadSpec]]:
    """The heads cut into blocks, one for each trial, in order."""
    return [specs[first : first + heads_per_trial] for first in range(0, len(specs), heads_per_trial)]


def _closed_form(family: HeadFamily, space: SpaceConfig, budget: int) -> list[HeadSpec]:
    if family == "nearest_class_mean":
        return [HeadSpec(family), HeadSpec(family, normalise=True)][: max(1, budget)]
    grid = np.linspace(*space.tau, min(GRID_POINTS, max(1, budget)))
    default = _within(DEFAULT_TAU, space.tau)
    grid[np.argmin(np.abs(grid - default))] = default
    return [HeadSpec(family, tau=round(float(tau), 6)) for tau in grid]


def _trained(family: HeadFamily, count: int, config: StageTwoConfig, seed: int) -> list[HeadSpec]:
    """The default and `count - 1` drawn heads of a trained family."""
    space, rng = config.space, generator(seed, f"stage two space {family}")
    default = HeadSpec(
        family,
        power=_within(DEFAULT_POWER, space.power),
        lr=_within(DEFAULT_LR, space.lr),
        weight_decay=_within(DEFAULT_WEIGHT_DECAY, space.weight_decay),
        epochs=int(_within(DEFAULT_EPOCHS, space.epochs)),
        batch_size=config.batch_size,
        seed=seed,
    )
    drawn = count - 1
    power_grid = np.linspace(*space.power, int(np.clip(drawn // HEADS_PER_POWER, 2, POWERS)))
    powers = rng.permutation(np.resize(power_grid, drawn))
    lr = np.exp(_stratified(rng, drawn, *np.log(space.lr)))
    weight_decay = np.exp(_stratified(rng, drawn, *np.log(space.weight_decay)))
    epochs = np.floor(_stratified(rng, drawn, space.epochs[0], space.epochs[1] + 1)).astype(int)
    return [
        default,
        *(
            HeadSpec(
                family,
                power=round(float(powers[i]), 6),
                lr=float(lr[i]),
                weight_decay=float(weight_decay[i]),
                epochs=int(min(epochs[i], space.epochs[1])),
                batch_size=config.batch_size,
                seed=seed,
            )
            for i in range(drawn)
        ),
    ]


def _stratified(rng: np.random.Generator, count: int, low: float, high: float) -> np.ndarray:
    """One uniform draw from each of `count` equal stretches of [low, high], in random order (Latin hypercube)."""
    return low + (high - low) * (rng.permutation(count) + rng.random(count)) / max(1, count)


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
