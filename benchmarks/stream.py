"""The planned order: how soon training starts or goes on, memory, and work a sample. Nothing is read or decoded.

    python benchmarks/stream.py --json stream.json

Each measurement has a new process, whose index is simulated: classes of Zipf sizes, keys and groups as long as real
ones, the rarest classes in tail shards.

start_s_10m            a stream is made and its first batch asked for
peak_bytes_10m         most resident memory of that process meanwhile: stream, index, Python and its modules
first_batch_s_1m       a run goes on in epoch 500 of 600 from natural to balanced sampling: the stream's modules are
                       imported, the stream made and the first batch asked for; *_p_x_k: the same with P x K batches
microseconds_per_sample  CPU time over an epoch, planning it and asking for all its batches; the worst of batches of 64,
                       of 256, and of a rank's eighth of a batch of 64
index_read_*           beside it: opening the index of a packed dataset (index.parquet) of as many samples
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

if TYPE_CHECKING:
    from data_pipeline.dataset import Index
    from data_pipeline.stream import TrainStream

SAMPLES_PER_SHARD = 3000  # of 20 KiB in 64 MiB
TAIL_SHARE = 0.005  # 1 GiB of ten million images of 20 KiB
STREAMS, EPOCHS = 8, 600
FIELDS = ("key", "label", "group", "shard", "offset", "length", "width", "height", "phash")


def simulated_index(samples: int, classes: int) -> tuple[Index, range]:
    """A training split and the numbers of its tail shards."""
    import numpy as np

    from data_pipeline.dataset import Index

    counts = np.maximum(5, samples / np.arange(1, classes + 1) / np.log(classes)).astype(np.int64)
    counts[0] += samples - counts.sum()
    in_tail = np.cumsum(counts[::-1])[::-1] <= samples * TAIL_SHARE
    classes_of = np.repeat(np.arange(classes), counts)
    tail_begins = int(counts[~in_tail].sum())
    np.random.default_rng(0).shuffle(classes_of[:tail_begins])
    shards = np.arange(samples, dtype=np.int32) // SAMPLES_PER_SHARD
    shards[tail_begins:] += 1
    keys = np.array([f"image_{number:08d}" for number in range(samples)], dtype=object)
    groups = np.array([f"lesion_{number:08d}" for number in range(samples)], dtype=object)
    zeros = [np.zeros(samples, dtype=kind) for kind in ("i8", "i8", "i4", "i4", "u8")]
    return Index(keys, classes_of, groups, shards, *zeros), range(
        tail_begins // SAMPLES_PER_SHARD + 1, int(shards[-1]) + 1
    )


def make_stream(index: Index, tail: range, classes: int, batch_size: int, **sampling: Any) -> TrainStream:
    from data_pipeline.config import SamplingConfig
    from data_pipeline.stream import TrainStream

    names = [f"class {number}" for number in range(classes)]
    return TrainStream(index, names, batch_size, SamplingConfig(**sampling), STREAMS, 0, tail, EPOCHS)


def measure_start(samples: int, classes: int) -> dict[str, float]:
    import psutil
    from common import peak_extra_bytes

    index, tail = simulated_index(samples, classes)
    seconds = []

    def start() -> None:
        begin = time.perf_counter()
        make_stream(index, tail, classes, 256, power=0.5).rank_rows(0, 0)
        seconds.append(time.perf_counter() - begin)

    before = psutil.Process().memory_info().rss
    extra = peak_extra_bytes(start)
    return {"seconds": seconds[0], "bytes": before + extra, "extra_bytes": extra}


def measure_first_batch(samples: int, classes: int, **p_and_k: int) -> dict[str, float]:
    begin = time.perf_counter()
    import data_pipeline.stream  # noqa: F401

    imported = time.perf_counter()
    index, tail = simulated_index(samples, classes)
    ready = time.perf_counter()
    stream = make_stream(index, tail, classes, 256, power=1.0, power_last=0.0, **p_and_k)
    stream.rank_rows(500, stream.steps_per_epoch // 2)
    return {"seconds": time.perf_counter() - ready + imported - begin}


def measure_p_x_k(samples: int, classes: int) -> dict[str, float]:
    return measure_first_batch(samples, classes, classes_per_batch=32, samples_per_class=8)


def measure_work(samples: int, classes: int) -> dict[str, float]:
    index, tail = simulated_index(samples, classes)
    figures = {}
    for batch_size, world in ((64, 1), (256, 1), (64, 8)):
        stream = make_stream(index, tail, classes, batch_size, power=0.5)
        begin = time.process_time()
        asked = sum(len(stream.rank_rows(0, step, 0, world)[0]) for step in range(stream.steps_per_epoch))
        figures[f"batch_{batch_size}" + f"_of_{world}_ranks" * (world > 1)] = (
            (time.process_time() - begin) / asked * 1e6
        )
    return figures


def measure_read(samples: int, classes: int) -> dict[str, float]:
    import psutil
    from common import peak_extra_bytes

    from cluster.storage import open_storage
    from data_pipeline.dataset import Dataset, Shard

    with tempfile.TemporaryDirectory() as folder:
        # Another process writes it: what the writer used would otherwise be at hand for the reader.
        subprocess.run(
            [sys.executable, __file__, *_arguments("write", samples, classes), "--folder", folder], check=True
        )
        names = tuple(f"class {number}" for number in range(classes))
        place = {"storage": open_storage(folder), "uri": folder, "name": "simulated", "made": {}}
        shards = tuple(
            Shard(f"{n}.tar", "train", "body", 0, 2**26, "") for n in range(samples // SAMPLES_PER_SHARD + 2)
        )
        dataset = Dataset(classes=names, shards=shards, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), **place)
        seconds = []

        def read() -> None:
            begin = time.perf_counter()
            assert len(dataset.index("train")) == samples
            seconds.append(time.perf_counter() - begin)

        before = psutil.Process().memory_info().rss
        return {"bytes": before + peak_extra_bytes(read), "seconds": seconds[0]}


def write_index(samples: int, classes: int, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipeline.dataset import INDEX_FILE, INDEX_SCHEMA

    index, _ = simulated_index(samples, classes)
    columns = {name: getattr(index, name) for name in FIELDS} | {"split": pa.repeat("train", samples)}
    table = pa.table({name: columns[name] for name in INDEX_SCHEMA.names}, schema=INDEX_SCHEMA)
    pq.write_table(table, folder / INDEX_FILE, compression="zstd")


MEASUREMENTS: dict[str, Callable[[int, int], dict[str, float]]] = {
    "start": measure_start,
    "first_batch": measure_first_batch,
    "p_x_k": measure_p_x_k,
    "work": measure_work,
    "read": measure_read,
}


def in_new_process(name: str, samples: int, classes: int) -> dict[str, float]:
    command = [sys.executable, __file__, *_arguments(name, samples, classes)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _arguments(name: str, samples: int, classes: int) -> list[str]:
    return ["--measure", name, "--samples", str(samples), "--classes", str(classes)]


def report(million: int, classes: int, json_file: str | None) -> None:
    """Measure all, print a table, write the file."""
    from common import record

    start = in_new_process("start", 10 * million, classes)
    work = in_new_process("work", million, classes)
    read = in_new_process("read", 10 * million, classes)
    figures = {
        "start_s_10m": start["seconds"],
        "peak_bytes_10m": start["bytes"],
        "peak_bytes_10m_stream_alone": start["extra_bytes"],
        "first_batch_s_1m": in_new_process("first_batch", million, classes)["seconds"],
        "first_batch_s_1m_p_x_k": in_new_process("p_x_k", million, classes)["seconds"],
        "microseconds_per_sample": max(work.values()),
        **{f"microseconds_per_sample_{name}": value for name, value in work.items()},
        "index_read_s_1m": in_new_process("read", million, classes)["seconds"],
        "index_read_s_10m": read["seconds"],
        "index_read_peak_bytes_10m": read["bytes"],
        "samples_in_1m": million,
        "classes": classes,
    }
    for name, value in figures.items():
        print(f"{name:46} {value / 1e9:.2f} GB" if "bytes" in name else f"{name:46} {value:.4g}")
    record(json_file, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    parser.add_argument("--million", type=int, default=1_000_000, help="smaller for a trial")
    parser.add_argument("--classes", type=int, default=10_000)
    for hidden in ("--measure", "--samples", "--folder"):  # of the processes that this one starts
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure == "write":
        write_index(int(options.samples), options.classes, Path(options.folder))
    elif options.measure:
        print(json.dumps(MEASUREMENTS[options.measure](int(options.samples), options.classes)))
    else:
        report(options.million, options.classes, options.json)


if __name__ == "__main__":
    main()
