import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest

from data_pipeline.config import MixConfig
from data_pipeline.mix import draw_mix, mix_batch

PX = 20
BOTH = MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.9)


def drawn(config, size=4000, streams=8, px=224, seed=0, epoch=0, positions=None):
    positions = np.arange(size) if positions is None else positions
    return draw_mix(positions, streams, config, (seed, epoch), px)


def batch(size, views=1, dtype=torch.float32, px=PX):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(views * size, 3, px, px, generator=generator).to(dtype)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(size) % 5


def by_loop(images, labels, partner, share, hole):
    """Oracle: pixel by pixel in float64."""
    views, size = len(images) // len(labels), len(labels)
    pixels = images.permute(0, 2, 3, 1).double().numpy()
    mixed = pixels.copy()
    for view in range(views):
        for i in range(size):
            own, other = pixels[view * size + i], pixels[view * size + partner[i]]
            top, left, bottom, right = hole[i]
            for y in range(PX):
                for x in range(PX):
                    if bottom > top:
                        if top <= y < bottom and left <= x < right:
                            mixed[view * size + i, y, x] = other[y, x]
                    else:
                        mixed[view * size + i, y, x] = share[i] * own[y, x] + (1 - share[i]) * other[y, x]
    return torch.from_numpy(mixed).permute(0, 3, 1, 2)


@pytest.mark.parametrize("config", [BOTH, MixConfig(mixup_alpha=0.2), MixConfig(cutmix_alpha=1.0)])
@pytest.mark.parametrize("views", [1, 2])
def test_images_and_shares_against_a_loop(config, views):
    images, labels = batch(24, views)
    positions = np.arange(96, 120)
    partner, share, hole = drawn(config, px=PX, positions=positions)
    before = images.clone()
    mixed, mix = mix_batch(images, labels, positions, 8, config, 0, 0)
    assert torch.equal(images, before) and mixed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(mixed.double(), by_loop(images, labels, partner, share, hole), rtol=1e-5, atol=1e-6)
    assert torch.equal(mix.labels, labels[partner]) and mix.labels.dtype == torch.int64
    assert mix.share.dtype == torch.float32
    np.testing.assert_allclose(mix.share.numpy(), share, atol=1e-7)
    for i in np.flatnonzero(hole[:, 2] > hole[:, 0]):  # the share of a hole is the share of pixels that stayed
        kept = (mixed[i] == images[i]).all(dim=0).double().mean().item()
        assert share[i] == pytest.approx(kept, abs=1e-9)


def test_images_that_are_not_mixed_keep_every_bit():
    images, labels = batch(64)
    mixed, mix = mix_batch(images, labels, np.arange(64), 8, MixConfig(mixup_alpha=1.0, probability=0.5), 0, 0)
    kept = mix.share == 1
    assert 10 < kept.sum() < 54
    assert torch.equal(mixed[kept], images[kept]) and (mixed[~kept] != images[~kept]).any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("config", [MixConfig(), MixConfig(mixup_alpha=1.0, probability=0.0)])
def test_without_mixing_the_images_are_those_that_came(config):
    images, labels = batch(16)
    mixed, mix = mix_batch(images, labels, np.arange(16), 8, config, 0, 0)
    assert mixed is images and (mix.share == 1).all()


def test_partners_stand_in_the_same_stream_each_once_and_none_is_its_own():
    positions = np.arange(800, 864)
    partner, share, _ = drawn(BOTH, positions=positions)
    assert sorted(partner.tolist()) == list(range(64))
    assert (positions[partner] % 8 == positions % 8).all()
    assert (partner != np.arange(64)).all()
    pairs = {tuple(drawn(BOTH, positions=positions, seed=seed)[0].tolist()) for seed in range(20)}
    assert len(pairs) == 20  # the ring is drawn
    alone, share, hole = drawn(BOTH, positions=np.arange(8))
    assert (alone == np.arange(8)).all() and (share == 1).all() and not hole.any()


