"""Curves of error against bytes: reading between their points, and a picture of them without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise


@dataclass(frozen=True)
class Point:
    """share: keys asked for, % of the tokens.  size: bytes read, % of all keys and values.  errors: of each head; error: their mean."""

    share: float
    size: float
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        return sum(self.errors) / len(self.errors)


Curve = Sequence[Point]


def error_at(curve: Curve, size: float) -> float | None:
    """The error at a budget, linear in its logarithm between points; None outside of the curve."""
    return _between([(point.size, math.log(point.error)) for point in curve], size, math.exp)


def size_at(curve: Curve, error: float) -> float | None:
    """The bytes at which the error is reached, the same way round."""
    return _between([(-math.log(point.error), point.size) for point in curve], -math.log(error), float)


def _between(pairs: Sequence[tuple[float, float]], at: float, back: Callable[[float], float]) -> float | None:
    for (left, low), (right, high) in pairwise(sorted(pairs)):
        if left <= at <= right:
            return back(low + (high - low) * ((at - left) / (right - left) if right > left else 0.0))
    return None


@dataclass(frozen=True)
class Look:
    colour: str
    width: float = 1.6
    dashes: str = ""


_PANEL_WIDTH, _PANEL_HEIGHT, _LEFT, _TOP, _LABELS, _BOTTOM = 380, 400, 56, 42, 150, 52
_LABEL_HEIGHT = 14
_STYLE = """
text { font-family: system-ui, 'DejaVu Sans', sans-serif; font-size: 12px; fill: #24292f; }
.title { font-weight: 600; font-size: 14px; }
.tick { fill: #57606a; }
.grid { stroke: #d0d7de; stroke-width: 1; }
.leader { stroke-width: 0.7; opacity: 0.6; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; }
.tick { fill: #9198a1; }
.grid { stroke: #3d444d; }
}
"""


def picture(panels: Mapping[str, Mapping[str, Curve]], looks: Mapping[str, Look], widest: float, low: float, high: float) -> str:
    """An SVG of one panel beside another: bytes to `widest` % along, errors from `low` to `high` in logarithmic scale up."""
    across = _LEFT + _PANEL_WIDTH + _LABELS
    width, height = across * len(panels), _TOP + _PANEL_HEIGHT + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        "<title>Output error of retrieval methods against bytes read</title>",
        f"<style>{_STYLE}</style>",
    ]
    for number, (title, curves) in enumerate(panels.items()):
        parts.append(f'<g transform="translate({number * across + _LEFT} {_TOP})">')
        parts += _axes(title, widest, low, high)
        parts += _lines(curves, looks, widest, low, high)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(size: float, widest: float) -> float:
    return round(_PANEL_WIDTH * size / widest, 1)


def _y(error: float, low: float, high: float) -> float:
    return round(_PANEL_HEIGHT * (1 - math.log(error / low) / math.log(high / low)), 1)


def _axes(title: str, widest: float, low: float, high: float) -> list[str]:
    parts = [f'<text class="title" x="0" y="-24">{escape(title)}</text>', '<text class="tick" x="0" y="-8">output error</text>']
    for error in (value * 10.0**power for power in range(-4, 1) for value in (1, 2, 5)):
        if low <= error <= high:
            y = _y(error, low, high)
            parts.append(f'<line class="grid" x1="0" x2="{_PANEL_WIDTH}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="tick" x="-8" y="{y + 4}" text-anchor="end">{error:.3g}</text>')
    for size in range(0, int(widest) + 1, 2):
        x = _x(size, widest)
        parts.append(f'<text class="tick" x="{x}" y="{_PANEL_HEIGHT + 18}" text-anchor="middle">{size}</text>')
    below = f'x="{_PANEL_WIDTH / 2}" y="{_PANEL_HEIGHT + 38}" text-anchor="middle"'
    parts.append(f'<text class="tick" {below}>bytes read, % of all keys and values</text>')
    return parts


def _lines(curves: Mapping[str, Curve], looks: Mapping[str, Look], widest: float, low: float, high: float) -> list[str]:
    parts, ends = [], []
    for name, look in looks.items():
        shown = _inside(curves.get(name, ()), widest, low)
        if not shown:
            continue
        places = [(_x(size, widest), _y(error, low, high)) for size, error in shown]
        dashes = f' stroke-dasharray="{look.dashes}"' if look.dashes else ""
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{look.colour}" stroke-width="{look.width}"{dashes}/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="{look.width + 0.8}" fill="{look.colour}"/>' for x, y in places]
        ends.append((places[-1], name, look))
    ends.sort(key=lambda end: end[0][1])
    label = -math.inf
    heights = []
    for (_, y), _, _ in ends:
        label = max(y, label + _LABEL_HEIGHT)
        heights.append(label)
    over = max(0.0, heights[-1] - _PANEL_HEIGHT) if heights else 0.0
    for place in reversed(range(len(heights))):  # what fell below the panel pushes the labels above it up
        heights[place] -= over
        if place and heights[place - 1] - over <= heights[place] - _LABEL_HEIGHT:
            over = max(0.0, heights[place - 1] - (heights[place] - _LABEL_HEIGHT))
    right = _PANEL_WIDTH + 12
    for ((x, y), name, look), height in zip(ends, heights, strict=True):
        parts.append(f'<line class="leader" x1="{x}" y1="{y}" x2="{right - 3}" y2="{height}" stroke="{look.colour}"/>')
        parts.append(f'<text x="{right}" y="{height + 4}" style="fill: {look.colour}">{escape(name)}</text>')
    return parts


def _inside(curve: Curve, widest: float, low: float) -> list[tuple[float, float]]:
    """Points as (size, error), cut where the curve leaves the panel to the right or below."""
    shown = [(point.size, point.error) for point in curve if point.size <= widest and point.error >= low]
    at_edge = error_at(curve, widest)
    if at_edge is not None and at_edge >= low:
        shown.append((widest, at_edge))
    return shown
