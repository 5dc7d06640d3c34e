"""S22: a checkpoint from a stranger is read as numbers or refused: none of it is run, nothing outside is read."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.checkpoint.shards import INDEX_NAME

pytestmark = pytest.mark.security("S22")

WEIGHTS = "model-00001-of-00003.safetensors"


@pytest.fixture(autouse=True)
def _unharmed():
    """There is no service to harm: none may come up."""


@pytest.fixture(scope="module", autouse=True)
def _no_growth():
    """Nor one that could grow."""


class Trap:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


@pytest.fixture
def model(tmp_path):
    """A checkpoint that would be served, with a good shard beside it and code that its config.json names."""
    directory = tmp_path / "model"
    shutil.copytree(BUNDLED_DIRECTORY / "tiny", directory)
    shutil.copy(directory / WEIGHTS, tmp_path / "outside.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {name: f"trap.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    (directory / "config.json").write_text(json.dumps(config))
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'sprung')!r}).touch()\n"
    for name in ("trap.py", "sitecustomize.py", "conftest.py", "__init__.py", "setup.py"):
        (directory / name).write_text(code)
    return directory


def trap(directory):
    return pickle.dumps(Trap(directory.parent / "sprung"))


def without_safetensors(directory):
    for path in directory.glob("*.safetensors*"):
        path.unlink()


def indexed(directory, name):
    """The index, with one of its shards under another name."""
    index = json.loads((directory / INDEX_NAME).read_text())
    index["weight_map"] = {key: name if file == WEIGHTS else file for key, file in index["weight_map"].items()}
    (directory / INDEX_NAME).write_text(json.dumps(index))


def pickles_alone(directory):
    without_safetensors(directory)
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "model.pth",
        "consolidated.00.pth",
        "model.ckpt",
        "training_args.bin",
    ):
        (directory / name).write_bytes(trap(directory))


def pickle_in_the_index(directory):
    (directory / "pytorch_model.bin").write_bytes(trap(directory))
    indexed(directory, "pytorch_model.bin")


def pickle_under_another_name(directory):
    (directory / WEIGHTS).write_bytes(trap(directory))


def parent_in_the_index(directory):
    indexed(directory, "../outside.safetensors")


def absolute_path_in_the_index(directory):
    indexed(directory, str(directory.parent / "outside.safetensors"))


def endless_header(directory):
    path = directory / WEIGHTS
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def tensor_beyond_the_file(directory):
    path = directory / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header[name] |= {"shape": [2**40], "data_offsets": [header[name]["data_offsets"][0], 2**42]}
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])


def shard_linked_outside(directory):
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to("../outside.safetensors")


def shard_that_never_ends(directory):
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to("/dev/zero")


def deep_index(directory):
    (directory / INDEX_NAME).write_text('{"weight_map":' + "[" * 10**6)


REFUSED = {
    pickles_alone: "other weight formats are not read",
    pickle_in_the_index: "not a complete safetensors file",
    pickle_under_another_name: "not a complete safetensors file",
    parent_in_the_index: "must be a plain file name",
    absolute_path_in_the_index: "must be a plain file name",
    endless_header: "not a complete safetensors file",
    tensor_beyond_the_file: "not a complete safetensors file",
    shard_linked_outside: "links outside the checkpoint directory",
    shard_that_never_ends: "shard is missing",
    deep_index: "not readable as JSON",
}


def case(spoil):
    """Each takes some seconds; one of them is for every day."""
    marks = [] if spoil is pickles_alone else [pytest.mark.slow]
    return pytest.param(spoil, REFUSED[spoil], id=spoil.__name__, marks=marks)


@pytest.mark.parametrize(("spoil", "reason"), [case(spoil) for spoil in REFUSED])
def test_a_hostile_checkpoint_is_refused_in_one_line(model, spoil, reason):
    spoil(model)
    command = [sys.executable, "-m", "wemm", "serve", "--model", str(model), "--device", "cpu", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert reason in last
    assert "Traceback" not in ended.stderr
    assert not (model.parent / "sprung").exists()


def test_the_trap_would_spring(model):
    pickle.loads(trap(model))
    assert (model.parent / "sprung").exists()


@pytest.mark.slow
def test_code_beside_good_weights_is_not_run(model, serve):
    service = serve("--no-warm-up", model=str(model)).wait_until_ready()
    assert service.stop() == 0
    assert not (model.parent / "sprung").exists()
