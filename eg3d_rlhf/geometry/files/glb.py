"""Reader of GLB 2.0 files from untrusted sources.

Allowed parts of a file become a `Model`. Parts without which the mesh is shown correctly are dropped: names,
extras, cameras, lights, animations, and minor material extensions. Other parts cause an error, because the
mesh would be shown wrongly without them, or because they are not safe: external files, compressed geometry
(Draco, meshopt), skins, instancing, points and lines, references out of bounds, and arrays that are too large
for the size of the file. Morph targets are applied, and hidden nodes are dropped.

A large number in the file never causes a large allocation of memory: arrays are views into the file, and the
size of a copy is subtracted from a budget before the copy is made.
"""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np

from eg3d_rlhf.geometry.files.appearance import mended_normals, vertex_normals
from eg3d_rlhf.geometry.files.glb_materials import MaterialReader
from eg3d_rlhf.geometry.files.gltf_arrays import MESHOPT_REMEDY, REACH, read_numbers
from eg3d_rlhf.geometry.files.model import (
    BIN_CHUNK,
    CHUNK_HEADER,
    GLB_HEADER,
    GLB_MAGIC,
    JSON_CHUNK,
    Array,
    Model,
    Node,
    Note,
    Primitive,
    array_numbers,
    primitive_points,
    primitive_triangles,
)

MAX_JSON = 16 << 20  # largest JSON chunk in bytes; its Python objects take up to about 40 times as many
MAX_NODES = 20_000  # largest number of nodes
MAX_PARTS = 20_000  # largest number of primitives of all meshes
MAX_DEPTH = 500  # largest depth of the tree of nodes, because browsers traverse it by recursion
MAX_TRIANGLES = 20_000_000  # largest number of rendered triangles; a mesh that two nodes use counts twice
# Largest number of bytes of all arrays: _SHARE times the size of the file, plus SPARE.
SPARE = 1 << 20
_SHARE = 4
# Required extensions that can be read: these, and extensions that concern nothing but materials, textures,
# lights, cameras and animations.
_READABLE = {"KHR_mesh_quantization", "KHR_node_visibility"}
_APPEARANCE = (
    "KHR_materials_",
    "EXT_materials_",
    "KHR_texture_",
    "EXT_texture_",
    "MSFT_texture_",
    "KHR_lights_",
    "EXT_lights_",
    "KHR_animation_",
    "KHR_xmp",
)
_DRACO_REMEDY = "Export it without compression. In Blender: import it, and export it with Compression off."
# Required extensions that cannot be read -> what to do.
_REMEDIES = {
    "KHR_draco_mesh_compression": _DRACO_REMEDY,
    "EXT_meshopt_compression": MESHOPT_REMEDY,
    "KHR_meshopt_compression": MESHOPT_REMEDY,
}
# Allowed attributes of vertices, and their allowed numbers of components.
_NAMES = {
    "POSITION": (3,),
    "NORMAL": (3,),
    "TANGENT": (4,),
    "COLOR_0": (3, 4),
    **{f"TEXCOORD_{i}": (2,) for i in range(4)},
}
_TRIANGLE_MODES = (4, 5, 6)  # modes of primitives: separate triangles, strip, fan


def read_glb(data: memoryview, geometry_only: bool = False) -> Model:
    """Read the visible parts of a GLB file.

    Args:
        data: content of the file. Arrays of the result are views into it.
        geometry_only: True to read only positions and indices, with the same checks. Other attributes,
            materials, textures and images are then neither read nor checked.

    Raises: ValueError for a damaged file, and for parts that are not allowed.
    """
    document, binary = _chunks(data)
    try:
        return _Reader(document, binary, _SHARE * len(data) + SPARE, geometry_only).model()
    # Records with fields of wrong types cause one of these exceptions; the types are not checked one by one.
    except (TypeError, KeyError, OverflowError, AttributeError) as error:
        raise ValueError(
            f"the GLB file has records that glTF 2.0 does not allow ({type(error).__name__}). Export it"
            " again."
        ) from None


