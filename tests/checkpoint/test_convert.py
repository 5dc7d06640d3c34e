"""`convert`: complete under its final name, or nothing there; the same numbers afterwards."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wemm import LLM, SamplingParams
from wemm.checkpoint.checkpoint import open_checkpoint
from wemm.checkpoint.convert import convert
from wemm.errors import CheckpointError, ParameterError, StorageError

ROOT = Path(__file__).parents[2]


def _tensors(directory):
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def _logprobs(directory, golden_images, ask):
    with LLM(str(directory), dtype="float32", device="cpu") as llm:
        [output] = llm.chat(ask("读", golden_images / "300x200.png"), SamplingParams(max_tokens=8, logprobs=20))
    return output.outputs[0].logprobs


def test_converted_weights_give_identical_logits(tiny, tmp_path, golden_images, ask):
    converted = convert(tiny, tmp_path / "out")
    assert converted.num_tensors == 94
    assert _logprobs(tiny, golden_images, ask) == _logprobs(tmp_path / "out", golden_images, ask)


def test_what_is_written(tiny, tmp_path):
    out = tmp_path / "out"
    convert(tiny, out)
    tensors = _tensors(out)
    assert not [name for name in tensors if "original_linear" in name]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "wemm"
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "float16"
    assert config["tokenizer_path"] == str(out)
    assert json.loads((out / "lora_adapter.json").read_text()) == {"wemm": str(out)}
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (8, 16)
    assert (out / "tokenizer.model").read_bytes() == (tiny / "tokenizer.model").read_bytes()
    assert (out / "tokenizer_config.json").exists()


def test_converting_twice_changes_nothing(tiny, tmp_path):
    convert(tiny, tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "twice")
    once, twice = _tensors(tmp_path / "once"), _tensors(tmp_path / "twice")
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tiny, tmp_path, dtype):
    convert(tiny, tmp_path / "out", dtype)
    source, result = _tensors(tiny), _tensors(tmp_path / "out")
    assert {t.dtype for t in result.values()} == {getattr(torch, dtype)}
    name = "language_model.model.layers.0.attention.wqkv"
    expected = source[f"{name}.original_linear.weight"].to(getattr(torch, dtype))
    assert torch.equal(result[f"{name}.weight"], expected)
    assert open_checkpoint(tmp_path / "out").dtype == dtype


def test_unknown_dtype(tiny, tmp_path):
    with pytest.raises(ParameterError, match="dtype must be float32, bfloat16, float16. Given: 'int8'"):
        convert(tiny, tmp_path / "out", "int8")


def test_a_foreign_adapter_directory_is_taken_in(tiny, tmp_path):
    """PLoRA that wins at load time is what the converted checkpoint holds, all in one place."""
    other = tmp_path / "other"
    other.mkdir()
    factors = {name: t * 3 for name, t in _tensors(tiny).items() if "Plora" in name}
    save_file(factors, other / "plora.safetensors")
    (other / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 4}')
    (tiny / "lora_adapter.json").write_text(json.dumps({"wemm": str(other)}))
    convert(tiny, tmp_path / "out")
    result = _tensors(tmp_path / "out")
    assert all(torch.equal(result[name], factor) for name, factor in factors.items())
    assert open_checkpoint(tmp_path / "out").plora.alpha == 4


def test_an_existing_target_is_kept_unless_forced(tiny, tmp_path):
    out = tmp_path / "out"
    convert(tiny, out)
    (out / "marker").touch()
    with pytest.raises(StorageError, match="out exists; give another directory, or --force"):
        convert(tiny, out)
    assert (out / "marker").exists()
    convert(tiny, out, force=True)
    assert not (out / "marker").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_force_replaces_checkpoints_only(tiny, tmp_path):
    """A slip of the hand (`--force ~`) must not delete what is no checkpoint."""
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    with pytest.raises(StorageError, match="holds something else than a checkpoint"):
        convert(tiny, precious, force=True)
    with pytest.raises(StorageError, match="is the source itself"):
        convert(tiny, tiny, force=True)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StorageError, match="exists and is not a directory"):
        convert(tiny, file, force=True)


def test_when_the_replacement_fails_the_old_checkpoint_is_back(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(tiny, out, "float32")
    rename = Path.rename

    def fail_once(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(StorageError, match="Input/output error"):
        convert(tiny, out, force=True)
    assert open_checkpoint(out).dtype == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


def test_a_name_no_directory_can_have(tiny, tmp_path):
    with pytest.raises(StorageError, match="cannot write"):
        convert(tiny, tmp_path / "a\0b")


def test_a_link_is_not_replaced(tiny, tmp_path):
    convert(tiny, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(StorageError, match="exists and is not a directory"):
        convert(tiny, tmp_path / "link", force=True)


def test_patterns_rslora_and_permissions_survive(tiny, tmp_path, edit_json):
    edit_json(tiny / "adapter_config.json", use_rslora=True, rank_pattern={"wo": 8}, alpha_pattern={"wo": 4})
    convert(tiny, tmp_path / "out")
    before, after = open_checkpoint(tiny).plora, open_checkpoint(tmp_path / "out").plora
    assert (after.use_rslora, after.rank_pattern, after.alpha_pattern) == (True, {"wo": 8}, {"wo": 4.0})
    assert after.scaling("x.attention.wo") == before.scaling("x.attention.wo")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_code_of_the_hub_is_not_referred_to(tiny, tmp_path):
    assert "auto_map" in json.loads((tiny / "config.json").read_text())
    convert(tiny, tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_what_was_written_is_read_back(tiny, tmp_path, monkeypatch):
    from wemm.checkpoint import convert as module

    write = module._write_shard
    monkeypatch.setattr(
        module,
        "_write_shard",
        lambda path, tensors, form, advance: write(path, tensors, replace(form, dtype="float32"), advance),
    )
    with pytest.raises(StorageError, match="was not written as it should be; check the disk"):
        convert(tiny, tmp_path / "out", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_a_broken_source_leaves_nothing(tiny, tmp_path):
    os.truncate(tiny / "model-00002-of-00003.safetensors", 1000)
    with pytest.raises(CheckpointError):
        convert(tiny, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_free_space_is_checked_first(tiny, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(StorageError, match="GiB needed, 0.00 GiB free; free some space"):
        convert(tiny, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


_CONVERT = "import sys; from wemm.cli import main; sys.exit(main(['convert', *sys.argv[1:]]))"


def _limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))


def test_a_disk_that_fills_up_while_writing(tiny, tmp_path):
    """A real refused write (a file size limit stands in for the full disk): one line, exit 2, nothing left."""
    result = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(tiny), str(tmp_path / "out")],
        preexec_fn=_limit_file_size, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot write")
    assert "the disk is full; nothing was left under that name" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


@pytest.mark.parametrize("stop_after", range(0, 94, 13))
def test_killed_at_any_point(tiny, tmp_path, stop_after):
    """SIGKILL after any tensor, also while replacing: the final name holds the old complete checkpoint or none."""
    out = tmp_path / "out"
    replacing = stop_after % 2 == 1
    if replacing:
        convert(tiny, out, "float32")
    script = f"""
