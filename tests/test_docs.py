"""From one's own folder to a model in two commands, and the commands of the pages after them, as a reader types them.

Of what trains for minutes all is done up to the packed dataset; what needs a cluster is left to test_readme.py, which
holds it against the command lines.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import yaml
from typer.testing import CliRunner

import rarelens
from cluster import doctor
from cluster.config import load_config
from cluster.storage import open_storage
from data_pipeline import synthetic
from data_pipeline.synthetic import draw_synthetic
from tests.docs_commands import COMMANDS, HEADS, ROOT, parsed
from tests.raw import pattern, save, write_csv
from tuning.config import Config
from tuning.study import packed_dataset

TINY = ["--hours", "0.01", "--backbone", "test_resnet", "--weights", "none", "--no-measure"]
"""Laid over the pages' `rarelens init`: seconds instead of an hour, and no download."""
STEPS = ("stage-one", "features", "stage-two", "evaluate", "report")
QUICK = ("init", "pack", "audit", "predict", "export", "status", "plan", "settings", *STEPS)
TRAINS = ("train", "study")


def is_run(command):
    """Whether a command is run here: quick, on files of this disk, and on nothing but the one run."""
    ours = command.program == "rarelens" and command.arguments[0] in QUICK and not command.environment
    others = [word for word in command.arguments if "s3://" in word or re.match(r"runs/(?!skin\b)", word)]
    return ours and not others


def is_opened(command):
    """Whether a command trains on images of this disk under another name than the run that is trained here."""
    ours = command.program == "rarelens" and command.arguments[0] in TRAINS and not is_in_a_bucket(command)
    return ours and command.arguments != ("train", "skin.yaml")


def is_in_a_bucket(command):
    return command.program == "rarelens" and any("s3://BUCKET" in word for word in command.arguments)


