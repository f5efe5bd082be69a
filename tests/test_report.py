"""The report: what it says is what went in, and the page stands on its own whatever the classes are called."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data_pipeline.audit import AuditReport, ClassAudit
from trainer.findings import (
    best_per_family,
    classes_in_confusions,
    heads_tried,
    imbalance,
    most_confused,
    rarest_last,
    row_shares,
    thinly_tested,
    verdict,
)
from trainer.page import DASH, MINUS, change, duration, percent
from trainer.report import Gain, ReportInputs, ResultRow, render, write_report

HOSTILE = ("<script>alert(1)</script>", '" onload="alert(1)', "$x_1$ & co", "--> ]]> </svg>", "#0072b2 'naevus'")
VOID = {"meta", "img", "br", "link", "input", "hr"}
COUNTS = {"train": [900, 30, 210, 8, 90], "val": [190, 7, 45, 2, 20], "test": [190, 7, 45, 0, 20]}


def _row(name: str, confusion: np.ndarray, **changes) -> ResultRow:
    recall = np.diag(row_shares(confusion))
    mean = float(np.nanmean(recall))
    values = {
        "name": name,
        "description": f"model {name}",
        "balanced_accuracy": mean,
        "interval": (mean - 0.04, mean + 0.03),
        "macro_f1": mean - 0.02,
        "worst_recall": float(np.nanmin(recall)),
        "many": 0.9,
        "medium": 0.6,
        "few": None,
        "ece": 0.05,
        "per_class_recall": [None if math.isnan(share) else float(share) for share in recall],
    }
    return ResultRow(**{**values, **changes})


def _confusion(seed: int, classes: int = 5, test: list[int] | None = None) -> np.ndarray:
    draw = np.random.default_rng(seed)
    shares = draw.dirichlet(np.ones(classes), classes) * 0.4 + 0.6 * np.eye(classes)
    return np.array([draw.multinomial(n, p) for n, p in zip(test or COUNTS["test"], shares, strict=True)])


def _jpeg(colour: tuple[int, int, int], **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), colour).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _history() -> list[dict]:
    steps = [
        {"stage": "stage_one", "kind": "step", "step": s, "epoch": s // 30, "loss": 5 / s, "cross_entropy": 2 / s}
        | {"metric_loss": 3 / s, "images_per_s": 100.0}
        for s in range(1, 61)
    ]
    epochs = [
        {"stage": stage, "kind": "epoch", "step": 30 * e, "epoch": e, "balanced_accuracy": 0.4 + 0.1 * e}
        | {"macro_f1": 0.4, "worst_recall": math.nan}
        for stage in ("stage_one", "baseline")
        for e in range(2)
    ]
    return steps + epochs


def _search() -> list[dict]:
    draw = np.random.default_rng(0)
    own = {"head": 0, "family": "own", "power": None, "tau": None, "lr": None, "score": 0.5}
    heads = [
        {"head": i, "family": "crt", "power": draw.uniform(), "tau": None, "lr": 10 ** draw.uniform(-3, 0)}
        | {"score": draw.uniform(0.4, 0.7)}
        for i in range(1, 9)
    ]
    heads += [{"head": i, "family": "tau_norm", "tau": 0.1 * i, "score": 0.5} for i in range(9, 12)]
    return [own, *heads, {"head": 12, "family": "crt", "power": 0.5, "lr": 1.0, "score": None}]


def _audit(leaked: int) -> dict:
    splits = ("train", "val", "test")
    none = dict.fromkeys(splits, 0)
    classes = [
        ClassAudit(
            name,
            {split: COUNTS[split][i] for split in splits},
            {split: COUNTS[split][i] - i for split in splits},
            none,
            none,
            {**none, "test": leaked * (i == 1)},
            conflicts=0,
            unreadable=0,
        )
        for i, name in enumerate(HOSTILE)
    ]
    return AuditReport(("skin",), splits, 2, tuple(classes), 3, (), (("a.jpg", "the file is empty"),)).to_json()


def _inputs(**changes) -> ReportInputs:
    own, winner = _confusion(1), _confusion(2)
    values = {
        "name": "run <b>1</b>",
        "dataset": "skin & co",
        "config": {
            "model": {"backbone": "resnet50"},
            "data": {"image_px": 128, "name": "<img src=x>"},
            "stage_one": {"epochs": 2, "loss": {"name": "supervised_contrastive"}},
            "stage_two": {"families": ("crt", "tau_norm")},
        },
        "classes": HOSTILE,
        "class_counts": COUNTS,
        "rows": [_row("own", own), _row("crt", winner), _row("winner", winner, detail="q 0.1, <i>lr</i> 0.3")],
        "own_confusion": own.tolist(),
        "winner_confusion": winner.tolist(),
        "test_groups": 240,
        "history": _history(),
        "search": _search(),
        "gain": Gain(0.031, (0.012, 0.05)),
        "gain_over_baseline": Gain(-0.005, (-0.02, 0.01)),
        "audit": _audit(leaked=0),
        "timings": {"pack": 4.21, "stage one": 754.0},
        "versions": {"rarelens": "0.1.0", "torch": "2.15.0"},
        "hashes": {"dataset.json": "ab" * 32},
        "examples": [[_jpeg((40 * i, 90, 60))] for i in range(5)],
    }
    return ReportInputs(**{**values, **changes})


def _page(inputs: ReportInputs, tmp_path) -> str:
    write_report(inputs, tmp_path / "out" / "report.html")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


class _Reader(HTMLParser):
    """Reads a page strictly: every element that is opened is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return _page(_inputs(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def read(page) -> _Reader:
    return _Reader(page)


def test_page_is_well_formed_and_has_all_sections_in_order(read):
    anchors = [attrs["id"] for tag, attrs in read.tags if tag == "section"]
    assert anchors == ["results", "recall", "confusion", "training", "search", "data", "making", "limits"]
    links = [attrs["href"] for tag, attrs in read.tags if tag == "a"]
    assert links == [f"#{anchor}" for anchor in anchors]
    assert sum(tag == "svg" for tag, _ in read.tags) == 10  # recall, 2 confusions, 3 curves, families, q, tau, lr
    assert all(attrs.get("aria-label") for tag, attrs in read.tags if tag == "svg")


def test_ids_are_unique_and_every_reference_is_there(read):
    ids = Counter(attrs["id"] for _, attrs in read.tags if "id" in attrs)
    assert max(ids.values()) == 1
    for _, attrs in read.tags:
        target = attrs.get("href", "data:")
        assert target.startswith("data:") or (target.startswith("#") and target[1:] in ids), attrs
        assert "xlink:href" not in attrs
        for reference in re.findall(r"url\(#([^)]*)\)", " ".join(str(value) for value in attrs.values())):
            assert reference in ids


def test_page_needs_nothing_from_outside_and_runs_nothing(page, read):
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in read.tags}
    for tag, attrs in read.tags:
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        assert attrs.get("src", "data:image/").startswith("data:image/")
    assert not re.search(r"url\((?!#)|@import", page)
    policy = next(attrs["content"] for tag, attrs in read.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_hostile_names_are_text(page, read):
    assert "<script" not in page and "<b>1</b>" not in page and "<img src=x>" not in page
    assert "run <b>1</b>" in read.text and "skin & co" in read.text and "<i>lr</i>" in read.text
    for name in HOSTILE:
        assert name in read.text
    # In pictures too, where long ones are cut: a formula is no formula, and a colour's name is not replaced.
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    drawn = [_Reader(picture).text for picture in pictures if 'id="confusion-' in picture]
    assert len(drawn) == 2
    for text in drawn:
        assert "<script>alert(1)</s…" in text and "$x_1$ & co" in text and "#0072b2 'naevus'" in text


def test_headline_and_table_say_the_figures(read):
    inputs = _inputs()
    own, winner = inputs.row("own"), inputs.row("winner")
    before, after = 100 * own.balanced_accuracy, 100 * winner.balanced_accuracy
    assert f"Balanced accuracy on test rose from {before:.1f} % to {after:.1f} %" in read.text
    assert "+3.1 points (95 % interval +1.2 to +5.0), more than chance would give" in read.text
    assert "262 test images of 240 groups" in read.text
    assert (
        f"Against plain cross-entropy of the same budget: {MINUS}0.5 points (95 % interval {MINUS}2.0 to +1.0)"
        in read.text
    )
    assert "resnet50 at 128 px, trained for 2 epochs by cross-entropy with a supervised contrastive loss" in read.text
    assert "the best on val of 12 heads" in read.text
    assert "Test was read once, after every choice had been made." in read.text
    assert "No group and no near-duplicate of a training image is in val or test." in read.text
    for text in ("ab" * 32, "12 min 34 s", "4.2 s", "image_px: 128", "- tau_norm", "torch 2.15.0"):
        assert text in read.text


def test_a_class_without_test_images_has_a_dash_and_is_named(read):
    assert f"{HOSTILE[3]} 8 0 {DASH} {DASH} {DASH}" in read.text  # train, test, before, after, points
    assert f"Fewer than 10 test images: {HOSTILE[1]} (7), {HOSTILE[3]} (0)." in read.text


def test_examples_are_small_copies_without_metadata(page):
    exif = Image.Exif()
    exif[0x010E] = "patient 4711"
    exif[0x0112] = 6  # rotated by 90 degrees
    inputs = _inputs(examples=[[_jpeg((200, 10, 10), exif=exif)]] + [[]] * 4)
    from trainer.report import render

    sources = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', render(inputs))
    assert len(sources) == 1
    data = base64.b64decode(sources[0])
    copy = Image.open(io.BytesIO(data))
    assert b"patient" not in data and not copy.getexif()
    assert copy.size == (85, 128)  # upright
    assert np.abs(np.array(copy).mean(axis=(0, 1)) - (200, 10, 10)).max() < 4


def test_second_reading_of_test_and_leaks_are_said_on_top(tmp_path):
    page = _page(_inputs(test_reads=2, audit=_audit(leaked=4)), tmp_path)
    read = _Reader(page)
    top = page[: page.index("<nav>")]
    assert "Test was read 2 times in this run" in top and "The audit found leaks" in top
    assert "only the first reading is an unbiased estimate" in read.text
    assert "No group and no near-duplicate" not in read.text
    audit = read.text[read.text.index("Leak audit") :]
    assert f"{HOSTILE[1]} 29 / 6 / 6 0 of 7 4 of 7" in audit
    assert audit.index(f"{HOSTILE[1]} 29") < audit.index(f"{HOSTILE[0]} 900"), "what leaks stands first"
    assert "a near-duplicate of another class: 3. Unreadable files: 1." in audit


@pytest.mark.parametrize(
    "gain, expected, said",
    [
        (Gain(0.02, (-0.01, 0.05)), "open", "which may be chance"),
        (Gain(-0.03, (-0.05, -0.01)), "loss", "Balanced accuracy on test fell"),
        (Gain(0.02, (0.001, 0.05)), "gain", "Balanced accuracy on test rose"),
        (None, "open", "No paired interval of the difference was computed"),
    ],
)
def test_verdict_follows_the_paired_interval(gain, expected, said, tmp_path):
    inputs = _inputs(gain=gain, gain_over_baseline=None)
    assert verdict(gain) == expected
    assert said in _Reader(_page(inputs, tmp_path)).text


def test_a_run_with_nothing_but_results_has_a_report(tmp_path):
    bare = _inputs(history=(), search=(), audit={}, timings={}, versions={}, hashes={}, examples=(), config={})
    read = _Reader(_page(bare, tmp_path))
    for text in ("No head was searched", "No step was logged", "No audit was recorded"):
        assert text in read.text


def test_many_classes_stay_a_page(tmp_path):
    count = 150
    draw = np.random.default_rng(0)
    counts = {split: draw.integers(1, 500, count).tolist() for split in COUNTS}
    own, winner = (_confusion(seed, count, counts["test"]) for seed in (1, 2))
    inputs = _inputs(
        classes=[f"class {i}" for i in range(count)],
        class_counts=counts,
        rows=[_row("own", own), _row("winner", winner)],
        own_confusion=own.tolist(),
        winner_confusion=winner.tolist(),
        examples=(),
    )
    page = _page(inputs, tmp_path)
    read = _Reader(page)
    assert "The 60 rarest of 150 classes are listed." in read.text
    assert "Of 150 classes, the 40 confused most." in read.text
    assert len(page) < 3e6


# --- the figures behind the words, against plain loops


def test_row_shares_and_confused_pairs_against_loops():
    inputs = _inputs()
    counts = np.array(inputs.winner_confusion)
    pairs = []
    for i in range(5):
        total = sum(counts[i])
        for j in range(5):
            if total:
                assert row_shares(counts)[i, j] == pytest.approx(counts[i][j] / total)
            else:
                assert math.isnan(row_shares(counts)[i, j])
            if i != j and counts[i][j] > 0:
                pairs.append((-counts[i][j] / total, -counts[i][j], i, j))
    found = most_confused(inputs, limit=6)
    assert [(p.true, p.predicted) for p in found] == [pair[2:] for pair in sorted(pairs)[:6]]
    first = found[0]
    before = np.array(inputs.own_confusion)
    assert (first.images, first.of) == (counts[first.true, first.predicted], counts[first.true].sum())
    assert first.share_before == pytest.approx(before[first.true, first.predicted] / before[first.true].sum())


def test_classes_in_confusions_are_the_ones_that_are_confused():
    confusion = np.diag([50] * 6)
    confusion[4, 1], confusion[2, 5] = 30, 1
    assert classes_in_confusions(confusion.tolist(), 2).tolist() == [1, 4]
    assert classes_in_confusions(confusion.tolist(), 4).tolist() == [1, 2, 4, 5]
    assert classes_in_confusions(confusion.tolist(), 99).tolist() == list(range(6))


def test_order_imbalance_and_thin_classes():
    inputs = _inputs()
    assert rarest_last(inputs) == [0, 2, 4, 1, 3]
    assert imbalance(COUNTS["train"]) == pytest.approx(900 / 8)
    assert imbalance([0, 10, 5]) == 2
    assert thinly_tested(inputs) == [1, 3]


def test_best_of_each_family_and_heads_tried():
    inputs = _inputs()
    best = best_per_family(inputs.search)
    scores = [row["score"] for row in inputs.search if row["family"] == "crt" and row["score"] is not None]
    assert best[0]["family"] == "crt" and best[0]["score"] == max(scores)
    # tau-norm and the own classifier tie at 0.5: of equal scores the first stands.
    assert [row["head"] for row in best[1:]] == [0, 9]
    assert heads_tried(inputs) == 12


def test_finalists_are_chosen_by_their_lower_bound():
    rows = [
        {"head": 0, "family": "crt", "score": 0.9, "lower_bound": None},
        {"head": 1, "family": "crt", "score": 0.8, "lower_bound": 0.7},
        {"head": 2, "family": "lws", "score": 0.7, "lower_bound": 0.72},
    ]
    assert [row["head"] for row in best_per_family(rows)] == [2, 1]


def test_the_search_tells_how_the_head_was_chosen():
    choice = {"folds": 5, "lower_bound": 0.61, "seeds_score": 0.68, "seeds": 3, "luck": 0.021, "score": 0.7}
    inputs = dataclasses.replace(_inputs(), choice={**choice, "families": {"own": 0.6}})
    page = render(inputs)
    assert "in 5 folds by groups" in page and "68.0 % over 3 seeds, at least 61.0 %" in page
    assert "classifier by +10.0 points" in page
    assert "would lead by +2.1 points by luck alone" in page


def test_numbers_in_words():
    assert [percent(share) for share in (0.7381, 0, 1, None, math.nan)] == ["73.8", "0.0", "100.0", DASH, DASH]
    assert 'class="up">+11.7<' in change(0.621, 0.738)
    assert f'class="down">{MINUS}8.3<' in change(0.9, 0.817)
    assert 'class="none">0.0<' in change(0.5, 0.5001)
    assert change(None, 0.5) == change(0.5, math.nan) == f'<span class="none">{DASH}</span>'
    assert [duration(s) for s in (4.21, 59.4, 200, 7500)] == ["4.2 s", "59 s", "3 min 20 s", "2 h 05 min"]


def test_rows_are_read_from_metrics_json():
    row = _row("winner", _confusion(2))
    values = {**dataclasses.asdict(row), "interval": list(row.interval), "accuracy": 0.9}
    values.pop("detail")
    assert ResultRow.read(values) == row


def test_rows_are_found_by_name():
    inputs = dataclasses.replace(_inputs(), own="crt")
    assert inputs.row(inputs.own).description == "model crt"
