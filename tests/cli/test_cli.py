"""The program as a user meets it: answers on stdout, one `error:` line and exit 2 for every mistake."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from wemm.cli import main

IMAGES = Path(__file__).parents[1] / "golden" / "images"
TEXT = ["generate", "--model", "tiny", "--device", "cpu", "--prompt", "hi"]


@pytest.fixture
def run(capsys):
    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def _assert_one_error(result, *parts):
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_generate_prints_the_answer(run, golden):
    case = golden["cases"][3]
    image = IMAGES / case["image"]
    status, out, err = run(
        "generate", "-m", "tiny", "--dtype", "float32", "--device", "cpu", "-i", image, "-p", case["text"],
        "--max-tokens", 16, "--ignore-eos",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert out == case["greedy_text"] + "\n"


def test_generate_json(run, golden):
    case = golden["cases"][0]
    status, out, _ = run(
        "generate", "--model", "tiny", "--dtype", "float32", "--device", "cpu", "--image", IMAGES / case["image"],
        "--prompt", case["text"], "--max-tokens", 16, "--json",
    )  # fmt: skip
    assert status == 0
    answer = json.loads(out)
    assert answer["text"] == case["greedy_text"]
    assert answer["token_ids"] == case["greedy_token_ids"]
    assert (answer["prompt_tokens"], answer["image_tokens"]) == (case["prompt_len"], case["num_image_tokens"])
    assert answer["finish_reason"] == "length"
    assert answer["timings"]["total"] > 0


def test_several_images_in_order(run):
    a, b = IMAGES / "33x21.png", IMAGES / "1x1.png"
    texts = [run(*TEXT, "--json", "--max-tokens", "8", "-i", x, "-i", y)[1] for x, y in ((a, b), (b, a))]
    first, second = (json.loads(text) for text in texts)
    assert first["image_tokens"] == second["image_tokens"] == 42 + 66
    assert first["token_ids"] != second["token_ids"]


def test_sampling_options_reach_the_sampler(run):
    base = [*TEXT, "--json", "--max-tokens", "8", "--ignore-eos"]
    greedy = json.loads(run(*base)[1])["token_ids"]
    hot = json.loads(run(*base, "--temperature", "3", "--seed", "1")[1])["token_ids"]
    assert json.loads(run(*base, "--temperature", "3", "--seed", "1")[1])["token_ids"] == hot
    assert json.loads(run(*base, "--temperature", "3", "--seed", "2")[1])["token_ids"] != hot
    assert greedy != hot
    assert json.loads(run(*base, "--temperature", "3", "--top-k", "1")[1])["token_ids"] == greedy
    text = json.loads(run(*base)[1])["text"]
    stopped = json.loads(run(*base, "--stop", text[2:4])[1])
    assert stopped["text"] == text[: text.index(text[2:4])]
    assert stopped["finish_reason"] == "stop"


def _png_bomb(path, width, height):
    """A tiny file whose header promises width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_wrong_images(run, tmp_path):
    text = tmp_path / "note.txt"
    text.write_text("not a picture")
    empty = tmp_path / "empty.png"
    empty.touch()
    whole, truncated = tmp_path / "whole.jpg", tmp_path / "truncated.jpg"
    Image.effect_noise((300, 300), 50).save(whole)
    truncated.write_bytes(whole.read_bytes()[:-3000])
    cases = {
        text: "not an image in one of the formats JPEG, PNG, WEBP, GIF, BMP",
        truncated: "JPEG image is damaged or truncated",
        _png_bomb(tmp_path / "bomb.png", 30_000, 30_000): "image of 900000000 pixels is too large",
        _png_bomb(tmp_path / "large.png", 12_000, 9_000): "image of 12000x9000 pixels is too large",
        empty: "is empty: 0 bytes",
        tmp_path / "absent.png": "No such file",
        tmp_path: "is not a regular file",
    }
    for path, message in cases.items():
        _assert_one_error(run(*TEXT, "--image", path), "messages[0].content[0].image", message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "max_tokens must be an integer in [1, 2147483647]. Given: 0"),
        (["--max-tokens", "many"], "--max-tokens"),
        (["--temperature", "nan"], "temperature must be a finite number in [0, 10000]. Given: nan"),
        (["--temperature", "-1"], "Given: -1"),
        (["--top-p", "0"], "top_p must be a finite number in [1e-06, 1]"),
        (["--dtype", "int3"], "dtype must be auto, float32, bfloat16, float16. Given: 'int3'"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
        (["--device", "meta"], "device 'meta' holds no data"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--load-format", "gguf"], "load_format must be auto or dummy"),
        (["--kv-cache-memory", "lots"], "a size is written like 4GiB"),
        (["--kv-cache-memory", "1KiB"], "--kv-cache-memory"),
        (
            ["--max-model-len", "12", "--prompt", "Why is the ocean blue?"],
            "has 18 tokens, but max_model_len 12 leaves",
        ),
        (["--tensor-parallel-size", "3"], "tensor_parallel_size must be 1, 2, 4 or 8. Given: 3"),
        (["--model", "/nonexistent"], "no model '/nonexistent'"),
        (["--model", "wemm-chat-2k-cn"], "add --load-format dummy"),
        (["--frobnicate"], "--frobnicate"),
        (["surplus"], "surplus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(run, arguments, message):
    base = TEXT if "--prompt" not in arguments else TEXT[:-2]
    _assert_one_error(run(*base, *arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "hi"], "--model"),
        (["generate", "--model", "tiny"], "--prompt"),
        (["frob"], "frob"),
        (["info", "nosuch"], "no model 'nosuch'"),
        (["info", "tiny", "--image-size", "0x5"], "--image-size is WIDTHxHEIGHT in pixels, such as 640x480"),
        (["info", "tiny", "--image-size", "big"], "Given: 'big'"),
        (["convert", "nosuch", "out"], "no model 'nosuch'"),
        (["convert", "tiny", "out", "--dtype", "int8"], "dtype must be"),
        (["bench", "ops", "--only", "frob"], "no op 'frob'; there are"),
        (["bench", "ops", "--dtype", "int8"], "dtype must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_commands(run, arguments, message):
    _assert_one_error(run(*arguments), message)


def test_not_enough_memory_shows_the_plan(run, monkeypatch):
    monkeypatch.setattr("wemm.platforms.cpu.CpuPlatform.available_memory", lambda self: 16 * 2**30)
    result = run("generate", "-m", "wemm-chat-2k-cn", "--load-format", "dummy", "--device", "cpu", "-p", "hi")
    _assert_one_error(result, "weights 17.6 GiB (bfloat16)", "16.0 GiB are available")


def _truncate(tensors, index, shard):
    return shard.read_bytes()[:5000]


def _change(tensors, index, shard, name, tensor):
    if tensor is None:
        del tensors[name], index["weight_map"][name]
    else:
        tensors[name] = tensor
        index["weight_map"][name] = shard.name
    return save(tensors)


def _point_outside(tensors, index, shard):
    index["weight_map"]["downsampler.group_op.weight"] = "../../etc/passwd"
    return shard.read_bytes()


CONV = "downsampler.group_op.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "model-00001-of-00003.safetensors: not a complete safetensors file"),
        (partial(_change, name=CONV, tensor=None), f"1 tensors missing: {CONV}"),
        (partial(_change, name="surplus", tensor=torch.ones(2)), "1 unexpected tensors: surplus"),
        (partial(_change, name=CONV, tensor=torch.ones(2)), f"{CONV} is [2] but must be [128, 48, 4, 4]"),
        (_point_outside, "'../../etc/passwd' must be a plain file name"),
    ],
    ids=["truncated shard", "missing tensor", "extra tensor", "wrong shape", "index points outside"],
)
def test_a_damaged_checkpoint(run, tiny, damage, message):
    """Every command refuses it in one line; the source stays as it is and nothing is written."""
    shard, index_path = tiny / "model-00001-of-00003.safetensors", tiny / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard.write_bytes(damage(load_file(shard), index, shard))
    index_path.write_text(json.dumps(index))
    before = {path: path.read_bytes() for path in tiny.iterdir()}
    for command in (["generate", "-m", tiny, "-p", "hi"], ["info", tiny], ["convert", tiny, tiny.parent / "out"]):
        _assert_one_error(run(*command), message)
    assert {path: path.read_bytes() for path in tiny.iterdir()} == before
    assert [path.name for path in tiny.parent.iterdir()] == ["tiny"]


def test_a_directory_without_config(run, tmp_path):
    _assert_one_error(run("generate", "-m", tmp_path, "-p", "hi"), "has no config.json")


def test_ours_is_not_the_users(run, monkeypatch):
    """What is not the caller's fault exits 1, still as one line."""
    from wemm.errors import NumericalError

    def fail(self, *batch):
        raise NumericalError("language_model", "bfloat16")

    monkeypatch.setattr("wemm.engine.model_runner.ModelRunner.forward", fail)
    status, _, err = run(*TEXT)
    assert status == 1
    assert err == "error: NaN or Inf in stage 'language_model' computed in bfloat16; try --dtype float32\n"


def test_an_error_is_one_line_whatever_it_quotes(run):
    _assert_one_error(run("info", "a\nb"))


def test_a_typo_does_not_cost_the_loading(run, monkeypatch):
    def load(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("wemm.engine.llm.build_engine", load)
    _assert_one_error(run(*TEXT, "--max-tokens", "0"), "max_tokens must be")


def test_defaults_of_the_checkpoint_reach_the_command(run, tiny):
    (tiny / "generation_config.json").write_text('{"max_new_tokens": 3}')
    answer = json.loads(run("generate", "-m", tiny, "-p", "hi", "--json", "--ignore-eos")[1])
    assert len(answer["token_ids"]) == 3


def test_info_of_the_preset_without_plora(run):
    assert json.loads(run("info", "wemm-chat-2k-cn", "--no-plora", "--json")[1])["plora"] is None


def test_interrupted(run, monkeypatch):
    def interrupt(self, *batch):
        raise KeyboardInterrupt

    monkeypatch.setattr("wemm.engine.model_runner.ModelRunner.forward", interrupt)
    status, _, err = run(*TEXT)
    assert (status, err) == (130, "")


COMMANDS = [
    [], ["generate"], ["chat"], ["info"], ["convert"],
    ["bench"], ["bench", "ops"], ["bench", "throughput"], ["bench", "latency"],
    ["bench", "serve"], ["bench", "all"],
]  # fmt: skip


@pytest.mark.parametrize("command", [[], *([*command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help(run, command):
    status, out, err = run(*command)
    assert (status, err) == (0, "")
    assert "Usage: wemm" in out


def test_help_names_every_engine_option(run):
    from wemm.config import EngineConfig

    out = run("generate", "--help")[1]
    for name in EngineConfig.help():
        assert f"--{name.replace('_', '-')}" in out


def test_version(run):
    from wemm import __version__

    assert run("--version") == (0, f"wemm {__version__}\n", "")


def test_info_of_the_preset(run):
    status, out, _ = run("info", "wemm-chat-2k-cn", "--json", "--image-size", "640x480")
    report = json.loads(out)
    assert status == 0
    assert report["parameters"]["total"] == 9_455_743_216
    assert report["image"]["num_tokens"] == 947
    assert report["memory"]["float16"] == {"weights": 2 * 9_455_743_216, "kv_per_token": 131_072}
    assert len(report["plora"]["linears"]) == 160
    assert set(map(str, report["plora"]["linears"].values())) == {"{'rank': 512, 'scaling': 1.0}"}


def test_info_of_a_checkpoint(run, tiny):
    status, out, _ = run("info", tiny)
    assert status == 0
    for part in ("float16", "PLoRA on image tokens", "adapter_config.json", "attention.wqkv", "0-2",
                 "model-00001-of-00003.safetensors", "vision tower", "1,129,680"):  # fmt: skip
        assert part in out
    assert "PLoRA: off" in run("info", tiny, "--no-plora")[1]


def test_convert(run, tmp_path):
    status, out, err = run("convert", "tiny", tmp_path / "out", "--dtype", "bfloat16")
    assert (status, err) == (0, "")
    assert "94 tensors in 3 shards" in out
    _assert_one_error(run("convert", "tiny", tmp_path / "out"), "exists; give another directory, or --force")
    assert run("convert", "tiny", tmp_path / "out", "--force")[0] == 0


def test_chat_reads_a_conversation_from_a_pipe():
    script = "Why?\n/image nosuch.png\n/image {image}\nWhat is it?\n/frob\n/help\n/clear\nWhy?\n/exit\nnever\n"
    result = subprocess.run(
        [sys.executable, "-m", "wemm", "chat", "--model", "tiny", "--dtype", "float32", "--device", "cpu",
         "--max-tokens", "6"],
        input=script.format(image=IMAGES / "33x21.png"), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0
    first, second, *rest = result.stdout.split("\n")
    assert rest[-2] == first  # after /clear the same question gets the same answer
    assert second != first
    assert "/image PATH" in result.stdout
    assert result.stderr.count("error:") == 2
    assert "'nosuch.png' cannot be read" in result.stderr
    assert "no command /frob" in result.stderr


def test_a_reader_that_leaves_early():
    """`wemm info | head -1` ends quietly."""
    command = f"{sys.executable} -m wemm info tiny | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.stderr == ""
    assert result.stdout.startswith("tiny")


SMALL_WORK = ["-m", "tiny", "--device", "cpu", "--requests", "3", "--image-size", "20x30", "--output-len", "3"]


@pytest.fixture
def small_probes(monkeypatch):
    """Ceilings of a cache: nothing here looks at their size."""
    monkeypatch.setattr("wemm.benchmark.ceilings._PROBE_BYTES", 2**22)
    monkeypatch.setattr("wemm.benchmark.ceilings._PROBE_SECONDS", 0.01)
    monkeypatch.setattr("wemm.benchmark.ceilings._GEMM_SIZES", {"cpu": (64,)})


def test_bench_throughput(run, tmp_path):
    """Three questions about one picture: a table, a picture, one JSON line; the picture is encoded once."""
    arguments = [*SMALL_WORK, "--images", "1", "--plot", tmp_path / "bars.png"]
    status, out, _ = run("bench", "throughput", *arguments)
    assert status == 0
    line = json.loads(out.splitlines()[-1])
    assert line["benchmark"] == "throughput"
    assert set(line["results"]) == {"together", "one by one"}
    for result in line["results"].values():
        assert result["num_tower_calls"] == 1
        assert result["requests_per_s"] * result["seconds"] == pytest.approx(3)
        assert result["output_tokens_per_s"] * result["seconds"] == pytest.approx(9)
    assert "together" in out
    assert f"{line['speed_up']:.1f} times as fast" in out
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.width == 840


def test_bench_latency(run, tmp_path, small_probes):
    """Every request pays for its own image; requests are filled up to whole batches."""
    files = {option: tmp_path / f"x.{option[2:]}" for option in ("--csv", "--report")}
    options = [*SMALL_WORK, "--batch", "2", "--plot", tmp_path / "bars.svg"]
    status, out, _ = run("bench", "latency", *options, *(part for pair in files.items() for part in pair))
    assert status == 0
    line = json.loads(out.splitlines()[-1])
    seconds = line["seconds"]
    assert line["settings"]["num_requests"] == 4
    assert seconds["vision"]["median"] > 0
    assert seconds["total"]["worst"] >= seconds["first_token"]["worst"] > 0
    assert (tmp_path / "bars.svg").read_text().startswith("<?xml")
    assert files["--csv"].read_text(encoding="utf-8").splitlines()[0].startswith("stage,median (ms)")
    assert "<html" in files["--report"].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size", "640"], "an image size is written like 640x480, or none for text alone. Given: '640'"),
        (["--image-size", "0x5"], "Given: '0x5'"),
        (["--plot", "bars.xyz"], "--plot bars.xyz:"),
        (["--csv", "absent/table.csv"], "--csv absent/table.csv: there is no directory absent"),
        (["--requests", "0"], "Invalid value for '--requests'"),
    ],
)
def test_bench_mistakes(run, arguments, message):
    status, _, err = run("bench", "throughput", *SMALL_WORK, "--no-compare", *arguments)
    assert status == 2
    assert message in err


def test_bench_ops(run, small_probes):
    options = ["--device", "cpu", "--only", "rms_norm", "--dtype", "float32", "--shapes", "nano"]
    status, out, _ = run("bench", "ops", *options, "--seconds", "0.01")
    assert status == 0
    report = json.loads(out.splitlines()[-1])
    assert set(report["ceilings"]) >= {"read_gb_per_s", "copy_gb_per_s", "gemm_gflop_per_s"}
    assert {r["op"] for r in report["ops"]} == {"rms_norm"}
    assert all(r["microseconds"] > 0 for r in report["ops"])
    assert {r["bound"] for r in report["ops"]} <= {"memory", "compute"}


def test_bench_all_is_one_line_and_one_report(run, tmp_path, small_probes):
    options = ["--seconds", "0.001", "--report", tmp_path / "speed.html"]
    status, out, _ = run("bench", "all", *SMALL_WORK, *options)
    assert status == 0
    results = json.loads(out.splitlines()[-1])["results"]
    assert [result["benchmark"] for result in results] == ["latency", "throughput", "ops"]
    assert {result["settings"]["dtype"] for result in results} == {results[0]["settings"]["dtype"]}
    assert results[2]["settings"]["shapes"] == "tiny"
    assert "tiny" in (tmp_path / "speed.html").read_text(encoding="utf-8")


def test_bench_serve_without_a_server_says_so(run):
    _assert_one_error(
        run("bench", "serve", "--base-url", "http://127.0.0.1:9/v1", "--model", "m"), "no answer from"
    )


def test_help_does_not_wait_for_torch():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "wemm", "--help"], capture_output=True, text=True, check=True
    )
    assert "| torch\n" not in result.stderr.replace("  ", "")
