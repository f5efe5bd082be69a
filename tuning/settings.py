"""Settings of a configuration as things to search: names, ranges, defaults by the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cluster.config import flatten, nearest, parse_config
from cluster.errors import UserError
from trainer.config import StageOneConfig
from tuning.config import Config, Range

# The ranges follow the sweeps of arXiv 2207.06975's code and of the losses' own papers.
_TEMPERATURE = {"stage_one.loss.temperature": Range(log_uniform=(0.03, 0.5))}
_MARGIN = {"stage_one.loss.margin": Range(uniform=(0.05, 1.0))}
_RAW_MARGIN = {"stage_one.loss.margin": Range(uniform=(5.0, 100.0))}  # distances of features that are not normalised
METRIC_SPACES: dict[str, dict[str, Range]] = {
    "supervised_contrastive": _TEMPERATURE,
    "balanced_contrastive": _TEMPERATURE,
    "batch_hard_triplet": _MARGIN,
    "semi_hard_triplet": _MARGIN,
    "all_triplet": _MARGIN,
    "class_centre_triplet": _MARGIN,
    "progressive_class_centre_triplet": _MARGIN,
    "centre": {"stage_one.loss.lr_ratio": Range(log_uniform=(1.0, 100.0))},
    "multi_similarity": {
        "stage_one.loss.negative_scale": Range(log_uniform=(10.0, 100.0)),
        "stage_one.loss.similarity_base": Range(uniform=(0.3, 0.8)),
    },
    "proxy_anchor": {
        "stage_one.loss.proxy_scale": Range(log_uniform=(10.0, 64.0)),
        "stage_one.loss.proxy_margin": Range(uniform=(0.0, 0.4)),
        "stage_one.loss.lr_ratio": Range(log_uniform=(1.0, 100.0)),
    },
    "none": {},
}
"""What is searched by default of each metric loss, beside its weight."""
CLASSIFICATION_SPACES: dict[str, dict[str, Range]] = {
    "cross_entropy": {},
    "balanced_softmax": {},
    "logit_adjusted": {"stage_one.classification.tau": Range(uniform=(0.5, 2.0))},
    "focal": {"stage_one.classification.gamma": Range(uniform=(0.5, 5.0))},
    "ldam": {"stage_one.classification.margin": Range(uniform=(0.1, 0.7))},
    "cosface": {"stage_one.classification.margin": Range(uniform=(0.1, 0.5))},
    "arcface": {"stage_one.classification.margin": Range(uniform=(0.1, 0.7))},
}
"""And of each classification loss."""


OF_A_TRAINING = (
    "stage_one.",
    "data.augment.",
    "data.mix.",
    "data.image_px.",
    "data.resize_ratio.",
    "model.",
    "features.",
)
"""Settings in which trainings on one packed dataset may differ."""


def search_space(config: Config) -> dict[str, Range]:
    """What is searched: `search.space`, or by default the losses' own settings, sampling and learning rate.

    A name may be that of a section, such as `stage_one.sampling`, where settings go together: P x K. Each value is then
    a whole section; what it leaves out has its default.

    Raises:
        UserError: A name is no setting, or one that a trial cannot change.
    """
    space = config.search.space or _default_space(config)
    check_settings(config, space, "search.space", "trials")
    return space


def check_settings(config: Config, names: Iterable[str], where: str, what: str) -> None:
    """Refuse names that are no settings, and settings in which trainings on one packed dataset cannot differ.

    Args:
        config: The configuration.
        names: Of settings.
        where: The key under which they stand.
        what: That differ in them.

    Raises:
        UserError: The first such name.
    """
    settings = flatten(config.model_dump(mode="json"))
    known = settings.keys() | {name.rpartition(".")[0] for name in settings if "." in name}  # sections too
    for name in names:
        if name not in known:
            raise UserError(f"{where}: {name!r} is no setting; {nearest(name, sorted(known))}")
        if not f"{name}.".startswith(OF_A_TRAINING):
            raise UserError(
                f"{where}: {name} cannot differ between {what}, they share one packed dataset and one cluster; these "
                "can: settings below stage_one, model, features, data.augment and data.mix, and data.image_px and "
                "data.resize_ratio"
            )


def with_choices(config: Config, choices: Mapping[str, Any], where: str = "search") -> Config:
    """The configuration with some settings changed.

    Args:
        config: The configuration.
        choices: Setting -> value.
        where: They come from, for the error.

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
    return parse_config(Config, values, where)


def trained_epochs(configured: int, choices: Mapping[str, Any]) -> int:
    """After how many epochs a trial with these choices has been trained to the end.

    Args:
        configured: Epochs of the configuration over which the choices are laid.
        choices: Setting -> value.
    """
    epochs: Any = configured
    for name, value in choices.items():
        if name == "stage_one":  # a whole section, which has its default where it says nothing
            epochs = value.get("epochs", StageOneConfig.model_fields["epochs"].default)
        elif name == "stage_one.epochs":
            epochs = value
    return int(epochs)


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


def short_value(value: Any) -> str:
    """A setting's value in few characters; of a section its settings by name."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {short_value(part)}" for name, part in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _default_space(config: Config) -> dict[str, Range]:
    stage = config.stage_one
    space: dict[str, Range] = {}
    if stage.loss.name != "none":
        bounds = (0.03, 3.0) if stage.loss.normalise else (1e-4, 1.0)
        space["stage_one.loss.weight"] = Range(log_uniform=bounds)
    metric = METRIC_SPACES[stage.loss.name]
    space |= _RAW_MARGIN if metric is _MARGIN and not stage.loss.normalise else metric
    space |= CLASSIFICATION_SPACES[stage.classification.name]
    # Sampling is left alone where the loss makes up for the frequencies, or where the classes have weights instead.
    corrects = stage.classification.corrects_frequencies and not stage.classification.double_correction
    if not corrects and stage.sampling.class_weights is None:
        space["stage_one.sampling.power"] = Range(uniform=(0.0, 1.0))
    lr = stage.optimiser.lr
    return {**space, "stage_one.optimiser.lr": Range(log_uniform=(lr / 5, lr * 3))}
