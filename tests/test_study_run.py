"""A study for real: cells are trained, and one that is killed goes on where it was."""

import json
import subprocess
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.run import RunFolder
from data_pipeline.synthetic import draw_synthetic
from tests.drivers import kill_driver, start_driver
from tests.tiny import tiny_config
from trainer.features import read_features
from trainer.heads import load_heads
from tuning.study import packed_dataset, run_study
from tuning.study_layout import RESULTS_FILE, ROWS_FILE, SEEDS_FILE

TRAININGS = ["cross_entropy", "supervised_contrastive"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    draw_synthetic(folder, seed=2, scale=0.06)
    return folder


def tiny_study(images, run, **study):
    return tiny_config(
        images,
        run,
        stage_one={"views": 1},
        stage_two={"folds": 1, "heads_per_trial": 24},
        cluster={"workers": 1},
        study={"only": TRAININGS, "seeds": [0, 1], **study},
    )


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.long
def test_a_cell_leaves_what_each_of_its_heads_says_about_test(images, ray_session, tmp_path):
    config = tiny_study(images, tmp_path / "run", only=["cross_entropy"], seeds=[3])
    run = RunFolder(config.run)
    table = run_study(config, packed_dataset(config, run), run)
    cell = tmp_path / "run/cells/cross_entropy-seed3"
    record, heads = json.loads((cell / ROWS_FILE).read_text()), load_heads(cell / "stage_two/heads.safetensors")
    test = read_features(cell / "features/stage_one_test", "test")
    x, names = np.asarray(test.x, dtype=np.float32), packed_dataset(config, run).classes
    assert set(heads) == set(record["rows"]) == {"own", "crt", "logit_adjustment", "tau_norm"}
    for name, head in heads.items():
        said = pq.read_table(cell / f"predictions/{name}.parquet").to_pydict()
        logits = x.astype(np.float64) @ head.weight.numpy().T + head.bias.numpy()
        expected = softmax(logits / record["rows"][name]["temperature"])
        np.testing.assert_allclose(np.stack([said[f"p_{c}"] for c in names], axis=1), expected, atol=1e-4)
        assert said["image"] == test.keys.tolist() and said["label"] == [names[i] for i in test.labels]
    searched = {row["family"]: row for row in pq.read_table(cell / "stage_two/results.parquet").to_pylist()}
    assert record["rows"]["own"]["val"] == searched["own"]["score"]
    assert record["model"] == json.loads((cell / "stage_two/winner.json").read_text())["winner"]
    assert table.reads == {"cross_entropy-seed3": 1}

    # Nothing but the checkpoint that was chosen is kept, and nothing is done again.
    checkpoint = json.loads((cell / "stage_one/result.json").read_text())["checkpoint"]
    weights = [file.parent.relative_to(cell).as_posix() for file in cell.glob("stage_one/*/weights.safetensors")]
    assert weights == [checkpoint]
    before = {file: file.stat().st_mtime_ns for file in cell.rglob("*") if file.is_file() and file.name != "run.lock"}
    again = run_study(config, packed_dataset(config, run), run)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert again == table


def start(config_file):
    return start_driver("study", config_file, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_study_that_is_killed_in_a_cell_ends_as_one_that_was_not(images, tmp_path):
    files = {}
    for name in ("unbroken", "killed"):
        files[name] = tmp_path / f"{name}.yaml"
        values = tiny_study(images, tmp_path / name).model_dump(mode="json")
        files[name].write_text(yaml.safe_dump(values))
    unbroken = start(files["unbroken"])
    said = unbroken.communicate(timeout=1000)[0]
    assert unbroken.returncode == 0, said
    assert "Study: 4 of 4 cells done" in said and "table.md" in said

    # Killed once the second cell has trained an epoch.
    process, cells = start(files["killed"]), tmp_path / "killed/cells"
    deadline = time.monotonic() + 600
    while not list(cells.glob(f"{TRAININGS[1]}-seed0/stage_one/epoch-0000")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    kill_driver(process)
    assert (cells / f"{TRAININGS[0]}-seed0" / ROWS_FILE).exists()
    before = {file: file.stat().st_mtime_ns for file in (cells / f"{TRAININGS[0]}-seed0").rglob("*.parquet")}
    process = start(files["killed"])
    said = process.communicate(timeout=1000)[0]
    assert process.returncode == 0, said
    assert {file: file.stat().st_mtime_ns for file in before} == before and before
    for name in (RESULTS_FILE, SEEDS_FILE):
        assert pq.read_table(tmp_path / "killed" / name) == pq.read_table(tmp_path / "unbroken" / name)
