"""Write a folder of meshes with which the speed of mesh validation is measured.

The meshes are bumpy spheres, of which some have a hole, a floater or an inner wall.

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


def make_mesh(mesh_index: int, triangle_count: int):
    """Make a mesh of the set.

    Args:
        mesh_index: number of the mesh, which determines its random shape and its defect.
        triangle_count: approximate number of triangles.
    """
    import trimesh

    rng = np.random.default_rng(mesh_index)  # the shape depends on the number alone
    # A sphere of r rows and 2 r columns has about 4 r^2 triangles.
    row_count = round((triangle_count / 4) ** 0.5)
    sphere = trimesh.creation.uv_sphere(radius=0.5, count=(row_count, 2 * row_count))
    bumps = sum(np.sin(sphere.vertices @ rng.normal(scale=12, size=3) + rng.uniform(0, 6)) for _ in range(4))
    sphere.vertices *= (1 + 0.02 * bumps)[:, None]
    # The defects alternate with the number.
    defect = DEFECTS[mesh_index % len(DEFECTS)]
    if defect == "hole":
        sphere.update_faces(
            np.linalg.norm(
                sphere.triangles_center - sphere.vertices[rng.integers(len(sphere.vertices))], axis=1
            )
            > 0.12
        )
    small_ball = trimesh.creation.icosphere(subdivisions=3, radius=0.05 if defect == "floater" else 0.25)
    if defect == "floater":
        small_ball.apply_translation(0.7 * sphere.vertices[0] / np.linalg.norm(sphere.vertices[0]))
    return trimesh.util.concatenate([sphere, small_ball]) if defect in ("floater", "inner wall") else sphere


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--count", default=500, show_default=True, help="Number of meshes.")
@click.option(
    "--triangles", default=20_000, show_default=True, help="Approximate number of triangles of each mesh."
)
def main(folder: Path, count: int, triangles: int) -> None:
    """Write COUNT meshes into FOLDER, in equal parts as GLB, PLY and OBJ.

    The meshes are written alternately for two generators, "first" and "second".
    """
    for mesh_index in tqdm(range(count), desc="written", unit="file"):
        # The generator changes after every two meshes, the file type after every mesh.
        mesh_path = (
            folder
            / ("first", "second")[mesh_index // 2 % 2]
            / f"{mesh_index:04d}{KINDS[mesh_index % len(KINDS)]}"
        )
        mesh_path.parent.mkdir(parents=True, exist_ok=True)
        make_mesh(mesh_index, triangles).export(mesh_path)


if __name__ == "__main__":
    main()
