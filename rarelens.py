"""rarelens: images of rare, look-alike classes -> a trained, rebalanced, evaluated model with its report.

Raw images -> packed dataset -> stage one -> features -> stage two (searched) -> model + report; each arrow is one
command below, and `train` is all of them. This file only names what happens; the packages say how.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import UserError

if TYPE_CHECKING:
    from cluster.run import RunFolder
    from data_pipeline.dataset import Dataset
    from tuning.config import Config

CONFIGS = Path(__file__).parent / "configs"

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[
    str, typer.Argument(help="YAML file or its s3:// URI, e.g. configs/ham10000.yaml", show_default=False)
]


def _complete_setting(incomplete: str) -> list[str]:
    """For the shell: the keys that begin so."""
    from cluster.reference import settings_of
    from tuning.config import Config

    return [f"{entry.key}=" for entry in settings_of(Config) if entry.kind and entry.key.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings laid over the file, e.g. stage_one.epochs=8",
        metavar="[KEY=VALUE]...",
        autocompletion=_complete_setting,
    ),
]
ImageColumn = Annotated[str, typer.Option(help="Column with the image, where a set is a table")]
LabelColumn = Annotated[str, typer.Option(help="Column, or field of a shard's JSON, with the class")]
GroupColumn = Annotated[str | None, typer.Option(help="Column or field with the patient or lesion")]
SplitColumn = Annotated[str | None, typer.Option(help="Column or field with train, val, test, which are then kept")]
GuessedColumn = Annotated[str | None, typer.Option(help="Column or field; none = guessed")]
ClassNames = Annotated[
    str | None, typer.Option(help="Classes in the order of their labels: a,b,c or a file with a name a line")
]
ModelFolder = Annotated[str, typer.Argument(help="Model folder, a path or s3:// URI", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Insist on going on with a run: an error if there is none.")]


@app.callback()
def _common(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """`--debug` is read by `main`, wherever it stands."""


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo")) -> None:
    """Draw a small set of look-alike, long-tailed classes and take it through the whole system."""
    from data_pipeline.synthetic import draw_synthetic
    from trainer.summary import print_summary

    draw_synthetic(out / "images")
    job = _open(CONFIGS / "quickstart.yaml", [f"source.path={out / 'images'}", f"run={out / 'run'}"])
    _run(job, last="report")
    print_summary(job.run)


@app.command()
def init(
    source: Annotated[str, typer.Argument(help="Folder of images, MedMNIST .npz, or WebDataset shards (a pattern)")],
    out: Annotated[Path | None, typer.Option(help="The configuration; none = NAME.yaml here")] = None,
    run: Annotated[str | None, typer.Option(help="Run folder or s3:// URI that it names; none = runs/NAME")] = None,
    hours: Annotated[float, typer.Option(min=0.01, help="That `rarelens train` may take on this machine")] = 1.0,
    backbone: Annotated[str | None, typer.Option(help="A timm network; none = as the hours allow")] = None,
    weights: Annotated[str, typer.Option(help="Starting weights: timm, a path or URI, or none")] = "timm",
    labels: Annotated[str | None, typer.Option(help="CSV or Parquet of labels below SOURCE; none = looked for")] = None,
    image_column: GuessedColumn = None,
    label_column: GuessedColumn = None,
    group_column: GuessedColumn = None,
    split_column: GuessedColumn = None,
    class_names: ClassNames = None,
    measure: Annotated[bool, typer.Option(help="Time a network and the decoder here")] = True,
) -> None:
    """Look at labelled images and at this machine, and write a configuration, each value with its reason.

    Then `rarelens train` needs nothing else. Exit status 1 when something must be mended first.
    """
    from tuning.proposal.draft import Wishes, draft, write_draft

    name = re.sub(r"[^\w.-]+", "_", Path(source).resolve().stem)  # of a pattern, too
    path = source if "://" in source else os.path.abspath(source)
    given = _columns(image_column, label_column, group_column, split_column, class_names) | {"labels": labels}
    wishes = Wishes(name, run or f"runs/{name}", hours, backbone, None if weights == "none" else weights)
    out = out or Path(f"{name}.yaml")
    made = write_draft(out, lambda: draft(path, given, wishes, measure))
    for line in (*made.found, *made.guessed, made.plan):
        typer.echo(line)
    for text in (*made.obstacles, *made.remarks):
        typer.echo(f"note: {text}", err=True)
    typer.echo(f"configuration: {out}\nnext: rarelens train {out}")
    raise typer.Exit(1 if made.obstacles else 0)


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="Folder of images, MedMNIST .npz, or WebDataset shards (a pattern)")],
    dest: Annotated[str, typer.Argument(help="Folder or s3:// URI of the packed dataset")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Other settings, e.g. data.max_damaged=5 data.split.val=0.2", metavar="[KEY=VALUE]..."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="CSV or Parquet of labels below SOURCE; none = one folder a class")
    ] = None,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
    group_column: GroupColumn = None,
    split_column: SplitColumn = None,
    class_names: ClassNames = None,
    size: Annotated[int | None, typer.Option(help="Shrink the short side to so many pixels; none = bytes kept")] = None,
    seed: Annotated[int, typer.Option(help="Of splits and shuffling")] = 0,
) -> None:
    """Pack labelled images into shards with grouped train / val / test splits, or with those that are given.

    Images become upright 8-bit JPEG or PNG by the rule in docs/architecture.md; those that are this keep their bytes.
    What is done is kept: the same command goes on. Exit status 1 when samples were left out, up to data.max_damaged:
    damaged.json names each with its reason.
    """
    from cluster.config import apply_overrides, parse_config
    from data_pipeline.config import PackConfig
    from data_pipeline.pack import pack as pack_dataset

    columns = _columns(image_column, label_column, group_column, split_column, class_names)
    data = {"name": Path(source).resolve().stem, "pack_px": size}
    values = {"source": {"path": source, "labels": labels, **columns}, "data": data, "seed": seed}
    config = parse_config(PackConfig, apply_overrides(values, settings or []), origin="pack")
    with _can_go_on():
        dataset = pack_dataset(config.source, config.data, dest, config.seed)
    typer.echo(f"packed {sum(s.samples for s in dataset.shards)} images of {len(dataset.classes)} classes into {dest}")
    raise typer.Exit(1 if dataset.made.get("damaged") else 0)


@app.command()
def audit(
    dataset: Annotated[str, typer.Argument(help="Packed dataset, the training set of a pair, or a set with splits")],
    test: Annotated[str | None, typer.Argument(help="Test set of a pair")] = None,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
    group_column: GroupColumn = None,
    split_column: SplitColumn = None,
    class_names: ClassNames = None,
    near_duplicate_bits: Annotated[
        int, typer.Option(min=-1, max=16, help="Bits of the 64 by which near-duplicates may differ; -1 = none are")
    ] = 2,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every shard's SHA-256 too")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Status 1 on conflicts and unreadable files too")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file too")] = None,
) -> None:
    """Look for leaks between splits: shared groups, near-duplicates, conflicting labels. Exit status 1 on a leak.

    A set is a packed dataset, a CSV or Parquet table, class folders, an .npz or shards.
    """
    import json

    from cluster.config import parse_config
    from cluster.progress import console
    from data_pipeline.audit import audit as audit_dataset
    from data_pipeline.config import SourceConfig

    columns = _columns(image_column, label_column, group_column, split_column, class_names)
    source = parse_config(SourceConfig, columns, origin="audit")
    report = audit_dataset(dataset, test, source, near_duplicate_bits, verify)
    if not console.is_terminal:
        console.width = 180  # of a log, where nothing need be wrapped
    console.print(report.to_table())
    if json_file:
        json_file.write_text(json.dumps(report.to_json(), indent=2))
    raise typer.Exit(0 if report.clean or not (strict or report.leaks) else 1)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """All of it: what is done in the run folder is skipped, what is not is done."""
    from trainer.summary import print_summary
    from tuning.cross_validation import print_cross_validation

    job = _open(config, overrides, resume)
    _run(job, last="report")
    if job.config.folds == 1:
        print_summary(job.run)
    else:
        print_cross_validation(job.run)


@app.command()
def stage_one(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Pack if needed, then metric learning with cross-entropy on all workers."""
    _run(_open(config, overrides, resume), last="stage one")


