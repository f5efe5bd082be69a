"""Features: what is written is read back, sorted, by memory map; what is not whole is refused."""

import json
import logging

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.loader import evaluation_batches
from tests.packed import write_packed
from trainer.config import ModelConfig
from trainer.features import Features, extract, read_features, read_manifest, write_manifest, write_part
from trainer.model import build_model

DIM = 8
DATA = DataConfig(image_px=32, decode_threads=1, decode="cpu")


def drawn(rows, seed=0):
    rows = np.asarray(rows, dtype=np.int64)
    x = np.random.default_rng(seed).normal(size=(1000, DIM)).astype(np.float16)[rows]
    keys = np.array([f"key{row}" for row in rows], dtype=object)
    groups = np.array([f"group{row // 2}" for row in rows], dtype=object)
    return Features(keys, rows % 3, groups, rows, x)


def write(folder, *parts, rows=None):
    for number, part in enumerate(parts):
        write_part(folder, "val", number, part)
    count = rows if rows is not None else sum(len(part) for part in parts)
    write_manifest(
        folder, backbone="test_resnet", checkpoint_sha256="ab12", dim=DIM, rows={"val": count}, parts=len(parts)
    )


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
def test_features_come_back_in_the_order_of_the_index(tmp_path, parts):
    write(tmp_path, *map(drawn, parts))
    features, expected = read_features(tmp_path, "val"), drawn(range(10))
    assert np.array_equal(features.rows, np.arange(10))
    assert np.array_equal(features.keys, expected.keys) and np.array_equal(features.groups, expected.groups)
    assert np.array_equal(features.labels, expected.labels) and features.labels.dtype == np.int64
    assert np.array_equal(features.x, expected.x) and features.x.dtype == np.float16


def test_one_part_is_not_copied(tmp_path):
    write(tmp_path, drawn(range(10)))
    x = read_features(tmp_path, "val").x
    assert not x.flags.owndata and not x.flags.writeable  # a writable or owned array would be a copy


def test_columns_are_those_of_the_format(tmp_path):
    import pyarrow as pa

    write(tmp_path, drawn(range(4)))
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
    assert table["split"].to_pylist() == ["val"] * 4 and table["view"].to_pylist() == [0] * 4


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

    def test_another_width(self, tmp_path):
        write(tmp_path, drawn(range(4)))
        manifest = read_manifest(tmp_path) | {"dim": 9}
        (tmp_path / "features.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=rf"features {tmp_path} have 8 values a sample, features.json says 9"):
            read_features(tmp_path, "val")


class TestExtraction:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        model = build_model(ModelConfig(backbone="test_resnet", hidden_dim=8, embedding_dim=4), 3, DATA.image_px)
        return model.train()

    def run(self, model, dataset, world=1, data=DATA):
        for rank in range(world):
            yield extract(model, dataset, data, "val", batch_size=4, rank=rank, world=world, device=torch.device("cpu"))

    def test_features_are_the_backbone_s_in_evaluation_mode(self, model, tmp_path):
        dataset = write_packed(tmp_path, {"train": [2, 2, 2], "val": [5, 3, 2]})
        (features,) = self.run(model, dataset)
        assert model.training
        index = dataset.index("val")
        assert np.array_equal(features.rows, np.arange(10)) and np.array_equal(features.keys, index.key)
        assert np.array_equal(features.labels, index.label) and np.array_equal(features.groups, index.group)
        batches = evaluation_batches(dataset, DATA, "val", batch_size=10, rank=0, world=1, device=torch.device("cpu"))
        with torch.no_grad():
            expected = torch.cat([model.eval().features(batch.images) for batch in batches])
        assert np.allclose(features.x, expected.numpy(), atol=2e-3, rtol=2e-3)
        assert features.x.dtype == np.float16 and features.x.std() > 0

    def test_parts_of_three_workers_make_the_whole(self, model, tmp_path):
        dataset = write_packed(tmp_path / "packed", {"train": [2, 2, 2], "val": [5, 3, 2]})
        (alone,) = self.run(model, dataset)
        for rank, part in enumerate(self.run(model, dataset, world=3)):
            write_part(tmp_path, "val", rank, part)
        write_manifest(tmp_path, backbone="b", checkpoint_sha256="", dim=alone.x.shape[1], rows={"val": 10}, parts=3)
        joined = read_features(tmp_path, "val")
        assert np.array_equal(joined.keys, alone.keys)
        assert np.allclose(joined.x, alone.x, atol=2e-3, rtol=2e-3)

    def test_a_worker_without_samples(self, model, tmp_path):
        dataset = write_packed(tmp_path, {"train": [1, 1, 1], "val": [1, 1, 0]})
        sizes = [part.x.shape for part in self.run(model, dataset, world=4)]
        assert sum(rows for rows, _ in sizes) == 2 and {dim for _, dim in sizes} == {model.feature_dim}

    def test_a_damaged_image_is_left_out(self, model, tmp_path, caplog):
        dataset = write_packed(tmp_path, {"train": [2, 2, 2], "val": [5, 3, 2]}, damage=["val_1_1"])
        with caplog.at_level(logging.WARNING):
            (features,) = self.run(model, dataset, data=DATA.model_copy(update={"max_damaged": 1}))
        assert len(features) == 9 and "val_1_1" not in features.keys and "val_1_1" in caplog.text
        write_part(tmp_path, "val", 0, features)
        write_manifest(tmp_path, backbone="b", checkpoint_sha256="", dim=model.feature_dim, rows={"val": 10}, parts=1)
        assert np.array_equal(read_features(tmp_path, "val").keys, features.keys)

    def test_features_that_are_not_finite_name_the_sample(self, model, tmp_path):
        dataset = write_packed(tmp_path, {"train": [2, 2, 2], "val": [2, 1, 1]})
        torch.nn.init.constant_(next(model.backbone.parameters()), float("nan"))
        with pytest.raises(
            UserError, match=rf"features of 4 val samples, {dataset.index('val').key[0]} the first, are not finite"
        ):
            list(self.run(model, dataset))
