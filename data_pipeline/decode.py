"""Decoding and augmenting by DALI: encoded bytes and parameters in, tensors out; `graph.py` says what is done.

Images come out as float32 or float16, channels_last.

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
from data_pipeline.augment import ViewParameters, draw_views
from data_pipeline.config import AugmentConfig
from data_pipeline.graph import ImageSettings, evaluation_graph, graph_inputs, has_conditions, training_graph
from data_pipeline.images import MAX_PIXELS, DamagedImage, prepare_image

QUEUE_DEPTH = 2
"""Batches in DALI's hands: one is decoded while the next waits, so that its threads never idle."""


class DecodeError(Exception):
    """DALI could not decode some image of a batch; it does not say which."""


@dataclass(frozen=True)
class DecoderSettings:
    """How a `Decoder` works.

    `augment` None means the evaluation graph, else the training graph with `views` views. `dtype` is that of the
    images, float32 or float16.
    """

    image: ImageSettings
    batch_size: int
    device: torch.device
    threads: int = 2
    decode: Literal["auto", "cpu", "mixed"] = "auto"
    augment: AugmentConfig | None = None
    views: int = 1
    dtype: torch.dtype = torch.float32

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
        self._pending = 0

    def submit(self, encoded: Sequence[np.ndarray], views: Sequence[ViewParameters] = ()) -> None:
        """Start decoding a batch; returns at once.

        Args:
            encoded: B uint8 arrays, each an encoded image that `can_parse` accepts; 1 <= B <= `batch_size`.
            views: V parameter sets for the training graph, none for the evaluation graph.
        """
        if self._pipeline is None:
            self._build()
        self._feed(encoded, views)
        self._pipeline.schedule_run()
        self._pending += 1

    def result(self) -> torch.Tensor:
        """The oldest submitted batch, `dtype` [V * B, 3, px, px], view-major, channels_last, on the device.

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
        images = torch.from_dlpack(outputs[0].as_tensor())
        self._pipeline.release_outputs()
        self._pending -= 1
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
        # Views beyond the first are cut from the same images: a dot is decoded in each one's place.
        self._pipeline.feed_input("encoded", [*encoded, *[_DOT] * (len(encoded) * (len(views) - 1))])
        for name, values in self._inputs(views).items():
            self._pipeline.feed_input(name, values)

    def _inputs(self, views: Sequence[ViewParameters]) -> dict[str, np.ndarray]:
        config = self.settings.augment
        return {} if config is None else graph_inputs(self.settings.image, config, views)

    def _build(self) -> None:
        dot = _dot_views(self.settings)
        self._pipeline = define_pipeline(self.settings, self._inputs(dot))
        self._pipeline.build()
        # The first `schedule_run` starts QUEUE_DEPTH runs, every later one a single run: let it have tiny batches.
        for _ in range(QUEUE_DEPTH):
            self._feed([_DOT], dot)
        self._pipeline.schedule_run()
        for _ in range(QUEUE_DEPTH):
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()


_CROPS = AugmentConfig(flip_horizontal=False, brightness=0, contrast=0, saturation=0)
"""What decides whether an image can be decoded, and no more."""


def can_parse(data: np.ndarray) -> bool:
    """Whether DALI's own parser makes out what an encoded image is, and of at most `MAX_PIXELS`; a few microseconds.

    To be asked of every image before it is submitted: DALI (2.4, CPU) fails a small batch with such an image in it, but
    a larger one crashes the process, since its threads still decode the others when it gives up.
    """
    from nvidia import nvimgcodec  # type: ignore[attr-defined]

    try:
        stream = nvimgcodec.CodeStream(data)
        return bool(stream.codec_name) and stream.width * stream.height <= MAX_PIXELS
    except RuntimeError:
        return False


def find_damaged(
    settings: DecoderSettings, encoded: Sequence[np.ndarray], views: Sequence[ViewParameters] = ()
) -> dict[int, str]:
    """Decode the images of a failed batch one by one.

    Returns:
        Number in the batch -> reason, for each image that DALI cannot decode.
    """
    decoder = Decoder(replace(settings, batch_size=1, augment=settings.augment and _CROPS))
    damaged = {}
    for number, data in enumerate(encoded):
        if not can_parse(data):
            damaged[number] = _reason(data) or "no image that DALI knows"
            continue
        decoder.submit([data], [view.select(slice(number, number + 1)) for view in views])
        try:
            decoder.result()
        except DecodeError as error:
            damaged[number] = _reason(data) or str(error)
    return damaged


def define_pipeline(settings: DecoderSettings, inputs: dict[str, np.ndarray]) -> Any:
    """The graph that `settings` ask for, to be fed with `encoded` and arrays like `inputs`."""
    from nvidia.dali import fn, pipeline_def, types

    kinds = {
        "int32": types.DALIDataType.INT32,
        "float32": types.DALIDataType.FLOAT,
        "bool": types.DALIDataType.BOOL,
    }
    image, mixed, dtype = settings.image, settings.mixed, settings.dtype
    device_id: Any = settings.device.index or 0 if mixed else None  # None: DALI's word for "no GPU"

    @pipeline_def(
        enable_conditionals=has_conditions(inputs),
        batch_size=settings.batch_size * settings.views,
        # One more than is asked for: beside operators that work on a whole batch a thread stands still (docs/log.md).
        num_threads=settings.threads + 1,
        device_id=device_id,
        seed=0,
        prefetch_queue_depth=QUEUE_DEPTH,
    )
    def graph() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
        if settings.augment is None:
            return evaluation_graph(image, encoded, mixed, dtype)
        nodes = {
            name: fn.external_source(name=name, dtype=kinds[values.dtype.name], ndim=values.ndim - 1)
            for name, values in inputs.items()
        }
        return training_graph(image, encoded, nodes, mixed, dtype)

    return graph()


_DOT_PX = 8


def _dot() -> np.ndarray:
    buffer = io.BytesIO()
    Image.new("RGB", (_DOT_PX, _DOT_PX)).save(buffer, "JPEG")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


_DOT = _dot()


def _dot_views(settings: DecoderSettings) -> list[ViewParameters]:
    if settings.augment is None:
        return []
    side = np.array([_DOT_PX])
    return draw_views(settings.augment, settings.image.image_px, (0, 0), np.zeros(1, int), settings.views, (side, side))


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
