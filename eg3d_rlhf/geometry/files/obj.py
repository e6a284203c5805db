"""Reader of OBJ files with their materials (MTL files) and textures.

Materials and textures must lie in the folder of the OBJ file or below it. Faces with any number of corners
are triangulated. Smoothing groups are ignored, since normals contain the same information. Textures are
embedded without metadata, but otherwise unchanged. If an MTL file is missing, the mesh is shown in grey.

Shapes: N lines of one kind, C corners of all faces.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eg3d_rlhf.geometry.files.model import (
    ImageFile,
    Model,
    model_from_primitives,
    srgb_to_linear,
    strip_image,
    triangle_primitive,
)
from eg3d_rlhf.geometry.files.polygons import triangulate_faces

MAX_MTL = 4 << 20  # largest size of an MTL file in bytes
MAX_TEXTURE = 128 << 20  # largest size of a texture file in bytes
MAX_MATERIALS = 1000  # largest number of materials in an MTL file
# Line that names an MTL file.
_LIBRARY = re.compile(rb"^[ \t]*mtllib[ \t]+([^\r\n]+)", re.MULTILINE)
GREY = [0.4, 0.4, 0.4, 1.0]  # linear RGB, and alpha
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)  # a URL, or a path with a drive letter


@dataclass
class Material:
    """Supported properties of a material in an MTL file."""

    colour: tuple[float, ...] = (1.0, 1.0, 1.0)  # Kd, sRGB in 0..1
    opacity: float = 1.0  # d, in 0..1
    texture: Path | None = None  # map_Kd, which is used instead of the colour


def companion_files(data: bytes | memoryview, path: Path) -> list[Path]:
    """Return the existing MTL and texture files that an OBJ file needs, each file once, in order.

    Args:
        data: content of the OBJ file.
        path: path of the OBJ file.

    Raises: ValueError for a file outside the folder, and for a missing texture.
    """
    companion_paths: dict[Path, None] = {}
    for library_path in _libraries(data, path)[0]:
        # a dictionary as an ordered set
        companion_paths[library_path] = None
        for material in _materials(decode_text(library_path.read_bytes()), library_path).values():
            if material.texture is not None:
                companion_paths[material.texture] = None
    return list(companion_paths)


def missing_libraries(data: bytes | memoryview, path: Path) -> list[str]:
    """Return the names of the MTL files that an OBJ file needs, but that do not exist.

    Args:
        data: content of the OBJ file.
        path: path of the OBJ file.
    """
    return _libraries(data, path)[1]


def decode_text(data: bytes | memoryview) -> str:
    """Decode text in UTF-8 or UTF-16, with or without a byte order mark. Invalid bytes become U+FFFD."""
    first_bytes = bytes(data[:512])
    encoding = utf16(first_bytes)
    # "utf-8-sig" also removes a byte order mark
    return bytes(data).decode(encoding or "utf-8-sig", "replace")


def utf16(first_bytes: bytes) -> str | None:
    """Return the name of the UTF-16 encoding of a text; None if the text is not in UTF-16.

    Without a byte order mark, UTF-16 is recognised by the zero bytes of Latin letters.

    Args:
        first_bytes: first bytes of the text.
    """
    if first_bytes[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    even_bytes = first_bytes[: len(first_bytes) // 2 * 2 : 2]
    odd_bytes = first_bytes[1::2]
    # Two zero bytes in a row do not occur in Latin text.
    if len(first_bytes) < 8 or b"\0\0" in first_bytes:
        return None
    return (
        "utf-16-le"
        if not any(odd_bytes) and b"\0" not in even_bytes
        else "utf-16-be"
        if not any(even_bytes) and b"\0" not in odd_bytes
        else None
    )


def read_obj(data: bytes | memoryview, path: Path, geometry_only: bool = False) -> Model:
    """Read the mesh of an OBJ file, with one primitive for each material.

    Args:
        data: content of the file.
        path: path of the file; materials and textures are searched relative to its folder.
        geometry_only: True to open neither materials nor textures. Vertices and faces are the same in both
            cases, and in the same order.

    Raises: ValueError for a damaged file, and for materials or textures that are missing or not allowed.
    """
    library_paths, missing_names = ([], []) if geometry_only else _libraries(data, path)
    if len(library_paths) > 1:
        raise ValueError(
            f"the OBJ file names {len(library_paths)} material files (mtllib). Join them into one file."
        )
    materials = (
        _materials(decode_text(library_paths[0].read_bytes()), library_paths[0]) if library_paths else {}
    )
    named_parts = _Lines(decode_text(data)).parts(geometry_only)
    # Materials that no face uses are dropped, with their textures.
    used_names = [
        material_name
        for material_name in materials
        if any(material_name == named_part[0] for named_part in named_parts)
    ]
    material_indices = {material_name: index for index, material_name in enumerate(used_names)}
    material_records, images = _records([materials[material_name] for material_name in used_names])
    # If the material file is missing, all parts get the same grey material.
    if missing_names:
        material_indices = dict.fromkeys([named_part[0] for named_part in named_parts], 0)
        material_records = [
            {
                "pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1, "baseColorFactor": GREY},
                "doubleSided": True,
            }
        ]
    return model_from_primitives(
        [
            triangle_primitive(**arrays, material=material_indices.get(material_name))
            for material_name, arrays in named_parts
        ],
        material_records,
        images,
    )


class _Lines:
    """Lines of an OBJ file by kind: v (points), vt (texture coordinates), vn (normals) and f (faces).

    Args:
        obj_text: content of the file.

    Raises: ValueError if there is no face.
    """

    def __init__(self, obj_text: str):
        # Words of all lines of a kind. A word of v, vt and vn is a number; a word of f is a corner, as 1/2/3.
        self.words: dict[str, list[str]] = {"v": [], "vt": [], "vn": [], "f": []}
        self.widths: dict[str, list[int]] = {
            line_kind: [] for line_kind in self.words
        }  # number of words of each line
        self.lines: list[int] = []  # line number of each face
        self.names: list[str] = []  # material of each face
        current_material = ""
        # A backslash at the end of a line continues the line. Line numbers count from 1.
        for line_number, text_line in enumerate(
            obj_text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines(), 1
        ):
            # text after # is a comment; an empty line has the kind ""
            line_kind, *words = (text_line.split("#", 1)[0] if "#" in text_line else text_line).split() or [
                ""
            ]
            if line_kind == "f":
                if len(words) < 3:
                    # Faces with fewer than three corners are dropped.
                    continue
                # A negative index counts back from the points above its line, so it is resolved here.
                if "-" in text_line:
                    words = [self._resolved(word, line_number) for word in words]
                self.lines.append(line_number)
                self.names.append(current_material)
            elif line_kind == "usemtl":
                current_material = " ".join(words)
            if line_kind in self.words:
                self.words[line_kind] += words
                self.widths[line_kind].append(len(words))
        if not self.lines:
            raise ValueError("the OBJ file has no triangles. Export a mesh that has faces.")

    def _resolved(self, word: str, line_number: int) -> str:
        """Replace the negative indices of a corner by positive indices, which count from 1.

        Args:
            word: corner, such as "-1/-1/-1"; -1 is the last point, texture coordinate or normal above the
                line of the face.
            line_number: number of the line, for the error message.

        Raises: ValueError if an index counts back beyond the first of them.
        """
        indices = word.split("/")
        # The keys of `widths`, v, vt and vn, are in the order of a corner's indices.
        for position, (index_text, line_kind) in enumerate(zip(indices, self.widths, strict=False)):
            if index_text.startswith("-") and index_text[1:].isdecimal():
                # -1 becomes the number of points so far, the last index that counts from 1.
                indices[position] = str(len(self.widths[line_kind]) + int(index_text) + 1)
                if int(indices[position]) < 1:
                    raise ValueError(
                        # shortened, because a word of an untrusted file may be very long
                        f"the index {word[:40]!r} in line {line_number} counts back beyond the first of the"
                        f" {len(self.widths[line_kind])} lines `{line_kind}` above it. Export the mesh again."
                    )
        return "/".join(indices)

    def corners(self) -> np.ndarray:
        """Return the corners of all faces as indices [C, 3] of points, texture coordinates and normals.

        Indices count from 0. A missing index is -1.

        Raises: ValueError for a word that is no corner.
        """
        corner_words = self.words["f"]
        slash_counts = {word.count("/") for word in corner_words}
        # Corners may have different forms: 1, 1/2, 1//3 or 1/2/3. They are padded with 0, which represents a
        # missing index, to the form 1/2/3.
        if (
            len(slash_counts) > 1
            or "//" in (corner_text := " ".join(corner_words))
            or "/ " in corner_text
            or corner_text.endswith("/")
        ):
            padded_words = [
                [*(index_text or "0" for index_text in word.split("/")), "0", "0"] for word in corner_words
            ]
            # Two zeros were added to every corner; they are removed again as far as three indices remain.
            corner_words = [
                "/".join(indices_as_text[: max(3, len(indices_as_text) - 2)])
                for indices_as_text in padded_words
            ]
            slash_counts = {word.count("/") for word in corner_words}
            corner_text = " ".join(corner_words)
        indices_per_corner = slash_counts.pop() + 1
        # All corners are parsed at once, because parsing them one by one is slow.
        parsed_indices = _numbers(corner_text.replace("/", " "), np.int64)
        if (
            slash_counts  # still several forms
            or indices_per_corner > 3
            or len(parsed_indices) != indices_per_corner * len(corner_words)
            or (parsed_indices < 0).any()
            # the first index of a corner must not be 0
            or not parsed_indices[::indices_per_corner].all()
        ):
            # The error names the first malformed corner and its line.
            corner_pattern = re.compile(r"0*[1-9]\d*(/\d*){0,2}")
            wrong_corner_index = next(
                (
                    corner_index
                    for corner_index, word in enumerate(self.words["f"])
                    if not corner_pattern.fullmatch(word)
                ),
                0,
            )
            line_number = self.lines[
                int(np.searchsorted(np.cumsum(self.widths["f"]), wrong_corner_index, side="right"))
            ]
            raise ValueError(
                f"{self.words['f'][wrong_corner_index][:40]!r} in line {line_number} is no corner of a face."
                " Write corners such as 1 or 1/1/1, which count from 1."
            )
        corner_indices = np.full((len(corner_words), 3), -1)
        corner_indices[:, :indices_per_corner] = parsed_indices.reshape(-1, indices_per_corner) - 1
        return corner_indices

    def _table(self, line_kind: str, min_count: int, max_columns: int) -> np.ndarray:
        """Return the numbers of all lines of one kind as a table [N, columns] float64.

        The table has as many columns as the shortest line has numbers, but at most `max_columns`.

        Args:
            line_kind: v, vt or vn.
            min_count: smallest allowed number of numbers in a line.
            max_columns: largest number of columns.

        Raises: ValueError for a line with fewer than `min_count` numbers, and for words that are no numbers.
        """
        line_widths = np.array(self.widths[line_kind], dtype=np.int64)
        numbers = _numbers(" ".join(self.words[line_kind]), np.float64)
        if len(line_widths) and (line_widths.min() < min_count or len(numbers) != line_widths.sum()):
            raise ValueError(
                f"a line that begins with {line_kind} has fewer than {min_count} numbers, or words that are"
                " no numbers. Export the mesh again."
            )
        # `initial` is the width of a table without lines
        column_count = min(int(line_widths.min(initial=max_columns)), max_columns)
        # [N, width]: position of each line's first number, plus the column
        return numbers[(np.cumsum(line_widths) - line_widths)[:, None] + np.arange(column_count)]

    def _appearance_table(self, line_kind: str, column_count: int) -> np.ndarray:
        """Return the numbers of all lines vt or vn as a table [N, columns] float64.

        The faces do not depend on these lines, so a number that is missing or cannot be read is NaN. Some
        exporters write "-nan(ind)".

        Args:
            line_kind: vt or vn.
            column_count: number of columns.
        """
        line_widths = np.array(self.widths[line_kind], dtype=np.int64)
        numbers = _numbers(" ".join(self.words[line_kind]), np.float64)
        if len(numbers) != line_widths.sum():
            numbers = np.array([_number_or_nan(word) for word in self.words[line_kind]])
        table = np.full((len(line_widths), column_count), np.nan)
        first_number = np.cumsum(line_widths) - line_widths
        for column in range(column_count):
            is_long_enough = line_widths > column
            table[is_long_enough, column] = numbers[first_number[is_long_enough] + column]
        return table

    def parts(self, geometry_only: bool = False) -> list[tuple[str, dict]]:
        """Divide the mesh into parts by material.

        A point with several texture coordinates or normals becomes several vertices.

        Args:
            geometry_only: True to return no texture coordinates, normals and colours.

        Returns: for each part, the name of the material, and the arguments of `triangle_primitive` by name.

        Raises: ValueError for indices beyond the number of points.
        """
        # x, y, z, and the colour r, g, b, a if all lines have it
        points = self._table("v", 3, 7)
        uv = np.zeros((0, 2)) if geometry_only else self._appearance_table("vt", 2)
        normals = np.zeros((0, 3)) if geometry_only else self._appearance_table("vn", 3)
        corners = self.corners()
        # An index must be below the number of lines of its kind.
        line_counts = np.array([len(self.widths[line_kind]) for line_kind in ("v", "vt", "vn")])
        is_beyond = corners >= line_counts
        if is_beyond[:, 0].any():
            raise ValueError(
                f"a face has the index {corners[:, 0].max() + 1}, but there are only {len(points)} vertices."
                " Export the mesh again."
            )
        # Columns of `corners` that are used: texture coordinates (1) and normals (2) only if every corner has
        # a valid index.
        usable_columns = [
            column
            for column in (1, 2)
            if line_counts[column] and not (is_beyond[:, column] | (corners[:, column] < 0)).any()
        ]
        triangle_corners, face_indices = triangulate_faces(
            points[:, :3], corners[:, 0], np.array(self.widths["f"])
        )
        material_indices = {
            material_name: material_index
            for material_index, material_name in enumerate(dict.fromkeys(self.names))
        }
        # [triangles] index of the material of each triangle
        triangle_material = np.array([material_indices[material_name] for material_name in self.names])[
            face_indices
        ]
        # One integer key for each combination of point, texture coordinates and normal.
        vertex_key = corners[:, 0]
        for column in usable_columns:
            vertex_key = vertex_key * line_counts[column] + corners[:, column]
        named_parts = []
        for material_name, material_index in material_indices.items():
            corner_indices = triangle_corners[triangle_material == material_index]
            # a material whose faces have too few corners to form triangles
            if not len(corner_indices):
                continue
            # A distinct key is one vertex. `first_uses` is a corner of each vertex, `faces` the vertex of
            # each corner.
            _, first_uses, faces = np.unique(
                vertex_key[corner_indices.reshape(-1)], return_index=True, return_inverse=True
            )
            vertex_corners = corners[corner_indices.reshape(-1)[first_uses]]
            primitive_arrays: dict = {
                "positions": points[vertex_corners[:, 0], :3],
                "faces": faces.reshape(-1, 3),
            }
            named_parts.append((material_name, primitive_arrays))
            if geometry_only:
                continue
            # x, y, z, r, g, b
            if points.shape[1] >= 6:
                # Colours of vertices are a common extension of the format.
                primitive_arrays["colours"] = np.rint(points[vertex_corners[:, 0], 3:].clip(0, 1) * 255)
            # The texture coordinate v increases upwards in OBJ, and downwards in glTF.
            if 1 in usable_columns:
                vertex_uv = uv[vertex_corners[:, 1]]
                # Without finite coordinates, it is not known where the texture lies.
                if np.isfinite(vertex_uv).all():
                    primitive_arrays["uv"] = np.stack([vertex_uv[:, 0], 1 - vertex_uv[:, 1]], axis=1)
            if 2 in usable_columns:
                primitive_arrays["normals"] = normals[vertex_corners[:, 2]]
        return named_parts


def _number_or_nan(word: str) -> float:
    """Return the number that a word states, or NaN if it states none."""
    try:
        return float(word)
    except ValueError:
        return np.nan


def _numbers(number_text: str, dtype: type) -> np.ndarray:
    """Parse numbers that are separated by spaces.

    Args:
        number_text: numbers.
        dtype: numpy type of the numbers.

    Returns: array of the numbers. It is shorter than the number of words, or empty, if a word is no number.
    """
    with warnings.catch_warnings():
        # np.fromstring stops at a word that is no number: older versions of numpy warn, newer versions raise
        # an error. The warning is turned into an error.
        warnings.simplefilter("error", DeprecationWarning)
        try:
            return np.fromstring(number_text, dtype=dtype, sep=" ") if number_text else np.zeros(0, dtype)
        except (ValueError, DeprecationWarning):
            return np.zeros(0, dtype)


def _records(materials: list[Material]) -> tuple[list[dict], list[ImageFile]]:
    """Return the glTF records of materials, and the images of their textures, each image once."""
    # file of a texture -> index of its image
    image_indices: dict[Path, int] = {}
    images: list[ImageFile] = []
    material_records = []
    for material in materials:
        # MTL has no metallic materials; roughness 1 gives a matt surface.
        pbr_fields: dict = {"metallicFactor": 0, "roughnessFactor": 1}
        if material.texture is None:
            pbr_fields["baseColorFactor"] = [
                *srgb_to_linear(np.array(material.colour)).tolist(),
                material.opacity,
            ]
        else:
            if material.texture not in image_indices:
                image_indices[material.texture] = len(images)
                images.append(strip_image(material.texture.read_bytes())[0])
            pbr_fields["baseColorTexture"] = {"index": image_indices[material.texture]}
        # A texture contains its transparency itself.
        blend_fields = {"alphaMode": "BLEND"} if material.opacity < 1 and material.texture is None else {}
        # Faces of OBJ files are visible from both sides.
        material_records.append({"pbrMetallicRoughness": pbr_fields, "doubleSided": True, **blend_fields})
    return material_records, images


def _libraries(data: bytes | memoryview, path: Path) -> tuple[list[Path], list[str]]:
    """Return the existing MTL files that an OBJ file names, and the names of the missing files.

    Args:
        data: content of the OBJ file.
        path: path of the OBJ file.

    Raises: ValueError for a file outside the folder.
    """
    # The pattern _LIBRARY searches bytes, so UTF-16 is converted to UTF-8 first.
    if utf16(bytes(data[:512])) is not None:
        data = decode_text(data).encode()
    library_names = dict.fromkeys(
        match.group(1).decode("utf-8", "replace").strip().strip('"') for match in _LIBRARY.finditer(data)
    )
    path_by_name = {
        library_name: _companion(path, library_name, MAX_MTL, may_be_missing=True)
        for library_name in library_names
    }
    return [library_path for library_path in path_by_name.values() if library_path is not None], [
        library_name for library_name, library_path in path_by_name.items() if library_path is None
    ]


def _materials(mtl_text: str, path: Path) -> dict[str, Material]:
    """Parse the content of an MTL file.

    Args:
        mtl_text: content of the file.
        path: path of the file.

    Returns: materials by name.

    Raises: ValueError for a malformed line, for too many materials, and for textures that are not allowed.
    """
    # by name, in the order of the file
    materials: dict[str, Material] = {}
    current_material = Material()
    for text_line in mtl_text.splitlines():
        words = text_line.split(maxsplit=1)
        # empty lines, lines without a value, and comments
        if len(words) < 2 or words[0].startswith("#"):
            continue
        keyword = words[0].lower()
        argument = words[1].strip()
        if keyword == "newmtl":
            # Later lines change this material, until the next newmtl.
            current_material = materials[" ".join(argument.split())] = Material()
            if len(materials) > MAX_MATERIALS:
                raise ValueError(f"{path.name} has more than {MAX_MATERIALS} materials. Reduce their number.")
        elif keyword in ("kd", "d"):
            try:
                numbers = tuple(
                    min(max(float(word), 0.0), 1.0)
                    for word in argument.split()[: 3 if keyword == "kd" else 1]
                )
            except ValueError:
                raise ValueError(
                    f"{argument[:40]!r} after {words[0]} in {path.name} is not a number. Write numbers in"
                    " 0..1."
                ) from None
            if keyword == "d":
                current_material.opacity = numbers[0]
            # Kd with fewer numbers, a spectral or incomplete colour, is ignored
            elif len(numbers) == 3:
                current_material.colour = numbers
        elif keyword.startswith(("map_", "bump", "disp", "decal", "norm", "refl")):
            # all texture files are checked, though only map_Kd is opened
            _check_name(path, argument)
            if keyword == "map_kd":
                if argument.startswith("-"):
                    raise ValueError(
                        f"map_Kd in {path.name} has options, which are not supported: {argument[:40]!r}."
                        " Remove the options."
                    )
                current_material.texture = _companion(path, argument, MAX_TEXTURE)
    return materials


def _check_name(path: Path, file_reference: str) -> None:
    """Raise ValueError if the name of a file is a URL or an absolute path, or leads to a parent folder.

    Args:
        path: OBJ or MTL file that contains the name.
        file_reference: name of the file; options may precede it.
    """
    # Options such as "-s 2 2 2" may precede the name.
    file_name = file_reference.split()[-1]
    # Paths with backslashes come from Windows.
    if (
        _ADDRESS.match(file_name)
        or file_name.startswith(("/", "\\"))
        or ".." in Path(file_name.replace("\\", "/")).parts
    ):
        raise ValueError(
            # shortened, because a name in an untrusted file may be very long
            f"{path.name} refers to the file {file_reference[:80]!r}, which is not in or below the folder of"
            f" {path.name}. Move that file there, and write its relative path in {path.name}."
        )


def _companion(path: Path, file_name: str, max_bytes: int, may_be_missing: bool = False) -> Path | None:
    """Return the path of a file that an OBJ or MTL file names.

    Args:
        path: OBJ or MTL file that contains the name.
        file_name: name of the file.
        max_bytes: largest allowed size in bytes.
        may_be_missing: True if the file may be missing; then the result is None.

    Raises: ValueError for a file outside the folder, for a missing file, and for a file that is too large.
    """
    _check_name(path, file_name)
    companion_path = path.parent / file_name.replace("\\", "/").strip('"')
    folder = path.parent.resolve()
    # A symbolic link may lead out of the folder although its name does not.
    if not companion_path.resolve().is_relative_to(folder):
        raise ValueError(
            f"{path.name} names the file {file_name[:80]!r}, which is a link to a file outside its folder."
            " Replace the link by the file."
        )
    if not companion_path.is_file():
        if may_be_missing:
            return None
        raise ValueError(
            f"{path.name} names the file {file_name[:80]!r}, which does not exist. Put it into the folder of"
            f" {path.name}."
        )
    if companion_path.stat().st_size > max_bytes:
        raise ValueError(
            f"the file {file_name[:80]!r} has more than {max_bytes >> 20} MB, which is the limit. Reduce its"
            " size."
        )
    return companion_path.resolve()
