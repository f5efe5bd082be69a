"""What the search over stage one tries next, and what it knows of the trials that earlier drivers have begun.

Tune's own state on disk lags and may be torn by a kill, so nothing is ever read from it: the folders of the trials say
what was chosen and how it ended. Each driver starts Tune anew; Optuna and ASHA are told what has ended, as if they had
seen it themselves, and what was begun and not ended is proposed first.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from tuning.config import Config, Range
from tuning.settings import search_space, trained_epochs, tune_space
from tuning.trial import TRIAL, judged_epochs, trial_name
from tuning.trials_table import ENDED, TrialRow

METRIC, MODE = "score", "max"


def random_choices(config: Config) -> list[dict[str, Any]]:
    """All settings of a search at random, drawn before the first is tried; a pure function of the configuration."""
    rng = np.random.RandomState(config.seed)
    domains = tune_space(search_space(config))
    return [
        {name: domain.sample(random_state=rng) for name, domain in domains.items()} for _ in range(config.search.trials)
    ]


def named(choices: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Choices by the names of their trials."""
    trials: dict[str, dict[str, Any]] = {}
    for chosen in choices:
        trials[trial_name(chosen, trials)] = chosen
    return trials


class Proposals(Searcher):
    """Optuna's proposals, after those of the trials that were begun before and have not ended.

    Args:
        config: The configuration; `search` says what is tried.
        begun: The trials of earlier drivers.
    """

    def __init__(self, config: Config, begun: Sequence[TrialRow]):
        super().__init__(metric=METRIC, mode=MODE)
        space = search_space(config)
        # Another seed after each start: the same one would propose again what it proposed then.
        self._optuna = optuna_search(config.seed + len(begun))
        self._optuna.set_search_properties(None, None, tune_space(space))
        self._space = space
        self._names = {row.trial for row in begun}
        self._waiting = {row.trial: row.choices for row in begun if row.status not in ENDED}
        self._taken_up: dict[str, dict[str, Any]] = {}
        for row in begun:
            if row.status in ENDED and row.score is not None:
                self._learn(row.choices, row.score)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The name and the choices of the next trial."""
        if self._waiting:
            name = next(iter(self._waiting))
            choices = self._taken_up[trial_id] = self._waiting.pop(name)
        else:
            choices = self._optuna.suggest(trial_id)
            name = trial_name(choices, self._names)
            self._names.add(name)
        return {TRIAL: {"name": name, "choices": choices}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A trial was judged."""
        if trial_id not in self._taken_up:
            self._optuna.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial has ended."""
        if trial_id not in self._taken_up:
            self._optuna.on_trial_complete(trial_id, result, error)
        elif result and METRIC in result:
            self._learn(self._taken_up[trial_id], result[METRIC])

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: the trials' folders say it all."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""

    def _learn(self, choices: Mapping[str, Any], score: float) -> None:
        if choices.keys() == self._space.keys():
            same = {name: _as_in_space(self._space[name], value) for name, value in choices.items()}
            self._optuna.add_evaluated_point(same, score)


def optuna_search(seed: int) -> Any:
    """Optuna's sampler (TPE), without a space yet."""
    from ray.tune.search.optuna import OptunaSearch

    # Sections are no types that its database could keep; here it has none.
    warnings.filterwarnings("ignore", "Choices for a categorical distribution", UserWarning)
    return OptunaSearch(metric=METRIC, mode=MODE, seed=seed)


def scheduler(config: Config, ended: Sequence[TrialRow]) -> ASHAScheduler | None:
    """ASHA, which has seen what has ended; None where no trial is judged before its end."""
    longest = most_epochs(config)
    if len(judged_epochs(config, longest)) == 1:
        return None
    asha = ASHAScheduler(
        time_attr="epochs",
        metric=METRIC,
        mode=MODE,
        max_t=longest,
        grace_period=config.search.first_epochs,
        reduction_factor=config.search.reduction,
    )
    nobody: Any = None
    for row in sorted(ended, key=lambda row: row.ended_s or 0.0):
        trial: Any = SimpleNamespace(trial_id=row.trial)
        asha.on_trial_add(nobody, trial)
        for line in row.lines:
            asha.on_trial_result(nobody, trial, line)
        asha.on_trial_remove(nobody, trial)
    return asha


def most_epochs(config: Config) -> int:
    """The epochs of the longest trial."""
    longest = [config.stage_one.epochs]
    space = search_space(config)
    for name in space.keys() & {"stage_one", "stage_one.epochs"}:
        wanted = space[name]
        values = wanted.choice or wanted.integers or wanted.uniform or wanted.log_uniform or ()
        longest = [trained_epochs(config.stage_one.epochs, {name: value}) for value in values]
    return max(longest)


def _as_in_space(wanted: Range, value: Any) -> Any:
    """A value that was read from JSON as it stands in the space, where Optuna looks for it: a tuple is no list."""
    said = json.dumps(value)
    return next((choice for choice in wanted.choice or () if json.dumps(choice) == said), value)
