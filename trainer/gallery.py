"""The report's pictures of images: examples of each class, confused pairs, the worst mistakes.

Pictures come re-encoded from `trainer.thumbnails`: no metadata of the originals reaches the page.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable

from trainer.findings import Mistake, ReportInputs, most_confused, rarest_last
from trainer.page import Section, breakable, percent, text


def examples(inputs: ReportInputs) -> str:
    """Training images of each class, commonest class first; markup, empty where there are none."""
    blocks = []
    for label in rarest_last(inputs):
        name = text(inputs.classes[label])
        row = _row(inputs, inputs.examples[label] if inputs.examples else (), f"{name}, training image")
        if row:
            count = inputs.class_counts["train"][label]
            blocks.append(_figure(row, f"<b>{name}</b> · {count:,} training images"))
    if not blocks:
        return ""
    return f'<h3>What the classes look like</h3><div class="grid">{"".join(blocks)}</div>'


def confused_pairs(inputs: ReportInputs) -> str:
    """Images of each confused pair beside recognised ones of the class that they are taken for; markup."""
    shares = {(p.true, p.predicted): p for p in most_confused(inputs.winner_confusion, inputs.own_confusion)}
    blocks = []
    for pair in inputs.look_alikes:
        true, predicted = text(inputs.classes[pair.true]), text(inputs.classes[pair.predicted])
        taken = _row(inputs, pair.taken, f"{true}, taken for {predicted}")
        if not taken:
            continue
        found = shares[pair.true, pair.predicted]
        said = f"taken for {breakable(inputs.classes[pair.predicted])}: {found.images} of {found.of}"
        left = _figure(taken, f"<b>{breakable(inputs.classes[pair.true])}</b>, {said}")
        rightly = _row(inputs, pair.rightly, f"{predicted}, recognised")
        right = _figure(rightly, f"<b>{predicted}</b>, recognised as such" if rightly else f"no {predicted} recognised")
        blocks.append(f'<div class="pair">{left}{right}</div>')
    if not blocks:
        return ""
    lead = (
        '<p class="note">Test images, the surest decisions first: what is mistaken, and beside it what it is mistaken '
        "for.</p>"
    )
    return f"<h3>What they look like</h3>{lead}{''.join(blocks)}"


def mistakes(inputs: ReportInputs) -> Section:
    """The test images of which the model is most wrong."""
    shots = "".join(_shot(inputs, mistake) for mistake in inputs.mistakes)
    if not inputs.mistakes:
        wrong = sum(sum(row) for row in inputs.winner_confusion) - sum(
            row[label] for label, row in enumerate(inputs.winner_confusion)
        )
        said = "No test image is taken for another class." if not wrong else "No mistake was recorded in this run."
        return Section("mistakes", "Mistakes", "The worst mistakes", f"<p>{said}</p>")
    lead = (
        "<p>The test images to whose true class the model gives the least probability (in brackets, as that of the "
        "class that it takes them for), at most a few of each class. Look at "
        "them before anything else: some may be labelled wrongly, others show what the model lacks.</p>"
    )
    return Section("mistakes", "Mistakes", "The worst mistakes", f'{lead}<div class="shots">{shots}</div>')


def _shot(inputs: ReportInputs, mistake: Mistake) -> str:
    true, predicted = inputs.classes[mistake.true], inputs.classes[mistake.predicted]
    own, other = (f"({percent(p, 0)}\N{NO-BREAK SPACE}%)" for p in (mistake.p_true, mistake.p_predicted))
    caption = (
        f"<b>{breakable(true)}</b> {own}<br>taken for {breakable(predicted)} {other}"
        f"<code>{breakable(mistake.key)}</code>"
    )
    return _figure(_picture(inputs, mistake.key, f"{text(true)}, taken for {text(predicted)}"), caption)


def _row(inputs: ReportInputs, keys: Iterable[str], what: str) -> str:
    """Pictures side by side; `what` (markup) is said of each to those who do not see it."""
    pictures = [_picture(inputs, key, f"{what} {number}") for number, key in enumerate(keys, 1)]
    shown = "".join(pictures)
    return f'<div class="thumbs">{shown}</div>' if shown else ""


def _picture(inputs: ReportInputs, key: str, what: str) -> str:
    data = inputs.pictures.get(key)
    if data is None:
        return ""
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(data).decode()}" alt="{what}">'


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
