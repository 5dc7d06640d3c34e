"""The goals of an accelerator: what they compare with what, and that every step runs where there is none."""

from __future__ import annotations

import json

import pytest

from wemm.benchmark.device import DeviceBenchmark, Goal, _least_seconds, run
from wemm.benchmark.result import Result
from wemm.cost import decode_bytes, image_cost, kv_bytes_per_token, prefill_flops
from wemm.engine.build import find_source
from wemm.errors import ParameterError
from wemm.ops.registry import DEFINITION, OPS, definitions_only


@pytest.fixture(scope="module")
def dry(fixed_ceilings):
    return run(DeviceBenchmark.dry_run())


def test_a_dry_run_takes_every_step_and_judges_nothing(dry):
    line = json.loads(json.dumps(dry.line()))
    assert set(line["steps"]) == {"as it comes", "int4", "definitions", "together"}
    assert {goal["is_met"] for goal in line["goals"]} == {None}
    ops, table, stages = dry.tables
    assert {row[0] for row in ops.rows} == set(OPS) == {row["op"] for row in line["ops"]["ops"]}
    assert {row[-1] for row in table.rows} == {"dry run"}
    assert [row[0] for row in stages.rows] == ["as it comes", "int4", "definitions"]
    assert dry.notes[0] == "a dry run: the steps work, the figures mean nothing"


def test_every_goal_is_compared_with_a_figure(dry):
    assert all(goal["reached"] > 0 for goal in dry.figures["goals"])


def test_a_cpu_is_not_judged():
    with pytest.raises(ParameterError, match="--dry-run runs the steps on a CPU"):
        run(DeviceBenchmark(device="cpu"))


def test_a_goal_is_met_from_what_was_wanted_on():
    assert Goal("", 0.85, 0.85).is_met is True
    assert Goal("", 0.85, 0.849).is_met is False


def test_the_roofline_of_many_computes_every_prompt_and_reads_for_every_token_but_the_first():
    benchmark = DeviceBenchmark(concurrent=64, concurrent_output_len=64)
    ceilings = {"gemm_gflop_per_s": {"max": 1e6}, "read_gb_per_s": {"max": 4e3}}
    measured = Result("", {}, {}, {"prompt_tokens": 1024, "image_tokens": 947, "ceilings": ceilings}, [], print)
    source = find_source(benchmark.engine())
    image = image_cost(source.config, source.plora, 1960, 1470, "float16")
    prompt = prefill_flops(source.config, source.plora, 1024, 947)
    computing = 64 * (image.tower_flops + image.downsampler_flops + prompt) / 1e15
    keys_and_values = 64 * (1024 + 32) * kv_bytes_per_token(source.config, "float16")
    reading = 63 * (decode_bytes(source.config, "float16") + keys_and_values) / 4e12
    assert _least_seconds(benchmark, measured) == pytest.approx(computing + reading)


def test_the_baseline_runs_no_kernel():
    with definitions_only():
        assert {op._requested for op in OPS.values()} == {DEFINITION}
    assert {op._requested for op in OPS.values()} == {None}
