"""Images a second of rarelens' loader, of WebDataset with Pillow and torchvision, and of DALI's own WebDataset reader.

    python benchmarks/loader.py --data DIR --json FILE [--s3]

DIR is a packed dataset or a folder of images (`metadata.csv` with image_id, dx and lesion_id, as HAM10000 has it, or a
folder a class), which is packed into a temporary folder at 224 px first. All three read the same shards with the same
cores, in turns, and do the same: random resized crop to 224 px, horizontal flip, normalisation, batches of tensors.
rarelens draws all classes equally often (power 0); its peers take the samples as they come, shuffled by a buffer.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import record
from data_pipeline.config import AugmentConfig, DataConfig, SamplingConfig, SourceConfig
from data_pipeline.dataset import DATASET_FILE, Dataset, open_dataset
from data_pipeline.loader import TrainLoader
from data_pipeline.pack import pack

IMAGE_PX, BATCH = 224, 64
SCALE_MIN = 0.08  # torchvision's and DALI's default for a random resized crop
SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class Setting:
    """What all rivals share."""

    dataset: Dataset
    cores: int
    device: torch.device

    @property
    def shards(self) -> list[str]:
        """Files of the training split."""
        paths = (self.dataset.storage.local_path(s.path) for s in self.dataset.shards if s.split == "train")
        return [str(path) for path in paths]


def data_config(setting: Setting, **options: object) -> DataConfig:
    """The peers' work and no more: crop, flip, normalisation."""
    augment = AugmentConfig(scale_min=SCALE_MIN, aspect_max=4 / 3, brightness=0, contrast=0, saturation=0)
    return DataConfig(image_px=IMAGE_PX, augment=augment, decode_threads=setting.cores, **options)


def make_loader(setting: Setting, dataset: Dataset, data: DataConfig) -> TrainLoader:
    return TrainLoader(
        dataset,
        data,
        batch_size=BATCH,
        views=1,
        sampling=SamplingConfig(power=0.0),
        seed=0,
        rank=0,
        world=1,
        device=setting.device,
        epochs=10**6,
    )


def rarelens_batches(setting: Setting, dataset: Dataset | None = None, data: DataConfig | None = None) -> Iterator[int]:
    loader = make_loader(setting, dataset or setting.dataset, data or data_config(setting))
    try:
        for epoch in range(10**6):
            for batch in loader.epoch(epoch):
                yield len(batch.labels)
    finally:
        loader.close()


def webdataset_batches(setting: Setting) -> Iterator[int]:
    """As its documentation has it: shards shared out over worker processes, a shuffle buffer, batches made there."""
    import webdataset
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(IMAGE_PX, scale=(SCALE_MIN, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(setting.dataset.mean, setting.dataset.std),
        ]
    )
    samples = (
        webdataset.WebDataset(setting.shards, shardshuffle=len(setting.shards), empty_check=False)
        .shuffle(SHUFFLE_BUFFER)
        .decode("pil")
        .to_tuple("jpg;png", "cls")
        .map_tuple(transform, int)
        .batched(BATCH, partial=False)
        .repeat()
    )
    loader = webdataset.WebLoader(samples, batch_size=None, num_workers=setting.cores)
    for images, labels in loader:
        images.to(setting.device, non_blocking=True)
        yield len(labels)


