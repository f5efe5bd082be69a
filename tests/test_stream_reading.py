"""In which order the stream reads: the body from front to back, rare samples round by round, P x K batches."""

import numpy as np
import pytest
from scipy.stats import chisquare

from data_pipeline.config import SamplingConfig
from data_pipeline.stream import REPEAT_WINDOWS, WINDOW_SHARDS, TrainStream
from tests.packed import bare_index
from tests.test_stream import BATCH, COUNTS, INDEX, global_batch, make_stream

STREAMS = 4
NUM_SHARDS, SAMPLES_PER_SHARD = 200, 100
BODY_COUNTS = (12_000, 5_000, 2_000, 800, 150, 50)
BODY_LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(6), BODY_COUNTS))
BODY = bare_index(BODY_LABELS, np.arange(20_000) // SAMPLES_PER_SHARD)
WINDOW_DRAWS = WINDOW_SHARDS * SAMPLES_PER_SHARD


def body_stream(**sampling):
    """Nothing is held in memory."""
    return TrainStream(BODY, [str(c) for c in range(6)], BATCH, SamplingConfig(**sampling), STREAMS, seed=0)


def shards_of_streams(stream, epoch):
    """Shard at each draw, [stream, time]."""
    return BODY.shard[stream.plan(epoch)].reshape(-1, STREAMS).T


def open_shards(shards):
    """At each draw of a stream, how many shards it has begun and not yet finished."""
    begins = np.unique(shards, return_index=True)[1]
    ends = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
    change = np.bincount(begins, minlength=len(shards) + 1) - np.bincount(ends + 1, minlength=len(shards) + 1)
    return np.cumsum(change)


@pytest.mark.parametrize(
    ("sampling", "windows"),
    [({"power": 1.0}, 1), ({"power": 0.8}, REPEAT_WINDOWS), ({"power": 0.0}, REPEAT_WINDOWS)],
    ids=["natural", "q = 0.8", "balanced"],
)
def test_each_stream_reads_its_shards_from_front_to_back(sampling, windows):
    """It holds a bounded number of shards open, closes each for good, and reads its own part of the body only."""
    stream = body_stream(**sampling)
    for epoch in range(2):
        by_stream = shards_of_streams(stream, epoch)
        for shards in by_stream:
            assert open_shards(shards).max() <= (windows + 1) * WINDOW_SHARDS
            assert len(np.unique(shards)) <= NUM_SHARDS / STREAMS + (windows + 1) * WINDOW_SHARDS
        assert len(np.unique(by_stream)) == NUM_SHARDS
    orders = [np.unique(shards_of_streams(stream, epoch)[0], return_index=True) for epoch in (0, 1)]
    assert orders[0][0].tolist() != orders[1][0].tolist()  # other shards in the next epoch


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_the_body_is_mixed_at_any_time(power):
    """Each class comes along all the time, however the shards are read."""
    stream = body_stream(power=power)
    whole = stream.draws_per_class(0)
    for part in np.array_split(BODY_LABELS[stream.plan(0)], 8):
        drawn, expected = np.bincount(part, minlength=6), whole / whole.sum() * len(part)
        if power == 1:
            assert chisquare(drawn, expected).pvalue > 1e-4
        once = whole <= BODY_COUNTS
        np.testing.assert_allclose(drawn[once], expected[once], atol=4.5 * np.sqrt(expected[once].max()))
        # Of a class that is drawn r times a sample, chance moves whole samples with all their visits.
        repeats = np.maximum(1, whole / BODY_COUNTS)
        assert (np.abs(drawn - expected) < 4.5 * np.sqrt(expected * repeats)).all()


def test_visits_of_a_body_sample_are_spread_over_windows():
    stream = body_stream(power=0.0)
    in_reading_order = stream.plan(0).reshape(-1, STREAMS).T.ravel()
    window_draws = len(in_reading_order) / (NUM_SHARDS / WINDOW_SHARDS)
    assert np.ceil(stream.draws_per_class(0) / BODY_COUNTS).tolist() == [1, 1, 2, 5, 23, 67]

    places = {row: np.flatnonzero(in_reading_order == row) for row in np.flatnonzero(BODY_LABELS >= 2).tolist()}
    for label in (2, 3):  # up to REPEAT_WINDOWS visits: each in a window of its own
        gaps = np.concatenate([np.diff(places[row]) for row in places if BODY_LABELS[row] == label]) / window_draws
        assert np.mean(gaps < 0.05) < 0.01
        assert 0.5 < np.median(gaps) < 1.5
    for label in (4, 5):  # more: shared out over REPEAT_WINDOWS windows
        stretches = [len(np.unique(places[row] // window_draws)) for row in places if BODY_LABELS[row] == label]
        assert REPEAT_WINDOWS - 1 <= np.mean(stretches) <= REPEAT_WINDOWS + 2


def test_samples_within_a_window_are_shuffled():
    stream = body_stream(power=1.0)
    rows = stream.plan(0).reshape(-1, STREAMS).T[0][:WINDOW_DRAWS]
    assert abs(np.corrcoef(rows % SAMPLES_PER_SHARD, np.arange(WINDOW_DRAWS))[0, 1]) < 0.2
    assert len(np.unique(BODY.shard[rows[: WINDOW_DRAWS // 4]])) == WINDOW_SHARDS


def test_a_rare_sample_in_memory_comes_back_evenly_over_the_epoch():
    plan = make_stream(power=0.0).plan(0)
    order = plan[INDEX.label[plan] == 4]
    rounds = [set(order[first : first + 5].tolist()) for first in range(0, len(order) - 5, 5)]
    assert all(len(seen) == 5 for seen in rounds)


def test_p_times_k_batches():
    stream = make_stream(power=0.0, classes_per_batch=4, samples_per_class=16)
    for epoch in range(3):
        used = np.zeros(5, dtype=int)
        for step in range(stream.steps_per_epoch):
            rows = np.array([int(key[1:]) for key in global_batch(stream, epoch, step, 1)])
            classes, sizes = np.unique(INDEX.label[rows], return_counts=True)
            assert sizes.tolist() == [16] * 4
            used[classes] += 1
            for label in classes:
                distinct = len(set(rows[INDEX.label[rows] == label].tolist()))
                assert distinct == min(16, COUNTS[label]), "a class with samples enough repeats none in a batch"
        assert used.max() - used.min() <= 1


def test_the_power_chooses_the_classes_of_p_times_k_batches_too():
    stream = make_stream(power=1.0, classes_per_batch=2, samples_per_class=32)
    used = np.bincount(INDEX.label[stream.plan(0)], minlength=5) / 32
    weights = np.array(COUNTS[1:]) / sum(COUNTS[1:])
    assert used[0] == stream.steps_per_epoch  # three quarters of the samples: in every batch, never twice in one
    np.testing.assert_allclose(used[1:], weights * stream.steps_per_epoch, atol=1)


def test_p_times_k_draws_of_a_class_come_from_different_places_of_the_body():
    """Up to S of them from S streams, and hence no sample twice in a batch, though one class is drawn 67 times over."""
    sampling = SamplingConfig(power=0.0, classes_per_batch=2, samples_per_class=STREAMS)
    stream = TrainStream(BODY, [str(c) for c in range(6)], 2 * STREAMS, sampling, STREAMS, seed=0)
    batches = stream.plan(0).reshape(-1, 2 * STREAMS)
    for batch in batches[:500]:
        of_stream = BODY_LABELS[batch].reshape(2, STREAMS)
        assert all(len(set(of_stream[:, number].tolist())) == 2 for number in range(STREAMS))
    repeated = [len(set(batch.tolist())) < len(batch) for batch in batches]
    assert np.mean(repeated) < 0.01


def test_p_times_k_batches_read_the_body_nearly_in_order():
    """A class strays by chance from the stream's place in the shards, the less the more samples of it are drawn."""
    stream = body_stream(power=0.5, classes_per_batch=4, samples_per_class=16)
    shards = shards_of_streams(stream, 1).ravel()
    labels = BODY_LABELS[stream.plan(1)].reshape(-1, STREAMS).T.ravel()
    place = np.arange(len(shards)) / len(shards)
    middle = [np.median(place[(shards == shard) & (labels < 2)]) for shard in range(NUM_SHARDS)]
    place_of_shard = np.argsort(np.argsort(middle)) / NUM_SHARDS  # as the commonest classes read them
    window = WINDOW_SHARDS / NUM_SHARDS
    for label, count in enumerate(BODY_COUNTS):
        astray = (place_of_shard[shards] - place + 0.5)[labels == label] % 1 - 0.5  # the last windows reach round
        repeated = REPEAT_WINDOWS * window if stream.draws_per_class(1)[label] > count else 0
        assert np.sqrt(np.mean(astray**2)) < 1 / (2 * np.sqrt(count)) + window + repeated


def test_a_million_samples_are_planned_exactly():
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 501)
    labels = np.concatenate([np.arange(500), rng.choice(500, 999_500, p=weights / weights.sum())])
    index = bare_index(labels, np.arange(1_000_000) // 5000)
    names = [str(c) for c in range(500)]
    stream = TrainStream(index, names, 256, SamplingConfig(power=0.5), 8, 0, tail_shards=range(150, 200))
    counts = np.bincount(stream.plan(7), minlength=1_000_000)
    low = np.full(500, np.iinfo(np.int64).max)
    high = np.zeros(500, dtype=np.int64)
    np.minimum.at(low, labels, counts)
    np.maximum.at(high, labels, counts)
    assert (high - low).max() <= 1
