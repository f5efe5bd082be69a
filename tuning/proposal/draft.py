"""`rarelens init`: look at a set of images and at this machine, and draft the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.folder import whole_file
from data_pipeline.fingerprint import take_fingerprint
from data_pipeline.fingerprint_report import describe, obstacles, remarks
from data_pipeline.guess import guess_source
from trainer.plan_measure import calibrate
from trainer.this_machine import ThisMachine, this_machine
from tuning.proposal import Proposal, Wishes, propose
from tuning.proposal.ladder import as_config
from tuning.proposal.rules import LARGE_NETWORK, SMALL_NETWORK
from tuning.proposal.text import to_yaml

TIMED_PX = {"cpu": 128, "cuda": 224}


@dataclass(frozen=True)
class Draft:
    """What `rarelens init` has to say.

    Attributes:
        text: Of the configuration file.
        found: Lines about the data.
        guessed: Lines about what each file and column was taken for.
        plan: One line about the hours.
        obstacles: What must be mended before the file can be trained with.
        remarks: What should be.
    """

    text: str
    found: list[str]
    guessed: list[str]
    plan: str
    obstacles: list[str]
    remarks: list[str]


def draft(path: str, given: dict[str, Any], wishes: Wishes, measure: bool = True) -> Draft:
    """Look at the data and the machine and propose a configuration.

    Args:
        path: As `source.path`.
        given: Settings of `source` that are known; None = to be guessed.
        wishes: The rest.
        measure: Time a network and the decoder here, some ten seconds; else constants of machines of the kind count.

    Raises:
        UserError: The source is wrong or cannot be guessed, or the network is unknown.
    """
    guess = guess_source(path, given)
    found = take_fingerprint(guess.source)
    here = this_machine()
    if measure:
        here = measured_here(here, wishes, len(found.classes))
    proposal = propose(guess, found, here, wishes)
    guessed = [f"source.{name}: {_value(guess.source, name)} ({why})" for name, why in guess.reasons.items()]
    plan = _plan(proposal, here, wishes)
    notes = remarks(found) + ([proposal.shortfall] if proposal.shortfall else [])
    head = [
        f"Written by `rarelens init {path}`. Next: rarelens train THIS_FILE",
        *describe(found),
        plan,
        *(f"NOTE: {text}" for text in obstacles(found) + notes),
    ]
    return Draft(to_yaml(proposal, head), describe(found), guessed, plan, obstacles(found), notes)


def write_draft(out: Path, make: Callable[[], Draft]) -> Draft:
    """Make a draft and write its file, whole or not at all.

    Args:
        out: The file, looked at before minutes go by.
        make: Makes the draft.

    Raises:
        UserError: There is a file already, or what `make` raises.
    """
    if out.exists():
        raise UserError(f"{out} exists, and may hold changes of yours; remove it, or give another file as --out")
    made = make()
    with whole_file(out) as file:
        file.write(made.text.encode())
    return made


def measured_here(here: ThisMachine, wishes: Wishes, num_classes: int) -> ThisMachine:
    """This machine with its constants scaled to what it reaches."""
    device = here.machine.device
    values = {
        "model.backbone": wishes.backbone or (LARGE_NETWORK if device == "cuda" else SMALL_NETWORK),
        "data.image_px": TIMED_PX[device],
        "stage_one.precision": "bf16" if device == "cuda" else "fp32",
    }
    return replace(here, machine=calibrate(as_config(values), here.machine, num_classes), known=True)


def _plan(proposal: Proposal, here: ThisMachine, wishes: Wishes) -> str:
    time, config = proposal.time, proposal.config
    sure = "" if here.known else ", by the constants of an L4, since this GPU was neither known nor timed"
    return (
        f"planned: {time.hours:.2g} of {wishes.hours:g} h on {here.machine.name}: {config.stage_one.epochs} epochs of "
        f"{time.epoch_s:.1f} s{', twice for the baseline' if time.baseline else ''}, features {time.features_s:.0f} s, "
        f"{config.stage_two.heads} heads {time.stage_two_s:.0f} s{sure}"
    )


def _value(source: Any, name: str) -> str:
    value = getattr(source, name)
    return "none" if value is None else str(value)
