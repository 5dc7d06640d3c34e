"""The stub is strict: whatever argument of a call is removed, misnamed or of another dtype, parity fails."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
import torch_npu_stub
from test_npu_parity import CPU, KERNELS
from torch_npu_stub import COMPUTED, SCHEMAS, ContractError

from wemm.benchmark.ops import model_shapes
from wemm.ops.registry import OPS, Inputs
from wemm.quantization import SCHEMES

PARSED = {name: torch._C.parse_schema(schema) for name, schema in SCHEMAS[COMPUTED].items()}
REFUSED = (ContractError, RuntimeError, AssertionError)
UNNOTICED = {
    ("rms_norm", "epsilon"),  # its default differs from the model's by less than the tolerance
    ("vision_attention", "num_key_value_heads"),  # as many as queries have: the default
}
"""What may be left out."""
OTHER_DTYPE = {
    torch.float16: torch.float64,
    torch.float32: torch.float64,
    torch.int8: torch.int16,
    torch.int32: torch.int64,
    torch.int64: torch.int16,
    torch.bool: torch.float64,
}


def by_name(name, args, kwargs):
    """All arguments of a call by their names."""
    return {**dict(zip((a.name for a in PARSED[name].arguments), args, strict=False)), **kwargs}


def given(calls):
    """(op, argument) → a value, where it is not the default."""
    found = {}
    for name, args, kwargs in calls:
        defaults = {a.name: a.default_value for a in PARSED[name].arguments if a.has_default_value()}
        for argument, value in by_name(name, args, kwargs).items():
            if isinstance(value, torch.Tensor) or argument not in defaults or value != defaults[argument]:
                found[name, argument] = value
    return found


def changed(stub, monkeypatch, name, change):
    """Until undone, `change` sees and alters the arguments of each call of an op."""
    call = getattr(stub, name)

    def altered(*args, **kwargs):
        arguments = by_name(name, args, kwargs)
        change(arguments)
        return call(**arguments)

    monkeypatch.setattr(stub, name, altered)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_changed_call_fails_parity(on_stub, parity, monkeypatch, kernel):
    def check():
        return parity(OPS[kernel], "torch_npu", torch.float16, CPU)

    def fails(name, change):
        with monkeypatch.context() as patch:
            changed(on_stub, patch, name, change)
            with pytest.raises(REFUSED):
                check()

    assert check() > 0
    arguments = given(list(on_stub.calls))
    assert arguments
    for (name, argument), value in arguments.items():
        if (kernel, argument) not in UNNOTICED:
            fails(name, lambda a, key=argument: a.pop(key, None))
        if isinstance(value, torch.Tensor):
            fails(name, lambda a, key=argument: a.update({key: _other_dtype(a.get(key))}))
        fails(name, lambda a, key=argument: a.update({f"{key}_": a.pop(key, None)}))
    with monkeypatch.context() as patch:  # and the change is what failed it
        changed(on_stub, patch, name, lambda a: None)
        assert check() > 0


def _other_dtype(value):
    return value if value is None else value.to(OTHER_DTYPE[value.dtype])


@pytest.fixture
def attention():
    """A valid call: two sequences of two new tokens over pages."""
    torch.manual_seed(0)
    cache = torch.randn(4, 128, 2 * 32).half()
    return dict(
        query=torch.randn(2, 2, 4, 32).half(),
        key=cache,
        value=cache,
        atten_mask=torch.ones(2048, 2048, dtype=torch.bool).triu(1),
        actual_seq_kvlen=[130, 7],
        block_table=torch.tensor([[3, 0], [1, 0]], dtype=torch.int32),
        num_query_heads=4,
        num_key_value_heads=2,
        input_layout="BSND",
        sparse_mode=3,
        block_size=128,
    )


def _dense(call):
    call["key"] = call["value"] = torch.randn(2, 130, 2, 32).half()
    call.update(block_table=None, block_size=0)


def _decode(call):
    call.update(query=call["query"][:, :1].contiguous(), atten_mask=None, sparse_mode=0)


CHANGES = {
    "another layout": lambda c: c.update(input_layout="BNSD"),
    "TND": lambda c: c.update(input_layout="TND", query=c["query"].flatten(0, 1)),
    "a query that is not contiguous": lambda c: c.update(query=c["query"].transpose(0, 1)),
    "a cache that is not contiguous": lambda c: c.update(key=c["key"].mT.contiguous().mT),
    "head_dim 24": lambda c: c.update(query=c["query"][..., :24].contiguous()),
    "lengths in a tensor": lambda c: c.update(actual_seq_kvlen=torch.tensor([130, 7])),
    "a tensor among the lengths": lambda c: c.update(actual_seq_kvlen=[torch.tensor(130), 7]),
    "too few lengths": lambda c: c.update(actual_seq_kvlen=[1, 2, 3]),
    "a length beyond the table": lambda c: c.update(actual_seq_kvlen=[300, 7]),
    "more blocks than there are": lambda c: c.update(actual_seq_kvlen=[256, 385], block_table=_table(2, 4)),
    "int64 block table": lambda c: c.update(block_table=c["block_table"].long()),
    "a mask of the visible": lambda c: c.update(atten_mask=~c["atten_mask"]),
    "a small mask": lambda c: c.update(atten_mask=c["atten_mask"][:1024, :1024].contiguous()),
    "a mask without its mode": lambda c: c.update(sparse_mode=0),
    "keys of another dtype": lambda c: c.update(key=c["key"].bfloat16(), value=c["value"].bfloat16()),
    "blocks of 16 for several tokens": lambda c: c.update(
        key=c["key"].view(32, 16, 64), value=c["value"].view(32, 16, 64), block_size=16, block_table=_table(2, 9)
    ),
    "blocks of 24 for one token": lambda c: (
        _decode(c),
        c.update(key=torch.zeros(32, 24, 64).half(), value=torch.zeros(32, 24, 64).half(), block_size=24),
    ),
    "the causal mode for one token": lambda c: c.update(query=c["query"][:, :1].contiguous()),
    "heads that do not divide": lambda c: c.update(num_key_value_heads=3),
    "block_size without pages": lambda c: (_dense(c), c.update(block_size=128)),
    "a quantised cache": lambda c: c.update(key=c["key"].to(torch.int8), value=c["value"].to(torch.int8)),
}


def _table(rows, columns):
    return torch.zeros(rows, columns, dtype=torch.int32)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_attention_outside_of_its_documented_limits_is_refused(on_stub, attention, change):
    change(attention)
    with pytest.raises((ContractError, RuntimeError)):
        on_stub.npu_fused_infer_attention_score_v2(**attention)


@pytest.mark.parametrize("change", [lambda c: None, _dense, _decode], ids=["paged", "dense", "decode"])
def test_attention_within_them_is_computed(on_stub, attention, change):
    change(attention)
    out, _ = on_stub.npu_fused_infer_attention_score_v2(**attention)
    assert out.shape == attention["query"].shape
    assert out.isfinite().all()


def test_every_stored_version_has_a_say(on_stub):
    """A keyword that the oldest version lacks is refused."""
    x = torch.ones(2, 3, dtype=torch.float16)
    on_stub.npu_dynamic_quant(x)
    with pytest.raises(RuntimeError, match="stub_2_7_1"):
        on_stub.npu_dynamic_quant(x, quant_mode="pertoken")


class Untouched(Inputs):
    """Tensors of the right sizes and dtypes whose memory nobody has filled."""

    def normal(self, *shape, scale=1.0):
        return torch.empty(shape, dtype=self.dtype)

    def quantized(self, scheme, out_size, in_size):
        stored = SCHEMES[scheme]
        weight = torch.empty(stored.weight_shape(out_size, in_size), dtype=stored.weight_dtype)
        return weight, torch.empty(stored.scale_shape(out_size, in_size), dtype=stored.scale_dtype)


@pytest.mark.parametrize(
    ("kernels", "block_size"), [(KERNELS, 16), (["decode_attention", "prefill_attention"], 128)], ids=["16", "128"]
)
def test_sizes_of_the_real_model_are_within_the_limits(on_stub, monkeypatch, kernels, block_size):
    """Every call is checked; the products are not computed."""
    monkeypatch.setattr(torch_npu_stub, "_attention", lambda q, *a: q.float())
    monkeypatch.setattr(torch_npu_stub, "_integer_product", lambda a, b: torch.zeros(a.shape[0], b.shape[1]))
    few_rows = dict(num_patches=147, num_image_tokens=20, num_prompt_tokens=260)  # limits are on widths
    shapes = replace(model_shapes("wemm-chat-2k-cn"), **few_rows)
    inputs = Untouched(torch.float16, CPU)
    for name in kernels:
        module = importlib.import_module(f"wemm.ops.{name}")
        if hasattr(module, "_BLOCK_SIZE"):
            monkeypatch.setattr(module, "_BLOCK_SIZE", block_size)
        for case, make in OPS[name].model_cases(inputs, shapes).items():
            if name.endswith("_attention") and case.endswith("int8"):
                continue  # left to the definition
            on_stub.calls.clear()
            with torch.inference_mode(), OPS[name].using("torch_npu"):
                OPS[name](*make())
            assert on_stub.calls, (name, case)
