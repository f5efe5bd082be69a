"""How many heads a minute stage two's search makes, beside one head a Tune trial and beside a cRT on images.

    python benchmarks/search.py --json FILE            heads of 10 epochs on 4,200 x 1,280 features of 7 classes
    python benchmarks/search.py --large --json FILE    heads of 10,000 classes streamed from a memory map

`heads_per_minute` is of cRT and balanced softmax with 10 epochs each; `default_heads_per_minute` of what a run tries by
default, all families with 5 to 30 epochs, of which fewer share a product. All of it runs in this one call, one after
the other. One head a trial is Ray Tune as its users write it: a class that opens the features once, with
`reuse_actors=True`, and Ray's defaults for the rest; the head itself is trained by the same code. The backbone's row is
the one that is estimated: images a second through the backbone are measured, the minutes of 10 epochs over 4,200 images
follow.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import peak_extra_bytes, record

SAMPLES, DIM, CLASSES, EPOCHS = 4200, 1280, 7, 10
HEADS_A_TRIAL = 128
OBJECTS = 100 * 2**20  # bytes of Ray's object store
LONG_TAIL = 0.45
"""Each class has this share of the images of the one before it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--heads", type=int, default=6144, help="heads of the search")
    parser.add_argument("--default-heads", type=int, default=1024, help="heads of the search over all families")
    parser.add_argument("--single", type=int, default=48, help="heads of the rival, one a Tune trial")
    parser.add_argument("--large", action="store_true", help="10,000 classes instead")
    parser.add_argument("--large-samples", type=int, default=100_000)
    parser.add_argument("--large-heads", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.large:
        figures = large(arguments.large_samples, heads=arguments.large_heads)
    else:
        figures = search(arguments.heads, arguments.single, arguments.default_heads)
    for name, value in figures.items():
        print(f"{name:32} {value:,.4g}")
    record(arguments.json, figures)


def search(heads: int, single: int, default_heads: int) -> dict[str, float]:
    import ray

    from tuning.config import StageTwoConfig
    from tuning.space import draw_specs

    logging.disable(logging.WARNING)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="rarelens-bench-") as scratch:
        folder = Path(scratch)
        write_features(folder / "features")
        began = time.perf_counter()
        ray.init(num_cpus=2, address="local", include_dashboard=False, object_store_memory=OBJECTS, log_to_driver=False)
        many = run_search(folder, "blocks", specs(heads))
        # In `train`, Ray and the libraries are there when the search begins; `stage-two` by itself starts them first.
        figures = {"start_to_first_result_s": many["first_s"] - many["began_s"]}
        figures["cold_start_to_first_result_s"] = many["first_s"] - began
        figures["heads_per_minute"] = 60 * heads / many["seconds"]
        figures["search_seconds"] = many["seconds"]
        figures["tune_overhead_share"] = 1 - many["busy_s"] / (2 * many["seconds"])
        # Rates without the start of either: from the first finished trial to the last.
        figures["heads_per_minute_once_started"] = 60 * (heads - HEADS_A_TRIAL) / (many["last_s"] - many["first_s"])
        drawn = draw_specs(StageTwoConfig(heads=default_heads), 0)
        figures["default_heads_per_minute"] = 60 * len(drawn) / run_search(folder, "default", drawn)["seconds"]
        figures["one_head_a_trial_per_minute"] = one_head_a_trial(folder, single)
    ray.shutdown()
    images_per_s = backbone_images_per_s()
    figures["backbone_images_per_s"] = images_per_s
    backbone_minutes = EPOCHS * SAMPLES / images_per_s / 60
    rate = figures["heads_per_minute_once_started"]
    figures["ratio_one_head_a_trial"] = rate / figures["one_head_a_trial_per_minute"]
    figures["ratio_backbone_each_epoch"] = figures["heads_per_minute"] * backbone_minutes
    return figures


