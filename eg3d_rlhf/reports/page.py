"""One self-contained HTML file for a report: no network, works from disk, dark and light, prints well."""

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from eg3d_rlhf.reports.jobs import Finding, Job, csv_text, data_file
from training.storage import write_atomic

_TABLE_LINES = 40  # of a table shown on the page; the whole is in the CSV
_STYLE = Path(__file__).parent / "static" / "page.css"
_MOVING = ' class="moving"'  # of animated pictures: hidden where motion is unwelcome and on paper, so a still stands beside each


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as a data: address of the given media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def write_page(
    path: Path, title: str, introduction: str, jobs: Sequence[Job], findings: Mapping[str, Finding], summary: Sequence[str] = (),
    extra: str = "",
) -> Path:
    """Assemble the report's page from the files that `jobs.run` wrote beside it.

    Args:
        path: <out>/index.html; introduction: one paragraph of plain text; summary: sentences that stand first.
        extra: HTML of the caller's, after the sections (an interactive view).
    Returns: path.
    """
    out = path.parent
    shown = [job for job in jobs if job.key in findings]
    contents = "".join(f'<li><a href="#{job.key}">{html.escape(job.title)}</a></li>' for job in shown)
    sections = "".join(_section(job, findings[job.key], out) for job in shown)
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE.read_text()}</style></head><body>
<h1>{html.escape(title)}</h1><p>{html.escape(introduction)}</p>{_sentences(summary)}
<nav aria-label="Contents"><ol>{contents}</ol></nav><main>{sections}{extra}</main></body></html>
"""
    write_atomic(path, text.encode())
    return path


def _sentences(lines: Sequence[str]) -> str:
    return f'<ul class="says">{"".join(f"<li>{html.escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _section(job: Job, finding: Finding, out: Path) -> str:
    figures = "".join(_figure(out / "figures" / f"{job.key}-{name}", f"{job.title}: {name}") for name in job.plots)
    pictures = "".join(
        f'<figure{_MOVING if name.endswith(".apng") else ""}><img alt="{html.escape(caption)}" '
        f'src="{data_uri((out / "data" / name).read_bytes(), "image/png")}">'
        f'<figcaption class="soft">{html.escape(caption)}</figcaption></figure>'
        for caption, name in finding.pictures.items()
    )
    return (
        f'<section id="{job.key}"><h2>{html.escape(job.title)}</h2>{_sentences(finding.says)}{figures}{pictures}'
        f'<p class="soft">{html.escape(finding.facts.line())}</p>{_data(job, finding, out)}</section>'
    )


def _figure(stem: Path, name: str) -> str:
    light, dark = (_inline(stem.with_name(stem.name + ending), theme) for ending, theme in ((".svg", "light"), ("-dark.svg", "dark")))
    return f'<figure role="img" aria-label="{html.escape(name)}">{light}{dark}</figure>'


def _inline(path: Path, theme: str) -> str:
    """An SVG file as an element of the page; its ids are made its own, since several figures share the page."""
    text = path.read_text()
    text = text[text.index("<svg") :]
    mark = f"{path.stem}-"
    text = re.sub(r'\bid="', f'id="{mark}', text)
    text = re.sub(r'(xlink:href="#|href="#|url\(#)', lambda found: found.group(1) + mark, text.replace('xlink:href="#', 'href="#'))
    return f'<div class="{theme}">{text}</div>'


def _data(job: Job, finding: Finding, out: Path) -> str:
    raw = data_file(out, job.key).read_bytes()
    links = [f'<a download="{job.key}.json" href="{data_uri(raw, "application/json")}">JSON</a>']
    table = ""
    if finding.rows:
        csv = csv_text(finding.rows).encode()
        links.append(f'<a download="{job.key}.csv" href="{data_uri(csv, "text/csv")}">CSV</a>')
        table = _table(finding.rows)
    return f'<details><summary>Data ({len(finding.rows)} lines)</summary><p class="soft">Download: {", ".join(links)}</p>{table}</details>'


def _table(rows: Sequence[Mapping]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in columns)
    lines = "".join("<tr>" + "".join(f"<td>{_cell(row.get(name))}</td>" for name in columns) + "</tr>" for row in rows[:_TABLE_LINES])
    rest = f'<p class="soft">{len(rows) - _TABLE_LINES} more lines in the CSV.</p>' if len(rows) > _TABLE_LINES else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>{rest}'


def _cell(value: object) -> str:
    if value is None:
        return ""
    return html.escape(f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value))
