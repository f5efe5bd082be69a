"""The search through both stages, with Ray Tune for real: proposals, early stops, deaths, a driver that is killed."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console

import cluster.progress
import rarelens
from cluster.config import load_config
from cluster.errors import UserError
from cluster.run import RunFolder
from cluster.storage import open_storage
from data_pipeline.dataset import open_dataset
from data_pipeline.pack import pack
from data_pipeline.synthetic import draw_synthetic
from tests.tiny import tiny_config
from trainer.extraction import extract
from trainer.metrics import balanced_accuracy
from trainer.stage_checkpoint import load_classifier
from trainer.stage_two import make_heads
from tuning.config import Config
from tuning.folds import number_of_folds, training_sets
from tuning.space import draw_specs
from tuning.stage_one import _run_round, search_stage_one
from tuning.trial import CHOICES_FILE, SCORES_FILE, TrialJob, judged_epochs, read_scores
from tuning.trials_table import BEST_FILE, PAGE_FILE, RESULTS_FILE, best_trial, said_of_luck, trials_table

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
    """A search whose test images are not there: it must do without."""
    config, dataset, run = opened(images, tmp_path_factory.mktemp("search"))
    tests = {path: path.read_bytes() for path in run.work.glob("dataset/test/*.tar")}
    assert tests
    for path, content in tests.items():
        path.write_bytes(bytes(len(content)))
    rows = search_stage_one(config, dataset, run)
    for path, content in tests.items():
        path.write_bytes(content)
    return config, rows, run


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

    def test_a_score_is_that_of_the_best_head_on_the_trial_s_features(self, searched):
        """Once more from the trial's checkpoint, head by head."""
        config, rows, run = searched
        row = next(row for row in rows if row.status == "done" and row.round == "settings")
        dataset = open_dataset(f"{run.uri}/dataset")
        folder = max((run.work / "search" / "trials" / row.trial / "checkpoints").iterdir())
        model = load_classifier(folder, config, len(dataset.classes))
        train, val = (extract(model, dataset, config, split, device=torch.device("cpu")) for split in ("train", "val"))
        wanted, own = config.stage_two.model_copy(update={"heads": config.search.heads}), model.own_head()
        folds = number_of_folds(wanted.folds, val.labels, val.groups)
        scores = []
        for spec in draw_specs(wanted, config.seed):
            said = np.full(len(val), -1)
            for seen, held_out in training_sets(train, val, folds, len(dataset.classes)):
                (head,) = make_heads([spec], seen, own)
                said[held_out] = head.logits(torch.from_numpy(val.x[held_out])).argmax(dim=1)
            scores.append(balanced_accuracy(val.labels, said, len(dataset.classes)))
        assert row.score == pytest.approx(max(scores), abs=0.02)
        said = own.logits(torch.from_numpy(np.asarray(val.x))).argmax(dim=1).numpy()
        assert row.own == pytest.approx(balanced_accuracy(val.labels, said, len(dataset.classes)), abs=0.02)

    def test_the_page_and_the_table_say_how_much_of_the_lead_is_luck(self, searched):
        config, rows, run = searched
        settings = [row for row in rows if row.round == "settings"]
        noise = np.array([row.lines[-1]["noise"] for row in settings])
        assert noise.std(axis=1) == pytest.approx([row.sd for row in settings], abs=1e-3)
        lead = best_trial(rows).score - np.median([row.score for row in settings])
        luck = np.mean([max(0, *noise[:, i]) for i in range(noise.shape[1])])
        assert luck > 0
        said = (
            f"leads the median trial by {100 * lead:.1f} points on val; if all 4 were equally good, the best of them "
        )
        said += f"would lead by {100 * luck:.1f} points by luck alone."
        assert said in said_of_luck(rows) and said in run.path(PAGE_FILE).read_text()
        assert trials_table(config, rows, list(SPACE)).caption == said_of_luck(rows)

    @pytest.mark.long
    def test_best_yaml_is_trained_as_it_is_and_the_search_is_told_again(self, searched, tmp_path, capsys):
        config, rows, run = searched
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        rarelens.app(["search", str(tmp_path / "config.yaml")], standalone_mode=False)
        said = capsys.readouterr()
        assert f"next: rarelens train {run.uri}/{BEST_FILE}" in said.out and best_trial(rows).trial in said.err
        rarelens.app(["train", f"{run.uri}/{BEST_FILE}"], standalone_mode=False)
        assert "report.html" in capsys.readouterr().out
        trained = json.loads((run.work / "best" / "stage_one" / "result.json").read_text())
        assert trained["metrics"]["balanced_accuracy"] > 0 and (run.work / "best" / "model" / "model.json").exists()

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
        ruin_tune_s_state(run)
        again = search_stage_one(config, pack(config.source, config.data, f"{run.uri}/dataset", 0, progress=False), run)
        assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 5
        assert [(row.trial, row.score) for row in again] == [(row.trial, row.score) for row in rows]


