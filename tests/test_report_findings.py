"""The figures behind the report's words, against plain loops and by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from tests.reports import COUNTS, confusion, row, some_inputs
from trainer.findings import (
    best_per_family,
    classes_in_confusions,
    heads_tried,
    imbalance,
    most_confused,
    rarest_last,
    row_shares,
    thinly_tested,
)
from trainer.page import DASH, MINUS, change, duration, percent
from trainer.report import ResultRow, render


def test_row_shares_and_confused_pairs_against_loops():
    inputs = some_inputs()
    counts = np.array(inputs.winner_confusion)
    pairs = []
    for i in range(5):
        total = sum(counts[i])
        for j in range(5):
            if total:
                assert row_shares(counts)[i, j] == pytest.approx(counts[i][j] / total)
            else:
                assert math.isnan(row_shares(counts)[i, j])
            if i != j and counts[i][j] > 0:
                pairs.append((-counts[i][j] / total, -counts[i][j], i, j))
    found = most_confused(inputs.winner_confusion, inputs.own_confusion, limit=6)
    assert [(p.true, p.predicted) for p in found] == [pair[2:] for pair in sorted(pairs)[:6]]
    first = found[0]
    before = np.array(inputs.own_confusion)
    assert (first.images, first.of) == (counts[first.true, first.predicted], counts[first.true].sum())
    assert first.share_before == pytest.approx(before[first.true, first.predicted] / before[first.true].sum())


def test_classes_in_confusions_are_the_ones_that_are_confused():
    confusion = np.diag([50] * 6)
    confusion[4, 1], confusion[2, 5] = 30, 1
    assert classes_in_confusions(confusion.tolist(), 2).tolist() == [1, 4]
    assert classes_in_confusions(confusion.tolist(), 4).tolist() == [1, 2, 4, 5]
    assert classes_in_confusions(confusion.tolist(), 99).tolist() == list(range(6))


def test_order_imbalance_and_thin_classes():
    inputs = some_inputs()
    assert rarest_last(inputs) == [0, 2, 4, 1, 3]
    assert imbalance(COUNTS["train"]) == pytest.approx(900 / 8)
    assert imbalance([0, 10, 5]) == 2
    assert thinly_tested(inputs) == [1, 3]


def test_best_of_each_family_and_heads_tried():
    inputs = some_inputs()
    best = best_per_family(inputs.search)
    scores = [row["score"] for row in inputs.search if row["family"] == "crt" and row["score"] is not None]
    assert best[0]["family"] == "crt" and best[0]["score"] == max(scores)
    # tau-norm and the own classifier tie at 0.5: of equal scores the first stands.
    assert [row["head"] for row in best[1:]] == [0, 9]
    assert heads_tried(inputs) == 12


def test_finalists_are_chosen_by_their_lower_bound():
    rows = [
        {"head": 0, "family": "crt", "score": 0.9, "lower_bound": None},
        {"head": 1, "family": "crt", "score": 0.8, "lower_bound": 0.7},
        {"head": 2, "family": "lws", "score": 0.7, "lower_bound": 0.72},
    ]
    assert [row["head"] for row in best_per_family(rows)] == [2, 1]


def test_the_search_tells_how_the_head_was_chosen():
    choice = {"folds": 5, "lower_bound": 0.61, "seeds_score": 0.68, "seeds": 3, "luck": 0.021, "score": 0.7}
    inputs = dataclasses.replace(some_inputs(), choice={**choice, "families": {"own": 0.6}})
    page = render(inputs)
    assert "in 5 folds by groups" in page and "68.0 % over 3 seeds, at least 61.0 %" in page
    assert "classifier by +10.0 points" in page
    assert "would lead by +2.1 points by luck alone" in page


def test_numbers_in_words():
    assert [percent(share) for share in (0.7381, 0, 1, None, math.nan)] == ["73.8", "0.0", "100.0", DASH, DASH]
    assert 'class="up">+11.7<' in change(0.621, 0.738)
    assert f'class="down">{MINUS}8.3<' in change(0.9, 0.817)
    assert 'class="none">0.0<' in change(0.5, 0.5001)
    assert change(None, 0.5) == change(0.5, math.nan) == f'<span class="none">{DASH}</span>'
    assert [duration(s) for s in (4.21, 59.4, 200, 7500)] == ["4.2 s", "59 s", "3 min 20 s", "2 h 05 min"]


def test_rows_are_read_from_metrics_json():
    winner = row("winner", confusion(2))
    values = {**dataclasses.asdict(winner), "interval": list(winner.interval), "of another version": 0.9}
    values.pop("detail")
    assert ResultRow.read(values) == winner


def test_rows_are_found_by_name():
    inputs = dataclasses.replace(some_inputs(), own="crt")
    assert inputs.row(inputs.own).description == "model crt"
