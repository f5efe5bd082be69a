"""The decoder: what it takes, in which order it gives, what becomes of damaged images, and that nothing else counts."""

import io
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cluster.errors import UserError
from data_pipeline.augment import draw_views
from data_pipeline.config import AugmentConfig, DataConfig, SamplingConfig
from data_pipeline.decode import DecodeError, Decoder, can_parse, find_damaged
from data_pipeline.images import prepare_image
from data_pipeline.loader import TrainLoader
from data_pipeline.stream import TrainStream
from tests.packed import write_packed
from tests.pictures import JPEG_SIZES, JPEGS, decode, draw, encoded, grey_levels, png, settings

CPU = torch.device("cpu")
EVERYTHING = AugmentConfig(
    flip_vertical=True,
    rotate_deg=20,
    rand_augment="rand-m9-n2",
    blur_sigma_max_px=2.0,
    hue_deg=10,
    cutout_share=0.1,
)


def source(mode="RGB", size=(64, 48)):
    rng = np.random.default_rng(5)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def packed(image, kind, **options):
    return np.frombuffer(prepare_image(encoded(image, kind, **options).tobytes()).data, dtype=np.uint8)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("augment", [None, EVERYTHING])
def test_results_come_in_order_and_keep_their_memory(augment):
    made = draw(augment, JPEG_SIZES) if augment else None

    def submit(decoder, first, last):
        decoder.submit(JPEGS[first:last], [made.select(slice(first, last))] if made else [])

    decoder = Decoder(settings(augment, batch_size=4))
    for number in range(2):
        submit(decoder, number, 2 * number + 1)
    results = []
    for number in range(2, 12):
        results.append(decoder.result())
        submit(decoder, number % 5, number % 5 + 1)
    copies = [result.clone() for result in results]
    results += [decoder.result(), decoder.result()]
    assert [len(result) for result in results] == [1, 2] + [1] * 10
    expected = decode(settings(augment), JPEGS, *([made] if made else []))
    for number, result in enumerate(results):
        assert torch.equal(result[0], expected[number if number < 2 else number % 5])
    assert all(torch.equal(a, b) for a, b in zip(copies, results, strict=False))


@pytest.mark.parametrize("views", [1, 2])
def test_threads_batches_and_neighbours_change_no_bit(views):
    made = [draw(EVERYTHING, JPEG_SIZES, view) for view in range(views)]
    whole = decode(settings(EVERYTHING, views=views), JPEGS, *made).unflatten(0, (views, -1))
    threads = decode(settings(EVERYTHING, views=views, threads=3), JPEGS, *made)
    assert torch.equal(threads.unflatten(0, (views, -1)), whole)
    decoder = Decoder(settings(EVERYTHING, views=views, threads=1, batch_size=1))
    for number in range(len(JPEGS)):
        decoder.submit([JPEGS[number]], [view.select(slice(number, number + 1)) for view in made])
        assert torch.equal(decoder.result(), whole[:, number])
    order = np.array([4, 0, 5, 2, 1, 3])
    shuffled = decode(
        settings(EVERYTHING, views=views), [JPEGS[i] for i in order], *[view.select(order) for view in made]
    )
    assert torch.equal(shuffled.unflatten(0, (views, -1)), whole[:, torch.from_numpy(order)])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_pixel_formats_come_out_as_rgb(mode):
    image = decode(settings(), [encoded(source(mode), "JPEG" if mode == "CMYK" else "PNG")])
    assert image.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("L", "JPEG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "WEBP")]
)
def test_what_packing_made_of_any_format_is_decoded_as_pillow_sees_it(mode, kind):
    data = packed(source(mode, (36, 36)), kind)
    reference = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"), dtype=float)[2:34, 2:34]
    (image,) = grey_levels(decode(settings(), [data]))
    assert np.abs(image - reference).max() <= 2.001  # libjpeg's colour conversion in two builds
    if mode == "L":
        assert np.ptp(image, axis=-1).max() < 1e-3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_that_were_turned_by_exif_come_out_upright(orientation):
    image = source(size=(48, 36))
    given = encoded(image, "JPEG", exif=exif(orientation), quality=95, subsampling=0)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(given.tobytes())))  # its short side is 36 already
    left, top = (upright.width - 32) // 2, (upright.height - 32) // 2
    expected = np.asarray(upright.crop((left, top, left + 32, top + 32)), dtype=float)
    data = np.frombuffer(prepare_image(given.tobytes()).data, dtype=np.uint8)
    assert np.abs(grey_levels(decode(settings(), [data]))[0] - expected).mean() < 2  # it was encoded twice


