"""Stage one's loop on one and two real ranks: its options, alone and together, and what it does when things break."""

import math
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import UserError
from data_pipeline.dataset import open_dataset
from data_pipeline.pack import pack
from data_pipeline.synthetic import draw_synthetic
from tests.gloo import run_gloo
from tests.loop import loop
from tests.tiny import tiny_config
from trainer.schedule import learning_rate
from trainer.stage_checkpoint import load_classifier

STEPS_PER_EPOCH = 5
FROZEN = {"freeze_batch_norm": True}
TOGETHER = {
    "ema_decay": 0.9,
    "memory": {"rows": 96, "start_epoch": 0.5},
    "loss": {"name": "proxy_anchor", "lr_ratio": 5.0, "warmup_epochs": 0.5},
}
MARGINS = {"classification": {"name": "ldam", "reweight_from": 0.5}, "loss": {"name": "centre", "compare": "feature"}}
COSINE = {**FROZEN, "cosine_scale": 30.0}
REMEMBERED = {"loss": {"name": "proxy_anchor"}, "memory": {"rows": 96, "start_epoch": 0.5}, "epochs": 2}
HALF_MIXED = {"mix": {"mixup_alpha": 0.4, "probability": 0.5}}
WITHIN = {"epochs": 2, "checkpoint_every_steps": 3}
POISONED_STEP = 3


def config_of(folder, run, stage_one=None, **sections):
    stage = {"batch_size": 32, "epochs": 1, "views": 2, "log_every_steps": 1, "optimiser": {"warmup_epochs": 0.5}}
    return tiny_config(Path(folder) / "images", run, stage_one={**stage, **(stage_one or {})}, **sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    draw_synthetic(folder / "images", seed=1, scale=0.06)
    config = config_of(folder, "packed")
    pack(config.source, config.data, str(folder / "dataset"), config.seed, progress=False)
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder):
    return run_gloo(on_two_ranks, 2, str(folder))


def on_two_ranks(rank, world, folder):
    """All that is looked at with two ranks: DeepSpeed takes seconds to import."""

    def run(name, stage_one=None, stop_after=None, change=None, **sections):
        return loop(rank, world, config_of(folder, name, stage_one, **sections), Path(folder), stop_after, change)

    def failure(name, stage_one=None, **sections):
        with pytest.raises(UserError) as error:
            run(name, stage_one, change=poison, **sections)
        return str(error.value)

    synchronised = {"model": {"sync_batch_norm": True}}
    labels = {}

    def note_and_poison(batch, rank):
        labels[batch.step + 1] = batch.labels.tolist()
        poison(batch, rank)

    return {
        "together": run("together", {**TOGETHER, "epochs": 2}, **synchronised),
        "broken": run("broken", {**TOGETHER, "epochs": 2}, stop_after=0, **synchronised)
        + run("broken", {**TOGETHER, "epochs": 2}, **synchronised),
        "unbroken": run("unbroken", {**TOGETHER, "epochs": 2}),
        "within": run("within", {**TOGETHER, **WITHIN}, stop_after="step-00000008")
        + run("within", {**TOGETHER, **WITHIN}),
        "stopped": failure("stopped", {"epochs": 2}, model=FROZEN),
        "skipped": run("skipped", {"skip_nonfinite_steps": 1, "views": 1}, change=note_and_poison),
        "labels": labels,
        "too_many": failure("too_many", {"skip_nonfinite_steps": 1, "epochs": 2}),
        "margins": run("margins", MARGINS, model=COSINE),
        "half": run("half", {"precision": "fp16"}, model=FROZEN),
        "mixed": run("mixed", {"loss": {"name": "none"}}, data={"mix": {"mixup_alpha": 0.4}}, model=FROZEN),
        "half_mixed": run("half_mixed", {**REMEMBERED, "epochs": 1}, data=HALF_MIXED, model=FROZEN),
    }


@pytest.fixture(scope="module")
def micro_batches(folder):
    return run_gloo(with_micro_batches, 2, str(folder))[0]


def with_micro_batches(rank, world, folder):
    def run(name, changes, stop_after=None):
        config = config_of(folder, name, {**REMEMBERED, **changes}, model=FROZEN)
        return loop(rank, world, config, Path(folder), stop_after)

    cut, zero3 = {"micro_batch_size": 5}, {"micro_batch_size": 5, "zero_stage": 3}
    return {
        "whole": run("whole", {}),
        "micro": run("micro", cut),
        "micro2": run("micro2", {**cut, "zero_stage": 2}),
        "micro3": run("micro3", zero3),
        "broken3": run("broken3", zero3, stop_after=0) + run("broken3", zero3),
    }


