"""Measure and render mesh files in a separate process with limits on memory and time.

A hostile or damaged file ends this process alone; the caller reports it as a row with a reason.
Example:
    python -m eg3d_rlhf.evaluation.mesh_validation_worker < requests.jsonl
"""

import base64
import io
import time
from pathlib import Path

import numpy as np

from eg3d_rlhf.experiments.process import serve_requests
from eg3d_rlhf.geometry.files.triangles import read_triangles
from eg3d_rlhf.measures.meshes.clean import CleanMesh, clean_mesh, face_areas
from eg3d_rlhf.measures.meshes.mesh_measures import measure_mesh
from eg3d_rlhf.measures.meshes.settings import MeasureOptions
from eg3d_rlhf.measures.meshes.space import Space

# limits of one file
MAX_BYTES = 512 << 20
MAX_TRIANGLES = 2_000_000
# limit of the address space in bytes, most of which the libraries take; processor time of one file in seconds
MEMORY = 8 << 30
SECONDS = 600
SIDE = 192  # edge of a render, pixels
_VIEW = np.array([0.55, 0.4, 0.75])  # direction from the mesh to the camera, y up
# RGB in 0..1 of the outsides and the insides of faces
_FRONT = np.array([0.78, 0.80, 0.83])
_BACK = np.array([0.90, 0.45, 0.10])


def mesh_of(path: Path, tolerance: float, up: str) -> CleanMesh:
    """Read and clean the mesh of a file. Raises: ValueError, OSError."""
    # Both sizes are checked before the costly step that follows them.
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise ValueError(f"expected a file of 1 byte to {MAX_BYTES >> 20} MB, got {size:,} bytes")
    vertices, faces = read_triangles(path)
    if len(faces) > MAX_TRIANGLES:
        raise ValueError(f"expected up to {MAX_TRIANGLES:,} triangles, got {len(faces):,}")
    return clean_mesh(vertices, faces, tolerance, up)


def render_mesh(mesh: CleanMesh, side: int = SIDE) -> np.ndarray:
    """Render the mesh from the front and above with an orthographic camera, uint8 [side, side, 4].

    Outsides are grey and insides orange, so that holes and inverted faces show. The background is
    transparent.
    """
    forward = -_VIEW / np.linalg.norm(_VIEW)
    right = np.cross(forward, [0, 1, 0])
    right /= np.linalg.norm(right)
    upward = np.cross(right, forward)
    # The largest extent of the mesh on the image plane, plus a margin of 5 %.
    reach = np.abs(mesh.vertices @ np.stack([right, upward], axis=1)).max() * 1.05
    axis = (np.arange(2 * side) + 0.5) / side - 1  # pixel centres at twice the resolution of the render
    x, y = np.meshgrid(axis * reach, -axis * reach)
    # [4 side^2, 3]: parallel rays that start two units in front of the image plane
    origins = x.reshape(-1, 1) * right + y.reshape(-1, 1) * upward - 2 * forward
    distance, face = Space(mesh).first_hits(origins, np.broadcast_to(forward, origins.shape))
    # Rays that miss have an infinite distance; their normal and colour are masked by `shown` below.
    normals = face_areas(mesh)[0][face]
    facing = -(normals @ forward)
    # Lambertian light from one direction plus an ambient part; the absolute value lights both sides alike.
    light = 0.35 + 0.65 * np.abs(normals @ np.array([0.3, 0.8, 0.52])).clip(0, 1)
    colour = np.where(facing[:, None] >= 0, _FRONT, _BACK) * light[:, None]
    shown = np.concatenate([colour, np.ones((len(face), 1))], axis=1) * np.isfinite(distance)[:, None]
    # Average 2 x 2 rays per pixel. The colours are premultiplied by the coverage here, and divided by it
    # next.
    fine = shown.reshape(side, 2, side, 2, 4).mean(axis=(1, 3))
    fine[..., :3] /= np.maximum(fine[..., 3:], 1e-9)
    return np.rint(fine.clip(0, 1) * 255).astype(np.uint8)


def answer(request: dict) -> dict:
    """Measure a file, or render it as PNG in base64; a file that fails gives {"reason": ...}."""
    try:
        began = time.process_time()  # processor time: other workers do not count
        mesh = mesh_of(Path(request["path"]), request["weld"], request["up"])
        if request["do"] == "picture":
            # Imported here: measuring alone does not need it.
            from PIL import Image

            out = io.BytesIO()
            Image.fromarray(render_mesh(mesh)).save(out, "PNG")
            return {"picture": base64.b64encode(out.getvalue()).decode()}
        return {
            **measure_mesh(mesh, MeasureOptions(**request["options"])),
            "seconds": round(time.process_time() - began, 3),
        }
    # A failure is an answer: the other files of the folder are still measured.
    except (ValueError, OSError, MemoryError) as error:
        # A MemoryError has no message of its own.
        if isinstance(error, MemoryError):
            return {
                "reason": "expected a mesh that can be measured with bounded memory, got one that takes more"
            }
        return {"reason": str(error) or type(error).__name__}


if __name__ == "__main__":
    serve_requests(answer, MEMORY, SECONDS)
