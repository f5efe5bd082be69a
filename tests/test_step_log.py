"""What a logged step says, figure by figure, over two real ranks, with a clock and a loader that are set."""

from types import SimpleNamespace

import pytest
import torch

import trainer.step_log
from cluster.worker import Worker
from tests.gloo import run_gloo
from trainer.config import StageOneConfig
from trainer.objective import Evaluation
from trainer.pool import Pool
from trainer.step_log import StepLog, ToldLines
from trainer.tracking import scalars

CLASSES = ("nv", "mel", "vasc", "df")
CONFIG = StageOneConfig(batch_size=8, views=1, log_every_steps=2)


def evaluation_of(masked):
    """Four anchors of all ranks, two rows of a memory behind them, and this rank's anchors without a term."""
    gathered = Pool(torch.zeros(4, 2), torch.tensor([0, 0, 1, 2]), 0)
    pool = Pool(torch.zeros(6, 2), torch.tensor([0, 0, 1, 2, 0, 2]), 0)
    terms = {"cross_entropy": 1.5, "metric_loss": 2.0}
    return Evaluation(torch.zeros(()), 2.1, terms, 0.3, gathered, pool, torch.tensor(masked, dtype=torch.int64),
                      torch.zeros(2))  # fmt: skip


def told(rank, world):
    """Two lines of two steps each, a validation between the steps of the first."""
    worker, loader, clock = Worker(rank, world, "cpu"), SimpleNamespace(wait_s=7.0), SimpleNamespace(now=100.0)
    lines = []
    worker.tell = lines.append  # type: ignore[method-assign]
    trainer.step_log.time = SimpleNamespace(perf_counter=lambda: clock.now)  # type: ignore[assignment]
    trainer.step_log._peak_memory_mib = lambda: 10.0 + rank
    log = StepLog(worker, ToldLines(worker), loader, CONFIG, CLASSES)

    def step(number, masked, seconds, waited_s):
        clock.now += seconds
        loader.wait_s += waited_s
        engine = SimpleNamespace(grad_norm=0.25, loss_scale=None)
        log.step(number, 5, 1e-3, evaluation_of(masked), engine)

    log.resume()
    step(1, [[2], [2, 3]][rank], 1.0, [0.5, 1.5][rank])
    log.pause()
    clock.now += 1000  # a validation, and its own waiting
    loader.wait_s += 900
    log.resume()
    step(2, [[], [2]][rank], 3.0, [0.5, 1.5][rank])
    step(3, [], 2.0, 0.0)
    step(4, [[1], []][rank], 2.0, 0.0)
    return lines


@pytest.fixture(scope="module")
def ranks():
    return run_gloo(told, 2)


def test_a_line_has_every_figure_of_its_steps(ranks):
    first = ranks[0][0]
    assert first == {
        "kind": "step",
        "step": 2,
        "epoch": 5,
        "loss": 2.1,
        "cross_entropy": 1.5,
        "metric_loss": 2.0,
        "lr": 1e-3,
        "grad_norm": 0.25,
        "images_per_s": 4.0,  # two steps of 8 images in 1 + 3 s, the validation left out
        "step_s": 2.0,
        "wait_share": 0.5,  # 1 s and 3 s of 4 s, the mean of the ranks
        "peak_memory_mib": 11.0,  # the larger of the ranks
        "metric_weight": 0.3,
        "pool_rows": 6,
        "positives_per_anchor": 1.25,  # 2, 2, 0 and 1
        "anchors_without_term": 4,
        "anchors_without_term_share": 0.5,  # of twice four anchors
        "anchors_without_term_by_class": {"vasc": 3, "df": 1},
    }


def test_the_next_line_counts_anew_and_rank_0_alone_tells(ranks):
    (_, second), others = ranks
    assert others == []
    assert (second["step"], second["images_per_s"], second["wait_share"]) == (4, 4.0, 0.0)
    assert second["anchors_without_term_by_class"] == {"mel": 1} and second["anchors_without_term_share"] == 1 / 8


def test_tensorboard_is_given_each_figure_of_a_line(ranks):
    line = ranks[0][0]
    shown = scalars(line)
    figures = {key: value for key, value in line.items() if not isinstance(value, (str, dict))}
    by_class = {f"anchors_without_term_by_class/{name}": n for name, n in {"vasc": 3.0, "df": 1.0}.items()}
    assert shown == {key: float(value) for key, value in figures.items() if key not in ("step", "epoch")} | by_class
