"""The settings of a proposal, each with whose it is and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from data_pipeline.fingerprint import Fingerprint
from data_pipeline.guess import Guess
from trainer.machine import Machine
from trainer.this_machine import ThisMachine
from tuning.proposal import rules
from tuning.proposal.ladder import HEADS_SHARE, MOST_HEADS, Fit

Kind = Literal["given", "found", "fixed", "rule", "searched"]


class Setting(NamedTuple):
    """One value of the configuration."""

    key: str
    value: Any
    kind: Kind
    reason: str


@dataclass(frozen=True)
class Wishes:
    """What the user says.

    Attributes:
        name: Of the data set.
        run: Run folder.
        hours: For the whole of `rarelens train`.
        backbone: Name of a timm network; None = by the hours.
        weights: As `model.weights`.
    """

    name: str
    run: str
    hours: float
    backbone: str | None = None
    weights: str | None = "timm"

    @property
    def pretrained(self) -> bool:
        """Whether training starts from trained weights."""
        return self.weights is not None


def of_run(wishes: Wishes) -> Iterator[Setting]:
    """Where everything goes."""
    yield Setting("run", wishes.run, "given", "everything that `rarelens train` makes; a path or s3://BUCKET/PREFIX")
    yield Setting("seed", 0, "fixed", "draws splits, order, augmentation and random weights")


def of_source(guess: Guess) -> Iterator[Setting]:
    """Where the images and labels are."""
    for name, value in guess.source.model_dump(exclude_defaults=True).items():
        reason = guess.reasons.get(name)
        yield Setting(f"source.{name}", value, "found" if reason else "given", reason or "on the command line")


def of_data(found: Fingerprint, here: ThisMachine, wishes: Wishes) -> Iterator[Setting]:
    """How the data is packed, and changed in training."""
    workers = here.machine.devices
    yield Setting("data.name", wishes.name, "given", "what reports call the data")
    if found.unusable:
        bound = rules.max_damaged(len(found.unusable), found.read, found.images)
        yield Setting("data.max_damaged", bound, "found", "images that cannot be used are named and left out")
    why = f"near-duplicates join a group, so that no split parts them; {found.near_duplicates} images have one"
    yield Setting("data.split.near_duplicate_bits", 2, "fixed", why)
    why = f"rare classes stay in the memory of {workers} workers; {here.host_bytes / 2**30:.0f} GiB are free"
    yield Setting("data.tail_budget_mib", rules.tail_budget_mib(here.host_bytes, workers), "rule", why)
    why = f"a multiple of {workers} workers, {rules.STREAMS} or more"
    yield Setting("data.streams", rules.streams(workers), "rule", why)
    why = "set true where up and down mean nothing, as in dermoscopy and microscopy"
    yield Setting("data.augment.flip_vertical", False, "fixed", why)
    if found.all_grey:
        yield Setting("data.augment.saturation", 0.0, "rule", "the images are grey")


def of_images(found: Fingerprint, fit: Fit, wishes: Wishes) -> Iterator[Setting]:
    """How large the images are."""
    short, px = found.short_px.median, fit.rung.image_px
    sides = ", ".join(map(str, rules.SIDES_PX))
    why = f"the largest of {sides} that the images (median short side {short} px) and {wishes.hours:g} h allow"
    yield Setting("data.image_px", px, "rule", why)
    packed = rules.pack_px(short, px)
    room = f"{rules.PACK_ROOM:g} x image_px: crops have room, and files are small"
    yield Setting("data.pack_px", packed, "rule", room if packed else "the images are hardly larger than is needed")
    ratio = rules.resize_ratio(packed or short, px)
    whole = "evaluation takes the whole image: there is no room to cut"
    yield Setting("data.resize_ratio", ratio, "rule", whole if ratio == 1 else "evaluation cuts the centre out")


def of_batches(train_images: int, machine: Machine, wishes: Wishes) -> Iterator[Setting]:
    """What a step takes."""
    on_gpu = machine.device == "cuda"
    batch = rules.batch_size(train_images, machine.devices, on_gpu)
    why = (
        f"{rules.BATCH}{' a GPU' if on_gpu else ''}, halved while {train_images} training images make fewer than "
        f"{rules.STEPS_PER_EPOCH} steps; a multiple of data.streams"
    )
    yield Setting("stage_one.batch_size", batch, "rule", why)
    start = f"{rules.LR[wishes.pretrained]:g} from {'trained' if wishes.pretrained else 'random'} weights"
    lr = rules.learning_rate(batch, wishes.pretrained)
    yield Setting("stage_one.optimiser.lr", lr, "searched", f"{start}, x sqrt(batch_size / {rules.BATCH})")
    yield Setting("stage_one.optimiser.weight_decay", 0.05, "fixed", "as is usual for AdamW")
    why = "half the memory and time on GPUs" if on_gpu else "bf16 is slower on CPUs (docs/log.md)"
    yield Setting("stage_one.precision", "bf16" if on_gpu else "fp32", "rule", why)
    together = rules.sync_batch_norm(batch, machine.devices)
    why = f"{batch // machine.devices} images a worker are {'too few' if together else 'enough'} for its statistics"
    yield Setting("model.sync_batch_norm", together, "rule", why)


def of_model(fit: Fit, wishes: Wishes) -> Iterator[Setting]:
    """The network."""
    if wishes.backbone is not None:
        yield Setting("model.backbone", wishes.backbone, "given", "on the command line")
    else:
        small = fit.rung.backbone == rules.SMALL_NETWORK
        why = "small and quick; more hours take resnet50" if small else "what the method was published with"
        yield Setting("model.backbone", fit.rung.backbone, "rule", f"{why}; any network of timm's will do")
    if wishes.weights == "timm":
        why = "trained on ImageNet, downloaded once; offline give the path of a .safetensors file"
        yield Setting("model.weights", "timm", "fixed", why)
    else:
        yield Setting("model.weights", wishes.weights, "given", "on the command line; null = random")


def of_stage_one(fit: Fit, wishes: Wishes, epochs: int, views: int) -> Iterator[Setting]:
    """What is learnt, and for how long."""
    fewest, most = rules.EPOCHS[wishes.pretrained]
    seconds = fit.time.epoch_s * views
    why = f"{fewest} to {most}, as {wishes.hours:g} h allow: one is planned to take {seconds:.0f} s"
    yield Setting("stage_one.epochs", epochs, "rule", why)
    why = "there is time: every image has a positive then" if views == 2 else "two would double the time of an epoch"
    yield Setting("stage_one.views", views, "rule", why)
    why = "the metric loss; docs/choosing_a_loss.md has the others"
    yield Setting("stage_one.loss.name", "supervised_contrastive", "searched", why)
    yield Setting("stage_one.loss.weight", 1.0, "searched", "lambda, its share beside the classification loss")
    yield Setting("stage_one.loss.temperature", 0.1, "searched", "the lower, the more the nearest negatives count")
    why = "plain: stage two makes up for the class frequencies"
    yield Setting("stage_one.classification.name", "cross_entropy", "fixed", why)
    yield Setting("stage_one.sampling.power", 1.0, "fixed", "natural: features are learnt from all images alike")


def of_stage_two(fit: Fit, wishes: Wishes, baseline: bool) -> Iterator[Setting]:
    """What `rarelens train` searches, and what it is compared with."""
    why = f"{MOST_HEADS}, halved while their search takes more than {HEADS_SHARE:.0%} of {wishes.hours:g} h"
    yield Setting("stage_two.heads", fit.heads, "rule", why)
    why = "q of the sampling p ~ n^q; `rarelens settings stage_two.space` tells the other ranges"
    yield Setting("stage_two.space.power", [0.0, 1.0], "searched", why)
    yield Setting("stage_two.select_by", "balanced_accuracy", "fixed", "mean of the classes' recalls")
    why = "plain cross-entropy of the same budget, for the report"
    yield Setting("evaluation.baseline", baseline, "rule", why if baseline else f"{why}: it would double the time")


def of_cluster(machine: Machine) -> Iterator[Setting]:
    """Who works."""
    unit = "GPU" if machine.device == "cuda" else "core, as far as the memory reaches"
    yield Setting("cluster.workers", machine.devices, "rule", f"one a {unit}; this machine: {machine.name}")
    share = machine.cores // machine.devices
    yield Setting("cluster.cpus_per_worker", share, "rule", f"{machine.cores} cores shared out")


def of_memory(part: int | None, machine: Machine) -> Iterator[Setting]:
    """What a worker does at once."""
    if part is not None:
        why = f"all at once would need more than the {machine.memory_bytes / 2**30:.1f} GiB of a worker"
        yield Setting("stage_one.micro_batch_size", part, "rule", why)
