"""What the losses have in common: how they are built, configured and refused, and what they never hold in memory."""

from __future__ import annotations

import re
import sys
from typing import get_args

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluster.config import parse_config
from cluster.errors import UserError
from tests.losses import (
    CLASSIFICATION_LOSS_NAMES,
    COUNTS,
    DIM,
    FIRST,
    LABELS,
    LAST,
    METRIC_CASES,
    METRIC_LOSS_NAMES,
    NUM_CLASSES,
    build,
    embeddings,
    of_anchors,
)
from trainer import pairwise_blocks
from trainer.config import TrainerConfig
from trainer.loss_config import (
    COSINE_LOSSES,
    SAMPLES_PER_CLASS_LOSSES,
    UNIT_LENGTH_REASONS,
    ClassificationLossName,
    LossConfig,
    MetricLossName,
)
from trainer.losses import (
    CLASSIFICATION_LOSS_CLASSES,
    METRIC_LOSS_CLASSES,
    build_metric_loss,
    metric_rows,
)
from trainer.losses.base import Pool
from trainer.losses.batch_hard_triplet import batch_hard_triplet
from trainer.losses.class_logsumexp import class_logsumexp
from trainer.losses.cosface import CosineMargin


def test_every_configured_name_has_its_class_and_every_class_its_test():
    assert {*METRIC_LOSS_CLASSES, "none"} == set(get_args(MetricLossName))
    assert set(CLASSIFICATION_LOSS_CLASSES) == set(get_args(ClassificationLossName))
    assert {config.name for config, _ in METRIC_CASES.values()} == set(METRIC_LOSS_NAMES)
    for name, kind in METRIC_LOSS_CLASSES.items():
        assert kind.needs_unit_length == (name in UNIT_LENGTH_REASONS)
    for name, kind in CLASSIFICATION_LOSS_CLASSES.items():
        assert issubclass(kind, CosineMargin) == (name in COSINE_LOSSES)


def test_built_losses_have_their_parameters_and_nothing_for_none():
    assert build_metric_loss(LossConfig(name="none"), NUM_CLASSES, DIM, COUNTS) is None
    shapes = {
        name: {key: tuple(p.shape) for key, p in build(LossConfig(name=name)).named_parameters()}
        for name in METRIC_LOSS_NAMES
    }
    assert {name: shape for name, shape in shapes.items() if shape} == {
        "balanced_contrastive": {"prototypes": (NUM_CLASSES, DIM)},
        "centre": {"centres": (NUM_CLASSES, DIM)},
        "proxy_anchor": {"proxies": (NUM_CLASSES, DIM)},
    }
    assert list(build(LossConfig(name="balanced_contrastive", class_complement=False)).parameters()) == []
    # Every rank builds from the same seed.
    for ours, theirs in zip(
        *(build(LossConfig(name="proxy_anchor")).parameters() for _ in range(2)),
        strict=True,
    ):
        assert ours.equal(theirs)


