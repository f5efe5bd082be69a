"""Fine-tuning's settings: what follows from the winner, which parameters learn, how a head becomes a classifier."""

import re

import pytest
import timm
import torch

from cluster.config import parse_config
from cluster.errors import UserError
from data_pipeline.config import SamplingConfig
from trainer.blocks import backbone_blocks, freeze_all_but
from trainer.classifiers import CosineLinear, UnitLinear, classifier_of
from trainer.config import ModelConfig
from trainer.finetune import fine_tuning
from trainer.heads import KNOBS, Head
from trainer.loss_config import ClassificationConfig
from trainer.losses import build_classification_loss
from trainer.model import build_model
from tuning.config import Config

NATURAL, CROSS_ENTROPY = SamplingConfig(), ClassificationConfig()
LINEAR = Head(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.arange(4.0))
COSINE = Head(20 * torch.nn.functional.normalize(LINEAR.weight, dim=1), torch.zeros(4), normalise=True)


def configured(**sections):
    return parse_config(Config, {"fine_tune": {"epochs": 3, **sections.pop("fine_tune", {})}, **sections}, "test.yaml")


def derived(winner, head=LINEAR, **sections):
    return fine_tuning(configured(**sections), winner, head, "macro_f1").config


FOLLOWS = {
    "crt": ({"power": 0.3}, SamplingConfig(power=0.3), CROSS_ENTROPY),
    "progressive": ({"power": 0.1}, SamplingConfig(power=1.0, power_last=0.1), CROSS_ENTROPY),
    "reweighted": ({"beta": 0.99}, NATURAL, ClassificationConfig(reweight_from=0.0, beta=0.99)),
    "balanced_softmax": ({}, NATURAL, ClassificationConfig(name="balanced_softmax")),
    "logit_adjusted": ({"tau": 1.3}, NATURAL, ClassificationConfig(name="logit_adjusted", tau=1.3)),
    "logit_adjustment": ({"tau": 0.7}, NATURAL, ClassificationConfig(name="logit_adjusted", tau=0.7)),
    "label_aware_smoothing": (
        {"power": 0.2, "smoothing": 0.4, "smoothing_tail": 0.1},
        SamplingConfig(power=0.2),
        CROSS_ENTROPY,
    ),
    "over_smoothing": (
        {"power": 0.0, "smoothing": 0.95},
        SamplingConfig(power=0.0),
        ClassificationConfig(label_smoothing=0.95),
    ),
    "lws": ({"power": 0.4}, SamplingConfig(power=0.4), CROSS_ENTROPY),
    "cosine": ({"power": 0.5, "scale": 20.0}, SamplingConfig(power=0.5), CROSS_ENTROPY),
    "ldam_drw": (
        {"margin": 0.3, "scale": 20.0, "beta": 0.999},
        NATURAL,
        ClassificationConfig(name="ldam", margin=0.3, reweight_from=0.8, beta=0.999),
    ),
    "tau_norm": ({"tau": 0.9}, SamplingConfig(power=0.0), CROSS_ENTROPY),
    "nearest_class_mean": ({"normalise": True}, SamplingConfig(power=0.0), CROSS_ENTROPY),
}


def test_every_family_may_win():
    assert {*FOLLOWS, "own"} == set(KNOBS)


@pytest.mark.parametrize("family", FOLLOWS)
def test_sampling_and_loss_are_the_winner_s(family):
    knobs, sampling, loss = FOLLOWS[family]
    cosine = family in ("cosine", "ldam_drw", "nearest_class_mean")
    config = derived({"winner": family, **knobs}, COSINE if cosine else LINEAR)
    stage = config.stage_one
    assert (stage.sampling, stage.classification) == (sampling, loss)
    assert config.model.cosine_scale == (pytest.approx(20.0) if cosine else None)
    build_classification_loss(stage.classification, torch.tensor([9, 5, 3, 2]), config.model.cosine_scale)
    assert stage.loss.name == "none" and stage.views == 1 and stage.epochs == 3 and stage.select_by == "macro_f1"


def test_the_own_classifier_goes_on_as_stage_one_trained_it():
    stage = {"classification": {"name": "focal"}, "sampling": {"power": 0.5}}
    config = derived({"winner": "own"}, stage_one=stage)
    assert config.stage_one.sampling.power == 0.5 and config.stage_one.classification.name == "focal"


def test_the_optimiser_is_stage_one_s_at_a_tenth_of_its_rate():
    optimiser = {"name": "sgd", "lr": 0.2, "momentum": 0.8, "schedule": "multi_step", "milestones_epochs": [60]}
    stage = {"optimiser": optimiser, "epochs": 90, "memory": {"rows": 64}, "batch_size": 32}
    made = derived({"winner": "balanced_softmax"}, stage_one=stage, fine_tune={"warmup_epochs": 0.25})
    tuned = made.stage_one.optimiser
    assert (tuned.name, tuned.momentum, tuned.schedule) == ("sgd", 0.8, "cosine") and made.stage_one.memory.rows == 0
    assert (tuned.lr, tuned.warmup_epochs) == (pytest.approx(0.02), 0.25) and made.stage_one.batch_size == 32
    assert derived({"winner": "own"}, fine_tune={"lr": 3e-5}).stage_one.optimiser.lr == 3e-5


