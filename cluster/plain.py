"""What is read of YAML and JSON that anybody may have written: plain values, of bounded size, without credentials."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from cluster.errors import UserError

MAX_VALUES = 100_000
"""Of one YAML file with its aliases written out: nine lines of aliases of aliases stand for a billion values."""
_CREDENTIALS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/]*@|.*\?.*=)", re.DOTALL)
# PyYAML's constructors of dates, numbers and booleans raise these on text that is none.
_BROKEN_YAML = (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError)


def read_yaml(data: str | bytes, origin: str) -> Any:
    """The values of a YAML text; its tags can make nothing but plain values.

    Args:
        data: The text.
        origin: What it is called in errors, e.g. `configuration x.yaml`.

    Raises:
        UserError: It is no YAML, asks for an object of Python, or unfolds to more than `MAX_VALUES` values.
    """
    try:
        values = yaml.safe_load(data)
        too_many = _count(values, {}) > MAX_VALUES
    except _BROKEN_YAML as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"{origin} is not valid YAML: {said}; correct that place: indent with spaces, quote text that holds ': '"
        ) from None
    except RecursionError:  # of brackets in brackets, or of an alias inside of its own anchor
        raise UserError(f"{origin} is not valid YAML: it is nested too deeply; write it flat") from None
    if too_many:
        raise UserError(f"{origin} unfolds to more than {MAX_VALUES} values by its aliases; write them out")
    return values


def read_json(data: str | bytes, origin: str, remedy: str) -> Any:
    """The values of a JSON text.

    Args:
        data: The text.
        origin: What it is called in errors.
        remedy: What to do about a damaged one.

    Raises:
        UserError: It is no JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{origin} is damaged, it is no JSON; {remedy}") from None


def refuse_credentials(values: Any, origin: str, key: str = "") -> None:
    """Credentials come by boto3's chain: a configuration is printed, pinned and sent to every worker.

    Raises:
        UserError: Some string is a URL with a user, password or signature; the key is named, the value is not repeated.
    """
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in inner:
        refuse_credentials(value, origin, f"{key}.{name}" if key else str(name))
    if isinstance(values, str) and _CREDENTIALS.match(values):
        raise UserError(
            f"{origin}: {key} is a URL with a user, password or signature; give credentials by environment, profile or "
            "role, and the plain URI here"
        )


def _count(value: Any, known: dict[int, int]) -> int:
    """Values in a value, each alias counted as often as it is used."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(item, known) for item in inner)
    return known[id(value)]
