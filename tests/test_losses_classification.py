"""Each classification loss against its definition, one sample at a time in float64: value, gradient, limits."""

from __future__ import annotations

import math
import re

import pytest
import torch

from cluster.errors import UserError
from tests.losses import CLASSIFICATION_CASES, COSINE_SCALE, COUNTS, NUM_CLASSES
from trainer.loss_config import ClassificationConfig
from trainer.losses import build_classification_loss
from trainer.losses.arcface import ArcFace
from trainer.losses.classification import cross_entropy
from trainer.losses.frequency import effective_number_weights, frequency_margins, log_prior

LABELS = torch.tensor([0, 3, 1, 1, 8, 7])
SEEN = [max(int(n), 1) for n in COUNTS]  # a class without a training sample counts as if it had one


def logits(dtype=torch.float64):
    """Cosines times the scale: every loss can be given them."""
    cosines = torch.rand(len(LABELS), NUM_CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (COSINE_SCALE * (1.8 * cosines - 0.9)).to(dtype).requires_grad_()


def build(config):
    return build_classification_loss(config, COUNTS, COSINE_SCALE)


def log_softmax_at(z, y):
    return z[y] - torch.log(sum(torch.exp(value) for value in z))


def cross_entropy_of(z, y, config):
    """With label smoothing: eps / C on every class, 1 - eps besides on the label."""
    eps = config.label_smoothing
    spread = sum(log_softmax_at(z, c) for c in range(NUM_CLASSES)) / NUM_CLASSES
    return -(1 - eps) * log_softmax_at(z, y) - eps * spread


def margin_of(config, y):
    largest = config.margin or {"ldam": 0.5, "cosface": 0.35, "arcface": 0.5}[config.name]
    if config.name == "ldam" or config.margin_by_frequency:
        return largest * SEEN[y] ** -0.25 / max(n**-0.25 for n in SEEN)
    return largest


def changed(z, y, config):
    """The logits before the softmax, by the paper of each loss."""
    prior = torch.log(torch.tensor([n / sum(SEEN) for n in SEEN], dtype=torch.float64))
    at_label = torch.zeros(NUM_CLASSES, dtype=torch.float64)
    at_label[y] = 1
    if config.name == "balanced_softmax":
        return z + prior
    if config.name == "logit_adjusted":
        return z + config.tau * prior
    if config.name in ("ldam", "cosface"):
        return z - COSINE_SCALE * margin_of(config, y) * at_label
    if config.name == "arcface":
        angle, margin = torch.acos(z[y] / COSINE_SCALE), margin_of(config, y)
        rising = angle > math.pi - margin
        cosine = torch.cos(angle) - margin * math.sin(margin) if rising else torch.cos(angle + margin)
        return z * (1 - at_label) + COSINE_SCALE * cosine * at_label
    return z


def weight_of(config, progress, y):
    if config.reweight_from is None or progress < config.reweight_from:
        return 1.0
    raw = [1 / n if config.beta == 1 else (1 - config.beta) / (1 - config.beta**n) for n in SEEN]
    return raw[y] * sum(SEEN) / sum(w * n for w, n in zip(raw, SEEN, strict=True))


def loop(z, labels, config, progress, weights):
    total = z.new_zeros(())
    for row, y, weight in zip(z, labels.tolist(), weights, strict=True):
        if config.name == "focal":
            log_p = log_softmax_at(row, y)
            term = -((1 - torch.exp(log_p)) ** config.gamma) * log_p
        else:
            term = cross_entropy_of(changed(row, y, config), y, config)
        total = total + weight * weight_of(config, progress, y) * term
    return total


@pytest.mark.parametrize("case", CLASSIFICATION_CASES)
@pytest.mark.parametrize("weights", [None, torch.tensor([0.3, 1.0, 0.0, 0.5, 1.0, 0.9])])
def test_loss_equals_the_plain_loop(case, weights):
    config, progress = CLASSIFICATION_CASES[case]
    ours, plain = logits(), logits()
    loss = build(config)(ours, LABELS, progress, weights)
    total = loop(plain, LABELS, config, progress, torch.ones(6).double() if weights is None else weights.double())
    torch.testing.assert_close(loss.total, total, rtol=1e-10, atol=1e-10)
    gradient = torch.autograd.grad(total, plain)[0]
    torch.testing.assert_close(torch.autograd.grad(loss.total, ours)[0], gradient, rtol=1e-9, atol=1e-10)
    assert gradient.abs().max() > 0.1
    assert loss.count == 6
    assert loss.masked.tolist() == []


@pytest.mark.parametrize("case", CLASSIFICATION_CASES)
def test_gradient_passes_gradcheck(case):
    config, progress = CLASSIFICATION_CASES[case]
    module = build(config)
    assert torch.autograd.gradcheck(lambda z: module(z, LABELS, progress).total, (logits(),))


@pytest.mark.parametrize("case", CLASSIFICATION_CASES)
def test_bf16_logits_are_computed_in_float32_and_no_sample_is_a_zero(case):
    config, progress = CLASSIFICATION_CASES[case]
    ours = logits(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = build(config)(ours, LABELS, progress).total
    expected = loop(ours.detach().double(), LABELS, config, progress, [1.0] * 6)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    empty = build(config)(ours[:0], LABELS[:0], progress)
    assert empty.total == 0 and empty.count == 0 and empty.total.requires_grad


@pytest.mark.parametrize("case", CLASSIFICATION_CASES)
def test_sure_logits_have_finite_losses_and_gradients(case):
    config, progress = CLASSIFICATION_CASES[case]
    for sure in (0, 1):  # of the label, or of another class
        z = torch.full((len(LABELS), NUM_CLASSES), -COSINE_SCALE)
        z[range(len(LABELS)), (LABELS + sure) % NUM_CLASSES] = COSINE_SCALE * (1 + 1e-6)
        if config.name not in ("ldam", "cosface", "arcface"):
            z *= 100
        z.requires_grad_()
        loss = build(config)(z, LABELS, progress).total
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()


def test_the_default_is_the_cross_entropy_to_the_last_bit():
    z = logits(torch.float32)
    expected = torch.nn.functional.cross_entropy(z, LABELS, reduction="sum")
    assert build_classification_loss(ClassificationConfig(), COUNTS)(z, LABELS).total.equal(expected)
    assert cross_entropy(z, LABELS).total.equal(expected)


def test_losses_meet_where_one_is_the_others_limit():
    def total(**settings):
        return build(ClassificationConfig(**settings))(logits(), LABELS).total

    plain = total()
    torch.testing.assert_close(total(name="focal", gamma=0), plain)
    torch.testing.assert_close(total(name="logit_adjusted", tau=0), plain)
    torch.testing.assert_close(total(name="logit_adjusted", tau=1), total(name="balanced_softmax"))
    torch.testing.assert_close(total(name="cosface", margin=0), plain)
    torch.testing.assert_close(total(name="arcface", margin=0), plain)
    torch.testing.assert_close(total(name="cosface", margin=0.5, margin_by_frequency=True), total(name="ldam"))
    torch.testing.assert_close(total(reweight_from=0, beta=0), plain)


def test_the_prior_is_added_in_training():
    # With the sign turned round, as code has had it, the rare class would need a *smaller* logit than the common one.
    z = torch.zeros(1, NUM_CLASSES, dtype=torch.float64, requires_grad=True)
    common, rare = 0, 3
    slopes = []
    for label in (common, rare):
        loss = build(ClassificationConfig(name="logit_adjusted"))(z, torch.tensor([label])).total
        slopes.append(-float(torch.autograd.grad(loss, z)[0][0, label]))
    assert slopes[1] > slopes[0] > 0


def test_mixed_samples_are_two_weighted_calls():
    module, share, partner = build(ClassificationConfig()), torch.tensor([0.7, 1, 0.2, 0.5, 0.9, 0.4]), LABELS.flip(0)
    z = logits()
    mixed = module(z, LABELS, 0.0, share).total + module(z, partner, 0.0, 1 - share).total
    soft = torch.zeros_like(z).scatter_add_(1, LABELS[:, None], share.double()[:, None])
    soft.scatter_add_(1, partner[:, None], 1 - share.double()[:, None])
    torch.testing.assert_close(mixed, -(soft * z.log_softmax(1)).sum(), rtol=1e-6, atol=1e-6)


def test_margins_weights_and_prior_of_the_frequencies():
    counts = torch.tensor([16, 1, 0, 81])
    torch.testing.assert_close(frequency_margins(counts, 0.6).tolist(), [0.3, 0.6, 0.6, 0.2])
    torch.testing.assert_close(log_prior(torch.tensor([1, 3])).exp().tolist(), [0.25, 0.75])
    inverse = effective_number_weights(torch.tensor([1, 4]), 1.0)
    torch.testing.assert_close((inverse[0] / inverse[1]).item(), 4.0)
    for beta in (0.0, 0.9, 0.9999, 1.0):
        weights = effective_number_weights(COUNTS, beta)
        samples = torch.tensor(SEEN, dtype=torch.float64)
        torch.testing.assert_close(float((weights * samples).sum() / samples.sum()), 1.0)
    # Close to 1 the difference 1 - beta^n cancels: the limit shows that it is made well.
    torch.testing.assert_close(effective_number_weights(COUNTS, 1 - 1e-13), effective_number_weights(COUNTS, 1.0))


def test_arcface_falls_with_the_angle_everywhere():
    angles = torch.linspace(0.01, math.pi - 0.01, 400, dtype=torch.float64)
    z = torch.stack([COSINE_SCALE * angles.cos(), torch.zeros_like(angles)], 1)
    module = ArcFace(ClassificationConfig(name="arcface", margin=0.5), torch.tensor([5, 5]), COSINE_SCALE)
    adjusted = module.adjust(z, torch.zeros(400, dtype=torch.int64))
    assert (adjusted[1:, 0] < adjusted[:-1, 0]).all()
    assert (adjusted[:, 0] < z[:, 0]).all() and (adjusted[:, 1] == 0).all()


@pytest.mark.parametrize("name", ["ldam", "cosface", "arcface"])
def test_a_margin_of_the_cosine_needs_a_cosine_classifier(name):
    message = (
        f"stage_one.classification.name = '{name}' has a margin between cosines, and the classifier is linear; set "
        f"model.cosine_scale, e.g. to 30"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build_classification_loss(ClassificationConfig(name=name), COUNTS)


def test_a_checkpoint_holds_nothing_that_follows_from_the_data():
    for config, _ in CLASSIFICATION_CASES.values():
        assert build(config).state_dict() == {}
