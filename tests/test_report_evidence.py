"""What evaluation keeps for the report: pictures within their budget, choices of images, the map, calibration."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from PIL.Image import blend

from cluster.errors import UserError
from cluster.run import RunFolder
from data_pipeline.config import DataConfig, SplitConfig
from data_pipeline.images import DamagedImage, perceptual_hash, thumbnail
from tests.packed import write_packed
from tests.raw import pack_quietly, pattern, save
from tests.test_pack_splits import with_splits
from trainer import gather, thumbnails
from trainer.calibration import calibration_bins
from trainer.features import Features
from trainer.findings import LookAlike, most_confused
from trainer.gather import EVIDENCE_FILE, audit_as_packed, keep_evidence, look_alikes, read_evidence, worst_mistakes
from trainer.metrics import confusion, per_class_recall
from trainer.operating_points import operating_points
from trainer.projection import MIN_POINTS, embedding_map, fair_choice
from trainer.result_table import HeldOutSet, Judged
from trainer.score_metrics import calibration_error


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(side_px: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)


def clusters(counts: list[int], dim: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, dim] that lie far apart by class, in float16 as on disk, and their labels."""
    labels = np.repeat(np.arange(len(counts)), counts)
    rng = np.random.default_rng(5)
    return (6 * np.eye(dim)[labels] + rng.normal(size=(len(labels), dim))).astype(np.float16), labels


# --- pictures


def test_thumbnails_are_small_upright_and_without_metadata():
    exif = Image.Exif()
    exif[0x010E] = "patient 4711"
    exif[0x0112] = 6  # rotated by 90 degrees
    colour = np.full((200, 300, 3), (200, 10, 10), dtype=np.uint8)
    made = thumbnail(encoded(colour, exif=exif, comment=b"patient 4711", icc_profile=b"patient 4711"), 128, 82)
    copy = Image.open(io.BytesIO(made))
    assert b"patient" not in made and not copy.getexif()
    assert (copy.format, copy.size) == ("JPEG", (85, 128))
    assert np.abs(np.array(copy).mean(axis=(0, 1)) - (200, 10, 10)).max() < 4


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_every_mode_has_a_thumbnail_and_small_images_keep_their_size(mode):
    image = Image.fromarray(noise(20)).convert("I").convert(mode) if mode == "I;16" else None
    buffer = io.BytesIO()
    (image or Image.fromarray(noise(20)).convert(mode)).save(buffer, "PNG")
    copy = Image.open(io.BytesIO(thumbnail(buffer.getvalue(), 128, 82)))
    assert copy.size == (20, 20) and copy.mode in ("L", "RGB")


def test_damaged_images_have_no_thumbnail():
    for data in (b"", b"no image", encoded(noise(64))[:200]):
        with pytest.raises(DamagedImage):
            thumbnail(data, 128, 82)


def test_a_page_of_the_worst_images_keeps_within_its_budget():
    """Noise does not compress: as many pictures as a page ever has, all of it."""
    shown = gather.CLASSES_SHOWN * gather.EXAMPLES_PER_CLASS + gather.MISTAKES + 10 * 2 * gather.PAIR_PICTURES
    limit_bytes = thumbnails.BUDGET_BYTES // shown
    data = encoded(noise(300), quality=95)
    assert len(thumbnail(data, *thumbnails.SIZES[0])) > limit_bytes
    assert len(thumbnails.small_enough(data, limit_bytes)) <= limit_bytes
    smooth = encoded(np.full((300, 300, 3), 90, dtype=np.uint8))
    assert Image.open(io.BytesIO(thumbnails.small_enough(smooth, limit_bytes))).size == (160, 160)


# --- choices


def decided(labels: list[int], p_true: list[float], wrong_as: list[int]) -> np.ndarray:
    """Probabilities [N, 3]; what the true class lacks goes to `wrong_as`."""
    made = np.zeros((len(labels), 3))
    for row, (label, p, other) in enumerate(zip(labels, p_true, wrong_as, strict=True)):
        made[row, label] += p
        made[row, other] += 1 - p
    return made


