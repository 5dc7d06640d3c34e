"""The report shows the figures it was given, in two languages, in one file that asks for nothing."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")

from wemm.benchmark import svg
from wemm.benchmark.html import render, write_report
from wemm.errors import StorageError

VOID = {"meta", "input", "br", "img", "link", "hr"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECTIONS = {"accuracy", "latency", "throughput", "ops", "serve", "environment", "settings"}
# Given but told in words, or not at all.
UNTOLD = re.compile(
    r"\.(waterfall\.\d+\.start|settings\..*|num_tower_calls|duration|offered_per_s|cached_share|queue\..*"
    r"|seconds\.per_token\..*|seconds\.\w+\.(p90|worst))$"
)

CHINESE = re.compile("[\u4e00-\u9fff]")

STAGES = ("processing", "queue", "vision", "prefill", "decode", "first_token", "inter_token", "total")
ENVIRONMENT = {"wemm": "0.1.0", "cpu": "A CPU", "physical_cores": 2, "memory_bytes": 2**34, "date": "2025-01-02",
               "instruction_sets": ["avx2"]}  # fmt: skip
LATENCY = {
    "benchmark": "latency", "environment": ENVIRONMENT,
    "settings": {"model": "nano", "dtype": "bfloat16", "image_size": "640x480", "requests": 10},
    "batch": 1, "output_len": 64, "prompt_tokens": 984, "image_tokens": 947, "tokens_per_s": 33.5172,
    "seconds": {s: {"median": 0.0123 * 3**i, "p95": 0.0145 * 3**i, "worst": 0.02 * 3**i}
                for i, s in enumerate(STAGES)},
    "waterfall": [{"stage": s, "start": 0.5 * i, "seconds": 0.51 + 0.01 * i} for i, s in enumerate(STAGES[:5])],
    "share_of_ceiling": {"decode": 0.8312, "vision": 0.41},
}  # fmt: skip
THROUGHPUT = {
    "benchmark": "throughput", "environment": {**ENVIRONMENT, "date": "2025-01-03"}, "settings": {"model": "nano"},
    "results": {
        "together": {"seconds": 4.1, "requests_per_s": 3.9, "prompt_tokens_per_s": 650.0,
                     "output_tokens_per_s": 249.7, "num_tower_calls": 4},
        "one by one": {"seconds": 20.0, "requests_per_s": 0.8, "prompt_tokens_per_s": 133.0,
                       "output_tokens_per_s": 51.2, "num_tower_calls": 16},
    },
    "speed_up": 4.878,
}  # fmt: skip
OPS = {
    "benchmark": "ops", "environment": ENVIRONMENT, "settings": {"device": "cpu"}, "dtype": "bfloat16",
    "ceilings": {name: {"median": 18.5 * i, "min": 17.25 * i, "max": 19.75 * i} for i, name in
                 enumerate(("read_gb_per_s", "copy_gb_per_s", "gemm_gflop_per_s", "int8_gemm_gflop_per_s"), 1)},
    "ops": [
        {"op": op, "case": f"case {i}", "implementation": "definition", "microseconds": 12345.6 / (i + 1),
         "gb_per_s": 7.5 + i, "gflop_per_s": 2.0 * i, "intensity": 0.75 * i, "bound": "memory",
         "share_of_ceiling": 0.25 + 0.125 * i}
        for i, op in enumerate(("rope_and_store_kv", "rms_norm", "rms_norm", "linear"))
    ],
    "skipped": ["a case that is too large"],
}  # fmt: skip


def _rate(rate, scale, **more):
    quantiles = dict(zip(("p50", "p90", "p95", "p99", "worst"), (1.0, 1.5, 1.75, 2.0, 3.0), strict=True))
    seconds = {
        name: {p: scale * size * value for p, value in quantiles.items()}
        for name, size in {"queue": 0.001, "first_token": 0.2, "inter_token": 0.03, "per_token": 0.031,
                           "total": 2.0}.items()
    }  # fmt: skip
    return {
        "request_rate": rate, "num_requests": 32, "num_errors": 0, "errors": {}, "duration": 30.0,
        "seconds": seconds, "offered_per_s": 1.1, "requests_per_s": 1.0 / scale, "output_tokens_per_s": 64 / scale,
        "prompt_tokens_per_s": 900.0, "cached_share": 0.0, "lateness_p99": 0.002,
        "goodput": {"requests_per_s": 0.9, "share": 0.90625}, **more,
    }  # fmt: skip


SERVE = {
    "benchmark": "serve", "environment": ENVIRONMENT,
    "settings": {"model": "nano", "requests": 32, "slo_first_token": 500.0, "slo_inter_token": 50.0},
    "rates": [_rate(1.0, 1.0), _rate("inf", 2.0, num_errors=4, errors={"429": 3, "timeout": 1}, lateness_p99=1.5)],
}  # fmt: skip
ACCURACY = {
    "accuracy": 0.9143, "num_samples": 5000, "num_errors": 2, "interval": [0.9062, 0.9217], "scoring": "soft",
    "settings": {"max_tokens": 64}, "task": "textvqa", "model": "nano", "date": "2025-01-02",
}  # fmt: skip
RESULTS = [LATENCY, THROUGHPUT, OPS, SERVE]


class Page(HTMLParser):
    """Every element with its attributes, its text and its ancestors; tags must close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", "inside": list(self.open), **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag, self.getpos()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]


