"""Many requests at once against one after another."""

from __future__ import annotations

import json

import pytest

from wemm.benchmark.throughput import run
from wemm.benchmark.workload import Workload
from wemm.config import EngineConfig

TINY = EngineConfig("tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def result():
    return run(TINY, Workload(3, (20, 30), 1, 3, 0), output_len=3, compare=True)


def test_rates_are_what_was_asked_over_the_seconds(result):
    for way in result.figures["results"].values():
        assert way["requests_per_s"] * way["seconds"] == pytest.approx(3)
        assert way["output_tokens_per_s"] * way["seconds"] == pytest.approx(9)
        assert way["num_tower_calls"] == 1, "one picture"


def test_the_speed_up_is_told_in_figures_and_words(result):
    ways = result.figures["results"]
    speed_up = ways["one by one"]["seconds"] / ways["together"]["seconds"]
    assert result.figures["speed_up"] == speed_up
    assert result.notes == [f"together {speed_up:.1f} times as fast as one by one"]


def test_a_result_is_ready_for_json_and_fills_its_table(result):
    line = json.loads(json.dumps(result.line()))
    assert (line["benchmark"], line["settings"]["model"], line["settings"]["dtype"]) == (
        "throughput", "tiny", "float32",
    )  # fmt: skip
    [table] = result.tables
    assert [row[0] for row in table.rows] == ["together", "one by one"]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_chart_names_its_quantity(result, tmp_path):
    result.chart(tmp_path / "bars.svg")
    text = (tmp_path / "bars.svg").read_text()
    for label in ("requests per second", "together", "one by one"):
        assert f"<!-- {label} -->" in text
