"""Configurations: what is read, and what is said of a wrong one."""

import re
from pathlib import Path

import pydantic
import pytest
import yaml

from cluster.config import ClusterConfig, Section, apply_overrides, flatten, load_config, nearest, parse_config
from cluster.errors import UserError
from data_pipeline.config import DataConfig
from trainer.config import TrainerConfig
from tuning.config import Config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(f'test.yaml: {message}')}$"):
        parse_config(Config, values, "test.yaml")


def test_there_are_configurations():
    assert "quickstart.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads_and_survives_being_saved(path, tmp_path):
    config = load_config(Config, path)
    saved = tmp_path / "as-used.yaml"
    saved.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(Config, saved) == config


def sections(kind: type[Section]) -> list[type[Section]]:
    inner = [field.annotation for field in kind.model_fields.values()]
    found = [k for k in inner if isinstance(k, type) and issubclass(k, Section)]
    return [kind, *(deeper for k in found for deeper in sections(k))]


def test_everything_is_frozen_closed_and_every_default_is_allowed():
    for kind in set(sections(Config)):
        values = kind()
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(values, next(iter(kind.model_fields)), None)
        with pytest.raises(pydantic.ValidationError, match="Extra inputs"):
            kind(no_such_key=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage_on": {}}, "unknown key 'stage_on'; did you mean 'stage_one'?"),
        (
            {"stage_one": {"loss": {"temprature": 1}}},
            "unknown key 'stage_one.loss.temprature'; did you mean 'temperature'?",
        ),
        (
            {"data": {"split": {"xyz": 1}}},
            "unknown key 'data.split.xyz'; known: fold, folds, near_duplicate_bits, pool_given, test, train, "
            "train_imbalance, val",
        ),
        (
            {"stage_one": {"loss": {"name": "suprvised_contrastive"}}},
            "stage_one.loss.name = 'suprvised_contrastive' is not known; did you mean 'supervised_contrastive'?",
        ),
        (
            {"stage_one": {"loss": {"name": "xyz"}}},
            "stage_one.loss.name = 'xyz' is not known; known: all_triplet, balanced_contrastive, batch_hard_triplet, "
            "centre, class_centre_triplet, multi_similarity, none, progressive_class_centre_triplet, proxy_anchor, "
            "semi_hard_triplet, supervised_contrastive",
        ),
        (
            {"stage_two": {"families": ["crt", "crtt"]}},
            "stage_two.families.1 = 'crtt' is not known; did you mean 'crt'?",
        ),
        ({"stage_one": {"views": 3}}, "stage_one.views = 3 is not known; known: 1, 2"),
        ({"stage_one": {"batch_size": 60}}, "stage_one.batch_size = 60 must be a multiple of data.streams = 8"),
        (
            {"stage_one": {"sampling": {"classes_per_batch": 7, "samples_per_class": 8}}},
            "stage_one.batch_size = 64 must be classes_per_batch x samples_per_class = 56",
        ),
        (
            {"stage_one": {"sampling": {"classes_per_batch": 8}}},
            "stage_one.sampling: classes_per_batch and samples_per_class go together; set both or neither",
        ),
        (
            {"stage_one": {"loss": {"normalise": False}}},
            "stage_one.loss: supervised_contrastive needs normalise: true, its temperature is made for the unit sphere",
        ),
        ({"data": {"split": {"train": 0.9}}}, "data.split: train + val + test must be 1, not 1.2"),
        ({"cluster": {"workers": 9}}, "cluster.workers = 9 is more than data.streams = 8; raise data.streams"),
        ({"cluster": {"workers": 0}}, "cluster.workers = 0 must be greater than or equal to 1 or a list or 'auto'"),
        ({"cluster": {"workers": "aut"}}, "cluster.workers = 'aut' must be a valid integer or a list or 'auto'"),
        ({"stage_one": {"epochs": "many"}}, "stage_one.epochs = 'many' must be a valid integer"),
        ({"cluster": {"workers": [3, 2]}}, "cluster: workers = [3, 2] is [least, most]; swap them"),
        ({"stage_one": 3}, "stage_one = 3 must be a mapping of keys to values"),
        ({"stage_two": {"space": {"tau": [1]}}}, "stage_two.space.tau.1 is missing; add it"),
        (
            {"stage_two": {"space": {"tau": [1, 2, 3]}}},
            "stage_two.space.tau = [1, 2, 3]: Tuple should have at most 2 items after validation, not 3",
        ),
        (
            {"data": {"image_px": 4}, "model": {"weights": 3}},
            "data.image_px = 4 must be greater than or equal to 8; model.weights = 3 must be a valid string",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_said_of_a_wrong_value(values, message):
    refused(values, message)


def test_the_same_is_said_by_every_packages_own_configuration():
    with pytest.raises(UserError, match=r"^x: unknown key 'worker'; did you mean 'workers'\?$"):
        parse_config(ClusterConfig, {"worker": 2}, "x")
    with pytest.raises(UserError, match=r"^x: unknown key 'stream'; did you mean 'streams'\?$"):
        parse_config(DataConfig, {"stream": 2}, "x")
    with pytest.raises(UserError, match=r"^x: unknown key 'stage_two'; did you mean 'stage_one'\?$"):
        parse_config(TrainerConfig, {"stage_two": {}}, "x")


def test_what_is_said_of_a_wrong_file(tmp_path):
    with pytest.raises(
        UserError, match=rf"^configuration {tmp_path}/no.yaml does not exist; give the path of a YAML file"
    ):
        load_config(Config, tmp_path / "no.yaml")
    path = tmp_path / "bad.yaml"
    for content in (b"a: [1", b"\xff\xfe\x00", b"a: b: c"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^configuration {path} is not valid YAML: [^\n]+; correct that place: "):
            load_config(Config, path)
    path.write_text("- a\n- b\n")
    told = rf"^configuration {path} must be a mapping of keys to values, not a list; write lines of KEY: VALUE"
    with pytest.raises(UserError, match=told):
        load_config(Config, path)
    path.write_text("!!python/object/apply:os.system ['touch canary']\n")
    with pytest.raises(UserError, match=rf"^configuration {path} is not valid YAML: could not determine a constructor"):
        load_config(Config, path)
    path.write_text("")
    assert load_config(Config, path) == Config()


def test_overrides_are_laid_over_the_file_and_have_their_types(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("stage_one: {epochs: 3, optimiser: {lr: 1e-2}}\n")
    config = load_config(
        Config,
        path,
        ["stage_one.optimiser.weight_decay=1e-3", "run=s3://b/x=y", "stage_two.space.tau=[0.5, 1]", "source.path=null"],
    )
    assert config.stage_one.epochs == 3 and config.stage_one.optimiser.lr == 0.01
    assert config.stage_one.optimiser.weight_decay == 0.001
    assert config.run == "s3://b/x=y" and config.stage_two.space.tau == (0.5, 1.0) and config.source.path is None
    values = {"a": {"b": [1]}}
    assert apply_overrides(values, ["a.c.d=true"]) == {"a": {"b": [1], "c": {"d": True}}}
    assert values == {"a": {"b": [1]}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "override 'epochs' must read key.path=value, e.g. stage_one.epochs=8"),
        ("=3", "override '=3' must read key.path=value, e.g. stage_one.epochs=8"),
        ("run=[a", "override 'run=[a': '[a' is not valid YAML; quote it, e.g. run='\"text\"'"),
    ],
)
def test_what_is_said_of_a_bad_override(override, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        apply_overrides({}, [override])


def test_flatten_and_nearest():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
    assert nearest("tau", ["tau_norm", "crt"]) == "did you mean 'tau_norm'?"
    assert nearest("xyz", ["b", "a"]) == "known: a, b"


def test_a_configuration_in_a_bucket_is_read(moto_s3):
    from cluster.storage import open_storage

    open_storage(f"{moto_s3}/configs").write("best.yaml", b"seed: 7\nmodel: {embedding_dim: 8}")
    config = load_config(Config, f"{moto_s3}/configs/best.yaml", ["seed=8"])
    assert (config.seed, config.model.embedding_dim) == (8, 8)
    with pytest.raises(UserError, match=r"s3://.*/configs/worst.yaml does not exist"):
        load_config(Config, f"{moto_s3}/configs/worst.yaml")