def dali_batches(setting: Setting, layout: str) -> Iterator[int]:
    """Its reader, decoder and operators in one graph, as its examples have it."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    on_gpu = setting.device.type == "cuda"
    pipeline = Pipeline(BATCH, setting.cores, 0 if on_gpu else None, seed=0)
    with pipeline:
        encoded, labels = fn.readers.webdataset(
            paths=setting.shards,
            ext=["jpg;png", "cls"],
            random_shuffle=True,
            initial_fill=SHUFFLE_BUFFER,
            missing_component_behavior="error",
        )
        images = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if on_gpu else "cpu",
            random_area=[SCALE_MIN, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
        )
        images = fn.resize(images, size=[IMAGE_PX, IMAGE_PX], antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            mean=[255 * number for number in setting.dataset.mean],
            std=[255 * number for number in setting.dataset.std],
            dtype=types.DALIDataType.FLOAT,
            output_layout=layout,
        )
        pipeline.set_outputs(images, labels)
    pipeline.build()
    while True:
        tensor = torch.from_dlpack(pipeline.run()[0].as_tensor())
        yield len(tensor)


@dataclass
class Rival:
    """One source of batches over all rounds."""

    batches: Iterator[int]
    workers: list[psutil.Process]
    rates: list[float]
    cpu_ms: list[float]

    @classmethod
    def start(cls, source: Callable[[], Iterator[int]]) -> Rival:
        before = set(psutil.Process().children(recursive=True))
        batches = source()
        next(batches)
        rival = cls(batches, sorted(set(psutil.Process().children(recursive=True)) - before, key=hash), [], [])
        rival._let(psutil.Process.suspend)
        return rival

    def run(self, seconds: float) -> None:
        """A round. It begins untimed, until the queues are no longer full; its worker processes rest between rounds."""
        self._let(psutil.Process.resume)
        self._take(seconds / 2)
        cpu = cpu_seconds()
        images, passed = self._take(seconds)
        self.rates.append(images / passed)
        self.cpu_ms.append(1000 * (cpu_seconds() - cpu) / images)
        self._let(psutil.Process.suspend)

    def stop(self) -> None:
        self._let(psutil.Process.resume)
        self.batches.close()  # type: ignore[attr-defined]

    def _let(self, act: Callable[[psutil.Process], None]) -> None:
        for worker in self.workers:
            act(worker)

    def _take(self, seconds: float) -> tuple[int, float]:
        begin, images = time.perf_counter(), 0
        while (passed := time.perf_counter() - begin) < seconds:
            images += next(self.batches)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        return images, passed


def compete(sources: dict[str, Callable[[], Iterator[int]]], rounds: int, seconds: float) -> dict[str, Rival]:
    """Rounds in turns, forwards and backwards, so that a change of load meets all."""
    rivals = {name: Rival.start(source) for name, source in sources.items()}
    for number in range(rounds):
        for name in list(rivals)[:: 1 if number % 2 == 0 else -1]:
            rivals[name].run(seconds)
    for rival in rivals.values():
        rival.stop()
    return rivals


def cpu_seconds() -> float:
    """Of this process and its workers."""
    used = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        times = process.cpu_times()
        used += times.user + times.system
    return used


def best(rival: Rival) -> float:
    return max(rival.rates)


def median_ratio(one: Rival, other: Rival) -> float:
    """Of the rounds: both under about the same load."""
    ratios = sorted(a / b for a, b in zip(one.rates, other.rates, strict=True))
    return ratios[len(ratios) // 2]


def pack_if_needed(path: Path, folder: str) -> Dataset:
    if (path / DATASET_FILE).is_file():
        return open_dataset(str(path))
    source = SourceConfig(path=str(path))
    if (path / "metadata.csv").is_file():
        source = SourceConfig(
            path=str(path),
            labels="metadata.csv",
            image_column="image_id",
            label_column="dx",
            group_column="lesion_id",
        )
    # Shards small enough for all workers to have some, and a tail that is not the whole set.
    return pack(source, DataConfig(pack_px=IMAGE_PX, shard_mib=8, tail_budget_mib=16), folder, seed=0, progress=False)


def measure(setting: Setting, rounds: int, seconds: float) -> dict[str, float]:
    found = compete(
        {
            "rarelens": lambda: rarelens_batches(setting),
            "webdataset": lambda: webdataset_batches(setting),
            "dali": lambda: dali_batches(setting, "CHW"),
            "dali_channels_last": lambda: dali_batches(setting, "HWC"),
        },
        rounds,
        seconds,
    )
    for name, rival in found.items():
        print(f"{name:20} {best(rival):7.0f} images/s, {min(rival.cpu_ms):6.2f} ms of CPU an image", flush=True)
    ours, webdataset = found["rarelens"], found["webdataset"]
    dali = max(found["dali"], found["dali_channels_last"], key=best)
    return {
        "images_per_s": best(ours),
        "webdataset_images_per_s": best(webdataset),
        "dali_images_per_s": best(dali),
        "ratio_webdataset": best(ours) / best(webdataset),
        "ratio_dali": best(ours) / best(dali),
        "median_ratio_webdataset": median_ratio(ours, webdataset),
        "median_ratio_dali": median_ratio(ours, dali),
        **{f"{name}_cpu_ms_per_image": min(rival.cpu_ms) for name, rival in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="packed dataset or folder of images")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--s3", action="store_true", help="also from an S3 server on loopback, free and throttled")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round of each, and half as much untimed")
    parser.add_argument("--step-images-per-s", type=float, default=150.0, help="S3: what the simulated step takes")
    options = parser.parse_args()

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # workers inherit it
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="rarelens-benchmark-") as folder:
        setting = Setting(pack_if_needed(options.data, f"{folder}/packed"), options.cores, device)
        figures: dict[str, object] = dict(measure(setting, options.rounds, options.seconds))
        if options.s3:
            from benchmarks.loader_s3 import measure_s3

            figures |= measure_s3(setting, folder, options.rounds, options.seconds, options.step_images_per_s)
    figures |= {"batch_size": BATCH, "image_px": IMAGE_PX, "rounds": options.rounds, "seconds": options.seconds}
    for name in ("ratio_webdataset", "ratio_dali", "s3_second_epoch_ratio", "s3_first_epoch_wait_share"):
        if name in figures:
            print(f"{name:28} {figures[name]:.3f}")
    record(options.json, figures)


if __name__ == "__main__":
    main()
