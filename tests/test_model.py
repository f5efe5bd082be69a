"""The network: shapes, starting weights, determinism, and what it says to a wrong configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from cluster.errors import UserError
from trainer.config import ModelConfig
from trainer.heads import parse_heads, save_heads
from trainer.model import build_model

SMALL = "test_resnet"  # timm's own tiny network: 0.4 million parameters, batch norm, F = 96


def _config(**changes) -> ModelConfig:
    return ModelConfig(**{"backbone": SMALL, "hidden_dim": 16, "embedding_dim": 8, **changes})


def _images(n: int = 2, px: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, px, px, generator=torch.Generator().manual_seed(1))


def _full_weights(path: Path, backbone: str = SMALL, **changes) -> dict[str, torch.Tensor]:
    """A .safetensors file as published: a whole network with its classifier of 1,000 classes."""
    torch.manual_seed(7)
    tensors = {**timm.create_model(backbone).state_dict(), **changes}
    save_file({key: value.contiguous() for key, value in tensors.items() if value is not None}, path)
    return tensors


def test_output_is_the_parts_put_together():
    model = build_model(_config(), num_classes=5, image_px=32).eval()
    images = _images()
    out = model(images)
    features = model.backbone(images)
    first, _, second = model.embedding
    hidden = (features @ first.weight.T + first.bias).clamp(min=0)
    embeddings = hidden @ second.weight.T + second.bias
    assert model.feature_dim == 96
    torch.testing.assert_close(out.features, features)
    torch.testing.assert_close(out.logits, features @ model.classifier.weight.T + model.classifier.bias)
    torch.testing.assert_close(out.embeddings, embeddings / embeddings.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(("mirrors", "turns"), [("none", [()]), ("horizontal", [(), (3,)]), ("both", 4)])
def test_outside_training_features_are_the_mean_over_mirror_images(mirrors, turns):
    model = build_model(_config(mirrors=mirrors), 3, 32).eval()
    images = _images()
    turns = [(), (3,), (2,), (2, 3)] if turns == 4 else turns
    expected = torch.stack([model.backbone(images.flip(dims)) for dims in turns]).mean(0)
    out = model(images)
    torch.testing.assert_close(out.features, expected)
    for dims in turns:
        torch.testing.assert_close(model(images.flip(dims)).logits, out.logits)
    assert len(turns) == 4 or not torch.allclose(model.features(images.flip(2)), out.features)


def test_training_sees_each_image_once():
    models = []
    for mirrors in ("none", "both"):
        torch.manual_seed(0)
        models.append(build_model(_config(mirrors=mirrors), 3, 32).train())
    plain, mirrored = (model(_images()) for model in models)
    assert torch.equal(plain.features, mirrored.features)
    assert torch.equal(models[0].backbone.bn1.running_var, models[1].backbone.bn1.running_var)


def test_embeddings_are_raw_on_request():
    model = build_model(_config(), 3, 32, normalise=False).eval()
    out = model(_images())
    torch.testing.assert_close(out.embeddings, model.embedding(out.features))


def test_the_global_seed_decides_every_random_weight():
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(build_model(_config(), 4, 32).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    for part in ("backbone.conv1.0.weight", "embedding.0.weight", "classifier.weight"):
        assert not torch.equal(states[0][part], states[2][part])


def test_dropout_falls_on_the_classifier_only():
    model = build_model(_config(drop_rate=0.5, freeze_batch_norm=True), 3, 32).train()
    first, second = model(_images()), model(_images())
    torch.testing.assert_close(first.embeddings, second.embeddings)
    assert not torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm_keeps_its_statistics_and_learns_its_scale(frozen):
    model = build_model(_config(freeze_batch_norm=frozen), 3, 32).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(_images(4)).logits.sum().backward()
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert (moved == []) is frozen
    assert model.backbone.bn1.weight.grad is not None


def test_bfloat16_weights_give_float32_embeddings_and_logits():
    model = build_model(_config(), 3, 32).bfloat16().eval()
    out = model(_images())
    assert (out.features.dtype, out.embeddings.dtype, out.logits.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    torch.testing.assert_close(out.embeddings.norm(dim=1), torch.ones(2))


def test_float64_stays_float64():
    out = build_model(_config(), 3, 32).double().eval()(_images())
    assert {tensor.dtype for tensor in out} == {torch.float64}


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "test_vit"])
def test_width_and_size_are_fitted_to_the_backbone(backbone):
    """mobilenetv3 pools to 1,024 although `num_features` says 288; a ViT is built for 160 px and takes 64."""
    model = build_model(_config(backbone=backbone), 3, 64).eval()
    assert model(_images(px=64)).features.shape == (2, model.feature_dim)


def test_published_weights_load_and_their_classifier_is_passed_over(tmp_path):
    tensors = _full_weights(tmp_path / "net.safetensors")
    model = build_model(_config(weights=str(tmp_path / "net.safetensors")), 5, 32)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, tensors[key]), key
    assert "fc.weight" in tensors


def test_weights_of_another_network_name_the_tensor(tmp_path):
    path = tmp_path / "net.safetensors"
    _full_weights(path, **{"layer1.0.conv1.weight": None})
    with pytest.raises(UserError, match=r"net\.safetensors lack tensor layer1\.0\.conv1\.weight of backbone test_"):
        build_model(_config(weights=str(path)), 5, 32)
    _full_weights(path, **{"layer1.0.conv1.weight": torch.zeros(2, 3)})
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight has shape \[2, 3\], backbone test_resnet needs \["):
        build_model(_config(weights=str(path)), 5, 32)
    _full_weights(path, **{"layer9.0.conv1.weight": torch.zeros(2, 3)})
    with pytest.raises(UserError, match=r"hold tensor layer9\.0\.conv1\.weight that backbone test_resnet has no place"):
        build_model(_config(weights=str(path)), 5, 32)


def test_weights_file_missing_damaged_or_pickled(tmp_path):
    with pytest.raises(UserError, match=r"model\.weights = '.*gone\.safetensors' does not exist"):
        build_model(_config(weights=str(tmp_path / "gone.safetensors")), 5, 32)
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00")
    with pytest.raises(UserError, match=r"cut\.safetensors' is damaged or no safetensors file"):
        build_model(_config(weights=str(tmp_path / "cut.safetensors")), 5, 32)
    torch.save({}, tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"net\.pth' must be a \.safetensors file.*pickles are never loaded"):
        build_model(_config(weights=str(tmp_path / "net.pth")), 5, 32)


def test_a_cosine_classifier_gives_scaled_cosines_in_float32():
    model = build_model(_config(cosine_scale=20.0), 5, 32).eval()
    images = _images()
    out = model(images)
    expected = 20 * torch.cosine_similarity(out.features[:, None], model.classifier.weight[None], dim=2)
    torch.testing.assert_close(out.logits, expected)
    assert not any(name == "classifier.bias" for name in model.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(images)
    assert low.features.dtype == torch.bfloat16 and low.logits.dtype == torch.float32
    # The features are rounded, the cosines are not.
    exact = 20 * torch.cosine_similarity(low.features.float()[:, None], model.classifier.weight[None], dim=2)
    torch.testing.assert_close(low.logits, exact)


@pytest.mark.parametrize("cosine_scale", [None, 16.0])
def test_the_own_head_is_the_classifier(cosine_scale, tmp_path):
    model = build_model(_config(cosine_scale=cosine_scale), 5, 32).eval()
    out = model(_images())
    head = model.own_head()
    torch.testing.assert_close(head.logits(out.features), out.logits)
    assert head.normalise is (cosine_scale is not None)
    # It survives being saved as one of the heads, as stage two does.
    again = parse_heads(save_heads({"own": head}))[0]["own"]
    torch.testing.assert_close(again.logits(out.features), out.logits)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_computed_a_second_time_on_request(recompute):
    calls = []
    model = build_model(_config(checkpoint_activations=recompute), 5, 32)
    model.backbone.layer1[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(_images()).logits.sum().backward()
    assert len(calls) == (2 if recompute else 1)


def test_activations_that_cannot_be_recomputed():
    with pytest.raises(UserError, match=r"^model.checkpoint_activations: timm's 'vgg11' cannot recompute its activ"):
        build_model(_config(backbone="vgg11", checkpoint_activations=True), 5, 64)


def test_autocast_chooses_the_images_dtype():
    model = build_model(_config(), 3, 32).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, full = model(_images().bfloat16()), model(_images())
    torch.testing.assert_close(low.logits, full.logits, rtol=0.05, atol=0.05)


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(UserError, match=re.escape("model.backbone = 'resnett50' is no timm network; did you mean '")):
        build_model(_config(backbone="resnett50"), 5, 32)


def test_backbone_that_cannot_take_the_size():
    with pytest.raises(UserError, match=r"'vgg11' cannot take data\.image_px = 8 \(.*too small\)"):
        build_model(_config(backbone="vgg11"), 5, 8)


def test_timm_weights_without_network_name_the_remedy(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"'test_resnet' could not be downloaded \(.*give the path of a \.safetensors"):
        build_model(_config(weights="timm"), 5, 32)


def test_timm_has_no_weights_for_the_network():
    with pytest.raises(UserError, match=r"model\.weights = 'timm': timm has no weights for 'vit_base_patch16_18x2"):
        build_model(_config(backbone="vit_base_patch16_18x2_224", weights="timm"), 5, 32)
