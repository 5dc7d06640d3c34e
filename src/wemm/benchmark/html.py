"""Benchmarks and an evaluation as one HTML file that needs nothing else: English and Chinese, screen and paper.

Every number stands in a `<data value="…" data-figure="…">`: the value as it was given, and where.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wemm.benchmark import svg
from wemm.errors import ParameterError, StorageError

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"
_ABSENT = "–"
_UNITS = ((1.0, "s", 1.0), (1e-3, "ms", 1e3), (0.0, "µs", 1e6))
_KINDS = ("latency", "ops", "throughput", "serve")


@dataclass(frozen=True)
class Figure:
    """A number, and where in the inputs it stands."""

    value: float
    path: str


def write_report(path: Path, results: Sequence[Mapping[str, Any]], accuracy: Mapping[str, Any] | None) -> None:
    """Write the report. `accuracy` is an evaluation's summary; what is missing anywhere is left out.

    Raises ParameterError without jinja2, StorageError if the file cannot be written.
    """
    text = render(results, accuracy)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror}); name another --report") from None


def render(results: Sequence[Mapping[str, Any]], accuracy: Mapping[str, Any] | None) -> str:
    """The page. Raises ParameterError without jinja2."""
    environment = _environment()
    figures = _figures(list(results), "results")
    by_kind = {kind: [each for each in figures if each.get("benchmark") == kind] for kind in _KINDS}
    return environment.get_template("report.html").render(
        accuracy=_figures(accuracy, "accuracy"),
        results=figures,
        machines=_machines(figures),
        raw=json.dumps({"results": results, "accuracy": accuracy}, ensure_ascii=False, indent=1, default=str),
        **by_kind,
    )


@functools.cache
def _environment() -> Environment:
    try:
        import jinja2
    except ImportError:
        raise ParameterError("--report needs jinja2: pip install 'wemm[bench]'") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number, "count": _count, "time": _time, "ms": _milliseconds, "percent": _percent,
        "gib": _gibibytes, "value": _value, "share": _share, "json": _json,
    }  # fmt: skip
    environment.globals |= {
        "rate_chart": _rate_chart, "roofline": _roofline, "is_late": _is_late, "top": _top, "svg": svg,
        "best_rate": _best_rate,
    }  # fmt: skip
    return environment


def _figures(data: Any, path: str) -> Any:
    """The same data with a Figure for every number."""
    if isinstance(data, Mapping):
        return {str(key): _figures(value, f"{path}.{key}") for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_figures(value, f"{path}.{index}") for index, value in enumerate(data)]
    if isinstance(data, int | float) and not isinstance(data, bool):
        return Figure(data, path)
    return data


def _machines(results: Sequence[Mapping[str, Any]]) -> list[tuple[list[str], dict[str, Any]]]:
    """Environments that differ in more than the date, and which benchmarks ran there."""
    machines: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for result in results:
        environment = result.get("environment")
        if isinstance(environment, dict) and environment:
            key = json.dumps({k: _plain(v) for k, v in environment.items() if k != "date"}, default=str)
            machines.setdefault(key, ([], environment))[0].append(str(result.get("benchmark")))
    return list(machines.values())


def _plain(value: Any) -> Any:
    """Figures and what holds them, as they were given."""
    if isinstance(value, Figure):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, indent=1, default=str)


def _float(value: Any) -> float | None:
    """The number of a figure; None for whatever else stands there."""
    return value.value if isinstance(value, Figure) and math.isfinite(value.value) else None


def _shown(show: Callable[[float], str]) -> Callable[..., Any]:
    """A filter: what is no number is shown as it is, what is absent as a dash."""

    @functools.wraps(show)
    def filtered(figure: Any, unit: str = "") -> Any:
        from markupsafe import Markup

        value = _float(figure)
        if value is None:
            return figure if isinstance(figure, str) and figure else _ABSENT
        text = show(value) + (f"\N{NO-BREAK SPACE}{unit}" if unit else "")
        return Markup('<data value="{}" data-figure="{}">{}</data>').format(figure.value, figure.path, text)

    return filtered


def _significant(value: float) -> str:
    """Three digits, or all before the point."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1 or not size:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.1 else f"{value:.2g}"


