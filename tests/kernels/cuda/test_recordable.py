"""A decode step of the real model launches kernels and nothing else, so that a CUDA graph can hold it; nor does
sampling wait for the device before the tokens are chosen.

And what comes before and behind it waits for no result, so that the next step can be launched meanwhile. Tensors
have no memory here: whoever asks one for its value gets an error, as in a capture.
Their tensors have no memory here: whoever asks one for its value gets an error, as in a capture.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from wemm.config import PRESETS, QuantizationConfig
from wemm.distributed import SINGLE
from wemm.engine.decode_graphs import _WholeStep
from wemm.engine.model_input import ModelInput, VisualSlice
from wemm.engine.model_runner import ModelRunner
from wemm.engine.sampler import SamplingRow, _draw, sample
from wemm.engine.vision_encode import image_batch
from wemm.model.batch import Batch
from wemm.model.vision_tower import PatchEmbedding
from wemm.model.wemm import WemmModel
from wemm.ops.registry import OPS
from wemm.platforms import Platform
from wemm.processing.image_processor import ProcessedImage
from wemm.processing.resize import plan_resized
from wemm.request import SamplingParams

CONFIG, PLORA = PRESETS["wemm-chat-2k-cn"]
ONE_LAYER = replace(CONFIG, text=replace(CONFIG.text, num_hidden_layers=1))
NUM_SEQS, NUM_BLOCKS = 4, 100


def _on_meta(monkeypatch):
    for op in OPS.values():
        attached = [replace(i, device="meta") for i in op.implementations if i.device == "cuda"]
        monkeypatch.setattr(op, "implementations", attached)


@pytest.mark.parametrize("language", [None, "int8", "int4"])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_decode_step_asks_the_device_for_nothing(language, kv_dtype, compiled, monkeypatch):
    _on_meta(monkeypatch)
    with torch.device("meta"), torch.inference_mode():
        model = WemmModel(ONE_LAYER, PLORA, SINGLE, QuantizationConfig(language))
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not name.endswith("scale"):
                parameter.data = parameter.data.to(torch.bfloat16)
        cache = torch.empty(model.kv_cache_shape(NUM_BLOCKS, 16, kv_dtype), dtype=kv_dtype)
        indices = torch.empty(NUM_SEQS, dtype=torch.int64)
        batch = Batch(
            input_ids=indices,
            positions=indices,
            slot_mapping=indices,
            block_tables=torch.empty(NUM_SEQS, NUM_BLOCKS, dtype=torch.int32),
            seq_lens=torch.empty(NUM_SEQS, dtype=torch.int32),
            logits_rows=indices,
        )
        step = _WholeStep(model)
        launches = compiled(90, lambda: step.recorded(step.before(batch), batch, cache))
    names = [launch.name for launch in launches]
    assert {"_decode_attention", "_join"} <= set(names)
    assert names.count("_rms_norm") == 3  # before the halves of the layer, and at the end; one adds
    assert "_silu_and_mul" not in names  # it ends the products of w1 and w3, for which rows are rounded once
    assert names.count("_quantize_rows") == (4 if language else 0)


class _NothingWaits(TorchDispatchMode):
    """Refuses copies to and from the device that hold the caller up until it has caught up."""

    def __init__(self):
        super().__init__()
        self.num_copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [x for x in (*args[:1], result) if isinstance(x, torch.Tensor)]
        if len({x.device for x in tensors}) > 1:
            names = [argument.name for argument in func._schema.arguments]
            self.num_copies += 1
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            assert given.get("non_blocking"), f"{func} of {tuple(result.shape)} waits"
        return result


class _Copies(list):
    """Instead of copies to main memory: tensors here have nothing to copy."""

    def __call__(self, x):
        self.append(x)


def test_a_step_is_launched_without_waiting_for_the_one_before(compiled, monkeypatch):
    """Chunks with an image, a token that is not known yet, and everything that sampling can be asked for."""
    _on_meta(monkeypatch)
    copies = _Copies()
    monkeypatch.setattr("wemm.engine.sampler.HostCopy", copies)
    with torch.device("meta"), torch.inference_mode():
        model = WemmModel(ONE_LAYER, PLORA).to(torch.bfloat16)
        platform = Platform(torch.device("meta"))
        dtypes = torch.bfloat16, torch.bfloat16
        runner = ModelRunner(model, ONE_LAYER, platform, *dtypes, NUM_BLOCKS, 16)
        runner._visual_embeds["cat"] = torch.empty(9, ONE_LAYER.text.hidden_size, dtype=torch.bfloat16)
        model.language_model.angles(torch.empty(1, dtype=torch.int64))  # sends its frequencies once
        last_token_ids, pending = torch.empty(3, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    inputs = ModelInput(
        input_ids=np.zeros(21, dtype=np.int64),
        positions=np.arange(21),
        slot_mapping=np.arange(21),
        block_tables=np.zeros((2, 4), dtype=np.int32),
        seq_lens=np.array([30, 20], dtype=np.int32),
        logits_rows=np.array([0, 20]),
        cu_seqlens_q=np.array([0, 20], dtype=np.int32),
        image_rows=np.arange(3, 8),
        visual_slices=(VisualSlice("cat", 2, 7),),
        pending_rows=np.array([0]),
        pending_draws=np.array([2]),
    )
    params = SamplingParams(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=0.5, min_tokens=9, logit_bias={1: 2.0}, logprobs=3,
    )  # fmt: skip
    allowed = torch.ones(ONE_LAYER.text.vocab_size, dtype=torch.bool)
    row = SamplingRow(params, 0, 0, [1, 2, 2], [3, 3], frozenset({4}), allowed, pending)
    with _NothingWaits() as watch:
        compiled(90, lambda: sample(runner.forward(inputs, last_token_ids).logits, [row, row]))
    assert watch.num_copies > 10
    assert [tuple(x.shape) for x in copies] == [(2, 4), (2, 4), (2,)]


def test_images_are_sent_without_waiting_for_the_device(compiled, monkeypatch):
    """As bytes, and normalised where they are multiplied."""
    _on_meta(monkeypatch)
    device, sizes = torch.device("meta"), [(1960, 1470), (1960, 799)]
    images = [
        ProcessedImage(torch.empty(height, width, 3, dtype=torch.uint8), plan_resized((width, height), CONFIG), "")
        for width, height in sizes
    ]
    num_patches = sum(image.plan.num_patches for image in images)
    with device, torch.inference_mode():
        embedding = PatchEmbedding(CONFIG.vision).to(torch.bfloat16)
    with torch.inference_mode(), _NothingWaits() as watch:
        batch = image_batch(images, CONFIG.vision, device)
        launches = compiled(90, lambda: embedding(batch.patches, batch.extents))
    assert watch.num_copies == len(images) + 3
    assert (batch.patches.dtype, len(batch.patches)) == (torch.uint8, num_patches)
    assert [launch.name for launch in launches] == ["_embed_patches"]
    assert {t.device for t in (batch.patches, batch.extents, batch.position_ids, batch.cu_seqlens)} == {device}


def test_draws_ask_the_device_for_nothing(compiled, monkeypatch):
    _on_meta(monkeypatch)
    params = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01)
    rows = [SamplingRow(params, 0, 0, [], [])] * NUM_SEQS
    logits = torch.empty(NUM_SEQS, CONFIG.text.vocab_size, device="meta")
    with torch.inference_mode():
        launches = compiled(90, lambda: _draw(logits, rows))
    assert [launch.name for launch in launches] == ["_keep_top_p"]
    assert launches[0].grid[0] == NUM_SEQS
