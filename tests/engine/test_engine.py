"""The engine: whatever is computed beside a request, cached, guessed, cut or given up, its answer is the same.

The oracle is one request at a time on an engine without caches and guesses.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from PIL import Image

from wemm import LLM, SamplingParams, StructuredOutputsParams
from wemm.engine.model_runner import ModelRunner
from wemm.errors import InsufficientMemoryError, PromptTooLongError, RequestTimeoutError, StepError
from wemm.platforms.transfer import HostCopy

MODEL = dict(dtype="float32", device="cpu", max_model_len=400)
PLAIN = dict(enable_prefix_caching=False, image_cache_memory=0, num_speculative_tokens=0)
COLOURS = ("red", "green", "blue", "white")
TEXTS = ("hi", "What is written here? What is written here? What is", "有几个？", "a b c a b c a b c a b", "Why?")


def _image(index):
    return Image.new("RGB", (20 + 37 * (index % 3), 30 + 11 * (index % 4)), COLOURS[index % 4])


def _conversation(rng):
    """Text with no, one or two images; few different ones, so that caches have something to find."""
    parts = [{"type": "text", "text": rng.choice(TEXTS)}]
    for _ in range(rng.choice((0, 1, 1, 2))):
        parts.insert(rng.randrange(len(parts) + 1), {"type": "image", "image": _image(rng.randrange(6))})
    return [{"role": "user", "content": parts}]


def _params(rng):
    options = rng.choice((
        {}, {}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 50},
        {"repetition_penalty": 1.3}, {"presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"n": 4, "temperature": 1.0}, {"logit_bias": {5: 3.0}, "min_tokens": 4},
    ))  # fmt: skip
    return SamplingParams(
        max_tokens=rng.randrange(4, 14), seed=rng.randrange(2**40), ignore_eos=rng.random() < 0.8, **options
    )


def _workload(count, seed):
    rng = random.Random(seed)
    return [(_conversation(rng), _params(rng)) for _ in range(count)]


def _ids(output):
    return [answer.token_ids for answer in output.outputs]


def _request(llm, messages, params, **order):
    return llm._intake.submit(messages, llm._open.processor.chat, params, **order).result()


def _arriving(llm, work, seed):
    """All requests, each added at a random step; integrity is checked after every step."""
    engine, rng = llm._open.engine, random.Random(seed)
    requests = [_request(llm, messages, params, priority=rng.randrange(3)) for messages, params in work]
    order = list(range(len(requests)))
    rng.shuffle(order)
    final = {}
    while order or engine.num_unfinished:
        while order and rng.random() < 0.6:
            engine.add_request(requests[order.pop()])
        for output in engine.step():
            final[output.request_id] = output
        engine.check_integrity()
    assert not any(output.error for output in final.values())
    return [_ids(final[request.request_id]) for request in requests]


@pytest.fixture(scope="module")
def work():
    return _workload(64, seed=1)


@pytest.fixture(scope="module")
def alone(work):
    """What each answers alone, by model."""
    answers = {}
    for model in ("tiny", "nano"):
        with LLM(model, **MODEL, **PLAIN) as llm:
            answers[model] = [_ids(llm.chat(messages, params)[0]) for messages, params in work]
    return answers


ASYNC = {"async_scheduling": True}
# Of one sequence of max_model_len: layers, keys and values, KV heads, head_dim, bytes.
TINY_POOL = {"kv_cache_memory": 400 * 3 * 2 * 8 * 8 * 4}
NANO_POOL = {"kv_cache_memory": 400 * 4 * 2 * 4 * 16 * 4}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("tiny", {}),
        ("tiny", PLAIN),
        ("tiny", {"max_num_seqs": 5, "max_num_batched_tokens": 23}),
        ("tiny", {"max_num_batched_patches": 40}),
        ("tiny", {"enable_prefix_caching": False}),
        ("tiny", {"image_cache_memory": 0}),
        ("tiny", {"num_speculative_tokens": 0}),
        ("tiny", {"block_size": 3, "max_num_batched_tokens": 50}),
        ("tiny", TINY_POOL),
        ("tiny", {**TINY_POOL, **PLAIN}),
        ("tiny", ASYNC),
        ("tiny", {**ASYNC, **PLAIN}),
        ("tiny", {**ASYNC, **TINY_POOL}),
        ("tiny", {**ASYNC, **TINY_POOL, **PLAIN}),
        ("tiny", {**ASYNC, "max_num_seqs": 5, "max_num_batched_tokens": 23, "max_num_batched_patches": 40}),
        ("nano", {}),
        ("nano", ASYNC),
        ("nano", {**NANO_POOL, "max_num_batched_tokens": 31, "max_num_batched_patches": 100}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_64_requests_arriving_at_random_answer_as_each_alone(model, options, work, alone):
    with LLM(model, **MODEL, **options) as llm:
        assert _arriving(llm, work, seed=3) == alone[model]
        stats = llm.stats
    if model == "tiny":
        assert (stats.num_preemptions > 0) == ("kv_cache_memory" in options)
    if model == "tiny" and options in ({}, ASYNC):
        assert stats.num_prefix_cached_tokens > 0
        assert stats.num_encoded_images <= 6 < stats.num_image_queries
        assert 0 < stats.num_accepted_tokens <= stats.num_draft_tokens


def test_every_chunk_size_gives_the_same_answer(ask):
    """1 … the whole prompt: an image is cut at every one of its rows."""
    messages = ask("ab", _image(1))
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=1)
    with LLM("tiny", **MODEL, **PLAIN) as llm:
        [whole] = llm.chat(messages, params)
        length = len(whole.prompt_token_ids)
        for size in range(1, length + 1):
            limits = llm._open.engine._scheduler._limits
            llm._open.engine._scheduler._limits = replace(limits, max_num_batched_tokens=size)
            [chunked] = llm.chat(messages, params)
            assert _ids(chunked) == _ids(whole), size
            expected = pytest.approx(whole.outputs[0].cumulative_logprob, abs=1e-3)
            assert chunked.outputs[0].cumulative_logprob == expected


def test_twenty_questions_about_one_image_cost_one_encoding_and_one_prefill(ask):
    """But for the tail of the image that does not fill a block: at most 15 tokens per question."""
    image = Image.new("RGB", (200, 150), "red")
    questions = [ask(f"Question {i}?", image) for i in range(20)]
    with LLM("tiny", **MODEL) as llm:
        outputs = llm.chat(questions, SamplingParams(max_tokens=2))
        stats, num_image_tokens = llm.stats, outputs[0].num_image_tokens
    assert (stats.num_tower_calls, stats.num_encoded_images, stats.num_image_queries) == (1, 1, 20)
    assert num_image_tokens <= stats.num_computed_image_tokens <= num_image_tokens + 19 * 15


def test_n_answers_share_their_prompt(ask):
    messages = ask("Why is the ocean blue? " * 4)
    with LLM("tiny", **MODEL, enable_prefix_caching=False) as llm:
        [output] = llm.chat(messages, SamplingParams(n=4, max_tokens=2, temperature=1.0, ignore_eos=True))
        length = len(output.prompt_token_ids)
        assert llm.stats.num_prefix_cached_tokens == 3 * ((length - 1) // 16 * 16)
        llm.chat(messages, SamplingParams(max_tokens=1))  # another request, no caching between requests
        assert llm.stats.num_prefix_cached_tokens == 3 * ((length - 1) // 16 * 16)


def test_what_cannot_fit_is_refused_with_its_numbers_before_work_begins(ask):
    with LLM("tiny", **{**MODEL, "max_model_len": 40}) as llm:
        message = r"the prompt has \d+ tokens, but max_model_len 40 leaves room for 39; shorten it or raise"
        with pytest.raises(PromptTooLongError, match=message):
            llm.chat([ask("fine"), ask("?", _image(0))], SamplingParams(max_tokens=2))
        assert llm.stats.num_tower_calls == 0
        assert llm.chat(ask("fine"), SamplingParams(max_tokens=2))[0].finished


def test_the_cache_takes_the_memory_it_was_given():
    with LLM("tiny", **MODEL, kv_cache_memory=10 * 2**20 + 1000) as llm:
        tensor = llm._open.engine._runner._kv_cache
        num_bytes = tensor.numel() * tensor.element_size()
        assert 10 * 2**20 - num_bytes // llm.stats.num_blocks < num_bytes <= 10 * 2**20 + 1000
    smallest = TINY_POOL["kv_cache_memory"]
    with pytest.raises(InsufficientMemoryError, match="but one sequence of 400 needs"):
        LLM("tiny", **MODEL, kv_cache_memory=smallest - 1)


def test_a_repeating_answer_takes_fewer_steps_than_tokens(ask):
    """And is token for token what it is without guesses, log probabilities included."""
    params = SamplingParams(max_tokens=60, ignore_eos=True, logprobs=2, logit_bias={5: 100})
    sampled = SamplingParams(
        max_tokens=60, ignore_eos=True, temperature=1.5, top_k=3, logit_bias={5: 30, 6: 30, 7: 30}
    )
    for p in (params, sampled):
        with LLM("tiny", **MODEL, **PLAIN) as llm:
            [plain] = llm.chat(ask("hi"), replace(p, seed=1))
            plain_steps = llm.stats.num_steps
        with LLM("tiny", **MODEL) as llm:
            [guessed] = llm.chat(ask("hi"), replace(p, seed=1))
            stats = llm.stats
        assert _ids(guessed) == _ids(plain)
        if p is params:
            assert stats.num_steps < plain_steps / 3
            for a, b in zip(guessed.outputs[0].logprobs, plain.outputs[0].logprobs, strict=True):
                assert list(a) == list(b)
    assert stats.num_draft_tokens > 0


def test_a_request_out_of_time_is_given_up_and_the_others_go_on(llm, ask):
    engine = llm._open.engine
    late = _request(llm, ask("late"), SamplingParams(max_tokens=50, ignore_eos=True), timeout=0.01)
    other = _request(llm, ask("other"), SamplingParams(max_tokens=5, ignore_eos=True))
    engine.add_request(late)
    engine.add_request(other)
    time.sleep(0.02)
    final = {}
    while engine.num_unfinished:
        final |= {output.request_id: output for output in engine.step()}
    assert isinstance(final[late.request_id].error, RequestTimeoutError)
    assert str(final[late.request_id].error) == "no complete answer within 0.01 s"
    assert len(final[other.request_id].outputs[0].token_ids) == 5
    with pytest.raises(RequestTimeoutError):
        llm.chat(ask("hi"), SamplingParams(max_tokens=500, ignore_eos=True), timeout=1e-4)
    assert llm.chat(ask("hi"), SamplingParams(max_tokens=1), timeout=60)[0].finished


@pytest.mark.parametrize("stage", ["encode", "forward"])
def test_a_step_that_raises_fails_its_requests_and_the_engine_goes_on(ask, stage, monkeypatch):
    """Whatever it raises: a request beside the failing step, and the next one, are answered."""
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    with LLM("tiny", **MODEL) as llm:
        expected = _ids(llm.chat(ask("hi"), params)[0])
        engine, runner = llm._open.engine, llm._open.engine._runner

        def fail(*arguments):
            raise RuntimeError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(runner, stage, fail)
            engine.add_request(_request(llm, ask("?", _image(0)), params))
            [output] = next(filter(None, iter(engine.step, None)))
            assert isinstance(output.error, StepError)
            assert "failed: RuntimeError('no memory')" in str(output.error)
            assert output.finished
        assert engine.num_unfinished == 0
        engine.check_integrity()
        assert _ids(llm.chat(ask("hi"), params)[0]) == expected
        assert llm.chat(ask("?", _image(0)), params)[0].finished


@pytest.mark.slow
def test_ten_thousand_images_leave_nothing_behind(capsys):
    """Distinct small images through both caches: no block is lost, and memory stays where it was."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def ask(i):
        image = Image.new("RGB", (24, 18), (i % 256, i // 256 % 256, 99))
        image.putpixel((0, 0), (i // 65536, 1, 2))
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]

    samples = []
    with LLM("nano", **MODEL, image_cache_memory=2**20) as llm:
        for start in range(0, 10_000, 500):
            outputs = llm.chat([ask(i) for i in range(start, start + 500)], SamplingParams(max_tokens=1))
            assert not any(output.error for output in outputs)
            llm._open.engine.check_integrity()
            samples.append(resident())
        assert llm.stats.num_free_blocks == llm.stats.num_blocks
        assert llm.stats.num_encoded_images == 10_000
        assert llm.stats.image_cache_bytes <= 2**20
    settled = samples[len(samples) // 2 :]
    slope = np.polyfit(range(len(settled)), settled, 1)[0] * 2  # MiB per 1000 requests
    with capsys.disabled():
        print(
            f"\nresident MiB every 500 requests: {[round(s) for s in samples]}; "
            f"at the end {slope:+.2f} MiB per 1000"
        )
    assert abs(slope) < 1


def test_what_a_failed_request_computed_is_not_shared(ask, monkeypatch):
    """Its prompt was computed and known to the cache before it failed."""
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    messages = ask("Why is the ocean blue? " * 4)
    with LLM("tiny", **MODEL) as llm:
        engine, runner = llm._open.engine, llm._open.engine._runner
        engine.add_request(_request(llm, messages, params))
        engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(runner, "forward", lambda *inputs: 1 / 0)
            [output] = engine.step()
        assert isinstance(output.error, StepError)
        llm.chat(messages, params)
        assert llm.stats.num_prefix_cached_tokens == 0
        llm.chat(messages, params)
        assert llm.stats.num_prefix_cached_tokens > 0


def test_an_image_whose_encoding_failed_halfway_begins_again(ask, monkeypatch):
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    with LLM("tiny", **MODEL, max_num_batched_patches=40) as llm:
        engine, runner = llm._open.engine, llm._open.engine._runner
        encode, layers = runner.encode, []

        def fail_once(vision):
            layers.append(vision.first_layer)
            return encode(vision) if len(layers) > 1 else 1 / 0

        monkeypatch.setattr(runner, "encode", fail_once)
        engine.add_request(_request(llm, ask("?", _image(0)), params))
        [output] = engine.step()
        assert isinstance(output.error, StepError)
        assert llm.chat(ask("?", _image(0)), params)[0].finished
        assert layers == [0, 0, 1]
        engine.check_integrity()


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_awaited(ask, monkeypatch):
    """From the second on; only the last step, which nobody needs, is never read."""
    order = []
    launch, wait = ModelRunner.forward, HostCopy.wait
    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.8, top_p=0.9, repetition_penalty=1.2)
    with (
        LLM("tiny", **MODEL, **PLAIN, **ASYNC) as llm,
        LLM("tiny", **MODEL, **PLAIN, async_scheduling=False) as waiting,
    ):
        monkeypatch.setattr(ModelRunner, "forward", lambda *a: (order.append("launch"), launch(*a))[1])
        monkeypatch.setattr(HostCopy, "wait", lambda copy: (order.append("wait"), wait(copy))[1])
        expected = _ids(waiting.chat(ask("hi"), params)[0])
        assert order == ["launch", "wait", "wait"] * 6
        order.clear()
        assert _ids(llm.chat(ask("hi"), params)[0]) == expected
        assert order == ["launch", *["launch", "wait", "wait"] * 5, "wait", "wait"]
        assert llm.stats.num_computed_tokens == waiting.stats.num_computed_tokens


def test_an_answer_that_ends_by_itself_costs_one_step_in_vain(ask):
    """What it computes is nobody's: not in the answer, not in the cache."""
    with LLM("tiny", **MODEL, **ASYNC, num_speculative_tokens=0) as llm:
        [whole] = llm.chat(ask("hi"), SamplingParams(max_tokens=6, ignore_eos=True))
        [ids] = _ids(whole)
        before = llm.stats.num_computed_tokens
        params = SamplingParams(max_tokens=6, stop_token_ids=[ids[2]], ignore_eos=True, seed=1)
        [output] = llm.chat(ask("hi"), params)
        assert _ids(output)[0] == ids[: ids.index(ids[2]) + 1]
        prompt = len(output.prompt_token_ids)
        computed = llm.stats.num_computed_tokens - before
        assert computed == prompt - (prompt - 1) // 16 * 16 + len(_ids(output)[0]) - 1 + 1
        llm._open.engine.check_integrity()


def test_answers_of_one_request_end_where_they_end(ask):
    """While others of it go on, what was computed behind their end is dropped."""
    params = SamplingParams(n=6, max_tokens=30, temperature=1.0, seed=2, stop_token_ids=list(range(0, 500, 9)))
    with LLM("tiny", **MODEL, **PLAIN) as llm, LLM("tiny", **MODEL, **PLAIN, **ASYNC) as ahead:
        expected = llm.chat(ask("hi"), params)[0].outputs
        assert len({len(answer.token_ids) for answer in expected}) > 3
        assert ahead.chat(ask("hi"), params)[0].outputs == expected


def test_guesses_and_grammars_are_waited_for(ask):
    """Beside sequences that are not: all answer as alone."""
    choice = SamplingParams(max_tokens=12, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    repeating = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=2, logit_bias={5: 100})
    plain = SamplingParams(max_tokens=25, ignore_eos=True, temperature=1.0, seed=4, min_tokens=5, logprobs=0)
    work = [(ask("is it?"), choice), (ask("hi"), repeating), (ask("Why?"), plain)]
    with LLM("tiny", **MODEL, **PLAIN) as llm:
        alone = [llm.chat(messages, params)[0].outputs[0] for messages, params in work]
    with LLM("tiny", **MODEL, **ASYNC) as llm:
        together = llm.chat([messages for messages, _ in work], [params for _, params in work])
        assert llm.stats.num_accepted_tokens > 0
    assert together[0].outputs[0].text in ("yes", "no")
    for expected, output in zip(alone, together, strict=True):
        answer = output.outputs[0]
        assert answer.token_ids == expected.token_ids
        assert answer.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)


def test_a_step_that_fails_on_the_device_fails_its_requests(ask, monkeypatch):
    """Which is heard of when its tokens are asked for."""
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    with LLM("tiny", **MODEL, **ASYNC) as llm:
        expected = _ids(llm.chat(ask("hi"), params)[0])
        with monkeypatch.context() as patch:
            patch.setattr(HostCopy, "wait", lambda copy: 1 / 0)
            with pytest.raises(StepError, match="step failed: ZeroDivisionError"):
                llm.chat(ask("hi"), params)
        llm._open.engine.check_integrity()
        assert _ids(llm.chat(ask("hi"), params)[0]) == expected


class EngineMachine(RuleBasedStateMachine):
    """Requests added, aborted and computed in any order on a small engine; then all finish as alone."""

    WORK = _workload(12, seed=5)
    ASYNC_SCHEDULING = False

    def __init__(self):
        super().__init__()
        self.llm = LLM(
            "tiny", **MODEL, max_num_seqs=4, max_num_batched_tokens=30,
            max_num_batched_patches=60, image_cache_memory=20_000, **TINY_POOL,
            async_scheduling=self.ASYNC_SCHEDULING,
        )  # fmt: skip
        self.engine = self.llm._open.engine
        self.under_way = {}
        self.final = {}

    @rule(index=st.integers(0, len(WORK) - 1), priority=st.integers(-1, 1))
    def add(self, index, priority):
        request = _request(self.llm, *self.WORK[index], priority=priority)
        self.engine.add_request(request)
        self.under_way[request.request_id] = index

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.under_way)))
        self.engine.abort(request_id)
        del self.under_way[request_id]

    @rule(count=st.integers(1, 5))
    def step(self, count):
        for _ in range(count):
            for output in self.engine.step():
                if output.finished:
                    assert output.error is None
                    self.final[output.request_id] = self.under_way.pop(output.request_id), _ids(output)
            self.engine.check_integrity()

    @invariant()
    def the_engine_knows_the_same_requests(self):
        assert self.engine.num_unfinished == len(self.under_way)

    def teardown(self):
        while self.engine.num_unfinished:
            self.step(1)
        self.engine.check_integrity()
        for index, ids in self.final.values():
            assert ids == ANSWERS[index]
        self.llm.close()


ANSWERS = []


class TestEngineMachine(EngineMachine.TestCase):
    settings = settings(
        max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )

    @classmethod
    def setup_class(cls):
        with LLM("tiny", **MODEL, **PLAIN) as llm:
            ANSWERS[:] = [_ids(llm.chat(*work)[0]) for work in EngineMachine.WORK]


class AsyncEngineMachine(EngineMachine):
    """The same, every step launched before the one before is known."""

    ASYNC_SCHEDULING = True


class TestAsyncEngineMachine(AsyncEngineMachine.TestCase):
    settings = TestEngineMachine.settings
    setup_class = TestEngineMachine.setup_class
