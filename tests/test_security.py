"""Hostile files: whatever comes from elsewhere runs no code, leaves its place alone, and is refused in one sentence."""

import json
import pickle
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from cluster.solo import SoloWorker
from cluster.storage import open_storage
from data_pipeline.dataset import open_dataset
from tests.canary import Canary, CommandLine
from tests.raw import digests, encoded, pattern, sample_members, save, table, write_csv, write_tar
from tests.test_images import says_it_is
from tests.tiny import tiny_config

ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.fixture
def canary(tmp_path):
    """Whose folder must not be there at the end."""
    made = Canary(tmp_path / "canary")
    yield made
    assert not made.path.exists(), "code of a hostile file ran"


@pytest.fixture
def rarelens(capsys):
    return CommandLine(capsys)


@pytest.fixture
def config(tmp_path):
    """Configuration file of a run on images that can be used."""

    def write(**values):
        whole = tiny_config(tmp_path / "images", tmp_path / "run").model_dump(mode="json") | values
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
        return tmp_path / "config.yaml"

    table(tmp_path / "images")
    return write


def test_the_canary_sings_where_it_is_let(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").is_dir()


class TestPickles:
    @pytest.mark.parametrize("manifest", [None, "{}", '{"format": 1, "world": 1, "files": {}, "extra": {}, "rank": 0}'])
    def test_a_checkpoint_that_no_manifest_vouches_for_is_not_loaded(self, tmp_path, canary, manifest, caplog):
        folder = tmp_path / "trial" / "checkpoints" / "00000001-epoch-0000" / "engine"
        folder.mkdir(parents=True)
        torch.save(canary, folder / "mp_rank_00_model_states.pt")
        if manifest:
            (folder.parent / "manifest.json").write_text(manifest)
        worker = SoloWorker("cpu", open_storage(tmp_path / "trial"), lambda metrics, folder: None)
        with worker.checkpoint() as found:
            assert found is None
        assert "manifest.json is" in caplog.text

    @pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.bin", "weights.safetensors"])
    def test_weights_are_never_unpickled(self, tmp_path, canary, rarelens, config, name):
        torch.save(canary, tmp_path / name)
        said = rarelens.refuses("train", config(), f"model.weights={tmp_path / name}")
        assert "pickles are never loaded" in said or "no safetensors file" in said

    @pytest.mark.parametrize("name", ["train_images", "train_labels"])
    def test_an_npz_of_objects(self, tmp_path, canary, rarelens, name):
        arrays = {"train_images": np.zeros((2, 8, 8), np.uint8), "train_labels": np.arange(2)}
        np.savez(tmp_path / "set.npz", **arrays | {name: np.array([canary, canary], dtype=object)})
        assert name in rarelens.refuses("pack", tmp_path / "set.npz", tmp_path / "packed")

    def test_a_parquet_table_of_pickled_objects(self, tmp_path, canary, rarelens):
        from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

        storage = pa.array([pickle.dumps(canary)], pa.large_binary())
        column = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), storage)
        save(tmp_path / "images" / "a.jpg", pattern(0))
        pq.write_table(pa.table({"image": ["a"], "label": column}), tmp_path / "images" / "labels.parquet")
        said = rarelens.refuses("pack", tmp_path / "images", tmp_path / "packed", "--labels", "labels.parquet")
        assert "column 'label' (source.label_column) holds" in said


