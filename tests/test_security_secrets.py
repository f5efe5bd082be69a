"""Secrets stay where they are, and no module runs what it reads.

`test_cli.py` looks for planted secrets in everything that a whole run leaves.
"""

import ast
import traceback
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from cluster.storage import open_storage, worker_environment
from tests.canary import CommandLine
from tests.planted import SECRETS, files_below, leaks

ROOT = Path(__file__).parent.parent
PACKAGES = ("cluster", "data_pipeline", "trainer", "tuning", "benchmarks")
MODULES = [ROOT / "rarelens.py", *sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]
NEVER = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load",
    "cloudpickle.loads", "marshal.loads", "shelve.open", "joblib.load", "dill.load", "dill.loads", "os.system",
    "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "torch.hub.load", "tar.extract", "tar.extractall",
    "shutil.unpack_archive", "importlib.import_module",
}  # fmt: skip
SECRET = SECRETS["AWS_SECRET_ACCESS_KEY"].replace("/", "")


@pytest.fixture
def planted(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def wrong_calls(tree):
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in NEVER or name.endswith((".extractall", ".unpack_archive")):
            yield call.lineno, name
        if name == "torch.load" and given.get("weights_only") != "True":
            yield call.lineno, "torch.load without weights_only=True"
        if given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
            yield call.lineno, f"{name} with {given}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_runs_what_it_reads(path):
    assert list(wrong_calls(ast.parse(path.read_text()))) == []


def test_the_walk_finds_what_it_looks_for():
    text = "eval(x); torch.load(f); torch.load(f, weights_only=False); subprocess.run(c, shell=True); tar.extractall()"
    assert len(list(wrong_calls(ast.parse(text)))) == 5


def test_the_search_finds_what_it_looks_for(tmp_path):
    pq.write_table(pa.table({"a": [SECRETS["HF_TOKEN"]] * 9}), tmp_path / "t.parquet", compression="zstd")
    (tmp_path / "log").write_text("Authorization: planted%2Fsecret%2Bkey%2Fof%2Fthe%2Ftests")
    assert leaks(files_below(tmp_path)) == [
        (str(tmp_path / "log"), "AWS_SECRET_ACCESS_KEY"),
        (str(tmp_path / "t.parquet"), "HF_TOKEN"),
    ]


@pytest.mark.parametrize("where", ["bucket", "endpoint", "profile", "proxy", "unreachable"])
def test_no_error_holds_a_secret_with_its_whole_chain(moto_s3, planted, monkeypatch, tmp_path, where):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    hostile = f"http://user:{SECRET}@127.0.0.1:9"
    if where == "endpoint":
        monkeypatch.setenv("AWS_ENDPOINT_URL", hostile)
    if where == "unreachable":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    if where == "proxy":
        monkeypatch.setenv("http_proxy", hostile)
    if where == "profile":
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        (tmp_path / "aws").write_text(f"[default]\nendpoint_url = {hostile}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws"))
    (tmp_path / "file").write_bytes(b"x")
    storage = open_storage("s3://no-such-bucket/x")
    for ask in (storage.list, lambda: storage.read("a"), lambda: storage.upload(tmp_path / "file", "a")):
        with pytest.raises(UserError) as error:
            ask()
        said = "".join(traceback.format_exception(error.value))
        assert SECRET not in said and leaks([("said", said.encode())]) == []


@pytest.mark.parametrize(
    "setting",
    [
        f"run=s3://user:{SECRET}@bucket/x",
        f"run=s3://{SECRET}@bucket/x",
        f"data.packed=s3://bucket/x?X-Amz-Signature={SECRET}",
        f"source.path=https://user:{SECRET}@host/x",
        f"model.weights=https://bucket/x.safetensors?X-Amz-Signature={SECRET}",
        f"source.class_names=[a, 'ftp://user:{SECRET}@host']",
        f"stage_one.deepspeed.x.y=http://user:{SECRET}@host",
    ],
)
def test_a_setting_with_a_secret_is_refused_and_not_repeated(setting, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"run: {tmp_path / 'run'}\n")
    said = CommandLine(capsys).refuses("train", tmp_path / "c.yaml", setting)
    assert f"{setting.partition('=')[0]}" in said and "give credentials by environment" in said
    assert SECRET not in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("uri", [f"s3://user:{SECRET}@bucket/x", f"s3://bucket/x?X-Amz-Signature={SECRET}"])
def test_a_uri_with_a_secret_is_not_repeated(uri, tmp_path, capsys):
    rarelens = CommandLine(capsys)
    for command in (["train", f"{uri}/c.yaml"], ["audit", uri], ["predict", uri, "x.jpg", "--out", tmp_path / "p.csv"]):
        assert SECRET not in rarelens.refuses(*command), command


def test_workers_are_told_where_the_storage_is_and_no_secret(planted, moto_s3):
    assert leaks([("environment", str(worker_environment()).encode())]) == []