def test_the_worst_mistakes_are_those_whose_class_got_least(monkeypatch):
    monkeypatch.setattr(gather, "MISTAKES_PER_CLASS", 2)
    labels = np.array([0, 0, 0, 0, 1, 2])
    probabilities = decided(labels.tolist(), [0.3, 0.1, 0.2, 0.9, 0.4, 0.6], [1, 2, 1, 1, 0, 0])
    found = worst_mistakes(np.array(list("abcdef"), dtype=object), labels, probabilities)
    assert [(m.key, m.true, m.predicted) for m in found] == [("b", 0, 2), ("c", 0, 1), ("e", 1, 0)]
    assert found[0].p_true == pytest.approx(0.1) and found[0].p_predicted == pytest.approx(0.9)
    monkeypatch.setattr(gather, "MISTAKES", 1)
    assert [m.key for m in worst_mistakes(np.array(list("abcdef"), dtype=object), labels, probabilities)] == ["b"]


def test_look_alikes_are_the_surest_of_both_sides():
    labels = np.array([0, 0, 0, 1, 1, 2])
    probabilities = decided(labels.tolist(), [0.2, 0.4, 0.9, 0.7, 0.9, 0.9], [1, 1, 2, 0, 0, 0])
    counts = confusion(labels, probabilities.argmax(axis=1), 3).tolist()
    found = look_alikes(most_confused(counts, counts), np.array(list("abcdef"), dtype=object), labels, probabilities)
    assert found == [LookAlike(0, 1, ["a", "b"], ["e", "d"])]


def test_a_choice_is_fair_to_small_classes():
    labels = np.repeat([0, 1, 2], [500, 3, 60])
    chosen = fair_choice(labels, 100, seed=0)
    assert len(chosen) == 100 == len(set(chosen.tolist())) and (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen]).tolist() in ([49, 3, 48], [48, 3, 49])
    assert fair_choice(labels, 9999, seed=0).tolist() == list(range(563))
    assert fair_choice(labels, 100, seed=0).tolist() == chosen.tolist() != fair_choice(labels, 100, seed=1).tolist()
    assert len(fair_choice(np.empty(0, dtype=np.int64), 5, seed=0)) == 0


# --- map and calibration


def test_the_map_keeps_neighbours_together():
    x, labels = clusters([60, 30, 12])
    made = embedding_map(x, labels, labels, seed=0)
    places = np.array([made.x, made.y]).T
    assert made.method == "t-SNE" and made.labels == labels.tolist() and made.samples == 102
    assert places.min() == 0 and places.max() == 1
    distance = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (labels[distance.argmin(axis=1)] == labels).mean() > 0.95
    assert made.trustworthiness > 0.8
    assert embedding_map(x, labels, labels, seed=0) == made


@pytest.mark.parametrize("count", [0, 1, 2, 3, MIN_POINTS - 1])
def test_of_few_points_the_main_components_are_shown(count):
    x, labels = clusters([count])
    made = embedding_map(x, labels, labels, seed=0)
    assert made.method == "main components" and len(made.x) == len(made.y) == count
    assert np.isfinite(made.x).all() and np.isfinite(made.y).all()


def test_features_that_are_all_the_same_have_a_map():
    made = embedding_map(
        np.ones((MIN_POINTS, 4), dtype=np.float16), np.zeros(MIN_POINTS, int), np.ones(MIN_POINTS, int), 0
    )
    assert set(made.x) == {0} and made.trustworthiness is None


