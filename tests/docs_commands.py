"""The commands in the README, in docs/ and at the heads of shipped files, as a shell would split them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import typer.main

import rarelens

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HEADED = [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "ray_cluster.yaml", ROOT / "cluster" / "kuberay.yaml"]
"""Files whose first comment says how they are used."""


@dataclass(frozen=True)
class Command:
    """A line of a page: the program's name, its arguments, and the environment that stands before it."""

    page: str
    program: str
    arguments: tuple[str, ...]
    environment: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.page}: {' '.join((self.program, *self.arguments))}"


def commands_of(path: Path) -> list[Command]:
    """Every command of a page; of `ray job submit ... -- COMMAND` both."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
    return [command for block in blocks for command in _commands_in(path.name, block)]


def commands_of_head(path: Path) -> list[Command]:
    """The same of the comment that a file begins with; what a command is for stands three spaces behind it."""
    head = re.match(r"(?:#.*\n)*", path.read_text())
    assert head is not None
    lines = [re.split(r"\s{3,}", line.lstrip("# "))[0] for line in head[0].splitlines()]
    text = "\n".join(lines).replace("\\\n", " ")
    typed = [line for line in text.splitlines() if re.match(r"([A-Z_]+=\S+ )*(rarelens|ray) [a-z]", line)]
    return _commands_in(path.name, "\n".join(typed))


def _commands_in(page: str, text: str) -> list[Command]:
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "--" in words:
            at = words.index("--")
            found.append(_command(page, words[:at]))
            words = words[at + 1 :]
        if words:
            found.append(_command(page, words))
    return found


def _command(page: str, words: list[str]) -> Command:
    first = next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    program = words[first].removeprefix(".venv/bin/")
    return Command(page, program, tuple(words[first + 1 :]), tuple(words[:first]))


COMMANDS = [command for page in PAGES for command in commands_of(page)]
HEADS = [command for path in HEADED for command in commands_of_head(path)]


def parsed(arguments: tuple[str, ...]) -> dict:
    """What the command line makes of the arguments of `rarelens`; raises where an option or argument is wrong."""
    command = typer.main.get_command(rarelens.app).commands[arguments[0]]
    return command.make_context(arguments[0], list(arguments[1:])).params
