"""A run goes on with another number of workers, at each ZeRO stage: the same batches follow, and no loss jumps."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cluster.checkpoint import verify
from cluster.errors import UserError
from data_pipeline.pack import pack
from data_pipeline.synthetic import draw_synthetic
from tests.gloo import run_gloo
from tests.loop import loop
from tests.tiny import tiny_config
from trainer.stage_checkpoint import VERSIONS_OF

STEPS = 10  # of two epochs
STOPPED = {"mid": "step-00000003", "end": "epoch-0000"}  # in the middle of an epoch, at its end
ZERO_STAGES = (0, 1, 2)
MOVES = [(2, 1), (1, 2), (2, 3)]


def config_of(folder, run, zero_stage):
    stage = {"epochs": 2, "batch_size": 32, "views": 2, "log_every_steps": 1, "optimiser": {"warmup_epochs": 0.5}}
    more = {"zero_stage": zero_stage, "checkpoint_every_steps": 3, "memory": {"rows": 64}}
    if zero_stage < 3:
        more["ema_decay"] = 0.9
    # Batch norm uses each rank's own images; on running statistics the number of workers makes no difference.
    return tiny_config(folder / "images", run, stage_one={**stage, **more}, model={"freeze_batch_norm": True})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    draw_synthetic(folder / "images", seed=1, scale=0.06)
    config = config_of(folder, "packed", 0)
    pack(config.source, config.data, str(folder / "dataset"), config.seed, progress=False)
    return folder


def run_each(rank, world, folder, runs):
    """{name: what rank 0 was told, or the error} of runs: name -> (ZeRO stage, checkpoint that is the last)."""

    def run(name, zero, stop_after):
        try:
            return loop(rank, world, config_of(Path(folder), name, zero), Path(folder), stop_after)
        except UserError as error:
            return str(error)

    return {name: run(name, *how) for name, how in runs.items()}


@pytest.fixture(scope="module")
def stopped(folder):
    """What was told until the stop, by (world, ZeRO stage, where), and of a run that was never stopped."""
    told = {}
    for world in (1, 2):
        places = [(zero, where) for zero in ZERO_STAGES for where in STOPPED if where == "mid" or not zero]
        runs = {f"{world}-{zero}-{where}": (zero, STOPPED[where]) for zero, where in places}
        more = {"unbroken": (0, None)} if world == 1 else {"2-3-mid": (3, STOPPED["mid"])}
        told |= run_gloo(run_each, world, str(folder), {**runs, **more})[0]
    return told


@pytest.fixture(scope="module")
def gone_on(folder, stopped):
    """What was told after it, by name and number of workers."""
    told = {}
    for before, after in MOVES:
        runs = {}
        for name in [name for name in stopped if name.startswith(f"{before}-")]:
            shutil.copytree(folder / name, folder / f"{name}-on-{after}")
            runs[f"{name}-on-{after}"] = int(name.split("-")[1]), None
        told |= run_gloo(run_each, after, str(folder), runs)[0]
    return told


def losses(lines):
    return {line["step"]: (line["cross_entropy"], line["metric_loss"]) for line in lines if line["kind"] == "step"}


@pytest.mark.parametrize(("before", "after"), MOVES)
@pytest.mark.parametrize(("zero", "where"), [(0, "mid"), (0, "end"), (1, "mid"), (2, "mid")])
def test_the_losses_of_the_unbroken_run_follow(folder, stopped, gone_on, before, after, zero, where):
    name = f"{before}-{zero}-{where}"
    first, then = losses(stopped[name]), losses(gone_on[f"{name}-on-{after}"])
    assert list(first) + list(then) == list(range(1, STEPS + 1)), "a step is missing, or was done twice"
    assert len(first) == (3 if where == "mid" else 5)
    for step, pair in losses(stopped["unbroken"]).items():
        assert {**first, **then}[step] == pytest.approx(pair, rel=2e-3), step  # float32 sums in another order
    average = load_file(folder / f"{name}-on-{after}" / "epoch-0001" / "weights.safetensors")
    for key, tensor in load_file(folder / "unbroken" / "epoch-0001" / "weights.safetensors").items():
        if tensor.is_floating_point():
            assert (average[key] - tensor).norm() <= 2e-2 * tensor.norm() + 1e-3, key


def test_a_zero_3_checkpoint_is_refused_on_another_number_of_workers(gone_on):
    for after in (1, 3):
        assert gone_on[f"2-3-mid-on-{after}"] == (
            f"stage_one.zero_stage = 3 splits the weights of a checkpoint over its 2 workers, and there are {after} "
            "now; set cluster.workers=2"
        )


def test_a_checkpoint_holds_all_that_a_run_goes_on_from(folder, stopped):
    files = verify(folder / "2-1-mid" / "step-00000003").files
    engine = {name for name in files if name.startswith("engine/") or "states" in name}
    assert {name.rsplit("/", 1)[-1] for name in engine} >= {"mp_rank_00_model_states.pt"}
    assert sum("optim_states" in name for name in engine) == 2, "of each rank its own part"
    assert files.keys() >= {"weights.safetensors", "memory.safetensors", "state.json"}
    assert files.keys() >= {"buffers-rank0.safetensors", "buffers-rank1.safetensors"}
    state = json.loads((folder / "2-1-mid" / "step-00000003" / "state.json").read_text())
    assert state["config"] == config_of(folder, "2-1-mid", 1).model_dump(mode="json")
    assert state["versions"].keys() == set(VERSIONS_OF) and all(state["versions"].values())
    assert state["loader"] and state["world"] == 2 and state["average_updates"] == 3 and state["metrics"]["step"] == 3
