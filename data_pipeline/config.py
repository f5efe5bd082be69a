"""Configuration of everything from raw images to batches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.config import Section


class SourceConfig(Section):
    """The images and labels that a user has."""

    path: str | None = Field(None, description="Folder with the images; not needed when data.packed exists")
    labels: str | None = Field(None, description="CSV of labels, relative to path; none = one folder a class")
    image_column: str = Field("image", description="CSV column with file name, path or stem of the image")
    label_column: str = Field("label", description="CSV column with the class name")
    group_column: str | None = Field(None, description="CSV column with the patient or lesion; none = image by image")


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

    @model_validator(mode="after")
    def _shares_make_one(self) -> SplitConfig:
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + val + test must be 1, not {total:g}")
        return self


class AugmentConfig(Section):
    """Random changes of a training image; every number is a half-width around "unchanged"."""

    scale_min: float = Field(0.4, gt=0, le=1, description="Smallest share of the image's area that a crop keeps")
    aspect_max: float = Field(1.333, ge=1, description="Largest stretch of a crop, either way")
    flip_horizontal: bool = True
    flip_vertical: bool = False
    rotate_deg: float = Field(0.0, ge=0, le=180, description="Rotation by up to so many degrees either way")
    brightness: float = Field(0.1, ge=0, lt=1)
    contrast: float = Field(0.1, ge=0, lt=1)
    saturation: float = Field(0.1, ge=0, lt=1)
    hue_deg: float = Field(0.0, ge=0, le=180)


class SamplingConfig(Section):
    """Which classes a training batch draws from."""

    power: float = Field(1.0, ge=0, le=1, description="q of p_c ~ n_c^q: 1 natural, 0.5 square root, 0 balanced")
    classes_per_batch: int | None = Field(
        None, ge=2, description="P of P x K batches (global batch); none = by power alone"
    )
    samples_per_class: int | None = Field(None, ge=2, description="K of P x K batches")

    @model_validator(mode="after")
    def _p_and_k_together(self) -> SamplingConfig:
        if (self.classes_per_batch is None) != (self.samples_per_class is None):
            raise ValueError("classes_per_batch and samples_per_class go together: set both or neither")
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
    streams: int = Field(
        8,
        ge=1,
        description="Canonical streams of the order; any number of workers up to this sees the same batches",
    )
    decode_threads: int = Field(2, ge=1, description="DALI threads a worker")
    cache_dir: str | None = Field(
        None, description="Where shards of a bucket are kept locally; none = the user's cache folder"
    )
    cache_gib: float = Field(50.0, gt=0, description="Bound of that cache")
    max_damaged: int = Field(0, ge=0, description="Unreadable images tolerated before packing or training stops")
    decode: Literal["auto", "cpu", "mixed"] = Field("auto", description="DALI decoder; auto = mixed on a GPU")
