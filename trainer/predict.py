"""Use of a trained model: images in, calibrated probabilities out, a row an image.

The output has the columns `image`, `label` (the most probable class) and `p_CLASS` for every class.
"""

from __future__ import annotations

import csv
import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch

from cluster.errors import UserError
from cluster.progress import console, progress_bar
from data_pipeline.sources import IMAGE_SUFFIXES
from trainer.export import load_model

FORMATS = (".csv", ".parquet")
KNOWN_SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES))
MAX_THREADS = 8  # more decoding threads than this outrun the network
# What a spreadsheet takes for a formula; a sign before letters and digits alone, as in "-ve", is harmless.
_FORMULA = re.compile(r"[=@\t\r]|[+-].*[^\w .]")


@dataclass(frozen=True)
class PredictResult:
    """What `predict` did; damaged images have no row."""

    out: Path
    predicted: int
    damaged: list[tuple[str, str]]
    """(image, reason)."""


def predict(
    model_folder: str | Path, images: Sequence[str], out: str | Path, batch_size: int = 64, device: str = "auto"
) -> PredictResult:
    """Predict every image and write one table, whole or not at all; damaged images are told on stderr and left out.

    Args:
        model_folder: Path or `s3://` URI of a model folder.
        images: Files, folders (searched to the bottom) and glob patterns.
        out: A `.csv` or `.parquet` file; its folder is made.
        batch_size: Images at once.
        device: `cuda`, `cpu`, or `auto` for cuda where there is one.

    Raises:
        UserError: `out` has another suffix, the model cannot be read, there is no such image, or none at all.
    """
    out = Path(out)
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out} must end in {' or '.join(FORMATS)}")
    place = _device(device)
    model = load_model(model_folder, place)
    files = find_images(images)
    from data_pipeline.decode import ImageSettings
    from data_pipeline.loader import decode_files

    description = model.description
    settings = ImageSettings(description.image_px, description.resize_ratio, description.mean, description.std)
    threads = min(os.cpu_count() or 1, MAX_THREADS)
    predicted, damaged = 0, []
    with _table(out, model.classes) as table, progress_bar("predict", len(files)) as bar:
        for batch in decode_files(files, settings, batch_size=batch_size, device=place, threads=threads):
            for number, reason in batch.damaged:
                console.print(f"damaged, left out: {files[number]}: {reason}", highlight=False, markup=False)
                damaged.append((files[number], reason))
            if batch.numbers:
                names = [files[number] for number in batch.numbers]
                table.write(names, model.predict_proba(batch.images).cpu().numpy())
            predicted += len(batch.numbers)
            bar.update(predicted + len(damaged), f"{len(damaged)} damaged" if damaged else "")
    return PredictResult(out, predicted, damaged)


def find_images(images: Sequence[str]) -> list[str]:
    """Files, folders and globs -> the paths of image files, each once, folders and globs in sorted order.

    Raises:
        UserError: A file does not exist, or a folder or a glob holds no image.
    """
    found: dict[str, None] = {}
    for given in images:
        path = Path(given)
        if path.is_dir():
            matches = sorted(str(file) for file in path.rglob("*") if _is_image(file))
            missing = f"folder {given} holds no image; images end in {KNOWN_SUFFIXES}"
        elif path.is_file():
            matches, missing = [str(path)], ""
        elif glob.has_magic(given):
            matches = sorted(name for name in glob.glob(given, recursive=True) if _is_image(Path(name)))
            missing = f"pattern {given} matches no image; images end in {KNOWN_SUFFIXES}"
        else:
            matches, missing = [], f"image {given} does not exist; give files, folders or patterns such as 'new/*.jpg'"
        if not matches:
            raise UserError(missing)
        found.update(dict.fromkeys(matches))
    if not found:
        raise UserError("no image was given; give files, folders or patterns such as 'new/*.jpg'")
    return list(found)


def _is_image(path: Path) -> bool:
    hidden = path.name.startswith(".")  # macOS leaves "._x.jpg" beside every image on a shared disk
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file()


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {name!r} is not known; known: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' is not there: torch sees no GPU; use cpu or auto, or see `rarelens doctor`")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class _Table(Protocol):
    def write(self, names: list[str], probabilities: np.ndarray) -> None: ...


@contextmanager
def _table(out: Path, classes: Sequence[str]) -> Iterator[_Table]:
    """A table that takes rows and appears under its name when all is well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.suffix == ".csv":
            with open(partial, "w", newline="", encoding="utf-8") as file:
                yield _CsvTable(file, classes)
        else:
            with _ParquetTable(partial, classes) as table:
                yield table
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


class _CsvTable:
    def __init__(self, file: IO[str], classes: Sequence[str]) -> None:
        self._writer, self._classes = csv.writer(file), classes
        self._writer.writerow(["image", "label", *(f"p_{name}" for name in classes)])

    def write(self, names: list[str], probabilities: np.ndarray) -> None:
        for name, row in zip(names, probabilities, strict=True):
            label = self._classes[int(row.argmax())]
            self._writer.writerow([_safe_path(name), _safe_label(label), *(f"{p:.6f}" for p in row)])


class _ParquetTable:
    """Exact names and float32 probabilities, a row group a batch."""

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._classes = classes
        columns: list[Any] = [("image", pa.string()), ("label", pa.string())]
        self._schema = pa.schema(columns + [(f"p_{name}", pa.float32()) for name in classes])
        self._writer = pq.ParquetWriter(path, self._schema)

    def __enter__(self) -> _ParquetTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, names: list[str], probabilities: np.ndarray) -> None:
        import pyarrow as pa

        labels = [self._classes[int(row.argmax())] for row in probabilities]
        columns = [pa.array(names), pa.array(labels), *(pa.array(column) for column in probabilities.T)]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))


def _safe_path(name: str) -> str:
    """`=x.jpg` -> `./=x.jpg`: the same file, and no formula for a spreadsheet that opens the CSV."""
    return f"./{name}" if name.startswith(("=", "+", "-", "@")) else name


def _safe_label(label: str) -> str:
    """A class name that a spreadsheet would run gets the apostrophe that tells it not to (CSV only)."""
    return f"'{label}" if _FORMULA.match(label) else label
