"""Each metric loss against a plain loop over its definition in float64: value, gradient, masked anchors."""

from __future__ import annotations

import pytest
import torch

from tests.losses import FIRST, LABELS, LAST, METRIC_CASES, NUM_CLASSES, build, embeddings, of_anchors
from trainer.losses.base import Pool

CLASSES = range(NUM_CLASSES)


def distance(a, b):
    return torch.linalg.vector_norm(a - b)


def split(i, rows, labels):
    """The other rows: of anchor i's class, and of other classes."""
    others = [a for a in range(len(rows)) if a != i]
    return [a for a in others if labels[a] == labels[i]], [a for a in others if labels[a] != labels[i]]


def mean(terms, default):
    return sum(terms) / len(terms) if terms else default


# Each loop: (rows, labels, anchors, module) -> (total, number of terms, masked anchors).


def supervised_contrastive(rows, labels, anchors, module):
    """Khosla et al. 2020, eq. 2, one exponential at a time."""
    total, masked, temperature = rows.new_zeros(()), [], module.config.temperature
    for i in anchors:
        positives, negatives = split(i, rows, labels)
        if not positives:
            masked.append(i)
            continue
        denominator = sum(torch.exp(rows[i] @ rows[a] / temperature) for a in positives + negatives)
        terms = [torch.log(torch.exp(rows[i] @ rows[p] / temperature) / denominator) for p in positives]
        total = total - sum(terms) / len(positives)
    return total, len(anchors) - len(masked), masked


def balanced_contrastive(rows, labels, anchors, module):
    """Zhu et al. 2022: the denominator is a sum over classes of means, prototypes among the rows."""
    labels = labels.tolist()
    if module.prototypes is not None:
        rows = torch.cat([rows, torch.stack([p / torch.linalg.vector_norm(p) for p in module.prototypes])])
        labels = labels + list(CLASSES)
    total, masked = rows.new_zeros(()), []
    for i in anchors:
        exponentials = {a: torch.exp(rows[i] @ rows[a] / module.config.temperature) for a in range(len(rows)) if a != i}
        of_class = [[e for a, e in exponentials.items() if labels[a] == c] for c in CLASSES]
        denominator = sum(sum(members) / len(members) for members in of_class if members)
        if not of_class[labels[i]]:
            masked.append(i)
            continue
        total = total - mean([torch.log(e / denominator) for e in of_class[labels[i]]], None)
    return total, len(anchors) - len(masked), masked


def batch_hard(rows, labels, anchors, module):
    """Hermans et al. 2017, eq. 5."""
    total, masked = rows.new_zeros(()), []
    for i in anchors:
        positives, negatives = ([distance(rows[i], rows[a]) for a in part] for part in split(i, rows, labels))
        if not positives or not negatives:
            masked.append(i)
            continue
        total = total + torch.relu(module.config.margin + max(positives) - min(negatives))
    return total, len(anchors) - len(masked), masked


def semi_hard(rows, labels, anchors, module):
    """FaceNet, section 3.2, with the farthest positive: the nearest negative beyond it."""
    total, masked = rows.new_zeros(()), []
    for i in anchors:
        positives, negatives = ([distance(rows[i], rows[a]) for a in part] for part in split(i, rows, labels))
        beyond = [n for n in negatives if positives and n > max(positives)]
        if not beyond:
            masked.append(i)
            continue
        total = total + torch.relu(module.config.margin + max(positives) - min(beyond))
    return total, len(anchors) - len(masked), masked


def all_triplets(rows, labels, anchors, module):
    """Hermans et al. 2017, eq. 6, one triplet at a time."""
    terms, masked = [], []
    for i in anchors:
        positives, negatives = split(i, rows, labels)
        if not positives or not negatives:
            masked.append(i)
        for p in positives:
            for n in negatives:
                to_positive, to_negative = distance(rows[i], rows[p]), distance(rows[i], rows[n])
                terms.append(torch.relu(module.config.margin + to_positive - to_negative))
    active = sum(bool(term > 0) for term in terms)
    assert 0 < active < len(terms)
    return sum(terms), active if module.config.triplet_mean == "active" else len(terms), masked


