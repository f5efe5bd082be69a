"""Packing: images a second, and memory over time.

    python benchmarks/pack.py --images 100000 --json pack.json

Synthetic JPEGs of 224 px and a table of labels are made in a temporary folder. `rarelens pack` packs them, a process of
its own; meanwhile the resident memory of it and all its children is added up ten times a second.

images_per_s       packed images over the whole command's time, start of Python and of the workers included
peak_rss_bytes     most memory at any moment, of all processes together (pages that they share count for each)
rss_growth_bytes   median memory in the last quarter of the time less that in the first, counted from when all of its
                   processes run; negative where it fell
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from common import record  # noqa: E402

SAMPLE_S = 0.1
POINTS = 20
CLASSES = 20
IMAGES_PER_PATIENT = 3
CHUNK = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--px", type=int, default=224, help="side of the images")
    parser.add_argument("--size", type=int, help="shrink the short side to so many pixels")
    parser.add_argument("--work", type=Path, help="folder for images and packed dataset; default: a temporary one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        source = Path(folder, "images")
        input_bytes = make_images(source, arguments.images, arguments.px)
        figures = measure(source, Path(folder, "packed"), arguments.images, arguments.size)
    figures |= {"images": arguments.images, "px": arguments.px, "size": arguments.size, "input_bytes": input_bytes}
    for name, value in figures.items():
        print(f"{name:22} {value}")
    record(arguments.json, figures)


def measure(source: Path, destination: Path, images: int, size: int | None) -> dict[str, Any]:
    """Pack in a process of its own and watch it."""
    command = [sys.executable, str(ROOT / "rarelens.py"), "pack", str(source), str(destination)]
    command += ["--labels", "labels.csv", "--group-column", "group"]
    command += ["--size", str(size)] if size else []
    started = time.monotonic()
    packing = subprocess.Popen(command, cwd=ROOT)
    taken: list[int] = []
    steady, processes = 0, 0
    while packing.poll() is None:
        now, resident = watch(packing.pid)
        if now > processes:
            steady, processes = len(taken), now
        taken.append(resident)
        time.sleep(SAMPLE_S)
    seconds = time.monotonic() - started
    if packing.returncode:
        sys.exit(f"packing failed with status {packing.returncode}")
    quarter = max(1, (len(taken) - steady) // 4)
    first, last = statistics.median(taken[steady : steady + quarter]), statistics.median(taken[-quarter:])
    return {
        "images_per_s": round(images / seconds, 1),
        "peak_rss_bytes": max(taken),
        "rss_first_quarter_bytes": int(first),
        "rss_last_quarter_bytes": int(last),
        "rss_growth_bytes": int(last - first),
        "seconds": round(seconds, 2),
        "processes": processes,
        "rss_mib_over_time": [round(taken[i * len(taken) // POINTS] / 2**20) for i in range(POINTS)],
    }


def watch(root: int) -> tuple[int, int]:
    """A process and its descendants: how many, and their resident memory together in bytes."""
    children: dict[int, list[int]] = {}
    pages: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            pages[int(entry.name)] = int((entry / "statm").read_text().split()[1])
        except OSError:  # it has just ended
            continue
        children.setdefault(parent, []).append(int(entry.name))
    family = [root]
    for process in family:
        family += children.get(process, [])
    return len(family), sum(pages.get(process, 0) for process in family) * os.sysconf("SC_PAGE_SIZE")


def make_images(folder: Path, number: int, side_px: int) -> int:
    """JPEGs of the size of photographs, no two alike, in sub-folders of a thousand; their bytes together."""
    for first in range(0, number, 1000):
        (folder / f"{first // 1000:04d}").mkdir(parents=True)
    chunks = [range(first, min(first + CHUNK, number)) for first in range(0, number, CHUNK)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        total = sum(pool.map(partial(draw, folder, side_px), chunks))
    with (folder / "labels.csv").open("w") as table:
        table.write("image,label,group\n")
        for i in range(number):
            # Three patients of every class, then Zipf: class c has about 1 / (c + 1) of the first one's images.
            patient = i // IMAGES_PER_PATIENT
            drawn = int(CLASSES ** ((patient * 2654435761 % 2**32) / 2**32)) - 1
            label = patient % CLASSES if patient < 3 * CLASSES else drawn
            table.write(f"{name_of(i)},class_{label:02d},patient_{patient:06d}\n")
    return total


def draw(folder: Path, side_px: int, numbers: range) -> int:
    """Smooth random pictures with grain, about 14 kB each at 224 px, as dermoscopy images have."""
    import numpy as np
    from PIL import Image

    total = 0
    for number in numbers:
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(60, 200, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side_px, side_px), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.integers(-12, 13, (side_px, side_px, 1), dtype=np.int16)
        buffer = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=75)
        (folder / name_of(number)).write_bytes(buffer.getvalue())
        total += buffer.tell()
    return total


def name_of(number: int) -> str:
    return f"{number // 1000:04d}/image_{number:07d}.jpg"


if __name__ == "__main__":
    main()
