"""Small copies of a packed dataset's images, for the report: re-encoded without metadata, all together of bounded size.

A row's image is found by the index and read as a byte range, also from a bucket; no shard is downloaded whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from data_pipeline.dataset import Dataset
from data_pipeline.images import DamagedImage, thumbnail

BUDGET_BYTES = 3_000_000
"""Of all pictures in a page; written as text in a data: URI they take a third more."""
SIZES = ((160, 82), (128, 78), (96, 72), (64, 60))
"""Long side in pixels and JPEG quality, tried in turn until a picture is as small as it must be."""
READ_THREADS = 8


def thumbnails(dataset: Dataset, wanted: Mapping[str, np.ndarray], shown: int) -> dict[str, bytes]:
    """JPEG copies by key; an image that cannot be read has none.

    Args:
        dataset: The packed dataset.
        wanted: Split -> rows of its index.
        shown: How many pictures the page has; one that stands in it twice counts twice.
    """
    limit_bytes = BUDGET_BYTES // max(shown, 1)

    def copy(split: str, row: int) -> bytes | None:
        index = dataset.index(split)
        path = dataset.shards[index.shard[row]].path
        data = dataset.storage.read_range(path, int(index.offset[row]), int(index.length[row]))
        with suppress(DamagedImage):
            return small_enough(data, limit_bytes)
        return None

    places = [(split, int(row)) for split, rows in wanted.items() for row in rows]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        copies = list(pool.map(copy, *zip(*places, strict=True))) if places else []
    keys = [dataset.index(split).key[row] for split, row in places]
    return {key: made for key, made in zip(keys, copies, strict=True) if made is not None}


def small_enough(data: bytes, limit_bytes: int) -> bytes:
    """The largest of `SIZES` that is within the limit; the smallest, where none is.

    Raises:
        DamagedImage: The image cannot be read.
    """
    made = b""
    for long_side_px, quality in SIZES:
        made = thumbnail(data, long_side_px, quality)
        if len(made) <= limit_bytes:
            break
    return made
