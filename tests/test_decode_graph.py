"""The training and evaluation graphs, operator by operator, against Pillow or numpy in float64.

Where a picture comes in as PNG of the network's side, and its crop is the whole of it, the operator under test is all
that happens to it, and tolerances are those of rounding to 8 bits. JPEGs of other sizes are decoded by libjpeg and
resized with a triangle filter on both sides, but Pillow rounds to 8 bits between its two passes and DALI's fused crop
may start chroma upsampling at the window: a mean difference below one grey level of 255.
"""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import gaussian_filter

from data_pipeline.config import AugmentConfig
from data_pipeline.decode import define_pipeline
from data_pipeline.graph import graph_inputs
from tests.pictures import (
    CROP,
    IMAGE,
    JPEG_SIZES,
    JPEGS,
    PX,
    WHOLE,
    augmented,
    decode,
    draw,
    grey_levels,
    png,
    settings,
    squares,
)

PICTURES = squares(12)


def with_(config, **values):
    return config.model_copy(update=values)


def assert_mean_level(images, expected, levels=1.0):
    """Grey levels [B, px, px, 3] against Pillow images."""
    for image, other in zip(images, expected, strict=True):
        assert np.abs(image - np.asarray(other, dtype=np.float64)).mean() < levels


def pil_crops(made, px=PX):
    for data, (top, left), (height, width) in zip(JPEGS, made.anchor, made.shape, strict=True):
        image = Image.open(io.BytesIO(data.tobytes()))
        crop = image.crop((left, top, left + width, top + height))
        yield crop.resize((px, px), Image.Resampling.BILINEAR)


def test_crop_resize_and_normalise():
    made = draw(CROP, JPEG_SIZES)
    images = decode(settings(CROP), JPEGS, made)
    assert images.shape == (len(JPEGS), 3, PX, PX) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert_mean_level(grey_levels(images), pil_crops(made))


def test_flips():
    config = with_(CROP, flip_horizontal=True, flip_vertical=True)
    made = draw(config, JPEG_SIZES)
    assert len({(a, b) for a, b in zip(made.mirror.tolist(), made.upside_down.tolist(), strict=True)}) >= 3
    expected = []
    for crop, mirror, upside_down in zip(pil_crops(made), made.mirror, made.upside_down, strict=True):
        mirrored = ImageOps.mirror(crop) if mirror else crop
        expected.append(ImageOps.flip(mirrored) if upside_down else mirrored)
    assert_mean_level(grey_levels(decode(settings(config), JPEGS, made)), expected)


@pytest.mark.parametrize(("mirror", "upside_down"), [(True, False), (False, True), (True, True)])
def test_flips_change_no_pixel(mirror, upside_down):
    config = with_(WHOLE, flip_horizontal=True, flip_vertical=True)
    made = draw(config, [(PX, PX)] * 12)
    every = np.ones(12, dtype=bool)
    flipped = augmented(PICTURES, config, replace(made, mirror=every & mirror, upside_down=every & upside_down))
    turned = [picture[:: -1 if upside_down else 1, :: -1 if mirror else 1] for picture in PICTURES]
    np.testing.assert_allclose(flipped, np.stack(turned), atol=1e-3)


def test_a_picture_without_augmentation_comes_out_as_it_was():
    np.testing.assert_allclose(augmented(PICTURES, WHOLE), np.stack(PICTURES), atol=1e-3)


