"""Stage one: classification loss + lambda * metric loss over the embeddings of all workers.

Shapes: B images of this rank in a step, V views of each, D embedding, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cluster.launch import run_workers
from cluster.progress import progress_bar
from cluster.run import RunFolder
from cluster.worker import Worker
from data_pipeline.config import SamplingConfig
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.loader import Batch, TrainLoader
from trainer.config import MemoryConfig, TrainerConfig
from trainer.engine import AUTOCAST_DTYPES, Engine
from trainer.gradient_cache import cached_forward
from trainer.loss_config import ClassificationConfig, LossConfig
from trainer.metrics import METRICS
from trainer.model import Output
from trainer.objective import Evaluation, Objective
from trainer.pool_size import out_of_memory_told
from trainer.schedule import learning_rate
from trainer.stage_checkpoint import CheckpointClock, restore_checkpoint, save_checkpoint
from trainer.step_log import StepLog
from trainer.tracking import tracking
from trainer.trainee import Trainee, build_trainee
from trainer.validation import ready_to_evaluate, validate

if TYPE_CHECKING:
    from trainer.starting_point import StartingPoint


def train_stage_one(
    config: TrainerConfig,
    dataset: Dataset,
    run: RunFolder,
    name: str = "stage_one",
    start: StartingPoint | None = None,
) -> dict[str, Any]:
    """Train on all workers, from the last checkpoint if there is one, and choose the best epoch on val.

    Args:
        config: The configuration; `config.stage_one` says what is trained.
        dataset: The packed dataset, at a place that every worker reaches.
        run: The run folder; checkpoints go to `NAME/`, log lines to `log.jsonl`, events to `tensorboard/NAME`, what
            DeepSpeed was given to `NAME/deepspeed.json`.
        name: `stage_one`, or another name for another training in the same run.
        start: What the training goes on from; None = the starting weights of the configuration.

    Returns:
        `checkpoint` (path below the run folder), `epoch`, `metrics` on val of the best epoch, and `seconds`; kept as
        `NAME/result.json`, whose presence says that this step is done.
    """
    done = run.read_json(f"{name}/result.json")
    if done is not None:
        return done
    started = time.monotonic()
    steps = config.stage_one.epochs * max(1, len(dataset.index("train")) // config.stage_one.batch_size)
    logged = {(line["kind"], line.get("step")) for line in run.read_log() if line.get("stage") == name}

    with progress_bar(name.replace("_", " "), steps) as bar, tracking(config, run, name) as told:

        def on_message(line: dict[str, Any]) -> None:
            if line["kind"] == "engine":
                run.write_json(f"{name}/deepspeed.json", line["deepspeed"])
                run.log({"stage": name, "kind": "start"})
                return
            mark = (line["kind"], line.get("step"))
            if line.pop("again", False) and mark in logged:
                return
            logged.add(mark)
            run.log({"stage": name, **line})
            if line["kind"] not in ("step", "epoch", "skipped"):
                return
            for tracker in told:
                tracker.line(line)
            if line["kind"] == "step":
                bar.update(
                    line["step"], f"epoch {line['epoch']} loss {line['loss']:.3f} {line['images_per_s']:.0f} images/s"
                )

        outcome = run_workers(
            train_on_worker,
            {"config": config, "dataset_uri": dataset.uri, "name": name, "start": start},
            name=name,
            run_uri=run.uri,
            cluster=config.cluster,
            keep=(config.stage_one.keep_checkpoints, config.stage_one.select_by),
            most=config.data.streams,
            on_message=on_message,
        )
    run.publish("tensorboard")
    path, metrics = outcome.checkpoints[0]
    result = {
        "checkpoint": path,
        "epoch": int(metrics["epoch"]),
        "metrics": {key: metrics[key] for key in METRICS},
        "seconds": round(time.monotonic() - started, 1),
    }
    run.write_json(f"{name}/result.json", result)
    return result


def train_baseline(config: TrainerConfig, dataset: Dataset, run: RunFolder) -> dict[str, Any]:
    """Plain cross-entropy with natural sampling: same network, images, views, epochs and optimiser, for comparison."""
    plain = {
        "loss": LossConfig(name="none"),
        "classification": ClassificationConfig(),
        "sampling": SamplingConfig(),
        "memory": MemoryConfig(),
    }
    stage = config.stage_one.model_copy(update=plain)
    return train_stage_one(config.model_copy(update={"stage_one": stage}), dataset, run, "baseline")


def train_on_worker(
    worker: Worker,
    config: TrainerConfig,
    dataset_uri: str,
    name: str = "stage_one",
    start: StartingPoint | None = None,
) -> None:
    """The loop on one worker, all ranks in step.

    Args:
        worker: Rank, number of workers, and the way to the driver and to the checkpoints.
        config: The configuration.
        dataset_uri: The packed dataset.
        name: Folder of the checkpoints below the run folder.
        start: What the training goes on from; None = the starting weights of the configuration.

    Raises:
        UserError: The loss was not finite, too many images are damaged, or the configuration does not fit the data.
    """
    stage = config.stage_one
    device = torch.device("cuda", torch.cuda.current_device()) if worker.device == "cuda" else torch.device("cpu")
    dataset = open_dataset(dataset_uri)
    loader = TrainLoader(
        dataset,
        config.data,
        batch_size=stage.batch_size,
        views=stage.views,
        sampling=stage.sampling,
        seed=config.seed,
        rank=worker.rank,
        world=worker.world,
        device=device,
        epochs=stage.epochs,
        dtype=AUTOCAST_DTYPES[stage.precision] or torch.float32,
        warn=worker.warn,
    )
    trainee = build_trainee(worker, config, dataset.class_counts("train"), loader, device, name, start)
    engine = trainee.engine
    log = StepLog(worker, trainee.told, loader, stage, dataset.classes)
    begin = restore_checkpoint(worker, trainee, config)
    clock = CheckpointClock(worker, stage, begin.step)
    if worker.rank == 0:
        worker.tell({"kind": "engine", "deepspeed": engine.settings})

    for epoch in range(begin.epoch, stage.epochs):
        # --- one epoch of steps, all ranks
        engine.train()
        first_step = begin.steps_of_epoch if epoch == begin.epoch else 0
        with out_of_memory_told():
            train_epoch(worker, trainee, config, epoch, log, clock, first_step)

        # --- validation, all ranks
        reestimate = start is not None and start.reestimate_batch_norm
        batches = worker.beating(loader.epoch(epoch), "batch-norm statistics") if reestimate else None
        predict = ready_to_evaluate(trainee, batches)
        metrics = validate(predict, dataset, config, worker, device)
        metrics = {"epoch": epoch, "step": (epoch + 1) * loader.steps_per_epoch, **metrics}
        trainee.told.tell({"kind": "epoch", **metrics})

        # --- checkpoint, all ranks
        save_checkpoint(worker, trainee, config, metrics)
        clock.saved(int(metrics["step"]))
    loader.close()


def train_epoch(
    worker: Worker,
    trainee: Trainee,
    config: TrainerConfig,
    epoch: int,
    log: StepLog,
    clock: CheckpointClock,
    first_step: int = 0,
) -> None:
    """The steps of an epoch. Every rank takes part.

    Args:
        worker: This rank.
        trainee: What is trained.
        config: The configuration.
        epoch: From 0.
        log: Takes note of each step.
        clock: Says when a checkpoint is due before the epoch's end.
        first_step: Steps of the epoch that are done.
    """
    stage, loader = config.stage_one, trainee.loader
    engine, objective, guard = trainee.engine, trainee.objective, trainee.guard
    log.resume()
    for batch in loader.epoch(epoch, first_step):
        step = epoch * loader.steps_per_epoch + batch.step + 1
        epochs_done = step / loader.steps_per_epoch
        lr = learning_rate(stage.optimiser, epochs_done, stage.epochs)
        _seed(worker, config.seed, step - 1)
        guard.before(engine.model)
        signals = clock.signals(step)
        output, evaluation = forward_backward(engine, objective, batch, epochs_done, stage.micro_batch_size, signals)
        worker.beat(f"step {step}")
        if not evaluation.is_finite or not engine.step(lr):
            guard.leave_out(step, batch, output, evaluation, engine)
            continue
        objective.remember(evaluation, batch, epochs_done)
        if trainee.average is not None:
            trainee.average.update(engine.model)
        log.step(step, epoch, lr, evaluation, engine)
        save, leave = clock.decide(evaluation.signals, ends_epoch=batch.step + 1 == loader.steps_per_epoch)
        if save:
            save_checkpoint(worker, trainee, config, {"epoch": epoch, "step": step})
            clock.saved(step)
        if leave:
            worker.leave()
    log.pause()


def forward_backward(
    engine: Engine,
    objective: Objective,
    batch: Batch,
    epochs_done: float,
    micro_batch_size: int | None = None,
    signals: Sequence[float] = (),
) -> tuple[Output, Evaluation]:
    """The gradient of one batch, unless its loss is not finite. Every rank takes part.

    Args:
        engine: Holds the network.
        objective: What is minimised.
        batch: Of this rank.
        epochs_done: When this step is, in (0, epochs].
        micro_batch_size: Images in a forward pass, views counted; None = all.
        signals: What this rank has to say to the others.
    """
    if micro_batch_size is None:
        output = engine(batch.images)
        evaluation = objective(output, batch.labels, epochs_done, batch.mix, signals)
        if evaluation.is_finite:
            engine.backward(evaluation.loss)
        return output, evaluation
    cached = cached_forward(engine, batch.images, micro_batch_size, engine.model)
    evaluation = objective(cached.output, batch.labels, epochs_done, batch.mix, signals)
    if evaluation.is_finite:
        cached.backward(evaluation.loss, engine.backward, objective.parameters())
    return cached.output, evaluation


def _seed(worker: Worker, seed: int, step: int) -> None:
    """Let dropout follow from seed, step and rank alone, so that a resumed run needs no generator state."""
    number = int(np.random.SeedSequence([seed, step, worker.rank]).generate_state(1)[0])
    # Not torch.manual_seed: where CUDA is not used it formats a stack trace for it, at each step.
    torch.default_generator.manual_seed(number)
    if worker.device == "cuda":
        torch.cuda.manual_seed(number)
