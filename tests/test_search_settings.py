"""What the search over stage one may try: any setting by its name, defaults for every loss, Optuna's proposals."""

from typing import get_args

import numpy as np
import pytest
from ray import tune

from cluster.config import parse_config
from cluster.errors import UserError
from trainer.loss_config import (
    PRIOR_AWARE_LOSSES,
    SAMPLES_PER_CLASS_LOSSES,
    ClassificationLossName,
    MetricLossName,
)
from tuning.config import Config, Range
from tuning.proposals import optuna_search
from tuning.settings import CLASSIFICATION_SPACES, METRIC_SPACES, search_space, tune_space, with_choices


def test_optuna_s_proposals_come_closer_to_what_scored_well():
    """Its sampler is driven as Tune drives it; values drawn at random from [0, 1] stay .37 away from .15 on average."""
    proposals = optuna_search(0)
    assert proposals.set_search_properties(None, None, {"stage_one.loss.weight": tune.uniform(0.0, 1.0)})
    away = []
    for number in range(60):
        away.append(abs(proposals.suggest(str(number))["stage_one.loss.weight"] - 0.15))
        proposals.on_trial_complete(str(number), {"score": -away[-1]})
    late, early = np.mean(away[40:]), np.mean(away[:10])
    assert late < 0.15 and early > 0.25


