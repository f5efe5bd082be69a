"""A study's figures against plain recomputation, and its cells: cached, shared out, killed, failed."""

import json
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score

from cluster.config import load_config, parse_config
from cluster.errors import UserError
from cluster.lock import RunLock
from cluster.run import RunFolder
from cluster.storage import open_storage
from data_pipeline.config import DataConfig
from tests.raw import pack_quietly, table_source
from trainer.evaluate import write_predictions
from trainer.features import Features
from tuning.config import STANDARD_TRAININGS, Config
from tuning.read_status import read_status
from tuning.study import run_study
from tuning.study_cells import cell_config, search_config, training_config
from tuning.study_layout import (
    PICTURE_FILE,
    RESULTS_FILE,
    ROWS_FILE,
    SEEDS_FILE,
    TABLE_FILE,
    Cell,
)
from tuning.study_methods import KINDS, methods_of
from tuning.study_table import FIGURES, study_table
from tuning.trials_table import BEST_FILE

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("study_*.yaml"))
TRAININGS = ("cross_entropy", "focal", "supervised_contrastive", "centre")
FAMILIES = ("crt", "logit_adjustment", "tau_norm")
RESAMPLES = 100
PLAN = 0
"""Decides what planted cells say."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    source = table_source(folder / "raw", {"common": 160, "middle": 90, "rare": 50}, per_group=2)
    return pack_quietly(source, DataConfig(), folder / "packed")


def opened(dataset, uri, **study):
    values = {
        "run": str(uri),
        "data": {"packed": dataset.uri, "name": "planted"},
        "stage_two": {"families": list(FAMILIES), "folds": 1},
        "evaluation": {"bootstrap_samples": RESAMPLES},
        "study": {"only": list(TRAININGS), "seeds": [0, 5], **study},
    }
    return parse_config(Config, values, "test"), RunFolder(str(uri))


def planted_cell(config, dataset, run):
    """What a cell leaves, without training: every head says something of its own about test, and has a score on val."""
    with open(run.path("starts"), "a") as file:
        file.write("x")
    cell = run.uri.rpartition("/")[2]
    index = dataset.index("test")
    test = Features(index.key, index.label.astype(np.int64), index.group, np.arange(len(index)), index.label[:, None])
    rows = {}
    for head in ("own", *FAMILIES):
        rng = np.random.default_rng(zlib.crc32(f"{PLAN}/{cell}/{head}".encode()))
        scores = rng.dirichlet(np.ones(3), len(test)) + rng.uniform(0.1, 0.6) * np.eye(3)[test.labels]
        write_predictions(
            run.path(f"predictions/{head}.parquet"), test, dataset.classes, scores / scores.sum(1)[:, None]
        )
        rows[head] = {"temperature": 1.0, "val": float(rng.uniform(0.4, 0.8)), "knobs": {}}
    run.publish("predictions")
    model = max(FAMILIES, key=lambda head: rows[head]["val"])
    run.write_json(ROWS_FILE, {"reads": 1, "model": model, "rows": rows})


@pytest.fixture(scope="module", params=["folder", "bucket"])
def made(request, dataset, tmp_path_factory):
    """(configuration, run folder, table) of a study with planted cells."""
    folder = tmp_path_factory.mktemp("run")
    uri = folder / "run" if request.param == "folder" else f"{request.getfixturevalue('moto_s3')}/{folder.name}/run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        config, run = opened(dataset, uri)
        yield config, run, run_study(config, dataset, run, finish=planted_cell)


def said_by(run, line):
    """Labels, groups and predictions of one row and seed, from its file alone."""
    table = pq.read_table(run.fetch(line["file"])).to_pydict()
    names = [name for name in table if name.startswith("p_")]
    predicted = [names[i][2:] for i in np.argmax([table[name] for name in names], axis=0)]
    return np.array(table["label"]), np.array(table["group"]), np.array(predicted), table


def figures_by_sklearn(labels, predicted):
    few = recall_score(labels, predicted, labels=["rare"], average="macro", zero_division=0)
    present = np.unique(np.concatenate([labels, predicted]))
    return [
        balanced_accuracy_score(labels, predicted),
        f1_score(labels, predicted, labels=present, average="macro", zero_division=0),
        few if "rare" in labels else np.nan,
    ]


def plain_figures(labels, predicted):
    """The same with numpy alone: sklearn takes a minute for all resamples."""
    hits = labels == predicted
    recall = {name: hits[labels == name].mean() for name in np.unique(labels)}
    f1 = [
        2 * hits[labels == name].sum() / ((labels == name).sum() + (predicted == name).sum())
        for name in np.unique(np.concatenate([labels, predicted]))
    ]
    return [np.mean(list(recall.values())), np.mean(f1), recall.get("rare", np.nan)]


class TestTable:
    def test_figures_are_those_of_the_prediction_files(self, made):
        _, run, table = made
        for row in table.rows:
            lines = [line for line in table.seeds if line["name"] == row["name"]]
            assert [line["seed"] for line in lines] == [0, 5]
            by_seed = np.array([figures_by_sklearn(*said_by(run, line)[::2][:2]) for line in lines])
            for i, name in enumerate(FIGURES):
                np.testing.assert_allclose([line[name] for line in lines], by_seed[:, i], rtol=1e-12)
                assert row[name] == pytest.approx(by_seed[:, i].mean(), abs=1e-12)
                assert row[f"{name}_sd"] == pytest.approx(by_seed[:, i].std(ddof=1), abs=1e-12)

    def test_prediction_files_hold_each_test_image_with_its_probabilities(self, made, dataset):
        _, run, table = made
        *_, columns = said_by(run, table.seeds[0])
        assert columns["image"] == dataset.index("test").key.tolist()
        assert list(columns) == ["image", "label", "group", "predicted", "p_common", "p_middle", "p_rare"]
        np.testing.assert_allclose(sum(np.array(columns[f"p_{name}"]) for name in dataset.classes), 1, atol=1e-6)

    def test_intervals_and_paired_differences_are_those_of_a_plain_bootstrap(self, made):
        """All methods and seeds on the same resamples of whole groups, which are drawn one by one here."""
        config, run, table = made
        chosen = [row["name"] for row in table.rows if row["description"] == table.best_one_stage]
        assert chosen != ["cross_entropy/own"], "the plan does not tell both apart"
        names = ["cross_entropy/own", "centre/searched", "searched", *chosen]
        said = {name: [said_by(run, line) for line in table.seeds if line["name"] == name] for name in names}
        labels, groups = said["searched"][0][:2]
        patients, rng = np.unique(groups), np.random.default_rng(config.seed)
        resampled = {name: [] for name in names}
        for _ in range(RESAMPLES):
            times = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)))
            drawn = np.concatenate(
                [np.tile(np.flatnonzero(groups == p), n) for p, n in zip(patients, times, strict=True)]
            )
            for name in names:
                of_seeds = [plain_figures(labels[drawn], predicted[drawn]) for _, _, predicted, _ in said[name]]
                resampled[name].append(np.mean(of_seeds, axis=0))
        values = {name: np.array(rows) for name, rows in resampled.items()}
        rows = {row["name"]: row for row in table.rows}
        for name in names:
            self.check(rows[name], "", values[name])
            self.check(rows[name], "_minus_baseline", values[name] - values["cross_entropy/own"])
            self.check(rows[name], "_minus_best_one_stage", values[name] - values[chosen[0]])
        assert rows["cross_entropy/own"]["macro_f1_minus_baseline_high"] == 0
        assert rows["searched"]["balanced_accuracy_minus_baseline"] == pytest.approx(
            rows["searched"]["balanced_accuracy"] - rows["cross_entropy/own"]["balanced_accuracy"]
        )

    def check(self, row, suffix, values):
        for i, name in enumerate(FIGURES):
            known = values[:, i][~np.isnan(values[:, i])]
            ends = [row[f"{name}{suffix}_{end}"] for end in ("low", "high")]
            np.testing.assert_allclose(ends, np.quantile(known, [0.025, 0.975]), atol=1e-12)

    def test_what_is_chosen_is_chosen_on_val(self, made):
        _, _, table = made
        one_stage = [row for row in table.rows if row["kind"] == "one-stage"]
        assert {row["name"] for row in one_stage} == {
            "cross_entropy/own",
            "cross_entropy/logit_adjustment",
            "focal/own",
        }
        best = max(one_stage, key=lambda row: row["val"])
        assert table.best_one_stage == best["description"]
        assert best != max(one_stage, key=lambda row: row["balanced_accuracy"]), "the plan does not tell them apart"
        for line in (line for line in table.seeds if line["name"] == "searched"):
            rivals = [
                other
                for other in table.seeds
                if other["name"] in ("supervised_contrastive/searched", "centre/searched")
                and other["seed"] == line["seed"]
            ]
            assert line["file"] == max(rivals, key=lambda other: other["val"])["file"]

    def test_rows_of_the_main_table_and_of_the_whole_one(self, made, dataset, tmp_path):
        config, run, table = made
        assert [row["name"] for row in table.rows] == [
            "cross_entropy/own",
            "cross_entropy/logit_adjustment",
            "focal/own",
            "cross_entropy/crt",
            "cross_entropy/tau_norm",
            "cross_entropy/searched",
            "supervised_contrastive/own",
            "centre/own",
            "supervised_contrastive/searched",
            "centre/searched",
            "searched",
        ]
        assert list(dict.fromkeys(row["kind"] for row in table.rows)) == list(KINDS)
        whole = config.model_copy(update={"study": config.study.model_copy(update={"rows": "all"})})
        assert len(study_table(whole, dataset, run).rows) == 4 * (1 + len(FAMILIES) + 1) + 1

    def test_files_say_what_the_table_says(self, made):
        _, run, table = made
        assert pq.read_table(run.fetch(RESULTS_FILE)).to_pylist() == table.rows
        seeds = pq.read_table(run.fetch(SEEDS_FILE)).to_pylist()
        assert [{**line, "knobs": json.loads(line["knobs"])} for line in seeds] == table.seeds
        text = run.fetch(TABLE_FILE).read_text()
        for row in table.rows:
            line = next(line for line in text.splitlines() if line.strip("|* ").startswith(f"{row['description']}"))
            assert f"{row['balanced_accuracy']:.3f}".lstrip("0") in line
            assert f"({row['few_recall_low']:.3f}".replace("0.", ".", 1) in line
        assert "each cell read it once" in text and f"val {table.best_one_stage}" in text
        picture = ElementTree.fromstring(run.fetch(PICTURE_FILE).read_text())
        words = [element.text for element in picture.iter() if element.tag.endswith("text")]
        assert all(row["description"] in words for row in table.rows)


def test_a_second_reading_of_test_is_told(dataset, tmp_path):
    config, run = opened(dataset, tmp_path, only=["cross_entropy"], seeds=[0])
    run_study(config, dataset, run, finish=planted_cell)
    file = Cell("cross_entropy", 0).path(ROWS_FILE)
    run.write_json(file, {**run.read_json(file), "reads": 2})
    table = run_study(config, dataset, run, finish=planted_cell)
    assert table.reads == {"cross_entropy-seed0": 2}
    assert "read more than once by cross_entropy-seed0 2" in (tmp_path / TABLE_FILE).read_text()
    assert table.rows[0]["balanced_accuracy_sd"] is None and "searched" not in [row["name"] for row in table.rows]


def test_a_method_without_a_head_is_left_out_and_named(dataset, tmp_path):
    config, run = opened(dataset, tmp_path, only=["cross_entropy"])
    run_study(config, dataset, run, finish=planted_cell)
    file = Cell("cross_entropy", 5).path(ROWS_FILE)
    record = run.read_json(file)
    del record["rows"]["crt"]
    run.write_json(file, {**record, "model": "tau_norm"})
    table = run_study(config, dataset, run, finish=planted_cell)
    assert table.left_out == ["cross-entropy + cRT"] and "cross_entropy/crt" not in [row["name"] for row in table.rows]
    assert "had diverged: cross-entropy + cRT." in (tmp_path / TABLE_FILE).read_text()


def test_a_training_that_has_more_than_others_is_told_apart(dataset, tmp_path):
    more = {"features.views": 3, "model.mirrors": "both"}
    config, run = opened(dataset, tmp_path, trainings={"centre": more})
    run_study(config, dataset, run, finish=planted_cell)
    text = (tmp_path / TABLE_FILE).read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("centre loss: ")]
    assert line.endswith(", heads on 3 views, tested on the mean over 4 mirror images.")
    assert text.count("mirror images") == 1


def test_predictions_about_other_images_are_refused(dataset, tmp_path):
    config, run = opened(dataset, tmp_path, only=["cross_entropy"])
    run_study(config, dataset, run, finish=planted_cell)
    file = tmp_path / "cells/cross_entropy-seed5/predictions/own.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(UserError, match=r"own.parquet is about other test images .* delete .*/cross_entropy-seed5 and"):
        run_study(config, dataset, run, finish=planted_cell)


# --- cells


def starts(run):
    return {file.parent.name: len(file.read_text()) for file in run.work.glob("cells/*/starts")}


def test_finished_cells_are_taken_as_they_are_and_new_ones_are_added(dataset, tmp_path):
    config, run = opened(dataset, tmp_path, only=["cross_entropy", "focal"], seeds=[0])
    run_study(config, dataset, run, finish=planted_cell)
    config, run = opened(dataset, tmp_path, only=["cross_entropy", "centre"], seeds=[0, 1])
    run_study(config, dataset, run, finish=planted_cell)
    assert starts(run) == {
        f"{name}-seed{seed}": 1
        for name, seed in (("cross_entropy", 0), ("focal", 0), ("centre", 0), ("cross_entropy", 1), ("centre", 1))
    }


def test_a_cell_is_a_run_of_its_own_on_the_studys_dataset(dataset, tmp_path):
    config, run = opened(dataset, tmp_path, only=["cross_entropy", "ldam_drw"], trainings={"focal": {}})
    run_study(config, dataset, run, finish=planted_cell)
    used = load_config(Config, tmp_path / "cells/ldam_drw-seed5/config.yaml")
    assert used.run == str(tmp_path / "cells/ldam_drw-seed5") and used.seed == 5
    assert used.data.packed == dataset.uri and used.source.path is None and used.study == Config().study
    assert used.stage_one.classification.name == "ldam" and used.stage_one.classification.reweight_from == 0.8
    assert used.stage_two == config.stage_two


def test_a_training_that_was_changed_is_refused_before_anything_is_trained(dataset, tmp_path):
    config, run = opened(dataset, tmp_path, only=["cross_entropy", "focal"], seeds=[0])
    run_study(config, dataset, run, finish=planted_cell)
    gamma = {"focal": {"stage_one": {"classification": {"gamma": 3.0}}}}
    config, run = opened(dataset, tmp_path, only=["cross_entropy", "focal"], seeds=[0, 1], trainings=gamma)
    with pytest.raises(
        UserError, match=r"focal-seed0 was started .* \(stage_one.classification.gamma = 3.0, was 2.0\)"
    ):
        run_study(config, dataset, run, finish=planted_cell)
    assert "cross_entropy-seed1" not in starts(run)


def test_a_cell_of_another_process_is_left_to_it(dataset, tmp_path):
    config, run = opened(dataset, tmp_path, only=["cross_entropy", "focal"], seeds=[0])
    with RunLock(open_storage(Cell("cross_entropy", 0).uri(run))):
        assert run_study(config, dataset, run, finish=planted_cell) is None
    assert starts(run) == {"focal-seed0": 1}
    assert run_study(config, dataset, run, finish=planted_cell) is not None
    assert starts(run) == {"focal-seed0": 1, "cross_entropy-seed0": 1}


def test_a_job_for_one_cell_does_that_one(dataset, tmp_path):
    config, run = opened(dataset, tmp_path, only=["cross_entropy", "focal"], seeds=[0])
    assert run_study(config, dataset, run, ["focal-seed0"], finish=planted_cell) is None
    assert starts(run) == {"focal-seed0": 1}
    assert run_study(config, dataset, run, ["cross_entropy-seed0"], finish=planted_cell) is not None
    with pytest.raises(UserError, match="the study has no cell 'focal-sed0'; did you mean 'focal-seed0'"):
        run_study(config, dataset, run, ["focal-sed0"], finish=planted_cell)


def test_a_cell_that_fails_stops_no_other(dataset, tmp_path):
    def torn(config, dataset, run):
        if run.uri.endswith("focal-seed0"):
            raise UserError("the loss was not finite")
        planted_cell(config, dataset, run)

    config, run = opened(dataset, tmp_path, only=["cross_entropy", "focal", "centre"], seeds=[0])
    with pytest.raises(UserError, match=r"1 of 3 cells failed, focal-seed0 the first: the loss was not finite; mend"):
        run_study(config, dataset, run, finish=torn)
    assert set(starts(run)) == {"cross_entropy-seed0", "centre-seed0"}
    assert run_study(config, dataset, run, finish=planted_cell) is not None


DRIVER = """
import sys
from cluster.config import load_config
from cluster.run import RunFolder
from cluster.storage import open_storage
from data_pipeline.dataset import open_dataset
from tests.test_study import planted_cell
from tuning.config import Config
from tuning.study import run_study