def test_rotation_turns_the_crop_and_leaves_no_black_corners():
    config = with_(WHOLE, rotate_deg=180.0)
    made = draw(config, [(PX, PX)] * 12)
    assert made.angle.min() < -90 and made.angle.max() > 90
    turned = augmented(PICTURES, config, made)
    disc = np.hypot(*(np.mgrid[:PX, :PX] - (PX - 1) / 2)) < PX / 2 - 2
    for image, picture, angle in zip(turned, PICTURES, made.angle, strict=True):
        reference = np.asarray(Image.fromarray(picture).rotate(float(angle), Image.Resampling.BILINEAR), dtype=float)
        assert np.abs(image - reference)[disc].max() <= 1.01
        assert (image.min(axis=(0, 1)) >= picture.min(axis=(0, 1)) - 1.0).all()
        assert (image.max(axis=(0, 1)) <= picture.max(axis=(0, 1)) + 1.0).all()


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_blur(probability):
    """DALI rounds to 8 bits between rows and columns and cuts the Gaussian off: one grey level."""
    config = with_(WHOLE, blur_sigma_max_px=2.0, blur_probability=probability)
    made = draw(config, [(PX, PX)] * 12)
    blurred = made.sigma_px > 0
    assert blurred.any() and (blurred.all() == (probability == 1))
    for image, picture, sigma in zip(augmented(PICTURES, config, made), PICTURES, made.sigma_px, strict=True):
        if sigma == 0:
            np.testing.assert_allclose(image, picture, atol=1e-3)
        else:
            reference = gaussian_filter(picture.astype(float), (sigma, sigma, 0), mode="mirror", truncate=8)
            assert np.abs(image - reference).max() <= 1.2


def test_a_blur_wider_than_the_picture_stays_within_its_range():
    config = with_(WHOLE, blur_sigma_min_px=16.0, blur_sigma_max_px=16.0, blur_probability=1.0)
    (image,) = augmented(squares(1, px=8), config)
    picture = squares(1, px=8)[0]
    assert (image.min(axis=(0, 1)) >= picture.min(axis=(0, 1)) - 1.0).all()
    assert np.abs(image.mean(axis=(0, 1)) - picture.mean(axis=(0, 1))).max() < 12
    assert image.std(axis=(0, 1)).max() < 2


def test_brightness():
    """As Pillow where it does not cut off at white."""
    config = with_(WHOLE, brightness=0.3)
    made = draw(config, [(PX, PX)] * 12)
    for image, picture, factor in zip(augmented(PICTURES, config, made), PICTURES, made.brightness, strict=True):
        np.testing.assert_allclose(image, picture * float(factor), atol=1e-3)
        enhanced = np.asarray(ImageEnhance.Brightness(Image.fromarray(picture)).enhance(float(factor)), dtype=float)
        assert np.abs(np.minimum(image, 255) - enhanced).max() <= 1.001


def test_brightness_and_contrast():
    """Contrast is taken about mid-grey (Pillow: about the picture's mean), before brightness."""
    config = with_(WHOLE, contrast=0.9, brightness=0.9)
    made = draw(config, [(PX, PX)] * 12)
    for image, picture, contrast, brightness in zip(
        augmented(PICTURES, config, made), PICTURES, made.contrast, made.brightness, strict=True
    ):
        expected = float(brightness) * (128 + float(contrast) * (picture.astype(float) - 128))
        np.testing.assert_allclose(image, expected, atol=0.01)


def test_saturation():
    """As Pillow, which rounds and cuts off; grey is rounded here too, before it is weighed."""
    config = with_(WHOLE, saturation=0.9)
    made = draw(config, [(PX, PX)] * 12)
    assert made.saturation.min() < 0.5 and made.saturation.max() > 1.5
    for image, picture, factor in zip(augmented(PICTURES, config, made), PICTURES, made.saturation, strict=True):
        grey = np.asarray(Image.fromarray(picture).convert("L"), dtype=float)[..., None]
        np.testing.assert_allclose(image, grey + float(factor) * (picture - grey), atol=1.0)
        enhanced = np.asarray(ImageEnhance.Color(Image.fromarray(picture)).enhance(float(factor)), dtype=float)
        assert np.abs(np.clip(image, 0, 255) - enhanced).max() <= 2.001