def starts(trials_uri, name):
    """How often a fake trial was started."""
    storage = open_storage(f"{trials_uri}/{name}")
    return len(storage.read("starts")) if storage.exists("starts") else 0


def fake_trial(given, job=None):
    """Says scores without training: one more letter each start, so that a second start is seen."""
    import ray
    from ray import tune

    name, choices = given["trial"]["name"], given["trial"]["choices"]
    storage = open_storage(f"{job.folder_uri}/{name}")
    storage.write("starts", b"x" * (1 + starts(job.folder_uri, name)))
    storage.write(CHOICES_FILE, json.dumps(choices).encode())
    storage.write("resources.json", json.dumps(ray.get_runtime_context().get_assigned_resources()).encode())
    weight, trials = choices["stage_one.loss.weight"], open_storage(job.folder_uri)
    if weight < 0.3 or (trials.exists("fails-above") and weight > float(trials.read("fails-above"))):
        raise RuntimeError("no such luck")
    said = []
    for epochs in judged_epochs(job.config):
        time.sleep(float(os.environ.get("TRIAL_SECONDS", "0")))
        said.append({"epochs": epochs, "score": weight, "own": 0.1, "sd": 0.01})
        said[-1] |= {"family": "crt", "at_s": 1.0}
        storage.write(SCORES_FILE, json.dumps(said).encode())
        tune.report(said[-1])


