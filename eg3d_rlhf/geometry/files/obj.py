"""OBJ files with their materials (MTL) and textures, which must lie in the same folder or below it.

Faces of any number of corners become triangles; smooth groups are left out, as normals say the same. The
textures' bytes are embedded as they are. Where the MTL file is missing the mesh is grey.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eg3d_rlhf.geometry.files.model import Model, Picture, linear, scene_of, stripped, triangles
from eg3d_rlhf.geometry.files.polygons import triangulated

# bytes
MAX_MTL = 4 << 20
MAX_TEXTURE = 128 << 20
MAX_MATERIALS = 1000
_LIBRARY = re.compile(rb"^[ \t]*mtllib[ \t]+([^\r\n]+)", re.MULTILINE)
GREY = [0.4, 0.4, 0.4, 1.0]  # linear
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


@dataclass
class Material:
    """What is taken of a material."""

    colour: tuple[float, ...] = (1.0, 1.0, 1.0)  # Kd, sRGB
    opacity: float = 1.0
    texture: Path | None = None  # map_Kd


def companions(data: bytes | memoryview, path: Path) -> list[Path]:
    """The files that an OBJ file needs and has, each once, in order. Raises: ValueError naming one that it
    may not have, or a texture that is not there.
    """
    files: dict[Path, None] = {}
    for library in _libraries(data, path)[0]:
        files[library] = None
        for material in _materials(as_text(library.read_bytes()), library).values():
            if material.texture is not None:
                files[material.texture] = None
    return list(files)


def missing_libraries(data: bytes | memoryview, path: Path) -> list[str]:
    """Names of the material files that an OBJ file asks for and that are not there: it is shown in grey."""
    return _libraries(data, path)[1]


def as_text(data: bytes | memoryview) -> str:
    """Text as UTF-16, with or without its mark, or UTF-8."""
    head = bytes(data[:512])
    name = utf16(head)
    return bytes(data).decode(name or "utf-8-sig", "replace")


def utf16(head: bytes) -> str | None:
    """The encoding of text in UTF-16 by its first bytes, of Latin letters where it has no mark; None for
    anything else.
    """
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    even = head[: len(head) // 2 * 2 : 2]
    odd = head[1::2]
    if len(head) < 8 or b"\0\0" in head:
        return None
    return (
        "utf-16-le"
        if not any(odd) and b"\0" not in even
        else "utf-16-be"
        if not any(even) and b"\0" not in odd
        else None
    )


def read_obj(data: bytes | memoryview, path: Path, geometry_only: bool = False) -> Model:
    """Read the mesh, a part for each material.

    Args: geometry_only: open neither materials nor textures. Vertices and faces stay the same, in the same
        order.
    Raises: ValueError.
    """
    libraries, missing = ([], []) if geometry_only else _libraries(data, path)
    if len(libraries) > 1:
        raise ValueError(f"expected one mtllib, got {len(libraries)}; join them in one file")
    materials = _materials(as_text(libraries[0].read_bytes()), libraries[0]) if libraries else {}
    parts = _Lines(as_text(data)).parts()
    used = [name for name in materials if any(name == part[0] for part in parts)]
    numbers = {name: i for i, name in enumerate(used)}
    records, pictures = _records([materials[name] for name in used])
    if missing:
        numbers = dict.fromkeys([part[0] for part in parts], 0)
        records = [
            {
                "pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1, "baseColorFactor": GREY},
                "doubleSided": True,
            }
        ]
    return scene_of(
        [triangles(**arrays, material=numbers.get(name)) for name, arrays in parts], records, pictures
    )


class _Lines:
    """What the lines of an OBJ file say: points, and faces with the numbers of their corners."""

    def __init__(self, text: str):
        # all numbers of a kind, and all corners
        self.words: dict[str, list[str]] = {"v": [], "vt": [], "vn": [], "f": []}
        self.widths: dict[str, list[int]] = {kind: [] for kind in self.words}  # of each line
        self.lines: list[int] = []  # number of each face's line
        self.names: list[str] = []  # material of each face
        material = ""
        for number, line in enumerate(text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines(), 1):
            kind, *words = (line.split("#", 1)[0] if "#" in line else line).split() or [""]
            if kind == "f":
                if len(words) < 3:
                    continue
                if "-" in line:
                    words = [self._counted(word, number) for word in words]
                self.lines.append(number)
                self.names.append(material)
            elif kind == "usemtl":
                material = " ".join(words)
            if kind in self.words:
                self.words[kind] += words
                self.widths[kind].append(len(words))
        if not self.lines:
            raise ValueError("expected triangles in the OBJ file, got none")

    def _counted(self, word: str, line: int) -> str:
        """A corner whose numbers below 0 count back from the last point above its line, with numbers from 1
        on.
        """
        parts = word.split("/")
        for i, (part, kind) in enumerate(zip(parts, self.widths, strict=False)):
            if part.startswith("-") and part[1:].isdecimal():
                parts[i] = str(len(self.widths[kind]) + int(part) + 1)
                if int(parts[i]) < 1:
                    raise ValueError(
                        f"expected indices of {len(self.widths['v'])} vertices, got {word[:40]!r} in line"
                        f" {line}"
                    )
        return "/".join(parts)

    def corners(self) -> np.ndarray:
        """Numbers [C, 3] of v, vt and vn from 0 on; -1 for none."""
        words = self.words["f"]
        slashes = {word.count("/") for word in words}
        if len(slashes) > 1 or "//" in (text := " ".join(words)) or "/ " in text or text.endswith("/"):
            split = [[*(part or "0" for part in word.split("/")), "0", "0"] for word in words]
            words = ["/".join(parts[: max(3, len(parts) - 2)]) for parts in split]
            slashes = {word.count("/") for word in words}
            text = " ".join(words)
        width = slashes.pop() + 1
        numbers = _numbers(text.replace("/", " "), np.int64)
        if (
            slashes
            or width > 3
            or len(numbers) != width * len(words)
            or (numbers < 0).any()
            or not numbers[::width].all()
        ):
            right = re.compile(r"0*[1-9]\d*(/\d*){0,2}")
            wrong = next((i for i, word in enumerate(self.words["f"]) if not right.fullmatch(word)), 0)
            line = self.lines[int(np.searchsorted(np.cumsum(self.widths["f"]), wrong, side="right"))]
            raise ValueError(
                f"expected corners such as 1 or 1/1/1 in line {line}, got {self.words['f'][wrong][:40]!r}"
            )
        found = np.full((len(words), 3), -1)
        found[:, :width] = numbers.reshape(-1, width) - 1
        return found

    def _table(self, kind: str, least: int, most: int) -> np.ndarray:
        """[N, least..most] float64, columns that all lines have. Raises: ValueError."""
        widths = np.array(self.widths[kind], dtype=np.int64)
        numbers = _numbers(" ".join(self.words[kind]), np.float64)
        if len(widths) and (widths.min() < least or len(numbers) != widths.sum()):
            raise ValueError(f"expected {least} numbers or more after each {kind}, got others")
        width = min(int(widths.min(initial=most)), most)
        return numbers[(np.cumsum(widths) - widths)[:, None] + np.arange(width)]

    def parts(self) -> list[tuple[str, dict]]:
        """Of each material: its name, and arrays as `triangles` takes them; vertices of their own where
        texture or normals have a seam.
        """
        points = self._table("v", 3, 7)
        uv = self._table("vt", 1, 2)
        normals = self._table("vn", 3, 3)
        corners = self.corners()
        sizes = np.array([len(points), len(uv), len(normals)])
        wrong = corners >= sizes
        if wrong[:, 0].any():
            raise ValueError(f"expected indices of {len(points)} vertices, got {corners[:, 0].max() + 1}")
        kept = [
            i
            for i, values in ((1, uv), (2, normals))
            if len(values) and not (wrong[:, i] | (corners[:, i] < 0)).any()
        ]
        cut, face = triangulated(points[:, :3], corners[:, 0], np.array(self.widths["f"]))
        names = {name: i for i, name in enumerate(dict.fromkeys(self.names))}
        material = np.array([names[name] for name in self.names])[face]
        key = corners[:, 0]
        for i in kept:
            key = key * sizes[i] + corners[:, i]
        result = []
        for name, number in names.items():
            mine = cut[material == number]
            if not len(mine):
                continue
            _, first, faces = np.unique(key[mine.reshape(-1)], return_index=True, return_inverse=True)
            at = corners[mine.reshape(-1)[first]]
            arrays: dict = {"positions": points[at[:, 0], :3], "faces": faces.reshape(-1, 3)}
            if points.shape[1] >= 6:
                arrays["colours"] = np.rint(points[at[:, 0], 3:].clip(0, 1) * 255)
            if 1 in kept and uv.shape[1] == 2:  # OBJ counts v upwards, glTF downwards
                arrays["uv"] = np.stack([uv[at[:, 1], 0], 1 - uv[at[:, 1], 1]], axis=1)
            if 2 in kept:
                arrays["normals"] = normals[at[:, 2]]
            result.append((name, arrays))
        return result


def _numbers(text: str, kind: type) -> np.ndarray:
    """Numbers of words; none where one of them is no number."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # older numpy stops there and warns, newer raises
        try:
            return np.fromstring(text, dtype=kind, sep=" ") if text else np.zeros(0, kind)
        except (ValueError, DeprecationWarning):
            return np.zeros(0, kind)


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


