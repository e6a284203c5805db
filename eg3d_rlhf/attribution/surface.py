"""Integrated Gradients of single voxels, shown on the surface that they change.

Letters: V vertices.
"""

import math
from pathlib import Path

import numpy as np

from eg3d_rlhf.attribution.projection import (
    GREY,
    LOWERS,
    NEUTRAL,
    RAISES,
    by_region,
    diverging,
    labels_at,
    picture,
    region_colour,
    voxels_at,
    write_pictures,
)
from eg3d_rlhf.attribution.study import Study
from eg3d_rlhf.reports.jobs import Finding
from eg3d_rlhf.reports.mesh_page import ColouredMesh, Layer, mesh_page
from eg3d_rlhf.sigma.mesh import extract_mesh
from training.storage import write_atomic

SHOWN = 3  # latents on the page
PAGE = "surface-attribution.html"
_SCALE = 0.99  # quantile of |attribution| on a surface that takes the full colour


def surface(study: Study, folder: Path) -> Finding:
    """Attribution per vertex of the first latents' meshes: a page to turn (<folder>/surface-attribution.html) and a picture."""
    meshes, drawn, rows, missing = [], [], [], []
    half = study.cube_spec.box_warp / 2
    for i, seed in enumerate(study.seeds[:SHOWN]):
        for role in ("before", "after"):
            try:
                vertices, faces = extract_mesh(study.cube(role, seed)[0], study.cube_spec)
            except ValueError:  # no surface to colour
                missing.append(f"seed {seed} {role}")
                continue
            values = voxels_at(vertices, study.integrated[i].voxels, study.c.spec)
            scale = float(np.quantile(np.abs(values), _SCALE))
            layers = _layers(study, i, vertices, values, scale)
            meshes.append(ColouredMesh(name=f"seed {seed}, {role}", vertices=vertices, faces=faces, layers=layers))
            rows.append({"seed": seed, "mesh": role, "vertices": len(vertices), "full_colour": scale, **_ends(vertices, values)})
            if role == "after":
                drawn.append([picture(vertices, faces, layers[0].colours, yaw, half=half) for yaw in (0.0, 0.6, 1.57)])
    says = [
        "Orange raises the reward, blue lowers it: the sum of Integrated Gradients over the 3 x 3 x 3 voxels about a vertex. Each mesh has "
        "its own scale (full colour in the table), so colours compare places of a head, not heads.",
        "Voxels away from the surface are not seen here; the table of regions counts them all.",
    ]
    says += [f"Without a surface, so not shown: {', '.join(missing)}."] if missing else []
    pictures = {}
    if drawn:
        write_pictures(folder / "surface-attribution.png", drawn)
        pictures = {f"Attribution on the tuned surface of seeds {study.seeds[0]}..: front, half turned, side.": "surface-attribution.png"}
    page = mesh_page(meshes, "Attribution on the surface", half) if meshes else ""
    write_atomic(folder / PAGE, page.encode())
    facts = study.c.facts(study.seeds[:SHOWN], ("before", "after", "reward"))
    return Finding(facts=facts, data={"page": PAGE if meshes else None}, rows=rows, says=says, pictures=pictures)


def _layers(study: Study, i: int, vertices: np.ndarray, values: np.ndarray, scale: float) -> list[Layer]:
    labels = labels_at(vertices, study.partitions[i], study.c.spec)
    ends = ((f"raises the reward (+{_short(scale)})", RAISES), ("no influence", NEUTRAL), (f"lowers it (-{_short(scale)})", LOWERS))
    names = [(name, region_colour(k)) for k, name in enumerate(study.names) if (labels == k).any()]
    names += [("outside the slab", GREY)] if (labels < 0).any() else []
    return [
        Layer(name="attribution", colours=diverging(values, scale), legend=ends),
        Layer(name="regions", colours=by_region(labels), legend=names),
        Layer(name="shape alone", colours=np.full((len(vertices), 3), 225, dtype=np.uint8), legend=()),
    ]


def _ends(vertices: np.ndarray, values: np.ndarray) -> dict:
    """The vertices with the largest and the smallest attribution."""
    most, least = int(values.argmax()), int(values.argmin())
    where = {"highest": most, "lowest": least}
    return {f"{name} {axis}": round(float(vertices[k, j]), 4) for name, k in where.items() for j, axis in enumerate("xyz")}


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.{max(0, 1 - math.floor(math.log10(abs(value))))}f}"
