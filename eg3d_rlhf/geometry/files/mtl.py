"""Reader of the material files (MTL) of OBJ files.

No line of a material file is an error: what cannot be used is left out, and a note says what and why.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eg3d_rlhf.geometry.files.appearance import GREY
from eg3d_rlhf.geometry.files.companions import find_companion
from eg3d_rlhf.geometry.files.model import ImageFile, Note, read_texture, srgb_to_linear

MAX_MTL = 4 << 20  # largest size of an MTL file in bytes
MAX_TEXTURE = 128 << 20  # largest size of a texture file in bytes
MAX_MATERIALS = 1000  # largest number of materials in an MTL file
# Line that names MTL files.
_LIBRARY = re.compile(rb"^[ \t]*mtllib[ \t]+([^\r\n]+)", re.MULTILINE)
# Options of map_Kd that do not change what is shown here -> number of their arguments.
_OPTIONS = {
    "-blendu": 1,
    "-blendv": 1,
    "-cc": 1,
    "-texres": 1,
    "-bm": 1,
    "-boost": 1,
    "-imfchan": 1,
    "-type": 1,
}
# Options that move or scale the texture -> their argument that changes nothing. One to three numbers follow.
_TRANSFORMS = {"-s": 1.0, "-o": 0.0, "-t": 0.0}


@dataclass
class Material:
    """Supported properties of a material in an MTL file."""

    colour: tuple[float, ...] | None = None  # Kd, sRGB in 0..1; None: not stated
    opacity: float = 1.0  # d, or 1 - Tr, in 0..1
    texture: Path | None = None  # map_Kd, which is used instead of the colour
    notes: list[str] = field(default_factory=list)  # properties that cannot be used, with the reasons


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


def find_libraries(data: bytes | memoryview, path: Path, root: Path) -> tuple[list[Path], list[str]]:
    """Return the MTL files that an OBJ file names, and why the others cannot be used.

    A line `mtllib` may name several files, and a name may contain spaces; text after # is a comment.

    Args:
        data: content of the OBJ file.
        path: path of the OBJ file.
        root: folder that may be read, which contains the OBJ file.
    """
    # The pattern _LIBRARY searches bytes, so UTF-16 is converted to UTF-8 first.
    if utf16(bytes(data[:512])) is not None:
        data = decode_text(data).encode()
    library_paths: dict[Path, None] = {}  # a dictionary as an ordered set
    faults: list[str] = []
    for match in _LIBRARY.finditer(data):
        whole_name = match.group(1).decode("utf-8", "replace").strip()
        without_comment = re.split(r"(?:^|\s)#", whole_name)[0].strip()
        fault_of_line = None
        # The first reading of the line that finds a file is used. Otherwise the first fault is reported.
        for names in ([without_comment], [whole_name], without_comment.split()):
            line_paths = []
            line_faults = []
            for name in names:
                try:
                    line_paths.append(find_companion(path, name, root, MAX_MTL))
                except ValueError as error:
                    line_faults.append(str(error))
            if line_paths:
                library_paths |= dict.fromkeys(line_paths)
                faults += line_faults
                break
            fault_of_line = fault_of_line or next(iter(line_faults), None)
        else:
            faults.append(fault_of_line or f"{path.name} has a line mtllib without a name. Add the name.")
    return list(library_paths), list(dict.fromkeys(faults))


def read_materials(library_paths: Iterable[Path], root: Path) -> dict[str, Material]:
    """Read the materials of MTL files by name. If several define a material, the first file counts.

    Args:
        library_paths: paths of the files.
        root: folder that may be read.

    Raises: ValueError for too many materials.
    """
    materials: dict[str, Material] = {}
    for library_path in library_paths:
        for name, material in _parse(decode_text(library_path.read_bytes()), library_path, root).items():
            materials.setdefault(name, material)
    return materials


def _parse(mtl_text: str, path: Path, root: Path) -> dict[str, Material]:
    """Parse the content of an MTL file.

    Args:
        mtl_text: content of the file.
        path: path of the file.
        root: folder that may be read.

    Raises: ValueError for too many materials.
    """
    # by name, in the order of the file
    materials: dict[str, Material] = {}
    current_material = Material()
    has_dissolve = False  # True if the current material has a line d, which takes precedence over Tr
    for text_line in mtl_text.splitlines():
        words = text_line.split(maxsplit=1)
        # empty lines, lines without a value, and comments
        if len(words) < 2 or words[0].startswith("#"):
            continue
        keyword = words[0].lower()
        argument = words[1].strip()
        without_comment = re.split(r"(?:^|\s)#", argument)[0].strip()
        if keyword == "newmtl":
            # Later lines change this material, until the next newmtl.
            current_material = materials[" ".join(without_comment.split())] = Material()
            has_dissolve = False
            if len(materials) > MAX_MATERIALS:
                raise ValueError(f"{path.name} has more than {MAX_MATERIALS} materials. Reduce their number.")
        elif keyword in ("kd", "d", "tr"):
            numbers = _clipped_numbers(without_comment, 3 if keyword == "kd" else 1)
            if numbers is None:
                current_material.notes.append(
                    f"{words[0]} {argument[:40]!r} in {path.name} is left out. Write numbers in 0..1."
                )
            elif keyword == "kd":
                current_material.colour = numbers
            elif keyword == "d":
                current_material.opacity = numbers[0]
                has_dissolve = True
            # Tr is the transparency.
            elif not has_dissolve:
                current_material.opacity = 1 - numbers[0]
        # Other maps, such as bumps and reflections, are not shown, so their files are not looked for.
        elif keyword == "map_kd":
            try:
                current_material.texture = _texture(argument, without_comment, path, root)
            except ValueError as error:
                current_material.notes.append(str(error))
    return materials


def _clipped_numbers(text: str, count: int) -> tuple[float, ...] | None:
    """Return the first `count` numbers of a text, clipped to 0..1; None if there are fewer numbers."""
    try:
        numbers = tuple(min(max(float(word), 0.0), 1.0) for word in text.split()[:count])
    # a spectral colour, or a word that is no number
    except ValueError:
        return None
    return numbers if len(numbers) == count and not np.isnan(numbers).any() else None


def _texture(argument: str, without_comment: str, path: Path, root: Path) -> Path:
    """Return the path of the texture that a line map_Kd names.

    Args:
        argument: text after map_Kd.
        without_comment: the same text without a comment.
        path: path of the MTL file.
        root: folder that may be read.

    Raises: ValueError if there is no such file, or if an option changes where the texture lies.
    """
    try:
        # The name may contain spaces and the character #.
        return find_companion(path, argument, root, MAX_TEXTURE)
    except ValueError:
        words = without_comment.split()
        while words and words[0].startswith("-"):
            option = words.pop(0).lower()
            if option in _TRANSFORMS:
                argument_count = next(
                    (i for i, word in enumerate(words[:3]) if not _is_number(word)), len(words[:3])
                )
                changes = any(float(word) != _TRANSFORMS[option] for word in words[:argument_count])
            elif option == "-mm":
                argument_count = 2
                changes = words[:2] not in (["0", "1"], ["0.0", "1.0"])
            elif option == "-clamp":
                argument_count = 1
                changes = words[:1] != ["off"]
            else:
                argument_count = _OPTIONS.get(option, 0)
                changes = option not in _OPTIONS
            if changes:
                raise ValueError(
                    f"map_Kd in {path.name} has the option {option[:20]}, which is not supported:"
                    f" {argument[:40]!r}. Remove the option, or export the asset as GLB."
                ) from None
            words = words[argument_count:]
        return find_companion(path, " ".join(words), root, MAX_TEXTURE)


def _is_number(word: str) -> bool:
    """Return True if a word is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def material_records(
    materials: Iterable[tuple[str, Material, bool]],
) -> tuple[list[dict], list[ImageFile], list[Note]]:
    """Return the glTF records of materials, the images of their textures, each image once, and notes.

    Args:
        materials: for each material its name, the material, and whether its faces have texture coordinates.
    """
    # file of a texture -> index of its image, or the reason why it cannot be shown
    image_results: dict[Path, int | str] = {}
    images: list[ImageFile] = []
    records = []
    notes = []
    for name, material, has_uv in materials:
        reasons = list(material.notes)
        # MTL has no metallic materials; roughness 1 gives a matt surface.
        pbr_fields: dict = {"metallicFactor": 0, "roughnessFactor": 1}
        image_index = None
        if material.texture is not None and has_uv:
            if material.texture not in image_results:
                try:
                    images.append(read_texture(material.texture.read_bytes())[0])
                    image_results[material.texture] = len(images) - 1
                except ValueError as error:
                    image_results[material.texture] = f"{material.texture.name}: {error}"
            image_result = image_results[material.texture]
            if isinstance(image_result, str):
                reasons.append(image_result)
            else:
                image_index = image_result
        elif material.texture is not None:
            reasons.append(
                f"{material.texture.name}: faces have no texture coordinates (vt). Export the asset with"
                " them."
            )
        if image_index is None:
            colour = material.colour
            # Without a colour, a surface whose texture is missing is grey; otherwise white is the default.
            pbr_fields["baseColorFactor"] = (
                [*GREY[:3], material.opacity]
                if colour is None and reasons
                else [*srgb_to_linear(np.array(colour or (1.0, 1.0, 1.0))).tolist(), material.opacity]
            )
        else:
            pbr_fields["baseColorTexture"] = {"index": image_index}
        # A texture contains its transparency itself.
        blend_fields = {"alphaMode": "BLEND"} if material.opacity < 1 and image_index is None else {}
        # Faces of OBJ files are visible from both sides.
        records.append({"pbrMetallicRoughness": pbr_fields, "doubleSided": True, **blend_fields})
        notes += [Note("untextured", f"material {name[:40]!r}: {reason}") for reason in reasons]
    return records, images, notes