def test_calibration_bins_are_what_the_error_is_made_of():
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.full(4, 0.4), 300), rng.integers(0, 4, 300)
    bins = calibration_bins(labels, probabilities, np.arange(300) // 3, samples=200, seed=0)
    assert sum(bins.samples) == 300 and min(bins.samples) > 0
    gaps = np.abs(np.array(bins.accuracy) - bins.confidence)
    assert np.dot(bins.samples, gaps) / 300 == pytest.approx(calibration_error(labels, probabilities)[0])
    for (low, high), accuracy in zip(bins.intervals, bins.accuracy, strict=True):
        assert low <= accuracy <= high


def test_operating_points_have_paired_intervals_or_none_where_they_cost_too_much():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [150, 50])
    scores = 0.3 * rng.normal(size=200) + labels
    probabilities = np.stack([1 - scores, scores, np.zeros(200)], axis=1)
    found = operating_points(labels, probabilities, np.arange(200) // 2, samples=200, seed=0)
    for c in (0, 1):
        for value, (low, high) in zip(found.sensitivity[c], found.intervals[c], strict=True):
            assert low <= value <= high
    assert found.sensitivity[2] == found.thresholds[2] == [None] * 3 and found.intervals[2] == [[None, None]] * 3
    assert operating_points(labels, probabilities, np.arange(200), samples=0, seed=0).intervals == []


# --- all of it, through the run folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(dataset, run, test set, model) of which the evidence is kept; one image of each split is damaged."""
    folder = tmp_path_factory.mktemp("evidence")
    counts = {"train": [9, 5, 3], "val": [2, 2, 2], "test": [8, 6, 4]}
    dataset = write_packed(folder / "packed", counts, damage=("test_0_1", "train_2_0"))
    index, rng = dataset.index("test"), np.random.default_rng(1)
    labels = index.label.astype(np.int64)
    scores = rng.dirichlet(np.ones(3), len(labels)) + 0.4 * np.eye(3)[labels]
    scores[index.key[:] == "test_0_1"] = [0, 0, 1.4]  # wrong, so that it is asked for
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    test = Features(index.key[:], labels, index.group[:], np.arange(len(labels)), clusters([8, 6, 4])[0])
    held_out = HeldOutSet(labels, test.groups, np.array(["many", "medium", "few"]), samples=100, seed=0)
    own, model = (
        Judged(name, name, p, p**2) for name, p in (("own", probabilities[:, ::-1]), ("winner", probabilities))
    )
    run = RunFolder(str(folder / "run"))
    keep_evidence(dataset, run, test, held_out, own, model)
    return dataset, run, held_out, model


def test_evidence_is_read_back_from_the_run_folder_alone(kept):
    dataset, run, held_out, model = kept
    found = read_evidence(RunFolder(run.uri))
    assert found["dataset"] == "test" and found["classes"] == list(dataset.classes)
    assert found["class_counts"] == {"train": [9, 5, 3], "val": [2, 2, 2], "test": [8, 6, 4]}
    assert found["audit"]["leaks"] is False and found["audit"]["near_duplicate_bits"] == 2
    assert [len(keys) for keys in found["examples"]] == [4, 4, 3]
    recall = per_class_recall(held_out.labels, model.predictions, 3)
    for value, (low, high) in zip(recall, found["recall_intervals"], strict=True):
        assert low <= value <= high
    assert found["embedding_map"].predicted == model.predictions.tolist()


def test_pictures_are_those_of_the_keys(kept):
    dataset, run, _, _ = kept
    found = read_evidence(run)
    named = {key for keys in found["examples"] for key in keys} | {mistake.key for mistake in found["mistakes"]}
    named |= {key for pair in found["look_alikes"] for key in (*pair.taken, *pair.rightly)}
    damaged = {"test_0_1", "train_2_0"}
    assert damaged <= named and set(found["pictures"]) == named - damaged
    for split in ("train", "test"):
        index = dataset.index(split)
        for row in (row for row in range(len(index)) if index.key[row] in found["pictures"]):
            shard = dataset.shards[index.shard[row]].path
            original = dataset.storage.read_range(shard, int(index.offset[row]), int(index.length[row]))
            picture, expected = (
                np.asarray(Image.open(io.BytesIO(data)), dtype=float)
                for data in (found["pictures"][index.key[row]], original)
            )
            assert picture.shape == expected.shape and np.abs(picture - expected).mean() < 12


@pytest.mark.parametrize("bits, leaked", [(2, 0), (10, 1), (-1, 0)])
def test_near_duplicates_are_those_that_the_dataset_was_packed_by(tmp_path, bits, leaked):
    """The test set was given, and one of its pictures is nearly one of training."""
    nearly = blend(*(pattern(seed) for seed in (0, 99)), 0.3)
    assert 2 < (perceptual_hash(nearly) ^ perceptual_hash(pattern(0))).bit_count() <= 10
    rows = [("ab"[i % 2], f"p{i}", split, i) for i, split in enumerate(6 * ["train"] + 2 * ["val"] + 2 * ["test"])]
    source = with_splits(tmp_path / "raw", rows)
    save(tmp_path / "raw" / "img_0009.jpg", nearly, quality=95)
    data = DataConfig(split=SplitConfig(near_duplicate_bits=bits))
    found = audit_as_packed(pack_quietly(source, data, tmp_path / "packed"))
    assert (found["near_duplicate_bits"], found["leaks"]) == (bits, leaked == 1)
    assert sum(entry["leaked"]["test"] for entry in found["classes"]) == leaked


def test_a_run_of_an_earlier_version_is_told_what_to_do(tmp_path):
    with pytest.raises(UserError, match=rf"{EVIDENCE_FILE} does not exist, .* run `rarelens evaluate CONFIG` again"):
        read_evidence(RunFolder(str(tmp_path)))
