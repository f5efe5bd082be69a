"""Ray Train's list of checkpoints: torn, missing, with folders that are gone; and which checkpoints stay.

Ray's own classes write and read the list here, without a session.
"""

import asyncio
import math
import random
import shutil

import pytest
from ray.air.config import CheckpointConfig
from ray.train import Checkpoint
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from cluster.checkpoint import CheckpointError, files_by_folder, stored_manifest, write_manifest
from cluster.registry import LIST_FILE, _parse, mend_registry
from cluster.retention import Reported, best_first, keep_by_our_rule, to_delete
from cluster.storage import open_storage


def save(folder, step, **metrics):
    """A whole checkpoint of two ranks, as the workers upload it."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(2):
        share = folder.parent / f".share-{rank}"
        share.mkdir()
        (share / f"weights-{rank}.bin").write_bytes(random.Random(step + rank).randbytes(50))
        write_manifest(share, rank, 2, {"step": step, "save": str(step)}, {"step": step, **metrics})
        for file in share.iterdir():
            file.rename(folder / file.name)
        share.rmdir()


def manager(run):
    """Ray's own, with what it reads of the list."""
    return CheckpointManager(CheckpointConfig(), StorageContext(str(run), "stage_one"))


def register(run, *checkpoints):
    """Have Ray's own classes register (name, metrics) of folders that are there."""

    async def registering():
        books = manager(run)
        for name, metrics in checkpoints:
            checkpoint = Checkpoint.from_directory(str(run / "stage_one" / name))
            books.register_checkpoint(_TrainingReport(checkpoint=checkpoint, metrics=metrics, validation=False))
        await asyncio.sleep(0)

    asyncio.run(registering())


def loaded(run):
    """What Ray's own loading code takes from the list: names in order with metrics, and the newest's name."""
    books = manager(run)
    results = [(r.checkpoint.path.rpartition("/")[2], r.metrics) for r in books._checkpoint_results]
    newest = books.latest_checkpoint_result
    return results, newest and newest.checkpoint.path.rpartition("/")[2]


REPORTED = [
    ("epoch-0000", {"step": 4, "score": 0.75, "epoch": 0}),
    ("step-00000006", {"step": 6, "epoch": 1}),
    ("epoch-0001", {"step": 8, "score": 0.5, "epoch": 1}),
]


@pytest.fixture
def run(tmp_path):
    """A run with three checkpoints in Ray's list."""
    for name, metrics in REPORTED:
        save(tmp_path / "stage_one" / name, **metrics)
    register(tmp_path, *REPORTED)
    return tmp_path


def mend(run):
    warnings = []
    step = mend_registry(open_storage(run / "stage_one"), warnings.append)
    return step, warnings


