"""Triton kernels where no block is full, where numbers are none, and where results are exact."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from wemm.errors import ParameterError
from wemm.ops.add_plora import add_plora
from wemm.ops.add_plora_pair import add_plora_pair
from wemm.ops.embed_patches import embed_patches, normalize
from wemm.ops.keep_top_p import keep_top_p
from wemm.ops.layer_norm import layer_norm
from wemm.ops.linear import linear
from wemm.ops.linear_int4 import linear_int4
from wemm.ops.linear_int4_silu_and_mul import linear_int4_silu_and_mul
from wemm.ops.linear_int8 import linear_int8
from wemm.ops.linear_int8_silu_and_mul import linear_int8_silu_and_mul
from wemm.ops.linear_silu_and_mul import linear_silu_and_mul
from wemm.ops.registry import TOLERANCES, Inputs
from wemm.ops.rms_norm import rms_norm
from wemm.ops.rope_and_store_kv import rope_and_store_kv
from wemm.quantization import SCHEMES, quantize_rows

pytestmark = pytest.mark.usefixtures("interpreted")
CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def inputs():
    return Inputs(torch.float32, CPU, seed=1)


@torch.inference_mode()
def compare(op, *arguments):
    """The kernel's result, found to be that of the definition."""

    def copies():
        return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]

    with op.using("triton"):
        got = op(*copies())
    tolerance = TOLERANCES[got.dtype]
    torch.testing.assert_close(
        got, op.definition(*copies()), rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True
    )
    return got


@pytest.mark.parametrize("tokens", [*range(1, 10), 17, 65, 129])
def test_any_number_of_tokens(inputs, tokens):
    x, weight, bias = inputs.normal(tokens, 200), inputs.normal(70, 200, scale=200**-0.5), inputs.normal(70)
    for scheme, op in (("int8", linear_int8), ("int4", linear_int4)):
        compare(op, x, *SCHEMES[scheme].quantize(weight), bias)
    if tokens <= 8:
        compare(linear, *(t.to(torch.bfloat16) for t in (x, weight, bias)))


@pytest.mark.parametrize(("scheme", "op"), [("int8", linear_int8), ("int4", linear_int4)])
@pytest.mark.parametrize("tokens", [1, 9, 65])
def test_sums_of_integers_are_exact(inputs, scheme, op, tokens):
    """Scales of 1: the result is the integers' product, to the last bit."""
    x = torch.randint(-127, 128, (tokens, 256), generator=torch.Generator().manual_seed(tokens)).float()
    x[:, 0] = 127
    weight, scale = SCHEMES[scheme].quantize(inputs.normal(40, 256))
    scale = torch.ones_like(scale)
    exact = x.double() @ SCHEMES[scheme].dequantize(weight, scale, 256).double().T
    assert torch.equal(compare(op, x, weight, scale).double(), exact)


@pytest.mark.parametrize(("scheme", "op"), [("int8", linear_int8), ("int4", linear_int4)])
@pytest.mark.parametrize("spoilt", [NAN, INF, -INF, 1e-44])
def test_a_row_that_cannot_be_rounded_is_nan_and_harms_no_other(inputs, scheme, op, spoilt):
    weight = SCHEMES[scheme].quantize(inputs.normal(40, 150))
    for tokens in (3, 9):
        x = inputs.normal(tokens, 150)
        x[1] = 0
        x[1, 100] = spoilt
        with torch.inference_mode(), op.using("triton"):
            y = op(x, *weight)
            others = op(x[[0, 2]], *weight)
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2]], others)


def test_rounding_is_that_of_the_definition(inputs):
    from wemm.kernels.cuda.quantized_rows import quantize_rows as kernel

    x = torch.cat((inputs.normal(20, 300, scale=3), torch.zeros(1, 300), torch.arange(-150.0, 150)[None] / 2))
    x[-1, 0] = 127  # what is rounded in this row ends in .5
    integers, scale = quantize_rows(x)
    with torch.inference_mode():
        got, got_scale = kernel(x, 128)
    assert torch.equal(got[:, :300].float(), integers)
    assert torch.equal(got_scale, scale[:, 0])
    assert got.shape == (22, 384)
    assert not got[:, 300:].any()


def test_keys_and_values_of_int8_are_bit_equal():
    qkv, cos, sin, *caches, slots = rope_and_store_kv.cases(Inputs(torch.bfloat16, CPU, seed=2))["int8"]
    stored = {}
    for implementation in ("triton", "definition"):
        own = [cache.clone() for cache in caches]
        with torch.inference_mode(), rope_and_store_kv.using(implementation):
            rope_and_store_kv(qkv[:9], cos[:9], sin[:9], *own, slots[:9])
        stored[implementation] = torch.stack(own)
    assert torch.equal(stored["triton"], stored["definition"])


