"""Small folders of raw images for the tests of the way in."""

from __future__ import annotations

import csv
import hashlib
import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.dataset import Dataset
from data_pipeline.pack import pack

SIDE_PX = 24
COUNTS = {"common": 60, "middle": 24, "rare": 9, "rarest": 6}
# Several shards of each kind, from pictures of about 1 KB.
SMALL_SHARDS = DataConfig(shard_mib=0.05, tail_budget_mib=0.04)


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


def table(folder: Path) -> SourceConfig:
    """99 pictures of four classes, imbalance 10, two a patient."""
    return table_source(folder, COUNTS, per_group=2)


def pack_quietly(source: SourceConfig, data: DataConfig, destination: Path | str, seed: int = 0) -> Dataset:
    """Pack without progress bars."""
    return pack(source, data, str(destination), seed, progress=False)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def hundred_megapixels() -> bytes:
    """A PNG of less than a hundred bytes whose header says 10,000 x 10,000."""
    data = encoded(Image.new("RGB", (8, 8)), "PNG")
    header = b"IHDR" + struct.pack(">II", 10_000, 10_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **header: object) -> Path:
    """A shard of these members in this order, names as they are; `header` overrides fields of every one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in header.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_members(key: str, seed: int, label: object, suffix: str = "jpg") -> list[tuple[str, bytes]]:
    """Image and `.cls` of one sample."""
    kind = {"jpg": "JPEG", "png": "PNG"}[suffix]
    return [(f"{key}.{suffix}", encoded(pattern(seed), kind)), (f"{key}.cls", str(label).encode())]


def rough_images(number: int, side_px: int = 28, channels: int | None = 3, seed: int = 0) -> np.ndarray:
    """uint8 [number, side, side] or [..., channels]: pictures as `pattern` draws them, as MedMNIST stores them."""
    images = np.stack([np.asarray(pattern(seed * 10_000 + i, side_px)) for i in range(number)])
    return images if channels == 3 else images[..., 0]


def medmnist(
    path: Path, counts: dict[str, int], channels: int | None = 3, compressed: bool = True
) -> dict[str, np.ndarray]:
    """An `.npz` of MedMNIST's layout, labels 0, 1, 2 in turn; its arrays."""
    arrays = {}
    for place, (split, number) in enumerate(counts.items()):
        arrays[f"{split}_images"] = rough_images(number, channels=channels, seed=place)
        arrays[f"{split}_labels"] = (np.arange(number) % 3).astype(np.uint8)[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return arrays
