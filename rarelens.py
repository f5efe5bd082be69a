"""rarelens: images of rare, look-alike classes -> a trained, rebalanced, evaluated model with its report.

Raw images -> packed dataset -> stage one -> features -> stage two (searched) -> model + report; each arrow is one
command below, and `train` is all of them. This file only names what happens; the packages say how.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
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
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings laid over the file, e.g. stage_one.epochs=8", metavar="[KEY=VALUE]..."),
]
ImageColumn = Annotated[str, typer.Option(help="Column with the image, where a set is a table")]
LabelColumn = Annotated[str, typer.Option(help="Column, or field of a shard's JSON, with the class")]
GroupColumn = Annotated[str | None, typer.Option(help="Column or field with the patient or lesion")]
SplitColumn = Annotated[str | None, typer.Option(help="Column or field with train, val, test, which are then kept")]
ClassNames = Annotated[
    str | None, typer.Option(help="Classes in the order of their labels: a,b,c or a file with a name a line")
]
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

    job = _open(config, overrides, resume)
    _run(job, last="report")
    print_summary(job.run)


@app.command()
def stage_one(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Pack if needed, then metric learning with cross-entropy on all workers."""
    _run(_open(config, overrides, resume), last="stage one")


@app.command()
def search(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Search stage one's settings, each trial judged by a small stage two; RUN/search/best.yaml is for `train`."""
    from cluster.progress import console
    from tuning.settings import search_space
    from tuning.stage_one import search_stage_one
    from tuning.trials_table import BEST_FILE, PAGE_FILE, trials_table

    job = _open(config, overrides, resume)
    names = list(search_space(job.config))
    with _can_go_on(), closing(job.run):
        _check(job)
        rows = search_stage_one(job.config, job.dataset, job.run)
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
def report(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Write report.html (and what comes before, where it is not done)."""
    _run(_open(config, overrides, resume), last="report")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Model folder, a path or s3:// URI")],
    images: Annotated[list[str], typer.Argument(help="Files, folders, globs")],
    out: Annotated[Path, typer.Option(help="CSV or Parquet file: image, label, p_CLASS...")],
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Classify images with a trained model. Exit status 1 when some could not be read."""
    from trainer.predict import predict as predict_images

    result = predict_images(model, images, out, batch_size=batch_size)
    typer.echo(f"{result.predicted} images classified, {len(result.damaged)} unreadable: {out}")
    raise typer.Exit(1 if result.damaged else 0)


@app.command()
def doctor(config: Annotated[Path | None, typer.Argument(help="Also check what this run needs")] = None) -> None:
    """What this machine or cluster has, what is missing, the command that mends it. Exit status 1 if something is."""
    from cluster.doctor import examine, render

    findings = examine(**_needs(config)) if config else examine()
    render(findings)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


# --------------------------------------------------------------------------------------------------------------------
# The steps of `train`, in order. Each looks for its own result first and returns at once when it is there.


def _columns(image: str, label: str, group: str | None, split: str | None, class_names: str | None) -> dict:
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


def _check(job: Job) -> None:
    """What would otherwise fail after minutes: the storage, the network and its weights."""
    from cluster.storage import check_storage
    from trainer.blocks import check_blocks
    from trainer.model import build_model

    if not job.run.storage.exists("stage_one/result.json"):
        check_storage(job.run.storage)
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

    report_run(job.config, job.dataset, job.run)


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
    from cluster.run import RunFolder
    from tuning.config import Config

    config = load_config(Config, config_file, overrides)
    run = RunFolder(config.run)
    run.pin_config(config.model_dump(mode="json"), must_exist=resume)
    return Job(config, run)


def _run(job: Job, last: str) -> None:
    """Every step up to `last`; the seconds of each are kept with the run, over all its starts."""
    import time

    with _can_go_on(), closing(job.run):
        _check(job)
        for name, step in STEPS.items():
            started = time.monotonic()
            step(job)
            job.run.add_seconds(name, time.monotonic() - started)
            if name == last:
                return


@contextmanager
def _can_go_on() -> Iterator[None]:
    """Ctrl-C loses nothing here, and says so."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(_say("stopped; the same command goes on from here", 130)) from None


def _needs(config_file: Path) -> dict:
    from cluster.config import load_config
    from tuning.config import Config

    config = load_config(Config, config_file)
    paths = [path for path in (config.source.path, config.model.weights) if path and path != "timm"]
    return {
        "storage_uri": config.run,
        "paths": [path for path in paths if not set(path) & set("*?[{")],  # of shards, a pattern names many
        "workers": config.cluster.workers,
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
