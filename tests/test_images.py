import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from data_pipeline.images import MAX_PIXELS, DamagedImage, perceptual_hash, prepare_image
from tests.raw import pattern


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(packed):
    return Image.open(io.BytesIO(packed.data))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind, suffix", [("JPEG", "jpg"), ("PNG", "png")])
def test_8_bit_jpeg_and_png_keep_their_bytes(mode, kind, suffix):
    data = encoded(pattern(0).convert(mode), kind)
    packed = prepare_image(data)
    assert (packed.data, packed.suffix, packed.width, packed.height) == (data, suffix, 24, 24)


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "BMP"])
def test_other_formats_become_png_without_loss(kind):
    data = encoded(pattern(1), kind, **({"lossless": True} if kind == "WEBP" else {}))
    packed = prepare_image(data)
    assert packed.suffix == "png"
    np.testing.assert_array_equal(np.asarray(decoded(packed)), np.asarray(pattern(1)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_and_dropped(kind, orientation):
    stored = pattern(2, 32).crop((0, 0, 32, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    packed = prepare_image(encoded(stored, kind, exif=exif, **options))
    pixels = np.asarray(stored, dtype=int)  # the tag says where row 0 and column 0 of the scene are (EXIF 2.3, 4.6.4)
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels[::-1].swapaxes(0, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: pixels[:, ::-1].swapaxes(0, 1),
    }[orientation]
    assert (packed.height, packed.width) == upright.shape[:2]
    assert packed.suffix == ("jpg" if kind == "JPEG" else "png")
    assert decoded(packed).getexif().get(0x0112, 1) == 1
    assert np.abs(np.asarray(decoded(packed), dtype=int) - upright).mean() <= (3 if kind == "JPEG" else 0)


def test_16_bit_grey_spans_0_to_255():
    values = np.array([[0, 128, 129, 32896, 65406, 65407, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(decoded(prepare_image(encoded(Image.fromarray(values), kind))))
        np.testing.assert_array_equal(pixels, np.rint(values / 257))
        assert pixels.dtype == np.uint8 and pixels[0, -1] == 255


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_grey_tiffs_of_either_byte_order(order):
    values = np.random.default_rng(0).integers(0, 65536, (6, 7)).astype(f"{order}u2")
    pixels = np.asarray(decoded(prepare_image(encoded(Image.fromarray(values), "TIFF"))))
    np.testing.assert_array_equal(pixels, np.rint(values / 257))


def test_16_bit_colour_keeps_the_high_byte():
    values = np.random.default_rng(0).integers(0, 65536, (5, 6, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)  # filter type 0, then the row

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 6, 5, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    packed = prepare_image(png)
    assert packed.data != png
    np.testing.assert_array_equal(np.asarray(decoded(packed)), values // 256)


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "RGB"])
def test_every_kind_of_transparency_shows_white(mode):
    image = pattern(3).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    if mode == "RGB":  # one colour is declared transparent
        data = encoded(Image.new("RGB", (5, 5), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    else:
        data = encoded(image.convert(mode), "TIFF" if mode == "PA" else "PNG")
    assert np.asarray(decoded(prepare_image(data)).convert("RGB")).min() == 255


@pytest.mark.parametrize("kind, mode", [("TIFF", "LAB"), ("TIFF", "YCbCr"), ("TIFF", "CMYK"), ("TIFF", "1")])
def test_other_colour_spaces_become_what_pillow_makes_of_them(kind, mode):
    data = encoded(pattern(3).convert(mode), kind)
    expected = Image.open(io.BytesIO(data)).convert("L" if mode == "1" else "RGB")
    np.testing.assert_array_equal(np.asarray(decoded(prepare_image(data))), np.asarray(expected))


def test_of_several_frames_the_first_is_taken():
    for kind, options in (("TIFF", {}), ("WEBP", {"lossless": True})):
        data = encoded(pattern(3), kind, save_all=True, append_images=[pattern(4)], **options)
        np.testing.assert_array_equal(np.asarray(decoded(prepare_image(data))), np.asarray(pattern(3)))


def test_transparency_is_laid_over_white():
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[..., 0] = 200
    pixels[:2, :, 3] = 255
    packed = decoded(prepare_image(encoded(Image.fromarray(pixels), "PNG")))
    assert packed.mode == "RGB"
    assert packed.getpixel((0, 0)) == (200, 0, 0) and packed.getpixel((0, 3)) == (255, 255, 255)


def test_palette_cmyk_and_1_bit_become_rgb_or_grey():
    palette = prepare_image(encoded(pattern(3).quantize(8), "PNG"))
    np.testing.assert_array_equal(np.asarray(decoded(palette)), np.asarray(pattern(3).quantize(8).convert("RGB")))
    cmyk = prepare_image(encoded(pattern(3).convert("CMYK"), "JPEG"))
    assert (decoded(cmyk).mode, cmyk.suffix) == ("RGB", "jpg")
    bits = prepare_image(encoded(pattern(3).convert("1"), "PNG"))
    assert (decoded(bits).mode, bits.suffix) == ("L", "png")


@pytest.mark.parametrize(
    "size, expected", [((60, 30), (48, 24)), ((30, 60), (24, 48)), ((24, 24), (24, 24)), ((20, 90), (20, 90))]
)
def test_the_short_side_is_shrunk_and_never_enlarged(size, expected):
    original = pattern(4, 90).resize(size)
    packed = prepare_image(encoded(original, "PNG"), short_side_px=24)
    assert (packed.width, packed.height) == expected == decoded(packed).size
    assert packed.suffix == ("png" if expected == size else "jpg")
    if expected != size:
        reference = np.asarray(original.resize(expected, Image.Resampling.LANCZOS), dtype=int)
        assert np.abs(np.asarray(decoded(packed)) - reference).mean() < 3


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_moments_are_those_of_the_pixels(mode):
    image = pattern(5).convert(mode)
    packed = prepare_image(encoded(image, "PNG"))
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    np.testing.assert_allclose(packed.mean, pixels.mean(axis=(0, 1)), rtol=1e-12)
    np.testing.assert_allclose(packed.mean_square, (pixels**2).mean(axis=(0, 1)), rtol=1e-12)


JPEG = encoded(pattern(6, 64), "JPEG")
PNG = encoded(pattern(6, 64), "PNG")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "the file is empty"),
        (b"GIF87 but not really", "no image format that is known"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:100], ""),
        (PNG[: len(PNG) // 2], "Truncated"),
        (PNG[:-200] + bytes(200), "checksum"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point pixels have no known range"),
        (encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "grey values 70000..70000 are not within"),
    ],
)
def test_damaged_images_say_why(data, reason):
    with pytest.raises(DamagedImage) as error:
        prepare_image(data)
    assert reason in str(error.value) and str(error.value)


def says_it_is(data, kind, side_px):
    """The same bytes with another size in the header."""
    if kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        return data[:place] + struct.pack(">HH", side_px, side_px) + data[place + 4 :]
    if kind == "PNG":
        header = b"IHDR" + struct.pack(">II", side_px, side_px) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    for tag in (256, 257):  # ImageWidth, ImageLength
        place = next(data.index(entry) for entry in (struct.pack("<HHI", tag, t, 1) for t in (3, 4)) if entry in data)
        data = data[: place + 2] + struct.pack("<HII", 4, 1, side_px) + data[place + 12 :]
    return data


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("side_px", [10_000, 60_000])
def test_a_hundred_megapixels_are_refused_by_the_header_alone(kind, side_px):
    data = says_it_is(encoded(pattern(0), kind), kind, side_px)
    with pytest.raises(DamagedImage, match=f"more than the {MAX_PIXELS} "):
        prepare_image(data)  # there are no such pixels: decoding would have said so
    assert MAX_PIXELS < 100_000_000


def test_an_image_of_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr("data_pipeline.images.MAX_PIXELS", 1000)
    with pytest.raises(DamagedImage, match="64 x 64 pixels, more than the 1000 that are read"):
        prepare_image(PNG)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_never_raises_anything_else():
    rng = np.random.default_rng(0)
    for data in (JPEG, PNG, encoded(pattern(7), "TIFF"), encoded(pattern(7), "WEBP"), encoded(pattern(7), "BMP")):
        for _ in range(60):
            broken = np.frombuffer(data, np.uint8).copy()
            broken[rng.integers(0, len(broken), 4)] = rng.integers(0, 256, 4)
            with suppress(DamagedImage):
                assert prepare_image(broken[: rng.integers(1, len(broken) + 1)].tobytes()).width > 0


def plain_hash(image):
    """The definition, term by term."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
    position = np.arange(32)

    def term(u, v):
        rows, columns = (np.cos(np.pi * (2 * position + 1) * k / 64) for k in (u, v))
        scale = (np.sqrt(1 / 32) if u == 0 else 0.25) * (np.sqrt(1 / 32) if v == 0 else 0.25)
        return scale * (grey * rows[:, None] * columns[None]).sum()

    terms = [term(u, v) for u in range(8) for v in range(8)]
    terms[0] = term(8, 8)
    return sum(1 << (63 - i) for i, value in enumerate(terms) if value > np.median(terms))


def test_the_hash_is_the_sign_of_the_low_frequencies():
    for seed in range(5):
        assert perceptual_hash(pattern(seed)) == plain_hash(pattern(seed))


def test_the_hash_survives_compression_and_size_and_tells_pictures_apart():
    hashes = [perceptual_hash(pattern(seed, 96)) for seed in range(60)]
    copies = [encoded(pattern(seed, 96).resize((64, 64)), "JPEG", quality=80) for seed in range(60)]
    again = [perceptual_hash(Image.open(io.BytesIO(copy))) for copy in copies]
    distances = [(a ^ b).bit_count() for a, b in zip(hashes, again, strict=True)]
    assert max(distances) <= 4 and np.mean(np.array(distances) <= 2) > 0.9
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 4


def test_a_flat_image_has_no_hash():
    assert perceptual_hash(Image.new("RGB", (40, 40), (10, 200, 30))) == 0
    noise = np.random.default_rng(0).integers(126, 130, (224, 224), dtype=np.uint8)
    assert perceptual_hash(Image.fromarray(noise)) == 0
