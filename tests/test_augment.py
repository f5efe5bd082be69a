from dataclasses import fields

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import kstest

from data_pipeline.augment import Purpose, ViewParameters, draw_views, uniform_numbers
from data_pipeline.config import AugmentConfig

SIZE = 4000
EVERYTHING = AugmentConfig(
    scale_min=0.3,
    aspect_max=1.5,
    flip_vertical=True,
    rotate_deg=30,
    rand_augment="rand-m9-n3-mstd0.5-inc1",
    blur_sigma_max_px=2.0,
    brightness=0.2,
    contrast=0.3,
    hue_deg=10,
    cutout_share=0.09,
    cutout_probability=0.6,
)


def parameters(config=EVERYTHING, width=600, height=450, size=SIZE, seed=0, px=224):
    sizes = np.full(size, width), np.full(size, height)
    return draw_views(config, px, (seed, 0), np.arange(size), 1, sizes)[0]


def arrays(made: ViewParameters) -> dict[str, np.ndarray]:
    found = {field.name: getattr(made, field.name) for field in fields(made) if field.name != "rand"}
    return found | {f"rand.{field.name}": getattr(made.rand, field.name) for field in fields(made.rand)}


def test_numbers_belong_to_purpose_seed_epoch_view_and_position_alone():
    def numbers(positions, purpose=Purpose.VIEW, key=(5, 2, 1)):
        return uniform_numbers(purpose, key, positions, 20)

    whole = numbers(np.arange(1000, 1256))
    np.testing.assert_array_equal(numbers(np.array([1003])), whole[3:4])
    np.testing.assert_array_equal(numbers(np.arange(1002, 1256, 8)), whole[2::8])
    shuffled = np.random.default_rng(0).permutation(256)
    np.testing.assert_array_equal(numbers(1000 + shuffled), whole[shuffled])
    for other in [(6, 2, 1), (5, 3, 1), (5, 2, 0)]:
        assert (numbers(np.arange(1000, 1256), key=other) != whole).all()
    assert (numbers(np.arange(1000, 1256), Purpose.MIX) != whole).all()


def test_numbers_are_uniform_and_positions_unrelated():
    numbers = uniform_numbers(Purpose.VIEW, (0, 0, 0), np.arange(SIZE), 24)
    assert numbers.shape == (SIZE, 24)
    assert kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    correlations = np.corrcoef(np.concatenate([numbers[1:], numbers[:-1]], axis=1).T)
    assert np.abs(correlations - np.eye(48)).max() < 0.08  # 5 standard errors of SIZE pairs


def test_a_sample_is_augmented_alike_in_any_batch():
    """Part of a batch, in another order, on another rank: the same position has the same parameters, in each view."""
    positions = np.arange(640, 640 + 64)
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 700, (2, 64))
    whole = draw_views(EVERYTHING, 96, (3, 1), positions, 2, tuple(sizes))
    for rows in (np.array([17]), np.arange(3, 64, 8), rng.permutation(64)):
        part = draw_views(EVERYTHING, 96, (3, 1), positions[rows], 2, tuple(sizes[:, rows]))
        for one, other in zip(part, whole, strict=True):
            for name, values in arrays(other).items():
                np.testing.assert_array_equal(arrays(one)[name], values[rows], err_msg=name)
    assert all((arrays(whole[0])[name] != arrays(whole[1])[name]).any() for name in arrays(whole[0]))


def test_selecting_images_selects_all_their_parameters():
    whole = parameters(size=20)
    for name, values in arrays(whole.select(slice(4, 9))).items():
        np.testing.assert_array_equal(values, arrays(whole)[name][4:9], err_msg=name)
    assert parameters(AugmentConfig(), size=4).select(slice(0, 2)).rand is None


def test_crops_lie_inside_and_follow_area_and_aspect():
    made = parameters()
    assert (made.anchor >= 0).all() and (made.shape >= 1).all()
    assert (made.anchor + made.shape <= [450, 600]).all()
    area = made.shape.prod(axis=1) / (450 * 600)
    aspect = made.shape[:, 1] / made.shape[:, 0]
    assert 0.29 < area.min() < 0.32 and area.max() > 0.95
    assert aspect.min() > 1 / 1.52 and aspect.max() < 1.52
    # Every place that a crop can have is as likely as any other.
    free = np.array([450, 600]) - made.shape + 1
    assert kstest(((made.anchor + 0.5) / free)[:, 0][free[:, 0] > 100], "uniform").pvalue > 1e-3
    assert kstest(((made.anchor + 0.5) / free)[:, 1][free[:, 1] > 100], "uniform").pvalue > 1e-3


