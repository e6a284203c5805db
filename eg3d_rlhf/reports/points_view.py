"""A map of samples as part of a page: points that show their shape, for mouse, touch and keyboard, without network or libraries."""

import html
import json
from collections.abc import Sequence

from eg3d_rlhf.reports import style

_CSS = """
.points { display: grid; grid-template-columns: minmax(0, 1fr) 15rem; gap: 1rem; align-items: start; }
@media (max-width: 46rem) { .points { grid-template-columns: minmax(0, 1fr); } }
.points svg { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; touch-action: manipulation; }
.points :is(svg, button, input):focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.points .dot { stroke: var(--ground); stroke-width: .6; } .points .cross { stroke-width: 1.6; }
.points .chosen { fill: none; stroke: var(--ink); stroke-width: 2.4; } .points .tie { stroke: var(--soft); stroke-width: 1.4; }
.points fieldset { border: 0; margin: 0 0 .4rem; padding: 0; } .points label { display: inline-block; padding: .5rem .9rem .5rem 0; }
.points .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; } .points .pair > div { text-align: center; font-size: .85rem; }
.points .shape { aspect-ratio: 1; background-color: #fff; border: 3px solid var(--line); border-radius: 6px; }
.points .shape.here { border-color: var(--ink); }
.points button { min-height: 2.75rem; width: 100%; margin: .25rem 0; font: inherit; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; cursor: pointer; }
.points .scale { height: .7rem; border-radius: 4px; }
.points .ends { display: flex; gap: .8rem; justify-content: space-between; font-size: .8rem; }
@media print { .points button, .points fieldset { display: none; } }
"""

_SCRIPT = """
(() => {
  const root = document.getElementById("points");
  const data = JSON.parse(document.getElementById("points-data").textContent);
  const svg = root.querySelector("svg"), name = "http://www.w3.org/2000/svg", W = 640, H = 480, EDGE = 18;
  const points = data.points, byReward = points.map((_, i) => i).sort((a, b) => points[a].reward - points[b].reward || a - b);
  const partner = new Map(points.map((p, i) => [p.role + p.seed, i]));
  let layout = data.layouts[0].name, chosen = 0;
  const add = (tag, attributes, parent) => {
    const made = document.createElementNS(name, tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return parent.appendChild(made);
  };
  const place = i => { const [x, y] = points[i].at[layout]; return [EDGE + x * (W - 2 * EDGE), H - EDGE - y * (H - 2 * EDGE)]; };
  const tie = add("line", {class: "tie"}, svg);
  const marks = points.map(p => p.role === "before"
    ? add("circle", {class: "dot", r: 5, fill: p.colour}, svg)
    : add("path", {class: "cross", d: "M-4 -4L4 4M-4 4L4 -4", stroke: p.colour}, svg));
  const ring = add("circle", {class: "chosen", r: 9}, svg);
  const other = i => partner.get((points[i].role === "before" ? "after" : "before") + points[i].seed);
  function draw() {
    marks.forEach((mark, i) => mark.setAttribute("transform", `translate(${place(i).join(" ")})`));
    show(chosen);
  }
  function show(i) {
    chosen = i;
    const [x, y] = place(i), [u, v] = place(other(i));
    ring.setAttribute("cx", x); ring.setAttribute("cy", y);
    for (const [key, value] of Object.entries({x1: x, y1: y, x2: u, y2: v})) tie.setAttribute(key, value);
    for (const k of [i, other(i)]) {
      const p = points[k], cell = root.querySelector(`[data-role="${p.role}"]`), shape = cell.querySelector(".shape");
      const column = p.picture % data.columns, row = Math.floor(p.picture / data.columns);
      shape.style.backgroundPosition = `${100 * column / Math.max(1, data.columns - 1)}% ${100 * row / Math.max(1, data.rows - 1)}%`;
      shape.classList.toggle("here", k === i);
      shape.setAttribute("aria-label", `Shape of seed ${p.seed} ${p.role} tuning`);
      cell.querySelector("output").textContent = `${p.role}: ${p.reward.toFixed(2)}`;
    }
    const p = points[i], rise = points[partner.get("after" + p.seed)].reward - points[partner.get("before" + p.seed)].reward;
    const rank = byReward.indexOf(i) + 1;
    root.querySelector("#points-said").textContent = `Seed ${p.seed}, ${p.role} tuning: reward ${p.reward.toFixed(2)}, ` +
      `${rank} of ${points.length} from the lowest; tuning changed it by ${rise >= 0 ? "+" : ""}${rise.toFixed(2)}.`;
    root.dataset.chosen = `${p.role} ${p.seed}`;
  }
  function toward(dx, dy) {
    const [x, y] = place(chosen);
    let best = null, least = Infinity;
    points.forEach((_, i) => {
      const [u, v] = place(i), along = (u - x) * dx + (v - y) * dy, across = Math.abs((u - x) * dy) + Math.abs((v - y) * dx);
      if (i !== chosen && along > 0 && across <= along && along + across < least) { best = i; least = along + across; }
    });
    if (best !== null) show(best);
  }
  const step = by => show(byReward[Math.min(points.length - 1, Math.max(0, byReward.indexOf(chosen) + by))]);
  const keys = {
    ArrowLeft: () => toward(-1, 0), ArrowRight: () => toward(1, 0), ArrowUp: () => toward(0, -1), ArrowDown: () => toward(0, 1),
    PageUp: () => step(1), PageDown: () => step(-1), Home: () => step(-points.length), End: () => step(points.length),
    Enter: () => show(other(chosen)), " ": () => show(other(chosen)),
  };
  svg.addEventListener("keydown", event => {
    if (!keys[event.key] || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  function near(event, reach) {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * W / box.width, y = (event.clientY - box.top) * H / box.height;
    const gap = i => Math.hypot(place(i)[0] - x, place(i)[1] - y);
    const best = points.map((_, i) => i).reduce((a, b) => gap(b) < gap(a) ? b : a);
    if (gap(best) < reach * W / box.width) show(best);
  }
  svg.addEventListener("pointermove", event => event.pointerType === "mouse" && near(event, 14));
  svg.addEventListener("click", event => near(event, 44));
  root.querySelectorAll("button").forEach(button => button.addEventListener("click", () => keys[button.dataset.key]()));
  root.querySelectorAll("input").forEach(input => input.addEventListener("change", () => { layout = input.value; draw(); }));
  chosen = byReward[0];
  draw();
})();
"""


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
<style>{_CSS} .points .shape {{ background-image: url("{sprite['uri']}"); {size}; }}</style>
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
<script type="application/json" id="points-data">{packed}</script><script>{_SCRIPT}</script></section>"""
