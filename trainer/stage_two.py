"""Stage two: many heads on fixed features, trained at once.

Heads that draw their samples in the same order (same power, seed and batch size) see the same minibatch at every step
and are trained as one product (`trainer.head_training`). Nothing else is shared: an order is a function of a head's
own knobs, never of its neighbours.

The features that SGD sees are standardised and divided by sqrt(D), so that their mean squared length is 1: the
curvature, and with it the useful range of the learning rate, is then much the same for every backbone. Afterwards the
standardisation is folded into weight and bias.

Where images have several views, an epoch still has as many draws as there are images: each draw takes the next view of
its image. Class counts are those of images. Closed forms see view 0 only, which is how images are evaluated: the mean
over augmented views would be that of other images than those that are classified.

Shapes: N training images, V views of each, M training features (N * V where all have V views), D feature, C classes,
H heads, B minibatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import UserError
from data_pipeline.sampling import apportion, class_probabilities, generator
from trainer.closed_forms import log_prior, logit_adjustment, nearest_class_mean, tau_norm
from trainer.head_training import ManyHeadSgd, bytes_per_head, kind_of
from trainer.heads import TRAINED_FAMILIES, Head, HeadSpec
from trainer.stacked import StackedRows

MEMORY_BYTES = 2 * 2**30
_CONSTANT_STD = 1e-6  # a feature that varies less does so by float16's rounding only: it is centred, not stretched
_CHUNK_BYTES = 64 * 2**20
_STACK_BYTES = 256 * 2**20
"""Weights of so many heads are put side by side for a product, of 10,000 classes of a few."""


class TrainingSet:
    """Training features with what every head needs of them, computed once.

    Args:
        x: Features [M, D], any float type; may be a memory map.
        labels: [N] of the images.
        class_counts: Training images of each class [C], for the prior.
        view_rows: int64 [V, N], the row of x that is view v of an image; an image with fewer views has some of them
            several times. None = one view, row i of image i.
        device: Where heads are trained.
        dtype: Arithmetic of the training and type of the heads.
        memory_bytes: Budget: standardised features are held if they fit into half of it, else made batch by batch;
            the heads trained together get the other half.
        sets: So many training sets of a process share the half for features; heads are trained on one at a time.

    Raises:
        UserError: A class has no training sample.
    """

    def __init__(
        self,
        x: np.ndarray | StackedRows,
        labels: np.ndarray,
        class_counts: np.ndarray,
        *,
        view_rows: np.ndarray | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory_bytes: int = MEMORY_BYTES,
        sets: int = 1,
    ):
        labels = np.asarray(labels, dtype=np.int64)
        view_rows = np.arange(len(x))[None] if view_rows is None else view_rows
        assert view_rows.shape[1] == len(labels), f"{view_rows.shape[1]} images, {len(labels)} labels"
        self.x, self.num_classes, self.dim = x, len(class_counts), x.shape[1]
        self.class_counts = np.asarray(class_counts)
        self.log_prior = log_prior(class_counts)
        self.device, self.dtype, self.memory_bytes = device, dtype, memory_bytes
        of_row = np.full(len(x), -1)
        of_row[view_rows] = labels
        assert of_row.min() >= 0, "features of no image"
        self.labels = torch.from_numpy(of_row).to(device)  # of each row of x, not of each image
        self._first_view = view_rows[0]
        self.rows_of_class = [view_rows[:, images] for images in _images_of_class(labels, self.num_classes)]
        self.mean, self.std = self._moments()
        self.scale = 1 / (torch.where(self.std > _CONSTANT_STD, self.std, 1.0) * self.dim**0.5)
        self._held: Tensor | None = None
        if x.size * dtype.itemsize <= memory_bytes / 2 / sets:
            self._held = torch.cat([self._standardise(chunk) for _, chunk in _chunks(x)])

    def __len__(self) -> int:
        """Images."""
        return len(self._first_view)

    def batch(self, rows: np.ndarray) -> Tensor:
        """Standardised features [B, D] of mean squared length 1."""
        if self._held is not None:
            return self._held[torch.from_numpy(rows).to(self.device)]
        return self._standardise(self.x[rows])

    def raw(self, rows: np.ndarray) -> Tensor:
        """Features [B, D] as they are, in the arithmetic's type."""
        return torch.from_numpy(np.asarray(self.x[rows])).to(self.device, self.dtype)

    def raw_chunks(self) -> Iterator[Tensor]:
        """All features in order, in pieces of bounded size."""
        for _, chunk in _chunks(self.x):
            yield torch.from_numpy(np.array(chunk)).to(self.device, self.dtype)

    def fold(self, weight: Tensor, bias: Tensor) -> Head:
        """The head on raw features that equals `weight` [C, D], `bias` [C] on standardised ones."""
        raw = weight.double().cpu() * self.scale
        return Head(raw.to(self.dtype), (bias.double().cpu() - raw @ self.mean).to(self.dtype))

    @cached_property
    def class_means(self) -> Tensor:
        """Mean raw feature of each class, view 0 of its images, [C, D]."""
        sums = torch.zeros(self.num_classes, self.dim, dtype=torch.float64)
        seen = StackedRows([(self.x, self._first_view)])
        labels = self.labels.cpu()[torch.from_numpy(self._first_view)]
        for start, chunk in _chunks(seen):
            sums.index_add_(0, labels[start : start + len(chunk)], torch.from_numpy(chunk.astype(np.float64)))
        sizes = torch.tensor([rows.shape[1] for rows in self.rows_of_class], dtype=torch.float64)
        return (sums / sizes[:, None]).to(self.dtype)

    def _moments(self) -> tuple[Tensor, Tensor]:
        total, squares = np.zeros(self.dim), np.zeros(self.dim)
        for _, chunk in _chunks(self.x):
            total += chunk.sum(axis=0, dtype=np.float64)
        mean = total / len(self.x)
        for _, chunk in _chunks(self.x):
            squares += np.square(chunk.astype(np.float64) - mean).sum(axis=0)
        return torch.from_numpy(mean), torch.from_numpy(np.sqrt(squares / len(self.x)))

    def _standardise(self, x: np.ndarray) -> Tensor:
        centred = torch.from_numpy(x.astype(np.float64)) - self.mean
        return (centred * self.scale).to(self.dtype).to(self.device)


