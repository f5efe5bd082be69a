"""How well embeddings find their own kind: for each sample, all others of the set by rising distance.

Musgrave, Belongie, Lim, A Metric Learning Reality Check, ECCV 2020 (arXiv 2003.08505), section 3.

Shapes: N samples, D dimensions, R other samples of a query's class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

BLOCK_BYTES = 64 << 20
SAME = 1e-7
"""Nearer than this share of the longest vector is the same place: what is left of it is float64's rounding."""


@dataclass(frozen=True)
class Retrieval:
    """Figures of each sample that has another one of its class; NaN for the others.

    Attributes:
        hit: [N], 1 where the nearest other sample is of the same class (recall@1), else 0.
        average_precision: [N], average precision at R: mean over ranks 1..R of the precision at those that hit.
    """

    hit: np.ndarray
    average_precision: np.ndarray


def retrieval(x: np.ndarray, labels: np.ndarray, normalise: bool = True) -> Retrieval:
    """Leave-one-out retrieval within a set. Of equally near samples the one with the lower number comes first.

    Args:
        x: Embeddings or features, [N, D].
        labels: [N].
        normalise: By cosine; false = by Euclidean distance.
    """
    # Distances come from a product, |a|^2 + |b|^2 - 2ab, which in float32 loses neighbours that are near each other
    # and far from the origin; differences one by one would take 50 times as long.
    points = torch.from_numpy(np.asarray(x, dtype=np.float64))
    if normalise:
        points = torch.nn.functional.normalize(points, dim=1)
    if len(points):
        points = points - points.mean(dim=0)
    longest = points.norm(dim=1).max() if len(points) else 0.0
    target = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    relevant = torch.bincount(target)[target] - 1 if len(target) else target
    deepest = int(relevant.max()) if len(target) else 0
    hit, precision = np.full(len(points), np.nan), np.full(len(points), np.nan)
    step = max(1, BLOCK_BYTES // (8 * max(1, len(points))))
    for start in range(0, len(points) if deepest else 0, step):
        rows = torch.arange(start, min(start + step, len(points)))
        distance = torch.cdist(points[rows], points, compute_mode="use_mm_for_euclid_dist")
        distance[distance < SAME * longest] = 0.0
        distance = distance.float()  # equally near ones differ by rounding in float64
        distance[torch.arange(len(rows)), rows] = torch.inf
        nearest = distance.sort(dim=1, stable=True).indices[:, :deepest]
        same = (target[nearest] == target[rows, None]) & (torch.arange(deepest) < relevant[rows, None])
        at_rank = same.cumsum(dim=1) / torch.arange(1, deepest + 1)
        known = (relevant[rows] > 0).numpy()
        ap = (at_rank * same).sum(dim=1) / relevant[rows].clamp(min=1)
        hit[rows.numpy()[known]] = (target[nearest[:, 0]] == target[rows]).numpy()[known]
        precision[rows.numpy()[known]] = ap.numpy()[known]
    return Retrieval(hit, precision)
