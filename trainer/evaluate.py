"""The one reading of test: figures of every row of the result table, the model folder, the predictions, the evidence.

Everything was chosen on val before. Each reading is counted in `test_reads.json`, and the report tells a second one.

Shapes: N test samples, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.checkpoint import sha256_of
from cluster.run import RunFolder
from data_pipeline.dataset import Dataset
from trainer import metrics
from trainer.closed_forms import fit_temperature
from trainer.config import TrainerConfig
from trainer.confusions import keep_confusion
from trainer.examples import TrainingExamples, choose_examples
from trainer.export import ModelDescription, save_model
from trainer.extraction import BASELINE, TEST, TRAIN_AND_VAL, extract_features, fetch_checkpoint
from trainer.features import Features, read_features
from trainer.finetune import CHOICE_FILE, NAME, FineTuning
from trainer.finetune import TEST as FINE_TUNED_TEST
from trainer.finetune import TRAIN as FINE_TUNED_TRAIN
from trainer.finetune import VAL as FINE_TUNED_VAL
from trainer.gather import keep_evidence
from trainer.heads import FAMILY_NAMES, Head, load_heads
from trainer.result_table import HeldOutSet, Judged, difference, result_rows
from trainer.retrieval import Retrieval, retrieval
from trainer.stage_checkpoint import WEIGHTS_FILE, load_classifier
from trainer.usage import USAGE_FILE, usage

MODEL_FOLDER = "model"
METRICS_FILE = f"{MODEL_FOLDER}/metrics.json"
PREDICTIONS_FILE = f"{MODEL_FOLDER}/predictions.parquet"
READS_FILE = "test_reads.json"
DESCRIPTIONS = {"baseline": "plain cross-entropy", **FAMILY_NAMES}
MODEL_NAMES = {"winner": "winner", NAME: "fine-tuned"}
"""Rows of the table that may be the model, and how differences from others call them."""


@dataclass(frozen=True)
class Candidate:
    """One row of the result table before its figures: a head, its temperature, the features that it works on.

    `trained` names the training whose network made these, with its configuration where that is not the run's.
    """

    name: str
    description: str
    head: Head
    temperature: float
    test: Features
    trained: str = "stage_one"
    config: TrainerConfig | None = None

    def probabilities(self, temperature: float) -> np.ndarray:
        """Of each class for each sample of test, float32 [N, C]."""
        logits = self.head.logits(_float32(self.test))
        return (logits.double() / temperature).softmax(dim=1).float().numpy()


def evaluate(config: TrainerConfig, dataset: Dataset, run: RunFolder) -> dict[str, Any]:
    """Read test once, and leave `model/` with weights, description, predictions and, written last, `metrics.json`.

    What the report tells beside these figures is left in `evidence/`, see `trainer.gather`.

    Args:
        config: The configuration.
        dataset: The packed dataset.
        run: The run folder, with stage one's checkpoint, its features and the heads of stage two.

    Returns:
        What `metrics.json` holds: `test` (samples, groups, reads), `rows` (the table), `model` (the row that is the
        model: `winner`, or `fine_tuned` where that was better on val), `fine_tuning` (why, in words; None where it was
        off), `confusion` of `own`, `winner` and the model (see `trainer.confusions`), `differences` of balanced
        accuracy with paired 95 % intervals, `temperature` of the model.
    """
    done = run.read_json(METRICS_FILE)
    if done is not None:
        return done
    candidates, reads = read_test(config, dataset, run)
    choice = run.read_json(CHOICE_FILE) if NAME in candidates else None
    model = candidates[NAME if choice and choice["chosen"] else "winner"]

    of_training = {candidate.trained: candidate for candidate in candidates.values()}
    found = {name: _retrieved(config, dataset, run, candidate) for name, candidate in of_training.items()}
    judged = {name: _judged(candidate, found[candidate.trained]) for name, candidate in candidates.items()}
    held_out = _held_out(config, dataset, model.test)
    result = {
        "test": {"samples": len(model.test), "groups": len(np.unique(model.test.groups)), "reads": reads},
        "model": model.name,
        "fine_tuning": choice and choice["says"],
        **_figures(judged, model.name, held_out),
        "temperature": model.temperature,
    }
    probabilities = judged[model.name].probabilities
    write_predictions(run.path(PREDICTIONS_FILE), model.test, dataset.classes, probabilities)
    _write_model(config, dataset, run, model)
    run.publish(MODEL_FOLDER)
    keep_evidence(dataset, run, model.test, held_out, own=judged["own"], model=judged[model.name])
    run.write_json(METRICS_FILE, result)
    return result


def read_test(config: TrainerConfig, dataset: Dataset, run: RunFolder) -> tuple[dict[str, Candidate], int]:
    """A reading of test, which is counted: the rows of the table by name, and the how many-eth reading it was."""
    chosen = run.need_json("stage_two/winner.json", "rarelens stage-two")
    heads = load_heads(run.fetch("stage_two") / "heads.safetensors")
    reads = (run.read_json(READS_FILE) or 0) + 1
    run.write_json(READS_FILE, reads)
    return {c.name: c for c in _candidates(config, dataset, run, heads, chosen)}, reads


def _held_out(config: TrainerConfig, dataset: Dataset, test: Features) -> HeldOutSet:
    wanted = config.evaluation
    tiers = metrics.class_tiers(dataset.class_counts("train"), wanted.many_above, wanted.few_below)
    return HeldOutSet(test.labels, test.groups, tiers, wanted.bootstrap_samples, config.seed)


def _figures(judged: dict[str, Judged], model: str, test: HeldOutSet) -> dict[str, Any]:
    """Rows, confusions and differences on test."""
    return {
        "rows": result_rows(list(judged.values()), test),
        "confusion": {
            name: keep_confusion(metrics.confusion(test.labels, judged[name].predictions, len(test.tiers)))
            for name in dict.fromkeys(("own", "winner", model))
        },
        "differences": {
            title: difference(judged[ours], judged[other], test) for title, ours, other in _pairs(model, judged)
        },
    }


def _candidates(
    config: TrainerConfig, dataset: Dataset, run: RunFolder, heads: dict[str, Head], chosen: dict[str, Any]
) -> list[Candidate]:
    """The rows of the table, in order: the baseline, stage one's own classifier, a head of each family, the winner."""
    candidates = []
    wanted = (TRAIN_AND_VAL, TEST, BASELINE) if config.evaluation.baseline else (TRAIN_AND_VAL, TEST)
    _, tested_on, *baseline = extract_features(config, dataset, run, *wanted)
    if baseline:
        val, test = read_features(baseline[0], "val"), read_features(baseline[0], "test")
        trained = run.need_json("baseline/result.json", "rarelens stage-one")
        head = own_head(fetch_checkpoint(run, trained["checkpoint"]), config, dataset)
        temperature = fit_temperature(head.logits(_float32(val)), torch.from_numpy(val.labels))
        candidates.append(Candidate("baseline", DESCRIPTIONS["baseline"], head, temperature, test, "baseline"))
    test, temperatures, winner = read_features(tested_on, "test"), chosen["temperatures"], chosen["winner"]
    # The table's order is the order of DESCRIPTIONS, whatever the order in the file.
    for name in sorted(heads, key=list(DESCRIPTIONS).index):
        candidates.append(Candidate(name, DESCRIPTIONS[name], heads[name], temperatures[name], test))
    described = f"winner: {DESCRIPTIONS[winner]}"
    candidates.append(Candidate("winner", described, heads[winner], temperatures[winner], test))
    if config.fine_tune.epochs:
        candidates.append(_fine_tuned(config, dataset, run, chosen))
    return candidates


