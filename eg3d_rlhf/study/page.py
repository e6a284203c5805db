"""The study's report as one HTML file: no network, works from disk, dark and light, prints well. Reads the JSON alone."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eg3d_rlhf.study.conclusions import p_value, percent

_WIDTH, _LEFT, _RIGHT, _ROW = 720, 210, 120, 30  # pixels of the drawing
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class ForestRow:
    """One row of a forest plot."""

    label: str
    rate: float | None
    interval: Sequence[float] | None
    note: str = ""
    kind: str = "plain"  # 'main', 'plain' or 'faint'


def forest(rows: Sequence[ForestRow], axis: str, title: str) -> str:
    """Rates with intervals on a common axis from 0 to 1, one half marked."""
    height = _ROW * len(rows) + 52
    bottom = height - 44
    parts = [_grid(bottom)]
    for i, row in enumerate(rows):
        parts.append(_forest_row(row, _ROW * i + 18))
    parts.append(f'<text class="axis" x="{_x(0.5):.1f}" y="{height - 6}" text-anchor="middle">{html.escape(axis)}</text>')
    return _svg(height, title, parts)


def _forest_row(row: ForestRow, y: int) -> str:
    label = f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end" class="{row.kind}">{html.escape(row.label)}</text>'
    note = f'<text x="{_WIDTH - _RIGHT + 12}" y="{y + 4}" class="note">{html.escape(row.note)}</text>'
    if row.rate is None:
        return label + note
    bar = ""
    if row.interval is not None:
        lo, hi = row.interval
        bar = f'<line class="bar {row.kind}" x1="{_x(lo):.1f}" x2="{_x(hi):.1f}" y1="{y}" y2="{y}"/>'
        bar += "".join(f'<line class="bar {row.kind}" x1="{_x(v):.1f}" x2="{_x(v):.1f}" y1="{y - 5}" y2="{y + 5}"/>' for v in (lo, hi))
    radius = 6 if row.kind == "main" else 4
    return f'{label}{bar}<circle class="dot {row.kind}" cx="{_x(row.rate):.1f}" cy="{y}" r="{radius}"/>{note}'


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


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #5b626d; --ground: #fff; --card: #f4f5f7; --line: #d9dce1; --main: #0b5cad;
  --warn: #a33b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a3abb6; --ground: #15181c; --card: #1d2126; --line: #3a3f47;
  --main: #7db7ff; --warn: #ffb074; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; font: 16px/1.55 system-ui, sans-serif; color: var(--ink);
  background: var(--ground); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; } .soft { color: var(--soft); font-size: .88rem; } .scroll { overflow-x: auto; }
.says { background: var(--card); border-left: 3px solid var(--main); border-radius: 4px; padding: .6rem 1rem .6rem 2rem; }
.interim { border: 2px solid var(--warn); color: var(--warn); border-radius: 4px; padding: .5rem 1rem; font-weight: 600; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td.text { white-space: normal; overflow-wrap: anywhere; } .out td { color: var(--soft); }
figure { margin: 1rem 0; overflow-x: auto; } svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .note, svg .axis, svg text.faint { fill: var(--soft); } svg text.main { font-weight: 600; }
svg .grid { stroke: var(--line); } svg .half { stroke: var(--soft); stroke-dasharray: 4 3; } svg .fill { fill: var(--main); }
svg .bar { stroke: var(--ink); stroke-width: 1.5; } svg .dot { fill: var(--ink); } svg .bar.main { stroke: var(--main); stroke-width: 3; }
svg .dot.main { fill: var(--main); } svg .bar.faint { stroke: var(--soft); } svg .dot.faint { fill: var(--soft); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; }
.pair { background: var(--card); border-radius: 6px; padding: .6rem; break-inside: avoid; } .pair div { display: flex; gap: .4rem; }
.pair figure { flex: 1; margin: 0; } .pair img { width: 100%; display: block; border-radius: 3px; background: #fff; }
.pair p, .pair figcaption { margin: .3rem 0 0; font-size: .82rem; color: var(--soft); }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --ground: #fff; --card: #f4f5f7; --line: #bbb; --main: #0b5cad;
  --warn: #a33b00; } body { max-width: none; padding: 0; font-size: 11px; } h2, figure, tr, .says { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .scroll, figure { overflow: visible; } th, td { white-space: normal; padding: .15rem .3rem; } }
"""


