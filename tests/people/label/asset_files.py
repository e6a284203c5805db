"""Small asset files for tests, made here: textured GLB, splat PLY, OBJ with its material, PLY mesh, films; of
any size.
"""

import io
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SECRET = "generator-seven"  # stands in every place of a file that should not reach an annotator


def image_bytes(side: int = 16, kind: str = "PNG", seed: int = 0, noise: bool = False) -> bytes:
    """Bytes of an image file that holds SECRET beside its pixels; `noise` does not compress."""
    rng = np.random.default_rng(seed)
    grain = rng.integers(0, 256, (side, side, 3) if noise else (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(grain).resize((side, side), Image.Resampling.NEAREST)
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = exif[0x0131] = SECRET
    if kind == "PNG":
        notes = PngInfo()
        notes.add_text("Software", SECRET)
        notes.add_itxt("Comment", SECRET)
        image.save(out, "PNG", pnginfo=notes, exif=exif)
    else:
        image.save(
            out,
            kind,
            exif=exif,
            quality=90,
            **({"comment": SECRET.encode()} if kind == "JPEG" else {"xmp": SECRET.encode()}),
        )
    return out.getvalue()


def sphere(points: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions [N, 3] float32, triangles [F, 3] and texture coordinates [N, 2] of a bumpy sphere of about so
    many points.
    """
    rows = max(4, round((points / 2) ** 0.5))
    u, v = np.meshgrid(
        np.linspace(0, 1, 2 * rows, dtype=np.float32), np.linspace(0, 1, rows, dtype=np.float32)
    )
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    radius = 0.5 + 0.05 * np.sin(6 * np.pi * u + phases[0]) * np.sin(np.pi * v) ** 2
    ring = np.sin(np.pi * v) * radius
    positions = np.stack(
        [ring * np.sin(2 * np.pi * u), np.cos(np.pi * v) * radius, ring * np.cos(2 * np.pi * u)], -1
    ).reshape(-1, 3)
    at = np.arange(rows * 2 * rows).reshape(rows, 2 * rows)
    a = at[:-1, :-1].ravel()
    b = at[1:, :-1].ravel()
    c = at[:-1, 1:].ravel()
    d = at[1:, 1:].ravel()
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([c, b, d], 1)])
    return positions.astype("<f4"), faces.astype("<u4"), np.stack([u, v], -1).reshape(-1, 2).astype("<f4")


def pack_glb(document: dict, binary: bytes) -> bytes:
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    binary += bytes(-len(binary) % 4)
    total = 12 + 8 + len(text) + 8 + len(binary)
    return b"".join(
        [
            struct.pack("<4sII", b"glTF", 2, total),
            struct.pack("<II", len(text), 0x4E4F534A),
            text,
            struct.pack("<II", len(binary), 0x004E4942),
            binary,
        ]
    )


def unpack_glb(data: bytes) -> tuple[dict, bytes]:
    size = struct.unpack_from("<I", data, 12)[0]
    return json.loads(data[20 : 20 + size]), data[28 + size :]


def glb_document(
    points: int = 200, side: int = 16, kind: str = "PNG", seed: int = 0, noise: bool = False
) -> tuple[dict, bytes]:
    """The parts of a textured GLB with SECRET as names, extras, generator and copyright."""
    positions, faces, uv = sphere(points, seed)
    pieces = [positions.tobytes(), uv.tobytes(), faces.tobytes(), image_bytes(side, kind, seed, noise)]
    views = []
    at = 0
    for piece in pieces:
        views.append({"buffer": 0, "byteOffset": at, "byteLength": len(piece), "name": SECRET})
        at += len(piece) + -len(piece) % 4
    named = {"name": SECRET, "extras": {"from": SECRET}}
    ends = {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
    document = {
        "asset": {"version": "2.0", "generator": SECRET, "copyright": SECRET, "extras": {"seed": SECRET}},
        "scene": 0,
        "scenes": [{"nodes": [0], **named}],
        "nodes": [{"children": [1], **named}, {"mesh": 0, "translation": [0, 0.1, 0], **named}],
        "meshes": [
            {
                "primitives": [
                    {
                        "attributes": {"POSITION": 0, "TEXCOORD_0": 1, "_SECRET": 0},
                        "indices": 2,
                        "material": 0,
                        "extras": SECRET,
                    }
                ],
                **named,
            }
        ],
        "materials": [
            {
                "pbrMetallicRoughness": {
                    "baseColorTexture": {"index": 0},
                    "metallicFactor": 0,
                    "roughnessFactor": 0.8,
                },
                **named,
            }
        ],
        "textures": [{"source": 0, "sampler": 0, **named}],
        "samplers": [{"magFilter": 9729, "wrapS": 10497, **named}],
        "images": [{"bufferView": 3, "mimeType": f"image/{kind.lower()}", **named}],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": 5126,
                "count": len(positions),
                "type": "VEC3",
                **ends,
                **named,
            },
            {"bufferView": 1, "componentType": 5126, "count": len(uv), "type": "VEC2"},
            {"bufferView": 2, "componentType": 5125, "count": faces.size, "type": "SCALAR"},
        ],
        "bufferViews": views,
        "buffers": [{"byteLength": at, "name": SECRET}],
        "extras": SECRET,
        "extensionsUsed": ["KHR_xmp_json_ld"],
        "extensions": {"KHR_xmp_json_ld": {"packets": [{"dc:creator": SECRET}]}},
    }
    return document, b"".join(piece + bytes(-len(piece) % 4) for piece in pieces)


def glb(points: int = 200, side: int = 16, kind: str = "PNG", seed: int = 0, noise: bool = False) -> bytes:
    """A textured GLB: a bumpy sphere. 50 MB: points=600_000, side=3072, noise=True."""
    return pack_glb(*glb_document(points, side, kind, seed, noise))


SPLAT_FIELDS = ("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2")


def splat_columns(count: int, degree: int = 0, seed: int = 0) -> np.ndarray:
    """Gaussians on a sphere as the usual PLY's columns [N, 17 + rest] float32."""
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(count, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    turns = rng.normal(size=(count, 4))
    rest = rng.normal(size=(count, 3 * ((degree + 1) ** 2 - 1))) * 0.1
    size = np.log(1.5 / count**0.5) + rng.normal(size=(count, 3)) * 0.1
    return np.concatenate(
        [normals / 2, normals, normals, rest, np.full((count, 1), 3.0), size, turns], axis=1
    ).astype("<f4")


def splats(count: int = 300, degree: int = 0, seed: int = 0) -> bytes:
    """A PLY of Gaussian splats with SECRET in its comments."""
    rows = splat_columns(count, degree, seed)
    names = [
        *SPLAT_FIELDS,
        *(f"f_rest_{i}" for i in range(rows.shape[1] - 17)),
        "opacity",
        *(f"scale_{i}" for i in range(3)),
        *(f"rot_{i}" for i in range(4)),
    ]
    head = f"ply\nformat binary_little_endian 1.0\ncomment {SECRET}\nelement vertex {count}\n"
    return (
        head + "".join(f"property float {name}\n" for name in names) + "end_header\n"
    ).encode() + rows.tobytes()


def ply(points: int = 200, seed: int = 0) -> bytes:
    """A PLY mesh with vertices' colours and SECRET in its comments."""
    positions, faces, uv = sphere(points, seed)
    rows = np.zeros(len(positions), [("p", "<f4", 3), ("c", "u1", 3)])
    rows["p"], rows["c"] = (
        positions,
        np.stack([uv[:, 0] * 255, uv[:, 1] * 255, np.full(len(uv), seed % 256)], 1),
    )
    sides = np.zeros(len(faces), [("n", "u1"), ("i", "<i4", 3)])
    sides["n"], sides["i"] = 3, faces
    head = (
        f"ply\nformat binary_little_endian 1.0\ncomment {SECRET}\nelement vertex {len(rows)}\nproperty float"
        " x\nproperty float y\nproperty float z\nproperty uchar red\nproperty uchar green\nproperty uchar"
        f" blue\nelement face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    return head.encode() + rows.tobytes() + sides.tobytes()


def write_obj(path: Path, points: int = 200, seed: int = 0) -> Path:
    """An OBJ with its MTL and texture beside it, named after it; SECRET in comments and names."""
    positions, faces, uv = sphere(points, seed)
    lines = [
        f"# {SECRET}",
        f"mtllib {path.stem}.mtl",
        f"o {SECRET}",
        *(f"v {x} {y} {z}" for x, y, z in positions.tolist()),
    ]
    lines += [f"vt {u} {1 - v}" for u, v in uv.tolist()]
    lines += [f"usemtl {SECRET}", *(f"f {a}/{a} {b}/{b} {c}/{c}" for a, b, c in (faces + 1).tolist())]
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".mtl").write_text(
        f"# {SECRET}\nnewmtl {SECRET}\nKd 0.8 0.8 0.8\nmap_Kd {path.stem}.png\n"
    )
    path.with_suffix(".png").write_bytes(image_bytes(16, "PNG", seed))
    return path


def write_film(path: Path, frames: int = 12, side: int = 64, seed: int = 0) -> Path:
    """A turntable as MP4 (H.264) or WebM (VP9), with SECRET in its metadata."""
    import imageio_ffmpeg

    codec = (
        {"codec": "libx264", "bitrate": "1M"}
        if path.suffix == ".mp4"
        else {"codec": "libvpx-vp9", "bitrate": "300k"}
    )
    notes = [
        "-metadata",
        f"title={SECRET}",
        "-metadata",
        f"comment={SECRET}",
        "-metadata:s:v",
        f"handler_name={SECRET}",
    ]
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (side, side),
        fps=12,
        macro_block_size=2,
        ffmpeg_log_level="error",
        output_params=notes,
        **codec,
    )
    writer.send(None)
    y, x = np.mgrid[:side, :side] / side
    for i in range(frames):
        turn = np.sin(6.28 * (x + i / frames)) * 0.5 + 0.5
        writer.send(
            (np.stack([turn, y, np.full_like(x, (seed % 7) / 7)], -1) * 255).astype(np.uint8).tobytes()
        )
    writer.close()
    return path
