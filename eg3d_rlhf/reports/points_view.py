"""A map of samples as part of a page: points that show their shape, for mouse, touch and keyboard, without network or libraries."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from eg3d_rlhf.reports import style

_STATIC = Path(__file__).parent / "static"


def section(points: Sequence[dict], layouts: Sequence[tuple[str, str]], sprite: dict) -> str:
    """The map as HTML for `write_page`'s `extra`.

    Args:
        points: {"role": "before" or "after", "seed", "reward", "<layout>_x", "<layout>_y"}; every seed with both roles.
        layouts: (name in the points, title), the first is shown first.
        sprite: {"uri": data: address of the sheet of pictures, "columns", "rows", "seeds", "roles"}; pictures row by row, the roles of the
            first seed, of the second, ...
    """
    low, high = (limit(p["reward"] for p in points if p["role"] == "before") for limit in (min, max))
    seeds = {seed: i for i, seed in enumerate(sprite["seeds"])}
    shown = [
        {
            "role": p["role"], "seed": p["seed"], "reward": p["reward"],
            "colour": shade_of((p["reward"] - low) / max(high - low, 1e-12)) if p["role"] == "before" else style.colour("after"),
            "picture": seeds[p["seed"]] * len(sprite["roles"]) + sprite["roles"].index(p["role"]),
            "at": {},
        }
        for p in points
    ]
    for name, _ in layouts:
        for axis in "xy":
            values = [p[f"{name}_{axis}"] for p in points]
            least, span = min(values), max(max(values) - min(values), 1e-12)
            for one, value in zip(shown, values, strict=True):
                one["at"].setdefault(name, []).append(round((value - least) / span, 5))
    data = {"points": shown, "layouts": [{"name": n, "title": t} for n, t in layouts], "columns": sprite["columns"], "rows": sprite["rows"]}
    return _page_part(data, sprite, low, high)


def shade_of(share: float) -> str:
    """Colour '#rrggbb' of a value in 0..1 on the reports' scale."""
    import matplotlib
    from matplotlib.colors import to_hex

    return to_hex(matplotlib.colormaps["viridis"](share))


def _page_part(data: dict, sprite: dict, low: float, high: float) -> str:
    choices = "".join(
        f'<label><input type="radio" name="points-layout" value="{html.escape(one["name"])}"{" checked" if i == 0 else ""}> '
        f'{html.escape(one["title"])}</label>'
        for i, one in enumerate(data["layouts"])
    )
    pair = "".join(
        f'<div data-role="{role}"><div class="shape" role="img"></div><output>{role}</output></div>' for role in sprite["roles"]
    )
    scale = ", ".join(shade_of(i / 8) for i in range(9))
    size = f"background-size: {100 * sprite['columns']}% {100 * sprite['rows']}%"
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<section id="shapes-of-the-points"><h2>Shapes of the points</h2>
<style>{(_STATIC / "points.css").read_text()} .points .shape {{ background-image: url("{sprite['uri']}"); {size}; }}</style>
<p id="points-help">Point at a sample, or tap it, to see its shape before and after tuning; a line joins both. With the keyboard: arrow keys
move to the next point in that direction, Page Up and Page Down to the next higher and lower reward, Home and End to the ends, Enter to the
same latent in the other network.</p>
<div class="points" id="points"><div><fieldset><legend class="soft">Layout</legend>{choices}</fieldset>
<svg viewBox="0 0 640 480" tabindex="0" role="application" aria-label="Map of samples" aria-describedby="points-help"></svg>
<div class="scale" style="background: linear-gradient(to right, {scale})"></div>
<div class="ends soft"><span>{low:.2f}</span><span>dots: before, coloured by reward; crosses: after</span>
<span>{high:.2f}</span></div></div>
<div><div class="pair">{pair}</div><p id="points-said" aria-live="polite"></p>
<button type="button" data-key="PageUp">Next higher reward</button><button type="button" data-key="PageDown">Next lower reward</button>
<button type="button" data-key="Enter">Same latent, other network</button></div></div>
<noscript><p>The points need JavaScript, which this browser has turned off; the figures above show the same map.</p></noscript>
<script type="application/json" id="points-data">{packed}</script><script>{(_STATIC / "points.js").read_text()}</script></section>"""
