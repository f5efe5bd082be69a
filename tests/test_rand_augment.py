"""RandAugment against timm: which operations with which arguments, and what each does to an image."""

import re

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare, kstest
from timm.data import auto_augment as timm_augment

from data_pipeline.config import AugmentConfig
from data_pipeline.rand_augment import OPERATIONS, RandParameters, parse_policy, rand_parameters
from tests.pictures import IMAGE, WHOLE, augmented, draw, squares

PX = 48
PICTURES = squares(10, PX)
FILL = tuple(round(255 * number) for number in IMAGE.mean)
WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
STRENGTHS = {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45 * PX, "TranslateYRel": 0.45 * PX}
LEVELS = {
    "AutoContrast": (0.6, 1.001),
    "Equalize": (2.0, 6.001),
    "Invert": (0.001, 0.001),
    "Posterize": (0.001, 0.001),
    "Solarize": (0.001, 0.001),
    "SolarizeAdd": (0.001, 0.001),
    "Color": (0.7, 2.001),
    "Contrast": (0.8, 2.001),
    "Brightness": (0.6, 1.001),
    "Sharpness": (0.6, 1.001),
}
"""Mean and largest difference from Pillow, in grey levels; what they come from is told in `rand_augment.py`."""


def numbers(size, seed=0):
    return np.random.default_rng(seed).random((size, 20))


def one(name, policy="rand-m9-n1-p1", size=10):
    """Parameters of one layer that does this operation to every image, with drawn signs and magnitudes."""
    drawn = numbers(size)
    drawn[:, 0] = (OPERATIONS.index(name) + 0.5) / len(OPERATIONS)
    return rand_parameters(parse_policy(policy), drawn, PX)


def applied(made: RandParameters, pictures=PICTURES):
    layers = made.operation.shape[1]
    config = WHOLE.model_copy(update={"rand_augment": f"rand-n{layers}"})
    drawn = draw(config, [(PX, PX)] * len(pictures), px=PX)
    return augmented(pictures, config, type(drawn)(**{**vars(drawn), "rand": made}))


def timm_level(name, magnitude, increasing):
    """The argument of an operation in timm, for a sign that is drawn as +."""
    known = timm_augment.LEVEL_TO_ARG
    function = known.get(f"{name}Increasing", known[name]) if increasing else known[name]
    return None if function is None else function(magnitude, {})[0]


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("magnitude", range(11))
def test_arguments_are_those_of_timm(monkeypatch, magnitude, increasing):
    for sign, kept in ((0.1, 1), (0.9, -1)):
        monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value, kept=kept: value * kept)
        for name in OPERATIONS:
            drawn = np.full((1, 20), 0.2)
            drawn[:, 0], drawn[:, 2] = (OPERATIONS.index(name) + 0.5) / len(OPERATIONS), sign
            policy = parse_policy(f"rand-m{magnitude}-n1-p1-inc{int(increasing)}")
            made = rand_parameters(policy, drawn, PX)
            expected = timm_level(name, magnitude, increasing)
            if name == "Posterize":
                expected = max(expected, 1)  # of no bits the image would be black
            if name in WARPS:
                assert strength(name, made.matrix[0, 0]) == pytest.approx(
                    expected * (PX if "Translate" in name else 1), abs=1e-4
                )
            else:
                assert made.value[0, 0] == pytest.approx(expected or 0, abs=1e-6)
                np.testing.assert_array_equal(made.matrix[0, 0], np.eye(2, 3))


def strength(name, matrix):
    """Angle, shear or shift of a warp's matrix."""
    if name == "Rotate":
        return np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0]))
    row, column = {"ShearX": (0, 1), "ShearY": (1, 0), "TranslateXRel": (0, 2), "TranslateYRel": (1, 2)}[name]
    return matrix[row, column]


def test_operations_are_those_of_timm():
    assert list(OPERATIONS) == timm_augment._RAND_TRANSFORMS


