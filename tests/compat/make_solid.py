"""Write values of `solid` by this project's own code, with other shapes, sizes and settings; see make_set.

Left out: grids of a score's second shape, most measures of one mesh, the libraries' verdicts of the other.
"""

import json
from pathlib import Path

import numpy as np

from eg3d_rlhf.geometry import solids
from eg3d_rlhf.measures.meshes.clean import clean_mesh
from eg3d_rlhf.measures.meshes.mesh_measures import measure_mesh
from eg3d_rlhf.measures.meshes.settings import MeasureOptions
from tests.compat.test_solid_meshes import ANGLES, COUNTS, LENGTHS, SIZES
from tests.geometry.grid_measures import measure_grid
from tests.references.solid import recipes

SAMPLED = {"sheet", "buried", "inverted", "thin", "overhang"}


def make(root: Path, seed: int) -> None:
    folder = root / "solid"
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed + 100)
    meshes(folder, random)
    grids(folder, random)
    scores(folder, random)
    surrogate(folder, random)


def write(path: Path, recipe: dict, arrays: dict) -> None:
    """Write the JSON and the .npz of one name."""
    path.with_suffix(".json").write_text(json.dumps(recipe, indent=1))
    np.savez_compressed(path.with_suffix(".npz"), **arrays)


def meshes(folder: Path, random: np.random.RandomState) -> None:
    """Write one set of meshes in its own units, and one that is turned about the vertical and larger."""
    edge = random.uniform(0.6, 0.9)
    shapes = {
        "ball": (recipes.sphere(0.4 * edge, 3), {"closed": True, "parts": 1, "euler": 2}),
        "brick": (recipes.box((edge, 0.4, 0.3)), {"volume": edge * 0.12, "closed": True}),
        "ring": (recipes.torus(0.4, 0.1, 40, 20), {"genus": 1, "euler": 0}),
        "bowl": (recipes.cup_sheet(0.4, 0.5, 32), {"closed": False, "rims": 1}),
        "stool": (recipes.table(5, n=24), {"bodies": 6, "parts": 6}),
    }
    for file, own_units in (("meshes", True), ("meshes_turned", False)):
        recipe = {}
        arrays = {}
        for name, (shape, closed) in shapes.items():
            if not own_units:
                angle = random.uniform(0, np.pi)
                turn = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
                shape = shape[0] @ np.array(turn) * random.uniform(0.5, 3), shape[1]
                closed = {key: value for key, value in closed.items() if key not in SIZES}
            arrays |= {f"{name}_v": shape[0].astype(np.float32), f"{name}_f": shape[1].astype(np.uint16)}
            options = {"samples": 3000, "seed": 5} if own_units else {"rays": 48, "thin": 0.02}
            mesh = clean_mesh(arrays[f"{name}_v"], arrays[f"{name}_f"])
            measures = measure_mesh(mesh, MeasureOptions(**options))
            keys = COUNTS | LENGTHS | ANGLES | SAMPLED | SIZES.keys()
            reference = {key: measures[key] for key in sorted(keys & measures.keys())}
            unit = mesh.edge if own_units else 1.0
            for key in SIZES.keys() & reference.keys():
                reference[key] = None if reference[key] is None else reference[key] * unit ** SIZES[key]
            if own_units:
                reference["samples"] = options.pop("samples")
                options = {}
                igl = {key: measures[key] for key in ("open_edges", "euler", "parts")}
                reference["libraries"] = {"igl": igl}
            record = {"closed_form": closed, "reference": reference, "options": options}
            if name == "stool" and not own_units:
                del record["reference"]
            recipe[name] = record
        write(folder / file, recipe, arrays)


def places(edge: int) -> np.ndarray:
    """Return the centres of voxels [edge, edge, edge, 3] in a cube from -1/2 to 1/2."""
    axis = (np.arange(edge) + 0.5) / edge - 0.5
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)


def packed(solid: np.ndarray) -> np.ndarray:
    return np.packbits(solid.reshape(-1))


def heads(edge: int, random: np.random.RandomState) -> dict[str, np.ndarray]:
    at = places(edge)
    far = np.linalg.norm(at, axis=-1)
    r = random.uniform(0.28, 0.36)
    floater = np.linalg.norm(at - 0.42, axis=-1) < 0.06
    inside = far < r - 0.08
    hole = (at[..., 0] > 0) & (np.hypot(at[..., 1], at[..., 2]) < 0.05)
    slab = (np.abs(at) < [0.4, 0.06, 0.3]).all(axis=-1)
    return {
        "ball": far < r,
        "hollow": (far < r) & ~inside,
        "leaky and a crumb": (far < r) & ~inside & ~hole | floater,
        "board": slab,
    }


def grids(folder: Path, random: np.random.RandomState) -> None:
    edge = 40
    recipe = {"R": edge, "r_thin": 1.3, "r_leak": 2.6, "shapes": {}}
    rules = solids.Rules(thin=recipe["r_thin"], leak=recipe["r_leak"])
    made = heads(edge, random)
    for name, solid in made.items():
        measures = measure_grid(solid, rules)
        measures["main"] = measures.pop("main_volume")
        recipe["shapes"][name] = measures
    write(folder / "grids", recipe, {name: packed(solid) for name, solid in made.items()})


def scores(folder: Path, random: np.random.RandomState) -> None:
    """Write scores beside an untuned grid of another name; leave out one changed grid."""
    edge = 36
    recipe: dict = {"R": edge, "r_thin": None, "r_leak": 2.2, "weights": [1, 2, 0, 1], "before": "untuned"}
    recipe["values"] = {}
    rules = solids.Rules(thin=None, leak=recipe["r_leak"], weights=tuple(recipe["weights"]))
    arrays = {}
    for name, solid in heads(edge, random).items():
        changes = {
            "untuned": solid,
            "filled": solids.fill(solid, 2.2) | solid,
            "main": solids.main_part(solid),
        }
        for change, grid in changes.items():
            judged = solids.reward(grid, solid, rules).to_dict()
            values = {key: value for key, value in judged.items() if key not in ("solid", "reward")}
            recipe["values"][f"{name} | {change}"] = {
                **values,
                "score": judged["solid"],
                "gated": judged["reward"],
            }
            arrays[f"{name} | {change}"] = packed(grid)
    del arrays["board | filled"]
    write(folder / "score_objects", recipe, arrays)


def surrogate(folder: Path, random: np.random.RandomState) -> None:
    """Write a hollow ball with a square hole, and a fragment beside it."""
    edge = 40
    at = places(edge) * edge
    far = np.linalg.norm(at, axis=-1)
    thick = 1.75 + random.uniform(0, 0.2)
    wall = thick - np.abs(far - 12.0)
    hole = (wall > 0) & (np.abs(at[..., 1:]) < 2).all(axis=-1) & (at[..., 0] > 0)
    crumb = 2.8 - np.linalg.norm(at - [14, 14, -14], axis=-1)
    density = np.maximum(np.where(hole, -0.5, wall), crumb).clip(-6, 5)
    arrays = {
        "density": density.astype(np.float16),
        "ideal": packed(wall > 0),
        "hole": packed(hole),
        "floater": packed(crumb > 0),
    }
    recipe: dict = {"reach": 4.0, "steps": 80, "coefficients": 10, "rate": 0.25, "hold": 0.004}
    # the shape is smaller, and its share of what lies near the defects larger
    recipe |= {"elsewhere": [0.003, 0.03], "iou": [0.96, 0.93]}
    write(folder / "surrogate_small", recipe, arrays)
