"""What a user's files say about themselves: which table holds the labels, and what each of its columns is.

Rules, in this order; a setting that the user gives is never guessed, and what was guessed is told with its reason.

1. `labels`: of the CSV and Parquet files in the folder, the one whose rows name most of its images and which has a
   column that can hold classes. A column names images where at least half of its values are paths, file names or stems
   of images. Without such a table, folders are classes.
2. `image_column`: the column that names most images.
3. `split_column`: its values are all words for splits (train, valid, test ...), train among them.
4. `group_column`: called patient, subject, case, lesion ... and with two values or more; of several the one with fewest
   values, since a patient has several lesions.
5. `label_column`: called label, class, diagnosis, dx ...; else the only one left that can hold classes: two values or
   more, none empty, each in two rows on average.

Fields of WebDataset shards' JSON are columns too; there the image is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cluster.errors import UserError
from data_pipeline.config import SourceConfig
from data_pipeline.sources.folder import find_images
from data_pipeline.sources.rows import SPLIT_NAMES, counted, first
from data_pipeline.sources.table import PARQUET_SUFFIXES, read_all_columns
from data_pipeline.sources.tars import find_shards, read_json_fields

TABLE_SUFFIXES = (".csv", *PARQUET_SUFFIXES)
MAX_TABLES = 50
"""More tables than this are no tables of labels; the first ones by name are looked into."""
IMAGE_SHARE = 0.5
"""Of a column's values that must name images."""
LABEL_NAMES = (
    "label", "labels", "class", "classname", "classlabel", "diagnosis", "dx", "target", "category", "finding",
    "disease", "species", "grade", "level", "y", "type",
)  # fmt: skip
"""What a column of classes is called, likeliest first; names are compared in small letters and digits alone."""
GROUP_NAMES = (
    "patient", "patientid", "patientname", "subject", "subjectid", "person", "personid", "participant",
    "participantid", "pid", "mrn", "case", "caseid", "donor", "donorid", "animal", "animalid", "slide", "slideid",
    "specimen", "specimenid", "lesion", "lesionid", "study", "studyid", "exam", "examid", "group", "groupid",
)  # fmt: skip
"""What a column of patients, lesions and the like is called."""

Columns = dict[str, list[str]]


class Guess(NamedTuple):
    """A source, and for each setting of it that was not given the rule that it follows."""

    source: SourceConfig
    reasons: dict[str, str]
    """By the setting's name, e.g. `label_column`."""


def guess_source(path: str, given: dict[str, str | list[str] | None] | None = None) -> Guess:
    """The source that a path means.

    Args:
        path: Folder of images, MedMNIST `.npz`, or WebDataset shards, as `source.path`.
        given: Settings of `SourceConfig` that the user knows; None = to be guessed.

    Raises:
        UserError: A table names the images and which of its columns holds the class cannot be told.
    """
    known = {name: value for name, value in (given or {}).items() if value is not None}
    root = Path(path)
    if root.is_dir():
        images = find_images(root)
        if images:
            return _guess_table(root, images, known)
        if find_shards(path):
            return _guess_shards(path, known)
    elif (root.is_file() and root.suffix.lower() == ".tar") or (not root.exists() and set(path) & set("*?[{")):
        return _guess_shards(path, known)
    return Guess(SourceConfig(path=path, **known), {})  # an .npz, or nothing: whoever reads it says what is wrong


def _guess_table(root: Path, images: list[str], known: dict) -> Guess:
    """Of a folder with images: the table and its columns, or folders as classes."""
    table, columns = _find_table(root, images, known.get("labels"))
    if table is None:
        reason = "no table names the images: each folder is a class"
        return Guess(SourceConfig(path=str(root), **known), {"labels": reason})
    aliases = _aliases(images)
    shares = {name: _share_named(values, aliases) for name, values in columns.items()}
    image = known.get("image_column") or max(shares, key=lambda name: shares[name])
    said = {
        "labels": f"names {round(shares.get(image, 0) * len(columns.get(image, ())))} of {len(images)} images",
        "image_column": f"{shares.get(image, 0):.0%} of its values name images",
    }
    rest = {name: values for name, values in columns.items() if name != image}
    chosen, reasons = _guess_columns(rest, known, f"{root / table}")
    source = {"path": str(root), "labels": table, "image_column": image, **chosen, **known}
    return Guess(SourceConfig(**source), _not_given(said | reasons, known))


def _guess_shards(path: str, known: dict) -> Guess:
    columns, has_cls = read_json_fields(find_shards(path))
    chosen, reasons = _guess_columns(columns, known, path, label_needed=not has_cls and "label" not in columns)
    return Guess(SourceConfig(path=path, **chosen | known), _not_given(reasons, known))