@pytest.mark.parametrize("text", ["rand-m9-n2", "rand-m7-n3-mstd0.5-inc1", "rand", "rand-p0.25-n1", "rand-m5-mstd101"])
def test_names_are_read_as_timm_reads_them(text):
    policy = parse_policy(text)
    transform = timm_augment.rand_augment_transform(text, {})
    assert transform.num_layers == policy.layers
    for operation in transform.ops:
        assert (operation.magnitude, operation.prob) == (policy.magnitude, policy.probability)
        drawn = policy.magnitude_std if policy.magnitude_std <= 100 else float("inf")
        assert operation.magnitude_std == drawn
        assert operation.name.endswith("Increasing") <= policy.increasing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnd-m9", "'rnd-m9' must begin with 'rand', e.g. rand-m9-n2"),
        ("rand-m11", "m11 in 'rand-m11' must lie in 0..10"),
        ("rand-n5", "n5 in 'rand-n5' must lie in 1..4"),
        ("rand-n0", "n0 in 'rand-n0' must lie in 1..4"),
        ("rand-p1.5", "p1.5 in 'rand-p1.5' must lie in 0..1"),
        ("rand-m9-m8", "'m8' in 'rand-m9-m8' sets m again; keep one of them"),
        ("rand-m9.5", "'m9.5' in 'rand-m9.5' must be m and its number, e.g. rand-m9-n2-p0.5-mstd0.5-inc1"),
        ("rand-ms1", "'ms1' in 'rand-ms1' is unknown; did you mean mstd? (known: m, n, p, mstd, inc, e.g."),
        ("rand-tweights", "'tweights' in 'rand-tweights' is unknown (known: m, n, p, mstd, inc, e.g."),
        ("rand--n2", "'' in 'rand--n2' is unknown (known: m,"),
    ],
)
def test_wrong_names_are_told(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_policy(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        AugmentConfig(rand_augment=text)


def test_operations_signs_and_magnitudes_have_their_frequencies():
    size = 6000
    made = rand_parameters(parse_policy("rand-m5-n2-p0.7-mstd1.5"), numbers(size), PX)
    assert made.operation.shape == (size, 2) and made.matrix.shape == (size, 2, 2, 3)
    done = made.operation > 0
    assert abs(done.mean() - 0.7) < 5 * np.sqrt(0.7 * 0.3 / (2 * size))
    assert chisquare(np.bincount(made.operation[done])[1:]).pvalue > 1e-3
    both = done.all(axis=1)
    assert abs((made.operation[both, 0] == made.operation[both, 1]).mean() - 1 / 15) < 0.025  # with replacement
    shifts = made.matrix[made.operation == 1 + OPERATIONS.index("TranslateXRel")][:, 0, 2]
    assert abs((shifts > 0).mean() - 0.5) < 0.1
    assert kstest(np.abs(shifts) / (0.045 * PX), "norm", args=(5, 1.5)).pvalue > 1e-3
    uniform = rand_parameters(parse_policy("rand-m8-n1-p1-mstd101"), numbers(size), PX)
    shifts = uniform.matrix[uniform.operation == 1 + OPERATIONS.index("TranslateXRel")][:, 0, 2]
    assert kstest(np.abs(shifts) / (0.045 * PX), "uniform", args=(0, 8)).pvalue > 1e-3
    strong = rand_parameters(parse_policy("rand-m10-n1-p1-mstd5"), numbers(size), PX)
    assert np.abs(strong.matrix[:, :, 0, 2]).max() <= 0.4501 * PX  # magnitudes end at 10


def pillow(name, picture, argument):
    arguments = () if name in ("AutoContrast", "Equalize", "Invert") else (argument,)
    options = {"fillcolor": FILL, "resample": Image.Resampling.BILINEAR}
    return np.asarray(timm_augment.NAME_TO_OP[name](Image.fromarray(picture), *arguments, **options), dtype=float)


def together(parts):
    """Parameters of several batches as of one."""
    fields = ("operation", "value", "matrix")
    return RandParameters(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


@pytest.mark.parametrize("policy", ["rand-m9-n1-p1", "rand-m4-n1-p1-mstd2-inc1"])
def test_point_operations_do_what_timm_does(policy):
    made = together([one(name, policy) for name in LEVELS])
    images = applied(made, PICTURES * len(LEVELS)).reshape(len(LEVELS), len(PICTURES), PX, PX, 3)
    values = made.value.reshape(len(LEVELS), len(PICTURES)).tolist()
    for (name, (mean, largest)), row, arguments in zip(LEVELS.items(), images, values, strict=True):
        for image, picture, value in zip(row, PICTURES, arguments, strict=True):
            argument = int(value) if name in ("Posterize", "Solarize", "SolarizeAdd") else value
            difference = np.abs(image - pillow(name, picture, argument))
            if name == "Sharpness":
                difference = difference[1:-1, 1:-1]  # Pillow leaves the border as it is
            assert difference.mean() <= mean and difference.max() <= largest, (
                name,
                difference.mean(),
                difference.max(),
            )


def test_equalize_follows_the_cumulative_histogram():
    """OpenCV's rule: the lowest level goes to 0, the others to their share of all higher pixels."""
    for image, picture in zip(applied(one("Equalize")), PICTURES, strict=True):
        for channel in range(3):
            count = np.bincount(picture[..., channel].ravel(), minlength=256)
            lowest = count[count > 0][0]
            levels = np.rint(255 * (np.cumsum(count) - lowest) / (PX * PX - lowest))
            np.testing.assert_allclose(image[..., channel], levels[picture[..., channel]], atol=1e-3)


def sampled(picture, x, y):
    """Bilinear, FILL outside; x and y [px, px] in pixels, corner = 0."""
    laid = np.broadcast_to(np.array(FILL, dtype=float), (PX + 2, PX + 2, 3)).copy()
    laid[1:-1, 1:-1] = picture
    x, y = np.clip(x + 0.5, 0, PX + 0.999), np.clip(y + 0.5, 0, PX + 0.999)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    across, down = (x - left)[..., None], (y - top)[..., None]
    upper = laid[top, left] * (1 - across) + laid[top, left + 1] * across
    lower = laid[top + 1, left] * (1 - across) + laid[top + 1, left + 1] * across
    return upper * (1 - down) + lower * down


@pytest.mark.parametrize("name", WARPS)
def test_warps_do_what_timm_does(name):
    """As plain bilinear sampling of the picture laid on the fill; inside, where Pillow knows no fill, as Pillow."""
    made = one(name, "rand-m7-n1-p1-mstd2")
    place = np.stack([*np.meshgrid(np.arange(PX) + 0.5, np.arange(PX) + 0.5), np.ones((PX, PX))])
    for image, picture, matrix in zip(applied(made), PICTURES, made.matrix[:, 0], strict=True):
        argument = strength(name, matrix) / (PX if "Translate" in name else 1)
        reference = pillow(name, picture, argument)
        x, y = np.einsum("ij,jkl->ikl", matrix, place)
        inside = (x > 0.51) & (x < PX - 0.51) & (y > 0.51) & (y < PX - 0.51)
        assert 0.2 < inside.mean() < 1
        assert np.abs(image - reference)[inside].max() <= 1.01
        assert np.abs(image - sampled(picture, x, y)).max() <= 0.6


def test_strengths_are_those_that_the_matrices_carry():
    for name, full in STRENGTHS.items():
        assert abs(strength(name, one(name, "rand-m10-n1-p1").matrix[0, 0])) == pytest.approx(full, rel=1e-5)


def test_flat_images_pass_the_histogram_operations():
    flat = [np.full((PX, PX, 3), level, dtype=np.uint8) for level in (0, 7, 255)]
    names = ("AutoContrast", "Equalize", "Contrast", "Color", "Sharpness")
    images = applied(together([one(name, size=3) for name in names]), flat * len(names))
    assert np.isfinite(images).all() and np.ptp(images, axis=(1, 2)).max() < 0.01
    np.testing.assert_allclose(images[:3], np.stack(flat), atol=1e-3)


def test_layers_are_done_one_after_the_other_and_nothing_where_nothing_is_drawn():
    first, second = one("Invert"), one("Posterize")
    both = RandParameters(
        *(np.concatenate([getattr(a, n) for a in (first, second)], axis=1) for n in ("operation", "value", "matrix"))
    )
    both.operation[3:] = [[0, 0], [0, 5], [3, 0], [5, 3], [0, 0], [0, 0], [0, 0]]
    both.value[6] = both.value[6, ::-1]
    mask = 256 - 2 ** (8 - int(second.value[0, 0]))
    steps = {3: lambda picture: picture ^ 255, 5: lambda picture: picture & mask, 0: lambda picture: picture}
    for image, picture, operations in zip(applied(both), PICTURES, both.operation.tolist(), strict=True):
        expected = picture
        for operation in operations:
            expected = steps[operation](expected)
        np.testing.assert_allclose(image, expected, atol=1e-3)


def test_the_drawn_operations_arrive_in_the_graph():
    """What `draw_views` draws is what happens: a batch in which every operation occurs, against timm's operations."""
    pictures = squares(20, PX) * 6
    config = WHOLE.model_copy(update={"rand_augment": "rand-m9-n1-p0.9"})
    made = draw(config, [(PX, PX)] * 120, px=PX)
    assert set(made.rand.operation[:, 0].tolist()) == set(range(16))
    for image, picture, operation, value, matrix in zip(
        augmented(pictures, config, made), pictures, made.rand.operation[:, 0], made.rand.value[:, 0],
        made.rand.matrix[:, 0], strict=True,
    ):  # fmt: skip
        name = OPERATIONS[operation - 1] if operation else None
        if name is None:
            expected = picture
        elif name in WARPS:
            expected = pillow(name, picture, strength(name, matrix) / (PX if "Translate" in name else 1))
        else:
            expected = pillow(name, picture, int(value) if name in ("Posterize", "Solarize", "SolarizeAdd") else value)
        assert np.abs(image - expected).mean() < 2.5, name
