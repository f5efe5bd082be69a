"""DALI against Pillow.

Tolerance: both decode by libjpeg and resize with a triangle filter, but Pillow rounds to 8 bits between its two passes
and DALI's fused crop may start chroma upsampling at the window: a mean difference below one grey level of 255.
"""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from cluster.errors import UserError
from data_pipeline.augment import uniform_numbers, view_parameters
from data_pipeline.config import AugmentConfig
from data_pipeline.decode import DecodeError, Decoder, DecoderSettings, ImageSettings, find_damaged
from tests.packed import drawn_jpeg

CPU = torch.device("cpu")
IMAGE = ImageSettings(image_px=32, resize_ratio=1.143, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
PLAIN = AugmentConfig(flip_horizontal=False, brightness=0, contrast=0, saturation=0)
SIZES = [(96, 72), (64, 64), (50, 81), (40, 40), (120, 90), (33, 70)]
ENCODED = [np.frombuffer(drawn_jpeg(seed, *size), dtype=np.uint8) for seed, size in enumerate(SIZES)]
ONE_LEVEL = 1 / 255


def settings(augment=None, views=1, batch_size=6):
    return DecoderSettings(IMAGE, batch_size, CPU, augment=augment, views=views)


def parameters(augment, view=0):
    numbers = uniform_numbers(0, 0, view, np.arange(len(SIZES)))
    return view_parameters(augment, numbers, *np.array(SIZES).T)


def decode(config, *views):
    decoder = Decoder(config)
    decoder.submit(ENCODED, views)
    return decoder.result()


def assert_like(images, expected, levels=1.0):
    """Images [B, 3, px, px] against Pillow images, in units of 0..1."""
    mean, std = (np.array(numbers)[:, None, None] for numbers in (IMAGE.mean, IMAGE.std))
    for image, other in zip(images.numpy(), expected, strict=True):
        reference = np.asarray(other, dtype=np.float64).transpose(2, 0, 1) / 255
        assert np.abs(image * std + mean - reference).mean() < levels * ONE_LEVEL


def pil_crops(made):
    for data, (top, left), (height, width) in zip(ENCODED, made.anchor, made.shape, strict=True):
        image = Image.open(io.BytesIO(data.tobytes()))
        crop = image.crop((left, top, left + width, top + height))
        yield crop.resize((32, 32), Image.Resampling.BILINEAR)


def test_crop_resize_and_normalise():
    made = parameters(PLAIN)
    images = decode(settings(PLAIN), made)
    assert images.shape == (len(SIZES), 3, 32, 32) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert_like(images, pil_crops(made))


def test_flips():
    augment = PLAIN.model_copy(update={"flip_horizontal": True, "flip_vertical": True})
    made = parameters(augment)
    assert 0 < made.mirror.sum() < len(SIZES) and 0 < made.upside_down.sum() < len(SIZES)
    expected = []
    for crop, mirror, upside_down in zip(pil_crops(made), made.mirror, made.upside_down, strict=True):
        mirrored = ImageOps.mirror(crop) if mirror else crop
        expected.append(ImageOps.flip(mirrored) if upside_down else mirrored)
    assert_like(decode(settings(augment), made), expected)


def test_rotation_turns_the_crop_and_leaves_no_black_corners():
    augment = PLAIN.model_copy(update={"rotate_deg": 180.0})
    made = parameters(augment)
    images = decode(settings(augment), made)
    upright = decode(settings(PLAIN), made)
    disc = torch.from_numpy(np.hypot(*(np.mgrid[:32, :32] - 15.5)) < 14)
    for image, plain, angle in zip(images, upright, made.angle, strict=True):
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (IMAGE.mean, IMAGE.std))
        pixels = ((plain * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()
        turned = Image.fromarray(pixels).rotate(float(angle), Image.Resampling.BILINEAR)
        reference = torch.from_numpy(np.array(turned)).permute(2, 0, 1) / 255
        assert (image * std + mean - reference)[:, disc].abs().mean() < ONE_LEVEL
        inside = plain.amin(dim=(1, 2)) - 0.05, plain.amax(dim=(1, 2)) + 0.05
        assert (image.amin(dim=(1, 2)) > inside[0]).all() and (image.amax(dim=(1, 2)) < inside[1]).all()


def test_brightness_and_contrast():
    """DALI takes the contrast about mid-grey (128), Pillow about the image's mean: plain arithmetic instead."""
    augment = PLAIN.model_copy(update={"brightness": 0.3})
    made = parameters(augment)
    expected = [
        ImageEnhance.Brightness(crop).enhance(float(factor))
        for crop, factor in zip(pil_crops(made), made.brightness, strict=True)
    ]
    assert_like(decode(settings(augment), made), expected)
    augment = PLAIN.model_copy(update={"contrast": 0.3})
    made = parameters(augment)
    expected = [
        np.clip((np.asarray(crop, dtype=float) - 128) * factor + 128, 0, 255)
        for crop, factor in zip(pil_crops(made), made.contrast, strict=True)
    ]
    assert_like(decode(settings(augment), made), expected)


def test_saturation_and_hue_change_colours_and_leave_greys():
    augment = PLAIN.model_copy(update={"saturation": 0.9, "hue_deg": 180.0})
    made = parameters(augment)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (IMAGE.mean, IMAGE.std))
    before, after = (decode(settings(config), made) * std + mean for config in (PLAIN, augment))
    assert (before - after).abs().mean() > 5 * ONE_LEVEL
    grey = np.full((40, 40, 3), 90, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    decoder = Decoder(settings(augment))
    part = made.select(slice(0, 4))
    part = replace(part, anchor=np.zeros_like(part.anchor), shape=np.full_like(part.shape, 40))
    decoder.submit([np.frombuffer(buffer.getvalue(), dtype=np.uint8)] * 4, [part])
    assert ((decoder.result() * std + mean) * 255 - 90).abs().max() < 2


def test_two_views_from_one_decoding_are_two_single_views():
    augment = AugmentConfig(rotate_deg=10, flip_vertical=True, hue_deg=5)
    first, second = parameters(augment, 0), parameters(augment, 1)
    both = decode(settings(augment, views=2), first, second)
    assert both.shape == (2 * len(SIZES), 3, 32, 32) and both.is_contiguous(memory_format=torch.channels_last)
    assert (both[: len(SIZES)] - both[len(SIZES) :]).abs().mean() > 0.1
    assert torch.equal(both, decode(settings(augment, views=2), first, second))
    singles = torch.cat([decode(settings(augment), first), decode(settings(augment), second)])
    # The whole image and the crop window are decoded with other chroma at the window's border.
    assert (both - singles).abs().mean() * 0.25 < ONE_LEVEL


def test_evaluation_is_short_side_and_centre_crop():
    expected = []
    for data in ENCODED:
        image = Image.open(io.BytesIO(data.tobytes()))
        width, height = (int(side * 36 / min(image.size) + 0.5) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - 31) // 2, (height - 31) // 2  # half a pixel goes to the right
        expected.append(image.crop((left, top, left + 32, top + 32)))
    assert_like(decode(settings()), expected)


def test_evaluation_crop_is_centred():
    sides = {
        (px, ratio): replace(IMAGE, image_px=px, resize_ratio=ratio).short_px
        for px in (33, 128, 224)
        for ratio in (1.0, 1.143)
    }
    assert sides == {
        (33, 1.0): 33,
        (33, 1.143): 37,
        (128, 1.0): 128,
        (128, 1.143): 146,
        (224, 1.0): 224,
        (224, 1.143): 256,
    }


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_pixel_formats_come_out_as_rgb(mode):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(ENCODED[1].tobytes())).convert(mode).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    decoder = Decoder(settings())
    decoder.submit([np.frombuffer(buffer.getvalue(), dtype=np.uint8)])
    assert decoder.result().shape == (1, 3, 32, 32)


def test_results_come_in_order_and_keep_their_memory():
    decoder = Decoder(settings(batch_size=4))
    for number in range(2):
        decoder.submit(ENCODED[number : number + 1 + number])
    results = []
    for number in range(2, 12):
        results.append(decoder.result())
        decoder.submit(ENCODED[number % 5 : number % 5 + 1])
    copies = [result.clone() for result in results]
    results += [decoder.result(), decoder.result()]
    assert [len(result) for result in results] == [1, 2] + [1] * 10
    expected = decode(settings())
    for number, result in enumerate(results):
        torch.testing.assert_close(result[0], expected[number if number < 2 else number % 5], rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(copies, results, strict=False))


def test_a_damaged_image_is_found_and_the_decoder_goes_on():
    broken = [*ENCODED]
    broken[1], broken[4] = np.zeros(500, dtype=np.uint8), ENCODED[4][:40]
    decoder = Decoder(settings())
    decoder.submit(broken)
    decoder.submit(ENCODED)
    with pytest.raises(DecodeError):
        decoder.result()
    found = find_damaged(settings(), broken)
    assert sorted(found) == [1, 4]
    assert "no image format that is known" in found[1]
    decoder.submit(ENCODED)
    assert torch.equal(decoder.result(), decode(settings()))
    made = parameters(AugmentConfig())
    assert sorted(find_damaged(settings(AugmentConfig()), broken, [made])) == [1, 4]


def test_decoding_on_a_gpu_needs_one():
    with pytest.raises(UserError, match=r"data\.decode = mixed needs a GPU, .* set data\.decode=auto"):
        Decoder(replace(settings(), decode="mixed")).submit(ENCODED)
    assert replace(settings(), device=torch.device("cuda:1")).mixed
    assert not replace(settings(), device=torch.device("cuda"), decode="cpu").mixed