def train_heads(
    specs: Sequence[HeadSpec],
    x: np.ndarray,
    labels: np.ndarray,
    class_counts: np.ndarray,
    own: Head,
) -> list[Head]:
    """Make heads of every family, in the order of `specs`; see `make_heads`."""
    return make_heads(specs, TrainingSet(x, labels, class_counts), own)


def make_heads(specs: Sequence[HeadSpec], data: TrainingSet, own: Head) -> list[Head]:
    """Make heads: the closed forms directly, the trained ones together wherever they share their minibatches.

    cRT (Kang et al. 2020, arXiv:1910.09217, section 4) draws from p_c ~ n_c^q and minimises the cross-entropy, from a
    new classifier; `progressive` is cRT whose sampling goes from natural to n_c^q. The other families change the
    objective (`trainer.head_objectives`) or what is learnt (`trainer.head_training`).

    Args:
        specs: What is to be made.
        data: The training features.
        own: Stage one's classifier, for the families that are made from it.

    Returns:
        A head for each spec, on raw features. None depends on the other specs beyond float rounding.
    """
    heads: list[Head | None] = [None] * len(specs)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, spec in enumerate(specs):
        if spec.family in TRAINED_FAMILIES:
            groups.setdefault(shared_by(spec), []).append(i)
        else:
            heads[i] = _closed_form(spec, data, own)
    for members in groups.values():
        members.sort(key=lambda i: -specs[i].epochs)  # heads that are done early leave from the end
        fitting = heads_that_fit(data, specs[members[0]].batch_size, kind_of(specs[members[0]].family))
        for first in range(0, len(members), fitting):
            together = members[first : first + fitting]
            for i, head in zip(together, _train_together([specs[i] for i in together], data, own), strict=True):
                heads[i] = head
    return [head for head in heads if head is not None]


def heads_that_fit(data: TrainingSet, batch_size: int, kind: str = "linear") -> int:
    """How many heads may be trained together in half of the budget."""
    return max(1, int(data.memory_bytes / 2 / bytes_per_head(kind, data, batch_size)))


