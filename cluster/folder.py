"""A folder as a storage, and how files are written so that they are whole or not there."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cluster.errors import UserError
from cluster.storage import StoredFile, StoredFiles, missing, safe_path, too_short

_PART = ".part"  # suffix of temporary files, `.<random>.part`: never listed
_BLOCK_BYTES = 1 << 20


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the user can mend about a disk (full, not allowed, a file in the way) into `UserError`."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left in {folder}; free some or choose a folder on another disk") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{where}: {os.strerror(error.errno).lower()}; allow it or choose another folder"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{where} is a file where a folder is needed; move it or choose another folder") from error
        if error.errno == errno.EISDIR:
            raise UserError(f"{where} is a folder where a file is needed; move it or choose another path") from error
        raise


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when the block has ended well, and not at all otherwise."""
    temporary = target.with_name(f".{uuid.uuid4().hex}{_PART}")
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)


class LocalStorage:
    """A folder of this machine, or of a network disk that all machines mount."""

    def __init__(self, root: Path):
        # Absolute, because Ray's workers have another working directory than the command that was given.
        self.root = Path(os.path.abspath(root.expanduser()))
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file where a folder is needed; move it or choose another folder")
        self.uri = str(self.root)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        with self._reading(path) as file:
            return file.read()

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """See `Storage.read_range`."""
        with self._reading(path) as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise too_short(f"{self.uri}/{path}", offset, length)
        return data

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        with whole_file(self.local_path(path)) as file:
            file.write(data)

    def write_new(self, path: str, data: bytes) -> bool:
        """See `Storage.write_new`. A hard link is the one step that fails if the name is taken."""
        target = self.local_path(path)
        if target.exists():
            return False
        draft = target.with_name(f".{uuid.uuid4().hex}{_PART}")
        with whole_file(draft) as file:
            file.write(data)
        with disk_errors(target.parent):
            try:
                os.link(draft, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise
                return _create_exclusively(target, data)
            finally:
                draft.unlink(missing_ok=True)
            _sync_folder(target.parent)
        return True

    def exists(self, path: str) -> bool:
        """See `Storage.exists`."""
        return self.local_path(path).is_file()

    def list(self, prefix: str = "") -> StoredFiles:
        """See `Storage.list`. Only the folder that the prefix names is walked."""
        start = self.root
        if "/" in prefix:
            start = self.local_path(prefix.rpartition("/")[0])
        found = []
        for folder, _, names in os.walk(start):
            for name in names:
                file = Path(folder, name)
                path = file.relative_to(self.root).as_posix()
                if not path.startswith(prefix) or (name.startswith(".") and name.endswith(_PART)):
                    continue
                with suppress(FileNotFoundError):  # deleted while we walked
                    found.append(StoredFile(path, file.stat().st_size))
        return sorted(found)

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        with disk_errors(self.root), suppress(FileNotFoundError):
            self.local_path(path).unlink()

    def upload(self, local: Path, path: str, on_bytes: Callable[[int], object] | None = None) -> None:
        """See `Storage.upload`."""
        _copy(local, self.local_path(path), on_bytes)

    def download(self, path: str, local: Path) -> None:
        """See `Storage.download`."""
        _copy(self.local_path(path), local)

    def local_path(self, path: str) -> Path:
        """See `Storage.local_path`."""
        return self.root / safe_path(path, self.uri) if path else self.root

    @contextmanager
    def _reading(self, path: str) -> Iterator[BinaryIO]:
        file = self.local_path(path)
        with _missing(file), disk_errors(self.root), file.open("rb") as opened:
            yield opened


@contextmanager
def _missing(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise missing(str(file)) from None


def _copy(source: Path, target: Path, on_bytes: Callable[[int], object] | None = None) -> None:
    with _missing(source), disk_errors(target.parent):
        if target.exists() and source.samefile(target):
            return
        with source.open("rb") as reader, whole_file(target) as writer:
            while block := reader.read(_BLOCK_BYTES):
                writer.write(block)
                if on_bytes is not None:
                    on_bytes(len(block))


def _create_exclusively(target: Path, data: bytes) -> bool:
    """Create-if-absent on disks without hard links: whoever reads at once may see part of it, only one creates it."""
    try:
        with target.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; some network disks cannot, and need not."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
