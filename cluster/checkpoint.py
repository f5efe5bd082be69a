"""What makes a folder a checkpoint: manifests, written last, that vouch for every file in it.

Each rank vouches for the files that it wrote, since ranks may be on different machines: rank 0 in `manifest.json`, rank
r in `manifest-rank<r>.json`. A checkpoint is whole when all of them are there, undamaged (each holds a SHA-256 of
itself), agree with one another, and every file has the size and SHA-256 that they say. Anything else is not loaded:
DeepSpeed's files are pickles.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.folder import whole_file
from cluster.storage import safe_path

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
_BLOCK_BYTES = 1 << 20

log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint is not whole; the message names the first bad file."""


@dataclass(frozen=True)
class FileEntry:
    """What a manifest says of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All ranks' manifests of a whole checkpoint: files by path below the folder, and what the ranks agreed on."""

    files: dict[str, FileEntry]
    world: int
    extra: dict[str, Any]


def write_manifest(folder: Path, rank: int = 0, world: int = 1, extra: dict[str, Any] | None = None) -> Path:
    """Vouch for every file below `folder`; to be called last, by every rank.

    Args:
        folder: This rank's files only, or for world 1 the whole checkpoint.
        rank: Of the writer.
        world: How many ranks write a manifest. Without all of them the checkpoint does not count.
        extra: JSON values, the same on all ranks, such as the step and a mark of this one save: ranks whose `extra`
            differ wrote at different times, and their files do not belong together.

    Returns:
        The manifest's path.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_manifest(path.relative_to(folder).as_posix())
    }
    manifest = {"format": FORMAT_VERSION, "rank": rank, "world": world, "extra": extra or {}, "files": files}
    manifest["sha256"] = _sha256_of_manifest(manifest)
    path = folder / _manifest_file(rank)
    with whole_file(path) as file:
        file.write(json.dumps(manifest, indent=1).encode())
    return path


def verify(folder: Path) -> Manifest:
    """Check every file of a checkpoint against the manifests.

    Raises:
        CheckpointError: It is not whole; the first missing, short, altered or unknown file is named.
    """
    first = _read(folder, MANIFEST_FILE)
    files: dict[str, FileEntry] = {}
    for rank in range(first["world"]):
        name = _manifest_file(rank)
        manifest = _read(folder, name)
        if any(manifest[key] != first[key] for key in ("world", "extra")) or manifest["rank"] != rank:
            raise _not_whole(folder, f"{name} is of another save than {MANIFEST_FILE}")
        files |= manifest["files"]
    for name, entry in files.items():
        _check(folder, name, entry)
    known = files.keys() | {_manifest_file(rank) for rank in range(first["world"])}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = path.name.startswith(".")  # Ray's own, and temporaries of a copy in progress
        if path.is_file() and name not in known and not hidden:
            raise _not_whole(folder, f"{name} is in no manifest")
    return Manifest(files, first["world"], first["extra"])


def newest_whole(candidates: Iterable[Path]) -> Path | None:
    """The first whole checkpoint of `candidates` (newest first), or None.

    Each that is passed over is logged as a warning with the reason.
    """
    for folder in candidates:
        try:
            verify(folder)
        except CheckpointError as error:
            log.warning("passed over: %s", error)
        else:
            return folder
    return None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _manifest_file(rank: int) -> str:
    return f"manifest-rank{rank}.json" if rank else MANIFEST_FILE


def _is_manifest(name: str) -> bool:
    return name == MANIFEST_FILE or (name.startswith("manifest-rank") and name.endswith(".json"))


def _sha256_of_manifest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read(folder: Path, name: str) -> dict[str, Any]:
    """A manifest, its shape checked: it may come from a damaged or a hostile bucket."""
    try:
        manifest = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise _not_whole(folder, f"{name} is missing, so it was never finished") from None
    except ValueError:
        raise _not_whole(folder, f"{name} is damaged") from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _sha256_of_manifest(manifest):
        raise _not_whole(folder, f"{name} is damaged")
    try:
        version, world, extra = manifest["format"], manifest["world"], manifest["extra"]
        files = {safe_path(f, name): FileEntry(int(e["bytes"]), str(e["sha256"])) for f, e in manifest["files"].items()}
        read = {"rank": manifest["rank"], "world": world, "extra": extra, "files": files}
        shaped = isinstance(world, int) and world >= 1 and isinstance(extra, dict)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _not_whole(folder, f"{name} is damaged") from None
    if version != FORMAT_VERSION:
        raise _not_whole(folder, f"{name} has format {version!r}, this program reads {FORMAT_VERSION}")
    if not shaped:
        raise _not_whole(folder, f"{name} is damaged")
    return read


def _check(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    if not path.is_file():
        raise _not_whole(folder, f"{name} is missing")
    size = path.stat().st_size
    if size != entry.bytes:
        raise _not_whole(folder, f"{name} has {size} bytes instead of {entry.bytes}")
    if sha256_of(path) != entry.sha256:
        raise _not_whole(folder, f"{name} was altered: its SHA-256 is not the manifest's")


def _not_whole(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} is not whole: {reason}; use an earlier one or copy it again")