def finish(config, dataset, run):
    if run.uri.endswith("focal-seed0"):
        run.path("begun").touch()
        sys.stdin.read()  # until it is killed
    planted_cell(config, dataset, run)

config = load_config(Config, sys.argv[1])
run = RunFolder(config.run)
run.pin_config(config.model_dump(mode="json"))
run_study(config, open_dataset(config.data.packed), run, finish=finish)
"""


def test_a_study_that_is_killed_goes_on_without_its_finished_cells(dataset, tmp_path):
    config, run = opened(dataset, tmp_path / "run", only=["cross_entropy", "focal"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "config.yaml")], stdin=subprocess.PIPE, cwd=ROOT
    )
    begun = tmp_path / "run/cells/focal-seed0/begun"
    deadline = time.monotonic() + 300
    while not begun.exists() and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert begun.exists()
    status = read_status(run.uri)
    assert status.cells == {"done": 1, "running": 1, "of": 4} and status.step.startswith("focal-seed0: ")
    assert status.process.lives
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    status = read_status(run.uri)
    assert status.cells == {"done": 1, "running": 0, "of": 4} and status.step.startswith("focal-seed0: ")
    assert status.process.lives is False, "its lock is there"
    before = (tmp_path / "run/cells/cross_entropy-seed0/predictions/own.parquet").stat().st_mtime_ns
    assert run_study(config, dataset, run, finish=planted_cell) is not None
    assert set(starts(run).values()) == {1} and len(starts(run)) == 4
    assert (tmp_path / "run/cells/cross_entropy-seed0/predictions/own.parquet").stat().st_mtime_ns == before
    status = read_status(run.uri)
    assert status.cells == {"done": 4, "running": 0, "of": 4} and status.step == "done"


# --- configuration


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_training_of_the_shipped_studies_makes_sense(path):
    config = load_config(Config, path)
    assert set(config.study.all_trainings) == set(STANDARD_TRAININGS)
    losses = {name: training_config(config, name, "packed").stage_one for name in config.study.all_trainings}
    assert losses["balanced_sampling"].sampling.power == 0
    assert {name for name, stage in losses.items() if stage.loss.name != "none"} == {
        "batch_hard_triplet",
        "centre",
        "supervised_contrastive",
    }
    assert len({(stage.epochs, stage.batch_size, stage.views) for stage in losses.values()}) == 1, "one budget"
    assert len(methods_of(config)) == 18
    assert config.stage_two.folds == 1, "one-stage methods do not learn from val either"


def test_settings_lie_over_a_standard_training_in_either_form():
    values = {
        "study": {"trainings": {"focal": {"stage_one.classification.gamma": 3}, "mine": {"stage_one": {"epochs": 4}}}}
    }
    config = parse_config(Config, values, "test")
    assert training_config(config, "focal", "x").stage_one.classification.gamma == 3
    assert training_config(config, "focal", "x").stage_one.classification.name == "focal"
    assert training_config(config, "mine", "x").stage_one.epochs == 4
    assert list(config.study.all_trainings)[-1] == "mine"


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"only": ["focl"]}, "only: 'focl' is none of the trainings; did you mean 'focal'"),
        ({"only": ["focal"]}, "baseline: 'cross_entropy' is none of the trainings; known: focal"),
        ({"search": ["centr"]}, "search: 'centr' is none of the trainings; did you mean 'centre'"),
        ({"trainings": {"a/b": {}}}, "trainings: 'a/b' names a folder; use letters, digits and _"),
        ({"seeds": [1, 1]}, r"seeds must differ, not \[1, 1\]"),
    ],
)
def test_what_a_study_cannot_be(study, message):
    with pytest.raises(UserError, match=message):
        parse_config(Config, {"study": study}, "test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"stage_one.epoch": 3},
            "study.trainings.mine: 'stage_one.epoch' is no setting; did you mean 'stage_one.epochs'",
        ),
        ({"data.pack_px": 64}, "study.trainings.mine: data.pack_px cannot differ between trainings, they share one"),
        ({"stage_one.classification.name": "ldam"}, "study.trainings.mine: .* the classifier is linear; set"),
    ],
)
def test_what_a_training_cannot_be_is_told_before_anything_is_trained(dataset, tmp_path, settings, message):
    config, run = opened(dataset, tmp_path, only=["cross_entropy", "mine"], trainings={"mine": settings})
    with pytest.raises(UserError, match=message):
        run_study(config, dataset, run, finish=planted_cell)
    assert not starts(run)


def test_folds_are_not_for_a_study(dataset, tmp_path):
    config, run = opened(dataset, tmp_path)
    config = config.model_copy(update={"folds": 5})
    with pytest.raises(UserError, match="folds = 5: a study has one packed dataset, and seeds instead; set folds=1"):
        run_study(config, dataset, run, finish=planted_cell)


def test_cells_of_a_searched_training_wait_for_its_settings_and_take_them(dataset, tmp_path):
    config, run = opened(dataset, tmp_path, search=["centre"])
    cell = Cell("centre", 5)
    assert cell_config(config, cell, dataset, run) is None
    around = search_config(config, "centre", dataset, run)
    assert around.run == str(tmp_path / "cells/centre-search") and around.stage_one.loss.name == "centre"
    loss = around.stage_one.loss.model_copy(update={"weight": 0.3})
    best = around.model_copy(update={"stage_one": around.stage_one.model_copy(update={"loss": loss})})
    text = yaml.safe_dump(best.model_dump(mode="json"))
    RunFolder(around.run).storage.write(BEST_FILE, text.encode())
    found = cell_config(config, cell, dataset, run)
    assert found.stage_one.loss.weight == 0.3 and found.seed == 5 and found.run == cell.uri(run)
    run_study(config, dataset, run, finish=planted_cell)
    assert "centre-seed5" in starts(run)
