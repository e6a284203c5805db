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

_STATIC = Path(__file__).parent / "static"


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
<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{(_STATIC / "mesh.css").read_text()}</style></head><body>
<form onsubmit="return false"><label>Mesh <select id="mesh"></select></label><label>Colours <select id="layer"></select></label>
<span>Drag, or arrow keys: turn. Wheel, + and -: zoom. Home: front.</span></form>
<canvas tabindex="0" role="img" aria-label="{html.escape(title)}"></canvas><p id="status"></p><ul id="legend"></ul>
<script>const MESHES = {values};
{(_STATIC / "mesh.js").read_text()}</script></body></html>
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
