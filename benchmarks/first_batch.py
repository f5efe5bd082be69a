"""How soon a stopped training has its next batch of tensors: opened, planned, read and decoded, with nothing replayed.

    python benchmarks/first_batch.py --samples 1000000 --json first_batch.json

A packed dataset of so many samples is made in a temporary folder: `stream.py`'s simulated index over shards that are
links to one file of a few JPEGs. A new process, which has imported its modules, then goes on in the middle of epoch
500 of 600, from natural to balanced sampling, with batches of 256 images of 224 px.

first_batch_s    from nothing open to the first batch of tensors; the sum of the others
open_s           the dataset and its index are opened
loader_s         the loader is made: class circles, tail shards into memory
batch_s          the epoch is planned, the batch read and decoded
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

IMAGES, SIDE_PX = 64, 224
BATCH, EPOCH, EPOCHS = 256, 500, 600


def write_dataset(folder: Path, samples: int, classes: int) -> None:
    import hashlib

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pack import draw, name_of
    from stream import simulated_index

    from cluster.storage import open_storage
    from data_pipeline.dataset import INDEX_FILE, INDEX_SCHEMA, Dataset, Shard, describe
    from data_pipeline.tar import TarWriter

    index, tail = simulated_index(samples, classes)
    (folder / "images" / "0000").mkdir(parents=True)
    (folder / "train").mkdir()
    draw(folder / "images", SIDE_PX, range(IMAGES))
    encoded = [(folder / "images" / name_of(number)).read_bytes() for number in range(IMAGES)]
    with open(folder / "train" / "images.tar", "wb") as file:
        tar = TarWriter(file)
        offsets = np.array([tar.add(f"{number}.jpg", data) for number, data in enumerate(encoded)])
        sha256 = tar.close()
    shards = []
    for number in range(int(index.shard[-1]) + 1):
        kind = "tail" if number in tail else "body"
        shards.append(Shard(f"train/{kind}-{number:06d}.tar", "train", kind, 0, tar.bytes, sha256))
        os.link(folder / "train" / "images.tar", folder / shards[-1].path)
    image = np.arange(samples) % IMAGES
    columns = {name: getattr(index, name) for name in ("key", "label", "group", "shard", "phash")}
    columns |= {"offset": offsets[image], "length": np.array([len(data) for data in encoded])[image]}
    columns |= {name: np.full(samples, SIDE_PX, dtype=np.int32) for name in ("width", "height")}
    columns |= {"split": pa.repeat("train", samples)}
    table = pa.table({name: columns[name] for name in INDEX_SCHEMA.names}, schema=INDEX_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    (folder / INDEX_FILE).write_bytes(buffer.getvalue())
    names = tuple(f"class {number}" for number in range(classes))
    looks = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    made = Dataset(str(folder), "simulated", names, tuple(shards), **looks, made={}, storage=open_storage(folder))
    counts = {split: np.zeros(classes, dtype=np.int64) for split in ("train", "val", "test")}
    entry = {"bytes": len(buffer.getvalue()), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    (folder / "dataset.json").write_bytes(describe(made, counts, entry))


def measure(folder: str) -> dict[str, float]:
    import nvidia.dali.fn  # noqa: F401
    import torch

    from data_pipeline.config import DataConfig, SamplingConfig
    from data_pipeline.dataset import open_dataset
    from data_pipeline.loader import TrainLoader

    begin = time.perf_counter()
    dataset = open_dataset(folder)
    dataset.index("train")
    opened = time.perf_counter()
    loader = TrainLoader(
        dataset,
        DataConfig(image_px=SIDE_PX),
        batch_size=BATCH,
        views=1,
        sampling=SamplingConfig(power=1.0, power_last=0.0),
        seed=0,
        rank=0,
        world=1,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        epochs=EPOCHS,
    )
    step = loader.steps_per_epoch // 2
    loader.load_state_dict({"epoch": EPOCH, "step": step, "damaged": []})
    made = time.perf_counter()
    batches = loader.epoch(EPOCH, step)
    batch = next(batches)
    done = time.perf_counter()
    assert batch.images.shape == (BATCH, 3, SIDE_PX, SIDE_PX) and (batch.epoch, batch.step) == (EPOCH, step)
    loader.close()
    return {"first_batch_s": done - begin, "open_s": opened - begin, "loader_s": made - opened, "batch_s": done - made}


def main() -> None:
    from common import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the folder, for the process that this one starts
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="rarelens-benchmark-") as folder:
        write_dataset(Path(folder), options.samples, options.classes)
        command = [sys.executable, __file__, "--measure", folder]
        figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    for name, value in figures.items():
        print(f"{name:16} {value:.3f}")
    record(options.json, figures | {"samples": options.samples, "classes": options.classes})


if __name__ == "__main__":
    main()
