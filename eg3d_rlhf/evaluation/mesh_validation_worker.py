"""Measure and render mesh files in a separate process with limits on memory and time.

A malicious or damaged file can end only this process; the caller then reports the file as not measured.
The process reads requests as JSON lines, and writes an answer as a JSON line for each.
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

MAX_BYTES = 512 << 20  # largest size of a file, 512 MB
MAX_TRIANGLES = 2_000_000  # largest number of triangles of a file
MEMORY = 8 << 30  # limit of the address space in bytes (8 GB), most of which the libraries take
SECONDS = 600  # limit of the processor time for one file
SIDE = 192  # edge of a render, pixels
_VIEW = np.array([0.55, 0.4, 0.75])  # direction from the mesh to the camera, y up
_FRONT = np.array([0.78, 0.80, 0.83])  # RGB in 0..1 of the outsides of faces, grey
_BACK = np.array([0.90, 0.45, 0.10])  # RGB in 0..1 of the insides of faces, orange


def read_mesh(mesh_path: Path, tolerance: float, up_axis: str) -> CleanMesh:
    """Read and clean the mesh of a file.

    Args:
        tolerance: edge of the grid cells within which vertices are merged, as a share of the longest edge of
            the bounding box.
        up_axis: axis that points up, for example "y".

    Raises: ValueError or OSError if the file cannot be read or is too large.
    """
    # Each size is checked before the expensive step that follows it.
    file_bytes = mesh_path.stat().st_size
    if not 0 < file_bytes <= MAX_BYTES:
        raise ValueError(
            f"the file has {file_bytes:,} bytes, but only 1 byte to {MAX_BYTES >> 20} MB are accepted. Reduce"
            " the mesh, or export it again if the file is empty."
        )
    vertices, faces = read_triangles(mesh_path)
    if len(faces) > MAX_TRIANGLES:
        raise ValueError(
            f"the mesh has {len(faces):,} triangles, but at most {MAX_TRIANGLES:,} are accepted. Reduce the"
            " mesh."
        )
    return clean_mesh(vertices, faces, tolerance, up_axis)


def render_mesh(mesh: CleanMesh, pixels_per_edge: int = SIDE) -> np.ndarray:
    """Render a mesh from the front and above with an orthographic camera: RGBA, uint8 [R, R, 4].

    The outsides of faces are grey and the insides orange, so that holes and inverted faces are visible. The
    background is transparent.

    Args: pixels_per_edge: R, the edge of the square image in pixels.
    """
    view_direction = -_VIEW / np.linalg.norm(_VIEW)  # viewing direction, a unit vector
    image_right = np.cross(view_direction, [0, 1, 0])
    image_right /= np.linalg.norm(image_right)
    image_up = np.cross(image_right, view_direction)  # a unit vector, since both factors are
    # The mesh fills the image, with a margin of 5 %.
    half_width = np.abs(mesh.vertices @ np.stack([image_right, image_up], axis=1)).max() * 1.05
    pixel_positions = (
        np.arange(2 * pixels_per_edge) + 0.5
    ) / pixels_per_edge - 1  # pixel centres at twice the resolution of the render
    # y decreases from row to row
    x, y = np.meshgrid(pixel_positions * half_width, -pixel_positions * half_width)
    # [4 side^2, 3]: parallel rays that start two units in front of the image plane
    origins = x.reshape(-1, 1) * image_right + y.reshape(-1, 1) * image_up - 2 * view_direction
    hit_distances, hit_faces = Space(mesh).first_hits(origins, np.broadcast_to(view_direction, origins.shape))
    # Rays that miss the mesh have an infinite distance. Their colour is multiplied by 0 below. `face_areas`
    # returns the normals as its first value.
    normals = face_areas(mesh)[0][hit_faces]
    cosine_to_camera = -(normals @ view_direction)
    # Lambertian light from one direction plus an ambient part. The absolute value lights both sides of a
    # face in the same way.
    brightness = 0.35 + 0.65 * np.abs(normals @ np.array([0.3, 0.8, 0.52])).clip(0, 1)
    colours = np.where(cosine_to_camera[:, None] >= 0, _FRONT, _BACK) * brightness[:, None]  # [rays, 3]
    rgba = (
        np.concatenate([colours, np.ones((len(hit_faces), 1))], axis=1) * np.isfinite(hit_distances)[:, None]
    )
    # Each pixel is the mean of 2 x 2 rays. The mean colour includes the black background, so the next line
    # divides it by the share of rays that hit the mesh, which is the alpha channel.
    pixels = rgba.reshape(pixels_per_edge, 2, pixels_per_edge, 2, 4).mean(axis=(1, 3))
    pixels[..., :3] /= np.maximum(pixels[..., 3:], 1e-9)
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)


def answer(request: dict) -> dict:
    """Answer a request: measure a mesh file, or render it.

    Args: request: dict with "path" (of the file), "do" ("render", or any other value to measure), "weld"
        (distance within which vertices are merged), "up" (axis), and to measure "options" (fields of
        `MeasureOptions`).
    Returns: the measures; or the render as PNG in base64; or {"reason": ...} if the file cannot be measured.
    """
    try:
        start_seconds = time.process_time()  # processor time, which other workers do not affect
        mesh = read_mesh(Path(request["path"]), request["weld"], request["up"])
        if request["do"] == "render":
            # Imported here, since measuring does not need it.
            from PIL import Image

            png_buffer = io.BytesIO()
            Image.fromarray(render_mesh(mesh)).save(png_buffer, "PNG")
            return {"render": base64.b64encode(png_buffer.getvalue()).decode()}
        return {
            **measure_mesh(mesh, MeasureOptions(**request["options"])),
            "seconds": round(time.process_time() - start_seconds, 3),
        }
    # The failure is returned as an answer, so that the other files are still measured.
    except (ValueError, OSError, MemoryError) as error:
        # A MemoryError has no message of its own.
        if isinstance(error, MemoryError):
            return {"reason": f"measuring the mesh needs more than {MEMORY >> 30} GB of memory"}
        return {"reason": str(error) or type(error).__name__}


if __name__ == "__main__":
    serve_requests(answer, MEMORY, SECONDS)
