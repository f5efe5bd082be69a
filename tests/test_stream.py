"""The planned order: class frequencies, even use of samples, world sizes, resuming, threads."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import chisquare

from cluster.errors import UserError
from data_pipeline.config import SamplingConfig
from data_pipeline.stream import TrainStream
from tests.packed import bare_index

CLASSES = ("nevus", "keratosis", "melanoma", "vascular", "dermatofibroma")
COUNTS = (1500, 400, 90, 21, 5)
BATCH, STEPS, EPOCHS = 64, 31, 5
SAMPLES_PER_SHARD = 50
WEIGHTS = {"nevus": 2.0, "keratosis": 1.0, "melanoma": 4.5, "vascular": 0.0, "dermatofibroma": 0.5}
P_4_K_16 = {"classes_per_batch": 4, "samples_per_class": 16}
P_2_K_32 = {"classes_per_batch": 2, "samples_per_class": 32}
SAMPLINGS = {
    "natural": {"power": 1.0},
    "q = 0.75": {"power": 0.75},
    "square root": {"power": 0.5},
    "q = 0.2": {"power": 0.2},
    "balanced": {"power": 0.0},
    "progressive": {"power": 1.0, "power_last": 0.0},
    "weights": {"class_weights": WEIGHTS},
    "P x K": {"power": 0.0, **P_4_K_16},
    "P x K, natural": {"power": 1.0, **P_2_K_32},
    "P x K, progressive": {"power": 1.0, "power_last": 0.0, **P_2_K_32},
    "P x K, weights": {"class_weights": WEIGHTS, **P_2_K_32},
}
each_sampling = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)


def make_index():
    """Body classes shuffled over shards 0.., tail classes in the shards after them."""
    labels = np.repeat(np.arange(5), COUNTS)
    body = np.random.default_rng(0).permutation(labels[labels < 2])
    labels = np.concatenate([body, labels[labels >= 2]])
    return bare_index(labels, np.arange(len(labels)) // SAMPLES_PER_SHARD)


INDEX = make_index()
TAIL_SHARDS = range(1900 // SAMPLES_PER_SHARD, int(INDEX.shard.max()) + 1)


def make_stream(streams=8, seed=3, index=INDEX, **sampling):
    return TrainStream(index, CLASSES, BATCH, SamplingConfig(**sampling), streams, seed, TAIL_SHARDS, EPOCHS)


def make_small(labels, **sampling):
    return TrainStream(
        bare_index(np.array(labels), np.zeros(len(labels))), CLASSES[:4], 8, SamplingConfig(**sampling), 4, seed=0
    )


def global_batch(stream, epoch, step, world):
    """The ranks' parts put back at their positions."""
    batch = np.full(BATCH, -1)
    for rank in range(world):
        rows, positions = stream.rank_rows(epoch, step, rank, world)
        assert (batch[positions - step * BATCH] == -1).all(), "two ranks own a position"
        batch[positions - step * BATCH] = rows
    assert (batch >= 0).all()
    return INDEX.key[batch].tolist()


def visits(stream, epochs):
    return np.bincount(np.concatenate([stream.plan(epoch) for epoch in epochs]), minlength=len(INDEX))


def target_draws(sampling, epoch):
    """Draws that each class is due, from the definitions."""

    def of_power(power):
        weights = [count**power for count in COUNTS]
        return np.array(weights) / sum(weights)

    if "class_weights" in sampling:
        p = np.array([WEIGHTS[name] for name in CLASSES]) / sum(WEIGHTS.values())
    else:
        first, last = of_power(sampling["power"]), of_power(sampling.get("power_last", sampling["power"]))
        p = (1 - epoch / (EPOCHS - 1)) * first + epoch / (EPOCHS - 1) * last
    if "classes_per_batch" not in sampling:
        return p * STEPS * BATCH
    # In proportion to p, but no class more than once a batch: min(T, x p_c) for the x that makes T * P of them.
    total = STEPS * sampling["classes_per_batch"]
    x = brentq(lambda x: np.minimum(STEPS, x * p).sum() - total, 0, 1e9)
    return np.minimum(STEPS, x * p) * sampling["samples_per_class"]


@each_sampling
def test_class_frequencies_follow_the_target(sampling):
    stream, unit = make_stream(**sampling), sampling.get("samples_per_class", 1)
    for epoch in range(EPOCHS):
        target = target_draws(sampling, epoch)
        realised = np.bincount(INDEX.label[stream.plan(epoch)], minlength=5)
        assert realised.sum() == STEPS * BATCH
        assert (np.abs(realised - target) < unit + 1e-6).all()  # never further than rounding takes it
        drawn = target > 0
        assert not realised[~drawn].any()
        assert chisquare(realised[drawn] / unit, target[drawn] / unit).pvalue > 0.7  # closer than by chance
        np.testing.assert_array_equal(realised, stream.draws_per_class(epoch))


