"""SGD for many heads at once: what is learnt, and how a step changes it.

SGD as in torch.optim (momentum .9, L2 penalty), learning rate cosine to zero, gradients by hand. H heads that see the
same minibatch are one matrix product of [H*C, D] with [D, B] forward and one of [H*C, B] with [B, D] backward. Three
kinds of heads differ in what they learn:

- *linear*: weight and bias on standardised features of mean squared length 1, from zero (the problem is convex). The
  gradient of every objective sums to zero over the classes, and so do weights that begin at zero: the last class's are
  minus the sum of the others' and are not trained, which saves 1 / C of all arithmetic and changes no head;
- *cosine*: unit weights w on features at unit length, logits s * w.x, from the class means (Gidaris and Komodakis
  2018, arXiv:1804.09458, section 3.2);
- *scaled* (LWS; Kang et al. 2020, arXiv:1910.09217, section 4): a factor for each class of stage one's logits, from 1.

The learning rate is in units of each kind's curvature, 1, s^2 and the mean square of stage one's logits, so that one
range of rates serves all of them.

Shapes: D feature, C classes, H heads, A of them active, B minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.head_objectives import Objective
from trainer.heads import COSINE_FAMILIES, Head, HeadSpec

if TYPE_CHECKING:
    from trainer.stage_two import TrainingSet

MOMENTUM = 0.9


class Heads(Protocol):
    """The parameters of H heads of one kind, with their velocities."""

    def inputs(self, rows: np.ndarray) -> Tensor:
        """What these heads see of some training features, [B, .]."""

    def logits(self, inputs: Tensor, active: int) -> Tensor:
        """[A, C, B] of the first `active` heads."""

    def update(self, grad: Tensor, inputs: Tensor, lr: Tensor) -> None:
        """Step the first A heads along `grad` [A, C, B] at learning rates [A]."""

    def finished(self) -> list[Head]:
        """The heads, on raw features."""


def kind_of(family: str) -> str:
    """`linear`, `cosine` or `scaled`."""
    return "cosine" if family in COSINE_FAMILIES else "scaled" if family == "lws" else "linear"


def bytes_per_head(kind: str, data: TrainingSet, batch_size: int) -> int:
    """Weights, velocities and four arrays of logits."""
    learnt = 1 if kind == "scaled" else data.dim
    return data.num_classes * (2 * learnt + 4 * batch_size) * data.dtype.itemsize


class ManyHeadSgd:
    """The training of H heads of one kind that see the same minibatches; the longest come first."""

    def __init__(self, specs: Sequence[HeadSpec], data: TrainingSet, own: Head, steps_per_epoch: int):
        kind = kind_of(specs[0].family)
        kinds: dict[str, Callable[..., Heads]] = {"linear": LinearHeads, "cosine": CosineHeads, "scaled": ScaledHeads}
        self._heads = kinds[kind](specs, data, own)
        like = torch.empty(0, dtype=data.dtype, device=data.device)
        self._objective = Objective(specs, data.class_counts, like)
        self._data, self._taken = data, 0
        self._peak_lr = torch.tensor([spec.lr for spec in specs], dtype=torch.float64)
        self._steps = torch.tensor([spec.epochs * steps_per_epoch for spec in specs], dtype=torch.float64)

    def step(self, rows: np.ndarray, active: int) -> None:
        """One step of the first `active` heads on the training features `rows` [B]."""
        inputs = self._heads.inputs(rows)
        labels = self._data.labels[torch.from_numpy(rows).to(self._data.device)]
        progress = self._taken / self._steps[:active]
        lr = self._peak_lr[:active] * 0.5 * (1 + torch.cos(torch.pi * progress))
        grad = self._objective.gradient(self._heads.logits(inputs, active), labels, progress)
        self._heads.update(grad, inputs, lr.to(grad))
        self._taken += 1

    def finished(self) -> list[Head]:
        """The heads, on raw features."""
        return self._heads.finished()


class LinearHeads:
    """Weight and bias on standardised features, of all classes but the last, whose logit is minus the others' sum."""

    def __init__(self, specs: Sequence[HeadSpec], data: TrainingSet, own: Head):
        self._data, self._learnt = data, data.num_classes - 1
        self._weight = torch.zeros(len(specs) * self._learnt, data.dim, dtype=data.dtype, device=data.device)
        self._bias = self._weight.new_zeros(len(specs) * self._learnt, 1)
        self._weight_velocity, self._bias_velocity = torch.zeros_like(self._weight), torch.zeros_like(self._bias)
        decay = self._weight.new_tensor([spec.weight_decay for spec in specs])
        self._decay = decay.repeat_interleave(self._learnt)[:, None]

    def inputs(self, rows: np.ndarray) -> Tensor:
        """Standardised features [B, D]."""
        return self._data.batch(rows)

    def logits(self, inputs: Tensor, active: int) -> Tensor:
        """[A, C, B]."""
        rows = active * self._learnt
        learnt = torch.addmm(self._bias[:rows], self._weight[:rows], inputs.T).view(active, self._learnt, -1)
        return _with_last_class(learnt)

    def update(self, grad: Tensor, inputs: Tensor, lr: Tensor) -> None:
        """See `Heads`."""
        rows = len(grad) * self._learnt
        grad = grad[:, :-1].reshape(rows, -1)
        rate = lr.repeat_interleave(self._learnt)[:, None]
        weight, bias = self._weight[:rows], self._bias[:rows]
        weight_velocity, bias_velocity = self._weight_velocity[:rows], self._bias_velocity[:rows]
        weight_velocity.addmm_(grad, inputs, beta=MOMENTUM)  # momentum costs no pass over memory of its own
        bias_velocity.mul_(MOMENTUM).add_(grad.sum(dim=1, keepdim=True))
        for value, velocity in ((weight, weight_velocity), (bias, bias_velocity)):
            velocity.addcmul_(value, self._decay[:rows])
            value.addcmul_(velocity, rate, value=-1)

    def finished(self) -> list[Head]:
        """The heads, with the standardisation folded in."""
        del self._weight_velocity, self._bias_velocity  # of many classes there is no room for copies of everything
        weights, biases = self._weight.view(-1, self._learnt, self._data.dim), self._bias.view(-1, self._learnt, 1)
        return [
            self._data.fold(_with_last_class(weight[None])[0], _with_last_class(bias[None])[0, :, 0])
            for weight, bias in zip(weights, biases, strict=True)
        ]


