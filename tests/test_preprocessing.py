"""What an exported model does to pixels, against DALI, which does it in training and in `predict`."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.graph import ImageSettings
from data_pipeline.passes import decode_files
from data_pipeline.preprocessing import Preprocessing

SIZES = [(100, 100), (450, 600), (517, 333), (37, 64), (20, 31), (64, 64), (300, 301), (1, 40), (40, 1), (1, 1)]


def picture(height, width):
    draw = np.random.default_rng(height * 1000 + width)
    coarse = draw.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def dali(pixels, settings):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    (batch,) = decode_files([file.getvalue()], settings, batch_size=1)
    return batch.images


@pytest.mark.parametrize("px, ratio", [(32, 1.143), (33, 1.0), (48, 1.0), (56, 1.3)])
def test_pixels_come_out_as_dali_makes_them(px, ratio):
    settings = ImageSettings(px, ratio, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    for size in SIZES:
        pixels, module = picture(*size), Preprocessing(settings)
        images = torch.from_numpy(pixels)[None]
        ours = module(images)
        levels = 255 * torch.tensor(settings.std).view(3, 1, 1) * (ours - dali(pixels, settings)).abs()
        assert ours.shape == (1, 3, px, px) and ours.dtype == torch.float32
        assert levels.max() < 1.01
        is_tie = (module.resized(images) % 1 - 0.5).abs() < 1e-3  # which rounding errors decide
        assert not ((levels > 0.01) & ~is_tie).any(), size


def test_images_of_a_batch_are_each_for_themselves():
    module = Preprocessing(ImageSettings(32, 1.143, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    images = torch.from_numpy(np.stack([picture(90, 70), picture(90, 70)[::-1]]))
    together, alone = module(images), torch.cat([module(image[None]) for image in images])
    torch.testing.assert_close(together, alone)
    assert not torch.equal(*together)


def test_it_holds_no_weights():
    module = Preprocessing(ImageSettings(32, 1.143, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    assert list(module.parameters()) == [] and sorted(module.state_dict()) == ["mean", "std"]
