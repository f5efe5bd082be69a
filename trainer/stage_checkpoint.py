"""Checkpoints of stage one: what is saved, how a run goes on from it, how later steps read its model."""

from __future__ import annotations

import json
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from cluster.checkpoint import write_manifest
from cluster.errors import UserError
from cluster.launch import Worker
from trainer.config import TrainerConfig
from trainer.model import Classifier, build_model
from trainer.trainee import Trainee

WEIGHTS_FILE = "weights.safetensors"
MEMORY_FILE = "memory.safetensors"
STATE_FILE = "state.json"


def save_checkpoint(worker: Worker, trainee: Trainee, config: TrainerConfig, metrics: dict[str, float]) -> None:
    """Each rank writes its share and, last, its manifest; rank 0 adds weights and state. Every rank takes part.

    Args:
        worker: This rank.
        trainee: Batch-norm statistics are the same on every rank.
        config: Goes into the state.
        metrics: `epoch`, `step` and what the checkpoint is chosen by.
    """
    mark = [uuid.uuid4().hex]  # of this one save: a killed save's files do not pass for those of its repetition
    dist.broadcast_object_list(mark)
    name = _folder_name(metrics)
    average, memory = trainee.average, trainee.memory
    with tempfile.TemporaryDirectory(prefix="rarelens-checkpoint-") as temporary:
        folder = Path(temporary)
        trainee.engine.save(folder)
        weights = trainee.engine.weights() if average is None else average.model.state_dict()
        if worker.rank == 0:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
            if memory is not None:
                save_file(memory.state_dict(), folder / MEMORY_FILE)
            state: dict[str, Any] = {
                "metrics": metrics,
                "loader": trainee.loader.state_dict(),
                "world": worker.world,
                "average_updates": average.updates if average is not None else None,
                "skipped_steps": trainee.guard.skipped,
                "config": config.model_dump(mode="json"),
            }
            (folder / STATE_FILE).write_text(json.dumps(state))
        write_manifest(folder, worker.rank, worker.world, {"step": metrics["step"], "save": mark[0]})
        worker.report(metrics, folder, name)
    trainee.guard.last_checkpoint = f"{trainee.name}/{name}"


def restore_checkpoint(worker: Worker, trainee: Trainee, config: TrainerConfig) -> int:
    """Go on from the newest whole checkpoint. Every rank takes part.

    Returns:
        The epoch to begin with.

    Raises:
        UserError: ZeRO has split the checkpoint over another number of workers.
    """
    with worker.checkpoint() as folder:
        if folder is None:
            return 0
        state = json.loads((folder / STATE_FILE).read_text())
        zero_stage = config.stage_one.zero_stage
        if state["world"] != worker.world and zero_stage > 0:
            raise UserError(
                f"stage_one.zero_stage = {zero_stage} splits a checkpoint over its {state['world']} workers, "
                f"and there are {worker.world} now; set cluster.workers={state['world']}"
            )
        trainee.engine.load(folder)
        trainee.loader.load_state_dict(state["loader"])
        if trainee.average is not None:
            trainee.average.load(load_file(folder / WEIGHTS_FILE), state["average_updates"])
        if trainee.memory is not None:
            trainee.memory.load_state_dict(load_file(folder / MEMORY_FILE))
        trainee.guard.skipped = state["skipped_steps"]
        trainee.guard.last_checkpoint = f"{trainee.name}/{_folder_name(state['metrics'])}"
        return int(state["metrics"]["epoch"]) + 1


def load_classifier(folder: Path, config: TrainerConfig, num_classes: int) -> Classifier:
    """The trained model in a verified checkpoint folder, in float32, for features and evaluation."""
    plain = {"weights": None, "checkpoint_activations": False}
    model = build_model(
        config.model.model_copy(update=plain), num_classes, config.data.image_px, config.stage_one.loss.normalise
    )
    model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model.eval()


def _folder_name(metrics: dict[str, float]) -> str:
    return f"epoch-{int(metrics['epoch']):04d}"
