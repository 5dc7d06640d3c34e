"""Sizes, FLOPs and bytes of every op at a model's shapes, and what is made of their times."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from wemm.benchmark import ops as benchmark
from wemm.benchmark.ceilings import Ceilings, Timing
from wemm.benchmark.ops import Measurement, OpsBenchmark, _Sizes, load_ops, model_shapes, run, shapes_of
from wemm.config import PRESETS
from wemm.cost import image_cost, kv_bytes_per_token, prefill_flops
from wemm.errors import ModelNotFoundError, ParameterError
from wemm.ops.registry import OPS, Inputs
from wemm.platforms import resolve_platform

load_ops()
CPU = resolve_platform("cpu")
SHAPES = model_shapes("wemm-chat-2k-cn")
NANO = model_shapes("nano")
pytestmark = pytest.mark.usefixtures("fixed_ceilings")


def _work(op, case, shapes=SHAPES):
    """(FLOPs, bytes) of a case whose result is as large as its first argument."""
    arguments = OPS[op].model_cases(_Sizes(torch.bfloat16), shapes)[case]()
    return OPS[op].work(arguments, arguments[0])


def test_the_real_model_is_measured_at_one_large_image_and_a_question():
    assert (SHAPES.num_patches, SHAPES.num_image_tokens, SHAPES.num_prompt_tokens) == (14_700, 947, 1024)


@pytest.mark.parametrize("name", OPS)
def test_cases_can_be_listed_before_they_have_memory(name):
    assert (
        OPS[name].cases(_Sizes(torch.float32)).keys() == OPS[name].cases(Inputs(torch.float32, CPU.device)).keys()
    )


@pytest.mark.parametrize("name", OPS)
def test_every_op_runs_at_the_sizes_of_nano(name):
    op = OPS[name]
    cases = op.model_cases(Inputs(torch.float32, CPU.device), NANO)
    assert cases, "an op without model cases is never measured"
    with torch.inference_mode():
        for make in cases.values():
            arguments = make()
            flops, moved = op.work(arguments, op(*arguments))
            assert flops > 0
            assert moved > 0


@pytest.mark.parametrize("shapes", [SHAPES, NANO], ids=["real", "nano"])
def test_flops_of_the_ops_add_up_to_the_closed_form_of_a_prefill(shapes):
    config, rows, text = shapes.config, shapes.num_prompt_tokens, shapes.config.text
    label = f"prefill {rows}, {shapes.num_image_tokens} image"
    linears = {
        name: _work("linear", f"{name}, prefill {rows}", shapes)[0]
        + _work("add_plora", f"{name}, {label}", shapes)[0]
        for name in ("wqkv", "wo", "w1", "w2")
    }
    attention = _work("prefill_attention", f"prefill {rows}", shapes)[0]
    layer = sum(linears.values()) + linears["w1"] + attention  # w3 is like w1
    logits = _work("linear", "output, decode 1", shapes)[0]
    expected = prefill_flops(config, shapes.plora, rows, shapes.num_image_tokens)
    assert layer * text.num_hidden_layers + logits == expected


def test_flops_of_the_ops_add_up_to_the_closed_form_of_the_tower():
    n, vision = SHAPES.num_patches, SHAPES.config.vision
    q_proj, fc1, fc2 = (_work("linear", f"{name}, tower {n}")[0] for name in ("q_proj", "fc1", "fc2"))
    layer = 4 * q_proj + fc1 + fc2 + _work("vision_attention", f"tower {n}")[0]
    embedding = _work("embed_patches", f"tower {n}")[0]
    cost = image_cost(SHAPES.config, SHAPES.plora, 1960, 1470, "bfloat16")
    assert layer * vision.num_hidden_layers + embedding == cost.tower_flops


def test_a_chunk_after_cached_tokens_attends_to_them():
    """Two halves are the whole."""
    whole = _work("prefill_attention", "prefill 1024")[0]
    second = _work("prefill_attention", "chunk of 512 after 512")[0]
    first = _work("prefill_attention", "prefill 512", dataclasses.replace(SHAPES, num_prompt_tokens=512))[0]
    assert first + second == whole


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_decode_attention_moves_the_tokens_in_use_and_no_more(batch):
    _, moved = _work("decode_attention", f"decode {batch}, context 1024")
    layers = SHAPES.config.text.num_hidden_layers
    keys_and_values = batch * 1024 * kv_bytes_per_token(SHAPES.config, "bfloat16") // layers
    assert keys_and_values < moved < 1.02 * keys_and_values


def test_decode_attention_does_not_count_empty_blocks():
    arguments = list(OPS["decode_attention"].cases(Inputs(torch.float32, CPU.device))["one sequence"])
    before = OPS["decode_attention"].work(tuple(arguments), arguments[0])
    arguments[1], arguments[2] = (torch.cat([cache, cache]) for cache in arguments[1:3])
    assert OPS["decode_attention"].work(tuple(arguments), arguments[0]) == before


def test_storing_moves_the_new_tokens_whatever_the_cache_holds():
    text = SHAPES.config.text
    head = 4 * text.head_dim * 2
    moved = 2 * text.num_attention_heads * head + 4 * text.num_key_value_heads * head
    assert _work("rope_and_store_kv", "decode 4")[1] == moved + 2 * 4 * text.head_dim // 2 * 4 + 4 * 8


def test_a_product_reads_its_weight_and_writes_its_result():
    x, weight, _ = OPS["linear"].model_cases(_Sizes(torch.bfloat16), SHAPES)["w1, decode 1"]()
    result = torch.empty(1, 14336, dtype=torch.bfloat16, device="meta")
    assert OPS["linear"].work((x, weight, None), result)[1] == 2 * (4096 + 14336 * 4096 + 14336)


def test_patches_are_read_as_bytes():
    arguments = OPS["embed_patches"].model_cases(_Sizes(torch.bfloat16), SHAPES)["tower 14700"]()
    result = torch.empty(14_700, 1152, dtype=torch.bfloat16, device="meta")
    weight_and_bias = 2 * (588 * 1152 + 1152)
    assert OPS["embed_patches"].work(arguments, result)[1] == 14_700 * (588 + 2 * 4 + 2 * 1152) + weight_and_bias


def test_a_pair_of_plora_computes_twice_as_much_and_reads_its_input_once():
    label = f"prefill 1024, {SHAPES.num_image_tokens} image"
    (flops, moved), (single_flops, single_moved) = (
        _work("add_plora_pair", label),
        _work("add_plora", f"w1, {label}"),
    )
    assert flops == 2 * single_flops
    assert moved == 2 * single_moved - SHAPES.num_image_tokens * (4096 * 2 + 8)


@pytest.mark.parametrize("kind", ["", "int8_", "int4_"])
def test_a_gate_computes_two_products_and_writes_one_result(kind):
    product, gate = OPS[f"linear_{kind}".rstrip("_")], OPS[f"linear_{kind}silu_and_mul"]
    x, *weight, _ = product.model_cases(_Sizes(torch.bfloat16), SHAPES)["w1, decode 4"]()
    x, *weights = gate.model_cases(_Sizes(torch.bfloat16), SHAPES)["decode 4"]()
    result = torch.empty(4, 14336, dtype=torch.bfloat16, device="meta")
    (flops, moved), single = gate.work((x, *weights), result), product.work((x, *weight, None), result)
    assert flops == 2 * single[0]
    assert moved == 2 * single[1] - 4 * 2 * (4096 + 14336)


def test_without_plora_its_op_has_no_sizes():
    bare = dataclasses.replace(SHAPES, plora=None)
    for name in ("add_plora", "add_plora_pair"):
        assert OPS[name].model_cases(_Sizes(torch.bfloat16), bare) == {}


def test_ops_that_multiply_int8_are_held_against_its_ceiling():
    assert {name for name, op in OPS.items() if op.arithmetic} == {
        "linear_int4",
        "linear_int4_silu_and_mul",
        "linear_int8",
        "linear_int8_gelu",
        "linear_int8_silu_and_mul",
    }
    ceilings = Ceilings(CPU, torch.float32, [1e10], [1e10], [1e12], [4e12])
    plain, int8 = (
        Measurement("op", "case", "definition", Timing((1.0,)), 10**12, 10**9, arithmetic).figures(ceilings)
        for arithmetic in (None, torch.int8)
    )
    assert (plain["bound"], plain["share_of_ceiling"]) == ("compute", 1.0)
    assert (int8["bound"], int8["share_of_ceiling"]) == ("compute", 0.25)


@pytest.mark.parametrize(
    ("flops", "moved", "bound"), [(10**9, 10**9, "memory"), (10**12, 10**9, "compute"), (0, 10**9, "memory")]
)
def test_the_roofline_says_which_ceiling_binds(flops, moved, bound):
    ceilings = Ceilings(CPU, torch.float32)
    ceilings.measure()
    least = max(flops / ceilings.gemm, moved / ceilings.read)
    row = Measurement("op", "case", "definition", Timing((2 * least,)), flops, moved).figures(ceilings)
    assert row["bound"] == bound
    assert row["share_of_ceiling"] == pytest.approx(0.5)
    assert row["gb_per_s"] == pytest.approx(moved / (2 * least) / 1e9)
    assert row["intensity"] == flops / moved


def test_every_implementation_of_an_op_is_measured_beside_the_definition():
    from wemm.kernels import load_kernels

    load_kernels("cpu")
    result = run(OpsBenchmark("cpu", "float32", "rms_norm", "nano", 0.001))
    found = {(row["case"], row["implementation"]) for row in result.figures["ops"]}
    implementations = ["definition", *(i.name for i in OPS["rms_norm"].implementations if i.device == "cpu")]
    cases = OPS["rms_norm"].model_cases(_Sizes(torch.float32), NANO)
    assert found == {(case, name) for case in cases for name in implementations}
    assert result.figures["skipped"] == []
    assert len(result.tables[0].rows) == len(found)
    assert all(len(row) == len(result.tables[0].columns) for row in result.tables[0].rows)


def test_a_kernel_that_takes_no_such_case_is_left_out():
    op = OPS["silu_and_mul"]

    @op.impl("picky", device="cpu", supports=lambda gate, up: gate.shape[0] == 1)
    def _(gate, up):
        return op.definition(gate, up)

    try:
        rows = run(OpsBenchmark("cpu", "float32", "silu_and_mul", "cases", 0.001)).figures["ops"]
    finally:
        op.implementations.pop()
    assert [row["case"] for row in rows if row["implementation"] == "picky"] == ["decode"]


def test_a_case_without_a_number_is_left_out():
    rows = run(OpsBenchmark("cpu", "float32", "add_residual", "cases", 0.001)).figures["ops"]
    assert "none" in OPS["add_residual"].cases(Inputs(torch.float32, torch.device("cpu")))
    assert rows
    assert "none" not in {row["case"] for row in rows}


def test_a_case_that_does_not_fit_is_skipped_and_said(monkeypatch):
    monkeypatch.setattr(type(CPU), "available_memory", lambda self: 4000)
    result = run(OpsBenchmark("cpu", "float32", "rms_norm", "nano", 0.001))
    assert result.figures["ops"] == []
    skipped = {entry["case"] for entry in result.figures["skipped"]}
    assert "decode 16" in skipped
    assert any("skipped: rms_norm, decode 16: needs up to" in note for note in result.notes)


def test_weights_come_in_copies_that_no_cache_holds_and_activations_do_not(monkeypatch):
    monkeypatch.setattr(type(CPU), "available_memory", lambda self: 2**36)
    assert benchmark._num_copies(2**20, CPU) == 1
    assert benchmark._num_copies(117 * 2**20, CPU) == 5
    assert benchmark._num_copies(2**24, CPU) == 8
    monkeypatch.setattr(type(CPU), "available_memory", lambda self: 4 * 117 * 2**20)
    assert benchmark._num_copies(117 * 2**20, CPU) == 2


def test_repeated_numbers_have_the_shape_and_scale_asked_for(monkeypatch):
    monkeypatch.setattr(benchmark, "_BLOCK_SIZE", 1000)
    x = benchmark._RepeatedNumbers(torch.float32, CPU.device).normal(7, 333, scale=3.0)
    assert x.shape == (7, 333)
    assert x.std().item() == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="int8"), "dtype must be float32, bfloat16, float16. Given: 'int8'"),
        (dict(only="frob"), "no op 'frob'; there are"),
        (dict(seconds=0.0), "seconds must be above 0. Given: 0.0"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ParameterError, match=message):
        OpsBenchmark(**options)


def test_unknown_shapes_are_refused():
    with pytest.raises(ModelNotFoundError, match="no model 'frob'"):
        run(OpsBenchmark("cpu", shapes="frob"))


def test_the_roofline_draws_every_dot_with_its_name(tmp_path):
    result = run(OpsBenchmark("cpu", "float32", "rms_norm", "nano", 0.001))
    result.chart(tmp_path / "roof.svg")
    text = (tmp_path / "roof.svg").read_text()
    for label in ("FLOP per byte that must move", "GFLOP/s", "read 10.0 GB/s", "decode 16"):
        assert f"<!-- {label} -->" in text


def test_presets_stand_for_their_own_shapes():
    config, plora = PRESETS["wemm-chat-2k-cn"]
    assert shapes_of(config, plora) == SHAPES