def _fine_tuned(config: TrainerConfig, dataset: Dataset, run: RunFolder, chosen: dict[str, Any]) -> Candidate:
    choice = run.need_json(CHOICE_FILE, "rarelens train")
    tuning = FineTuning.of(config, run, chosen)
    (folder,) = extract_features(tuning.config, dataset, run, FINE_TUNED_TEST)
    _, head = tuning.outcome(dataset, run)
    described = f"fine-tuned, {DESCRIPTIONS[chosen['winner']]}"
    test = read_features(folder, "test")
    return Candidate(NAME, described, head, choice["temperature"], test, NAME, tuning.config)


def _pairs(model: str, candidates: Container[str]) -> list[tuple[str, str, str]]:
    """Title, model and other one of each difference that is told."""
    pairs = [(f"{MODEL_NAMES[model]} - {DESCRIPTIONS[other]}", model, other) for other in ("baseline", "own")]
    pairs.append((f"{MODEL_NAMES[NAME]} - winner", NAME, "winner"))
    return [pair for pair in pairs if pair[1] in candidates and pair[2] in candidates]


def own_head(checkpoint: Path, config: TrainerConfig, dataset: Dataset) -> Head:
    """The classifier that a training learnt by itself, as a head on its raw features."""
    return load_classifier(checkpoint, config, len(dataset.classes)).own_head()