def page(report: dict) -> str:
    """HTML of a report as `eg3d_rlhf.study.report.compute` gives it."""
    design = report["design"]
    title = f"Blind study {design['name']}: {design['b']['label']} against {design['a']['label']}"
    sections = [
        f"<h1>{_e(title)}</h1>", f'<p class="soft">{_e(_about(report))}</p>',
        '<p class="interim">Interim look: the stopping rule is not met.</p>' if report["interim"] else "",
        f'<ul class="says">{"".join(f"<li>{_e(sentence)}</li>" for sentence in report["conclusions"])}</ul>',
    ]  # fmt: skip
    if report["result"]["win_rate"] is not None:
        sections += [_result(report), _latents(report)]
    sections += [_annotators(report), _exclusions(report), _pictures(report), _design(report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{_e(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>\n'
        + "\n".join(s for s in sections if s) + "\n</body></html>\n"
    )  # fmt: skip


def _e(text: object) -> str:
    return html.escape(str(text))


def _about(report: dict) -> str:
    d = report["design"]
    return (
        f"{report['answered']} of {d['trials']} trials answered; design of {d['created']}, hash {d['hash'][:16]}; report of "
        f"{report['reported']}. Same latents for both, sides random, shapes drawn alike at psi {d['psi']:g}, level {d['level']:g}, "
        f"{d['resolution']} grid points an edge."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], faint: Sequence[bool] = ()) -> str:
    marks = faint or [False] * len(rows)
    body = "".join(
        f"<tr{' class=out' if mark else ''}>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>"
        for row, mark in zip(rows, marks, strict=True)
    )
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{_e(h)}</th>" for h in head)}</tr>{body}</table></div>'


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"


def _rate(value: float | None) -> str:
    return "none" if value is None else percent(value)


def _result(report: dict) -> str:
    r, b = report["result"], report["design"]["b"]["label"]
    rate = r["win_rate"]
    lines = [
        ForestRow(label="annotators and latents", rate=rate, interval=r["interval"], note=percent(rate), kind="main"),
        ForestRow(label="Wilson, trials independent", rate=rate, interval=r["wilson"]),
        *(ForestRow(label=f"bootstrap over {over}", rate=rate, interval=v) for over, v in r["bootstrap"].items() if v is not None),
    ]
    lines += [
        ForestRow(label=name, rate=s["win_rate"], interval=s.get("interval"), note=_rate(s["win_rate"]), kind="faint")
        for name, s in report["sensitivity"].items()
    ]
    counts = [
        (f"{b} won", r["b_wins"]), (f"{report['design']['a']['label']} won", r["a_wins"]), ("ties", r["ties"]), ("skipped", r["skips"]),
        ("exact binomial test", p_value(r["p_exact"]) if r["p_exact"] is not None else "none"),
        ("test allowing for annotators and latents", p_value(r["p_clustered"])), ("design effect", f"{r['design_effect']:.2f}"),
        ("b on the left", f"{report['sides']['b_left']} of {report['sides']['n']}"), ("left chosen", _rate(report["sides"]["left_share"])),
        ("win rate with b on the left", _rate(report["sides"]["win_rate_b_left"])),
        ("win rate with b on the right", _rate(report["sides"]["win_rate_b_right"])),
        ("Krippendorff's alpha between annotators", _alpha(report["agreement"])),
    ]  # fmt: skip
    axis = f"win rate of {b}, {r['confidence']:.0%} intervals, n = {r['n']}"
    return f"<h2>Win rate</h2><figure>{forest(lines, axis, 'Win rate with its intervals')}</figure>{_table(('figure', 'value'), counts)}"


def _alpha(agreement: dict) -> str:
    value, bounds = agreement["krippendorff_alpha"], agreement["alpha_ci95"]
    return "none" if value is None else f"{value:.2f} ({bounds[0]:.2f} to {bounds[1]:.2f})"


def _latents(report: dict) -> str:
    values = [p["win_rate"] for p in report["pairs"]]
    axis = f"share of answers for {report['design']['b']['label']}, per latent; {len(values)} latents"
    return f"<h2>Latents</h2><figure>{histogram(values, axis, 'How the latents differ')}</figure>"


def _annotators(report: dict) -> str:
    people = report["annotators"]
    if not people:
        return ""
    lines = [
        ForestRow(
            label=p["name"], rate=p["win_rate"], interval=p["wilson"], note=f"n = {p['n']}", kind="faint" if p["excluded"] else "plain"
        )
        for p in people
    ]
    rows = [
        (p["name"], p["trials"], _rate(p["win_rate"]), _range(p["wilson"]), p["ties"], p["skips"], _rate(p["left_share"]),
         _range(p["left_ci"]), f"{p['gold_right']} of {p['gold_n']}", f"{p['median_seconds']:.1f} s", p["fast"], p["excluded"] or "")
        for p in people
    ]  # fmt: skip
    head = ("annotator", "trials", "win rate", "Wilson", "ties", "skips", "left chosen", "interval", "gold right", "median", "too fast",
            "left out")  # fmt: skip
    axis = f"win rate of {report['design']['b']['label']} by annotator, Wilson intervals"
    figure = forest(lines, axis, "Win rate by annotator")
    return f"<h2>Annotators</h2><figure>{figure}</figure>{_table(head, rows, [bool(p['excluded']) for p in people])}"


def _exclusions(report: dict) -> str:
    rows = [(e["what"], e["reason"], e["trials"]) for e in report["exclusions"]]
    return "<h2>Left out</h2>" + (_table(("what", "reason", "trials"), rows) if rows else "<p>Nothing was left out.</p>")


def _pictures(report: dict) -> str:
    pictures = report["pictures"]
    if not pictures:
        return ""
    a, b = (report["design"][side]["label"] for side in "ab")
    out = "<h2>Pairs at the ends</h2><p>One shading and one crop for all.</p>"
    for end, title in (("best", f"Most for {b}"), ("worst", f"Most for {a}")):
        cards = "".join(
            f'<div class="pair"><div>{_picture(p["a"], a)}{_picture(p["b"], b)}</div>'
            f"<p>latent {p['seed']}: {percent(p['win_rate'])} for {_e(b)}, n = {p['n']}</p></div>"
            for p in pictures[end]
        )
        out += f'<h3>{_e(title)}</h3><div class="pairs">{cards}</div>' if cards else ""
    return out


def _picture(source: str, label: str) -> str:
    return f'<figure><img src="{source}" alt="shape of {_e(label)}"><figcaption>{_e(label)}</figcaption></figure>'


def _design(report: dict) -> str:
    d = report["design"]
    shown = {k: v for k, v in d.items() if k not in ("plan", "latent_seeds", "hash")}
    for side in ("a", "b"):
        shown[side] = {**d[side], "source": Path(d[side]["source"]).name or "bundled"}
    rows = [(k, json.dumps(v) if isinstance(v, (dict, list)) else v) for k, v in shown.items()]
    body = "".join(f'<tr><td>{_e(k)}</td><td class="text">{_e(v)}</td></tr>' for k, v in rows)
    plan = "".join(f"<li>{_e(sentence)}</li>" for sentence in d["plan"])
    return (
        f"<h2>Design, written before the first answer</h2><ul>{plan}</ul><details open><summary>All settings</summary>"
        f'<div class="scroll"><table>{body}</table></div></details>'
        f'<p class="soft">Hash {_e(d["hash"])}; the seeds are in the design file.</p>'
    )
