"""Settings of a configuration as things to search: names, ranges, defaults by the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.config import flatten, nearest, parse_config
from cluster.errors import UserError
from tuning.config import Config, Range

_PAIR = {
    "stage_one.loss.weight": Range(log_uniform=(0.03, 3.0)),
    "stage_one.sampling.power": Range(uniform=(0.0, 1.0)),
}
# The ranges follow the sweeps of arXiv 2207.06975's code and of the losses' own papers.
DEFAULT_SPACES: dict[str, dict[str, Range]] = {
    "contrastive": {**_PAIR, "stage_one.loss.temperature": Range(log_uniform=(0.03, 0.5))},
    "margin": {**_PAIR, "stage_one.loss.margin": Range(uniform=(0.05, 1.0))},
    "raw margin": {
        "stage_one.loss.weight": Range(log_uniform=(1e-4, 1.0)),
        "stage_one.loss.margin": Range(uniform=(5.0, 100.0)),
        "stage_one.sampling.power": Range(uniform=(0.0, 1.0)),
    },
    "weight": _PAIR,
    "none": {"stage_one.sampling.power": Range(uniform=(0.0, 1.0))},
}


def search_space(config: Config) -> dict[str, Range]:
    """What is searched: `search.space`, or by default the loss's own settings, its weight, sampling and learning rate.

    Raises:
        UserError: A name is no setting, or one that a trial cannot change.
    """
    space = config.search.space or _default_space(config)
    known = flatten(config.model_dump(mode="json"))
    for name in space:
        if name not in known:
            raise UserError(f"search.space: {name!r} is no setting; {nearest(name, sorted(known))}")
        if not name.startswith(("stage_one.", "data.augment.", "data.mix.", "data.image_px", "model.", "features.")):
            raise UserError(
                f"search.space: {name} cannot differ between trials, they share one packed dataset and one cluster; "
                "search settings below stage_one, model, data.augment, data.mix, or data.image_px"
            )
    return space


def with_choices(config: Config, choices: Mapping[str, Any]) -> Config:
    """The configuration with some settings changed.

    Raises:
        UserError: The values do not go together; the message is the configuration's own.
    """
    values = config.model_dump(mode="json")
    for name, value in choices.items():
        *parents, leaf = name.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return parse_config(Config, values, "search")


def tune_space(space: Mapping[str, Range]) -> dict[str, Any]:
    """The ranges as Ray Tune's domains."""
    from ray import tune

    domains: dict[str, Any] = {}
    for name, wanted in space.items():
        if wanted.uniform:
            domains[name] = tune.uniform(*wanted.uniform)
        elif wanted.log_uniform:
            domains[name] = tune.loguniform(*wanted.log_uniform)
        elif wanted.integers:
            domains[name] = tune.randint(wanted.integers[0], wanted.integers[1] + 1)
        else:
            domains[name] = tune.choice(list(wanted.choice or ()))
    return domains


def _default_space(config: Config) -> dict[str, Range]:
    loss, lr = config.stage_one.loss, config.stage_one.optimiser.lr
    if loss.name == "none":
        kind = "none"
    elif "contrastive" in loss.name:
        kind = "contrastive"
    elif "triplet" in loss.name:
        kind = "margin" if loss.normalise else "raw margin"
    else:
        kind = "weight"
    return {**DEFAULT_SPACES[kind], "stage_one.optimiser.lr": Range(log_uniform=(lr / 5, lr * 3))}
