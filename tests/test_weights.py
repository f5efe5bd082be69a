"""Starting weights by name and by path: timm's, the hub's (a server on loopback), folders, files; never a pickle."""

import hashlib
import http.server
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import UserError
from tests.canary import Canary
from trainer.config import ModelConfig
from trainer.model import build_model
from trainer.weights import conversion_command, load_backbone

SMALL = "test_resnet"
VIT = "test_vit"  # built for 160 px
COMMIT = "a" * 40


def build(weights, backbone=SMALL, px=32):
    config = ModelConfig(backbone=backbone, weights=str(weights), hidden_dim=8, embedding_dim=4)
    return build_model(config, 3, px).backbone.state_dict()


def same(state, tensors):
    return all(torch.equal(value, tensors[key]) for key, value in state.items())


def hub_folder(path, backbone=SMALL, **config):
    """As timm's `save_for_hf` leaves a model; the tensors."""
    path.mkdir(parents=True)
    torch.manual_seed(7)
    tensors = {key: value.contiguous() for key, value in timm.create_model(backbone).state_dict().items()}
    save_file(tensors, path / "model.safetensors")
    described = {"architecture": backbone, "num_classes": 1000, "pretrained_cfg": {"tag": "in1k"}}
    (path / "config.json").write_text(json.dumps(described | config))
    return tensors


def converts(command, in_a_shell=False):
    """Run the command that users are told to type; `python` is this Python, by default this very process."""
    python, option, program, *arguments = shlex.split(command)
    assert (python, option) == ("python", "-c")
    if in_a_shell:
        subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["-c", *arguments])
        exec(program, {})


class TestFolders:
    def test_a_folder_as_the_hub_has_it(self, tmp_path):
        tensors = hub_folder(tmp_path / "net")
        assert same(build(tmp_path / "net"), tensors)
        assert "fc.weight" in tensors  # its own classifier, passed over

    def test_position_tables_are_fitted_to_the_image_size(self, tmp_path):
        """A ViT of 160 px in a run of 64 px; its position table is what timm itself makes of it."""
        hub_folder(tmp_path / "net", VIT)
        state = build(tmp_path / "net", VIT, px=64)
        overlay = {"file": str(tmp_path / "net" / "model.safetensors")}
        expected = timm.create_model(VIT, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=64)
        assert same(state, expected.state_dict())
        assert state["pos_embed"].shape[1] < load_file(tmp_path / "net" / "model.safetensors")["pos_embed"].shape[1]

    @pytest.mark.parametrize(
        "change, message",
        [
            (
                {"architecture": "resnet18"},
                r"net' are of 'resnet18' and model\.backbone = 'test_resnet'; set model\.backbone=resnet18$",
            ),
            (
                {"architecture": None, "architectures": ["ResNetForImageClassification"]},
                r"names no architecture of timm's, the model is made for transformers; choose one of timm's",
            ),
            ({"architecture": None}, r"names no architecture of timm's, the model is made for another library"),
            (
                {"model_args": {"act_layer": "gelu", "img_size": 64}},
                r"of a 'test_resnet' built with another act_layer, which model\.backbone cannot say",
            ),
        ],
    )
    def test_a_folder_of_another_network(self, tmp_path, change, message):
        hub_folder(tmp_path / "net", **change)
        with pytest.raises(UserError, match=message):
            build(tmp_path / "net")

    @pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "3"])
    def test_a_description_that_is_none(self, tmp_path, text):
        hub_folder(tmp_path / "net")
        (tmp_path / "net" / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"net': config\.json is no JSON object; get the model again"):
            build(tmp_path / "net")

    def test_a_folder_that_lacks_a_file(self, tmp_path):
        hub_folder(tmp_path / "net")
        (tmp_path / "net" / "config.json").unlink()
        with pytest.raises(
            UserError, match=r"holds no config\.json that names its network; give .*model\.safetensors i"
        ):
            build(tmp_path / "net")
        (tmp_path / "net" / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"net': the folder holds no model\.safetensors$"):
            build(tmp_path / "net")

    def test_a_backbone_that_is_a_place(self):
        for name in ("hf-hub:timm/resnet18", "local-dir:/tmp", "some/folder"):
            with pytest.raises(
                UserError, match=re.escape(f"model.backbone = {name!r} is a place and no timm network;")
            ):
                build_model(ModelConfig(backbone=name), 3, 32)


