"""Definitions against the written formula, where the model's own sizes would hide a slip."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from wemm import LLM
from wemm.config import PRESETS, RopeScaling
from wemm.layers.norm import LayerNorm
from wemm.layers.rotary_embedding import rotary_angles
from wemm.ops.decode_attention import decode_attention
from wemm.ops.registry import Inputs
from wemm.ops.rms_norm import rms_norm

TEXT = PRESETS["wemm-chat-2k-cn"][0].text


def test_decode_attention_uses_its_scale():
    *arguments, scale = decode_attention.cases(Inputs(torch.float32, torch.device("cpu")))["mixed lengths"]
    query, *rest = arguments
    torch.testing.assert_close(
        decode_attention(2 * query, *rest, scale / 2), decode_attention(query, *rest, scale)
    )
    assert not torch.allclose(decode_attention(query, *rest, scale / 2), decode_attention(query, *rest, scale))


def test_norms_add_eps_under_the_root():
    """Of inputs so small that eps is all there is."""
    x = 1e-3 * torch.randn(3, 64)
    norm = LayerNorm(64, 1e-5)
    norm.weight.data.fill_(1)
    norm.bias.data.fill_(0)
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(norm(x), centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(rms_norm(x, torch.ones(64), 1e-5), expected)


def test_rotary_frequencies_are_rounded_from_float64():
    positions = torch.tensor([0, 1, 32767])
    frequencies = (1 / 1e6 ** (np.arange(0, 128, 2) / 128)).astype(np.float32)
    angles = torch.outer(positions.float(), torch.from_numpy(frequencies))
    cos, sin = rotary_angles(positions, TEXT)
    assert torch.equal(cos, angles.cos())
    assert torch.equal(sin, angles.sin())


def test_linear_rope_scaling_divides_positions():
    scaled = dataclasses.replace(TEXT, rope_scaling=RopeScaling("linear", 2.0))
    plain = dataclasses.replace(TEXT, rope_scaling=None)
    assert torch.equal(rotary_angles(torch.tensor([4]), scaled)[0], rotary_angles(torch.tensor([2]), plain)[0])


def test_logits_are_float32_whatever_the_dtype():
    with LLM("tiny", dtype="bfloat16", device="cpu") as llm:
        model = llm.model
        with torch.inference_mode():
            assert model.compute_logits(torch.zeros(1, 128, dtype=torch.bfloat16)).dtype is torch.float32


def test_decode_attention_never_reads_behind_the_end_of_a_sequence():
    """Sequences of other lengths beside it, and NaN wherever nothing was written."""
    inputs = Inputs(torch.float32, torch.device("cpu"))
    arguments = decode_attention.cases(inputs)["mixed lengths"]
    query, keys, values, tables, lengths, scale = arguments
    offsets = torch.arange(tables.shape[1] * keys.shape[1])
    unwritten = torch.ones(keys.shape[:2], dtype=torch.bool)
    for table, length in zip(tables, lengths, strict=True):
        written = offsets[: int(length)]
        unwritten[table[written // keys.shape[1]].long(), written % keys.shape[1]] = False
    keys[unwritten], values[unwritten] = float("nan"), float("nan")
    together = decode_attention.definition(query, keys, values, tables, lengths, scale)
    for i in range(len(lengths)):
        row = slice(i, i + 1)
        alone = decode_attention.definition(query[row], keys, values, tables[row], lengths[row], scale)
        torch.testing.assert_close(together[row], alone)
        assert alone.isfinite().all()