def class_centre(rows, labels, anchors, module):
    """Lei et al. 2020: own centre against the nearest other one, centres over the whole pool."""
    members = {c: [rows[a] for a in range(len(rows)) if labels[a] == c] for c in CLASSES}
    centres = {c: sum(of_class) / len(of_class) for c, of_class in members.items() if of_class}
    total, masked = rows.new_zeros(()), []
    for i in anchors:
        own = int(labels[i])
        if len(members[own]) < 2:
            masked.append(i)
            continue
        nearest = min(distance(rows[i], centre) for c, centre in centres.items() if c != own)
        total = total + torch.relu(module.config.margin + distance(rows[i], centres[own]) - nearest)
    return total, len(anchors) - len(masked), masked


def centre(rows, labels, anchors, module):
    """Wen et al. 2016, eq. 2."""
    return sum(0.5 * ((rows[i] - module.centres[labels[i]]) ** 2).sum() for i in anchors), len(anchors), []


def multi_similarity(rows, labels, anchors, module):
    """Wang et al. 2019, eq. 10 over the pairs of eq. 7 and 8."""
    c, total, masked, mined_away = module.config, rows.new_zeros(()), [], 0
    for i in anchors:
        positives, negatives = ([rows[i] @ rows[a] for a in part] for part in split(i, rows, labels))
        if not positives or not negatives:
            masked.append(i)
            continue
        hard_positives = [s for s in positives if s - c.mining_margin < max(negatives)]
        hard_negatives = [s for s in negatives if s + c.mining_margin > min(positives)]
        mined_away += len(positives + negatives) - len(hard_positives + hard_negatives)
        pull = sum(torch.exp(-c.positive_scale * (s - c.similarity_base)) for s in hard_positives)
        push = sum(torch.exp(c.negative_scale * (s - c.similarity_base)) for s in hard_negatives)
        if hard_positives:  # then there are hard negatives too
            total = total + torch.log(1 + pull) / c.positive_scale + torch.log(1 + push) / c.negative_scale
    assert mined_away > 0
    return total, len(anchors) - len(masked), masked


def proxy_anchor(rows, labels, anchors, module):
    """Kim et al. 2020, eq. 4, over every row, not the anchors alone."""
    c, pull, push, present = module.config, rows.new_zeros(()), rows.new_zeros(()), 0
    for proxy_class in CLASSES:
        proxy = module.proxies[proxy_class] / torch.linalg.vector_norm(module.proxies[proxy_class])
        own = [rows[a] @ proxy for a in range(len(rows)) if labels[a] == proxy_class]
        others = [rows[a] @ proxy for a in range(len(rows)) if labels[a] != proxy_class]
        present += bool(own)
        pull = pull + torch.log(1 + sum((torch.exp(-c.proxy_scale * (s - c.proxy_margin)) for s in own), proxy[0] * 0))
        push = push + torch.log(1 + sum(torch.exp(c.proxy_scale * (s + c.proxy_margin)) for s in others))
    return pull / present + push / NUM_CLASSES, 1, []


LOOPS = {
    "supervised_contrastive": supervised_contrastive,
    "balanced_contrastive": balanced_contrastive,
    "batch_hard_triplet": batch_hard,
    "semi_hard_triplet": semi_hard,
    "all_triplet": all_triplets,
    "class_centre_triplet": class_centre,
    "progressive, triplets": batch_hard,
    "progressive, centres": class_centre,
    "centre": centre,
    "multi_similarity": multi_similarity,
    "proxy_anchor": proxy_anchor,
}


def loop_of(case):
    return LOOPS.get(case) or LOOPS[case.partition(",")[0]]


