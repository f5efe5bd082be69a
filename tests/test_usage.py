"""What a user is told about a model that was just made is what can be typed: in the README beside it, and in Python."""

import ast
import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image

import rarelens
import trainer
from trainer.config import ModelConfig
from trainer.examples import TrainingExamples, UnlikeRule
from trainer.export import ModelDescription, save_model
from trainer.heads import Head
from trainer.model import build_model
from trainer.usage import predict_command, usage

PX = 32
ROOT = Path(__file__).parent.parent


@pytest.fixture
def two_images(tmp_path, monkeypatch):
    """A working folder as the example in `trainer/__init__.py` has it: a model that tells two images apart."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = ModelConfig(backbone="test_resnet", hidden_dim=8, embedding_dim=4)
    network = build_model(config, 2, PX).eval()
    drawn = np.random.default_rng(0).integers(0, 256, (2, PX, PX, 3), dtype=np.uint8)
    drawn[0] //= 4
    (tmp_path / "new").mkdir()
    for name, pixels in zip("ab", drawn, strict=True):
        Image.fromarray(pixels).save(tmp_path / "new" / f"{name}.png")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    scaled = (drawn / 255 - np.array(mean)) / np.array(std)
    with torch.no_grad():
        first, second = network.features(torch.from_numpy(scaled).permute(0, 3, 1, 2).float())
    weight = 100 * torch.stack([second - first, first - second])  # classes: melanoma, naevus
    head = Head(weight, -weight @ (first + second) / 2)
    known = torch.nn.functional.normalize(first, dim=0)[None]
    rule = UnlikeRule(k=1, distance=2e-3, quantile=0.95, held_out_images=1)
    examples = TrainingExamples(np.array(["train a"], dtype=object), np.array([1]), known.half(), rule)
    described = ModelDescription(config, ("melanoma", "naevus"), PX, 1.0, mean, std, 1.0)
    save_model(tmp_path / "runs" / "mine" / "model", network, head, described, examples)
    return tmp_path


def test_the_example_in_python(two_images):
    found = doctest.testmod(trainer)
    assert found.attempted >= 8 and found.failed == 0


def test_only_what_the_package_has_can_be_imported_from_it():
    with pytest.raises(ImportError, match="cannot import name 'load_modell'"):
        from trainer import load_modell  # noqa: F401


def test_reading_a_configuration_does_not_load_pytorch():
    program = "import sys, trainer.config; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("model", ["runs/mine/model", "/data/it's mine/model", "s3://bucket/runs/mine/model"])
def test_the_commands_beside_the_model_can_be_typed(model):
    text = usage(model)
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert shlex.split(predict_command(model)) in commands and len(commands) == 2
    for _, name, *arguments in commands:
        context = typer.main.get_command(rarelens.app).commands[name].make_context(name, arguments)
        assert context.params["model"] == model
    (python,) = python_of(text)
    assert model in [node.value for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Constant)]


def python_of(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_python_beside_the_model_runs(two_images, capsys):
    (python,) = python_of(usage("runs/mine/model"))
    exec(python.replace("NEW_IMAGES", "new"), {})
    assert "['naevus', 'melanoma']" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["first_model.md", "using_a_model.md"])
def test_the_pages_python_runs(two_images, page):
    said = {}
    exec(python_of((ROOT / "docs" / page).read_text())[0].replace("skin", "mine").replace("new_images", "new"), said)
    assert said["said"].labels == ["naevus", "melanoma"]
