"""Stage one: cross-entropy + lambda * metric loss over the embeddings of all workers.

Shapes: B images of this rank in a step, V views of each, D embedding, C classes.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from cluster.checkpoint import write_manifest
from cluster.errors import UserError
from cluster.launch import Worker, run_workers
from cluster.progress import progress_bar
from cluster.run import RunFolder
from data_pipeline.config import SamplingConfig
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.loader import TrainLoader, evaluation_batches
from trainer.config import LossConfig, StageOneConfig, TrainerConfig
from trainer.engine import Engine, learning_rate
from trainer.losses import METRIC_LOSSES
from trainer.losses.classification import cross_entropy
from trainer.metrics import METRICS
from trainer.model import Classifier, Output, build_model
from trainer.pool import gather_pool, global_mean

WEIGHTS_FILE = "weights.safetensors"
STATE_FILE = "state.json"


def train_stage_one(config: TrainerConfig, dataset: Dataset, run: RunFolder, name: str = "stage_one") -> dict[str, Any]:
    """Train on all workers, from the last checkpoint if there is one, and choose the best epoch on val.

    Args:
        config: The configuration; `config.stage_one` says what is trained.
        dataset: The packed dataset, at a place that every worker reaches.
        run: The run folder; checkpoints go to `NAME/`, log lines to `log.jsonl`, events to `tensorboard/NAME`.
        name: `stage_one`, or another name for another training in the same run.

    Returns:
        `checkpoint` (path below the run folder), `epoch`, `metrics` on val of the best epoch, and `seconds`; kept as
        `NAME/result.json`, whose presence says that this step is done.
    """
    done = run.read_json(f"{name}/result.json")
    if done is not None:
        return done
    started = time.monotonic()
    steps = config.stage_one.epochs * max(1, len(dataset.index("train")) // config.stage_one.batch_size)
    from torch.utils.tensorboard import SummaryWriter

    with (
        progress_bar(name.replace("_", " "), steps) as bar,
        SummaryWriter(str(run.path(f"tensorboard/{name}"))) as events,
    ):

        def on_message(line: dict[str, Any]) -> None:
            run.log({"stage": name, **line})
            for key, value in line.items():
                if isinstance(value, float):
                    events.add_scalar(f"{line['kind']}/{key}", value, line["step"])
            if line["kind"] == "step":
                bar.update(
                    line["step"], f"epoch {line['epoch']} loss {line['loss']:.3f} {line['images_per_s']:.0f} images/s"
                )

        outcome = run_workers(
            _train,
            {"config": config, "dataset_uri": dataset.uri},
            name=name,
            run_uri=run.uri,
            cluster=config.cluster,
            keep=(config.stage_one.keep_checkpoints + 1, config.stage_one.select_by),
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
    """Plain cross-entropy with natural sampling: the same images, views, epochs and optimiser, for the comparison."""
    plain = config.stage_one.model_copy(update={"loss": LossConfig(name="none"), "sampling": SamplingConfig()})
    return train_stage_one(config.model_copy(update={"stage_one": plain}), dataset, run, "baseline")


def objective(
    output: Output, labels: torch.Tensor, config: StageOneConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L = cross-entropy + lambda * metric loss (arXiv 2207.06975, eq. 1), as the scalar to give to backward.

    Args:
        output: Of the V * B images of this rank, view-major.
        labels: [V * B], of the same.
        config: Loss, lambda and its settings.

    Returns:
        The scalar, and for the log each term's (sum, count) over this rank, [2] each. Every rank takes part.
    """
    classification = cross_entropy(output.logits, labels)
    terms = {"cross_entropy": classification}
    loss = global_mean(classification)
    if config.loss.name != "none" and config.loss.weight > 0:
        pool = gather_pool(output.embeddings, labels)
        metric = METRIC_LOSSES[config.loss.name](output.embeddings, labels, pool, config.loss)
        terms["metric_loss"] = metric
        loss = loss + config.loss.weight * global_mean(metric)
    sums = {
        key: torch.stack([t.total.detach().float(), t.total.new_tensor(t.count).float()]) for key, t in terms.items()
    }
    return loss, sums


