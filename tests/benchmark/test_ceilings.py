"""The clock and the ceilings: what is called how often, and which probe counts."""

from __future__ import annotations

import pytest
import torch

from wemm.benchmark import ceilings as module
from wemm.benchmark.ceilings import Ceilings, describe, time_calls
from wemm.platforms import resolve_platform

CPU = resolve_platform("cpu")


@pytest.fixture
def small_probes(monkeypatch):
    monkeypatch.setattr(module, "_PROBE_BYTES", 2**22)
    monkeypatch.setattr(module, "_PROBE_SECONDS", 0.002)
    monkeypatch.setattr(module, "_GEMM_SIZES", {"cpu": (64,)})


def _clock(monkeypatch, cost):
    """A clock that each call of the returned function moves on by `cost` seconds."""
    now, calls = [0.0], []

    def function():
        calls.append(now[0])
        now[0] += cost

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return function, calls


def test_a_call_longer_than_the_budget_is_made_once_and_counts(monkeypatch):
    function, calls = _clock(monkeypatch, 5.0)
    assert time_calls(function, CPU, 1.0).rounds == (5.0,)
    assert len(calls) == 1


def test_a_warm_up_does_not_count_where_there_is_time(monkeypatch):
    now = [0.0]
    costs = iter([0.5, *[0.01] * 1000])

    def function():
        now[0] += next(costs)

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    timing = time_calls(function, CPU, 1.0)
    assert timing.best == pytest.approx(0.01)
    assert timing.median == pytest.approx(0.01)
    assert len(timing.rounds) > 5


def test_the_budget_is_kept(monkeypatch):
    function, calls = _clock(monkeypatch, 0.125)
    time_calls(function, CPU, 1.0)
    assert len(calls) * 0.125 <= 1.125


def test_short_calls_are_timed_together_and_told_alone(monkeypatch):
    function, calls = _clock(monkeypatch, 1e-5)
    timing = time_calls(function, CPU, 0.01)
    assert timing.median == pytest.approx(1e-5)
    assert len(calls) > 20 * len(timing.rounds)


def test_every_probe_is_kept_and_the_best_is_the_ceiling(small_probes):
    ceilings = Ceilings(CPU, torch.float32)
    for _ in range(3):
        ceilings.measure()
    assert len(ceilings.read_probes) == len(ceilings.copy_probes) == len(ceilings.gemm_probes) == 3
    assert ceilings.read == max(ceilings.read_probes)
    assert ceilings.gemm == max(ceilings.gemm_probes)
    for spread in ceilings.figures().values():
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]


def test_a_probe_reads_and_copies_what_it_says(small_probes, monkeypatch):
    """Seconds of 1 each: the rates are then bytes and FLOPs."""
    monkeypatch.setattr(Ceilings, "_seconds", lambda self, function: 1.0)
    ceilings = Ceilings(CPU, torch.bfloat16)
    ceilings.measure()
    assert (ceilings.read, ceilings.copy_probes, ceilings.gemm) == (2**22, [2**22], 2 * 64**3)
    assert set(ceilings.int8_gemm_probes) <= {2 * 64**3}


def test_products_of_int8_have_a_ceiling_of_their_own_where_torch_has_them():
    ceilings = Ceilings(CPU, torch.bfloat16, [1e9], [1e9], [4e12])
    assert ceilings.gemm_of(torch.int8) == ceilings.gemm_of(None) == 4e12
    assert "int8_gemm_gflop_per_s" not in ceilings.figures()
    ceilings.int8_gemm_probes += [5e12, 6e12]
    assert (ceilings.gemm_of(torch.int8), ceilings.gemm_of(None)) == (6e12, 4e12)
    assert describe(ceilings.figures()).endswith("in int8 6,000.0 GOP/s (median 5,500.0, least 5,000.0)")


def test_a_product_that_torch_does_not_have_is_no_probe(small_probes, monkeypatch):
    def absent(*arguments):
        raise RuntimeError("not compiled for this device")

    monkeypatch.setattr(torch, "_int_mm", absent)
    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", absent)
    ceilings = Ceilings(CPU, torch.float32)
    ceilings.measure()
    assert ceilings.int8_gemm_probes == []


def test_a_small_machine_gets_a_small_probe(small_probes, monkeypatch):
    monkeypatch.setattr(type(CPU), "available_memory", lambda self: 2**23)
    monkeypatch.setattr(Ceilings, "_seconds", lambda self, function: 1.0)
    ceilings = Ceilings(CPU, torch.float32)
    ceilings.measure()
    assert ceilings.read == 2**21


def test_the_spread_is_told_in_words(small_probes):
    ceilings = Ceilings(CPU, torch.float32, [1e9, 3e9], [2e9], [4e12])
    assert describe(ceilings.figures()).startswith(
        "ceilings: read 3.0 GB/s (median 2.0, least 1.0); copy 2.0 GB/s"
    )
