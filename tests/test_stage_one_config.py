"""Settings of stage one that do not go together, as a user meets them: one sentence each."""

import re

import pytest

from cluster.config import parse_config
from cluster.errors import UserError
from tuning.config import Config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"stage_one": {"loss": {"name": "class_centre_triplet"}}},
            "stage_one.loss.name = 'class_centre_triplet' needs batches of P classes x K samples; set "
            "stage_one.sampling.classes_per_batch and samples_per_class",
        ),
        (
            {"stage_one": {"classification": {"name": "arcface"}}},
            "stage_one.classification.name = 'arcface' has a margin between cosines, and the classifier is linear; set "
            "model.cosine_scale, e.g. to 30",
        ),
        (
            {"data": {"mix": {"cutmix_alpha": 1}}},
            "data.mix.probability = 1 gives every image two classes and stage_one.loss.name = 'supervised_contrastive' "
            "compares images of one class; set data.mix.probability to 0.5, or stage_one.loss.name: none",
        ),
        (
            {
                "data": {"mix": {"cutmix_alpha": 1, "probability": 0.5}},
                "stage_one": {
                    "loss": {"name": "class_centre_triplet"},
                    "sampling": {"classes_per_batch": 16, "samples_per_class": 4},
                },
            },
            "data.mix takes images out of the batches of P classes x K samples that stage_one.loss.name = "
            "'class_centre_triplet' needs; set both alphas of data.mix to 0, or another loss",
        ),
        (
            {"stage_one": {"loss": {"name": "none"}, "memory": {"rows": 64}}},
            "stage_one: memory.rows = 64 serves a metric loss and loss.name is 'none'; set memory.rows: 0",
        ),
        (
            {"stage_one": {"zero_stage": 3, "ema_decay": 0.999}},
            "stage_one: ema_decay = 0.999 needs the whole weights on every worker and zero_stage = 3 splits them; set "
            "zero_stage: 2 or ema_decay: null",
        ),
        (
            {"stage_one": {"zero_stage": 3, "compile": True}},
            "stage_one: compile = True and zero_stage = 3 do not go together, DeepSpeed's hooks cut the graph at every "
            "layer; set zero_stage: 2 or compile: false",
        ),
        (
            {"stage_one": {"optimiser": {"milestones_epochs": [3]}}},
            "stage_one.optimiser: schedule = 'cosine' and milestones_epochs = [3.0] do not go together; milestones are "
            "what multi_step needs, and nothing else does",
        ),
        (
            {"stage_one": {"optimiser": {"name": "adamm"}}},
            "stage_one.optimiser.name = 'adamm' is not known; did you mean 'adamw'?",
        ),
        ({"stage_one": {"zero_stage": 4}}, "stage_one.zero_stage = 4 is not known; known: 0, 1, 2, 3"),
        ({"stage_one": {"precision": "fp8"}}, "stage_one.precision = 'fp8' is not known; did you mean 'fp32'?"),
    ],
)
def test_what_is_said(values, message):
    with pytest.raises(UserError, match=f"^{re.escape(f'x: {message}')}$"):
        parse_config(Config, values, "x")


def test_what_goes_together():
    parse_config(
        Config,
        {
            "model": {"cosine_scale": 30, "sync_batch_norm": True, "checkpoint_activations": True},
            "stage_one": {
                "batch_size": 64,
                "sampling": {"classes_per_batch": 8, "samples_per_class": 8},
                "loss": {"name": "class_centre_triplet", "compare": "feature", "warmup_epochs": 2},
                "memory": {"rows": 1000},
                "classification": {"name": "cosface"},
                "optimiser": {"name": "deepspeed", "schedule": "multi_step", "milestones_epochs": [3, 5]},
                "deepspeed": {"optimizer": {"type": "NAdam"}, "zero_optimization": {"overlap_comm": False}},
                "zero_stage": 2,
                "ema_decay": 0.99,
                "precision": "bf16",
                "micro_batch_size": 8,
                "skip_nonfinite_steps": 3,
            },
        },
        "x",
    )
