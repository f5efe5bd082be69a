"""The page of a search over stage one, from hand-made trials: every one of them is drawn, in its own look."""

import re
from xml.etree import ElementTree

import pytest

from tests.test_search_proposals import WEIGHT, config_of, line
from tuning.pictures import search_page
from tuning.trials_table import TrialRow

SAMPLING = "stage_one.sampling"
STATUSES = ("done", "stopped", "failed", "done", "stopped", "done", "done")


@pytest.fixture(scope="module")
def page():
    ways = [{"power": 0.5}, {"power": 1.0}]
    config = config_of({WEIGHT: {"log_uniform": [0.1, 1.0]}, SAMPLING: {"choice": ways}})
    rows = [
        TrialRow.of(
            f"trial{i}",
            {WEIGHT: 0.1 + i / 10, SAMPLING: ways[i % 2]},
            [line(1, 0.3 + i / 20, 60.0 * i), line(3, 0.4 + i / 20, 60.0 * i + 30)],
            status,
        )
        for i, status in enumerate(STATUSES)
    ]
    rows.append(TrialRow.of("silent", {WEIGHT: 0.1, SAMPLING: ways[0]}, [], "failed"))
    return search_page(config, rows, [WEIGHT, SAMPLING])


def pictures(page):
    """Picture by what it says of itself."""
    found = (ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    return {picture.get("aria-label"): picture for picture in found}


def groups(picture, name):
    return [group for group in picture.findall(".//{*}g") if re.search(rf"-{name}_\d+$", group.get("id", ""))]


def test_each_picture_says_what_it_shows(page):
    assert list(pictures(page)) == [
        "Best score on val so far against time",
        f"Score on val against {WEIGHT}",
        f"Score on val against {SAMPLING}",
        "All settings and the score of each trial",
    ]
    for title in ("Best so far", "Score against each setting", "All settings of each trial", "Trials"):
        assert f">{title}<" in page
    assert "8 trials; 2 were stopped early and 2 failed" in page and "silent" in page


@pytest.mark.parametrize("name", [WEIGHT, SAMPLING])
def test_a_mark_a_judged_trial_and_a_look_a_status(page, name):
    """Of `done`, `stopped` and `failed`, in this order."""
    drawn = groups(pictures(page)[f"Score on val against {name}"], "PathCollection")
    assert [len(marks.findall(".//{*}use")) for marks in drawn] == [4, 2, 1]
    looks = [marks.findall(".//{*}use")[0].get("style") for marks in drawn]
    for look, (colour, said) in zip(
        looks, {"blue": "Blue dots", "grey": "grey crosses", "vermillion": "red triangles"}.items(), strict=True
    ):
        assert said in page and (f"var(--{colour})" in look or colour == "grey")
    assert len(set(looks)) == 3


def test_every_score_is_a_point_against_time_and_every_trial_a_line(page):
    said = pictures(page)
    points = [
        len(group.findall(".//{*}use")) for group in groups(said["Best score on val so far against time"], "line2d")
    ]
    assert max(points) == 2 * len(STATUSES)
    lines = [
        path
        for group in groups(said["All settings and the score of each trial"], "line2d")
        for path in group.findall("{*}path")
        if "var(--blue)" in path.get("style", "")
    ]
    assert len(lines) == len(STATUSES)
