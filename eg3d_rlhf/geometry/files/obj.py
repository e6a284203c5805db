"""OBJ files with their materials (MTL) and textures, which must lie in the same folder or below it.

Faces with any number of corners are triangulated. Smoothing groups are ignored, since normals contain the
same information. The bytes of texture files are embedded unchanged apart from metadata. Without its MTL file
a mesh is shown in grey.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eg3d_rlhf.geometry.files.model import Model, Picture, linear, scene_of, stripped, triangles
from eg3d_rlhf.geometry.files.polygons import triangulated

MAX_MTL = 4 << 20  # bytes
MAX_TEXTURE = 128 << 20  # bytes
MAX_MATERIALS = 1000
_LIBRARY = re.compile(rb"^[ \t]*mtllib[ \t]+([^\r\n]+)", re.MULTILINE)
GREY = [0.4, 0.4, 0.4, 1.0]  # linear RGB, and alpha
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)  # a URL, or a path with a drive letter


@dataclass
class Material:
    """The supported properties of a material."""

    colour: tuple[float, ...] = (1.0, 1.0, 1.0)  # Kd, sRGB
    opacity: float = 1.0  # d, 0..1
    texture: Path | None = None  # map_Kd; takes the place of the colour


def companions(data: bytes | memoryview, path: Path) -> list[Path]:
    """Return the existing files that an OBJ file needs, each once, in order.

    Raises: ValueError for a file that lies elsewhere, or a texture that is missing.
    """
    files: dict[Path, None] = {}
    for library in _libraries(data, path)[0]:
        files[library] = None
        for material in _materials(as_text(library.read_bytes()), library).values():
            if material.texture is not None:
                files[material.texture] = None
    return list(files)


def missing_libraries(data: bytes | memoryview, path: Path) -> list[str]:
    """Return the names of the material files that an OBJ file needs and that are missing."""
    return _libraries(data, path)[1]


def as_text(data: bytes | memoryview) -> str:
    """Decode text in UTF-16, with or without a byte order mark, or in UTF-8."""
    head = bytes(data[:512])
    name = utf16(head)
    return bytes(data).decode(name or "utf-8-sig", "replace")


def utf16(head: bytes) -> str | None:
    """Return the encoding of text in UTF-16 from its first bytes; None for other text.

    Without a byte order mark it is recognised by the zero bytes of Latin letters.
    """
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    even = head[: len(head) // 2 * 2 : 2]
    odd = head[1::2]
    # Two zero bytes in sequence do not occur in Latin text
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
    """Read a mesh, with one primitive per material.

    Args:
        path: of the file; materials and textures are searched relative to it.
        geometry_only: open neither materials nor textures. Vertices and faces are the same, in the same
            order.
    Raises: ValueError.
    """
    libraries, missing = ([], []) if geometry_only else _libraries(data, path)
    if len(libraries) > 1:
        raise ValueError(f"expected one mtllib, got {len(libraries)}; join the material files into one")
    materials = _materials(as_text(libraries[0].read_bytes()), libraries[0]) if libraries else {}
    parts = _Lines(as_text(data)).parts()
    used = [name for name in materials if any(name == part[0] for part in parts)]
    numbers = {name: i for i, name in enumerate(used)}
    records, images = _records([materials[name] for name in used])
    # A material file is missing: all parts get the same grey material.
    if missing:
        numbers = dict.fromkeys([part[0] for part in parts], 0)
        records = [
            {
                "pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1, "baseColorFactor": GREY},
                "doubleSided": True,
            }
        ]
    return scene_of(
        [triangles(**arrays, material=numbers.get(name)) for name, arrays in parts], records, images
    )


class _Lines:
    """The parsed lines of an OBJ file: numbers of points, texture coordinates and normals, and corners of
    faces.
    """

    def __init__(self, text: str):
        # v, vt, vn: words of all lines of this kind, each a number; f: words of all faces, each a corner
        self.words: dict[str, list[str]] = {"v": [], "vt": [], "vn": [], "f": []}
        self.widths: dict[str, list[int]] = {kind: [] for kind in self.words}  # number of words of each line
        self.lines: list[int] = []  # line number of each face
        self.names: list[str] = []  # material of each face
        material = ""
        # A backslash at the end of a line continues it.
        for number, line in enumerate(text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines(), 1):
            kind, *words = (line.split("#", 1)[0] if "#" in line else line).split() or [""]
            if kind == "f":
                if len(words) < 3:
                    # faces with fewer than three corners are dropped
                    continue
                # A negative index counts back from the points read so far, so it is resolved here.
                if "-" in line:
                    words = [self._resolved(word, number) for word in words]
                self.lines.append(number)
                self.names.append(material)
            elif kind == "usemtl":
                material = " ".join(words)
            if kind in self.words:
                self.words[kind] += words
                self.widths[kind].append(len(words))
        if not self.lines:
            raise ValueError("expected triangles in the OBJ file, got none")

    def _resolved(self, word: str, line: int) -> str:
        """Return a corner with its negative indices replaced by positive ones, which count from 1.

        A negative index counts back from the last point above the line of the face.
        """
        parts = word.split("/")
        for i, (part, kind) in enumerate(zip(parts, self.widths, strict=False)):
            if part.startswith("-") and part[1:].isdecimal():
                parts[i] = str(len(self.widths[kind]) + int(part) + 1)
                if int(parts[i]) < 1:
                    raise ValueError(
                        f"expected indices of the {len(self.widths['v'])} vertices above, got {word[:40]!r}"
                        f" in line {line}"
                    )
        return "/".join(parts)

    def corners(self) -> np.ndarray:
        """Return indices [C, 3] of v, vt and vn, which count from 0; -1 for none."""
        words = self.words["f"]
        slashes = {word.count("/") for word in words}
        # Corners of different forms (1, 1/2, 1//3) are padded with 0 to one form; 0 means none.
        if len(slashes) > 1 or "//" in (text := " ".join(words)) or "/ " in text or text.endswith("/"):
            split = [[*(part or "0" for part in word.split("/")), "0", "0"] for word in words]
            words = ["/".join(parts[: max(3, len(parts) - 2)]) for parts in split]
            slashes = {word.count("/") for word in words}
            text = " ".join(words)
        width = slashes.pop() + 1
        # all corners at once: parsing them one by one is slow
        numbers = _numbers(text.replace("/", " "), np.int64)
        if (
            slashes  # still several forms
            or width > 3
            or len(numbers) != width * len(words)
            or (numbers < 0).any()
            or not numbers[::width].all()
        ):
            # An error names the first corner that is malformed, and its line.
            right = re.compile(r"0*[1-9]\d*(/\d*){0,2}")
            wrong = next((i for i, word in enumerate(self.words["f"]) if not right.fullmatch(word)), 0)
            line = self.lines[int(np.searchsorted(np.cumsum(self.widths["f"]), wrong, side="right"))]
            raise ValueError(
                f"expected corners such as 1 or 1/1/1 in line {line}, got {self.words['f'][wrong][:40]!r}"
            )
        indices = np.full((len(words), 3), -1)
        indices[:, :width] = numbers.reshape(-1, width) - 1
        return indices

    def _table(self, kind: str, least: int, most: int) -> np.ndarray:
        """Return the numbers of one kind of lines, [N, least..most] float64: the columns that all lines have.

        Raises: ValueError for lines with fewer than `least` numbers, or with other words.
        """
        widths = np.array(self.widths[kind], dtype=np.int64)
        numbers = _numbers(" ".join(self.words[kind]), np.float64)
        if len(widths) and (widths.min() < least or len(numbers) != widths.sum()):
            raise ValueError(f"expected at least {least} numbers after each {kind}, got fewer or other words")
        width = min(int(widths.min(initial=most)), most)
        # [N, width]: position of each line's first number, plus the column
        return numbers[(np.cumsum(widths) - widths)[:, None] + np.arange(width)]

    def parts(self) -> list[tuple[str, dict]]:
        """Return the name and the arrays (arguments of `triangles`) of each material's part.

        A vertex is duplicated at seams of texture coordinates or normals.
        """
        # x, y, z; and r, g, b, a if all lines have them
        points = self._table("v", 3, 7)
        uv = self._table("vt", 1, 2)
        normals = self._table("vn", 3, 3)
        corners = self.corners()
        sizes = np.array([len(points), len(uv), len(normals)])
        wrong = corners >= sizes
        if wrong[:, 0].any():
            raise ValueError(f"expected indices of the {len(points)} vertices, got {corners[:, 0].max() + 1}")
        # Texture coordinates and normals are used only if every corner has a valid index.
        usable = [
            i
            for i, values in ((1, uv), (2, normals))
            if len(values) and not (wrong[:, i] | (corners[:, i] < 0)).any()
        ]
        cut, face = triangulated(points[:, :3], corners[:, 0], np.array(self.widths["f"]))
        names = {name: i for i, name in enumerate(dict.fromkeys(self.names))}
        material = np.array([names[name] for name in self.names])[face]
        # One integer key for each combination of position, texture coordinates and normal.
        vertex_key = corners[:, 0]
        for i in usable:
            vertex_key = vertex_key * sizes[i] + corners[:, i]
        result = []
        for name, number in names.items():
            corner_indices = cut[material == number]
            if not len(corner_indices):
                continue
            _, first_use, faces = np.unique(
                vertex_key[corner_indices.reshape(-1)], return_index=True, return_inverse=True
            )
            vertex_corners = corners[corner_indices.reshape(-1)[first_use]]
            arrays: dict = {"positions": points[vertex_corners[:, 0], :3], "faces": faces.reshape(-1, 3)}
            if points.shape[1] >= 6:
                # vertex colours, a common extension of OBJ
                arrays["colours"] = np.rint(points[vertex_corners[:, 0], 3:].clip(0, 1) * 255)
            # v increases upwards in OBJ and downwards in glTF.
            if 1 in usable and uv.shape[1] == 2:
                arrays["uv"] = np.stack(
                    [uv[vertex_corners[:, 1], 0], 1 - uv[vertex_corners[:, 1], 1]], axis=1
                )
            if 2 in usable:
                arrays["normals"] = normals[vertex_corners[:, 2]]
            result.append((name, arrays))
        return result


def _numbers(text: str, kind: type) -> np.ndarray:
    """Parse numbers separated by spaces. The result is empty if a word is no number."""
    with warnings.catch_warnings():
        # np.fromstring stops at a word that is no number: older versions of numpy warn, newer ones raise.
        warnings.simplefilter("error", DeprecationWarning)
        try:
            return np.fromstring(text, dtype=kind, sep=" ") if text else np.zeros(0, kind)
        except (ValueError, DeprecationWarning):
            return np.zeros(0, kind)


def _records(materials: list[Material]) -> tuple[list[dict], list[Picture]]:
    """Return glTF's records of materials, and the images of their textures, each once."""
    places: dict[Path, int] = {}
    images: list[Picture] = []
    records = []
    for material in materials:
        surface: dict = {"metallicFactor": 0, "roughnessFactor": 1}
        if material.texture is None:
            surface["baseColorFactor"] = [*linear(np.array(material.colour)).tolist(), material.opacity]
        else:
            if material.texture not in places:
                places[material.texture] = len(images)
                images.append(stripped(material.texture.read_bytes())[0])
            surface["baseColorTexture"] = {"index": places[material.texture]}
        # a texture contains its own transparency
        blend = {"alphaMode": "BLEND"} if material.opacity < 1 and material.texture is None else {}
        records.append({"pbrMetallicRoughness": surface, "doubleSided": True, **blend})
    return records, images


