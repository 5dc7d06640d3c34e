"""The servers' door: many callers at once, deltas, cancellation, and an end that everybody hears of."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from wemm import AsyncLLM, SamplingParams, StructuredOutputsParams
from wemm.errors import (
    EngineDeadError,
    EngineError,
    InsufficientMemoryError,
    ModelNotFoundError,
    ParameterError,
    PromptError,
    RequestTimeoutError,
)

MODEL = dict(dtype="float32", device="cpu", max_model_len=400)
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=2)


async def _collect(stream):
    return [output async for output in stream]


def _joined(outputs, index=0):
    """Text, ids and log probabilities of all deltas together."""
    answers = [output.outputs[index] for output in outputs]
    logprobs = [entry for answer in answers for entry in answer.logprobs or ()]
    return "".join(a.text for a in answers), [i for a in answers for i in a.token_ids], logprobs


async def _idle(llm):
    """Nothing is lost or held for nobody, and soon nothing runs: aborts need a step to take effect."""
    for _ in range(500):
        await llm.check_integrity()
        if llm.stats.num_waiting + llm.stats.num_running == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(llm.stats)


def test_callers_side_by_side_get_what_each_gets_alone(llm, ask, golden_images):
    conversations = [ask("hi"), ask("?", golden_images / "33x21.png"), ask("Why is the ocean blue?")] * 3
    expected = [llm.chat(conversation, PARAMS)[0].outputs[0] for conversation in conversations]

    async def run():
        async with AsyncLLM("tiny", **MODEL) as engine:
            streams = await asyncio.gather(*(_collect(engine.chat(c, PARAMS)) for c in conversations))
            await _idle(engine)
        return streams

    for outputs, answer in zip(asyncio.run(run()), expected, strict=True):
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        text, ids, logprobs = _joined(outputs)
        assert (text, tuple(ids)) == (answer.text, answer.token_ids)
        assert [list(entry) for entry in logprobs] == [list(entry) for entry in answer.logprobs]


def test_a_slow_caller_misses_nothing(llm, ask):
    params = replace(PARAMS, n=2, temperature=1.0, seed=1)
    [whole] = llm.chat(ask("hi"), params)

    async def run():
        outputs = []
        async with AsyncLLM("tiny", **MODEL) as engine:
            async for output in engine.chat(ask("hi"), params):
                outputs.append(output)
                await asyncio.sleep(0.02)
        return outputs

    outputs = asyncio.run(run())
    for index in range(2):
        assert tuple(_joined(outputs, index)[1]) == whole.outputs[index].token_ids


def test_leaving_and_cancelling_abort_and_free_everything(ask):
    async def run():
        async with AsyncLLM("tiny", **MODEL) as engine:
            stream = engine.chat(ask("hi"), replace(PARAMS, max_tokens=300))
            await anext(stream)
            await stream.aclose()
            await _idle(engine)
            assert engine.stats.num_computed_tokens < 200
            task = asyncio.create_task(_collect(engine.chat(ask("hi"), replace(PARAMS, max_tokens=300))))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await _idle(engine)
            assert len(_joined(await _collect(engine.generate([5, 6, 7], PARAMS)))[1]) == 20

    asyncio.run(run())


def test_mistakes_are_the_callers_alone(ask):
    async def run():
        async with AsyncLLM("tiny", **MODEL) as engine:
            good = asyncio.create_task(_collect(engine.chat(ask("hi"), PARAMS)))
            with pytest.raises(PromptError):
                await _collect(engine.chat([{"role": "pope", "content": "x"}], PARAMS))
            with pytest.raises(ParameterError, match="timeout must be seconds above 0. Given: -1"):
                await _collect(engine.chat(ask("hi"), PARAMS, timeout=-1))
            with pytest.raises(ParameterError, match="priority must be an integer"):
                await _collect(engine.chat(ask("hi"), PARAMS, priority=0.5))
            with pytest.raises(RequestTimeoutError):
                await _collect(engine.chat(ask("hi"), replace(PARAMS, max_tokens=350), timeout=1e-4))
            assert len(_joined(await good)[1]) == 20
            await _idle(engine)

    asyncio.run(run())


def _kill(engine):
    os.kill(engine.engine_pid, signal.SIGKILL)


def _break(engine):
    engine._process.order("no_such_method")


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        (_kill, EngineDeadError, "the engine's process was killed by signal 9; what it had under way is lost"),
        (_break, EngineError, "the engine failed: AttributeError.*no_such_method"),
    ],
)
def test_when_the_engine_ends_everybody_hears_of_it(ask, end, error, message):
    async def run():
        async with AsyncLLM("tiny", **MODEL) as engine:
            streams = [engine.chat(ask(text), replace(PARAMS, max_tokens=300)) for text in "ab"]
            for stream in streams:
                await anext(stream)
            check = asyncio.create_task(engine.wait_until_ended())
            end(engine)
            for stream in streams:
                with pytest.raises(error, match=message):
                    await _collect(stream)
            with pytest.raises(error, match=message):
                engine.chat(ask("hi"), PARAMS)
            assert isinstance(await check, error)

    asyncio.run(run())


def test_what_the_engine_logs_is_logged_by_its_door(caplog):
    async def run():
        async with AsyncLLM("tiny", **MODEL) as engine:
            _break(engine)
            await engine.wait_until_ended()

    with caplog.at_level("INFO", logger="wemm"):
        asyncio.run(run())
    started, failed = [r.getMessage() for r in caplog.records if r.name.startswith("wemm.engine")]
    assert started.startswith("tiny on cpu in float32")
    assert failed.startswith("the engine has come to its end\nTraceback")


def test_the_engine_ends_with_its_door():
    """Also when nobody closes it: nothing may go on computing for a process that was killed."""
    code = """
