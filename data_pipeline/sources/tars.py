"""WebDataset shards that exist already: an image member and its label in `.cls` or `.json`, grouped by key.

A key is a member's name up to the first dot after the last slash, as WebDataset has it. Nothing is unpacked: the
listing reads headers and labels, and notes where in the tar each image lies. What is wrong with a member is said of its
sample, and what is wrong with a shard of the shard; samples that stand before the damage are kept.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from braceexpand import braceexpand

from cluster.errors import UserError
from data_pipeline.config import SourceConfig
from data_pipeline.raw import TarPlace
from data_pipeline.sources.rows import IMAGE_SUFFIXES, Row, counted, first, name_of, split_of_path

MAX_LABEL_BYTES = 2**20
"""Of a `.cls` or `.json`: more is no label."""
SAMPLES_LOOKED_INTO = 200
"""To see which fields there are."""
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError)


@dataclass
class _Sample:
    """The members of one key."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Suffix -> offset and bytes."""
    labels: dict[str, bytes] = field(default_factory=dict)
    """`cls`, `json` -> content."""
    problem: str | None = None


def find_shards(path: str) -> list[Path]:
    """The tars that a path means: one, all of a folder and its sub-folders, or a pattern of braces and wildcards.

    Raises:
        UserError: A brace pattern names a file that is not there, or the pattern matches nothing.
    """
    if Path(path).is_dir():
        return sorted(Path(path).rglob("*.tar"))
    if Path(path).is_file():
        return [Path(path)]
    try:
        patterns = list(braceexpand(path))
    except ValueError:
        raise UserError(f"source.path = {path}: its braces are unbalanced; write e.g. train-{{000..009}}.tar") from None
    found = [
        Path(name) for pattern in patterns for name in (sorted(glob(pattern)) if has_magic(pattern) else [pattern])
    ]
    gone = [str(shard) for shard in found if not shard.is_file()]
    if gone or not found:
        raise UserError(
            f"source.path = {path}: {counted(len(gone), 'shard')} not there ({first(gone)}); correct the pattern"
            if gone
            else f"source.path = {path}: no shard matches; give a .tar, a folder of them or a pattern of their names"
        )
    return sorted(set(found))


def read_shards(shards: list[Path], config: SourceConfig) -> list[Row]:
    """A row a sample, and a row with a `problem` for whatever cannot be used.

    Names of the JSON's fields are `config.label_column`, `group_column`, `split_column`. Without the last, splits are
    taken from the shards' names where all of them name one.

    Raises:
        UserError: Some of the shards name a split and others do not, or a shard is compressed.
    """
    root = Path(os.path.commonpath([shard.absolute().parent for shard in shards]))
    names = [shard.absolute().relative_to(root).as_posix() for shard in shards]
    splits = ["" if config.split_column else split_of_path(name) for name in names]
    unnamed = [name for name, split in zip(names, splits, strict=True) if not split]
    if unnamed and any(splits):
        raise UserError(
            f"source.path = {config.path}: some shards' names begin with train, val or test and "
            f"{counted(len(unnamed), 'other')} not ({first(unnamed)}); rename them, or name a JSON field as "
            "source.split_column"
        )
    rows: list[Row] = []
    for shard, name, split in zip(shards, names, splits, strict=True):
        rows += _read_shard(shard, name, split, config)
    return rows


def read_json_fields(shards: list[Path]) -> tuple[dict[str, list[str]], bool]:
    """The names and whole numbers in the `.json` of the first samples, by field, and whether there are `.cls` too.

    Samples without a field are passed over, and so is what `read_shards` complains of.
    """
    fields: dict[str, list[str]] = {}
    has_cls, seen = False, 0
    with shards[0].open("rb") as file, suppress(*_BROKEN):
        for member in _members(shards[0], file):
            has_cls |= member.name.lower().endswith(".cls")
            if not member.name.lower().endswith(".json") or not member.isreg() or member.size > MAX_LABEL_BYTES:
                continue
            file.seek(member.offset_data)
            with suppress(ValueError):
                for name, value in _parse_json(file.read(member.size)).items():
                    if isinstance(value, str | int) and not isinstance(value, bool):
                        fields.setdefault(name, []).append(str(value).strip())
            seen += 1
            if seen == SAMPLES_LOOKED_INTO:
                break
    return fields, has_cls


