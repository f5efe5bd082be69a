"""A labelled image of a source, and the place where its bytes are: a file, a member of a tar, a row of an array.

Only places travel to the processes that read images, never pixels, and a place reads no more than its own bytes. This
module imports little, because every such process imports it.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

MAX_FILE_BYTES = 2**30
"""A larger file is refused unread: no image of `images.MAX_PIXELS` needs as much."""


class Place(Protocol):
    """Where the encoded bytes of one image are."""

    def read(self) -> bytes:
        """The bytes; `OSError` where they cannot be had."""

    def state(self) -> tuple[int, int]:
        """Bytes, and time of the last change in ns, of the image or of the file that holds it; -1 where it is gone."""

    def __str__(self) -> str: ...


@dataclass(frozen=True, slots=True)
class FilePlace:
    """A file of its own; two strings, because a folder's samples share the first."""

    root: str
    name: str

    def read(self) -> bytes:
        """See `Place.read`."""
        path = os.path.join(self.root, self.name)
        _check_size(os.stat(path).st_size)
        with open(path, "rb") as file:
            return file.read()

    def state(self) -> tuple[int, int]:
        """See `Place.state`."""
        return _state(os.path.join(self.root, self.name))

    def __str__(self) -> str:
        return os.path.join(self.root, self.name)


@dataclass(frozen=True, slots=True)
class TarPlace:
    """A member of a tar that is not compressed."""

    tar: str
    offset: int
    length: int

    def read(self) -> bytes:
        """See `Place.read`."""
        _check_size(self.length)
        return _read_range(self.tar, self.offset, self.length)

    def state(self) -> tuple[int, int]:
        """See `Place.state`."""
        return _state(self.tar)

    def __str__(self) -> str:
        return f"{self.tar} (byte {self.offset})"


@dataclass(frozen=True, slots=True)
class RowPlace:
    """A row of an array of images, encoded as PNG when it is read, which loses nothing."""

    array: ArrayFile
    row: int

    def read(self) -> bytes:
        """See `Place.read`."""
        buffer = io.BytesIO()
        Image.fromarray(self.array.read(self.row)).save(buffer, "PNG")
        return buffer.getvalue()

    def state(self) -> tuple[int, int]:
        """See `Place.state`."""
        return _state(self.array.origin)

    def __str__(self) -> str:
        return f"{self.array.origin} (row {self.row} of {self.array.name})"


@dataclass(frozen=True, eq=False)
class ArrayFile:
    """An array on disk in C order, read row by row: part of an `.npz` that is stored, or a copy that was inflated."""

    origin: str
    """The file of the user."""
    name: str
    """Of the array in it."""
    path: str
    """Where its values lie uncompressed: `origin` itself, or a temporary file that `scratch` owns."""
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    scratch: Scratch | None = None

    def read(self, row: int) -> np.ndarray:
        """One row, [H, W] or [H, W, channels]."""
        shape = self.shape[1:-1] if self.shape[-1] == 1 and len(self.shape) == 4 else self.shape[1:]
        length = int(np.prod(shape)) * self.dtype.itemsize
        data = _read_range(self.path, self.offset + row * length, length)
        return np.frombuffer(data, dtype=self.dtype).reshape(shape)

    def __getstate__(self) -> dict[str, object]:
        # Another process reads the temporary file; only the one that made it removes it.
        return self.__dict__ | {"scratch": None}


class Scratch:
    """A temporary folder that goes when nothing refers to it any more, at the latest with the process."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rarelens-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class RawSample:
    """One labelled image of the source."""

    key: str
    """Unique, and safe as a WebDataset key: neither '.' nor '/'."""
    label: str
    """Name of the class; empty where `problem` leaves it unknown."""
    group: str
    """Patient or lesion; the sample's own name where the source names none."""
    name: str
    """Unique: the path below the source folder, with '/', or the like for members and rows."""
    place: Place
    split: str | None = None
    """train, val or test where the source gives it."""
    problem: str | None = None
    """Why the sample cannot be used, where the listing has shown that already."""


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"{size} bytes, more than the {MAX_FILE_BYTES} that are read of one image")


def _read_range(path: str, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) != length:
        raise OSError(errno.EIO, "the file that holds it is truncated")
    return data


def _state(path: str) -> tuple[int, int]:
    try:
        state = os.stat(path)
    except OSError:
        return -1, -1
    return state.st_size, state.st_mtime_ns
