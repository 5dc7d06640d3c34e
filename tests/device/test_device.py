"""On the accelerator of this machine, every op and the golden answers: `make gpu-check`, `make npu-check`."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from wemm import LLM, SamplingParams
from wemm.benchmark.ops import load_ops
from wemm.kernels import load_kernels
from wemm.ops.registry import DEFINITION, OPS
from wemm.platforms.npu import is_npu_present

pytestmark = pytest.mark.device

DEVICE = "npu" if is_npu_present() else "cuda"
load_ops()
load_kernels(DEVICE)
TESTS = Path(__file__).parents[1]
GOLDEN = json.loads((TESTS / "golden" / "golden.json").read_text())
CASES = [case for case in GOLDEN["cases"] if case["prompt_len"]]
PAIRS = [
    (name, implementation)
    for name, op in OPS.items()
    for implementation in (DEFINITION, *(i.name for i in op.implementations if i.device == DEVICE))
]


def _parity():
    spec = importlib.util.spec_from_file_location("parity", TESTS / "ops" / "test_parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch):
    if DEVICE == "cuda":
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(("name", "implementation"), PAIRS)
def test_parity(name, implementation):
    parity = _parity()
    ran = [parity.check(OPS[name], implementation, dtype, torch.device(DEVICE)) for dtype in parity.DTYPES]
    assert any(ran), "a kernel that takes no case is never compared"


@pytest.mark.parametrize("name", ["decode_attention", "prefill_attention"])
def test_parity_with_blocks_of_128_tokens(monkeypatch, name):
    """Kernels for NPUs then read keys and values where they lie in prefill, too."""
    monkeypatch.setattr(importlib.import_module(f"wemm.ops.{name}"), "_BLOCK_SIZE", 128)
    parity = _parity()
    for implementation in (i.name for i in OPS[name].implementations if i.device == DEVICE):
        assert any(parity.check(OPS[name], implementation, dtype, torch.device(DEVICE)) for dtype in parity.DTYPES)


def test_parity_of_long_sequences(monkeypatch):
    """Beyond the 512 and 2048 tokens at which fused attention may change its ways."""
    spans, parity, device = [(0, 700), (1500, 900), (2500, 1)], _parity(), torch.device(DEVICE)
    prefill, decode = (importlib.import_module(f"wemm.ops.{n}_attention") for n in ("prefill", "decode"))
    cases = {
        "prefill_attention": lambda inputs: {"long": prefill._case(inputs, *spans)},
        "decode_attention": lambda inputs: {"long": decode._case(inputs, 513, 2049, 3000)},
    }
    for name, make in cases.items():
        monkeypatch.setattr(OPS[name], "cases", make)
        for implementation in (DEFINITION, *(i.name for i in OPS[name].implementations if i.device == DEVICE)):
            assert any(parity.check(OPS[name], implementation, dtype, device) for dtype in parity.DTYPES)


@pytest.mark.parametrize(("dtype", "margin"), [("float32", 1e-3), ("float16", 0.02)])
def test_golden_answers(ask, golden_images, dtype, margin):
    with LLM("tiny", dtype=dtype, device=DEVICE) as llm:
        for case in CASES:
            images = [golden_images / case["image"]] if case["image"] else []
            params = SamplingParams(max_tokens=len(case["greedy_token_ids"]), ignore_eos=True)
            [output] = llm.chat(ask(case["text"], *images), params)
            close = [i for i, reference in enumerate(case["greedy_margins"]) if reference <= margin]
            comparable = close[0] if close else len(case["greedy_token_ids"])
            assert list(output.outputs[0].token_ids[:comparable]) == case["greedy_token_ids"][:comparable]


@pytest.mark.parametrize("block_size", [16, 128])
def test_nano_reads_images(ask, block_size):
    """In float16, with the head sizes that fused attention takes."""
    images = TESTS.parent / "docs" / "images"
    asked = [
        ask("What word is written here?", images / "word.png"),
        ask("图中的数字是多少？", images / "number.png"),
        ask("How many circles are there?", images / "shapes.png"),
    ]
    with LLM("nano", dtype="float16", device=DEVICE, block_size=block_size) as llm:
        outputs = llm.chat(asked, SamplingParams(max_tokens=8))
    assert [output.outputs[0].text.strip() for output in outputs] == ["WEMM", "2048", "3"]


def test_replayed_steps_are_computed_steps(ask):
    """Alone, and three as four."""
    if DEVICE == "npu":
        pytest.skip("no decode graphs on NPUs")
    questions = [ask("What is this?"), ask("为什么大海是蓝色的？"), ask("Once upon a time")]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    options = dict(dtype="float32", device=DEVICE, num_speculative_tokens=0, enable_prefix_caching=False)
    with LLM("nano", **options) as replayed, LLM("nano", enforce_eager=True, **options) as eager:
        for asked in (questions[:1], questions):
            expected, got = eager.chat(asked, params), replayed.chat(asked, params)
            assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in expected]
        graphs = replayed._open.engine._runner._decode_graphs._graphs
        assert graphs[1] is not None
        assert graphs[4] is not None
