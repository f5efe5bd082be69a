"""A drawn, fine-grained, long-tailed set for the demo and the tests: 16 kinds of "lesions" in 4 look-alike families.

A family shares skin, colour and outline; its members differ in fine detail alone (kind, period and polarity of the
texture, border). Every lesion is pictured one to four times, each time from elsewhere, in another light, with hairs and
noise: its pictures are one group. Drawn with numpy and Pillow; the pixels are a function of the seed alone.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from cluster.errors import UserError
from cluster.folder import disk_errors, whole_file
from cluster.progress import progress_bar
from data_pipeline.config import SourceConfig
from data_pipeline.lesions import CLASSES, draw_picture

COMMONEST, RAREST = 800, 16
"""Pictures of the first and last class; those between lie on a geometric row, so the imbalance is 50."""
SMALLEST = 6
"""Pictures that a class keeps when the set is scaled down: four lesions, enough for three splits."""
PICTURES_PER_LESION = (1, 2, 1, 3, 1, 2, 1, 1, 2, 4)
CHUNK = 64
WORTH_A_PROCESS = 500
DRAWN_FILE = "drawn.json"
VERSION = 1


@dataclass(frozen=True)
class Picture:
    """What one file shows."""

    name: str
    label: int
    lesion: int
    view: int

    @property
    def group(self) -> str:
        """Name of the lesion."""
        return f"lesion_{self.lesion:05d}"


def draw_synthetic(folder: Path, seed: int = 0, scale: float = 1.0) -> SourceConfig:
    """Draw the set: `images/*.jpg` of 96 px and `labels.csv` with `image, label, group`.

    A folder that holds this very set already is left as it is.

    Args:
        folder: Where to; made if needed.
        seed: Draws everything.
        scale: Share of the pictures; every class keeps at least 6.

    Raises:
        UserError: The folder holds a set drawn with other arguments, or the disk is full.
    """
    config = SourceConfig(path=str(folder), labels="labels.csv", group_column="group")
    drawn = json.dumps({"seed": seed, "scale": scale, "version": VERSION})
    if (folder / DRAWN_FILE).exists():
        if (folder / DRAWN_FILE).read_text() == drawn:
            return config
        raise UserError(
            f"{folder} holds a synthetic set drawn with {(folder / DRAWN_FILE).read_text()}, not {drawn}; "
            "choose another folder or delete it"
        )
    pictures = list(plan_pictures(scale))
    with disk_errors(folder):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        _draw_all(folder / "images", seed, pictures)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "label", "group"])
    writer.writerows([picture.name, CLASSES[picture.label].name, picture.group] for picture in pictures)
    for name, text in (("labels.csv", table.getvalue()), (DRAWN_FILE, drawn)):
        with whole_file(folder / name) as file:
            file.write(text.encode())
    return config


def class_sizes(scale: float = 1.0) -> list[int]:
    """Pictures of each class, from the commonest to the rarest."""
    steps = np.linspace(0, 1, len(CLASSES))
    return [max(SMALLEST, round(scale * COMMONEST * (RAREST / COMMONEST) ** step)) for step in steps.tolist()]


def plan_pictures(scale: float = 1.0) -> Iterator[Picture]:
    """All pictures: class by class, lesion by lesion."""
    lesion = number = 0
    for label, size in enumerate(class_sizes(scale)):
        last = number + size
        for pictures in cycle(PICTURES_PER_LESION):
            for view in range(min(pictures, last - number)):
                yield Picture(f"img_{number:05d}.jpg", label, lesion, view)
                number += 1
            lesion += 1
            if number == last:
                break


def _draw_all(folder: Path, seed: int, pictures: list[Picture]) -> None:
    """Draw on all cores; processes are spawned, not forked, because the caller may run threads."""
    chunks = [pictures[i : i + CHUNK] for i in range(0, len(pictures), CHUNK)]
    draw = partial(_draw_files, folder, seed)
    workers = min(len(os.sched_getaffinity(0)), len(pictures) // WORTH_A_PROCESS)
    with progress_bar("drawing images", len(pictures)) as bar, ExitStack() as stack:
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            drawn: Iterable[int] = pool.map(draw, chunks)
        else:
            drawn = map(draw, chunks)
        done = 0
        for number in drawn:
            done += number
            bar.update(done)


def _draw_files(folder: Path, seed: int, pictures: list[Picture]) -> int:
    for picture in pictures:
        (folder / picture.name).write_bytes(draw_picture(seed, picture.label, picture.lesion, picture.view))
    return len(pictures)
