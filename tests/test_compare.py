"""`rarelens report A B`: paired differences against plain loops, what differs, test sets that may not be compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from cluster.errors import UserError
from tests.reports import HOSTILE, Reader, comparison_of_two, decisions, finished_run
from trainer.bootstrap import bootstrap, decision_measure
from trainer.compare import ABSENT, compare_runs, different_settings, is_run_folder
from trainer.compare_page import headline, render, write_comparison

CLASSES = ("common", "middle", "rare")
WEAK = np.array([[40, 10, 10], [6, 14, 0], [4, 2, 4]])
STRONG = np.array([[55, 3, 2], [3, 17, 0], [1, 0, 9]])


def balanced_accuracy(counts: np.ndarray) -> float:
    return float(np.mean(np.diag(counts) / counts.sum(axis=1)))


@pytest.fixture
def runs(tmp_path):
    """Makes a run of that name, WEAK unless told otherwise."""
    return lambda name, counts=WEAK, **changes: finished_run(tmp_path / name, counts, CLASSES, **changes)


def test_differences_are_those_of_the_predictions(runs):
    found = compare_runs(runs("a"), runs("b", STRONG))
    for row, counts in zip(found.rows, (WEAK, STRONG), strict=True):
        assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy(counts))
        low, high = row["interval"]
        assert low <= row["balanced_accuracy"] <= high
    gain = found.figures["balanced_accuracy"]
    assert gain["value"] == pytest.approx(balanced_accuracy(STRONG) - balanced_accuracy(WEAK))
    assert {"macro_f1", "worst_recall", "few", "ece", "auc", "average_precision"} <= set(found.figures)
    for label in range(3):
        assert [recall[label] for recall in found.recall] == pytest.approx(
            [counts[label, label] / counts[label].sum() for counts in (WEAK, STRONG)]
        )
    assert found.test_counts == [60, 20, 10] and found.groups == 45 and found.train_counts == [900, 30, 210]


def test_intervals_are_paired_over_groups(runs):
    found = compare_runs(runs("a"), runs("b", STRONG))
    labels, groups = decisions(WEAK)[0], np.array([f"group {row // 2}" for row in range(90)])
    measures = {
        name: decision_measure("balanced_accuracy", labels, decisions(counts)[1].argmax(axis=1), 3)
        for name, counts in (("a", WEAK), ("b", STRONG))
    }
    values = bootstrap(measures, groups, samples=200, seed=0)
    expected = np.quantile(values["b"] - values["a"], [0.025, 0.975])
    assert found.figures["balanced_accuracy"]["interval"] == pytest.approx(expected.tolist())
    assert expected[0] > 0 and "B is better" in headline(found)


def test_a_run_is_as_good_as_itself_and_the_order_turns_the_sign(runs):
    a, b = runs("a"), runs("b", STRONG)
    same = compare_runs(a, a)
    assert same.figures["balanced_accuracy"] == {"value": 0, "interval": [0, 0]} and same.settings == []
    assert same.recall_differences == [[0, 0]] * 3
    assert "no difference" in headline(same) and "have the same configuration" in render(same)
    back = compare_runs(b, a)
    assert back.figures["few"]["value"] == -compare_runs(a, b).figures["few"]["value"]
    assert "A is better" in headline(back)


def test_settings_that_differ_are_told(runs):
    a = runs("a", config={"stage_one": {"epochs": 2, "loss": {"name": "none"}}, "model": {"weights": None}})
    found = compare_runs(a, runs("b", config={"stage_one": {"epochs": 9, "loss": {"name": "none"}}}))
    assert found.settings == [("model.weights", None, ABSENT), ("stage_one.epochs", 2, 9)]
    page = Reader(render(found)).text
    assert "model.weights none (not set) stage_one.epochs 2 9" in page
    assert different_settings({"run": "x", "a": 1}, {"run": "y", "a": 1}) == []


def test_the_page_says_what_may_be_wrong_with_it(runs):
    a, b = runs("a", reads=3), runs("b", STRONG, fingerprint="cd" * 32)
    page = Reader(render(compare_runs(a, b))).text
    assert "Test was read 3 times in A" in page and "sure that they are the same pictures" in page
    clean = Reader(render(compare_runs(runs("c"), runs("d")))).text
    assert "Test was read" not in clean and "same pictures" not in clean


def test_hostile_names_are_text_and_the_page_is_whole(tmp_path):
    found = comparison_of_two(tmp_path / "runs")
    write_comparison(found, tmp_path / "out" / "page.html")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["page.html"]
    page = (tmp_path / "out" / "page.html").read_text()
    read = Reader(page)
    assert "<script" not in page and "<b>cRT" not in page and not {"script", "link"} & {tag for tag, _ in read.tags}
    assert all(name in read.text for name in HOSTILE)
    assert [attrs["id"] for tag, attrs in read.tags if tag == "section"] == ["figures", "classes", "settings", "runs"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"keys": [f"test_{row:04d}" for row in range(2, 92)]},
            "2 of 90 test images only in .*a .*test_0000, test_0001",
        ),
        (
            {"labels": ["rare"] + ["common"] * 59 + ["middle"] * 20 + ["rare"] * 10},
            "1 test images other labels, test_0000",
        ),
        (
            {"groups": [f"group {row // 3}" for row in range(90)]},
            "other groups, test_0002 the first: group 1 and group 0",
        ),
    ],
)
def test_other_test_sets_are_refused(runs, changes, message):
    with pytest.raises(UserError, match=rf"{message}.*; evaluate both on one packed dataset"):
        compare_runs(runs("a"), runs("b", **changes))


def test_other_classes_are_refused(runs, tmp_path):
    other = finished_run(tmp_path / "b", WEAK, ("common", "middle", "another"))
    with pytest.raises(UserError, match=r"different classes \(rare, another only in one of them\)"):
        compare_runs(runs("a"), other)


def test_classes_in_another_order_are_the_same_classes(runs, tmp_path):
    turned = finished_run(tmp_path / "b", WEAK[::-1, ::-1], CLASSES[::-1])
    numbers = [*range(30, 90), *range(10, 30), *range(10)]  # the images of each class, in its order
    groups = [f"group {number // 2}" for number in numbers]
    straight = runs("a", keys=[f"test_{number:04d}" for number in numbers], groups=groups)
    found = compare_runs(straight, turned)
    assert found.classes == list(CLASSES)
    assert found.figures["balanced_accuracy"]["value"] == pytest.approx(0)


def test_what_is_no_finished_run_is_told(runs, tmp_path):
    with pytest.raises(UserError, match=r"nowhere is no run folder, it holds no config\.yaml"):
        compare_runs(runs("a"), str(tmp_path / "nowhere"))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    with pytest.raises(UserError, match=r"metrics\.json does not exist; run `rarelens train .*begun/config\.yaml`"):
        compare_runs(str(tmp_path / "begun"), runs("b"))


def test_run_folders_are_told_from_configurations(runs, tmp_path):
    a = runs("a")
    assert is_run_folder(a) and not is_run_folder(f"{a}/config.yaml") and not is_run_folder("configs/quickstart.yaml")
    assert not is_run_folder(str(tmp_path)) and not is_run_folder(str(tmp_path / "nowhere"))
    assert json.loads((tmp_path / "a/model/metrics.json").read_text())["model"] == "winner"