def _libraries(data: bytes | memoryview, path: Path) -> tuple[list[Path], list[str]]:
    """Return the existing material files, and the names of those that are missing.

    Raises: ValueError for a file outside of the folder.
    """
    # the pattern below works on bytes of UTF-8
    if utf16(bytes(data[:512])) is not None:
        data = as_text(data).encode()
    names = dict.fromkeys(
        match.group(1).decode("utf-8", "replace").strip().strip('"') for match in _LIBRARY.finditer(data)
    )
    files = {name: _companion(path, name, MAX_MTL, optional=True) for name in names}
    return [file for file in files.values() if file is not None], [
        name for name, file in files.items() if file is None
    ]


def _materials(text: str, path: Path) -> dict[str, Material]:
    """Parse a material file. Raises: ValueError."""
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
            _check_name(path, value)
            if key == "map_kd":
                if value.startswith("-"):
                    raise ValueError(f"expected map_Kd in {path.name} without options, got {value[:40]!r}")
                current.texture = _companion(path, value, MAX_TEXTURE)
    return materials


def _check_name(path: Path, name: str) -> None:
    """Raise ValueError for the name of a file that is an address, an absolute path, or leads to a parent."""
    last = name.split()[-1]
    if _ADDRESS.match(last) or last.startswith(("/", "\\")) or ".." in Path(last.replace("\\", "/")).parts:
        raise ValueError(
            f"expected only files in the folder of {path.name} or below, got {name[:80]!r} in it"
        )


def _companion(path: Path, name: str, limit: int, optional: bool = False) -> Path | None:
    """Return the path of a file that `path` names; None if it is optional and missing.

    Raises: ValueError for a file outside of the folder, a missing one, or one larger than `limit` bytes.
    """
    _check_name(path, name)
    file = path.parent / name.replace("\\", "/").strip('"')
    folder = path.parent.resolve()
    # A symbolic link may lead out of the folder although its name does not.
    if not file.resolve().is_relative_to(folder):
        raise ValueError(
            f"expected only files in the folder of {path.name} or below, got {name[:80]!r} in it, a link to"
            " another place"
        )
    if not file.is_file():
        if optional:
            return None
        raise ValueError(f"expected {name[:80]!r}, which {path.name} names, got no such file")
    if file.stat().st_size > limit:
        raise ValueError(f"expected {name[:80]!r} of up to {limit >> 20} MB, got a larger one")
    return file.resolve()
