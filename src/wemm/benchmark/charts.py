"""Charts of results, drawn with matplotlib: bars, the waterfall of a request, the roofline of a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wemm.errors import ParameterError

_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#2a9d8f", "#b07aa1", "#9c755f", "#b8860b", "#5f5f5f",
            "#d6278a", "#d37295", "#2f4b7c")  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")


@contextmanager
def saved_axes(path: Path, width: float, height: float, columns: int = 1) -> Iterator[Any]:
    """Axes, or a row of them, that are saved to `path` at the end. Raises ParameterError."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ParameterError("--plot needs matplotlib: pip install 'wemm[bench]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
    try:
        for each in figure.axes:
            each.spines[["top", "right"]].set_visible(False)
        yield axes
        try:
            figure.savefig(path, dpi=120)
        except ValueError as error:  # a file type it does not know
            raise ParameterError(f"--plot {path}: {error}") from None
    finally:
        pyplot.close(figure)


def bars(path: Path, title: str, label: str, values: Mapping[str, float]) -> None:
    """Horizontal bars; `label` names the quantity and its unit."""
    with saved_axes(path, 7, 0.6 * len(values) + 1.5) as axes:
        axes.bar_label(axes.barh(list(values), list(values.values())), fmt="{:,.3g}", padding=3)
        axes.invert_yaxis()
        axes.set(xlabel=label, title=title)
        axes.margins(x=0.15)


def waterfall(path: Path, title: str, stages: Sequence[tuple[str, float, float]]) -> None:
    """(stage, start, length) in milliseconds, from top to bottom."""
    end = max(start + length for _, start, length in stages)
    with saved_axes(path, 8, 0.5 * len(stages) + 1.5) as axes:
        for row, (_, start, length) in enumerate(stages):
            axes.barh(row, length, left=start, color=_COLOURS[row], height=0.65)
            _label_bar(axes, row, start, length, end)
        axes.set_yticks(range(len(stages)), [name for name, _, _ in stages])
        axes.invert_yaxis()
        axes.set(xlim=(0, end * 1.02), xlabel="milliseconds since arrival", title=title)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)


def _label_bar(axes: Any, row: int, start: float, length: float, end: float) -> None:
    """In a long bar, else beside it on the side that has room."""
    text = f"{length:,.0f} ms" if length >= 100 else f"{length:.3g} ms"
    at, offset, align, colour = start + length, 4, "left", "black"
    if length > 0.3 * end:
        at, offset, align, colour = start + length / 2, 0, "center", "white"
    elif at > 0.8 * end:
        at, offset, align = start, -4, "right"
    axes.annotate(
        text, (at, row), xytext=(offset, 0), textcoords="offset points", va="center", ha=align, fontsize=9,
        color=colour,
    )  # fmt: skip


def roofline(
    path: Path,
    title: str,
    read: float,
    products: Mapping[str, float],
    points: Sequence[tuple[str, str, float, float]],
) -> None:
    """(op, label, FLOP/byte, GFLOP/s) below the ceilings `read` GB/s and `products`, GFLOP/s of each kind.

    Both axes are logarithmic.
    """
    highest = max(products.values())
    ridge = highest / read
    left = min([ridge, *(x for _, _, x, _ in points)]) / 6
    right = max([ridge, *(x for _, _, x, _ in points)]) * 3
    with saved_axes(path, 13, 8) as axes:
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s", title=title)
        axes.plot([left, ridge], [left * read, highest], color="black", label=f"read {read:,.1f} GB/s")
        for (name, gemm), dashes in zip(products.items(), ("--", ":"), strict=False):
            axes.plot(
                [gemm / read, right], [gemm, gemm], color="black", ls=dashes, label=f"{name} {gemm:,.0f} GFLOP/s"
            )
        styles = dict(
            zip(
                dict.fromkeys(op for op, _, _, _ in points),
                itertools.cycle(zip(_COLOURS, _MARKERS, strict=True)),
                strict=False,
            )
        )
        for op, (colour, marker) in styles.items():
            own = [(x, y) for name, _, x, y in points if name == op]
            axes.scatter(*zip(*own, strict=True), s=34, color=colour, marker=marker, label=op, zorder=3)
        axes.set_xlim(left, right)
        axes.grid(alpha=0.15, which="both")
        axes.legend(loc="lower right", fontsize=9)
        axes.figure.draw_without_rendering()  # the layout must stand before labels find their place
        _label_points(axes, points, {op: colour for op, (colour, _) in styles.items()})


def _label_points(axes: Any, points: Sequence[tuple[str, str, float, float]], colours: Mapping[str, str]) -> None:
    """Each label where it covers no other and no point, as near as that allows."""
    size = 7.0
    to_points = 72 / axes.figure.dpi
    at = [axes.transData.transform((x, y)) * to_points for _, _, x, y in points]
    edge = axes.bbox.x0 * to_points
    taken: list[tuple[float, ...]] = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
    for (op, label, x, y), (left, bottom) in sorted(zip(points, at, strict=True), key=lambda pair: -pair[1][1]):
        width = 0.58 * size * len(label)
        boxes = [_box(left, bottom, dx, dy, width, size) for dy, dx in _offsets(width)]
        free = (b for b in boxes if b[0] > edge and not any(_overlap(b, other) for other in taken))
        box = next(free, boxes[0])
        taken.append(box)
        offset = box[0] - left, box[1] - bottom
        is_far = abs(offset[1]) > size
        axes.annotate(
            label, (x, y), xytext=offset, textcoords="offset points", fontsize=size, color=colours[op],
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": colours[op], "lw": 0.4, "shrinkB": 3} if is_far else None,
        )  # fmt: skip


def _offsets(width: float) -> Iterator[tuple[float, float]]:
    """(up, right) in points, the nearest first: beside the point, then above and below in turn."""
    for step in range(40):
        up = (step + 1) // 2 * 8.0 * (-1) ** step - 3
        yield from ((up, 7), (up, -width - 7))


def _box(x: float, y: float, dx: float, dy: float, width: float, height: float) -> tuple[float, ...]:
    return x + dx, y + dy, x + dx + width, y + dy + height


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
