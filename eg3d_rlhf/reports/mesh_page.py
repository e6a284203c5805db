"""A page that turns coloured meshes: one HTML file that needs no network; works with mouse, touch and keyboard.

Letters: V vertices, F faces.
"""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_SCRIPT = Path(__file__).parent / "static" / "viewer.js"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --ground: #ffffff; --line: #d9dce1; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --ground: #15181c; --line: #3a3f47; --link: #7db7ff; } }
body { margin: 0; height: 100vh; display: flex; flex-direction: column; font: 14px/1.4 system-ui, sans-serif; color: var(--ink);
  background: var(--ground); }
form { display: flex; flex-wrap: wrap; gap: .4rem 1rem; padding: .5rem .8rem; border-bottom: 1px solid var(--line); }
select { font: inherit; } canvas { flex: 1; min-height: 0; width: 100%; touch-action: none; }
canvas:focus-visible { outline: 2px solid var(--link); outline-offset: -2px; }
#legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: 0; padding: .5rem .8rem; }
#legend span { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border: 1px solid var(--line); }
#status { margin: 0; padding: 0 .8rem; }
"""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One colouring of a mesh."""

    name: str
    colours: np.ndarray  # [V, 3] uint8
    legend: Sequence[tuple[str, tuple[int, int, int]]]  # (text, colour)


@dataclass(frozen=True, kw_only=True)
class ColouredMesh:
    """A mesh with its colourings."""

    name: str
    vertices: np.ndarray  # [V, 3] world coordinates
    faces: np.ndarray  # [F, 3]
    layers: Sequence[Layer]


def mesh_page(meshes: Sequence[ColouredMesh], title: str, reach: float = 0.5) -> str:
    """The page as text. Args: reach: half the side of the scene, world units; vertices are kept to 1/32767 of it."""
    values = json.dumps([_values(mesh, reach) for mesh in meshes]).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>
<form onsubmit="return false"><label>Mesh <select id="mesh"></select></label><label>Colours <select id="layer"></select></label>
<span>Drag, or arrow keys: turn. Wheel, + and -: zoom. Home: front.</span></form>
<canvas tabindex="0" role="img" aria-label="{html.escape(title)}"></canvas><p id="status"></p><ul id="legend"></ul>
<script>const MESHES = {values};
{_SCRIPT.read_text()}</script></body></html>
"""


def _values(mesh: ColouredMesh, reach: float) -> dict:
    positions = np.round(np.clip(mesh.vertices / reach, -1, 1) * 32767).astype("<i2")
    layers = [
        {
            "name": layer.name, "colours": _text(layer.colours.astype(np.uint8)),
            "legend": [[text, "rgb({}, {}, {})".format(*colour)] for text, colour in layer.legend],
        }
        for layer in mesh.layers
    ]
    return {"name": mesh.name, "positions": _text(positions), "faces": _text(mesh.faces.astype("<u4")), "layers": layers}


def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
