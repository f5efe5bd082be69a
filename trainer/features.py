"""Features: the backbone's output for every sample, kept as Arrow files that stage two reads by memory map.

On disk, in one folder: `SPLIT-PART.arrow` (Arrow IPC; a part is what one worker made, one view of its samples after the
other) and `features.json`, written last: without it the features do not exist.

Shapes: N samples, V views of each, D feature.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import UserError
from trainer.stacked import StackedRows

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
        x: Features, float16 [V * N, D], view-major: row v * N + i is view v of sample i. What was read looks into the
            memory maps.
        views: V; view 0 is the image as it is evaluated, the others are augmented.
    """

    keys: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    rows: np.ndarray
    x: np.ndarray | StackedRows
    views: int = 1

    def __len__(self) -> int:
        return len(self.rows)


def write_part(folder: str | Path, split: str, part: int, features: Features) -> Path:
    """Write one worker's part as `SPLIT-PART.arrow`, whole or not at all.

    Args:
        folder: The features folder; made if needed.
        split: Name of the split.
        part: Number of the part, by convention the worker's rank.
        features: What `trainer.extraction.extract` returned.

    Returns:
        The file.
    """
    import pyarrow as pa

    (total, dim), views = features.x.shape, features.views
    flat = pa.array(np.ascontiguousarray(features.x, dtype=np.float16).reshape(-1))
    table = pa.table(
        {
            "key": pa.array(np.tile(features.keys, views), pa.string()),
            "label": pa.array(np.tile(features.labels, views), pa.int32()),
            "group": pa.array(np.tile(features.groups, views), pa.string()),
            "split": pa.array([split] * total, pa.string()),
            "view": pa.array(np.repeat(np.arange(views, dtype=np.int8), len(features))),
            "row": pa.array(np.tile(features.rows, views), pa.int64()),
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
    folder: str | Path,
    *,
    backbone: str,
    checkpoint_sha256: str,
    dim: int,
    rows: Mapping[str, int],
    parts: int,
    views: Mapping[str, int] | None = None,
    made_with: Mapping[str, Any] | None = None,
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
        views: V of each split; None = one.
        made_with: What else decides the features, as JSON values.

    Raises:
        UserError: A part is missing or damaged, or a row is there twice.
    """
    views = {split: (views or {}).get(split, 1) for split in rows}
    left_out = {}
    for split, count in rows.items():
        read = _read_parts(folder, split, parts, dim, views[split])
        made = np.concatenate([part.rows for part in read])
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
        "views": views,
        "made_with": dict(made_with or {}),
    }
    path = Path(folder) / MANIFEST_FILE
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    unfinished.write_text(json.dumps(manifest, indent=2))
    os.replace(unfinished, path)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """`features.json`: backbone, checkpoint_sha256, dim, parts, made_with; rows, left_out and views by split.

    Raises:
        UserError: There is none, or it is damaged or of another format.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"features {folder} hold no {MANIFEST_FILE}, so they are missing or unfinished; {_REMEDY}")
    try:
        manifest = json.loads(path.read_text())
        version = manifest.get("format")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {_REMEDY}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {manifest.get('format')!r}, this program reads {FORMAT_VERSION}; {_REMEDY}")
    kinds = {"backbone": str, "checkpoint_sha256": str, "dim": int, "parts": int, "rows": dict, "left_out": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(manifest.get(name), kind) or not manifest[name]]
    if wrong:
        raise UserError(f"{path} lacks a {wrong[0]} that can be used; {_REMEDY}")
    return manifest


def read_features(folder: str | Path, split: str) -> Features:
    """All features of a split, in the order of its Index; samples whose image was damaged are left out.

    Nothing is copied: `x` looks into the memory maps, which the processes of a machine share. Of one part and one view
    it is an array, else a stack of such arrays.

    Args:
        folder: The features folder.
        split: `train`, `val` or `test`.

    Raises:
        UserError: The folder has no manifest, or a part is missing, damaged or not the one that the manifest means.
    """
    manifest = read_manifest(folder)
    if split not in manifest["rows"]:
        raise UserError(f"features {folder} have no split {split!r}, only {', '.join(manifest['rows'])}; {_REMEDY}")
    views = manifest.get("views", {}).get(split, 1)
    parts = _read_parts(folder, split, manifest["parts"], manifest["dim"], views)
    rows = np.concatenate([part.rows for part in parts])
    order = _check_rows(folder, split, rows, manifest["rows"][split], manifest["left_out"][split])
    return Features(
        keys=np.concatenate([part.keys for part in parts])[order],
        labels=np.concatenate([part.labels for part in parts]).astype(np.int64)[order],
        groups=np.concatenate([part.groups for part in parts])[order],
        rows=rows[order],
        x=_stacked(parts, order),
        views=views,
    )


def _stacked(parts: list[Features], order: np.ndarray) -> np.ndarray | StackedRows:
    """Parts as one, [V * N, D], the samples of each view in `order` [N]."""
    views, filled = parts[0].views, [part for part in parts if len(part)]
    blocks = [part.x[v * len(part) : (v + 1) * len(part)] for v in range(views) for part in filled]
    x = blocks[0] if len(blocks) == 1 else StackedRows([(block, None) for block in blocks]) if blocks else parts[0].x
    if np.array_equal(order, np.arange(len(order))):
        return x
    return StackedRows([(x, np.concatenate([v * len(order) + order for v in range(views)]))])


def _part_path(folder: str | Path, split: str, part: int) -> Path:
    return Path(folder) / f"{split}-{part:03d}.arrow"


def _read_parts(folder: str | Path, split: str, parts: int, dim: int, views: int) -> list[Features]:
    return [_read_part(_part_path(folder, split, part), dim, views) for part in range(parts)]


def _read_part(path: Path, dim: int, views: int) -> Features:
    """One worker's part; its features look into the file's memory map."""
    import pyarrow as pa

    if not path.is_file():
        raise UserError(f"features file {path} is missing; {_REMEDY}")
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"features file {path} is truncated or damaged ({message}); {_REMEDY}") from None
    samples, rest = divmod(len(table), views)
    rows, view = table["row"].to_numpy(), table["view"].to_numpy()
    in_turn = np.array_equal(view, np.repeat(np.arange(views), samples)) and not rest
    if not in_turn or not np.array_equal(rows, np.tile(rows[:samples], views)):
        raise UserError(
            f"features file {path} does not hold {views} views of its samples, one after the other; {_REMEDY}"
        )
    first = table.slice(0, samples)
    return Features(
        keys=first["key"].to_numpy(zero_copy_only=False),
        labels=first["label"].to_numpy(),
        groups=first["group"].to_numpy(zero_copy_only=False),
        rows=rows[:samples],
        x=_matrix(table["embedding"], dim, path),
        views=views,
    )


def _check_rows(folder: str | Path, split: str, rows: np.ndarray, count: int, left_out: list[int]) -> np.ndarray:
    """The order that sorts `rows`, after a check that they are 0..count - 1 without those left out, each once."""
    order = np.argsort(rows, kind="stable")
    if not np.array_equal(rows[order], np.setdiff1d(np.arange(count), left_out)):
        raise UserError(
            f"features {folder} hold {len(rows)} rows of split {split!r}, not each of its {count - len(left_out)} "
            f"readable samples once; {_REMEDY}"
        )
    return order


def _matrix(column: Any, dim: int, path: Path) -> np.ndarray:
    """A column of fixed-size lists as [N, D]; one chunk is a view, several are joined."""
    width = column.type.list_size
    if width != dim:
        raise UserError(f"features file {path} has {width} values a sample, {MANIFEST_FILE} says {dim}; {_REMEDY}")
    chunks = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, dim) for chunk in column.chunks if len(chunk)]
    if not chunks:
        return np.empty((0, dim), dtype=np.float16)
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
