"""Heads: what stage two puts on top of the features. Every family ends as one linear map.

Shapes: N samples, D feature, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.errors import UserError

_ORDER = ("epochs", "batch_size", "seed")
_SGD = ("lr", "weight_decay", *_ORDER)

# Family -> the knobs of HeadSpec that it reads. `own` is stage one's classifier as it is. The first block are closed
# forms (`trainer.closed_forms`), the second is trained on the features (`trainer.stage_two`).
KNOBS: dict[str, tuple[str, ...]] = {
    "own": (),
    "tau_norm": ("tau",),
    "logit_adjustment": ("tau",),
    "nearest_class_mean": ("normalise",),
    # trained
    "crt": ("power", *_SGD),
    "progressive": ("power", *_SGD),
    "reweighted": ("beta", *_SGD),
    "balanced_softmax": _SGD,
    "logit_adjusted": ("tau", *_SGD),
    "label_aware_smoothing": ("power", "smoothing", "smoothing_tail", *_SGD),
    "over_smoothing": ("power", "smoothing", *_SGD),
    "lws": ("power", "lr", *_ORDER),
    "cosine": ("power", "scale", "lr", *_ORDER),
    "ldam_drw": ("margin", "scale", "beta", "lr", *_ORDER),
}
FAMILY_NAMES = {
    "own": "stage one, its own classifier",
    "tau_norm": "tau-norm",
    "logit_adjustment": "logit adjustment, post-hoc",
    "nearest_class_mean": "nearest class mean",
    "crt": "cRT",
    "progressive": "cRT, progressive",
    "reweighted": "re-weighted",
    "balanced_softmax": "balanced softmax",
    "logit_adjusted": "logit-adjusted loss",
    "label_aware_smoothing": "label-aware smoothing",
    "over_smoothing": "label over-smoothing",
    "lws": "LWS",
    "cosine": "cosine",
    "ldam_drw": "LDAM-DRW",
}
TRAINED_FAMILIES = tuple(family for family, knobs in KNOBS.items() if "lr" in knobs)
COSINE_FAMILIES = ("cosine", "ldam_drw")
PRIOR_AWARE_FAMILIES = ("balanced_softmax", "logit_adjusted", "reweighted", "ldam_drw")
"""Their loss makes up for the class frequencies: balanced sampling on top of it would correct twice."""


@dataclass(frozen=True)
class HeadSpec:
    """One head to be made: its family and the values of its knobs; knobs that the family does not read are ignored.

    Attributes:
        family: A key of `KNOBS`.
        power: q of the sampling p_c ~ n_c^q; `progressive` goes from natural sampling to it.
        tau: Strength of tau-norm and of logit adjustment.
        normalise: Nearest class mean by cosine instead of Euclidean distance.
        lr: Peak learning rate of SGD, in units in which 1 to 10 suits every backbone (see `trainer.stage_two`).
        weight_decay: L2 penalty on weight and bias, on features of mean squared length 1.
        epochs: Passes; an epoch has as many draws as there are training features.
        batch_size: Features a step.
        seed: Decides the order of the samples.
        beta: Class weights (1 - beta) / (1 - beta^n_c); 1 = their limit, 1 / n_c.
        smoothing: Label smoothing; of the commonest class where there is a `smoothing_tail` too.
        smoothing_tail: Label smoothing of the rarest class.
        margin: LDAM's largest margin, in units of the cosine.
        scale: s, factor of the cosine.
        double_correction: Let a family of `PRIOR_AWARE_FAMILIES` draw by `power` as well.

    Raises:
        UserError: The family is unknown, or its prior would be corrected twice.
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
    beta: float = 0.9999
    smoothing: float = 0.0
    smoothing_tail: float = 0.0
    margin: float = 0.5
    scale: float = 30.0
    double_correction: bool = False

    def __post_init__(self) -> None:
        if self.family not in KNOBS:
            raise UserError(f"head family {self.family!r} is not known; known: {', '.join(sorted(KNOBS))}")
        if self.family in PRIOR_AWARE_FAMILIES and self.power < 1 and not self.double_correction:
            raise UserError(
                f"head family {self.family} already corrects for the class frequencies, and sampling with power = "
                f"{self.power:g} would correct twice; set power to 1, or double_correction: true if that is wanted"
            )

    def knobs(self) -> dict[str, Any]:
        """The knobs that this family reads, with their values."""
        values = asdict(self)
        names = KNOBS[self.family]
        if self.family in PRIOR_AWARE_FAMILIES and self.double_correction:
            names = ("power", *names)
        return {name: values[name] for name in names}

    @property
    def sampling_power(self) -> float:
        """The q under which samples are drawn: natural (1) for the families that do not read `power`."""
        return self.knobs().get("power", 1.0)


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


def save_heads(
    heads: Mapping[str, Head],
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> bytes:
    """Heads by name -> bytes of a safetensors file with `NAME.weight`, `NAME.bias`.

    Args:
        heads: The heads.
        metadata: Further strings for the file's header.
        extra: Further tensors.
    """
    from safetensors.torch import save

    tensors = dict(extra or {})
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
