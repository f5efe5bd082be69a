"""Heads: what stage two puts on top of the features. Every family ends as one linear map.

Shapes: N samples, D feature, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import UserError

_SGD = ("lr", "weight_decay", "epochs", "batch_size", "seed")

# Family -> the knobs of HeadSpec that it reads. `own` is stage one's classifier as it is.
KNOBS: dict[str, tuple[str, ...]] = {
    "own": (),
    "tau_norm": ("tau",),
    "logit_adjustment": ("tau",),
    "nearest_class_mean": ("normalise",),
    "balanced_softmax": _SGD,
    "crt": ("power", *_SGD),
}
TRAINED_FAMILIES = tuple(family for family, knobs in KNOBS.items() if "lr" in knobs)


@dataclass(frozen=True)
class HeadSpec:
    """One head to be made: its family and the values of its knobs; knobs that the family does not read are ignored.

    Attributes:
        family: A key of `KNOBS`.
        power: q of the sampling p_c ~ n_c^q (cRT).
        tau: Strength of tau-norm and of logit adjustment.
        normalise: Nearest class mean by cosine instead of Euclidean distance.
        lr: Peak learning rate of SGD on features of mean squared length 1 (see `trainer.stage_two`).
        weight_decay: L2 penalty on weight and bias, on those same features.
        epochs: Passes; an epoch has as many draws as there are training features.
        batch_size: Features a step.
        seed: Decides the order of the samples.
    """

    family: str
    power: float = 1.0
    tau: float = 1.0
    normalise: bool = False
    lr: float = 1.0
    weight_decay: float = 1e-4
    epochs: int = 10
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in KNOBS:
            raise UserError(f"head family {self.family!r} is not known; known: {', '.join(sorted(KNOBS))}")

    def knobs(self) -> dict[str, Any]:
        """The knobs that this family reads, with their values."""
        values = asdict(self)
        return {name: values[name] for name in KNOBS[self.family]}

    @property
    def sampling_power(self) -> float:
        """The q under which samples are drawn: cRT's own, natural (1) for the losses that know the prior."""
        return self.power if self.family == "crt" else 1.0


@dataclass
class Head:
    """A linear classifier of features.

    Attributes:
        weight: [C, D].
        bias: [C].
        normalise: Features are brought to unit length first (cosine heads).
    """

    weight: Tensor
    bias: Tensor
    normalise: bool = False

    def logits(self, x: Tensor) -> Tensor:
        """Features [N, D] of any float type -> logits [N, C] in the weight's type."""
        x = x.to(self.weight)
        if self.normalise:
            x = torch.nn.functional.normalize(x, dim=1)
        return torch.addmm(self.bias, x, self.weight.T)


def tau_norm(own: Head, tau: float) -> Head:
    """Tau-normalised classifier: w_c / ||w_c||^tau (Kang et al. 2020, arXiv:1910.09217, section 4).

    Stage one's bias is left out, as in the paper and in its reference code (facebookresearch/classifier-balancing,
    tau_norm.py); so tau = 0 is stage one's classifier without its bias.

    Args:
        own: Stage one's classifier.
        tau: 0 changes no weight, 1 makes all of the same length.
    """
    norm = own.weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(own.weight.dtype).tiny)
    return Head(own.weight / norm**tau, torch.zeros_like(own.bias), own.normalise)


def logit_adjustment(own: Head, class_counts: np.ndarray, tau: float) -> Head:
    """Post-hoc logit adjustment: argmax_y f_y(x) - tau log pi_y (Menon et al. 2021, arXiv:2007.07314, eq. 9).

    The prior is *subtracted*. At tau = 1, and with f the log-probabilities under the training prior, this is the
    classifier of the smallest balanced error.

    Args:
        own: Stage one's classifier.
        class_counts: Training samples of each class, [C]; pi is their share.
        tau: 0 is stage one's classifier.

    Raises:
        UserError: A class has no training sample.
    """
    prior = torch.as_tensor(log_prior(class_counts)).to(own.bias)
    return Head(own.weight.clone(), own.bias - tau * prior, own.normalise)