def run_search(folder: Path, name: str, wanted: list) -> dict[str, float]:
    """One round of the search; when its first and last blocks were finished, and how long its processes worked."""
    import torch

    from trainer.heads import Head
    from tuning.block import Job
    from tuning.rounds import run_blocks
    from tuning.space import blocks_of

    job = Job(
        features_uri=str(folder / "features"),
        blocks=blocks_of(wanted, HEADS_A_TRIAL),
        own=Head(torch.zeros(CLASSES, DIM), torch.zeros(CLASSES)),
        num_classes=CLASSES,
        select_by="balanced_accuracy",
        folds=1,
        storage_uri=str(folder / name),
    )
    finished: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            done = len(list((folder / name / "blocks").glob("*.safetensors")))
            finished.extend([time.perf_counter()] * (done - len(finished)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    run_blocks(job)
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    busy = sum(read_seconds(job))
    return {"began_s": began, "seconds": seconds, "first_s": finished[0], "last_s": finished[-1], "busy_s": busy}


def one_head_a_trial(folder: Path, heads: int) -> float:
    """Heads a minute where each is a Tune trial, from the first finished one to the last."""
    from ray import tune

    class OneHead(tune.Trainable):
        def setup(self, config: dict, folder: str, specs: list) -> None:
            import torch

            from trainer.features import read_features
            from tuning.folds import training_sets

            torch.set_num_threads(1)
            train, self.val = read_features(folder, "train"), read_features(folder, "val")
            (self.data, _), *_ = training_sets(train, self.val, 1, CLASSES)
            self.specs = specs

        def reset_config(self, new_config: dict) -> bool:
            return True

        def step(self) -> dict:
            import torch

            from trainer.heads import Head
            from trainer.metrics import balanced_accuracy
            from trainer.stage_two import make_heads, predict

            own = Head(torch.zeros(CLASSES, DIM), torch.zeros(CLASSES))
            heads = make_heads([self.specs[self.config["head"]]], self.data, own)
            (said,) = predict(heads, self.val.x)
            return {"score": balanced_accuracy(self.val.labels, said, CLASSES), "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Tune asks for one at the end of each trial; there is nothing to go on from."""

        def load_checkpoint(self, checkpoint: object) -> None: ...

    class Clock(tune.Callback):
        def __init__(self) -> None:
            self.ended: list[float] = []

        def on_trial_complete(self, iteration: int, trials: list, trial: object, **info: object) -> None:
            self.ended.append(time.perf_counter())

    os.environ.pop("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", None)  # which the search does without
    clock = Clock()
    results = tune.Tuner(
        tune.with_parameters(OneHead, folder=str(folder / "features"), specs=specs(heads)),
        param_space={"head": tune.grid_search(list(range(heads)))},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(folder / "one"), callbacks=[clock], verbose=0),
    ).fit()
    assert not results.errors, results.errors[0]
    return 60 * (heads - 1) / (clock.ended[-1] - clock.ended[0])


def read_seconds(job) -> list[float]:
    from tuning.block import read_block

    return [read_block(job, block).seconds for block in range(len(job.blocks))]


def specs(heads: int):
    """Specs of cRT and balanced softmax with drawn rates and decays; eleven sampling powers."""
    from trainer.heads import HeadSpec

    rng = np.random.default_rng(0)
    made = []
    for i in range(heads):
        knobs = {"lr": float(10 ** rng.uniform(-1, 1.5)), "weight_decay": float(10 ** rng.uniform(-6, -2))}
        family, power = ("crt", i % 11 / 10) if i % 2 else ("balanced_softmax", 1.0)
        made.append(HeadSpec(family, power=power, epochs=EPOCHS, **knobs))
    return sorted(made, key=lambda spec: (spec.sampling_power, spec.family))


def write_features(folder: Path) -> None:
    from trainer.features import Features, write_manifest, write_part

    centres = np.random.default_rng(0).normal(size=(CLASSES, DIM)) * 0.1
    shares = LONG_TAIL ** np.arange(CLASSES)
    rows = {"train": SAMPLES, "val": 900}
    for split, number in rows.items():
        rng = np.random.default_rng(number)
        labels = np.concatenate([np.arange(CLASSES), rng.choice(CLASSES, number - CLASSES, p=shares / shares.sum())])
        x = np.maximum(centres[labels] + rng.normal(size=(number, DIM)), 0).astype(np.float16)
        names = np.array([f"{split}{i}" for i in range(number)], dtype=object)
        write_part(folder, split, 0, Features(names, labels, names, np.arange(number), x))
    write_manifest(folder, backbone="none", checkpoint_sha256="none", dim=DIM, rows=rows, parts=1)


def backbone_images_per_s(batches: int = 6) -> float:
    """Forward passes of EfficientNet-Lite0 at 128 px, both cores: what a cRT that keeps no features repeats."""
    import timm
    import torch

    torch.set_num_threads(2)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval().to(memory_format=torch.channels_last)
    images = torch.randn(64, 3, 128, 128).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        model(images)
        began = time.perf_counter()
        for _ in range(batches):
            model(images)
    return 64 * batches / (time.perf_counter() - began)


def large(samples: int, dim: int = 2048, classes: int = 10_000, heads: int = 32, asked: int = 1000) -> dict[str, float]:
    """One epoch of some heads over features that stay in a memory map, and what they say about `asked` of them.

    Twice as many samples should take twice the time, and no more memory.
    """
    import torch

    from trainer.heads import Head, HeadSpec
    from trainer.stage_two import TrainingSet, make_heads, predict

    torch.set_num_threads(2)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="rarelens-bench-") as scratch:
        x = np.lib.format.open_memmap(f"{scratch}/x.npy", "w+", np.float16, (samples, dim))
        rng = np.random.default_rng(0)
        for start in range(0, samples, 10_000):
            x[start : start + 10_000] = rng.standard_normal((min(10_000, samples - start), dim), dtype=np.float32)
        labels = np.arange(samples) % classes  # every class in any beginning that is long enough
        own = Head(torch.zeros(classes, dim), torch.zeros(classes))
        wanted = [HeadSpec("crt", power=0.5, epochs=1, lr=lr) for lr in np.geomspace(1, 3, heads).tolist()]

        def train(number: int) -> None:
            counts = np.bincount(labels[:number], minlength=classes)
            # A budget below the features' size: they are read batch by batch, as a million samples would be.
            data = TrainingSet(x[:number], labels[:number], counts, memory_bytes=2**30)
            predict(make_heads(wanted, data, own), x[:asked])

        for name, number in (("half", samples // 2), ("whole", samples)):
            began = time.perf_counter()
            figures[f"{name}_extra_bytes"] = peak_extra_bytes(lambda number=number: train(number))
            figures[f"{name}_seconds"] = time.perf_counter() - began
    figures["heads"] = heads
    figures["seconds_ratio"] = figures["whole_seconds"] / figures["half_seconds"]
    return figures


if __name__ == "__main__":
    main()
