"""Loose images, as `predict` is given them: files, folders and patterns, on local disks and in buckets."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from cluster.errors import UserError
from cluster.storage import Storage, open_storage
from data_pipeline.raw import FilePlace
from data_pipeline.sources import IMAGE_SUFFIXES

KNOWN_SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES))
EXAMPLES = "files, folders or patterns such as 'new/*.jpg' or 's3://bucket/new/*.jpg'"
BUCKET = "s3://"


def find_images(images: Sequence[str]) -> list[str]:
    """Files, folders and patterns -> the paths and URIs of image files, each once; those of each in sorted order.

    Args:
        images: Paths or `s3://` URIs. A folder is searched to the bottom; `**` in a pattern crosses folders, `*` does
            not. A file that is named is taken whatever its name ends in.

    Raises:
        UserError: A file does not exist, a folder or a pattern holds no image, or nothing was given.
    """
    found: dict[str, None] = {}
    for given in images:
        found.update(dict.fromkeys(_in_storage(given) if "://" in given else _on_disk(given)))
    if not found:
        raise UserError(f"no image was given; give {EXAMPLES}")
    return list(found)


class ImageReader:
    """Reads what `find_images` found; the connection to each bucket is made once. Several threads may share it."""

    def __init__(self) -> None:
        self._buckets: dict[str, Storage] = {}

    def __call__(self, image: Path | str) -> bytes:
        """The whole file.

        Raises:
            OSError: A local file cannot be read, or is too large for an image.
            UserError: A bucket does not give it.
        """
        if isinstance(image, Path) or not image.startswith(BUCKET):
            return FilePlace("", str(image)).read()
        bucket, _, key = image.removeprefix(BUCKET).partition("/")
        if bucket not in self._buckets:
            self._buckets[bucket] = open_storage(BUCKET + bucket)
        return self._buckets[bucket].read(key)


def _on_disk(given: str) -> list[str]:
    path = Path(given)
    if path.is_dir():
        return _some((str(file) for file in path.rglob("*") if file.is_file()), f"folder {given} holds")
    if path.is_file():
        return [str(path)]
    if glob.has_magic(given):
        names = glob.glob(given, recursive=True)
        return _some((name for name in names if Path(name).is_file()), f"pattern {given} matches")
    raise UserError(f"image {given} does not exist; give {EXAMPLES}")


def _in_storage(given: str) -> list[str]:
    """The same by listing a storage, which knows no folders, only names that begin alike."""
    folder, _, name = given.rstrip("/").rpartition("/")
    if not folder.endswith("/") and open_storage(folder).exists(name):
        return _local(open_storage(folder), [name])
    if not glob.has_magic(given):
        storage = open_storage(given)
        return _local(storage, _some((file.path for file in storage.list()), f"folder {given} holds"))
    from fsspec.utils import glob_translate

    above = given[: re.search(r"[*?[]", given).start()].rpartition("/")[0]  # type: ignore[union-attr]
    storage, pattern = open_storage(above), re.compile(glob_translate(given[len(above) + 1 :]))
    names = (file.path for file in storage.list() if pattern.match(file.path))
    return _local(storage, _some(names, f"pattern {given} matches"))


def _some(names: Iterable[str], said: str) -> list[str]:
    """Those of some file names that are images', sorted; `said` begins the sentence that there is none."""
    images = sorted(name for name in names if _is_image(name))
    if not images:
        raise UserError(f"{said} no image; images end in {KNOWN_SUFFIXES}")
    return images


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")  # macOS leaves "._x.jpg" everywhere


def _local(storage: Storage, names: Iterable[str]) -> list[str]:
    """Names in a storage as paths on this machine where they lie on it, else as URIs."""
    return [str(storage.local_path(name) or f"{storage.uri}/{name}") for name in names]
