"""Where the lines, dots and ticks of the report's charts lie: geometry alone, the template draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LINES = (360, 250)
ROOFLINE = (560, 360)
"""Width and height of the charts in their own units, near the pixels they get."""
LEFT, RIGHT, TOP, BOTTOM = 50, 22, 14, 44
"""Margins for the labels."""
_NUM_TICKS = 5


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Point:
    """A value in its place; `index` is that of the value."""

    x: float
    y: float
    index: int


@dataclass(frozen=True)
class LineChart:
    """Values over a few named columns."""

    size: tuple[int, int]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: dict[str, list[Point]]


@dataclass(frozen=True)
class Roofline:
    """FLOP per byte → GFLOP/s, both logarithmic, under the ceilings of memory and of products."""

    size: tuple[int, int]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    roofs: list[list[tuple[float, float]]]
    """For each kind of product its corners: memory, ridge, compute."""
    dots: list[Point]


def line_chart(columns: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> LineChart | None:
    """One line for each series, broken nowhere: a None is left out. None without any value."""
    values = [value for line in series.values() for value in line if value is not None]
    if not values:
        return None
    top = _ceiling(max(values))
    width, height = LINES
    step = (width - RIGHT - LEFT) / len(columns)
    places = [LEFT + (i + 0.5) * step for i in range(len(columns))]
    lines = {
        name: [Point(places[i], _y(value / top, height), i) for i, value in enumerate(line) if value is not None]
        for name, line in series.items()
    }
    y_ticks = [Tick(_y(i / _NUM_TICKS, height), f"{top * i / _NUM_TICKS:g}") for i in range(_NUM_TICKS + 1)]
    return LineChart(LINES, [Tick(*pair) for pair in zip(places, columns, strict=True)], y_ticks, lines)


def roofline(
    points: Sequence[tuple[float, float] | None], gb_per_s: float, gflop_per_s: Sequence[float]
) -> Roofline | None:
    """Points are (FLOP per byte, GFLOP/s); what has no arithmetic is None. None without any point."""
    drawn = [point for point in points if point is not None]
    if not drawn or gb_per_s <= 0 or min(gflop_per_s) <= 0:
        return None
    x_low, x_high = _decades([*(gemm / gb_per_s for gemm in gflop_per_s), *(x for x, _ in drawn)])
    y_low, y_high = _decades([*gflop_per_s, *(y for _, y in drawn)])

    width, height = ROOFLINE

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - x_low) / (x_high - x_low) * (width - RIGHT - LEFT)

    def y(value: float) -> float:
        return _y((math.log10(value) - y_low) / (y_high - y_low), height)

    foot = max(10.0**x_low, 10.0**y_low / gb_per_s)
    roofs = [[(foot, foot * gb_per_s), (gemm / gb_per_s, gemm), (10.0**x_high, gemm)] for gemm in gflop_per_s]
    return Roofline(
        size=ROOFLINE,
        x_ticks=[Tick(x(10.0**i), _power(i)) for i in range(x_low, x_high + 1)],
        y_ticks=[Tick(y(10.0**i), _power(i)) for i in range(y_low, y_high + 1)],
        roofs=[[(x(a), y(b)) for a, b in roof] for roof in roofs],
        dots=[Point(x(p[0]), y(p[1]), i) for i, p in enumerate(points) if p is not None],
    )


def _y(share: float, height: int) -> float:
    return height - BOTTOM - share * (height - BOTTOM - TOP)


def _ceiling(value: float) -> float:
    """The next round number that five steps divide evenly."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if value <= step * unit)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _power(exponent: int) -> str:
    if -2 <= exponent <= 4:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
