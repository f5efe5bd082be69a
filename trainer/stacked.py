"""Several arrays of features as one, without copying them: memory maps stay memory maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


class StackedRows:
    """The rows of some arrays [N_i, D], one array after the other; read by slice or by row numbers.

    Args:
        parts: Array and the rows of it that count, int64 [M_i], or None for all of them.
    """

    def __init__(self, parts: Sequence[tuple[np.ndarray, np.ndarray | None]]):
        self._parts = [(x, np.arange(len(x)) if rows is None else rows) for x, rows in parts]
        self._starts = np.cumsum([0, *(len(rows) for _, rows in self._parts)])
        dim = self._parts[0][0].shape[1]
        assert all(x.shape[1] == dim for x, _ in self._parts), "features of different width"
        self.shape = (int(self._starts[-1]), dim)
        self.size = self.shape[0] * dim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, wanted: slice | np.ndarray) -> np.ndarray:
        """Rows [B, D], copied."""
        rows = np.arange(*wanted.indices(len(self))) if isinstance(wanted, slice) else np.asarray(wanted)
        out = np.empty((len(rows), self.shape[1]), dtype=self._parts[0][0].dtype)
        for (x, own_rows), (start, end) in zip(self._parts, pairwise(self._starts), strict=True):
            here = (rows >= start) & (rows < end)
            if here.any():
                out[here] = x[own_rows[rows[here] - start]]
        return out
