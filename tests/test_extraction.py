"""Extraction: a split's images through the backbone, in one view or several, by any number of workers."""

import logging
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

import trainer.extraction
from cluster.errors import UserError
from cluster.run import RunFolder
from cluster.worker import Worker
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.passes import augmented_batches, evaluation_batches
from tests.packed import write_packed
from trainer.config import FeaturesConfig, ModelConfig, TrainerConfig
from trainer.extraction import Extraction, extract, extract_features
from trainer.features import read_features, read_manifest, write_manifest, write_part
from trainer.model import build_model
from trainer.stage_checkpoint import WEIGHTS_FILE

COUNTS = {"train": [7, 4, 2], "val": [5, 3, 2]}
DATA = DataConfig(image_px=32, decode_threads=1, decode="cpu")


def config_of(batch_size=4, views=1, **sections):
    model = ModelConfig(backbone="test_resnet", hidden_dim=8, embedding_dim=4)
    features = FeaturesConfig(batch_size=batch_size, views=views)
    return TrainerConfig(model=model, features=features, **{"data": DATA, **sections})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(config_of().model, 3, DATA.image_px).train()


def parts(model, dataset, split="val", world=1, config=None):
    """What each of the workers makes."""
    for rank in range(world):
        yield extract(model, dataset, config or config_of(), split, rank=rank, world=world, device=torch.device("cpu"))


def test_features_are_the_backbone_s_in_evaluation_mode(model, tmp_path):
    dataset = write_packed(tmp_path, COUNTS)
    (features,) = parts(model, dataset)
    assert model.training
    index = dataset.index("val")
    assert np.array_equal(features.rows, np.arange(10)) and np.array_equal(features.keys, index.key)
    assert np.array_equal(features.labels, index.label) and np.array_equal(features.groups, index.group)
    batches = evaluation_batches(dataset, DATA, "val", batch_size=10, rank=0, world=1, device=torch.device("cpu"))
    with torch.no_grad():
        expected = torch.cat([model.eval().features(batch.images) for batch in batches])
    assert np.allclose(features.x, expected.numpy(), atol=2e-3, rtol=2e-3)
    assert features.x.dtype == np.float16 and features.x.std() > 0


