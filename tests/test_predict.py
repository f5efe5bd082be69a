"""Prediction: which images are found, what the table holds, and that a damaged image costs its own row only."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cluster.errors import UserError
from trainer.config import ModelConfig
from trainer.export import ModelDescription, load_model, save_model
from trainer.heads import Head
from trainer.model import build_model
from trainer.predict import find_images, predict

PX = 32
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CLASSES = ("=cmd|' /C calc'!A0", 'naevus, "common"', "-ve")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "model"
    torch.manual_seed(0)
    config = ModelConfig(backbone="test_resnet", hidden_dim=8, embedding_dim=4)
    network = build_model(config, len(CLASSES), PX)
    for _ in range(5):
        network(torch.randn(16, 3, PX, PX))
    weight = 4 * torch.randn(len(CLASSES), 96)
    with torch.no_grad():  # an untrained network gives all images nearly the same features: take their mean away
        mean = network.eval().features(3 * torch.rand(32, 3, 1, 1).expand(-1, -1, PX, PX) - 1.5).mean(dim=0)
    head = Head(weight=weight, bias=-weight @ mean)
    save_model(folder, network, head, ModelDescription(config, CLASSES, PX, 1.0, MEAN, STD, 1.5))
    return folder


@pytest.fixture()
def images(tmp_path) -> Path:
    """Seven PNGs of the model's own size, so that nothing is resized, in two folders, and what is no image."""
    folder = tmp_path / "images"
    (folder / "deep" / "er").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for i in range(7):
        name = f"{i}.png" if i < 4 else f"deep/er/{i}.PNG"
        colour = draw.integers(0, 256, (1, 1, 3)) * 0.7 + draw.integers(0, 77, (PX, PX, 3))
        Image.fromarray(colour.astype(np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "._0.png").write_bytes(b"what macOS leaves on shared disks")
    return folder


def _expected(model: Path, paths: list[str]) -> np.ndarray:
    """The same by Pillow and the loaded model."""
    pixels = np.stack([np.array(Image.open(path), dtype=np.float32) for path in paths]) / 255
    normalised = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return load_model(model).predict_proba(torch.from_numpy(normalised).permute(0, 3, 1, 2)).numpy()


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


def test_files_folders_and_patterns_each_image_once(images):
    names = [Path(name).name for name in find_images([str(images / "3.png"), f"{images}/*.png", f"{images}/**/*.PNG"])]
    assert names == ["3.png", "0.png", "1.png", "2.png", "4.PNG", "5.PNG", "6.PNG"]


def test_a_file_is_taken_whatever_it_is_called(tmp_path):
    (tmp_path / "scan[1].dat").write_bytes(b"x")
    assert find_images([str(tmp_path / "scan[1].dat")]) == [str(tmp_path / "scan[1].dat")]


@pytest.mark.parametrize(
    "given, message",
    [
        ("gone.jpg", r"image .*gone\.jpg does not exist; give files, folders or patterns"),
        ("empty", r"folder .*empty holds no image; images end in \.bmp, \.dcm"),
        ("*.jpg", r"pattern .*\*\.jpg matches no image; images end in"),
    ],
)
def test_no_image_is_an_error(given, message, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_images([str(tmp_path / given)])


def test_no_image_given_at_all():
    with pytest.raises(UserError, match="no image was given"):
        find_images([])


def test_wrong_output_device_and_model(model, images, tmp_path):
    with pytest.raises(UserError, match=r"--out p\.xlsx must end in \.csv or \.parquet"):
        predict(model, [str(images)], "p.xlsx")
    with pytest.raises(UserError, match="device 'tpu' is not known; known: auto, cpu, cuda"):
        predict(model, [str(images)], tmp_path / "p.csv", device="tpu")
    with pytest.raises(UserError, match=r"nowhere holds no model\.json"):
        predict(tmp_path / "nowhere", [str(images)], tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()


def test_model_and_weights_from_a_bucket(model, images, tmp_path, moto_s3):
    from cluster.storage import open_storage

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
