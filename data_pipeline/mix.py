"""mixup and CutMix: training images made of two, after the graph, on the device.

mixup (Zhang et al. 2018, "mixup: Beyond empirical risk minimization", eq. 1) adds an image and its partner with shares
lambda and 1 - lambda; CutMix (Yun et al. 2019, eq. 1 and 2) fills a rectangle of the image with the partner's pixels.
The loss is then share * loss(own label) + (1 - share) * loss(partner's label).

Partners stand in the same canonical stream of the same batch, in a ring whose order is drawn: each sample is partner
once, so that classes keep their frequencies, and none its own, unless the stream has no other in the batch. Streams are
never cut by ranks: any world size mixes alike. Whether, how and how much is drawn for each sample by itself, and is the
same in all its views.

Legend: B samples of a rank, V views, px image side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.augment import Purpose, uniform_numbers
from data_pipeline.config import MixConfig

_TRIES = 16  # of the rejection below: all fail for one sample in 5e10
_NUMBERS = 2 * _TRIES + 8  # ring, whether, which, two for the shape of the hole; a multiple of 4


@dataclass(eq=False)
class Mix:
    """What the images of a batch are made of; labels of their own are in `Batch.labels`."""

    labels: torch.Tensor
    """int64 [B]: of the partners."""
    share: torch.Tensor
    """float32 [B]: of the image's own label, 1 = not mixed; for CutMix the share of pixels."""


def mix_batch(
    images: torch.Tensor,
    labels: torch.Tensor,
    positions: np.ndarray,
    streams: int,
    config: MixConfig,
    seed: int,
    epoch: int,
) -> tuple[torch.Tensor, Mix]:
    """Mix the images of a batch with each other.

    Args:
        images: Float [V * B, 3, px, px], view-major.
        labels: Int64 [B], on the images' device.
        positions: Int [B], of the samples in the epoch; those of one step.
        streams: Number of canonical streams.
        config: What is drawn.
        seed: The run's seed.
        epoch: From 0.

    Returns:
        New images, channels_last, and what they are made of. Where nothing is mixed the images themselves.
    """
    px, device = images.shape[-1], images.device
    partner, share, hole = draw_mix(positions, streams, config, (seed, epoch), px)
    rows = torch.from_numpy(partner).to(device)
    mix = Mix(labels[rows], torch.from_numpy(share.astype(np.float32)).to(device))
    if (share == 1).all():
        return images, mix
    weight = _weights(share, hole, px).to(device, images.dtype)
    views = images.permute(0, 2, 3, 1).unflatten(0, (-1, len(partner)))
    mixed = torch.lerp(views, views[:, rows], weight)  # exact where the weight is 0 or 1
    return mixed.flatten(0, 1).contiguous().permute(0, 3, 1, 2), mix


def draw_mix(
    positions: np.ndarray, streams: int, config: MixConfig, key: tuple[int, int], px: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Partners, shares and holes; arguments as of `mix_batch`, `key` is seed and epoch, `px` the images' side.

    Returns:
        Partner of each sample, int64 [B], by place in the batch; share of its own image, float64 [B]; rectangle that
        the partner fills, int64 [B, 4] (top, left, bottom, right; empty = mixup).
    """
    if not (config.mixup_alpha or config.cutmix_alpha):
        return np.arange(len(positions)), np.ones(len(positions)), np.zeros((len(positions), 4), dtype=np.int64)
    numbers = uniform_numbers(Purpose.MIX, key, positions, _NUMBERS)
    ring, chance, which, *centre = numbers[:, 2 * _TRIES : 2 * _TRIES + 5].T
    partner = _partners(ring, positions % streams)
    by_hole = which < (0.5 if config.mixup_alpha else 1.0) if config.cutmix_alpha else np.zeros(len(which), dtype=bool)
    alphas = np.where(by_hole, config.cutmix_alpha, config.mixup_alpha)
    share = np.ones(len(positions))
    for alpha in set(alphas.tolist()):
        share = np.where(alphas == alpha, _symmetric_beta(alpha, numbers[:, : 2 * _TRIES]), share)
    share = np.where((chance < config.probability) & (partner != np.arange(len(partner))), share, 1.0)
    hole = _holes(np.where(by_hole, share, 1.0), np.stack(centre, axis=1), px)
    area = (hole[:, 2] - hole[:, 0]) * (hole[:, 3] - hole[:, 1])
    return partner, np.where(by_hole, 1 - area / px**2, share), hole


def _partners(ring: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """For each sample the next of its stream in the order of `ring`, after the last the first; places in the batch."""
    order = np.lexsort((ring, stream))
    first = np.searchsorted(stream[order], stream[order])
    count = np.bincount(stream)[stream[order]]
    following = first + (np.arange(len(order)) - first + 1) % count
    partner = np.empty_like(order)
    partner[order] = order[following]
    return partner


def _symmetric_beta(alpha: float, numbers: np.ndarray) -> np.ndarray:
    """Beta(alpha, alpha) from a fixed stretch of uniform numbers.

    Over 1/2: Ulrich 1984, "Computer generation of distributions on the m-sphere", in closed form. Else Jöhnk 1964:
    U^(1/alpha) / (U^(1/alpha) + V^(1/alpha)) for the first pair of which the sum is at most 1; a pair is taken with
    probability pi / 4 at 1/2, and more often below. In logarithms, as the powers underflow.

    Args:
        alpha: Over 0.
        numbers: Float [B, 32] in [0, 1).
    """
    u, v = 1 - numbers[:, 0::2], numbers[:, 1::2]  # u in (0, 1]
    if alpha > 0.5:
        return 0.5 + 0.5 * np.sqrt(1 - u[:, 0] ** (2 / (2 * alpha - 1))) * np.cos(2 * np.pi * v[:, 0])
    log_u, log_v = np.log(u) / alpha, np.log(1 - v) / alpha
    log_sum = np.logaddexp(log_u, log_v)
    row, taken = np.arange(len(u)), (log_sum <= 0).argmax(axis=1)
    return np.exp(log_u[row, taken] - log_sum[row, taken])


def _holes(share: np.ndarray, centre: np.ndarray, px: int) -> np.ndarray:
    """Squares of area 1 - share about a centre anywhere, cut at the border (Yun et al. 2019, eq. 2); int64 [B, 4]."""
    side = np.rint(px * np.sqrt(1 - share))[:, None]
    top_left = np.floor(centre * px - side / 2 + 0.5)
    hole = np.clip(np.concatenate([top_left, top_left + side], axis=1), 0, px).astype(np.int64)
    empty = (hole[:, :2] >= hole[:, 2:]).any(axis=1)
    return np.where(empty[:, None], 0, hole)


def _weights(share: np.ndarray, hole: np.ndarray, px: int) -> torch.Tensor:
    """Of the partner at each pixel, float32, [B, 1, 1, 1] or, where there are holes, [B, px, px, 1]."""
    flat = torch.from_numpy(1 - share).float()[:, None, None]
    filled = torch.from_numpy(hole[:, 2] > hole[:, 0])
    if not filled.any():
        return flat[..., None]
    place = torch.arange(px)
    top, left, bottom, right = torch.from_numpy(hole).T[:, :, None]
    rows, columns = (place >= top) & (place < bottom), (place >= left) & (place < right)
    inside = (rows[:, :, None] & columns[:, None, :]).float()
    return torch.where(filled[:, None, None], inside, flat)[..., None]
