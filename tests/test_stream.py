import numpy as np
import pytest
from scipy.stats import chisquare

from cluster.errors import UserError
from data_pipeline.config import SamplingConfig
from data_pipeline.stream import WINDOW_SHARDS, TrainStream
from tests.packed import bare_index

COUNTS = (1500, 400, 90, 21, 5)
TAIL = (2, 3, 4)
BATCH = 64
SAMPLES_PER_SHARD = 50


def make_index():
    """Body classes shuffled over shards 0.., tail classes in the shards after them."""
    labels = np.repeat(np.arange(5), COUNTS)
    body = np.random.default_rng(0).permutation(labels[labels < 2])
    labels = np.concatenate([body, labels[labels >= 2]])
    return bare_index(labels, np.arange(len(labels)) // SAMPLES_PER_SHARD)


INDEX = make_index()
TAIL_SHARDS = range(1900 // SAMPLES_PER_SHARD, int(INDEX.shard.max()) + 1)


def make_stream(power=0.5, streams=8, seed=3, **sampling):
    config = SamplingConfig(power=power, **sampling)
    return TrainStream(INDEX, 5, BATCH, config, streams, seed, TAIL_SHARDS)


def global_batch(stream, epoch, step, world):
    """The ranks' parts put back at their positions."""
    batch = np.full(BATCH, -1)
    for rank in range(world):
        rows, positions = stream.rank_rows(epoch, step, rank, world)
        assert (batch[positions - step * BATCH] == -1).all(), "two ranks own a position"
        batch[positions - step * BATCH] = rows
    assert (batch >= 0).all()
    return batch.tolist()


def visits(stream, epochs):
    return np.bincount(np.concatenate([stream.plan(epoch) for epoch in epochs]), minlength=len(INDEX))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_class_frequencies_follow_the_target(power):
    weights = np.array(COUNTS) ** power
    stream = make_stream(power)
    draws = stream.steps_per_epoch * BATCH
    target = weights / weights.sum() * draws
    for epoch in range(3):
        realised = np.bincount(INDEX.label[stream.plan(epoch)], minlength=5)
        assert realised.sum() == draws
        assert np.abs(realised - target).max() < 1
        assert chisquare(realised, target).pvalue > 0.99  # far closer than chance


@pytest.mark.parametrize(
    "sampling", [{"power": 0.0}, {"power": 0.5}, {"classes_per_batch": 4, "samples_per_class": 16}]
)
@pytest.mark.parametrize("epochs", [[0], [3], [0, 1], [0, 1, 2, 3, 4]])
def test_samples_of_a_class_are_drawn_equally_often(sampling, epochs):
    """Floor or ceil of the mean, in each epoch and over all epochs so far."""
    counts = visits(make_stream(**sampling), epochs)
    for label in range(5):
        of_class = counts[INDEX.label == label]
        assert of_class.max() - of_class.min() <= 1


def test_natural_sampling_visits_no_sample_twice_in_an_epoch():
    stream = make_stream(1.0)
    for epoch in range(6):
        assert visits(stream, [epoch]).max() == 1
    assert visits(stream, range(6)).min() >= 5


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("sampling", [{"power": 0.0}, {"classes_per_batch": 4, "samples_per_class": 16}])
def test_every_world_size_sees_the_same_global_batches(world, sampling):
    alone, shared = make_stream(**sampling), make_stream(**sampling)
    for epoch in (0, 2):
        for step in range(alone.steps_per_epoch):
            assert global_batch(shared, epoch, step, world) == global_batch(alone, epoch, step, 1)


def test_resume_at_any_point_and_world_size_replays_nothing():
    unbroken = make_stream(0.0)
    batches = [global_batch(unbroken, epoch, step, 1) for epoch in range(4) for step in range(31)]
    rng = np.random.default_rng(0)
    for cut in rng.integers(0, len(batches), 100).tolist():
        resumed = make_stream(0.0)
        epoch, step = divmod(cut, resumed.steps_per_epoch)
        assert global_batch(resumed, epoch, step, int(rng.choice([1, 2, 3, 4, 8]))) == batches[cut]


def test_seeds_and_epochs_give_other_orders():
    orders = {tuple(make_stream(seed=seed).plan(epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_p_times_k_batches():
    stream = make_stream(0.0, classes_per_batch=4, samples_per_class=16)
    for epoch in range(3):
        used = np.zeros(5, dtype=int)
        for step in range(stream.steps_per_epoch):
            rows = np.array(global_batch(stream, epoch, step, 1))
            classes, sizes = np.unique(INDEX.label[rows], return_counts=True)
            assert sizes.tolist() == [16] * 4
            used[classes] += 1
            for label in classes:
                distinct = len(set(rows[INDEX.label[rows] == label].tolist()))
                assert distinct == min(16, COUNTS[label]), "a class with samples enough repeats none in a batch"
        assert used.max() - used.min() <= 1


def test_the_power_chooses_the_classes_of_p_times_k_batches_too():
    stream = make_stream(1.0, classes_per_batch=2, samples_per_class=32)
    used = np.bincount(INDEX.label[stream.plan(0)], minlength=5) / 32
    weights = np.array(COUNTS[1:]) / sum(COUNTS[1:])
    assert used[0] == stream.steps_per_epoch  # three quarters of the samples: in every batch, never twice in one
    np.testing.assert_allclose(used[1:], weights * stream.steps_per_epoch, atol=1)


def test_a_rare_sample_comes_back_evenly_over_the_epoch():
    stream = make_stream(0.0)
    plan = stream.plan(0)
    order = plan[INDEX.label[plan] == 4]
    rounds = [set(order[first : first + 5].tolist()) for first in range(0, len(order) - 5, 5)]
    assert all(len(seen) == 5 for seen in rounds)


def test_streams_read_the_body_sequentially():
    """A stream touches few shards in a window of steps, and over the epoch about its share of all shards."""
    labels = np.random.default_rng(1).choice(3, 20_000, p=[0.7, 0.2, 0.1])
    index = bare_index(labels, np.arange(20_000) // 100)
    stream = TrainStream(index, 3, BATCH, SamplingConfig(power=0.5), 4, seed=0)
    shards = index.shard[stream.plan(1)].reshape(-1, 4)  # [position of a stream, stream]
    for number in range(4):
        assert len(np.unique(shards[:, number])) < 200 / 4 * 1.3
        touched = [len(np.unique(part)) for part in np.array_split(shards[:, number], 20)]
        assert np.mean(touched) < 4 * WINDOW_SHARDS  # without order: all 200


def test_a_set_smaller_than_a_batch_still_makes_a_step():
    stream = TrainStream(bare_index(np.array([0, 0, 1]), np.zeros(3)), 2, 8, SamplingConfig(power=0), 4, seed=0)
    assert stream.steps_per_epoch == 1
    assert visits(make_stream(0.0), [0]).sum() == 31 * BATCH
    assert sorted(np.bincount(stream.plan(0)).tolist()) == [2, 2, 4]


def test_a_class_without_training_samples_is_never_drawn():
    stream = TrainStream(bare_index(np.array([0] * 40 + [2] * 8), np.zeros(48)), 4, 8, SamplingConfig(power=0), 4, 0)
    assert set(np.array([0] * 40 + [2] * 8)[stream.plan(0)].tolist()) == {0, 2}


def test_user_errors():
    with pytest.raises(UserError, match=r"9 workers are more than data\.streams = 8; set data\.streams to at least 9"):
        make_stream().rank_rows(0, 0, 0, 9)
    with pytest.raises(UserError, match=r"batch_size = 64 must be a multiple of data\.streams = 7"):
        make_stream(streams=7)
    with pytest.raises(UserError, match="batch_size = 64 must be classes_per_batch x samples_per_class = 9"):
        make_stream(classes_per_batch=3, samples_per_class=3)
    with pytest.raises(UserError, match="classes_per_batch = 8 is more than the 5 classes"):
        make_stream(classes_per_batch=8, samples_per_class=8)


def test_a_million_samples_are_planned_exactly():
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 501)
    labels = np.concatenate([np.arange(500), rng.choice(500, 999_500, p=weights / weights.sum())])
    index = bare_index(labels, np.arange(1_000_000) // 5000)
    stream = TrainStream(index, 500, 256, SamplingConfig(power=0.5), 8, seed=0, tail_shards=range(150, 200))
    counts = np.bincount(stream.plan(7), minlength=1_000_000)
    low = np.full(500, np.iinfo(np.int64).max)
    high = np.zeros(500, dtype=np.int64)
    np.minimum.at(low, labels, counts)
    np.maximum.at(high, labels, counts)
    assert (high - low).max() <= 1
