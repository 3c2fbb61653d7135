"""A heat map as SVG text, without a plotting library; for light and dark pages.

One colour, more or less of it over whatever the page is: so it needs no colour of its own for dark pages, and the number in a cell stays
readable (contrast 4 : 1 and more at the strongest).  The scale is logarithmic and the same for every picture, so that two can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

LOWEST, HIGHEST = 1e-2, 1.0  # of the scale; what lies beyond has the colour of its end
_FAINT, _STRONG = 0.06, 0.85
_COLOUR = "#d1481f"
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 30, 22, 66, 44, 78, 16
_SCALE_WIDTH, _LEAST_WIDTH, _CHARACTER = 180, 300, 7.2
_STYLE = f"""
text {{ font: 12px system-ui, sans-serif; fill: #24292f; }}
.title {{ font-weight: 600; }}
.cell {{ font-size: 10px; text-anchor: middle; }}
.tick {{ fill: #57606a; text-anchor: middle; }}
.heat {{ fill: {_COLOUR}; }}
.none {{ fill: none; stroke: #8c959f; stroke-opacity: 0.5; stroke-dasharray: 2 2; }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #f0f6fc; }}
.tick {{ fill: #9198a1; }}
}}
"""


class Cell(NamedTuple):
    """value: a share (0.05 is shown as 5); None of a cell that has none.  told: what is shown when the mouse rests on it."""

    column: int
    row: int
    value: float | None
    told: str


def heat_map(title: str, columns: str, rows: str, cells: Sequence[Cell]) -> str:
    """The picture of at least one cell.  columns, rows: what is counted along and down."""
    wide, high = 1 + max(cell.column for cell in cells), 1 + max(cell.row for cell in cells)
    width = max(_LEFT + wide * _WIDTH + _RIGHT, _LEFT + _LEAST_WIDTH, 2 * _RIGHT + round(_CHARACTER * len(title)))
    height = _TOP + high * _HEIGHT + _BOTTOM
    below = _TOP + high * _HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="{_RIGHT}" y="24">{escape(title)}</text>',
        f'<text class="tick" transform="translate(20 {_TOP + high * _HEIGHT / 2}) rotate(-90)">{escape(rows)}</text>',
        f'<text class="tick" x="{_LEFT + wide * _WIDTH / 2}" y="{below + 34}">{escape(columns)}</text>',
    ]
    parts += [f'<text class="tick" x="{_x(column) + _WIDTH / 2}" y="{below + 16}">{column}</text>' for column in range(wide)]
    parts += [f'<text class="tick" x="{_LEFT - 14}" y="{_y(row) + 15}">{row}</text>' for row in range(high)]
    parts += [_drawn(cell, f"{columns} {cell.column}, {rows} {cell.row}: {cell.told}") for cell in cells]
    return "\n".join([*parts, *_scale(below + 48), "</svg>"]) + "\n"


def opacity(value: float) -> float:
    """How much of the colour a value has: even steps for even factors."""
    place = math.log(min(max(value, LOWEST), HIGHEST) / LOWEST) / math.log(HIGHEST / LOWEST)
    return round(_FAINT + (_STRONG - _FAINT) * place, 3)


def percent(value: float) -> str:
    """A share in percent, as short as a cell is: 0.34, 3.4, 34."""
    number = 100 * value
    return f"{number:.0f}" if number >= 9.95 else f"{number:.1f}" if number >= 0.995 else f"{number:.2f}"


def _drawn(cell: Cell, told: str) -> str:
    box = f'x="{_x(cell.column)}" y="{_y(cell.row)}" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" rx="2"'
    title = f"<title>{escape(told)}</title>"
    if cell.value is None:
        return f'<g>{title}<rect class="none" {box}/></g>'
    text = f'<text class="cell" x="{_x(cell.column) + _WIDTH / 2 - 1}" y="{_y(cell.row) + 14}">{percent(cell.value)}</text>'
    return f'<g>{title}<rect class="heat" fill-opacity="{opacity(cell.value)}" {box}/>{text}</g>'


def _scale(top: int) -> list[str]:
    """What the colours mean: from LOWEST to HIGHEST, in percent."""
    ends = "".join(f'<stop offset="{place}" stop-color="{_COLOUR}" stop-opacity="{o}"/>' for place, o in ((0, _FAINT), (1, _STRONG)))
    parts = [
        f'<defs><linearGradient id="scale">{ends}</linearGradient></defs>',
        f'<rect fill="url(#scale)" x="{_LEFT}" y="{top}" width="{_SCALE_WIDTH}" height="8" rx="2"/>',
    ]
    powers = range(round(math.log10(LOWEST)), round(math.log10(HIGHEST)) + 1)
    for place, power in enumerate(powers):
        x = _LEFT + _SCALE_WIDTH * place / (len(powers) - 1)
        parts.append(f'<text class="tick" x="{x:g}" y="{top + 22}">{100 * 10.0**power:g} %</text>')
    return parts


def _x(column: int) -> int:
    return _LEFT + column * _WIDTH


def _y(row: int) -> int:
    return _TOP + row * _HEIGHT
