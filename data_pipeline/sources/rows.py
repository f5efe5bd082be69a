"""What every kind of source is read into, and the words that its columns, folders and file names may use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from data_pipeline.raw import Place

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".dcm", ".dicom"})
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
NAMED_IN_ERRORS = 3


class Row(NamedTuple):
    """One sample as a source gives it."""

    name: str
    """Unique in the source, with '/'."""
    label: str
    """Name or number of the class; empty where `problem` says why there is none."""
    place: Place
    group: str = ""
    split: str = ""
    """As the source writes it, or empty."""
    key: str = ""
    """What the sample is best called; empty = by its name."""
    problem: str | None = None
    """Why the sample cannot be used."""


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its suffix; hidden files are not."""
    pure = PurePosixPath(name)
    return not pure.name.startswith(".") and pure.suffix.lower() in IMAGE_SUFFIXES


def split_of_path(path: str) -> str:
    """The split that a shard's name begins with or a folder is called (`train-0003.tar`, `val/000.tar`), else ''."""
    pure = PurePosixPath(path.lower())
    words = [*re.findall(r"^[a-z]+", pure.name), *pure.parent.parts]
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")


def first(names: Sequence[str]) -> str:
    """The first few of many, for an error."""
    shown = ", ".join(name or "''" for name in names[:NAMED_IN_ERRORS])
    return shown if len(names) <= NAMED_IN_ERRORS else f"{shown}, ..."


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def name_of(label: str, class_names: Sequence[str] | None) -> str:
    """The class that a label stands for: a number is a place in `class_names`, where it is one of them."""
    if class_names is not None and label not in class_names and label.isdecimal() and int(label) < len(class_names):
        return class_names[int(label)]
    return label