import os, signal, sys, contextlib
from pathlib import Path
from wemm.checkpoint.convert import convert
@contextlib.contextmanager
def progress(*_):
    count = 0
    def advance(amount):
        nonlocal count
        if count == {stop_after}:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    yield advance
convert(Path({str(tiny)!r}), Path({str(out)!r}), "float16", {replacing}, progress)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert result.returncode == -signal.SIGKILL
    if replacing:
        assert open_checkpoint(out).dtype == "float32"
    else:
        assert not out.exists()
    convert(tiny, out, force=replacing)  # the next run succeeds
    assert open_checkpoint(out).dtype == "float16"


def test_interrupted_politely_nothing_is_left(tiny, tmp_path):
    from contextlib import contextmanager

    @contextmanager
    def progress(*_):
        def advance(amount):
            raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        convert(tiny, tmp_path / "out", progress=progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_the_original_command_line(tiny, tmp_path):
    script = ROOT / "examples/models/wemm/rename_weights.py"
    command = [
        sys.executable,
        str(script),
        "--src_model_path",
        str(tiny),
        "--save_directory",
        str(tmp_path / "out"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "94 tensors in 3 shards" in result.stdout
    assert len(open_checkpoint(tmp_path / "out").tensors) == 94
    assert subprocess.run(command, capture_output=True).returncode == 2


@pytest.mark.slow
def test_memory_stays_below_one_shard_plus_one_tensor(tmp_path):
    """Peak resident memory of a conversion, over that of one that writes next to nothing.

    A checkpoint of four 400 MB shards, largest tensor 105 MB; converted to float32, so that nothing can
    be a view of the file.
    """
    sizes = dict(vocab=25_600, hidden=2048, intermediate=8192, layers=4)
    big = _make_checkpoint(tmp_path / "big", **sizes)
    shard = max(path.stat().st_size for path in big.glob("*.safetensors"))
    largest = 4 * sizes["vocab"] * sizes["hidden"]
    small = _make_checkpoint(tmp_path / "small", vocab=640, hidden=64, intermediate=64, layers=1)
    assert _peak_rss(big, tmp_path / "a") - _peak_rss(small, tmp_path / "b") < shard + largest


_CONVERT_AND_MEASURE = """
import resource, sys
from wemm.cli import main
assert main(["convert", *sys.argv[1:]]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _peak_rss(source, target):
    command = [sys.executable, "-c", _CONVERT_AND_MEASURE, str(source), str(target), "--dtype", "float32"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1]) * 1024


def _make_checkpoint(directory, vocab, hidden, intermediate, layers):
    """Random weights of any size in the hub's layout, one layer per shard."""
    from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
    from wemm.checkpoint.config_file import parse_config
    from wemm.checkpoint.weight_map import expected_tensors

    tiny = BUNDLED_DIRECTORY / "tiny"
    directory.mkdir()
    data = json.loads((tiny / "config.json").read_text())
    data["text_config"] |= dict(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers
    )
    data["downsampler_config"]["llm_hidden_size"] = data["spliter_emb_config"]["embedding_dim"] = hidden
    (directory / "config.json").write_text(json.dumps(data))
    for name in ("tokenizer.model", "tokenizer_config.json", "adapter_config.json"):
        (directory / name).write_bytes((tiny / name).read_bytes())
    config = parse_config(data)
    shards = {}
    for name, spec in expected_tensors(config, config.lora_cfg).items():
        layer = name.split(".")[3] if ".layers." in name and name.startswith("language") else "rest"
        shards.setdefault(layer, {})[name] = torch.zeros(spec.shape, dtype=torch.float16)
    for layer, tensors in shards.items():
        save_file(tensors, directory / f"{layer}.safetensors")
    return directory
