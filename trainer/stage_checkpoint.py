"""Checkpoints of stage one: what is saved, how a run goes on from it, how later steps read its model."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.checkpoint import MANIFEST_FILE, write_manifest
from cluster.errors import UserError
from cluster.worker import Worker
from data_pipeline.loader import TrainLoader
from trainer.config import StageOneConfig, TrainerConfig
from trainer.model import Classifier, build_model
from trainer.trainee import Trainee
from trainer.universal import CONVERTIBLE_ZERO_STAGES, universal_checkpoint

WEIGHTS_FILE = "weights.safetensors"
MEMORY_FILE = "memory.safetensors"
STATE_FILE = "state.json"
FULL_BELOW_BYTES = 1 << 20
VERSIONS_OF = ("torch", "deepspeed", "ray", "timm")


class CheckpointClock:
    """When a checkpoint is due in the middle of an epoch, agreed on by all ranks without a message of its own.

    Each step's sums over ranks carry `signals`. Rank 0 alone says that time or steps are over, since clocks differ;
    any rank may say that the run has to stop, or that its last checkpoint is still on its way, which puts off the next.

    Args:
        worker: This rank.
        stage: Stage one's configuration.
        step: Of the checkpoint that the run goes on from; 0 = none.
    """

    def __init__(self, worker: Worker, stage: StageOneConfig, step: int = 0):
        self._worker, self._stage = worker, stage
        self._step, self._at = step, time.monotonic()

    def signals(self, step: int) -> tuple[float, float, float]:
        """This rank's: a checkpoint is due, one is on its way, the run has to stop.

        Args:
            step: The one that is being done, from 1.
        """
        return float(self._is_due(step)), float(self._worker.uploading), float(self._worker.should_stop)

    def decide(self, signals: Sequence[float], ends_epoch: bool) -> tuple[bool, bool]:
        """Whether all ranks save now, and whether they leave after that.

        Args:
            signals: Sums over all ranks.
            ends_epoch: The epoch's own checkpoint follows.
        """
        due, uploading, stop = signals
        return bool(stop or (due and not uploading and not ends_epoch)), bool(stop)

    def saved(self, step: int) -> None:
        """A checkpoint was made, of whatever occasion."""
        self._step, self._at = step, time.monotonic()

    def _is_due(self, step: int) -> bool:
        if self._worker.rank:
            return False
        steps, minutes = self._stage.checkpoint_every_steps, self._stage.checkpoint_every_minutes
        if steps is not None and step - self._step >= steps:
            return True
        return minutes is not None and time.monotonic() - self._at >= 60 * minutes


def save_checkpoint(worker: Worker, trainee: Trainee, config: TrainerConfig, metrics: dict[str, Any]) -> None:
    """Each rank writes its share to local disk and, last, its manifest; rank 0 adds weights and state.

    Every rank takes part. The upload goes on behind the steps that follow.

    Args:
        worker: This rank.
        trainee: Batch-norm statistics are the same on every rank at the end of an epoch, and rank 0's before.
        config: Goes into the state.
        metrics: `epoch`, `step`, and at the end of an epoch what the checkpoint is chosen by.

    Raises:
        UserError: Too many images are damaged over all ranks, or the local disk is full.
    """
    share_damaged(trainee.loader, worker.world)
    mark = [uuid.uuid4().hex]  # of this one save: a killed save's files do not pass for those of its repetition
    dist.broadcast_object_list(mark)
    name = _folder_name(metrics, config)
    try:
        with worker.snapshot() as folder:
            _write(folder, worker, trainee, config, metrics)
            write_manifest(folder, worker.rank, worker.world, {"step": metrics["step"], "save": mark[0]}, metrics)
            worker.report(metrics, folder, name)
    except Exception as error:
        if not _disk_is_full(error):
            raise
        raise UserError(
            f"no room for checkpoint {name} below {tempfile.gettempdir()} on {socket.gethostname()}; free some, or set "
            f"TMPDIR to another disk; {trainee.guard.last_checkpoint or 'no checkpoint'} is kept"
        ) from error
    trainee.guard.last_checkpoint = f"{trainee.name}/{name}"


def share_damaged(loader: TrainLoader, world: int) -> None:
    """Tell every rank which damaged images the others have met. Every rank takes part.

    Raises:
        UserError: Together they have met more than `data.max_damaged`; every rank raises it.
    """
    parts: list[list[tuple[str, str]]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, loader.damaged)
    loader.add_damaged(pair for part in parts for pair in part)


def _write(folder: Path, worker: Worker, trainee: Trainee, config: TrainerConfig, metrics: dict[str, Any]) -> None:
    average, memory = trainee.average, trainee.memory
    trainee.engine.save(folder)
    weights = trainee.engine.weights() if average is None else average.model.state_dict()
    if config.stage_one.select_by not in metrics:  # statistics are averaged over ranks at the end of an epoch only
        save_file(_own_buffers(trainee), folder / _buffers_file(worker.rank))
    if worker.rank:
        return
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
    if memory is not None:
        save_file(memory.state_dict(), folder / MEMORY_FILE)
    state: dict[str, Any] = {
        "metrics": metrics,
        "loader": trainee.loader.state_dict(),
        "world": worker.world,
        "average_updates": average.updates if average is not None else None,
        "skipped_steps": trainee.guard.skipped,
        "told": list(trainee.told.last),
        "config": config.model_dump(mode="json"),
        "versions": {name: version(name) for name in VERSIONS_OF},
    }
    (folder / STATE_FILE).write_text(json.dumps(state))


def _disk_is_full(error: Exception) -> bool:
    """Torch and safetensors say of a full disk that some file is short."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return shutil.disk_usage(tempfile.gettempdir()).free < FULL_BELOW_BYTES


