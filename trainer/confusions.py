"""Confusion matrices as JSON: whole where there are few classes, else only the cells that are not zero.

Shapes: C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

WHOLE_UP_TO = 1000
"""Classes; a matrix of 10,000 would be 100 million numbers, nearly all of them 0."""


def keep_confusion(counts: np.ndarray) -> list[list[int]] | dict[str, Any]:
    """Counts [C, C] for a JSON file; of many classes `classes` and `cells`, each [true, predicted, count]."""
    if len(counts) <= WHOLE_UP_TO:
        return counts.tolist()
    true, predicted = np.nonzero(counts)
    return {"classes": len(counts), "cells": np.stack([true, predicted, counts[true, predicted]], axis=1).tolist()}


def read_confusion(kept: Any) -> Any:
    """What was kept, as counts [C, C]: a list of lists, or an array where only the cells were kept."""
    if not isinstance(kept, dict):
        return kept
    counts = np.zeros((kept["classes"], kept["classes"]), dtype=np.int32)
    if kept["cells"]:
        true, predicted, number = np.array(kept["cells"], dtype=np.int64).T
        counts[true, predicted] = number
    return counts
