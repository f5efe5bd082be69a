"""Use of a trained model: images in; calibrated probabilities, look-alikes and a warning of strangers out.

Shapes: B images, C classes, K neighbours among the training examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from cluster.errors import UserError
from cluster.progress import console, progress_bar
from data_pipeline.loose_images import find_images
from trainer.export import LoadedModel, load_model
from trainer.prediction_table import check_format, open_table

__all__ = ["Predictions", "classify", "find_images", "joined", "predict"]


@dataclass(frozen=True, eq=False)
class Similar:
    """The training examples that images look like, nearest first, and whether they look like any.

    Attributes:
        keys: Of the packed dataset, object [B, K].
        labels: Names of their classes, object [B, K].
        distances: To them, float32 [B, K], 0 to 2.
        distance: To the one by which `unlike` is decided, float32 [B].
        unlike: Whether an image is unlike the training set, bool [B].
    """

    keys: np.ndarray
    labels: np.ndarray
    distances: np.ndarray
    distance: np.ndarray
    unlike: np.ndarray


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of some images.

    Attributes:
        images: Paths or URIs, B.
        classes: Names, C.
        probabilities: Calibrated, float32 [B, C].
        similar: None where the model folder holds no training examples.
        damaged: (image, reason) of those that could not be read; they are not among `images`.
    """

    images: list[str]
    classes: tuple[str, ...]
    probabilities: np.ndarray
    similar: Similar | None = None
    damaged: list[tuple[str, str]] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """The most probable class of each image."""
        return [self.classes[place] for place in self.probabilities.argmax(axis=1)]


@dataclass(frozen=True)
class PredictResult:
    """What `predict` did; damaged images have no row."""

    out: Path | None
    predicted: int
    unlike: int
    damaged: list[tuple[str, str]]
    """(image, reason)."""

    def __str__(self) -> str:
        unlike = f", {self.unlike} unlike the training set" if self.unlike else ""
        where = f": {self.out}" if self.out else ""
        return f"{self.predicted} images classified, {len(self.damaged)} unreadable{unlike}{where}"


def predict(
    model_folder: str | Path,
    images: Sequence[str],
    out: str | Path | None = None,
    *,
    top: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> PredictResult:
    """Predict every image and write one table, whole or not at all; damaged images are told on stderr and left out.

    Args:
        model_folder: Path or `s3://` URI of a model folder.
        images: Files, folders and patterns, local or `s3://`, see `find_images`.
        out: A `.csv` or `.parquet` file; its folder is made. None = stdout, as a table for people on a terminal, else
            as CSV.
        top: How many classes to tell of each image; None = all, on a terminal three.
        batch_size: Images at once.
        device: `cuda`, `cpu`, or `auto` for cuda where there is one.

    Raises:
        UserError: `out` has another suffix, the model cannot be read, there is no such image, or none at all.
    """
    place = None if out is None else check_format(Path(out))
    model = load_model(model_folder, _device(device))
    files = find_images(images)
    predicted = unlike = 0
    damaged: list[tuple[str, str]] = []
    with open_table(place, top) as table, progress_bar("predict", len(files)) as bar:
        for said in classify(model, files, batch_size):
            for image, reason in said.damaged:  # a path stays in one piece
                console.print(f"damaged, left out: {image}: {reason}", highlight=False, markup=False, soft_wrap=True)
            table.write(said)
            damaged += said.damaged
            predicted += len(said.images)
            unlike += int(said.similar.unlike.sum()) if said.similar else 0
            bar.update(predicted + len(damaged), f"{len(damaged)} damaged" if damaged else "")
    return PredictResult(place, predicted, unlike, damaged)


def classify(model: LoadedModel, files: Sequence[str], batch_size: int = 64) -> Iterator[Predictions]:
    """Predictions batch by batch, in order; the next ones are read and decoded meanwhile.

    Args:
        model: On the device that is to work.
        files: What `find_images` found.
        batch_size: Images at once.
    """
    from data_pipeline.decode import ImageSettings
    from data_pipeline.passes import cores_per_worker, decode_files

    described = model.description
    settings = ImageSettings(described.image_px, described.resize_ratio, described.mean, described.std)
    threads = cores_per_worker()
    for batch in decode_files(files, settings, batch_size=batch_size, device=model.device, threads=threads):
        names = [files[number] for number in batch.numbers]
        damaged = [(files[number], reason) for number, reason in batch.damaged]
        yield _said_of(model, batch.images, names, damaged)


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of one model, one after the other; there is at least one."""
    first = parts[0]
    similar = None
    if first.similar:
        names = [field.name for field in fields(Similar)]
        similar = Similar(*(np.concatenate([getattr(part.similar, name) for part in parts]) for name in names))
    return Predictions(
        images=[image for part in parts for image in part.images],
        classes=first.classes,
        probabilities=np.concatenate([part.probabilities for part in parts]),
        similar=similar,
        damaged=[pair for part in parts for pair in part.damaged],
    )


@torch.inference_mode()
def _said_of(model: LoadedModel, images: torch.Tensor, names: list[str], damaged: list[tuple[str, str]]) -> Predictions:
    """Of one batch, of which nothing may be left."""
    features = model.network.features(images) if names else images.new_empty(0, model.network.feature_dim)
    probabilities = model.probabilities(features).cpu().numpy()
    similar = None
    if model.examples is not None:
        known = model.examples
        rows, distances = (found.cpu().numpy() for found in known.nearest(features))
        distance = distances[:, known.rule.k - 1]
        similar = Similar(
            keys=known.keys[rows],
            labels=np.array(model.classes, dtype=object)[known.labels[rows]],
            distances=distances,
            distance=distance,
            unlike=distance > known.rule.distance,
        )
    return Predictions(names, model.classes, probabilities, similar, damaged)


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {name!r} is not known; known: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' is not there: torch sees no GPU; use cpu or auto, or see `rarelens doctor`")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
