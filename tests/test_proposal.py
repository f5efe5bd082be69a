"""`rarelens init`'s rules one by one, what the hours buy, and the file that comes out."""

import re
from dataclasses import replace

import pytest
import yaml

from cluster.config import load_config
from cluster.reference import settings_of
from data_pipeline.config import SourceConfig
from data_pipeline.fingerprint import Fingerprint, Spread
from data_pipeline.guess import Guess
from trainer.machine import CPU, H100, L4, calibrated
from trainer.network_size import network_size
from trainer.plan import DataSize, device_memory, predict
from trainer.this_machine import cpu_machine, gpu_machine, this_machine
from tuning.config import Config
from tuning.folds import AUTO_FOLDS
from tuning.proposal import Wishes, number_to_train, propose, rules
from tuning.proposal.draft import measured_here
from tuning.proposal.ladder import Fit, Rung, as_config, hours_for, ladder, spend
from tuning.proposal.text import LEGEND, to_yaml
from tuning.run_time import RunTime, heads_s, run_time

GIB = 2**30
FOUND = Fingerprint(
    classes={"common": 900, "rare": 100},
    independent={"common": 900, "rare": 100},
    groups=None,
    images_per_group=Spread(1, 1, 1),
    splits={},
    read=1000,
    width_px=Spread(450, 600, 600),
    height_px=Spread(300, 450, 450),
    short_px=Spread(300, 450, 450),
    bits={8: 1000},
    all_grey=False,
    near_duplicates=3,
    contradictions=0,
    unusable=(),
)
GUESS = Guess(SourceConfig(path="/images", labels="labels.csv", label_column="dx"), {"label_column": "called so"})
SMALL = {"backbone": "test_resnet", "weights": None}


def proposed(hours=1.0, here=None, found=FOUND, **wishes):
    here = here or cpu_machine(2, 16 * GIB)
    return propose(GUESS, found, here, Wishes("mine", "runs/mine", hours, **{**SMALL, **wishes}))


# ---- rules


def test_images_are_not_enlarged_except_to_the_smallest_side():
    assert rules.sides_px(450) == [64, 96, 128, 160, 224, 288]
    assert rules.sides_px(200) == [64, 96, 128, 160]
    assert rules.sides_px(28) == [64]


@pytest.mark.parametrize(
    ("short", "image", "packed"), [(450, 224, 280), (450, 96, 120), (300, 224, None), (28, 64, None)]
)
def test_images_are_packed_smaller_where_that_saves_much(short, image, packed):
    assert rules.pack_px(short, image) == packed


def test_evaluation_cuts_the_centre_out_where_there_is_room():
    assert rules.resize_ratio(256, 224) == 1.0  # 256.03 would be needed
    assert rules.resize_ratio(280, 224) == 1.143


@pytest.mark.parametrize(("workers", "streams"), [(1, 8), (2, 8), (3, 9), (6, 12), (8, 8), (16, 16)])
def test_streams_are_shared_out_evenly(workers, streams):
    assert rules.streams(workers) == streams


@pytest.mark.parametrize(
    ("images", "workers", "on_gpu", "batch"),
    [
        (10_000, 2, False, 64),
        (1_000, 2, False, 32),
        (100, 2, False, 16),
        (10_000, 3, False, 72),  # 9 streams
        (100_000, 4, True, 256),
        (100_000, 16, True, 512),
        (3_000, 4, True, 128),
    ],
)
def test_batches(images, workers, on_gpu, batch):
    assert rules.batch_size(images, workers, on_gpu) == batch


def test_the_learning_rate_follows_the_batch():
    assert rules.learning_rate(64, True) == 1e-3 and rules.learning_rate(64, False) == 3e-3
    assert rules.learning_rate(256, True) == 2e-3 and rules.learning_rate(32, True) == 7.1e-4


def test_the_tail_fits_into_the_memory():
    assert rules.tail_budget_mib(64 * GIB, 2) == 1024
    assert rules.tail_budget_mib(4 * GIB, 4) == 128
    assert rules.tail_budget_mib(GIB / 2, 8) == 64


def test_damage_is_scaled_to_all_images():
    assert rules.max_damaged(3, 1000, 1000) == 3
    assert rules.max_damaged(3, 1000, 10_500) == 32


def test_batch_norm_is_synchronised_where_a_worker_has_few_images():
    assert [rules.sync_batch_norm(*case) for case in ((64, 4), (64, 8), (8, 1))] == [False, True, False]