class TestMendRegistry:
    def test_a_list_that_is_right_is_left_alone(self, run):
        before = (run / "stage_one" / LIST_FILE).read_bytes()
        assert mend(run) == (8, [])
        assert (run / "stage_one" / LIST_FILE).read_bytes() == before
        assert loaded(run) == (REPORTED, "epoch-0001")

    def test_a_run_that_begins_has_no_list(self, tmp_path):
        assert mend(tmp_path) == (0, [])
        assert not list(tmp_path.iterdir())

    def test_a_list_cut_at_any_length_is_damaged(self, run):
        whole = (run / "stage_one" / LIST_FILE).read_bytes()
        assert _parse(whole) == [Reported(*item) for item in REPORTED]
        assert [length for length in range(len(whole)) if _parse(whole[:length]) is not None] == []

    def test_a_damaged_list_is_made_anew_and_ray_takes_it(self, run):
        path = run / "stage_one" / LIST_FILE
        whole = path.read_bytes()
        for length in (0, 1, *random.Random(4).sample(range(len(whole)), 10), len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointManagerInitializationError):
                loaded(run)
            step, (warning,) = mend(run)
            assert step == 8 and warning.endswith(
                f"/{LIST_FILE} is damaged; it was made anew of epoch-0000, step-00000006, epoch-0001"
            )
            assert loaded(run) == (REPORTED, "epoch-0001")

    @pytest.mark.parametrize("content", [b"[]", b"3", b"{}", b"\xff", b"[" * 100_000, b'{"checkpoint_results": 3}'])
    def test_a_list_that_is_none_is_made_anew(self, run, content):
        (run / "stage_one" / LIST_FILE).write_bytes(content)
        assert mend(run)[0] == 8
        assert loaded(run) == (REPORTED, "epoch-0001")

    def test_a_missing_list_is_made_anew_of_the_whole_folders(self, run):
        (run / "stage_one" / LIST_FILE).unlink()
        (run / "stage_one" / "step-00000006" / "manifest-rank1.json").unlink()
        step, (warning,) = mend(run)
        assert step == 8 and warning.endswith("is missing; it was made anew of epoch-0000, epoch-0001")
        assert loaded(run) == ([REPORTED[0], REPORTED[2]], "epoch-0001")

    @pytest.mark.parametrize("gone", [name for name, _ in REPORTED])
    def test_a_listed_folder_that_is_gone_leaves_the_list(self, run, gone):
        shutil.rmtree(run / "stage_one" / gone)
        with pytest.raises(CheckpointManagerInitializationError, match="does not exist anymore"):
            loaded(run)
        step, warnings = mend(run)
        left = [(name, metrics) for name, metrics in REPORTED if name != gone]
        assert step == left[-1][1]["step"]
        assert warnings == [f"checkpoints that were listed are gone from {run / 'stage_one'}: {gone}"]
        assert loaded(run) == (left, left[-1][0])
        assert mend(run) == (step, []), "told twice"

    def test_all_folders_gone_is_a_new_beginning_that_is_told(self, run):
        for name, _ in REPORTED:
            shutil.rmtree(run / "stage_one" / name)
        step, warnings = mend(run)
        assert step == 0 and len(warnings) == 1
        assert loaded(run) == ([], None)

    def test_a_whole_checkpoint_whose_run_was_killed_before_it_was_listed_joins_the_list(self, run):
        save(run / "stage_one" / "epoch-0002", 12, score=0.5)
        assert mend(run) == (12, [])
        assert loaded(run) == ([*REPORTED, ("epoch-0002", {"step": 12, "score": 0.5})], "epoch-0002")

    def test_a_name_that_leads_out_of_the_folder_is_dropped(self, run):
        path = run / "stage_one" / LIST_FILE
        path.write_text(path.read_text().replace("epoch-0001", "../../somebody"))
        assert mend(run)[0] == 8  # the folder itself is found again
        assert loaded(run) == (REPORTED, "epoch-0001")

    def test_training_goes_on_with_a_list_that_was_made_anew(self, run):
        (run / "stage_one" / LIST_FILE).unlink()
        mend(run)
        save(run / "stage_one" / "epoch-0002", 12, score=0.5)
        register(run, ("epoch-0002", {"step": 12, "score": 0.5}))
        assert loaded(run) == ([*REPORTED, ("epoch-0002", {"step": 12, "score": 0.5})], "epoch-0002")
        assert mend(run) == (12, [])


class TestStoredManifest:
    def test_whole_by_names_and_sizes(self, run):
        storage = open_storage(run / "stage_one")
        sizes = files_by_folder(storage)
        assert sizes.keys() == {name for name, _ in REPORTED}
        manifest = stored_manifest(storage, "epoch-0000", sizes["epoch-0000"])
        assert (manifest.world, manifest.extra["step"], manifest.metrics) == (2, 4, REPORTED[0][1])

    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            (lambda folder: (folder / "weights-1.bin").unlink(), "weights-1.bin has no bytes instead of 50"),
            (lambda folder: (folder / "weights-0.bin").write_bytes(b"3"), "weights-0.bin has 1 bytes instead of 50"),
            (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing, so it was never finished"),
            (lambda folder: (folder / "manifest-rank1.json").write_text("{"), "manifest-rank1.json is damaged"),
            (lambda folder: (folder / "weights-2.bin").touch(), "weights-2.bin is in no manifest"),
        ],
    )
    def test_what_is_not(self, run, spoil, reason):
        spoil(run / "stage_one" / "epoch-0000")
        storage = open_storage(run / "stage_one")
        with pytest.raises(CheckpointError, match=f"is not whole: {reason};"):
            stored_manifest(storage, "epoch-0000", files_by_folder(storage)["epoch-0000"])


def kept(reported, best=1, **more):
    gone = to_delete([Reported(*item) for item in reported], best, "score", **more)
    return [name for name in dict.fromkeys(name for name, _ in reported) if name not in gone]


