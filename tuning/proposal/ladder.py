"""What the hours allow: the highest rung of a ladder from a small network on small images to a large one on large ones.

From above: the search over heads is given its share, then the rung is climbed to that leaves time for the fewest epochs
that give a result. Time beyond the most epochs goes to a second view, and then to the baseline.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from cluster.config import parse_config
from trainer.machine import Machine
from trainer.network_size import network_size
from trainer.plan import DataSize
from tuning.config import Config
from tuning.proposal.rules import EPOCHS, LARGE_NETWORK, SMALL_NETWORK, sides_px
from tuning.run_time import RunTime, run_time

TIME_SHARE = 0.9
"""Of the hours that is planned for; the rest is for what the plan leaves out, packing first of all."""
MOST_HEADS, LEAST_HEADS, HEADS_SHARE = 512, 64, 0.2
"""Heads are halved while their search would take more than this share of the hours."""


class Rung(NamedTuple):
    """A step of the ladder."""

    backbone: str
    image_px: int


class Fit(NamedTuple):
    """A rung with what it leaves time for.

    Attributes:
        rung: Network and side of its images.
        heads: Of the search.
        epochs: With one view and without the baseline; more than the most that are wanted where there is time.
        time: Of a run with one view, without the baseline.
    """

    rung: Rung
    heads: int
    epochs: int
    time: RunTime


class Load(NamedTuple):
    """What is worked on, and where.

    Attributes:
        data: Of the dataset when it is packed.
        images: Of all splits.
        machine: With a worker a device.
    """

    data: DataSize
    images: int
    machine: Machine


def ladder(short_px: int, backbone: str | None) -> list[Rung]:
    """From cheap to dear.

    Args:
        short_px: Median short side of the images.
        backbone: The only network that may be used; None = the small one, then the large one on large images.
    """
    sides = sides_px(short_px)
    if backbone is not None:
        return [Rung(backbone, px) for px in sides]
    return [Rung(SMALL_NETWORK, px) for px in sides] + [Rung(LARGE_NETWORK, px) for px in sides[-2:]]


def climb(values: dict[str, Any], rungs: list[Rung], load: Load, hours: float) -> Fit:
    """The highest rung up to which each leaves time for enough epochs; the lowest where none does.

    Args:
        values: The settings that do not depend on the time, by key.
        rungs: From cheap to dear.
        load: What is worked on.
        hours: Of the whole run.
    """
    fewest, _ = EPOCHS[values.get("model.weights") is not None]
    fit = fit_rung(values, rungs[0], load, hours)
    for rung in rungs[1:]:
        higher = fit_rung(values, rung, load, hours)
        if higher.epochs < fewest:
            break
        fit = higher
    return fit


def fit_rung(values: dict[str, Any], rung: Rung, load: Load, hours: float) -> Fit:
    """How many heads and epochs a rung leaves time for."""
    taken = values | {"model.backbone": rung.backbone, "data.image_px": rung.image_px, "stage_one.views": 1}
    network = network_size(as_config(taken), load.data.num_classes)

    def timed(heads: int) -> RunTime:
        config = as_config(taken | {"stage_two.heads": heads, "stage_one.epochs": 1})
        return run_time(config, load.data, network, load.images, load.machine)

    heads = MOST_HEADS
    while heads > LEAST_HEADS and timed(heads).stage_two_s > HEADS_SHARE * hours * 3600:
        heads //= 2
    time = timed(heads)
    left_s = (TIME_SHARE * hours - time.other_hours) * 3600
    return Fit(rung, heads, max(1, int(left_s / time.epoch_s)), time)


def spend(epochs: int, most: int) -> tuple[int, int, bool]:
    """(epochs, views, baseline): the most epochs, then a second view, then the baseline, as far as time reaches.

    Args:
        epochs: That there is time for, with one view and without the baseline.
        most: Epochs that are worth their time.
    """
    views, baseline = (2 if epochs >= 2 * most else 1), epochs >= 4 * most
    return min(most, epochs), views, baseline


def hours_for(fit: Fit, epochs: int) -> float:
    """Hours to ask for, to a tenth, so that a rung has time for so many epochs."""
    needed = fit.time.other_hours + epochs * fit.time.epoch_s / 3600
    return math.ceil(10 * needed / TIME_SHARE) / 10


def as_config(values: dict[str, Any]) -> Config:
    """`{"a.b": value}` -> the configuration."""
    return parse_config(Config, nest(values), origin="proposal")


def nest(values: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": value}` -> `{"a": {"b": value}}`."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        target = nested
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = value
    return nested
