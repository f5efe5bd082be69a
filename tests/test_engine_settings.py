"""What the engine is given: DeepSpeed's settings, groups of parameters, and settings that it refuses."""

import re

import pytest
import torch
from torch import nn

from cluster.errors import UserError
from tests.engines import BATCH, Proxies, stage, tiny_model
from trainer.engine import deepspeed_settings
from trainer.optimiser import build_optimiser, parameter_groups


def test_options_that_the_optimiser_does_not_know_are_named():
    message = r"^stage_one.optimiser.options = \{'beta': 1\} do not suit adamw \(.*'beta'\); give arguments of that"
    with pytest.raises(UserError, match=message):
        build_optimiser(
            [{"params": [nn.Parameter(torch.zeros(1))]}], stage(optimiser={"options": {"beta": 1}}).optimiser
        )


def test_the_raw_section_is_merged_last():
    raw = {"zero_optimization": {"overlap_comm": False}, "gradient_clipping": 2.0, "comms_logger": {"enabled": True}}
    config = stage(zero_stage=3, deepspeed=raw, optimiser={"clip_norm": 1.0})
    settings = deepspeed_settings(config, world=3)
    assert settings["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert settings["gradient_clipping"] == 2.0 and settings["comms_logger"] == {"enabled": True}
    assert settings["train_micro_batch_size_per_gpu"] == BATCH // 3
    assert deepspeed_settings(stage(), 1)["zero_optimization"] == {"stage": 0}
    raw = {"optimizer": {"type": "NAdam", "params": {"lr": 1.0, "momentum_decay": 0.1}}}
    config = stage(optimiser={"name": "deepspeed"}, deepspeed=raw)
    assert deepspeed_settings(config, 1)["optimizer"] == raw["optimizer"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_decay": 0.9, "zero_stage": 3}, "ema_decay = 0.9 needs the whole weights on every worker and zero_stage"),
        (
            {"optimiser": {"name": "lamb"}, "zero_stage": 2},
            "optimiser.name = 'lamb' scales each layer by its own norm and zero_stage = 2 flattens the layers into "
            "one; set zero_stage: 0",
        ),
        (
            {"optimiser": {"name": "deepspeed"}},
            "optimiser.name = 'deepspeed' and deepspeed.optimizer = None do not go together; set optimiser.name",
        ),
        (
            {"deepspeed": {"optimizer": {"type": "Lion"}}},
            "optimiser.name = 'adamw' and deepspeed.optimizer = {'type': 'Lion'} do not go together",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}}},
            "deepspeed.zero_optimization.stage is for this program to set; set stage_one.zero_stage instead",
        ),
        (
            {"deepspeed": {"gradient_accumulation_steps": 2}},
            "deepspeed.gradient_accumulation_steps is for this program to set; set stage_one.micro_batch_size instead",
        ),
        (
            {"deepspeed": {"bf16": {"enabled": True}}},
            "deepspeed.bf16.enabled is for this program to set; set stage_one.precision instead",
        ),
        (
            {"optimiser": {"schedule": "multi_step"}},
            "schedule = 'multi_step' and milestones_epochs = [] do not go together; milestones are what multi_step",
        ),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stage(**changes)


def test_biases_norms_and_the_losss_own_parameters_are_not_decayed():
    model, of_loss = tiny_model(), list(Proxies().parameters())
    groups = parameter_groups(model, of_loss, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])
    assert groups[2]["params"] == of_loss
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) + 1
    assert len(parameter_groups(model, [], 0.1)) == 2
