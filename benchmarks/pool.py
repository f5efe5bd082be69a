"""The blockwise kernel beside pytorch-metric-learning: time and peak memory of forward + backward.

    python benchmarks/pool.py --json pool.json

SupCon: `supervised_contrastive` beside `SupConLoss`. Batch-hard triplet: `batch_hard_triplet` beside
`TripletMarginLoss` with `BatchHardMiner`. Both get the same anchors and the same pool (`ref_emb`, `ref_labels`), and
their losses are compared first. "Products" are the three bare B x N x D matrix products of a dense forward and
backward, into arrays that are there already.

Time: each rival once a round, in alternating rounds; the ratios are those of the best times (`..._median`: the middle
of the ratios within a round). Memory: a new process for each measurement, growth of its resident memory by the kernel's
high-water mark (`common.peak_extra_bytes`), and as a check what PyTorch's allocator handed out (`..._allocator`).
Where there is a GPU its part follows (`pool_gpu.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common import allocator_extra_bytes, peak_extra_bytes, quiet_time, record
from trainer.losses.base import Pool
from trainer.losses.batch_hard_triplet import batch_hard_triplet
from trainer.losses.supervised_contrastive import supervised_contrastive

LOSSES = ("supcon", "triplet")
RIVALS = ("ours", "theirs")
TEMPERATURE, MARGIN = 0.1, 0.2
CLASS_SHARES = (0.67, 0.11, 0.11, 0.05, 0.03, 0.02, 0.01)  # about HAM10000's

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(memory_here(*args.measure.split("-"), args.anchors, args.rows, args.dim)))
        return
    check_losses(inputs(64, 512, args.dim))
    figures = times(args) | memory(args) | growth(args)
    show(args, figures)
    if torch.cuda.is_available():
        from benchmarks.pool_gpu import gpu_figures

        figures |= gpu_figures(args.anchors, args.gpu_rows, args.dim)
    record(args.json, figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--anchors", type=int, default=1024, help="B")
    parser.add_argument("--rows", type=int, default=16_384, help="N")
    parser.add_argument("--large-rows", type=int, default=262_144, help="N of extra_bytes_262144")
    parser.add_argument("--gpu-rows", type=int, default=1_048_576, help="N on a GPU")
    parser.add_argument("--dim", type=int, default=128, help="D")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", metavar="RIVAL-LOSS", help="print the peak memory of one step and end")
    return parser.parse_args()


# --- what is measured


def inputs(num_anchors: int, num_rows: int, dim: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Data:
    """Anchors, their labels, pool, its labels: unit rows, long-tailed classes, anchors in the middle of the pool."""
    generator = torch.Generator().manual_seed(0)
    pool = functional.normalize(torch.randn(num_rows, dim, generator=generator))
    labels = torch.multinomial(torch.tensor(CLASS_SHARES), num_rows, replacement=True, generator=generator)
    pool, labels = pool.to(device, dtype), labels.to(device)
    rows = slice(first_row(num_anchors, num_rows), first_row(num_anchors, num_rows) + num_anchors)
    return pool[rows].clone().requires_grad_(), labels[rows].clone(), pool.requires_grad_(), labels


def first_row(num_anchors: int, num_rows: int) -> int:
    return (num_rows - num_anchors) // 2


def step(rival: str, loss: str, data: Data) -> Callable[[], Tensor]:
    """Forward and backward of the mean loss; returns the loss."""
    anchors, _, pool, _ = data
    mean = ours(loss, data) if rival == "ours" else theirs(loss, data)

    def run() -> Tensor:
        anchors.grad = pool.grad = None
        value = mean()
        value.backward()
        return value.detach()

    return run


def ours(loss: str, data: Data) -> Callable[[], Tensor]:
    anchors, labels, rows, row_labels = data
    pool = Pool(rows, row_labels, first_row(len(anchors), len(rows)))

    def mean() -> Tensor:
        if loss == "supcon":
            result = supervised_contrastive(anchors, labels, pool, TEMPERATURE)
        else:
            result = batch_hard_triplet(anchors, labels, pool, MARGIN)
        return result.total / result.count

    return mean


def theirs(loss: str, data: Data, without_own: bool = False) -> Callable[[], Tensor]:
    """Their loss without work that ours does not do: no normalising, no swap, mean instead of their mean of non-zeros.

    They count an anchor's own row among its positives where the pool is given apart. For the triplet that changes
    nothing: it is never the hardest. For SupCon it changes the value, not the work; `without_own` gives them a list of
    the pairs without it, for the comparison of values, at a cost that is no part of what is timed.
    """
    from pytorch_metric_learning import distances, losses, miners, reducers
    from pytorch_metric_learning.utils import loss_and_miner_utils

    anchors, labels, pool, row_labels = data
    if loss == "supcon":
        supcon = losses.SupConLoss(TEMPERATURE, distance=distances.DotProductSimilarity(normalize_embeddings=False))
        pairs = None
        if without_own:
            one, positive, *negatives = loss_and_miner_utils.get_all_pairs_indices(labels, row_labels)
            other = positive != one + first_row(len(anchors), len(pool))
            pairs = (one[other], positive[other], *negatives)
        return lambda: supcon(anchors, labels, pairs, pool, row_labels)
    distance = distances.LpDistance(normalize_embeddings=False)
    miner = miners.BatchHardMiner(distance=distance)
    triplet = losses.TripletMarginLoss(MARGIN, distance=distance, reducer=reducers.MeanReducer())
    return lambda: triplet(anchors, labels, miner(anchors, labels, pool, row_labels), pool, row_labels)


def products(data: Data) -> Callable[[], None]:
    """Similarities, the anchors' gradient, the pool's gradient."""
    anchors, pool = data[0].detach(), data[2].detach()
    similarity = torch.ones(len(anchors), len(pool))
    grad_anchors, grad_pool = torch.ones_like(anchors), torch.ones_like(pool)

    def run() -> None:
        torch.mm(anchors, pool.T, out=similarity)
        torch.mm(similarity, pool, out=grad_anchors)
        torch.mm(similarity.T, anchors, out=grad_pool)

    return run


def check_losses(data: Data) -> None:
    """The same loss on the same inputs: else the rest means nothing."""
    for loss in LOSSES:
        value, other = ours(loss, data)().item(), theirs(loss, data, without_own=True)().item()
        if not math.isclose(value, other, rel_tol=1e-5):
            raise RuntimeError(f"{loss}: ours is {value}, pytorch-metric-learning's is {other}")


# --- figures


def times(args: argparse.Namespace) -> dict[str, float]:
    """Ours beside theirs and beside the products."""
    data = inputs(args.anchors, args.rows, args.dim)
    functions: dict[str, Callable[[], object]] = {
        f"{rival}-{loss}": step(rival, loss, data) for loss in LOSSES for rival in RIVALS
    }
    functions["products"] = products(data)
    seconds = quiet_time(functions, args.rounds)
    figures = {f"seconds_{name.replace('-', '_')}": seconds.best(name) for name in functions}
    for loss in LOSSES:
        for name, other in (("time", f"theirs-{loss}"), ("products", "products")):
            figures[f"{name}_ratio_{loss}"] = seconds.ratio(f"ours-{loss}", other)
            figures[f"{name}_ratio_{loss}_median"] = seconds.median_ratio(f"ours-{loss}", other)
    return figures


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Extra peak memory, ours beside theirs, and ours with a large pool."""
    figures: dict[str, float] = {}
    for loss in LOSSES:
        extra = {rival: memory_in_new_process(args, f"{rival}-{loss}", args.rows) for rival in RIVALS}
        for rival in RIVALS:
            figures |= {f"bytes_{rival}_{loss}": extra[rival]["resident"]}
            figures |= {f"bytes_{rival}_{loss}_allocator": extra[rival]["allocator"]}
        for suffix, method in (("", "resident"), ("_allocator", "allocator")):
            figures[f"memory_ratio_{loss}{suffix}"] = extra["ours"][method] / extra["theirs"][method]
    large = {loss: memory_in_new_process(args, f"ours-{loss}", args.large_rows)["resident"] for loss in LOSSES}
    return figures | {"extra_bytes_262144": max(large.values()), **{f"extra_bytes_{k}": v for k, v in large.items()}}