def test_what_is_configured_goes_before_the_winner_and_nothing_is_corrected_twice():
    crt, aware = {"winner": "crt", "power": 0.0}, {"winner": "balanced_softmax"}
    softmax = {"classification": {"name": "balanced_softmax"}}
    assert derived(crt, fine_tune=softmax).stage_one.sampling == NATURAL
    balanced = derived(aware, fine_tune={"sampling": {"power": 0.0}}).stage_one
    assert (balanced.sampling.power, balanced.classification) == (0.0, CROSS_ENTROPY)
    both = {"classification": {"name": "focal"}, "sampling": {"power": 0.5}}
    chosen = derived(aware, fine_tune=both).stage_one
    assert (chosen.sampling.power, chosen.classification.name) == (0.5, "focal")
    twice = {"classification": {"name": "balanced_softmax", "double_correction": True}, "sampling": {"power": 0.5}}
    assert derived(crt, fine_tune=twice).stage_one.sampling.power == 0.5


@pytest.mark.parametrize(("batch_norm", "frozen"), [("frozen", True), ("reestimated", False)])
def test_batch_norm(batch_norm, frozen):
    config = derived({"winner": "own"}, model={"weights": "a.safetensors"}, fine_tune={"batch_norm": batch_norm})
    assert config.model.freeze_batch_norm is frozen and config.model.weights is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"fine_tune": {"classification": {"name": "ldam"}}},
            "fine_tune: classification.name = 'ldam' has a margin between cosines, and the winning head may be linear; "
            "leave classification out, and a winner of that kind brings its own margin",
        ),
        (
            {"fine_tune": {"classification": {"name": "balanced_softmax"}, "sampling": {"power": 0.5}}},
            "fine_tune: classification.name = 'balanced_softmax' makes up for the class frequencies, and sampling does "
            "so too; leave sampling out, or set classification.double_correction: true if that is wanted",
        ),
        (
            {"fine_tune": {"sampling": {"classes_per_batch": 7, "samples_per_class": 8}}},
            "fine_tune.sampling: classes_per_batch x samples_per_class = 56 must be stage_one.batch_size = 64",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_config(Config, values, "test.yaml")


class TestBlocks:
    @pytest.mark.parametrize(
        ("name", "number", "last"),
        [
            ("test_resnet", 5, "layer4."),
            ("test_efficientnet", 6, ("blocks.4.", "conv_head.", "bn2.")),
            ("test_vit", 7, ("blocks.5.", "norm.")),
            ("test_convnext", 5, ("stages.3.", "head.norm.")),  # timm counts the last norm as a group of its own
        ],
    )
    def test_they_are_timm_s_and_hold_every_parameter_once(self, name, number, last):
        backbone = timm.create_model(name, num_classes=0)
        blocks = backbone_blocks(backbone)
        assert len(blocks) == number and all(parameter.startswith(last) for parameter in blocks[-1])
        names = [parameter for block in blocks for parameter in block]
        assert sorted(names) == sorted(parameter for parameter, _ in backbone.named_parameters())

    @pytest.mark.parametrize("learning", [0, 1, 2, 5, "all"])
    def test_the_last_ones_and_the_classifier_learn(self, learning):
        model = build_model(ModelConfig(backbone="test_resnet", hidden_dim=8, embedding_dim=4), 3, 32)
        freeze_all_but(model, "test_resnet", learning)
        learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        prefixes = {
            0: ("classifier.",),
            1: ("classifier.", "backbone.layer4."),
            2: ("classifier.", "backbone.layer4.", "backbone.layer3."),
        }.get(learning, ("classifier.", "backbone."))
        assert learns == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}

    def test_more_than_there_are_is_refused(self):
        model = build_model(ModelConfig(backbone="test_resnet", hidden_dim=8, embedding_dim=4), 3, 32)
        with pytest.raises(UserError, match=r"= 9 is more than the 5 blocks of model.backbone = 'test_resnet'; "):
            freeze_all_but(model, "test_resnet", 9)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (LINEAR, torch.nn.Linear),
        (COSINE, CosineLinear),
        (Head(LINEAR.weight, torch.zeros(4), normalise=True), UnitLinear),
        (Head(COSINE.weight, torch.arange(4.0), normalise=True), UnitLinear),
    ],
    ids=["linear", "cosine", "lengths", "bias"],
)
def test_a_classifier_starts_as_the_head(head, kind):
    model = build_model(ModelConfig(backbone="test_resnet", hidden_dim=8, embedding_dim=4), 4, 32)
    model.classifier = classifier_of(head)
    assert type(model.classifier) is kind
    x = torch.randn(5, 6)
    assert torch.allclose(model.classifier(x), head.logits(x), atol=1e-4)
    again = model.own_head()
    assert again.normalise == head.normalise and torch.allclose(again.logits(x), head.logits(x), atol=1e-4)
