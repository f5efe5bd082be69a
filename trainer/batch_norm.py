"""Batch norm over the images of all ranks, and statistics that are held while a forward pass is repeated.

torch's own SyncBatchNorm refuses CPU tensors, on which the proof that W ranks equal one runs; this one is plain tensor
operations and two messages, the same on every device.

Shapes: W ranks, B_r images of rank r, C channels, P pixels (1 for rows), n = sum of B_r * P.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from cluster.errors import UserError
from trainer.pairwise import accumulation_dtype


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """Let every batch norm of a model take its statistics from all ranks' images, while it trains.

    The modules stay where and what they are, with their parameters, buffers and names; only their forward changes. With
    one rank, without a process group, and in evaluation mode it is the one they had.

    W ranks then give what one rank gives on all their images, in forward, gradient and running statistics; a rank may
    have fewer images than others, or none.

    Args:
        model: Changed in place. Layers of torch and timm's `BatchNormAct2d` are known; torch's own SyncBatchNorm is
            left as it is.

    Returns:
        The model.

    Raises:
        UserError: A batch norm does more than normalise.
    """
    for name, module in model.named_modules():
        norm: Any = type(module)
        if not issubclass(norm, _BatchNorm) or issubclass(norm, (_OverRanks, nn.SyncBatchNorm)):
            continue
        if not _is_known(norm):
            raise UserError(
                f"model.sync_batch_norm = true: layer {name} is a {norm.__name__}, which is not known here; set it to "
                f"false or choose another backbone"
            )
        module.__class__ = _over_ranks(norm)
    return model


@contextmanager
def statistics_held(model: nn.Module) -> Iterator[None]:
    """Leave running statistics and their counters as they are; in training the batch's own normalise as ever.

    Copies stand in their place meanwhile and are updated. (Switching the tracking off would save fewer tensors for
    backward, at which a recomputation of activations takes offence; momentum 0 would let NaN through.)
    """
    held = [
        (module, name, buffer)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in held:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in held:
            setattr(module, name, buffer)


class _OverRanks:
    """Stands before a torch batch norm among the bases of a class and replaces its training forward."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """[B_r, C, ...] -> the same shape and dtype. Every rank takes part, and in its backward."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)  # type: ignore[misc]
        self._check_input_dim(x)
        x = self._over_ranks(self, x)
        # timm's BatchNormAct2d is followed by these two.
        for part in ("drop", "act"):
            x = getattr(self, part, nn.Identity())(x)
        return x


def _is_known(norm: type[_BatchNorm]) -> bool:
    """A class without a forward of its own, or timm's batch norm with activation."""
    from timm.layers import BatchNormAct2d

    return norm.forward in (_BatchNorm.forward, BatchNormAct2d.forward)


@cache
def _over_ranks(norm: Any) -> Any:
    # `disable` imports the compiler, 2 s: not where nothing asks for synchronised statistics.
    normalise = staticmethod(torch.compiler.disable(_normalise))
    return type(f"Synchronised{norm.__name__}", (_OverRanks, norm), {"_over_ranks": normalise})


def _normalise(norm: Any, x: Tensor) -> Tensor:
    """Normalise by the statistics of all ranks and update the running ones, as torch's `_BatchNorm.forward` does."""
    with torch.no_grad():
        mean, variance, count = _statistics(x)
        if norm.track_running_stats:
            norm.num_batches_tracked.add_(1)
            # None: the plain mean of all batches so far.
            momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.mul_(1 - momentum).add_((mean * momentum).to(norm.running_mean.dtype))
            unbiased = variance * (count / (count - 1))
            norm.running_var.mul_(1 - momentum).add_((unbiased * momentum).to(norm.running_var.dtype))
    return _NormaliseOverRanks.apply(x, norm.weight, norm.bias, (mean, variance, count), norm.eps)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number n of values a channel over all ranks, the same on every rank.

    In float32 at least. Each rank's own mean and variance are combined (Chan et al. 1979), not sums of squares, whose
    difference cancels where a mean is large.

    Raises:
        ValueError: One value a channel, or none: it has no variance. On every rank.
    """
    dtype, channels = accumulation_dtype(x), x.shape[1]
    values = x.numel() // max(channels, 1)
    own = torch.zeros(2 * channels + 1, dtype=dtype, device=x.device)
    if values:
        variance, mean = torch.var_mean(x.to(dtype), _reduced(x), correction=0)
        own = torch.cat([mean, variance, own.new_tensor([values])])
    world = dist.get_world_size()
    parts = own.new_empty(world * len(own))
    dist.all_gather_into_tensor(parts, own)
    means, variances, counts = parts.view(world, -1).split([channels, channels, 1], dim=1)
    count = counts.sum()
    if values < 2 and count < 2:  # a rank that has two needs not look, which would wait for the device
        raise ValueError(
            f"batch norm over {world} ranks has {int(count)} value(s) a channel, and a variance needs two; raise "
            f"stage_one.batch_size"
        )
    share = counts / count
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    return mean, variance, count


class _NormaliseOverRanks(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, with mean and variance functions of all ranks' x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: tuple[Tensor, Tensor, Tensor],
        eps: float,
    ) -> Tensor:
        mean, variance, count = statistics
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        weight, bias = (p if p is None else p.to(mean.dtype) for p in (weight, bias))
        return nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3, with the two sums over all ranks.

        Weight and bias get this rank's part: the engine's mean over ranks adds the parts, as it does for every weight.
        """
        x, weight, mean, variance, count = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        inverse_std = torch.rsqrt(variance + ctx.eps)
        centred, dy = x.to(mean.dtype) - mean.view(shape), grad.to(mean.dtype)
        sums = torch.stack([dy.sum(_reduced(x)), (dy * centred).sum(_reduced(x))])
        grad_bias, grad_weight = sums[0].clone(), sums[1] * inverse_std
        grad_x = None
        if ctx.needs_input_grad[0]:
            dist.all_reduce(sums)
            mean_dy, mean_dy_centred = sums / count
            scale = inverse_std if weight is None else inverse_std * weight.to(mean.dtype)
            # scale * (dy - mean_dy - centred / (variance + eps) * mean_dy_centred), in one array
            grad_x = centred.mul_((-inverse_std.square() * mean_dy_centred).view(shape)).sub_(mean_dy.view(shape))
            grad_x = grad_x.add_(dy).mul_(scale.view(shape)).to(x.dtype)
        if weight is None:
            return grad_x, None, None, None, None
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


def _reduced(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [0, *range(2, x.dim())]
