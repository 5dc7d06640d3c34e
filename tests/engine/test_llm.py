"""The offline door: batched = alone, preempted = undisturbed, streamed = whole, and clean failures."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image

from wemm import LLM, SamplingParams
from wemm.cost import kv_bytes_per_token
from wemm.errors import (
    CheckpointError,
    EngineError,
    InsufficientMemoryError,
    MediaError,
    NumericalError,
    ParameterError,
    PromptError,
    PromptTooLongError,
)

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2)


@pytest.fixture
def conversations(ask, golden_images):
    return [
        ask("What is written here?", golden_images / "300x200.png"),
        ask("为什么大海是蓝色的？"),
        ask("有几个？", golden_images / "33x21.png", golden_images / "1x1.png"),
        ask("What is written here?", golden_images / "588x240.png"),
        ask("Why is the ocean blue?"),
    ]


def _ids(outputs):
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


def _request(llm, prompt, process, params):
    return llm._intake.submit(prompt, process, params).result()


def test_a_batch_answers_as_each_alone_in_order(llm, conversations):
    together = llm.chat(conversations, GREEDY)
    alone = [llm.chat(conversation, GREEDY)[0] for conversation in conversations]
    assert _ids(together) == _ids(alone)
    for a, b in zip(together, alone, strict=True):
        assert a.prompt_token_ids == b.prompt_token_ids
        assert a.outputs[0].cumulative_logprob == pytest.approx(b.outputs[0].cumulative_logprob, abs=1e-3)


def test_each_prompt_its_own_parameters(llm, conversations):
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 2, 3, 4, 5)]
    outputs = llm.chat(conversations, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3, 4, 5]
    with pytest.raises(ParameterError, match="2 sampling_params for 5 prompts"):
        llm.chat(conversations, params[:2])


def test_preemption_changes_nothing(llm, conversations):
    """A cache too small for everyone: sequences give way, are computed again, and answer the same."""
    config = llm._open.source.config
    memory = 9 * 16 * kv_bytes_per_token(config, "float32")
    with LLM("tiny", dtype="float32", device="cpu", kv_cache_memory=memory, max_model_len=130) as small:
        # Short prompts that fit together and grow beyond the cache.
        prompts = [conversations[1], conversations[4], conversations[1]]
        params = SamplingParams(max_tokens=50, ignore_eos=True)
        assert _ids(small.chat(prompts, params)) == _ids(llm.chat(prompts, params))
        assert small._open.engine.stats.num_preemptions > 0
        small._open.engine.check_integrity()


def test_a_preempted_image_keeps_its_rows(llm, ask, golden_images):
    memory = 8 * 16 * kv_bytes_per_token(llm._open.source.config, "float32")
    with LLM("tiny", dtype="float32", device="cpu", kv_cache_memory=memory, max_model_len=128) as small:
        prompts = [ask("a", golden_images / "35x1200.png"), ask("b", golden_images / "1000x40.png")]
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        assert _ids(small.chat(prompts, params)) == _ids(llm.chat(prompts, params))
        assert small._open.engine.stats.num_preemptions > 0


def test_few_sequences_at_a_time(llm, conversations):
    with LLM("tiny", dtype="float32", device="cpu", max_num_seqs=2, max_num_batched_tokens=60) as narrow:
        assert _ids(narrow.chat(conversations, GREEDY)) == _ids(llm.chat(conversations, GREEDY))


@pytest.mark.parametrize("budget", [7, 16, 33])
def test_prompts_in_chunks_answer_as_whole_ones(llm, conversations, budget):
    """A step computes at most `budget` prompt tokens, wherever that cuts text and images; draws are the same."""
    params = [GREEDY, SamplingParams(max_tokens=6, temperature=1.0, seed=3, ignore_eos=True, n=2)] * 2 + [GREEDY]
    with LLM("tiny", dtype="float32", device="cpu", max_num_batched_tokens=budget) as chunked:
        sizes = []
        runner = chunked._open.engine._runner
        forward = runner.forward
        runner.forward = lambda batch, *last: sizes.append(len(batch.input_ids)) or forward(batch, *last)
        assert _ids(chunked.chat(conversations, params)) == _ids(llm.chat(conversations, params))
        assert max(sizes) <= budget
        chunked._open.engine.check_integrity()


def test_a_chunked_prompt_can_be_aborted(ask):
    with LLM("tiny", device="cpu", max_num_batched_tokens=5) as llm:
        built = llm._open
        request = _request(llm, ask("Why is the ocean blue?"), built.processor.chat, GREEDY)
        built.engine.add_request(request)
        assert built.engine.step() == []
        built.engine.abort(request.request_id)
        built.engine.check_integrity()


def test_images_go_through_the_tower_in_bounded_groups(llm, ask, monkeypatch):
    """Five that arrive together: no call takes more patches than the largest single image has."""
    images = [Image.new("RGB", (80 + 5 * i, 20), (i, 0, 0)) for i in range(5)]
    whole = [llm.chat(ask("?", image), GREEDY)[0].outputs[0].token_ids for image in images]
    calls, built = [], llm._open
    encode = built.engine._runner.encode
    monkeypatch.setattr(built.engine._runner, "encode", lambda vision: calls.append(vision) or encode(vision))
    requests = [_request(llm, ask("?", image), built.processor.chat, GREEDY) for image in images]
    for request in requests:
        built.engine.add_request(request)
    final = {}
    while built.engine.num_unfinished:
        final |= {output.request_id: output for output in built.engine.step()}
    assert [final[request.request_id].outputs[0].token_ids for request in requests] == whole
    packs = [vision.images for vision in calls if vision.first_layer == 0]
    assert sum(len(pack) for pack in packs) == 5 > len(packs)
    assert max(sum(image.plan.num_patches for image in pack) for pack in packs) <= 31 * 31


def test_an_image_asked_about_several_times_is_encoded_once(llm, ask, golden_images):
    before = llm.stats
    same = golden_images / "300x200.png"
    llm.chat([ask("a", same), ask("b", same), ask("c", same, same)], SamplingParams(max_tokens=2, n=2))
    assert llm.stats.num_encoded_images - before.num_encoded_images == 1
    assert llm.stats.num_image_queries - before.num_image_queries == 6


def test_another_picture_of_the_same_size_is_not_confused(llm, ask):
    red, blue = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    params = SamplingParams(max_tokens=1, logprobs=1)
    together = llm.chat([ask("?", red), ask("?", blue)], params)
    alone = [llm.chat(ask("?", image), params)[0] for image in (red, blue)]
    values = [output.outputs[0].cumulative_logprob for output in (*together, *alone)]
    assert values[0] == pytest.approx(values[2], abs=1e-4)
    assert values[1] == pytest.approx(values[3], abs=1e-4)
    assert values[0] != pytest.approx(values[1], abs=1e-4)


def test_a_seed_decides_whatever_is_beside_it(llm, conversations):
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=11, ignore_eos=True)
    other = SamplingParams(max_tokens=8, temperature=1.0, seed=12, ignore_eos=True)
    alone = _ids(llm.chat(conversations[0], params))
    assert _ids(llm.chat(conversations, [params, other, other, other, other]))[0] == alone[0]
    assert _ids(llm.chat(conversations[0], other)) != alone


def test_n_answers_differ_and_repeat(llm, ask):
    params = SamplingParams(n=3, max_tokens=8, temperature=1.0, seed=5, ignore_eos=True)
    [first], [second] = llm.chat(ask("hi"), params), llm.chat(ask("hi"), params)
    assert _ids([first]) == _ids([second])
    assert len(set(_ids([first])[0])) == 3
    assert [answer.index for answer in first.outputs] == [0, 1, 2]


def test_the_engine_seed_makes_unseeded_requests_repeatable(ask):
    def draw(seed):
        with LLM("tiny", device="cpu", seed=seed) as llm:
            params = SamplingParams(max_tokens=8, temperature=1.0, ignore_eos=True)
            return _ids(llm.chat([ask("hi"), ask("hi")], params))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1]


def test_logprobs(llm, ask):
    params = SamplingParams(max_tokens=4, logprobs=3, temperature=5.0, seed=3, ignore_eos=True)
    [output] = llm.chat(ask("hi"), params)
    answer = output.outputs[0]
    total = 0.0
    for token_id, entries in zip(answer.token_ids, answer.logprobs, strict=True):
        assert {entry.rank for entry in entries.values()} >= {1, 2, 3}
        assert len(entries) == (3 if entries[token_id].rank <= 3 else 4)
        assert sum(math.exp(entry.logprob) for entry in entries.values()) <= 1 + 1e-6
        assert all(isinstance(entry.decoded_token, str) for entry in entries.values())
        total += entries[token_id].logprob
    assert answer.cumulative_logprob == pytest.approx(total)


def test_without_logprobs_there_are_none(llm, ask):
    [output] = llm.chat(ask("hi"), SamplingParams(max_tokens=2))
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_streaming_ends_as_the_whole_answer(llm, ask, golden_images):
    conversation = ask("What?", golden_images / "33x21.png")
    [whole] = llm.chat(conversation, GREEDY)
    states = list(llm.stream_chat(conversation, GREEDY))
    assert [state.finished for state in states] == [False] * (len(states) - 1) + [True]
    assert [len(state.outputs[0].token_ids) for state in states] == list(range(1, 13))
    assert states[-1].outputs == whole.outputs
    assert all(states[-1].outputs[0].text.startswith(state.outputs[0].text) for state in states)


def test_a_stream_left_early_frees_everything(llm, ask):
    stream = llm.stream_chat(ask("hi"), GREEDY)
    next(stream)
    stream.close()
    assert llm._open.engine.num_unfinished == 0


def test_streams_side_by_side_keep_to_themselves(llm, ask):
    """Two open streams, and a chat between their steps: each ends as it does alone."""
    prompts = [ask("hi"), ask("Why is the ocean blue?"), ask("?")]
    alone = [llm.chat(prompt, GREEDY)[0].outputs[0].token_ids for prompt in prompts]
    first, second = llm.stream_chat(prompts[0], GREEDY), llm.stream_chat(prompts[1], GREEDY)
    next(first)
    next(second)
    [between] = llm.chat(prompts[2], GREEDY)
    assert between.outputs[0].token_ids == alone[2]
    assert list(second)[-1].outputs[0].token_ids == alone[1]
    assert list(first)[-1].outputs[0].token_ids == alone[0]


def test_a_stream_does_not_outlive_its_engine(ask):
    with LLM("tiny", device="cpu") as llm:
        stream = llm.stream_chat(ask("hi"), GREEDY)
        next(stream)
    with pytest.raises(EngineError, match="closed"):
        list(stream)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_one_failing_answer_of_several_frees_all(ask, async_scheduling):
    """n = 2, and one of the two rows goes wrong in decode: the request fails whole and holds nothing."""
    with LLM("tiny", device="cpu", async_scheduling=async_scheduling) as llm:
        runner = llm._open.engine._runner
        forward = runner.forward

        def fail_second_row(*batch):
            forwarded = forward(*batch)
            is_finite = forwarded.is_finite.clone()
            is_finite[1:] = False
            return replace(forwarded, is_finite=is_finite)

        runner.forward = fail_second_row
        with pytest.raises(NumericalError, match="language_model"):
            llm.chat(ask("hi"), SamplingParams(n=2, max_tokens=5, temperature=1.0, ignore_eos=True))
        llm._open.engine.check_integrity()


def test_a_long_list_is_taken_in_as_the_engine_drains(ask, monkeypatch):
    with LLM("tiny", device="cpu", max_num_seqs=2) as llm:
        engine, seen = llm._open.engine, []
        add = engine.add_request
        monkeypatch.setattr(
            engine, "add_request", lambda request: (add(request), seen.append(engine.num_unfinished))
        )
        llm.chat([ask(str(i)) for i in range(7)], SamplingParams(max_tokens=2))
    assert max(seen) <= 2


def test_the_chosen_token_of_a_greedy_answer_has_rank_1(llm, ask):
    [output] = llm.chat(ask("hi"), SamplingParams(max_tokens=3, logprobs=0, ignore_eos=True))
    assert [[entry.rank for entry in entries.values()] for entries in output.outputs[0].logprobs] == [[1]] * 3


def test_a_tokenizer_larger_than_the_model(tiny, edit_json):
    edit_json(tiny / "config.json", text_config__vocab_size=100)
    with pytest.raises(CheckpointError, match="the tokenizer has ids beyond vocab_size 100"):
        LLM(str(tiny), load_format="dummy", device="cpu")


def test_random_weights_need_no_shards(tiny, ask):
    for path in tiny.glob("*.safetensors*"):
        path.unlink()
    with LLM(str(tiny), load_format="dummy", device="cpu") as llm:
        assert llm.chat(ask("hi"), SamplingParams(max_tokens=1))[0].finished


def test_metrics_add_up(llm, ask, golden_images):
    [output] = llm.chat(ask("hi", golden_images / "33x21.png"), GREEDY)
    m = output.metrics
    assert min(m.processing, m.queue, m.vision, m.prefill, m.decode) > 0
    assert m.first_token == pytest.approx(m.processing + m.queue + m.vision + m.prefill)
    assert m.total == pytest.approx(m.first_token + m.decode)


def test_raw_text_has_no_template(llm):
    tokenizer = llm._open.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode("Once upon")]
    [text], [raw] = llm.generate("Once upon", GREEDY), llm.generate(ids, GREEDY)
    assert list(text.prompt_token_ids) == ids
    assert _ids([text]) == _ids([raw])
    assert _ids(llm.generate(["Once upon", "x"], GREEDY))[0] == _ids([text])[0]


def test_several_turns_and_images_in_order(llm, golden_images):
    first = {"type": "image", "image": golden_images / "33x21.png"}
    second = {"type": "image", "image": (golden_images / "1x1.png").read_bytes()}
    conversation = [
        {"role": "system", "content": "简短回答。"},
        {"role": "user", "content": [first, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": "B."},
        {"role": "user", "content": [{"type": "text", "text": "And"}, second]},
    ]
    [output] = llm.chat(conversation, GREEDY)
    assert output.num_image_tokens == 42 + 66
    swapped = [*conversation[:1], {"role": "user", "content": [second, {"type": "text", "text": "A?"}]},
               conversation[2], {"role": "user", "content": [{"type": "text", "text": "And"}, first]}]  # fmt: skip
    assert llm.chat(swapped, GREEDY)[0].outputs[0].cumulative_logprob != output.outputs[0].cumulative_logprob


def test_max_model_len_ends_an_answer(ask):
    with LLM("tiny", dtype="float32", device="cpu", max_model_len=40) as llm:
        [output] = llm.chat(ask("hi"), SamplingParams(max_tokens=1000, ignore_eos=True))
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 40
        assert output.outputs[0].finish_reason == "length"
        with pytest.raises(PromptTooLongError, match=r"has 49 tokens, but max_model_len 40 leaves room for 39"):
            llm.generate([5] * 49)
        llm._open.engine.check_integrity()


def test_as_completed_is_the_same_as_all_at_once(llm, conversations):
    completed = dict(llm.chat_as_completed(iter(conversations), GREEDY))
    assert _ids([completed[place] for place in range(5)]) == _ids(llm.chat(conversations, GREEDY))


def test_a_failure_among_many_is_told_beside_the_other_answers(llm, ask, tmp_path):
    """A prompt that is refused, and parameters that are, each in its place; the others answer as alone."""
    asked = [ask("one"), ask("x", tmp_path / "absent.png"), ask("two"), ask("three")]
    params = [GREEDY, GREEDY, SamplingParams(stop_token_ids=[10**6]), GREEDY]
    completed = dict(llm.chat_as_completed(asked, params))
    assert isinstance(completed[1].error, MediaError)
    assert isinstance(completed[2].error, ParameterError)
    assert completed[1].finished
    assert _ids([completed[0], completed[3]]) == _ids(llm.chat([asked[0], asked[3]], GREEDY))


def test_however_many_fail_the_rest_is_answered(llm, ask):
    bad, good = SamplingParams(stop_token_ids=[10**6]), SamplingParams(max_tokens=1)
    params = [bad] * 40 + [good]
    completed = dict(llm.chat_as_completed([ask("hello")] * 41, params))
    assert sum(output.error is not None for output in completed.values()) == 40
    assert completed[40].error is None


def test_conversations_without_end_are_taken_as_they_are_needed(llm, ask):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield ask("again")

    completed = llm.chat_as_completed(endless(), SamplingParams(max_tokens=1))
    for _ in range(3):
        next(completed)
    completed.close()
    assert len(taken) <= llm.config.max_num_seqs + 2 * llm._intake.lookahead


def test_a_bad_prompt_in_a_batch_is_named_and_nothing_is_left(llm, ask, golden_images, tmp_path):
    bad = tmp_path / "note.txt"
    bad.write_text("no image")
    with pytest.raises(MediaError, match=r"messages\[0\]\.content\[0\]\.image: .*note.txt. is not an image"):
        llm.chat([ask("fine", golden_images / "1x1.png"), ask("?", bad), ask("fine")], GREEDY)
    assert llm._open.engine.num_unfinished == 0
    llm.chat(ask("still works"), GREEDY)


@pytest.mark.parametrize("messages", ["hello", 3, [{"role": "user"}], [{"role": "pope", "content": "x"}], [[]]])
def test_malformed_messages(llm, messages):
    with pytest.raises(PromptError):
        llm.chat(messages)


@pytest.mark.parametrize("prompts", [[[]], [[-1]], [[640]], [[1.5]], [None], 3])
def test_malformed_prompts(llm, prompts):
    with pytest.raises(PromptError):
        llm.generate(prompts)


def test_a_stop_token_outside_the_vocabulary(llm, ask):
    with pytest.raises(ParameterError, match=r"stop_token_ids must be in \[0, 640\). Given: 640"):
        llm.chat(ask("hi"), SamplingParams(stop_token_ids=[640]))


def test_nan_names_its_stage_and_spares_the_others(ask, golden_images):
    """NaN in tower, downsampler, one token's embedding or the head: the request fails by stage, others answer."""
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    picture = ask("hi", golden_images / "1x1.png")

    def poison(model, name):
        dict(model.named_parameters())[name].data.view(-1)[0] = float("nan")

    with LLM("tiny", dtype="float32", device="cpu") as llm:
        expected = _ids(llm.chat(ask("hi"), params))
        model = llm.model
        poison(model, "downsampler.conv.weight")
        with pytest.raises(NumericalError, match="stage 'downsampler' computed in float32"):
            llm.chat([ask("hi"), picture], params)
        poison(model, "vision_tower.post_layernorm.bias")
        with pytest.raises(NumericalError, match="stage 'vision_tower'"):
            llm.chat(picture, params)
        assert _ids(llm.chat(ask("hi"), params)) == expected  # text needs neither
        model.language_model.tok_embeddings.weight.data[600, 0] = float("nan")
        with pytest.raises(NumericalError, match="stage 'language_model'"):
            llm.generate([[1, 600]], params)
        assert _ids(llm.chat(ask("hi"), params)) == expected
        poison(model, "language_model.output.weight")
        with pytest.raises(NumericalError, match="stage 'logits'"):
            llm.chat(ask("hi"), params)
        llm._open.engine.check_integrity()