@pytest.mark.parametrize("name", METRIC_LOSS_NAMES)
def test_one_class_is_refused(name):
    message = (
        f"stage_one.loss.name = '{name}' tells classes apart and the dataset has 1; give it two classes or more, or "
        f"set stage_one.loss.name: none"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build_metric_loss(LossConfig(name=name), 1, DIM, torch.tensor([7]))


@pytest.mark.parametrize("name", METRIC_LOSS_NAMES)
def test_embeddings_of_another_length_are_refused_where_it_matters(name):
    rows = embeddings(normalised=False)
    if name not in UNIT_LENGTH_REASONS:
        assert of_anchors(build(LossConfig(name=name)), rows).total.isfinite()
        return
    length = float(torch.linalg.vector_norm(rows[FIRST].detach()))
    message = (
        f"{name} needs embeddings of unit length and was given one of length {length:.4g}; set "
        f"stage_one.loss.normalise: true"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        of_anchors(build(LossConfig(name=name)), rows)


@pytest.mark.parametrize("name", METRIC_LOSS_NAMES)
def test_anchors_and_pool_of_different_types_are_refused(name):
    rows = embeddings(dtype=torch.float32)
    pool = Pool(rows.bfloat16(), LABELS, FIRST)
    message = f"{name}: anchors are torch.float32 and the pool is torch.bfloat16; convert them to one type"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build(LossConfig(name=name))(rows[FIRST:LAST], LABELS[FIRST:LAST], pool, 0.0)


def test_equal_embeddings_have_zero_not_nan_triplet_gradient():
    rows, labels = torch.ones(6, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 0, 0, 1, 1, 1])
    loss = batch_hard_triplet(rows, labels, Pool(rows, labels, 0), 0.2)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(6 * 0.2)
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_what_is_compared():
    generator = torch.Generator().manual_seed(0)
    features, outputs = (torch.randn(3, n, generator=generator, dtype=torch.bfloat16) for n in (7, 4))
    assert metric_rows(LossConfig(), features, outputs) is outputs
    rows = metric_rows(LossConfig(compare="feature"), features, outputs)
    torch.testing.assert_close(rows, functional.normalize(features.float(), dim=1))
    raw = metric_rows(LossConfig(name="centre", compare="feature", normalise=False), features, outputs)
    assert raw.dtype == torch.float32 and raw.equal(features.float())
    assert metric_rows(LossConfig(compare="feature"), features.double(), outputs).dtype == torch.float64


def test_lambda_grows_over_its_warm_up():
    assert [LossConfig(weight=0.5, warmup_epochs=4).weight_at(e) for e in (0, 1, 4, 9)] == [0, 0.125, 0.5, 0.5]
    assert LossConfig(weight=0.5).weight_at(0) == 0.5


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        *(
            (
                {"loss": {"name": name}},
                f"stage_one.loss.name = '{name}' needs batches of P classes x K samples; set "
                f"stage_one.sampling.classes_per_batch and samples_per_class",
            )
            for name in SAMPLES_PER_CLASS_LOSSES
        ),
        *(
            ({"loss": {"name": name, "normalise": False}}, f"stage_one.loss: {name} needs normalise: true, {reason}")
            for name, reason in UNIT_LENGTH_REASONS.items()
        ),
        *(
            (
                {"classification": {"name": name}},
                f"stage_one.classification.name = '{name}' has a margin between cosines, and the classifier is linear; "
                f"set model.cosine_scale, e.g. to 30",
            )
            for name in COSINE_LOSSES
        ),
        (
            {"classification": {"name": "focal", "label_smoothing": 0.1}},
            "stage_one.classification: label_smoothing = 0.1 does not go with focal, whose factor is that of one "
            "class; set label_smoothing: 0",
        ),
        *(
            (
                {"classification": {"name": "balanced_softmax"}, "sampling": sampling},
                "stage_one.classification.name = 'balanced_softmax' makes up for the class frequencies, and "
                "stage_one.sampling does so too; leave the sampling natural, or set "
                "stage_one.classification.double_correction: true if that is wanted",
            )
            for sampling in ({"power": 0.5}, {"classes_per_batch": 8, "samples_per_class": 8})
        ),
        (
            {"classification": {"reweight_from": 0.8}, "sampling": {"power": 0}},
            "stage_one.classification.reweight_from makes up for the class frequencies, and stage_one.sampling does "
            "so too; leave the sampling natural, or set stage_one.classification.double_correction: true if that is "
            "wanted",
        ),
        (
            {"classification": {"name": "logit_adjustd"}},
            "stage_one.classification.name = 'logit_adjustd' is not known; did you mean 'logit_adjusted'?",
        ),
        (
            {"loss": {"name": "proxy_ancor"}},
            "stage_one.loss.name = 'proxy_ancor' is not known; did you mean 'proxy_anchor'?",
        ),
    ],
)
def test_what_is_said_of_losses_that_do_not_suit(stage, message):
    with pytest.raises(UserError, match=f"^{re.escape(f'test.yaml: {message}')}$"):
        parse_config(TrainerConfig, {"stage_one": stage}, "test.yaml")


def test_what_suits_is_taken():
    batches = {"classes_per_batch": 8, "samples_per_class": 8}
    for name in METRIC_LOSS_NAMES:
        parse_config(TrainerConfig, {"stage_one": {"loss": {"name": name}, "sampling": batches}}, "x")
    for name in CLASSIFICATION_LOSS_NAMES:
        values = {"stage_one": {"classification": {"name": name}}, "model": {"cosine_scale": 30}}
        parse_config(TrainerConfig, values, "x")
    wanted = {"name": "balanced_softmax", "double_correction": True}
    parse_config(TrainerConfig, {"stage_one": {"classification": wanted, "sampling": {"power": 0}}}, "x")


