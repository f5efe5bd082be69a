"""What the README and docs/ tell people to type is what the programs take; test_docs.py runs what takes seconds."""

import json
import re
from pathlib import Path

import boto3
import click
import pytest
import typer.main
from packaging.requirements import Requirement

import rarelens
from cluster.config import apply_overrides, load_config, parse_config
from cluster.reference import settings_of
from tests.docs_commands import COMMANDS, HEADED, HEADS, PAGES, ROOT, parsed
from tuning.config import Config

PROGRAMS = ("rarelens", "make", "ray", "python3", "pip", "tests/sealed.sh", "source", "aws")


def of(program):
    return [command for command in (*COMMANDS, *HEADS) if command.program == program]


def test_the_first_screen_shows_both_commands():
    first = [(command.program, *command.arguments) for command in COMMANDS if command.page == "README.md"]
    assert first[:2] == [("make", "demo"), ("make", "test")]


def test_every_program_is_looked_at_here():
    assert {command.program for command in COMMANDS} <= set(PROGRAMS)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in of("make"):
        (target,) = command.arguments
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("command", of("rarelens"), ids=str)
def test_rarelens_takes_the_command(command):
    taken = parsed(command.arguments)
    if "overrides" in taken:
        shipped = ROOT / str(taken["config"])
        if shipped.is_file():
            load_config(Config, shipped, taken["overrides"])
        else:  # a file of the reader's: the settings that are laid over it are checked alone
            parse_config(Config, apply_overrides({}, taken["overrides"] or []), origin=str(command))


def read_by_ray(arguments):
    """What Ray's own command line makes of its arguments; raises where a command or an option is wrong."""
    from ray.scripts.scripts import cli

    taken, words = cli, list(arguments)
    while isinstance(taken, click.Group):
        taken = taken.commands[words.pop(0)]
    if taken.name == "submit":
        words += ["--", "what is submitted"]  # the page's own, which is looked at by itself
    return taken.make_context(taken.name, words).params


@pytest.mark.parametrize("command", of("ray"), ids=str)
def test_ray_takes_the_command(command):
    taken = read_by_ray(command.arguments)
    assert (ROOT / taken.get("cluster_config_file", "ray_cluster.yaml")).is_file()


def test_a_wrong_option_of_ray_s_would_be_seen():
    with pytest.raises(click.UsageError, match=r"No such option.*--works-dir"):
        read_by_ray(["job", "submit", "--works-dir", "."])


def test_a_shipped_configuration_is_told_where_the_images_are():
    """None of them says it itself."""
    looked_at = 0
    for command in of("rarelens"):
        taken = parsed(command.arguments)
        if command.arguments[0] in ("train", "study", "search") and (ROOT / str(taken["config"])).is_file():
            config = load_config(Config, ROOT / taken["config"], taken["overrides"])
            assert config.source.path or config.data.packed, command
            looked_at += 1
    assert looked_at >= 10


def test_what_is_packed_for_a_cluster_is_what_is_trained_on_there():
    for page in {command.page for command in COMMANDS}:
        ours = [parsed(c.arguments) for c in COMMANDS if c.page == page and c.program == "rarelens"]
        packed = {taken["dest"] for taken in ours if "dest" in taken}
        for taken in ours:
            for setting in taken.get("overrides") or []:
                if setting.startswith("data.packed=") and packed:
                    assert setting.removeprefix("data.packed=") in packed, page


def test_every_shipped_configuration_says_how_it_is_used():
    demo = "quickstart.yaml"  # `rarelens demo` opens it
    assert {command.page for command in HEADS} == {path.name for path in HEADED} - {demo}


def test_the_rule_for_parts_that_nobody_completes_is_one(moto_s3):
    (command,) = of("aws")
    assert command.arguments[:4] == ("s3api", "put-bucket-lifecycle-configuration", "--bucket", "BUCKET")
    assert command.arguments[4] == "--lifecycle-configuration"
    bucket, s3 = "rarelens-parts", boto3.client("s3")
    s3.create_bucket(Bucket=bucket)
    s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=json.loads(command.arguments[5]))
    (rule,) = s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert rule["Status"] == "Enabled" and rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}
    assert "Expiration" not in rule, "what is whole stays"
    s3.delete_bucket(Bucket=bucket)


def test_what_is_installed_is_what_the_project_offers():
    offered = (ROOT / "pyproject.toml").read_text().split("optional-dependencies")[1]
    extras = set(re.findall(r"^(\w+) = \[", offered, re.MULTILINE))
    for page in PAGES:
        for name in re.findall(r"pip install 'rarelens\[(\w+)\]'", page.read_text()):
            assert name in extras, f"{page.name}: {name}"
    for command in of("pip"):
        *options, what = command.arguments[1:]
        assert options == ["--editable"] and Requirement(what.replace(".", "rarelens")).name == "rarelens"


def test_tests_that_are_named_exist():
    for command in of("tests/sealed.sh"):
        assert (ROOT / command.arguments[-1]).is_file() and command.arguments[0] == ".venv/bin/python"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_settings_that_are_named_exist():
    known = {entry.key for entry in settings_of(Config)}
    sections = {key.partition(".")[0] for key in known if "." in key}
    files = (".py", ".yaml", ".json", ".jsonl", ".parquet", ".md", ".html", ".safetensors")
    for page in PAGES:
        for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)[=:`]", page.read_text()):
            if key.partition(".")[0] in sections and not key.endswith(files):
                assert key in known, f"{page.name}: {key}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_every_command_is_in_the_table():
    table = (ROOT / "README.md").read_text()
    for name in typer.main.get_command(rarelens.app).commands:
        assert f"`rarelens {name}" in table or f"`{name}`" in table, name


def test_every_package_is_shipped():
    """What `pip install` takes along is what the code imports."""
    declared = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    names = set(re.findall(r'"([\w.]+)"', declared[1]))
    there = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for package in ("cluster", "data_pipeline", "trainer", "tuning")
        for file in (ROOT / package).rglob("__init__.py")
    }
    assert names == there | {"configs"}
    assert all((ROOT / Path(*name.split("."))).is_dir() for name in names)
