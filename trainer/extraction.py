"""Features of whole splits, made by all workers from a trained checkpoint.

Shapes: B images, V views, D feature.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster.checkpoint import sha256_of, verify
from cluster.errors import UserError
from cluster.launch import run_workers
from cluster.progress import progress_bar
from cluster.run import RunFolder
from cluster.worker import Worker
from data_pipeline.damage import check_left_out
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.passes import augmented_batches, evaluation_batches
from data_pipeline.read_ahead import Batch
from trainer.config import TrainerConfig
from trainer.feature_mirror import fetch_features
from trainer.features import MANIFEST_FILE, Features, read_manifest, write_manifest, write_part
from trainer.model import Classifier
from trainer.stage_checkpoint import WEIGHTS_FILE, load_classifier


@dataclass(frozen=True)
class Extraction:
    """Features that are wanted: of `splits`, by the best checkpoint of training `name`, in `folder` of the run."""

    name: str
    splits: tuple[str, ...]
    folder: str


TRAIN_AND_VAL = Extraction("stage_one", ("train", "val"), "features/stage_one")
TEST = Extraction("stage_one", ("test",), "features/stage_one_test")
BASELINE = Extraction("baseline", ("val", "test"), "features/baseline")


def extract_features(config: TrainerConfig, dataset: Dataset, run: RunFolder, *wanted: Extraction) -> list[Path]:
    """Features of whole splits, by all workers in one go; what is there and of the right checkpoint is kept.

    Args:
        config: The configuration.
        dataset: The packed dataset.
        run: The run folder; `NAME/result.json` names the checkpoint.
        wanted: What is extracted.

    Returns:
        The local folder of each, for `trainer.features.read_features`.
    """
    checkpoints = {w.name: run.need_json(f"{w.name}/result.json", "rarelens stage-one")["checkpoint"] for w in wanted}
    sha256 = {name: sha256_of(fetch_checkpoint(run, path) / WEIGHTS_FILE) for name, path in checkpoints.items()}
    missing = [w for w in wanted if not _is_there(run, w, sha256[w.name], made_with(config, dataset, w.splits))]
    if not missing:
        return [fetch_features(f"{run.uri}/{w.folder}") for w in wanted]
    for w in missing:  # parts that are replaced one by one must not pass for whole features meanwhile
        run.storage.delete(f"{w.folder}/{MANIFEST_FILE}")
    made: dict[tuple[Any, ...], dict[str, Any]] = {}
    splits = [split for w in missing for split in w.splits]
    images = sum(len(dataset.index(split)) * views_of(config, split) for split in splits)
    with progress_bar(f"features of {' + '.join(splits)}", images) as bar:

        def on_message(message: dict[str, Any]) -> None:
            if "images" not in message:  # an incident
                run.log({"stage": "features", **message})
                return
            for part in [part for part, other in made.items() if other["world"] != message["world"]]:
                del made[part]  # of as many workers as there were before a restart
            made[message["folder"], message["split"], message["rank"]] = message
            bar.update(sum(part["images"] for part in made.values()))

        run_workers(
            _extract,
            {
                "config": config,
                "dataset_uri": dataset.uri,
                "run_uri": run.uri,
                "wanted": [(w, checkpoints[w.name]) for w in missing],
            },
            name="features/ray",
            run_uri=run.uri,
            cluster=config.cluster,
            on_message=on_message,
        )
    last = next(iter(made.values()))
    for w in missing:
        folder = fetch_features(f"{run.uri}/{w.folder}", declared=False)
        write_manifest(
            folder,
            backbone=config.model.backbone,
            checkpoint_sha256=sha256[w.name],
            dim=last["dim"],
            rows={split: len(dataset.index(split)) for split in w.splits},
            parts=last["world"],
            views={split: views_of(config, split) for split in w.splits},
            made_with=made_with(config, dataset, w.splits),
        )
        if not run.is_local:
            run.storage.upload(folder / MANIFEST_FILE, f"{w.folder}/{MANIFEST_FILE}")
    return [fetch_features(f"{run.uri}/{w.folder}") for w in wanted]


def views_of(config: TrainerConfig, split: str) -> int:
    """V: only train has more than the view in which images are evaluated."""
    return config.features.views if split == "train" else 1


def made_with(config: TrainerConfig, dataset: Dataset, splits: Sequence[str]) -> dict[str, Any]:
    """All that decides features beside the checkpoint, as JSON values: with another one they are made anew."""
    data, views = config.data, max(views_of(config, split) for split in splits)
    decides: dict[str, Any] = {"dataset": dataset.fingerprint, "views": views}
    decides |= {"image_px": data.image_px, "resize_ratio": data.resize_ratio}
    if config.model.mirrors != "none":
        decides["mirrors"] = config.model.mirrors
    if views > 1:
        decides |= {"seed": config.seed, "augment": data.augment.model_dump(mode="json")}
    return decides


def _is_there(run: RunFolder, wanted: Extraction, weights_sha256: str, decides: dict[str, Any]) -> bool:
    if not run.storage.exists(f"{wanted.folder}/{MANIFEST_FILE}"):
        return False
    manifest = read_manifest(fetch_features(f"{run.uri}/{wanted.folder}"))
    return manifest["checkpoint_sha256"] == weights_sha256 and manifest.get("made_with") == decides


def fetch_checkpoint(run: RunFolder, path: str) -> Path:
    """Local folder of a checkpoint below the run folder, verified against its manifest."""
    folder = run.fetch(path)
    verify(folder)
    return folder


def extract(
    model: Classifier,
    dataset: Dataset,
    config: TrainerConfig,
    split: str,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device,
    worker: Worker | None = None,
) -> Features:
    """This worker's part of a split's features: its images through the backbone in evaluation mode.

    Args:
        model: The network; it is left in the mode in which it came.
        dataset: The packed dataset.
        config: How images are decoded and augmented, in how many views, how many at a time.
        split: `train`, `val` or `test`.
        rank: Number of this worker.
        world: Number of workers.
        device: Where the model is.
        worker: Is told that work goes on, and of damaged images.

    Raises:
        UserError: A feature is not finite in float16; the message names the sample.
    """
    size, further = config.features.batch_size, views_of(config, split) - 1
    worker = worker or Worker(rank, world, device.type)
    place: dict[str, Any] = {"rank": rank, "world": world, "device": device, "warn": worker.warn}
    passes = [(evaluation_batches(dataset, config.data, split, batch_size=size, **place), 1)]
    if further:  # as many images in a forward pass as without views
        at_once: dict[str, Any] = {"batch_size": max(1, size // further), "views": further, "seed": config.seed}
        passes.append((augmented_batches(dataset, config.data, split, **at_once, **place), further))
    was_training = model.training
    model.eval()
    try:
        made = [_through(model, worker.beating(batches, f"features of {split}"), views) for batches, views in passes]
    finally:
        model.train(was_training)
    # Whether a damaged image can be decoded may depend on the crop: one that lacks a view is left out.
    rows = made[0][0]
    for seen, _ in made[1:]:
        rows = np.intersect1d(rows, seen)
    kept = [x if len(seen) == len(rows) else x[:, np.searchsorted(seen, rows)] for seen, x in made]
    return _checked(dataset, split, rows, np.concatenate(kept) if further else kept[0])


def _through(model: Classifier, batches: Iterable[Batch], views: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N] in order, and their features, float16 [V, N, D]."""
    rows = [np.empty(0, dtype=np.int64)]
    parts = [np.empty((views, 0, model.feature_dim), dtype=np.float16)]
    with torch.inference_mode():
        for batch in batches:
            rows.append(np.asarray(batch.rows, dtype=np.int64))
            features = model.features(batch.images).to(torch.float16).cpu().numpy()
            parts.append(features.reshape(views, len(batch.rows), model.feature_dim))
    return np.concatenate(rows), np.concatenate(parts, axis=1)


