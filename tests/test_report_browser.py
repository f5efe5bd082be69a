"""The report in a real browser: nothing is asked for, nothing complains, and it fits a phone and a sheet of paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import A4_PX, DESKTOP, PHONE, Browser
from tests.reports import comparison_of_two, some_inputs
from tests.test_report import SECTIONS
from trainer.compare_page import write_comparison
from trainer.report import write_report

LONG = "a very long name of a disease, not otherwise specified, with every qualification that one may think of"
UNBROKEN = "Pneumonoultramicroscopicsilicovolcanoconiosis_" * 3
SCREENS = [(DESKTOP, "screen"), (PHONE, "screen"), (A4_PX, "print")]
WIDER_THAN_THE_PAGE = """
[...document.querySelectorAll("body *")].filter(element => {
    const box = element.getBoundingClientRect(), scrolled = element.closest(".scroll");
    return box.width && !(scrolled && scrolled !== element) && box.right > document.documentElement.clientWidth + 1;
}).map(element => `${element.tagName} in ${(element.closest("section") || {}).id}`)
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    inputs = some_inputs()
    write_report(inputs, folder / "report.html")
    write_report(some_inputs(classes=(LONG, *inputs.classes[1:4], UNBROKEN)), folder / "long.html")
    write_comparison(comparison_of_two(folder / "runs"), folder / "comparison.html")
    return {path.stem: path for path in folder.glob("*.html")}


@pytest.mark.parametrize("name", ["report", "long", "comparison"])
@pytest.mark.parametrize("size, media", SCREENS, ids=["desktop", "phone", "print"])
def test_the_page_fits_and_is_alone(browser, pages, name, size, media):
    browser.open(pages[name], size, media)
    assert browser.complaints() == []
    assert browser.requests() == [pages[name].resolve().as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= size[0]
    if media == "screen":  # in print nothing is cut off by the page's width alone
        assert browser.value(WIDER_THAN_THE_PAGE) == []


def test_all_sections_are_seen(browser, pages):
    browser.open(pages["report"], PHONE)
    script = """[...document.querySelectorAll("section")].map(e => [e.id, e.getBoundingClientRect().height])"""
    seen = dict(browser.value(script))
    assert list(seen) == list(SECTIONS) and min(seen.values()) > 60
    images = browser.value("[...document.images].map(image => image.complete && image.naturalWidth)")
    assert images == [160] * 9


def test_the_map_is_a_picture_whose_marks_have_titles(browser, pages):
    browser.open(pages["report"], DESKTOP)
    marks = browser.value("""[...document.querySelectorAll("svg.map use")].map(mark => {
        const box = mark.getBoundingClientRect(), map = mark.ownerSVGElement.getBoundingClientRect();
        const inside = box.left >= map.left - 9 && box.right <= map.right + 9;
        return [box.width, inside, mark.querySelector("title").textContent];
    })""")
    points = some_inputs().embedding_map
    assert len(marks) == len(points.x)
    assert all(width > 2 and inside for width, inside, _ in marks)
    classes = some_inputs().classes
    titles = [
        classes[label] + ("" if said == label else f", taken for {classes[said]}")
        for label, said in zip(points.labels, points.predicted, strict=True)
    ]
    assert sorted(title for _, _, title in marks) == sorted(titles)


def test_colours_follow_the_reader_and_stay_legible(browser, pages):
    """Text against its background by WCAG 2's contrast ratio: at least 4.5 for all text of the page's own elements."""
    for scheme in ("light", "dark"):
        browser.open(pages["report"], DESKTOP, scheme=scheme)
        contrasts = browser.value("""(() => {
            const rgb = css => css.match(/[\\d.]+/g).slice(0, 3).map(Number);
            const light = colour => rgb(colour).map(v => v / 255)
                .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
            const paper = light(getComputedStyle(document.body).backgroundColor);
            const names = ["h1", "p", ".note", "figcaption", "td", "thead th", "dt", ".none", "td .up", "td span.down"];
            return names.map(name => {
                const ink = light(getComputedStyle(document.querySelector(name)).color);
                return [name, (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05)];
            });
        })()""")
        assert [(name, ratio) for name, ratio in contrasts if ratio < 4.5] == []


def test_it_prints(browser, pages):
    browser.open(pages["report"], DESKTOP)
    assert browser.pdf().startswith(b"%PDF-")