@app.command()
def search(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Search stage one's settings, each trial judged by a small stage two; RUN/search/best.yaml is for `train`."""
    from cluster.progress import console
    from cluster.run import alone_in
    from tuning.settings import search_space
    from tuning.stage_one import search_stage_one
    from tuning.trials_table import BEST_FILE, PAGE_FILE, trials_table

    job = _open(config, overrides, resume)
    names = list(search_space(job.config))
    with _can_go_on(), alone_in(job.run):
        _check(job)
        rows = search_stage_one(job.config, job.dataset, job.run)
    if not console.is_terminal:
        console.width = 180  # of a log, where nothing need be wrapped
    console.print(trials_table(job.config, rows, names))
    typer.echo(f"page: {job.run.uri}/{PAGE_FILE}\nnext: rarelens train {job.run.uri}/{BEST_FILE}")


@app.command()
def features(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Backbone outputs of train and val for stage two (and what comes before, where it is not done)."""
    _run(_open(config, overrides, resume), last="features")


@app.command()
def stage_two(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Search the heads on val (and what comes before, where it is not done)."""
    _run(_open(config, overrides, resume), last="stage two")


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Read test once and write the model folder (and what comes before, where it is not done)."""
    _run(_open(config, overrides, resume), last="evaluation")


@app.command()
def report(
    what: Annotated[str, typer.Argument(help="YAML file as for `train`, or a run folder", show_default=False)],
    more: Annotated[
        list[str] | None,
        typer.Argument(help="Settings laid over, or a run folder to compare with", metavar="[KEY=VALUE... | RUN]"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Page of the comparison")] = Path("comparison.html"),
    resume: Resume = False,
) -> None:
    """Write report.html (and what comes before, where it is not done); of a run folder, again, from its files alone.

    Of two run folders A B: the paired differences of their models on the same test set, and of their settings.
    """
    from cluster.run import alone_in
    from trainer.compare import compare_runs, is_run_folder
    from trainer.compare_page import headline, write_comparison
    from trainer.record import report_run

    more = more or []
    if any(not re.match(r"[\w.]+=", text) for text in more):  # a setting is a dotted name and a value
        if len(more) > 1:
            raise UserError(f"report compares two run folders and takes no settings then, not {' '.join(more)}")
        found = compare_runs(what, more[0])
        write_comparison(found, out)
        typer.echo(f"{headline(found)}\npage: {out}")
    elif is_run_folder(what):
        job = _open(f"{what}/config.yaml", [*more, f"run={what}"])
        with alone_in(job.run):
            report_run(job.config, job.run, again=True)
        typer.echo(f"report: {job.run.uri}/model/report.html")
    else:
        _run(_open(what, more, resume), last="report")


@app.command()
def study(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
    cell: Annotated[
        list[str] | None, typer.Option(help="Work on this cell alone, e.g. focal-seed0; none = all that nobody has")
    ] = None,
) -> None:
    """A table of methods x seeds on one dataset and one budget.

    A cell is one training with one seed. The same command, started again elsewhere, shares in the work.
    """
    from cluster.progress import console
    from tuning.study import packed_dataset, run_study
    from tuning.study_files import terminal_table
    from tuning.study_layout import PICTURE_FILE, TABLE_FILE

    job = _open(config, overrides, resume)
    with _can_go_on():
        _check(job)
        table = run_study(job.config, packed_dataset(job.config, job.run), job.run, cell or ())
    if table is None:
        typer.echo("cells are left; when all are done, the same command makes the table")
        return
    if not console.is_terminal:
        console.width = 180  # of a log, where nothing need be wrapped
    console.print(terminal_table(table))
    typer.echo(f"table: {job.run.uri}/{TABLE_FILE}\npicture: {job.run.uri}/{PICTURE_FILE}")


@app.command()
def predict(
    model: ModelFolder,
    images: Annotated[list[str], typer.Argument(help="Files, folders, patterns such as 'new/*.jpg'; also s3://")],
    out: Annotated[
        Path | None, typer.Option(help="CSV or Parquet file; none = a table on the terminal, CSV into a pipe")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Tell the K most probable classes alone; none = p_CLASS of each")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once")] = 64,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
) -> None:
    """Classify images: calibrated probabilities, training images that look alike, a flag where none does.

    Exit status 1 when some could not be read: each is named on stderr, the others have their row.
    """
    from trainer.predict import predict as predict_images

    result = predict_images(model, images, out, top=top, batch_size=batch_size, device=device)
    typer.echo(str(result), err=out is None)
    raise typer.Exit(1 if result.damaged else 0)


@app.command()
def export(
    model: ModelFolder,
    out: Annotated[Path, typer.Option(help="The file: .onnx, or .pt2 for torch-export")],
    kind: Annotated[str, typer.Option("--format", help="onnx or torch-export")] = "onnx",
) -> None:
    """Write a model as one file, checked against PyTorch: pixels in, calibrated probabilities out."""
    from trainer.portable import export_model

    difference = export_model(model, out, kind)
    typer.echo(f"{out}: probabilities within {difference:.1g} of PyTorch's")


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="Run folder, a path or s3:// URI")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """What a run is doing, how far it is and what went wrong last, from its run folder alone."""
    from tuning.read_status import read_status
    from tuning.status import print_status

    print_status(read_status(run), as_json)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Workers to plan for, beside the table's own")] = 8,
    machine: Annotated[str, typer.Option(help="Kind of machine: l4, a100, h100 or cpu")] = "l4",
    images: Annotated[int | None, typer.Option(min=1, help="Training images, where nothing is packed yet")] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="Classes, where nothing is packed yet")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time network and decoder on this machine first")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file too")] = None,
) -> None:
    """Stage one on paper for 1 to 1,024 GPUs: speed, S3 and network traffic, memory, checkpoints, time and cost."""
    from cluster.config import load_config
    from cluster.progress import console
    from trainer.machine import machine as machine_named
    from trainer.plan_measure import measure as measure_here
    from trainer.plan_report import data_size, network_size, predictions, table, to_json
    from tuning.config import Config

    settings, kind = load_config(Config, config, overrides), machine_named(machine)
    data = data_size(settings, images, classes)
    kind = measure_here(settings, kind, data.num_classes) if measure else kind
    network = network_size(settings, data.num_classes)
    rows = predictions(settings, data, network, kind, gpus)
    if not console.is_terminal:
        console.width = 220  # of a log, where nothing need be wrapped
    console.print(table(rows, settings, kind, gpus))
    if json_file:
        json_file.write_text(to_json(rows, data, network, kind))


@app.command()
def settings(
    name: Annotated[str | None, typer.Argument(help="A setting or a section, e.g. stage_one.loss; none = all")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print what docs/configuration.md holds.")] = False,
) -> None:
    """What a configuration can hold: every setting with its values, its default and its meaning."""
    from cluster.reference import find_settings, markdown, text
    from tuning.config import Config

    entries = find_settings(Config, name)
    typer.echo((markdown if as_markdown else text)(entries), nl=False)


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(help="YAML file or its s3:// URI: also check what it needs")] = None,
    overrides: Overrides = None,
) -> None:
    """What this machine or cluster has, what is missing, the command that mends it. Exit status 1 if something is."""
    from cluster.doctor import examine, render

    findings = examine(**_needs(config, overrides)) if config else examine()
    render(findings)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


# --------------------------------------------------------------------------------------------------------------------
# The steps of `train`, in order. Each looks for its own result first and returns at once when it is there.


def _columns(
    image: str | None, label: str | None, group: str | None, split: str | None, class_names: str | None
) -> dict:
    """What a source's columns and classes are called, by the names of `SourceConfig`."""
    names: list[str] | None = None
    if class_names is not None:
        is_file = Path(class_names).is_file()
        names = Path(class_names).read_text().splitlines() if is_file else class_names.split(",")
    columns = {"image_column": image, "label_column": label, "group_column": group, "split_column": split}
    return columns | {"class_names": names and [name.strip() for name in names if name.strip()]}


class Job:
    """A configuration, its run folder and its packed dataset."""

    def __init__(self, config: Config, run: RunFolder):
        self.config, self.run = config, run
        self._dataset: Dataset | None = None

    @property
    def dataset(self) -> Dataset:
        """The packed dataset, packed if it is not there."""
        from data_pipeline.pack import pack as pack_dataset

        if self._dataset is None:
            destination = self.config.data.packed or f"{self.run.uri}/dataset"
            self._dataset = pack_dataset(self.config.source, self.config.data, destination, self.config.seed)
        return self._dataset

    @property
    def folds(self) -> list[Job]:
        """The run of each fold; without cross-validation this one alone."""
        from tuning.cross_validation import fold_configs

        return [self] if self.config.folds == 1 else [_job(config) for config in fold_configs(self.config)]


def _check(job: Job) -> None:
    """What would otherwise fail after minutes: the storage, the network and its weights."""
    from cluster.storage import check_storage
    from trainer.blocks import check_blocks
    from trainer.model import build_model
    from trainer.tracking import check_tracking

    check_tracking(job.config.tracking)
    check_storage(job.run.storage)
    if not job.run.storage.exists("stage_one/result.json"):
        model = build_model(job.config.model, num_classes=2, image_px=job.config.data.image_px)
        if job.config.fine_tune.epochs:
            check_blocks(model.backbone, job.config.model.backbone, job.config.fine_tune.blocks)


def _pack(job: Job) -> None:
    assert job.dataset is not None


def _stage_one(job: Job) -> None:
    from trainer.stage_one import train_baseline, train_stage_one

    train_stage_one(job.config, job.dataset, job.run)
    if job.config.evaluation.baseline:
        train_baseline(job.config, job.dataset, job.run)


def _features(job: Job) -> None:
    from trainer.extraction import TRAIN_AND_VAL, extract_features

    extract_features(job.config, job.dataset, job.run, TRAIN_AND_VAL)


def _stage_two(job: Job) -> None:
    from tuning.stage_two import search_stage_two

    search_stage_two(job.config, job.dataset, job.run)


def _fine_tune(job: Job) -> None:
    from tuning.fine_tuning import fine_tune

    fine_tune(job.config, job.dataset, job.run)


def _evaluate(job: Job) -> None:
    from trainer.evaluate import evaluate as evaluate_run

    evaluate_run(job.config, job.dataset, job.run)


def _report(job: Job) -> None:
    from trainer.record import report_run
    from trainer.tracking import send_model

    report_run(job.config, job.run)
    send_model(job.config, job.run)


STEPS = {
    "pack": _pack,
    "stage one": _stage_one,
    "features": _features,
    "stage two": _stage_two,
    "fine-tuning": _fine_tune,
    "evaluation": _evaluate,
    "report": _report,
}


def _open(config_file: str | Path, overrides: list[str] | None = None, resume: bool = False) -> Job:
    from cluster.config import load_config
    from tuning.config import Config

    return _job(load_config(Config, config_file, overrides), resume)


def _job(config: Config, resume: bool = False) -> Job:
    from cluster.run import RunFolder
    from tuning.config import Config

    run = RunFolder(config.run)
    run.pin_config(config.model_dump(mode="json"), must_exist=resume, defaults=Config().model_dump(mode="json"))
    return Job(config, run)


def _run(job: Job, last: str) -> None:
    """Every step up to `last`, of each fold where there are folds."""
    from cluster.run import alone_in
    from tuning.cross_validation import cross_validate

    with _can_go_on():
        folds = job.folds
        for fold in folds:
            with alone_in(fold.run):
                _do_steps(fold, last)
        if len(folds) > 1 and last == "report":
            cross_validate(job.run, [fold.run for fold in folds])


def _do_steps(job: Job, last: str) -> None:
    """Every step up to `last`; the seconds of each are kept with the run, over all its starts."""
    import time

    _check(job)
    for name, step in STEPS.items():
        started = time.monotonic()
        step(job)
        job.run.add_seconds(name, time.monotonic() - started)
        if name == last:
            return


@contextmanager
def _can_go_on() -> Iterator[None]:
    """Ctrl-C and SIGTERM lose nothing here, and say so."""
    from cluster.worker import RunStopped

    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(_say("stopped; the same command goes on from here", 130)) from None
    except RunStopped:
        raise typer.Exit(_say("stopped, with a last checkpoint; the same command goes on from here", 143)) from None


def _needs(config_file: str, overrides: list[str] | None = None) -> dict:
    """What `cluster.doctor.examine` is to look at for a run."""
    from cluster.config import load_config
    from trainer.config import HUB
    from tuning.config import Config

    config = load_config(Config, config_file, overrides)
    weights = config.model.weights
    on_disk = weights if weights != "timm" and not str(weights).startswith(HUB) else None
    packed = f"{config.data.packed}/dataset.json" if config.data.packed and not config.source.path else None
    paths = [path for path in (config.source.path, packed, on_disk) if path]
    return {
        "storage_uri": config.run,
        "paths": [path for path in paths if not set(path) & set("*?[{")],  # of shards, a pattern names many
        "cluster": config.cluster,
        "extras": ["mlflow"] if config.tracking.mlflow else [],
    }


def main() -> None:
    """Entry point: a user's mistake is one line and exit status 2."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments, prog_name="rarelens")
    except UserError as error:
        if debug:
            raise
        sys.exit(_say(f"error: {error}", 2))


def _say(text: str, status: int) -> int:
    print(text, file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
