"""A column of strings in Arrow against a numpy array of objects."""

import numpy as np
import pyarrow as pa

from data_pipeline.strings import Strings

WORDS = np.array([f"k{i}" for i in range(10)], dtype=object)
COLUMN = Strings(pa.chunked_array([pa.array(WORDS[:4]), pa.array(WORDS[4:])]))


def test_it_reads_like_an_array_of_objects():
    assert len(COLUMN) == 10 and COLUMN[3] == "k3" and COLUMN[-1] == "k9" and COLUMN[np.int64(5)] == "k5"
    for rows in (np.array([7, 0, 7]), np.array([-1, 2]), slice(2, 8, 3), WORDS == "k6", np.array([], dtype=np.int64)):
        assert COLUMN[rows].tolist() == WORDS[rows].tolist() and COLUMN[rows].dtype == object
    assert COLUMN.tolist() == list(COLUMN) == WORDS.tolist()
    assert np.isin(COLUMN, ["k2", "no"]).tolist() == np.isin(WORDS, ["k2", "no"]).tolist()
    assert np.array_equal(np.concatenate([COLUMN, COLUMN]), np.concatenate([WORDS, WORDS]))


def test_comparison_and_filter():
    assert (COLUMN == "k4").tolist() == (WORDS == "k4").tolist()
    assert (Strings(WORDS) == COLUMN).all() and (COLUMN == WORDS).all()
    assert COLUMN.filter(WORDS > "k5").tolist() == WORDS[WORDS > "k5"].tolist()
