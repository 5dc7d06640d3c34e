"""What the largest step takes: it is computed once, on the loaded model, before the KV cache gets its size.

An estimate has to be cautious, and cannot know what kernels and libraries take. Only a device with memory of its
own is asked: where other programs share it, what is free now says little, and on a CPU the step takes minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, cycle

import numpy as np
import torch

from wemm.config import ModelConfig
from wemm.cost import ProfiledMemory, largest_image, size_text
from wemm.engine.model_input import ModelInput, VisualSlice
from wemm.engine.model_runner import ModelRunner
from wemm.engine.sampler import SamplingRow, sample
from wemm.engine.scheduler import MAX_SPECULATING, Limits, VisionSlice
from wemm.errors import InsufficientMemoryError
from wemm.model.wemm import WemmModel
from wemm.platforms import Platform
from wemm.processing.image_processor import ProcessedImage
from wemm.processing.resize import plan_resized
from wemm.request import MAX_LOGPROBS, SamplingParams


@dataclass(frozen=True)
class LargestStep:
    """No step of an engine computes more of anything. Every rank profiles the leader's."""

    num_patches: int
    """Of a vision-tower call."""
    num_tokens: int
    """Rows of the language model."""
    num_seqs: int
    num_logits: int
    """Rows of logits, those behind drafts included."""
    max_model_len: int

    def spans(self) -> list[tuple[int, int]]:
        """Positions (start, stop) that each sequence computes: one of decodes, then chunks, the longest last.

        That one ends a sequence of max_model_len, for some kernels copy what lies before a chunk.
        """
        spans: list[tuple[int, int]] = []
        left = self.num_tokens
        for num_behind in reversed(range(self.num_seqs)):
            num_new = min(self.max_model_len, left - num_behind)
            start = 0 if spans else self.max_model_len - num_new
            spans.append((start, start + num_new))
            left -= num_new
        return spans[::-1]


def largest_step(
    limits: Limits, max_model_len: int, num_speculative_tokens: int, kv_tokens: int | None = None
) -> LargestStep:
    """What the scheduler can put together at most; `kv_tokens`, if the size of the KV cache is known already."""
    num_tokens = min(limits.max_num_batched_tokens, limits.max_running * max_model_len)
    if kv_tokens is not None:
        num_tokens = min(num_tokens, kv_tokens)  # each has a slot of its own
    num_seqs = min(limits.max_running, num_tokens)
    num_drafts = min(num_seqs, MAX_SPECULATING) * num_speculative_tokens
    num_logits = min(num_tokens, num_seqs + num_drafts)
    return LargestStep(limits.max_image_patches, num_tokens, num_seqs, num_logits, max_model_len)


