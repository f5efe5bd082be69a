"""The configuration reference: made from the code, whole, true and up to date."""

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field
from typer.testing import CliRunner

import rarelens
from cluster.config import Section, flatten, parse_config
from cluster.errors import UserError
from cluster.reference import Entry, find_settings, markdown, settings_of, text
from tuning.config import Config

ROOT = Path(__file__).parent.parent


class Inner(Section):
    """What is
    inside."""

    pair: tuple[float, float] = Field((0.0, 1.0), description="low | high")
    names: list[str] | None = Field(None, description="Some names")


class Outer(Section):
    """All of it."""

    inner: Inner = Inner()
    number: int = Field(3, ge=1, lt=9, description="How many")
    kind: Literal["auto"] | int = Field("auto", description="Which")
    raw: dict[str, Any] = Field({}, description="Anything")
    maybe: Inner | None = Field(None, description="Another")


def test_a_class_is_read_as_it_is_written():
    assert settings_of(Outer) == [
        Entry("number", "whole number >= 1 and < 9", "3", "How many"),
        Entry("kind", "`auto`, whole number", "auto", "Which"),
        Entry("raw", "a mapping", "{}", "Anything"),
        Entry("maybe", "a mapping: pair, names, null", "null", "Another"),
        Entry("inner", meaning="What is inside."),
        Entry("inner.pair", "[number, number]", "[0.0, 1.0]", "low | high"),
        Entry("inner.names", "a list of text, null", "null", "Some names"),
    ]


def test_a_table_a_section():
    made = markdown(settings_of(Outer))
    assert "| `number` | whole number >= 1 and < 9 | `3` | How many |" in made
    assert "## inner\nWhat is inside.\n\n| setting |" in made
    assert "| `inner.pair` | [number, number] | `[0.0, 1.0]` | low \\| high |" in made


def test_the_terminal_is_told_the_same():
    assert text(find_settings(Outer, "inner")).splitlines() == [
        "inner:",
        "    What is inside.",
        "inner.pair = [0.0, 1.0]  ([number, number])",
        "    low | high",
        "inner.names = null  (a list of text, null)",
        "    Some names",
    ]


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(UserError, match=r"there is no setting 'stage_one.los'; did you mean 'stage_one.loss'\?"):
        find_settings(Config, "stage_one.los")


def test_every_setting_says_what_it_means():
    assert [entry.key for entry in settings_of(Config) if not entry.meaning] == []


def test_the_defaults_that_are_told_are_those_of_the_code():
    told = {entry.key: yaml.safe_load(entry.default) for entry in settings_of(Config) if not entry.is_section}
    values: dict[str, Any] = {}
    for key, value in told.items():
        *sections, leaf = key.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
    assert parse_config(Config, values, "reference") == Config()
    assert told.keys() >= flatten(Config().model_dump(mode="json")).keys()


def test_the_reference_is_up_to_date():
    shown = CliRunner().invoke(rarelens.app, ["settings", "--markdown"])
    assert shown.exit_code == 0
    assert (ROOT / "docs" / "configuration.md").read_text() == shown.stdout, "run `make docs`"