def _read_shard(shard: Path, shard_name: str, split: str, config: SourceConfig) -> Iterator[Row]:
    samples: dict[str, _Sample] = {}
    nowhere = TarPlace(str(shard), 0, 0)
    outside: set[str] = set()
    try:
        with shard.open("rb") as file:
            for member in _members(shard, file):
                if not _leads_out(member.name):
                    _collect(samples, member, file)
                elif member.name not in outside:
                    outside.add(member.name)
                    told = "the member's name leads out of the shard"
                    yield Row(f"{shard_name}/{member.name}", "", nowhere, split=split, problem=told)
    except UserError:
        raise
    except _BROKEN as error:
        yield Row(shard_name, "", nowhere, split=split, problem=f"corrupt tar: {' '.join(str(error).split())}")
    for key, sample in samples.items():
        yield _row(key, sample, shard, shard_name, split, config)


def _members(shard: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """All members but folders and hidden files; then an error, if it was not the end that stopped `tarfile`.

    It takes a broken header in the middle for the end, hence the look at what is there.
    """
    if file.read(2) == b"\x1f\x8b":
        raise UserError(f"{shard} is compressed, and its members cannot be read in place; unpack it with gunzip")
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            if not member.isdir() and not PurePosixPath(member.name).name.startswith("."):
                yield member
        file.seek(tar.offset)
        end = file.read(tarfile.BLOCKSIZE)
    if end != bytes(tarfile.BLOCKSIZE):
        state = f"no header at byte {tar.offset}" if end else f"it ends at byte {tar.offset} without an end mark"
        raise tarfile.ReadError(state)


def _leads_out(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name


def _collect(samples: dict[str, _Sample], member: tarfile.TarInfo, file: BinaryIO) -> None:
    matched = _NAME.fullmatch(member.name.removeprefix("./"))
    key, suffix = (matched[1], matched[2].lower()) if matched else (member.name.removeprefix("./"), "")
    is_image = PurePosixPath(f"x.{suffix}").suffix in IMAGE_SUFFIXES
    if not is_image and suffix not in ("cls", "json"):
        return
    sample = samples.setdefault(key, _Sample())
    if suffix in sample.images or suffix in sample.labels:
        sample.problem = f"duplicate key: {key}.{suffix} is there more than once"
    elif not member.isreg() or member.issparse():
        sample.problem = f".{suffix} is a link or special file, not an image or label"
    elif is_image:
        sample.images[suffix] = member.offset_data, member.size
    elif member.size > MAX_LABEL_BYTES:
        sample.problem = f".{suffix} has {member.size} bytes, more than the {MAX_LABEL_BYTES} of any label"
    else:
        file.seek(member.offset_data)  # tarfile finds its own place again
        sample.labels[suffix] = file.read(member.size)


def _row(key: str, sample: _Sample, shard: Path, shard_name: str, split: str, config: SourceConfig) -> Row:
    # `x.jpg` is the image where there is `x.mask.png` too.
    plain = [suffix for suffix in sample.images if "." not in suffix] or list(sample.images)
    problem, label, group = sample.problem, "", ""
    if problem is None and len(plain) != 1:
        problem = f"several images ({', '.join(plain)}), which one is meant is not said" if plain else "no image"
    suffix = plain[0] if plain else ""
    offset, length = sample.images[suffix] if plain else (0, 0)
    if problem is None:
        try:
            label, group, given = _labels(sample.labels, config)
            split = given or split
        except ValueError as error:
            problem = str(error)
    place = TarPlace(str(shard), offset, length)
    name = f"{shard_name}/{key}.{suffix}" if suffix else f"{shard_name}/{key}"
    return Row(name, label, place, group, split, key.replace("/", "__"), problem)


def _labels(members: dict[str, bytes], config: SourceConfig) -> tuple[str, str, str]:
    """Label, group and split of a sample, '' where there is none; ValueError says what is wrong."""
    described = _parse_json(members["json"]) if "json" in members else {}
    in_json = _text(described, config.label_column)
    try:
        in_cls = members.get("cls", b"").decode().strip()
    except UnicodeDecodeError:
        raise ValueError(".cls is neither a number nor a name in UTF-8") from None
    by_cls, by_json = (name_of(label, config.class_names) for label in (in_cls, in_json))
    comparable = by_cls.isdecimal() == by_json.isdecimal()  # a number and a name may mean the same
    if by_cls and by_json and by_cls != by_json and comparable:
        raise ValueError(f".cls says {by_cls} and .json {config.label_column} = {by_json}")
    label = in_json or in_cls  # a name says more than a number
    if not label:
        raise ValueError(f"no label: neither a .cls nor {config.label_column!r} in a .json")
    return label, _text(described, config.group_column), _text(described, config.split_column)


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        described = json.loads(data)
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise ValueError(".json is no JSON object")
    return described


def _text(described: dict[str, Any], field_name: str | None) -> str:
    value = described.get(field_name) if field_name is not None else None
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f".json {field_name} is neither a name nor a whole number")
    return str(value).strip()
