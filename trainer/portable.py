"""A model as one file for programs that know nothing of rarelens: ONNX, or a program of `torch.export`.

Preprocessing and temperature are inside: pixels in, calibrated probabilities out. What is not inside is the decoding of
files (give upright 8-bit RGB) and the comparison with training examples.

    images          uint8 [batch, height, width, 3], any batch, any size, all images of a batch having the same
    probabilities   float32 [batch, classes]

The class names are JSON: in an ONNX file metadata under `classes`, in a `.pt2` file an extra file of that name.

Shapes: B images, H x W their size, C classes, F features.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import UserError
from data_pipeline.graph import ImageSettings
from data_pipeline.preprocessing import Preprocessing
from trainer.export import LoadedModel, load_model
from trainer.model import mean_over_mirrors
from trainer.weights import one_line

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
TOLERANCE = 1e-4
"""Largest `difference` from PyTorch's probabilities with which a file is written."""
SMALLEST = 1e-30
"""Probabilities below are equal."""
MAX_ONNX_BYTES = 2**31 - 2**20
"""An ONNX file is one protobuf message, of less than 2 GiB."""
INPUT, OUTPUT = "images", "probabilities"
TRACED_SHAPE = (2, 61, 47, 3)
"""No two sizes alike and none 1, which a tracer would take for a law."""
CHECKED_SHAPES = ((1, 480, 640, 3), (3, 97, 64, 3), (2, 20, 33, 3))
"""Shrunk and enlarged, upright and lying, batches of other sizes than the traced one."""
BLOCK_PX = 16


class PortableModel(nn.Module):
    """Pixels, uint8 [B, H, W, 3], RGB -> calibrated class probabilities, float32 [B, C]."""

    weight: Tensor
    bias: Tensor

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        described = model.description
        settings = ImageSettings(described.image_px, described.resize_ratio, described.mean, described.std)
        self.preprocessing, self.backbone = Preprocessing(settings), model.network.backbone
        self.mirrored = model.network.mirrored
        self.register_buffer("weight", model.head.weight.float())
        self.register_buffer("bias", model.head.bias.float())
        self.normalise, self.temperature = model.head.normalise, described.temperature

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        features = mean_over_mirrors(self.backbone, self.preprocessing(images), self.mirrored)
        if self.normalise:
            features = nn.functional.normalize(features, dim=1)
        return torch.softmax(torch.addmm(self.bias, features, self.weight.T) / self.temperature, dim=1)


def export_model(model_folder: str | Path, out: str | Path, kind: str = "onnx") -> float:
    """Write a model as one file, if what it computes is what PyTorch computes; else nothing is written.

    Args:
        model_folder: Path or `s3://` URI of a model folder.
        out: The file, `.onnx` or `.pt2`; its folder is made.
        kind: A key of `SUFFIXES`.

    Returns:
        The largest `difference` that was seen between the written file and PyTorch.

    Raises:
        UserError: The kind is unknown or does not go with the suffix, a package is missing, the model cannot be read,
            exported or written as one file, or the file computes something else.
    """
    out = Path(out)
    if kind not in SUFFIXES:
        raise UserError(f"--format {kind!r} is not known; known: {', '.join(SUFFIXES)}")
    if out.suffix != SUFFIXES[kind]:
        raise UserError(f"--out {out} must end in {SUFFIXES[kind]} for --format {kind}")
    if kind == "onnx":
        _need_onnx()
    model = load_model(model_folder)
    portable = PortableModel(model).eval()
    write, runner = (_write_onnx, _onnx_runner) if kind == "onnx" else (_write_program, _program_runner)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".partial-{out.name}")
    try:
        with _quiet():
            write(_traced(portable, model), partial, model)
            seen = _largest_difference(portable, runner(partial))
        if not seen <= TOLERANCE:
            raise UserError(
                f"{out} was not written: its probabilities differ by {seen:.2g} from PyTorch's, more than "
                f"{TOLERANCE:g}; try --format {'torch-export' if kind == 'onnx' else 'onnx'}"
            )
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return seen


