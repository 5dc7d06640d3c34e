"""Attention in Triton where the cases of the ops do not look: edges of tiles, layouts, one part or many."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from wemm.kernels.cuda import decode_attention as decoding
from wemm.ops.decode_attention import decode_attention, with_int8_caches
from wemm.ops.prefill_attention import prefill_attention
from wemm.ops.registry import Inputs
from wemm.ops.vision_attention import vision_attention

pytestmark = pytest.mark.usefixtures("interpreted")
BF16 = torch.bfloat16
INPUTS = Inputs(BF16, torch.device("cpu"))


def _assert_close(op, *arguments, like=None):
    """The kernel on these arguments, the definition on those of `like`, where layouts or what is unread differ."""
    wide = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in like or arguments]
    with torch.inference_mode():
        [kernel] = [i for i in op.implementations if i.automatic and i.supports(*arguments)]
        got, expected = kernel.function(*arguments), op.definition(*wide)
    tolerance = op.tolerances[BF16]
    torch.testing.assert_close(got.float(), expected, rtol=tolerance.rtol, atol=tolerance.atol)


def _paged(spans, kv_heads=1, group=2, head_dim=32, block_size=16, spare_blocks=0):
    """(tokens before, new tokens) per sequence → query, caches, tables, lengths; NaN where nothing is stored."""
    counts = [-(-(before + new) // block_size) for before, new in spans]
    order = INPUTS.permutation(sum(counts) + 1).tolist()
    tables = torch.zeros(len(spans), max(counts) + spare_blocks, dtype=torch.int32)
    caches = [
        torch.full((sum(counts) + 1, block_size, kv_heads, head_dim), torch.nan, dtype=BF16) for _ in range(2)
    ]
    for i, (before, new) in enumerate(spans):
        tables[i, : counts[i]] = torch.tensor([order.pop() for _ in range(counts[i])])
        position = torch.arange(before + new)
        slots = tables[i, position // block_size].long() * block_size + position % block_size
        for cache in caches:
            cache.flatten(0, 1)[slots] = INPUTS.normal(before + new, kv_heads, head_dim)
    query = INPUTS.normal(sum(new for _, new in spans), kv_heads * group, head_dim)
    return query, *caches, tables, INPUTS.int32([before + new for before, new in spans])


@pytest.mark.parametrize(
    ("lengths", "head_dim"),
    [((63, 0, 65, 1), 72), ((128, 129), 72), ((64,), 128), ((30, 40), 80), ((17, 17), 16), ((50,), 96)],
    ids=str,
)
def test_images_of_any_size(lengths, head_dim):
    bounds = INPUTS.int32([0, *lengths]).cumsum(0, dtype=torch.int32)
    query, key, value = (INPUTS.normal(sum(lengths), 2, head_dim) for _ in range(3))
    _assert_close(vision_attention, query, key, value, bounds, head_dim**-0.5)
    _assert_close(vision_attention, query * 30, key, value, bounds, head_dim**-0.5)


def test_queries_keys_and_values_of_one_product():
    qkv = INPUTS.normal(70, 3, 2, 72)
    query, key, value = qkv.unbind(1)
    plain = [x.contiguous() for x in (query, key, value)]
    rest = INPUTS.int32([0, 70]), 72**-0.5
    _assert_close(vision_attention, query, key, value, *rest, like=[*plain, *rest])


@pytest.mark.parametrize("programs", [1, 6, 1000])
@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
def test_decoding_in_one_part_or_many(programs, int8, monkeypatch):
    monkeypatch.setattr(decoding, "_PROGRAMS", programs)
    query, keys, values, tables, lengths = _paged([(0, 1), (63, 1), (64, 1), (199, 1)], spare_blocks=20)
    arguments = query, keys, values, tables, lengths, 32**-0.5
    _assert_close(decode_attention, *(with_int8_caches(arguments) if int8 else arguments))


@pytest.mark.parametrize("group", [1, 3, 7])
def test_prefill_of_any_group_over_a_cache_of_which_the_rest_is_nan(group):
    spans = [(0, 1), (15, 33), (100, 60), (0, 130)]
    query, keys, values, tables, lengths = _paged(spans, kv_heads=2, group=group)
    bounds = INPUTS.int32([0, *(new for _, new in spans)]).cumsum(0, dtype=torch.int32)
    _assert_close(prefill_attention, query, keys, values, tables, bounds, lengths, 32**-0.5)


def test_blocks_of_any_size():
    query, keys, values, tables, lengths = _paged([(70, 1)], block_size=24)
    _assert_close(decode_attention, query, keys, values, tables, lengths, 32**-0.5)
    query, keys, values, tables, lengths = _paged([(70, 20)], block_size=128)
    _assert_close(prefill_attention, query, keys, values, tables, INPUTS.int32([0, 20]), lengths, 32**-0.5)
