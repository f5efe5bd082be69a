"""docs/troubleshooting.md quotes messages that the code still says; and every message for users names a remedy."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cluster", "data_pipeline", "trainer", "tuning")
FILES = [ROOT / "rarelens.py", *(file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))]
QUOTED = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
FILLED_IN = "\0"
CALLED_BY_VALIDATORS = ("check_losses",)
REMEDY = re.compile(r"; | must |: pip install |^\0+$")
"""A semicolon and what to do, or a rule from which it follows; or a message that is made elsewhere."""


def text_of(node: ast.AST) -> str:
    """A string of the source, what is filled in replaced by one character."""
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else FILLED_IN for part in node.values)
    return FILLED_IN


def strings() -> list[str]:
    trees = [ast.parse(file.read_text()) for file in FILES]
    return [
        text_of(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)
    ]


ALL = strings()


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_one_of_the_code(message):
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("..."))
    assert any(re.search(pattern, text, re.DOTALL) for text in ALL), f"no message of the code reads like {message!r}"


def test_there_are_messages_to_look_at():
    assert len(QUOTED) > 20 and len(QUOTED) == len(set(QUOTED))


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """Where something of that name is made."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [node for node in nodes if isinstance(node.func, ast.Name) and node.func.id == name]


def said_to_users(file: Path) -> list[ast.Call]:
    """Each `UserError`, and each `ValueError` of the configuration's checks, which become one."""
    tree = ast.parse(file.read_text())
    found = calls(tree, "UserError")
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        checks = any("_validator" in ast.unparse(decorator) for decorator in function.decorator_list)
        if checks or function.name in CALLED_BY_VALIDATORS:
            found += calls(function, "ValueError")
    return found


def test_every_error_for_users_names_a_remedy():
    without, looked_at = [], 0
    for file in FILES:
        for node in said_to_users(file):
            text = text_of(node.args[0])
            looked_at += node.func.id == "ValueError"
            if not REMEDY.search(text) and not text.endswith(FILLED_IN):  # `{remedy}`, which others share
                without.append(f"{file.relative_to(ROOT)}:{node.lineno}: {text.replace(FILLED_IN, '...')}")
    assert without == []
    assert looked_at > 30
