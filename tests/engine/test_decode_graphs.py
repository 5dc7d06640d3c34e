"""A replayed decode step is the step: the same tokens and the same numbers, whatever came before and beside it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from wemm import LLM, SamplingParams
from wemm.kernels import Recorder, load_kernels, recorder
from wemm.ops.rms_norm import rms_norm
from wemm.platforms.cpu import CpuPlatform

load_kernels("cpu")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("wemm.kernels.cpu._kernels") is None, reason="the C++ extension is not built here"
)
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=2)
SETTINGS = [
    dict(dtype="bfloat16"),
    dict(dtype="float16", quantization="int8"),
    dict(dtype="bfloat16", quantization="int4", kv_cache_dtype="int8"),
]


@pytest.fixture(scope="module")
def work(ask, golden_images):
    return [
        ask("What is this?", golden_images / "300x200.png"),
        ask("为什么大海是蓝色的？"),
        ask("?", golden_images / "33x21.png", golden_images / "1x1.png"),
        ask("Once upon a time"),
    ]


def _engine(**options):
    plain = dict(num_speculative_tokens=0, enable_prefix_caching=False, max_model_len=400)
    return LLM("nano", device="cpu", **plain, **options)


def _ask(llm, conversations, params=PARAMS):
    return [output.outputs[0] for output in llm.chat(conversations, params)]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_replayed_is_computed(options, work):
    """Alone and together, twice on the same recordings, with sequences that end at different steps."""
    lengths = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, logprobs=2) for n in (5, 24, 11, 17)]
    with _engine(**options) as replayed, _engine(enforce_eager=True, **options) as eager:
        graphs = replayed._open.engine._runner._decode_graphs
        assert eager._open.engine._runner._decode_graphs is None
        for conversations, params in ((work[:1], PARAMS), (work, lengths), (work[1:3], PARAMS), (work, lengths)):
            expected, got = _ask(eager, conversations, params), _ask(replayed, conversations, params)
            assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
            if len(conversations) == 1:  # which requests meet in a step shows in the last digits
                assert got[0].cumulative_logprob == expected[0].cumulative_logprob
        assert graphs._graphs[1] is not None


def test_steps_are_filled_up_to_the_next_size(monkeypatch, work):
    """Three and two sequences as four, the sizes coming and going; five as they are."""
    monkeypatch.setattr(CpuPlatform, "decode_graph_sizes", (1, 4))
    lengths = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (5, 24, 11, 17, 3)]
    with _engine(dtype="bfloat16") as replayed, _engine(dtype="bfloat16", enforce_eager=True) as eager:
        for conversations in (work[:3], [*work, work[0]], work[1:3]):
            params = lengths[: len(conversations)]
            expected, got = _ask(eager, conversations, params), _ask(replayed, conversations, params)
            assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
        engine = replayed._open.engine
        graphs = engine._runner._decode_graphs._graphs
        assert set(graphs) == {1, 4}
        assert all(graphs.values())
        # The last of these steps had two sequences. Two more wrote where no sequence ever is.
        filled = graphs[4].inputs.batch
        nobody = engine._kv_cache.num_blocks
        assert filled.block_tables[2:, 0].tolist() == [nobody] * 2
        assert (filled.slot_mapping[2:] // 16).tolist() == [nobody] * 2
        assert filled.seq_lens[2:].tolist() == [1, 1]
        assert nobody == engine._runner._kv_cache.shape[2] - 1


def _repeated(function):
    """A recording of anything: the function again, its results where the first ones lie."""
    out = function()

    def replay():
        for fixed, values in zip(out, function(), strict=True):
            fixed.copy_(values)

    return out, replay


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_device_that_records_torch_replays_whole_steps(monkeypatch, work, async_scheduling):
    """Token ids in, logits out; beside a prompt in chunks, whose last one may be a row without logits."""
    monkeypatch.setattr("wemm.kernels.cpu.RECORDER", Recorder(_repeated, holds_torch=True))
    monkeypatch.setattr(CpuPlatform, "decode_graph_sizes", (1, 4))
    lengths = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, logprobs=1) for n in (5, 24, 11, 17)]
    options = dict(dtype="float32", max_num_batched_tokens=21, async_scheduling=async_scheduling)
    with _engine(**options) as replayed, _engine(enforce_eager=True, **options) as eager:
        for conversations in (work[:3], work, work[1:3]):
            expected = _ask(eager, conversations, lengths[: len(conversations)])
            got = _ask(replayed, conversations, lengths[: len(conversations)])
            assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
            for one, other in zip(got, expected, strict=True):
                assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
        graphs = replayed._open.engine._runner._decode_graphs._graphs
        assert set(graphs) == {1, 4}
        assert graphs[4].out[0].shape == (4, replayed.model.language_model.output.weight.shape[0])


def test_a_row_without_logits_is_left_out(monkeypatch, ask):
    """A budget that leaves one token of it to an urgent prompt, whose row comes first."""
    monkeypatch.setattr("wemm.kernels.cpu.RECORDER", Recorder(_repeated, holds_torch=True))
    monkeypatch.setattr(CpuPlatform, "decode_graph_sizes", (1, 2))
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    answers = []
    for options in ({}, {"enforce_eager": True}):
        with _engine(dtype="float32", max_num_batched_tokens=2, **options) as llm:
            engine, final = llm._open.engine, {}
            for text, priority, num_steps in (("hi", 0, 12), ("Once upon a time", -1, 100)):
                request = llm._intake.submit(ask(text), llm._open.processor.chat, params, priority=priority)
                engine.add_request(request.result())
                for _ in range(num_steps):
                    final |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
            assert engine.num_unfinished == 0
            answers.append(list(final.values()))
    assert answers[0] == answers[1]


def test_a_step_with_products_of_torch_is_computed_op_by_op(work):
    """In float32 all products are MKL's."""
    with _engine(dtype="float32") as llm, _engine(dtype="float32", enforce_eager=True) as eager:
        assert _ask(llm, work[:1])[0].token_ids == _ask(eager, work[:1])[0].token_ids
        assert llm._open.engine._runner._decode_graphs._graphs == {1: None}


