"""From a fingerprint, a machine and some hours to a configuration, each value with its reason.

As in nnU-Net (Isensee et al., Nature Methods 18, 2021) values are of three kinds, and two more say whose they are:

| kind | what it is |
|---|---|
| given | on the command line |
| found | in the files |
| fixed | the same for every data set |
| rule | follows from the fingerprint, the machine and the hours (`rules.py`, `ladder.py`) |
| searched | a start: `rarelens train` searches stage two, `rarelens search` stage one |
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.reference import settings_of
from data_pipeline.config import SplitConfig
from data_pipeline.dataset import SPLITS
from data_pipeline.fingerprint import Fingerprint
from data_pipeline.guess import Guess
from trainer.network_size import network_size
from trainer.plan_report import assumed_size
from trainer.this_machine import ThisMachine
from tuning.config import Config
from tuning.proposal import settings
from tuning.proposal.ladder import Load, as_config, climb, hours_for, ladder, spend
from tuning.proposal.rules import EPOCHS, micro_batch_size
from tuning.proposal.settings import Setting, Wishes
from tuning.run_time import RunTime, run_time

__all__ = ["Proposal", "Setting", "Wishes", "propose"]


@dataclass(frozen=True)
class Proposal:
    """A configuration with its reasons.

    Attributes:
        settings: In the order of the configuration.
        config: What they make.
        time: That the run takes.
        shortfall: What the hours are too short for, and the hours to give; None = nothing.
    """

    settings: tuple[Setting, ...]
    config: Config
    time: RunTime
    shortfall: str | None


def propose(guess: Guess, found: Fingerprint, here: ThisMachine, wishes: Wishes) -> Proposal:
    """The configuration for some data on this machine.

    Args:
        guess: The source.
        found: Its fingerprint.
        here: The machine; a worker a device.
        wishes: The rest.
    """
    train_images = number_to_train(found)
    base = assumed_size(Config().data, train_images, len(found.classes))
    load = Load(base, found.images, here.machine)
    steady = [
        *settings.of_run(wishes),
        *settings.of_source(guess),
        *settings.of_data(found, here, wishes),
        *settings.of_batches(train_images, here.machine, wishes),
        *settings.of_cluster(here.machine),
    ]
    values = {setting.key: setting.value for setting in steady} | {"model.weights": wishes.weights}
    fit = climb(values, ladder(found.short_px.median, wishes.backbone), load, wishes.hours)
    fewest, most = EPOCHS[wishes.pretrained]
    epochs, views, baseline = spend(fit.epochs, most)
    timed = [
        *settings.of_images(found, fit, wishes),
        *settings.of_model(fit, wishes),
        *settings.of_stage_one(fit, wishes, epochs, views),
        *settings.of_stage_two(fit, wishes, baseline),
    ]
    config = _config_of([*steady, *timed])
    network = network_size(config, len(found.classes))
    timed += settings.of_memory(micro_batch_size(config, network, here.machine), here.machine)
    shortfall = None
    if epochs < fewest:
        shortfall = (
            f"{wishes.hours:g} h leave time for {epochs} epochs where {fewest} are wanted, at {fit.rung.backbone} on "
            f"{fit.rung.image_px} px; give --hours {hours_for(fit, fewest):g} or more"
        )
    time = run_time(config, base, network, found.images, here.machine)
    return Proposal(_in_order([*steady, *timed]), _config_of([*steady, *timed]), time, shortfall)


def number_to_train(found: Fingerprint) -> int:
    """Images that train will hold: given, less what is cut out of it for splits that are lacking, or cut."""
    split = SplitConfig()
    if not found.splits:
        return max(1, round(split.train * found.images))
    lacking = sum(getattr(split, name) for name in SPLITS if name not in found.splits)
    return max(1, round(found.splits.get("train", 0) * split.train / (split.train + lacking)))


def _config_of(made: list[Setting]) -> Config:
    return as_config({setting.key: setting.value for setting in made})


def _in_order(made: list[Setting]) -> tuple[Setting, ...]:
    """Sections as the configuration has them."""
    order = {entry.key: number for number, entry in enumerate(settings_of(Config))}
    return tuple(sorted(made, key=lambda setting: order[setting.key]))