def poison(batch, rank):
    """An image of rank 1 that is not a number, in one step of each epoch."""
    if rank == 1 and batch.step == POISONED_STEP:
        batch.images[2] = math.nan


@pytest.fixture(scope="module")
def one_rank(folder):
    return run_gloo(on_one_rank, 1, str(folder))[0]


def on_one_rank(rank, world, folder):
    def run(name, stage_one, **sections):
        return loop(rank, world, config_of(folder, name, stage_one, **sections), Path(folder))

    with pytest.raises(UserError, match=r"^a pool of 1,000,000,000,064 rows x 8 needs .* lower stage_one.memory.rows"):
        run("no_room", {"memory": {"rows": 10**12, "start_epoch": 0}})
    return {"alone": run("alone", {**TOGETHER, "epochs": 2}, model={"sync_batch_norm": True})}


def steps(lines):
    return {line["step"]: line for line in lines if line["kind"] == "step"}


def losses(lines):
    return {step: (line["cross_entropy"], line["metric_loss"]) for step, line in steps(lines).items()}


def epochs(lines):
    return {line["epoch"]: line for line in lines if line["kind"] == "epoch"}


def weights(folder, run, epoch=0):
    return load_file(folder / run / f"epoch-{epoch:04d}" / "weights.safetensors")


def test_a_run_that_was_broken_follows_the_unbroken_one_with_average_memory_and_proxies(folder, two_ranks):
    unbroken, broken = two_ranks[0]["together"], two_ranks[0]["broken"]
    assert len(losses(unbroken)) == 2 * STEPS_PER_EPOCH
    assert losses(broken) == losses(unbroken)
    assert epochs(broken) == epochs(unbroken)
    for name, tensor in weights(folder, "together", 1).items():
        assert weights(folder, "broken", 1)[name].equal(tensor), name
    memory = [load_file(folder / run / "epoch-0001" / "memory.safetensors") for run in ("together", "broken")]
    assert memory[0]["labels"].equal(memory[1]["labels"]) and memory[0]["embeddings"].equal(memory[1]["embeddings"])


def test_a_run_that_was_broken_in_the_middle_of_an_epoch_follows_the_unbroken_one(folder, two_ranks):
    """Batch norm is each rank's own here: its statistics differ between ranks until the epoch's end."""
    unbroken, within = two_ranks[0]["unbroken"], two_ranks[0]["within"]
    assert {path.name for path in (folder / "within").glob("*-*")} == {
        "step-00000003",
        "epoch-0000",
        "step-00000008",
        "epoch-0001",
    }
    assert [line["step"] for line in within if line["kind"] == "step"] == list(range(1, 11)), "no step is done twice"
    assert losses(within) == losses(unbroken)
    assert epochs(within) == epochs(unbroken)
    # A driver that was killed may not have written what it was told before the checkpoint: it is told again.
    again = [(line["kind"], line["step"]) for line in within if line["kind"].startswith("again")]
    assert again == [*(("again step", step) for step in range(1, 6)), ("again epoch", 5)] + [
        ("again step", step) for step in range(6, 9)
    ]
    for name, tensor in weights(folder, "unbroken", 1).items():
        assert weights(folder, "within", 1)[name].equal(tensor), name


def test_two_ranks_are_one_rank_with_average_memory_proxies_and_synchronised_batch_norm(folder, two_ranks, one_rank):
    one, two = one_rank["alone"], two_ranks[0]["together"]
    for step, pair in losses(one).items():
        assert losses(two)[step] == pytest.approx(pair, rel=2e-3), step  # float32 sums in another order
        assert steps(two)[step]["positives_per_anchor"] == steps(one)[step]["positives_per_anchor"]
    alone, together = ({k: v for k, v in weights(folder, run, 1).items()} for run in ("alone", "together"))
    for name, tensor in alone.items():
        if tensor.is_floating_point():
            assert (together[name] - tensor).norm() <= 2e-2 * tensor.norm() + 1e-3, name
    labels = [load_file(folder / run / "epoch-0001" / "memory.safetensors")["labels"] for run in ("alone", "together")]
    assert labels[0].equal(labels[1])  # the memory's order does not depend on how the batch was cut


