"""The DALI graph: encoded bytes and parameters in, tensors out; one graph for CPU and GPU.

The graph holds no randomness: crop windows, flips, angles and colour factors come from `augment.py` with each batch.

Training, each view:  crop -> resize to image_px (antialiased) -> rotation -> flips -> colour -> normalise.
Evaluation:           short side to image_px * resize_ratio (antialiased) -> centre crop -> normalise.

- One view decodes no more than its crop window; two views are cut from one decoded image.
- Rotation turns the crop about its centre; what comes in from outside repeats the border's pixels, no black corners.
- Operators that the configuration leaves without effect are not in the graph.
- Images come out as float32, channels_last.

Legend: B samples, V views, px image side.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from cluster.errors import UserError
from data_pipeline.augment import ViewParameters
from data_pipeline.config import AugmentConfig
from data_pipeline.images import DamagedImage, prepare_image

QUEUE_DEPTH = 2
"""Batches in DALI's hands: one is decoded while the next waits, so that its threads never idle."""


class DecodeError(Exception):
    """DALI could not decode some image of a batch; it does not say which."""


@dataclass(frozen=True)
class ImageSettings:
    """What the images come out as; `mean` and `std` in units of 0..1, RGB."""

    image_px: int
    resize_ratio: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def short_px(self) -> int:
        """Evaluation: short side before the centre crop; as even or odd as `image_px`, so that the crop is centred."""
        return self.image_px + 2 * round(self.image_px * (self.resize_ratio - 1) / 2)


@dataclass(frozen=True)
class DecoderSettings:
    """How a `Decoder` works.

    `augment` None means the evaluation graph, else the training graph with `views` views.
    """

    image: ImageSettings
    batch_size: int
    device: torch.device
    threads: int = 2
    decode: Literal["auto", "cpu", "mixed"] = "auto"
    augment: AugmentConfig | None = None
    views: int = 1

    @property
    def mixed(self) -> bool:
        """Whether the GPU decodes.

        Raises:
            UserError: It should, and there is none.
        """
        if self.decode == "mixed" and self.device.type != "cuda":
            raise UserError("data.decode = mixed needs a GPU, and this worker has none; set data.decode=auto")
        return self.device.type == "cuda" and self.decode != "cpu"


class Decoder:
    """A DALI pipeline that is fed by `submit` and emptied by `result`, in the same order."""

    def __init__(self, settings: DecoderSettings):
        self.settings = settings
        self._pipeline: Any = None
        self._inputs: list[tuple[str, int, str]] = []
        self._pending = 0

    def submit(self, encoded: Sequence[np.ndarray], views: Sequence[ViewParameters] = ()) -> None:
        """Start decoding a batch; returns at once.

        Args:
            encoded: B uint8 arrays, each an encoded image; 1 <= B <= `batch_size`.
            views: V parameter sets for the training graph, none for the evaluation graph.
        """
        if self._pipeline is None:
            self._build()
        self._feed(encoded, views)
        self._pipeline.schedule_run()
        self._pending += 1

    def result(self) -> torch.Tensor:
        """The oldest submitted batch, float32 [V * B, 3, px, px], view-major, channels_last, on the device.

        Raises:
            DecodeError: Some image cannot be decoded. This batch and all later submitted ones are lost.
        """
        assert self._pending, "nothing was submitted"
        try:
            outputs = self._pipeline.share_outputs()
        except RuntimeError as error:
            self.close()
            raise DecodeError(_last_line(error)) from None
        # DALI does not write into these buffers as long as a tensor refers to them (its default executor).
        views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        self._pipeline.release_outputs()
        self._pending -= 1
        images = views[0] if len(views) == 1 else torch.cat(views)
        return images.to(self.settings.device).permute(0, 3, 1, 2)

    def drain(self) -> None:
        """Throw away what was submitted and not asked for."""
        while self._pending:
            with suppress(DecodeError):
                self.result()

    def close(self) -> None:
        """Let go of the pipeline and of what it was decoding; the next `submit` builds it anew."""
        self._pipeline = None
        self._pending = 0

    def _feed(self, encoded: Sequence[np.ndarray], views: Sequence[ViewParameters]) -> None:
        self._pipeline.feed_input("encoded", list(encoded))
        for name, view, field in self._inputs:
            self._pipeline.feed_input(name, getattr(views[view], field))

    def _build(self) -> None:
        from nvidia.dali.pipeline import Pipeline

        settings = self.settings
        self._pipeline = Pipeline(
            batch_size=settings.batch_size,
            num_threads=settings.threads,
            device_id=settings.device.index or 0 if settings.mixed else None,
            seed=0,
            prefetch_queue_depth=QUEUE_DEPTH,
        )
        with self._pipeline:
            if settings.augment is None:
                outputs = [_evaluation_graph(settings)]
            else:
                outputs, self._inputs = _training_graph(settings, settings.augment)
            self._pipeline.set_outputs(*outputs)
        self._pipeline.build()
        # The first `schedule_run` starts QUEUE_DEPTH runs, every later one a single run: let it have tiny batches.
        for _ in range(QUEUE_DEPTH):
            self._feed([_DOT], [_dot_parameters()] * settings.views)
        self._pipeline.schedule_run()
        for _ in range(QUEUE_DEPTH):
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()


