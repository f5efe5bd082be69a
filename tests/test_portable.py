"""A model as one file: what ONNX and `torch.export` compute of pixels is what `predict` says of the same images."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import trainer.portable as module
from cluster.errors import UserError
from tests.canary import CommandLine
from tests.test_preprocessing import picture
from trainer.config import ModelConfig
from trainer.export import ModelDescription, load_model, save_model
from trainer.heads import Head
from trainer.model import build_model
from trainer.portable import PortableModel, export_model

CLASSES = ("naevus", "mélanome", "<b>", "=1+1")
PX = 32
SIZES = ((100, 100), (450, 600), (90, 33))  # of which resizing leaves no ties to be rounded


def save(folder, temperature=1.5):
    torch.manual_seed(0)
    config = ModelConfig(backbone="test_resnet", hidden_dim=8, embedding_dim=4, mirrors="horizontal")
    network = build_model(config, len(CLASSES), PX)
    for _ in range(5):
        network(torch.randn(16, 3, PX, PX))
    head = Head(2 * torch.randn(len(CLASSES), 96), torch.randn(len(CLASSES)), normalise=True)
    described = ModelDescription(config, CLASSES, PX, 1.143, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), temperature)
    save_model(folder, network, head, described)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def program(model):
    """The traced model: what tracing costs is paid once."""
    loaded = load_model(model)
    return module._traced(PortableModel(loaded).eval(), loaded)


@pytest.fixture
def traced(program, monkeypatch):
    monkeypatch.setattr(module, "_traced", lambda portable, model: program)


@pytest.fixture(scope="module")
def files(model, program, tmp_path_factory):
    """The two files, and the differences that were told."""
    folder = tmp_path_factory.mktemp("out")
    onnx_file, program_file = folder / "new" / "model.onnx", folder / "new" / "model.pt2"
    told = export_model(model, onnx_file), 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_traced", lambda portable, loaded: program)
        told = told[0], export_model(model, program_file, "torch-export")
    assert sorted(path.name for path in onnx_file.parent.iterdir()) == ["model.onnx", "model.pt2"]
    return onnx_file, program_file, told


@pytest.fixture(scope="module")
def runs(files):
    session = onnxruntime.InferenceSession(str(files[0]), providers=["CPUExecutionProvider"])
    program = torch.export.load(files[1]).module()
    return {
        "onnx": lambda pixels: session.run(["probabilities"], {"images": pixels})[0],
        "torch-export": lambda pixels: program(torch.from_numpy(pixels)).detach().numpy(),
    }


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
class TestBoth:
    def test_it_says_of_pixels_what_predict_says_of_the_file(self, runs, kind, model, tmp_path):
        for height, width in SIZES:
            pixels = picture(height, width)
            Image.fromarray(pixels).save(tmp_path / f"{height}.png")
            expected = load_model(model).predict([tmp_path / f"{height}.png"]).probabilities
            np.testing.assert_allclose(runs[kind](pixels[None]), expected, atol=1e-4)
            assert 0.01 < expected.max() < 0.99, "probabilities that show nothing"

    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 1), (5, 33, 700), (2, 61, 47)])
    def test_any_batch_and_any_size(self, runs, kind, model, shape):
        pixels = np.stack([picture(*shape[1:])] * shape[0])
        pixels[-1] = 255 - pixels[-1]
        expected = PortableModel(load_model(model)).eval()(torch.from_numpy(pixels)).detach().numpy()
        said = runs[kind](pixels)
        assert said.shape == (shape[0], len(CLASSES)) and said.dtype == np.float32
        np.testing.assert_allclose(said, expected, atol=1e-4)
        np.testing.assert_allclose(said.sum(axis=1), 1, atol=1e-5)

    def test_the_difference_that_was_seen_is_told(self, files, kind):
        assert 0 <= files[2][kind == "torch-export"] <= 1e-4


def test_what_computes_something_else_is_not_written(traced, tmp_path):
    """The trace of one model, the description of another."""
    other = save(tmp_path / "other", temperature=1.53)
    with pytest.raises(UserError, match=r"m\.pt2 was not written: its probabilities differ by 0\.0\d+ from PyTorch's"):
        export_model(other, tmp_path / "m.pt2", "torch-export")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_the_difference_bounds_that_of_the_probabilities_and_sees_what_saturates():
    expected = np.random.default_rng(0).dirichlet(np.full(6, 0.1), 1000)
    found = expected * (1 + 1e-4 * np.random.default_rng(1).normal(size=expected.shape))
    assert np.abs(found - expected).max() <= module.difference(found, expected) * (1 + 1e-3)
    sure = np.array([[1.0, 1e-12]])
    assert module.difference(np.array([[1.0, 1e-9]]), sure) > 0.2
    assert module.difference(np.array([[1.0, 0.0]]), np.array([[1.0, 1e-35]])) == 0
    assert not module.difference(np.array([[np.nan, 1.0]]), sure) <= 1


def test_an_onnx_file_is_well_formed_and_describes_itself(files):
    made = onnx.load(files[0])
    onnx.checker.check_model(made, full_check=True)
    told = {entry.key: entry.value for entry in made.metadata_props}
    assert json.loads(told["classes"]) == list(CLASSES)
    assert "uint8 [batch, height, width, 3], RGB, upright" in told["input"]
    assert json.loads(told["provenance"])["versions"]["torch"] == torch.__version__.split("+")[0]
    (given,), (back,) = made.graph.input, made.graph.output
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8 and back.name == "probabilities"
    assert [bool(dim.dim_param) for dim in given.type.tensor_type.shape.dim] == [True, True, True, False]


def test_a_program_describes_itself(files):
    told = {"classes": "", "input": ""}
    torch.export.load(files[1], extra_files=told)
    assert json.loads(told["classes"]) == list(CLASSES) and "uint8" in told["input"]


def test_the_page_s_program_runs(files, tmp_path, monkeypatch, capsys):
    """The one for people who have onnxruntime and not rarelens."""
    monkeypatch.chdir(tmp_path)
    Path("skin.onnx").symlink_to(files[0])
    Image.fromarray(picture(60, 90)).save("new.jpg")
    page = (Path(module.__file__).parent.parent / "docs" / "using_a_model.md").read_text()
    (program,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnxruntime" in text)
    exec(program, {})
    said = capsys.readouterr().out
    assert all(repr(name) in said for name in CLASSES)


def test_the_command(model, traced, tmp_path, capsys):
    status, _ = CommandLine(capsys)("export", model, "--format", "torch-export", "--out", tmp_path / "m.pt2")
    assert status == 0 and (tmp_path / "m.pt2").is_file()


def test_a_missing_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"^ONNX needs onnxscript: pip install 'rarelens\[export\]'$"):
        export_model(model, tmp_path / "m.onnx")


def test_wrong_formats_and_suffixes(model, tmp_path):
    with pytest.raises(UserError, match="--format 'tflite' is not known; known: onnx, torch-export"):
        export_model(model, tmp_path / "m.tflite", "tflite")
    with pytest.raises(UserError, match=r"--out .*m\.onnx must end in \.pt2 for --format torch-export"):
        export_model(model, tmp_path / "m.onnx", "torch-export")
    with pytest.raises(UserError, match=r"nowhere holds no model\.json"):
        export_model(tmp_path / "nowhere", tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_onnx_file_can_hold(model, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_ONNX_BYTES", 1000)
    with pytest.raises(UserError, match=r"the model has 0\.0 GiB of weights and an ONNX file holds less than 2 GiB; "):
        export_model(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_onnx_lacks(model, traced, tmp_path, monkeypatch):
    def lacks(*_, **__):
        raise RuntimeError("No ONNX function found for\n<OpOverload(op='aten.x')>")

    monkeypatch.setattr(torch.onnx, "export", lacks)
    with pytest.raises(UserError, match=r"'test_resnet' cannot be written as ONNX by torch .* \(No ONNX .*; pip inst"):
        export_model(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_traced(model, tmp_path, monkeypatch):
    monkeypatch.setattr(PortableModel, "forward", lambda self, images: images if images.sum() > 3 else images + 1)
    with pytest.raises(UserError, match=r"backbone 'test_resnet' cannot be exported by torch .*; use `rarelens predi"):
        export_model(model, tmp_path / "m.pt2", "torch-export")
    assert list(tmp_path.iterdir()) == []