def test_nan_in_one_row_of_a_batch(ask):
    """Inside the engine: the poisoned request is given up with its error, its neighbour finishes."""
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    with LLM("tiny", dtype="float32", device="cpu") as llm:
        expected = _ids(llm.generate([[1, 5]], params))[0][0]
        built = llm._open
        built.engine._runner._model.language_model.tok_embeddings.weight.data[600, 0] = float("nan")
        requests = [_request(llm, ids, built.processor.token_ids, params) for ids in ([1, 600], [1, 5])]
        for request in requests:
            built.engine.add_request(request)
        final = {}
        while built.engine.num_unfinished:
            final |= {output.request_id: output for output in built.engine.step()}
        poisoned, neighbour = (final[request.request_id] for request in requests)
        assert isinstance(poisoned.error, NumericalError)
        assert poisoned.finished
        assert neighbour.error is None
        assert neighbour.outputs[0].token_ids == expected
        built.engine.check_integrity()


def test_fp16_overflow_is_not_an_answer(ask, golden_images):
    """The classic failure of float16 towers: weights that overflow give an error, never `!!!!`."""
    with LLM("tiny", dtype="float16", device="cpu") as llm:
        llm.model.vision_tower.encoder.layers[0].mlp.fc2.weight.data.fill_(6e4)
        with pytest.raises(NumericalError, match="'vision_tower' computed in float16; try --dtype bfloat16"):
            llm.chat(ask("hi", golden_images / "1x1.png"))


