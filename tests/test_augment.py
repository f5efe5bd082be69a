import numpy as np
from scipy.stats import kstest

from data_pipeline.augment import uniform_numbers, view_parameters
from data_pipeline.config import AugmentConfig

SIZE = 4000
EVERYTHING = AugmentConfig(
    scale_min=0.3, aspect_max=1.5, flip_vertical=True, rotate_deg=30, brightness=0.2, contrast=0.3, hue_deg=10
)


def parameters(config=EVERYTHING, width=600, height=450, size=SIZE, seed=0):
    numbers = uniform_numbers(seed, 0, 0, np.arange(size))
    return view_parameters(config, numbers, np.full(size, width), np.full(size, height))


def test_numbers_belong_to_seed_epoch_view_and_position_alone():
    whole = uniform_numbers(5, 2, 1, np.arange(1000, 1256))
    np.testing.assert_array_equal(uniform_numbers(5, 2, 1, np.array([1003])), whole[3:4])
    np.testing.assert_array_equal(uniform_numbers(5, 2, 1, np.arange(1002, 1256, 8)), whole[2::8])
    shuffled = np.random.default_rng(0).permutation(256)
    np.testing.assert_array_equal(uniform_numbers(5, 2, 1, 1000 + shuffled), whole[shuffled])
    for other in [(6, 2, 1), (5, 3, 1), (5, 2, 0)]:
        assert (uniform_numbers(*other, np.arange(1000, 1256)) != whole).all()


def test_numbers_are_uniform_and_positions_unrelated():
    numbers = uniform_numbers(0, 0, 0, np.arange(SIZE))
    assert numbers.shape == (SIZE, 20)
    assert kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    correlations = np.corrcoef(np.concatenate([numbers[1:], numbers[:-1]], axis=1).T)
    assert np.abs(correlations - np.eye(40)).max() < 0.08  # 5 standard errors of SIZE pairs


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


def test_flips_angles_and_colours_have_their_ranges():
    made = parameters()
    for flips in (made.mirror, made.upside_down):
        assert set(flips.tolist()) == {0, 1}
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
