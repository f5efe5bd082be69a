import hashlib
import json
import pickle
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.dataset import open_dataset
from data_pipeline.pack import pack
from tests.raw import table_source


@pytest.fixture
def packed(tmp_path):
    source = table_source(tmp_path / "raw", {"a": 20, "b": 12, "c": 8})
    pack(source, DataConfig(name="three"), str(tmp_path / "packed"), seed=0, progress=False)
    return tmp_path / "packed"


def test_an_opened_dataset_says_what_it_holds(packed):
    dataset = open_dataset(str(packed), verify=True)
    assert (dataset.name, dataset.classes, dataset.uri) == ("three", ("a", "b", "c"), str(packed))
    total = sum(dataset.class_counts(split) for split in ("train", "val", "test"))
    assert total.tolist() == [20, 12, 8] and total.dtype == np.int64
    description = json.loads((packed / "dataset.json").read_text())
    for split in ("train", "val", "test"):
        index = dataset.index(split)
        assert index is dataset.index(split)
        assert description["class_counts"][split] == dataset.class_counts(split).tolist()
        types = {name: getattr(index, name).dtype for name in ("label", "shard", "offset", "length", "width", "phash")}
        assert [str(kind) for kind in types.values()] == ["int64", "int32", "int64", "int64", "int32", "uint64"]
        assert {dataset.shards[i].split for i in index.shard} == {split}
    assert len(dataset.fingerprint) == 64


def test_the_fingerprint_changes_with_the_content(packed, tmp_path):
    source = table_source(tmp_path / "raw", {"a": 20, "b": 12, "c": 8})
    other = pack(source, DataConfig(name="three"), str(tmp_path / "other"), seed=1, progress=False)
    assert other.fingerprint != open_dataset(str(packed)).fingerprint


def test_a_dataset_travels_to_a_worker(packed):
    dataset = pickle.loads(pickle.dumps(open_dataset(str(packed))))
    assert len(dataset.index("train")) == dataset.class_counts("train").sum()


def test_no_dataset_there(tmp_path):
    with pytest.raises(UserError) as error:
        open_dataset(str(tmp_path))
    assert str(error.value) == (
        f"no packed dataset at {tmp_path}: it holds no dataset.json; make one with `rarelens pack SOURCE {tmp_path}`"
    )


def test_unknown_split(packed):
    with pytest.raises(UserError, match="split 'valid' is not known; known: train, val, test"):
        open_dataset(str(packed)).index("valid")


def fails(packed, message, verify=False):
    with pytest.raises(UserError) as error:
        open_dataset(str(packed), verify=verify)
    assert re.fullmatch(message.format(uri=re.escape(str(packed))), str(error.value)), error.value


AGAIN = "download or pack the dataset again"


def test_truncated_shard(packed):
    shard = packed / "val" / "000000.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-512])
    fails(
        packed,
        f"val/000000.tar of the packed dataset {{uri}} is truncated: {size - 512} bytes instead of {size}; {AGAIN}",
    )


def test_shard_that_grew_and_shard_that_is_gone(packed):
    shard = packed / "test" / "000000.tar"
    shard.write_bytes(shard.read_bytes() + b"x")
    fails(packed, rf"test/000000.tar of the packed dataset {{uri}} is altered: \d+ bytes instead of \d+; {AGAIN}")
    shard.unlink()
    fails(packed, f"test/000000.tar of the packed dataset {{uri}} is missing; {AGAIN}")


def test_altered_shard_of_the_same_size_is_found_by_verify(packed):
    shard = packed / "train" / "tail-000000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    open_dataset(str(packed))
    fails(
        packed,
        "train/tail-000000.tar of the packed dataset {uri} is altered: its SHA-256 is not the one in dataset.json; "
        + AGAIN,
        verify=True,
    )


def test_altered_index_is_found_without_verify(packed):
    index = packed / "index.parquet"
    content = bytearray(index.read_bytes())
    content[100] ^= 1
    index.write_bytes(content)
    fails(
        packed,
        f"index.parquet of the packed dataset {{uri}} is altered: its SHA-256 is not the one in dataset.json; {AGAIN}",
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(version=2), "has format version 2, this rarelens reads version 1; pack the dataset again"),
        (lambda d: d.pop("mean"), "is incomplete; pack the dataset again"),
        (
            lambda d: d["shards"][0].update(path="../../etc/x.tar"),
            "names shard '../../etc/x.tar' outside of the dataset; pack the dataset again",
        ),
        (lambda d: d.pop("version"), "is no description of a packed dataset; pack the dataset again"),
    ],
)
def test_description_that_cannot_be_used(packed, change, message):
    description = json.loads((packed / "dataset.json").read_text())
    change(description)
    (packed / "dataset.json").write_text(json.dumps(description))
    fails(packed, "{uri}/dataset.json " + re.escape(message))


def test_description_that_is_no_json(packed):
    (packed / "dataset.json").write_bytes(b"\xff{")
    fails(packed, "{uri}/dataset.json is no description of a packed dataset; pack the dataset again")


def rewrite_index(packed, change):
    """Change the index's columns, with sizes and checksums that fit: only what it says is wrong."""
    table = pq.read_table(packed / "index.parquet")
    columns = {name: table[name].to_pylist() for name in table.column_names}
    change(columns)
    pq.write_table(pa.table(columns, schema=table.schema), packed / "index.parquet")
    content = (packed / "index.parquet").read_bytes()
    description = json.loads((packed / "dataset.json").read_text())
    description["index"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (packed / "dataset.json").write_text(json.dumps(description))
    return columns


@pytest.mark.parametrize(
    "column, value, what",
    [
        ("label", 3, "a label that is none of the classes"),
        ("label", -1, "a label that is none of the classes"),
        ("shard", 3, "a shard that is not there"),
        ("shard", -1, "a shard that is not there"),
        ("offset", 10**9, "bytes outside of its shard"),
        ("offset", -512, "bytes outside of its shard"),
        ("length", 10**9, "bytes outside of its shard"),
        ("split", "val", "another split than its shard"),
        ("split", "valid", "another split than its shard"),
    ],
)
def test_an_index_that_does_not_fit_its_dataset(packed, column, value, what):
    columns = rewrite_index(packed, lambda columns: columns[column].__setitem__(2, value))
    with pytest.raises(UserError) as error:
        open_dataset(str(packed)).index("train")
    assert str(error.value) == (
        f"index.parquet of the packed dataset {packed} gives sample {columns['key'][2]!r} {what}; "
        "pack the dataset again"
    )


def test_an_index_with_a_key_twice(packed):
    columns = rewrite_index(packed, lambda columns: columns["key"].__setitem__(2, columns["key"][7]))
    with pytest.raises(UserError) as error:
        open_dataset(str(packed), verify=True)
    assert str(error.value) == (
        f"index.parquet of the packed dataset {packed} has the key {columns['key'][7]!r} twice; pack the dataset again"
    )