def _train(worker: Worker, config: TrainerConfig, dataset_uri: str) -> None:
    """The loop on one worker, all ranks in step."""
    stage = config.stage_one
    device = torch.device("cuda", torch.cuda.current_device()) if worker.device == "cuda" else torch.device("cpu")
    dataset = open_dataset(dataset_uri)

    # Every rank builds the same weights from the same seed; DeepSpeed broadcasts rank 0's besides.
    torch.manual_seed(config.seed)
    model = build_model(config.model, len(dataset.classes), config.data.image_px, normalise=stage.loss.normalise)
    engine = Engine(model.to(device), stage, worker.world, worker.device)
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
    )
    log = StepLog(worker, loader, stage)
    first_epoch = _restore(worker, engine, loader, stage)

    for epoch in range(first_epoch, stage.epochs):
        # --- one epoch of steps
        engine.module.train()
        for batch in loader.epoch(epoch):
            step = epoch * loader.steps_per_epoch + batch.step
            lr = learning_rate(stage.optimiser, (step + 1) / loader.steps_per_epoch, stage.epochs)
            # Dropout follows from seed, step and rank alone, so that a resumed run needs no generator state.
            torch.manual_seed(int(np.random.SeedSequence([config.seed, step, worker.rank]).generate_state(1)[0]))
            loss, terms = objective(engine(batch.images), batch.labels.repeat(stage.views), stage)
            engine.step(loss, lr)
            log.step(step + 1, epoch, lr, len(batch.labels), terms)

        # --- validation, all ranks
        average_batch_norm(engine.module)
        metrics = validate(engine, dataset, config, worker, device)
        step = (epoch + 1) * loader.steps_per_epoch
        if worker.rank == 0:
            worker.tell({"kind": "epoch", "epoch": epoch, "step": step, **metrics})

        # --- checkpoint, all ranks
        _save(worker, engine, loader, config, {"epoch": epoch, "step": step, **metrics})
    loader.close()


class StepLog:
    """What a step cost and said, told to the driver every `log_every_steps` steps."""

    def __init__(self, worker: Worker, loader: TrainLoader, config: StageOneConfig):
        self._worker, self._loader, self._config = worker, loader, config
        self._images, self._since, self._waited = 0, time.monotonic(), loader.wait_s

    def step(self, step: int, epoch: int, lr: float, images: int, terms: dict[str, torch.Tensor]) -> None:
        """Count a step; on each `log_every_steps`-th, all ranks add up their terms and rank 0 tells."""
        self._images += images
        if step % self._config.log_every_steps:
            return
        sums = torch.cat([*terms.values(), next(iter(terms.values())).new_tensor([float(self._images)])])
        dist.all_reduce(sums)
        seconds = time.monotonic() - self._since
        waited = self._loader.wait_s - self._waited
        self._images, self._since, self._waited = 0, time.monotonic(), self._loader.wait_s
        means = {key: float(sums[2 * i] / sums[2 * i + 1].clamp(min=1)) for i, key in enumerate(terms)}
        loss = means["cross_entropy"] + self._config.loss.weight * means.get("metric_loss", 0.0)
        if not math.isfinite(loss):  # the same sums on every rank: all of them stop here
            raise UserError(
                f"the loss is {loss} at step {step} (epoch {epoch}): the training has diverged; lower "
                f"stage_one.optimiser.lr = {self._config.optimiser.lr:g} and give another run=..."
            )
        if self._worker.rank:
            return
        line = {"kind": "step", "step": step, "epoch": epoch, "loss": loss, **means, "lr": lr}
        line |= {"images_per_s": float(sums[-1]) / seconds, "wait_share": waited / seconds}
        if "metric_loss" in terms:
            pool = self._config.batch_size * self._config.views
            line["anchors_without_term"] = pool - float(sums[3])
        self._worker.tell(line)


