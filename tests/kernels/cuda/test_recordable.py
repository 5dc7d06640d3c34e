"""A decode step of the real model launches kernels and nothing else, so that a CUDA graph can hold it; nor does
sampling wait for the device before the tokens are chosen.

Their tensors have no memory here: whoever asks one for its value gets an error, as in a capture.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from wemm.config import PRESETS, QuantizationConfig
from wemm.distributed import SINGLE
from wemm.engine.sampler import SamplingRow, _draw
from wemm.model.batch import Batch
from wemm.model.wemm import WemmModel
from wemm.ops.registry import OPS
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
        x = torch.empty(NUM_SEQS, ONE_LAYER.text.hidden_size, dtype=torch.bfloat16)
        cos = sin = torch.empty(NUM_SEQS, ONE_LAYER.text.head_dim // 2)
        launches = compiled(90, lambda: model.language_model.run_layers(x, cos, sin, batch, cache))
    assert {"_decode_attention", "_join"} <= {launch.name for launch in launches}


def test_draws_ask_the_device_for_nothing(compiled, monkeypatch):
    _on_meta(monkeypatch)
    params = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01)
    rows = [SamplingRow(params, 0, 0, [], [])] * NUM_SEQS
    logits = torch.empty(NUM_SEQS, CONFIG.text.vocab_size, device="meta")
    with torch.inference_mode():
        launches = compiled(90, lambda: _draw(logits, rows))
    assert [launch.name for launch in launches] == ["_keep_top_p"]
    assert launches[0].grid[0] == NUM_SEQS
