"""The KV cache gets what a profile of the largest step leaves, on a device that tells; no step is larger."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wemm import LLM, SamplingParams
from wemm.cost import activation_bytes, kv_bytes_per_token, largest_image
from wemm.engine.encoder_cache import EncoderCache
from wemm.engine.kv_cache import KVCacheManager
from wemm.engine.memory_profile import largest_step
from wemm.engine.model_runner import ModelRunner
from wemm.engine.scheduler import Limits, Scheduler
from wemm.engine.sequence import Request, Sequence
from wemm.engine.speculation import Speculator
from wemm.errors import InsufficientMemoryError, RankError
from wemm.ops.registry import definitions_only
from wemm.platforms.cpu import CpuPlatform
from wemm.processing.image_processor import ImagePlan, ProcessedImage
from wemm.processing.processor import ImageSpan, ProcessedPrompt

MODEL = dict(dtype="float32", device="cpu", max_num_batched_tokens=200, max_num_seqs=8)
FREE, PEAK = 2**31, 2**28


class Meter(TorchDispatchMode):
    """Bytes of tensors made inside that are alive, and the most there were; not pixels, which a host keeps."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and tensor.dtype is not torch.uint8:  # else a view, or in place
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: alive for key, alive in self._alive.items() if not alive[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._alive.values()))
        return result


class Told(CpuPlatform):
    """A CPU that tells: FREE always, and PEAK for any work, which it does."""

    worked = 0

    def available_memory(self):
        return FREE

    def peak_memory(self, work):
        type(self).worked += 1
        work()
        return PEAK


class Measured(Told):
    """What work really takes."""

    def peak_memory(self, work):
        with Meter() as meter:
            work()
        return meter.peak


def _run_on(monkeypatch, platform):
    monkeypatch.setitem(sys.modules["wemm.platforms"]._PLATFORMS, "cpu", platform)
    platform.worked = 0


@pytest.fixture
def told(monkeypatch):
    _run_on(monkeypatch, Told)
    return Told


@pytest.fixture
def seen(monkeypatch):
    """What model runners were given: slices of the vision tower, and inputs of the language model."""
    slices, inputs = [], []
    encode, forward = ModelRunner.encode, ModelRunner.forward
    monkeypatch.setattr(ModelRunner, "encode", lambda self, v: slices.append(v) or encode(self, v))
    monkeypatch.setattr(ModelRunner, "forward", lambda self, m: inputs.append(m) or forward(self, m))
    return slices, inputs


def test_the_largest_images_and_the_largest_chunk_are_computed(told, seen):
    slices, inputs = seen
    with LLM("tiny", max_num_batched_patches=2500, max_model_len=600, **MODEL) as llm:
        assert told.worked == 1
        config, limits = llm._open.source.config, llm._open.engine._scheduler._limits
        largest = largest_image(config)
    # A call is under way while the language model computes, and another's result is there.
    assert [(s.first_layer, s.last_layer, s.is_complete) for s in slices] == [
        (0, 1, True), (0, 1, False), (1, 1, True)
    ]  # fmt: skip
    for vision in slices:
        patches = [image.plan.num_patches for image in vision.images]
        assert patches[:2] == [largest.num_patches] * 2
        assert limits.max_image_patches == 2500 <= sum(patches) < 2500 + largest.patch_grid[1]
        assert all(image.pixels.shape == (*image.plan.resized[::-1], 3) for image in vision.images)
    [batch] = inputs
    assert len(batch.input_ids) == 200
    assert len(batch.seq_lens) == 8
    assert len(batch.logits_rows) == 8 + 8 * 8  # each with as many drafts as there may be
    # The chunk is the end of the longest sequence, and all of it is images.
    assert batch.seq_lens.tolist() == [1] * 7 + [600]
    assert batch.cu_seqlens_q.tolist() == [0, 193]
    assert batch.image_rows.tolist() == list(range(7, 200))
    assert sum(s.stop - s.start for s in batch.visual_slices) == 193


