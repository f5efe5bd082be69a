"""Large batches on small memory: the gradient of a whole batch, with the activations of one micro-batch at a time.

Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021 (arXiv 2101.06983),
section 3: plain accumulation of micro-batches would compare each of them with itself only. Here

1.  a first pass computes the outputs of all micro-batches without a graph,
2.  the loss of the whole batch, gathered over ranks, is taken once, with its gradient g at the outputs y,
3.  a second pass computes each micro-batch k again, with a graph, and gives <y_k, g_k> to backward.

By the chain rule sum_k d<y_k, g_k>/dt = d loss/dt: the gradient of the one big batch, for one more forward pass.

**Random numbers.** Each micro-batch has a seed, set before both of its passes: dropout's masks are equal in both.

**Batch norm** normalises each micro-batch by its own statistics (over all ranks where it is synchronised), equal in
both passes: it then is "ghost" batch norm (Hoffer et al. 2017, arXiv 1705.08741) of `micro_batch_size` images, and the
gradient is the exact one of that network, not of the network that sees the big batch at once. With frozen statistics,
or without batch norm, it is that of the one big batch. Running statistics are left alone in the first pass and take in
each micro-batch in the second: each image counts once, and a step moves them as K steps of a micro-batch would.

Shapes: n images of this rank, views counted; K micro-batches, as many on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.errors import UserError
from trainer.batch_norm import statistics_held
from trainer.pairwise import accumulation_dtype
from trainer.pool import gather_sizes

Outputs = TypeVar("Outputs", bound=tuple[Tensor, ...])


class CachedForward(Generic[Outputs]):
    """Outputs of a whole batch, from which a loss is computed, and the way back from that loss to the weights.

    Attributes:
        output: What `forward` returns, of all n images; the start of the loss's graph. In float32 at least, so that
            its gradient does not vanish in half precision before a loss scale reaches it.
    """

    def __init__(
        self, forward: Callable[[Tensor], Outputs], parts: Sequence[Tensor], output: Outputs, seeds: list[int]
    ):
        self._forward, self._parts, self._seeds = forward, parts, seeds
        self.output = output

    def backward(
        self, loss: Tensor, backward: Callable[[Tensor, bool], Any], parameters: Sequence[nn.Parameter] = ()
    ) -> None:
        """The second pass. Every rank takes part.

        Args:
            loss: Scalar, a function of `output` and perhaps of `parameters`.
            backward: (scalar, whether it is the last of this step) -> nothing; adds to the weights' gradient. Called
                once a micro-batch, which is how it works inside DeepSpeed's accumulation: every gradient, that of the
                loss's own parameters included, passes through it, its loss scale and its mean over ranks.
            parameters: The loss's own: centres, proxies, prototypes.
        """
        if not self._seeds:
            backward(loss, True)
            return
        leaves = [*self.output, *parameters]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        sizes = [len(part) for part in self._parts]
        of_output = [None if grad is None else grad.split(sizes) for grad in grads[: len(self.output)]]
        last = len(self._parts) - 1
        for k, (part, seed) in enumerate(zip(self._parts, self._seeds, strict=True)):
            torch.manual_seed(seed)
            products = [
                (y.to(grad[k].dtype) * grad[k]).sum()
                for y, grad in zip(self._forward(part), of_output, strict=True)
                if grad is not None
            ]
            if k == 0:  # at ZeRO 3 what comes later is added to the gradient that the step before has left
                own = zip(parameters, grads[len(self.output) :], strict=True)
                products += [(p * grad).sum() for p, grad in own if grad is not None]
            backward(torch.stack([product.to(loss.dtype) for product in products]).sum(), k == last)


def cached_forward(
    forward: Callable[[Tensor], Outputs],
    images: Tensor,
    micro_batch_size: int,
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
) -> CachedForward[Outputs]:
    """The first pass. Every rank takes part.

    Args:
        forward: Images of a micro-batch -> a (named) tuple of tensors with a row an image.
        images: [n, ...] of this rank, views counted.
        micro_batch_size: Most images of a micro-batch. They are cut as evenly as they can be; all ranks cut into as
            many, since the backward of each may be a collective.
        model: What `forward` runs: the statistics of its batch norms are held in the first pass.
        group: None = the default group.

    Returns:
        The outputs, and the second pass. Where every rank's images fit one micro-batch there is one pass, with its
        graph.

    Raises:
        UserError: A rank has fewer images than another has micro-batches. On every rank.
    """
    sizes = gather_sizes(len(images), images.device, group)
    num_parts = -(-max(sizes) // micro_batch_size)
    if num_parts <= 1:
        return CachedForward(forward, [images], forward(images), [])
    if min(sizes) < num_parts:
        raise UserError(
            f"stage_one.micro_batch_size = {micro_batch_size} cuts {max(sizes)} images of one worker into {num_parts} "
            f"micro-batches and another worker has {min(sizes)} images; raise stage_one.micro_batch_size"
        )
    parts = images.tensor_split(num_parts)
    seeds = torch.randint(2**62, (num_parts,)).tolist()
    outputs: list[Outputs] = []
    with torch.no_grad(), statistics_held(model):
        for part, seed in zip(parts, seeds, strict=True):
            torch.manual_seed(seed)
            outputs.append(forward(part))
    return CachedForward(forward, parts, _leaves(outputs), seeds)


def _leaves(outputs: list[Outputs]) -> Outputs:
    """The outputs of all micro-batches, row by row, as leaves of a new graph."""
    whole = [torch.cat(rows) for rows in zip(*outputs, strict=True)]
    leaves = [rows.to(accumulation_dtype(rows)).requires_grad_() for rows in whole]
    make = getattr(outputs[0], "_make", tuple)  # a named tuple stays one
    return cast(Outputs, make(leaves))