def _checked(dataset: Dataset, split: str, rows: np.ndarray, x: np.ndarray) -> Features:
    """Features of `rows` [N] from x [V, N, D]."""
    index, views = dataset.index(split), len(x)
    damaged = ~np.isfinite(x).all(axis=(0, 2))
    if damaged.any():
        raise UserError(
            f"features of {damaged.sum()} {split} samples, {index.key[rows[damaged][0]]} the first, are not finite in "
            "float16; the training has diverged: train again with a lower stage_one.optimiser.lr"
        )
    x = x.reshape(views * len(rows), x.shape[2])
    return Features(index.key[rows], index.label[rows].astype(np.int64), index.group[rows], rows, x, views)


def _extract(
    worker: Worker, config: TrainerConfig, dataset_uri: str, run_uri: str, wanted: list[tuple[Extraction, str]]
) -> None:
    """One worker's part of each split; `wanted` comes with the path of its checkpoint."""
    device = torch.device("cuda", torch.cuda.current_device()) if worker.device == "cuda" else torch.device("cpu")
    dataset, run = open_dataset(dataset_uri), RunFolder(run_uri)
    for extraction, checkpoint in wanted:
        model = load_classifier(fetch_checkpoint(run, checkpoint), config, len(dataset.classes)).to(device)
        for split in extraction.splits:
            place: dict[str, Any] = {"rank": worker.rank, "world": worker.world, "device": device}
            part = extract(model, dataset, config, split, worker=worker, **place)
            rows: list[np.ndarray] = [part.rows] * worker.world
            dist.all_gather_object(rows, part.rows)
            check_left_out(dataset, split, np.concatenate(rows), config.data.max_damaged)
            with tempfile.TemporaryDirectory(prefix="rarelens-features-") as scratch:
                file = write_part(scratch, split, worker.rank, part)
                run.storage.upload(file, f"{extraction.folder}/{file.name}")
            said = {"folder": extraction.folder, "split": split, "rank": worker.rank, "world": worker.world}
            worker.tell({"images": len(part.x), "dim": part.x.shape[1], **said})