def test_a_step_that_torch_takes_part_in_is_not_recorded():
    """Products of five tokens in bfloat16, say, are oneDNN's: what it computes no recording would hold."""
    record = recorder("cpu").record
    x, weight = torch.randn(2, 8), torch.ones(8)
    with torch.inference_mode():
        assert record(lambda: rms_norm(x, weight, 1e-5).mul_(2)) is None
        assert record(lambda: rms_norm(x, weight, 1e-5)) is not None


def test_a_recording_computes_on_what_the_tensors_hold_now():
    x, weight = torch.randn(2, 8), torch.rand(8)
    with torch.inference_mode():
        x, weight = x.clone(), weight.clone()
        out, replay = recorder("cpu").record(lambda: rms_norm(rms_norm(x, weight, 1e-5), weight, 1e-5))
        assert len(replay) == 2
        x.normal_()
        expected = rms_norm(rms_norm(x, weight, 1e-5), weight, 1e-5)
        assert not torch.equal(out, expected)
        replay()
        assert torch.equal(out, expected)


def test_recording_does_not_import_a_compiler():
    """torch's takes seconds, which the first token would wait for, and leaves a directory behind."""
    answer = (
        "import sys; from wemm import LLM, SamplingParams\n"
        "with LLM('nano', device='cpu', dtype='bfloat16', max_model_len=100) as llm:\n"
        "    llm.generate('hi', SamplingParams(max_tokens=4, ignore_eos=True))\n"
        "    assert llm._open.engine._runner._decode_graphs._graphs[1] is not None\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", answer], check=True)


def test_without_kernels_nothing_is_recorded(work):
    from wemm.ops.silu_and_mul import silu_and_mul

    with _engine(dtype="float32") as llm, silu_and_mul.using("definition"):
        assert _ask(llm, work[:1])[0].token_ids
        assert llm._open.engine._runner._decode_graphs._graphs == {1: None}
