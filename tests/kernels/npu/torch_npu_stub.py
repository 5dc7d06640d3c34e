"""A torch_npu without an NPU: every call is held to the published schemas and documented limits, then computed.

Schemas (op_schemas.json) are registered with torch, so torch itself refuses unknown names, missing arguments and
wrong types, as it would with torch_npu; each call must be valid in every stored version. Dtypes, layouts and sizes
are those that torch_npu/_op_plugin_docs.py of the 2.13.0 wheel states, for Atlas A2 where products differ. What is
documented but not modelled here (other layouts, quantised attention …) is refused too.
"""

from __future__ import annotations

import importlib.machinery
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from wemm.quantization import quantize_rows

SCHEMAS: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("op_schemas.json").read_text())["wheels"]
COMPUTED = "torch_npu-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"
"""The version whose schema calls the computation; the others only check."""
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)
_LIBRARIES: list[torch.library.Library] = []  # ops live as long as these


class ContractError(Exception):
    """A call that the documentation does not allow."""


def require(condition: bool, says: str) -> None:
    if not condition:
        raise ContractError(says)


def dtype_in(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    require(tensor.dtype in allowed, f"{name} must be one of {allowed}, is {tensor.dtype}")


def contiguous(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        require(tensor.is_contiguous(), f"{name} must be contiguous")


def npu_rms_norm(input: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, ...]:
    dtype_in("input", input, FLOATS)
    dtype_in("gamma", gamma, [input.dtype])
    require(2 <= input.dim() <= 8, "input must have 2 to 8 dimensions")
    require(gamma.shape == input.shape[input.dim() - gamma.dim() :], "gamma must be the last dimensions of input")
    wide = input.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * inverse * gamma.float()).to(input.dtype), inverse


def npu_rotary_mul(
    input: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    rotary_mode: str = "half",
    rotate: torch.Tensor | None = None,
) -> torch.Tensor:
    dtype_in("input", input, FLOATS)
    require(input.dim() == r1.dim() == r2.dim() == 4, "all must have 4 dimensions")
    for name, table in (("r1", r1), ("r2", r2)):
        dtype_in(name, table, [input.dtype])
        b, s, n, d = input.shape
        require(tuple(table.shape) in [(1, s, 1, d), (b, s, 1, d), (b, s, n, d)], f"{name}: 1S1D, BS1D, BSND")
        require(bool((table.abs() <= 1).all()), f"{name} must lie in [-1, 1]")
    require(input.shape[3] < 896 and input.shape[3] % 2 == 0, "D must be even and below 896")
    require(input.shape[0] < 1000 and input.shape[2] < 1000, "B and N must be below 1000")
    require(rotary_mode == "half" and rotate is None, "only rotary_mode half is modelled")
    first, second = input.float().chunk(2, -1)
    return (r1.float() * input.float() + r2.float() * torch.cat((-second, first), -1)).to(input.dtype)


def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    dtype_in("input", input, FLOATS)
    require(1 <= input.dim() <= 8 and input.shape[dim] % 2 == 0, "1 to 8 dimensions, the chosen one even")
    gate, up = input.float().chunk(2, dim)
    return (gate * torch.sigmoid(gate) * up).to(input.dtype)


def npu_scatter_nd_update_(input: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    dtype_in("input", input, [*FLOATS, torch.bool, torch.int64, torch.int8])
    dtype_in("updates", updates, [input.dtype])
    dtype_in("indices", indices, [torch.int32, torch.int64])
    require(indices.dim() >= 2 and indices.shape[-1] <= input.dim(), "indices: 2 dimensions, the last an index")
    shape = (*indices.shape[:-1], *input.shape[indices.shape[-1] :])
    require(updates.shape == shape, f"updates must have shape {shape}")
    bounds = torch.tensor(input.shape[: indices.shape[-1]])
    require(bool(((indices >= 0) & (indices < bounds)).all()), "an index lies outside of input")
    input[tuple(indices.long().unbind(-1))] = updates
    return input


def npu_dynamic_quant(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype_in("input", input, HALVES)
    require(input.dim() > 1 and input.numel() > 0, "input must have more than one dimension")
    plain = smooth_scales is None and group_index is None and dst_type is None
    require(plain and quant_mode == "pertoken" and dst_type_max == 0, "only the defaults are modelled")
    # Documented is round(x / scale), without a word on ties and zeros. Here they fall as in the definition, which
    # multiplies; docs/ascend.md names it among what a card must show.
    integers, scale = quantize_rows(input)
    return integers.to(torch.int8), scale.squeeze(-1)


def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: torch.dtype | int | None = None,
    **other: Any,
) -> torch.Tensor:
    [dtype] = [d for d in HALVES if output_dtype in (d, _SCALAR_TYPES[d])] or [None]
    require(dtype is not None, "only output_dtype float16 and bfloat16 are modelled")
    require(offset is None and all(v is None for v in other.values()), "only these arguments are modelled")
    dtype_in("x1", x1, [torch.int8])
    dtype_in("x2", x2, [torch.int8])
    dtype_in("scale", scale, [torch.float32] if dtype is torch.float16 else [torch.float32, torch.bfloat16])
    require(x1.dim() == x2.dim() == 2 and x1.shape[1] == x2.shape[0], "x1 [M, K], x2 [K, N]")
    require(x1.numel() > 0 and max(x1.shape[1], *x2.shape) <= 65535, "not empty, K and N up to 65535")
    require(x1.is_contiguous() and (x2.is_contiguous() or x2.t().is_contiguous()), "x2 may be transposed, x1 not")
    require(tuple(scale.shape) in [(1,), (x2.shape[1],)], "scale [1] or [N]")
    require(pertoken_scale is not None, "without pertoken_scale a float32 scale is for other outputs")
    dtype_in("pertoken_scale", pertoken_scale, [torch.float32])
    require(tuple(pertoken_scale.shape) == (x1.shape[0],), "pertoken_scale [M]")
    product = _integer_product(x1, x2) * pertoken_scale[:, None] * scale.float()
    if bias is not None:
        dtype_in("bias", bias, [dtype, torch.float32, torch.int32])
        require(tuple(bias.shape) in [(x2.shape[1],), (1, x2.shape[1])], "bias [N] or [1, N]")
        require(bias.dtype is not torch.int32, "a bias of int32 is added before scaling: not modelled")
        product = product + bias.float()
    return product.to(dtype)


def _integer_product(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """Exact below 2**53, then float32."""
    return (x1.double() @ x2.double()).float()


_SCALAR_TYPES = {torch.float16: 5, torch.bfloat16: 15}
"""What torch makes of a dtype given for an int."""


def npu_fused_infer_attention_score_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    atten_mask: torch.Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: torch.Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    query_quant_mode: int = 0,
    key_quant_mode: int = 0,
    value_quant_mode: int = 0,
    inner_precise: int = 0,
    return_softmax_lse: bool = False,
    **other: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    is_plain = all(v is None for v in other.values()) and actual_seq_qlen is None and not return_softmax_lse
    is_plain = is_plain and pre_tokens == next_tokens == 2147483647 and inner_precise == 0
    require(is_plain and query_quant_mode == key_quant_mode == value_quant_mode == 0, "not modelled")
    require(input_layout == "BSND" and query.dim() == 4, "only input_layout BSND is modelled: 4 dimensions")
    dtype_in("query", query, HALVES)
    dtype_in("key", key, [query.dtype])
    dtype_in("value", value, [query.dtype])
    contiguous(query=query, key=key, value=value)
    require(key.shape == value.shape, "key and value must have one shape")
    batch, num_new, num_heads, head_dim = query.shape
    num_kv_heads = num_key_value_heads or num_query_heads
    require(num_query_heads == num_heads <= 256, "num_query_heads must be N of query, up to 256")
    require(num_heads % num_kv_heads == 0 and num_heads // num_kv_heads <= 64, "groups of up to 64 heads")
    require(head_dim % 16 == 0 and head_dim <= 512 and num_heads * head_dim < 65535, "D: 16-aligned, up to 512")
    require(0 < batch <= 65536 and num_new > 0, "B up to 65536")
    lengths = None if actual_seq_kvlen is None else list(actual_seq_kvlen)
    if lengths is not None:
        require(len(lengths) in (1, batch) and min(lengths) >= 0, "actual_seq_kvlen: 1 or B lengths")
        lengths = lengths * batch if len(lengths) == 1 else lengths
    if block_table is None:
        require(block_size == 0, "block_size is for page attention")
        require(key.dim() == 4 and key.shape[0] == batch and key.shape[2:] == (num_kv_heads, head_dim), "key BSND")
        lengths = lengths or [key.shape[1]] * batch
        require(max(lengths) <= key.shape[1], "actual_seq_kvlen beyond key")
        keys, values = ([x[i, :n] for i, n in enumerate(lengths)] for x in (key, value))
    else:
        require(lengths is not None, "page attention needs actual_seq_kvlen")
        _check_pages(key, block_table, block_size, lengths, num_new, num_kv_heads * head_dim)
        keys, values = (
            [
                x[block_table[i, : -(-n // block_size)].long()].flatten(0, 1)[:n].unflatten(-1, (num_kv_heads, -1))
                for i, n in enumerate(lengths)
            ]
            for x in (key, value)
        )
    is_causal = sparse_mode == 3
    if is_causal:
        require(num_new > 1 and atten_mask is not None, "sparse_mode 3 needs atten_mask, and Q_S above 1")
        dtype_in("atten_mask", atten_mask, [torch.bool, torch.int8, torch.uint8])
        contiguous(atten_mask=atten_mask)
        require(atten_mask.shape[-2:] == (2048, 2048) and atten_mask.numel() == 2048**2, "atten_mask: 2048 x 2048")
        hidden = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        require(torch.equal(atten_mask.bool().view(2048, 2048), hidden), "atten_mask: 1 above the diagonal")
    else:
        require(sparse_mode == 0 and atten_mask is None, "only sparse_mode 0 without a mask, and 3, are modelled")
    out = [
        _attention(q, k, v, softmax_scale, is_causal) for q, k, v in zip(query, keys, values, strict=True)
    ]  # fmt: skip
    return torch.stack(out).to(query.dtype), torch.zeros(1)


def _check_pages(
    key: torch.Tensor, block_table: torch.Tensor, block_size: int, lengths: list[int], num_new: int, features: int
) -> None:
    require(key.dim() == 3 and key.shape[1:] == (block_size, features), "key [blocks, block_size, H]")
    require(features <= 65535 and key.numel() < 2**31, "H up to 65535, key up to 2**31 - 1 elements")
    if num_new > 1:
        require(block_size in (128, 256, 384, 512), "block_size for Q_S above 1: 128, 256, 384 or 512")
    else:
        require(block_size > 0 and block_size % 16 == 0, "block_size: a multiple of 16")
    dtype_in("block_table", block_table, [torch.int32])
    blocks = [-(-n // block_size) for n in lengths]
    require(block_table.dim() == 2 and block_table.shape[0] == len(lengths), "block_table [B, blocks]")
    require(block_table.shape[1] >= max(blocks), "block_table is shorter than the longest sequence")
    require(key.shape[0] >= sum(blocks), "fewer blocks than the sequences need without sharing")


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool) -> torch.Tensor:
    """[new, heads, head_dim], [length, kv_heads, head_dim] → [new, heads, head_dim], float32."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if is_causal:
        visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(k) - len(q))
        scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


COMPUTE: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        npu_dynamic_quant,
        npu_fused_infer_attention_score_v2,
        npu_quant_matmul,
        npu_rms_norm,
        npu_rotary_mul,
        npu_scatter_nd_update_,
        npu_swiglu,
    )
}


def make() -> ModuleType:
    """The module, to be put into sys.modules. Calls are kept in `calls`."""
    module: Any = ModuleType("torch_npu")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    module.npu = SimpleNamespace()
    module.calls = []
    versions = [_register(wheel) for wheel in SCHEMAS]
    for name in COMPUTE:
        setattr(module, name, _checked(name, [getattr(ops, name) for ops in versions], module.calls))
    return module


def _register(wheel: str) -> Any:
    """torch.ops namespace of one version."""
    namespace = "stub_" + wheel.split("-")[1].replace(".", "_")
    library = torch.library.Library(namespace, "DEF")
    _LIBRARIES.append(library)
    for name, schema in SCHEMAS[wheel].items():
        library.define(schema)
        num_results = len(torch._C.parse_schema(schema).returns)
        compute = COMPUTE[name] if wheel == COMPUTED else _nothing(num_results)
        library.impl(name, compute, "CompositeExplicitAutograd")
    return getattr(torch.ops, namespace)


def _nothing(num_results: int) -> Callable[..., Any]:
    def result(*args: Any, **kwargs: Any) -> Any:
        made = tuple(torch.empty(0) for _ in range(num_results))
        return made if num_results > 1 else made[0]

    return result


def _checked(name: str, versions: list[Any], calls: list[Any]) -> Callable[..., Any]:
    schema = torch._C.parse_schema(SCHEMAS[COMPUTED][name])
    lists = [a.name for a in schema.arguments if "List[int]" in str(a.type)]

    def call(*args: Any, **kwargs: Any) -> Any:
        for given in (kwargs[n] for n in lists if kwargs.get(n) is not None):
            is_plain = isinstance(given, list) and all(type(v) is int for v in given)
            require(is_plain, f"{name}: a list of int")  # torch would read a tensor's numbers
        results = [op(*args, **kwargs) for op in versions]
        calls.append((name, args, kwargs))
        return results[list(SCHEMAS).index(COMPUTED)]

    return call
