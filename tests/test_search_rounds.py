"""The rounds of stage two's search without Ray: what is lost in the later ones, and what is said of the choice."""

import shutil
import tempfile
from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch

import tuning.rounds
from cluster.config import parse_config
from cluster.errors import UserError
from tests.test_search import DIM, NUM_CLASSES, write_clusters
from trainer.heads import Head, HeadSpec
from trainer.stage_two import TrainingSet
from tuning.block import BlockTrial, Data, Job, make_block
from tuning.config import StageTwoConfig
from tuning.results import SearchResult, head_row, read_results, said_of_choice, write_results
from tuning.stage_two import search_heads


class InThisProcess:
    """Runs the blocks of a round as Tune would, without its processes: a trial that raises twice is given up."""

    def __init__(self, job, pending, gpus_per_trial, trial, watcher):
        self.job, self.pending, self.trial, self.watcher = job, pending, trial, watcher

    def fit(self):
        for block in self.pending:
            trial = self.trial.__new__(self.trial)
            trial.config, trial.job, trial.data = {"block": block}, self.job, Data(self.job)
            try:
                for last in (False, True):
                    try:
                        trial.step()
                        break
                    except RuntimeError:
                        if last:
                            raise
            except RuntimeError as error:
                with tempfile.NamedTemporaryFile("w") as file:
                    file.write(str(error))
                    file.flush()
                    given_up = SimpleNamespace(config=trial.config, error_file=file.name)
                    self.watcher.on_trial_error(0, [], given_up)


def test_later_rounds_may_lose_all_but_the_winner(tmp_path, monkeypatch):
    """tau-norm with tau = 0 is stage one's classifier, here none, which loses; its death takes cRT's along at first."""
    features = write_clusters(tmp_path / "features")
    monkeypatch.setattr(tuning.rounds, "_tuner", InThisProcess)
    wanted = {"heads": 8, "families": ["crt", "tau_norm"], "space": {"tau": [0, 0]}, "folds": 1, "seeds": 2}
    config, dies = parse_config(StageTwoConfig, wanted, "test"), tmp_path / "dies"

    class Dies(BlockTrial):
        def step(self):
            specs = self.job.blocks[self.config["block"]]
            if any(spec.seed > 0 for spec in specs):
                raise RuntimeError("no other seeds")
            if self.job.keep and any(spec.family == dies.read_text() for spec in specs):
                raise RuntimeError(f"no such luck, {len(specs)}")
            return super().step()

    own = Head(torch.zeros(NUM_CLASSES, DIM), torch.zeros(NUM_CLASSES))
    dies.write_text("tau_norm")
    result = search_heads(features, own, NUM_CLASSES, config, 0, str(tmp_path), trial=Dies)
    assert result.winner == "crt" and set(result.heads) == {"own", "crt"}
    assert result.best_row("tau_norm")["error"] == "no such luck, 1"
    best = result.best_row("crt")
    assert best["seeds"] == 1 and best["lower_bound"] < best["score"] and best["temperature"] > 0
    write_results(tmp_path / "out", result)
    assert set(read_results(tmp_path / "out").heads) == {"own", "crt"}

    dies.write_text("crt")
    for folder in tmp_path.glob("chosen-*"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"the chosen crt head could not be made once more: no such luck, 1"):
        search_heads(features, own, NUM_CLASSES, config, 0, str(tmp_path), trial=Dies)


@pytest.mark.parametrize("folds", [1, 5])
def test_the_sets_of_a_process_share_its_memory(tmp_path, monkeypatch, folds):
    """A budget whose half one of them fills holds none of folds + 1 sets; heads come out the same."""
    features, begin = write_clusters(tmp_path / "features"), TrainingSet.__init__
    own = Head(torch.zeros(NUM_CLASSES, DIM), torch.zeros(NUM_CLASSES))
    blocks = [[HeadSpec("crt", power=0.5, epochs=3, lr=lr) for lr in (1.0, 3.0)]]

    def held(memory_bytes):
        monkeypatch.setattr(TrainingSet, "__init__", partialmethod(begin, memory_bytes=memory_bytes))
        place = str(tmp_path / str(memory_bytes))
        job = Job(str(features), blocks, own, NUM_CLASSES, "balanced_accuracy", folds, place, keep=True, environment={})
        data = Data(job)
        sets = [*(seen for seen, _ in data.folds), data.all]
        scores = [row["score"] for row in make_block(job, 0, data)]
        return sum(4 * seen.x.size for seen in sets if seen._held is not None), sets, scores

    whole, sets, scores = held(2**31)
    assert whole == sum(4 * seen.x.size for seen in sets)
    largest = max(4 * seen.x.size for seen in sets)
    assert held(2 * largest)[0] == 0 and held(2 * largest)[2] == scores
    assert held(2 * largest * (folds + 1))[0] == whole <= largest * (folds + 1)


class TestWhatIsSaidOfTheChoice:
    def result(self, winner, luck=0.0213, **bound):
        rows = [head_row(0, HeadSpec("own"), None), head_row(1, HeadSpec("crt"), 0), head_row(2, HeadSpec("crt"), 0)]
        for row, score in zip(rows, (0.7, 0.765, 0.6), strict=True):
            row.update(status="done", score=score, balanced_accuracy=score, macro_f1=score, worst_recall=score)
        rows[1].update(bound)
        return SearchResult(rows, {}, winner, "macro_f1", luck=luck)

    def test_the_winner_its_lower_bound_and_the_luck_in_its_lead(self):
        said = said_of_choice(self.result("crt", seeds=3, seeds_score=0.7512, lower_bound=0.7204))
        assert said == (
            "cRT is the winner: macro f1 on val 0.765, 0.751 over 3 seeds, at least 0.720 (one-sided 95 %). It leads "
            "stage one's own classifier by 6.5 points; if all 2 heads were equally good, the best of them would lead "
            "by 2.1 points by luck alone."
        )

    def test_without_finalists_there_is_no_bound(self):
        said = said_of_choice(self.result("crt"))
        assert "on val 0.765. It leads" in said and "at least" not in said

    def test_stage_one_s_own_classifier_leads_nobody(self):
        said = said_of_choice(self.result("own"))
        assert said.startswith("stage one, its own classifier is the winner: macro f1 on val 0.700; if all 2 heads")
