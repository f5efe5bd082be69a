"""Encoded pictures, their augmentation and decoding, for the tests that hold DALI against Pillow and numpy."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from data_pipeline.augment import ViewParameters, draw_views
from data_pipeline.config import AugmentConfig
from data_pipeline.decode import Decoder, DecoderSettings, ImageSettings
from tests.packed import drawn_jpeg

PX = 32
IMAGE = ImageSettings(image_px=PX, resize_ratio=1.143, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
CROP = AugmentConfig(flip_horizontal=False, brightness=0, contrast=0, saturation=0)
"""Random crops and nothing else."""
WHOLE = CROP.model_copy(update={"scale_min": 1.0, "aspect_max": 1.0})
"""Nothing at all, for square images."""
JPEG_SIZES = [(96, 72), (64, 64), (50, 81), (40, 40), (120, 90), (33, 70)]
JPEGS = [np.frombuffer(drawn_jpeg(seed, *size), dtype=np.uint8) for seed, size in enumerate(JPEG_SIZES)]


def png(pixels: np.ndarray) -> np.ndarray:
    """Encode uint8 [H, W, 3] or [H, W] without loss."""
    return encoded(Image.fromarray(pixels), "PNG")


def encoded(image: Image.Image, kind: str, **options: object) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def squares(count: int, px: int = PX) -> list[np.ndarray]:
    """Colourful pictures, uint8 [px, px, 3], smooth with a little noise; their ranges differ."""
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((px, px), Image.Resampling.BICUBIC), dtype=float)
        low, high = rng.uniform(0, 60), rng.uniform(180, 255)
        noisy = low + (high - low) * smooth / 255 + rng.normal(0, 4, smooth.shape)
        made.append(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
    return made


def draw(config: AugmentConfig, sizes: list[tuple[int, int]], view: int = 0, px: int = PX) -> ViewParameters:
    """Parameters of images of these (width, height), at positions 0, 1, ..."""
    widths, heights = np.array(sizes).T
    return draw_views(config, px, (0, 0), np.arange(len(sizes)), view + 1, (widths, heights))[view]


def settings(augment: AugmentConfig | None = None, batch_size: int = 64, **options: object) -> DecoderSettings:
    made = DecoderSettings(IMAGE, batch_size, torch.device("cpu"), augment=augment)
    return replace(made, **options)


def decode(made: DecoderSettings, images: list[np.ndarray], *views: ViewParameters) -> torch.Tensor:
    decoder = Decoder(made)
    decoder.submit(images, views)
    return decoder.result()


def grey_levels(images: torch.Tensor, image: ImageSettings = IMAGE) -> np.ndarray:
    """Normalised [B, 3, px, px] -> float64 [B, px, px, 3] in units of 0..255."""
    pixels = images.permute(0, 2, 3, 1).double().numpy()
    return 255 * (pixels * np.array(image.std) + np.array(image.mean))


def augmented(pictures: list[np.ndarray], config: AugmentConfig, made: ViewParameters | None = None) -> np.ndarray:
    """Square pictures through the training graph without loss on the way in: float64 [B, px, px, 3], 0..255."""
    px = len(pictures[0])
    made = made or draw(config, [(px, px)] * len(pictures), px=px)
    image = replace(IMAGE, image_px=px)
    made_of = settings(config, batch_size=len(pictures), image=image)
    return grey_levels(decode(made_of, [png(picture) for picture in pictures], made), image)
