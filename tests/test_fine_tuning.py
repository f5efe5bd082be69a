"""Fine-tuning as a step of a run: what it has to beat, and a tiny run from images to the report with real workers."""

import json
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import rarelens
import trainer.extraction
import trainer.stage_one
from cluster.errors import UserError
from cluster.run import RunFolder
from data_pipeline.passes import evaluation_batches
from data_pipeline.synthetic import draw_synthetic
from tests.tiny import tiny_config
from trainer.bootstrap import bootstrap, decision_measure
from trainer.evaluate import evaluate
from trainer.export import load_model
from trainer.features import read_features
from trainer.finetune import FineTuning
from trainer.heads import HeadSpec
from trainer.record import report_inputs, report_run
from trainer.summary import print_summary
from tuning.choice import ONE_SIDED_95, RESAMPLES, Judge, paired_lower_bound
from tuning.fine_tuning import fine_tune, spec_of


def drawn(seed, errs):
    """Labels, groups and what two models say that err on the same hard images, one of them on more."""
    rng = np.random.default_rng(seed)
    labels, groups = np.repeat(np.arange(4), 50), np.arange(200) // 2
    hard = rng.random(200)
    ours, theirs = (np.where(hard < share, (labels + 1) % 4, labels) for share in errs)
    return labels, groups, ours, theirs


def test_the_bound_is_that_of_the_paired_difference():
    labels, groups, ours, theirs = drawn(0, (0.2, 0.3))
    judge = Judge(labels, groups, 4, "balanced_accuracy")
    difference, bound = paired_lower_bound(judge, ours, theirs)
    recall = [np.mean([np.mean(says[labels == c] == c) for c in range(4)]) for says in (ours, theirs)]
    assert difference == pytest.approx(recall[0] - recall[1])
    measures = {
        name: decision_measure("balanced_accuracy", labels, says, 4) for name, says in (("o", ours), ("t", theirs))
    }
    values = bootstrap(measures, groups, RESAMPLES, 0)
    assert bound == pytest.approx(difference - ONE_SIDED_95 * np.std(values["o"] - values["t"]))
    # What is hard for both cancels out: unpaired, the same difference would be lost in the noise.
    unpaired = ONE_SIDED_95 * np.sqrt(values["o"].var() + values["t"].var())
    assert bound > 0 and difference - unpaired < bound / 2


def test_equal_models_and_worse_ones_do_not_pass():
    labels, groups, ours, theirs = drawn(1, (0.3, 0.2))
    judge = Judge(labels, groups, 4, "macro_f1")
    assert paired_lower_bound(judge, ours, theirs)[1] < paired_lower_bound(judge, ours, ours)[1] == 0


def test_the_winner_is_made_anew_with_all_of_its_knobs():
    common = {"score": 0.5, "temperature": 1.2, "folds": 5, "lr": 2.0, "weight_decay": 1e-3, "epochs": 7}
    common |= {"batch_size": 64, "seed": 3}
    for knobs in ({"winner": "crt", "power": 0.3}, {"winner": "logit_adjusted", "tau": 1.4}):
        spec = spec_of({**common, **knobs})
        assert spec == HeadSpec(
            knobs["winner"], power=knobs.get("power", 1.0), tau=knobs.get("tau", 1.0), lr=2.0, weight_decay=1e-3,
            epochs=7, batch_size=64, seed=3,
        )  # fmt: skip
    assert spec_of({"winner": "nearest_class_mean", "normalise": True, "score": 1}) == HeadSpec(
        "nearest_class_mean", normalise=True
    )
    twice = spec_of({**common, "winner": "balanced_softmax", "power": 0.5})
    assert twice.double_correction and twice.sampling_power == 0.5


def test_it_is_off_by_default_and_then_does_nothing(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "run")
    assert fine_tune(config, None, RunFolder(config.run)) is None  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_blocks_that_are_not_there_are_refused_before_anything_is_trained(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "run", fine_tune={"epochs": 1, "blocks": 6})
    with pytest.raises(UserError, match=r"fine_tune\.blocks = 6 is more than the 5 blocks of model\.backbone"):
        rarelens._check(rarelens.Job(config, RunFolder(config.run)))


