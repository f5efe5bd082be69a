"""Features of whole splits, made by all workers from a trained checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from cluster.checkpoint import sha256_of, verify
from cluster.launch import Worker, run_workers
from cluster.progress import progress_bar
from cluster.run import RunFolder
from data_pipeline.dataset import Dataset, open_dataset
from trainer.config import TrainerConfig
from trainer.features import MANIFEST_FILE, extract, read_manifest, write_manifest, write_part
from trainer.stage_one import WEIGHTS_FILE, load_classifier


def extract_features(
    config: TrainerConfig, dataset: Dataset, run: RunFolder, name: str, splits: tuple[str, ...], folder: str
) -> Path:
    """Features of `splits` by the best checkpoint of training `name`, in FOLDER below the run folder.

    Features that are there and were made by this checkpoint are kept.

    Args:
        config: The configuration.
        dataset: The packed dataset.
        run: The run folder; `NAME/result.json` names the checkpoint.
        name: `stage_one` or `baseline`.
        splits: Of train, val, test.
        folder: Where the features go, below the run folder.

    Returns:
        The local folder, for `trainer.features.read_features`.
    """
    checkpoint = run.need_json(f"{name}/result.json", "rarelens stage-one")["checkpoint"]
    weights_sha256 = sha256_of(fetch_checkpoint(run, checkpoint) / WEIGHTS_FILE)
    if run.storage.exists(f"{folder}/{MANIFEST_FILE}"):
        local = run.fetch(folder)
        if read_manifest(local)["checkpoint_sha256"] == weights_sha256:
            return local
    made: list[dict] = []
    samples = sum(len(dataset.index(split)) for split in splits)
    with progress_bar(f"features of {' + '.join(splits)}", samples) as bar:

        def on_message(message: dict) -> None:
            made.append(message)
            bar.update(sum(m["samples"] for m in made))

        run_workers(
            _extract,
            {
                "config": config,
                "dataset_uri": dataset.uri,
                "run_uri": run.uri,
                "checkpoint": checkpoint,
                "splits": splits,
                "folder": folder,
            },
            name=f"ray/{folder}",
            run_uri=run.uri,
            cluster=config.cluster,
            on_message=on_message,
        )
    local = run.fetch(folder)
    write_manifest(
        local,
        backbone=config.model.backbone,
        checkpoint_sha256=weights_sha256,
        dim=made[0]["dim"],
        rows={split: len(dataset.index(split)) for split in splits},
        parts=made[0]["world"],
    )
    run.publish(f"{folder}/{MANIFEST_FILE}")
    return local


def fetch_checkpoint(run: RunFolder, path: str) -> Path:
    """Local folder of a checkpoint below the run folder, verified against its manifest."""
    folder = run.fetch(path)
    verify(folder)
    return folder


def _extract(
    worker: Worker,
    config: TrainerConfig,
    dataset_uri: str,
    run_uri: str,
    checkpoint: str,
    splits: tuple[str, ...],
    folder: str,
) -> None:
    """One worker's part of each split."""
    device = torch.device("cuda", torch.cuda.current_device()) if worker.device == "cuda" else torch.device("cpu")
    dataset, run = open_dataset(dataset_uri), RunFolder(run_uri)
    model = load_classifier(fetch_checkpoint(run, checkpoint), config, len(dataset.classes)).to(device)
    for split in splits:
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
            run.storage.upload(file, f"{folder}/{file.name}")
        worker.tell({"samples": len(part), "dim": part.x.shape[1], "world": worker.world})