def test_hue_and_saturation_turn_and_stretch_the_chroma_and_keep_luma():
    config = with_(WHOLE, hue_deg=180.0, saturation=0.5)
    made = draw(config, [(PX, PX)] * 12)
    luma = np.array([0.299, 0.587, 0.114])
    i_axis, q_axis = np.array([0.595716, -0.274453, -0.321263]), np.array([0.211456, -0.522591, 0.311135])
    for image, picture, angle, stretch in zip(
        augmented(PICTURES, config, made), PICTURES, made.hue, made.saturation, strict=True
    ):
        np.testing.assert_allclose(image @ luma, picture @ luma, atol=0.01)
        before = (picture @ i_axis) + 1j * (picture @ q_axis)
        after = (image @ i_axis) + 1j * (image @ q_axis)
        np.testing.assert_allclose(after, before * float(stretch) * np.exp(-1j * np.radians(float(angle))), atol=0.02)
    grey = np.full((PX, PX, 3), 90, dtype=np.uint8)
    np.testing.assert_allclose(augmented([grey] * 12, config, made), 90, atol=0.01)


def test_colours_are_not_cut_off_at_black_and_white():
    white = [np.full((PX, PX, 3), 255, dtype=np.uint8)] * 2
    config = with_(WHOLE, brightness=0.5)
    made = replace(draw(config, [(PX, PX)] * 2), brightness=np.array([1.25, 0.5], dtype=np.float32))
    np.testing.assert_allclose(augmented(white, config, made)[:, 0, 0, 0], [1.25 * 255, 0.5 * 255], atol=1e-3)


def test_cut_out_is_filled_with_the_mean_of_the_dataset():
    config = with_(WHOLE, cutout_share=0.1, cutout_probability=0.7, brightness=0.5)
    made = draw(config, [(PX, PX)] * 12)
    images = decode(settings(config), [png(picture) for picture in PICTURES], made)
    without = replace(made, hole=None)
    plain = decode(settings(with_(config, cutout_share=0.0)), [png(picture) for picture in PICTURES], without)
    expected = plain.clone()
    for image, (top, left, bottom, right) in zip(expected, made.hole, strict=True):
        image[:, top:bottom, left:right] = 0
    assert torch.equal(images, expected)
    cut = (images == 0).all(dim=1).flatten(1).any(dim=1).numpy()
    assert (cut == (made.hole[:, 2] > 0)).all() and 0 < cut.sum() < 12


def test_two_views_from_one_decoding_are_two_single_views():
    config = AugmentConfig(rotate_deg=10, flip_vertical=True, hue_deg=5, blur_sigma_max_px=1, cutout_share=0.1)
    first, second = (draw(config, JPEG_SIZES, view) for view in range(2))
    both = decode(settings(config, views=2), JPEGS, first, second)
    assert both.shape == (2 * len(JPEGS), 3, PX, PX) and both.is_contiguous(memory_format=torch.channels_last)
    assert (both[: len(JPEGS)] - both[len(JPEGS) :]).abs().mean() > 0.1
    singles = torch.cat([decode(settings(config), JPEGS, made) for made in (first, second)])
    # The whole image and the crop window are decoded with other chroma at the window's border.
    assert np.abs(grey_levels(both) - grey_levels(singles)).mean() < 1
    lossless = [png(np.asarray(Image.open(io.BytesIO(data.tobytes())))) for data in JPEGS]
    both = decode(settings(config, views=2), lossless, first, second)
    assert torch.equal(both, torch.cat([decode(settings(config), lossless, made) for made in (first, second)]))


def test_evaluation_is_short_side_and_centre_crop():
    expected = []
    for data in JPEGS:
        image = Image.open(io.BytesIO(data.tobytes()))
        width, height = (int(side * 36 / min(image.size) + 0.5) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - 31) // 2, (height - 31) // 2  # half a pixel goes to the right
        expected.append(image.crop((left, top, left + 32, top + 32)))
    assert_mean_level(grey_levels(decode(settings(), JPEGS)), expected)


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


