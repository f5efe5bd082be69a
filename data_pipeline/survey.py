"""Read every image once and note what it is: its size, hash and moments, or why it cannot be read."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from cluster.progress import Bar, progress_bar
from cluster.storage import Storage
from data_pipeline.images import DamagedImage, PackedImage, prepare_image
from data_pipeline.sources import RawSample

NOTES_PER_FILE = 512
"""What a killed run loses at most."""
AHEAD_PER_THREAD = 4
"""Images in flight: this bounds the memory, whatever the number of images."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Note:
    """What reading one image has shown. `bytes` and `sha256` are of the image as it is packed."""

    name: str
    file_bytes: int
    modified_ns: int
    damage: str | None = None
    suffix: str = ""
    bytes: int = 0
    sha256: str = ""
    width: int = 0
    height: int = 0
    phash: int = 0
    mean: tuple[float, ...] = ()
    mean_square: tuple[float, ...] = ()


def survey(
    samples: Sequence[RawSample], short_side_px: int | None, journal: Journal | None = None, progress: bool = True
) -> list[Note]:
    """Read all images, in parallel, and note what they are.

    Args:
        samples: What to read.
        short_side_px: As in `prepare_image`.
        journal: Notes of an earlier run are taken from it, for files that have not changed since and were whole, and
            new ones are added to it.
        progress: Show a progress bar.

    Returns:
        A note a sample, in their order.
    """
    known = journal.read() if journal else {}
    notes = [_still_true(sample, known.get(sample.name)) for sample in samples]
    todo = [i for i, note in enumerate(notes) if note is None]
    fresh: list[Note] = []
    with bar("reading images", len(samples), progress) as shown, image_threads() as pool:
        for note in ordered_map(pool, lambda i: take_note(samples[i], short_side_px), todo):
            fresh.append(note)
            notes[todo[len(fresh) - 1]] = note
            if journal and len(fresh) % NOTES_PER_FILE == 0:
                journal.add(fresh[-NOTES_PER_FILE:])
            shown.update(len(samples) - len(todo) + len(fresh))
    if journal and len(fresh) % NOTES_PER_FILE:
        journal.add(fresh[-(len(fresh) % NOTES_PER_FILE) :])
    return [note for note in notes if note is not None]


class Journal:
    """Notes kept in a storage, so that a run that was stopped goes on where it was."""

    def __init__(self, storage: Storage, prefix: str):
        """Args: storage: the destination; prefix: path below it under which the notes of these settings lie."""
        self.storage, self.prefix = storage, prefix
        self.files = [stored.path for stored in storage.list(prefix)]

    def read(self) -> dict[str, Note]:
        """Notes by the image's name."""
        notes = (Note(**values) for path in self.files for values in json.loads(self.storage.read(path)))
        return {note.name: note for note in notes}

    def add(self, notes: Sequence[Note]) -> None:
        """Append notes, as one new file."""
        path = f"{self.prefix}{len(self.files):06d}.json"
        self.storage.write(path, json.dumps([asdict(note) for note in notes]).encode())
        self.files.append(path)


def take_note(sample: RawSample, short_side_px: int | None) -> Note:
    """Read one image; damage is noted, not raised."""
    file_bytes, modified_ns = _state(sample.path)
    try:
        image = prepare_image(sample.path.read_bytes(), short_side_px)
    except DamagedImage as error:
        return Note(sample.name, file_bytes, modified_ns, damage=str(error))
    except OSError as error:
        return Note(sample.name, file_bytes, modified_ns, damage=(error.strerror or str(error)).lower())
    return Note(
        sample.name,
        file_bytes,
        modified_ns,
        suffix=image.suffix,
        bytes=len(image.data),
        sha256=hashlib.sha256(image.data).hexdigest(),
        width=image.width,
        height=image.height,
        phash=image.phash,
        mean=image.mean,
        mean_square=image.mean_square,
    )


def packed_bytes(sample: RawSample, note: Note, short_side_px: int | None) -> bytes | None:
    """The image as it is packed, made once more from its file; None if the file is no longer what was noted."""
    try:
        data = sample.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != note.sha256:  # else the bytes are kept as they are
            image: PackedImage = prepare_image(data, short_side_px)
            data = image.data
    except (DamagedImage, OSError):
        return None
    return data if hashlib.sha256(data).hexdigest() == note.sha256 else None


def image_threads() -> ThreadPoolExecutor:
    """Threads, one a core: Pillow decodes, resizes and encodes without the interpreter's lock."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="images")


def ordered_map(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Results in the order of `items`; never more than a few calls ahead of the consumer, unlike `pool.map`."""
    ahead = AHEAD_PER_THREAD * pool._max_workers
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def bar(title: str, total: int, progress: bool) -> AbstractContextManager[Bar]:
    """The project's progress bar, or one that says nothing."""
    return progress_bar(title, total) if progress else nullcontext(_Silent())


class _Silent:
    def update(self, done: int, note: str = "") -> None:
        """Say nothing."""


def _state(path: Path) -> tuple[int, int]:
    """Bytes and time of change of a file; -1 where it is gone."""
    try:
        state = path.stat()
    except OSError:
        return -1, -1
    return state.st_size, state.st_mtime_ns


def _still_true(sample: RawSample, note: Note | None) -> Note | None:
    """The note, if it is of a whole image and the file has not changed since."""
    if note is None or note.damage is not None or (note.file_bytes, note.modified_ns) != _state(sample.path):
        return None
    return note
