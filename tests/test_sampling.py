import numpy as np
import pytest
from scipy.stats import chisquare

from cluster.config import parse_config
from cluster.errors import UserError
from data_pipeline.config import SamplingConfig
from data_pipeline.sampling import (
    apportion,
    batches_per_class,
    class_probabilities,
    deal_classes,
    epoch_classes,
    generator,
    progressive,
    round_fairly,
    weighted_probabilities,
)

COUNTS = np.array([700, 120, 30, 0, 5])
CLASSES = ("nevus", "keratosis", "melanoma", "vascular", "dermatofibroma")


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_probabilities_are_counts_to_the_power(power):
    weights = [count**power if count else 0.0 for count in COUNTS.tolist()]
    expected = [weight / sum(weights) for weight in weights]
    np.testing.assert_allclose(class_probabilities(COUNTS, power), expected, rtol=1e-12)


def test_no_samples_is_a_user_error():
    with pytest.raises(UserError, match="the training split has no samples; pack a source"):
        class_probabilities(np.zeros(3), 1.0)


def test_weights_by_name_are_the_target():
    weights = {"melanoma": 6.0, "nevus": 1.0, "vascular": 0.0, "dermatofibroma": 2.5, "keratosis": 0.5}
    np.testing.assert_allclose(weighted_probabilities(COUNTS, CLASSES, weights), [0.1, 0.05, 0.6, 0, 0.25], rtol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"melanom": 1.0},
            r"class_weights names 'melanom', which is no class of the dataset; did you mean 'melanoma'\?",
        ),
        ({"nevus": None}, r"class_weights has no weight for class 'nevus'; give each class one, 0 = never drawn"),
        (
            {"nevus": None, "melanoma": None, "vascular": None},
            r"class_weights has no weight for class 'nevus' and 2 more; give each class one, 0 = never drawn",
        ),
        (
            {"vascular": 1.5},
            r"class_weights = 1\.5 for class 'vascular', which has no training images; set its weight to 0",
        ),
    ],
)
def test_weights_that_do_not_fit_the_classes_are_user_errors(changes, message):
    weights = dict.fromkeys(CLASSES, 1.0) | {"vascular": 0.0} | changes
    with pytest.raises(UserError, match=f"^{message}$"):
        weighted_probabilities(COUNTS, CLASSES, {name: w for name, w in weights.items() if w is not None})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"power_last": 2}, "power_last = 2 must be less than or equal to 1"),
        ({"class_weights": {"a": -1}}, "class_weights = -1 for class 'a' must be finite and at least 0"),
        ({"class_weights": {"a": float("nan")}}, "class_weights = nan for class 'a' must be finite and at least 0"),
        ({"class_weights": {"a": float("inf")}}, "class_weights = inf for class 'a' must be finite and at least 0"),
        ({"class_weights": {"a": 0.0}}, "class_weights are all 0; give at least one class a weight above 0"),
        ({"class_weights": {}}, "class_weights are all 0; give at least one class a weight above 0"),
        (
            {"class_weights": {"a": 1}, "power": 0.5},
            "class_weights take the place of power and power_last; remove these or class_weights",
        ),
        (
            {"class_weights": {"a": 1}, "power_last": 0},
            "class_weights take the place of power and power_last; remove these or class_weights",
        ),
        (
            {"samples_per_class": 4},
            "classes_per_batch and samples_per_class go together; set both or neither",
        ),
    ],
)
def test_sampling_that_contradicts_itself_is_refused(values, message):
    with pytest.raises(UserError, match=f"^test.yaml: {message}$"):
        parse_config(SamplingConfig, values, "test.yaml")


def test_the_progressive_mixture_goes_from_the_first_to_the_last_epoch():
    first, last = np.array([0.9, 0.1]), np.array([0.5, 0.5])
    for epoch, expected in [(0, [0.9, 0.1]), (1, [0.8, 0.2]), (2, [0.7, 0.3]), (4, [0.5, 0.5]), (9, [0.5, 0.5])]:
        np.testing.assert_allclose(progressive(first, last, epoch, epochs=5), expected)
    np.testing.assert_array_equal(progressive(first, last, 0, epochs=1), first)