def test_a_crop_that_cannot_fit_is_cut_to_the_image():
    made = parameters(AugmentConfig(scale_min=1.0, aspect_max=1.1), width=1000, height=10)
    assert (made.shape[:, 0] == 10).all()
    assert (made.shape[:, 1] < 1000).all() and (made.anchor + made.shape <= [10, 1000]).all()
    made = parameters(width=1, height=1)
    assert (made.shape == 1).all() and (made.anchor == 0).all()


def test_no_augmentation_leaves_images_whole():
    config = AugmentConfig(scale_min=1, aspect_max=1, flip_horizontal=False, brightness=0, contrast=0, saturation=0)
    made = parameters(config, width=96, height=96)
    assert (made.shape == 96).all() and (made.anchor == 0).all()
    assert not made.mirror.any() and not made.upside_down.any() and not made.angle.any() and not made.hue.any()
    assert (made.brightness == 1).all() and (made.contrast == 1).all() and (made.saturation == 1).all()
    assert made.rand is None and made.sigma_px is None and made.hole is None


def test_flips_angles_and_colours_have_their_ranges():
    made = parameters()
    for flips in (made.mirror, made.upside_down):
        assert set(flips.tolist()) == {False, True}
        assert abs(flips.mean() - 0.5) < 5 * 0.5 / np.sqrt(SIZE)
    half_widths = {
        "angle": (0, 30),
        "brightness": (1, 0.2),
        "contrast": (1, 0.3),
        "saturation": (1, 0.1),
        "hue": (0, 10),
    }
    for name, (centre, half_width) in half_widths.items():
        values = (getattr(made, name) - centre) / half_width
        assert np.abs(values).max() <= 1 + 1e-5
        assert kstest(values, "uniform", args=(-1, 2)).pvalue > 1e-3


def test_blur_has_its_share_and_range():
    sigma = parameters().sigma_px
    assert abs((sigma > 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(SIZE)
    assert kstest(sigma[sigma > 0], "uniform", args=(0.1, 1.9)).pvalue > 1e-3
    assert (parameters(AugmentConfig(blur_sigma_max_px=1, blur_probability=1)).sigma_px > 0).all()
    assert parameters(AugmentConfig(blur_sigma_max_px=1, blur_probability=0)).sigma_px is None


def test_cut_out_is_a_square_about_any_pixel_cut_at_the_border():
    hole = parameters(px=100).hole
    height, width = (hole[:, 2:] - hole[:, :2]).T
    cut = height * width > 0
    assert abs(cut.mean() - 0.6) < 5 * 0.5 / np.sqrt(SIZE)
    assert (hole >= 0).all() and (hole <= 100).all() and not hole[~cut].any()
    top, left, bottom, right = hole[cut].T
    inside = (top > 0) & (left > 0) & (bottom < 100) & (right < 100)
    assert 0.4 < inside.mean() < 0.6  # 70 % of the centres along each axis
    assert (height[cut][inside] == 30).all() and (width[cut][inside] == 30).all()  # 9 % of the area
    assert kstest((top[inside] + 14.5) / 100, "uniform", args=(0.15, 0.7)).pvalue > 1e-3
    # Each pixel of a row is as likely to be cut as its mirror image, and the middle is cut in 30 % of the rows.
    covered = ((top[:, None] <= np.arange(100)) & (np.arange(100) < bottom[:, None])).mean(axis=0)
    assert np.abs(covered - covered[::-1]).max() < 0.05 and abs(covered[30:70].mean() - 0.3) < 0.02


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blur_sigma_max_px": 0.05}, r"blur_sigma_max_px = 0.05 is less than blur_sigma_min_px = 0.1; raise the one"),
        ({"rand_augment": "rnd-m9"}, r"'rnd-m9' must begin with 'rand', e.g. rand-m9-n2"),
        ({"cutout_share": 1.0}, "Input should be less than 1"),
    ],
)
def test_wrong_settings_are_told(values, message):
    with pytest.raises(ValidationError, match=message):
        AugmentConfig(**values)
