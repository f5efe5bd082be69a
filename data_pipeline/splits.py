"""Who learns from what: grouped, stratified splits, and near-duplicates that join a group before the cut.

Shapes: N samples, C classes, U unique hashes, P pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from cluster.errors import UserError
from data_pipeline.config import SplitConfig
from data_pipeline.dataset import SPLITS

HASH_BITS = 64
COMPARE_BLOCK = 2048
"""Hashes compared at once: 2048 x 2048 distances are 32 MiB."""


def assign_splits(
    labels: np.ndarray,
    groups: np.ndarray,
    config: SplitConfig,
    seed: int,
    classes: Sequence[str],
    into: Sequence[str] = SPLITS,
) -> np.ndarray:
    """Share samples out over train, val and test, class by class and never through a group.

    Classes are dealt out from the one with the fewest groups to the one with the most, the groups of a class from the
    largest to the smallest, equal ones in an order drawn from `seed`. Each group goes to the split that lacks most
    samples of that class, but the last groups of a class are kept for splits that have none of it yet. A group with
    samples of several classes is dealt out with the first of them and counts for each.

    Args:
        labels: int [N], into `classes`.
        groups: [N], names of patients or lesions.
        config: Shares.
        seed: Draws the order of equal groups; the result depends on nothing else, not on the samples' order either.
        classes: Names, for the error.
        into: The splits to share out over, in the proportion of their shares.

    Returns:
        object [N] of the names in `into`.

    Raises:
        UserError: A class has fewer groups than there are splits.
    """
    shares = np.array([getattr(config, split) for split in into])
    return _deal(labels, groups, shares / shares.sum(), seed, classes, into)


def _deal(
    labels: np.ndarray, groups: np.ndarray, shares: np.ndarray, seed: int, classes: Sequence[str], into: Sequence[str]
) -> np.ndarray:
    """`assign_splits` by `shares` of the samples, which sum to 1."""
    names, group = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    sizes = np.zeros((len(names), len(classes)), dtype=np.int64)  # samples by group and class
    np.add.at(sizes, (group, labels), 1)
    num_groups = (sizes > 0).sum(axis=0)
    _check_groups(num_groups, classes, into)
    lot = np.array([hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in names])
    split_of = np.full(len(names), -1)
    held = np.zeros((len(into), len(classes)), dtype=np.int64)  # samples by split and class
    for label in sorted(range(len(classes)), key=lambda c: (num_groups[c], classes[c])):
        target = shares * sizes[:, label].sum()
        waiting = np.flatnonzero((sizes[:, label] > 0) & (split_of < 0))
        waiting = waiting[np.lexsort((lot[waiting], -sizes[waiting, label]))]
        for position, which in enumerate(waiting):
            lacking = target - held[:, label]
            empty = held[:, label] == 0
            if len(waiting) - position <= empty.sum():
                lacking = np.where(empty, lacking, -np.inf)
            split_of[which] = lacking.argmax()
            held[split_of[which]] += sizes[which]
    _check_splits(held, classes, into)
    return np.array(into, dtype=object)[split_of[group]]


def complete_splits(
    given: np.ndarray, labels: np.ndarray, groups: np.ndarray, config: SplitConfig, seed: int, classes: Sequence[str]
) -> np.ndarray:
    """Keep the splits that a source gives; cut those that it lacks, val or test or both, out of its training samples.

    Args:
        given: object [N] of train, val, test; not all three need occur.
        labels: int [N], into `classes`.
        groups: [N], near-duplicates joined: no group of the training samples is cut. What given splits share stays.
        config: Shares of what is cut.
        seed: As in `assign_splits`.
        classes: Names, for errors.

    Returns:
        object [N] of "train", "val", "test".

    Raises:
        UserError: A class has no given training sample, or too few groups of them to cut.
    """
    train = given == "train"
    unseen = np.flatnonzero(np.bincount(labels[train], minlength=len(classes)) == 0)
    if len(unseen):
        elsewhere = sorted(set(given[labels == unseen[0]]))
        raise UserError(
            f"class {classes[unseen[0]]!r} is in the given {' and '.join(elsewhere)} and not in train, where it would "
            "have to be learnt; give train some of it, or leave the class out"
        )
    lacking = [split for split in SPLITS if split not in set(given)]
    splits = given.copy()
    if lacking:
        splits[train] = assign_splits(labels[train], groups[train], config, seed, classes, ("train", *lacking))
    return splits


def cut_fold(
    splits: np.ndarray, labels: np.ndarray, groups: np.ndarray, config: SplitConfig, seed: int, classes: Sequence[str]
) -> np.ndarray:
    """Cut train and val together into `config.folds` parts, each of which is val once; test stays as it is.

    Args:
        splits: object [N] of train, val, test.
        labels: int [N], into `classes`.
        groups: [N], near-duplicates joined; none is cut.
        config: How many folds, and which of them is val.
        seed: As in `assign_splits`; the same for all folds of a set.
        classes: Names, for errors.

    Returns:
        object [N] of "train", "val", "test".

    Raises:
        UserError: A class has fewer groups than there are folds.
    """
    pooled = np.flatnonzero(splits != "test")
    pairs = {(int(label), group) for label, group in zip(labels[pooled], groups[pooled], strict=True)}
    num_groups = np.bincount([label for label, _ in pairs], minlength=len(classes))
    rarest = int(num_groups.argmin())
    if num_groups[rarest] < config.folds:
        raise UserError(
            f"class {classes[rarest]!r} has {num_groups[rarest]} groups (patients or lesions) outside of test, too few "
            f"for folds = {config.folds}; lower folds, add images of other patients, or leave the class out"
        )
    names = tuple(f"fold {number}" for number in range(config.folds))
    shares = np.full(config.folds, 1 / config.folds)
    part = _deal(labels[pooled], groups[pooled], shares, seed, classes, names)
    cut = splits.copy()
    cut[pooled] = np.where(part == names[config.fold], "val", "train")
    return cut


def long_tail(labels: np.ndarray, groups: np.ndarray, keys: np.ndarray, imbalance: float, seed: int) -> np.ndarray:
    """Which training samples stay, so that the classes have a long tail: n_c = n_max * imbalance^(-c / (C - 1)).

    The exponential profile of CIFAR-LT (Cao et al. 2019, arXiv:1906.07413, section 4.1), there over the classes in
    their order, here from the commonest (c = 0) to the rarest; a class that has less keeps all it has. As there only
    training samples are meant for it: val and test keep what they have, which makes their recalls more certain. Whole
    groups stay, in an order drawn from `seed`, and of the last one as much as is needed: a rare disease is seen in few
    patients.

    Args:
        labels: int [N].
        groups: [N], names of patients or lesions.
        keys: [N], unique; decide which samples of the last group stay.
        imbalance: n_max over the n_c of the rarest class.
        seed: Draws the groups; the result depends on nothing else, not on the samples' order either.

    Returns:
        bool [N].
    """
    counts = np.bincount(labels)
    ranked = sorted(np.flatnonzero(counts).tolist(), key=lambda c: (-counts[c], c))
    shares = imbalance ** -np.linspace(0, 1, len(ranked))
    lot = {name: hashlib.sha256(f"{seed}:long tail:{name}".encode()).hexdigest() for name in set(groups.tolist())}
    stays = np.zeros(len(labels), dtype=bool)
    for label, share in zip(ranked, shares.tolist(), strict=True):
        ours = sorted(np.flatnonzero(labels == label).tolist(), key=lambda i: (lot[groups[i]], keys[i]))
        stays[ours[: max(1, round(counts.max() * share))]] = True
    return stays


def join_near_duplicates(groups: np.ndarray, hashes: np.ndarray, max_bits: int) -> np.ndarray:
    """Join the groups of all images whose perceptual hashes differ in at most `max_bits` bits, and so on from there.

    Args:
        groups: [N] names.
        hashes: uint64 [N]; 0 = no hash, joins nothing.
        max_bits: Largest distance; negative = join nothing.

    Returns:
        object [N]: names; a joined group is called after the first, in alphabetical order, of its members.
    """
    names, group = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    parent = np.arange(len(names))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def join(links: np.ndarray) -> None:
        for left, right in np.unique(links, axis=0).tolist():
            low, high = sorted((root(left), root(right)))
            parent[high] = low

    if max_bits >= 0:
        values, first, which = np.unique(np.asarray(hashes, dtype=np.uint64), return_index=True, return_inverse=True)
        same = np.flatnonzero(hashes != 0)
        join(np.stack([group[same], group[first[which[same]]]], axis=1))
        for pairs in near_pairs(values, max_bits):
            join(group[first[pairs]])
    return names[[root(node) for node in range(len(names))]][group]


def near_pairs(values: np.ndarray, max_bits: int) -> Iterator[np.ndarray]:
    """All pairs of distinct hashes that differ in 1 to `max_bits` bits, without comparing each with each.

    Cut into `max_bits` + 1 bands of bits, two such hashes agree in at least one band (pigeonhole), so only hashes that
    agree in a band are compared: N^2 / 2^(64 / (max_bits + 1)) comparisons a band for evenly spread hashes.

    Args:
        values: uint64 [U], distinct; 0 is no hash and pairs with nothing.
        max_bits: Largest distance.

    Yields:
        int64 [P, 2]: positions in `values`; a pair may come more than once.
    """
    known = np.flatnonzero(values)
    edges = np.linspace(0, HASH_BITS, max_bits + 2).round().astype(int).tolist()
    for low, high in pairwise(edges):
        band = (values[known] >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order])) + 1
        for bucket in np.split(known[order], starts):
            if len(bucket) > 1:
                yield from _compare(values, bucket, max_bits)


def _compare(values: np.ndarray, bucket: np.ndarray, max_bits: int) -> Iterator[np.ndarray]:
    for i in range(0, len(bucket), COMPARE_BLOCK):
        for j in range(i, len(bucket), COMPARE_BLOCK):
            left, right = bucket[i : i + COMPARE_BLOCK], bucket[j : j + COMPARE_BLOCK]
            distance = np.bitwise_count(values[left][:, None] ^ values[right][None])
            rows, columns = np.nonzero((distance <= max_bits) & (distance > 0))
            if len(rows):
                yield np.stack([left[rows], right[columns]], axis=1)


def _check_groups(num_groups: np.ndarray, classes: Sequence[str], into: Sequence[str]) -> None:
    short = [f"class {classes[c]!r} has {num_groups[c]}" for c in np.flatnonzero(num_groups < len(into)).tolist()]
    if short:
        raise UserError(
            f"too few groups (patients or lesions, near-duplicates joined) to split: {', '.join(short)}, and each of "
            f"{', '.join(into[:-1])} and {into[-1]} needs one; add images of other patients or lesions, or leave the "
            "class out (data.split.near_duplicate_bits=-1 joins no near-duplicates)"
        )


def _check_splits(held: np.ndarray, classes: Sequence[str], into: Sequence[str]) -> None:
    for split, label in np.argwhere(held == 0).tolist():
        raise UserError(
            f"class {classes[label]!r} has no group left for {into[split]}: its groups are other classes' too; "
            "add images of other patients or lesions, or leave the class out"
        )