def average_batch_norm(model: nn.Module) -> None:
    """Average running means and variances over ranks, each of which saw its own images. Every rank takes part.

    After it all ranks hold the same model, so that it does not matter whose buffers a checkpoint keeps.
    """
    buffers = [
        b
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        for b in (m.running_mean, m.running_var)
    ]
    if not buffers or dist.get_world_size() == 1:
        return
    flat = torch.cat([b.flatten().float() for b in buffers])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):  # type: ignore[union-attr]
        buffer.copy_(mean.view_as(buffer))  # type: ignore[union-attr]


@torch.inference_mode()
def validate(
    engine: Engine, dataset: Dataset, config: TrainerConfig, worker: Worker, device: torch.device
) -> dict[str, float]:
    """Each sample of val once over all workers -> METRICS of the own classifier. Every rank takes part."""
    engine.module.eval()
    rows, predictions = [], []
    batches = evaluation_batches(
        dataset,
        config.data,
        "val",
        batch_size=config.features.batch_size,
        rank=worker.rank,
        world=worker.world,
        device=device,
    )
    for batch in batches:
        rows.append(batch.rows)
        predictions.append(engine(batch.images).logits.argmax(1).cpu().numpy())
    parts: list[Any] = [None] * worker.world
    mine = (np.concatenate(rows or [np.empty(0, np.int64)]), np.concatenate(predictions or [np.empty(0, np.int64)]))
    dist.all_gather_object(parts, mine)
    labels = dataset.index("val").label[np.concatenate([p[0] for p in parts])]
    predicted = np.concatenate([p[1] for p in parts])
    return {name: float(metric(labels, predicted, len(dataset.classes))) for name, metric in METRICS.items()}


def _save(
    worker: Worker, engine: Engine, loader: TrainLoader, config: TrainerConfig, metrics: dict[str, float]
) -> None:
    """Each rank writes its share and, last, its manifest; rank 0 adds weights and state. Every rank takes part."""
    mark = [uuid.uuid4().hex]  # of this one save: a killed save's files do not pass for those of its repetition
    dist.broadcast_object_list(mark)
    with tempfile.TemporaryDirectory(prefix="rarelens-checkpoint-") as name:
        folder = Path(name)
        engine.save(folder)
        if worker.rank == 0:
            weights = {name: tensor.contiguous() for name, tensor in engine.module.state_dict().items()}
            save_file(weights, folder / WEIGHTS_FILE)
            state = {"metrics": metrics, "loader": loader.state_dict(), "world": worker.world}
            (folder / STATE_FILE).write_text(json.dumps({**state, "config": config.model_dump(mode="json")}))
        write_manifest(folder, worker.rank, worker.world, {"step": metrics["step"], "save": mark[0]})
        worker.report(metrics, folder, f"epoch-{int(metrics['epoch']):04d}")


def _restore(worker: Worker, engine: Engine, loader: TrainLoader, config: StageOneConfig) -> int:
    """Go on from the newest whole checkpoint. Returns the epoch to begin with. Every rank takes part."""
    with worker.checkpoint() as folder:
        if folder is None:
            return 0
        state = json.loads((folder / STATE_FILE).read_text())
        if state["world"] != worker.world and config.zero_stage > 0:
            raise UserError(
                f"stage_one.zero_stage = {config.zero_stage} splits a checkpoint over its {state['world']} workers, "
                f"and there are {worker.world} now; set cluster.workers={state['world']}"
            )
        engine.load(folder)
        loader.load_state_dict(state["loader"])
        return int(state["metrics"]["epoch"]) + 1


def load_classifier(folder: Path, config: TrainerConfig, num_classes: int) -> Classifier:
    """The trained model in a verified checkpoint folder, in float32, for features and evaluation."""
    model = build_model(
        config.model.model_copy(update={"weights": None}),
        num_classes,
        config.data.image_px,
        config.stage_one.loss.normalise,
    )
    model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model.eval()