def _chunks(data: memoryview) -> tuple[dict, memoryview]:
    """Return the JSON document and the binary chunk of a GLB file. The chunk is empty if it is missing.

    Raises: ValueError for a damaged file.
    """
    if len(data) < GLB_HEADER.size + CHUNK_HEADER.size:
        raise ValueError("the GLB file is incomplete. Export it again.")
    magic, version, file_length = GLB_HEADER.unpack_from(data)
    if magic != GLB_MAGIC:
        raise ValueError("the file is not a GLB file: it does not begin with glTF. Export it as GLB.")
    if version != 2 or file_length > len(data):
        raise ValueError(
            f"the file must be a complete GLB file of version 2, but it has version {version} and {len(data)}"
            f" of {file_length} bytes. Export it again."
        )
    chunk_size, chunk_kind = CHUNK_HEADER.unpack_from(data, GLB_HEADER.size)
    chunk_start = GLB_HEADER.size + CHUNK_HEADER.size
    if chunk_size > MAX_JSON:
        raise ValueError(
            f"the JSON of the GLB file is too large: its first part has {chunk_size:,} bytes, but at most"
            f" {MAX_JSON >> 20} MB are allowed. Export the file with fewer nodes, materials and extras."
        )
    if chunk_kind != JSON_CHUNK or chunk_start + chunk_size > file_length:
        raise ValueError(
            "the GLB file is damaged: its first part is no JSON, or is longer than the file. Export it again."
        )
    try:
        document = json.loads(bytes(data[chunk_start : chunk_start + chunk_size]).decode())
    except (ValueError, RecursionError):
        raise ValueError("the GLB file has invalid JSON. Export it again.") from None
    if not isinstance(document, dict):
        raise ValueError("the JSON of the GLB file is no object. Export it again.")
    chunk_start += chunk_size
    # The binary chunk is optional.
    if chunk_start + CHUNK_HEADER.size > file_length:
        return document, memoryview(b"")
    chunk_size, chunk_kind = CHUNK_HEADER.unpack_from(data, chunk_start)
    chunk_start += CHUNK_HEADER.size
    if chunk_kind != BIN_CHUNK or chunk_start + chunk_size > file_length:
        raise ValueError(
            "the second part of the GLB file is no binary chunk, or is longer than the file. Export it again."
        )
    return document, data[chunk_start : chunk_start + chunk_size]


