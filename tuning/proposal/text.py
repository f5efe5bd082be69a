"""A proposal as a YAML file that explains itself."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import yaml

from tuning.proposal import Proposal, Setting

COLUMNS = 120
LEGEND = {
    "given": "on the command line",
    "found": "in the files",
    "fixed": "the same for every data set",
    "rule": "follows from the data, the machine and the hours",
    "searched": "a start: `rarelens train` searches stage two, `rarelens search` stage one",
}


def to_yaml(proposal: Proposal, head: Sequence[str]) -> str:
    """The configuration, each value with its kind and reason.

    Args:
        proposal: What is written.
        head: Lines for the top of the file, without the comment's mark.
    """
    lines = [wrapped for line in head for wrapped in _comment(line, 0)]
    lines += ["#", "# Each value says what it is:"]
    lines += [f"#   {kind:9} {meaning}" for kind, meaning in LEGEND.items()]
    above: list[str] = []
    for setting in proposal.settings:
        *sections, leaf = setting.key.split(".")
        for depth, section in enumerate(sections):
            if above[: depth + 1] != sections[: depth + 1]:
                lines += [""] * (depth == 0) + [f"{'  ' * depth}{section}:"]
                above = sections[: depth + 1]
        above = sections
        lines += _setting(leaf, setting, len(sections))
    return "\n".join(lines) + "\n"


def _setting(leaf: str, setting: Setting, depth: int) -> list[str]:
    """Key and value with the reason behind them, or above where the line would be too long."""
    dumped = yaml.safe_dump(setting.value, default_flow_style=True, allow_unicode=True, width=10**6)
    value = dumped.removesuffix("...\n").strip()  # the end of a document that is one plain value
    line, reason = f"{'  ' * depth}{leaf}: {value}", f"{setting.kind}: {setting.reason}"
    if len(f"{line}  # {reason}") <= COLUMNS:
        return [f"{line}  # {reason}"]
    return [*_comment(reason, depth), line]


def _comment(text: str, depth: int) -> list[str]:
    return textwrap.wrap(
        text, COLUMNS, initial_indent=f"{'  ' * depth}# ", subsequent_indent=f"{'  ' * depth}#   ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
