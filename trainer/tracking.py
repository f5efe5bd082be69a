"""Who is told of a training beside `log.jsonl`: TensorBoard always, an MLflow server where it is asked for.

All of it happens in the driver; workers know nothing of it. The MLflow server is named by MLFLOW_TRACKING_URI, never by
the configuration, since it may hold a password. A run folder is one MLflow run, whichever process works in it: its id
is kept in `mlflow.json`. What the server does not take during a training costs the figures there, never the training.
"""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from cluster.config import Section, flatten
from cluster.errors import UserError
from cluster.progress import console
from cluster.run import LOG_FILE, RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from trainer.config import TrainerConfig

URI_VARIABLE = "MLFLOW_TRACKING_URI"
RUN_FILE = "mlflow.json"
PARAMETERS_AT_ONCE, METRICS_AT_ONCE, LONGEST_PARAMETER = 100, 1000, 500
"""What an MLflow server takes in one request, and of one value."""
SETTLE_S = 30.0
"""That the end of a training waits for the server."""
TEST_FIGURES = ("balanced_accuracy", "macro_f1", "worst_recall")


class TrackingConfig(Section):
    """Servers that are told of a run, beside its run folder."""

    mlflow: bool = Field(
        False,
        description="Tell the MLflow server that MLFLOW_TRACKING_URI names: settings, figures and the model with its "
        "report. Needs the extra `mlflow`",
    )
    experiment: str = Field("rarelens", min_length=1, description="Name of the MLflow experiment")


class Told(Protocol):
    """Takes a training's lines."""

    def line(self, line: dict[str, Any]) -> None:
        """A line of the log, of a kind that has figures: `step`, `epoch`, `skipped`."""


@contextmanager
def tracking(config: TrainerConfig, run: RunFolder, name: str) -> Iterator[list[Told]]:
    """All that are told of a training's lines while it lasts.

    Args:
        config: The configuration.
        run: The run folder; events go to `tensorboard/NAME`.
        name: Of the training.

    Raises:
        UserError: See `check_tracking`; or the MLflow server does not answer.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.path(f"tensorboard/{name}"))) as events:
        told: list[Told] = [_TensorBoard(events)]
        if not config.tracking.mlflow:
            yield told
            return
        server = _Mlflow(config, run, name)
        try:
            yield [*told, server]
        finally:
            server.settle()


def check_tracking(config: TrackingConfig) -> None:
    """Refuse what would fail later.

    Raises:
        UserError: MLflow is asked for and not installed, or no server is named.
    """
    if not config.mlflow:
        return
    _client()
    if not os.environ.get(URI_VARIABLE):
        raise UserError(
            f"tracking.mlflow = True and {URI_VARIABLE} is not set; set it to the server's address, e.g. "
            "http://127.0.0.1:5000 or sqlite:///mlflow.db, or leave tracking.mlflow out"
        )


def send_model(config: TrainerConfig, run: RunFolder) -> None:
    """Give the MLflow server the model folder with its report, and test's figures, once; then the MLflow run is over.

    Raises:
        UserError: The server does not take them. The run folder has them all the same.
    """
    if not config.tracking.mlflow:
        return
    noted = _run_id(config, run)
    if noted.get("finished"):
        return
    metrics = run.need_json("model/metrics.json", "rarelens evaluate")
    row = next(row for row in metrics["rows"] if row["name"] == metrics["model"])
    with _server_errors():
        client = _client()
        for figure in TEST_FIGURES:
            client.log_metric(noted["run_id"], f"test/{figure}", row[figure])
        client.log_artifacts(noted["run_id"], str(run.fetch("model")), "model")
        client.set_terminated(noted["run_id"])
    run.write_json(RUN_FILE, {**noted, "finished": True})


def scalars(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The figures of a line, those of a mapping as `name/key`."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key not in ("step", "epoch"):
            found[f"{prefix}{key}"] = float(value)
    return found


class _TensorBoard:
    def __init__(self, events: Any):
        self._events = events

    def line(self, line: dict[str, Any]) -> None:
        for key, value in scalars(line).items():
            self._events.add_scalar(f"{line['kind']}/{key}", value, line["step"])


class _Mlflow:
    """Lines go to the server on a thread of their own: whoever logs does not wait for the network."""

    def __init__(self, config: TrainerConfig, run: RunFolder, name: str):
        check_tracking(config.tracking)
        self._name, self._client = name, _client()
        self._run_id = _run_id(config, run)["run_id"]
        self._waiting: queue.SimpleQueue[list[Metric] | None] = queue.SimpleQueue()
        self._lost = 0
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def line(self, line: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._waiting.put(
            [
                Metric(_metric_name(f"{self._name}/{line['kind']}/{key}"), value, now_ms, line["step"])
                for key, value in scalars(line).items()
            ]
        )

    def settle(self) -> None:
        """Wait for what is under way, but not for ever, and tell what was lost."""
        self._waiting.put(None)
        self._thread.join(SETTLE_S)
        if self._lost or self._thread.is_alive():
            said = f"{self._name}: the MLflow server did not take all figures; {LOG_FILE} in the run folder has them"
            console.print(said, highlight=False, markup=False, soft_wrap=True)

    def _send(self) -> None:
        """Send what is waiting together: after an outage everything goes in a few requests."""
        ended = False
        while not ended:
            lines = [self._waiting.get()]
            while not self._waiting.empty() and sum(map(len, filter(None, lines))) < METRICS_AT_ONCE:
                lines.append(self._waiting.get())
            ended = lines[-1] is None
            metrics = [metric for line in lines if line is not None for metric in line]
            for i in range(0, len(metrics), METRICS_AT_ONCE):
                try:
                    self._client.log_batch(self._run_id, metrics=metrics[i : i + METRICS_AT_ONCE])
                except Exception:  # of the network, the server or its database; told once, in the end
                    self._lost += 1


def _run_id(config: TrainerConfig, run: RunFolder) -> dict[str, Any]:
    """`run_id` of the MLflow run of a run folder, which is begun, with the settings, where there is none."""
    noted = run.read_json(RUN_FILE)
    if noted is not None:
        return noted
    with _server_errors():
        from mlflow.entities import Param

        client, experiment = _client(), config.tracking.experiment
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found is not None else client.create_experiment(experiment)
        made = client.create_run(experiment_id, run_name=run.uri.rpartition("/")[2], tags={"rarelens.run": run.uri})
        values = flatten(config.model_dump(mode="json"))
        parameters = [Param(_metric_name(key), str(value)[:LONGEST_PARAMETER]) for key, value in values.items()]
        for i in range(0, len(parameters), PARAMETERS_AT_ONCE):
            client.log_batch(made.info.run_id, params=parameters[i : i + PARAMETERS_AT_ONCE])
    noted = {"run_id": made.info.run_id, "experiment": experiment}
    run.write_json(RUN_FILE, noted)
    return noted


def _client() -> MlflowClient:
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError:
        raise UserError(
            "tracking.mlflow = True and MLflow is not installed; install it with `pip install 'rarelens[mlflow]'`"
        ) from None
    return MlflowClient()


@contextmanager
def _server_errors() -> Iterator[None]:
    """What the server or the way to it lacks, without the exception's text: that may hold the address's password."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise UserError(
            f"the MLflow server that {URI_VARIABLE} names cannot be told of the run ({type(error).__name__}); check "
            "the address and that it runs, or set tracking.mlflow=false"
        ) from None


def _metric_name(name: str) -> str:
    """MLflow's names hold letters, digits, and a few signs; classes may be called anything."""
    return re.sub(r"[^\w\-. :/]", "_", name)
