"""Features: the backbone's output for every sample, kept as Arrow files that stage two reads by memory map.

On disk, in one folder: `SPLIT-PART.arrow` (Arrow IPC; a part is what one worker made) and `features.json`, written
last: without it the features do not exist.

Shapes: N samples, D feature.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cluster.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.config import DataConfig
    from data_pipeline.dataset import Dataset
    from trainer.model import Classifier

MANIFEST_FILE = "features.json"
FORMAT_VERSION = 1
_REMEDY = "delete the folder and run `rarelens features` again"


@dataclass(frozen=True)
class Features:
    """Backbone outputs of one split, or of one worker's part of it.

    Attributes:
        keys: Sample keys, object [N].
        labels: Class numbers, int64 [N].
        groups: Patient or lesion, object [N].
        rows: Row of each sample in the split's Index, int64 [N].
        x: Features, float16 [N, D]; a view of the memory map where the split is one part.
    """

    keys: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    rows: np.ndarray
    x: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def extract(
    model: Classifier,
    dataset: Dataset,
    data: DataConfig,
    split: str,
    *,
    batch_size: int,
    rank: int,
    world: int,
    device: torch.device,
) -> Features:
    """This worker's part of a split's features: test images through the backbone in evaluation mode.

    Args:
        model: The network; it is left in the mode in which it came.
        dataset: The packed dataset.
        data: How images are decoded.
        split: `train`, `val` or `test`.
        batch_size: Images a batch.
        rank: Number of this worker.
        world: Number of workers.
        device: Where the model is.

    Raises:
        UserError: A feature is not finite in float16; the message names the sample.
    """
    from data_pipeline.loader import evaluation_batches

    index = dataset.index(split)
    rows, parts = [], []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in evaluation_batches(
                dataset, data, split, batch_size=batch_size, rank=rank, world=world, device=device
            ):
                rows.append(np.asarray(batch.rows, dtype=np.int64))
                parts.append(model.features(batch.images).to(torch.float16).cpu().numpy())
    finally:
        model.train(was_training)
    row = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    x = np.concatenate(parts) if parts else np.empty((0, model.feature_dim), dtype=np.float16)
    damaged = ~np.isfinite(x).all(axis=1)
    if damaged.any():
        key = index.key[row[damaged][0]]
        raise UserError(
            f"features of {damaged.sum()} {split} samples, {key} the first, are not finite in float16; "
            "the training has diverged: train again with a lower stage_one.optimiser.lr"
        )
    return Features(index.key[row], index.label[row].astype(np.int64), index.group[row], row, x)


def write_part(folder: str | Path, split: str, part: int, features: Features) -> Path:
    """Write one worker's part as `SPLIT-PART.arrow`, whole or not at all.

    Args:
        folder: The features folder; made if needed.
        split: Name of the split.
        part: Number of the part, by convention the worker's rank.
        features: What `extract` returned.

    Returns:
        The file.
    """
    import pyarrow as pa

    count, dim = features.x.shape
    flat = pa.array(np.ascontiguousarray(features.x, dtype=np.float16).reshape(-1))
    table = pa.table(
        {
            "key": pa.array(features.keys, pa.string()),
            "label": pa.array(features.labels, pa.int32()),
            "group": pa.array(features.groups, pa.string()),
            "split": pa.array([split] * count, pa.string()),
            "view": pa.array(np.zeros(count, dtype=np.int8)),
            "row": pa.array(features.rows, pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, dim),
        }
    )
    path = _part_path(folder, split, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)  # one record batch: read back, its features are one array in the map
    os.replace(unfinished, path)
    return path


def write_manifest(
    folder: str | Path, *, backbone: str, checkpoint_sha256: str, dim: int, rows: Mapping[str, int], parts: int
) -> None:
    """Declare the features whole; called once, after every part is written.

    Rows that no part holds are samples whose image was damaged, which the loader has named; they are listed.

    Args:
        folder: The features folder.
        backbone: timm name.
        checkpoint_sha256: Hash of the weights that made the features.
        dim: D.
        rows: Samples of each split in the dataset's Index.
        parts: Files a split, numbered from 0; others in the folder are leftovers and not read.

    Raises:
        UserError: A part is missing or damaged, or a row is there twice.
    """
    left_out = {}
    for split, count in rows.items():
        made = _read_parts(folder, split, parts)["row"].to_numpy()
        left_out[split] = np.setdiff1d(np.arange(count), made).tolist()
        _check_rows(folder, split, made, count, left_out[split])
    manifest = {
        "format": FORMAT_VERSION,
        "backbone": backbone,
        "checkpoint_sha256": checkpoint_sha256,
        "dim": dim,
        "rows": dict(rows),
        "left_out": left_out,
        "parts": parts,
    }
    path = Path(folder) / MANIFEST_FILE
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    unfinished.write_text(json.dumps(manifest, indent=2))
    os.replace(unfinished, path)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """`features.json`: backbone, checkpoint_sha256, dim, parts; rows and left_out by split.

    Raises:
        UserError: There is none, or it is damaged or of another format.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"features {folder} hold no {MANIFEST_FILE}, so they are missing or unfinished; {_REMEDY}")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {_REMEDY}") from None
    if manifest.get("format") != FORMAT_VERSION:
        raise UserError(f"{path} has format {manifest.get('format')!r}, this program reads {FORMAT_VERSION}; {_REMEDY}")
    return manifest