def _traced(portable: PortableModel, model: LoadedModel) -> torch.export.ExportedProgram:
    """The model's operators, for any batch, height and width."""
    dynamic = torch.export.Dim.DYNAMIC
    pixels = torch.zeros(TRACED_SHAPE, dtype=torch.uint8)
    try:
        return torch.export.export(portable, (pixels,), dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic},))
    except Exception as error:  # whatever a network of timm's does that cannot be traced
        raise UserError(
            f"backbone {model.description.model.backbone!r} cannot be exported by torch {torch.__version__} "
            f"({one_line(error)}); use `rarelens predict`, or `load_model` from Python"
        ) from error


def _metadata(model: LoadedModel) -> dict[str, str]:
    described = model.description
    return {
        "classes": json.dumps(model.classes, ensure_ascii=False),
        "input": f"{INPUT}: uint8 [batch, height, width, 3], RGB, upright; resized and cropped to "
        f"{described.image_px} px inside",
        "output": f"{OUTPUT}: float32 [batch, {len(model.classes)}], calibrated, in the order of classes",
        "provenance": json.dumps({key: described.provenance.get(key) for key in ("run", "dataset", "versions")}),
    }


def _write_onnx(program: torch.export.ExportedProgram, path: Path, model: LoadedModel) -> None:
    total = sum(tensor.nbytes for tensor in program.state_dict.values())
    if total > MAX_ONNX_BYTES:
        raise UserError(
            f"the model has {total / 2**30:.1f} GiB of weights and an ONNX file holds less than 2 GiB; "
            f"use --format torch-export"
        )
    try:
        made = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    except Exception as error:  # an operator that ONNX lacks, or packages that do not go together
        raise UserError(
            f"backbone {model.description.model.backbone!r} cannot be written as ONNX by torch {torch.__version__} "
            f"({one_line(error)}); pip install --upgrade 'rarelens[export]', or use --format torch-export"
        ) from error
    assert made is not None, "torch.onnx.export with dynamo=True returns the program"
    made.model.metadata_props.update(_metadata(model))
    made.save(str(path))


def _onnx_runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixels: session.run([OUTPUT], {INPUT: pixels})[0]


def _write_program(program: torch.export.ExportedProgram, path: Path, model: LoadedModel) -> None:
    with open(path, "wb") as file:  # by name, torch would want it to end in .pt2
        torch.export.save(program, file, extra_files=_metadata(model))


def _program_runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    with open(path, "rb") as file:
        run = torch.export.load(file).module()
    return lambda pixels: run(torch.from_numpy(pixels)).numpy()


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of two sets of probabilities, in log p by 1 + |log p|.

    It bounds that of the probabilities, since p (1 + |log p|) is at most 1, and it also tells where all are near 0 or 1
    and the difference of p would show nothing.
    """
    ours, theirs = (np.log(np.maximum(p.astype(np.float64), SMALLEST)) for p in (found, expected))
    return float((np.abs(ours - theirs) / (1 + np.abs(theirs))).max())


@torch.inference_mode()
def _largest_difference(portable: PortableModel, run: Callable[[np.ndarray], np.ndarray]) -> float:
    """Between the model and what was written of it, on drawn pictures of several sizes: blocks of colour, and noise."""
    draw = np.random.default_rng(0)
    largest = 0.0
    for batch, height, width, channels in CHECKED_SHAPES:
        coarse = draw.integers(0, 216, (batch, -(-height // BLOCK_PX), -(-width // BLOCK_PX), channels))
        blocks = coarse.repeat(BLOCK_PX, axis=1).repeat(BLOCK_PX, axis=2)[:, :height, :width]
        pixels = (blocks + draw.integers(0, 40, blocks.shape)).astype(np.uint8)
        largest = max(largest, difference(run(pixels), portable(torch.from_numpy(pixels)).numpy()))
    return largest


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install 'rarelens[export]'") from None


@contextmanager
def _quiet() -> Iterator[Any]:
    """The exporters' warnings are for those who write them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
