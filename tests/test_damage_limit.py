"""`data.max_damaged` holds for all ranks together: in training, in validation, while features are made."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import trainer.extraction
from cluster.errors import UserError
from cluster.worker import Worker
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.damage import check_left_out
from data_pipeline.dataset import open_dataset
from tests.gloo import run_gloo
from tests.loop import loop
from tests.packed import train_loader, write_packed
from tests.tiny import tiny_config
from trainer.config import FeaturesConfig, ModelConfig, TrainerConfig
from trainer.extraction import Extraction
from trainer.model import Output, build_model
from trainer.stage_checkpoint import share_damaged
from trainer.validation import validate

COUNTS = {"train": [30, 14, 5], "val": [9, 5, 4]}
DAMAGED = ["train_1_3", "train_2_1", "train_2_2"]
DATA = DataConfig(image_px=24, streams=4, decode_threads=1, augment=AugmentConfig(rotate_deg=20))


def with_limit(limit):
    return DATA.model_copy(update={"max_damaged": limit})


def config_of(limit):
    model = ModelConfig(backbone="test_resnet", hidden_dim=8, embedding_dim=4)
    return TrainerConfig(model=model, features=FeaturesConfig(batch_size=4), data=with_limit(limit))


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """Of a dataset with three damaged images in train and one in each half of val's index."""
    folder = tmp_path_factory.mktemp("packed")
    val = write_packed(folder / "whole", COUNTS).index("val").key
    return write_packed(folder / "damaged", COUNTS, damage=[*DAMAGED, val[2], val[12]]).uri


def trained(rank, world, uri, limit):
    """Each rank has met one; what all know after stage one has made them share it, and how it ends."""
    loader = train_loader(open_dataset(uri), with_limit(limit), rank, world)
    loader.add_damaged([(DAMAGED[rank], "cut off")])
    try:
        share_damaged(loader, world)
        return loader.damaged, None
    except UserError as error:
        return loader.damaged, str(error)
    finally:
        loader.close()


def test_in_training(uri):
    everyones = [(key, "cut off") for key in sorted(DAMAGED)]
    for limit, failed in [(3, False), (2, True)]:
        for damaged, message in run_gloo(trained, 3, uri, limit):
            assert sorted(damaged) == everyones
            assert (message is not None) is failed
            expected = r"more than data\.max_damaged = 2 damaged images: train_\d_\d \(cut off\); "
            assert not failed or re.search(expected, message)


def validated(rank, world, uri, limit):
    def first_class(images):
        nothing = torch.empty(len(images), 1)
        return Output(features=nothing, embeddings=nothing, logits=torch.eye(3)[[0] * len(images)])

    config = config_of(limit)
    try:
        return validate(first_class, open_dataset(uri), config, Worker(rank, world, "cpu"), torch.device("cpu"))
    except UserError as error:
        return str(error)


def extracted(rank, world, uri, limit, run):
    model = build_model(config_of(limit).model, 3, DATA.image_px)
    trainer.extraction.load_classifier = lambda *_: model
    trainer.extraction.fetch_checkpoint = lambda *_: None
    wanted = [(Extraction("stage_one", ("val",), "features"), "checkpoint")]
    try:
        trainer.extraction._extract(Worker(rank, world, "cpu"), config_of(limit), uri, run, wanted)
        return None
    except UserError as error:
        return str(error)


def assert_all_ranks_say_both(uri, messages):
    val = open_dataset(uri).index("val").key
    said = f"{uri} has more than data.max_damaged = 1 damaged images: {val[2]}; {val[12]}; pack the dataset again, or"
    assert len(messages) == 2 and all(message.startswith(said) for message in messages)


def test_in_validation(uri):
    """Each rank by itself has met no more than it may."""
    assert_all_ranks_say_both(uri, run_gloo(validated, 2, uri, 1))
    recalls = [found["balanced_accuracy"] for found in run_gloo(validated, 2, uri, 2)]
    assert recalls == pytest.approx([1 / 3] * 2)


def test_while_features_are_made(uri, tmp_path):
    assert_all_ranks_say_both(uri, run_gloo(extracted, 2, uri, 1, str(tmp_path)))
    assert run_gloo(extracted, 2, uri, 2, str(tmp_path)) == [None, None]
    assert len(list(Path(tmp_path, "features").iterdir())) == 2


def test_the_driver_is_told_of_each(tmp_path):
    counts = {"train": [20, 12], "val": [3, 3], "test": [1, 1]}
    write_packed(tmp_path / "dataset", counts, damage=["train_1_2", "val_0_1"])
    config = tiny_config(tmp_path, "run", data={"max_damaged": 1}, stage_one={"epochs": 1})
    (told,) = run_gloo(loop, 1, config, tmp_path)
    reason = "no image format that is known"
    assert [line["text"] for line in told if line["kind"] == "warning"] == [
        f"train_1_2 of split train is damaged, the next of its class takes its place: {reason}",
        f"val_0_1 of split val is left out, it is damaged: {reason}",
    ]


def test_many_are_named_and_the_rest_counted(tmp_path):
    dataset = write_packed(tmp_path, {"train": [1, 1], "val": [20, 15]}, distinct=1)
    check_left_out(dataset, "val", np.arange(35), limit=0)
    key = dataset.index("val").key
    with pytest.raises(UserError) as error:
        check_left_out(dataset, "val", np.arange(30, 35), limit=3)
    assert str(error.value) == (
        f"{dataset.uri} has more than data.max_damaged = 3 damaged images: {'; '.join(key[:20])}; and 10 more; "
        "pack the dataset again, or raise data.max_damaged"
    )
