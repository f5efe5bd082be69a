"""Hostile descriptions (JSON beside data), and hostile names on the pages: refused in a sentence, shown as text."""

import hashlib
import json
import shutil
from html.parser import HTMLParser

import pytest
import torch

from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.dataset import open_dataset
from data_pipeline.passes import evaluation_batches
from tests.packed import drawn_jpeg, write_packed
from tests.test_examples import features
from tests.test_export import _parts
from tests.test_features import drawn, write
from tests.test_images import says_it_is
from tests.tiny import tiny_config
from trainer.examples import choose_examples
from trainer.export import load_model, save_model
from trainer.features import read_features
from tuning.pictures import search_page
from tuning.trials_table import TrialRow

DATASET = [
    ("shards.0.path", "../../x.tar"), ("shards.0.path", "/etc/x"), ("shards.0.path", 3), ("shards.0.split", "../x"),
    ("shards.0.bytes", "many"), ("shards", {"a": 1}), ("shards.0", "x"), ("classes", 3), ("classes", [1, 2]),
    ("mean", "x"), ("index", "../../x"), ("index", {}), ("made", None), ("name", ["x"]),
]  # fmt: skip
FEATURES = [
    ("parts", "../../x"), ("parts", 1e9), ("parts", 10**9), ("rows", ["../x"]), ("rows", None), ("dim", None),
    ("left_out", {}), ("format", "../x"),
]  # fmt: skip
MODEL = [
    ("architecture.backbone", "../../x"), ("architecture.backbone", "hf-hub:evil/x"), ("architecture", "../x"),
    ("architecture.backbone", "local-dir:/tmp"), ("architecture.hidden_dim", "x"), ("preprocessing", []),
    ("architecture.hidden_dim", 10**13), ("preprocessing.image_px", -1), ("classes", 3),
    ("unlike_training", []), ("unlike_training.k", "../x"), ("unlike_training.k", 10**9),
    ("unlike_training.distance", {}),
]  # fmt: skip


class Tags(HTMLParser):
    """The names of all tags and attributes of a page."""

    def __init__(self):
        super().__init__()
        self.names, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def alter(path, key, value):
    """Replace one value in a JSON file; a model's checksum of itself is made to fit."""
    whole = json.loads(path.read_text())
    *outer, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    inner = whole
    for part in outer:
        inner = inner[part]
    inner[last] = value
    if "sha256" in whole:
        rest = {name: value for name, value in whole.items() if name != "sha256"}
        whole["sha256"]["model.json"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(whole))


def refuses(read, path):
    """One sentence that names the file's folder; nothing beside it is touched."""
    before = sorted(path.parent.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        read()
    assert str(path.parent) in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.parent.parent.rglob("*")) == before


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A packed dataset, features and a model."""
    folder = tmp_path_factory.mktemp("made")
    write_packed(folder / "packed", {"train": [6, 4], "val": [2, 2], "test": [2, 2]})
    write(folder / "features", drawn(range(10)))
    save_model(folder / "model", *_parts(), choose_examples(features(9), features(9), 2**20, seed=0))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "made")


@pytest.mark.parametrize("key, value", DATASET)
def test_a_hostile_dataset_json(folder, key, value):
    path = folder / "packed" / "dataset.json"
    alter(path, key, value)
    refuses(lambda: open_dataset(str(path.parent)), path)


@pytest.mark.parametrize("key, value", FEATURES)
def test_a_hostile_features_json(folder, key, value):
    path = folder / "features" / "features.json"
    alter(path, key, value)
    refuses(lambda: read_features(path.parent, "val"), path)


@pytest.mark.parametrize("key, value", MODEL)
def test_a_hostile_model_json(folder, key, value):
    path = folder / "model" / "model.json"
    alter(path, key, value)
    refuses(lambda: load_model(path.parent), path)


@pytest.mark.parametrize("name", ["packed/dataset.json", "features/features.json", "model/model.json"])
@pytest.mark.parametrize("text", ["", "[]", "3", '"x"', "[" * 100_000, "\udcff"])
def test_what_is_no_description(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    reads = {
        "packed": lambda f: open_dataset(str(f)),
        "features": lambda f: read_features(f, "val"),
        "model": load_model,
    }
    refuses(lambda: reads[path.parent.name](path.parent), path)


@pytest.mark.parametrize("name", ["model.safetensors", "examples.safetensors"])
def test_weights_of_a_model_that_are_no_safetensors(folder, name):
    path = folder / "model" / name
    path.write_bytes(b"\x80\x04.")
    description = json.loads((path.parent / "model.json").read_text())
    description["sha256"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "model.json").write_text(json.dumps(description))
    refuses(lambda: load_model(path.parent), path)


def test_a_pixel_bomb_in_a_packed_dataset_is_never_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.packed.drawn_jpeg", lambda *a: says_it_is(drawn_jpeg(1), "JPEG", 60_000))
    dataset = write_packed(tmp_path / "packed", {"train": [2, 2], "val": [2, 2], "test": [2, 2]})
    batches = evaluation_batches(dataset, DataConfig(image_px=32), "val", batch_size=4, device=torch.device("cpu"))
    with pytest.raises(UserError, match="more than the 80000000 pixels that are read"):
        list(batches)


def test_the_page_of_a_search_shows_hostile_names_as_text():
    hostile = ("<script>alert(1)</script>", '" onload="alert(1)', "--> ]]> </svg><img src=x>")
    rows = [
        TrialRow(f"{name}-{number}", "settings", {"stage_one.x": name, "y": number}, "done", 2, 0.5 + number / 9)
        for number, name in enumerate(hostile)
    ]
    config = tiny_config("images", "run", data={"name": hostile[0]})
    page = search_page(config, rows, ["stage_one.x", "y"])
    tags = Tags()
    tags.feed(page)
    assert not tags.names & {"script", "img", "iframe", "object", "foreignobject"}
    assert not any(name.startswith("on") for name in tags.attributes)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