def _with_last_class(learnt: Tensor) -> Tensor:
    """[H, C - 1, .] -> [H, C, .], of sum zero over the classes."""
    return torch.cat([learnt, -learnt.sum(dim=1, keepdim=True)], dim=1)


class CosineHeads:
    """Unit weights on features at unit length; after each step a weight is brought back to length 1.

    Steps follow the gradient's part along the sphere. There is no weight decay: a weight has no length to decay.
    """

    def __init__(self, specs: Sequence[HeadSpec], data: TrainingSet, own: Head):
        self._data, self._classes = data, data.num_classes
        means = torch.nn.functional.normalize(data.class_means.to(data.device), dim=1)
        self._weight = means.repeat(len(specs), 1)
        self._velocity = torch.zeros_like(self._weight)
        self._scale = self._weight.new_tensor([spec.scale for spec in specs])

    def inputs(self, rows: np.ndarray) -> Tensor:
        """Features at unit length [B, D]."""
        return torch.nn.functional.normalize(self._data.raw(rows), dim=1)

    def logits(self, inputs: Tensor, active: int) -> Tensor:
        """[A, C, B]."""
        cosine = torch.mm(self._weight[: active * self._classes], inputs.T).view(active, self._classes, -1)
        return cosine.mul_(self._scale[:active, None, None])

    def update(self, grad: Tensor, inputs: Tensor, lr: Tensor) -> None:
        """See `Heads`."""
        active = len(grad)
        rows = active * self._classes
        weight, velocity = self._weight[:rows], self._velocity[:rows]
        # By the cosine it is s * grad, and the rate is divided by s^2.
        slope = torch.mm((grad / self._scale[:active, None, None]).view(rows, -1), inputs)
        slope.addcmul_(weight, (slope * weight).sum(dim=1, keepdim=True), value=-1)
        velocity.mul_(MOMENTUM).add_(slope)
        weight.addcmul_(velocity, lr.repeat_interleave(self._classes)[:, None], value=-1)
        weight.div_(weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny))

    def finished(self) -> list[Head]:
        """The heads."""
        weights = self._weight.view(-1, self._classes, self._data.dim)
        scaled = (weights * self._scale[:, None, None]).cpu()
        return [Head(weight, weight.new_zeros(self._classes), normalise=True) for weight in scaled]


class ScaledHeads:
    """A factor for each class of stage one's logits."""

    def __init__(self, specs: Sequence[HeadSpec], data: TrainingSet, own: Head):
        self._data = data
        self._own = Head(own.weight.to(data.device, data.dtype), own.bias.to(data.device, data.dtype), own.normalise)
        self._factor = torch.ones(len(specs), data.num_classes, dtype=data.dtype, device=data.device)
        self._velocity = torch.zeros_like(self._factor)
        squares = [self._own.logits(chunk).square().mean(dim=1).sum() for chunk in data.raw_chunks()]
        self._curvature = (torch.stack(squares).sum() / len(data.x)).clamp_min(torch.finfo(data.dtype).tiny)

    def inputs(self, rows: np.ndarray) -> Tensor:
        """Stage one's logits [B, C]."""
        return self._own.logits(self._data.raw(rows))

    def logits(self, inputs: Tensor, active: int) -> Tensor:
        """[A, C, B]."""
        return self._factor[:active, :, None] * inputs.T

    def update(self, grad: Tensor, inputs: Tensor, lr: Tensor) -> None:
        """See `Heads`."""
        active = len(grad)
        slope = (grad * inputs.T).sum(dim=2).div_(self._curvature)
        self._velocity[:active].mul_(MOMENTUM).add_(slope)
        self._factor[:active].addcmul_(self._velocity[:active], lr[:, None], value=-1)

    def finished(self) -> list[Head]:
        """Stage one's classifier with each class scaled."""
        weight, bias = self._own.weight, self._own.bias
        return [
            Head((weight * factor[:, None]).cpu(), (bias * factor).cpu(), self._own.normalise)
            for factor in self._factor
        ]