@pytest.fixture(scope="module")
def page():
    return Page(render(RESULTS, ACCURACY))


def _leaves(data, path):
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        for key, value in items:
            yield from _leaves(value, f"{path}.{key}")
    elif isinstance(data, int | float):
        yield path, data


GIVEN = dict([*_leaves(RESULTS, "results"), *_leaves(ACCURACY, "accuracy")])


def test_every_figure_is_the_one_given(page):
    for data in page.all("data"):
        assert float(data["value"]) == GIVEN[data["data-figure"]], data


def test_every_number_given_is_shown(page):
    shown = {data["data-figure"] for data in page.all("data")}
    told_once = {  # of the same machine, and where the date is another: once
        path for path in GIVEN if ".environment." in path and not path.startswith("results.0.")
    }
    assert {path for path in GIVEN if not UNTOLD.search(path)} - told_once - shown == set()


def test_what_is_read_is_the_value_rounded(page):
    """Three digits or a tenth of a percent, whatever the unit; tables of stages are in milliseconds."""
    factors = {"s": 1, "ms": 1e3, "µs": 1e6, "%": 100, "GiB": 2**-30}
    for data in page.all("data"):
        number, _, unit = data["text"].partition("\N{NO-BREAK SPACE}")
        is_table = re.search(r"(\.seconds\.\w+\.\w+|lateness_p99)$", data["data-figure"]) and not unit
        factor = 1e3 if is_table else factors.get(unit, 1)
        if ".settings." in data["data-figure"]:  # given in the unit shown
            factor = 1
        exact = factor * float(data["value"])
        assert float(number.replace(",", "")) == pytest.approx(exact, rel=6e-3, abs=0.051 if unit == "%" else 0)


def test_every_section_is_there_in_both_languages(page):
    sections = {section["id"] for section in page.all("section")}
    assert sections == SECTIONS
    for section in page.all("section"):
        inside = [e for e in page.elements if section in e["inside"]]
        english, chinese = ([e for e in inside if e.get("lang") == lang] for lang in ("en", "zh-Hans"))
        assert len(english) == len(chinese) > 0
        assert all(
            re.search("[\u4e00-\u9fff]", e["text"]) or e["text"] == "p95" for e in chinese if len(e["text"]) > 8
        )
        assert not any(re.search("[\u4e00-\u9fff]", e["text"]) for e in english)
    assert page.all("html")[0]["lang"] == "en"


