"""Several arrays of features as one, without copying them: memory maps stay memory maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class StackedRows:
    """The rows of some arrays [N_i, D], one array after the other; read by slice or by row numbers.

    Args:
        parts: Array, itself a stack or not, and the rows of it that count, int64 [M_i], or None for all of them.
    """

    def __init__(self, parts: Sequence[tuple[np.ndarray | StackedRows, np.ndarray | None]]):
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(x if rows is None else rows) for x, rows in parts)])
        dim: int = parts[0][0].shape[1]
        self.dtype: np.dtype = parts[0][0].dtype
        assert all(x.shape[1] == dim and x.dtype == self.dtype for x, _ in parts), "features of different kinds"
        self.shape: tuple[int, int] = (int(self._starts[-1]), dim)
        self.size = self.shape[0] * dim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, wanted: slice | np.ndarray) -> np.ndarray:
        """Rows [B, D], copied."""
        rows = np.arange(*wanted.indices(len(self))) if isinstance(wanted, slice) else np.asarray(wanted)
        out = np.empty((len(rows), self.shape[1]), dtype=self.dtype)
        # Only parts that hold some of the rows are asked: of many parts a minibatch meets few.
        part_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(part_of_row):
            x, own_rows = self._parts[part]
            here = part_of_row == part
            local = rows[here] - self._starts[part]
            out[here] = x[local if own_rows is None else own_rows[local]]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of them, [N, D]: only for what is small."""
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)
