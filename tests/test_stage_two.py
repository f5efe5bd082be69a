"""Many heads at once against one plain PyTorch loop, and against each other."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from tests.plain_heads import COUNTS, DIM, NUM_CLASSES, clusters, plain_loop
from trainer.heads import TRAINED_FAMILIES, Head, HeadSpec
from trainer.stage_two import TrainingSet, heads_that_fit, make_heads, predict, sample_orders, train_heads


@pytest.fixture
def own():
    return Head(torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(1)), torch.zeros(NUM_CLASSES))


EACH_FAMILY = [
    HeadSpec("crt", power=0.0, lr=3.0, weight_decay=1e-3, epochs=4, batch_size=50, seed=3),
    HeadSpec("crt", power=0.5, lr=0.5, weight_decay=0.0, epochs=2, batch_size=64, seed=4),
    HeadSpec("progressive", power=0.0, lr=2.0, epochs=5, batch_size=64),
    HeadSpec("balanced_softmax", lr=5.0, weight_decay=1e-4, epochs=5, batch_size=256, seed=5),
    HeadSpec("logit_adjusted", tau=1.5, lr=2.0, epochs=3, batch_size=64),
    HeadSpec("reweighted", beta=0.99, lr=1.0, epochs=3, batch_size=64),
    HeadSpec("reweighted", beta=1.0, lr=1.0, epochs=3, batch_size=64),
    HeadSpec("label_aware_smoothing", power=0.0, smoothing=0.4, smoothing_tail=0.1, lr=2.0, epochs=3, batch_size=64),
    HeadSpec("over_smoothing", power=0.0, smoothing=0.98, lr=2.0, epochs=3, batch_size=64),
    HeadSpec("lws", power=0.0, lr=2.0, epochs=3, batch_size=64),
    HeadSpec("cosine", power=0.0, scale=16.0, lr=2.0, epochs=3, batch_size=64),
    HeadSpec("ldam_drw", margin=0.3, scale=16.0, beta=0.99, lr=2.0, epochs=5, batch_size=64),
]


def test_every_trained_family_has_an_oracle():
    assert {spec.family for spec in EACH_FAMILY} == set(TRAINED_FAMILIES)


@pytest.mark.parametrize("spec", EACH_FAMILY, ids=lambda spec: spec.family)
def test_a_head_equals_the_plain_loop(spec, own):
    """Trained beside a longer head of its kind with other settings."""
    x, labels = clusters()
    data = TrainingSet(x, labels, COUNTS, dtype=torch.float64)
    other = replace(spec, lr=0.1, epochs=9, tau=0.2)
    head = make_heads([other, spec], data, own)[1]
    expected = plain_loop(spec, x, labels, own)
    assert torch.allclose(head.logits(torch.from_numpy(x)), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert expected.std() > 0.01


def many_specs():
    """Different families, powers, rates, lengths, seeds and batch sizes, mixed up."""
    rng = np.random.default_rng(5)
    trained = [
        replace(
            spec,
            lr=float(10 ** rng.uniform(-1, 1)),
            weight_decay=float(10 ** rng.uniform(-6, -2)),
            epochs=int(rng.integers(2, 8)),
            batch_size=batch_size,
            seed=seed,
        )
        for spec in EACH_FAMILY
        for seed, batch_size in ((0, 32), (1, 64))
        for _ in range(2)
    ]
    closed = [HeadSpec("tau_norm", tau=0.7), HeadSpec("nearest_class_mean"), HeadSpec("logit_adjustment", tau=1.2)]
    mixed = [*trained, *closed]
    return [mixed[i] for i in rng.permutation(len(mixed))]


def test_a_head_does_not_depend_on_its_neighbours(own):
    x, labels = clusters()
    specs = many_specs()
    together = train_heads(specs, x, labels, COUNTS, own)
    for spec, head in zip(specs, together, strict=True):
        alone = train_heads([spec], x, labels, COUNTS, own)[0]
        scale = float(alone.weight.abs().max())
        assert torch.allclose(head.weight, alone.weight, rtol=0, atol=1e-5 * scale)
        assert torch.allclose(head.bias, alone.bias, rtol=0, atol=1e-5 * max(scale, float(alone.bias.abs().max())))


def test_a_small_memory_budget_changes_nothing(own):
    x, labels = clusters()
    specs = many_specs()
    data = TrainingSet(x, labels, COUNTS)
    small = TrainingSet(x, labels, COUNTS, memory_bytes=12_000)
    assert heads_that_fit(small, 64) == 1 < heads_that_fit(data, 64)
    for wide, narrow in zip(make_heads(specs, data, own), make_heads(specs, small, own), strict=True):
        assert torch.allclose(wide.weight, narrow.weight, rtol=0, atol=1e-5 * float(wide.weight.abs().max()))


def test_heads_of_ten_thousand_classes_are_trained_few_at_a_time():
    """What a head holds grows with the classes: weight, velocity and four arrays of logits of a minibatch."""
    classes, dim = 10_000, 4
    x, labels = np.random.default_rng(0).normal(size=(classes, dim)).astype(np.float32), np.arange(classes)
    own, counts = Head(torch.zeros(classes, dim), torch.zeros(classes)), np.ones(classes)
    specs = [HeadSpec("crt", power=0.0, lr=lr, epochs=1, batch_size=500) for lr in (1.0, 2.0, 3.0)]
    budget = 2 * 2 * classes * (2 * dim + 4 * 500) * 4  # of two heads, in its half
    data = TrainingSet(x, labels, counts, memory_bytes=budget)
    assert heads_that_fit(data, 500) == 2
    for spec, head in zip(specs, make_heads(specs, data, own), strict=True):
        alone = make_heads([spec], data, own)[0]
        assert torch.allclose(head.weight, alone.weight, rtol=0, atol=1e-5 * float(alone.weight.abs().max()))


def test_features_in_a_read_only_float16_memory_map(own, tmp_path):
    x, labels = clusters()
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    spec = HeadSpec("crt", power=0.0, lr=2.0)
    held = make_heads([spec], TrainingSet(x.astype(np.float16).astype(np.float32), labels, COUNTS), own)[0]
    streamed = make_heads([spec], TrainingSet(mapped, labels, COUNTS, memory_bytes=1000), own)[0]
    assert torch.allclose(held.weight, streamed.weight, atol=1e-5)


def test_a_constant_feature_gets_no_weight(own):
    x, labels = clusters()
    x[:, 3] = 7.5
    head = train_heads([HeadSpec("crt", power=0.0)], x, labels, COUNTS, own)[0]
    assert head.weight[:, 3].abs().max() < 1e-6
    assert torch.isfinite(head.weight).all()


def test_closed_forms_use_the_training_features(own):
    x, labels = clusters()
    specs = [HeadSpec("own"), HeadSpec("nearest_class_mean"), HeadSpec("nearest_class_mean", normalise=True)]
    kept, euclidean, cosine = train_heads(specs, x, labels, COUNTS, own)
    assert kept is own
    means = np.stack([x[labels == c].mean(axis=0) for c in range(NUM_CLASSES)])
    assert np.allclose(euclidean.weight, 2 * means, atol=1e-5)
    assert cosine.normalise and np.allclose(
        cosine.weight, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6
    )


def test_rebalanced_heads_lift_the_rarest_classes(own):
    x, labels = clusters(spread=0.5, counts=COUNTS * 4)
    other_x, other_labels = clusters(seed=1, spread=0.5, counts=np.full(NUM_CLASSES, 400))
    specs = [
        HeadSpec("crt", power=1.0, lr=10.0, epochs=20),
        HeadSpec("crt", power=0.0, lr=10.0, epochs=20),
        HeadSpec("balanced_softmax", lr=10.0, epochs=20),
    ]
    heads = train_heads(specs, x, labels, COUNTS * 4, own)
    recall = [
        [float(np.mean(row[other_labels == c] == c)) for c in range(NUM_CLASSES)] for row in predict(heads, other_x)
    ]
    plain, balanced, aware = recall
    assert np.mean(balanced) > np.mean(plain) + 0.02 and np.mean(aware) > np.mean(plain) + 0.02
    assert balanced[-1] > plain[-1] and aware[-1] > plain[-1]


class TestSampleOrders:
    rows = [np.arange(0, 60), np.arange(60, 80), np.arange(80, 84)]  # noqa: RUF012 - read only

    def epochs(self, power, count, seed=0):
        return list(islice(sample_orders(self.rows, power, seed), count))

    def test_natural_sampling_is_a_permutation(self):
        for order in self.epochs(1.0, 3):
            assert np.array_equal(np.sort(order), np.arange(84))

    def test_balanced_sampling_serves_classes_and_their_samples_equally(self):
        seen = np.bincount(np.concatenate(self.epochs(0.0, 30)), minlength=84)
        for rows in self.rows:
            assert seen[rows].sum() == pytest.approx(84 * 30 / 3, abs=1)
            assert seen[rows].max() - seen[rows].min() <= 1

    def test_square_root_sampling_has_its_shares(self):
        seen = np.bincount(np.concatenate(self.epochs(0.5, 50)), minlength=84)
        shares = np.sqrt([60, 20, 4]) / np.sqrt([60, 20, 4]).sum()
        assert [seen[rows].sum() / seen.sum() for rows in self.rows] == pytest.approx(list(shares), abs=0.01)

    def test_progressive_sampling_goes_from_natural_to_its_power_in_equal_steps(self):
        natural, balanced = np.array([60, 20, 4]) / 84, np.full(3, 1 / 3)
        epochs = islice(sample_orders(self.rows, 0.0, 0, progressive_epochs=5), 7)
        for order, share in zip(epochs, (0, 0.25, 0.5, 0.75, 1, 1, 1), strict=True):
            served = [np.isin(order, rows).sum() for rows in self.rows]
            assert served == pytest.approx(84 * ((1 - share) * natural + share * balanced), abs=1)

    def test_the_order_follows_from_the_seed(self):
        assert np.array_equal(self.epochs(0.5, 3)[2], self.epochs(0.5, 3)[2])
        assert not np.array_equal(self.epochs(0.5, 1)[0], self.epochs(0.5, 1, seed=1)[0])


@pytest.mark.parametrize("stack_bytes", [1, 2 * 4 * NUM_CLASSES * DIM, 2**28])
def test_predict_is_each_head_s_argmax(own, monkeypatch, stack_bytes):
    """However many of them are put side by side."""
    monkeypatch.setattr("trainer.stage_two._STACK_BYTES", stack_bytes)
    x, labels = clusters()
    heads = train_heads([*many_specs()[:9], HeadSpec("nearest_class_mean", normalise=True)], x, labels, COUNTS, own)
    expected = [head.logits(torch.from_numpy(x)).argmax(dim=1).numpy() for head in heads]
    assert np.array_equal(predict(heads, x), np.stack(expected))


def test_features_of_another_dataset_are_refused():
    x, labels = clusters()
    with pytest.raises(UserError, match=r"hold labels 0\.\.4 and class 4 3 times, for 4 classes; delete the features"):
        TrainingSet(x, labels, COUNTS[:4])
