"""Stage one, features, heads, evaluation, report, and the model in a user's hands.

A trained model is used from Python like this; files, folders, patterns and `s3://` URIs all will do:

>>> from trainer import load_model
>>> model = load_model("runs/mine/model")  # device="cuda" where there is a GPU
>>> model.classes
('melanoma', 'naevus')
>>> said = model.predict(["new/a.png", "new/b.png"])
>>> said.labels
['naevus', 'melanoma']
>>> said.probabilities.shape  # calibrated, a row an image, a column a class
(2, 2)
>>> said.similar.labels[0, 0]  # of the training image that looks most like the first one; its name is in `keys`
'naevus'
>>> said.similar.unlike.tolist()  # whether an image looks like none of them
[False, True]
>>> said.damaged  # images that could not be read, with the reason
[]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.export import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """`load_model` at its first use: it costs PyTorch, which reading a configuration from here does not."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer.export import load_model

    return load_model