def test_what_is_sampled_is_finite_whatever_the_cache_holds(told, monkeypatch):
    """Memory that was never written may be NaN, of which a sampler need not make sense."""
    forward, given = ModelRunner.forward, []

    def forward_of_nan(self, model_input):
        self._kv_cache.fill_(torch.nan)
        forwarded = forward(self, model_input)
        assert not forwarded.is_finite.all()
        return forwarded

    monkeypatch.setattr(ModelRunner, "forward", forward_of_nan)
    monkeypatch.setattr("wemm.engine.memory_profile.sample", lambda *arguments: given.append(arguments))
    with LLM("tiny", max_model_len=600, **MODEL):
        pass
    [(logits, rows)] = given
    assert logits.isfinite().all()
    assert logits.shape == (len(rows), 640)


def test_sequences_shorter_than_a_step_fill_it_together(told, seen):
    with LLM("tiny", max_model_len=90, **MODEL):
        pass
    [batch] = seen[1]
    assert batch.seq_lens.tolist() == [1, 1, 1, 1, 1, 15, 90, 90]
    slots = batch.slot_mapping.tolist()
    assert len(set(slots)) == len(slots) == 200


def test_what_the_step_leaves_is_the_kv_cache(told):
    """All of it but the image cache and the reserve, as long as sequences could use it."""
    with LLM("tiny", **{**MODEL, "max_num_seqs": 64, "max_num_batched_tokens": 64}) as llm:
        plan, config = llm._open.memory_plan, llm._open.source.config
        per_block = 16 * kv_bytes_per_token(config, "float32")
        # The step had a cache of its own: one sequence of 32768 tokens, and 63 of one.
        assert plan.activations == PEAK - (32768 // 16 + 63) * per_block
        assert plan.reserve == 2**29
        room = FREE - plan.activations - plan.image_cache - plan.reserve
        assert plan.kv_cache == room // per_block * per_block
        assert plan.kv_tokens == plan.kv_cache // per_block * 16
        assert plan.available == FREE + plan.weights
        assert llm._open.engine._runner._kv_cache.shape[2] * 16 == plan.kv_tokens
        assert llm.stats.num_blocks * 16 == plan.kv_tokens


def test_no_more_than_all_sequences_could_use(told):
    with LLM("tiny", max_model_len=100, **MODEL) as llm:
        assert llm._open.memory_plan.kv_tokens == 7 * 16 * 8


def test_the_users_sizes_stay(told):
    with LLM("tiny", kv_cache_memory=2**22, image_cache_memory=12345, **MODEL) as llm:
        plan = llm._open.memory_plan
        assert 0 <= 2**22 - plan.kv_cache < 16 * kv_bytes_per_token(llm._open.source.config, "float32")
        assert (plan.image_cache, plan.reserve) == (12345, 0)
        assert plan.max_model_len == plan.kv_tokens


def _refused(monkeypatch, peak, **options):
    monkeypatch.setattr(Told, "peak_memory", lambda self, work: work() or peak)
    with pytest.raises(InsufficientMemoryError) as error:
        LLM("tiny", **{**MODEL, **options})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_leaves_no_room_for_a_sequence_is_refused_with_the_plan(told, monkeypatch):
    message = _refused(monkeypatch, peak=FREE - 2**29)
    for part in (
        "activations 1.5 GiB (profiled)",
        "KV cache 3.0 MiB (2048 tokens)",
        "+ reserve 0.5 GiB = 2.1 GiB, but 2.0 GiB are available",
        "lower --max-model-len, --kv-cache-memory or --max-num-batched-tokens",
    ):
        assert part in message


def test_a_kv_cache_that_was_asked_for_and_does_not_fit_is_refused(told, monkeypatch):
    message = _refused(monkeypatch, peak=FREE, kv_cache_memory=2**24)
    assert "KV cache 16.0 MiB" in message
    assert "reserve" not in message


def test_a_step_that_does_not_fit_is_refused_with_its_size(told, monkeypatch):
    def run_out(self, vision):
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(ModelRunner, "encode", run_out)
    with pytest.raises(InsufficientMemoryError) as error:
        LLM("tiny", max_model_len=600, **MODEL)
    step = "961 image patches, 200 tokens, 72 rows of logits"
    for part in ("2.0 GiB are free", step, "--max-num-batched-tokens"):
        assert part in str(error.value)


def test_a_sequence_is_no_longer_than_the_one_that_was_profiled(monkeypatch):
    """Even if the profile leaves more room than the estimate had seen."""

    class Roomier(Told):
        def available_memory(self):
            return FREE if self.worked else 2**26

    _run_on(monkeypatch, Roomier)
    with LLM("tiny", **{**MODEL, "max_num_seqs": 1}) as llm:
        assert 2048 < llm.max_model_len < 32768  # half of 64 MiB
        assert llm._open.memory_plan.kv_tokens - llm.max_model_len in range(16)


def test_broken_weights_are_found_by_requests_not_by_the_profile(told, monkeypatch, ask):
    """An image that is refused leaves no embeddings to fill a chunk with."""
    load = sys.modules["wemm.engine.build"]._load_model

    def broken(*arguments):
        model = load(*arguments)
        model.vision_tower.encoder.layers[0].mlp.fc2.weight.data.fill_(torch.nan)
        return model

    monkeypatch.setattr("wemm.engine.build._load_model", broken)
    with LLM("tiny", **MODEL) as llm:
        assert told.worked == 1
        assert llm.chat(ask("hi"), SamplingParams(max_tokens=3, ignore_eos=True))


def test_a_cpu_is_not_asked(seen, llm):
    """The estimate is its plan."""
    options = dict(max_model_len=600, **MODEL)
    with LLM("tiny", **options) as llm:
        plan, config = llm._open.memory_plan, llm._open.source.config
        assert plan.activations == activation_bytes(config, 200, 512, "float32")
        assert plan.reserve == 0
    assert seen == ([], [])


def test_answers_after_a_profile_are_those_without(told, llm, ask, golden_images):
    work = [ask("What?", golden_images / "300x200.png"), ask("为什么大海是蓝色的？"), ask("hi")]
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1)
    expected = llm.chat(work, params)
    with LLM("tiny", enforce_eager=True, num_speculative_tokens=0, **MODEL) as profiled:
        assert told.worked == 1
        outputs = profiled.chat(work, params)
        profiled._open.engine.check_integrity()
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]


