"""`folds: 2` as a normal run: how train and val are cut, what each fold leaves, what all of them say together."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
import typer.main
import yaml

import rarelens
from cluster.config import load_config, parse_config
from cluster.errors import UserError
from cluster.run import RunFolder
from data_pipeline.config import DataConfig, SplitConfig
from data_pipeline.dataset import open_dataset
from data_pipeline.splits import cut_fold
from data_pipeline.synthetic import draw_synthetic
from tests.raw import pack_quietly
from tests.test_pack_splits import with_splits
from tests.tiny import tiny_config
from trainer.extraction import TEST
from trainer.features import read_features
from trainer.stage_checkpoint import load_classifier
from tuning.config import Config
from tuning.cross_validation import cross_validate, fold_configs, over_folds, print_cross_validation
from tuning.read_status import read_status

CLASSES = ("a", "b", "c")


class TestCut:
    labels = np.repeat([0, 1, 2], [120, 45, 15])
    groups = np.array([f"p{i // 3}" for i in range(180)], dtype=object)
    splits = np.tile(np.array(["train"] * 12 + ["val"] * 3 + ["test"] * 3, dtype=object), 10)

    def cut(self, fold, folds=4):
        config = SplitConfig(folds=folds, fold=fold)
        return cut_fold(self.splits, self.labels, self.groups, config, 3, CLASSES)

    def test_each_sample_outside_of_test_is_val_once(self):
        cuts = np.stack([self.cut(fold) for fold in range(4)])
        pooled = self.splits != "test"
        assert ((cuts == "val").sum(axis=0)[pooled] == 1).all() and ((cuts == "train").sum(axis=0)[pooled] == 3).all()
        assert (cuts[:, ~pooled] == "test").all()

    def test_no_group_is_cut_and_every_class_is_everywhere_in_its_share(self):
        for fold in range(4):
            cut = self.cut(fold)
            assert not set(self.groups[cut == "train"]) & set(self.groups[cut == "val"])
            held = np.bincount(self.labels[cut == "val"], minlength=3)
            whole = np.bincount(self.labels[self.splits != "test"], minlength=3)
            assert (np.abs(held - whole / 4) <= 3).all() and held.min() > 0

    def test_a_class_with_fewer_groups_than_folds_is_named(self):
        message = r"class 'c' has 4 groups \(patients or lesions\) outside of test, too few for folds = 6; lower folds"
        with pytest.raises(UserError, match=message):
            self.cut(0, folds=6)

    def test_a_fold_that_is_not_there_is_named(self):
        with pytest.raises(UserError, match="fold = 2 is none of the folds = 2, which count from 0"):
            parse_config(DataConfig, {"split": {"folds": 2, "fold": 2}}, "test")


def test_given_splits_are_pooled_but_for_test_and_near_duplicates_stay_together(tmp_path):
    given = ("train",) * 6 + ("val",) * 3 + ("test",) * 2
    rows = [(label, f"{label}{i}", split, i + 40 * (label == "b")) for label in "ab" for i, split in enumerate(given)]
    rows[6] = ("a", "a6", "val", 0)  # the picture of the first training sample, under another patient's name
    source = with_splits(tmp_path / "raw", rows)
    vals = []
    for fold in range(3):
        data = DataConfig(split=SplitConfig(folds=3, fold=fold))
        dataset = pack_quietly(source, data, tmp_path / f"d{fold}")
        of_split = {split: {int(key[-4:]) for key in dataset.index(split).key} for split in ("train", "val", "test")}
        assert of_split["test"] == {9, 10, 20, 21} and dataset.made["given_splits"] == ["test"]
        assert ({0, 6} <= of_split["val"]) or ({0, 6} <= of_split["train"])
        vals.append(of_split["val"])
    assert sorted(number for val in vals for number in val) == [*range(9), *range(11, 20)]


def test_each_fold_is_a_run_of_its_own():
    config = parse_config(Config, {"folds": 3, "run": "runs/x", "source": {"path": "images"}}, "test")
    for number, fold in enumerate(fold_configs(config)):
        assert (fold.run, fold.folds) == (f"runs/x/folds/{number}", 1)
        assert (fold.data.split.folds, fold.data.split.fold) == (3, number)
        again = parse_config(Config, fold.model_dump(mode="json"), "test")  # as it is kept with the run
        assert again == fold and again.stage_one == config.stage_one


def test_folds_of_a_set_that_is_cut_already_are_refused():
    with pytest.raises(UserError, match=r"folds = 5 cuts train and val anew, and data.packed = p is cut already; give"):
        parse_config(Config, {"folds": 5, "data": {"packed": "p"}}, "test")


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """Models of true quality .7 +- .03, each judged on the same test of 400 images, with intervals of their own."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        quality = 0.7 + rng.normal(size=5) * 0.03
        shared = rng.normal() * np.sqrt(0.7 * 0.3 / 400)  # what this test adds to all of them
        values = quality + shared
        half = 1.96 * np.sqrt(0.7 * 0.3 / 400)
        low, high = over_folds(values.tolist(), [[value - half, value + half] for value in values])["interval"]
        covered += low <= 0.7 <= high
    assert 0.92 <= covered / 300 <= 0.99