def sample_orders(
    rows_of_class: list[np.ndarray], power: float, seed: int, progressive_epochs: int | None = None
) -> Iterator[np.ndarray]:
    """The order of the samples in epoch 0, 1, ...: N draws each, p_c ~ n_c^q.

    Each class gets its share of the draws (p_c * N, rounded fairly), and serves them from shuffled rounds through its
    samples, so that all of them are seen equally often, to within one round. q = 1 is then plain shuffling: every
    sample once. Of a sample's views each round takes the next one, in an order of the sample's own.

    Args:
        rows_of_class: Row numbers of each class, [n_c], or [V, n_c] where a sample has several views.
        power: q.
        seed: Together with the other arguments it determines everything.
        progressive_epochs: T: in epoch t the probabilities are (1 - t / (T - 1)) natural + t / (T - 1) those of
            `power` (progressively-balanced sampling; Kang et al. 2020, arXiv:1910.09217, eq. 2). None = no change.
    """
    tables = [np.atleast_2d(rows) for rows in rows_of_class]
    counts = np.array([table.shape[1] for table in tables])
    final = probabilities = class_probabilities(counts, power)
    natural = class_probabilities(counts, 1.0)
    rng = generator(seed, "stage two order")
    waiting = [np.empty(0, dtype=np.int64) for _ in rows_of_class]
    for epoch in itertools.count():
        if progressive_epochs is not None:
            share = min(1.0, epoch / max(1, progressive_epochs - 1))
            probabilities = (1 - share) * natural + share * final
        drawn = []
        for c, share in enumerate(apportion(probabilities, int(counts.sum()), rng)):
            missing = int(share) - len(waiting[c])
            if missing > 0:
                rounds = _rounds(tables[c], -(-missing // counts[c]), rng)
                waiting[c] = np.concatenate([waiting[c], rng.permuted(rounds, axis=1).ravel()])
            drawn.append(waiting[c][:share])
            waiting[c] = waiting[c][share:]
        yield rng.permutation(np.concatenate(drawn))


def _rounds(views: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """`number` rounds or more through samples with rows [V, n], int64 [R, n]: each row once in V rounds."""
    cycles = -(-number // len(views))
    rounds = np.tile(views, (cycles, 1))
    if len(views) > 1:
        rounds = rng.permuted(rounds.reshape(cycles, *views.shape), axis=1).reshape(-1, views.shape[1])
    return rounds


def predict(heads: Sequence[Head], x: np.ndarray | StackedRows, device: str = "cpu") -> np.ndarray:
    """Class numbers int64 [H, N] that each head gives to features [N, D]; heads of one kind in one product."""
    predictions = np.empty((len(heads), len(x)), dtype=np.int64)
    for chosen in _side_by_side(heads):
        normalise, (num_classes, dim) = heads[chosen[0]].normalise, heads[chosen[0]].weight.shape
        stacked = Head(
            torch.cat([heads[i].weight for i in chosen]).to(device),
            torch.cat([heads[i].bias for i in chosen]).to(device),
            normalise,
        )
        for start, chunk in _chunks(x, bytes_per_row=8 * max(dim, len(chosen) * num_classes)):
            logits = stacked.logits(torch.from_numpy(np.array(chunk)).to(device))
            best = logits.view(len(chunk), len(chosen), num_classes).argmax(dim=2)
            predictions[chosen, start : start + len(chunk)] = best.T.cpu().numpy()
    return predictions


def _side_by_side(heads: Sequence[Head]) -> Iterator[list[int]]:
    """Numbers of heads of one kind whose weights may be copied into one matrix."""
    for normalise in (False, True):
        chosen = [i for i, head in enumerate(heads) if head.normalise == normalise]
        if chosen:
            weight = heads[chosen[0]].weight
            step = max(1, _STACK_BYTES // (weight.numel() * weight.element_size()))
            yield from (chosen[first : first + step] for first in range(0, len(chosen), step))


def shared_by(spec: HeadSpec) -> tuple[Any, ...]:
    """What heads must have in common to be trained together."""
    progressive_epochs = spec.epochs if spec.family == "progressive" else None
    return kind_of(spec.family), spec.sampling_power, progressive_epochs, spec.seed, spec.batch_size


def _closed_form(spec: HeadSpec, data: TrainingSet, own: Head) -> Head:
    if spec.family == "own":
        return own
    if spec.family == "tau_norm":
        return tau_norm(own, spec.tau)
    if spec.family == "logit_adjustment":
        return logit_adjustment(own, data.class_counts, spec.tau)
    assert spec.family == "nearest_class_mean", spec.family
    return nearest_class_mean(data.class_means, spec.normalise)


def _train_together(specs: list[HeadSpec], data: TrainingSet, own: Head) -> list[Head]:
    """Train heads of one kind that share their minibatches; the longest come first."""
    first = specs[0]
    sgd = ManyHeadSgd(specs, data, own, steps_per_epoch=-(-len(data) // first.batch_size))
    progressive_epochs = first.epochs if first.family == "progressive" else None
    orders = sample_orders(data.rows_of_class, first.sampling_power, first.seed, progressive_epochs)
    for epoch, order in zip(range(first.epochs), orders, strict=False):
        active = sum(spec.epochs > epoch for spec in specs)
        for start in range(0, len(order), first.batch_size):
            sgd.step(order[start : start + first.batch_size], active)
    return sgd.finished()


def _images_of_class(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Numbers of the images of each class."""
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=num_classes)
    if len(sizes) > num_classes or not sizes.all():
        raise UserError(
            f"the training features hold labels 0..{len(sizes) - 1} and class {int(np.argmin(sizes))} "
            f"{int(sizes.min())} times, for {num_classes} classes; delete the features and run `rarelens features`"
        )
    return np.split(order, np.cumsum(sizes)[:-1])


def _chunks(x: np.ndarray | StackedRows, bytes_per_row: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of bounded size, counted in float64."""
    step = max(1, _CHUNK_BYTES // (bytes_per_row or 8 * x.shape[1]))
    for start in range(0, len(x), step):
        yield start, x[start : start + step]