def epoch(step, score):
    return f"epoch-{step}", {"step": step, "score": score}


def middle(step):
    return f"step-{step}", {"step": step}


class TestToDelete:
    def test_the_two_newest_stay_without_a_score(self):
        assert kept([epoch(4, 0.9), epoch(8, 0.5), middle(10), middle(12)]) == ["epoch-4", "step-10", "step-12"]
        assert kept([epoch(4, 0.9), middle(10), middle(12), epoch(16, 0.1)]) == ["epoch-4", "step-12", "epoch-16"]

    def test_as_many_of_the_best_as_are_wanted_beside_them(self):
        epochs = [epoch(step, score) for step, score in enumerate([0.1, 0.9, 0.3, 0.8, 0.2, 0.4], 1)]
        assert kept(epochs, best=1) == ["epoch-2", "epoch-5", "epoch-6"]
        assert kept(epochs, best=2) == ["epoch-2", "epoch-4", "epoch-5", "epoch-6"]
        assert kept(epochs, best=1, newest=1) == ["epoch-2", "epoch-6"]

    def test_few_are_all_kept(self):
        assert kept([]) == [] and kept([middle(1)]) == ["step-1"]
        assert kept([middle(1), middle(2)]) == ["step-1", "step-2"]

    @pytest.mark.parametrize("score", [math.nan, None, "0.9"])
    def test_what_is_no_number_is_no_score(self, score):
        reported = [epoch(1, score), epoch(2, 0.1), middle(3), middle(4)]
        assert kept(reported) == ["epoch-2", "step-3", "step-4"]

    def test_of_equal_scores_the_earlier_is_best_as_it_is_chosen_afterwards(self):
        reported = [epoch(1, 0.5), epoch(2, 0.5), middle(3), middle(4)]
        assert kept(reported) == ["epoch-1", "step-3", "step-4"]
        assert [name for name, _ in best_first(reported, "score")] == ["epoch-1", "epoch-2", "step-3", "step-4"]

    def test_where_steps_go_back_those_from_there_on_were_damaged_and_do_not_count(self):
        reported = [middle(1), middle(2), middle(3), middle(4), middle(3)]  # 3 and 4 were passed over
        assert kept(reported) == ["step-2", "step-3"]
        assert kept([epoch(2, 0.1), epoch(4, 0.9), epoch(6, 0.5), middle(3)]) == ["epoch-2", "step-3"]

    def test_it_never_takes_away_the_best_or_the_two_newest_of_any_history(self):
        rng = random.Random(3)
        for _ in range(200):
            reported, there = [], []
            for step in range(1, 20):
                item = epoch(step, rng.random()) if rng.random() < 0.4 else middle(step)
                reported.append(item)
                there = [other for other in [*there, item] if other[0] in kept([*there, item], best=2)]
                scored = sorted((r for r in reported if "score" in r[1]), key=lambda r: -r[1]["score"])
                wanted = {name for name, _ in [*scored[:2], *reported[-2:]]}
                assert {name for name, _ in there} == wanted


def test_rays_own_manager_deletes_by_the_rule(tmp_path, monkeypatch):
    name = "_save_state_and_delete_old_checkpoints"
    monkeypatch.setattr(CheckpointManager, name, getattr(CheckpointManager, name))  # put back afterwards
    keep_by_our_rule(best=1, by="score")
    reported = [epoch(4, 0.9), epoch(8, 0.5), middle(10), middle(12), middle(14)]
    for number, (name, metrics) in enumerate(reported):
        save(tmp_path / "stage_one" / name, metrics["step"])
        register(tmp_path, (name, metrics))
        there = {path.name for path in (tmp_path / "stage_one").iterdir() if path.is_dir()}
        assert there == set(kept(reported[: number + 1])) == {name for name, _ in loaded(tmp_path)[0]}
        assert loaded(tmp_path)[1] == name
    assert there == {"epoch-4", "step-12", "step-14"}
    # 12 and 14 were damaged, and 12 is saved again: Ray has two of that name, and one folder
    save(tmp_path / "stage_one" / "step-12", 12)
    register(tmp_path, middle(12))
    assert loaded(tmp_path) == ([epoch(4, 0.9), middle(12)], "step-12")
    assert {path.name for path in (tmp_path / "stage_one").iterdir() if path.is_dir()} == {"epoch-4", "step-12"}