def test_the_same_in_all_folds_has_the_interval_of_one():
    found = over_folds([0.8, 0.8], [[0.7, 0.9], [0.7, 0.9]])
    assert found["interval"] == pytest.approx([0.7, 0.9]) and found["sd"] == 0 and found["mean"] == pytest.approx(0.8)


def finished_fold(folder, value, family):
    """What a fold leaves that is put together: one model, one figure."""
    row = {"name": "winner", "description": f"winner: {family}", "interval": [0.5, 0.9]}
    figures = {"balanced_accuracy": value, "macro_f1": value - 0.1}
    intervals = {name: [figure - 0.1, figure + 0.1] for name, figure in figures.items()}
    metrics = {
        "test": {"samples": 40, "groups": 30, "reads": 1},
        "rows": [{**row, **figures, "intervals": intervals}],
        "differences": {"winner - own": {"value": 0.02, "interval": [-0.01, 0.05]}},
    }
    run = RunFolder(str(folder))
    run.write_json("model/metrics.json", metrics)
    run.write_json("stage_two/winner.json", {"score": value, "winner": family, "select_by": "macro_f1"})
    return run


def test_the_table_ends_with_the_command_that_uses_a_fold_s_model(tmp_path, capsys):
    run = RunFolder(str(tmp_path / "a run"))
    folds = [finished_fold(tmp_path / "a run" / "folds" / str(n), 0.6 + 0.1 * n, "crt") for n in range(3)]
    cross_validate(run, folds)
    print_cross_validation(run)
    told = capsys.readouterr().out
    assert "winner: crt" in told and "0.700" in told and "winner - own: +0.020" in told
    assert f"models:  {run.uri}/folds/0 to 2, each in model; none of them was chosen" in told
    (command,) = re.findall(r"^use one: rarelens (.*)$", told, re.MULTILINE)
    name, *arguments = shlex.split(command)
    taken = typer.main.get_command(rarelens.app).commands[name].make_context(name, arguments).params
    assert (taken["model"], taken["images"]) == (f"{run.uri}/folds/0/model", ["NEW_IMAGES"])