def test_a_batch_that_does_not_fit_is_cut_into_halves():
    config = as_config({"model.backbone": "test_resnet", "data.image_px": 96, "stage_one.views": 2})
    network = network_size(config, 2)
    whole = device_memory(config, network, CPU, 2, 32).total
    assert rules.micro_batch_size(config, network, replace(CPU, memory_bytes=whole)) is None
    assert rules.micro_batch_size(config, network, replace(CPU, memory_bytes=whole - 1)) == 32  # of 2 x 32


# ---- the machine


def test_a_cpu_has_a_worker_a_core_as_far_as_the_memory_reaches():
    assert cpu_machine(2, 16 * GIB).machine.devices == 2
    assert cpu_machine(4, 4 * GIB).machine.devices == 2
    big = cpu_machine(32, 100 * GIB).machine
    assert (big.devices, big.cores, big.memory_bytes) == (8, 32, 100 * GIB / 8)
    assert big.flop_per_s["fp32"] == 4 * CPU.flop_per_s["fp32"]  # a worker has four threads


def test_a_gpu_is_known_by_its_name():
    h100 = gpu_machine("NVIDIA H100 80GB HBM3", 80 * GIB, 4, 32, 200 * GIB)
    assert h100.known and h100.machine.flop_per_s == H100.flop_per_s and h100.machine.devices == 4
    other = gpu_machine("NVIDIA L40S", 48 * GIB, 1, 8, 64 * GIB)
    assert not other.known and other.machine.flop_per_s == L4.flop_per_s
    assert other.machine.memory_bytes == 48 * GIB


def test_this_machine_is_looked_at():
    import os

    here = this_machine()
    assert here.machine.cores == len(os.sched_getaffinity(0)) and here.host_bytes > GIB / 4


def test_a_network_that_was_timed_scales_the_others():
    twice = calibrated(CPU, 2.0, 100.0)
    assert twice.image_s(1e9, 1e6, "fp32") == pytest.approx(CPU.image_s(1e9, 1e6, "fp32") / 2)
    assert twice.decode_images_per_s_core == 100.0
    assert calibrated(cpu_machine(32, 100 * GIB).machine, 1.0, 100.0).decode_images_per_s_core == 400.0


def test_a_machine_that_is_timed_is_scaled_as_a_whole(monkeypatch):
    """One call of each is enough to see that the constants move together."""
    monkeypatch.setattr("trainer.plan_measure.shortest_s", lambda function, clock=None: (function(), 0.5)[1])
    before = cpu_machine(2, 16 * GIB)
    after = measured_here(before, Wishes("mine", "runs/mine", 1.0, **SMALL), num_classes=2)
    scale = after.machine.flop_per_s["fp32"] / before.machine.flop_per_s["fp32"]
    assert after.machine.memory_bytes_per_s == pytest.approx(scale * before.machine.memory_bytes_per_s)
    config = as_config({"model.backbone": "test_resnet", "data.image_px": 128})
    network = network_size(config, 2)
    image_s = after.machine.image_s(network.forward_flop, network.kept_bytes, "fp32")
    assert image_s == pytest.approx(0.5 / 16)  # a batch of 16 took half a second on one thread
    assert after.machine.decode_images_per_s_core == pytest.approx((128 / 224) ** 2 * 64 / 0.5)


# ---- the hours


def test_a_run_s_time_is_that_of_its_steps():
    config = as_config({"model.backbone": "test_resnet", "data.image_px": 64, "stage_one.epochs": 3})
    size, network = DataSize(700, 150, 2, 0.0, 1e6, 1e5), network_size(config, 2)
    time = run_time(config, size, network, 1000, CPU)
    assert time.stage_one_s == pytest.approx(predict(config, size, network, CPU, 2, 1).wall_h * 3600)
    one_more = as_config({"model.backbone": "test_resnet", "data.image_px": 64, "stage_one.epochs": 4})
    later = run_time(one_more, size, network, 1000, CPU)
    assert later.stage_one_s - time.stage_one_s == pytest.approx(time.epoch_s)
    doubled = replace(time, baseline=True)
    assert doubled.hours - time.hours == pytest.approx(time.stage_one_s / 3600)


def test_heads_take_their_operations():
    config = as_config({"stage_two.heads": 100, "stage_two.space.epochs": [10, 10]})
    size = DataSize(3000, 1000, 7, 0, 0, 0)
    flop = 4 * 4000 * 1280 * 7 * 10 * AUTO_FOLDS * 100
    assert heads_s(config, size, 1280, CPU) == pytest.approx(flop / (2 * 0.55 * 97e9))


