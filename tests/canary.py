"""What a hostile file would do if its code ran: a folder appears. And the command line, in this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import rarelens


class Canary:
    """Unpickling it makes the folder `path`; so do, as far as they run, the texts below."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)

    @property
    def shell(self) -> str:
        return f"mkdir {self.path}"

    @property
    def yaml(self) -> list[str]:
        return [
            f"!!python/object/apply:os.mkdir ['{self.path}']",
            f"!!python/object/new:os.mkdir ['{self.path}']",
            f"!!python/object/apply:subprocess.check_call [['mkdir', '{self.path}']]",
            "!!python/name:os.system",
            "!!python/module:antigravity",
        ]


class CommandLine:
    """`rarelens ...` as the installed program runs it."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str]:
        """Exit status, and what was said on stderr."""
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", ["rarelens", *map(str, arguments)])
            rarelens.main()
        return int(end.value.code or 0), self._capsys.readouterr().err

    def refuses(self, *arguments: object) -> str:
        """The one sentence that it ends with."""
        status, said = self(*arguments)
        assert status == 2, said
        *bars, sentence = said.strip().splitlines()
        assert sentence.startswith("error: ") and "Traceback" not in said and not any("error" in bar for bar in bars)
        return sentence
