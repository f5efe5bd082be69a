"""How often each class is drawn, and how classes are dealt to batches. Pure numpy, no samples here.

Legend: C classes, N draws of an epoch, T steps of an epoch, P classes a batch, K draws of each of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from cluster.errors import UserError

_EXTRA_TRADES = 4  # after one round for each doubling of the batches pairs of classes meet as in the long run; margin


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """The random generator of one purpose: a pure function of its arguments, independent of every other one.

    Args:
        seed: The run's seed.
        purpose: Any name; each name gives its own stream of numbers.
        numbers: Further non-negative keys, e.g. the epoch.
    """
    entropy = [seed, int.from_bytes(purpose.encode(), "little"), *numbers]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def class_probabilities(counts: np.ndarray, power: float) -> np.ndarray:
    """p_c ~ n_c^q (Kang et al. 2020, "Decoupling representation and classifier", eq. 1).

    Args:
        counts: Samples of each class, int [C]. Classes without samples get probability 0, whatever the power.
        power: q: 1 natural (instance-balanced), 0.5 square root, 0 class-balanced.

    Returns:
        Float64 [C] that sums to 1.

    Raises:
        UserError: No class has a sample.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if not counts.any():
        raise UserError("the training split has no samples; pack a source with images in its train split")
    weights = np.where(counts > 0, np.maximum(counts, 1.0) ** power, 0.0)
    return weights / weights.sum()


def weighted_probabilities(counts: np.ndarray, classes: Sequence[str], weights: Mapping[str, float]) -> np.ndarray:
    """p_c ~ w_c, the weights given by name.

    Args:
        counts: Samples of each class, int [C].
        classes: Names of the C classes.
        weights: A weight for each of them, finite, none negative, one above 0; 0 = never drawn.

    Returns:
        Float64 [C] that sums to 1.

    Raises:
        UserError: A name is unknown, a class has no weight, or one without samples has a weight above 0.
    """
    known = set(classes)
    for name in (name for name in weights if name not in known):
        nearest = difflib.get_close_matches(name, classes, n=1, cutoff=0.0)[0]
        raise UserError(f"class_weights names {name!r}, which is no class of the dataset; did you mean {nearest!r}?")
    missing = [name for name in classes if name not in weights]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"class_weights has no weight for class {missing[0]!r}{others}; give each class one, 0 = never drawn"
        )
    target = np.array([weights[name] for name in classes], dtype=np.float64)
    for c in np.flatnonzero((target > 0) & (np.asarray(counts) == 0)).tolist():
        raise UserError(
            f"class_weights = {target[c]:g} for class {classes[c]!r}, which has no training images; set its weight to 0"
        )
    return target / target.sum()


def progressive(first: np.ndarray, last: np.ndarray, epoch: int, epochs: int) -> np.ndarray:
    """p(t) = (1 - t/T) p_first + t/T p_last (progressively-balanced sampling, Kang et al. 2020, eq. 2).

    Args:
        first: Probabilities in epoch 0, float [C].
        last: Probabilities in the last epoch and ever after, float [C].
        epoch: t, from 0.
        epochs: T + 1; with a single epoch `first` holds.
    """
    share = min(1.0, epoch / max(1, epochs - 1))
    return (1 - share) * first + share * last