class _Reader(MaterialReader):
    """Conversion of one GLB file into a model.

    Args:
        document: JSON document of the file.
        binary: binary chunk of the file.
        budget: largest number of bytes of all arrays together.
        geometry_only: True to read only positions and indices.
    """

    def __init__(self, document: dict, binary: memoryview, budget: int, geometry_only: bool):
        super().__init__(document, binary, budget)
        self.geometry_only = geometry_only

    def model(self) -> Model:
        """Convert the scene, and return the model. Raises: ValueError for parts that are not allowed."""
        # extensions without which the file cannot be shown
        unsupported_extensions = {
            extension
            for extension in set(self.document.get("extensionsRequired", [])) - _READABLE
            if not str(extension).startswith(_APPEARANCE)
        }
        if unsupported_extensions:
            remedy = next(
                (text for name, text in _REMEDIES.items() if name in unsupported_extensions),
                "Export it without them.",
            )
            raise ValueError(
                "the GLB file requires extensions that are not supported:"
                f" {', '.join(sorted(map(str, unsupported_extensions)))[:200]}. {remedy}"
            )
        buffer_uris = [str(buffer["uri"]) for buffer in self._records("buffers") if "uri" in buffer]
        if any(uri.startswith("data:") for uri in buffer_uris):
            raise ValueError(
                "the data of the GLB file is base64 text (a buffer with a data URI) instead of the binary"
                " chunk. Export it as binary glTF (.glb), not as embedded glTF."
            )
        if len(self._records("buffers")) > 1 or buffer_uris:
            raise ValueError(
                "the GLB file has several buffers, or a buffer with a URI instead of data inside the file."
                " Export it with all data inside the file."
            )
        scenes = self._records("scenes")
        if not scenes:
            raise ValueError("the GLB file has no scene. Export it with a scene.")
        # The field `scene` is the index of the scene to show, by default the first.
        scene = self._record("scenes", self.document.get("scene", 0))
        self._nodes(scene.get("nodes", []))
        # The triangles of a mesh count once for each node that refers to the mesh.
        triangle_counts = [self._triangle_count(mesh) for mesh in self.out.meshes]
        rendered_triangle_count = sum(
            triangle_counts[node.mesh] for node in self.out.nodes if node.mesh is not None
        )
        if not rendered_triangle_count:
            raise ValueError("the GLB file has no triangles. Export a mesh that has faces.")
        if rendered_triangle_count > MAX_TRIANGLES:
            raise ValueError(
                f"the GLB file has {rendered_triangle_count:,} triangles, but at most {MAX_TRIANGLES:,} are"
                " allowed. Simplify the mesh, or reduce its resolution."
            )
        return self.out

    @staticmethod
    def _triangle_count(mesh: list[Primitive]) -> int:
        """Count the triangles of a mesh.

        N indices form N // 3 separate triangles, or N - 2 triangles in a strip or a fan.
        """
        triangle_count = 0
        for primitive in mesh:
            # Without indices, the vertices in their order form the triangles.
            index_count = len((primitive.indices or primitive.attributes["POSITION"]).values)
            triangle_count += index_count // 3 if primitive.mode == 4 else max(index_count - 2, 0)
        return triangle_count

    def _nodes(self, root_indices: list) -> None:
        """Convert the nodes of a scene. Hidden nodes and nodes without a mesh on them or below are dropped.

        Args:
            root_indices: indices in the file of the nodes without a parent.

        Raises: ValueError for cycles, skins and instances, and for too many nodes.
        """
        # (index of a node, index of its parent), parents before their children
        visit_order: list[tuple[int, int | None]] = []
        visited_nodes: set[int] = set()
        # Depth-first traversal with a stack, because recursion could exceed Python's limit. An entry is
        # (node, parent, depth). Lists are reversed, because the last entry of the stack is taken first.
        pending_nodes: list[tuple[Any, int | None, int]] = [
            (node_index, None, 1) for node_index in reversed(root_indices)
        ]
        while pending_nodes:
            node_index, parent_index, depth = pending_nodes.pop()
            node_record = self._record("nodes", node_index)
            visibility = node_record.get("extensions", {}).get("KHR_node_visibility", {})
            # A hidden node hides the nodes below it, too.
            if visibility.get("visible") is False:
                continue
            if depth > MAX_DEPTH:
                raise ValueError(
                    f"the tree of nodes is more than {MAX_DEPTH} levels deep. Export the file with fewer"
                    " levels."
                )
            if node_index in visited_nodes or len(visited_nodes) >= MAX_NODES:
                raise ValueError(
                    f"the nodes must form a tree of at most {MAX_NODES:,} nodes. The file has more nodes, or"
                    " a node with two parents, or a cycle. Join nodes if there are too many; otherwise"
                    " export the file again."
                )
            visited_nodes.add(node_index)
            visit_order.append((node_index, parent_index))
            pending_nodes += [
                (child, node_index, depth + 1) for child in reversed(node_record.get("children", []))
            ]
        children: dict[int | None, list[int]] = {}
        converted_nodes: dict[int, Node] = {}
        # Reversed, so that children are converted before their parents.
        for node_index, parent_index in reversed(visit_order):
            node_record = self._record("nodes", node_index)
            if "skin" in node_record or "EXT_mesh_gpu_instancing" in node_record.get("extensions", {}):
                raise ValueError(
                    "the GLB file has a mesh with a skin or instances, which are not supported. Export it as"
                    " a static mesh."
                )
            mesh = self._mesh_of_node(node_record) if "mesh" in node_record else None
            # [::-1] restores the order of the children, which were converted in reversed order.
            if mesh is not None or node_index in children:
                converted_nodes[node_index] = Node(
                    children.get(node_index, [])[::-1], mesh, _place(node_record)
                )
                children.setdefault(parent_index, []).append(node_index)
        new_index_by_node = {
            node_index: position
            for position, node_index in enumerate(node for node, _ in visit_order if node in converted_nodes)
        }
        self.out.nodes = [converted_nodes[node_index] for node_index in new_index_by_node]
        for node in self.out.nodes:
            node.children = [new_index_by_node[child] for child in node.children]
        self.out.roots = [new_index_by_node[node_index] for node_index in children.get(None, [])[::-1]]

    def _mesh_of_node(self, node_record: dict) -> int:
        """Return the index in the model of the mesh of a node, with the node's weights of morph targets.

        The weights of a node replace those of its mesh (glTF 2.0, section 3.7.2.2), so a mesh that two nodes
        use with different weights becomes two meshes.
        """
        mesh_record = self._record("meshes", node_record["mesh"])
        stated_weights = node_record.get("weights", mesh_record.get("weights")) or []
        weights = tuple(read_numbers(stated_weights, len(stated_weights)))
        # Morph targets whose weights are all 0 do not change the mesh.
        weights = weights if any(weights) else ()
        mesh_key = ("meshes", (node_record["mesh"], weights))
        if mesh_key not in self._indices:
            self.out.meshes.append(self._mesh(mesh_record, weights))
            self._indices[mesh_key] = len(self.out.meshes) - 1
        return self._indices[mesh_key]

    def _mesh(self, mesh_record: dict, weights: tuple[float, ...]) -> list[Primitive]:
        """Convert the record of a mesh into its primitives.

        Args:
            mesh_record: record of the mesh.
            weights: weights of its morph targets; empty if all are 0.
        """
        primitive_records = mesh_record.get("primitives", [])
        if sum(len(mesh) for mesh in self.out.meshes) + len(primitive_records) > MAX_PARTS:
            raise ValueError(
                f"the meshes have more than {MAX_PARTS:,} primitives. Join parts of the same material."
            )
        return [self._primitive(primitive_record, weights) for primitive_record in primitive_records]

    def _primitive(self, primitive_record: dict, weights: tuple[float, ...]) -> Primitive:
        """Convert the record of a primitive.

        Args:
            primitive_record: record of the primitive.
            weights: weights of its morph targets; empty if all are 0.

        Raises: ValueError for compression, for points and lines, and for invalid arrays.
        """
        if set(primitive_record.get("extensions", {})) & {"KHR_draco_mesh_compression"}:
            raise ValueError(f"the GLB file uses Draco compression, which is not supported. {_DRACO_REMEDY}")
        mode = primitive_record.get("mode", 4)
        if mode not in _TRIANGLE_MODES:
            raise ValueError(
                "the GLB file contains points or lines instead of triangles. Export a mesh that has faces."
            )
        allowed_names = ("POSITION",) if self.geometry_only else _NAMES
        attributes = {
            attribute_name: self._array(accessor_index)
            for attribute_name, accessor_index in primitive_record["attributes"].items()
            if attribute_name in allowed_names
        }
        if "POSITION" not in attributes:
            raise ValueError("a primitive in the GLB file has no attribute POSITION. Export the file again.")
        # All attributes must have one row for each vertex.
        vertex_count = len(attributes["POSITION"].values)
        for attribute_name, attribute in attributes.items():
            if (
                attribute.values.shape[1] not in _NAMES[attribute_name]
                or len(attribute.values) != vertex_count
            ):
                allowed_widths = " or ".join(map(str, _NAMES[attribute_name]))
                raise ValueError(
                    f"the attribute {attribute_name} must have the shape [{vertex_count}, {allowed_widths}],"
                    " got"
                    f" {list(attribute.values.shape)}. Export the file again."
                )
            if (
                attribute_name == "POSITION"
                and attribute.values.dtype.kind == "f"
                and not (np.abs(attribute.values) < REACH).all()
            ):
                raise ValueError(
                    f"the attribute {attribute_name} contains NaN, infinity or numbers beyond {REACH:g}."
                    " Export the file again."
                )
            if attribute.values.dtype.str == "<u4":
                raise ValueError(
                    f"the attribute {attribute_name} has integers of 32 bits, but only floats and integers of"
                    " 8 or 16 bits are allowed. Export the file again."
                )
            # glTF 2.0 itself allows integers for these attributes. Integers in others need an extension.
            is_core_gltf = attribute_name == "COLOR_0" or (
                attribute_name.startswith("TEXCOORD")
                and attribute.normalized
                and attribute.values.dtype.kind == "u"
            )
            # 8 or 16 bits
            if attribute.values.dtype.itemsize < 4 and not is_core_gltf:
                self.out.extensions.add("KHR_mesh_quantization")
        indices = (
            None
            if "indices" not in primitive_record
            else self._array(primitive_record["indices"], is_index=True)
        )
        if indices is not None:
            if (
                indices.values.shape[1] != 1
                or indices.values.dtype.kind != "u"
                or (len(indices.values) and indices.values.max() >= vertex_count)
            ):
                raise ValueError(
                    f"the indices of a primitive must be unsigned integers below {vertex_count}, its number"
                    " of vertices. Export the file again."
                )
        if not vertex_count or (indices is not None and not len(indices.values)):
            raise ValueError("a primitive in the GLB file has no triangles. Export the file again.")
        material = None
        if "material" in primitive_record and not self.geometry_only:
            material = self._once(
                "materials", primitive_record["material"], self.out.materials, self._material
            )
        primitive = self._with_finite_numbers(Primitive(attributes, indices, mode, material))
        if weights:
            primitive = self._morphed(primitive, primitive_record.get("targets", []), weights)
        if material is None:
            return primitive
        return replace(primitive, material=self._without_textures(material, primitive.attributes))

    def _morphed(
        self, primitive: Primitive, target_records: list[dict], weights: tuple[float, ...]
    ) -> Primitive:
        """Return a primitive whose positions are the base plus the weighted sum of its morph targets.

        Normals are computed anew, and tangents are dropped. Targets of texture coordinates and colours are
        not applied, which a note says.

        Raises: ValueError if the numbers of targets and weights differ, or for invalid arrays.
        """
        if len(target_records) != len(weights):
            raise ValueError(
                f"the GLB file has {len(weights)} weights for {len(target_records)} morph targets. Export it"
                " again."
            )
        points = primitive_points(primitive)
        # the sum in float64, the positions and the normals in float32
        self.budget -= 2 * points.nbytes
        for target_record, weight in zip(target_records, weights, strict=True):
            if weight and "POSITION" in target_record:
                difference = self._array(target_record["POSITION"])
                if difference.values.shape != points.shape:
                    raise ValueError(
                        f"a morph target must have the shape {list(points.shape)}, got"
                        f" {list(difference.values.shape)}. Export the file again."
                    )
                points = points + weight * array_numbers(difference)
            if weight and not self.geometry_only and set(target_record) - {"POSITION", "NORMAL", "TANGENT"}:
                self.out.notes.append(
                    Note("approximated", "colours of morph targets are left out. Export a static mesh.")
                )
        if self.budget < 0 or not (np.abs(points) < REACH).all():
            raise ValueError(
                f"the positions with morph targets contain NaN or numbers beyond {REACH:g}, or are too many"
                " for the size of the file. Export it again."
            )
        attributes = {**primitive.attributes, "POSITION": Array(points.astype("<f4"))}
        attributes.pop("TANGENT", None)
        if "NORMAL" in attributes:
            attributes["NORMAL"] = Array(vertex_normals(points, primitive_triangles(primitive)))
        return replace(primitive, attributes=attributes)

    def _with_finite_numbers(self, primitive: Primitive) -> Primitive:
        """Return a primitive whose attributes have no NaN and no number beyond REACH.

        Positions were checked before. Normals are computed anew where they are not finite, and tangents are
        then dropped. Texture coordinates and colours are dropped, because their right values are not known.
        """
        unusable_names = [
            attribute_name
            for attribute_name, attribute in primitive.attributes.items()
            if attribute.values.dtype.kind == "f" and not (np.abs(attribute.values) < REACH).all()
        ]
        if not unusable_names:
            return primitive
        attributes = {
            attribute_name: attribute
            for attribute_name, attribute in primitive.attributes.items()
            if attribute_name not in unusable_names
        }
        if "NORMAL" in unusable_names:
            attributes.pop("TANGENT", None)
            points = primitive_points(primitive)
            self.budget -= 4 * points.size
            normals = mended_normals(
                primitive.attributes["NORMAL"].values, points, primitive_triangles(primitive)
            )
            attributes["NORMAL"] = Array(normals)
        if "COLOR_0" in unusable_names:
            self.out.notes.append(
                Note(
                    "untextured", "colours of vertices are left out, because some are NaN. Export them anew."
                )
            )
        return replace(primitive, attributes=attributes)


def _place(node_record: dict) -> dict:
    """Return the transformation of a node: its fields matrix, translation, rotation and scale, if present.

    A rotation whose length differs from 1 by more than rounding is normalised.

    Raises: ValueError for values that are not finite numbers, and for a rotation of length 0.
    """
    length_by_field = {"matrix": 16, "translation": 3, "rotation": 4, "scale": 3}
    node_place = {
        field_name: read_numbers(node_record[field_name], length)
        for field_name, length in length_by_field.items()
        if field_name in node_record
    }
    if "rotation" in node_place:
        quaternion_length = math.hypot(*node_place["rotation"])
        if quaternion_length < 1e-6:
            raise ValueError("a node of the GLB file has a rotation of length 0. Export the file again.")
        # A quaternion of another length would scale the mesh, in each viewer in another way.
        if abs(quaternion_length - 1) > 1e-3:
            node_place["rotation"] = [number / quaternion_length for number in node_place["rotation"]]
    return node_place
