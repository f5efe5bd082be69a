"""Heads trained on several views of an image: an epoch's draws, class counts, folds with val, which has one view."""

from itertools import islice

import numpy as np
import pytest
import torch

from tests.plain_heads import COUNTS, DIM, NUM_CLASSES, clusters, plain_loop
from trainer.features import Features
from trainer.heads import Head, HeadSpec
from trainer.stage_two import TrainingSet, make_heads, sample_orders
from tuning.folds import training_set


@pytest.fixture
def own():
    return Head(torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(1)), torch.zeros(NUM_CLASSES))


def several_views():
    x, labels = clusters(counts=COUNTS * 2)
    rng = np.random.default_rng(7)
    trained = len(labels) - 20
    rows = np.concatenate([x + 0.3, x[:trained] - 0.2, x[:trained] + rng.normal(size=(trained, DIM))])
    view_rows = np.tile(np.arange(len(labels)), (3, 1))
    view_rows[1:, :trained] += len(labels) + np.array([[0], [trained]])
    return rows.astype(np.float32), labels, view_rows, trained


def test_each_view_comes_once_in_so_many_rounds():
    rows = [np.arange(60).reshape(3, 20), np.arange(60, 66).reshape(3, 2)]
    drawn = list(islice(sample_orders(rows, 1.0, 0), 6))
    for order in drawn:
        assert len(order) == 22  # as many draws as images, each image once
        assert np.array_equal(np.sort(np.where(order < 60, order % 20, 20 + order % 2)), np.arange(22))
    for three in (drawn[:3], drawn[3:]):
        assert np.array_equal(np.sort(np.concatenate(three)), np.arange(66))
    first = np.sort(drawn[0])
    assert len(set((first[:20] // 20).tolist())) == 3  # not all images show the same view in a round


def test_balanced_sampling_serves_the_views_of_a_rare_class_equally():
    rows = [np.arange(60).reshape(3, 20), np.arange(60, 66).reshape(3, 2)]
    seen = np.bincount(np.concatenate(list(islice(sample_orders(rows, 0.0, 0), 12))), minlength=66)
    assert seen.sum() == 12 * 22 and seen[60:].sum() == pytest.approx(12 * 11, abs=1)
    assert seen[60:].max() - seen[60:].min() <= 2 and seen[:60].max() - seen[:60].min() <= 1


@pytest.mark.parametrize("family", ["crt", "lws", "balanced_softmax"])
def test_a_head_equals_the_plain_loop(own, family):
    x, labels, view_rows, _ = several_views()
    spec = HeadSpec(family, power=0.5 if family == "crt" else 1.0, lr=2.0, epochs=4, batch_size=64)
    data = TrainingSet(x, labels, COUNTS * 2, view_rows=view_rows, dtype=torch.float64)
    assert len(data) == len(labels) < len(x)
    head = make_heads([spec], data, own)[0]
    of_row = np.empty(len(x), dtype=np.int64)
    of_row[view_rows] = labels
    expected = plain_loop(spec, x, of_row, own, [view_rows[:, labels == c] for c in range(NUM_CLASSES)])
    logits = head.logits(torch.from_numpy(x))
    assert torch.allclose(logits, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_features_that_are_not_held_give_the_same_heads(own):
    x, labels, view_rows, _ = several_views()
    spec = HeadSpec("crt", power=0.0, lr=2.0, epochs=3)
    held, streamed = (
        make_heads([spec], TrainingSet(x, labels, COUNTS * 2, view_rows=view_rows, memory_bytes=budget), own)[0]
        for budget in (2**30, 1000)
    )
    assert torch.allclose(held.weight, streamed.weight, atol=1e-5)


def test_class_means_are_of_the_view_in_which_images_are_evaluated(own):
    x, labels, view_rows, _ = several_views()
    data = TrainingSet(x, labels, COUNTS * 2, view_rows=view_rows)
    head = make_heads([HeadSpec("nearest_class_mean")], data, own)[0]
    alone = make_heads([HeadSpec("nearest_class_mean")], TrainingSet(x[: len(labels)], labels, COUNTS * 2), own)[0]
    assert torch.equal(head.weight, alone.weight)


def test_folds_put_val_with_its_one_view_beside_train():
    x, labels, view_rows, trained = several_views()
    names = np.array([f"{row}" for row in range(len(labels))], dtype=object)
    rows = np.arange(len(labels))
    seen = np.concatenate([x[:trained], x[len(labels) :]])
    train = Features(names[:trained], labels[:trained], names[:trained], rows[:trained], seen, views=3)
    val = Features(names[trained:], labels[trained:], names[trained:], rows[:20], x[trained : len(labels)])
    data = training_set(train, val, np.array([4, 11]), NUM_CLASSES, "cpu")
    assert len(data) == trained + 2
    counts = np.bincount(np.concatenate([labels[:trained], labels[trained:][[4, 11]]]), minlength=NUM_CLASSES)
    assert np.array_equal(data.class_counts, counts)  # images, not views
    assert data.log_prior == pytest.approx(np.log(counts / counts.sum()))
    c = labels[trained + 4]
    table = data.rows_of_class[c]
    assert table.shape == (3, counts[c])
    for v in range(3):
        of_train = np.flatnonzero(labels[:trained] == c)
        assert np.array_equal(data.raw(table[v, : len(of_train)]), x[view_rows[v, of_train]])
        assert any(np.array_equal(row, x[trained + 4]) for row in data.raw(table[v, len(of_train) :]).numpy())
