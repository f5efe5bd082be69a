"""Proxy-anchor loss.

Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020 (arXiv 2003.13911), eq. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.loss_config import LossConfig
from trainer.losses.base import LossSum, MetricLoss, Pool
from trainer.losses.class_logsumexp import class_logsumexp
from trainer.pairwise import accumulation_dtype


class ProxyAnchor(MetricLoss):
    """See `proxy_anchor`. The proxies are parameters, [C, D], normalised when used (the authors learn them 100 x faster
    than the backbone: `lr_ratio`)."""

    needs_unit_length = True

    def __init__(self, config: LossConfig, num_classes: int, dim: int, class_counts: Tensor) -> None:
        super().__init__(config, num_classes, dim, class_counts)
        self.proxies = nn.Parameter(torch.empty(num_classes, dim))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")  # as the authors do

    def loss_sum(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float) -> LossSum:
        """See `MetricLoss.forward`."""
        return proxy_anchor(pool, self.proxies, self.config.proxy_scale, self.config.proxy_margin)


def proxy_anchor(pool: Pool, proxies: Tensor, scale: float, margin: float) -> LossSum:
    """The loss of the whole pool, the same on every rank.

    loss = 1 / |P+| sum_{p in P+} log(1 + sum_{x of class p} exp(-alpha (s_xp - delta)))
         + 1 / C    sum_p         log(1 + sum_{x of other classes} exp(alpha (s_xp + delta))),

    with s_xp the cosine of row x and proxy p, and P+ the classes that have a row.

    The proxies are the anchors here and their sums run over the rows of all ranks, so the loss is no sum of terms of
    local anchors. Every rank computes the whole and returns it as one term. Let L be the loss: `global_mean` gives
    W * L / W = L on each rank, `gather_pool` hands W copies of L's gradient to each row, and the engine's mean over
    ranks divides by W: one rank's gradient, for rows and proxies alike.

    Args:
        pool: Of all ranks, on the unit sphere.
        proxies: [C, D], of any length but 0.
        scale: alpha.
        margin: delta, a cosine.

    Returns:
        The loss, of one term, no anchor masked; computed in float32 for lower precisions. Memory is linear in N, time
        in N x C.
    """
    dtype = accumulation_dtype(pool.embeddings)
    anchors = nn.functional.normalize(proxies.to(dtype), dim=1)
    num_classes, num_rows = len(proxies), len(pool.labels)
    classes = torch.arange(num_classes, device=pool.labels.device)
    left_out = anchors.new_full((max(num_classes, num_rows),), -torch.inf)
    shift = torch.full_like(left_out, scale * margin)
    sums = [
        class_logsumexp(anchors, classes, pool.embeddings, pool.labels, factor, same[:num_classes], other[:num_rows])
        for factor, same, other in ((-scale, shift, left_out), (scale, left_out, shift))
    ]
    positive, negative = (torch.logaddexp(x, torch.zeros_like(x)) for x in sums)
    # A class without a row has the term log(1 + 0) = 0: only the divisor leaves it out.
    present = (torch.bincount(pool.labels, minlength=num_classes) > 0).sum().clamp(min=1)
    return LossSum(positive.sum() / present + negative.sum() / num_classes, 1, pool.labels[:0])