def apportion(probabilities: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Share `draws` out over the classes: each gets floor or ceil of p_c * draws, and p_c * draws in expectation.

    Args:
        probabilities: Float [C], not negative, sum 1.
        draws: How many draws there are.
        rng: Decides who gets the remainders.

    Returns:
        Int64 [C] that sums to `draws`.
    """
    expected = np.asarray(probabilities, dtype=np.float64) * draws
    if not _remainders(expected).any():
        return np.rint(expected).astype(np.int64)
    return round_fairly(expected, rng.permutation(len(expected)), rng.random())


def round_fairly(expected: np.ndarray, order: np.ndarray, offset: float) -> np.ndarray:
    """Round numbers up or down so that their sum stays, each up with its remainder as the probability.

    The remainders lie end to end on a line; whose stretch holds one of the points 1 - offset, 2 - offset, ... is
    rounded up (systematic sampling; Madow 1949). Largest remainders would starve a class that is due less than half a
    draw an epoch for ever; this is fair over epochs.

    Args:
        expected: Float [C], not negative, with a whole number as sum.
        order: The classes' order on the line, int [C].
        offset: In [0, 1); uniform random, or of an evenly spread sequence.

    Returns:
        Int64 [C] of the same sum.
    """
    remainders = _remainders(expected)
    rounded = np.rint(expected - remainders).astype(np.int64)
    marks = np.cumsum(remainders[order])
    left = round(float(expected.sum())) - int(rounded.sum())
    if left:
        marks *= left / marks[-1]  # a sum that rounding has made 2.9999999 holds 3 points
        marks[-1] = left
        rounded[order] += np.diff(np.floor(marks + offset), prepend=0.0).astype(np.int64)
    return rounded


def batches_per_class(probabilities: np.ndarray, steps: int, classes_per_batch: int) -> np.ndarray:
    """In how many of an epoch's P x K batches each class appears: ~ p_c, but in no batch twice.

    A class that would exceed once a batch is capped there and the rest is shared out over the others by p_c again.

    Args:
        probabilities: Float [C], sum 1.
        steps: T.
        classes_per_batch: P.

    Returns:
        Expected numbers of batches, float64 [C], at most T each, sum T * P.

    Raises:
        UserError: Fewer than P classes can be drawn.
    """
    present = int(np.count_nonzero(probabilities))
    if present < classes_per_batch:
        raise UserError(
            f"classes_per_batch = {classes_per_batch} is more than the {present} classes that can be drawn (with "
            f"training images and no weight of 0); set it to at most {present}"
        )
    expected = np.zeros(len(probabilities))
    free = np.asarray(probabilities) > 0
    while free.any():
        left = steps * classes_per_batch - expected[~free].sum()
        expected[free] = probabilities[free] / probabilities[free].sum() * left
        over = free & (expected > steps)
        if not over.any():
            break
        expected[over] = steps
        free &= ~over
    return expected


def deal_classes(batches: np.ndarray, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Choose the P different classes of every batch, each class in exactly `batches[c]` of them.

    Classes laid end to end and wrapped round the batches are one valid table (McNaughton 1959: nothing is longer than
    T). Pairs of batches then trade the classes that only one of them has, at random: this keeps every total and walks
    to the uniform distribution over all valid tables (curveball trades; Strona et al. 2014).

    Args:
        batches: Int [C], each at most T, sum T * P.
        steps: T.
        rng: Decides the trades.

    Returns:
        Class numbers, int64 [T, P].
    """
    line = np.repeat(np.arange(len(batches)), batches)
    table = line.reshape(-1, steps).T.copy()
    rounds = int(np.ceil(np.log2(steps))) + _EXTRA_TRADES if steps > 1 else 0
    for _ in range(rounds):
        partners = rng.permutation(steps)
        half = steps // 2
        table[partners[:half]], table[partners[half : 2 * half]] = _trade(
            table[partners[:half]], table[partners[half : 2 * half]], rng
        )
    return rng.permuted(table, axis=1)


def epoch_classes(draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The class at each position of an epoch: a random order of c repeated `draws[c]` times, [N]."""
    kind = np.uint16 if len(draws) <= np.iinfo(np.uint16).max else np.int32  # 16 bits: numpy sorts them by radix
    return rng.permutation(np.repeat(np.arange(len(draws), dtype=kind), draws))


def _remainders(expected: np.ndarray) -> np.ndarray:
    """What is above the next lower whole number, float64 [C]; 0 where only rounding keeps it from a whole number."""
    remainders = expected - np.floor(expected)
    remainders[np.abs(expected - np.rint(expected)) < 1e-6] = 0.0
    return remainders


def _trade(mine: np.ndarray, yours: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One curveball trade for each row pair of two [M, P] tables: shared classes stay, the others are dealt anew."""
    pool = np.sort(np.concatenate([mine, yours], axis=1), axis=1)
    same_as_next = pool[:, :-1] == pool[:, 1:]
    # Class number in the low half, what it is sorted by in the high half: one sort deals, and no argsort is needed.
    dealt = rng.integers(1, 2**31 - 1, pool.shape) << 32 | pool
    dealt[:, :-1][same_as_next] = pool[:, :-1][same_as_next]  # the first of two equals goes left,
    dealt[:, 1:][same_as_next] |= (2**31 - 1) << 32  # the second goes right
    dealt.sort(axis=1)
    dealt &= 2**32 - 1
    width = mine.shape[1]
    return dealt[:, :width], dealt[:, width:]