def growth(args: argparse.Namespace) -> dict[str, float]:
    """How cost grows over four sizes of N: the exponent e of c N^e (1 is linear) and R^2 of the line a + b N."""
    sizes = [args.rows // 2, args.rows, args.rows * 2, args.rows * 4]
    figures: dict[str, float] = {}
    for loss in LOSSES:
        steps = {str(size): step("ours", loss, inputs(args.anchors, size, args.dim)) for size in sizes}
        seconds = quiet_time(steps, max(args.rounds // 3, 2))
        best = [seconds.best(name) for name in steps]
        extra = [memory_in_new_process(args, f"ours-{loss}", size)["resident"] for size in sizes]
        figures |= {f"seconds_ours_{loss}_{size}": value for size, value in zip(sizes, best, strict=True)}
        figures |= {f"bytes_ours_{loss}_{size}": value for size, value in zip(sizes, extra, strict=True)}
        for name, values in (("time", best), ("memory", extra)):
            logarithms = [[math.log(max(number, 1e-9)) for number in numbers] for numbers in (sizes, values)]
            figures[f"{name}_exponent_{loss}"] = statistics.linear_regression(*logarithms).slope
            figures[f"{name}_r2_{loss}"] = statistics.correlation(sizes, values) ** 2
    return figures


def memory_in_new_process(args: argparse.Namespace, name: str, num_rows: int) -> dict[str, int]:
    """See `memory_here`."""
    command = [sys.executable, __file__, "--measure", name, "--rows", str(num_rows)]
    command += ["--anchors", str(args.anchors), "--dim", str(args.dim), "--threads", str(args.threads)]
    quiet = os.environ | {"KINETO_LOG_LEVEL": "99"}  # the profiler tells of GPUs that are not there
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=quiet).stdout)


def memory_here(rival: str, loss: str, num_anchors: int, num_rows: int, dim: int) -> dict[str, int]:
    """Extra bytes of one step of this process, by both methods."""
    step(rival, loss, inputs(64, 512, dim))()  # loads what the first call loads
    run = step(rival, loss, inputs(num_anchors, num_rows, dim))
    resident = peak_extra_bytes(run)
    run = step(rival, loss, inputs(num_anchors, num_rows, dim))  # its gradients are not there yet
    return {"resident": resident, "allocator": allocator_extra_bytes(run)}


def show(args: argparse.Namespace, figures: dict[str, float]) -> None:
    print(
        f"B {args.anchors}, N {args.rows}, D {args.dim}, float32, {args.threads} threads; best of {args.rounds} rounds"
    )
    print(f"products {1e3 * figures['seconds_products']:.1f} ms")
    print(f"{'':10}{'ours':>10}{'theirs':>10}{'ratio':>8}{'products':>10}{'ours':>10}{'theirs':>10}{'ratio':>8}")
    for loss in LOSSES:
        times_ms = [1e3 * figures[f"seconds_{rival}_{loss}"] for rival in RIVALS]
        megabytes = [figures[f"bytes_{rival}_{loss}"] / 1e6 for rival in RIVALS]
        print(
            f"{loss:10}{times_ms[0]:7.1f} ms{times_ms[1]:7.1f} ms{figures[f'time_ratio_{loss}']:8.3f}"
            f"{figures[f'products_ratio_{loss}']:8.2f} x{megabytes[0]:7.1f} MB{megabytes[1]:7.1f} MB"
            f"{figures[f'memory_ratio_{loss}']:8.4f}"
        )
    print(f"N {args.large_rows}: {figures['extra_bytes_262144'] / 1e6:.0f} MB extra")
    for loss in LOSSES:
        slopes = [figures[f"{name}_exponent_{loss}"] for name in ("time", "memory")]
        print(f"{loss}: time ~ N^{slopes[0]:.2f}, memory ~ N^{slopes[1]:.2f}")


if __name__ == "__main__":
    main()
