"""Features of whole splits, made by all workers from a trained checkpoint."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.checkpoint import sha256_of, verify
from cluster.launch import Worker, run_workers
from cluster.progress import progress_bar
from cluster.run import RunFolder
from data_pipeline.dataset import Dataset, open_dataset
from trainer.config import TrainerConfig
from trainer.features import MANIFEST_FILE, extract, read_manifest, write_manifest, write_part
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
    missing = [w for w in wanted if not _is_there(run, w, sha256[w.name])]
    if not missing:
        return [run.fetch(w.folder) for w in wanted]
    made: list[dict[str, Any]] = []
    splits = [split for w in missing for split in w.splits]
    with progress_bar(f"features of {' + '.join(splits)}", sum(len(dataset.index(split)) for split in splits)) as bar:

        def on_message(message: dict[str, Any]) -> None:
            made.append(message)
            bar.update(sum(m["samples"] for m in made))

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
    for w in missing:
        write_manifest(
            run.fetch(w.folder),
            backbone=config.model.backbone,
            checkpoint_sha256=sha256[w.name],
            dim=made[0]["dim"],
            rows={split: len(dataset.index(split)) for split in w.splits},
            parts=made[0]["world"],
        )
        run.publish(f"{w.folder}/{MANIFEST_FILE}")
    return [run.fetch(w.folder) for w in wanted]


def _is_there(run: RunFolder, wanted: Extraction, weights_sha256: str) -> bool:
    if not run.storage.exists(f"{wanted.folder}/{MANIFEST_FILE}"):
        return False
    return read_manifest(run.fetch(wanted.folder))["checkpoint_sha256"] == weights_sha256


def fetch_checkpoint(run: RunFolder, path: str) -> Path:
    """Local folder of a checkpoint below the run folder, verified against its manifest."""
    folder = run.fetch(path)
    verify(folder)
    return folder


def _extract(
    worker: Worker, config: TrainerConfig, dataset_uri: str, run_uri: str, wanted: list[tuple[Extraction, str]]
) -> None:
    """One worker's part of each split; `wanted` comes with the path of its checkpoint."""
    device = torch.device("cuda", torch.cuda.current_device()) if worker.device == "cuda" else torch.device("cpu")
    dataset, run = open_dataset(dataset_uri), RunFolder(run_uri)
    for extraction, checkpoint in wanted:
        model = load_classifier(fetch_checkpoint(run, checkpoint), config, len(dataset.classes)).to(device)
        for split in extraction.splits:
            part = extract(
                model,
                dataset,
                config.data,
                split,
                batch_size=config.features.batch_size,
                rank=worker.rank,
                world=worker.world,
                device=device,
            )
            with tempfile.TemporaryDirectory(prefix="rarelens-features-") as scratch:
                file = write_part(scratch, split, worker.rank, part)
                run.storage.upload(file, f"{extraction.folder}/{file.name}")
            worker.tell({"samples": len(part), "dim": part.x.shape[1], "world": worker.world})
