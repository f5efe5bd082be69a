"""The exponential moving average of a model's weights, which is evaluated and exported in their place."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.model import Classifier


class WeightAverage:
    """theta_ema <- d_t theta_ema + (1 - d_t) theta after each step, with d_t = min(decay, (1 + t) / (10 + t)).

    Polyak and Juditsky (1992); the ramp of the decay is TensorFlow's `ExponentialMovingAverage(num_updates)`: without
    it the random start would weigh for 1 / (1 - decay) steps. Batch norm's statistics are averaged likewise.

    Args:
        model: The model as it starts, with whole weights on every rank; the average is the same on every rank, but for
            batch norm's statistics, which are each rank's own until they are averaged over ranks.
        decay: Upper bound of d_t.
    """

    def __init__(self, model: Classifier, decay: float):
        def average(averages: Any, values: Any, updates: Tensor | int) -> None:
            steps = int(updates)
            get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averages, values, updates)

        self._averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self._averaged.requires_grad_(False)

    @property
    def model(self) -> Classifier:
        """The averaged model."""
        return cast(Classifier, self._averaged.module)

    @property
    def updates(self) -> int:
        """How many steps it has seen."""
        return int(self._averaged.n_averaged)

    def update(self, model: Classifier) -> None:
        """Take in the weights after a step; the first ones are taken as they are."""
        self._averaged.update_parameters(model)

    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Go on from saved weights."""
        self.model.load_state_dict(weights)
        self._averaged.n_averaged.fill_(updates)
