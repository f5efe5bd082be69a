"""What a search over stage one tries, and what it knows of trials that earlier drivers have begun; without Ray."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

import cluster.progress
from cluster.config import parse_config
from cluster.errors import UserError
from cluster.storage import open_storage
from tuning.config import Config
from tuning.proposals import Proposals, most_epochs, named, random_choices, scheduler
from tuning.settings import search_space, trained_epochs
from tuning.stage_one import _run_round, _watched, _Watcher, search_stage_one
from tuning.trial import TRIAL, TrialJob, TrialsSoFar, judged_epochs, run_trial, trial_name
from tuning.trials_table import TrialRow, best_trial

WEIGHT = "stage_one.loss.weight"
UNIFORM = {WEIGHT: {"uniform": [0.0, 1.0]}}


def config_of(space=UNIFORM, **search):
    stage_one = search.pop("stage_one", {"epochs": 9})
    values = {"search": {"space": space, "first_epochs": 1, "reduction": 3, **search}, "stage_one": stage_one}
    return parse_config(Config, {"model": {"embedding_dim": 8}, **values}, "test")


def line(epochs, score, at_s=1.0):
    return {"epochs": epochs, "score": score, "own": 0.1, "sd": 0.01, "family": "crt", "at_s": at_s}


def row(choices, scores, status="done"):
    """A trial that said a score after 1, 3 and 9 epochs, or after fewer of them."""
    lines = [line(epochs, score) for epochs, score in zip((1, 3, 9), scores, strict=False)]
    return TrialRow.of(trial_name(choices), choices, lines, status)


class TestProposals:
    def test_what_was_begun_comes_first_under_its_name_and_what_has_ended_never(self):
        ended = [row({WEIGHT: 0.5}, [0.4, 0.5, 0.6]), row({WEIGHT: 0.7}, [0.1], "stopped")]
        begun = [row({WEIGHT: 0.2}, [0.3], "under way"), row({WEIGHT: 0.9}, [], "failed")]
        proposals = Proposals(config_of(), [*ended, *begun])
        given = [proposals.suggest(str(number))[TRIAL] for number in range(4)]
        assert [trial["name"] for trial in given[:2]] == [waiting.trial for waiting in begun]
        assert [trial["choices"][WEIGHT] for trial in given[:2]] == [0.2, 0.9]
        assert len({trial["name"] for trial in given} | {past.trial for past in ended}) == 6

    def test_a_driver_that_goes_on_does_not_draw_again_what_was_drawn(self):
        first = Proposals(config_of(), [])
        drawn = [first.suggest(str(number))[TRIAL]["choices"] for number in range(5)]
        second = Proposals(config_of(), [row(choices, [0.5, 0.5, 0.5]) for choices in drawn])
        more = [second.suggest(str(number))[TRIAL]["choices"] for number in range(5)]
        assert not {choices[WEIGHT] for choices in drawn} & {choices[WEIGHT] for choices in more}

    @pytest.mark.parametrize("how", ["ended before", "taken up"])
    def test_optuna_learns_from_the_trials_of_earlier_drivers(self, how):
        """Values drawn at random from [0, 1] stay .37 away from .15 on average."""
        values = np.random.default_rng(0).uniform(size=30).tolist()
        status = "done" if how == "ended before" else "under way"
        scores = [1 - abs(value - 0.15) for value in values]
        begun = [row({WEIGHT: v}, [s] * 3, status) for v, s in zip(values, scores, strict=True)]
        proposals = Proposals(config_of(), begun)
        if how == "taken up":
            for number, score in enumerate(scores):
                proposals.suggest(f"taken-{number}")
                proposals.on_trial_result(f"taken-{number}", line(1, score))
                proposals.on_trial_complete(f"taken-{number}", line(9, score))
        away = []
        for number in range(20):
            away.append(abs(proposals.suggest(str(number))[TRIAL]["choices"][WEIGHT] - 0.15))
            proposals.on_trial_complete(str(number), {"score": 1 - away[-1]})
        assert np.mean(away) < 0.2

    def test_whole_sections_come_back_from_their_files(self):
        ways = ({"power": 0.5}, {"classes_per_batch": 16, "samples_per_class": 4})
        space = {"stage_one.sampling": {"choice": ways}, "data.mix.mixup_alpha": {"choice": [0.0, 0.2]}}
        config = config_of(space)
        first = Proposals(config, [])
        drawn = [first.suggest(str(number))[TRIAL]["choices"] for number in range(12)]
        begun = [row(choices, [0.5] * 3, ["failed", "done"][i % 2]) for i, choices in enumerate(drawn)]
        for past, name in zip(begun, named(drawn), strict=True):
            past.trial, past.choices = name, json.loads(json.dumps(past.choices))
        second = Proposals(config, begun)
        again = [second.suggest(str(number))[TRIAL]["choices"] for number in range(7)]
        assert again[:6] == drawn[::2] and again[6]["stage_one.sampling"] in ways

    def test_equal_choices_are_trials_of_their_own(self):
        proposals = Proposals(config_of({WEIGHT: {"choice": [0.5]}}), [row({WEIGHT: 0.5}, [0.4, 0.5, 0.6])])
        names = [proposals.suggest(str(number))[TRIAL]["name"] for number in range(3)]
        assert len({*names, trial_name({WEIGHT: 0.5})}) == 4
        assert list(named([{WEIGHT: 0.5}, {WEIGHT: 0.5}]))[1] == names[0] == f"{trial_name({WEIGHT: 0.5})}-2"

    def test_random_settings_are_a_function_of_the_configuration(self):
        space = {
            **UNIFORM,
            "stage_one.epochs": {"integers": [3, 5]},
            "stage_one.sampling": {"choice": [{"power": 0.5}]},
        }
        config = config_of(space, sampler="random", trials=40)
        drawn = random_choices(config)
        assert drawn == random_choices(config) == json.loads(json.dumps(drawn)) and len(drawn) == 40
        assert len({choices[WEIGHT] for choices in drawn}) == 40
        assert {choices["stage_one.epochs"] for choices in drawn} == {3, 4, 5}
        assert all(choices["stage_one.sampling"] == {"power": 0.5} for choices in drawn)


class TestScheduler:
    def said(self, asha, *scores):
        trial = SimpleNamespace(trial_id="new")
        asha.on_trial_add(None, trial)
        return [asha.on_trial_result(None, trial, line(e, s)) for e, s in zip((1, 3, 9), scores, strict=False)]

    def test_it_compares_with_what_ended_before(self):
        ended = [row({WEIGHT: w}, [w, w, w]) for w in (0.5, 0.6)] + [row({WEIGHT: 0.4}, [0.4], "stopped")]
        assert self.said(scheduler(config_of(), ended), 0.45) == ["STOP"]
        assert self.said(scheduler(config_of(), ended), 0.7, 0.55) == ["CONTINUE", "STOP"]
        assert self.said(scheduler(config_of(), []), 0.45) == ["CONTINUE"]

    def test_none_judges_once(self):
        config = config_of(scheduler="none")
        assert scheduler(config, []) is None and judged_epochs(config) == [9]
        assert judged_epochs(config_of()) == [1, 3, 9]


class TestEpochsThatAreSearched:
    @pytest.mark.parametrize(
        ("space", "longest"),
        [
            (UNIFORM, 9),
            ({"stage_one.epochs": {"choice": [3, 12, 6]}}, 12),
            ({"stage_one.epochs": {"integers": [2, 30]}}, 30),
            ({"stage_one": {"choice": [{"epochs": 4}, {"epochs": 15}]}}, 15),
        ],
    )
    def test_asha_counts_to_the_longest(self, space, longest):
        config = config_of(space)
        assert most_epochs(config) == longest
        long, end = SimpleNamespace(trial_id="long"), SimpleNamespace(trial_id="end")
        asha = scheduler(config, [])
        for trial, epochs, action in ((long, longest - 1, "CONTINUE"), (end, longest, "STOP")):
            asha.on_trial_add(None, trial)
            assert asha.on_trial_result(None, trial, line(epochs, 0.9)) == action

    def test_a_trial_has_ended_after_its_own_epochs(self, tmp_path):
        config = config_of({"stage_one.epochs": {"choice": [3, 9]}, **UNIFORM})
        job = TrialJob(config, "", str(tmp_path), "cpu", "", {}, 0.0)
        for name, choices, epochs in (("short", {"stage_one.epochs": 3}, 3), ("long", {"stage_one.epochs": 9}, 3)):
            storage = open_storage(tmp_path / name)
            storage.write("choices.json", json.dumps(choices).encode())
            storage.write("scores.json", json.dumps([line(epochs, 0.5)]).encode())
            assert trained_epochs(config.stage_one.epochs, choices) == choices["stage_one.epochs"]
        assert {seen.trial: seen.status for seen in TrialsSoFar(job).rows()} == {"short": "done", "long": "under way"}
        open_storage(tmp_path / "long").write("stopped.json", b"true")
        assert {seen.trial: seen.status for seen in TrialsSoFar(job).rows()} == {"short": "done", "long": "stopped"}

    def test_the_winner_may_be_a_short_one(self):
        short = TrialRow.of("short", {}, [line(3, 0.8)], "done")
        long = TrialRow.of("long", {}, [line(9, 0.7)], "done")
        stopped = TrialRow.of("stopped", {}, [line(3, 0.9)], "stopped")
        assert best_trial([long, stopped, short]) is short


class TestWatching:
    def job(self, tmp_path):
        return TrialJob(config_of(), "", str(tmp_path / "trials"), "cpu", "", {}, 0.0)

    def tune_trial(self, name, **last):
        given = {TRIAL: {"name": name, "choices": {WEIGHT: 0.5}}}
        return SimpleNamespace(config=given, last_result=last)

    def test_only_a_trial_that_fell_behind_is_marked(self, tmp_path):
        watcher = _Watcher(self.job(tmp_path))
        for name, last in (("behind", {"epochs": 3}), ("whole", {"epochs": 9}), ("silent", {})):
            watcher.on_trial_complete(0, [], self.tune_trial(name, **last))
        assert [path.parent.name for path in tmp_path.glob("trials/*/stopped.json")] == ["behind"]

    def test_the_table_tells_trials_that_failed_and_counts_them(self, tmp_path, monkeypatch):
        terminal = Console(file=io.StringIO(), force_terminal=True, width=160)
        monkeypatch.setattr(cluster.progress, "console", terminal)
        job = self.job(tmp_path)
        for name, lines in (("broken", []), ("whole", [line(9, 0.5)]), ("later", [line(3, 0.6)])):
            storage = open_storage(f"{job.folder_uri}/{name}")
            storage.write("choices.json", json.dumps({WEIGHT: 0.5}).encode())
            storage.write("scores.json", json.dumps(lines).encode())
        watcher = _Watcher(job)
        with _watched("settings", job, 4, watcher, None):
            watcher.on_trial_error(0, [], self.tune_trial("broken"))
        told = terminal.file.getvalue()
        told = told[told.rindex("search: settings") :]
        assert "2/4" in told and "1 failed" in told and "best balanced accuracy 0.600" in told
        for name, status in (("broken", "failed"), ("whole", "done"), ("later", "under way")):
            assert any(name in said and status in said for said in told.splitlines())

    def test_a_storage_that_cannot_be_read_ends_no_search(self, tmp_path, monkeypatch):
        job, looks = self.job(tmp_path), []

        def fails(self):
            looks.append(1)
            raise UserError("the bucket is not there")

        monkeypatch.setattr(TrialsSoFar, "rows", fails)
        with _watched("settings", job, 4, _Watcher(job), None):
            pass
        assert looks


def test_a_search_that_lacks_trials_says_so(tmp_path, monkeypatch):
    import cluster.launch
    import tuning.stage_one

    monkeypatch.setattr(cluster.launch, "start_ray", lambda config: None)
    monkeypatch.setattr(cluster.launch, "resolve_workers", lambda config: (1, "cpu"))
    monkeypatch.setattr(tuning.stage_one, "_began", lambda run: 0.0)
    rows = [row({WEIGHT: 0.5}, [0.4, 0.5, 0.6])]
    monkeypatch.setattr(tuning.stage_one, "_run_round", lambda *given: rows)
    run = SimpleNamespace(uri=str(tmp_path))
    with pytest.raises(UserError, match="the search ended after 1 of 4 trials; run it again"):
        search_stage_one(config_of(trials=4), SimpleNamespace(uri=""), run)


def test_trials_that_have_all_ended_need_no_ray(tmp_path):
    job = TrialJob(config_of(trials=2), "", str(tmp_path / "trials"), "cpu", "", {}, 0.0)
    for weight, lines in ((0.5, [line(9, 0.5, 7.0)]), (0.6, [line(1, 0.4, 9.0)])):
        storage = open_storage(f"{job.folder_uri}/{trial_name({WEIGHT: weight})}")
        storage.write("choices.json", json.dumps({WEIGHT: weight}).encode())
        storage.write("scores.json", json.dumps(lines).encode())
    storage.write("stopped.json", b"true")
    rows = _run_round("settings", job, SimpleNamespace(uri=str(tmp_path)), run_trial)
    assert [(found.choices[WEIGHT], found.status) for found in rows] == [(0.5, "done"), (0.6, "stopped")]
    assert search_space(job.config).keys() == {WEIGHT}
