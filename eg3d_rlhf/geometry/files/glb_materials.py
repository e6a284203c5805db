"""Materials and textures of a GLB file, reduced to allowed fields with allowed values.

A texture that cannot be shown, such as one of a compressed format, is left out, and a note of the model names
it. The surface then has its plain colour, or is grey if the texture was the only colour.
"""

import base64
import binascii
from collections.abc import Iterable

from eg3d_rlhf.geometry.files.appearance import GREY
from eg3d_rlhf.geometry.files.gltf_arrays import (
    GltfArrays,
    read_number,
    read_numbers,
    read_set,
    read_share,
)
from eg3d_rlhf.geometry.files.model import ImageFile, Note, image_format, read_texture

MAX_PIXELS = 3 * 8192 * 8192  # largest number of pixels of all textures together
# Exceptions of records with fields of wrong types; the types are not checked one by one.
MALFORMED = (TypeError, KeyError, OverflowError, AttributeError)
# Fields of a material that contain a texture: record -> names for people by field.
_TEXTURES = {
    "baseColorTexture": "base colour texture",
    "metallicRoughnessTexture": "metallic-roughness texture",
    "normalTexture": "normal texture",
    "occlusionTexture": "occlusion texture",
    "emissiveTexture": "emissive texture",
}
# Allowed values of the fields of a sampler: the numbers of filters and wrapping modes in glTF.
_SAMPLERS = {
    "magFilter": (9728, 9729),
    "minFilter": (9728, 9729, 9984, 9985, 9986, 9987),
    "wrapS": (33071, 33648, 10497),
    "wrapT": (33071, 33648, 10497),
}


