"""Imports go down the layers, maths imports no machinery, and DeepSpeed has one door."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("rarelens", "tuning", "trainer", "data_pipeline", "cluster")  # top to bottom
PURE = ("trainer/losses/*", "trainer/pairwise*.py", "data_pipeline/sampling.py")
MACHINERY = ("ray", "deepspeed", "torch.distributed")
ONE_DOOR = {"deepspeed": "trainer/engine.py"}  # module -> the only file that imports it


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """Every imported module, wherever the statement stands, as (line, dotted name).

    `from a import b` counts as `a.b`, since b may be a module. `package` is the importing file's own.
    """
    found = []
    tree = ast.parse(source)
    roots = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - (node.level - 1)] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif (
            isinstance(node, ast.Attribute) and dotted(node).split(".")[0] in roots
        ):  # `torch.distributed.all_reduce` after a plain `import torch`
            found.append((node.lineno, dotted(node)))
        elif isinstance(node, ast.Call) and dotted(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            found += [(node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return found


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute of a name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def violations(root: Path) -> list[str]:
    """`file:line imports module` for each import up a layer, from maths to machinery, or past the one door."""
    found = []
    files = [root / f"{LAYERS[0]}.py", *(file for layer in LAYERS[1:] for file in sorted((root / layer).rglob("*.py")))]
    for file in files:
        path = file.relative_to(root).as_posix()
        layer = path.split("/")[0].removesuffix(".py")
        forbidden = [*LAYERS[: LAYERS.index(layer)], "tests", "benchmarks"]
        if any(fnmatch(path, pure) for pure in PURE):
            forbidden += MACHINERY
        forbidden += [module for module, door in ONE_DOOR.items() if path != door]
        package = ".".join(file.relative_to(root).parent.parts)
        lines = {
            (line, name) for line, name in imports(file.read_text(), package) if any(within(name, f) for f in forbidden)
        }
        found += [f"{path}:{line} imports {name}" for line, name in sorted(lines)]
    return found


def test_imports_only_go_down():
    assert violations(ROOT) == []


def test_every_layer_and_every_pure_file_was_looked_at():
    assert all((ROOT / layer).is_dir() or (ROOT / f"{layer}.py").is_file() for layer in LAYERS)
    assert all(list(ROOT.glob(pure)) for pure in PURE)
    assert len(list((ROOT / "trainer" / "losses").glob("*.py"))) > 2


@pytest.mark.parametrize(
    ("path", "code", "found"),
    [
        ("cluster/x.py", "import trainer.model", "cluster/x.py:1 imports trainer.model"),
        ("cluster/x.py", "from data_pipeline import pack", "cluster/x.py:1 imports data_pipeline.pack"),
        ("cluster/x.py", "def f():\n    import rarelens", "cluster/x.py:2 imports rarelens"),
        (
            "data_pipeline/x.py",
            "if True:\n    from trainer.losses import y",
            "data_pipeline/x.py:2 imports trainer.losses.y",
        ),
        ("trainer/losses/x.py", "from ...tuning import space", "trainer/losses/x.py:1 imports tuning.space"),
        ("tuning/x.py", "import importlib\nimportlib.import_module('rarelens')", "tuning/x.py:2 imports rarelens"),
        ("tuning/x.py", "from tests import tiny", "tuning/x.py:1 imports tests.tiny"),
        ("trainer/losses/x.py", "import ray", "trainer/losses/x.py:1 imports ray"),
        (
            "trainer/losses/x.py",
            "from torch import distributed as d",
            "trainer/losses/x.py:1 imports torch.distributed",
        ),
        ("trainer/pairwise.py", "import torch.distributed.nn", "trainer/pairwise.py:1 imports torch.distributed.nn"),
        ("trainer/pairwise_x.py", "import deepspeed", "trainer/pairwise_x.py:1 imports deepspeed"),
        (
            "trainer/pairwise.py",
            "import torch\ntorch.distributed.barrier()",
            "trainer/pairwise.py:2 imports torch.distributed",
        ),
        ("trainer/universal.py", "def f():\n    import deepspeed", "trainer/universal.py:2 imports deepspeed"),
        (
            "data_pipeline/sampling.py",
            "from deepspeed.comm import x",
            "data_pipeline/sampling.py:1 imports deepspeed.comm.x",
        ),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, code, found):
    place(tmp_path, path, code)
    assert found in violations(tmp_path)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("rarelens.py", "import tuning, trainer, data_pipeline, cluster"),
        ("tuning/x.py", "from trainer.config import TrainerConfig\nimport ray"),
        ("trainer/pool.py", "import torch.distributed"),
        ("trainer/engine.py", "import torch.distributed, deepspeed"),
        ("cluster/x.py", "trainer = make()\ntrainer.fit()"),
        ("trainer/losses/x.py", "import torch\nfrom trainer.pairwise import f\nimport raytracer"),
        (
            "cluster/x.py",
            "from cluster.errors import UserError\nfrom . import storage\n'import trainer'  # import trainer",
        ),
    ],
)
def test_what_is_allowed_is_not_found(tmp_path, path, code):
    place(tmp_path, path, code)
    assert violations(tmp_path) == []


def place(root: Path, path: str, code: str) -> None:
    (root / "rarelens.py").touch()
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(code)