def find_damaged(
    settings: DecoderSettings, encoded: Sequence[np.ndarray], views: Sequence[ViewParameters] = ()
) -> dict[int, str]:
    """Decode the images of a failed batch one by one.

    Returns:
        Number in the batch -> reason, for each image that DALI cannot decode.
    """
    decoder = Decoder(replace(settings, batch_size=1))
    damaged = {}
    for number, data in enumerate(encoded):
        decoder.submit([data], [view.select(slice(number, number + 1)) for view in views])
        try:
            decoder.result()
        except DecodeError as error:
            damaged[number] = _reason(data) or str(error)
    return damaged


def _training_graph(settings: DecoderSettings, config: AugmentConfig) -> tuple[list[Any], list[tuple[str, int, str]]]:
    """Outputs of the views [B, px, px, 3], and the inputs to feed: (name, view, field of ViewParameters)."""
    from nvidia.dali import fn, types

    inputs: list[tuple[str, int, str]] = []

    def parameter(view: int, field: str) -> Any:
        inputs.append((f"{field}_{view}", view, field))
        kind = (
            types.DALIDataType.FLOAT
            if field in ("angle", "brightness", "contrast", "saturation", "hue")
            else types.DALIDataType.INT32
        )
        return fn.external_source(name=f"{field}_{view}", dtype=kind, ndim=1 if field in ("anchor", "shape") else 0)

    encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
    device = "mixed" if settings.mixed else "cpu"
    whole = fn.decoders.image(encoded, device=device) if settings.views > 1 else None
    outputs = []
    for view in range(settings.views):
        anchor, shape = parameter(view, "anchor"), parameter(view, "shape")
        images: Any
        if whole is None:
            images = fn.decoders.image_slice(encoded, anchor, shape, axis_names="HW", device=device)
        else:
            images = fn.slice(whole, anchor, shape, axis_names="HW")
        px = settings.image.image_px
        images = fn.resize(images, size=[px, px], interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True)
        if config.rotate_deg:
            images = fn.rotate(images, angle=parameter(view, "angle"), keep_size=True)
        if config.flip_vertical:
            images = fn.flip(images, horizontal=0, vertical=parameter(view, "upside_down"))
        colours = [name for name, field in _COLOUR_FIELDS.items() if getattr(config, field)]
        if colours:
            images = fn.color_twist(images, **{name: parameter(view, name) for name in colours})
        mirror = {"mirror": parameter(view, "mirror")} if config.flip_horizontal else {}
        outputs.append(_normalise(settings.image, images, **mirror))
    return outputs, inputs


def _evaluation_graph(settings: DecoderSettings) -> Any:
    """Output [B, px, px, 3]."""
    from nvidia.dali import fn, types

    encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
    images: Any = fn.decoders.image(encoded, device="mixed" if settings.mixed else "cpu")
    px = settings.image.image_px
    images = fn.resize(
        images, resize_shorter=settings.image.short_px, interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True
    )
    return _normalise(settings.image, images, crop=(px, px))


def _normalise(settings: ImageSettings, images: Any, **options: Any) -> Any:
    """(x / 255 - mean) / std as float32, kept HWC: a permuted view of it is channels_last."""
    from nvidia.dali import fn, types

    mean, std = ([255.0 * number for number in numbers] for numbers in (settings.mean, settings.std))
    return fn.crop_mirror_normalize(
        images, mean=mean, std=std, dtype=types.DALIDataType.FLOAT, output_layout="HWC", **options
    )


_COLOUR_FIELDS = {"brightness": "brightness", "contrast": "contrast", "saturation": "saturation", "hue": "hue_deg"}


def _dot() -> np.ndarray:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


_DOT = _dot()


def _dot_parameters() -> ViewParameters:
    integers, numbers = np.zeros(1, dtype=np.int32), np.ones(1, dtype=np.float32)
    window = np.zeros((1, 2), dtype=np.int32)
    return ViewParameters(window, window + 8, integers, integers, numbers, numbers, numbers, numbers, numbers)


def _reason(data: np.ndarray) -> str | None:
    """Pillow's word on an image; DALI gives only a number."""
    try:
        prepare_image(data.tobytes())
    except DamagedImage as damage:
        return str(damage)
    return None


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "pipeline" not in line.lower()]
    return (told or lines or ["unknown reason"])[-1]