def test_random_weights_answer(ask, golden_images):
    with LLM("tiny", load_format="dummy", device="cpu") as llm:
        [output] = llm.chat(ask("hi", golden_images / "1x1.png"), SamplingParams(max_tokens=5, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 5


def test_closing_lets_go_of_weights_and_caches(ask):
    with LLM("tiny", device="cpu") as llm:
        llm.chat(ask("hi"), SamplingParams(max_tokens=1))
        runner = weakref.ref(llm._open.engine._runner)
    gc.collect()
    assert runner() is None


def test_closed(ask):
    with LLM("tiny", device="cpu") as llm:
        pass
    with pytest.raises(EngineError, match="closed"):
        llm.chat(ask("hi"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtyp": "float32"}, ParameterError, "unknown option 'dtyp'; did you mean dtype?"),
        ({"dtype": "float8"}, ParameterError, "dtype must be auto, .* Given: 'float8'"),
        ({"load_format": "gguf"}, ParameterError, "load_format must be auto or dummy"),
        ({"tensor_parallel_size": 3}, ParameterError, "tensor_parallel_size must be 1, 2, 4 or 8. Given: 3"),
        ({"image_cache_memory": -1}, ParameterError, "image_cache_memory must be an integer >= 0. Given: -1"),
        ({"num_speculative_tokens": 1.5}, ParameterError, "num_speculative_tokens must be an integer >= 0"),
        ({"max_num_seqs": 0}, ParameterError, "max_num_seqs must be an integer >= 1. Given: 0"),
        ({"seed": -1}, ParameterError, "seed must be an integer in"),
        ({"seed": 2**32}, ParameterError, "seed must be an integer in"),
        ({"block_size": True}, ParameterError, "block_size must be an integer"),
        ({"max_model_len": 1}, ParameterError, r"max_model_len must be in \[2, 32768\]"),
        ({"max_model_len": 40_000}, ParameterError, r"max_model_len must be in \[2, 32768\]"),
        ({"kv_cache_memory": 1000}, InsufficientMemoryError, "kv_cache_memory 1000 bytes holds 0 tokens"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        LLM("tiny", device="cpu", **options)


def test_a_preset_has_no_weights_to_load():
    with pytest.raises(
        ParameterError, match="'wemm-chat-2k-cn' is a preset without weights: add --load-format dummy"
    ):
        LLM("wemm-chat-2k-cn", device="cpu")


def test_not_enough_memory_is_the_plan(monkeypatch):
    """Refused before a byte is loaded; the line says what was wanted, what is there and what helps."""
    monkeypatch.setattr("wemm.platforms.cpu.CpuPlatform.available_memory", lambda self: 24 * 2**30)
    with pytest.raises(InsufficientMemoryError) as error:
        LLM("wemm-chat-2k-cn", load_format="dummy", dtype="float32", device="cpu")
    message = str(error.value)
    for part in ("weights 35.2 GiB (float32)", "KV cache", "24.0 GiB are available", "--dtype bfloat16"):
        assert part in message
    assert "\n" not in message


def test_generation_config_is_the_default(tiny, ask):
    (tiny / "generation_config.json").write_text('{"max_new_tokens": 3}')
    with LLM(str(tiny), device="cpu") as llm:
        assert llm.default_sampling_params == SamplingParams(max_tokens=3)
        [output] = llm.chat(ask("hi"))
        assert len(output.outputs[0].token_ids) <= 3


def test_half_of_what_is_free_bounds_the_cache(monkeypatch):
    monkeypatch.setattr("wemm.platforms.cpu.CpuPlatform.available_memory", lambda self: 2**28)
    with LLM("tiny", device="cpu", max_num_batched_tokens=64) as llm:
        plan = llm._open.memory_plan
        assert plan.kv_cache <= (2**28 - plan.weights - plan.activations) // 2
        assert plan.kv_tokens > llm.max_model_len


@pytest.mark.parametrize("budget", [0, 4 * 66 * 128 * 4])
def test_memory_of_images_is_bounded(ask, budget):
    """A hundred different pictures later the engine holds the last few that fit, and no more."""
    with LLM("tiny", dtype="float32", device="cpu", image_cache_memory=budget) as llm:
        for start in range(0, 100, 25):
            batch = [ask("?", Image.new("RGB", (8, 8), (i, 0, 0))) for i in range(start, start + 25)]
            llm.chat(batch, SamplingParams(max_tokens=1))
        llm._open.engine.check_integrity()
        kept = llm._open.engine._runner._visual_embeds.values()
        num_bytes = sum(embeds.numel() * embeds.element_size() for embeds in kept)
        assert num_bytes == llm.stats.image_cache_bytes <= budget
        assert bool(kept) == bool(budget)


def test_threads_of_torch_are_left_alone():
    before = torch.get_num_threads()
    LLM("tiny", device="cpu").close()
    assert torch.get_num_threads() == before
