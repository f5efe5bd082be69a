"""The search through both stages, with Ray Tune for real: proposals, early stops, deaths, a driver that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from cluster.config import load_config, parse_config
from cluster.errors import UserError
from cluster.run import RunFolder
from cluster.storage import open_storage
from data_pipeline.pack import pack
from data_pipeline.synthetic import draw_synthetic
from tests.tiny import tiny_config
from tuning.config import Config, Range
from tuning.settings import search_space, with_choices
from tuning.stage_one import search_stage_one
from tuning.trial import SCORES_FILE, judged_epochs, read_scores
from tuning.trials_table import BEST_FILE, PAGE_FILE, RESULTS_FILE, best_trial, trials_table

SPACE = {"stage_one.loss.temperature": {"log_uniform": [0.05, 0.5]}, "stage_one.loss.weight": {"uniform": [0.1, 1.0]}}
SEARCH = {"trials": 4, "first_epochs": 1, "reduction": 2, "heads": 14, "finalists": 1, "seeds": 2, "space": SPACE}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    draw_synthetic(folder, seed=1, scale=0.06)
    return folder


def opened(images, folder, **search):
    run = RunFolder(str(folder))
    config = tiny_config(images, run.uri, search={**SEARCH, **search}, model={"freeze_batch_norm": True})
    return config, pack(config.source, config.data, f"{run.uri}/dataset", config.seed, progress=False), run


@pytest.fixture(scope="module")
def searched(images, ray_session, tmp_path_factory):
    config, dataset, run = opened(images, tmp_path_factory.mktemp("search"))
    return config, search_stage_one(config, dataset, run), run


class TestSearch:
    def test_trials_have_their_choices_and_scores_through_both_stages(self, searched):
        _, rows, run = searched
        settings = [row for row in rows if row.round == "settings"]
        assert len(settings) == 4 and all(row.status in ("done", "stopped") for row in settings)
        assert any(row.status == "done" for row in settings)
        for row in settings:
            assert 0.05 <= row.choices["stage_one.loss.temperature"] <= 0.5
            assert row.score > 1 / 16 and row.score >= row.own - 0.2 and row.sd > 0
            assert row.lines == read_scores(open_storage(f"{run.uri}/search/trials/{row.trial}"))
        assert len({row.choices["stage_one.loss.temperature"] for row in settings}) == 4

    def test_finalists_are_trained_with_other_seeds(self, searched):
        _, rows, _ = searched
        best = best_trial(rows)
        repeats = [row for row in rows if row.round == "seeds"]
        assert [row.choices["seed"] for row in repeats] == [1]
        assert best.seeds == 2 and best.lower_bound < best.seeds_score == (best.score + repeats[0].score) / 2

    def test_best_yaml_is_a_run_of_its_own_on_the_same_dataset(self, searched):
        config, rows, run = searched
        best = load_config(Config, run.path(BEST_FILE))
        assert best.stage_one.loss.temperature == best_trial(rows).choices["stage_one.loss.temperature"]
        assert best.run == f"{run.uri}/best" and best.data.packed == f"{run.uri}/dataset"
        assert best.stage_one.epochs == config.stage_one.epochs

    def test_the_table_the_page_and_the_terminal_tell_every_trial(self, searched):
        config, rows, run = searched
        table = pq.read_table(run.path(RESULTS_FILE)).to_pylist()
        assert [(line["trial"], line["score"]) for line in table] == [(row.trial, row.score) for row in rows]
        assert [line["stage_one.loss.weight"] for line in table[:4]] == [
            row.choices["stage_one.loss.weight"] for row in rows[:4]
        ]
        page = run.path(PAGE_FILE).read_text()
        assert page.count("<svg") == 4 and "<script" not in page and all(row.trial in page for row in rows)
        assert trials_table(config, rows, list(SPACE)).row_count == 4

    def test_a_finished_search_runs_no_trial_again(self, searched, images):
        config, rows, run = searched
        before = {path: path.stat().st_mtime_ns for path in run.work.glob(f"search/trials/*/{SCORES_FILE}")}
        again = search_stage_one(config, pack(config.source, config.data, f"{run.uri}/dataset", 0, progress=False), run)
        assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 5
        assert [(row.trial, row.score) for row in again] == [(row.trial, row.score) for row in rows]


def fake_trial(choices, job=None):
    """Says scores without training: one more line each start, so that a second start is seen."""
    from ray import tune

    name = tune.get_context().get_trial_id()
    storage = open_storage(f"{job.folder_uri}/{name}")
    folder = Path(job.folder_uri) / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "starts", "a") as file:
        file.write("x")
    choices = choices.get("choices", choices)
    if choices["stage_one.loss.weight"] < 0.3:
        raise RuntimeError("no such luck")
    said = []
    for epochs in judged_epochs(job.config):
        time.sleep(float(os.environ.get("TRIAL_SECONDS", "0")))
        said.append({"epochs": epochs, "score": choices["stage_one.loss.weight"], "own": 0.1, "sd": 0.01})
        said[-1] |= {"family": "crt", "at_s": 1.0}
        storage.write(SCORES_FILE, json.dumps(said).encode())
        tune.report(said[-1])


def test_a_trial_that_dies_is_retried_then_recorded_and_the_search_goes_on(images, ray_session, tmp_path):
    space = {"stage_one.loss.weight": {"choice": [0.2, 0.8]}}
    config, dataset, run = opened(images, tmp_path, trials=4, space=space, sampler="random", seeds=1)
    rows = search_stage_one(config, dataset, run, fake_trial)
    failed = [row for row in rows if row.status == "failed"]
    assert failed and len(failed) < 4 and all("no such luck" in row.error for row in failed)
    for row in rows:
        starts = (tmp_path / "search" / "trials" / row.trial / "starts").read_text()
        assert starts == ("xx" if row.status == "failed" else "x")
    assert best_trial(rows).score == 0.8


def test_when_all_die_the_first_reason_is_said(images, ray_session, tmp_path):
    space = {"stage_one.loss.weight": {"choice": [0.1]}}
    config, dataset, run = opened(images, tmp_path, trials=1, space=space, sampler="random")
    with pytest.raises(UserError, match=r"all 1 trials of the search failed, the first with: .*no such luck"):
        search_stage_one(config, dataset, run, fake_trial)


DRIVER = """
import sys, ray
from cluster.config import load_config
from cluster.run import RunFolder
from data_pipeline.dataset import open_dataset
from tests.test_search_stage_one import fake_trial
from tuning.config import Config
from tuning.stage_one import search_stage_one
address, config = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
config = load_config(Config, config)
run = RunFolder(config.run)
search_stage_one(config, open_dataset(f"{run.uri}/dataset"), run, fake_trial)
"""


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)], ids=["kill -9", "Ctrl-C"]
)
def test_a_stopped_search_goes_on_without_its_finished_trials(images, ray_session, tmp_path, monkeypatch, how):
    import ray

    space = {"stage_one.loss.weight": {"uniform": [0.4, 0.9]}}
    config, dataset, run = opened(images, tmp_path / "run", trials=4, space=space, seeds=1)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.setenv("TRIAL_SECONDS", "0.7")
    command = [sys.executable, "-c", DRIVER, ray.get_runtime_context().gcs_address, str(tmp_path / "config.yaml")]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE)
    trials = tmp_path / "run" / "search" / "trials"
    deadline = time.monotonic() + 120

    def ended():
        scores = {path.parent.name: json.loads(path.read_text()) for path in trials.glob(f"*/{SCORES_FILE}")}
        return {name for name, lines in scores.items() if len(lines) == len(judged_epochs(config))}

    while len(ended()) < 2:
        assert driver.poll() is None and time.monotonic() < deadline, driver.stderr.read()
        time.sleep(0.05)
    time.sleep(1.5)  # Tune's own state is on disk by then
    driver.send_signal(how)
    driver.communicate(timeout=60)
    time.sleep(1)  # Ray's workers notice that their driver is gone
    before = ended()
    assert 2 <= len(before) <= 4
    rows = search_stage_one(config, dataset, run, fake_trial)
    assert len(rows) == 4 and all(row.status in ("done", "stopped") for row in rows)
    assert before <= {row.trial for row in rows}
    assert all((trials / name / "starts").read_text() == "x" for name in before)


class TestSpace:
    def config(self, **sections):
        return parse_config(Config, {"model": {"embedding_dim": 8}, **sections}, "test")

    def test_defaults_follow_the_loss(self):
        space = search_space(self.config())
        assert set(space) == {
            "stage_one.loss.weight",
            "stage_one.sampling.power",
            "stage_one.loss.temperature",
            "stage_one.optimiser.lr",
        }
        triplet = {"loss": {"name": "batch_hard_triplet"}}
        assert "stage_one.loss.margin" in search_space(self.config(stage_one=triplet))
        raw = {"loss": {"name": "batch_hard_triplet", "normalise": False}}
        assert search_space(self.config(stage_one=raw))["stage_one.loss.margin"].uniform == (5.0, 100.0)

    def test_any_setting_can_be_named(self):
        config = self.config(search={"space": {"stage_one.views": {"choice": [1, 2]}}})
        assert search_space(config) == {"stage_one.views": Range(choice=(1, 2))}
        assert with_choices(config, {"stage_one.views": 1}).stage_one.views == 1

    def test_a_name_that_is_no_setting_is_named_with_the_nearest(self):
        config = self.config(search={"space": {"stage_one.loss.temprature": {"uniform": [0.1, 1]}}})
        with pytest.raises(UserError, match="is no setting; did you mean 'stage_one"):
            search_space(config)

    def test_a_setting_that_trials_share_is_refused(self):
        config = self.config(search={"space": {"data.pack_px": {"choice": [64, 128]}}})
        with pytest.raises(UserError, match=r"search.space: data.pack_px cannot differ between trials"):
            search_space(config)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({}, "give exactly one of uniform, log_uniform, integers, choice"),
            ({"uniform": [0, 1], "choice": [1]}, "give exactly one of uniform, log_uniform, integers, choice"),
            ({"uniform": [2, 1]}, r"uniform = \[2, 1\] must be \[low, high\]"),
            ({"log_uniform": [0, 1]}, r"log_uniform = \[0, 1\] must be \[low, high\], and above 0 for log_uniform"),
        ],
    )
    def test_a_range_that_makes_no_sense_is_named(self, values, message):
        with pytest.raises(UserError, match=message):
            self.config(search={"space": {"stage_one.views": values}})