def read_features(folder: str | Path, split: str) -> Features:
    """All features of a split, in the order of its Index; samples whose image was damaged are left out.

    A split of one part is not copied: `x` looks into the memory map, which the processes of a machine share. Several
    parts are joined in memory, as float16.

    Args:
        folder: The features folder.
        split: `train`, `val` or `test`.

    Raises:
        UserError: The folder has no manifest, or a part is missing, damaged or not the one that the manifest means.
    """
    manifest = read_manifest(folder)
    if split not in manifest["rows"]:
        raise UserError(f"features {folder} have no split {split!r}, only {', '.join(manifest['rows'])}; {_REMEDY}")
    table = _read_parts(folder, split, manifest["parts"])
    rows = table["row"].to_numpy()
    order = _check_rows(folder, split, rows, manifest["rows"][split], manifest["left_out"][split])
    x = _matrix(table["embedding"], manifest["dim"], folder)
    in_order = bool((order == np.arange(len(order))).all())
    return Features(
        keys=table["key"].to_numpy(zero_copy_only=False)[order],
        labels=table["label"].to_numpy()[order].astype(np.int64),
        groups=table["group"].to_numpy(zero_copy_only=False)[order],
        rows=rows[order],
        x=x if in_order else x[order],
    )


def _part_path(folder: str | Path, split: str, part: int) -> Path:
    return Path(folder) / f"{split}-{part:03d}.arrow"


def _read_parts(folder: str | Path, split: str, parts: int) -> Any:
    """The parts of a split as one table that looks into their memory maps."""
    import pyarrow as pa

    return pa.concat_tables([_read_part(_part_path(folder, split, part)) for part in range(parts)])


def _check_rows(folder: str | Path, split: str, rows: np.ndarray, count: int, left_out: list[int]) -> np.ndarray:
    """The order that sorts `rows`, after a check that they are 0..count - 1 without those left out, each once."""
    order = np.argsort(rows, kind="stable")
    if not np.array_equal(rows[order], np.setdiff1d(np.arange(count), left_out)):
        raise UserError(
            f"features {folder} hold {len(rows)} rows of split {split!r}, not each of its {count - len(left_out)} "
            f"readable samples once; {_REMEDY}"
        )
    return order


def _read_part(path: Path) -> Any:
    import pyarrow as pa

    if not path.is_file():
        raise UserError(f"features file {path} is missing; {_REMEDY}")
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"features file {path} is truncated or damaged ({message}); {_REMEDY}") from None


def _matrix(column: Any, dim: int, folder: str | Path) -> np.ndarray:
    """A column of fixed-size lists as [N, D]; one chunk is a view, several are joined."""
    width = column.type.list_size
    if width != dim:
        raise UserError(f"features {folder} have {width} values a sample, {MANIFEST_FILE} says {dim}; {_REMEDY}")
    chunks = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, dim) for chunk in column.chunks if len(chunk)]
    if not chunks:
        return np.empty((0, dim), dtype=np.float16)
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
