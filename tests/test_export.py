"""The model folder: what is saved comes back, and nothing else is taken for it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import UserError
from trainer.config import ModelConfig
from trainer.export import ModelDescription, load_model, save_model
from trainer.heads import Head
from trainer.model import build_model

CLASSES = ("naevus", "melanoma", "<b>", "=1+1")
CONFIG = ModelConfig(backbone="test_resnet", hidden_dim=16, embedding_dim=8, drop_rate=0.3, weights="gone.safetensors")


def _parts(normalise: bool = False):
    torch.manual_seed(0)
    network = build_model(CONFIG.model_copy(update={"weights": None}), len(CLASSES), 32)
    network.train()
    for _ in range(3):  # running statistics that differ from a fresh network's
        network(torch.randn(8, 3, 32, 32))
    network.eval()
    head = Head(weight=torch.randn(len(CLASSES), 96), bias=torch.randn(len(CLASSES)), normalise=normalise)
    description = ModelDescription(
        model=CONFIG,
        classes=CLASSES,
        image_px=32,
        resize_ratio=1.25,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.21, 0.22),
        temperature=1.7,
        provenance={"run": "runs/x", "dataset": "skin", "fingerprint": "ab" * 32, "config": {"seed": 3}},
    )
    return network, head, description


@pytest.mark.parametrize("normalise", [False, True])
def test_probabilities_come_back_and_are_the_calibrated_softmax(tmp_path, normalise):
    network, head, description = _parts(normalise)
    save_model(tmp_path / "model", network, head, description)
    loaded = load_model(tmp_path / "model")
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        features = network.backbone(images).double()
    if normalise:
        features = features / features.norm(dim=1, keepdim=True)
    logits = (features @ head.weight.double().T + head.bias.double()) / 1.7
    expected = logits.exp() / logits.exp().sum(1, keepdim=True)
    probabilities = loaded.predict_proba(images)
    torch.testing.assert_close(probabilities.double(), expected, rtol=1e-4, atol=1e-6)
    assert probabilities.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(loaded.embed(images), network(images).embeddings)


def test_mirrors_come_back(tmp_path):
    network, head, description = _parts()
    mirrored = build_model(CONFIG.model_copy(update={"weights": None, "mirrors": "both"}), len(CLASSES), 32)
    mirrored.load_state_dict(network.state_dict())
    description = replace(description, model=CONFIG.model_copy(update={"mirrors": "both"}))
    save_model(tmp_path / "model", mirrored.eval(), head, description)
    loaded, images = load_model(tmp_path / "model"), torch.randn(5, 3, 32, 32)
    assert loaded.description.model.mirrors == "both"
    said = loaded.predict_proba(images)
    torch.testing.assert_close(loaded.predict_proba(images.flip(2)), said)
    save_model(tmp_path / "plain", network, head, replace(description, model=CONFIG))
    assert not torch.allclose(load_model(tmp_path / "plain").predict_proba(images), said)


def test_description_comes_back_with_its_provenance(tmp_path):
    network, head, description = _parts()
    save_model(tmp_path, network, head, description)
    loaded = load_model(str(tmp_path)).description
    assert loaded.classes == CLASSES
    assert (loaded.image_px, loaded.resize_ratio, loaded.temperature) == (32, 1.25, 1.7)
    assert (loaded.mean, loaded.std) == ((0.5, 0.4, 0.3), (0.2, 0.21, 0.22))
    assert loaded.provenance.items() >= description.provenance.items()
    assert set(loaded.provenance["versions"]) >= {"python", "torch", "timm"}
    assert loaded.provenance["created"].endswith("+00:00")


def test_the_folder_holds_two_files_without_pickles(tmp_path):
    network, head, description = _parts()
    (tmp_path / "metrics.json").write_text("{}")
    save_model(tmp_path, network, head, description)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "model.json", "model.safetensors"]
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {"backbone", "embedding", "head"}


def test_a_saved_model_is_a_starting_point_for_another_run(tmp_path):
    network, head, description = _parts()
    save_model(tmp_path, network, head, description)
    config = CONFIG.model_copy(update={"weights": str(tmp_path / "model.safetensors")})
    again = build_model(config, 9, 32).backbone.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in network.backbone.state_dict().items())


def test_saving_again_replaces_the_model(tmp_path):
    network, head, description = _parts()
    save_model(tmp_path, network, head, description)
    other = Head(weight=head.weight * 2, bias=head.bias, normalise=False)
    save_model(tmp_path, network, other, description)
    assert torch.equal(torch.as_tensor(load_model(tmp_path).head.weight), head.weight * 2)


def test_altered_weights_are_refused(tmp_path):
    save_model(tmp_path, *_parts())
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(f"{path} was altered or is damaged (its SHA-256 does not match)")):
        load_model(tmp_path)


def test_altered_class_order_is_refused(tmp_path):
    save_model(tmp_path, *_parts())
    path = tmp_path / "model.json"
    values = json.loads(path.read_text())
    values["classes"].reverse()
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=re.escape(f"{path} was altered or is damaged")):
        load_model(tmp_path)
    path.write_text('{"format_version": 1')
    with pytest.raises(UserError, match=re.escape(f"{path} was altered or is damaged")):
        load_model(tmp_path)


def test_newer_format_is_refused(tmp_path):
    save_model(tmp_path, *_parts())
    path = tmp_path / "model.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UserError, match=r"model\.json has format version 2, this rarelens reads 1; install"):
        load_model(tmp_path)


def test_folder_without_model_names_the_right_one(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} holds no model.json; give the model folder that a fin")):
        load_model(tmp_path)
    save_model(tmp_path / "model", *_parts())
    with pytest.raises(UserError, match=re.escape(f"did you mean {tmp_path}/model?")):
        load_model(tmp_path)


def test_a_kill_between_the_two_files_leaves_no_model(tmp_path, monkeypatch):
    """The old description must not vouch for new weights, nor the new one for weights that are not there."""
    save_model(tmp_path, *_parts())
    monkeypatch.setattr("trainer.export.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path, *_parts())
    with pytest.raises(UserError, match=r"holds no model\.json"):
        load_model(tmp_path)
