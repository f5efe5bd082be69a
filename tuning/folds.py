"""Folds of val by whole groups: what a head is scored on, it was not trained on.

Shapes: N samples of val, K folds, G groups, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainer.features import Features
from trainer.stacked import StackedRows
from trainer.stage_two import TrainingSet

SMALL_CLASS = 50
"""With fewer images of some class in val, folds are worth their cost: `folds: auto` makes AUTO_FOLDS of them."""
AUTO_FOLDS = 5


def number_of_folds(wanted: int | str, labels: np.ndarray, groups: np.ndarray) -> int:
    """K: `wanted`, or by default 5 where some class has fewer than 50 images in val; 1 = no folds.

    Never more than the groups of the class that has fewest: else a class would be missing in most of the folds.
    """
    if wanted == "auto":
        wanted = AUTO_FOLDS if np.bincount(labels)[np.unique(labels)].min() < SMALL_CLASS else 1
    fewest = min(len(np.unique(groups[labels == c])) for c in np.unique(labels))
    return max(1, min(int(wanted), fewest))


def assign_folds(labels: np.ndarray, groups: np.ndarray, folds: int) -> np.ndarray:
    """Share val out over folds, class by class and never through a group; a pure function of its arguments.

    Classes are dealt out from the rarest to the commonest, the groups of a class from the largest to the smallest, each
    to the fold that holds fewest samples of that class (and then fewest of all).

    Args:
        labels: [N].
        groups: [N], patients or lesions.
        folds: K.

    Returns:
        Fold of each sample, int64 [N], in 0..K - 1.
    """
    names, group = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    classes = int(labels.max()) + 1
    sizes = np.zeros((len(names), classes), dtype=np.int64)
    np.add.at(sizes, (group, labels), 1)
    fold_of = np.full(len(names), -1)
    held = np.zeros((folds, classes), dtype=np.int64)
    for label in np.argsort(sizes.sum(axis=0), kind="stable"):
        waiting = np.flatnonzero((sizes[:, label] > 0) & (fold_of < 0))
        for which in waiting[np.argsort(-sizes[waiting, label], kind="stable")]:
            fold = np.lexsort((held.sum(axis=1), held[:, label]))[0]
            fold_of[which] = fold
            held[fold] += sizes[which]
    return fold_of[group]


def training_sets(
    train: Features, val: Features, folds: int, num_classes: int, device: str = "cpu", sets: int = 1
) -> Iterator[tuple[TrainingSet, np.ndarray]]:
    """For each fold what heads are trained on, train and the other folds, and the rows of val that they are judged by.

    With one fold heads are trained on train alone and judged by all of val.

    Args:
        train: Features of train.
        val: Features of val.
        folds: K.
        num_classes: C.
        device: Where heads are trained.
        sets: So many of them are held at once, and share the memory for standardised features.
    """
    fold = assign_folds(val.labels, val.groups, folds)
    for k in range(folds):
        seen = np.flatnonzero(fold != k) if folds > 1 else np.empty(0, dtype=np.int64)
        yield training_set(train, val, seen, num_classes, device, sets), np.flatnonzero(fold == k)


def training_set(
    train: Features, val: Features, rows: np.ndarray, num_classes: int, device: str, sets: int = 1
) -> TrainingSet:
    """Train, in all its views, and some rows of val, which have one, as one set; nothing is copied."""
    labels, views = np.concatenate([train.labels, val.labels[rows]]), train.views
    view_rows = np.arange(len(train.x)).reshape(views, -1)
    x: np.ndarray | StackedRows = train.x
    if len(rows):
        x = StackedRows([(train.x, None), (val.x, rows)])
        of_val = np.tile(np.arange(len(train.x), len(x)), (views, 1))
        view_rows = np.concatenate([view_rows, of_val], axis=1)
    counts = np.bincount(labels, minlength=num_classes)
    return TrainingSet(x, labels, counts, view_rows=view_rows, device=device, sets=sets)