def _find_table(root: Path, images: list[str], given: str | None) -> tuple[str | None, Columns]:
    """Path below the root and columns of the table of labels; None where there is none."""
    if given is not None:
        return given, read_all_columns(root / given)
    found = sorted(
        file.relative_to(root).as_posix()
        for file in root.rglob("*")
        if file.suffix.lower() in TABLE_SUFFIXES and file.is_file() and not _is_hidden(file.relative_to(root))
    )
    aliases = _aliases(images)
    best: tuple[float, str | None, Columns] = (0.0, None, {})
    for name in sorted(found, key=lambda name: (name.count("/"), name))[:MAX_TABLES]:
        try:
            columns = read_all_columns(root / name)
        except UserError:  # no table of ours; where it was meant, `source.labels` names it and the error is told
            continue
        shares = {column: _share_named(values, aliases) for column, values in columns.items()}
        column = max(shares, key=lambda name: shares[name], default=None)
        if column is None or shares[column] < IMAGE_SHARE:
            continue
        if not any(_may_be_classes(values) for other, values in columns.items() if other != column):
            continue
        named = shares[column] * len(columns[column])
        if named > best[0]:
            best = named, name, columns
    return best[1:]


def _guess_columns(
    columns: Columns, known: dict, where: str, label_needed: bool = True
) -> tuple[dict[str, str], dict[str, str]]:
    """Columns of split, group and class among those that do not name images, and the reasons."""
    chosen: dict[str, str] = {}
    reasons: dict[str, str] = {}
    taken = {known.get(f"{what}_column") for what in ("split", "group", "label")}

    def take(what: str, column: str | None, reason: str) -> None:
        if column is not None and f"{what}_column" not in known:
            chosen[f"{what}_column"], reasons[f"{what}_column"] = column, reason
            taken.add(column)

    def left() -> Columns:
        return {name: values for name, values in columns.items() if name not in taken}

    take("split", _split_column(left()), "all of its values are words for splits, which are kept")
    group = _group_column(left())
    take("group", group, f"called like a patient or lesion; {len(set(columns[group])) if group else 0} values")
    if "label_column" not in known and label_needed:
        take("label", *_label_column(left(), where))
    return chosen, reasons


def _split_column(columns: Columns) -> str | None:
    for name, values in columns.items():
        words = {SPLIT_NAMES.get(value.lower()) for value in set(values)}
        if "train" in words and len(words) > 1 and None not in words:
            return name
    return None


def _group_column(columns: Columns) -> str | None:
    fitting = {
        name: len(set(values))
        for name, values in columns.items()
        if _plain(name) in GROUP_NAMES and len(set(values)) > 1
    }
    return min(fitting, key=lambda name: fitting[name], default=None)


def _label_column(columns: Columns, where: str) -> tuple[str, str]:
    """The column of classes and the reason.

    Raises:
        UserError: None or several may be it.
    """
    fitting = [name for name, values in columns.items() if _may_be_classes(values)]
    by_name = sorted((n for n in fitting if _plain(n) in LABEL_NAMES), key=lambda n: LABEL_NAMES.index(_plain(n)))
    if by_name:
        return by_name[0], f"called like a class; {counted(len(set(columns[by_name[0]])), 'value')}"
    if len(fitting) == 1:
        return fitting[0], "the only column that can hold classes"
    spread = [name for name, values in columns.items() if set(values) <= {"0", "1", "0.0", "1.0"}]
    if len(spread) > 1 and spread == fitting[: len(spread)]:
        raise UserError(
            f"{where}: the class seems to be spread over columns of 0 and 1 ({first(spread)}); write one column with "
            "its name, and give that as --label-column"
        )
    told = f"{first(fitting)} may" if fitting else f"none of {first(list(columns)) or 'its columns'} can"
    raise UserError(f"{where}: which column holds the class cannot be told, {told}; give it as --label-column")


def _may_be_classes(values: list[str]) -> bool:
    return "" not in values and 2 <= len(set(values)) <= len(values) / 2


def _aliases(images: Iterable[str]) -> set[str]:
    """All that a table may call these images: path, path without suffix, file name, stem."""
    names: set[str] = set()
    for image in images:
        pure = PurePosixPath(image)
        names |= {image, str(pure.with_suffix("")), pure.name, pure.stem}
    return names


def _share_named(values: list[str], aliases: set[str]) -> float:
    named = sum(value.replace("\\", "/").removeprefix("./") in aliases for value in values)
    return named / max(1, len(values))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _not_given(reasons: dict[str, str], known: dict) -> dict[str, str]:
    return {name: reason for name, reason in reasons.items() if name not in known}
