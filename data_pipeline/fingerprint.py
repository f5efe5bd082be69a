"""The fingerprint of a user's data: what a configuration depends on, counted before anything is packed.

Labels, groups and splits are those of the whole source. Of the images themselves up to `MAX_READ` are read, spread
evenly over the source; what follows from these alone says so.

Shapes: N images, K images read, C classes.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from cluster.errors import UserError
from data_pipeline.config import SourceConfig, SplitConfig
from data_pipeline.dataset import SPLITS
from data_pipeline.dicom import bits_of_dicom, is_dicom
from data_pipeline.images import PNG_SIGNATURE, DamagedImage, prepare_image
from data_pipeline.raw import Place, RawSample
from data_pipeline.sources import class_order, read_source
from data_pipeline.splits import join_near_duplicates
from data_pipeline.survey import IMAGES_PER_TASK, bar
from data_pipeline.workers import ImageWorkers

MAX_READ = 20_000
"""Images whose pixels are looked at: some minutes on two cores."""
PNG_DEPTH_BYTE = 24
TIFF_BITS_PER_SAMPLE = 258
GREY_DIFFERENCE = 1 / 255
"""Between an image's means of red, green and blue, below which it is grey, whatever its file says."""


class Spread(NamedTuple):
    """Smallest, median and largest."""

    low: int
    median: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}, median {self.median}"


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a source before it is packed.

    Attributes:
        classes: Images of each class, in the order of the labels.
        independent: Groups of each class, near-duplicates joined: what can be shared out over splits.
        groups: Groups in all; None = the source names none.
        images_per_group: Of the groups that the source names.
        splits: Images of each split that the source gives; empty where it gives none.
        read: Images whose pixels were looked at.
        width_px: Of those.
        height_px: Of those.
        short_px: The shorter side of those.
        bits: Of a channel -> images.
        all_grey: None of those read has a colour.
        near_duplicates: Images read that show, but for a few bits of the hash, what another one shows.
        contradictions: Of those, the ones whose like has another class.
        unusable: Name and reason of samples that cannot be used.
    """

    classes: dict[str, int]
    independent: dict[str, int]
    groups: int | None
    images_per_group: Spread
    splits: dict[str, int]
    read: int
    width_px: Spread
    height_px: Spread
    short_px: Spread
    bits: dict[int, int]
    all_grey: bool
    near_duplicates: int
    contradictions: int
    unusable: tuple[tuple[str, str], ...]

    @property
    def images(self) -> int:
        """N, without those that cannot be used."""
        return sum(self.classes.values())

    @property
    def imbalance(self) -> float:
        """Images of the commonest class for one of the rarest."""
        return max(self.classes.values()) / max(1, min(self.classes.values()))

    @property
    def read_all(self) -> bool:
        """Whether every image was looked at."""
        return self.read >= self.images


class Look(NamedTuple):
    """What the pixels of one image have shown."""

    width: int = 0
    height: int = 0
    phash: int = 0
    bits: int = 0
    grey: bool = True
    damage: str | None = None


def take_fingerprint(
    source: SourceConfig, near_duplicate_bits: int | None = None, max_read: int = MAX_READ, progress: bool = True
) -> Fingerprint:
    """List a source and look at its images, in parallel.

    Args:
        source: Where images and labels are.
        near_duplicate_bits: As in `data.split`; None = its default.
        max_read: Images to look at.
        progress: Show a progress bar.

    Raises:
        UserError: The source is wrong (see `read_source`), no image can be read, or one needs a package that is not
            installed.
    """
    samples = read_source(source)
    usable = [sample for sample in samples if sample.problem is None]
    chosen = [usable[i] for i in np.linspace(0, len(usable) - 1, min(len(usable), max_read)).round().astype(int)]
    looks = look_at(chosen, progress)
    damaged = {sample.name: look.damage for sample, look in zip(chosen, looks, strict=True) if look.damage}
    unusable = [(sample.name, sample.problem) for sample in samples if sample.problem is not None]
    whole = [sample for sample in usable if sample.name not in damaged]
    if not whole:
        name, reason = next(iter(damaged.items()))
        raise UserError(f"none of the {len(damaged)} images of {source.path} can be read, {name}: {reason}; mend them")
    pixels = [(sample, look) for sample, look in zip(chosen, looks, strict=True) if look.damage is None]
    max_bits = SplitConfig().near_duplicate_bits if near_duplicate_bits is None else near_duplicate_bits
    duplicates, contradictions = _duplicates(pixels, max_bits)
    named = [sample.group for sample in whole if sample.group != sample.name]
    sides = np.array([(look.width, look.height) for _, look in pixels]).reshape(-1, 2)
    return Fingerprint(
        classes=_by_class(whole, source, [sample.name for sample in whole]),
        independent=_by_class(whole, source, _independent(whole, pixels, max_bits)),
        groups=len({sample.group for sample in whole}) if named else None,
        images_per_group=_spread(list(Counter(sample.group for sample in whole).values())),
        splits={name: n for name in SPLITS if (n := sum(sample.split == name for sample in whole))},
        read=len(chosen),
        width_px=_spread(sides[:, 0]),
        height_px=_spread(sides[:, 1]),
        short_px=_spread(sides.min(axis=1)),
        bits=dict(sorted(Counter(look.bits for _, look in pixels).items())),
        all_grey=all(look.grey for _, look in pixels),
        near_duplicates=duplicates,
        contradictions=contradictions,
        unusable=tuple(unusable + list(damaged.items())),
    )


def look_at(samples: Sequence[RawSample], progress: bool = True) -> list[Look]:
    """What the pixels of each sample show, in their order."""
    places = [sample.place for sample in samples]
    tasks = (places[i : i + IMAGES_PER_TASK] for i in range(0, len(places), IMAGES_PER_TASK))
    looks: list[Look] = []
    with ImageWorkers(len(places)) as workers, bar("looking at images", len(places), progress) as shown:
        for found in workers.map(_look_at_places, tasks):
            looks += found
            shown.update(len(looks))
    return looks


def _look_at_places(places: Sequence[Place]) -> list[Look]:
    return [_look(place) for place in places]


def _look(place: Place) -> Look:
    try:
        data = place.read()
        image = prepare_image(data)
    except (DamagedImage, OSError) as error:
        return Look(damage=str(error))
    grey = max(image.mean) - min(image.mean) < GREY_DIFFERENCE
    return Look(image.width, image.height, image.phash, bits_per_channel(data), grey)


def bits_per_channel(data: bytes) -> int:
    """Of an encoded image that can be read, by its header."""
    if is_dicom(data):
        return bits_of_dicom(data)
    if data.startswith(PNG_SIGNATURE):
        return data[PNG_DEPTH_BYTE]  # Pillow opens 16-bit RGB in an 8-bit mode
    image = Image.open(io.BytesIO(data))
    if image.format == "TIFF":
        return max(image.tag_v2.get(TIFF_BITS_PER_SAMPLE, (1,)))  # type: ignore[attr-defined]
    return 16 if image.mode.startswith("I;16") else 8


def _duplicates(pixels: Sequence[tuple[RawSample, Look]], max_bits: int) -> tuple[int, int]:
    """Images that have a near-duplicate, and those of them whose near-duplicates are not all of their class.

    Near-duplicates are joined to sets, as packing does it.
    """
    names = np.array([sample.name for sample, _ in pixels], dtype=object)
    hashes = np.array([look.phash for _, look in pixels], dtype=np.uint64)
    joined = join_near_duplicates(names, hashes, max_bits) if len(names) else names
    sizes = Counter(joined)
    labels_of: dict[str, set[str]] = {}
    for name, (sample, _) in zip(joined, pixels, strict=True):
        labels_of.setdefault(name, set()).add(sample.label)
    doubled = [name for name in joined if sizes[name] > 1]
    return len(doubled), sum(len(labels_of[name]) > 1 for name in doubled)


def _independent(whole: Sequence[RawSample], pixels: Sequence[tuple[RawSample, Look]], max_bits: int) -> Sequence[str]:
    """The group of each sample, near-duplicates joined; images that were not read have no hash."""
    hash_of = {sample.name: look.phash for sample, look in pixels}
    groups = np.array([sample.group for sample in whole], dtype=object)
    hashes = np.array([hash_of.get(sample.name, 0) for sample in whole], dtype=np.uint64)
    return join_near_duplicates(groups, hashes, max_bits).tolist() if len(groups) else []


def _by_class(samples: Sequence[RawSample], source: SourceConfig, what: Sequence[str]) -> dict[str, int]:
    """How many different things of `what` the samples of each class have, in the order of the labels."""
    found: dict[str, set[str]] = {name: set() for name in class_order(samples, source.class_names)}
    for sample, thing in zip(samples, what, strict=True):
        found[sample.label].add(thing)
    return {name: len(things) for name, things in found.items()}


def _spread(values: Sequence[int] | np.ndarray) -> Spread:
    if not len(values):
        return Spread(0, 0, 0)
    return Spread(int(np.min(values)), int(np.median(values)), int(np.max(values)))