def test_every_loss_names_its_paper_and_its_shapes():
    for name, kind in {**METRIC_LOSS_CLASSES, **CLASSIFICATION_LOSS_CLASSES}.items():
        module = sys.modules[kind.__module__]
        own = [thing for thing in vars(module).values() if getattr(thing, "__module__", None) == kind.__module__]
        methods = [method for thing in own if isinstance(thing, type) for method in vars(thing).values()]
        text = "\n".join(thing.__doc__ or "" for thing in (module, *own, *methods))
        assert re.search(r"arXiv|(CVPR|ECCV|ISBI) \d{4}", text), name
        assert re.search(r"\[[BNC](, [CD])?\]", text), name


def dense_class_logsumexp(anchors, anchor_labels, pool, pool_labels, scale, same_bias, row_bias, first):
    same = anchor_labels[:, None] == pool_labels[None]
    exponents = scale * anchors @ pool.T + torch.where(same, same_bias[:, None], row_bias[None])
    if first is not None:
        exponents[range(len(anchors)), range(first, first + len(anchors))] = -torch.inf
    return exponents.logsumexp(1)


@pytest.mark.parametrize("rows_per_block", [32, 33, 199, 200, 1000])
@pytest.mark.parametrize("scale", [0.5, -3.0, 500.0])
@pytest.mark.parametrize("first", [None, 0, 150])
def test_class_logsumexp_equals_the_dense_one_for_any_block(rows_per_block, scale, first, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(200, 4, generator=generator, dtype=torch.float64).requires_grad_()
    anchors = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    anchors = (anchors if first is None else pool.detach()[first : first + 40]).clone().requires_grad_()
    labels = torch.arange(200) % 7
    own = torch.arange(40) % 7 if first is None else labels[first : first + 40]
    same_bias, row_bias = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (40, 200))
    row_bias[::3] = -torch.inf
    same_bias[5] = -torch.inf
    arguments = (anchors, own, pool, labels, scale, same_bias, row_bias, first)
    monkeypatch.setitem(pairwise_blocks.BLOCK_BYTES, "cpu", 8 * 40 * rows_per_block)
    ours, dense = class_logsumexp(*arguments), dense_class_logsumexp(*arguments)
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    weights = torch.randn(40, generator=generator, dtype=torch.float64)
    for x, y in zip(
        torch.autograd.grad(ours, (anchors, pool), weights),
        torch.autograd.grad(dense, (anchors, pool), weights),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10 * abs(scale))


def test_class_logsumexp_of_no_row_is_minus_infinity_without_gradient():
    pool = embeddings()
    nothing = torch.full((len(LABELS),), -torch.inf, dtype=torch.float64)
    log_sum = class_logsumexp(pool[:3], LABELS[:3], pool, LABELS, 1.0, nothing[:3], nothing, 0)
    assert log_sum.tolist() == [-torch.inf] * 3
    (gradient,) = torch.autograd.grad(log_sum, pool, torch.ones(3, dtype=torch.float64))
    assert gradient.equal(torch.zeros_like(pool))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.num_bytes = max(self.num_bytes, leaf.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("name", METRIC_LOSS_NAMES)
def test_no_matrix_of_anchors_by_pool_is_ever_made(name):
    num_anchors, num_rows, num_classes = 256, 65_536, 20
    rows = torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(0))
    rows = functional.normalize(rows, dim=1).requires_grad_()
    labels = torch.arange(num_rows) % num_classes
    module = build_metric_loss(LossConfig(name=name), num_classes, 4, torch.full((num_classes,), 100))
    with LargestTensor() as largest:
        # As in training: a leaf of the anchors, and a pool gathered of it.
        loss = module(rows[:num_anchors], labels[:num_anchors], Pool(rows, labels, 0), 1.0)
        loss.total.backward()
    assert rows.grad.abs().max() > 0
    full = num_anchors * num_rows * rows.element_size()
    assert 4 * 4 * num_anchors <= largest.num_bytes <= full / 4
