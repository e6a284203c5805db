"""Write a folder of meshes on which mesh validation is measured.

They are bumpy spheres of about so many triangles each, some with holes, floaters or walls inside.

Example:
    python benchmarks/mesh_validation_set.py runs/mesh-set --count=500 &&
        time eg3d-rlhf check-assets runs/mesh-set --outdir=runs/mesh-validation
"""

from pathlib import Path

import click
import numpy as np

from training.progress import tqdm

DEFECTS = ("none", "hole", "floater", "inner wall")
KINDS = (".glb", ".ply", ".obj")


def mesh(number: int, triangles: int):
    """Mesh `number` of the set, with the defect of its number."""
    import trimesh

    rng = np.random.default_rng(number)
    rows = round((triangles / 4) ** 0.5)
    body = trimesh.creation.uv_sphere(radius=0.5, count=(rows, 2 * rows))
    waves = sum(np.sin(body.vertices @ rng.normal(scale=12, size=3) + rng.uniform(0, 6)) for _ in range(4))
    body.vertices *= (1 + 0.02 * waves)[:, None]
    defect = DEFECTS[number % len(DEFECTS)]
    if defect == "hole":
        body.update_faces(
            np.linalg.norm(body.triangles_center - body.vertices[rng.integers(len(body.vertices))], axis=1)
            > 0.12
        )
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.05 if defect == "floater" else 0.25)
    if defect == "floater":
        ball.apply_translation(0.7 * body.vertices[0] / np.linalg.norm(body.vertices[0]))
    return trimesh.util.concatenate([body, ball]) if defect in ("floater", "inner wall") else body


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--count", default=500, show_default=True)
@click.option("--triangles", default=20_000, show_default=True, help="Of each mesh, about.")
def main(folder: Path, count: int, triangles: int) -> None:
    """Write COUNT meshes into FOLDER, a third each as GLB, PLY and OBJ, for two generators in turn."""
    for number in tqdm(range(count), desc="written", unit="file"):
        path = folder / ("first", "second")[number // 2 % 2] / f"{number:04d}{KINDS[number % len(KINDS)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        mesh(number, triangles).export(path)


if __name__ == "__main__":
    main()