@pytest.mark.parametrize("case", METRIC_CASES)
def test_loss_equals_the_plain_loop(case):
    config, progress = METRIC_CASES[case]
    ours, plain = (embeddings(normalised=config.normalise) for _ in range(2))
    module, twin = build(config), build(config)
    result = of_anchors(module, ours, progress)
    total, count, masked = loop_of(case)(plain, LABELS, range(FIRST, LAST), twin)
    result.total.backward()
    total.backward()

    assert result.count == count
    assert result.masked.tolist() == [int(LABELS[i]) for i in masked]
    assert result.total.shape == ()
    torch.testing.assert_close(result.total, total, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-10)
    assert plain.grad.abs().max() > 0.01
    for own, expected in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-9, atol=1e-10)
        assert expected.grad.abs().max() > 0.01


@pytest.mark.parametrize("case", METRIC_CASES)
def test_gradient_passes_gradcheck(case):
    config, progress = METRIC_CASES[case]
    module = build(config)

    def total(rows, *parameters):
        return torch.func.functional_call(
            module,
            dict(zip(dict(module.named_parameters()), parameters, strict=True)),
            (rows[FIRST:LAST], LABELS[FIRST:LAST], Pool(rows, LABELS, FIRST), progress),
        ).total

    # A step of 1e-6 leaves the unit sphere by less than the check's tolerance.
    inputs = (embeddings(normalised=config.normalise), *(p.detach().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(total, inputs)


@pytest.mark.parametrize("case", METRIC_CASES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_embeddings_are_computed_in_float32(case, autocast):
    config, progress = METRIC_CASES[case]
    # The loop gets the same rounded embeddings in float64: what is left is the error of the computation alone.
    ours = embeddings(normalised=config.normalise, dtype=torch.bfloat16)
    plain = ours.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = of_anchors(build(config).float(), ours, progress)
    total, count, _ = loop_of(case)(plain, LABELS, range(FIRST, LAST), build(config))
    result.total.backward()
    total.backward()

    assert result.total.dtype == torch.float32
    assert result.count == count
    # Prototypes are rows of the pool and rounded as it is.
    rounding = 2**-7 if case == "balanced_contrastive" else 2e-5
    torch.testing.assert_close(result.total.double(), total, rtol=rounding, atol=0)
    assert ours.grad.dtype == torch.bfloat16
    # The gradient is rounded to bf16 (2^-9) where it leaves each of the two inputs.
    slack = 2**-5 if case == "balanced_contrastive" else 2**-7
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=slack, atol=slack * float(plain.grad.abs().max()))


@pytest.mark.parametrize("case", METRIC_CASES)
def test_float32_under_autocast_stays_float32(case):
    config, progress = METRIC_CASES[case]
    rows, module = embeddings(normalised=config.normalise, dtype=torch.float32), build(config).float()
    expected = of_anchors(module, rows, progress).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = of_anchors(module, rows, progress).total
    assert total.dtype == torch.float32
    assert total.equal(expected)
    (gradient,) = torch.autograd.grad(expected, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.autograd.grad(total, rows)[0].equal(gradient)


def test_frozen_rows_of_past_batches_take_part_without_gradient():
    for case, (config, progress) in METRIC_CASES.items():
        if config.name == "centre":
            continue
        rows, module = embeddings(normalised=config.normalise), build(config)
        frozen = embeddings(seed=1, normalised=config.normalise).detach()
        labels = torch.cat([LABELS, LABELS])
        pool = Pool(torch.cat([rows, frozen]), labels, FIRST)
        loss = module(rows[FIRST:LAST], LABELS[FIRST:LAST], pool, progress)
        plain = embeddings(normalised=config.normalise)
        total, count, _ = loop_of(case)(torch.cat([plain, frozen]), labels, range(FIRST, LAST), build(config))
        torch.testing.assert_close(loss.total, total, rtol=1e-10, atol=1e-10)
        assert loss.count == count
        torch.testing.assert_close(*(torch.autograd.grad(x, r)[0] for x, r in ((loss.total, rows), (total, plain))))
