"""Prediction: what the table holds, which training images look alike, and that a damaged image costs its row alone."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

import cluster.progress
from cluster.errors import UserError
from cluster.storage import open_storage
from trainer.config import ModelConfig
from trainer.examples import TrainingExamples, UnlikeRule
from trainer.export import ModelDescription, load_model, save_model
from trainer.heads import Head
from trainer.model import Classifier, build_model
from trainer.predict import predict

PX = 32
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CLASSES = ("=cmd|' /C calc'!A0", 'naevus, "common"', "-ve")


@pytest.fixture(scope="module")
def parts():
    """Network, head and description of a model whose classes are all predicted for some image."""
    torch.manual_seed(0)
    config = ModelConfig(backbone="test_resnet", hidden_dim=8, embedding_dim=4)
    network = build_model(config, len(CLASSES), PX)
    for _ in range(5):
        network(torch.randn(16, 3, PX, PX))
    weight = 4 * torch.randn(len(CLASSES), 96)
    with torch.no_grad():  # an untrained network gives all images nearly the same features: take their mean away
        mean = network.eval().features(3 * torch.rand(32, 3, 1, 1).expand(-1, -1, PX, PX) - 1.5).mean(dim=0)
    head = Head(weight=weight, bias=-weight @ mean)
    return network, head, ModelDescription(config, CLASSES, PX, 1.0, MEAN, STD, 1.5)


@pytest.fixture(scope="module")
def model(parts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "model"
    save_model(folder, *parts)
    return folder


@pytest.fixture(scope="module")
def known_images() -> np.ndarray:
    """Pixels of twelve training images."""
    return _pixels(12, seed=1)


@pytest.fixture(scope="module")
def knowing(parts, known_images, tmp_path_factory) -> Path:
    """The same model with training examples; half of its held-out images were farther than the rule allows."""
    folder = tmp_path_factory.mktemp("knowing") / "model"
    features = torch.from_numpy(_unit(parts[0], known_images)).half()
    far = np.sort(_distances(parts[0], _pixels(7), known_images), axis=1)[:, 1]
    keys = np.array([f"=train {number}" for number in range(12)], dtype=object)
    rule = UnlikeRule(k=2, distance=float(np.median(far)), quantile=0.5, held_out_images=7)
    save_model(folder, *parts, TrainingExamples(keys, np.arange(12) % 3, features, rule))
    return folder


@pytest.fixture()
def images(tmp_path) -> Path:
    """Seven PNGs of the model's own size, so that nothing is resized, in two folders, and what is no image."""
    folder = tmp_path / "images"
    (folder / "deep" / "er").mkdir(parents=True)
    for i, pixels in enumerate(_pixels(7)):
        Image.fromarray(pixels).save(folder / (f"{i}.png" if i < 4 else f"deep/er/{i}.PNG"))
    (folder / "notes.txt").write_text("no image")
    (folder / "._0.png").write_bytes(b"what macOS leaves on shared disks")
    return folder


