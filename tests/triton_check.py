"""Holds the Triton path against the PyTorch path; prints the largest relative errors as JSON.

Run in a process of its own: on a GPU as it is, else with TRITON_INTERPRET=1, which must be set before Triton is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trainer import pairwise_contrastive, pairwise_logsumexp, pairwise_rows
from trainer.pairwise import contrastive_total, hardest_rows, pool_logsumexp

# Anchors, pool, D, first row, temperature, largest class. Several blocks and splits; a D that is no power of 2; anchors
# at the end; a temperature that overflows without the running maximum; an anchor alone in the pool.
CASES = [(20, 77, 24, 30, 0.1, 5), (20, 1030, 16, 1010, 0.01, 3), (9, 9, 130, 0, 1.0, 2), (1, 1, 8, 0, 0.5, 1)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def error(ours: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest value; 0 where both are the same infinity."""
    ours, exact = ours.detach().double().cpu(), exact.detach().cpu()
    difference = torch.where(ours == exact, 0.0, (ours - exact).abs())
    return float(difference.max() / exact[exact.isfinite()].abs().max().clamp(min=1e-30)) if difference.any() else 0.0


def value_and_gradients(function: Callable, anchors: Tensor, pool: Tensor, weights: Tensor) -> list[Tensor]:
    anchors, pool = anchors.clone().requires_grad_(), pool.clone().requires_grad_()
    out = function(anchors, pool)
    out = torch.where(out.isfinite(), out, 0)
    return [out, *torch.autograd.grad((out * weights[: out.numel()].view_as(out)).sum(), (anchors, pool))]


def use_triton() -> None:
    for module in (pairwise_contrastive, pairwise_logsumexp, pairwise_rows):
        module.is_supported = lambda pool: pool.dtype != torch.float64  # type: ignore[attr-defined]
        module.use_triton = lambda *_: True  # type: ignore[attr-defined]


def main() -> None:
    use_triton()
    errors: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    for num_anchors, num_rows, dim, first, temperature, num_classes in CASES:
        wide = functional.normalize(torch.randn(num_rows, dim, generator=generator))
        labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
        labels[0] = num_classes  # of one row
        weights = torch.randn(num_anchors, generator=generator, dtype=torch.float64).to(DEVICE)
        labels = labels.to(DEVICE)
        own = labels[first : first + num_anchors]
        for dtype in (torch.float32, torch.bfloat16):
            pool = wide.to(DEVICE, dtype)
            anchors = pool[first : first + num_anchors]
            functions = {
                "logsumexp": lambda a, p: pool_logsumexp(a, p, temperature, first),  # noqa: B023
                "contrastive": lambda a, p: contrastive_total(a, own, p, labels, temperature, first)[0],  # noqa: B023
            }
            case = f"{num_anchors}x{num_rows}x{dim}-{str(dtype).removeprefix('torch.')}"
            for name, function in functions.items():
                ours = value_and_gradients(function, anchors, pool, weights)
                exact = value_and_gradients(function, anchors.double(), pool.double(), weights)
                for part, x, y in zip(("value", "anchors", "pool"), ours, exact, strict=True):
                    errors[f"{name}-{part}-{case}"] = error(x, y)
            rows = hardest_rows(anchors, own, pool, labels, first)
            exact = hardest_rows(anchors.double(), own, pool.double(), labels, first)
            # Of equally hard rows any will do: their distances are compared.
            distances = torch.cdist(anchors.double(), pool.double(), compute_mode="donot_use_mm_for_euclid_dist")
            for name, found, right in zip(("positive", "negative"), rows, exact, strict=True):
                none_alike = bool(((found < 0) == (right < 0)).all())
                one, other = (distances.gather(1, row.clamp(min=0)[:, None]) for row in (found, right))
                errors[f"{name}-{case}"] = float((one - other).abs().max()) if none_alike else 1.0
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