class TestSources:
    @pytest.mark.parametrize("kind", ["csv", "parquet"])
    @pytest.mark.parametrize(
        "image", ["pipe:{}", "|{}", "$({})", "=cmd|'/C {}'!A0", "../../secret.jpg", "/etc/passwd", "http://127.0.0.1/x"]
    )
    def test_an_image_path_is_a_name_in_its_folder_and_nothing_else(self, tmp_path, canary, rarelens, kind, image):
        save(tmp_path / "secret.jpg", pattern(1))
        save(tmp_path / "deep" / "images" / "a.jpg", pattern(0))
        rows = [("a", "x"), (image.format(canary.shell), "y")]
        labels = tmp_path / "deep" / "images" / f"labels.{kind}"
        if kind == "csv":
            write_csv(labels, ["image", "label"], rows)
        else:
            pq.write_table(pa.table(dict(zip(("image", "label"), zip(*rows, strict=True), strict=True))), labels)
        said = rarelens.refuses("pack", labels.parent, tmp_path / "packed", "--labels", labels.name)
        assert "1 row without an image" in said

    def test_members_of_a_tar_stay_in_it(self, tmp_path, canary, rarelens):
        members = [(f"../{canary.path.name}.jpg", b"x"), (f"{canary.path}.jpg", b"x"), ("a/../../b.jpg", b"x")]
        good = [*sample_members("k", 1, "x"), *sample_members("l", 2, "y")]
        shard = write_tar(tmp_path / "in" / "s.tar", good + members)
        with tarfile.open(shard, "a") as tar:
            for name, kind in (("m.jpg", tarfile.SYMTYPE), ("n.jpg", tarfile.LNKTYPE)):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "/etc/passwd"
                tar.addfile(info)
        before = sorted(tmp_path.rglob("*"))
        assert "5 samples cannot be used" in rarelens.refuses("pack", shard, tmp_path / "packed")
        reasons = {entry["reason"] for entry in json.loads((tmp_path / "packed" / "damaged.json").read_text())}
        assert reasons == {
            "the member's name leads out of the shard",
            ".jpg is a link or special file, not an image or label",
        }
        assert [path for path in sorted(tmp_path.rglob("*")) if "packed" not in path.parts] == before

    @pytest.mark.parametrize(
        "command", ["pack PIPE packed", "audit PIPE", "predict PIPE a.jpg --out p.csv", "train PIPE"]
    )
    def test_no_pipe_is_opened(self, tmp_path, canary, rarelens, monkeypatch, command):
        monkeypatch.chdir(tmp_path)
        rarelens.refuses(*(f"pipe:{canary.shell}" if word == "PIPE" else word for word in command.split()))

    @pytest.mark.parametrize("key", ["source.path", "data.packed", "model.weights", "run"])
    def test_no_pipe_is_opened_for_a_setting(self, canary, rarelens, config, key, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for uri in (f"pipe://{canary.shell}", f"pipe:{canary.shell}"):
            settings = [f"{key}={uri}"] + ["source.path=null"] * (key in ("data.packed", "run"))
            rarelens.refuses("train", config(), *settings)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
    def test_pixel_bombs_are_refused_by_their_header(self, tmp_path, rarelens, kind):
        bomb = says_it_is(encoded(pattern(0), kind), kind, 60_000)
        for label in ("a", "b"):
            save(tmp_path / "in" / label / "good.png", pattern(ord(label)))
        (tmp_path / "in" / "a" / f"bomb.{kind.lower()}").write_bytes(bomb)
        said = rarelens.refuses("pack", tmp_path / "in", tmp_path / "packed")
        assert re.search("more than the 80000000 (pixels )?that are read", said)

    def test_a_picture_that_is_a_program_is_not_run(self, tmp_path, canary, rarelens):
        script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%{canary.shell}) (w) file\nshowpage\n"
        for label in ("a", "b"):
            save(tmp_path / "in" / label / "good.png", pattern(ord(label)))
        (tmp_path / "in" / "a" / "eps.jpg").write_text(script)
        assert "no image format that is known" in rarelens.refuses("pack", tmp_path / "in", tmp_path / "packed")

    @pytest.mark.parametrize("label", ["../../out", "/out", "a/b/c", "..", "<script>alert(1)</script>", "=1+1"])
    def test_a_class_name_is_no_path(self, tmp_path, rarelens, label):
        rows = [(f"{i}", ("other", label)[i % 2]) for i in range(20)]
        for name, _ in rows:
            save(tmp_path / "in" / f"{name}.png", pattern(int(name)))
        write_csv(tmp_path / "in" / "labels.csv", ["image", "label"], rows)
        status, said = rarelens("pack", tmp_path / "in", tmp_path / "packed", "--labels", "labels.csv")
        assert status == 0, said
        assert set(open_dataset(str(tmp_path / "packed")).classes) == {"other", label}
        assert {path.name for path in tmp_path.iterdir()} == {"in", "packed"}
        assert {name.partition("/")[0] for name in digests(tmp_path / "packed")} <= {
            "dataset.json", "index.parquet", "damaged.json", "train", "val", "test",
        }  # fmt: skip


class TestConfigurations:
    def test_tags_make_no_objects(self, tmp_path, canary, rarelens, config):
        good = config()
        for tag in canary.yaml:
            (tmp_path / "best.yaml").write_text(f"run: {tag}\n")
            assert "is not valid YAML" in rarelens.refuses("train", tmp_path / "best.yaml")
            assert "is not valid YAML" in rarelens.refuses("train", good, f"run={tag}")
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run" / "config.yaml").write_text(f"run: {tag}\n")
            assert "config.yaml is not valid YAML" in rarelens.refuses("train", good)

    @pytest.mark.parametrize(
        "text, reason",
        [
            (ALIASES, "unfolds to more than 100000 values"),
            ("a: &a [*a]", "nested too deeply"),
            ("a: " + "[" * 5000, "nested too deeply"),
            ("a: 2026-99-99", "is not valid YAML"),
            ("a: !!bool perhaps", "is not valid YAML"),
        ],
        ids=["aliases of aliases", "an alias in itself", "brackets", "date", "boolean"],
    )
    def test_what_exhausts_a_reader_is_refused(self, tmp_path, rarelens, text, reason):
        (tmp_path / "best.yaml").write_text(text)
        assert reason in rarelens.refuses("train", tmp_path / "best.yaml")