def profile_memory(
    step: LargestStep,
    model: WemmModel,
    config: ModelConfig,
    platform: Platform,
    dtype: torch.dtype,
    kv_cache_dtype: torch.dtype,
    block_size: int,
) -> ProfiledMemory | None:
    """Compute `step`; None, and nothing is computed, where the platform does not tell what it took.

    With several ranks all call it together. The KV cache of the step is allocated for it and is no part of the
    result. Raises InsufficientMemoryError if the step does not fit beside the weights.
    """
    num_blocks = sum(-(-stop // block_size) for _, stop in step.spans())

    def work() -> None:
        runner = ModelRunner(model, config, platform, dtype, kv_cache_dtype, num_blocks, block_size)
        _compute(runner, step, config, block_size)

    kv_cache = math.prod(model.kv_cache_shape(num_blocks, block_size, kv_cache_dtype)) * kv_cache_dtype.itemsize
    before = platform.available_memory()  # beside the weights; what loading them left unused is given back
    try:
        peak = platform.peak_memory(work)
    except torch.OutOfMemoryError:
        raise InsufficientMemoryError(
            f"not enough memory: beside the weights {size_text(before or 0)} are free, which do not hold the "
            f"largest step: {step.num_patches} image patches, {step.num_tokens} tokens, "
            f"{step.num_logits} rows of logits and a KV cache of {size_text(kv_cache)}; lower "
            "--max-num-batched-tokens, --max-num-seqs or --max-model-len, or use a larger machine"
        ) from None
    free = None if peak is None else platform.available_memory()
    if peak is None or free is None:
        return None
    return ProfiledMemory(free, peak - kv_cache, step.max_model_len)


@torch.inference_mode()
def _compute(runner: ModelRunner, step: LargestStep, config: ModelConfig, block_size: int) -> None:
    """The language model's part runs while one vision-tower call is under way, beside the results of another.

    One layer of the tower stands for all: they are alike, and of a layer nothing stays but its output. Layers of
    the language model may differ in their PLoRA.
    """
    done, begun = (_images(step.num_patches, config, name) for name in ("done", "begun"))
    errors = runner.encode(VisionSlice(done, 0, 1, is_complete=True))
    runner.encode(VisionSlice(begun, 0, 1, is_complete=False))
    # An image that is refused has no embeddings: requests with images will fail, those of text alone will not.
    logits = runner.forward(_model_input(step, () if any(errors) else done, block_size)).logits
    # What a new cache holds may be NaN. Of equal logits none can be left out before the others are looked at.
    sample(logits.zero_(), _sampling_rows(step.num_logits, config.text.vocab_size))
    del logits
    runner.encode(VisionSlice(begun, 1, 1, is_complete=True))


def _images(num_patches: int, config: ModelConfig, name: str) -> tuple[ProcessedImage, ...]:
    """Black ones of the largest size, the last as high as it takes to have `num_patches` together."""
    largest = largest_image(config)
    plans = [largest] * (num_patches // largest.num_patches)
    rest = num_patches % largest.num_patches
    if rest:
        num_rows = -(-rest // largest.patch_grid[1])
        plans.append(plan_resized((largest.resized[0], num_rows * config.vision.patch_size), config))
    return tuple(
        ProcessedImage(torch.zeros(*reversed(plan.resized), 3, dtype=torch.uint8), plan, f"{name} {i}")
        for i, plan in enumerate(plans)
    )


def _model_input(step: LargestStep, images: tuple[ProcessedImage, ...], block_size: int) -> ModelInput:
    """Every token of a chunk belongs to one of `images`, if there are any. No sequence shares a block."""
    spans = step.spans()
    positions = [np.arange(*span, dtype=np.int64) for span in spans]
    num_blocks = [-(-stop // block_size) for _, stop in spans]
    first_blocks = [0, *accumulate(num_blocks)][:-1]
    tables = np.zeros((step.num_seqs, max(num_blocks)), dtype=np.int32)
    for table, first, count in zip(tables, first_blocks, num_blocks, strict=True):
        table[:count] = np.arange(first, first + count)
    chunks = [stop - start for start, stop in spans if stop - start > 1]
    num_image_tokens = sum(chunks) if images else 0
    return ModelInput(
        input_ids=np.zeros(step.num_tokens, dtype=np.int64),
        positions=np.concatenate(positions),
        slot_mapping=np.concatenate(
            [first * block_size + p for first, p in zip(first_blocks, positions, strict=True)]
        ),
        block_tables=tables,
        seq_lens=np.array([stop for _, stop in spans], dtype=np.int32),
        logits_rows=np.arange(step.num_logits, dtype=np.int64),
        cu_seqlens_q=np.array([0, *accumulate(chunks)], dtype=np.int32) if chunks else None,
        image_rows=np.arange(step.num_tokens - num_image_tokens, step.num_tokens, dtype=np.int64),
        visual_slices=_visual_slices(images, num_image_tokens),
        pending_rows=np.empty(0, dtype=np.int64),
        pending_draws=np.empty(0, dtype=np.int64),
    )


def _visual_slices(images: tuple[ProcessedImage, ...], num_tokens: int) -> tuple[VisualSlice, ...]:
    """Of the images in turn, as often as it takes."""
    slices: list[VisualSlice] = []
    for image in cycle(images):
        if not num_tokens:
            break
        slices.append(VisualSlice(image.sha256, 0, min(num_tokens, image.plan.num_tokens)))
        num_tokens -= slices[-1].stop
    return tuple(slices)


def _sampling_rows(count: int, vocab_size: int) -> list[SamplingRow]:
    """With everything that copies logits."""
    params = SamplingParams(
        temperature=1.0,
        top_p=0.9,
        top_k=vocab_size - 1,
        min_p=1e-6,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        logprobs=MAX_LOGPROBS,
    )
    allowed = torch.ones(vocab_size, dtype=torch.bool)
    return [SamplingRow(params, 0, index, (0,), (0,), allowed=allowed) for index in range(count)]
