"""On the accelerator of this machine: every op, and whole answers. Run by `make gpu-check`, `make npu-check`."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from wemm import LLM, SamplingParams
from wemm.benchmark.ops import load_ops, model_shapes
from wemm.config import PRESETS
from wemm.cost import largest_image
from wemm.engine.engine import Engine
from wemm.kernels import load_kernels
from wemm.ops.registry import DEFINITION, OPS, Inputs
from wemm.platforms import resolve_platform
from wemm.platforms.npu import is_npu_present

pytestmark = pytest.mark.device

load_ops()
TESTS = Path(__file__).parents[1]
GOLDEN = json.loads((TESTS / "golden" / "golden.json").read_text())
CASES = [case for case in GOLDEN["cases"] if case["prompt_len"]]
PICTURES = TESTS.parent / "docs" / "images"


def _parity():
    spec = importlib.util.spec_from_file_location("parity", TESTS / "ops" / "test_parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PARITY = _parity()
LONG = {
    "decode_attention": [513, 2049, 3000],
    "prefill_attention": [(0, 700), (1500, 900), (2500, 1)],
}
"""Beyond the 512 and 2048 tokens at which fused attention may change its ways."""


def _device(config):
    if config.getoption("--dry-run"):
        return "cpu"
    return "npu" if is_npu_present() else "cuda"


@pytest.fixture
def device(request):
    return _device(request.config)


def pytest_generate_tests(metafunc):
    if "implementation" in metafunc.fixturenames:
        device = _device(metafunc.config)
        load_kernels(device)
        found = [(op, i.name) for op in OPS.values() for i in op.implementations if i.device == device]
        pairs = [(op, DEFINITION) for op in OPS.values()] + found
        argument = "op"
        if "paged_op" in metafunc.fixturenames:
            argument, pairs = "paged_op", [pair for pair in pairs if pair[0].name in LONG]
        metafunc.parametrize((argument, "implementation"), pairs, ids=[f"{op.name}-{name}" for op, name in pairs])


@pytest.fixture(autouse=True)
def _full_float32():
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    yield
    products.allow_tf32, convolutions.allow_tf32 = before


def test_parity(op, implementation, device):
    ran = [PARITY.check(op, implementation, dtype, torch.device(device)) for dtype in PARITY.DTYPES]
    assert any(ran), "a kernel that takes no case is never compared"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parity_at_the_sizes_of_the_model(op, implementation, dtype, device):
    shapes = model_shapes("tiny" if device == "cpu" else "wemm-chat-2k-cn")
    for name, make in op.model_cases(Inputs(dtype, torch.device(device)), shapes).items():
        PARITY.compare(op, implementation, name, make(), dtype)


@pytest.mark.parametrize("block_size", [16, 128])
def test_parity_over_pages(paged_op, implementation, device, monkeypatch, block_size):
    """Kernels for NPUs read blocks of 128 tokens where they lie, and gather smaller ones."""
    module = importlib.import_module(f"wemm.ops.{paged_op.name}")
    monkeypatch.setattr(module, "_BLOCK_SIZE", block_size)
    ran = 0
    for dtype in PARITY.DTYPES:
        inputs = Inputs(dtype, torch.device(device))
        ran += PARITY.compare(paged_op, implementation, "long", module._case(inputs, *LONG[paged_op.name]), dtype)
        ran += PARITY.check(paged_op, implementation, dtype, torch.device(device))
    assert ran


@pytest.mark.parametrize(("dtype", "margin"), [("float32", 1e-3), ("float16", 0.02)])
def test_golden_answers(ask, golden_images, device, dtype, margin):
    with LLM("tiny", dtype=dtype, device=device) as llm:
        for case in CASES:
            images = [golden_images / case["image"]] if case["image"] else []
            params = SamplingParams(max_tokens=len(case["greedy_token_ids"]), ignore_eos=True)
            [output] = llm.chat(ask(case["text"], *images), params)
            close = [i for i, reference in enumerate(case["greedy_margins"]) if reference <= margin]
            comparable = close[0] if close else len(case["greedy_token_ids"])
            assert list(output.outputs[0].token_ids[:comparable]) == case["greedy_token_ids"][:comparable]


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype="float32"),
        dict(dtype="bfloat16"),
        dict(dtype="float16"),
        dict(dtype="float16", block_size=128),
        dict(dtype="float16", quantization="int8", vision_quantization="int8"),
        dict(dtype="float16", quantization="int4", kv_cache_dtype="int8"),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_what_a_picture_shows_is_read_in_every_precision(ask, device, options):
    questions = {"word.png": "What word is written here?", "number.png": "图中的数字是多少？"}
    with LLM("nano", device=device, **options) as llm:
        outputs = llm.chat([ask(question, PICTURES / name) for name, question in questions.items()])
    assert [output.outputs[0].text for output in outputs] == ["WEMM", "2048"]


def test_replayed_steps_are_computed_steps(ask, device):
    """Alone, and three as four."""
    if device == "npu":
        pytest.skip("no decode graphs on NPUs")
    questions = [ask("What is this?"), ask("为什么大海是蓝色的？"), ask("Once upon a time")]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    dtype = "bfloat16" if device == "cpu" else "float32"  # a CPU replays no float32
    options = dict(dtype=dtype, device=device, num_speculative_tokens=0, enable_prefix_caching=False)
    with LLM("nano", **options) as replayed, LLM("nano", enforce_eager=True, **options) as eager:
        for asked in (questions[:1], questions):
            expected, got = eager.chat(asked, params), replayed.chat(asked, params)
            assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in expected]
        graphs = replayed._open.engine._runner._decode_graphs._graphs
        assert graphs[1] is not None
        assert graphs[3 if device == "cpu" else 4] is not None


MIXED = [
    SamplingParams(max_tokens=24, ignore_eos=True),
    SamplingParams(max_tokens=17, temperature=1.0, seed=3, top_p=0.9, top_k=40, logprobs=2),
    SamplingParams(max_tokens=20, temperature=0.8, seed=5, repetition_penalty=1.2, frequency_penalty=0.3, n=2),
    SamplingParams(max_tokens=30, stop_token_ids=list(range(0, 700, 7)), ignore_eos=True, min_tokens=3),
]


@pytest.mark.parametrize("num_speculative_tokens", [0, 8])
def test_steps_launched_ahead_are_steps_waited_for(ask, device, num_speculative_tokens):
    """float32, drawn and greedy, answers of different lengths, with a picture and a prompt in chunks."""
    asked = [ask("What is this?", PICTURES / "word.png"), *(ask(text) for text in ("a b a b a b", "你好", "Once"))]
    options = dict(dtype="float32", device=device, num_speculative_tokens=num_speculative_tokens)
    answers = []
    for ahead in (True, False):
        with LLM("nano", async_scheduling=ahead, max_num_batched_tokens=40, **options) as llm:
            rounds = [llm.chat(asked, MIXED) for _ in range(2)]
            llm._open.engine.check_integrity()
        answers.append([[a.token_ids for a in output.outputs] for outputs in rounds for output in outputs])
    assert answers[0] == answers[1]


def test_nothing_waits_while_a_step_is_launched(ask, device, monkeypatch):
    """torch refuses whatever would; recordings are made, and memory is found, in a first round."""
    if device == "npu":
        pytest.skip("steps are waited for on NPUs")
    asked = [ask(text) for text in ("What is this?", "a b a b a b", "你好", "Once")]
    launch = Engine._launch

    def watched(engine, scheduled):
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(engine, scheduled)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    with LLM("nano", dtype="float16", device=device, async_scheduling=True) as llm:
        expected = llm.chat(asked, MIXED)
        monkeypatch.setattr(Engine, "_launch", watched)
        outputs = llm.chat(asked, MIXED)  # a launch that is refused fails its requests
        assert llm.stats.seconds_awaiting_device > 0
    assert [len(o.outputs[0].token_ids) for o in outputs] == [len(o.outputs[0].token_ids) for o in expected]


@pytest.mark.parametrize("model", ["nano", "wemm-chat-2k-cn"])
@pytest.mark.parametrize("options", [dict(enforce_eager=True), dict()], ids=["eager", "replayed"])
def test_answers_stay_within_the_memory_plan(ask, device, model, options):
    """The largest image, beside long prompts and answers; decode graphs take of the reserve."""
    platform = resolve_platform(device)
    if model in PRESETS and (platform.device.type == "cpu" or (platform.available_memory() or 0) < 30 * 2**30):
        pytest.skip("needs a device with 30 GiB")
    weights = "dummy" if model in PRESETS else "auto"
    with LLM(model, device=device, load_format=weights, image_cache_memory=0, **options) as llm:
        plan = llm._open.memory_plan
        edge = largest_image(llm._open.source.config).resized[0]
        work = [ask(f"{i} " + "word " * 200, Image.new("RGB", (edge, edge), (i, 0, 0))) for i in range(8)]
        params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, top_p=0.9, top_k=50, logprobs=5)
        peak = platform.peak_memory(lambda: llm.chat(work, params) and None)
        if peak is None:
            pytest.skip("this device does not tell what it took")
        left = platform.available_memory()
    assert peak <= plan.activations + (0 if options else plan.reserve)
    assert left >= plan.activations, "what was planned for steps is there"