_number = _shown(_significant)
_count = _shown(lambda value: f"{value:,.0f}")
_milliseconds = _shown(lambda value: _significant(1e3 * value))
_percent = _shown(lambda value: f"{100 * value:.1f}\N{NO-BREAK SPACE}%")
_gibibytes = _shown(lambda value: f"{value / 2**30:.1f}\N{NO-BREAK SPACE}GiB")


@_shown
def _time(seconds: float) -> str:
    unit, factor = next((unit, factor) for least, unit, factor in _UNITS if abs(seconds) >= least)
    return f"{_significant(factor * seconds)}\N{NO-BREAK SPACE}{unit}"


def _value(value: Any) -> Any:
    """Anything of a settings or environment table."""
    if isinstance(value, Figure):
        return _shown(lambda number: f"{number:g}" if isinstance(number, float) else str(number))(value)
    if isinstance(value, list):
        return ", ".join(str(_plain(item)) for item in value) or _ABSENT
    if isinstance(value, dict):
        return json.dumps(_plain(value), ensure_ascii=False, default=str)
    return _ABSENT if value is None or value == "" else str(value)


def _share(figure: Any, whole: Any = 1.0) -> str:
    """Percent of a whole for the style sheet, from 0 to 100."""
    value = _float(figure) or 0.0
    whole = whole if isinstance(whole, float) else _float(whole)
    return f"{100 * min(1.0, max(0.0, value / whole)):.2f}" if whole else "0"


def _top(values: Sequence[Any]) -> float:
    """The largest of some figures, or sums of two figures."""
    sums = [
        sum(_float(part) or 0.0 for part in (value if isinstance(value, list) else [value])) for value in values
    ]
    return max(sums, default=0.0)


def _rate_chart(rates: Any, factor: float, **paths: str) -> svg.LineChart | None:
    """Lines of `name="key.key"` over the offered rates; figures times `factor`."""
    if not isinstance(rates, list) or not rates:
        return None
    columns = [_rate_name(rate) for rate in rates]
    series = {}
    for name, path in paths.items():
        values = [_float(_at(rate, path)) for rate in rates]
        series[name] = [None if value is None else factor * value for value in values]
    return svg.line_chart(columns, series)


def _rate_name(rate: Any) -> str:
    value = _plain(_at(rate, "request_rate"))
    return f"{value:g}" if isinstance(value, float | int) else "∞" if value == "inf" else _ABSENT


def _at(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _roofline(result: Any) -> svg.Roofline | None:
    """Of an ops result whose ceilings are known."""
    ops = _at(result, "ops")
    names = ("read_gb_per_s", "gemm_gflop_per_s", "int8_gemm_gflop_per_s")
    read, gemm, int8 = (_float(_at(result, f"ceilings.{name}.max")) for name in names)
    if not isinstance(ops, list) or not read or not gemm:
        return None
    return svg.roofline([_point(op) for op in ops], read, [gemm, int8] if int8 else [gemm])


def _point(op: Any) -> tuple[float, float] | None:
    intensity, speed = _float(_at(op, "intensity")), _float(_at(op, "gflop_per_s"))
    return (intensity, speed) if intensity and speed and intensity > 0 and speed > 0 else None


def _is_late(rate: Any) -> bool:
    """Whether the client, not the endpoint, decided the figures."""
    from wemm.benchmark.load_figures import is_late

    return is_late(_float(_at(rate, "lateness_p99")) or 0.0, _float(_at(rate, "seconds.first_token.p50")) or 0.0)


def _best_rate(rates: Any) -> Any:
    """The rate that answered most, of those without errors if there are any."""
    known = [rate for rate in rates if _float(_at(rate, "requests_per_s"))] if isinstance(rates, list) else []
    clean = [rate for rate in known if not _float(_at(rate, "num_errors"))] or known
    return max(clean, key=lambda rate: rate["requests_per_s"].value, default=None)