RUN = [command for command in COMMANDS if is_run(command) and command.arguments[:2] != ("init", "skin")]
INIT = [command for command in COMMANDS if command.arguments[:2] == ("init", "skin")]
OPENED = [command for command in COMMANDS if is_opened(command)]
HEADS_OPENED = [command for command in HEADS if is_opened(command)]
LOOKED_AT = [command for command in COMMANDS if command.arguments[:1] == ("status",) and not is_run(command)]
IN_A_BUCKET = [command for command in COMMANDS if is_in_a_bucket(command)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the reader sits: `skin` with images and labels, `new_images`, the project's `configs`."""
    place = tmp_path_factory.mktemp("reader")
    draw_synthetic(place / "skin", seed=3, scale=0.03)
    (place / "new_images").mkdir()
    for image in sorted((place / "skin" / "images").glob("*.jpg"))[:3]:
        shutil.copy(image, place / "new_images")
    (place / "configs").symlink_to(ROOT / "configs")
    draw_ham10000(place / "HAM10000")
    draw_brain_mri(place / "BRAIN_MRI")
    return place


def draw_ham10000(folder):
    """Noise in the layout of HAM10000: its seven classes, its columns, some lesions with two images."""
    rows = []
    for label in ("nv", "bkl", "mel", "bcc", "akiec", "vasc", "df"):
        for lesion in range(8):
            for _ in range(1 + lesion % 2):
                rows.append((f"HAM_{label}{lesion}", f"ISIC_{len(rows):07d}", label, "histo"))
                save(folder / "images" / f"{rows[-1][1]}.jpg", pattern(len(rows)))
    write_csv(folder / "metadata.csv", ["lesion_id", "image_id", "dx", "dx_type"], rows)


def draw_brain_mri(folder):
    """Noise in the layout of the brain MRI set: class folders below its own two splits."""
    names = ("glioma", "meningioma", "no_tumor", "pituitary")
    for number in range(160):
        split = "Testing" if number % 5 == 0 else "Training"
        save(folder / split / names[number % 4] / f"{number}.jpg", pattern(1000 + number).convert("L"))


def typed(folder, *words, cores=None):
    """A command in a process of its own, which may use some cores alone."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(ROOT / "rarelens.py"), *words]
    limit = partial(os.sched_setaffinity, 0, cores) if cores else None
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=environment, preexec_fn=limit
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def written(folder):
    """What `rarelens init skin` said, on a machine of one core: a worker is all that it plans for."""
    return typed(folder, "init", "skin", *TINY, cores={min(os.sched_getaffinity(0))})


@pytest.fixture(scope="module")
def trained(written, folder):
    """What `rarelens train skin.yaml` said."""
    return typed(folder, "train", "skin.yaml")


def test_init_says_what_it_found_and_guessed_and_what_comes_next(written, folder):
    pictures = len(list((folder / "skin" / "images").iterdir()))
    for text in (
        f"images: {pictures} of 16 classes",
        f"source.labels: labels.csv (names {pictures} of {pictures} images)",
        "source.label_column: label (called like a class; 16 values)",
        "source.group_column: group (called like a patient or lesion; ",
        "configuration: skin.yaml\nnext: rarelens train skin.yaml\n",
    ):
        assert text in written
    config = load_config(Config, folder / "skin.yaml")
    assert config.source.path == str(folder / "skin") and config.run == "runs/skin"
    assert config.source.labels == "labels.csv" and config.source.group_column == "group"
    assert config.model.backbone == "test_resnet" and config.model.weights is None
    assert config.cluster.workers == 1


@pytest.mark.long
def test_the_second_command_ends_with_a_model_and_the_command_that_uses_it(trained, folder):
    model = folder / "runs" / "skin" / "model"
    assert {"model.safetensors", "model.json", "report.html"} <= {path.name for path in model.iterdir()}
    assert f"rarelens predict {model} NEW_IMAGES --out predictions.csv" in trained


def test_init_does_not_write_over_a_file(written, folder):
    before = (folder / "skin.yaml").read_text()
    done = CliRunner().invoke(rarelens.app, ["init", str(folder / "skin"), "--out", str(folder / "skin.yaml"), *TINY])
    assert "exists, and may hold changes of yours; remove it" in str(done.exception)
    assert (folder / "skin.yaml").read_text() == before


def test_what_must_be_mended_first_is_told_by_the_exit_status(folder, tmp_path):
    for image in sorted((folder / "skin" / "images").glob("*.jpg"))[:4]:
        label = "ab"[len(list(tmp_path.rglob("*.jpg"))) % 2]
        (tmp_path / "few" / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "few" / label)
    out = tmp_path / "few.yaml"
    done = CliRunner().invoke(rarelens.app, ["init", str(tmp_path / "few"), "--out", str(out), *TINY])
    assert done.exit_code == 1, done.output
    assert "note: 2 classes with fewer groups" in done.output and out.exists()


@pytest.mark.parametrize("command", INIT, ids=str)
def test_init_as_the_pages_have_it(command, folder, tmp_path, monkeypatch):
    """With the reader's own words last, so that nothing of them is overridden but hours, network and weights."""
    monkeypatch.chdir(folder)
    given = [word for word in command.arguments if word not in ("--hours", "1")]
    out = tmp_path / "made.yaml"
    done = CliRunner().invoke(rarelens.app, [*given, *TINY, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(out.read_text())["source"]["labels"] == "labels.csv"


@pytest.mark.long
@pytest.mark.parametrize("command", RUN, ids=str)
def test_the_pages_commands_run(command, trained, folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(rarelens.app, list(command.arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output


def opened(arguments):
    """The packed dataset on which a command would train; its run folder is begun."""
    taken = parsed(arguments)
    job = rarelens._open(taken["config"], taken["overrides"])
    return packed_dataset(job.config, job.run) if arguments[0] == "study" else job.dataset


@pytest.mark.parametrize("command", OPENED, ids=str)
def test_what_the_pages_train_on_can_be_opened(command, written, folder, monkeypatch):
    """All of it in the reader's folder, where one command follows the other."""
    monkeypatch.chdir(folder)
    look_at(opened(command.arguments), command)


@pytest.mark.parametrize("command", HEADS_OPENED, ids=str)
def test_what_a_configuration_s_head_trains_on_can_be_opened(command, folder, tmp_path, monkeypatch):
    for name, theirs in (("configs", "configs"), ("HAM10000", "HAM10000_FOLDER"), ("BRAIN_MRI", "BRAIN_MRI_FOLDER")):
        (tmp_path / theirs).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    look_at(opened(command.arguments), command)


def look_at(dataset, command):
    """Whether the tiny set of that layout is what the configuration takes it for."""
    counts = {split: dataset.class_counts(split) for split in ("train", "val", "test")}
    assert all(count.min() > 0 for count in counts.values()), counts
    if "HAM10000" in str(command):
        assert len(dataset.classes) == 7 and not (dataset.uri.startswith("s3://"))
        lesions = [set(dataset.index(split).group) for split in counts]
        assert sum(map(len, lesions)) == len(set.union(*lesions)) == 7 * 8
    if "BRAIN" in str(command):
        assert len(dataset.classes) == 4 and counts["test"].sum() > 20
        assert counts["train"].max() >= 10 * counts["train"].min(), "it is made long-tailed"


def test_a_run_that_is_begun_can_be_looked_at(folder, monkeypatch):
    """After the commands above it on its page."""
    monkeypatch.chdir(folder)
    local = [command for command in LOOKED_AT if not is_in_a_bucket(command)]
    for command in local:
        for before in (before for before in OPENED if before.page == command.page):
            opened(before.arguments)
        done = CliRunner().invoke(rarelens.app, list(command.arguments), catch_exceptions=False)
        assert done.exit_code == 0 and command.arguments[1] in done.output, done.output
    assert local


@pytest.mark.long
def test_two_runs_are_compared_as_the_pages_have_it(trained, folder, tmp_path, monkeypatch):
    """The other run is begun as the page says, and has the results of the first one."""
    (compared,) = (
        command for command in COMMANDS if command.arguments[:1] == ("report",) and len(command.arguments) == 3
    )
    _, ours, theirs = compared.arguments
    (begun,) = (command for command in OPENED if f"run={theirs}" in command.arguments)
    for name in ("skin", "skin.yaml"):
        (tmp_path / name).symlink_to(folder / name)
    shutil.copytree(folder / ours, tmp_path / ours)
    monkeypatch.chdir(tmp_path)
    opened(begun.arguments)
    for part in ("model", "evidence"):
        shutil.copytree(tmp_path / ours / part, tmp_path / theirs / part)
    done = CliRunner().invoke(rarelens.app, list(compared.arguments), catch_exceptions=False)
    assert done.exit_code == 0 and "B - A: 0.0 points" in done.output, done.output
    assert "stage_one.loss.name" in (tmp_path / "comparison.html").read_text().replace("<wbr>", "")


@pytest.mark.long
def test_the_commands_on_a_bucket_run(trained, folder, moto_s3, tmp_path, monkeypatch):
    """In the order of the pages; a model that was trained in the bucket is one that was copied there."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = open_storage(f"{moto_s3}/docs")
    for file in (folder / "runs" / "skin" / "model").iterdir():
        bucket.write(f"runs/skin/model/{file.name}", file.read_bytes())
    image = io.BytesIO()
    pattern(7).save(image, "PNG")
    bucket.write("new/deep/er/one.png", image.getvalue())
    ran = set()
    for command in IN_A_BUCKET:
        words = [word.replace("s3://BUCKET", f"{moto_s3}/docs") for word in command.arguments]
        if words[0] in TRAINS:
            assert opened(words).uri == f"{moto_s3}/docs/datasets/{'ham10000' if 'ham' in words[1] else 'skin'}"
        else:
            done = CliRunner().invoke(rarelens.app, words, catch_exceptions=False)
            assert done.exit_code == 0, (command, done.output)
        ran.add(words[0])
    assert ran == {"pack", "audit", "train", "study", "predict", "status"}


def test_the_doctor_finds_nothing_missing_for_the_pages_run(written, folder, moto_s3, monkeypatch):
    """But for libraries and the machine's size, which are looked at elsewhere; the server is ours."""
    monkeypatch.chdir(folder)
    for name, value in (("_PROBE_REMEDIES", {}), ("FREE_DISK_GIB", 0), ("SHARED_MEMORY_MIB", 0), ("OPEN_FILES", 0)):
        monkeypatch.setattr(doctor, name, value)
    for command in (command for command in COMMANDS if command.arguments[:1] == ("doctor",)):
        assert {text.partition("=")[0] for text in command.environment} <= {"AWS_ENDPOINT_URL", "RAY_ADDRESS"}
        done = CliRunner().invoke(rarelens.app, list(command.arguments), catch_exceptions=False)
        assert done.exit_code == 0, done.output


@pytest.mark.long
def test_the_demo_as_make_has_it(trained, folder, tmp_path, monkeypatch):
    """All but the training, on fewer pictures: the drawn set is packed, and the table is what its run left."""
    recipe = re.search(r"^demo:.*\n\t\$\(BIN\)/rarelens (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic, "draw_synthetic", partial(draw_synthetic, scale=0.03))
    steps = []

    def only_packs(job, last):
        steps.append((last, len(job.dataset.classes), job.config.evaluation.baseline))
        shutil.copytree(folder / "runs" / "skin" / "model", job.run.work / "model")

    monkeypatch.setattr(rarelens, "_run", only_packs)
    done = CliRunner().invoke(rarelens.app, recipe[1].split(), catch_exceptions=False)
    assert done.exit_code == 0 and steps == [("report", 16, True)]
    report = re.search(r"its report is then `(.*?)`", (ROOT / "README.md").read_text())
    assert (tmp_path / report[1]).is_file(), "where the README says"
    assert "report: " in done.output and "use it: rarelens predict " in done.output


def test_every_command_of_the_pages_is_run_somewhere():
    elsewhere = ("demo", "train", "doctor", "report")
    for command in COMMANDS:
        if command.program == "rarelens" and command not in (*RUN, *INIT, *OPENED, *IN_A_BUCKET, *LOOKED_AT):
            assert command.arguments[0] in elsewhere, command


def test_enough_of_them_run():
    assert {command.arguments[0] for command in RUN} >= {
        *STEPS,
        "pack",
        "audit",
        "predict",
        "export",
        "status",
        "plan",
        "settings",
    }
