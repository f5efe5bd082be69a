"""What the README tells people to type is what the programs take; test_cli.py runs the commands for real."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

import rarelens
from cluster.config import load_config
from tuning.config import Config

ROOT = Path(__file__).parent.parent
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


def commands(program):
    return [command[command.index(program) + 1 :] for command in COMMANDS if program in command]


def test_the_first_screen_shows_both_commands():
    assert COMMANDS[:2] == [["make", "demo"], ["make", "test"]]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for (target,) in commands("make"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("arguments", commands("rarelens"), ids=" ".join)
def test_rarelens_takes_the_command(arguments):
    command = typer.main.get_command(rarelens.app).commands[arguments[0]]
    context = command.make_context(arguments[0], list(arguments[1:]))  # raises where an option or argument is wrong
    if arguments[0] == "train":
        load_config(Config, ROOT / context.params["config"], context.params["overrides"])


def test_ray_has_the_commands():
    from ray.scripts.scripts import cli

    for first, *_ in commands("ray"):
        assert first in cli.commands, first


def test_every_command_is_in_the_table():
    table = (ROOT / "README.md").read_text()
    for name in typer.main.get_command(rarelens.app).commands:
        assert f"`rarelens {name}" in table or f"`{name}`" in table, name
