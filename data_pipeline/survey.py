"""Read every image once and note what it is, or why it cannot be used; and make its packed bytes again later."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np

from cluster.progress import Bar, progress_bar
from data_pipeline.images import DamagedImage, prepare_image
from data_pipeline.notes import Journal, Note, Notes
from data_pipeline.raw import Place, RawSample
from data_pipeline.workers import ImageWorkers

NOTES_PER_FILE = 512
"""What a killed run loses at most."""
IMAGES_PER_TASK = 16
TASK_BYTES = 8 * 2**20
"""Packed bytes that a task brings back at most, unless one image has more."""


def survey(
    samples: Sequence[RawSample],
    short_side_px: int | None,
    workers: ImageWorkers,
    journal: Journal | None = None,
    progress: bool = True,
) -> Notes:
    """Read all images, in parallel, and note what they are.

    Args:
        samples: What to read.
        short_side_px: As in `prepare_image`.
        workers: Who reads.
        journal: Notes of an earlier run are taken from it, for files that have not changed since and were whole, and
            new ones are added to it.
        progress: Show a progress bar.

    Returns:
        A note a sample, in their order.
    """
    notes = Notes(len(samples))
    for number, sample in enumerate(samples):
        if sample.problem is not None:
            notes[number] = Note(-1, -1, damage=sample.problem)
    if journal and journal.files:
        _take_up(samples, notes, journal)
    todo = notes.missing()
    tasks = ([samples[i].place for i in todo[k : k + IMAGES_PER_TASK]] for k in range(0, len(todo), IMAGES_PER_TASK))
    fresh: list[int] = []  # since the journal was last written
    done = len(samples) - len(todo)
    with bar("reading images", len(samples), progress) as shown:
        for taken in workers.map(partial(take_notes, short_side_px=short_side_px), tasks):
            first = done - (len(samples) - len(todo))
            for number, note in zip(todo[first : first + len(taken)].tolist(), taken, strict=True):
                notes[number] = note
                fresh.append(number)
            done += len(taken)
            shown.update(done)
            if journal and len(fresh) >= NOTES_PER_FILE:
                _write_down(samples, notes, journal, fresh)
        if journal and fresh:
            _write_down(samples, notes, journal, fresh)
    return notes


def take_notes(places: Sequence[Place], short_side_px: int | None) -> list[Note]:
    """Read some images; damage is noted, not raised."""
    return [_take_note(place, short_side_px) for place in places]


class Wanted(NamedTuple):
    """An image that is to be packed, and the digest of its packed bytes."""

    place: Place
    sha256: str


def packed_images(
    samples: Sequence[RawSample],
    notes: Notes,
    numbers: np.ndarray,
    short_side_px: int | None,
    workers: ImageWorkers,
) -> Iterator[bytes | None]:
    """Some images as they are packed, made once more; None for one that is no longer what was noted.

    Args:
        samples: All samples.
        notes: Of all samples.
        numbers: Which, in which order, int64 [K].
        short_side_px: As in `prepare_image`.
        workers: Who reads; no more than a few tasks of `TASK_BYTES` are under way.
    """
    sizes = notes.column("bytes")[numbers]
    tasks = ([Wanted(samples[i].place, notes[i].sha256) for i in part] for part in _parts(numbers.tolist(), sizes))
    for images in workers.map(partial(_packed, short_side_px=short_side_px), tasks):
        yield from images


def bar(title: str, total: int, progress: bool) -> AbstractContextManager[Bar]:
    """The project's progress bar, or one that says nothing."""
    return progress_bar(title, total) if progress else nullcontext(_Silent())


class _Silent:
    def update(self, done: int, note: str = "") -> None:
        """Say nothing."""


def _take_note(place: Place, short_side_px: int | None) -> Note:
    file_bytes, modified_ns = place.state()
    try:
        image = prepare_image(place.read(), short_side_px)
    except (DamagedImage, OSError) as error:
        return Note(file_bytes, modified_ns, damage=_reason(error))
    return Note(
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


def _packed(wanted: Sequence[Wanted], short_side_px: int | None) -> list[bytes | None]:
    found: list[bytes | None] = []
    for place, sha256 in wanted:
        try:
            data = place.read()
            if hashlib.sha256(data).hexdigest() != sha256:  # else the bytes are kept as they are
                data = prepare_image(data, short_side_px).data
            found.append(data if hashlib.sha256(data).hexdigest() == sha256 else None)
        except (DamagedImage, OSError):
            found.append(None)
    return found


def _parts(numbers: Sequence[int], sizes: Iterable[int]) -> Iterator[list[int]]:
    part: list[int] = []
    held = 0
    for number, size in zip(numbers, sizes, strict=True):
        if part and (len(part) == IMAGES_PER_TASK or held + size > TASK_BYTES):
            yield part
            part, held = [], 0
        part.append(number)
        held += size
    if part:
        yield part


def _take_up(samples: Sequence[RawSample], notes: Notes, journal: Journal) -> None:
    """Notes of an earlier run, where they are of a whole image whose file has not changed since."""
    numbers = {sample.name: number for number, sample in enumerate(samples) if sample.problem is None}
    for name, note in journal.read():
        number = numbers.get(name)
        if number is None or note.damage is not None:
            continue
        if (note.file_bytes, note.modified_ns) == samples[number].place.state():
            notes[number] = note


def _write_down(samples: Sequence[RawSample], notes: Notes, journal: Journal, fresh: list[int]) -> None:
    journal.add([samples[i].name for i in fresh], [notes[i] for i in fresh])
    fresh.clear()


def _reason(error: Exception) -> str:
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return text[:1].lower() + text[1:]