def test_the_ladder_goes_from_cheap_to_dear():
    assert ladder(230, None)[0] == Rung("tf_efficientnet_lite0", 64)
    assert ladder(230, None)[-2:] == [Rung("resnet50", 160), Rung("resnet50", 224)]
    rungs = ladder(100, None)
    sizes = [network_size(as_config({"model.backbone": b, "data.image_px": px}), 2).forward_flop for b, px in rungs]
    assert sizes == sorted(sizes)
    assert ladder(100, "resnet18") == [Rung("resnet18", 64), Rung("resnet18", 96)]


def test_time_that_is_left_buys_a_second_view_and_then_the_baseline():
    assert spend(7, 40) == (7, 1, False)
    assert spend(79, 40) == (40, 1, False)
    assert spend(80, 40) == (40, 2, False)
    assert spend(160, 40) == (40, 2, True)


def test_hours_to_ask_for():
    time = RunTime(stage_one_s=0, epoch_s=360, baseline=False, features_s=340, stage_two_s=0)
    assert hours_for(Fit(Rung("x", 64), 64, 1, time), epochs=8) == 1.0  # (.1 + .8) h / .9


def test_more_hours_give_larger_images_more_epochs_and_at_last_the_baseline():
    short, long, longest = (proposed(hours) for hours in (0.1, 1.0, 100.0))
    assert short.config.data.image_px <= long.config.data.image_px <= longest.config.data.image_px == 288
    assert short.config.stage_two.heads <= long.config.stage_two.heads == 512
    assert not short.config.evaluation.baseline and longest.config.evaluation.baseline
    assert longest.config.stage_one.views == 2 and longest.config.stage_one.epochs == 120
    assert long.time.hours <= 1.0 and longest.shortfall is None


def test_too_few_hours_are_told():
    made = proposed(0.01)
    assert made.config.stage_one.epochs == 1 and made.config.data.image_px == 64
    hours = re.fullmatch(
        r"0\.01 h leave time for 1 epochs where 30 are wanted, at test_resnet on 64 px; give --hours ([\d.]+) or more",
        made.shortfall,
    )[1]
    assert proposed(float(hours)).shortfall is None


# ---- what comes out


def test_given_splits_are_what_is_trained_on():
    assert number_to_train(FOUND) == 700
    assert number_to_train(replace(FOUND, splits={"train": 800, "val": 100, "test": 100})) == 800
    assert number_to_train(replace(FOUND, splits={"train": 850, "test": 150})) == 700  # val is cut out of train


def test_what_the_data_shows_comes_into_the_configuration():
    grey = replace(FOUND, all_grey=True, unusable=(("x.jpg", "torn"),) * 2)
    config = proposed(found=grey).config
    assert config.data.augment.saturation == 0 and config.data.max_damaged == 2
    assert config.source.label_column == "dx" and config.source.labels == "labels.csv"
    gpus = proposed(here=gpu_machine("NVIDIA A100-SXM4-40GB", 40 * GIB, 4, 48, 200 * GIB)).config
    assert gpus.stage_one.precision == "bf16" and gpus.cluster.workers == 4 and gpus.cluster.cpus_per_worker == 12


def test_whose_a_value_is():
    kinds = {setting.key: setting.kind for setting in proposed().settings}
    assert kinds["model.backbone"] == "given" == kinds["source.labels"]
    assert kinds["source.label_column"] == "found"
    assert kinds["stage_one.loss.temperature"] == "searched" == kinds["stage_two.space.power"]
    assert kinds["stage_one.epochs"] == "rule" and kinds["stage_two.select_by"] == "fixed"


@pytest.fixture(scope="module")
def written():
    made = proposed()
    return made, to_yaml(made, ["first line", "a very long line " * 20])


def test_the_file_is_the_configuration(written, tmp_path):
    made, text = written
    (tmp_path / "mine.yaml").write_text(text)
    assert load_config(Config, tmp_path / "mine.yaml") == made.config


def test_each_value_has_its_kind_and_reason_in_lines_that_fit(written):
    made, text = written
    assert all(len(line) <= 120 for line in text.splitlines())
    for setting in made.settings:
        leaf = setting.key.rpartition(".")[2]
        behind, above = rf"{leaf}: .*# {setting.kind}: ", rf"# {setting.kind}: .*(?:\n *#   .*)*\n *{leaf}: "
        own = re.findall(rf"^ *(?:{behind}|{above})", text, re.M)
        assert own and setting.reason, setting.key
    assert all(f"#   {kind:9} {meaning}" in text for kind, meaning in LEGEND.items())
    assert {setting.kind for setting in made.settings} == set(LEGEND)


def test_sections_stand_in_the_order_of_the_configuration(written):
    _, text = written
    sections = list(yaml.safe_load(text))
    order = [entry.key for entry in settings_of(Config) if "." not in entry.key]
    assert sections == sorted(sections, key=order.index)
