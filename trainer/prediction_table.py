"""The table that `predict` leaves: CSV, Parquet, or rows for people on a terminal.

| column | what it is |
|---|---|
| `image` | path or URI as it was given or found |
| `label` | the most probable class |
| `p_CLASS` ... | calibrated probability of each class; or, for the most probable K classes alone: |
| `top_1`, `top_1_p` ... | class and probability, the most probable first |
| `similar_1`, `similar_1_label` ... | keys and classes of the nearest training examples |
| `distance` | to the training example that the rule looks at, 0 to 2 |
| `unlike_training` | whether the image is unlike the training set |

The last three are there where the model folder holds training examples.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from cluster.errors import UserError

if TYPE_CHECKING:
    from trainer.predict import Predictions

FORMATS = (".csv", ".parquet")
TOP_ON_A_TERMINAL = 3
# What a spreadsheet takes for a formula; a sign before letters and digits alone, as in "-ve", is harmless.
_FORMULA = re.compile(r"[=@\t\r]|[+-].*[^\w .]")


class Column(NamedTuple):
    """One column of some rows."""

    name: str
    kind: Literal["path", "text", "number", "flag"]
    values: Sequence[Any] | np.ndarray


class Table(Protocol):
    """What takes rows; the first that are written, though they may be none, decide the columns."""

    def write(self, said: Predictions) -> None:
        """Add a row an image."""


def columns(said: Predictions, top: int | None) -> list[Column]:
    """What is told of each image, in order.

    Args:
        said: The predictions.
        top: How many classes; None = all of them, a column each.
    """
    told = [Column("image", "path", said.images), Column("label", "text", said.labels)]
    if top is None:
        told += [Column(f"p_{name}", "number", said.probabilities[:, c]) for c, name in enumerate(said.classes)]
    else:
        for place, order in enumerate(_most_probable(said, top).T, start=1):
            told.append(Column(f"top_{place}", "text", [said.classes[c] for c in order]))
            told.append(Column(f"top_{place}_p", "number", said.probabilities[np.arange(len(order)), order]))
    if said.similar:
        for place in range(said.similar.keys.shape[1]):
            told.append(Column(f"similar_{place + 1}", "text", said.similar.keys[:, place].tolist()))
            told.append(Column(f"similar_{place + 1}_label", "text", said.similar.labels[:, place].tolist()))
        told.append(Column("distance", "number", said.similar.distance))
        told.append(Column("unlike_training", "flag", said.similar.unlike))
    return told


def check_format(out: Path) -> Path:
    """The path itself.

    Raises:
        UserError: Its suffix is none of `FORMATS`.
    """
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out} must end in {' or '.join(FORMATS)}")
    return out


@contextmanager
def open_table(out: Path | None, top: int | None) -> Iterator[Table]:
    """A table that takes rows and appears under its name when all is well.

    Args:
        out: A path with a suffix of `FORMATS`; None = stdout.
        top: See `columns`; a terminal has `TOP_ON_A_TERMINAL` where it is None.
    """
    if out is None:
        if not sys.stdout.isatty():
            yield _CsvTable(sys.stdout, top)
            return
        with _TerminalTable(top or TOP_ON_A_TERMINAL) as table:
            yield table
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.suffix == ".csv":
            with open(partial, "w", newline="", encoding="utf-8") as file:
                yield _CsvTable(file, top)
        else:
            with _ParquetTable(partial, top) as parquet:
                yield parquet
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


class _CsvTable:
    def __init__(self, file: IO[str], top: int | None) -> None:
        self._writer, self._top, self._begun = csv.writer(file, lineterminator="\n"), top, False

    def write(self, said: Predictions) -> None:
        told = columns(said, self._top)
        if not self._begun:
            self._writer.writerow([column.name for column in told])
            self._begun = True
        self._writer.writerows(zip(*(_cells(column) for column in told), strict=True))


def _cells(column: Column) -> list[str]:
    """A column as text that no spreadsheet runs."""
    if column.kind == "number":
        return [f"{value:.6f}" for value in column.values]
    if column.kind == "flag":
        return ["true" if value else "false" for value in column.values]
    return [_safe_path(value) if column.kind == "path" else _safe_text(value) for value in column.values]


class _ParquetTable:
    """Exact names and float32 probabilities, a row group a batch."""

    def __init__(self, path: Path, top: int | None) -> None:
        self._path, self._top = path, top
        self._writer: Any = None

    def __enter__(self) -> _ParquetTable:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, said: Predictions) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"path": pa.string(), "text": pa.string(), "number": pa.float32(), "flag": pa.bool_()}
        told = columns(said, self._top)
        schema = pa.schema([(column.name, kinds[column.kind]) for column in told])
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, schema)
        arrays = [pa.array(column.values, kinds[column.kind]) for column in told]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


class _TerminalTable:
    """Printed at the end, when the progress bar is gone."""

    def __init__(self, top: int) -> None:
        from rich.table import Table as RichTable

        self._top, self._table = top, RichTable(box=None, pad_edge=False, header_style="bold")

    def __enter__(self) -> _TerminalTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._table.row_count:
            from rich.console import Console

            Console().print(self._table)

    def write(self, said: Predictions) -> None:
        from rich.text import Text

        if not self._table.columns:
            for name in ("image", "class and probability", *(["looks like", ""] if said.similar else [])):
                self._table.add_column(name, overflow="fold")
        for row, order in enumerate(_most_probable(said, self._top)):
            cells = [said.images[row], ", ".join(f"{said.classes[c]} {said.probabilities[row, c]:.3f}" for c in order)]
            if said.similar:
                pairs = zip(said.similar.keys[row], said.similar.labels[row], strict=True)
                cells.append(", ".join(f"{key} ({label})" for key, label in list(pairs)[: self._top]))
                cells.append("unlike the training set" if said.similar.unlike[row] else "")
            self._table.add_row(*(Text(_printable(cell)) for cell in cells))  # Text: names are no markup


def _most_probable(said: Predictions, top: int) -> np.ndarray:
    """Class numbers [B, min(top, C)], the most probable first; of equal ones the first in the model's order."""
    return np.argsort(-said.probabilities, axis=1, kind="stable")[:, :top]


def _printable(text: str) -> str:
    """Without what a terminal would obey: a file may be called by an escape sequence."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _safe_path(name: str) -> str:
    """`=x.jpg` -> `./=x.jpg`: the same file, and no formula for a spreadsheet that opens the CSV."""
    return f"./{name}" if name.startswith(("=", "+", "-", "@")) else name


def _safe_text(text: str) -> str:
    """A class name or key that a spreadsheet would run gets the apostrophe that tells it not to (CSV only)."""
    return f"'{text}" if _FORMULA.match(text) else text