class MaterialReader(GltfArrays):
    """Conversion of the materials of one GLB file into records of a model."""

    def __init__(self, document: dict, binary: memoryview, budget: int):
        super().__init__(document, binary, budget)
        # number of pixels that further textures may have
        self.pixels = MAX_PIXELS
        self._image_faults: dict[int, str] = {}  # id of an image's record -> why it cannot be shown

    def _material(self, material_record: dict) -> dict:
        """Return a copy of a material's record that contains only allowed fields with allowed values."""
        pbr_record = material_record.get("pbrMetallicRoughness", {})
        material: dict = {}
        pbr_fields: dict = {}
        for field_name, length in (("baseColorFactor", 4), ("metallicFactor", 0), ("roughnessFactor", 0)):
            if field_name in pbr_record:
                pbr_fields[field_name] = read_share(pbr_record[field_name], length)
        lost_fields: dict[str, str] = {}  # field of a texture that cannot be shown -> reason
        for field_name in ("baseColorTexture", "metallicRoughnessTexture"):
            if field_name in pbr_record:
                self._add_texture(pbr_fields, field_name, pbr_record[field_name], lost_fields)
        extensions = material_record.get("extensions", {})
        glossy_record = extensions.get("KHR_materials_pbrSpecularGlossiness")
        # Materials that have colours of both kinds have them for viewers that read only one kind.
        if glossy_record is not None and not pbr_record.keys() & {"baseColorFactor", "baseColorTexture"}:
            self._convert_glossy(glossy_record, pbr_fields, lost_fields)
        material["pbrMetallicRoughness"] = pbr_fields
        for field_name, factor_name in (
            ("normalTexture", "scale"),
            ("occlusionTexture", "strength"),
            ("emissiveTexture", ""),
        ):
            if field_name in material_record:
                self._add_texture(material, field_name, material_record[field_name], lost_fields)
                if factor_name in material_record[field_name] and field_name in material:
                    material[field_name][factor_name] = read_number(material_record[field_name][factor_name])
        if "emissiveFactor" in material_record:
            material["emissiveFactor"] = read_share(material_record["emissiveFactor"], 3)
        # "OPAQUE" is the default of glTF, so it need not be written.
        if material_record.get("alphaMode") in ("MASK", "BLEND"):
            material["alphaMode"] = material_record["alphaMode"]
        if "alphaCutoff" in material_record and material.get("alphaMode") == "MASK":
            material["alphaCutoff"] = read_number(material_record["alphaCutoff"])
        if material_record.get("doubleSided") is True:
            material["doubleSided"] = True
        if "KHR_materials_unlit" in extensions:
            material["extensions"] = {"KHR_materials_unlit": {}}
            self.out.extensions.add("KHR_materials_unlit")
        _set_plain_values(material, lost_fields)
        self._note_lost(lost_fields)
        return material

    def _convert_glossy(self, glossy_record: dict, pbr_fields: dict, lost_fields: dict[str, str]) -> None:
        """Convert a material of the withdrawn KHR_materials_pbrSpecularGlossiness, and add a note.

        The diffuse colour becomes the base colour, and the roughness is 1 - glossiness. The specular colour
        has no counterpart.

        Args:
            glossy_record: record of the extension.
            pbr_fields: fields of pbrMetallicRoughness, which are extended.
            lost_fields: reason by name of the field, for textures that cannot be shown.
        """
        if "diffuseFactor" in glossy_record:
            pbr_fields["baseColorFactor"] = read_share(glossy_record["diffuseFactor"], 4)
        if "diffuseTexture" in glossy_record:
            self._add_texture(pbr_fields, "baseColorTexture", glossy_record["diffuseTexture"], lost_fields)
        pbr_fields["metallicFactor"] = 0
        pbr_fields["roughnessFactor"] = 1
        # The glossiness is multiplied by that of the texture, which is not read.
        if "specularGlossinessTexture" not in glossy_record:
            pbr_fields["roughnessFactor"] = 1 - read_share(glossy_record.get("glossinessFactor", 1), 0)
        note = Note(
            "approximated",
            "a material of KHR_materials_pbrSpecularGlossiness is shown with its diffuse colour, without its"
            " specular colour. Export it with metallic-roughness materials to show both.",
        )
        if note not in self.out.notes:
            self.out.notes.append(note)

    def _add_texture(
        self, record: dict, field_name: str, reference: dict, lost_fields: dict[str, str]
    ) -> None:
        """Add a reference to a texture to a record, or, if it cannot be shown, the reason to `lost_fields`.

        Args:
            record: record of the material or of its field pbrMetallicRoughness.
            field_name: name of the field, such as "baseColorTexture".
            reference: reference in the file.
            lost_fields: reason by name of the field.
        """
        try:
            record[field_name] = self._texture(reference)
        except ValueError as error:
            lost_fields[field_name] = str(error)
        except MALFORMED as error:
            lost_fields[field_name] = (
                f"its record is not allowed by glTF 2.0 ({type(error).__name__}). Export the file again."
            )

    def _note_lost(self, lost_fields: dict[str, str]) -> None:
        """Add a note for each texture that is left out. Args: lost_fields: reason by name of the field."""
        for field_name, reason in lost_fields.items():
            note = Note("untextured", f"the {_TEXTURES[field_name]} is left out: {reason}")
            # Many materials may use one texture.
            if note not in self.out.notes:
                self.out.notes.append(note)

    def _without_textures(self, material_index: int, attribute_names: Iterable[str]) -> int:
        """Return the index of a material without the textures whose coordinates a primitive lacks.

        Args:
            material_index: index of the material in the model.
            attribute_names: names of the attributes of the primitive.
        """
        material = self.out.materials[material_index]
        pbr_fields = material["pbrMetallicRoughness"]
        lost_fields = {}
        for field_name in _TEXTURES:
            reference = pbr_fields.get(field_name) or material.get(field_name)
            if reference is None:
                continue
            transform_fields = reference.get("extensions", {}).get("KHR_texture_transform", {})
            coordinate_set = transform_fields.get("texCoord", reference.get("texCoord", 0))
            if f"TEXCOORD_{coordinate_set}" not in attribute_names:
                lost_fields[field_name] = (
                    f"a primitive has no texture coordinates TEXCOORD_{coordinate_set} that are numbers."
                    " Export the file with them."
                )
        if not lost_fields:
            return material_index
        plain_key = ("plain materials", (material_index, *lost_fields))
        if plain_key not in self._indices:
            plain_material = {name: value for name, value in material.items() if name not in lost_fields}
            plain_material["pbrMetallicRoughness"] = {
                name: value for name, value in pbr_fields.items() if name not in lost_fields
            }
            _set_plain_values(plain_material, lost_fields)
            self.out.materials.append(plain_material)
            self._indices[plain_key] = len(self.out.materials) - 1
        self._note_lost(lost_fields)
        return self._indices[plain_key]

    def _texture(self, texture_reference: dict) -> dict:
        """Return a copy of a material's reference to a texture that contains only allowed fields."""
        kept_reference: dict = {
            "index": self._once("textures", texture_reference["index"], self.out.textures, self._source)
        }
        if "texCoord" in texture_reference:
            kept_reference["texCoord"] = read_set(texture_reference["texCoord"])
        transform_record = texture_reference.get("extensions", {}).get("KHR_texture_transform")
        # Offset, scale and rotation of the texture coordinates.
        if transform_record is not None:
            transform_fields: dict = {
                field_name: read_numbers(transform_record[field_name], 2)
                for field_name in ("offset", "scale")
                if field_name in transform_record
            }
            transform_fields |= (
                {"rotation": read_number(transform_record["rotation"])}
                if "rotation" in transform_record
                else {}
            )
            transform_fields |= (
                {"texCoord": read_set(transform_record["texCoord"])} if "texCoord" in transform_record else {}
            )
            kept_reference["extensions"] = {"KHR_texture_transform": transform_fields}
            self.out.extensions.add("KHR_texture_transform")
        return kept_reference

    def _source(self, texture_record: dict) -> dict:
        """Return the record of a texture with new indices of its image and of its sampler, if it has one."""
        extensions = texture_record.get("extensions", {})
        # A WebP image takes precedence over its fallback, as in viewers that support the extension.
        image_index = extensions.get("EXT_texture_webp", {}).get("source", texture_record.get("source"))
        if image_index is None:
            raise ValueError(
                "it has no PNG, JPEG or WebP image, only"
                f" {', '.join(map(str, extensions))[:80] or 'an empty record'}. Convert it to one of these"
                " formats."
            )
        texture = {"source": self._once("images", image_index, self.out.images, self._image)}
        if "sampler" in texture_record:
            texture["sampler"] = self._once(
                "samplers", texture_record["sampler"], self.out.samplers, _sampler
            )
        return texture

    def _image(self, image_record: dict) -> ImageFile:
        """Convert the record of an image. Its data lies in the binary chunk, or in a data URI.

        Raises: ValueError for external files, other formats, damaged images, and too many pixels.
        """
        # A damaged image may be large, and many textures may use it, so it is read once.
        if id(image_record) in self._image_faults:
            raise ValueError(self._image_faults[id(image_record)])
        try:
            return self._readable_image(image_record)
        except ValueError as error:
            self._image_faults[id(image_record)] = str(error)
            raise

    def _readable_image(self, image_record: dict) -> ImageFile:
        """Convert the record of an image, see `_image`."""
        if "bufferView" in image_record:
            image_bytes, _ = self._bytes(image_record["bufferView"])
        else:
            uri = image_record.get("uri", "")
            if not isinstance(uri, str) or not uri.startswith("data:image/") or ";base64," not in uri[:64]:
                raise ValueError(
                    "it is neither in the binary chunk nor in a base64 data URI of an image. Export the file"
                    " with all textures inside."
                )
            try:
                image_bytes = memoryview(base64.b64decode(uri[uri.index(",") + 1 :], validate=True))
            except binascii.Error:
                raise ValueError("it is no valid base64 text. Export the file again.") from None
        if image_format(image_bytes) is None:
            raise ValueError("it is not PNG, JPEG or WebP. Convert it to one of these formats.")
        image, pixel_count = read_texture(image_bytes)
        # The image is copied, so its size is subtracted from the budget.
        if self.pixels < pixel_count or self.budget < len(image_bytes):
            raise ValueError(
                "the textures of the GLB file are too large: together, they have more than"
                f" {MAX_PIXELS >> 20} megapixels, or their data exceeds the limit for a file of this size."
                " Reduce the resolution of the textures, and store each texture once."
            )
        self.budget -= len(image_bytes)
        self.pixels -= pixel_count
        return image


def _set_plain_values(material: dict, lost_fields: Iterable[str]) -> None:
    """Replace the default values of a material that mean "as in the texture", where the texture is left out.

    Args:
        material: record of the material, which is changed.
        lost_fields: fields of textures that are left out.
    """
    pbr_fields = material["pbrMetallicRoughness"]
    if "baseColorTexture" in lost_fields:
        pbr_fields.setdefault("baseColorFactor", GREY)
    if "metallicRoughnessTexture" in lost_fields:
        # The factors are multiplied by the texture, so alone they would give a mirror.
        pbr_fields["metallicFactor"] = 0
        pbr_fields["roughnessFactor"] = 1
    elif "baseColorTexture" in lost_fields and "metallicRoughnessTexture" not in pbr_fields:
        pbr_fields.setdefault("metallicFactor", 0)
    # Without the texture, the factor would light the entire surface.
    if "emissiveTexture" in lost_fields:
        material.pop("emissiveFactor", None)


def _sampler(sampler_record: dict) -> dict:
    """Return a copy of a sampler's record that contains only allowed fields with allowed values."""
    return {
        field_name: sampler_record[field_name]
        for field_name, allowed_values in _SAMPLERS.items()
        if sampler_record.get(field_name) in allowed_values
    }
