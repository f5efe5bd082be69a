"""Where a training begins that goes on from another one's network, with a head in its classifier's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safetensors.torch import load_file

from cluster.run import RunFolder
from trainer.blocks import freeze_all_but
from trainer.classifiers import classifier_of
from trainer.extraction import fetch_checkpoint
from trainer.heads import load_heads
from trainer.model import Classifier
from trainer.stage_checkpoint import WEIGHTS_FILE

HEAD = "start"
"""Name of the head in its file."""


@dataclass(frozen=True)
class StartingPoint:
    """Network and head that a training goes on from, and what of them learns.

    Attributes:
        run_uri: The run folder, at a place that every worker reaches.
        checkpoint: Path below it of the checkpoint whose network is taken.
        heads: Path below it of the file whose head `start` takes the classifier's place.
        blocks: Last blocks of the backbone that learn.
        reestimate_batch_norm: Statistics of batch norm are computed anew after each epoch (`trainer.validation`).
    """

    run_uri: str
    checkpoint: str
    heads: str
    blocks: int | Literal["all"]
    reestimate_batch_norm: bool

    def prepare(self, model: Classifier, backbone: str) -> None:
        """Fill a model, and let only learn what should.

        Args:
            model: As it was built; its classifier is replaced.
            backbone: Its name, for messages.

        Raises:
            UserError: The checkpoint is damaged or not there, or the backbone has fewer blocks.
        """
        run = RunFolder(self.run_uri)
        weights = load_file(fetch_checkpoint(run, self.checkpoint) / WEIGHTS_FILE)
        for part in ("backbone", "embedding"):
            own = {key.removeprefix(f"{part}."): value for key, value in weights.items() if key.startswith(f"{part}.")}
            model.get_submodule(part).load_state_dict(own)
        model.classifier = classifier_of(load_heads(run.fetch(self.heads))[HEAD])
        freeze_all_but(model, backbone, self.blocks)
