import io
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from cluster.errors import UserError
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.dicom import is_dicom
from data_pipeline.images import DamagedImage, prepare_image
from data_pipeline.pack import pack

RAMP_8 = np.arange(256, dtype=np.uint8).reshape(16, 16)
RAMP_12 = np.linspace(0, 4095, 240).astype(np.uint16).reshape(12, 20)


def dataset(pixels, bits=None, photometric="MONOCHROME2", **tags):
    """A dataset of these pixels; [H, W], [H, W, 3], or [frames, H, W] with `NumberOfFrames`."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = "1.2.3"
    frames = "NumberOfFrames" in tags
    made.Rows, made.Columns = pixels.shape[frames : frames + 2]
    made.SamplesPerPixel = 3 if pixels.ndim - frames == 3 else 1
    if made.SamplesPerPixel == 3:
        made.PlanarConfiguration = 0
    made.BitsAllocated = pixels.dtype.itemsize * 8
    made.BitsStored = bits or made.BitsAllocated
    made.HighBit = made.BitsStored - 1
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    made.PhotometricInterpretation = photometric
    for name, value in tags.items():
        setattr(made, name, value)
    made.PixelData = pixels.tobytes()
    return made


def file_of(made):
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def shown(made):
    """What is packed of it, uint8."""
    packed = prepare_image(file_of(made))
    assert packed.suffix == "png"
    return np.asarray(Image.open(io.BytesIO(packed.data)))


def by_pydicom(made, index=0):
    """The window of pydicom, whose output spans what the stored bits can express, as 8 bits."""
    values = apply_modality_lut(made.pixel_array, made)
    windowed = apply_windowing(values, made, index)
    low, high = (0, 2**made.BitsStored - 1)
    if made.PixelRepresentation:
        low, high = -(2 ** (made.BitsStored - 1)), 2 ** (made.BitsStored - 1) - 1
    if "RescaleSlope" in made:
        low, high = (end * float(made.RescaleSlope) + float(made.RescaleIntercept) for end in (low, high))
    return np.rint((windowed - low) / (high - low) * 255)


def test_eight_bits_without_a_window_stay_as_they_are():
    np.testing.assert_array_equal(shown(dataset(RAMP_8)), RAMP_8)


def test_monochrome1_is_turned_round():
    np.testing.assert_array_equal(shown(dataset(RAMP_8, photometric="MONOCHROME1")), 255 - RAMP_8)


@pytest.mark.parametrize("bits, highest", [(12, 4095), (16, 65535)])
def test_without_a_window_the_stored_bits_span_0_to_255(bits, highest):
    values = np.linspace(0, highest, 240).astype(np.uint16).reshape(12, 20)
    np.testing.assert_array_equal(shown(dataset(values, bits)), np.rint(values / highest * 255))


def test_signed_values_with_slope_and_intercept_span_their_range():
    values = np.linspace(-2048, 2047, 240).astype(np.int16).reshape(12, 20)
    expected = np.rint((values + 2048) / 4095 * 255)
    np.testing.assert_array_equal(shown(dataset(values, 12)), expected)
    np.testing.assert_array_equal(shown(dataset(values, 12, RescaleSlope=2, RescaleIntercept=-100)), expected)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("rescale", [{}, {"RescaleSlope": 1.5, "RescaleIntercept": -1024}])
@pytest.mark.parametrize("center, width", [(40, 400), (1000.5, 1), (600, 3000)])
def test_windows_are_pydicoms(function, rescale, center, width):
    made = dataset(RAMP_12, 12, WindowCenter=center, WindowWidth=width, VOILUTFunction=function, **rescale)
    difference = np.abs(shown(made).astype(float) - by_pydicom(made))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02  # halves may round either way


def test_signed_values_and_a_falling_slope_are_windowed_by_the_standards_formula():
    values = np.linspace(-1024, 3071, 240).astype(np.int16).reshape(12, 20)
    made = dataset(values, 16, WindowCenter=-40, WindowWidth=401, RescaleSlope=-1, RescaleIntercept=10)
    x = 10.0 - values
    y = np.where(x <= -40.5 - 200, 0, np.where(x > -40.5 + 200, 255, ((x + 40.5) / 400 + 0.5) * 255))
    np.testing.assert_array_equal(shown(made), np.rint(y))


@pytest.mark.parametrize("kind, center, width", [(np.uint8, 100, 50), (np.uint16, 30_000, 20_000)])
def test_monochrome1_is_turned_round_behind_its_window(kind, center, width):
    values = np.linspace(0, np.iinfo(kind).max, 240).astype(kind).reshape(12, 20)
    window = {"WindowCenter": center, "WindowWidth": width}
    turned = shown(dataset(values, photometric="MONOCHROME1", **window))
    difference = np.abs(turned - (255 - by_pydicom(dataset(values, **window))))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02 and np.ptp(turned) == 255


def test_of_several_windows_the_first_is_taken():
    made = dataset(RAMP_12, 12, WindowCenter=[300, 2000], WindowWidth=[200, 4000])
    one = dataset(RAMP_12, 12, WindowCenter=300, WindowWidth=200)
    np.testing.assert_array_equal(shown(made), shown(one))
    assert np.abs(shown(made) - by_pydicom(made, 1)).max() > 50


def test_a_width_of_one_is_a_threshold():
    made = dataset(RAMP_8, WindowCenter=100, WindowWidth=1)
    np.testing.assert_array_equal(shown(made), np.where(RAMP_8 >= 100, 255, 0))


def lut_item(table, first, bits):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(table), first, bits])
    item.add_new("LUTData", "OW", np.asarray(table, dtype=np.uint16).tobytes())
    return item


def test_look_up_tables_of_modality_and_of_what_is_shown():
    falling = np.arange(255, -1, -1)
    both = dataset(RAMP_8, ModalityLUTSequence=Sequence([lut_item(falling * 16, 0, 16)]))
    np.testing.assert_array_equal(shown(both), np.rint(falling[RAMP_8] * 16 / 65535 * 255))
    steep = np.clip(np.arange(256) * 32, 0, 4095)
    made = dataset(RAMP_8, VOILUTSequence=Sequence([lut_item(steep, 0, 12)]), WindowCenter=1, WindowWidth=2)
    np.testing.assert_array_equal(shown(made), np.rint(apply_voi_lut(RAMP_8, made) / 4095 * 255))


def test_colour():
    rgb = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(shown(dataset(rgb, photometric="RGB")), rgb)
    deep = np.random.default_rng(1).integers(0, 65536, (8, 9, 3), dtype=np.uint16)
    np.testing.assert_array_equal(shown(dataset(deep, photometric="RGB")), np.rint(deep / 65535 * 255))
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    assert np.abs(shown(dataset(ybr, photometric="YBR_FULL")).astype(int) - rgb).max() <= 3


def test_the_first_of_several_frames_is_shown_by_its_own_window():
    frames = np.stack([RAMP_12, RAMP_12[::-1]])
    window = Dataset()
    window.WindowCenter, window.WindowWidth = 300, 200
    values = Dataset()
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 2, 10, "US"
    shared, first = Dataset(), Dataset()
    shared.PixelValueTransformationSequence = Sequence([values])
    first.FrameVOILUTSequence = Sequence([window])
    groups = {
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence([first, Dataset()]),
    }
    made = dataset(frames, 12, NumberOfFrames=2, **groups)
    plain = dataset(RAMP_12, 12, WindowCenter=300, WindowWidth=200, RescaleSlope=2, RescaleIntercept=10)
    np.testing.assert_array_equal(shown(made), shown(plain))


# Files of other people's devices and tools, which pydicom brings along.
@pytest.mark.parametrize(
    "name, size",
    [
        ("CT_small.dcm", (128, 128)),
        ("MR_small.dcm", (64, 64)),
        ("MR_small_RLE.dcm", (64, 64)),
        ("MR_small_bigendian.dcm", (64, 64)),
        ("MR_small_jp2klossless.dcm", (64, 64)),
        ("SC_rgb_jpeg.dcm", (256, 256)),
        ("SC_ybr_full_422_uncompressed.dcm", (100, 100)),
        ("examples_palette.dcm", (800, 350)),
    ],
)
def test_real_files(name, size):
    packed = prepare_image(Path(get_testdata_file(name)).read_bytes())
    assert (packed.width, packed.height) == size and 0.02 < packed.mean[0] < 0.98


def test_the_same_slice_in_four_encodings_is_the_same_image():
    names = ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_jp2klossless.dcm"]
    assert len({prepare_image(Path(get_testdata_file(name)).read_bytes()).data for name in names}) == 1


# ---- bad input


@pytest.mark.parametrize(
    "made, reason",
    [
        (lambda: dataset(RAMP_8, Rows=20_000, Columns=20_000), "20000 x 20000 pixels, more than the 80000000 that are"),
        (lambda: dataset(RAMP_8, WindowCenter=1, WindowWidth=0), "the width of the header's window is not positive"),
        (
            lambda: dataset(RAMP_8, WindowCenter=1, WindowWidth=5, VOILUTFunction="CUBIC"),
            "VOI LUT function 'CUBIC' is not known",
        ),
        (lambda: dataset(RAMP_8, photometric="HSV"), "photometric interpretation 'HSV' is not read"),
        (lambda: dataset(RAMP_8, Rows=32), "The number of bytes of pixel data is less than expected"),
        (
            lambda: dataset(RAMP_8, syntax=DeflatedExplicitVRLittleEndian),
            "a deflated DICOM file; write it uncompressed",
        ),
    ],
)
def test_what_cannot_be_shown_says_why(made, reason):
    with pytest.raises(DamagedImage) as error:
        prepare_image(file_of(made()))
    assert str(error.value).startswith(reason)


def test_a_report_without_an_image_and_a_cut_off_file():
    made = dataset(RAMP_8)
    whole = file_of(made)
    for name in ("Rows", "Columns", "PixelData"):
        delattr(made, name)
    with pytest.raises(DamagedImage, match="a DICOM file without an image"):
        prepare_image(file_of(made))
    for end in range(132, len(whole), 7):
        with pytest.raises(DamagedImage):
            prepare_image(whole[:end])


def test_without_pydicom_packing_says_how_to_get_it(tmp_path, monkeypatch):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(3):
            (tmp_path / label / f"{i}.dcm").write_bytes(file_of(dataset(np.roll(RAMP_8, i + 3 * ord(label)))))
    for name in [name for name in sys.modules if name.partition(".")[0] == "pydicom"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydicom", None)  # an import of it fails
    with pytest.raises(UserError) as error:
        pack(SourceConfig(path=str(tmp_path)), DataConfig(max_damaged=6), str(tmp_path / "d"), 0, progress=False)
    assert str(error.value) == (
        "DICOM files need pydicom, which is not installed; install it with `pip install 'rarelens[dicom]'`"
    )


def test_a_folder_of_dicom_files_is_packed(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(18):
        coarse = Image.fromarray(rng.integers(0, 4096, (6, 6)).astype(np.int32)).resize(
            (40, 40), Image.Resampling.BICUBIC
        )
        values = np.asarray(coarse).clip(0, 4095).astype(np.uint16)
        made = dataset(values, 12, "MONOCHROME1" if i % 2 else "MONOCHROME2", WindowCenter=2048, WindowWidth=4096)
        path = tmp_path / "raw" / "ab"[i % 2] / f"{i}.{'dcm' if i % 3 else 'DCM'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_of(made))
        assert is_dicom(path.read_bytes()) and pydicom.dcmread(path).Rows == 40
    packed = pack(
        SourceConfig(path=str(tmp_path / "raw")), DataConfig(pack_px=32), str(tmp_path / "d"), 0, progress=False
    )
    counts = sum(packed.class_counts(split) for split in ("train", "val", "test"))
    assert counts.tolist() == [9, 9] and packed.made["damaged"] == 0
    assert set(packed.index("train").width) == {32}
