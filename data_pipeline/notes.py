"""What reading the images has shown: a few numbers each, in arrays, and a journal of them that survives a stop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.storage import Storage

SUFFIXES = ("jpg", "png")
"""Of packed images."""
_COLUMNS = np.dtype(
    [
        ("file_bytes", "i8"),
        ("modified_ns", "i8"),
        ("suffix", "u1"),
        ("bytes", "i8"),
        ("sha256", "u1", 32),
        ("width", "i4"),
        ("height", "i4"),
        ("phash", "u8"),
        ("mean", "f8", 3),
        ("mean_square", "f8", 3),
    ]
)


@dataclass(frozen=True, slots=True)
class Note:
    """What reading one image has shown. `bytes` and `sha256` are of the image as it is packed."""

    file_bytes: int
    modified_ns: int
    damage: str | None = None
    """Why it cannot be used; all that follows is then empty."""
    suffix: str = SUFFIXES[0]
    bytes: int = 0
    sha256: str = "00" * 32
    width: int = 0
    height: int = 0
    phash: int = 0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    mean_square: tuple[float, ...] = (0.0, 0.0, 0.0)


class Notes:
    """A note a sample, in 150 bytes: room for all of them is taken at the start, so that no packing grows."""

    def __init__(self, num_samples: int):
        self._columns = np.zeros(num_samples, dtype=_COLUMNS)
        self._taken = np.zeros(num_samples, dtype=bool)
        self.damage: dict[int, str] = {}
        """Reason by the number of the sample."""

    def __len__(self) -> int:
        return len(self._columns)

    def __setitem__(self, number: int, note: Note) -> None:
        values = asdict(note) | {
            "suffix": SUFFIXES.index(note.suffix),
            "sha256": np.frombuffer(bytes.fromhex(note.sha256), dtype=np.uint8),
        }
        self._columns[number] = tuple(values[name] for name in _COLUMNS.names or ())
        self._taken[number] = True
        self.damage.pop(number, None)
        if note.damage is not None:
            self.damage[number] = note.damage

    def __getitem__(self, number: int) -> Note:
        values: dict[str, Any] = dict(zip(_COLUMNS.names or (), self._columns[number].tolist(), strict=True))
        values |= {"suffix": SUFFIXES[values["suffix"]], "sha256": bytes(values["sha256"]).hex()}
        values |= {"mean": tuple(values["mean"]), "mean_square": tuple(values["mean_square"])}
        return Note(damage=self.damage.get(number), **values)

    def column(self, name: str) -> np.ndarray:
        """One column, [N] or [N, 3]; zero where the image is damaged."""
        return self._columns[name]

    def missing(self) -> np.ndarray:
        """Numbers of the samples without a note, int64."""
        return np.flatnonzero(~self._taken)

    def whole(self) -> np.ndarray:
        """Numbers of the samples that can be used, int64."""
        usable = self._taken.copy()
        usable[list(self.damage)] = False
        return np.flatnonzero(usable)


class Journal:
    """Notes kept in a storage, so that a run that was stopped goes on where it was."""

    def __init__(self, storage: Storage, prefix: str):
        """Args: storage: the destination; prefix: path below it under which the notes of these settings lie."""
        self.storage, self.prefix = storage, prefix
        self.files = [stored.path for stored in storage.list(prefix)]

    def read(self) -> Iterator[tuple[str, Note]]:
        """All notes with their images' names, file by file."""
        for path in self.files:
            for values in json.loads(self.storage.read(path)):
                yield values.pop("name"), Note(**values)

    def add(self, names: Sequence[str], notes: Sequence[Note]) -> None:
        """Append notes, as one new file."""
        path = f"{self.prefix}{len(self.files):06d}.json"
        entries = [{"name": name, **asdict(note)} for name, note in zip(names, notes, strict=True)]
        self.storage.write(path, json.dumps(entries).encode())
        self.files.append(path)