def test_round_fairly_rounds_up_where_a_point_falls():
    """Against the definition: a point at every whole number, stretches laid end to end from `offset` on."""
    rng = np.random.default_rng(5)
    for _ in range(300):
        expected = rng.dirichlet(np.ones(6)) * rng.integers(1, 12)
        order, offset = rng.permutation(6), rng.random()
        begin, counted = offset, np.floor(expected)
        for c in order:
            end = begin + expected[c] % 1
            counted[c] += np.floor(end) - np.floor(begin)
            begin = end
        rounded = round_fairly(expected, order, offset)
        assert rounded.sum() == round(expected.sum())
        np.testing.assert_array_equal(rounded, counted)


def test_round_fairly_takes_what_is_whole_but_for_rounding_as_whole():
    expected = np.array([2.9999999, 1.0000001, 0.5, 1.5])
    for offset in (0.0, 0.3, 0.6, 0.99):
        assert round_fairly(expected, np.arange(4), offset)[:2].tolist() == [3, 1]


@pytest.mark.parametrize("draws", [1, 7, 64, 1000])
def test_apportion_gives_floor_or_ceil_and_no_more(draws):
    probabilities = class_probabilities(COUNTS, 0.5)
    for seed in range(50):
        shares = apportion(probabilities, draws, np.random.default_rng(seed))
        assert shares.sum() == draws
        assert (shares >= np.floor(probabilities * draws)).all()
        assert (shares <= np.ceil(probabilities * draws)).all()


def test_apportion_is_exact_where_shares_are_whole_numbers():
    counts = np.array([3, 1, 4, 1, 5, 9])
    shares = apportion(class_probabilities(counts, 1.0), int(counts.sum()), np.random.default_rng(0))
    np.testing.assert_array_equal(shares, counts)


def test_apportion_starves_no_class():
    """A class that is due 0.1 draws an epoch gets one in every tenth epoch; largest remainders would never draw it."""
    probabilities = np.array([0.5, 0.49, 0.01])
    total = sum(apportion(probabilities, 10, generator(0, "draws", epoch)) for epoch in range(4000))
    np.testing.assert_allclose(total / 4000, probabilities * 10, atol=0.03)


def test_batches_per_class_caps_at_once_a_batch():
    probabilities = np.array([0.8, 0.1, 0.05, 0.05])
    expected = batches_per_class(probabilities, steps=10, classes_per_batch=2)
    np.testing.assert_allclose(expected, [10, 5, 2.5, 2.5])
    np.testing.assert_allclose(batches_per_class(probabilities, 10, 4), [10, 10, 10, 10])


def test_more_classes_a_batch_than_classes_is_a_user_error():
    with pytest.raises(UserError, match=r"classes_per_batch = 5 is more than the 4 classes .* set it to at most 4"):
        batches_per_class(class_probabilities(COUNTS, 0.0), 10, 5)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_dealt_batches_hold_different_classes_in_the_numbers_asked_for(steps):
    batches = apportion(np.full(6, 1 / 6), steps * 4, np.random.default_rng(1))
    table = deal_classes(batches, steps, np.random.default_rng(2))
    assert table.shape == (steps, 4)
    np.testing.assert_array_equal(np.bincount(table.ravel(), minlength=6), batches)
    assert all(len(set(row)) == 4 for row in table.tolist())


def test_dealt_classes_meet_each_other_evenly():
    """Every pair of equally frequent classes shares a batch equally often, as in the uniform distribution."""
    meetings = np.zeros((8, 8))
    for seed in range(60):
        table = deal_classes(np.full(8, 30), 60, np.random.default_rng(seed))
        present = np.zeros((60, 8))
        np.put_along_axis(present, table, 1, axis=1)
        meetings += present.T @ present
    pairs = meetings[np.triu_indices(8, 1)]
    # In one batch of P = 4 of 8 classes a pair is there with probability (4/8) * (3/7).
    np.testing.assert_allclose(pairs / (60 * 60), 4 / 8 * 3 / 7, rtol=0.1)


def test_classes_of_an_epoch_are_a_shuffled_multiset():
    classes = epoch_classes(np.array([300, 200, 100]), np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(classes), [300, 200, 100])
    first_half = np.bincount(classes[:300], minlength=3)
    assert chisquare(first_half, [150, 100, 50]).pvalue > 1e-3


def test_generators_of_different_purposes_differ():
    draws = {generator(*key).integers(1 << 60) for key in [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1)]}
    assert len(draws) == 4
    assert generator(0, "a", 1).integers(1 << 60) in draws
