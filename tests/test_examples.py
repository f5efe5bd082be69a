"""Training examples beside a model: which are kept, which are nearest, and when an image is unlike them."""

import json

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from tests.test_export import _parts
from trainer import examples as module
from trainer.examples import (
    NEIGHBOURS,
    QUANTILE,
    choose_examples,
    conformal_quantile,
    evenly_chosen,
    nearest,
    parse_examples,
    save_examples,
)
from trainer.export import EXAMPLES_FILE, load_model, save_model
from trainer.features import Features

DIM = 96  # of the network of `_parts`
draw = np.random.default_rng


def features(count, seed=0, classes=4, views=1):
    x = draw(seed).normal(size=(views * count, DIM)).astype(np.float16)
    names = np.array([f"key{seed}-{number}" for number in range(count)], dtype=object)
    return Features(names, draw(seed + 9).integers(0, classes, count), names, np.arange(count), x, views)


def unit(x):
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def store():
    return choose_examples(features(60), features(40, seed=1), 2**20, seed=0)


@pytest.mark.parametrize("block_bytes", [1, 4 * 7 * 10, 2**20], ids=["smallest blocks", "odd blocks", "one block"])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_neighbours_are_those_of_a_plain_search(monkeypatch, block_bytes, k):
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    points, known = draw(0).normal(size=(7, 16)), unit(draw(1).normal(size=(33, 16)))
    found = nearest(torch.from_numpy(points), torch.from_numpy(known).float(), k)
    for row, point in enumerate(unit(points)):
        distances = np.array([np.sqrt(((point - other) ** 2).sum()) for other in known])
        order = np.argsort(distances)[:k]
        assert found.rows[row].tolist() == order.tolist()
        np.testing.assert_allclose(found.distances[row], distances[order], rtol=1e-4)


def test_an_image_is_its_own_neighbour_at_no_distance():
    known = torch.nn.functional.normalize(torch.from_numpy(draw(0).normal(size=(20, 64))).float(), dim=1)
    found = nearest(3 * known, known, 2)
    assert found.rows[:, 0].tolist() == list(range(20))
    assert found.distances[:, 0].max() < 2e-3 < found.distances[:, 1].min()


def test_what_is_kept_is_its_own_neighbour_in_spite_of_its_rounding(store):
    x = torch.from_numpy(features(60).x).float() * (1 + 1e-4 * torch.rand(60, DIM))
    assert store.nearest(x).distances[:, 0].max() < 2e-3


def test_no_image_has_no_neighbours():
    assert nearest(torch.empty(0, 8), torch.eye(8), 3).rows.shape == (0, 3)


@pytest.mark.parametrize("most", [0, 1, 3, 7, 20, 31, 36, 99])
def test_large_classes_give_way_and_rare_ones_stay(most):
    labels = draw(5).permutation(np.repeat([0, 1, 2, 4], [20, 3, 1, 12]))
    chosen = evenly_chosen(labels, most, seed=0)
    assert len(chosen) == min(most, len(labels)) == len(set(chosen.tolist()))
    assert np.array_equal(chosen, np.sort(chosen))
    counts, kept = np.bincount(labels), np.bincount(labels[chosen], minlength=5)
    for name in range(5):  # a class that lost some has as many as any other, or one less
        assert kept[name] == counts[name] or kept[name] >= kept.max() - 1
    assert np.array_equal(chosen, evenly_chosen(labels, most, seed=0))


def test_which_of_a_large_class_are_kept_is_drawn():
    labels = np.zeros(1000, dtype=int)
    first, second = (set(evenly_chosen(labels, 100, seed).tolist()) for seed in (0, 1))
    assert len(first & second) < 30 and max(first) > 900


@pytest.mark.parametrize("count, place", [(1, 1), (18, 18), (19, 19), (39, 38), (99, 95), (100, 96)])
def test_the_quantile_is_the_conformal_one(count, place):
    values = draw(count).normal(size=count)
    assert conformal_quantile(values, 0.95) == sorted(values)[place - 1]