@pytest.mark.long
class TestRun:
    @pytest.fixture(scope="class")
    @staticmethod
    def run(ray_session, tmp_path_factory):
        """`rarelens train` with two folds of a tiny run."""
        folder = tmp_path_factory.mktemp("folds")
        draw_synthetic(folder / "images", seed=2, scale=0.06)
        metric = {"select_by": "macro_f1"}
        config = tiny_config(folder / "images", folder / "run", folds=2, stage_one=metric, stage_two=metric)
        (folder / "tiny.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        rarelens.app(["train", str(folder / "tiny.yaml")], standalone_mode=False)
        return RunFolder(str(folder / "run")), folder / "tiny.yaml"

    def test_each_fold_has_its_own_network_heads_and_report_and_the_same_test(self, run):
        folds = [run[0].work / "folds" / str(number) for number in range(2)]
        first, second = (open_dataset(str(fold / "dataset")) for fold in folds)
        assert set(first.index("val").key) == set(second.index("train").key)
        assert set(first.index("test").key) == set(second.index("test").key)
        networks = [json.loads((fold / "model" / "model.json").read_text()) for fold in folds]
        assert len({model["provenance"]["checkpoint_sha256"] for model in networks}) == 2
        for fold in folds:
            assert (fold / "model" / "report.html").exists()
            assert json.loads((fold / "test_reads.json").read_text()) == 1

    def test_the_best_epoch_and_the_winner_are_chosen_by_the_metric_that_was_asked_for(self, run):
        for number in range(2):
            fold = RunFolder(f"{run[0].uri}/folds/{number}")
            epochs = {line["epoch"]: line["macro_f1"] for line in fold.read_log() if line["kind"] == "epoch"}
            assert len(epochs) == 2
            assert fold.read_json("stage_one/result.json")["epoch"] == max(epochs, key=epochs.get)
            winner = fold.read_json("stage_two/winner.json")
            assert winner["select_by"] == "macro_f1" and winner["score"] == winner["macro_f1"]

    def test_the_table_is_of_all_folds(self, run, capsys):
        result = run[0].read_json("cross_validation.json")
        metrics = [run[0].read_json(f"folds/{number}/model/metrics.json") for number in range(2)]
        assert result["test"]["reads"] == [1, 1] and len(result["winners"]) == 2
        winner = next(row for row in result["rows"] if row["name"] == "winner")
        scores = [next(row for row in m["rows"] if row["name"] == "winner")["balanced_accuracy"] for m in metrics]
        assert winner["balanced_accuracy"]["folds"] == scores
        assert winner["balanced_accuracy"]["mean"] == pytest.approx(np.mean(scores))
        assert {"macro_f1", "worst_recall", "auc", "ece"} <= winner.keys()
        print_cross_validation(run[0])
        told = capsys.readouterr().out
        assert "2 folds, each on the same test" in told and f"{np.mean(scores):.3f}" in told

    def test_retrieval_is_on_embeddings(self, run):
        fold = RunFolder(f"{run[0].uri}/folds/0")
        config, test = fold_configs(load_config(Config, run[1]))[0], read_features(fold.work / TEST.folder, "test")
        checkpoint = fold.work / fold.read_json("stage_one/result.json")["checkpoint"]
        network = load_classifier(checkpoint, config, int(test.labels.max()) + 1).eval()
        with torch.no_grad():
            embeddings = network.embed(torch.from_numpy(np.asarray(test.x, dtype=np.float32))).numpy()
        cosine = embeddings @ embeddings.T - 9 * np.eye(len(test))
        known = np.bincount(test.labels)[test.labels] > 1
        expected = (test.labels[cosine.argmax(axis=1)] == test.labels)[known].mean()
        rows = {row["name"]: row for row in fold.read_json("model/metrics.json")["rows"]}
        assert rows["winner"]["recall_at_1"] == rows["own"]["recall_at_1"] == pytest.approx(expected, abs=0.02)

    def test_what_is_done_is_not_done_again(self, run):
        before = {path: path.stat().st_mtime_ns for path in run[0].work.rglob("*.json") if "cross" not in path.name}
        rarelens.app(["train", str(run[1]), "--resume"], standalone_mode=False)
        after = {path: path.stat().st_mtime_ns for path in run[0].work.rglob("*.json") if "cross" not in path.name}
        assert {path for path in after if before.get(path) != after[path]} == set()

    def test_status_tells_the_fold_until_all_is_done(self, run):
        assert read_status(run[0].uri).step == "done"
        (run[0].work / "cross_validation.json").unlink()
        assert read_status(run[0].uri).step == "fold 1 of 0 to 1: done"
        cross_validate(run[0], [RunFolder(f"{run[0].uri}/folds/{number}") for number in range(2)])
        assert read_status(run[0].uri).step == "done"