import asyncio
from wemm import AsyncLLM
async def main():
    llm = AsyncLLM("tiny", dtype="float32", device="cpu", max_model_len=400)
    print(llm.engine_pid, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as door:
        pid = int(door.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        door.kill()
        for _ in range(500):
            if not Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.02)
        assert not Path(f"/proc/{pid}").exists()


def test_a_model_that_cannot_be_loaded_is_the_callers_mistake():
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        AsyncLLM("no-such-model")
    with pytest.raises(InsufficientMemoryError):
        AsyncLLM("tiny", **{**MODEL, "kv_cache_memory": 1000})


def test_answers_follow_a_grammar_there_too(ask):
    params = SamplingParams(max_tokens=20, structured_outputs=StructuredOutputsParams(choice=["purple", "orange"]))

    async def run():
        async with AsyncLLM("tiny", **MODEL) as engine:
            assert _joined(await _collect(engine.chat(ask("hi"), params)))[0] in ("purple", "orange")

    asyncio.run(run())


def test_requests_of_another_salt_share_no_cache(ask, golden_images):
    """What one tenant has asked must not be felt by another; with the same salt it is found."""
    question = ask("hi " * 20, golden_images / "33x21.png")

    async def run():
        async with AsyncLLM("tiny", **MODEL) as engine:
            cached, texts = [], []
            for salt in ("", "", "a", "b", "a"):
                outputs = await _collect(engine.chat(question, PARAMS, cache_salt=salt))
                cached.append(outputs[-1].num_cached_tokens > 0)
                texts.append(_joined(outputs)[:2])
            assert cached == [False, True, False, False, True]
            assert engine.stats.num_encoded_images == 3
            assert all(text == texts[0] for text in texts)

    asyncio.run(run())


def test_closing_ends_what_is_under_way(ask):
    async def run():
        engine = AsyncLLM("tiny", **MODEL)
        stream = engine.chat(ask("hi"), replace(PARAMS, max_tokens=300))
        await anext(stream)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await _collect(stream)
        with pytest.raises(EngineError, match="closed"):
            engine.chat(ask("hi"))
        await engine.close()
        assert not Path(f"/proc/{engine.engine_pid}").exists()

    asyncio.run(run())
