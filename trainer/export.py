"""The model folder, what a user takes home: safetensors files and one JSON file, no pickles.

    model.safetensors      backbone.*, embedding.*, head.weight [C, F], head.bias [C]
    examples.safetensors   training examples to compare with (`trainer.examples`); may be deleted before passing it on
    model.json             format version, architecture, classes, preprocessing, temperature, provenance, SHA-256

`model.json` is written last and vouches for all files: where it is and its checksums match, the model is whole.
Shapes: B images, px side of an image, F features, C classes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cluster.errors import UserError
from cluster.storage import open_storage
from trainer.config import ModelConfig
from trainer.examples import TrainingExamples, parse_examples, save_examples
from trainer.heads import Head
from trainer.model import Classifier, build_model

if TYPE_CHECKING:
    from trainer.predict import Predictions

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
EXAMPLES_FILE = "examples.safetensors"
DESCRIPTION_FILE = "model.json"
PACKAGES = (
    "rarelens", "torch", "torchvision", "timm", "deepspeed", "ray", "nvidia-dali-cuda130", "numpy", "safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class ModelDescription:
    """Everything about a model that is not a weight."""

    model: ModelConfig
    classes: tuple[str, ...]
    image_px: int
    resize_ratio: float
    """The short side is resized to image_px times this, then the centre is cropped."""
    mean: tuple[float, float, float]
    """RGB, in units of 0..1; subtracted before the network."""
    std: tuple[float, float, float]
    temperature: float
    """Logits are divided by it; fitted on val."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Run, dataset and its fingerprint, SHA-256 of the checkpoint, the configuration as used."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A trained model. Tensors that it takes were resized, cropped and normalised as `description` says."""

    network: Classifier
    head: Head
    description: ModelDescription
    examples: TrainingExamples | None = None
    """What images are compared with; None where the folder holds none."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the probabilities' columns."""
        return self.description.classes

    @property
    def device(self) -> torch.device:
        """Where the model is, and images go."""
        return self.head.weight.device

    def predict(self, images: Sequence[str | Path], batch_size: int = 64) -> Predictions:
        """What the model says of image files, folders and patterns, local or `s3://`: see `trainer.predict`."""
        from trainer.predict import classify, find_images, joined

        return joined(list(classify(self, find_images([str(image) for image in images]), batch_size)))

    @torch.inference_mode()
    def predict_proba(self, images: Tensor) -> Tensor:
        """Calibrated class probabilities [B, C], float32, of normalised images [B, 3, px, px] on the model's device."""
        return self.probabilities(self.network.features(images))

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        """Calibrated class probabilities [B, C], float32, of the network's features [B, F]."""
        return torch.softmax(self.head.logits(features).float() / self.description.temperature, dim=1)

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of normalised images [B, 3, px, px], for nearest neighbours."""
        return self.network.embed(self.network.features(images))


def save_model(
    folder: str | Path,
    network: Classifier,
    head: Head,
    description: ModelDescription,
    examples: TrainingExamples | None = None,
) -> None:
    """Write a model folder; other files in it (report, metrics, predictions) are left alone.

    Args:
        folder: A local folder; made if it is not there.
        network: The stage-one network; its classifier is left out, `head` takes its place.
        head: The winner of stage two, on raw backbone features.
        description: The rest; creation date and library versions are added to its provenance.
        examples: Training examples to compare images with; None = none are kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"backbone": network.backbone.state_dict(), "embedding": network.embedding.state_dict()}
    tensors = {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}
    tensors |= {"head.weight": torch.as_tensor(head.weight), "head.bias": torch.as_tensor(head.bias)}
    data = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "architecture": {
            **description.model.model_dump(include={"backbone", "hidden_dim", "embedding_dim", "mirrors"}),
            "normalised_embedding": network.normalise,
            "normalised_features": head.normalise,
        },
        "classes": list(description.classes),
        "preprocessing": {
            "image_px": description.image_px,
            "resize_ratio": description.resize_ratio,
            "mean": list(description.mean),
            "std": list(description.std),
        },
        "temperature": description.temperature,
        "provenance": {
            **description.provenance,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": library_versions(),
        },
    }
    files = {WEIGHTS_FILE: data}
    if examples is not None:
        files[EXAMPLES_FILE], values["unlike_training"] = save_examples(examples)
    values["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    values["sha256"][DESCRIPTION_FILE] = _own_hash(values)
    # A kill in between leaves no model.json beside weights that it does not describe.
    for name in (DESCRIPTION_FILE, EXAMPLES_FILE):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        _write_whole(folder / name, content)
    _write_whole(folder / DESCRIPTION_FILE, json.dumps(values, indent=2, ensure_ascii=False).encode())


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Open and verify a model folder, by path or `s3://` URI.

    Raises:
        UserError: The folder is no model folder, was written by a newer version, or one of its files was altered.
    """
    place = str(folder).rstrip("/")
    storage = open_storage(place)
    if not storage.exists(DESCRIPTION_FILE):
        hint = f"did you mean {place}/model?" if storage.exists(f"model/{DESCRIPTION_FILE}") else "e.g. runs/NAME/model"
        raise UserError(f"{place} holds no {DESCRIPTION_FILE}; give the model folder that a finished run wrote, {hint}")
    values = _verified_description(storage.read(DESCRIPTION_FILE), place)
    with_examples = EXAMPLES_FILE in values["sha256"] and storage.exists(EXAMPLES_FILE)
    files = {name: storage.read(name) for name in (WEIGHTS_FILE, *[EXAMPLES_FILE] * with_examples)}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != values["sha256"].get(name):
            raise UserError(_altered(place, name))
    try:
        network, head, description = _build(values, load(files[WEIGHTS_FILE]))
        examples = None
        if with_examples:
            dims = len(description.classes), network.feature_dim
            examples = parse_examples(files[EXAMPLES_FILE], values["unlike_training"], *dims).to(device)
    except UserError as error:
        raise UserError(f"{place}/{DESCRIPTION_FILE}: {error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        # Its checksums match, so it was written like this: not by `save_model`.
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{place} is no model folder that rarelens wrote ({reason}); get it again from whom you trust"
        ) from None
    head = replace(head, weight=head.weight.to(device), bias=head.bias.to(device))
    return LoadedModel(network.to(device).requires_grad_(False).eval(), head, description, examples)


def _build(values: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Classifier, Head, ModelDescription]:
    """The network, its head and what is known of it, on the CPU; raises whatever does not fit."""
    architecture, preprocessing = values["architecture"], values["preprocessing"]
    config = ModelConfig(
        backbone=architecture["backbone"],
        hidden_dim=architecture["hidden_dim"],
        embedding_dim=architecture["embedding_dim"],
        mirrors=architecture.get("mirrors", "none"),
    )
    description = ModelDescription(
        model=config,
        classes=tuple(values["classes"]),
        image_px=preprocessing["image_px"],
        resize_ratio=preprocessing["resize_ratio"],
        mean=tuple(preprocessing["mean"]),
        std=tuple(preprocessing["std"]),
        temperature=values["temperature"],
        provenance=values["provenance"],
    )
    network = build_model(
        config, len(description.classes), description.image_px, normalise=architecture["normalised_embedding"]
    )
    for part in ("backbone", "embedding"):
        state = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        network.get_submodule(part).load_state_dict(state)
    head = Head(tensors["head.weight"], tensors["head.bias"], normalise=architecture["normalised_features"])
    return network, head, description


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that made a result; what is not installed is left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _verified_description(data: bytes, place: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
        version, own = values["format_version"], values["sha256"][DESCRIPTION_FILE]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(_altered(place, DESCRIPTION_FILE)) from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{place}/{DESCRIPTION_FILE} has format version {version}, this rarelens reads {FORMAT_VERSION}; "
            f"install the rarelens that made the model ({values.get('provenance', {}).get('versions', {})})"
        )
    if _own_hash(values) != own:
        raise UserError(_altered(place, DESCRIPTION_FILE))
    return values


def _own_hash(values: dict[str, Any]) -> str:
    """SHA-256 of a description without its checksums: classes in another order would be a silent disaster."""
    rest = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _altered(place: str, file: str) -> str:
    return f"{place}/{file} was altered or is damaged (its SHA-256 does not match); copy the model folder again"


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
