"""A folder of images whose folders are the classes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cluster.errors import UserError
from data_pipeline.raw import FilePlace
from data_pipeline.sources.rows import IMAGE_SUFFIXES, SPLIT_NAMES, Row, counted, first, is_image

_log = logging.getLogger(__name__)


def find_files(root: Path) -> list[str]:
    """Paths of all files below `root`, with '/', sorted; links are followed, hidden files and folders passed over."""
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = Path(folder).relative_to(root)
        names += [(inside / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def find_images(root: Path) -> list[str]:
    """Those of `find_files` that are images by their suffix."""
    return [name for name in find_files(root) if is_image(name)]


def read_class_folders(root: Path, files: list[str]) -> list[Row]:
    """The first folder level is the class; where it names splits alone, they are kept, and the second is the class.

    Args:
        root: The folder.
        files: What `find_files` found in it. A warning names those that are no image by their suffix.

    Raises:
        UserError: An image lies outside of any class folder.
    """
    images = [name for name in files if is_image(name)]
    others = sorted(set(files) - set(images))
    if others:
        named = f"{counted(len(others), 'file')} in {root} ({first(others)})"
        known = " ".join(sorted(IMAGE_SUFFIXES))
        _log.warning("passed over %s, no image by its suffix; an image ends in: %s", named, known)
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
