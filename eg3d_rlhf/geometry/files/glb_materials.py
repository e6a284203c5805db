"""Materials and textures of a GLB file, reduced to allowed fields with allowed values."""

import base64
import binascii

from eg3d_rlhf.geometry.files.gltf_arrays import (
    GltfArrays,
    read_number,
    read_numbers,
    read_set,
    read_share,
)
from eg3d_rlhf.geometry.files.model import ImageFile, image_format, strip_image

MAX_PIXELS = 3 * 8192 * 8192  # largest number of pixels of all textures together
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

    def _material(self, material_record: dict) -> dict:
        """Return a copy of a material's record that contains only allowed fields with allowed values."""
        pbr_record = material_record.get("pbrMetallicRoughness", {})
        material: dict = {}
        pbr_fields: dict = {}
        for field_name, length in (("baseColorFactor", 4), ("metallicFactor", 0), ("roughnessFactor", 0)):
            if field_name in pbr_record:
                pbr_fields[field_name] = read_share(pbr_record[field_name], length)
        for field_name in ("baseColorTexture", "metallicRoughnessTexture"):
            if field_name in pbr_record:
                pbr_fields[field_name] = self._texture(pbr_record[field_name])
        material["pbrMetallicRoughness"] = pbr_fields
        for field_name, factor_name in (
            ("normalTexture", "scale"),
            ("occlusionTexture", "strength"),
            ("emissiveTexture", ""),
        ):
            if field_name in material_record:
                material[field_name] = self._texture(material_record[field_name])
                if factor_name in material_record[field_name]:
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
        if "KHR_materials_unlit" in material_record.get("extensions", {}):
            material["extensions"] = {"KHR_materials_unlit": {}}
            self.out.extensions.add("KHR_materials_unlit")
        return material

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
                "a texture in the GLB file has no PNG, JPEG or WebP image, only"
                f" {', '.join(map(str, extensions))[:80] or 'an empty record'}. Convert the textures to one"
                " of these formats."
            )
        texture = {"source": self._once("images", image_index, self.out.images, self._image)}
        if "sampler" in texture_record:
            texture["sampler"] = self._once(
                "samplers", texture_record["sampler"], self.out.samplers, _sampler
            )
        return texture

    def _image(self, image_record: dict) -> ImageFile:
        """Convert the record of an image. Its data lies in the binary chunk, or in a data URI.

        Raises: ValueError for external files, other formats, and images with too many pixels.
        """
        if "bufferView" in image_record:
            image_bytes, _ = self._bytes(image_record["bufferView"])
        else:
            uri = image_record.get("uri", "")
            if not isinstance(uri, str) or not uri.startswith("data:image/") or ";base64," not in uri[:64]:
                raise ValueError(
                    "a texture of the GLB file is neither in the binary chunk nor in a base64 data URI of an"
                    " image. Export the file with all textures inside."
                )
            try:
                image_bytes = memoryview(base64.b64decode(uri[uri.index(",") + 1 :], validate=True))
            except binascii.Error:
                raise ValueError(
                    "a texture in the GLB file is no valid base64 text. Export the file again."
                ) from None
        if image_format(image_bytes) is None:
            raise ValueError(
                "the GLB file has textures that are not PNG, JPEG or WebP. Convert them to one of these"
                " formats."
            )
        # The image is copied, so its size is subtracted from the budget.
        self.budget -= len(image_bytes)
        image, pixel_count = strip_image(image_bytes)
        self.pixels -= pixel_count
        if self.pixels < 0 or self.budget < 0:
            raise ValueError(
                "the textures of the GLB file are too large: together, they have more than"
                f" {MAX_PIXELS >> 20} megapixels, or their data exceeds the limit for a file of this size."
                " Reduce the resolution of the textures, and store each texture once."
            )
        return image


def _sampler(sampler_record: dict) -> dict:
    """Return a copy of a sampler's record that contains only allowed fields with allowed values."""
    return {
        field_name: sampler_record[field_name]
        for field_name, allowed_values in _SAMPLERS.items()
        if sampler_record.get(field_name) in allowed_values
    }
