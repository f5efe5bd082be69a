"""How a model that was just made is used, as commands to copy: for the terminal, and beside the model."""

from __future__ import annotations

import shlex

USAGE_FILE = "README.md"


def predict_command(model: str) -> str:
    """The command that predicts with a model folder, a path or URI; only the images have to be filled in."""
    return f"rarelens predict {shlex.quote(model)} NEW_IMAGES --out predictions.csv"


def usage(model: str) -> str:
    """Markdown to lie in the model folder.

    Args:
        model: Path or URI of the folder.
    """
    place = shlex.quote(model)
    return f"""# How to use this model

NEW_IMAGES are files, folders, patterns or `s3://` URIs. The path is where the run left this folder; it may be moved.

```bash
{predict_command(model)}
rarelens export {place} --out model.onnx
```

```python
from trainer import load_model

said = load_model({model!r}).predict(["NEW_IMAGES"])
print(said.labels, said.probabilities, said.similar)
```

| file | what it is |
|---|---|
| `model.safetensors` | weights |
| `model.json` | classes, image size, temperature, where the model comes from, checksums |
| `examples.safetensors` | training images, as features with their names, which new images are compared with |
| `metrics.json`, `predictions.parquet` | figures on test; each test image with its probabilities |
| `report.html` | the report |

`examples.safetensors` and `predictions.parquet` name images. Where these names are private, delete both before you pass
the model on; it works without.
"""
