"""What a configuration can hold, read from its classes: every setting with its type, its default and its meaning."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from cluster.config import Section, nearest
from cluster.errors import UserError

COLUMNS = 100
HEAD = """# Configuration reference
Every setting of the YAML file that `rarelens train CONFIG` reads. `KEY=VALUE` on the command line overrides the file,
`rarelens settings NAME` tells the same in the terminal, and an unknown key is an error that names the nearest one.
Made from the code by `make docs`."""
Schema = dict[str, Any]
NAMES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "null"}
"""JSON Schema's types in words."""
BOUNDS = {"minimum": ">= {:g}", "exclusiveMinimum": "> {:g}", "maximum": "<= {:g}", "exclusiveMaximum": "< {:g}"}


class Entry(NamedTuple):
    """One setting. Of a section, `kind` and `default` are empty and `meaning` is its class's text."""

    key: str
    kind: str = ""
    default: str = ""
    meaning: str = ""

    @property
    def is_section(self) -> bool:
        """Whether settings lie below it."""
        return not self.kind


def settings_of(kind: type[Section]) -> list[Entry]:
    """Every section and every setting of a configuration class, in order, a section before what it holds."""
    schema = kind.model_json_schema()
    return list(_entries(schema, schema.get("$defs", {}), ""))


def find_settings(kind: type[Section], key: str | None) -> list[Entry]:
    """A setting, or a section with all that it holds; None = everything.

    Raises:
        UserError: There is none of that name; the message names the nearest.
    """
    entries = settings_of(kind)
    found = [entry for entry in entries if key is None or entry.key == key or entry.key.startswith(f"{key}.")]
    if not found:
        raise UserError(f"there is no setting {key!r}; {nearest(str(key), [entry.key for entry in entries])}")
    return found


def markdown(entries: list[Entry]) -> str:
    """`docs/configuration.md`: a heading and a table a section."""
    lines = [HEAD]
    table_of: str | None = None
    for entry in entries:
        if entry.is_section:
            lines += ["", f"## {entry.key}", entry.meaning]
            table_of = None
            continue
        section = entry.key.rpartition(".")[0]
        if section != table_of:
            lines += ["", "| setting | values | default | meaning |", "|---|---|---|---|"]
            table_of = section
        cells = [f"`{entry.key}`", entry.kind, f"`{entry.default}`", entry.meaning]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines).strip() + "\n"


def text(entries: list[Entry]) -> str:
    """For the terminal: `key: values, default`, and the meaning below."""
    lines: list[str] = []
    for entry in entries:
        head = (
            f"{entry.key}:" if entry.is_section else f"{entry.key} = {entry.default}  ({entry.kind.replace('`', '')})"
        )
        lines += ["", head] if entry.is_section else [head]
        lines += textwrap.wrap(entry.meaning, COLUMNS, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines).strip() + "\n"


def _entries(schema: Schema, classes: dict[str, Schema], prefix: str) -> Iterator[Entry]:
    """Settings first, sections after them: a table is not torn."""
    properties = {name: _resolved(value, classes) for name, value in schema.get("properties", {}).items()}
    for name, value in properties.items():
        if "properties" not in value:
            default = json.dumps(value.get("default"), ensure_ascii=False)
            yield Entry(prefix + name, _kind(value, classes), default.strip('"'), _one_line(value.get("description")))
    for name, value in properties.items():
        if "properties" in value:
            yield Entry(prefix + name, meaning=_one_line(value.get("description")))
            yield from _entries(value, classes, f"{prefix}{name}.")


def _resolved(schema: Schema, classes: dict[str, Schema]) -> Schema:
    """A reference to a class, with what is said beside it laid over the class."""
    if "$ref" not in schema:
        return schema
    return {**classes[schema["$ref"].rpartition("/")[2]], **{k: v for k, v in schema.items() if k != "$ref"}}


def _kind(schema: Schema, classes: dict[str, Schema]) -> str:
    """What a value may be, in words."""
    schema = _resolved(schema, classes)
    if "anyOf" in schema:
        return ", ".join(_kind(arm, classes) for arm in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "properties" in schema:
        return f"a mapping: {', '.join(schema['properties'])}"
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("prefixItems")
        return f"[{', '.join(_kind(item, classes) for item in items)}]" if items else _list(schema, classes)
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"name: {_kind(inner, classes)}" if isinstance(inner, dict) and inner else "a mapping"
    bounds = [text.format(schema[name]) for name, text in BOUNDS.items() if name in schema]
    return " ".join([NAMES.get(str(kind), "anything"), " and ".join(bounds)]).strip()


def _list(schema: Schema, classes: dict[str, Schema]) -> str:
    return f"a list of {_kind(schema.get('items', {}), classes)}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
