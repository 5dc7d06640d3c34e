"""On the accelerator of this machine: every op and the golden answers. Run by `make gpu-check`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from wemm import LLM, SamplingParams
from wemm.benchmark.ops import load_ops
from wemm.kernels import load_kernels
from wemm.ops.registry import DEFINITION, OPS

pytestmark = pytest.mark.device

load_ops()
load_kernels("cuda")
TESTS = Path(__file__).parents[1]
GOLDEN = json.loads((TESTS / "golden" / "golden.json").read_text())
CASES = [case for case in GOLDEN["cases"] if case["prompt_len"]]
PAIRS = [
    (name, implementation)
    for name, op in OPS.items()
    for implementation in (DEFINITION, *(i.name for i in op.implementations if i.device == "cuda"))
]


def _parity():
    spec = importlib.util.spec_from_file_location("parity", TESTS / "ops" / "test_parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(("name", "implementation"), PAIRS)
def test_parity(name, implementation):
    parity = _parity()
    ran = [parity.check(OPS[name], implementation, dtype, torch.device("cuda")) for dtype in parity.DTYPES]
    assert any(ran), "a kernel that takes no case is never compared"


def test_golden_answers(ask, golden_images):
    with LLM("tiny", dtype="float32", device="cuda") as llm:
        for case in CASES:
            images = [golden_images / case["image"]] if case["image"] else []
            params = SamplingParams(max_tokens=len(case["greedy_token_ids"]), ignore_eos=True)
            [output] = llm.chat(ask(case["text"], *images), params)
            close = [i for i, margin in enumerate(case["greedy_margins"]) if margin <= 1e-3]
            comparable = close[0] if close else len(case["greedy_token_ids"])
            assert list(output.outputs[0].token_ids[:comparable]) == case["greedy_token_ids"][:comparable]


def test_replayed_steps_are_computed_steps(ask):
    """Alone, and three as four."""
    questions = [ask("What is this?"), ask("为什么大海是蓝色的？"), ask("Once upon a time")]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    options = dict(dtype="float32", device="cuda", num_speculative_tokens=0, enable_prefix_caching=False)
    with LLM("nano", **options) as replayed, LLM("nano", enforce_eager=True, **options) as eager:
        for asked in (questions[:1], questions):
            expected, got = eager.chat(asked, params), replayed.chat(asked, params)
            assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in expected]
        graphs = replayed._open.engine._runner._decode_graphs._graphs
        assert graphs[1] is not None
        assert graphs[4] is not None
