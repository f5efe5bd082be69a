"""Hardest and semi-hard rows against plain loops in float64."""

from __future__ import annotations

import pytest
import torch

from tests.pairs import EACH_BLOCK, LABELS, NUM_ROWS, PLACES, cut_pool, pairs, pool_of, random_rows
from trainer.pairwise import (
    hardest_rows,
    semi_hard_rows,
)


@pytest.mark.parametrize("block_bytes", [8 * 7 * rows for rows in (1, 4, 5, 22, 23, 100)])
def test_hardest_rows_equal_the_dense_ones_for_any_block(block_bytes):
    pool = random_rows(NUM_ROWS, 4)
    labels = torch.arange(NUM_ROWS) ** 2 % 11  # row 5 + 0 has class 3, ..., some classes have one row only
    anchors, own = pool[5:12], labels[5:12]
    positive, negative = hardest_rows(anchors, own, pool, labels, 5, block_bytes)
    for i in range(7):
        distances = [float((anchors[i] - row).square().sum()) for row in pool]
        positives = [j for j in range(NUM_ROWS) if labels[j] == own[i] and j != 5 + i]
        negatives = [j for j in range(NUM_ROWS) if labels[j] != own[i]]
        assert positive[i] == (max(positives, key=distances.__getitem__) if positives else -1)
        assert negative[i] == min(negatives, key=distances.__getitem__)


def test_hardest_rows_of_collapsed_embeddings_far_from_the_origin():
    # All rows within 0.01 of one point at distance 1,000: |p|^2 - 2ap alone would have lost every digit in float32.
    pool = (1000 + 0.01 * random_rows(200, 4)).float()
    labels = torch.arange(200) % 5
    positive, negative = hardest_rows(pool, labels, pool, labels, 0)
    distances = torch.cdist(pool.double(), pool.double(), compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels[None]
    found = distances[torch.arange(200), positive]
    assert same[torch.arange(200), positive].all() and not same[torch.arange(200), negative].any()
    torch.testing.assert_close(found, distances.masked_fill(~same, -1).amax(1), rtol=1e-4, atol=0)
    found = distances[torch.arange(200), negative]
    torch.testing.assert_close(found, distances.masked_fill(same, torch.inf).amin(1), rtol=1e-4, atol=1e-5)


def loop_semi_hard(anchors, pool, labels, positive_rows, first):
    found = []
    for i, anchor in enumerate(anchors.double()):
        away = [float((anchor - row).square().sum()) for row in pool.double()]
        farther = [j for j in pairs(i, labels, first)[1] if away[j] > away[positive_rows[i]] + 1e-9]
        found.append(min(farther, key=away.__getitem__) if farther and positive_rows[i] >= 0 else -1)
    return found


@EACH_BLOCK
@pytest.mark.parametrize(("num_anchors", "first"), PLACES)
def test_semi_hard_rows_equal_a_loop(num_anchors, first, block, monkeypatch):
    cut_pool(monkeypatch, block)
    pool = pool_of()
    anchors, own = pool[first : first + num_anchors], LABELS[first : first + num_anchors]
    positive_rows, _ = hardest_rows(anchors, own, pool, LABELS, first)
    nearest = torch.tensor([min(pairs(i, LABELS, first)[0], default=-1) for i in range(num_anchors)])
    for rows in (positive_rows, nearest):
        expected = loop_semi_hard(anchors, pool, LABELS, rows, first)
        assert semi_hard_rows(anchors, own, pool, LABELS, rows, first).tolist() == expected


def test_a_negative_as_far_as_the_positive_is_not_farther():
    # Random directions: the equal distances are rounded sums. Rows 3.. are negatives: at the positive's place, at its
    # mirror image (equally far), nearer, and one that is farther by 1 %.
    for seed in range(20):
        for dtype in (torch.float32, torch.float64):
            anchor, step = random_rows(2, 64, seed=seed)
            pool = torch.stack(
                [anchor, anchor + step, anchor, anchor + step, anchor - step, anchor + step / 2, anchor + 1.01 * step]
            ).to(dtype)
            labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
            found = semi_hard_rows(pool[:1], labels[:1], pool, labels, torch.tensor([1]), 0)
            assert found.tolist() == [6]
            assert semi_hard_rows(pool[:1], labels[:1], pool[:6], labels[:6], torch.tensor([1]), 0).tolist() == [-1]


def test_semi_hard_rows_let_nan_through_and_take_no_anchor():
    pool = pool_of()
    pool[20] = torch.nan
    positive_rows, _ = hardest_rows(pool[:7], LABELS[:7], pool, LABELS, 0)
    rows = semi_hard_rows(pool[:7], LABELS[:7], pool, LABELS, positive_rows, 0)
    assert all(row == 20 for row, label in zip(rows, LABELS[:7], strict=True) if label != LABELS[20])
    assert semi_hard_rows(pool[:0], LABELS[:0], pool, LABELS, positive_rows[:0], 0).tolist() == []