def _retrieved(config: TrainerConfig, dataset: Dataset, run: RunFolder, candidate: Candidate) -> Retrieval:
    """Among the embeddings that stage one's metric loss compared; where none did, among the features, by cosine."""
    loss, x, labels = config.stage_one.loss, _float32(candidate.test), candidate.test.labels
    if candidate.trained != "stage_one" or loss.name == "none" or loss.compare != "embedding":
        return retrieval(x.numpy(), labels)
    trained = run.need_json("stage_one/result.json", "rarelens stage-one")
    network = load_classifier(fetch_checkpoint(run, trained["checkpoint"]), config, len(dataset.classes)).eval()
    with torch.inference_mode():
        embeddings = network.embed(x)
    return retrieval(embeddings.numpy(), labels, loss.normalise)


def _judged(candidate: Candidate, found: Retrieval) -> Judged:
    return Judged(
        candidate.name,
        candidate.description,
        probabilities=candidate.probabilities(candidate.temperature),
        uncalibrated=candidate.probabilities(1.0),
        found=found,
    )


def write_predictions(path: Path, test: Features, classes: tuple[str, ...], probabilities: np.ndarray) -> None:
    """`image, label, group, predicted, p_CLASS ...`, so that anyone can score the model again, intervals included."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"image": test.keys, "label": [classes[i] for i in test.labels]}
    columns["group"] = test.groups
    columns["predicted"] = [classes[i] for i in probabilities.argmax(1)]
    columns |= {f"p_{name}": probabilities[:, i] for i, name in enumerate(classes)}
    pq.write_table(pa.table(columns), path)


def _write_model(config: TrainerConfig, dataset: Dataset, run: RunFolder, model: Candidate) -> None:
    trained = run.need_json(f"{model.trained}/result.json", "rarelens stage-one")
    checkpoint = fetch_checkpoint(run, trained["checkpoint"])
    network = load_classifier(checkpoint, model.config or config, len(dataset.classes))
    description = ModelDescription(
        model=config.model,
        classes=dataset.classes,
        image_px=config.data.image_px,
        resize_ratio=config.data.resize_ratio,
        mean=dataset.mean,
        std=dataset.std,
        temperature=model.temperature,
        provenance={
            "run": Path(run.uri).name,
            "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
            "checkpoint_sha256": sha256_of(checkpoint / WEIGHTS_FILE),
            "config": config.model_dump(mode="json"),
        },
    )
    save_model(run.path(MODEL_FOLDER), network, model.head, description, _examples(config, dataset, run, model))
    run.path(f"{MODEL_FOLDER}/{USAGE_FILE}").write_text(usage(f"{run.uri}/{MODEL_FOLDER}"))


def _examples(config: TrainerConfig, dataset: Dataset, run: RunFolder, model: Candidate) -> TrainingExamples | None:
    """Training images as the model's own network sees them; a fine-tuned one has not seen them yet."""
    most_bytes = int(config.evaluation.examples_mib * 2**20)
    if not most_bytes:
        return None
    if model.trained == NAME:
        settings = model.config or config
        one_view = settings.model_copy(update={"features": settings.features.model_copy(update={"views": 1})})
        train, val = extract_features(one_view, dataset, run, FINE_TUNED_TRAIN, FINE_TUNED_VAL)
    else:
        train = val = extract_features(config, dataset, run, TRAIN_AND_VAL)[0]
    return choose_examples(read_features(train, "train"), read_features(val, "val"), most_bytes, config.seed)


def _float32(features: Features) -> Tensor:
    return torch.from_numpy(np.asarray(features.x, dtype=np.float32))
