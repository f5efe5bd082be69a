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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.folder import whole_file
from cluster.storage import Storage, safe_path

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
    """All ranks' manifests of a whole checkpoint: files by path below the folder, what the ranks agreed on, metrics."""

    files: dict[str, FileEntry]
    world: int
    extra: dict[str, Any]
    metrics: dict[str, Any]


def write_manifest(
    folder: Path,
    rank: int = 0,
    world: int = 1,
    extra: dict[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Vouch for every file below `folder`; to be called last, by every rank.

    Args:
        folder: This rank's files only, or for world 1 the whole checkpoint.
        rank: Of the writer.
        world: How many ranks write a manifest. Without all of them the checkpoint does not count.
        extra: JSON values, the same on all ranks, such as the step and a mark of this one save: ranks whose `extra`
            differ wrote at different times, and their files do not belong together.
        metrics: JSON values that are reported with the checkpoint, `step` among them. Rank 0's are kept: ranks on
            different machines may differ in a last digit.

    Returns:
        The manifest's path.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not is_manifest(path.relative_to(folder).as_posix())
    }
    manifest: dict[str, Any] = {"format": FORMAT_VERSION, "rank": rank, "world": world, "extra": extra or {}}
    manifest |= {"metrics": dict(metrics or {}), "files": files}
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
    manifest = _manifests(str(folder), lambda name: (folder / name).read_bytes())
    for name, entry in manifest.files.items():
        _check(folder, name, entry)
    known = manifest.files.keys() | {_manifest_file(rank) for rank in range(manifest.world)}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in known and not _is_hidden(name):
            raise _not_whole(folder, f"{name} is in no manifest")
    return manifest


def stored_manifest(storage: Storage, folder: str, sizes: Mapping[str, int]) -> Manifest:
    """The manifest of a checkpoint in a storage that is whole by its files' names and sizes.

    What the files contain is left to `verify`, which needs all of them on this machine.

    Args:
        storage: In which the checkpoint's folder lies.
        folder: Its name.
        sizes: Bytes of every file there, by path below the folder, of `files_by_folder`.

    Raises:
        CheckpointError: It is not whole.
    """

    def read(name: str) -> bytes:
        if name not in sizes:
            raise FileNotFoundError(name)
        return storage.read(f"{folder}/{name}")

    where = f"{storage.uri}/{folder}"
    manifest = _manifests(where, read)
    for name, entry in manifest.files.items():
        if sizes.get(name) != entry.bytes:
            raise _not_whole(where, f"{name} has {sizes.get(name, 'no')} bytes instead of {entry.bytes}")
    for name in sizes.keys() - manifest.files.keys() - {_manifest_file(rank) for rank in range(manifest.world)}:
        if not _is_hidden(name):
            raise _not_whole(where, f"{name} is in no manifest")
    return manifest


def files_by_folder(storage: Storage) -> dict[str, dict[str, int]]:
    """The folders of a storage: for each its files' bytes by path below it."""
    folders: dict[str, dict[str, int]] = {}
    for stored in storage.list():
        folder, _, inside = stored.path.partition("/")
        if inside:
            folders.setdefault(folder, {})[inside] = stored.bytes
    return folders


def newest_whole(candidates: Iterable[Path], warn: Callable[[str], None] = log.warning) -> Path | None:
    """The first whole checkpoint of `candidates` (newest first), or None.

    Args:
        candidates: Folders.
        warn: Told of each that is passed over, with the reason.
    """
    for folder in candidates:
        try:
            verify(folder)
        except CheckpointError as error:
            warn(f"passed over: {error}")
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


def is_manifest(name: str) -> bool:
    """Whether a file, by its name, is a rank's manifest: those are uploaded last."""
    return name == MANIFEST_FILE or (name.startswith("manifest-rank") and name.endswith(".json"))


def _is_hidden(name: str) -> bool:
    """Ray's own, and temporaries of a copy in progress."""
    return name.rpartition("/")[2].startswith(".")


def _sha256_of_manifest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _manifests(folder: str, read: Callable[[str], bytes]) -> Manifest:
    """All ranks' manifests, which have to agree.

    Args:
        folder: For messages.
        read: Gives the content of a manifest by its name, or raises OSError.
    """
    first = _parse(folder, MANIFEST_FILE, read)
    files: dict[str, FileEntry] = {}
    for rank in range(first["world"]):
        name = _manifest_file(rank)
        manifest = _parse(folder, name, read)
        if any(manifest[key] != first[key] for key in ("world", "extra")) or manifest["rank"] != rank:
            raise _not_whole(folder, f"{name} is of another save than {MANIFEST_FILE}")
        files |= manifest["files"]
    return Manifest(files, first["world"], first["extra"], first["metrics"])


def _parse(folder: str, name: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    """A manifest, its shape checked: it may come from a damaged or a hostile bucket."""
    try:
        manifest = json.loads(read(name))
    except FileNotFoundError:
        raise _not_whole(folder, f"{name} is missing, so it was never finished") from None
    except OSError as error:
        raise _not_whole(folder, f"{name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise _not_whole(folder, f"{name} is damaged") from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _sha256_of_manifest(manifest):
        raise _not_whole(folder, f"{name} is damaged")
    try:
        version, world, extra = manifest["format"], manifest["world"], manifest["extra"]
        files = {safe_path(f, name): FileEntry(int(e["bytes"]), str(e["sha256"])) for f, e in manifest["files"].items()}
        metrics = manifest.get("metrics", {})  # which older ones do not have
        parsed = {"rank": manifest["rank"], "world": world, "extra": extra, "metrics": metrics, "files": files}
        shaped = isinstance(world, int) and world >= 1 and isinstance(extra, dict) and isinstance(metrics, dict)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _not_whole(folder, f"{name} is damaged") from None
    if version != FORMAT_VERSION:
        raise _not_whole(folder, f"{name} has format {version!r}, this program reads {FORMAT_VERSION}")
    if not shaped:
        raise _not_whole(folder, f"{name} is damaged")
    return parsed


def _check(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    if not path.is_file():
        raise _not_whole(folder, f"{name} is missing")
    size = path.stat().st_size
    if size != entry.bytes:
        raise _not_whole(folder, f"{name} has {size} bytes instead of {entry.bytes}")
    try:
        found = sha256_of(path)
    except OSError as error:  # of a disk that fails
        raise _not_whole(folder, f"{name} cannot be read ({error.strerror})") from None
    if found != entry.sha256:
        raise _not_whole(folder, f"{name} was altered: its SHA-256 is not the manifest's")


def _not_whole(folder: Path | str, reason: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} is not whole: {reason}; use an earlier one or copy it again")
