"""Stages of requests: what is asked, what is counted, and what a share of the ceiling is."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from wemm import LLM, RequestMetrics
from wemm.benchmark.ceilings import Ceilings
from wemm.benchmark.latency import LatencyFigures, _shares, measure, run
from wemm.benchmark.workload import Workload
from wemm.config import EngineConfig
from wemm.cost import image_cost, prefill_flops
from wemm.engine.build import find_source
from wemm.errors import MediaError, ParameterError
from wemm.platforms import resolve_platform

REAL = find_source(EngineConfig("wemm-chat-2k-cn", load_format="dummy"))
TINY = EngineConfig("tiny", dtype="float32", device="cpu")
pytestmark = pytest.mark.usefixtures("fixed_ceilings")


def _metrics(total=10.0, **seconds):
    stages = dict(processing=1.0, queue=0.5, vision=2.0, prefill=1.5, decode=total - 5.0, first_token=5.0)
    return RequestMetrics(**{**stages, **seconds}, total=total)


def _figures(*requests, batch=1, output_len=6, image_tokens=947, prompt_tokens=1024):
    return LatencyFigures(batch, output_len, prompt_tokens, image_tokens, requests, (10.0,) * len(requests), 4.0)


def _ceilings():
    ceilings = Ceilings(resolve_platform("cpu"), None)
    ceilings.measure()
    return ceilings


def test_every_request_is_measured_and_the_first_batch_is_not(llm, monkeypatch):
    asked = []
    chat = LLM.chat
    monkeypatch.setattr(
        LLM, "chat", lambda self, prompts, params: asked.append(prompts) or chat(self, prompts, params)
    )
    conversations = Workload(6, (20, 30), 6, 3, 0).conversations()
    figures = measure(llm, conversations, output_len=4, batch=2)
    assert asked == [conversations[:2], conversations[:2], conversations[2:4], conversations[4:]]
    assert (len(figures.requests), len(figures.batch_seconds)) == (6, 3)
    assert figures.image_tokens == 50
    assert figures.prompt_tokens > 50
    for metrics in figures.requests:
        assert metrics.vision > 0
        assert 0 < metrics.first_token < metrics.total


def test_requests_that_make_no_whole_batches_are_refused(llm):
    with pytest.raises(ParameterError, match="3 requests do not make batches of 2"):
        measure(llm, Workload(3, None, 0, 3, 0).conversations(), output_len=2, batch=2)


def test_stages_follow_one_another_up_to_the_total():
    figures = _figures(_metrics(8.0), _metrics(10.0), _metrics(12.0))
    stages = figures.waterfall()
    assert [stage["stage"] for stage in stages] == ["processing", "queue", "vision", "prefill", "decode"]
    for stage, following in pairwise(stages):
        assert stage["start"] + stage["seconds"] == pytest.approx(following["start"])
    assert stages[0]["start"] == 0
    assert stages[-1]["start"] + stages[-1]["seconds"] == pytest.approx(10.0), "of the request in the middle"


def test_time_between_tokens_is_decode_over_the_tokens_after_the_first():
    seconds = _figures(_metrics(10.0), _metrics(15.0), output_len=6).seconds()
    assert seconds["inter_token"] == {"median": 1.5, "p95": 2.0, "worst": 2.0}
    assert "inter_token" not in _figures(_metrics(), output_len=1).seconds()


def test_tokens_per_second_are_those_of_the_whole_batch():
    assert _figures(_metrics(), batch=4, output_len=5).tokens_per_s == 2.0


def test_decode_is_compared_with_the_weights_and_the_context_it_reads():
    """Of the real model 14.7 GB: 7.74 B parameters less the embeddings, and 1027 tokens of 131072 bytes."""
    weights = 2 * (7_737_708_544 - 92544 * 4096)
    per_token = (weights + 1027 * 131_072) / 1e10
    figures = _figures(_metrics(5.0 + 5 * per_token))
    assert _shares(figures, REAL, "bfloat16", "bfloat16", None, _ceilings())["inter_token"] == pytest.approx(1.0)
    wide = _shares(
        _figures(_metrics(5.0 + 5 * per_token), batch=9), REAL, "bfloat16", "bfloat16", None, _ceilings()
    )
    assert wide["inter_token"] == pytest.approx((weights + 9 * 1027 * 131_072) / (weights + 1027 * 131_072))


def test_quantised_weights_and_keys_are_fewer_bytes():
    """int4: half a byte per weight of the decoder and two per 128 of them; int8 keys: 132 bytes per head."""
    int4 = find_source(EngineConfig("wemm-chat-2k-cn", load_format="dummy", quantization="int4"))
    linears = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    rest = 2 * (7_737_708_544 - 92544 * 4096 - linears)
    moved = linears // 2 + linears // 128 * 2 + rest + 1027 * 2 * 32 * 8 * 132
    figures = _figures(_metrics(5.0 + 5 * moved / 1e10))
    assert _shares(figures, int4, "bfloat16", "int8", None, _ceilings())["inter_token"] == pytest.approx(1.0)


def test_vision_and_prefill_are_compared_with_the_matrix_product():
    cost = image_cost(REAL.config, REAL.plora, 1960, 1470, "bfloat16")
    vision = (cost.tower_flops + cost.downsampler_flops) / 1e12
    prefill = prefill_flops(REAL.config, REAL.plora, 1024, 947) / 1e12
    figures = _figures(_metrics(vision=2 * vision, prefill=4 * prefill))
    shares = _shares(figures, REAL, "bfloat16", "bfloat16", (1960, 1470), _ceilings())
    assert (shares["vision"], shares["prefill"]) == pytest.approx((0.5, 0.25))


def test_stages_that_wait_for_others_are_compared_with_nothing():
    shares = _shares(_figures(_metrics(), batch=2), REAL, "bfloat16", "bfloat16", (1960, 1470), _ceilings())
    assert set(shares) == {"inter_token"}


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ceilings, "measure", lambda self: [
            probes.append(1e10) for probes in (self.read_probes, self.copy_probes, self.gemm_probes)
        ])  # fmt: skip
        return run(TINY, Workload(4, (20, 30), 1, 3, 0), output_len=3, batch=2)


def test_caches_are_off(result):
    """One picture in four requests: it is encoded for each."""
    assert result.figures["seconds"]["vision"]["median"] > 0
    assert result.settings["caches"] is False


def test_a_result_is_ready_for_json_and_fills_its_table(result):
    line = json.loads(json.dumps(result.line()))
    assert (line["benchmark"], line["batch"], line["output_len"], line["image_tokens"]) == ("latency", 2, 3, 50)
    assert line["settings"]["image_size"] == "20x30"
    [table] = result.tables
    assert [row[0] for row in table.rows] == list(line["seconds"])
    assert all(len(row) == len(table.columns) for row in table.rows)


@pytest.mark.parametrize("ahead", [False, True])
def test_how_long_the_cpu_waited_is_said_where_it_is_a_step_ahead(ahead):
    engine = replace(TINY, async_scheduling=ahead)
    result = run(engine, Workload(1, (20, 30), 1, 3, 0), 3, 1)
    said = [note for note in result.notes if note.startswith("the CPU was a step ahead and waited")]
    assert len(said) == ahead
    assert 0 < result.figures["seconds_awaiting_device"] < result.figures["seconds"]["total"]["worst"]


def test_the_waterfall_is_drawn_with_its_unit(result, tmp_path):
    result.chart(tmp_path / "waterfall.svg")
    text = (tmp_path / "waterfall.svg").read_text()
    for label in ("milliseconds since arrival", "processing", "decode"):
        assert f"<!-- {label} -->" in text


def test_a_picture_and_a_question_of_ones_own(golden_images):
    workload = Workload(2, (640, 480), 2, 3, 0, golden_images / "33x21.png", "What is it?")
    first, second = workload.conversations()
    assert first == second
    assert [part["type"] for part in first[0]["content"]] == ["image", "text"]
    assert first[0]["content"][1]["text"] == "What is it?"
    assert workload.pixels() == (33, 21)
    assert workload.settings()["image_size"] == "33x21"


def test_a_batch_beyond_the_engine_is_refused():
    with pytest.raises(ParameterError, match="--batch 65 is more than --max-num-seqs 64"):
        run(TINY, Workload(65, None, 0, 3, 0), output_len=2, batch=65)


def test_a_file_that_is_no_image_is_refused_before_loading(tmp_path):
    file = tmp_path / "note.png"
    file.write_text("no picture")
    with pytest.raises(MediaError, match="not an image"):
        run(TINY, Workload(1, None, 1, 3, 0, file), output_len=2, batch=1)