class TestPickles:
    @pytest.mark.parametrize("wrap", ["plain", "state_dict", "model"])
    def test_the_command_in_the_refusal_makes_a_file_that_is_taken(self, tmp_path, wrap):
        state = timm.create_model(SMALL).state_dict()
        saved = {"plain": state, "state_dict": {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}}
        torch.save(saved.get(wrap, {"model": state}), tmp_path / "it's a net.pth")
        with pytest.raises(UserError) as refused:
            build(tmp_path / "it's a net.pth")
        said = str(refused.value)
        assert "since pickles are never loaded" in said and "if you trust whoever made it" in said and "\n" not in said
        converts(said[said.index("python -c") :], in_a_shell=wrap == "plain")
        assert same(build(tmp_path / "it's a net.safetensors"), state)

    def test_the_command_runs_no_code_either(self, tmp_path):
        torch.save({"state_dict": Canary(tmp_path / "canary")}, tmp_path / "net.bin")
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            converts(conversion_command(str(tmp_path / "net.bin")))
        assert not (tmp_path / "canary").exists()

    @pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.bin", "net.ckpt", "net.pth.tar"])
    def test_every_kind_is_refused_unread(self, tmp_path, name):
        with pytest.raises(UserError, match=r"must be a \.safetensors file, since pickles are never loaded"):
            build(tmp_path / name)  # nor looked for: it does not exist

    def test_one_in_a_bucket_is_converted_where_it_was_downloaded_to(self):
        with pytest.raises(UserError, match=r" net\.pth net\.safetensors$"):
            build("s3://bucket/folder/net.pth")

    def test_one_in_a_folder(self, tmp_path):
        hub_folder(tmp_path / "net")
        (tmp_path / "net" / "model.safetensors").rename(tmp_path / "net" / "pytorch_model.bin")
        with pytest.raises(
            UserError, match=r"holds no model\.safetensors; pickles are never loaded: convert it once: py"
        ):
            build(tmp_path / "net")

    def test_timms_weights_that_are_a_pickle(self):
        with pytest.raises(UserError, match=r"timm's weights of 'gcvit_xxtiny' are a pickle \(https://.* convert it: "):
            load_backbone(torch.nn.Module(), "gcvit_xxtiny", "timm")

    def test_what_is_neither(self):
        with pytest.raises(UserError, match=r"'resnet18' must be a \.safetensors file, a folder with config\.json and"):
            build("resnet18")


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol by which one file of a model is fetched."""

    folder: Path
    asked: list[str]

    def do_HEAD(self):
        self.send()

    def do_GET(self):
        self.send()

    def send(self):
        self.asked.append(f"{self.command} {self.path}")
        model, _, rest = self.path.removeprefix("/").partition("/resolve/")
        path = self.folder / model.replace("/", "--") / rest.partition("/")[2]
        data = path.read_bytes() if path.is_file() else b""
        self.send_response(200 if data else 404)
        if not data:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        """Not on the tests' stderr."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(its folder, its URL, what it was asked)."""
    Hub.folder, Hub.asked = tmp_path_factory.mktemp("hub"), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Hub.folder, f"http://127.0.0.1:{server.server_address[1]}", Hub.asked
    server.shutdown()
    thread.join()
    server.server_close()


HUB_PROGRAM = """
import sys, torch
from safetensors.torch import save_file
from cluster.errors import UserError
from tests.test_weights import build
for number, weights in enumerate(sys.argv[2:]):
    try:
        save_file({k: v.contiguous() for k, v in build(weights).items()}, f"{sys.argv[1]}/{number}.safetensors")
    except UserError as error:
        print(number, error)
"""


def test_models_on_a_hub(hub, tmp_path):
    """In a process of its own: the hub's library reads its address when it is imported."""
    folder, url, asked = hub
    tensors = hub_folder(folder / "someone--net")
    shutil.copytree(folder / "someone--net", folder / "timm--test_resnet.r160_in1k")
    hub_folder(folder / "someone--pickled")
    (folder / "someone--pickled" / "model.safetensors").rename(folder / "someone--pickled" / "pytorch_model.bin")
    hub_folder(folder / "someone--other", architecture="resnet18")
    names = ["hf-hub:someone/net", "hf-hub:someone/net@v2", "timm", "hf-hub:someone/pickled", "hf-hub:someone/other"]
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "PATH": "", "PYTHONPATH": "."}
    command = [sys.executable, "-c", HUB_PROGRAM, str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for number in range(3):
        assert same(load_file(tmp_path / f"{number}.safetensors"), tensors), done.stdout
    said = done.stdout.splitlines()
    assert re.match(
        r"3 model\.weights: someone/pickled on the hub holds no model\.safetensors; choose a model", said[0]
    )
    assert re.match(r"4 model\.weights = 'hf-hub:someone/other' are of 'resnet18' and model\.backbone = ", said[1])
    assert "HEAD /someone/net/resolve/v2/model.safetensors" in asked  # the same bytes, which the cache has
    assert "GET /timm/test_resnet.r160_in1k/resolve/main/model.safetensors" in asked
    assert not any(name.endswith(".bin") for name in asked)
