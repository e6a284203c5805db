"""What a reader can turn and point at: coloured meshes, and a map of samples that shows their shapes.

Both need neither network nor libraries, and work with mouse, touch and keyboard.
Letters: V vertices, F faces.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eg3d_rlhf.reports import style
from eg3d_rlhf.reports.page import fill, safe, static


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
    """A page of its own as text. Args: reach: half the side of the scene, world units; vertices are kept to 1/32767 of it."""
    values = _script_json([_values(mesh, reach) for mesh in meshes])
    return fill("mesh.html", title=title, css=static("mesh.css"), script=static("mesh.js"), meshes=values)


def _script_json(values, **how):
    """JSON that may stand inside a script element."""
    return safe(json.dumps(values, **how).replace("<", "\\u003c"))


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


def points_section(points: Sequence[dict], layouts: Sequence[tuple[str, str]], sprite: dict) -> str:
    """The map as HTML for `write_page`'s `extra`.

    Args:
        points: {"role": "before" or "after", "seed", "reward", "<layout>_x", "<layout>_y"}; every seed with both roles.
        layouts: (name in the points, title), the first is shown first.
        sprite: {"uri": data: address of the sheet of pictures, "columns", "rows", "seeds", "roles"}; pictures row by row, the roles of the
            first seed, of the second, ...
    """
    low, high = (limit(p["reward"] for p in points if p["role"] == "before") for limit in (min, max))
    seeds = {seed: i for i, seed in enumerate(sprite["seeds"])}
    shown: list[dict] = [
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
    return fill(
        "points.html", sprite=sprite, layouts=layouts, low=f"{low:.2f}", high=f"{high:.2f}", css=static("points.css"),
        script=static("points.js"), scale=", ".join(shade_of(i / 8) for i in range(9)), data=_script_json(data, separators=(",", ":")),
    )


def shade_of(share: float) -> str:
    """Colour '#rrggbb' of a value in 0..1 on the reports' scale."""
    import matplotlib
    from matplotlib.colors import to_hex

    return to_hex(matplotlib.colormaps["viridis"](share))
