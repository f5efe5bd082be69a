"""A folder of images whose folders are the classes."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.errors import UserError
from data_pipeline.raw import FilePlace
from data_pipeline.sources.rows import SPLIT_NAMES, Row, counted, first, is_image


def find_images(root: Path) -> list[str]:
    """Paths of all images below `root`, with '/', sorted; links are followed, hidden files and folders passed over."""
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = Path(folder).relative_to(root)
        names += [(inside / name).as_posix() for name in files if is_image(name)]
    return sorted(names)


def read_class_folders(root: Path, images: list[str]) -> list[Row]:
    """The first folder level is the class; where it names splits alone, they are kept, and the second is the class.

    Raises:
        UserError: An image lies outside of any class folder.
    """
    top = {name.partition("/")[0].lower() for name in images if "/" in name}
    splits = top <= SPLIT_NAMES.keys() and "train" in {SPLIT_NAMES[name] for name in top} and len(top) > 1
    loose = [name for name in images if name.count("/") < 1 + splits]
    if loose:
        raise UserError(
            f"{counted(len(loose), 'image')} directly in {root} ({first(loose)}), outside of any class folder; "
            "move them into folders named after their classes, or give the CSV of labels as source.labels"
        )
    rows = []
    for name in images:
        parts = name.split("/")
        rows.append(Row(name, parts[splits], FilePlace(str(root), name), split=parts[0] if splits else ""))
    return rows