def test_a_section_is_there_only_with_its_data():
    for kind in ("latency", "throughput", "ops", "serve"):
        page = Page(render([r for r in RESULTS if r["benchmark"] == kind], None))
        assert {s["id"] for s in page.all("section")} == {kind, "environment", "settings"}
    assert [s["id"] for s in Page(render([], ACCURACY)).all("section")] == ["accuracy", "settings"]
    assert Page(render([], None)).all("section") == []
    twice = [s["id"] for s in Page(render([LATENCY, LATENCY], None)).all("section")]
    assert len(set(twice)) == len(twice)


def test_the_file_needs_nothing_else(page):
    text = render(RESULTS, ACCURACY)
    links = [e[key] for e in page.elements for key in ("src", "href", "data", "action", "srcset") if key in e]
    ids = {e["id"] for e in page.elements if "id" in e}
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert not re.search(r"url\(|@import|https?://", text)
    assert not {"script", "link", "img", "iframe", "object"} & {e["tag"] for e in page.elements}


def test_the_summary_has_at_most_five_numbers(page):
    cards = [e for e in page.all("a") if any(i.get("class") == "cards" for i in e["inside"])]
    assert [card["href"] for card in cards] == ["#accuracy", "#latency", "#latency", "#throughput", "#serve"]


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 191 }}'


