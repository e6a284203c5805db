"""OBJ files with their materials (MTL) and textures, which must lie in the same folder or below it.

The geometry is read by trimesh, which never sees a file's name: materials and textures are looked up here, and the textures' bytes are
embedded as they are.
"""

import collections
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eg3d_rlhf.people.label.assets.model import Model, Picture, linear, scene_of, stripped, triangles

MAX_MTL, MAX_TEXTURE = 4 << 20, 128 << 20  # bytes
MAX_MATERIALS = 1000
_LIBRARY = re.compile(rb"^[ \t]*mtllib[ \t]+([^\r\n]+)", re.MULTILINE)
_FACE = re.compile(rb"^[ \t]*f[ \t]", re.MULTILINE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


@dataclass
class Material:
    """What is taken of a material."""

    colour: tuple[float, ...] = (1.0, 1.0, 1.0)  # Kd, sRGB
    opacity: float = 1.0
    texture: Path | None = None  # map_Kd


def companions(data: bytes | memoryview, path: Path) -> list[Path]:
    """The files that an OBJ file needs, each once, in order. Raises: ValueError naming one that it may not have, or that is not there."""
    files: dict[Path, None] = {}
    for library in _libraries(data, path):
        files[library] = None
        for material in _materials(library.read_text("utf-8", "replace"), library).values():
            if material.texture is not None:
                files[material.texture] = None
    return list(files)


def check_obj(data: bytes | memoryview) -> None:
    """Whether there is a mesh to be read. Raises: ValueError."""
    if _FACE.search(data) is None:
        raise ValueError("expected triangles in the OBJ file, got none")


def read_obj(data: memoryview, path: Path) -> Model:
    """The mesh. Raises: ValueError."""
    libraries = _libraries(data, path)
    if len(libraries) > 1:
        raise ValueError(f"expected one mtllib, got {len(libraries)}; join them in one file")
    materials = _materials(libraries[0].read_text("utf-8", "replace"), libraries[0]) if libraries else {}
    order = list(materials)
    from trimesh.exchange.obj import load_obj

    names = "".join(f"newmtl {name}\nKd 1 1 1\n" for name in order).encode()  # all that trimesh learns of materials
    try:
        loaded = load_obj(io.BytesIO(data), resolver=collections.defaultdict(lambda: names), maintain_order=True)
        parts = list(loaded.get("geometry", {}).values())
        arrays = [(p["vertices"], p["faces"], getattr(p["visual"], "uv", None), p.get("vertex_colors"), p.get("vertex_normals"),
                   getattr(getattr(p["visual"], "material", None), "name", None)) for p in parts]  # fmt: skip
    except Exception as error:  # whatever a damaged file makes of the parser
        raise ValueError(f"expected an OBJ mesh, got a damaged one ({type(error).__name__})") from None
    if not arrays:
        raise ValueError("expected triangles in the OBJ file, got none")
    used = [name for name in order if any(name == row[-1] for row in arrays)]
    numbers = {name: i for i, name in enumerate(used)}
    records, pictures = _records([materials[name] for name in used])
    primitives = []
    for vertices, faces, uv, colours, normals, name in arrays:
        if uv is not None:
            uv = np.stack([uv[:, 0], 1 - uv[:, 1]], axis=1)  # OBJ counts v upwards, glTF downwards
        if colours is not None:
            colours = np.asarray(colours)
            colours = colours if colours.dtype == np.uint8 else np.rint(colours.clip(0, 1) * 255)
        primitives.append(triangles(vertices, faces, uv=uv, colours=colours, normals=normals, material=numbers.get(str(name))))
    return scene_of(primitives, records, pictures)


def _records(materials: list[Material]) -> tuple[list[dict], list[Picture]]:
    places: dict[Path, int] = {}
    pictures: list[Picture] = []
    records = []
    for material in materials:
        surface: dict = {"metallicFactor": 0, "roughnessFactor": 1}
        if material.texture is None:
            surface["baseColorFactor"] = [*linear(np.array(material.colour)).tolist(), material.opacity]
        else:
            if material.texture not in places:
                places[material.texture] = len(pictures)
                pictures.append(stripped(material.texture.read_bytes())[0])
            surface["baseColorTexture"] = {"index": places[material.texture]}
        blend = {"alphaMode": "BLEND"} if material.opacity < 1 and material.texture is None else {}
        records.append({"pbrMetallicRoughness": surface, "doubleSided": True, **blend})
    return records, pictures


def _libraries(data: bytes | memoryview, path: Path) -> list[Path]:
    names = [match.group(1).decode("utf-8", "replace").strip().strip('"') for match in _LIBRARY.finditer(data)]
    return [_beside(path, name, MAX_MTL) for name in dict.fromkeys(names)]


def _materials(text: str, path: Path) -> dict[str, Material]:
    materials: dict[str, Material] = {}
    current = Material()
    for line in text.splitlines():
        words = line.split(maxsplit=1)
        if len(words) < 2 or words[0].startswith("#"):
            continue
        key, value = words[0].lower(), words[1].strip()
        if key == "newmtl":
            current = materials[" ".join(value.split())] = Material()
            if len(materials) > MAX_MATERIALS:
                raise ValueError(f"expected up to {MAX_MATERIALS} materials in {path.name}, got more")
        elif key in ("kd", "d"):
            try:
                numbers = tuple(min(max(float(word), 0.0), 1.0) for word in value.split()[: 3 if key == "kd" else 1])
            except ValueError:
                raise ValueError(f"expected numbers after {words[0]} in {path.name}, got {value[:40]!r}") from None
            if key == "d":
                current.opacity = numbers[0]
            elif len(numbers) == 3:
                current.colour = numbers
        elif key.startswith(("map_", "bump", "disp", "decal", "norm", "refl")):
            _refuse_foreign(path, value)
            if key == "map_kd":
                if value.startswith("-"):
                    raise ValueError(f"expected map_Kd in {path.name} without options, got {value[:40]!r}")
                current.texture = _beside(path, value, MAX_TEXTURE)
    return materials


def _refuse_foreign(path: Path, name: str) -> None:
    last = name.split()[-1]
    if _ADDRESS.match(last) or last.startswith(("/", "\\")) or ".." in Path(last.replace("\\", "/")).parts:
        raise ValueError(f"expected files beside {path.name}, got {name[:80]!r} named in it")


def _beside(path: Path, name: str, limit: int) -> Path:
    _refuse_foreign(path, name)
    file = path.parent / name.replace("\\", "/").strip('"')
    folder = path.parent.resolve()
    if not file.resolve().is_relative_to(folder):
        raise ValueError(f"expected files beside {path.name}, got {name[:80]!r} named in it, which leads elsewhere")
    if not file.is_file():
        raise ValueError(f"expected {name[:80]!r}, which {path.name} names, got no such file")
    if file.stat().st_size > limit:
        raise ValueError(f"expected {name[:80]!r} of up to {limit >> 20} MB, got a larger one")
    return file.resolve()
