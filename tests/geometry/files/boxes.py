"""Files of one box with the edges 1, 2 and 3, so of volume 6, in every format; tests damage them."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.people.label.asset_files import pack_glb

POINTS = np.array(list(itertools.product([0.0, 1.0], [0.0, 2.0], [0.0, 3.0])))  # [8, 3]
# [12, 3], outwards
FACES = np.array(
    [
        *([0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1]),
        *([2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]),
    ]
)
UV = np.random.default_rng(0).uniform(size=(8, 2))  # a texture coordinate for each vertex
CORNERS = "".join(
    "f " + " ".join(f"{i + 1}/{k + 1}" for k, i in enumerate(face)) + "\n" for face in FACES
)  # faces of an OBJ with texture coordinates
VT = "vt 0 0\nvt 1 0\nvt 1 1\n"


def write(path: Path, data: str | bytes) -> Path:
    """Write a file, with the folders above it, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def image(kind: str = "PNG", mode: str = "RGB", side: int = 8) -> bytes:
    """Bytes of a red image."""
    out = io.BytesIO()
    Image.new(mode, (side, side), (255, 0, 0)).save(out, kind)
    return out.getvalue()


def obj(
    faces: str | None = None, head: str = "", points: np.ndarray = POINTS, line: str = "v {} {} {}"
) -> str:
    """An OBJ of the box. Args: faces: lines after the points; None: the faces without texture coordinates."""
    plain = "".join("f {} {} {}\n".format(*(face + 1)) for face in FACES)
    return (
        head + "".join(line.format(*point) + "\n" for point in points) + (plain if faces is None else faces)
    )


def glb(
    *,
    points: np.ndarray = POINTS,
    attributes: dict[str, np.ndarray] | None = None,
    targets: Sequence[np.ndarray] = (),
    images: Sequence[bytes] = (),
    **document: object,
) -> bytes:
    """A GLB of the box.

    Args:
        attributes: further attributes of the vertices, float32.
        targets: differences of positions, morph targets.
        images: files of images in the binary chunk, in order.
        document: parts of the document. `mesh` and `primitive` are added to the record of the mesh and of its
            primitive; the others are added to the document.
    """
    pieces: list[bytes] = []
    views: list[dict] = []
    accessors: list[dict] = []

    def view(data: bytes) -> int:
        start = sum(map(len, pieces))
        pieces.append(data + bytes(-len(data) % 4))
        views.append({"buffer": 0, "byteOffset": start, "byteLength": len(data)})
        return len(views) - 1

    def accessor(values: np.ndarray, dtype: str = "<f4", component: int = 5126) -> int:
        values = np.ascontiguousarray(values, dtype)
        kind = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}[values.shape[1]]
        accessors.append(
            {
                "bufferView": view(values.tobytes()),
                "componentType": component,
                "count": len(values),
                "type": kind,
            }
        )
        return len(accessors) - 1

    named = {"POSITION": points, **(attributes or {})}
    primitive = {
        "attributes": {name: accessor(values) for name, values in named.items()},
        "indices": accessor(FACES.reshape(-1, 1), "<u2", 5123),
        **({"targets": [{"POSITION": accessor(target)} for target in targets]} if targets else {}),
        **document.pop("primitive", {}),  # type: ignore[arg-type]
    }
    pictures = [{"bufferView": view(data), "mimeType": "image/png"} for data in images]
    whole = {
        "asset": {"version": "2.0"},
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
        "meshes": [{"primitives": [primitive], **document.pop("mesh", {})}],  # type: ignore[arg-type]
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": sum(map(len, pieces))}],
        **({"images": pictures} if pictures else {}),
        **document,
    }
    return pack_glb(whole, b"".join(pieces))


def ply(
    *,
    comments: Sequence[str] = (),
    points: np.ndarray = POINTS,
    columns: Sequence[tuple[str, str]] = (),
    values: np.ndarray | None = None,
    face_properties: str = "",
    face_values: Sequence[str] | None = None,
    faces: np.ndarray = FACES,
    newline: str = "\n",
) -> bytes:
    """A text PLY of the box.

    Args:
        comments: comments of the header.
        columns: (type, name) of further properties of the vertices.
        values: values [N, columns] of these properties.
        face_properties: lines of further properties of the faces.
        face_values: text of these properties for each face.
        newline: characters at the end of each line.
    """
    rows = points if values is None else np.hstack([points, values])
    lines = [
        "ply",
        "format ascii 1.0",
        *(f"comment {comment}" for comment in comments),
        f"element vertex {len(points)}",
        *(f"property {kind} {name}" for kind, name in (*(("float", name) for name in "xyz"), *columns)),
        f"element face {len(faces)}",
        "property list uchar int vertex_indices",
        *face_properties.splitlines(),
        "end_header",
        *(" ".join(f"{number:.9g}" for number in row) for row in rows),
        *(
            f"3 {a} {b} {c} {'' if face_values is None else face_values[i]}"
            for i, (a, b, c) in enumerate(faces)
        ),
    ]
    return (newline.join(lines) + newline).encode()


def volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Return the signed volume of a closed mesh."""
    a, b, c = (np.asarray(vertices, float)[faces[:, i]] for i in range(3))
    return float((a * np.cross(b, c)).sum()) / 6