def test_every_partner_of_a_stream_is_as_likely_as_any_other():
    counts = np.zeros((4, 4))
    for epoch in range(600):
        partner, _, _ = drawn(BOTH, positions=np.arange(4), streams=1, epoch=epoch)
        counts[np.arange(4), partner] += 1
    assert not counts.diagonal().any()
    assert np.abs(counts[~np.eye(4, dtype=bool)] - 200).max() < 5 * np.sqrt(600 * (1 / 3) * (2 / 3))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_any_world_size_mixes_alike(world):
    """A rank holds whole streams of the batch; the union of the ranks' images is what one rank makes."""
    images, labels = batch(64, views=2)
    positions = np.arange(640, 704)
    whole, mix = mix_batch(images, labels, positions, 8, BOTH, 3, 1)
    for rank in range(world):
        rows = np.flatnonzero(positions % 8 * world // 8 == rank)
        both = np.concatenate([rows, 64 + rows])
        part, part_mix = mix_batch(images[both], labels[rows], positions[rows], 8, BOTH, 3, 1)
        assert torch.equal(part, whole[both])
        assert torch.equal(part_mix.labels, mix.labels[rows]) and torch.equal(part_mix.share, mix.share[rows])


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 0.51, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha):
    """Each half by itself: close to 1 float64 is too coarse for a small alpha."""
    _, share, hole = drawn(MixConfig(mixup_alpha=alpha), size=8000)
    assert not hole.any() and (share >= 0).all() and (share <= 1).all()
    assert abs((share < 0.5).mean() - 0.5) < 5 * 0.5 / np.sqrt(8000)
    assert kstest(share[share < 0.5], lambda x: 2 * beta(alpha, alpha).cdf(x)).pvalue > 1e-3
    if alpha >= 0.2:
        assert kstest(1 - share[share > 0.5], lambda x: 2 * beta(alpha, alpha).cdf(x)).pvalue > 1e-3


def test_holes_have_the_area_that_was_drawn_and_any_place():
    _, share, hole = drawn(MixConfig(cutmix_alpha=1.0), size=8000, px=224)
    top, left, bottom, right = hole.T
    assert (hole >= 0).all() and (hole <= 224).all()
    np.testing.assert_allclose(share, 1 - (bottom - top) * (right - left) / 224**2, atol=1e-12)
    inside = (top > 0) & (left > 0) & (bottom < 224) & (right < 224)
    assert ((bottom - top) == (right - left))[inside].all()
    # Uniform lambda: the side is 224 sqrt(1 - lambda), cut at the border; the centre lies anywhere.
    assert abs(((top + bottom) / 2)[inside].mean() - 112) < 3 and abs(((left + right) / 2)[inside].mean() - 112) < 3
    rng = np.random.default_rng(0)
    half, centre = 112 * np.sqrt(1 - rng.random(100_000)), rng.uniform(0, 224, (2, 100_000))
    sides = np.minimum(centre + half, 224) - np.maximum(centre - half, 0)
    assert abs(share.mean() - (1 - sides.prod(axis=0) / 224**2).mean()) < 0.015


def test_both_share_the_images_half_each():
    _, share, hole = drawn(BOTH)
    by_hole, mixed = hole[:, 2] > hole[:, 0], share < 1
    assert abs(mixed.mean() - 0.9) < 0.02
    assert abs(by_hole.sum() / mixed.sum() - 0.5) < 0.05


def test_half_precision():
    images, labels = batch(16, dtype=torch.float16)
    mixed, _ = mix_batch(images, labels, np.arange(16), 2, BOTH, 0, 0)
    exact, _ = mix_batch(images.float(), labels, np.arange(16), 2, BOTH, 0, 0)
    assert mixed.dtype == torch.float16
    torch.testing.assert_close(mixed.float(), exact, rtol=2e-3, atol=2e-3)


def test_other_seeds_and_epochs_mix_otherwise():
    reference = drawn(BOTH, size=64)
    for other in (drawn(BOTH, size=64, seed=1), drawn(BOTH, size=64, epoch=1)):
        assert all((a != b).any() for a, b in zip(reference, other, strict=True))
