"""Configuration of everything from raw images to batches."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from cluster.config import Section
from data_pipeline.rand_augment import parse_policy


class SourceConfig(Section):
    """The images and labels that a user has; see `data_pipeline/sources`."""

    path: str | None = Field(
        None,
        description="Folder of images, MedMNIST .npz, or WebDataset shards (a .tar, a folder of them, or a pattern "
        "such as train-{000..009}.tar); not needed when data.packed exists",
    )
    labels: str | None = Field(
        None, description="CSV or Parquet table of labels, relative to path; none = one folder a class"
    )
    image_column: str = Field("image", description="Column with file name, path or stem of the image")
    label_column: str = Field("label", description="Column, or field of a shard's JSON, with the class")
    group_column: str | None = Field(
        None, description="Column, or field of a shard's JSON, with the patient or lesion; none = image by image"
    )
    split_column: str | None = Field(
        None, description="Column, or field of a shard's JSON, with train, val or test, which are then kept"
    )
    class_names: list[str] | None = Field(
        None, description="Classes in the order of their labels; labels that are numbers stand for these"
    )

    @field_validator("class_names")
    @classmethod
    def _names_are_told_apart(cls, names: list[str] | None) -> list[str] | None:
        if names is not None and (len(set(names)) < len(names) or len(names) < 2 or "" in names):
            raise ValueError(f"names must be two or more, none empty and none twice, not {names}")
        return names


class SplitConfig(Section):
    """How samples are shared out over train, val and test."""

    train: float = Field(0.7, gt=0, lt=1, description="Share of each class's samples")
    val: float = Field(0.15, gt=0, lt=1, description="Share of each class's samples")
    test: float = Field(0.15, gt=0, lt=1, description="Share of each class's samples")
    near_duplicate_bits: int = Field(
        2,
        ge=-1,
        le=16,
        description="Images whose 64-bit perceptual hashes differ in at most so many bits share a group; -1 = off",
    )
    folds: int = Field(
        1, ge=1, description="Cut train and val together into so many parts by groups; 1 = by the shares, or as given"
    )
    fold: int = Field(0, ge=0, description="Number of the part that is val, from 0; the others are train")
    pool_given: bool = Field(False, description="Pool the splits that a source gives and cut new ones")
    train_imbalance: float | None = Field(
        None,
        gt=1,
        description="Thin train out to a long tail: so many times more images of the commonest class than of the "
        "rarest; val and test stay as they are. None = train stays too",
    )

    @model_validator(mode="after")
    def _shares_make_one(self) -> SplitConfig:
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + val + test must be 1, not {total:g}")
        return self

    @model_validator(mode="after")
    def _fold_is_one_of_them(self) -> SplitConfig:
        if self.fold >= self.folds:
            raise ValueError(f"fold = {self.fold} is none of the folds = {self.folds}, which count from 0; lower it")
        return self


class AugmentConfig(Section):
    """Random changes of a training image, in the order in which they are done; 0 or null leaves one out."""

    scale_min: float = Field(0.4, gt=0, le=1, description="Smallest share of the image's area that a crop keeps")
    aspect_max: float = Field(1.333, ge=1, description="Largest stretch of a crop, either way")
    flip_horizontal: bool = Field(True, description="Mirror half of the images, left to right")
    flip_vertical: bool = Field(False, description="Mirror half of the images, top to bottom")
    rotate_deg: float = Field(0.0, ge=0, le=180, description="Rotation by up to so many degrees either way")
    rand_augment: str | None = Field(
        None,
        description="RandAugment as timm names it: rand-m9-n2 = two operations of magnitude 9; also pP, mstdS, inc1. "
        "Its operations are listed in data_pipeline/rand_augment.py",
    )
    blur_sigma_min_px: float = Field(0.1, gt=0, description="Gaussian blur: smallest standard deviation")
    blur_sigma_max_px: float = Field(0.0, ge=0, le=16, description="Largest, in pixels of image_px; 0 = no blur")
    blur_probability: float = Field(0.5, ge=0, le=1, description="Share of the images that are blurred")
    brightness: float = Field(0.1, ge=0, lt=1, description="Half-width of the factor around 1")
    contrast: float = Field(0.1, ge=0, lt=1, description="Half-width of the factor around 1")
    saturation: float = Field(0.1, ge=0, lt=1, description="Half-width of the factor around 1")
    hue_deg: float = Field(0.0, ge=0, le=180, description="Rotation of the hue by up to so many degrees either way")
    cutout_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Area of the square that the dataset's mean fills, as a share of the image",
    )
    cutout_probability: float = Field(0.5, ge=0, le=1, description="Share of the images that are cut out of")

    @field_validator("rand_augment")
    @classmethod
    def _policy_is_known(cls, name: str | None) -> str | None:
        if name is not None:
            parse_policy(name)
        return name

    @model_validator(mode="after")
    def _blur_has_a_range(self) -> AugmentConfig:
        if 0 < self.blur_sigma_max_px < self.blur_sigma_min_px:
            raise ValueError(
                f"blur_sigma_max_px = {self.blur_sigma_max_px:g} is less than blur_sigma_min_px = "
                f"{self.blur_sigma_min_px:g}; raise the one or lower the other"
            )
        return self


class MixConfig(Section):
    """Training images made of two, with the labels of both, for the classification loss; others alone are compared."""

    mixup_alpha: float = Field(
        0.0, ge=0, description="mixup: the images' shares are drawn from Beta(alpha, alpha); 0 = off"
    )
    cutmix_alpha: float = Field(
        0.0,
        ge=0,
        description="CutMix: the area's share is drawn from Beta(alpha, alpha); 0 = off; with both, half each",
    )
    probability: float = Field(
        1.0, ge=0, le=1, description="Share of the images that are mixed; below 1 with a metric loss"
    )


class SamplingConfig(Section):
    """Which classes a training batch draws from."""

    power: float = Field(1.0, ge=0, le=1, description="q of p_c ~ n_c^q: 1 natural, 0.5 square root, 0 balanced")
    power_last: float | None = Field(
        None, ge=0, le=1, description="q of the last epoch; the probabilities go there in equal steps. None = power"
    )
    class_weights: dict[str, float] | None = Field(
        None, description="p_c ~ w_c instead of a power: a weight for each class by name, 0 = never drawn"
    )
    classes_per_batch: int | None = Field(
        None, ge=2, description="P of P x K batches (global batch), chosen by the above; none = by the above alone"
    )
    samples_per_class: int | None = Field(None, ge=2, description="K of P x K batches")

    @model_validator(mode="after")
    def _p_and_k_together(self) -> SamplingConfig:
        if (self.classes_per_batch is None) != (self.samples_per_class is None):
            raise ValueError("classes_per_batch and samples_per_class go together; set both or neither")
        return self

    @model_validator(mode="after")
    def _one_target(self) -> SamplingConfig:
        if self.class_weights is not None:
            if self.power != 1.0 or self.power_last is not None:
                raise ValueError("class_weights take the place of power and power_last; remove these or class_weights")
            for name, weight in self.class_weights.items():
                if not 0 <= weight < math.inf:
                    raise ValueError(f"class_weights = {weight:g} for class {name!r} must be finite and at least 0")
            if not any(self.class_weights.values()):
                raise ValueError("class_weights are all 0; give at least one class a weight above 0")
        return self


class DataConfig(Section):
    """The packed dataset and the batches made of it."""

    packed: str | None = Field(None, description="Folder or s3:// URI of the packed dataset; none = RUN/dataset")
    name: str = Field("dataset", description="What the dataset is called in reports")
    pack_px: int | None = Field(
        None, ge=8, description="Short side that images are shrunk to at packing; none = bytes are kept"
    )
    shard_mib: float = Field(64.0, gt=0, description="Size at which a new shard begins")
    tail_budget_mib: float = Field(
        1024.0, ge=0, description="The rarest classes that fit are held in memory by every worker"
    )
    split: SplitConfig = SplitConfig()
    image_px: int = Field(224, ge=8, description="Side of the square image that the network sees")
    resize_ratio: float = Field(
        1.143, ge=1, description="Evaluation: short side is resized to image_px x this, then centre-cropped"
    )
    augment: AugmentConfig = AugmentConfig()
    mix: MixConfig = MixConfig()
    streams: int = Field(
        8,
        ge=1,
        description="Canonical streams of the order; any number of workers up to this sees the same batches",
    )
    decode_threads: int | None = Field(
        None, ge=1, description="Cores a worker decodes on; none = the machine's cores shared out over its workers"
    )
    cache_dir: str | None = Field(
        None, description="Where shards of a bucket are kept locally; none = the user's cache folder"
    )
    cache_gib: float = Field(50.0, gt=0, description="Bound of that cache")
    max_damaged: int = Field(0, ge=0, description="Unreadable images tolerated before packing or training stops")
    decode: Literal["auto", "cpu", "mixed"] = Field("auto", description="DALI decoder; auto = mixed on a GPU")


class PackConfig(Section):
    """All that the command `pack` takes."""

    source: SourceConfig = SourceConfig()
    data: DataConfig = DataConfig()
    seed: int = Field(0, description="Draws splits and order")