@pytest.mark.parametrize(
    ("limits", "answers", "pictures", "words", "share"),
    [
        (dict(max_num_batched_patches=2 * 961, max_num_batched_tokens=200, max_num_seqs=8), 2, 2, 10, 0.9),
        (dict(max_num_batched_patches=1, max_num_batched_tokens=4000, max_num_seqs=8), 1, 0, 600, 0.2),
        (dict(max_num_batched_patches=1, max_num_batched_tokens=200, max_num_seqs=64), 8, 0, 1, 0.3),
    ],
    ids=["images", "tokens", "logits"],
)
def test_steps_stay_within_what_was_profiled(monkeypatch, ask, limits, answers, pictures, words, share):
    """Every tensor counted, where images, long prompts or sampling take most, and at least `share` of the plan."""
    _run_on(monkeypatch, Measured)
    params = [
        SamplingParams(
            max_tokens=8, ignore_eos=True, temperature=1.0, top_p=0.8, top_k=600, min_p=0.01, logprobs=20,
            n=answers, repetition_penalty=1.2, logit_bias={5: 1.0}, seed=i,
        )
        for i in range(8)
    ]  # fmt: skip
    images = [Image.new("RGB", (434, 434), (i, 0, 0)) for i in range(8 + pictures)]
    work = [ask(f"{i}" + " a" * words, *images[i : i + pictures]) for i in range(8)]
    options = dict(dtype="float32", device="cpu", image_cache_memory=0, enforce_eager=True, max_model_len=800)
    with definitions_only(), LLM("tiny", **options, **limits) as llm:
        plan = llm._open.memory_plan
        with Meter() as meter:
            outputs = llm.chat(work, params)
    assert all(len(answer.token_ids) == 8 for output in outputs for answer in output.outputs)
    assert share * plan.activations < meter.peak <= plan.activations


