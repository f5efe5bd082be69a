"""Torn, flipped and swapped checkpoints: the newest whole one is taken, the bad file named, the last good one kept."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.checkpoint import CheckpointError, newest_whole, verify
from tests.torn_saves import NEW, PREVIOUS, save

ROOT = Path(__file__).parent.parent
FLIPS = 1000


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What was found after each kill, by case; the calls are counted in libc, under Python, Rust and C++ alike."""
    folder = tmp_path_factory.mktemp("torn")
    library = folder / "kill_after.so"
    source = ROOT / "tests" / "kill_after.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "tests.torn_saves", folder], cwd=ROOT, env=environment, check=True)
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Storage with two whole checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    for seed, name in enumerate((PREVIOUS, NEW)):
        save(folder / "storage", folder / f"scratch-{seed}", name, seed)
    return folder / "storage"


@pytest.fixture
def storage(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "storage"))


@pytest.mark.parametrize("case", ["0 then 1", "1 then 0, writes cut in half"])
class TestKilledAfterEachCall:
    def test_the_newest_whole_checkpoint_is_taken(self, killed, case):
        *torn, done = killed[case]
        assert len(torn) > 100, "calls are not counted"
        assert {step["status"] for step in torn} == {9} and done["status"] == 0
        newest = [step["newest"] for step in killed[case]]
        first_whole = newest.index(NEW)
        assert set(newest[:first_whole]) == {PREVIOUS} and set(newest[first_whole:]) == {NEW}

    def test_the_bad_file_is_named(self, killed, case):
        for step in killed[case]:
            if step["newest"] == PREVIOUS:
                assert re.search(
                    rf"passed over: checkpoint \S+/{NEW} is not whole: manifest\S* is missing", step["warnings"][0]
                )

    def test_the_last_good_one_is_never_altered(self, killed, case):
        assert all(step["kept"] for step in killed[case])

    def test_the_same_save_done_again_is_whole(self, killed, case):
        again = [step["again"] for step in killed[case] if "again" in step]
        assert len(again) > 5 and set(again) == {NEW}


def test_every_bit_flip_is_found_and_its_file_named(storage):
    newest = storage / NEW
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in files}
    rng = random.Random(6)
    hit = set()
    for _ in range(FLIPS):
        path = rng.choice(files)
        flipped = bytearray(whole[path])
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        name = path.relative_to(newest).as_posix()
        warnings = []
        assert newest_whole([newest, storage / PREVIOUS], warnings.append) == storage / PREVIOUS
        assert f"is not whole: {name} " in warnings[0], warnings
        path.write_bytes(whole[path])
        hit.add(path)
    assert hit == set(files), "some file was never flipped"
    verify(newest)


def test_a_truncation_at_any_length_is_found(storage):
    newest = storage / NEW
    rng = random.Random(7)
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for length in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(8))}:
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=f"is not whole: {re.escape(str(path.relative_to(newest)))} "):
                verify(newest)
        path.write_bytes(whole)
    verify(newest)


def test_a_file_of_another_checkpoint_is_found(storage):
    newest, previous = storage / NEW, storage / PREVIOUS
    shares = {"manifest.json": "manifest-rank1.json is of another save than manifest.json"}
    shares["manifest-rank1.json"] = shares["manifest.json"]
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        name = path.relative_to(newest).as_posix()
        whole, other = path.read_bytes(), (previous / name).read_bytes()
        if other == whole:
            continue
        path.write_bytes(other)
        with pytest.raises(CheckpointError, match=re.escape(shares.get(name, f"is not whole: {name} "))):
            verify(newest)
        path.write_bytes(whole)
    verify(newest)


@pytest.mark.parametrize("name", ["engine/mp_rank_01_model_states.pt", "zero_to_fp32.py", ".hidden/mp_rank_00.pt"])
def test_a_file_that_was_added_is_found(storage, name):
    (storage / NEW / name).parent.mkdir(exist_ok=True)
    (storage / NEW / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=re.escape(f"is not whole: {name} is in no manifest")):
        verify(storage / NEW)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "engine"])
def test_a_folder_in_a_files_place_and_the_other_way_round(storage, name):
    path = storage / NEW / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_bytes(b"")
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(CheckpointError, match="is not whole: "):
        verify(storage / NEW)


def test_a_manifest_of_another_save_is_refused_even_with_its_files(storage):
    newest, previous = storage / NEW, storage / PREVIOUS
    for name in ("manifest-rank1.json", "buffers-rank1.safetensors", "engine/zero_pp_rank_1_optim_states.pt"):
        shutil.copy(previous / name, newest / name)
    warnings = []
    assert newest_whole([newest, previous], warnings.append) == previous
    assert "manifest-rank1.json is of another save than manifest.json" in warnings[0]


def test_a_manifest_nested_to_exhaust_the_parser_is_damaged(storage):
    (storage / NEW / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=re.escape("manifest.json is damaged")):
        verify(storage / NEW)
