"""How the winner is chosen on val: folds by groups, lower bounds, luck, ties; and results that are not whole."""

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from trainer.heads import Head, HeadSpec
from trainer.metrics import balanced_accuracy
from tuning.choice import Judge, finalists, lower_bound, luck
from tuning.folds import assign_folds, number_of_folds
from tuning.results import SearchResult, head_row, rank, read_results, write_results

LABELS = np.repeat([0, 1, 2], [120, 40, 12])
GROUPS = np.arange(len(LABELS)) // 2
JUDGE = Judge(LABELS, GROUPS, 3, "balanced_accuracy")


def predictions(heads, right, seed=0):
    """Each right with the given probability, image by image and on its own."""
    rng = np.random.default_rng(seed)
    wrong = (LABELS + rng.integers(1, 3, size=(heads, len(LABELS)))) % 3
    return np.where(rng.random((heads, len(LABELS))) < right, LABELS, wrong)


class TestFolds:
    def test_folds_part_val_by_groups_with_every_class_in_each(self):
        folds = assign_folds(LABELS, GROUPS, 5)
        assert sorted(np.unique(folds)) == [0, 1, 2, 3, 4]
        for group in np.unique(GROUPS):
            assert len(np.unique(folds[group == GROUPS])) == 1
        held = np.array([np.bincount(LABELS[folds == k], minlength=3) for k in range(5)])
        assert (held.max(axis=0) - held.min(axis=0)).max() <= 2 and held.min() >= 2

    def test_one_fold_is_all_of_val(self):
        assert not assign_folds(LABELS, GROUPS, 1).any()

    def test_a_small_class_asks_for_folds_and_its_groups_bound_them(self):
        assert number_of_folds("auto", LABELS, GROUPS) == 5
        assert number_of_folds("auto", np.repeat([0, 1], 50), np.arange(100)) == 1
        assert number_of_folds(3, LABELS, GROUPS) == 3
        assert number_of_folds(10, LABELS, GROUPS) == 6
        assert number_of_folds("auto", LABELS, np.array(["one"] * len(LABELS))) == 1


def test_scores_are_the_metric():
    said = predictions(4, 0.7)
    assert JUDGE.scores(said) == pytest.approx([balanced_accuracy(LABELS, row, 3) for row in said])


def test_a_lower_bound_counts_val_and_seeds():
    said = predictions(3, 0.7)
    mean, bound = lower_bound(JUDGE, said)
    scores = JUDGE.scores(said)
    of_val = JUDGE.resampled(said).mean(axis=0).var()
    assert mean == pytest.approx(scores.mean())
    assert bound == pytest.approx(mean - 1.645 * np.sqrt(of_val + scores.var(ddof=1) / 3))
    assert lower_bound(JUDGE, said[:1])[1] < mean
    steady = np.repeat(said[:1], 3, axis=0)
    assert lower_bound(JUDGE, steady)[1] == pytest.approx(lower_bound(JUDGE, said[:1])[1])


def test_luck_grows_with_independent_heads_and_not_with_equal_ones():
    few, many = luck(JUDGE, predictions(4, 0.7)), luck(JUDGE, predictions(100, 0.7))
    equal = luck(JUDGE, np.repeat(predictions(1, 0.7), 100, axis=0))
    assert 0 < equal < few < many
    assert luck(JUDGE, predictions(1, 0.7)) == 0


def test_luck_is_the_lead_that_equal_heads_show():
    """The best of 60 heads that are equally good leads by about what `luck` says."""
    leads, told = [], []
    for seed in range(12):
        said = predictions(60, 0.7, seed)
        leads.append(JUDGE.scores(said).max() - 0.7)
        told.append(luck(JUDGE, said))
    assert np.mean(told) == pytest.approx(np.mean(leads), rel=0.35)


def test_finalists_come_from_several_families():
    def row(number, family, score):
        scores = dict.fromkeys(("score", "balanced_accuracy", "macro_f1", "worst_recall"), score)
        return head_row(number, HeadSpec(family), 0) | scores | {"status": "done"}

    rows = [row(i, "crt", 0.9 - i / 100) for i in range(5)] + [row(5, "lws", 0.5), row(6, "cosine", 0.4)]
    rows.append(head_row(7, HeadSpec("crt"), 0))
    assert [row["head"] for row in finalists(rows, 4)] == [0, 1, 5, 6]


class TestResults:
    def row(self, number, score, f1=0.5, status="done"):
        row = head_row(number, HeadSpec("tau_norm"), 0)
        return row | {"status": status, "score": score, "balanced_accuracy": score, "macro_f1": f1, "worst_recall": 0.1}

    def test_ties_go_to_the_other_metrics_and_then_to_the_first(self):
        rows = [self.row(1, 0.6), self.row(2, 0.7), self.row(3, 0.7, f1=0.6), self.row(4, 0.7, f1=0.6)]
        assert max(rows, key=rank)["head"] == 3
        assert max(rows[::-1], key=rank)["head"] == 3

    def test_a_failed_head_never_wins(self):
        failed = self.row(1, None, status="failed")
        assert max([failed, self.row(2, 0.0)], key=rank)["head"] == 2

    def test_unfinished_or_damaged_results_are_named(self, tmp_path):
        with pytest.raises(UserError, match=rf"search {tmp_path} holds no winner.json, so it is not finished; run"):
            read_results(tmp_path)
        head = Head(torch.ones(2, 3), torch.zeros(2))
        write_results(tmp_path, SearchResult([self.row(0, 0.5)], {"tau_norm": head}, "tau_norm", "balanced_accuracy"))
        (tmp_path / "results.parquet").write_bytes(b"PAR1")
        with pytest.raises(UserError, match=rf"search {tmp_path} cannot be read \(.+\); delete it and run"):
            read_results(tmp_path)
