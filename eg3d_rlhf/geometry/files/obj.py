"""Reader of OBJ files with their materials (MTL files) and textures.

Materials and textures must lie in the folder that the user passed; see `companions`. Faces with any number of
corners are triangulated. Smoothing groups are ignored, since normals contain the same information. Textures
are embedded without metadata, but otherwise unchanged. What cannot be used, such as a missing texture, is
left out, and a note of the model names it.

Shapes: N lines of one kind, C corners of all faces.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from eg3d_rlhf.geometry.files.appearance import GREY_MATERIAL, UNKNOWN_WITH_COLOURS, colours_255
from eg3d_rlhf.geometry.files.model import Model, Note, model_from_primitives, triangle_primitive
from eg3d_rlhf.geometry.files.mtl import (
    Material,
    decode_text,
    find_libraries,
    material_records,
    read_materials,
)
from eg3d_rlhf.geometry.files.polygons import triangulate_faces


def companion_files(data: bytes | memoryview, path: Path, root: Path | None = None) -> list[Path]:
    """Return the existing MTL and texture files that an OBJ file needs, each file once, in order.

    Args:
        data: content of the OBJ file.
        path: path of the OBJ file.
        root: folder that may be read, which contains the OBJ file; None: the folder of the OBJ file.

    Raises: ValueError for too many materials.
    """
    root = root or path.parent
    companion_paths: dict[Path, None] = {}
    for library_path in find_libraries(data, path, root)[0]:
        # a dictionary as an ordered set
        companion_paths[library_path] = None
        for material in read_materials([library_path], root).values():
            if material.texture is not None:
                companion_paths[material.texture] = None
    return list(companion_paths)


def read_obj(
    data: bytes | memoryview, path: Path, geometry_only: bool = False, root: Path | None = None
) -> Model:
    """Read the mesh of an OBJ file, with one primitive for each material.

    A material whose faces partly lack texture coordinates gives two primitives, of which one is shown without
    the texture.

    Args:
        data: content of the file.
        path: path of the file; materials and textures are searched relative to its folder.
        geometry_only: True to open neither materials nor textures, and to read no normals, texture
            coordinates and colours. The triangles are the same in both cases.
        root: folder that may be read, which contains the file; None: the folder of the file.

    Raises: ValueError for a damaged file.
    """
    if geometry_only:
        return model_from_primitives(
            [triangle_primitive(**part.arrays) for part in _Lines(decode_text(data)).parts(geometry_only)]
        )
    root = root or path.parent
    library_paths, faults = find_libraries(data, path, root)
    materials = read_materials(library_paths, root)
    lines = _Lines(decode_text(data))
    notes = [Note("untextured", fault) for fault in faults]
    material_by_name = {name: _find_material(name, materials) for name in dict.fromkeys(lines.names)}
    unknown_names = [name for name, material in material_by_name.items() if material is None]
    # A file without any material is shown with the default of glTF.
    has_materials = bool(library_paths or faults or any(lines.names))
    if unknown_names and not faults and has_materials:
        notes.append(Note("untextured", _unknown_text(unknown_names, materials, bool(library_paths))))
    parts = lines.parts()
    # (name in the file, True if its faces have texture coordinates), materials that no face uses are dropped
    used_materials = {
        (name, part.has_uv): None for part in parts if (name := material_by_name[part.name]) is not None
    }
    # A material without a texture is the same with and without texture coordinates.
    used_keys = list(
        dict.fromkeys((name, has_uv or materials[name].texture is None) for name, has_uv in used_materials)
    )
    records, images, material_notes = material_records(
        [(name, materials[name], has_uv) for name, has_uv in used_keys]
    )
    index_by_key = {key: index for index, key in enumerate(used_keys)}
    primitives = []
    for part in parts:
        name = material_by_name[part.name]
        material_index = None
        if name is not None:
            material_index = index_by_key[name, part.has_uv or materials[name].texture is None]
        elif has_materials:
            # Colours of vertices are multiplied by the colour of the material.
            record = UNKNOWN_WITH_COLOURS if "colours" in part.arrays else GREY_MATERIAL
            if record not in records:
                records.append(record)
            material_index = records.index(record)
        primitives.append(triangle_primitive(**part.arrays, material=material_index))
    notes += [*material_notes, *(Note("untextured", text) for text in lines.notes)]
    return model_from_primitives(primitives, records, images, notes)


def _find_material(name: str, materials: Mapping[str, Material]) -> str | None:
    """Return the name of the material that a line usemtl means; None if it is not known.

    Upper and lower case count only if there are several such materials. Faces without a line usemtl get the
    material of a file that contains only one.

    Args:
        name: name after usemtl; '' without such a line.
        materials: materials by name.
    """
    if name in materials:
        return name
    similar_names = [other_name for other_name in materials if other_name.casefold() == name.casefold()]
    if not name:
        similar_names = list(materials)
    return similar_names[0] if len(similar_names) == 1 else None


def _unknown_text(unknown_names: list[str], materials: Mapping[str, Material], has_library: bool) -> str:
    """Return the text of a note about faces whose material is not known.

    Args:
        unknown_names: names after usemtl; '' for faces without such a line.
        materials: materials by name.
        has_library: True if a material file was found.
    """
    if not has_library:
        return "the file names materials (usemtl), but no material file. Add a line mtllib with its name."
    known_text = ", ".join(materials)[:80] or "no material"
    if unknown_names == [""]:
        return (
            f"faces have no material (usemtl), but the material file has several: {known_text}. Add lines"
            " usemtl."
        )
    unknown_text = ", ".join(repr(name[:40]) for name in unknown_names[:3] if name)
    return (
        f"the material {unknown_text} (usemtl) is not in the material file, which has {known_text}. Correct"
        " the name."
    )


class _Part:
    """Triangles of an OBJ file with one material.

    Args:
        name: name of the material.
        has_uv: True if all corners have texture coordinates.
        arrays: arguments of `triangle_primitive` by name.
    """

    def __init__(self, name: str, has_uv: bool, arrays: dict):
        self.name = name
        self.has_uv = has_uv
        self.arrays = arrays


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
        self.notes: list[str] = []  # what is not shown, with the reason
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

    def parts(self, geometry_only: bool = False) -> list[_Part]:
        """Divide the mesh into parts by material.

        A point with several texture coordinates or normals becomes several vertices. If only some faces of a
        material have texture coordinates, they are a part of their own.

        Args:
            geometry_only: True to return no texture coordinates, normals and colours. The material is then
                not divided.

        Raises: ValueError for indices beyond the number of points.
        """
        points = self._points()
        uv = np.zeros((0, 2)) if geometry_only else self._appearance_table("vt", 2)
        normals = np.zeros((0, 3)) if geometry_only else self._appearance_table("vn", 3)
        colours = None if geometry_only else self._colours()
        corners = self.corners()
        # An index must be below the number of lines of its kind.
        line_counts = np.array([len(self.widths[line_kind]) for line_kind in ("v", "vt", "vn")])
        is_beyond = corners >= line_counts
        if is_beyond[:, 0].any():
            raise ValueError(
                f"a face has the index {corners[:, 0].max() + 1}, but there are only {len(points)} vertices."
                " Export the mesh again."
            )
        has_index = ~(is_beyond | (corners < 0))  # [C, 3]
        if not geometry_only:
            # Without finite coordinates, it is not known where the texture lies.
            has_index[has_index[:, 1], 1] = np.isfinite(uv[corners[has_index[:, 1], 1]]).all(axis=1)
        triangle_corners, face_indices = triangulate_faces(points, corners[:, 0], np.array(self.widths["f"]))
        material_indices = {
            material_name: material_index
            for material_index, material_name in enumerate(dict.fromkeys(self.names))
        }
        # [triangles] index of the material of each triangle
        triangle_material = np.array([material_indices[material_name] for material_name in self.names])[
            face_indices
        ]
        triangle_has_uv = has_index[triangle_corners, 1].all(axis=1)
        parts = []
        for material_name, material_index in material_indices.items():
            is_of_material = triangle_material == material_index
            # True first: the faces with texture coordinates precede the others.
            selections = [
                (True, is_of_material & triangle_has_uv),
                (False, is_of_material & ~triangle_has_uv),
            ]
            if geometry_only:
                selections = [(False, is_of_material)]
            for has_uv, is_selected in selections:
                corner_indices = triangle_corners[is_selected].reshape(-1)
                # none, or a material whose faces have too few corners to form triangles
                if not len(corner_indices):
                    continue
                # Columns of `corners` that are used: texture coordinates (1) and normals (2) only if every
                # corner has a valid index. In a mesh that is measured, all corners of the file decide, so
                # that its materials have no influence.
                decisive_rows = slice(None) if geometry_only else corner_indices
                usable_columns = [
                    column
                    for column in (1, 2)
                    if line_counts[column] and has_index[decisive_rows, column].all()
                ]
                # One integer key for each combination of point, texture coordinates and normal.
                vertex_key = corners[corner_indices, 0]
                for column in usable_columns:
                    vertex_key = vertex_key * line_counts[column] + corners[corner_indices, column]
                # A distinct key is one vertex. `first_uses` is a corner of each vertex, `faces` the vertex of
                # each corner.
                _, first_uses, faces = np.unique(vertex_key, return_index=True, return_inverse=True)
                vertex_corners = corners[corner_indices[first_uses]]
                arrays: dict = {
                    "positions": points[vertex_corners[:, 0]],
                    "faces": faces.reshape(-1, 3),
                }
                if colours is not None:
                    arrays["colours"] = colours[vertex_corners[:, 0]]
                # The texture coordinate v increases upwards in OBJ, and downwards in glTF.
                if 1 in usable_columns and not geometry_only:
                    vertex_uv = uv[vertex_corners[:, 1]]
                    arrays["uv"] = np.stack([vertex_uv[:, 0], 1 - vertex_uv[:, 1]], axis=1)
                if 2 in usable_columns and not geometry_only:
                    arrays["normals"] = normals[vertex_corners[:, 2]]
                parts.append(_Part(material_name, has_uv, arrays))
        return parts

    def _points(self) -> np.ndarray:
        """Return the positions of all points [N, 3] float64.

        A line v with four numbers, x y z w, is a rational point: its position is (x, y, z) / w. A line with
        six numbers or more is x y z with a colour.

        Raises: ValueError for lines with fewer than three numbers, for words that are no numbers, and for
            w = 0.
        """
        points = self._table("v", 3, 3)
        line_widths = np.array(self.widths["v"], dtype=np.int64)
        is_rational = line_widths == 4
        if not is_rational.any():
            return points
        numbers = _numbers(" ".join(self.words["v"]), np.float64)
        w = numbers[(np.cumsum(line_widths) - 1)[is_rational]]
        if not w.all():
            raise ValueError(
                "a line `v x y z w` has w = 0, a point at infinity. Write w = 1, or leave w out."
            )
        points[is_rational] /= w[:, None]
        return points

    def _colours(self) -> np.ndarray | None:
        """Return the colours of all points [N, 3 or 4] in 0..255, a common extension of the format.

        Returns: None unless all lines v have a colour. If only some have one, a note is added.
        """
        line_widths = np.array(self.widths["v"], dtype=np.int64)
        has_colour = line_widths >= 6
        if not has_colour.all():
            if has_colour.any():
                self.notes.append(
                    f"only {has_colour.sum()} of {len(has_colour)} vertices have a colour, so none is shown."
                    " Export the asset with a colour for each vertex, or with none."
                )
            return None
        colours = self._table("v", 6, 7)[:, 3:]
        return np.concatenate([colours_255(colours[:, :3]), colours_255(colours[:, 3:])], axis=1)


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