class _Answer:
    def __init__(self, room):
        self._room = room

    @property
    def num_tokens_left(self):
        return self._room()


def _sequence(number, length, max_model_len, num_patches, draft):
    """Tokens go round, so that drafts are made and come true. An image of four tokens, if there is room."""
    plan = ImagePlan(resized=(28, 28), patch_grid=(1, num_patches), token_grid=(1, 2))
    images = ((ImageSpan(0, ProcessedImage(None, plan, str(number % 5))),)) if length > 5 else ()
    prompt = ProcessedPrompt(tuple(i % 3 + 10 * number for i in range(length)), images)
    request = Request(str(number), prompt, SamplingParams(), 0, 0.0)
    sequence = Sequence(str(number), request, 0, None, Speculator(draft))
    sequence.answer = _Answer(lambda: max_model_len - sequence.num_tokens)
    return sequence


@settings(max_examples=200, deadline=None)
@given(
    seqs=st.integers(1, 20),
    tokens=st.integers(1, 60),
    max_model_len=st.integers(2, 70),
    draft=st.integers(0, 8),
    block_size=st.integers(1, 8),
    patches=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    max_image_patches=st.integers(50, 200),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=30),
)
@example(  # all of those that may have drafts have as many as they may
    seqs=9,
    tokens=100,
    max_model_len=90,
    draft=8,
    block_size=4,
    patches=[1],
    max_image_patches=50,
    lengths=[20] * 8,
)
def test_no_step_is_larger_than_the_one_profiled(
    seqs, tokens, max_model_len, draft, block_size, patches, max_image_patches, lengths
):
    limits = Limits(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_num_batched_patches=10,
        max_image_patches=max_image_patches,
        num_vision_layers=3,
        embed_bytes_per_token=1,
        embed_bytes_per_call=20,
    )
    num_blocks = -(-max_model_len // block_size) * max(2, seqs // 2)
    kv_cache, encoder_cache = KVCacheManager(num_blocks, block_size), EncoderCache(100)
    scheduler = Scheduler(kv_cache, encoder_cache, limits)
    largest = largest_step(limits, max_model_len, draft, num_blocks * block_size)
    for number, length in enumerate(lengths):
        length = min(length, max_model_len - 1)
        scheduler.add(_sequence(number, length, max_model_len, patches[number % len(patches)], draft))
    for _ in range(300):
        if not scheduler.has_work:
            break
        plan = scheduler.schedule()
        for image in plan.vision.images if plan.vision else ():
            if plan.vision.is_complete:
                encoder_cache.store(image.sha256, image.plan.num_tokens)
        if plan.vision:
            assert sum(image.plan.num_patches for image in plan.vision.images) <= largest.num_patches
        assert sum(entry.num_rows for entry in plan.scheduled) <= largest.num_tokens
        assert len(plan.scheduled) <= largest.num_seqs
        complete = [entry for entry in plan.scheduled if entry.is_complete]
        assert sum(1 + len(entry.draft_token_ids) for entry in complete) <= largest.num_logits
        for entry in plan.scheduled:
            sequence, drafted = entry.sequence, entry.draft_token_ids
            assert entry.stop + len(drafted) <= largest.max_model_len
            scheduler.advance(entry)
            if entry.is_complete:
                sequence.num_pending_tokens = 0
                behind = 10 * int(sequence.seq_id) + (sequence.num_tokens + len(drafted)) % 3
                sequence.output_token_ids += [*drafted, behind]
            if drafted:
                scheduler.accept_drafts(entry, len(drafted))
            if sequence.num_tokens >= max_model_len:
                scheduler.remove(sequence)


@given(
    seqs=st.integers(1, 300),
    tokens=st.integers(1, 5000),
    max_model_len=st.integers(1, 5000),
    draft=st.integers(0, 8),
    kv_tokens=st.none() | st.integers(1, 9000),
)
def test_the_parts_of_the_step_are_its_size(seqs, tokens, max_model_len, draft, kv_tokens):
    limits = Limits(seqs, tokens, 10, 50, 3, 1, 20)
    step = largest_step(limits, max_model_len, draft, kv_tokens)
    spans = step.spans()
    sizes = [stop - start for start, stop in spans]
    assert sizes == sorted(sizes)
    assert len(sizes) == step.num_seqs
    assert sum(sizes) == step.num_tokens
    assert all(0 <= start < stop <= max_model_len for start, stop in spans)
    assert spans[-1][1] == max_model_len
    assert step.num_seqs <= step.num_logits <= step.num_tokens


_RANKS = """
import os, sys
import wemm.platforms, wemm.engine.build as build
from wemm import LLM, SamplingParams
from wemm.platforms.cpu import CpuPlatform

class Told(CpuPlatform):
    def available_memory(self):
        return 2**31
    def peak_memory(self, work):
        work()
        return 2**29 - 2**27 * int(os.environ["RANK"] == os.environ["SMALLER"])

wemm.platforms._PLATFORMS["cpu"] = Told
runner = build._runner
def made(*arguments):
    print("blocks", arguments[-2], flush=True)
    return runner(*arguments)
build._runner = made
with LLM("tiny", device="cpu", dtype="float32", tensor_parallel_size=2, max_num_batched_tokens=64) as llm:
    plan = llm._open.memory_plan
    print("plan", plan.activations, plan.kv_tokens, flush=True)
    [output] = llm.generate([[1, 5, 6]], SamplingParams(max_tokens=5, ignore_eos=True))
    print("ids", list(output.outputs[0].token_ids), flush=True)
"""


def test_the_rank_with_the_least_room_decides(llm):
    """Whichever it is: all of them have as many blocks as it has, and answer as one."""
    [expected] = llm.generate([[1, 5, 6]], SamplingParams(max_tokens=5, ignore_eos=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SMALLER": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANKS], env={**os.environ, **together, "RANK": str(rank)}, stdout=-1, text=True
        )
        for rank in range(2)
    ]
    (leader, _), (follower, _) = (rank.communicate(timeout=120) for rank in ranks)
    blocks, plan, ids = leader.splitlines()
    assert follower.splitlines() == [blocks]
    assert ids == f"ids {list(expected.outputs[0].token_ids)}"
    activations, kv_tokens = map(int, plan.split()[1:])
    assert int(blocks.split()[1]) * 16 == kv_tokens
    # Rank 1 took more, so its peak is the one in the plan: half of the KV heads are its own.
    config = llm._open.source.config
    per_block = 8 * kv_bytes_per_token(config, "float32")
    assert activations == 2**29 - (32768 // 16 + 63) * per_block


def test_a_rank_that_dies_before_the_cache_has_its_size(monkeypatch):
    """SIGKILL while the leader loads: it says so, at once or at the first call."""
    started, popen = [], subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    load = sys.modules["wemm.engine.build"]._load_model

    def kill_and_load(*arguments):
        os.kill(started[0].pid, signal.SIGKILL)
        started[0].wait()
        return load(*arguments)

    monkeypatch.setattr("wemm.engine.worker.subprocess.Popen", start)
    monkeypatch.setattr("wemm.engine.build._load_model", kill_and_load)
    with pytest.raises(RankError, match="rank 1 of the tensor-parallel group was killed by signal 9"):
        LLM("tiny", tensor_parallel_size=2, dtype="float32", device="cpu").generate([[1, 5, 6]])