@pytest.mark.long
class TestRun:
    @pytest.fixture(scope="class")
    @staticmethod
    def job(ray_session, tmp_path_factory):
        """A run up to stage two, with views, folds and a fine-tuning that is killed once."""
        folder = tmp_path_factory.mktemp("fine-tuned")
        draw_synthetic(folder / "images", seed=1, scale=0.06)
        config = tiny_config(
            folder / "images",
            folder / "run",
            source={"group_column": None},  # each image its own group, so that two folds hold every class
            data={"split": {"train": 0.4, "val": 0.4, "test": 0.2}},
            features={"batch_size": 32, "views": 2},
            stage_two={"heads": 12, "heads_per_trial": 12, "seeds": 1, "folds": 2, "families": ["crt", "lws"]},
            fine_tune={"epochs": 2, "lr": 1e-4, "batch_norm": "reestimated"},
        )
        run = RunFolder(config.run)
        run.pin_config(config.model_dump(mode="json"))
        job = rarelens.Job(config, run)
        for name in ("pack", "stage one", "features", "stage two"):
            rarelens.STEPS[name](job)
        return job

    @pytest.fixture(scope="class")
    @staticmethod
    def choice(job):
        """The fine-tuning, with a worker killed in its second epoch."""
        killed, run_workers = [], trainer.stage_one.run_workers

        def with_a_kill(*args, on_message, **kwargs):
            def watch(message):
                if message["kind"] == "step" and message["epoch"] == 1 and not killed:
                    # Of this process's own Ray: others on the machine are nobody's business.
                    workers = psutil.Process().children(recursive=True)
                    victim = next(p for p in workers if "RayTrainWorker" in " ".join(p.cmdline()))
                    killed.append(victim.pid)
                    victim.kill()
                on_message(message)

            return run_workers(*args, on_message=watch, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.stage_one, "run_workers", with_a_kill)
            made = fine_tune(job.config, job.dataset, job.run)
        assert killed
        return made

    @pytest.fixture(scope="class")
    @staticmethod
    def metrics(job, choice):
        return evaluate(job.config, job.dataset, job.run)

    def test_after_the_kill_it_went_on_with_the_same_losses(self, job, choice):
        lines = [json.loads(text) for text in (job.run.work / "log.jsonl").read_text().splitlines()]
        losses: dict[int, list[float]] = {}
        for line in lines:
            if (line["stage"], line["kind"]) == ("fine_tuned", "step"):
                losses.setdefault(line["step"], []).append(line["loss"])
        assert set(losses) == set(range(1, 13))
        assert max(len(told) for told in losses.values()) == 2  # what came after the last checkpoint, once more
        assert all(len(set(told)) == 1 for told in losses.values())

    def test_the_choice_is_by_the_lower_bound_on_val(self, job, choice):
        winner = job.run.read_json("stage_two/winner.json")
        assert choice["winner"] == winner["winner"] and winner["folds"] == 2
        # what it has to beat is the winner as the search scored it, each fold by a head that did not see it
        assert choice["winner_score"] == pytest.approx(winner["score"], abs=0.03)
        assert choice["difference"] == pytest.approx(choice["score"] - choice["winner_score"])
        assert choice["chosen"] == (choice["lower_bound"] > 0)
        trained = job.run.read_json("fine_tuned/result.json")
        assert choice["score"] == pytest.approx(trained["metrics"]["balanced_accuracy"], abs=0.02)
        verdict = "so it is the model" if choice["chosen"] else "so the search's winner stays the model"
        assert verdict in choice["says"] and "Fine-tuning the last block from" in choice["says"]

    def test_it_is_done_once(self, job, choice, monkeypatch):
        monkeypatch.setattr(trainer.stage_one, "run_workers", None)  # would raise if it were called
        monkeypatch.setattr(trainer.extraction, "run_workers", None)
        assert fine_tune(job.config, None, job.run) == choice
        (job.run.work / "fine_tuned" / "choice.json").unlink()
        assert fine_tune(job.config, job.dataset, job.run) == choice  # the steps below it were done once as well

    def test_it_is_a_row_of_the_table(self, job, choice, metrics, capsys):
        rows = {row["name"]: row for row in metrics["rows"]}
        assert list(rows)[-2:] == ["winner", "fine_tuned"]
        assert rows["fine_tuned"]["description"].startswith("fine-tuned, ")
        assert metrics["model"] == ("fine_tuned" if choice["chosen"] else "winner")
        assert "fine-tuned - winner" in metrics["differences"]
        print_summary(job.run)
        told = capsys.readouterr().out
        assert "fine-tuned, " in told and choice["says"] in told

    def test_the_report_tells_why(self, job, choice, metrics):
        page = report_run(job.config, job.run).read_text()
        assert "Fine-tuning the last block from" in page and "fine-tuned, " in page
        assert report_inputs(job.config, job.run).winner == metrics["model"]

    def test_if_it_is_better_it_becomes_the_model(self, job, metrics):
        """The same run with the choice turned the other way."""
        run = job.run
        choice = run.read_json("fine_tuned/choice.json")
        run.write_json("fine_tuned/choice.json", {**choice, "chosen": True})
        (run.work / "model" / "metrics.json").unlink()
        turned = evaluate(job.config, job.dataset, run)
        assert turned["model"] == "fine_tuned" and turned["test"]["reads"] == 2
        assert turned["temperature"] == choice["temperature"]
        assert any(title.startswith("fine-tuned - stage one") for title in turned["differences"])
        model = load_model(run.work / "model")
        (batch,) = evaluation_batches(job.dataset, job.config.data, "test", batch_size=1000)
        said = model.predict_proba(batch.images).numpy()
        row = next(row for row in turned["rows"] if row["name"] == "fine_tuned")
        labels = job.dataset.index("test").label
        recall = [np.mean(said.argmax(1)[labels == c] == c) for c in np.unique(labels)]
        assert np.mean(recall) == pytest.approx(row["balanced_accuracy"], abs=0.02)
        tuning = FineTuning.of(job.config, run, run.read_json("stage_two/winner.json"))
        network, head = tuning.outcome(job.dataset, run)
        expected = (network(batch.images).logits / choice["temperature"]).softmax(1)
        assert np.allclose(said, expected.detach().numpy(), atol=1e-4)
        features = read_features(Path(run.work) / "features/fine_tuned_test", "test")
        logits = head.logits(torch.from_numpy(np.array(features.x)))
        assert np.allclose((logits / choice["temperature"]).softmax(1).numpy(), said, atol=0.02)
