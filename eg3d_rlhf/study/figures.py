"""Inline SVG of a study's figures, in the page's own colours; reads the analysis alone."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _LEFT, _RIGHT, _ROW = 720, 210, 120, 30  # pixels of the drawing
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of a forest plot."""

    label: str
    rate: float | None
    interval: Sequence[float] | None
    note: str = ""
    kind: str = "plain"  # 'main', 'plain' or 'faint'


def forest(lines: Sequence[Line], axis: str, title: str) -> str:
    """Rates with intervals on a common axis from 0 to 1, one half marked."""
    height = _ROW * len(lines) + 52
    bottom = height - 44
    parts = [_grid(bottom)]
    for i, line in enumerate(lines):
        parts.append(_forest_row(line, _ROW * i + 18))
    parts.append(f'<text class="axis" x="{_x(0.5):.1f}" y="{height - 6}" text-anchor="middle">{html.escape(axis)}</text>')
    return _svg(height, title, parts)


def _forest_row(line: Line, y: int) -> str:
    label = f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end" class="{line.kind}">{html.escape(line.label)}</text>'
    note = f'<text x="{_WIDTH - _RIGHT + 12}" y="{y + 4}" class="note">{html.escape(line.note)}</text>'
    if line.rate is None:
        return label + note
    bar = ""
    if line.interval is not None:
        lo, hi = line.interval
        bar = f'<line class="bar {line.kind}" x1="{_x(lo):.1f}" x2="{_x(hi):.1f}" y1="{y}" y2="{y}"/>'
        bar += "".join(f'<line class="bar {line.kind}" x1="{_x(v):.1f}" x2="{_x(v):.1f}" y1="{y - 5}" y2="{y + 5}"/>' for v in (lo, hi))
    radius = 6 if line.kind == "main" else 4
    return f'{label}{bar}<circle class="dot {line.kind}" cx="{_x(line.rate):.1f}" cy="{y}" r="{radius}"/>{note}'


def histogram(values: Sequence[float], axis: str, title: str, bins: int = 11) -> str:
    """How many values fall into each of `bins` equal parts of 0..1, the middle one about one half."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int(value * bins))] += 1
    top, plot = max([*counts, 1]), 150
    height, bottom = plot + 72, plot + 28
    parts = [_grid(bottom)]
    for i, count in enumerate(counts):
        tall = plot * count / top
        x0, x1 = _x(i / bins), _x((i + 1) / bins)
        if count:
            parts.append(f'<rect class="fill" x="{x0 + 1:.1f}" y="{bottom - tall:.1f}" width="{x1 - x0 - 2:.1f}" height="{tall:.1f}"/>')
            parts.append(f'<text class="note" x="{(x0 + x1) / 2:.1f}" y="{bottom - tall - 5:.1f}" text-anchor="middle">{count}</text>')
    parts.append(f'<text x="{_LEFT - 12}" y="{bottom - plot / 2:.0f}" text-anchor="end">latents</text>')
    parts.append(f'<text class="axis" x="{_x(0.5):.1f}" y="{height - 6}" text-anchor="middle">{html.escape(axis)}</text>')
    return _svg(height, title, parts)


def _grid(bottom: float) -> str:
    out = ""
    for tick in _TICKS:
        kind = "half" if tick == 0.5 else "grid"
        out += f'<line class="{kind}" x1="{_x(tick):.1f}" x2="{_x(tick):.1f}" y1="4" y2="{bottom}"/>'
        out += f'<text class="note" x="{_x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{tick:.0%}</text>'
    return out


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    label = html.escape(title, quote=True)
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}">{"".join(parts)}</svg>'