def test_of_images_like_the_held_out_ones_no_more_are_flagged_than_was_said():
    values = draw(0).exponential(size=(20_000, 40))
    flagged = np.mean([row[-1] > conformal_quantile(row[:-1], 0.9) for row in values])
    assert 0.9 * 0.1 < flagged < 1.06 * 0.1  # 4 of the 40 places; 20,000 draws: standard error .002


def test_the_rule_follows_from_the_held_out_distances(store):
    train, val = unit(features(60).x), unit(features(40, seed=1).x)
    distances = sorted(np.sort(np.linalg.norm(train - point, axis=1))[NEIGHBOURS - 1] for point in val)
    assert (store.rule.k, store.rule.quantile, store.rule.held_out_images) == (NEIGHBOURS, QUANTILE, 40)
    assert store.rule.distance == pytest.approx(distances[38], rel=1e-3)  # 39 of 40: .95 x 41, rounded up
    assert np.array_equal(store.labels, features(60).labels) and store.keys.tolist() == features(60).keys.tolist()
    np.testing.assert_allclose(store.unit, train, atol=1e-6)


def test_of_several_views_the_first_is_kept():
    one, several = features(30), features(30, views=3)
    several.x[:30] = one.x
    kept = [choose_examples(train, one, 2**20, seed=0).features for train in (one, several)]
    assert torch.equal(*kept)


def test_fewer_examples_than_neighbours():
    small = choose_examples(features(3), features(9, seed=1), 2**20, seed=0)
    assert small.rule.k == 3 and small.nearest(torch.randn(2, DIM)).rows.shape == (2, 3)


def test_the_file_keeps_within_its_bound():
    train = features(5000, classes=40)
    data, _ = save_examples(choose_examples(train, features(40, seed=1), 100_000, seed=0))
    kept = 100_000 // (2 * DIM)
    assert 2 * DIM * kept < len(data) < 100_000 + 32 * kept  # keys and labels come on top


def test_it_comes_back_with_the_model(tmp_path, store):
    save_model(tmp_path, *_parts(), store)
    back = load_model(tmp_path).examples
    assert back.rule == store.rule and back.keys.tolist() == store.keys.tolist()
    assert np.array_equal(back.labels, store.labels) and torch.equal(back.features, store.features)
    assert json.loads((tmp_path / "model.json").read_text())["unlike_training"] == {
        "k": NEIGHBOURS,
        "distance": store.rule.distance,
        "quantile": QUANTILE,
        "held_out_images": 40,
    }


def test_it_may_be_deleted_before_the_model_is_passed_on(tmp_path, store):
    save_model(tmp_path, *_parts(), store)
    (tmp_path / EXAMPLES_FILE).unlink()
    assert load_model(tmp_path).examples is None


def test_saved_again_without_them_the_folder_has_none(tmp_path, store):
    save_model(tmp_path, *_parts(), store)
    save_model(tmp_path, *_parts())
    assert not (tmp_path / EXAMPLES_FILE).exists() and load_model(tmp_path).examples is None


def test_altered_examples_are_refused(tmp_path, store):
    save_model(tmp_path, *_parts(), store)
    other, _ = save_examples(choose_examples(features(60, seed=3), features(40, seed=1), 2**20, seed=0))
    (tmp_path / EXAMPLES_FILE).write_bytes(other)
    with pytest.raises(UserError, match=r"examples\.safetensors was altered or is damaged \(its SHA-256 does not"):
        load_model(tmp_path)


RULE = {"k": 5, "distance": 0.3, "quantile": 0.95, "held_out_images": 40}


@pytest.mark.parametrize(
    "change, num_classes, dim, message",
    [
        ({}, 4, DIM + 1, "no finite float16 features of 97 values"),
        ({}, 3, DIM, "labels are not one an example, of the model's classes"),
        ({"k": 0}, 4, DIM, "the rule compares with neighbour 0 of 60 training examples"),
        ({"k": 61}, 4, DIM, "the rule compares with neighbour 61 of 60 training examples"),
    ],
)
def test_examples_of_another_model_are_refused(store, change, num_classes, dim, message):
    data, _ = save_examples(store)
    assert parse_examples(data, RULE, 4, DIM).rule.distance == 0.3
    with pytest.raises(ValueError, match=message):
        parse_examples(data, RULE | change, num_classes, dim)