def _pixels(count: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    drawn = [draw.integers(0, 256, (1, 1, 3)) * 0.7 + draw.integers(0, 77, (PX, PX, 3)) for _ in range(count)]
    return np.stack(drawn).astype(np.uint8)


def _normalised(pixels: np.ndarray) -> torch.Tensor:
    scaled = (pixels.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2)


@torch.no_grad()
def _unit(network: Classifier, pixels: np.ndarray) -> np.ndarray:
    """Features of unit length, float64 [N, F]."""
    features = network.eval().features(_normalised(pixels)).numpy().astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _distances(network: Classifier, pixels: np.ndarray, known: np.ndarray) -> np.ndarray:
    """[N, M], by a plain difference."""
    return np.linalg.norm(_unit(network, pixels)[:, None] - _unit(network, known)[None], axis=2)


def _expected(model: Path, paths: list[str]) -> np.ndarray:
    """The same by Pillow and the loaded model."""
    return load_model(model).predict_proba(_normalised(np.stack([np.array(Image.open(p)) for p in paths]))).numpy()


def _csv(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_csv_holds_a_row_an_image_in_order(model, images, tmp_path):
    result = predict(model, [str(images)], tmp_path / "new" / "p.csv", batch_size=3)
    header, *rows = _csv(tmp_path / "new" / "p.csv")
    paths = [row[0] for row in rows]
    assert header == ["image", "label", *(f"p_{name}" for name in CLASSES)]
    assert paths == sorted(str(path) for path in images.rglob("*.[pP][nN][gG]") if not path.name.startswith("."))
    assert len(paths) == 7
    probabilities = np.array([row[2:] for row in rows], dtype=np.float64)
    np.testing.assert_allclose(probabilities, _expected(model, paths), atol=2e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert len(set(probabilities.argmax(axis=1))) > 1, "every image got one class: the test would miss a mix-up of rows"
    assert (result.predicted, result.damaged, result.out) == (7, [], tmp_path / "new" / "p.csv")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.csv"]


def test_parquet_holds_the_same_with_exact_names(model, images, tmp_path):
    predict(model, [str(images)], tmp_path / "p.csv")
    predict(model, [str(images)], tmp_path / "p.parquet", batch_size=2)
    _, *rows = _csv(tmp_path / "p.csv")
    table = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert list(table) == ["image", "label", *(f"p_{name}" for name in CLASSES)]
    assert table["image"] == [row[0] for row in rows]
    probabilities = np.array([table[f"p_{name}"] for name in CLASSES]).T
    assert table["label"] == [CLASSES[i] for i in probabilities.argmax(axis=1)]
    np.testing.assert_allclose(probabilities, np.array([row[2:] for row in rows], dtype=float), atol=2e-6)


def test_damaged_images_are_told_and_left_out(model, images, tmp_path, capsys):
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:300])
    (images / "2.png").write_bytes(b"")
    result = predict(model, [str(images)], tmp_path / "p.csv", batch_size=2)
    _, *rows = _csv(tmp_path / "p.csv")
    assert [Path(row[0]).stem for row in rows] == ["0", "3", "4", "5", "6"]
    probabilities = np.array([row[2:] for row in rows], dtype=np.float64)
    np.testing.assert_allclose(probabilities, _expected(model, [row[0] for row in rows]), atol=2e-5)
    assert [Path(name).name for name, _ in result.damaged] == ["1.png", "2.png"]
    assert all(reason for _, reason in result.damaged)
    assert result.predicted == 5
    told = capsys.readouterr().err
    assert "1.png" in told and "2.png" in told and "damaged, left out" in told


def test_every_image_damaged_leaves_a_header(model, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    result = predict(model, [str(tmp_path / "a.jpg")], tmp_path / "p.csv")
    assert result.predicted == 0 and len(result.damaged) == 1
    assert len(_csv(tmp_path / "p.csv")) == 1


def test_no_cell_is_a_formula(model, images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    Path("0.png").rename("=1+1.png")
    predict(model, ["*.png", "deep"], tmp_path / "p.csv")
    _, *rows = _csv(tmp_path / "p.csv")
    assert "./=1+1.png" in {row[0] for row in rows} and Path("./=1+1.png").is_file()
    labels = {row[1] for row in rows}
    assert labels <= {f"'{CLASSES[0]}", CLASSES[1], CLASSES[2]} and len(labels) > 1


def test_the_most_probable_classes_alone(model, images, tmp_path):
    predict(model, [str(images)], tmp_path / "all.parquet")
    predict(model, [str(images)], tmp_path / "two.parquet", top=2)
    whole, two = (pq.read_table(tmp_path / name).to_pydict() for name in ("all.parquet", "two.parquet"))
    assert list(two) == ["image", "label", "top_1", "top_1_p", "top_2", "top_2_p"]
    assert two["image"] == whole["image"] and two["label"] == two["top_1"] == whole["label"]
    for row in range(7):
        ranked = sorted(((whole[f"p_{name}"][row], name) for name in CLASSES), reverse=True)
        assert [(two[f"top_{place}_p"][row], two[f"top_{place}"][row]) for place in (1, 2)] == ranked[:2]


def test_more_classes_than_there_are(model, images, tmp_path):
    predict(model, [str(images / "0.png")], tmp_path / "p.csv", top=9)
    assert _csv(tmp_path / "p.csv")[0][2:] == ["top_1", "top_1_p", "top_2", "top_2_p", "top_3", "top_3_p"]


def test_look_alikes_and_strangers_are_those_of_a_plain_search(knowing, parts, known_images, images, tmp_path):
    result = predict(knowing, [str(images)], tmp_path / "p.parquet", batch_size=3)
    table = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert list(table)[5:] == [
        *(f"similar_{place}{what}" for place in range(1, 6) for what in ("", "_label")), "distance", "unlike_training",
    ]  # fmt: skip
    distances = _distances(parts[0], _pixels(7), known_images)
    close = {"rtol": 0.02, "atol": 2e-3}  # of features so near, float32 keeps few digits of the difference
    for place in range(5):
        numbers = [int(key.removeprefix("=train ")) for key in table[f"similar_{place + 1}"]]
        np.testing.assert_allclose(distances[np.arange(7), numbers], np.sort(distances, axis=1)[:, place], **close)
        assert table[f"similar_{place + 1}_label"] == [CLASSES[number % 3] for number in numbers]
    second = np.sort(distances, axis=1)[:, 1]
    np.testing.assert_allclose(table["distance"], second, **close)
    told = load_model(knowing).examples.rule.distance
    sure = np.abs(second - told) > 0.02 * told
    assert sure.sum() >= 5 and np.array_equal(np.array(table["unlike_training"])[sure], (second > told)[sure])
    assert result.unlike == sum(table["unlike_training"]) and str(result).startswith(
        f"7 images classified, 0 unreadable, {result.unlike} unlike the training set: "
    )


def test_keys_of_training_images_are_no_formulas(knowing, images, tmp_path):
    predict(knowing, [str(images)], tmp_path / "p.csv")
    header, *rows = _csv(tmp_path / "p.csv")
    assert {row[header.index("similar_1")][:7] for row in rows} == {"'=train"}
    assert {row[-1] for row in rows} == {"true", "false"}


def test_without_out_csv_goes_into_a_pipe(knowing, images, tmp_path, capsys):
    predict(knowing, [str(images)], tmp_path / "p.csv")
    capsys.readouterr()
    predict(knowing, [str(images)])
    assert capsys.readouterr().out == (tmp_path / "p.csv").read_text()


def test_without_out_a_terminal_shows_a_table(knowing, images, capsys, monkeypatch):
    (images / "torn\x1b[2J.png").write_bytes((images / "1.png").read_bytes())
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "400")
    predict(knowing, [str(images)], top=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 1 + 8 and "looks like" in lines[0]
    expected = _expected(knowing, [str(images / "0.png")])[0]
    first = next(line for line in lines if f"{images}/0.png" in line)
    best = int(expected.argmax())
    assert f"{CLASSES[best]} {expected[best]:.3f}" in first and "=train" in first
    assert sum("unlike the training set" in line for line in lines) in range(1, 8)
    assert not any("\x1b[2J" in line for line in lines)


def test_from_python(knowing, images, tmp_path):
    predict(knowing, [str(images)], tmp_path / "p.parquet", batch_size=3)
    table = pq.read_table(tmp_path / "p.parquet").to_pydict()
    (images / "torn.png").write_bytes(b"x")
    said = load_model(knowing).predict([images], batch_size=3)
    assert said.images == table["image"] and said.labels == table["label"]
    np.testing.assert_allclose(said.probabilities, np.array([table[f"p_{name}"] for name in CLASSES]).T, atol=1e-6)
    assert said.similar.keys[:, 0].tolist() == table["similar_1"]
    assert said.similar.unlike.tolist() == table["unlike_training"]
    assert np.array_equal(said.similar.distance, said.similar.distances[:, 1])
    assert [(Path(name).name, bool(reason)) for name, reason in said.damaged] == [("torn.png", True)]


def test_a_model_without_examples_compares_nothing(model, images):
    assert load_model(model).predict([images]).similar is None


def test_images_come_from_a_bucket(model, images, tmp_path, moto_s3):
    storage = open_storage(f"{moto_s3}/predict/new")
    for name in ("0.png", "deep/er/4.PNG"):
        storage.upload(images / name, name)
    result = predict(model, [f"{moto_s3}/predict/new"], tmp_path / "s3.csv")
    predict(model, [str(images / "0.png"), str(images / "deep")], tmp_path / "local.csv", top=None)
    remote, local = _csv(tmp_path / "s3.csv"), _csv(tmp_path / "local.csv")
    assert result.predicted == 2 and [row[1:] for row in remote] == [local[0][1:], local[1][1:], local[2][1:]]
    assert [row[0] for row in remote[1:]] == [f"{storage.uri}/0.png", f"{storage.uri}/deep/er/4.PNG"]


def test_wrong_output_device_and_model(model, images, tmp_path):
    with pytest.raises(UserError, match=r"--out p\.xlsx must end in \.csv or \.parquet"):
        predict(model, [str(images)], "p.xlsx")
    with pytest.raises(UserError, match="device 'tpu' is not known; known: auto, cpu, cuda"):
        predict(model, [str(images)], tmp_path / "p.csv", device="tpu")
    with pytest.raises(UserError, match=r"nowhere holds no model\.json"):
        predict(tmp_path / "nowhere", [str(images)], tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()


def test_model_and_weights_from_a_bucket(model, images, tmp_path, moto_s3):
    storage = open_storage(f"{moto_s3}/h6/model")
    for file in model.iterdir():
        storage.upload(file, file.name)
    predict(f"{moto_s3}/h6/model", [str(images)], tmp_path / "s3.csv")
    predict(model, [str(images)], tmp_path / "local.csv")
    assert _csv(tmp_path / "s3.csv") == _csv(tmp_path / "local.csv")
    config = ModelConfig(backbone="test_resnet", weights=f"{moto_s3}/h6/model/model.safetensors")
    backbone = build_model(config, 4, PX).backbone.state_dict()
    saved = load_model(model).network.backbone.state_dict()
    assert all(torch.equal(value, backbone[key]) for key, value in saved.items())


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_bar_tells_how_many_are_done_and_how_many_are_damaged(model, images, tmp_path, monkeypatch, is_terminal):
    shown = io.StringIO()
    monkeypatch.setattr(cluster.progress, "console", Console(file=shown, force_terminal=is_terminal, width=120))
    (images / "9.png").write_bytes((images / "0.png").read_bytes()[:60])
    predict(model, [str(images)], tmp_path / "p.csv", batch_size=3)
    if is_terminal:
        last = shown.getvalue()[shown.getvalue().rindex("predict") :]
        assert "8/8" in last and "1 damaged" in last
    else:
        assert shown.getvalue().splitlines() == ["predict: 3/8 ", "predict: 6/8 1 damaged", "predict: 8/8 1 damaged"]
