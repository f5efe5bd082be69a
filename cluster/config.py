"""How configurations are read: one YAML file and `key.path=value` overrides -> frozen, typed, checked objects."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import UserError
from cluster.plain import read_yaml, refuse_credentials


class Section(BaseModel):
    """Base of every configuration class: frozen, no unknown keys, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


Count = Annotated[int, Field(ge=1)]


class ClusterConfig(Section):
    """Where a run's workers live and how they are looked after."""

    workers: Count | tuple[Count, Count] | Literal["auto"] = Field(
        "auto",
        description="Training processes; [least, most] = as many as there is room for, more or fewer after a restart; "
        "auto = one a GPU, else one a core",
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto = cuda where Ray sees a GPU")
    cpus_per_worker: float = Field(1.0, gt=0, description="Cores reserved for each worker, its decoding included")
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = Field(
        "pack",
        description="Workers on few machines, or on many; strict_: on one machine, or each on its own, or not at all",
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description="Restarts in a row without progress before giving up: each new checkpoint has them counted anew; "
        "-1 = no limit",
    )
    health_check_interval_s: float = Field(0.5, gt=0, description="How often Ray Train looks after its workers")
    hang_after_s: float = Field(
        45.0,
        gt=0,
        description="Pause without a step or batch from which workers are taken for hung and restarted, unless they "
        "made pauses a tenth as long before",
    )

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """The least and the most workers; None = auto."""
        if self.workers == "auto":
            return None
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    @model_validator(mode="after")
    def _least_is_not_more_than_most(self) -> ClusterConfig:
        if self.worker_range and self.worker_range[0] > self.worker_range[1]:
            raise ValueError(f"workers = {list(self.worker_range)} is [least, most]; swap them")
        return self


SectionType = TypeVar("SectionType", bound=Section)


def load_config(kind: type[SectionType], path: str | Path, overrides: list[str] | None = None) -> SectionType:
    """Read a YAML file, lay `key.path=value` overrides over it and check the whole.

    Args:
        kind: The configuration class.
        path: A YAML file, or its s3:// URI.
        overrides: `key.path=value` strings; the value is YAML (`3`, `1e-3`, `[a, b]`, `null`).

    Raises:
        UserError: The file is missing or no YAML mapping, or a key or value is wrong; the message names the key and,
            for an unknown one, the nearest right one.
    """
    values = read_yaml(_read(str(path)), f"configuration {path}") or {}
    if not isinstance(values, dict):
        raise UserError(
            f"configuration {path} must be a mapping of keys to values, not a {type(values).__name__}; write lines of "
            "KEY: VALUE, as configs/quickstart.yaml has them"
        )
    return parse_config(kind, apply_overrides(values, overrides or []), origin=str(path))


def _read(path: str) -> bytes:
    if "://" in path:
        from cluster.storage import open_storage

        folder, _, name = path.rpartition("/")
        return open_storage(folder).read(name)
    if not Path(path).is_file():
        raise UserError(
            f"configuration {path} does not exist; give the path of a YAML file, e.g. configs/quickstart.yaml"
        )
    return Path(path).read_bytes()


def parse_config(kind: type[SectionType], values: dict[str, Any], origin: str) -> SectionType:
    """Check `values` and freeze them; pydantic's findings become one `UserError` that names each key."""
    refuse_credentials(values, origin)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}: {'; '.join(_findings(kind, error))}") from None


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `values` with each `key.path=value` laid over it."""
    merged = _copy(values)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise UserError(f"override {override!r} must read key.path=value, e.g. stage_one.epochs=8")
        *parents, leaf = name.split(".")
        target = merged
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                target[parent] = {}
            target = target[parent]
        try:
            target[leaf] = _scalar(text)
        except UserError:
            raise UserError(
                f"override {override!r}: {text!r} is not valid YAML; quote it, e.g. {name}='\"text\"'"
            ) from None
    return merged


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> `{"a.b.c": value}`, the form in which configurations are compared and overridden."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the closest known name, else the list of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _findings(kind: type[Section], error: ValidationError) -> list[str]:
    """One clause for each wrong key; pydantic has several where a key may be one of several types."""
    by_key: dict[str, list[dict[str, Any]]] = {}
    for item in error.errors():
        by_key.setdefault(_key(kind, dict(item)), []).append(dict(item))
    return [
        _clause(kind, key, items)
        for key, items in by_key.items()
        if not any(other.startswith(f"{key}.") for other in by_key)  # says the same again, e.g. of a list's item
    ]


def _clause(kind: type[Section], key: str, items: list[dict[str, Any]]) -> str:
    item = items[0]
    if item["type"] == "extra_forbidden":
        return (
            f"unknown key {key!r}; {nearest(str(item['loc'][-1]), list(_section(kind, item['loc'][:-1]).model_fields))}"
        )
    if item["type"] == "missing":
        return f"{key} is missing; add it"
    if item["type"] == "value_error":  # of our own validators, which name the key and the value themselves
        message = item["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    if len(items) == 1 and item["type"] == "literal_error":
        names = [word.strip(" '") for word in item["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{key} = {item['input']!r} is not known; {nearest(str(item['input']), names)}"
    rules = [other["msg"].removeprefix("Input should be ").partition(", ")[0] for other in items]
    rules = ["a list" if rule == "a valid tuple" else rule for rule in rules]
    if item["type"] == "model_type":
        rules = ["a mapping of keys to values"]
    rule = f" must be {' or '.join(rules)}" if item["msg"].startswith("Input should be ") else f": {item['msg']}"
    return f"{key} = {item['input']!r}{rule}"


def _key(kind: type[Section], item: dict[str, Any]) -> str:
    """`a.b.c` of pydantic's location, which also names the arms of unions."""
    *outer, last = item["loc"] or ("",)
    parts = [part for i, part in enumerate(outer) if _names_something(kind, item["loc"][:i], part)]
    if item["type"] == "extra_forbidden" or _names_something(kind, tuple(outer), last):
        parts.append(last)
    return ".".join(str(part) for part in parts)


def _names_something(kind: type[Section], location: tuple[int | str, ...], part: int | str) -> bool:
    return isinstance(part, int) or part in _section(kind, location).model_fields


def _section(kind: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The innermost section at `location`; parts that are no fields, such as arms of unions, are passed over."""
    current = kind
    for part in location:
        field = current.model_fields.get(str(part))
        if field is not None:
            candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
            current = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), current)
    return current


def _scalar(text: str) -> Any:
    """YAML 1.1 reads `1e-3` as a string; every user means the number."""
    value = read_yaml(text, "override") if text else None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _copy(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _copy(value) for key, value in values.items()}
    return [_copy(value) for value in values] if isinstance(values, list) else values