@pytest.mark.parametrize("augment", [None, AugmentConfig(rand_augment="rand-m9-n2", blur_sigma_max_px=1, hue_deg=9)])
def test_images_of_one_pixel(augment):
    pixel = png(np.array([[[200, 100, 50]]], dtype=np.uint8))
    tall = png(np.full((40, 1, 3), (200, 100, 50), dtype=np.uint8))
    views = [draw(augment, [(1, 1), (1, 40)])] if augment else []
    images = decode(settings(augment), [pixel, tall], *views)
    assert images.shape == (2, 3, PX, PX) and images.isfinite().all()
    flat = decode(settings(WHOLE), [pixel, tall], draw(WHOLE, [(1, 1), (1, 40)]))
    assert np.abs(grey_levels(flat) - [200, 100, 50]).max() < 0.51


def test_a_crop_as_large_as_the_image():
    made = draw(CROP, JPEG_SIZES)
    whole = np.array(JPEG_SIZES, dtype=np.int32)[:, ::-1]
    made = replace(made, anchor=np.zeros_like(made.anchor), shape=np.ascontiguousarray(whole))
    assert_mean_level(grey_levels(decode(settings(CROP), JPEGS, made)), pil_crops(made))


def test_half_precision():
    config = AugmentConfig(cutout_share=0.2, cutout_probability=1, saturation=0.2)
    made = draw(config, JPEG_SIZES)
    single = decode(settings(config), JPEGS, made)
    half = decode(settings(config, dtype=torch.float16), JPEGS, made)
    assert half.dtype == torch.float16 and half.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(half.float(), single, rtol=1e-3, atol=1e-3)
    assert decode(settings(dtype=torch.float16), JPEGS).dtype == torch.float16


def test_only_what_has_an_effect_is_in_the_graph():
    made = draw(AugmentConfig(), [(PX, PX)])
    assert set(graph_inputs(IMAGE, WHOLE, [made])) == {"anchor", "shape", "size"}
    assert set(graph_inputs(IMAGE, AugmentConfig(), [made])) == {"anchor", "shape", "size", "saturation", "mean", "std"}


@pytest.mark.parametrize("hue", [0.0, 10.0])
@pytest.mark.parametrize("views", [1, 2])
def test_the_same_graph_is_one_for_a_gpu(hue, views):
    """Defined for a device that need not be here: DALI has each operator for it, and images never leave it."""
    from nvidia.dali import backend

    known = {
        "cpu": set(backend.RegisteredCPUOps()),
        "gpu": set(backend.RegisteredGPUOps()),
        "mixed": set(backend.RegisteredMixedOps()),
    }
    config = AugmentConfig(
        flip_vertical=True, rotate_deg=9, rand_augment="rand-m9-n2", blur_sigma_max_px=2, hue_deg=hue, cutout_share=0.1
    )
    for augment in (config, None):
        made = settings(augment, views=views, device=torch.device("cuda:0"))
        inputs = graph_inputs(IMAGE, config, [draw(config, [(PX, PX)], view) for view in range(views)])
        pipeline = define_pipeline(made, inputs if augment else {})
        pipeline._build_graph()
        operators = [instance._op for instance in pipeline._ops]
        found = {(getattr(op, "schema_name", type(op).__name__), op._device) for op in operators}
        assert [name for name, device in found if name not in known[device]] == []
        decoders = {name for name, device in found if device == "mixed"}
        assert decoders == {"decoders__Image" if views == 2 or not augment else "decoders__ImageSlice"}
        assert sum(op._device == "mixed" for op in operators) == 1  # several views come from one decoding
        on_cpu = {name for name, device in found if device == "cpu"}
        numbers = {"ExternalSource", "Constant", "Cast", "Reshape", "_ArithmeticGenericOp", "_conditional__Split"}
        assert on_cpu <= numbers
        assert all(output.device == "gpu" for output in pipeline._graph_outputs)