def nearest_class_mean(class_means: Tensor, normalise: bool) -> Head:
    """Nearest class mean on raw features, by Euclidean distance or by cosine (Kang et al. 2020, arXiv:1910.09217).

    -||x - mu||^2 = 2 mu.x - ||mu||^2 - ||x||^2, whose last term is the same for all classes; and cos(x, mu) is the
    product of both at unit length. Not standardised: the distances that stage one shaped are kept.

    Args:
        class_means: mu, [C, D].
        normalise: Cosine instead of Euclidean.
    """
    if normalise:
        unit = torch.nn.functional.normalize(class_means, dim=1)
        return Head(unit, unit.new_zeros(len(unit)), normalise=True)
    return Head(2 * class_means, -class_means.square().sum(dim=1))


def log_prior(class_counts: np.ndarray) -> np.ndarray:
    """Logarithm of the prior, log pi_c, of the training counts [C]; float64.

    Raises:
        UserError: A class has no training sample, so that its prior has no logarithm.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    if not (counts > 0).all():
        raise UserError(
            f"class {int(np.argmin(counts))} has no training sample, and stage two needs at least one of every class; "
            "pack the dataset again with images of it, or without the class"
        )
    return np.log(counts / counts.sum())


def fit_temperature(logits: Tensor, labels: Tensor, bounds: tuple[float, float] = (0.01, 1e4)) -> float:
    """Temperature T that minimises the NLL of softmax(logits / T) (Guo et al. 2017, arXiv:1706.04599, section 4.2).

    In beta = 1 / T the NLL is convex with derivative mean(E_p[z] - z_y), so bisection on its sign is exact; where
    every sample is right, or none is, the NLL falls for ever and a bound is the answer.

    Args:
        logits: z, [N, C].
        labels: [N].
        bounds: Smallest and largest T.
    """
    z = logits.double()
    target = z.gather(1, labels[:, None])[:, 0]

    def slope(log_beta: float) -> float:
        return float(((np.exp(log_beta) * z).softmax(dim=1).mul(z).sum(dim=1) - target).mean())

    low, high = -np.log(bounds[1]), -np.log(bounds[0])
    for _ in range(60):
        middle = (low + high) / 2
        if slope(middle) <= 0:
            low = middle
        else:
            high = middle
    return float(np.exp(-(low + high) / 2))


def save_heads(heads: Mapping[str, Head], metadata: Mapping[str, str] | None = None) -> bytes:
    """Heads by name -> bytes of a safetensors file with `NAME.weight`, `NAME.bias`.

    Args:
        heads: The heads.
        metadata: Further strings for the file's header.
    """
    from safetensors.torch import save

    tensors = {}
    for name, head in heads.items():
        tensors[f"{name}.weight"] = head.weight.contiguous()
        tensors[f"{name}.bias"] = head.bias.contiguous()
    normalise = json.dumps({name: head.normalise for name, head in heads.items()})
    return save(tensors, metadata={**(metadata or {}), "normalise": normalise})


def parse_heads(data: bytes) -> tuple[dict[str, Head], dict[str, str]]:
    """The heads, and the header's strings, of bytes that `save_heads` made.

    Raises:
        ValueError: The bytes are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {})
    normalise = json.loads(metadata.get("normalise", "{}"))
    heads = {n: Head(tensors[f"{n}.weight"], tensors[f"{n}.bias"], cosine) for n, cosine in normalise.items()}
    return heads, metadata


def load_heads(path: str | Path) -> dict[str, Head]:
    """The heads in a file, by name.

    Raises:
        UserError: The file is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"heads {path} do not exist; run `rarelens stage-two` first")
    try:
        return parse_heads(path.read_bytes())[0]
    except ValueError as error:
        raise UserError(
            f"heads {path} cannot be read ({error}); delete the file and run `rarelens stage-two`"
        ) from None
