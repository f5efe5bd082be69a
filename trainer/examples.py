"""Training examples that a model carries with it: which of them an image looks like, and whether it looks like any.

They are kept as features, the backbone's pooled output before the embedding head: that is the better representation of
the two (Chen et al., SimCLR, ICML 2020, arXiv:2002.05709, section 4.2), it exists also where no metric loss trained the
embedding head, and stage two decides on it. Distances are Euclidean between features of unit length, 0 to 2.

An image is *unlike the training set* if its k-th nearest training example is farther than that of nearly all held-out
images (Sun, Ming, Zhu, Li, Out-of-distribution detection with deep nearest neighbors, ICML 2022, arXiv:2204.06507).
k is small here, where a rare class may have a dozen examples. The threshold is the conformal quantile of the val
images' distances (Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005): of new images that come from
where the val images came from, a share of at most 1 - quantile is flagged.

Shapes: B images, N examples, F features, K neighbours, C classes.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from trainer.features import Features

NEIGHBOURS = 5
"""k, and how many examples an image is compared with for the eye."""
QUANTILE = 0.95
"""As in the paper, where 95 % of the images from the known source are let pass."""
BLOCK_BYTES = 64 << 20


class Neighbours(NamedTuple):
    """The nearest training examples of some images, nearest first."""

    rows: Tensor
    """int64 [B, K]: numbers of examples."""
    distances: Tensor
    """float32 [B, K]."""


@dataclass(frozen=True)
class UnlikeRule:
    """When an image is unlike the training set: its k-th nearest example is farther than `distance`."""

    k: int
    distance: float
    quantile: float
    """Of the held-out images' distances."""
    held_out_images: int


@dataclass(frozen=True, eq=False)
class TrainingExamples:
    """Training images, or as many of each class as there was room for.

    Attributes:
        keys: Of the packed dataset, object [N].
        labels: Class numbers, int64 [N].
        features: As the network made them, float16 [N, F].
        rule: When an image is unlike them.
    """

    keys: np.ndarray
    labels: np.ndarray
    features: Tensor
    rule: UnlikeRule

    def to(self, device: str | torch.device) -> TrainingExamples:
        """The same, with the features on a device."""
        return replace(self, features=self.features.to(device))

    @cached_property
    def unit(self) -> Tensor:
        """The features with length 1, float32 [N, F]: rounded to float16 they would be longer or shorter."""
        return _unit(self.features)

    def nearest(self, features: Tensor) -> Neighbours:
        """Neighbours of images with features [B, F]: at least as many as the rule asks for."""
        return nearest(features, self.unit, max(NEIGHBOURS, self.rule.k))


def nearest(features: Tensor, examples: Tensor, k: int) -> Neighbours:
    """K = min(k, N) neighbours of features [B, F] among `examples` [N, F] of unit length, by products in blocks."""
    points = _unit(features)
    block = max(k, BLOCK_BYTES // (4 * max(len(points), 1)))
    similarity = points.new_empty(len(points), 0)
    rows = torch.empty(len(points), 0, dtype=torch.int64, device=points.device)
    for begin in range(0, len(examples), block):
        part = points @ examples[begin : begin + block].T
        near, places = part.topk(min(k, part.shape[1]), dim=1)
        similarity, rows = torch.cat([similarity, near], dim=1), torch.cat([rows, begin + places], dim=1)
        similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)
        rows = rows.gather(1, best)
    return Neighbours(rows, (2 - 2 * similarity).clamp(min=0).sqrt())


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=1)


def choose_examples(train: Features, val: Features, most_bytes: int, seed: int) -> TrainingExamples:
    """The store of a trained network.

    Args:
        train: Features of the training split; of several views the first counts.
        val: Of the val split, by which the rule is set.
        most_bytes: Bound of the features as they are kept, in float16.
        seed: Decides which examples of a large class are kept.
    """
    rows = evenly_chosen(train.labels, max(most_bytes // (2 * train.x.shape[1]), NEIGHBOURS), seed)
    kept, held_out = (torch.from_numpy(np.array(x, dtype=np.float16)) for x in (train.x[rows], val.x[: len(val)]))
    k = min(NEIGHBOURS, len(rows))
    distances = nearest(held_out, _unit(kept), k).distances[:, -1].numpy()
    rule = UnlikeRule(k, conformal_quantile(distances, QUANTILE), QUANTILE, len(val))
    return TrainingExamples(train.keys[rows], train.labels[rows], kept, rule)


def evenly_chosen(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most `most` places in labels [N], rising: of each class as many as of any other, or all that it has."""
    by_class = np.random.default_rng(seed).permutation(len(labels))
    by_class = by_class[np.argsort(labels[by_class], kind="stable")]
    counts = np.bincount(labels)
    turn = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # 0 = the first of its class
    return np.sort(by_class[np.argsort(turn, kind="stable")[:most]])


def conformal_quantile(values: np.ndarray, quantile: float) -> float:
    """The ceil((n + 1) quantile)-th smallest of n values; the largest where n is too small for that."""
    place = min(math.ceil((len(values) + 1) * quantile), len(values))
    return float(np.sort(values)[place - 1])


def save_examples(examples: TrainingExamples) -> tuple[bytes, dict[str, Any]]:
    """Bytes of a safetensors file (`feature` float16 [N, F], `label` int32 [N], `key`: JSON), and the rule."""
    keys = np.frombuffer(json.dumps(examples.keys.tolist()).encode(), dtype=np.uint8)
    tensors = {
        "feature": examples.features.cpu(),
        "label": torch.from_numpy(examples.labels.astype(np.int32)),
        "key": torch.from_numpy(keys.copy()),
    }
    return save(tensors), asdict(examples.rule)


def parse_examples(data: bytes, rule: dict[str, Any], num_classes: int, feature_dim: int) -> TrainingExamples:
    """What `save_examples` made.

    Raises:
        ValueError, KeyError, TypeError, SafetensorError: It is something else.
    """
    tensors = load(data)
    features, labels, keys = tensors["feature"], tensors["label"].numpy(), json.loads(tensors["key"].numpy().tobytes())
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("the training examples' keys are no texts")
    if features.dtype != torch.float16 or features.shape != (len(keys), feature_dim) or not features.isfinite().all():
        raise ValueError(f"the training examples are no finite float16 features of {feature_dim} values")
    if labels.shape != (len(keys),) or not len(keys) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError("the training examples' labels are not one an example, of the model's classes")
    known = UnlikeRule(int(rule["k"]), float(rule["distance"]), float(rule["quantile"]), int(rule["held_out_images"]))
    if not 1 <= known.k <= len(keys):
        raise ValueError(f"the rule compares with neighbour {known.k} of {len(keys)} training examples")
    return TrainingExamples(np.array(keys, dtype=object), labels.astype(np.int64), features, known)
