"""Confusion matrices of many classes are kept without their zeros, and read again as they were."""

import json

import numpy as np
import pytest

from trainer.confusions import WHOLE_UP_TO, keep_confusion, read_confusion
from trainer.findings import classes_in_confusions, most_confused
from trainer.metrics import confusion


@pytest.mark.parametrize("classes", [3, WHOLE_UP_TO, WHOLE_UP_TO + 1])
def test_what_is_kept_is_what_is_read(classes):
    rng = np.random.default_rng(0)
    counts = confusion(rng.integers(classes, size=500), rng.integers(classes, size=500), classes)
    kept = json.loads(json.dumps(keep_confusion(counts)))
    assert np.array_equal(read_confusion(kept), counts)
    assert isinstance(kept, dict) == (classes > WHOLE_UP_TO)
    assert most_confused(read_confusion(kept), counts.tolist()) == most_confused(counts.tolist(), counts.tolist())
    assert np.array_equal(classes_in_confusions(read_confusion(kept), 5), classes_in_confusions(counts.tolist(), 5))


def test_many_classes_take_as_much_as_there_are_images():
    labels = np.arange(3000)
    kept = keep_confusion(confusion(labels, labels, 3000))
    assert len(json.dumps(kept)) < 20 * 3000 and kept["cells"][7] == [7, 7, 1]
    assert not read_confusion(keep_confusion(np.zeros((1001, 1001), dtype=np.int64))).any()