def _libraries(data: bytes | memoryview, path: Path) -> tuple[list[Path], list[str]]:
    """The files of materials, and the names of those that are not there.

    Raises: ValueError for one elsewhere.
    """
    if utf16(bytes(data[:512])) is not None:
        data = as_text(data).encode()
    names = dict.fromkeys(
        match.group(1).decode("utf-8", "replace").strip().strip('"') for match in _LIBRARY.finditer(data)
    )
    there = {name: _beside(path, name, MAX_MTL, optional=True) for name in names}
    return [file for file in there.values() if file is not None], [
        name for name, file in there.items() if file is None
    ]


def _materials(text: str, path: Path) -> dict[str, Material]:
    materials: dict[str, Material] = {}
    current = Material()
    for line in text.splitlines():
        words = line.split(maxsplit=1)
        if len(words) < 2 or words[0].startswith("#"):
            continue
        key = words[0].lower()
        value = words[1].strip()
        if key == "newmtl":
            current = materials[" ".join(value.split())] = Material()
            if len(materials) > MAX_MATERIALS:
                raise ValueError(f"expected up to {MAX_MATERIALS} materials in {path.name}, got more")
        elif key in ("kd", "d"):
            try:
                numbers = tuple(
                    min(max(float(word), 0.0), 1.0) for word in value.split()[: 3 if key == "kd" else 1]
                )
            except ValueError:
                raise ValueError(
                    f"expected numbers after {words[0]} in {path.name}, got {value[:40]!r}"
                ) from None
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


def _beside(path: Path, name: str, limit: int, optional: bool = False) -> Path | None:
    _refuse_foreign(path, name)
    file = path.parent / name.replace("\\", "/").strip('"')
    folder = path.parent.resolve()
    if not file.resolve().is_relative_to(folder):
        raise ValueError(
            f"expected files beside {path.name}, got {name[:80]!r} named in it, which leads elsewhere"
        )
    if not file.is_file():
        if optional:
            return None
        raise ValueError(f"expected {name[:80]!r}, which {path.name} names, got no such file")
    if file.stat().st_size > limit:
        raise ValueError(f"expected {name[:80]!r} of up to {limit >> 20} MB, got a larger one")
    return file.resolve()