def test_parts_of_three_workers_make_the_whole(model, tmp_path):
    dataset = write_packed(tmp_path / "packed", COUNTS)
    (alone,) = parts(model, dataset)
    for rank, part in enumerate(parts(model, dataset, world=3)):
        write_part(tmp_path, "val", rank, part)
    write_manifest(tmp_path, backbone="b", checkpoint_sha256="none", dim=alone.x.shape[1], rows={"val": 10}, parts=3)
    joined = read_features(tmp_path, "val")
    assert np.array_equal(joined.keys, alone.keys)
    assert np.allclose(joined.x, alone.x, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("views", [1, 3])
def test_a_worker_without_samples(model, tmp_path, views):
    dataset = write_packed(tmp_path, {"train": [1, 1, 0], "val": [1, 1, 1]})
    sizes = [part.x.shape for part in parts(model, dataset, "train", world=4, config=config_of(views=views))]
    assert sum(rows for rows, _ in sizes) == 2 * views and {dim for _, dim in sizes} == {model.feature_dim}


def test_a_damaged_image_is_left_out(model, tmp_path, caplog):
    dataset = write_packed(tmp_path, COUNTS, damage=["val_1_1"])
    with caplog.at_level(logging.WARNING):
        (features,) = parts(model, dataset, config=config_of(data=DATA.model_copy(update={"max_damaged": 1})))
    assert len(features) == 9 and "val_1_1" not in features.keys and "val_1_1" in caplog.text
    write_part(tmp_path, "val", 0, features)
    write_manifest(tmp_path, backbone="b", checkpoint_sha256="none", dim=model.feature_dim, rows={"val": 10}, parts=1)
    assert np.array_equal(read_features(tmp_path, "val").keys, features.keys)


def test_features_that_are_not_finite_name_the_sample(model, tmp_path):
    dataset = write_packed(tmp_path, {"train": [2, 2, 2], "val": [2, 1, 1]})
    torch.nn.init.constant_(next(model.backbone.parameters()), float("nan"))
    with pytest.raises(
        UserError, match=rf"features of 4 val samples, {dataset.index('val').key[0]} the first, are not finite"
    ):
        list(parts(model, dataset))


class TestViews:
    @pytest.fixture(scope="class")
    @staticmethod
    def dataset(tmp_path_factory):
        return write_packed(tmp_path_factory.mktemp("packed"), COUNTS, samples_per_shard=5)

    def test_train_has_the_evaluation_view_and_augmented_ones(self, model, dataset):
        config = config_of(views=3, seed=11)
        (features,) = parts(model, dataset, "train", config=config)
        assert features.views == 3 and len(features) == 13 and features.x.shape == (39, model.feature_dim)
        (alone,) = parts(model, dataset, "train")
        assert np.allclose(features.x[:13], alone.x, atol=2e-3, rtol=2e-3)
        (batch,) = augmented_batches(dataset, DATA, "train", views=2, seed=11, batch_size=13)
        with torch.no_grad():
            expected = model.eval().features(batch.images).numpy()
        assert np.allclose(features.x[13:], expected, atol=2e-3, rtol=2e-3)
        assert (
            np.abs(features.x[13:26] - features.x[:13]).max() > 0.05 < np.abs(features.x[26:] - features.x[13:26]).max()
        )

    def test_val_has_one_view(self, model, dataset):
        (features,) = parts(model, dataset, "val", config=config_of(views=3))
        (alone,) = parts(model, dataset, "val")
        assert features.views == 1 and np.array_equal(features.x, alone.x)

    def test_two_workers_make_the_views_of_one(self, model, dataset, tmp_path):
        config = config_of(views=3, seed=11)
        (alone,) = parts(model, dataset, "train", config=config)
        for rank, part in enumerate(parts(model, dataset, "train", world=2, config=config)):
            write_part(tmp_path, "train", rank, part)
        dim = alone.x.shape[1]
        write_manifest(
            tmp_path, backbone="b", checkpoint_sha256="none", dim=dim, rows={"train": 13}, parts=2, views={"train": 3}
        )
        joined = read_features(tmp_path, "train")
        assert np.array_equal(joined.keys, alone.keys) and np.array_equal(joined.labels, alone.labels)
        assert np.allclose(joined.x, alone.x, atol=2e-3, rtol=2e-3)

    def test_a_damaged_image_is_left_out_of_every_view(self, model, tmp_path):
        dataset = write_packed(tmp_path, COUNTS, damage=["train_0_3"])
        config = config_of(views=3, data=DATA.model_copy(update={"max_damaged": 1}))
        (features,) = parts(model, dataset, "train", config=config)
        assert len(features) == 12 and "train_0_3" not in features.keys and features.x.shape[0] == 36
        (batch,) = augmented_batches(dataset, config.data, "train", views=2, seed=0, batch_size=13)
        assert batch.rows.tolist() == features.rows.tolist()
        with torch.no_grad():
            expected = model.eval().features(batch.images).numpy()
        assert np.allclose(features.x[12:], expected, atol=2e-3, rtol=2e-3)


class Anew(Exception):
    """Features are being made."""


def test_features_are_kept_until_something_that_decides_them_changes(ray_session, model, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    dataset = write_packed(tmp_path / "packed", COUNTS)
    run = RunFolder(str(tmp_path / "run"))
    wanted = Extraction("stage_one", ("train", "val"), "features/stage_one")

    def checkpoint(name):
        from cluster.checkpoint import write_manifest as declare_whole

        folder = run.path(f"stage_one/{name}/{WEIGHTS_FILE}").parent
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / WEIGHTS_FILE)
        declare_whole(folder, 0, 1, {})
        run.write_json("stage_one/result.json", {"checkpoint": f"stage_one/{name}"})

    checkpoint("epoch-0000")
    cluster = {"workers": 2, "device": "cpu", "cpus_per_worker": 0.5}
    config = config_of(views=2, run=run.uri, cluster=cluster)
    (folder,) = extract_features(config, dataset, run, wanted)
    train, val = read_features(folder, "train"), read_features(folder, "val")
    (alone,) = parts(model, dataset, "train", config=config)
    assert (train.views, len(train), val.views, len(val)) == (2, 13, 1, 10)
    made = [len(pa.ipc.open_file(str(folder / f"train-{rank:03d}.arrow")).read_all()) for rank in range(2)]
    assert read_manifest(folder)["parts"] == 2 and sum(made) == 26 and min(made) > 8  # both workers made them
    assert np.allclose(train.x, alone.x, atol=2e-3, rtol=2e-3)
    assert read_manifest(folder)["made_with"]["augment"]["scale_min"] == 0.4

    def anew(*args, **kwargs):
        raise Anew

    monkeypatch.setattr(trainer.extraction, "run_workers", anew)
    faster = config.model_copy(update={"features": FeaturesConfig(batch_size=7, views=2)})
    assert extract_features(faster, dataset, run, wanted) == [folder]
    manifest = (folder / "features.json").read_text()
    changes = {
        "views": {"features": FeaturesConfig(views=3)},
        "seed": {"seed": 1},
        "size": {"data": DATA.model_copy(update={"image_px": 48})},
        "mirrors": {"model": config.model.model_copy(update={"mirrors": "horizontal"})},
        "augmentation": {"data": DATA.model_copy(update={"augment": AugmentConfig(flip_vertical=True)})},
    }
    for name, change in changes.items():
        with pytest.raises(Anew):
            extract_features(config.model_copy(update=change), dataset, run, wanted)
        assert not (folder / "features.json").exists(), name  # parts of two kinds are no features
        (folder / "features.json").write_text(manifest)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    checkpoint("epoch-0001")
    with pytest.raises(Anew):
        extract_features(config, dataset, run, wanted)


def test_with_one_view_the_augmentation_decides_nothing(tmp_path):
    dataset = write_packed(tmp_path, COUNTS)
    plain = config_of()
    other = config_of(data=DATA.model_copy(update={"augment": AugmentConfig(flip_vertical=True)}), seed=5)
    assert trainer.extraction.made_with(plain, dataset, ("train",)) == trainer.extraction.made_with(
        other, dataset, ("train",)
    )
    views = config_of(views=4)
    assert trainer.extraction.made_with(views, dataset, ("test",)) == trainer.extraction.made_with(
        plain, dataset, ("test",)
    )


def test_after_a_restart_with_fewer_workers_theirs_are_the_parts(model, tmp_path, monkeypatch):
    """Two workers make train and one of them val; then one is left, which makes everything anew."""
    dataset = write_packed(tmp_path / "packed", COUNTS)
    run, counted = RunFolder(str(tmp_path / "run")), []
    config = config_of(run=run.uri)
    run.write_json("stage_one/result.json", {"checkpoint": "stage_one/epoch-0000"})
    run.path(f"stage_one/epoch-0000/{WEIGHTS_FILE}").write_bytes(b"weights")
    monkeypatch.setattr(trainer.extraction, "fetch_checkpoint", lambda run, path: run.path(path))
    monkeypatch.setattr(trainer.extraction, "load_classifier", lambda *given: model)
    monkeypatch.setattr(trainer.extraction.dist, "all_gather_object", lambda rows, own: None)
    monkeypatch.setattr(trainer.extraction, "check_left_out", lambda *given: None)

    def workers(work, arguments, *, on_message, **given):
        for rank, world, splits in ((0, 2, ("train", "val")), (1, 2, ("train",)), (0, 1, ("train", "val"))):
            worker = Worker(rank, world, "cpu")
            worker.tell = on_message
            (of_run, checkpoint), *_ = arguments["wanted"]
            work(worker, **{**arguments, "wanted": [(replace(of_run, splits=splits), checkpoint)]})

    @contextmanager
    def bar(title, total):
        assert total == 23
        yield SimpleNamespace(update=counted.append)

    monkeypatch.setattr(trainer.extraction, "run_workers", workers)
    monkeypatch.setattr(trainer.extraction, "progress_bar", bar)
    (folder,) = extract_features(config, dataset, run, trainer.extraction.TRAIN_AND_VAL)
    assert read_manifest(folder)["parts"] == 1 and counted[-2:] == [13, 23] and max(counted) <= 23
    for split, number in (("train", 13), ("val", 10)):
        (alone,) = parts(model, dataset, split)
        seen = read_features(folder, split)
        assert len(seen) == number and np.array_equal(seen.x, alone.x)
