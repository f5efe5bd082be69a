"""How often each class is drawn, and how classes are dealt to batches. Pure numpy, no samples here.

Legend: C classes, N draws of an epoch, T steps of an epoch, P classes a batch, K draws of each of them.
"""

from __future__ import annotations

import numpy as np

from cluster.errors import UserError

_TRADES_PER_DOUBLING = 2  # rounds of trades for each doubling of the number of batches: mixed well beyond sight


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


def apportion(probabilities: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Share `draws` out over the classes: each gets floor or ceil of p_c * draws, and p_c * draws in expectation.

    The whole parts are given away first. What is left goes to the remainders by systematic sampling in a random order
    (Madow 1949). Largest remainders would starve a class with p_c * draws < 1/2 for ever; this is fair over epochs.

    Args:
        probabilities: Float [C], not negative, sum 1.
        draws: How many draws there are.
        rng: Decides who gets the remainders.

    Returns:
        Int64 [C] that sums to `draws`.
    """
    expected = np.asarray(probabilities, dtype=np.float64) * draws
    whole_numbers = np.rint(expected)
    expected = np.where(np.abs(expected - whole_numbers) < 1e-6, whole_numbers, expected)  # rounding, not remainders
    shares = np.floor(expected).astype(np.int64)
    left = draws - int(shares.sum())
    if left == 0:
        return shares
    order = rng.permutation(len(expected))
    marks = np.cumsum((expected - np.floor(expected))[order])
    marks *= left / marks[-1]
    marks[-1] = left
    # A class gets a draw when a whole number lies in its stretch of the line, which starts at a random point.
    taken = np.floor(np.concatenate(([0.0], marks)) + rng.random())
    shares[order] += np.diff(taken).astype(np.int64)
    return shares


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
            f"classes_per_batch = {classes_per_batch} is more than the {present} classes that have training images; "
            f"set it to at most {present}"
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
    rounds = _TRADES_PER_DOUBLING * int(np.ceil(np.log2(steps))) + 2 if steps > 1 else 0
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


def _trade(mine: np.ndarray, yours: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One curveball trade for each row pair of two [M, P] tables: shared classes stay, the others are dealt anew."""
    pool = np.sort(np.concatenate([mine, yours], axis=1), axis=1)
    same_as_next = np.zeros(pool.shape, dtype=bool)
    same_as_next[:, :-1] = pool[:, :-1] == pool[:, 1:]
    key = rng.random(pool.shape)
    key[same_as_next] = -1.0  # the first of two equals goes left,
    key[:, 1:][same_as_next[:, :-1]] = 2.0  # the second goes right
    pool = np.take_along_axis(pool, np.argsort(key, axis=1, kind="stable"), axis=1)
    width = mine.shape[1]
    return pool[:, :width], pool[:, width:]
