"""Small folders of raw images for the tests of the way in."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.config import SourceConfig

SIDE_PX = 24


def pattern(seed: int, side_px: int = SIDE_PX) -> Image.Image:
    """A picture whose perceptual hash is its own: random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side_px, side_px), Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def write_csv(path: Path, columns: list[str], rows: Iterable[Iterable[str]]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def table_source(folder: Path, counts: dict[str, int], per_group: int = 2) -> SourceConfig:
    """`counts` JPEGs a class in one folder, with labels.csv; `per_group` pictures a patient."""
    rows, number = [], 0
    for label, count in counts.items():
        for i in range(count):
            name = f"img_{number:04d}"
            save(folder / "images" / f"{name}.jpg", pattern(number), quality=90)
            rows.append((name, label, f"{label}-{i // per_group}"))
            number += 1
    write_csv(folder / "labels.csv", ["image", "label", "group"], rows)
    return SourceConfig(path=str(folder), labels="labels.csv", group_column="group")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