def test_the_pool_is_the_batch_of_all_ranks_and_then_the_memory(two_ranks):
    lines = steps(two_ranks[0]["together"])
    assert lines[1]["pool_rows"] == 64 and max(line["pool_rows"] for line in lines.values()) == 64 + 96
    # lambda grows over half an epoch
    assert [lines[step]["metric_weight"] for step in (1, 2, 3)] == pytest.approx([0.4, 0.8, 1.0])
    optimiser = config_of("", "").stage_one.optimiser
    for step, line in lines.items():
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line["metric_weight"] * line["metric_loss"])
        assert line["lr"] == pytest.approx(learning_rate(optimiser, step / STEPS_PER_EPOCH, 2))


def test_anchors_without_a_positive_are_counted_by_class_and_logged(folder, two_ranks):
    """One view: the only image of its class in the batch of both ranks has no positive."""
    classes = open_dataset(str(folder / "dataset")).classes
    for step, line in steps(two_ranks[0]["skipped"]).items():
        images_of = Counter(chain(*(results["labels"][step] for results in two_ranks)))
        alone = {classes[label]: 1 for label, images in images_of.items() if images == 1}
        assert alone and line["anchors_without_term_by_class"] == alone
        assert line["anchors_without_term"] == len(alone)
        assert line["anchors_without_term_share"] == pytest.approx(len(alone) / 32)


def test_micro_batches_are_the_whole_batch_at_zero_0_2_and_3(folder, micro_batches):
    whole = micro_batches["whole"]
    assert max(line["pool_rows"] for line in steps(whole).values()) == 64 + 96
    for run in ("micro", "micro2", "micro3"):
        for step, line in steps(micro_batches[run]).items():
            assert losses(micro_batches[run])[step] == pytest.approx(losses(whole)[step], rel=1e-3), (run, step)
            # Adam forgives a gradient that is too large, its norm does not.
            assert line["grad_norm"] == pytest.approx(steps(whole)[step]["grad_norm"], rel=2e-3), (run, step)
            assert line["pool_rows"] == steps(whole)[step]["pool_rows"]
        assert weights(folder, run, 1).keys() == weights(folder, "whole", 1).keys()


def test_zero_3_goes_on_from_its_checkpoint(folder, micro_batches):
    unbroken, broken = micro_batches["micro3"], micro_batches["broken3"]
    assert len(losses(unbroken)) == 2 * STEPS_PER_EPOCH
    assert losses(broken) == losses(unbroken) and epochs(broken) == epochs(unbroken)
    for name, tensor in weights(folder, "micro3", 1).items():
        assert weights(folder, "broken3", 1)[name].equal(tensor), name


@pytest.fixture(scope="module")
def three_ranks(folder):
    return run_gloo(on_three_ranks, 3, str(folder))[0]


def on_three_ranks(rank, world, folder):
    def run(name, stage_one, **sections):
        return loop(rank, world, config_of(folder, name, stage_one, model=FROZEN, **sections), Path(folder))

    return {
        "half_mixed": run("half_mixed3", {**REMEMBERED, "epochs": 1}, data=HALF_MIXED),
        "three": run("three", REMEMBERED),
        "micro1": run("micro1", {**REMEMBERED, "micro_batch_size": 5, "zero_stage": 1}),
    }


def test_three_ranks_share_eight_streams_unevenly_and_follow_the_losses_of_two(three_ranks, micro_batches):
    whole = micro_batches["whole"]
    for run in ("three", "micro1"):  # in micro-batches too, at ZeRO 1
        three = three_ranks[run]
        for step, pair in losses(whole).items():
            assert losses(three)[step] == pytest.approx(pair, rel=2e-3), (run, step)
            assert steps(three)[step]["grad_norm"] == pytest.approx(steps(whole)[step]["grad_norm"], rel=4e-3), run
        assert epochs(three).keys() == {0, 1}


def test_a_loss_that_is_not_finite_stops_every_rank_at_its_step_and_names_the_image(folder, two_ranks):
    index = open_dataset(str(folder / "dataset")).index("train")
    messages = [results["stopped"] for results in two_ranks]
    assert messages[0] == messages[1]
    found = re.fullmatch(
        r"the loss is nan, from outputs that are not finite for worker 1: (\S+) at step 4 \(epoch 0\); the weights "
        r"were not updated, there is no checkpoint yet; lower stage_one\.optimiser\.lr = 0\.001, or raise "
        r"stage_one\.skip_nonfinite_steps = 0, and give another run=\.\.\.",
        messages[0],
    )
    assert found and found[1] in index.key