@pytest.mark.parametrize("image_tokens", [0, 1, 17, 70])
def test_plora_of_scattered_rows(inputs, image_tokens):
    y, x = inputs.normal(80, 100), inputs.normal(80, 90)
    plora_a, plora_b = inputs.normal(24, 90, scale=0.1), inputs.normal(100, 24, scale=0.2)
    rows = inputs.permutation(80)[:image_tokens]
    got = compare(add_plora, y, x, plora_a, plora_b, 0.5, rows)
    untouched = torch.ones(80, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(got[untouched], y[untouched])


@pytest.mark.parametrize(
    ("op", "scheme"),
    [(linear_silu_and_mul, None), (linear_int8_silu_and_mul, "int8"), (linear_int4_silu_and_mul, "int4")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 16])
def test_the_gate_in_one_launch_is_that_in_three(monkeypatch, op, scheme, dtype, tokens):
    """To the last bit: both products are rounded before the activation."""
    monkeypatch.setattr("wemm.kernels.cuda.linear_int4.MANY_OUTPUTS", 0)  # sums of groups in the same order
    inputs = Inputs(dtype, CPU, seed=3)
    x, weights = inputs.normal(tokens, 300, scale=3), [inputs.normal(70, 300, scale=300**-0.5) for _ in range(2)]
    stored = weights if scheme is None else [t for w in weights for t in SCHEMES[scheme].quantize(w)]
    if scheme is None and tokens > 8:
        with op.using("triton"), torch.inference_mode(), pytest.raises(ParameterError):
            op(x, *stored)
        return
    with torch.inference_mode():
        with op.using("triton"):
            got = op(x, *stored)
        assert torch.equal(got, op.definition(x, *stored))
    assert got.shape == (tokens, 70)


@pytest.mark.parametrize("image_tokens", [0, 1, 17, 70])
def test_a_pair_of_plora_is_two(inputs, image_tokens):
    """To the last bit, with a scaling each."""
    gate, up, x = inputs.normal(80, 100), inputs.normal(80, 100), inputs.normal(80, 90)
    factors = [(inputs.normal(24, 90, scale=0.1), inputs.normal(100, 24, scale=0.2)) for _ in range(2)]
    rows = inputs.permutation(80)[:image_tokens]
    with torch.inference_mode(), add_plora_pair.using("triton"), add_plora.using("triton"):
        got = add_plora_pair(gate.clone(), up.clone(), x, *factors[0], 0.5, *factors[1], 2.0, rows)
        assert torch.equal(got[0], add_plora(gate.clone(), x, *factors[0], 0.5, rows))
        assert torch.equal(got[1], add_plora(up.clone(), x, *factors[1], 2.0, rows))


def test_a_pair_of_different_ranks_is_left_to_its_definition(inputs):
    gate, up, x, rows = inputs.normal(9, 30), inputs.normal(9, 30), inputs.normal(9, 20), torch.arange(5)
    gate_factors, up_factors = ((inputs.normal(rank, 20), inputs.normal(30, rank)) for rank in (8, 4))
    with torch.inference_mode(), add_plora_pair.using("triton"), pytest.raises(ParameterError):
        add_plora_pair(gate, up, x, *gate_factors, 1.0, *up_factors, 1.0, rows)


@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (2, 3, 129)])
def test_norms_of_any_shape(inputs, shape):
    x, weight, bias = inputs.normal(*shape), inputs.normal(shape[-1]), inputs.normal(shape[-1])
    compare(rms_norm, x, weight, 1e-5)
    compare(layer_norm, x, weight, bias, 1e-5)


@pytest.mark.parametrize("vocab_size", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("scale", [0, 1e-6, 1, 10, 1000])
def test_the_nucleus_is_that_of_the_definition(inputs, vocab_size, scale, monkeypatch):
    """Over several blocks; with ties of rounded logits; of what other filters left of a row."""
    monkeypatch.setattr("wemm.kernels.cuda.keep_top_p.BLOCK", 16)
    probs = inputs.normal(6, vocab_size, scale=scale).softmax(dim=-1)
    tied = (inputs.normal(6, vocab_size) * 2).round().softmax(dim=-1)
    top_p = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
    for rows in (probs, tied):
        few = rows.where(rows >= rows.topk(min(7, vocab_size)).values[:, -1:], 0.0)
        for given in (rows, few):
            with torch.inference_mode(), keep_top_p.using("triton"):
                got = keep_top_p(given, top_p)
            assert torch.equal(got, keep_top_p.definition(given, top_p))


def test_the_nucleus_of_a_row_that_sums_to_almost_nothing():
    rows = torch.tensor([[0.0, 1e-30, 2e-30], [0.0, 1e-44, 0.0], [0.0, 1e-12, 2e-12], [0.0, 0.0, 0.0]])
    with torch.inference_mode(), keep_top_p.using("triton"):
        got = keep_top_p(rows, torch.full((4,), 0.1))
    assert torch.equal(got, keep_top_p.definition(rows, torch.full((4,), 0.1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("patch_size", [1, 5, 14])
def test_normalised_samples_are_those_of_the_definition(dtype, patch_size):
    """To the last bit: each output takes one sample. All 256, in patches that are full and in all that are not."""
    width = 3 * patch_size**2
    extents = torch.cartesian_prod(*(torch.arange(patch_size + 1, dtype=torch.int32),) * 2).repeat(
        -(-256 // width), 1
    )
    patches = (torch.arange(len(extents) * width) % 256).to(torch.uint8).view(-1, width)
    weight = torch.eye(width, dtype=dtype).view(width, 3, patch_size, patch_size)
    with torch.inference_mode(), embed_patches.using("triton"):
        got = embed_patches(patches, extents, weight, torch.zeros(width, dtype=dtype))
    assert torch.equal(got, normalize(patches, extents, patch_size).to(dtype))


@pytest.mark.parametrize("num_patches", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("outputs", [1, 127, 129])
def test_any_number_of_patches(inputs, num_patches, outputs):
    patches, bias = inputs.uint8(num_patches, 3 * 7 * 7), inputs.normal(outputs)
    extents = torch.tensor([[7, 7], [7, 2], [1, 7]], dtype=torch.int32).repeat(22, 1)[:num_patches]
    compare(embed_patches, patches, extents, inputs.normal(outputs, 3, 7, 7, scale=147**-0.5), bias)