def _poisoned(data):
    """Every text and every name that is not ours is hostile."""
    if isinstance(data, dict):
        return {key if key != "decode" else HOSTILE: _poisoned(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_poisoned(value) for value in data]
    return (
        HOSTILE if isinstance(data, str) and data not in ("latency", "throughput", "ops", "serve", "inf") else data
    )


def test_hostile_names_are_text():
    poisoned = [_poisoned(copy.deepcopy(result)) for result in RESULTS]
    poisoned[3]["rates"][1]["errors"] = {HOSTILE: 3}
    poisoned[0]["environment"] = {HOSTILE: HOSTILE}
    text = render(poisoned, {**_poisoned(ACCURACY), "num_samples": HOSTILE})
    page = Page(text)
    assert not {"script", "img"} & {e["tag"] for e in page.elements}
    assert not [key for e in page.elements for key in e if key.startswith("on")]
    assert "1337" not in text
    assert HOSTILE in page.all("body")[0]["text"]


def _paths(data, path=()):
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield (*path, key)
            yield from _paths(value, (*path, key))


def test_whatever_is_missing_leaves_a_page():
    """Each key of each input in turn, in the first entry of each list: absent, null."""
    inputs = {"results": RESULTS, "accuracy": ACCURACY}
    paths = [path for path in _paths(inputs) if len(path) > 1 and not any(key in (1, 2) for key in path[2:])]
    for path in paths:
        for remove in (True, False):
            changed = copy.deepcopy(inputs)
            target = changed
            for key in path[:-1]:
                target = target[key]
            if remove and isinstance(target, dict):
                del target[path[-1]]
            elif len(path) > 2:
                target[path[-1]] = None
            assert "</html>" in render(changed["results"], changed["accuracy"]), path


def test_numbers_that_are_none_are_no_figures():
    page = Page(render([{**LATENCY, "tokens_per_s": float("nan"), "batch": "many"}], None))
    shown = {data["data-figure"] for data in page.all("data")}
    assert not {"results.0.tokens_per_s", "results.0.batch"} & shown


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(tmp_path / "absent" / "report.html", RESULTS, ACCURACY)


def test_a_line_stays_in_its_frame_and_larger_is_higher():
    chart = svg.line_chart(["1", "2", "4"], {"a": [1.0, 7.3, None], "b": [0.0, 2.0, 3.0]})
    assert [p.index for p in chart.lines["a"]] == [0, 1]
    assert chart.lines["a"][1].y < chart.lines["b"][1].y < chart.lines["b"][0].y
    width, height = chart.size
    assert all(0 < p.x < width and 0 < p.y < height for line in chart.lines.values() for p in line)
    assert float(chart.y_ticks[-1].text) >= 7.3
    assert svg.line_chart(["1"], {"a": [None]}) is None


def test_a_dot_at_the_ceiling_lies_on_the_roof():
    memory, ridge, compute = (0.5, 10.0), (32.0, 640.0), (90.0, 640.0)
    chart = svg.roofline([memory, None, ridge, compute], 20.0, [640.0])
    [[(x0, y0), (x1, y1), (x2, y2)]] = chart.roofs
    first, second, third = chart.dots
    assert [dot.index for dot in chart.dots] == [0, 2, 3]
    assert (second.x, second.y) == pytest.approx((x1, y1))
    assert (first.y - y1) / (first.x - x1) == pytest.approx((y0 - y1) / (x0 - x1))
    assert third.y == pytest.approx(y2)
    assert x1 < third.x < x2
    assert svg.roofline([None], 1.0, [1.0]) is None


def test_the_roof_of_int8_is_higher_and_shares_the_slope_of_memory():
    plain, int8 = svg.roofline([(1.0, 1.0)], 20.0, [640.0, 1280.0]).roofs
    assert plain[0] == int8[0]
    assert (plain[1][1] - plain[0][1]) / (plain[1][0] - plain[0][0]) == pytest.approx(
        (int8[1][1] - int8[0][1]) / (int8[1][0] - int8[0][0])
    )
    assert int8[2][1] < plain[2][1]


# What a browser says of the laid out page: elements that leave it, and what is visible in which language.
PROBE = """<script>
const width = document.documentElement.clientWidth;
const clipped = e => e.closest('.scroll') && !e.matches('.scroll');
const out = [...document.querySelectorAll('body *')].filter(e => !clipped(e) && !e.matches('.switch')
  && (e.getBoundingClientRect().right > width + 1 || e.getBoundingClientRect().left < -1));
const all = lang => [...document.querySelectorAll(`main [lang="${lang}"]`)];
const seen = lang => all(lang).filter(e => e.getClientRects().length).length;
const probe = {out: out.map(e => e.outerHTML.slice(0, 120)), width, scroll: document.documentElement.scrollWidth,
  english: seen('en'), chinese: seen('zh-Hans')};
document.getElementById('in-chinese').checked = true;
probe.then_english = seen('en'); probe.then_chinese = seen('zh-Hans');
document.body.dataset.probe = JSON.stringify(probe);
</script></body>"""


def _browser():
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    assert found, f"this test looks at the page in a browser: install one of {', '.join(BROWSERS)}"
    return found


def _dumped(file, width, profile):
    command = [
        _browser(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--window-size={width},900",
        f"--user-data-dir={profile}", file.as_uri(),
    ]  # fmt: skip
    return Page(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("media", ["screen", "print"])
def test_a_browser_shows_the_figures_and_nothing_leaves_the_page(tmp_path, width, media):
    """The summary as a file of its own, as an evaluation leaves it; the probe replaces the ban on scripts."""
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps(ACCURACY))
    long = {**LATENCY, "settings": {"model": "/a/long/path" * 30, "image": "x" * 300}}
    write_report(tmp_path / "report.html", [long, *RESULTS[1:]], json.loads(summary.read_text()))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", PROBE)
    if media == "print":
        text, width = text.replace("@media print", "@media screen"), 688  # A4 less its margins
    (tmp_path / "probed.html").write_text(text, encoding="utf-8")
    page = _dumped(tmp_path / "probed.html", width, tmp_path / "profile")
    probe = json.loads(page.all("body")[0]["data-probe"])
    assert probe["out"] == []
    assert probe["scroll"] <= probe["width"] <= width
    assert probe["english"] > 50
    assert (probe["chinese"], probe["then_english"]) == (0, 0)
    assert probe["then_chinese"] > 50
    figures = {data["data-figure"]: float(data["value"]) for data in page.all("data")}
    expected = json.loads(summary.read_text())
    assert figures["accuracy.accuracy"] == expected["accuracy"]
    assert [figures[f"accuracy.interval.{i}"] for i in (0, 1)] == expected["interval"]
    assert {path: GIVEN[path] for path in figures} == figures
