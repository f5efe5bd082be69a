"""A checkpoint counts only if every file is as its manifests say: each kind of damage is named."""

import hashlib
import json
import logging
import random
import re
from pathlib import Path

import pytest

from cluster.checkpoint import CheckpointError, newest_whole, sha256_of, verify, write_manifest

REMEDY = "; use an earlier one or copy it again"


def checkpoint(folder: Path, world: int = 2, save: str = "a", seed: int = 0) -> Path:
    """Files of several ranks, merged into one folder as Ray Train does it."""
    for rank in range(world):
        share = folder.parent / f"share-{folder.name}-{rank}"
        (share / "zero").mkdir(parents=True)
        (share / "zero" / f"optimiser-{rank}.pt").write_bytes(random.Random(f"{seed}-{rank}").randbytes(1000))
        if rank == 0:
            (share / "state.json").write_text('{"step": 3}')
            (share / "empty").touch()
        write_manifest(share, rank, world, {"step": 3, "save": save})
        for file in (path for path in share.rglob("*") if path.is_file()):
            target = folder / file.relative_to(share)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return folder


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'checkpoint {folder} is not whole: {reason}{REMEDY}')}$"):
        verify(folder)


def test_a_whole_checkpoint_is_told_file_by_file(tmp_path):
    folder = checkpoint(tmp_path / "c", world=2)
    manifest = verify(folder)
    assert manifest.world == 2 and manifest.extra == {"step": 3, "save": "a"}
    assert set(manifest.files) == {"zero/optimiser-0.pt", "zero/optimiser-1.pt", "state.json", "empty"}
    content = (folder / "zero/optimiser-1.pt").read_bytes()
    assert manifest.files["zero/optimiser-1.pt"].sha256 == hashlib.sha256(content).hexdigest()
    assert manifest.files["zero/optimiser-1.pt"].bytes == 1000
    assert manifest.files["empty"].sha256 == hashlib.sha256(b"").hexdigest()


def test_a_file_larger_than_a_block_is_hashed_whole(tmp_path):
    content = random.Random(0).randbytes((1 << 20) + 7)
    (tmp_path / "large").write_bytes(content)
    assert sha256_of(tmp_path / "large") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("world", [1, 2])
def test_every_bit_flip_is_found(tmp_path, world):
    folder = checkpoint(tmp_path / "c", world)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    whole = {path: path.read_bytes() for path in files}
    rng = random.Random(1)
    for _ in range(200):
        path = rng.choice(files)
        damaged = bytearray(whole[path])
        place = rng.randrange(len(damaged))
        damaged[place] ^= 1 << rng.randrange(8)
        if path.name.startswith("manifest") and same_meaning(bytes(damaged), whole[path]):
            continue
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            verify(folder)
        path.write_bytes(whole[path])
    verify(folder)


def same_meaning(damaged: bytes, whole: bytes) -> bool:
    """White space between JSON values may flip into other white space."""
    try:
        return json.loads(damaged) == json.loads(whole)
    except ValueError:
        return False


def test_an_altered_file_is_named(tmp_path):
    folder = checkpoint(tmp_path / "c")
    (folder / "state.json").write_text('{"step": 4}')
    refused(folder, "state.json was altered: its SHA-256 is not the manifest's")


def test_a_truncated_file_is_named(tmp_path):
    folder = checkpoint(tmp_path / "c")
    with (folder / "zero/optimiser-0.pt").open("r+b") as file:
        file.truncate(999)
    refused(folder, "zero/optimiser-0.pt has 999 bytes instead of 1000")


def test_a_missing_file_is_named(tmp_path):
    folder = checkpoint(tmp_path / "c")
    (folder / "zero/optimiser-1.pt").unlink()
    refused(folder, "zero/optimiser-1.pt is missing")


def test_a_file_that_no_manifest_vouches_for_is_refused(tmp_path):
    folder = checkpoint(tmp_path / "c")
    (folder / ".metadata.json").touch()  # Ray's own
    verify(folder)
    (folder / "zero" / "optimiser-9.pt").write_bytes(b"a pickle from elsewhere")
    refused(folder, "zero/optimiser-9.pt is in no manifest")


@pytest.mark.parametrize("name", ["manifest.json", "manifest-rank1.json"])
def test_without_every_ranks_manifest_a_checkpoint_does_not_exist(tmp_path, name):
    folder = checkpoint(tmp_path / "c")
    (folder / name).unlink()
    refused(folder, f"{name} is missing, so it was never finished")


def test_ranks_of_two_saves_do_not_make_one_checkpoint(tmp_path):
    folder, other = checkpoint(tmp_path / "c", save="a"), checkpoint(tmp_path / "d", save="b")
    for name in ("manifest-rank1.json", "zero/optimiser-1.pt"):
        (folder / name).write_bytes((other / name).read_bytes())
    refused(folder, "manifest-rank1.json is of another save than manifest.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "manifest.json has format 2, this program reads 1"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, "manifest.json is damaged"),
        ({"files": {"a": {"bytes": "many", "sha256": ""}}}, "manifest.json is damaged"),
        ({"files": ["a"]}, "manifest.json is damaged"),
        ({"world": 0}, "manifest.json is damaged"),
        ({"extra": None}, "manifest.json is damaged"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(tmp_path, change, reason):
    folder = checkpoint(tmp_path / "c")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | change
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest))
    refused(folder, reason)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3"])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, content):
    folder = checkpoint(tmp_path / "c")
    (folder / "manifest.json").write_bytes(content)
    refused(folder, "manifest.json is damaged")


def test_the_newest_whole_one_is_taken_and_the_others_are_named(tmp_path, caplog):
    newest, middle, oldest = (checkpoint(tmp_path / name, world=1) for name in ("newest", "middle", "oldest"))
    assert newest_whole([newest, middle, oldest]) == newest
    (newest / "manifest.json").unlink()
    (middle / "state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert newest_whole([newest, middle, oldest]) == oldest
    assert [record.getMessage() for record in caplog.records] == [
        f"passed over: checkpoint {newest} is not whole: manifest.json is missing, so it was never finished{REMEDY}",
        f"passed over: checkpoint {middle} is not whole: state.json is missing{REMEDY}",
    ]
    assert newest_whole([newest, middle]) is None
    assert newest_whole([]) is None