def test_a_step_may_be_left_out_and_leaves_nothing_behind(folder, two_ranks):
    lines = two_ranks[0]["skipped"]
    assert steps(lines).keys() == {1, 2, 3, 5}
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert [(line["step"], line["skipped"]) for line in skipped] == [(4, 1)]
    assert skipped[0]["reason"].startswith("the loss is nan, from outputs that are not finite for worker 1: ")
    assert all(math.isfinite(line["loss"]) for line in steps(lines).values())
    assert all(tensor.isfinite().all() for tensor in weights(folder, "skipped").values())  # batch norm's means too


def test_more_steps_than_allowed_stop_the_run_and_name_the_last_good_checkpoint(two_ranks):
    message = two_ranks[0]["too_many"]
    assert " at step 9 (epoch 1), after 1 steps left out; the weights were not updated, " in message
    assert "the last good checkpoint is stage_one/epoch-0000; lower stage_one.optimiser.lr" in message


def test_mixed_images_are_learnt_by_the_classification_loss_alone(two_ranks):
    lines = steps(two_ranks[0]["mixed"])
    assert len(lines) == STEPS_PER_EPOCH
    assert all(line["loss"] == line["cross_entropy"] and "metric_loss" not in line for line in lines.values())


def test_beside_mixed_images_the_others_are_compared_and_remembered_alike_on_two_and_three_ranks(
    two_ranks, three_ranks
):
    pairs, threes = losses(two_ranks[0]["half_mixed"]), losses(three_ranks["half_mixed"])
    assert pairs.keys() == threes.keys() and len(pairs) == STEPS_PER_EPOCH
    for step, pair in pairs.items():
        assert threes[step] == pytest.approx(pair, rel=2e-3), step


def test_margins_train_a_cosine_classifier_that_later_steps_read(folder, two_ranks):
    lines = steps(two_ranks[0]["margins"])
    assert len(lines) == STEPS_PER_EPOCH and lines[5]["metric_loss"] < lines[1]["metric_loss"]
    model = load_classifier(folder / "margins" / "epoch-0000", config_of(folder, "margins", MARGINS, model=COSINE), 16)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = model(images)
    torch.testing.assert_close(model.own_head().logits(output.features), output.logits)
    assert output.logits.abs().max() <= 30


def test_fp16_logs_its_loss_scale(two_ranks):
    lines = steps(two_ranks[0]["half"])
    assert lines and all(math.isfinite(line["loss"]) and line["loss_scale"] >= 1 for line in lines.values())
    assert "loss_scale" not in steps(two_ranks[0]["together"])[1]


def test_the_average_is_what_later_steps_read(folder, two_ranks):
    assert two_ranks
    config = config_of(folder, "together", {**TOGETHER, "epochs": 2}, model={"sync_batch_norm": True})
    model = load_classifier(folder / "together" / "epoch-0001", config, 16)
    raw = torch.load(folder / "together/epoch-0001/engine/mp_rank_00_model_states.pt", weights_only=False)["module"]
    name = "backbone.conv1.0.weight"
    assert model.state_dict()[name].equal(weights(folder, "together", 1)[name])
    assert not raw[f"classifier.{name}"].equal(model.state_dict()[name])
    assert raw["of_loss.0"].shape == (16, 8)  # proxies are DeepSpeed's to keep


def compiled_and_not(rank, world, folder):
    def run(name, **changes):
        return loop(rank, world, config_of(folder, name, {"ema_decay": 0.9, **changes}), Path(folder))

    return run("eager"), run("compiled", compile=True)


@pytest.mark.long
def test_a_compiled_backbone_follows_the_losses_of_one_that_is_not(folder):
    eager, compiled = run_gloo(compiled_and_not, 1, str(folder))[0]
    assert len(losses(compiled)) == STEPS_PER_EPOCH
    for step, pair in losses(eager).items():
        assert losses(compiled)[step] == pytest.approx(pair, rel=2e-3), step
    assert weights(folder, "compiled").keys() == weights(folder, "eager").keys()
