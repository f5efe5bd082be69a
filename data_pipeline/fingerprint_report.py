"""A fingerprint in words: what was found, what keeps it from being packed, and what is worth mending first."""

from __future__ import annotations

from collections.abc import Collection

from data_pipeline.dataset import SPLITS
from data_pipeline.fingerprint import Fingerprint
from data_pipeline.sources.rows import counted, first

CLASSES_NAMED = 8
FEW_IMAGES = 20
"""Of a class, below which its recall on val and test is known to a fifth at best."""


def describe(found: Fingerprint) -> list[str]:
    """Lines of `what: how much`."""
    looked = "" if found.read_all else f" (of {found.read} that were looked at)"
    lines = [
        f"images: {found.images} of {_class_count(found.classes)}, imbalance {found.imbalance:.3g}",
        f"images of each class: {_classes(found.classes)}",
        f"groups: {_groups(found)}",
        f"splits: {', '.join(f'{name} {n}' for name, n in found.splits.items()) or 'none given'}",
        f"width: {found.width_px} px; height: {found.height_px} px{looked}",
        f"bits a channel: {', '.join(f'{bits} ({number} images)' for bits, number in found.bits.items())}{looked}",
        f"colour: {'none, all are grey' if found.all_grey else 'yes'}{looked}",
        f"near-duplicates: {found.near_duplicates}, {found.contradictions} of them with another class{looked}",
    ]
    return lines


def obstacles(found: Fingerprint) -> list[str]:
    """What keeps the data from being packed, with the remedy; empty where nothing does."""
    parts = len(SPLITS) if not found.splits else 1 + len(set(SPLITS) - set(found.splits))
    scarce = [f"{name} ({number})" for name, number in found.independent.items() if number < parts]
    if not scarce:
        return []
    return [
        f"{_class_count(scarce)} with fewer groups (patients or lesions, near-duplicates joined) than there are splits "
        f"to cut, {parts}: {first(scarce)}; add images of other patients or lesions, or take the class out"
    ]


def remarks(found: Fingerprint) -> list[str]:
    """What is worth mending before training, each with the remedy; empty where nothing is."""
    said = []
    few = [f"{name} ({number})" for name, number in found.classes.items() if number < FEW_IMAGES]
    if few:
        said.append(
            f"fewer than {FEW_IMAGES} images: {first(few)}; recall of such classes is known roughly: read its interval "
            "in the report, and add images where you can"
        )
    if found.unusable:
        name, reason = found.unusable[0]
        said.append(
            f"{counted(len(found.unusable), 'image')} cannot be used, the first {name}: {reason}; mend or remove them, "
            "or keep data.max_damaged, and they are left out"
        )
    if found.contradictions:
        said.append(
            f"{counted(found.contradictions, 'image')} have a near-duplicate of another class; look at them with "
            "`rarelens audit` after packing, and correct the labels that are wrong"
        )
    if found.groups is None:
        said.append(
            "no groups are named: pictures of one patient may come into train and test, which flatters every figure; "
            "give a column of patients or lesions by --group-column where there is one"
        )
    return said


def _classes(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    shown = ordered if len(ordered) <= CLASSES_NAMED else ordered[: CLASSES_NAMED // 2] + ordered[-CLASSES_NAMED // 2 :]
    words = [f"{name} {number}" for name, number in shown]
    if len(ordered) > CLASSES_NAMED:
        words.insert(CLASSES_NAMED // 2, "...")
    return ", ".join(words)


def _groups(found: Fingerprint) -> str:
    if found.groups is None:
        return "none are named, each image is one"
    return f"{found.groups}, images each: {found.images_per_group}"


def _class_count(classes: Collection[str]) -> str:
    return f"{len(classes)} class{'es' * (len(classes) != 1)}"
