"""What an audit found, as values, JSON and a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class ClassAudit:
    """One class; the dicts are by split."""

    name: str
    samples: dict[str, int]
    groups: dict[str, int]
    shared_groups: dict[str, int]
    """Samples outside of training whose group is in training."""
    shared_duplicates: dict[str, int]
    """Samples outside of training that show, but for a few bits of the hash, an image of training."""
    leaked: dict[str, int]
    """Samples to which either applies."""
    conflicts: int
    """Samples of which a near-duplicate is labelled otherwise."""
    unreadable: int
    """Samples that cannot be used; they count nowhere else."""


@dataclass(frozen=True)
class AuditReport:
    """What an audit found."""

    what: tuple[str, ...]
    splits: tuple[str, ...]
    near_duplicate_bits: int
    classes: tuple[ClassAudit, ...]
    conflicts: int
    """Samples of which a near-duplicate is labelled otherwise."""
    first_conflicts: tuple[tuple[str, str, str, str], ...]
    """Key, class, near-duplicate's key, its class; at most 100."""
    unreadable: tuple[tuple[str, str], ...]
    """File, reason."""

    @property
    def leaks(self) -> bool:
        """Whether any sample of val or test has its group or a near-duplicate in training."""
        return any(sum(entry.leaked.values()) for entry in self.classes)

    @property
    def clean(self) -> bool:
        """Whether nothing at all was found: no leak, no conflict of labels, nothing unreadable."""
        return not (self.leaks or self.conflicts or self.unreadable)

    def leaked_by_split(self) -> dict[str, tuple[int, int]]:
        """Leaked samples and all samples of each split that is not trained on."""
        return {
            split: (sum(entry.leaked[split] for entry in self.classes), sum(e.samples[split] for e in self.classes))
            for split in self.splits
            if split != "train"
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values; `leaked_share` is by split, null where a split has no sample."""
        shares = {split: _share(*numbers) for split, numbers in self.leaked_by_split().items()}
        values = {"leaks": self.leaks, "clean": self.clean, "leaked_share": shares, **asdict(self)}
        for entry in values["classes"]:
            entry["leaked_share"] = {split: _share(n, entry["samples"][split]) for split, n in entry["leaked"].items()}
        return values

    def to_table(self) -> Table:
        """A row a class: samples (groups) by split, the leaked share of each split that is not trained on, damage."""
        title = f"Audit of {' against '.join(self.what)}"
        found = (
            f"{self.conflicts} samples with a near-duplicate of another class, {len(self.unreadable)} unreadable files"
        )
        table = Table(title=title, caption=found)
        table.add_column("class", no_wrap=True)
        held_out = [split for split in self.splits if split != "train"]
        for split in self.splits:
            table.add_column(f"{split} samples (groups)", justify="right")
        for split in held_out:
            table.add_column(f"{split}: group in train", justify="right")
            table.add_column("near-duplicate in train", justify="right", overflow="fold")
            table.add_column("leaked", justify="right")
        table.add_column("label conflicts", justify="right")
        table.add_column("unreadable", justify="right")
        for entry in self.classes:
            cells = [f"{entry.samples[split]} ({entry.groups[split]})" for split in self.splits]
            for split in held_out:
                share = _share(entry.leaked[split], entry.samples[split])
                cells += [str(entry.shared_groups[split]), str(entry.shared_duplicates[split])]
                cells.append("-" if share is None else f"{share:.1%}")
            cells += [str(entry.conflicts), str(entry.unreadable)]
            table.add_row(entry.name, *cells, style="red" if sum(entry.leaked.values()) else None)
        return table


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
