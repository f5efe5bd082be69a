"""Which heads stage two's search tries: families share a budget, ranges are filled, defaults are always there."""

from collections import Counter

import numpy as np
import pytest

from cluster.config import parse_config
from cluster.errors import UserError
from trainer.heads import TRAINED_FAMILIES
from trainer.stage_two import shared_by
from tuning.config import StageTwoConfig
from tuning.space import blocks_of, draw_specs


class TestSpace:
    def test_families_share_the_budget(self):
        specs = draw_specs(StageTwoConfig(heads=256), seed=0)
        count = Counter(spec.family for spec in specs)
        assert count["tau_norm"] == count["logit_adjustment"] == 21 and count["nearest_class_mean"] == 2
        assert sum(count.values()) == 256
        assert {count[family] for family in TRAINED_FAMILIES} == {21, 22}
        for family in ("tau_norm", "logit_adjustment"):
            taus = [spec.tau for spec in specs if spec.family == family]
            assert taus == pytest.approx(np.linspace(0, 2, 21))

    @pytest.mark.parametrize("heads", [1, 7, 24, 40, 1000])
    def test_defaults_are_always_there(self, heads):
        config = StageTwoConfig(heads=heads)
        specs = draw_specs(config, seed=3)
        assert len(specs) == max(heads, len(config.families))
        assert {spec.family for spec in specs} == set(config.families)
        assert any(s.family == "crt" and s.power == 0 and s.lr == 3 and s.epochs == 10 for s in specs)
        assert any(s.family == "balanced_softmax" and s.lr == 3 and s.epochs == 10 for s in specs)
        assert any(s.family == "logit_adjustment" and s.tau == 1 for s in specs)
        assert any(s.family == "logit_adjusted" and s.tau == 1 for s in specs)
        assert any(s.family == "tau_norm" and s.tau == 1 for s in specs)
        assert any(s.family == "ldam_drw" and s.margin == 0.5 and s.scale == 30 for s in specs)
        assert any(s.family == "over_smoothing" and s.smoothing == 0.98 for s in specs)
        assert any(s.family == "label_aware_smoothing" and (s.smoothing, s.smoothing_tail) == (0.4, 0.1) for s in specs)

    def test_heads_share_their_minibatches(self):
        """Of 512 heads most are trained beside seven others or more."""
        specs = [spec for spec in draw_specs(StageTwoConfig(), seed=0) if spec.family in TRAINED_FAMILIES]
        together = Counter(shared_by(spec) for spec in specs)
        assert sum(number for number in together.values() if number >= 8) > 0.8 * len(specs)

    def test_closed_forms_alone_need_no_more_than_their_grid(self):
        assert len(draw_specs(StageTwoConfig(heads=500, families=("tau_norm", "nearest_class_mean")), seed=0)) == 23

    def test_values_stay_in_their_ranges_and_fill_them(self):
        config = parse_config(
            StageTwoConfig,
            {
                "heads": 300,
                "families": ["crt", "logit_adjustment"],
                "space": {
                    "power": [0.2, 0.6],
                    "tau": [0.0, 0.5],
                    "lr": [0.5, 2],
                    "weight_decay": [1e-5, 1e-3],
                    "epochs": [3, 6],
                },
            },
            "test",
        )
        specs = draw_specs(config, seed=0)
        crt = [spec for spec in specs if spec.family == "crt"]
        assert {spec.epochs for spec in crt} == {3, 4, 5, 6}
        assert len({spec.power for spec in crt}) == 11 and {0.2, 0.6} < {spec.power for spec in crt}
        for name in ("power", "lr", "weight_decay"):
            low, high = getattr(config.space, name)
            values = np.array([getattr(spec, name) for spec in crt])
            assert low <= values.min() and values.max() <= high
        logs = np.log([spec.lr for spec in crt])
        quarters = np.histogram(logs, bins=4, range=np.log([0.5, 2]))[0]
        assert quarters == pytest.approx(np.full(4, len(crt) / 4), abs=3)
        assert max(spec.tau for spec in specs if spec.family == "logit_adjustment") == 0.5

    def test_beta_reaches_one_where_the_range_does(self):
        """Weights 1 / n, `inverse`: one draw is the limit itself; the others spread over the logarithm of 1 - beta."""
        families = ("reweighted", "ldam_drw")
        specs = draw_specs(StageTwoConfig(heads=80, families=families), seed=0)
        for family in families:
            away = np.array([1 - spec.beta for spec in specs if spec.family == family])
            assert (away == 0).sum() == 1 and away.max() <= 0.1 and (np.sort(away)[1:] >= 0.99e-7).all()
            decades = np.histogram(np.log10(away[away > 0]), bins=6, range=(-7, -1))[0]
            assert decades == pytest.approx(np.full(6, 39 / 6), abs=3)
        below = draw_specs(parse_config(StageTwoConfig, {"space": {"beta": [0.5, 0.999]}}, "test"), seed=0)
        assert 0.99 < max(spec.beta for spec in below if spec.family == "reweighted") <= 0.999
        fixed = draw_specs(parse_config(StageTwoConfig, {"space": {"beta": [1, 1]}}, "test"), seed=0)
        assert {spec.beta for spec in fixed if spec.family == "reweighted"} == {1.0}

    def test_the_seed_decides(self):
        config = StageTwoConfig(heads=64)
        assert draw_specs(config, seed=1) == draw_specs(config, seed=1) != draw_specs(config, seed=2)

    def test_correcting_twice_is_searched_where_it_is_asked_for(self):
        families = ("balanced_softmax", "reweighted", "crt")
        once = draw_specs(StageTwoConfig(heads=60, families=families), seed=0)
        assert {spec.sampling_power for spec in once if spec.family != "crt"} == {1.0}
        twice = draw_specs(StageTwoConfig(heads=60, families=families, double_correction=True), seed=0)
        for family in families:
            powers = [spec.sampling_power for spec in twice if spec.family == family]
            assert 0.0 in powers and 1.0 in powers and len(set(powers)) > 5

    def test_blocks_keep_every_head_in_order(self):
        specs = draw_specs(StageTwoConfig(heads=50), seed=0)
        blocks = blocks_of(specs, 8)
        assert [spec for block in blocks for spec in block] == specs
        assert all(len(block) == 8 for block in blocks[:-1])

    def test_a_range_that_is_turned_round_is_named(self):
        with pytest.raises(UserError, match=r"test: space: .*lr = \[3, 1\] must be \[low, high\] within"):
            parse_config(StageTwoConfig, {"space": {"lr": [3, 1]}}, "test")