@each_sampling
def test_class_frequencies_follow_the_target_over_a_long_training(sampling):
    """What rounding owes a class in one epoch it gets in the next ones."""
    stream, unit = make_stream(**sampling), sampling.get("samples_per_class", 1)
    epochs = range(EPOCHS - 1, 200)  # the last target stays
    realised = sum(stream.draws_per_class(epoch) for epoch in epochs)
    assert (np.abs(realised - len(epochs) * target_draws(sampling, EPOCHS - 1)) < 4 * unit).all()


@pytest.mark.parametrize("name", ["square root", "progressive", "weights"])
def test_classes_come_at_random_times(name):
    """The class frequencies of any part of an epoch are those of the epoch."""
    stream = make_stream(**SAMPLINGS[name])
    for epoch in range(3):
        whole = stream.draws_per_class(epoch)
        for part in np.array_split(INDEX.label[stream.plan(epoch)], 4):
            expected = whole[whole > 0] / whole.sum() * len(part)
            assert chisquare(np.bincount(part, minlength=5)[whole > 0], expected).pvalue > 1e-4


@each_sampling
@pytest.mark.parametrize("epochs", [[0], [3], [0, 1], [0, 1, 2, 3, 4]], ids=str)
def test_samples_of_a_class_are_drawn_equally_often(sampling, epochs):
    """Floor or ceil of the mean, in each epoch and over all epochs so far: of the rarest class as of the commonest."""
    counts = visits(make_stream(**sampling), epochs)
    for label in range(5):
        of_class = counts[INDEX.label == label]
        assert of_class.max() - of_class.min() <= 1


def test_natural_sampling_visits_no_sample_twice_in_an_epoch():
    stream = make_stream(power=1.0)
    for epoch in range(6):
        assert visits(stream, [epoch]).max() == 1
    assert visits(stream, range(6)).min() >= 5