def ruin_tune_s_state(run):
    """As a kill or a full disk may leave it."""
    for path in run.work.glob("search/tune/**/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_trial_that_dies_is_retried_then_recorded_and_the_search_goes_on(images, ray_session, tmp_path):
    space = {"stage_one.loss.weight": {"choice": [0.2, 0.8]}}
    config, dataset, run = opened(
        images, tmp_path, trials=4, space=space, sampler="random", seeds=1, cpus_per_trial=0.5
    )
    rows = search_stage_one(config, dataset, run, fake_trial)
    failed = [row for row in rows if row.status == "failed"]
    assert failed and len(failed) < 4 and all("no such luck" in row.error for row in failed)
    for row in rows:
        assert starts(f"{run.uri}/search/trials", row.trial) == (2 if row.status == "failed" else 1)
        given = json.loads((tmp_path / "search" / "trials" / row.trial / "resources.json").read_text())
        assert given["CPU"] == 0.5  # so that two share a core
    assert best_trial(rows).score == 0.8


def test_asha_stops_trials_that_fall_behind_and_the_terminal_shows_them(images, ray_session, tmp_path, monkeypatch):
    """The first ones are the best: what comes after them is in the lower half and ends at its first comparison."""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(cluster.progress, "console", terminal)
    weights = [0.9, 0.85, 0.5, 0.45, 0.4, 0.35]
    config, dataset, run = opened(images, tmp_path, trials=6, seeds=1, sampler="random", reduction=2)
    job = TrialJob(config, dataset.uri, f"{run.uri}/search/trials", "cpu", os.getcwd(), {}, 0.0)
    given = [{"stage_one.loss.weight": weight} for weight in weights]
    rows = _run_round("settings", job, run, fake_trial, given)
    ended = {row.choices["stage_one.loss.weight"]: (row.status, row.epochs) for row in rows}
    first, last = judged_epochs(config)
    assert ended[0.9] == ("done", last) and all(ended[weight] == ("stopped", first) for weight in weights[2:])
    told = terminal.file.getvalue()
    told = told[told.rindex("search: settings") :]
    assert "best balanced accuracy 0.900" in told and told.index("0.900") < told.index("lower bound")
    assert all(row.trial in told for row in rows) and "temperature" in told
    assert told.count("stopped") >= 4 and "under way" not in told

    again = _run_round("settings", job, run, fake_trial, given)
    assert [(row.trial, row.status, row.epochs) for row in again] == [
        (row.trial, row.status, row.epochs) for row in rows
    ]
    assert all(starts(f"{run.uri}/search/trials", row.trial) == 1 for row in rows)


def test_a_search_is_taken_up_whatever_tune_s_state_is(images, ray_session, tmp_path):
    """One trial fails and one is killed: both are run again, and then the finalist is another, with its own seeds."""
    space = {"stage_one.loss.weight": {"uniform": [0.4, 0.9]}}
    config, dataset, run = opened(images, tmp_path, trials=3, space=space, scheduler="none")
    fails_above, trials = tmp_path / "search" / "trials" / "fails-above", f"{run.uri}/search/trials"
    fails_above.parent.mkdir(parents=True)
    fails_above.write_text("0.72")
    first = search_stage_one(config, dataset, run, fake_trial)
    settings = [row for row in first if row.round == "settings"]
    (failed,) = [row for row in settings if row.status == "failed"]
    assert failed.choices["stage_one.loss.weight"] > 0.72 and best_trial(first).seeds == 2

    fails_above.unlink()
    ruin_tune_s_state(run)
    (killed,) = [row for row in settings if row not in (failed, best_trial(first))]
    (fails_above.parent / killed.trial / SCORES_FILE).unlink()
    before = {row.trial: starts(trials, row.trial) for row in first}
    second = search_stage_one(config, dataset, run, fake_trial)
    assert {row.trial for row in second if row.round == "settings"} == {row.trial for row in settings}
    assert all(row.status == "done" for row in second)
    for row in first:
        assert starts(trials, row.trial) == before[row.trial] + (row in (failed, killed))
    best = best_trial(second)
    assert best.trial == failed.trial and best.seeds == 2
    assert [row.choices for row in second if row.round == "seeds"] == [{**best.choices, "seed": 1}]


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
    ("how", "where"),
    [
        (signal.SIGKILL, "folder"),
        pytest.param(signal.SIGKILL, "bucket", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, "folder", marks=pytest.mark.long),
    ],
    ids=["kill -9", "kill -9, bucket", "Ctrl-C"],
)
def test_a_stopped_search_goes_on_without_its_finished_trials(
    images, ray_session, moto_s3, tmp_path, monkeypatch, how, where
):
    import ray

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    space = {"stage_one.loss.weight": {"uniform": [0.4, 0.9]}}
    uri = tmp_path / "run" if where == "folder" else f"{moto_s3}/{tmp_path.name}"
    config, dataset, run = opened(images, uri, trials=4, space=space, seeds=1)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.setenv("TRIAL_SECONDS", "0.7")
    command = [sys.executable, "-c", DRIVER, ray.get_runtime_context().gcs_address, str(tmp_path / "config.yaml")]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE)
    trials = open_storage(f"{run.uri}/search/trials")
    deadline = time.monotonic() + 120

    def ended():
        files = [stored.path for stored in trials.list() if stored.path.endswith(SCORES_FILE)]
        scores = {path.partition("/")[0]: json.loads(trials.read(path)) for path in files}
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
    assert all(starts(trials.uri, name) == 1 for name in before)
