"""A map of features in two dimensions, for people: which classes lie apart and which run into each other.

t-SNE (van der Maaten and Hinton, JMLR 9, 2008) by scikit-learn, started from the two main components, so that the map
keeps their rough order (Kobak and Berens, Nature Communications 10, 2019). It keeps neighbourhoods, not distances; how
well it keeps them is measured by its trustworthiness (Venna and Kaski, 2001).

Shapes: N samples, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from trainer.stacked import StackedRows

MAX_POINTS = 1000
"""Beyond, the page grows heavy and t-SNE takes minutes."""
PERPLEXITY = 30.0
MIN_POINTS = 3 * int(PERPLEXITY)
"""Below, the main components are shown as they are: t-SNE of so few points shows what it likes."""
MAIN_COMPONENTS = 50
ITERATIONS = 500
"""Half of scikit-learn's: started from the main components, so few points have settled by then."""
NEIGHBOURS = 5


@dataclass(frozen=True)
class EmbeddingMap:
    """Where samples lie on the map; x and y are in 0..1, of one scale."""

    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[int]
    predicted: Sequence[int]
    method: str
    trustworthiness: float | None
    """1 = whoever is near on the map is near among the features; about 0.5 = a map by chance. None for a few points."""
    samples: int
    """Of which the points are a choice."""


def embedding_map(x: np.ndarray | StackedRows, labels: np.ndarray, predicted: np.ndarray, seed: int) -> EmbeddingMap:
    """The map of at most `MAX_POINTS` samples, of rare classes as many as there are.

    Args:
        x: Features, [N, F]; compared by cosine.
        labels: [N].
        predicted: [N].
        seed: Chooses the samples and drives t-SNE.
    """
    rows = fair_choice(labels, MAX_POINTS, seed)
    chosen = np.asarray(x[rows], dtype=np.float32)
    chosen /= np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), 1e-12)
    places, method, trust = _project(chosen, seed)
    places = places - places.min(axis=0, initial=np.inf)
    places = places / max(places.max(initial=0), 1e-12)
    return EmbeddingMap(
        x=[round(value, 4) for value in places[:, 0].tolist()],
        y=[round(value, 4) for value in places[:, 1].tolist()],
        labels=labels[rows].tolist(),
        predicted=predicted[rows].tolist(),
        method=method,
        trustworthiness=trust,
        samples=len(labels),
    )


def fair_choice(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most `limit` rows, sorted: small classes whole, of the others equally many, drawn at random.

    Args:
        labels: [N].
        limit: Rows wanted; of more classes than that, some are left out.
        seed: Of the draws.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    _, number, counts = np.unique(labels[order], return_inverse=True, return_counts=True)
    starts = np.cumsum(counts) - counts
    by_class = np.argsort(number, kind="stable")
    rank = np.empty(len(labels), dtype=np.int64)  # a row's number within its class, in the order of the draw
    rank[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.sort(order[np.argsort(rank, kind="stable")[:limit]])


def _project(x: np.ndarray, seed: int) -> tuple[np.ndarray, str, float | None]:
    """Places [N, 2], how they were found, and how far they can be trusted."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE, trustworthiness

    if len(x) < 3 or np.ptp(x, axis=0).max() < 1e-6:  # nothing that could be told apart
        return np.zeros((len(x), 2)), "main components", None
    # On a busy machine threads that wait for each other at every step take minutes instead of seconds.
    with threadpool_limits(1):
        components = PCA(min(MAIN_COMPONENTS, *x.shape), random_state=seed).fit_transform(x)
        places, method = components[:, :2], "main components"
        if places.shape[1] < 2:
            places = np.column_stack([places, np.zeros(len(places))])
        if len(x) >= MIN_POINTS:
            start = (places / places[:, 0].std() * 1e-4).astype(np.float32)  # the scale that t-SNE wants
            tsne = TSNE(perplexity=PERPLEXITY, init=start, max_iter=ITERATIONS, random_state=seed)
            places, method = tsne.fit_transform(components), "t-SNE"
        neighbours = min(NEIGHBOURS, (len(x) - 1) // 2)
        return places, method, float(trustworthiness(x, places, n_neighbors=neighbours))
