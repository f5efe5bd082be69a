"""Images a second of `rarelens predict`, beside the loader's bare pass over the same images with the same network.

    python benchmarks/predict.py --data DIR --json FILE [--backbone tf_efficientnet_lite0] [--px 224]

DIR is a packed dataset or a folder of images, as of `benchmarks/loader.py`. Both go over the same images in turns: bare
is `evaluation_batches` (from shards) and the network's forward pass into a head; predict reads each image as a file of
its own, checks it, compares it with 10,000 training examples and writes a CSV. Bound: at least .8 of bare.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import quiet_time, record
from benchmarks.loader import pack_if_needed
from data_pipeline.config import DataConfig
from data_pipeline.dataset import Dataset
from data_pipeline.passes import evaluation_batches
from trainer.config import ModelConfig
from trainer.examples import NEIGHBOURS, TrainingExamples, UnlikeRule
from trainer.export import LoadedModel, ModelDescription, load_model, save_model
from trainer.heads import Head
from trainer.model import build_model
from trainer.predict import predict

BATCH = 64
EXAMPLES = 10_000
SPLIT = "train"


def save_random_model(folder: Path, dataset: Dataset, backbone: str, px: int) -> None:
    """A model folder as a run leaves it, untrained."""
    config = ModelConfig(backbone=backbone)
    network = build_model(config, len(dataset.classes), px)
    width = network.feature_dim
    head = Head(torch.randn(len(dataset.classes), width) / width**0.5, torch.zeros(len(dataset.classes)))
    known = torch.randn(EXAMPLES, width).abs().half()
    keys = np.array([f"image-{number:06d}" for number in range(EXAMPLES)], dtype=object)
    labels = np.arange(EXAMPLES) % len(dataset.classes)
    examples = TrainingExamples(keys, labels, known, UnlikeRule(NEIGHBOURS, 1.0, 0.95, 1000))
    described = ModelDescription(config, dataset.classes, px, 1.143, dataset.mean, dataset.std, 1.0)
    save_model(folder, network, head, described, examples)


def write_files(dataset: Dataset, images: int, folder: Path) -> int:
    """The first images of the split as files; how many there are."""
    folder.mkdir()
    index = dataset.index(SPLIT)
    for row in range(min(images, len(index))):
        path, offset, length = dataset.shards[index.shard[row]].path, int(index.offset[row]), int(index.length[row])
        (folder / f"{row:06d}.jpg").write_bytes(dataset.storage.read_range(path, offset, length))
    return min(images, len(index))


def bare(model: LoadedModel, dataset: Dataset, data: DataConfig, images: int) -> None:
    """The loader and the forward pass, and nothing else."""
    done = 0
    for batch in evaluation_batches(dataset, data, SPLIT, batch_size=BATCH, device=model.device):
        model.predict_proba(batch.images).cpu()
        done += len(batch.rows)
        if done >= images:
            return


def measure(dataset: Dataset, folder: Path, backbone: str, px: int, images: int, rounds: int) -> dict[str, float]:
    """Both in alternating rounds."""
    save_random_model(folder / "model", dataset, backbone, px)
    count = write_files(dataset, images, folder / "images")
    model = load_model(folder / "model", "cuda" if torch.cuda.is_available() else "cpu")
    data = DataConfig(image_px=px, resize_ratio=model.description.resize_ratio)
    rivals = {
        "bare": lambda: bare(model, dataset, data, count),
        "predict": lambda: predict(folder / "model", [str(folder / "images")], folder / "out.csv", batch_size=BATCH),
        "loading": lambda: load_model(folder / "model", model.device),  # once a command, not once an image
    }
    times = quiet_time(rivals, rounds)
    work = [one - two for one, two in zip(times.seconds["predict"], times.seconds["loading"], strict=True)]
    ratios = sorted(one / two for one, two in zip(times.seconds["bare"], work, strict=True))
    return {
        "images": count,
        "bare_images_per_s": count / times.best("bare"),
        "predict_images_per_s": count / min(work),
        "ratio": times.best("bare") / min(work),
        "median_ratio": ratios[len(ratios) // 2],
        "loading_s": times.best("loading"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="packed dataset or folder of images")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--images", type=int, default=1024, help="of a round, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="rarelens-benchmark-") as folder:
        dataset = pack_if_needed(options.data, f"{folder}/packed")
        figures = measure(dataset, Path(folder), options.backbone, options.px, options.images, options.rounds)
    for name, value in figures.items():
        print(f"{name:22} {value:9.3f}")
    record(options.json, {**figures, "backbone": options.backbone, "image_px": options.px})


if __name__ == "__main__":
    main()
