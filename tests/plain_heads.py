"""Heads as their papers have them, one at a time in float64, and class clusters to train them on."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import torch

from trainer.heads import Head
from trainer.stage_two import sample_orders

COUNTS = np.array([120, 40, 15, 6, 3])
NUM_CLASSES, DIM = len(COUNTS), 16


def clusters(seed=0, counts=COUNTS, spread=1.0):
    """Gaussian class clusters with long-tailed counts, features offset and scaled unevenly."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(len(counts), DIM)) * spread
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    x = centres[labels] + rng.normal(size=(len(labels), DIM))
    return (x * np.linspace(0.1, 4, DIM) + np.linspace(-3, 3, DIM)).astype(np.float32), labels


class PlainHead(torch.nn.Module):
    """One head in float64, as its paper has it: a linear layer, a cosine classifier, or scales of stage one's logits.

    Gives logits of raw features; `trained` are its parameters.
    """

    def __init__(self, spec, x, labels, own):
        super().__init__()
        self.spec, self.own = spec, own
        self.mean, self.std = x.mean(dim=0), x.std(dim=0, correction=0)
        if spec.family in ("cosine", "ldam_drw"):
            means = torch.stack([x[labels == c].mean(dim=0) for c in range(NUM_CLASSES)])
            self.weight = torch.nn.Parameter(torch.nn.functional.normalize(means, dim=1))
            self.curvature = spec.scale**2
        elif spec.family == "lws":
            self.weight = torch.nn.Parameter(torch.ones(NUM_CLASSES, dtype=torch.float64))
            self.curvature = own.logits(x).square().mean()
        else:
            self.weight = torch.nn.Parameter(torch.zeros(NUM_CLASSES, DIM, dtype=torch.float64))
            self.bias = torch.nn.Parameter(torch.zeros(NUM_CLASSES, dtype=torch.float64))
            self.curvature = 1.0

    def forward(self, x):
        if self.spec.family in ("cosine", "ldam_drw"):
            return self.spec.scale * torch.nn.functional.cosine_similarity(x[:, None], self.weight[None], dim=2)
        if self.spec.family == "lws":
            return self.own.logits(x) * self.weight
        return (x - self.mean) / self.std / math.sqrt(DIM) @ self.weight.T + self.bias

    def after_step(self):
        if self.spec.family in ("cosine", "ldam_drw"):
            with torch.no_grad():
                self.weight.copy_(torch.nn.functional.normalize(self.weight, dim=1))


def plain_loss(spec, logits, target, progress):
    """Each family's loss, with torch's own cross-entropy wherever it can express it."""
    counts = torch.from_numpy(COUNTS).double()
    cross_entropy = torch.nn.functional.cross_entropy
    if spec.family == "balanced_softmax":  # the paper's form: n_c exp(z_c) / sum n exp(z)
        weighted = counts * logits.exp()
        return -(weighted.gather(1, target[:, None])[:, 0] / weighted.sum(dim=1)).log().mean()
    if spec.family == "logit_adjusted":
        return cross_entropy(logits + spec.tau * (counts / counts.sum()).log(), target)
    if spec.family == "over_smoothing":
        return cross_entropy(logits, target, label_smoothing=spec.smoothing)
    if spec.family == "label_aware_smoothing":
        rank = (counts - counts.min()) / (counts.max() - counts.min())
        eps = spec.smoothing_tail + (spec.smoothing - spec.smoothing_tail) * torch.sin(rank * math.pi / 2)
        terms = []
        for row, label in zip(logits.log_softmax(dim=1), target.tolist(), strict=True):
            others = sum(row[c] for c in range(NUM_CLASSES) if c != label)
            terms.append(-(1 - eps[label]) * row[label] - eps[label] / (NUM_CLASSES - 1) * others)
        return torch.stack(terms).mean()
    if spec.family in ("reweighted", "ldam_drw"):
        weights = (1 - spec.beta) / (1 - spec.beta**counts) if spec.beta < 1 else 1 / counts
        weights = weights * counts.sum() / (weights * counts).sum()
        if spec.family == "ldam_drw":
            margins = spec.margin * (counts.min() / counts) ** 0.25
            logits = logits - spec.scale * margins * torch.nn.functional.one_hot(target, NUM_CLASSES)
            weights = weights if progress >= 0.8 else torch.ones_like(weights)
        return (cross_entropy(logits, target, reduction="none") * weights[target]).mean()
    return cross_entropy(logits, target)


def plain_loop(spec, x, labels, own, rows_of_class=None):
    """torch.optim.SGD and autograd on one head, float64, the same order of samples; the head's logits."""
    own = Head(own.weight.double(), own.bias.double())
    seen, target = torch.from_numpy(x).double(), torch.from_numpy(labels)
    head = PlainHead(spec, seen, target, own)
    decay = spec.weight_decay if "weight_decay" in spec.knobs() else 0.0
    optimiser = torch.optim.SGD(head.parameters(), lr=spec.lr / float(head.curvature), momentum=0.9, weight_decay=decay)
    rows_of_class = rows_of_class or [np.flatnonzero(labels == c) for c in range(NUM_CLASSES)]
    images = sum(np.atleast_2d(rows).shape[1] for rows in rows_of_class)
    steps = spec.epochs * math.ceil(images / spec.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    progressive = spec.epochs if spec.family == "progressive" else None
    taken = 0
    for order in islice(sample_orders(rows_of_class, spec.sampling_power, spec.seed, progressive), spec.epochs):
        for start in range(0, len(order), spec.batch_size):
            rows = torch.from_numpy(order[start : start + spec.batch_size])
            loss = plain_loss(spec, head(seen[rows]), target[rows], taken / steps)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            head.after_step()
            schedule.step()
            taken += 1
    return head(seen).detach()