class Position(NamedTuple):
    """Where a run goes on: the epoch, how many of its steps are done, and all steps done since the start."""

    epoch: int
    steps_of_epoch: int
    step: int


def restore_checkpoint(worker: Worker, trainee: Trainee, config: TrainerConfig) -> Position:
    """Go on from the newest whole checkpoint. Every rank takes part.

    Raises:
        UserError: ZeRO 3 has split the checkpoint over another number of workers.
    """
    with worker.checkpoint() as folder:
        if folder is None:
            return Position(0, 0, 0)
        state = json.loads((folder / STATE_FILE).read_text())
        with _for_world(folder, state["world"], worker, config) as (source, universal):
            trainee.engine.load(source, universal)
        trainee.loader.load_state_dict(state["loader"])
        if trainee.average is not None:
            trainee.average.load(load_file(folder / WEIGHTS_FILE), state["average_updates"])
        if trainee.memory is not None:
            trainee.memory.load_state_dict(load_file(folder / MEMORY_FILE))
        if (folder / _buffers_file(worker.rank)).exists():
            for name, tensor in load_file(folder / _buffers_file(worker.rank)).items():
                _buffers_of(trainee)[name].copy_(tensor)
        trainee.told.tell_again(state["told"])
        metrics = state["metrics"]
        trainee.guard.skipped = state["skipped_steps"]
        trainee.guard.last_checkpoint = f"{trainee.name}/{_folder_name(metrics, config)}"
        epoch, step = int(metrics["epoch"]), int(metrics["step"])
        if config.stage_one.select_by in metrics:
            return Position(epoch + 1, 0, step)
        return Position(epoch, step - epoch * trainee.loader.steps_per_epoch, step)


def load_classifier(folder: Path, config: TrainerConfig, num_classes: int) -> Classifier:
    """The trained model in a verified checkpoint folder, in float32, for features and evaluation."""
    plain = {"weights": None, "checkpoint_activations": False}
    model = build_model(
        config.model.model_copy(update=plain), num_classes, config.data.image_px, config.stage_one.loss.normalise
    )
    model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model.eval()


@contextmanager
def _for_world(folder: Path, saved_by: int, worker: Worker, config: TrainerConfig) -> Iterator[tuple[Path, bool]]:
    """DeepSpeed's files for this number of workers, and whether they are in the universal format."""
    zero_stage = config.stage_one.zero_stage
    if saved_by == worker.world or zero_stage == 0:
        yield folder, False
        return
    if zero_stage not in CONVERTIBLE_ZERO_STAGES:
        raise UserError(
            f"stage_one.zero_stage = {zero_stage} splits the weights of a checkpoint over its {saved_by} workers, "
            f"and there are {worker.world} now; set cluster.workers={saved_by}"
        )
    mark = json.loads((folder / MANIFEST_FILE).read_text())["extra"]["save"]
    with universal_checkpoint(folder, mark) as converted:
        yield converted, True


def _buffers_of(trainee: Trainee) -> dict[str, Tensor]:
    """Batch norm's running statistics, each rank's its own: of the model and of its moving average."""
    models = {"model": trainee.engine.model} | ({"average": trainee.average.model} if trainee.average else {})
    return {f"{kind}.{name}": buffer for kind, model in models.items() for name, buffer in model.named_buffers()}


def _own_buffers(trainee: Trainee) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in _buffers_of(trainee).items()}


def _buffers_file(rank: int) -> str:
    return f"buffers-rank{rank}.safetensors"


def _folder_name(metrics: dict[str, Any], config: TrainerConfig) -> str:
    """Of the end of an epoch, which was validated, or of the middle of one."""
    if config.stage_one.select_by in metrics:
        return f"epoch-{int(metrics['epoch']):04d}"
    return f"step-{int(metrics['step']):08d}"