def test_a_damaged_image_is_found_and_the_decoder_goes_on():
    broken = [*JPEGS]
    broken[1], broken[4] = JPEGS[1][: len(JPEGS[1]) // 2], JPEGS[4][:-9]
    decoder = Decoder(settings())
    decoder.submit(broken)
    decoder.submit(JPEGS)
    with pytest.raises(DecodeError):
        decoder.result()
    found = find_damaged(settings(), broken)
    assert sorted(found) == [1, 4] and "truncated" in found[1]
    decoder.submit(JPEGS)
    assert torch.equal(decoder.result(), decode(settings(), JPEGS))
    broken[4], broken[5] = np.zeros(500, dtype=np.uint8), JPEGS[5][:40]  # DALI must not be given these
    assert [can_parse(data) for data in broken] == [True] * 4 + [False] * 2
    whole = {"anchor": np.zeros((6, 2), np.int32), "shape": np.array(JPEG_SIZES, np.int32)[:, ::-1].copy()}
    for augment in (AugmentConfig(), EVERYTHING):
        found = find_damaged(settings(augment), broken, [replace(draw(augment, JPEG_SIZES), **whole)])
        assert sorted(found) == [1, 4, 5] and "no image format that is known" in found[4]


def test_decoding_on_a_gpu_needs_one():
    with pytest.raises(UserError, match=r"data\.decode = mixed needs a GPU, .* set data\.decode=auto"):
        Decoder(replace(settings(), decode="mixed")).submit(JPEGS)
    assert replace(settings(), device=torch.device("cuda:1")).mixed
    assert not replace(settings(), device=torch.device("cuda"), decode="cpu").mixed


def test_images_of_tail_and_body_are_treated_alike(tmp_path):
    """Whichever shard an image comes from, it is what the graph makes of its bytes and of its position's numbers."""
    data = DataConfig(image_px=32, streams=4, decode_threads=1, augment=EVERYTHING)
    dataset = write_packed(tmp_path, {"train": [30, 6, 20, 4], "val": [1] * 4, "test": [1] * 4}, tail_classes=[1, 3])
    sampling, index = SamplingConfig(power=0.0), dataset.index("train")
    tail = [number for number, shard in enumerate(dataset.shards) if shard.kind == "tail"]
    loader = TrainLoader(dataset, data, batch_size=16, views=2, sampling=sampling, seed=7, rank=0, world=1, device=CPU)
    stream = TrainStream(index, dataset.classes, 16, sampling, 4, 7, tail)
    image = replace(settings().image, mean=dataset.mean, std=dataset.std)
    decoder, kinds = Decoder(settings(EVERYTHING, views=2, image=image)), set()
    for batch in loader.epoch(0):
        rows, positions = stream.rank_rows(0, batch.step)
        np.testing.assert_array_equal(rows, batch.rows)
        kinds |= {dataset.shards[number].kind for number in index.shard[rows]}
        views = draw_views(EVERYTHING, 32, (7, 0), positions, 2, (index.width[rows], index.height[rows]))
        files = [
            np.fromfile(
                os.path.join(tmp_path, dataset.shards[index.shard[row]].path),
                dtype=np.uint8,
                count=index.length[row],
                offset=index.offset[row],
            )
            for row in rows
        ]
        decoder.submit(files, views)
        assert torch.equal(batch.images, decoder.result())
    loader.close()
    assert kinds == {"tail", "body"}


def test_a_png_of_sixteen_bits_comes_out_by_packings_rule():
    levels = (np.arange(40 * 40).reshape(40, 40) * 40).astype(np.uint16)
    data = packed(Image.fromarray(levels), "PNG")
    image = grey_levels(decode(settings(image=replace(settings().image, resize_ratio=1.0)), [data]))
    small = np.asarray(Image.fromarray(np.rint(levels / 257).astype(np.uint8)).resize((32, 32), 2), dtype=float)
    assert np.abs(image[0] - small[..., None]).max() <= 1.01


def test_an_image_is_decoded_no_larger_than_its_window():
    """The window of a large PNG alone decides what comes out."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    plain = AugmentConfig(flip_horizontal=False, brightness=0, contrast=0, saturation=0)
    made = draw(plain, [(120, 90)])
    made = replace(made, anchor=np.array([[7, 50]], np.int32), shape=np.array([[32, 32]], np.int32))
    (image,) = grey_levels(decode(settings(plain), [png(picture)], made))
    np.testing.assert_allclose(image, picture[7:39, 50:82], atol=1e-3)
