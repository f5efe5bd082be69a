"""A column of strings that stays in Arrow until somebody asks: a million Python strings cost a second and 100 MB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa


class Strings:
    """Strings [N] that behave like a numpy array of objects where it is read: by row, rows, mask or slice, or whole."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, column: pa.ChunkedArray | np.ndarray | list[str]):
        self._column = (
            column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([pa.array(column, pa.string())])
        )

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, rows: Any) -> Any:
        """One string for a row number, else an object array."""
        if isinstance(rows, (int, np.integer)):
            return self._column[int(rows)].as_py()
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        rows = np.where(rows < 0, rows + len(self), rows)
        return _objects(self._column.take(pa.array(rows, pa.int64())))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> Any:
        return np.asarray(self) == (np.asarray(other) if isinstance(other, Strings) else other)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return _objects(self._column).astype(dtype or object)

    def tolist(self) -> list[str]:
        """All of them, as Python strings."""
        return self._column.to_pylist()

    def filter(self, mask: np.ndarray) -> Strings:
        """Those of a mask bool [N], still in Arrow."""
        return Strings(self._column.filter(pa.array(mask)))


def _objects(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(object)
