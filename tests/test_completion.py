"""Shell completion in a real bash: what `rarelens --install-completion` writes is sourced and asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).parent / "rarelens"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home in which completion was installed."""
    folder = tmp_path_factory.mktemp("home")
    command = ["bash", "--norc", "-c", f"{PROGRAM} --install-completion && true"]  # the shell that asks is looked up
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "bash completion installed in" in done.stdout, done.stderr
    return folder


def completed(home, *words):
    """What bash offers for the last word."""
    script = (
        f'source ~/.bashrc; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        f'_rarelens_completion {PROGRAM}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    environment = {**os.environ, "HOME": str(home)}
    command = ["bash", "--norc", "-c", script, "bash", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_commands_and_options_are_completed(home):
    assert completed(home, "rarelens", "tra") == ["train"]
    assert set(completed(home, "rarelens", "init", "--gr")) == {"--group-column"}


def test_settings_are_completed_where_they_are_typed(home):
    assert completed(home, "rarelens", "train", "x.yaml", "stage_one.loss.t") == [
        "stage_one.loss.temperature=",
        "stage_one.loss.triplet_mean=",
    ]
