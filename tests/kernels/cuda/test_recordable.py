"""A decode step of the real model launches kernels and nothing else, so that a CUDA graph can hold it.

Its tensors have no memory here: whoever asks one for its value gets an error, as in a capture.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from wemm.config import PRESETS, QuantizationConfig
from wemm.distributed import SINGLE
from wemm.model.batch import Batch
from wemm.model.wemm import WemmModel
from wemm.ops.registry import OPS

CONFIG, PLORA = PRESETS["wemm-chat-2k-cn"]
ONE_LAYER = replace(CONFIG, text=replace(CONFIG.text, num_hidden_layers=1))
NUM_SEQS, NUM_BLOCKS = 4, 100


@pytest.mark.parametrize("language", [None, "int8", "int4"])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_decode_step_asks_the_device_for_nothing(language, kv_dtype, compiled, monkeypatch):
    for op in OPS.values():
        attached = [replace(i, device="meta") for i in op.implementations if i.device == "cuda"]
        monkeypatch.setattr(op, "implementations", attached)
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
    names = [launch.name for launch in launches]
    assert {"_decode_attention", "_join"} <= set(names)
    assert "_silu_and_mul" not in names  # it ends the products of w1 and w3, for which rows are rounded once
    assert names.count("_quantize_rows") == (4 if language else 0)
