"""Configuration of the fine-tuning on images that may follow the search over heads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.config import Section
from data_pipeline.config import SamplingConfig
from trainer.loss_config import COSINE_LOSSES, PRIOR_AWARE_LOSSES, ClassificationConfig


class FineTuneConfig(Section):
    """Stage one's network with the search's winning head, trained on: the search proposes, this confirms.

    Batch size, precision, optimiser, moving average and ZeRO are stage one's; there is one view and no metric loss.
    """

    epochs: int = Field(0, ge=0, description="0 = off")
    blocks: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        1, description="Last blocks of the backbone that learn, as timm counts them; 0 = the head alone"
    )
    lr: float | None = Field(
        None, gt=0, description="Peak learning rate, falling as a cosine; none = a tenth of stage one's"
    )
    warmup_epochs: float = Field(0.5, ge=0, description="Epochs over which the rate grows from 0 to lr, linearly")
    sampling: SamplingConfig | None = Field(
        None, description="None = the winner's: its power, or natural where its loss makes up for the frequencies"
    )
    classification: ClassificationConfig | None = Field(
        None, description="Loss; none = the winner's own where images can be trained by it, else cross-entropy"
    )
    batch_norm: Literal["frozen", "reestimated"] = Field(
        "frozen",
        description="Statistics of stage one, or those of each batch, re-estimated under the sampling for evaluation",
    )

    @model_validator(mode="after")
    def _any_winner_can_have_this_loss(self) -> FineTuneConfig:
        loss, sampling = self.classification, self.sampling
        if loss is None:
            return self
        if loss.name in COSINE_LOSSES:
            raise ValueError(
                f"classification.name = {loss.name!r} has a margin between cosines, and the winning head may be "
                f"linear; leave classification out, and a winner of that kind brings its own margin"
            )
        if loss.corrects_frequencies and not loss.double_correction and sampling not in (None, SamplingConfig()):
            what = f"name = {loss.name!r}" if loss.name in PRIOR_AWARE_LOSSES else "reweight_from"
            raise ValueError(
                f"classification.{what} makes up for the class frequencies, and sampling does so too; leave sampling "
                f"out, or set classification.double_correction: true if that is wanted"
            )
        return self