class TestSpace:
    def config(self, **sections):
        return parse_config(Config, {"model": {"embedding_dim": 8}, **sections}, "test")

    def test_defaults_follow_the_loss(self):
        space = search_space(self.config())
        assert set(space) == {
            "stage_one.loss.weight",
            "stage_one.sampling.power",
            "stage_one.loss.temperature",
            "stage_one.optimiser.lr",
        }
        assert "stage_one.sampling.power" not in search_space(
            self.config(stage_one={"classification": {"name": "balanced_softmax"}})
        )
        triplet = {"loss": {"name": "batch_hard_triplet"}}
        assert "stage_one.loss.margin" in search_space(self.config(stage_one=triplet))
        raw = {"loss": {"name": "batch_hard_triplet", "normalise": False}}
        assert search_space(self.config(stage_one=raw))["stage_one.loss.margin"].uniform == (5.0, 100.0)

    @pytest.mark.parametrize("metric", METRIC_SPACES)
    @pytest.mark.parametrize("classification", CLASSIFICATION_SPACES)
    def test_every_loss_has_defaults_whose_ends_are_valid(self, metric, classification):
        in_batches = {"classes_per_batch": 8, "samples_per_class": 8}
        stage = {"loss": {"name": metric}, "classification": {"name": classification}}
        aware = classification in PRIOR_AWARE_LOSSES
        if aware and metric in SAMPLES_PER_CLASS_LOSSES:
            stage["classification"]["double_correction"] = True
        if metric in SAMPLES_PER_CLASS_LOSSES:
            stage["sampling"] = in_batches
        config = self.config(stage_one=stage, model={"embedding_dim": 8, "cosine_scale": 30.0})
        space = search_space(config)
        for end in (0, 1):
            with_choices(config, {name: (r.uniform or r.log_uniform)[end] for name, r in space.items()})
        assert ("stage_one.sampling.power" in space) == (not aware or metric in SAMPLES_PER_CLASS_LOSSES)
        own = {name.split(".")[2] for name in space if name.startswith("stage_one.loss.")} - {"weight"}
        assert bool(own) == (metric != "none")

    def test_every_loss_is_there(self):
        assert set(METRIC_SPACES) == set(get_args(MetricLossName))
        assert set(CLASSIFICATION_SPACES) == set(get_args(ClassificationLossName))

    def test_settings_that_go_together_are_searched_as_a_section(self):
        ways = [{"power": 0.5}, {"classes_per_batch": 16, "samples_per_class": 4}]
        config = self.config(search={"space": {"stage_one.sampling": {"choice": ways}}})
        assert search_space(config)["stage_one.sampling"].choice == tuple(ways)
        natural, p_by_k = (with_choices(config, {"stage_one.sampling": way}).stage_one.sampling for way in ways)
        assert natural.power == 0.5 and natural.classes_per_batch is None
        assert (p_by_k.power, p_by_k.classes_per_batch, p_by_k.samples_per_class) == (1.0, 16, 4)
        proposals = optuna_search(config.seed)
        proposals.set_search_properties(None, None, tune_space(search_space(config)))
        drawn = [proposals.suggest(str(number))["stage_one.sampling"] for number in range(12)]
        assert all(way in drawn for way in ways)

    def test_any_setting_can_be_named(self):
        config = self.config(search={"space": {"stage_one.views": {"choice": [1, 2]}}})
        assert search_space(config) == {"stage_one.views": Range(choice=(1, 2))}
        assert with_choices(config, {"stage_one.views": 1}).stage_one.views == 1

    def test_the_loss_itself_can_be_varied(self):
        """By its name, whether features are normalised, or as a section, whose settings go together."""
        losses = [
            {"name": "multi_similarity", "negative_scale": 40.0},
            {"name": "batch_hard_triplet", "normalise": False, "margin": 50.0},
        ]
        space = {
            "stage_one.loss.name": {"choice": ["batch_hard_triplet", "centre"]},
            "stage_one.loss.normalise": {"choice": [True, False]},
        }
        for given in (space, {"stage_one.loss": {"choice": losses}}):
            config = self.config(search={"space": given})
            proposals = optuna_search(config.seed)
            proposals.set_search_properties(None, None, tune_space(search_space(config)))
            drawn = [proposals.suggest(str(number)) for number in range(20)]
            seen = [with_choices(config, choices).stage_one.loss for choices in drawn]
            if given is space:
                assert {(loss.name, loss.normalise) for loss in seen} == {
                    (name, normalise) for name in space["stage_one.loss.name"]["choice"] for normalise in (True, False)
                }
                continue
            assert {(loss.name, loss.normalise, loss.negative_scale, loss.margin) for loss in seen} == {
                ("multi_similarity", True, 40.0, type(seen[0])().margin),
                ("batch_hard_triplet", False, type(seen[0])().negative_scale, 50.0),
            }

    def test_integers_are_whole_and_reach_both_ends(self):
        config = self.config(search={"space": {"stage_one.views": {"integers": [1, 3]}}})
        proposals = optuna_search(config.seed)
        proposals.set_search_properties(None, None, tune_space(search_space(config)))
        drawn = [proposals.suggest(str(number))["stage_one.views"] for number in range(30)]
        assert set(drawn) == {1, 2, 3} and all(type(number) is int for number in drawn)
        assert with_choices(config, {"stage_one.views": drawn[0]}).stage_one.views == drawn[0]

    def test_the_size_of_images_can_be_varied(self):
        space = {"data.image_px": {"choice": [64, 96]}, "data.resize_ratio": {"uniform": [1.0, 1.3]}}
        config = self.config(search={"space": space})
        assert search_space(config).keys() == space.keys()
        assert with_choices(config, {"data.resize_ratio": 1.25}).data.resize_ratio == 1.25

    def test_a_name_that_is_no_setting_is_named_with_the_nearest(self):
        config = self.config(search={"space": {"stage_one.loss.temprature": {"uniform": [0.1, 1]}}})
        with pytest.raises(UserError, match="is no setting; did you mean 'stage_one"):
            search_space(config)

    def test_a_setting_that_trials_share_is_refused(self):
        config = self.config(search={"space": {"data.pack_px": {"choice": [64, 128]}}})
        with pytest.raises(UserError, match=r"space: data.pack_px cannot differ between trials.*data.resize_ratio$"):
            search_space(config)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({}, "give exactly one of uniform, log_uniform, integers, choice"),
            ({"uniform": [0, 1], "choice": [1]}, "give exactly one of uniform, log_uniform, integers, choice"),
            ({"uniform": [2, 1]}, r"uniform = \[2, 1\] must be \[low, high\]"),
            ({"log_uniform": [0, 1]}, r"log_uniform = \[0, 1\] must be \[low, high\], and above 0 for log_uniform"),
        ],
    )
    def test_a_range_that_makes_no_sense_is_named(self, values, message):
        with pytest.raises(UserError, match=message):
            self.config(search={"space": {"stage_one.views": values}})