def test_no_sample_of_a_common_class_is_favoured():
    """Which part of the class an epoch draws, when, and from which shard: all by chance."""
    stream, common = make_stream(power=0.5), np.flatnonzero(INDEX.label == 0)
    early, late = np.zeros(len(INDEX), dtype=int), np.zeros(len(INDEX), dtype=int)
    for epoch in range(40):
        plan = stream.plan(epoch)
        early += np.bincount(plan[: len(plan) // 2], minlength=len(INDEX))
        late += np.bincount(plan[len(plan) // 2 :], minlength=len(INDEX))
    total = (early + late)[common]
    assert total.max() - total.min() <= 1
    # Halves of the epoch, a fair coin each visit: the variance of early - late is the number of visits.
    assert 0.85 < (early - late)[common].var() / total.mean() < 1.15
    for epoch in range(3):  # within an epoch: draws by shard are in proportion to what the shard holds
        drawn = np.bincount(INDEX.shard[common], weights=visits(stream, [epoch])[common])
        held = np.bincount(INDEX.shard[common])
        assert chisquare(drawn, held * drawn.sum() / held.sum()).pvalue > 1e-3


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@each_sampling
def test_every_world_size_sees_the_same_global_batches(world, sampling):
    """The same keys at the same places, unsorted."""
    alone, shared = make_stream(**sampling), make_stream(**sampling)
    for epoch in (0, 2):
        for step in range(alone.steps_per_epoch):
            assert global_batch(shared, epoch, step, world) == global_batch(alone, epoch, step, 1)


@pytest.mark.parametrize("name", ["progressive", "P x K, weights"])
def test_resume_at_any_point_and_world_size_replays_nothing(name):
    """A new process that begins at any step goes on with the same keys in the same order."""
    unbroken = make_stream(**SAMPLINGS[name])
    steps = [(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS)]
    batches = [global_batch(unbroken, *step, world=1) for step in steps]
    rng = np.random.default_rng(0)
    for cut in rng.integers(0, len(steps), 100).tolist():
        resumed, world = make_stream(**SAMPLINGS[name]), int(rng.choice([1, 2, 3, 4, 8]))
        until = cut + 20
        assert [global_batch(resumed, *step, world) for step in steps[cut:until]] == batches[cut:until]


@pytest.mark.parametrize("name", ["progressive", "P x K, progressive"])
def test_an_epoch_does_not_depend_on_what_was_asked_before(name):
    in_order, late, backwards = (make_stream(**SAMPLINGS[name]) for _ in range(3))
    plans = [in_order.plan(epoch).tolist() for epoch in range(60)]
    assert late.plan(59).tolist() == plans[59]
    assert [backwards.plan(epoch).tolist() for epoch in reversed(range(60))] == plans[::-1]


@pytest.mark.parametrize("threads", [2, 8])
def test_any_number_of_threads_gets_the_same_batches(threads):
    alone, shared = make_stream(power=0.5), make_stream(power=0.5)
    steps = [(epoch, step) for step in range(8) for epoch in range(EPOCHS)]  # they contend for the plan
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda step: shared.rank_rows(*step, 1, 2)[0].tolist(), steps))
    assert found == [alone.rank_rows(*step, 1, 2)[0].tolist() for step in steps]


def test_datasets_seeds_and_epochs_have_other_orders():
    label = INDEX.label.copy()
    label[[0, np.flatnonzero(label != label[0])[0]]] = label[[np.flatnonzero(label != label[0])[0], 0]]
    orders = {
        tuple(make_stream(power=0.5, seed=seed, index=index).plan(epoch).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
        for index in (INDEX, replace(INDEX, label=label))
    }
    assert len(orders) == 8
    assert tuple(make_stream(power=0.5, seed=1).plan(1).tolist()) in orders


def test_a_plan_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        make_stream().plan(0)[0] = 1


def test_five_images_in_the_rarest_of_ten_thousand_classes():
    """Their draws equal the plan exactly, on every world size and over the epochs."""
    counts = np.maximum(5, 3000 // np.arange(1, 10_001))
    labels = np.repeat(np.arange(10_000), counts)
    body = np.random.default_rng(0).permutation(labels[counts[labels] > 5])
    labels = np.concatenate([body, labels[counts[labels] == 5]])
    shards = np.arange(len(labels)) // 500
    names = [f"class {c}" for c in range(10_000)]
    stream = TrainStream(
        bare_index(labels, shards), names, 128, SamplingConfig(power=0.0), 8, 0, range(len(body) // 500 + 1, 1000)
    )
    rarest = np.flatnonzero(labels == 9_999)
    assert len(rarest) == 5
    due, drawn = stream.steps_per_epoch * 128 / 10_000, np.zeros(5, dtype=int)
    for epoch, world in enumerate([1, 2, 4, 8, 3, 5]):
        ranks = [(step, rank) for step in range(stream.steps_per_epoch) for rank in range(world)]
        rows = np.concatenate([stream.rank_rows(epoch, step, rank, world)[0] for step, rank in ranks])
        seen = np.bincount(rows, minlength=len(labels))[rarest]
        assert seen.sum() == stream.draws_per_class(epoch)[9_999] in (int(due), int(due) + 1)
        drawn += seen
        assert drawn.max() - drawn.min() <= 1
    assert abs(drawn.sum() - 6 * due) < 2


def test_a_set_smaller_than_a_batch_still_makes_a_step():
    stream = make_small([0, 0, 1], power=0)
    assert stream.steps_per_epoch == 1
    assert sorted(np.bincount(stream.plan(0)).tolist()) == [2, 2, 4]


def test_a_class_without_training_samples_is_never_drawn():
    labels = np.array([0] * 40 + [2] * 8)
    assert set(labels[make_small(labels, power=0).plan(0)].tolist()) == {0, 2}


def test_user_errors():
    with pytest.raises(UserError, match=r"9 workers are more than data\.streams = 8; set data\.streams to at least 9"):
        make_stream().rank_rows(0, 0, 0, 9)
    with pytest.raises(UserError, match=r"batch_size = 64 must be a multiple of data\.streams = 7"):
        make_stream(streams=7)
    with pytest.raises(UserError, match="batch_size = 64 must be classes_per_batch x samples_per_class = 9"):
        make_stream(classes_per_batch=3, samples_per_class=3)
    with pytest.raises(UserError, match="classes_per_batch = 8 is more than the 5 classes that can be drawn"):
        make_stream(classes_per_batch=8, samples_per_class=8)
    with pytest.raises(UserError, match=r"class_weights names 'naevus', .* did you mean 'nevus'"):
        make_stream(class_weights={**WEIGHTS, "naevus": 1})
    with pytest.raises(UserError, match="the index has label 4, but the dataset has 4 classes; pack the dataset again"):
        make_small([0, 4, 1, 2])
    with pytest.raises(UserError, match="the training split has no samples; pack a source"):
        make_small([])
