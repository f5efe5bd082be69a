"""Features: what is written is read back, sorted, by memory map; what is not whole is refused."""

import json

import numpy as np
import pytest

from cluster.errors import UserError
from trainer.features import Features, read_features, read_manifest, write_manifest, write_part
from trainer.stacked import StackedRows

DIM = 8


def drawn(rows, views=1):
    rows = np.asarray(rows, dtype=np.int64)
    x = np.random.default_rng(0).normal(size=(views, 1000, DIM)).astype(np.float16)[:, rows]
    keys = np.array([f"key{row}" for row in rows], dtype=object)
    groups = np.array([f"group{row // 2}" for row in rows], dtype=object)
    return Features(keys, rows % 3, groups, rows, x.reshape(-1, DIM), views)


def write(folder, *parts, rows=None, views=1):
    for number, part in enumerate(parts):
        write_part(folder, "val", number, part)
    write_manifest(
        folder,
        backbone="test_resnet",
        checkpoint_sha256="ab12",
        dim=DIM,
        rows={"val": rows if rows is not None else sum(len(part) for part in parts)},
        parts=len(parts),
        views={"val": views},
        made_with={"seed": 3},
    )


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(
    "parts",
    [
        [range(10)],
        [range(4), range(4, 10)],
        [range(6, 10), range(6)],
        [[3, 1, 0], [2, 9, 7, 8], [4, 6, 5]],
        [range(10), []],
    ],
    ids=["one part", "two parts", "other order", "mixed", "empty part"],
)
def test_features_come_back_in_the_order_of_the_index(tmp_path, parts, views):
    write(tmp_path, *(drawn(part, views) for part in parts), views=views)
    features, expected = read_features(tmp_path, "val"), drawn(range(10), views)
    assert features.views == views and features.x.shape == (10 * views, DIM)
    assert np.array_equal(features.rows, np.arange(10))
    assert np.array_equal(features.keys, expected.keys) and np.array_equal(features.groups, expected.groups)
    assert np.array_equal(features.labels, expected.labels) and features.labels.dtype == np.int64
    assert np.array_equal(features.x, expected.x) and features.x.dtype == np.float16


def test_one_part_is_not_copied(tmp_path):
    write(tmp_path, drawn(range(10)))
    x = read_features(tmp_path, "val").x
    assert not x.flags.owndata and not x.flags.writeable  # a writable or owned array would be a copy


def test_parts_and_views_are_not_copied(tmp_path):
    write(tmp_path, drawn(range(4), 3), drawn(range(4, 10), 3), views=3)
    x = read_features(tmp_path, "val").x
    assert isinstance(x, StackedRows) and len(x._parts) == 6
    assert all(rows is None and not part.flags.owndata and not part.flags.writeable for part, rows in x._parts)


def test_columns_are_those_of_the_format(tmp_path):
    import pyarrow as pa

    write(tmp_path, drawn([2, 1], views=2), views=2, rows=3)
    table = pa.ipc.open_file(str(tmp_path / "val-000.arrow")).read_all()
    assert {name: str(table.schema.field(name).type) for name in table.schema.names} == {
        "key": "string",
        "label": "int32",
        "group": "string",
        "split": "string",
        "view": "int8",
        "row": "int64",
        "embedding": f"fixed_size_list<item: halffloat>[{DIM}]",
    }
    assert table["split"].to_pylist() == ["val"] * 4 and table["view"].to_pylist() == [0, 0, 1, 1]
    assert table["row"].to_pylist() == [2, 1, 2, 1] and table["key"].to_pylist() == ["key2", "key1"] * 2
    assert table["label"].to_pylist() == [2, 1] * 2 and table["group"].to_pylist() == ["group1", "group0"] * 2
    assert np.array_equal(table["embedding"].to_pylist(), drawn([2, 1], views=2).x)


def test_manifest_says_what_made_them(tmp_path):
    write(tmp_path, drawn(range(4)), drawn(range(5, 9)), rows=9)
    assert read_manifest(tmp_path) == {
        "format": 1,
        "backbone": "test_resnet",
        "checkpoint_sha256": "ab12",
        "dim": DIM,
        "rows": {"val": 9},
        "left_out": {"val": [4]},
        "parts": 2,
        "views": {"val": 1},
        "made_with": {"seed": 3},
    }
    assert read_features(tmp_path, "val").rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]


def test_leftover_parts_are_not_read(tmp_path):
    write_part(tmp_path, "val", 1, drawn(range(5, 10)))
    write(tmp_path, drawn(range(10)))
    assert len(read_features(tmp_path, "val")) == 10


class TestWhatIsNotWhole:
    def test_no_manifest(self, tmp_path):
        write_part(tmp_path, "val", 0, drawn(range(10)))
        with pytest.raises(UserError, match=rf"features {tmp_path} hold no features.json, so they are missing or"):
            read_features(tmp_path, "val")

    def test_manifest_damaged(self, tmp_path):
        (tmp_path / "features.json").write_text("{")
        with pytest.raises(
            UserError, match=rf"{tmp_path}/features.json is not valid JSON .*; delete the folder and run"
        ):
            read_features(tmp_path, "val")

    def test_manifest_of_another_format(self, tmp_path):
        (tmp_path / "features.json").write_text(json.dumps({"format": 7}))
        with pytest.raises(UserError, match=r"features.json has format 7, this program reads 1; delete the folder"):
            read_features(tmp_path, "val")

    def test_no_such_split(self, tmp_path):
        write(tmp_path, drawn(range(4)))
        with pytest.raises(UserError, match=rf"features {tmp_path} have no split 'test', only val; delete the folder"):
            read_features(tmp_path, "test")

    def test_part_missing(self, tmp_path):
        write(tmp_path, drawn(range(5)), drawn(range(5, 10)))
        (tmp_path / "val-001.arrow").unlink()
        with pytest.raises(UserError, match=rf"features file {tmp_path}/val-001.arrow is missing; delete the folder"):
            read_features(tmp_path, "val")

    def test_part_truncated(self, tmp_path):
        write(tmp_path, drawn(range(10)))
        path = tmp_path / "val-000.arrow"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match=rf"features file {path} is truncated or damaged \(.+\); delete the folder"):
            read_features(tmp_path, "val")

    def test_a_row_twice(self, tmp_path):
        with pytest.raises(UserError, match=r"hold 9 rows of split 'val', not each of its 8 readable samples once"):
            write(tmp_path, drawn(range(5)), drawn(range(4, 8)), rows=8)

    def test_a_part_of_another_run(self, tmp_path):
        write(tmp_path, drawn(range(5)), drawn(range(5, 10)))
        write_part(tmp_path, "val", 1, drawn(range(5, 9)))
        with pytest.raises(UserError, match=r"hold 9 rows of split 'val', not each of its 10 readable samples once"):
            read_features(tmp_path, "val")

    def test_another_number_of_views(self, tmp_path):
        write(tmp_path, drawn(range(4), 3), views=3)
        for views in (1, 2):
            manifest = read_manifest(tmp_path) | {"views": {"val": views}}
            (tmp_path / "features.json").write_text(json.dumps(manifest))
            with pytest.raises(UserError, match=rf"val-000.arrow does not hold {views} views of its samples"):
                read_features(tmp_path, "val")

    def test_another_width(self, tmp_path):
        write(tmp_path, drawn(range(4)))
        manifest = read_manifest(tmp_path) | {"dim": 9}
        (tmp_path / "features.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"val-000.arrow has 8 values a sample, features.json says 9; delete"):
            read_features(tmp_path, "val")
