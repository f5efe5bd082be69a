"""MedMNIST's `.npz`: arrays of images and labels for train, val and test, which are kept as given."""

from __future__ import annotations

import math
import zipfile
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from cluster.errors import UserError
from cluster.folder import disk_errors
from data_pipeline.dataset import SPLITS
from data_pipeline.raw import ArrayFile, RowPlace, Scratch
from data_pipeline.sources.rows import Row

BLOCK_BYTES = 2**20
LOCAL_HEADER_BYTES = 30
"""Of a zip member, before its name and extra field (PKWARE APPNOTE 4.3.7)."""


def read_medmnist(path: Path) -> list[Row]:
    """A row an image. Labels are numbers or names, [N] or [N, 1].

    Arrays that the file holds compressed are inflated once into a temporary folder, which goes with the rows.

    Raises:
        UserError: The file is damaged, or not laid out as MedMNIST's are.
    """
    if not path.is_file():
        raise UserError(f"source.path = {path}: there is no such file; give the path of an .npz")
    scratch = Scratch()
    rows: list[Row] = []
    try:
        with zipfile.ZipFile(path) as file:
            names = {Path(name).stem for name in file.namelist()}
            splits = [split for split in SPLITS if f"{split}_images" in names]
            missing = [split for split in splits if f"{split}_labels" not in names]
            if missing or not splits:
                raise UserError(
                    f"{path} has no {(missing or SPLITS)[0]}_{'labels' if missing else 'images'}, as MedMNIST files "
                    f"do; it holds {', '.join(sorted(names)) or 'nothing'}"
                )
            for split in splits:
                images = _images(path, file, f"{split}_images", scratch)
                labels = _labels(path, file, f"{split}_labels", images.shape[0])
                rows += [
                    Row(f"{split}/{row:07d}", label, RowPlace(images, row), split=split)
                    for row, label in enumerate(labels)
                ]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())}); download or write the file again"
        ) from None
    return rows


def _images(path: Path, file: zipfile.ZipFile, name: str, scratch: Scratch) -> ArrayFile:
    """The array of images, uncompressed on disk, its checksum compared."""
    info = file.getinfo(f"{name}.npy")
    stored = info.compress_type == zipfile.ZIP_STORED
    inflated = scratch.folder / f"{name}.raw"
    with file.open(info) as member:
        header = _header(path, name, member)
        _check_images(path, name, header)
        begin = member.tell()
        if begin + header.bytes != info.file_size:
            raise EOFError(f"{name} has {info.file_size - begin} bytes of pixels instead of {header.bytes}")
        with disk_errors(scratch.folder), nullcontext() if stored else inflated.open("wb") as target:
            while block := member.read(BLOCK_BYTES):  # zipfile compares the checksum at the end
                if target is not None:
                    target.write(block)
    if stored:
        return ArrayFile(str(path), name, str(path), _data_offset(path, info) + begin, header.shape, header.dtype)
    return ArrayFile(str(path), name, str(inflated), 0, header.shape, header.dtype, scratch)


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _header(path: Path, name: str, member: IO[bytes]) -> _Header:
    try:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return _Header(*read(member))
    except ValueError as error:
        raise UserError(f"{path}: {name} is no array ({' '.join(str(error).split())}); write the file again") from None


def _check_images(path: Path, name: str, header: _Header) -> None:
    shape, fortran_order, dtype = header
    grey = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
    rgb = len(shape) == 4 and shape[3] == 3
    if not (grey or rgb) or 0 in shape[1:]:
        raise UserError(
            f"{path}: {name} has the shape {shape}; images are [N, H, W] or [N, H, W, 3], volumes are not read"
        )
    if dtype != np.uint8 and not (grey and dtype == np.uint16):
        raise UserError(f"{path}: {name} holds {dtype}; convert it to uint8 (grey may be uint16 too)")
    if fortran_order:
        raise UserError(f"{path}: {name} is in Fortran order; save np.ascontiguousarray of it")


def _labels(path: Path, file: zipfile.ZipFile, name: str, num_images: int) -> list[str]:
    with file.open(f"{name}.npy") as member:
        shape, _, dtype = _header(path, name, member)
    if len(shape) not in (1, 2) or shape[1:] not in ((), (1,)):
        raise UserError(f"{path}: {name} has the shape {shape}; one class an image is needed, [N] or [N, 1]")
    if dtype.kind not in "iuU":
        raise UserError(f"{path}: {name} holds {dtype}; save it as whole numbers or text")
    if shape[0] != num_images:
        raise UserError(f"{path}: {name} has {shape[0]} labels for {num_images} images; write the file again")
    with file.open(f"{name}.npy") as member:
        labels = np.lib.format.read_array(member, allow_pickle=False)
    return [str(label).strip() for label in labels.ravel().tolist()]


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin: the local header's lengths may differ from the directory's."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(LOCAL_HEADER_BYTES)
    return info.header_offset + LOCAL_HEADER_BYTES + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
