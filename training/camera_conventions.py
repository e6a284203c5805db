"""Checks of camera labels for the usual mistakes of convention and unit.

A camera label has 16 numbers of the pose cam2world and 9 of the intrinsics K, both row-major. The pose has
OpenCV's camera axes (x right, y down, z forward) in a world whose y axis points up, and K is divided by the
image size. `number_faults` finds labels that cannot be right. `diagnose` finds labels that can be right but
hardly are: cameras that look away from the scene, a distance that does not suit the rendered cube, one pose
for all images. To name the likely mistake, it tries all combinations of the cures on the labels, and proposes
the one after which all checks pass.

Shapes: n is the number of labels.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from training.camera_cures import (
    CURES,
    INTRINSICS_TOLERANCE,
    MAX_FOCAL,
    ROTATION_TOLERANCE,
    apply_cures,
    is_divided,
    numbers_text,
    point_text,
)
from training.rendering.cameras import LABEL_NUMBERS, POSE_NUMBERS

# Largest ratio of fx and fy, which are equal in square images. In images of 16:9 the ratio is 1.8.
_MAX_FOCAL_RATIO = 2.0
# The image may show up to this many sides of the cube, and at least the other number of them, in the
# distance of the scene's centre. FFHQ shows 0.63 sides, ShapeNet 0.6 to 0.8.
_MIN_SIDES = 0.2
_MAX_SIDES = 2.0
# The centre of the scene may be projected this far from the middle of the image (median), in image sizes.
_MAX_OFFSET = 0.2
# Another convention is likely if the optical axes miss the centre by more than the first number (median, in
# degrees), and with that convention by less than this angle divided by the second number.
_SUSPICIOUS_DEGREES = 0.5
_SUSPICIOUS_RATIO = 3.0
# Cameras turn at one place if their axes have at least this spread (root mean square, radians), and their
# positions, divided by the distance, less than a third of it. Orbiting cameras have equal spreads.
_TURNING_SPREAD = 0.01
# Smallest y component of the mean up direction. Its angle with the y axis is then below 70 degrees.
_MIN_UP = 0.35
# Width of the image at the scene's centre, in sides of the cube, that a factor on the distances aims at.
_USUAL_SIDES = 0.7
_TRIED_LABELS = 2000  # combinations of cures are tried on at most this many labels


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Region that the cameras of a set have to show. The defaults suit all presets of EG3D."""

    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)  # centre of the scene, world units
    box_sides: tuple[float, float] = (1.0, 1.6)  # smallest and largest possible side of the rendered cube
    radius: float | None = None  # usual distance of the cameras, world units; None: unknown
    # Depths along a ray between which the renderer samples, world units; None: the limits of the cube.
    ray_range: tuple[float, float] | None = None
    # The true centre of the scene may differ from the pivot by this part of the cube's side.
    pivot_tolerance: float = 0.2
    source: str = "EG3D's presets"  # origin of these values, for messages


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Numbers of labels that cannot be right."""

    is_faulty: np.ndarray  # bool [n]
    describe: Callable[[int], str]  # index of a faulty label -> clause that says what is wrong with it
    remedy: str  # sentence that says what to write instead


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Findings about the cameras of a set, with the likely mistake and its cure."""

    findings: tuple[str, ...] = ()  # clauses that say what is unusual; empty for a set that passes
    cures: tuple[str, ...] | None = None  # cures after which all checks pass; None: there are none
    scale: float = 1.0  # factor on the translations after which all checks pass
    remedy: str = ""  # sentence that says what to do if there are no such cures


def number_faults(labels: np.ndarray) -> Iterator[Fault]:
    """Yield the kinds of faults that some labels [n, 25] have: poses first, then intrinsics."""
    labels = labels.astype(np.float64)  # rounding in the check itself becomes negligible
    poses = labels[:, :POSE_NUMBERS].reshape(-1, 4, 4)
    intrinsics = labels[:, POSE_NUMBERS:].reshape(-1, 3, 3)
    focal = intrinsics[:, (0, 1), (0, 1)]  # fx and fy [n, 2]
    centre = intrinsics[:, (0, 1), (2, 2)]  # cx and cy [n, 2]
    rotations = poses[:, :3, :3]
    rotation_error = np.abs(rotations.transpose(0, 2, 1) @ rotations - np.eye(3)).max(axis=(1, 2))
    determinants = np.linalg.det(rotations)
    # K10, K20, K21 and K22; K01 is the skew, which the ray sampler supports.
    constants = np.stack([intrinsics[:, 1, 0], *intrinsics[:, 2].T], axis=1)  # [n, 4]
    all_faults = (
        Fault(
            # R^T R = I also holds for a reflection, whose determinant is negative.
            is_faulty=(rotation_error > ROTATION_TOLERANCE) | (determinants < 0),
            describe=lambda i: (
                f"the pose contains no rotation, because |R^T R - I| = {rotation_error[i]:.3g} and the"
                f" determinant is {determinants[i]:.3g}{_describe_no_rotation(rotations[i])}"
            ),
            remedy="Write a rigid cam2world matrix in row-major order.",
        ),
        Fault(
            # A pose in column-major order has its translation in the last row.
            is_faulty=np.abs(poses[:, 3] - [0, 0, 0, 1]).max(axis=1) > ROTATION_TOLERANCE,
            describe=lambda i: (
                f"the last row of the pose must be 0 0 0 1, but it is {numbers_text(poses[i, 3])}"
            ),
            remedy="Write cam2world in row-major order, with the position in the last column.",
        ),
        Fault(
            is_faulty=np.asarray(np.any((focal <= 0) | (focal > MAX_FOCAL), axis=1)),
            describe=lambda i: (
                f"the focal lengths fx and fy must be above 0 and at most {MAX_FOCAL:g} image sizes, but they"
                f" are {numbers_text(focal[i])}"
            ),
            remedy=(
                "Write positive focal lengths, divided by the image size: fx by the width, fy by the height."
            ),
        ),
        Fault(
            is_faulty=np.asarray(np.any((centre < 0) | (centre > 1), axis=1)),
            describe=lambda i: (
                f"the principal point (cx, cy) must lie in the image, between 0 and 1, but it is"
                f" {numbers_text(centre[i])}"
            ),
            remedy="Divide cx by the width of the image and cy by its height.",
        ),
        Fault(
            is_faulty=np.abs(constants - [0, 0, 0, 1]).max(axis=1) > INTRINSICS_TOLERANCE,
            describe=lambda i: (
                "the intrinsics must be fx skew cx, 0 fy cy, 0 0 1, but they are"
                f" {', '.join(map(numbers_text, intrinsics[i]))}"
            ),
            remedy="Write the 3 x 3 matrix in row-major order, and divide its first two rows alone.",
        ),
    )
    for fault in all_faults:
        if fault.is_faulty.any():
            yield fault


def _describe_no_rotation(matrix: np.ndarray) -> str:
    """Return a clause that says in which way a 3 x 3 matrix fails to be a rotation, or an empty text."""
    if not np.isfinite(matrix).all():
        return ""
    singular_values = np.linalg.svd(matrix, compute_uv=False)
    scale = float(singular_values.mean())
    if scale > 0 and np.ptp(singular_values) < ROTATION_TOLERANCE * scale:
        # A rotation or a reflection, multiplied by a number.
        if np.linalg.det(matrix) < 0:
            return " (one axis is negated, as between a left-handed and a right-handed system)"
        return f" (a rotation multiplied by {scale:.4g}, by which it has to be divided)"
    return ""


# Checks of cameras whose numbers are possible.


@dataclass(frozen=True, kw_only=True)
class _Geometry:
    """Position of the scene in the views of the cameras."""

    ups: np.ndarray  # directions of the images' upper edges in the world [n, 3]
    axes: np.ndarray  # optical axes, unit vectors in the world [n, 3]
    distances: np.ndarray  # of the cameras from the scene's centre [n], world units
    depths: np.ndarray  # of the scene's centre along the optical axes [n], world units
    angles: np.ndarray  # between the optical axes and the direction to the scene's centre [n], degrees
    focal: np.ndarray  # smaller one of fx and fy [n], image sizes
    focal_ratios: np.ndarray  # larger one of fx and fy divided by the smaller one [n]
    # Where the scene's centre is projected [n, 2], in image sizes from the middle of the image.
    # Meaningless where the depth is not positive.
    offsets: np.ndarray


def _geometry(labels: np.ndarray, scene: Scene) -> _Geometry:
    """Compute where the scene lies in the views of cameras [n, 25]."""
    poses = labels[:, :POSE_NUMBERS].reshape(-1, 4, 4)
    intrinsics = labels[:, POSE_NUMBERS:].reshape(-1, 3, 3)
    focal = intrinsics[:, (0, 1), (0, 1)]  # [n, 2]
    to_centre = np.array(scene.pivot) - poses[:, :3, 3]  # [n, 3]
    distances = np.linalg.norm(to_centre, axis=1)
    in_camera = np.einsum("nij,ni->nj", poses[:, :3, :3], to_centre)  # R^T v, [n, 3]
    depths = in_camera[:, 2]
    projected = np.einsum("nij,nj->ni", intrinsics, in_camera)[:, :2]
    with np.errstate(divide="ignore", invalid="ignore"):
        offsets = projected / depths[:, None] - 0.5
    return _Geometry(
        ups=-poses[:, :3, 1],
        axes=poses[:, :3, 2],
        distances=distances,
        depths=depths,
        # The arc tangent is exact near 0, where the arc cosine amplifies rounding.
        angles=np.degrees(np.arctan2(np.linalg.norm(in_camera[:, :2], axis=1), depths)),
        focal=focal.min(axis=1),
        focal_ratios=focal.max(axis=1) / focal.min(axis=1),
        offsets=offsets,
    )


def _pivot_offset(geometry: _Geometry, scene: Scene) -> np.ndarray:
    """Return the size of the scene's uncertain centre in the images [n], in image sizes."""
    with np.errstate(divide="ignore"):
        return scene.pivot_tolerance * scene.box_sides[0] * geometry.focal / geometry.depths


def _misses_scene(geometry: _Geometry, scene: Scene) -> np.ndarray:
    """Return a mask [n] of the cameras whose images do not contain the centre of the scene."""
    with np.errstate(invalid="ignore"):
        is_outside = np.abs(geometry.offsets).max(axis=1) > 0.5 + _pivot_offset(geometry, scene)
    return (geometry.depths <= 0) | is_outside


def _is_misplaced(geometry: _Geometry, scene: Scene) -> np.ndarray:
    """Return a mask [n] of the cameras whose distance does not suit the rendered cube."""
    distances = geometry.distances
    # Width of the image in the distance of the scene's centre, world units
    widths = distances / geometry.focal
    smallest_side, largest_side = scene.box_sides
    is_misplaced = (
        (distances <= smallest_side / 2)  # inside the cube
        | (widths < _MIN_SIDES * smallest_side)
        | (widths > _MAX_SIDES * largest_side)
    )
    if scene.ray_range is not None:
        is_misplaced |= (distances <= scene.ray_range[0]) | (distances >= scene.ray_range[1])
    return is_misplaced


def _mean_up(geometry: _Geometry) -> np.ndarray | None:
    """Return the mean of the cameras' up directions as a unit vector [3], None if they cancel out."""
    mean_direction = geometry.ups.mean(axis=0)
    length = float(np.linalg.norm(mean_direction))
    return mean_direction / length if length > 0.2 else None


def _is_turning_in_place(labels: np.ndarray, geometry: _Geometry) -> bool:
    """Return True if cameras [n, 25] turn at one place, as the inverses of orbiting cameras do."""
    position_spread, axis_spread = (
        float(np.sqrt(((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1).mean()))
        for vectors in (labels[:, 3:12:4], geometry.axes)  # [n, 3] each
    )
    relative_spread = position_spread / max(float(np.median(geometry.distances)), 1e-12)
    return axis_spread > _TURNING_SPREAD and relative_spread < axis_spread / 3


def _findings(labels: np.ndarray, scene: Scene, example: Callable[[int], str]) -> tuple[list[str], bool]:
    """Return clauses that say what is unusual about cameras [n, 25], and True if their distance is.

    Args: labels: [n, 25], without `number_faults`; scene: scene; example: name of the image with an index.
    """
    geometry = _geometry(labels, scene)
    count = len(labels)
    findings = []
    centre_text = "the centre of the scene, " + point_text(scene.pivot)
    misses_scene = _misses_scene(geometry, scene)
    if misses_scene.any():
        i = int(misses_scene.argmax())
        findings.append(
            f"{misses_scene.sum()} of {count} cameras look away from {centre_text}, for example"
            f" {example(i)} by {geometry.angles[i]:.0f} degrees"
        )
    mean_up = _mean_up(geometry)
    if mean_up is not None and mean_up[1] < _MIN_UP:
        findings.append(
            f"the mean up direction of the images is {point_text(mean_up)}, but it must be near the y axis"
            " (0, 1, 0) of the world"
        )
    is_backward = geometry.depths <= 0
    # If only some cameras look backward, two conventions are probably mixed, and the spreads mean nothing.
    if is_backward.all() == is_backward.any() and _is_turning_in_place(labels, geometry):
        findings.append(
            f"the cameras stand at nearly one place, {point_text(labels[:, 3:12:4].mean(axis=0))}, while"
            " their optical axes turn"
        )
    is_misplaced = _is_misplaced(geometry, scene)
    if is_misplaced.any():
        i = int(is_misplaced.argmax())
        low_side, high_side = scene.box_sides
        side_text = f"{low_side:g}" if low_side == high_side else f"{low_side:g} to {high_side:g}"
        ray_text = (
            ""
            if scene.ray_range is None
            else f" and samples rays from {scene.ray_range[0]:g} to {scene.ray_range[1]:g}"
        )
        findings.append(
            f"the distance of {is_misplaced.sum()} of {count} cameras does not suit the generator, whose cube"
            f" has the side {side_text}{ray_text} ({scene.source}): {example(i)} is"
            f" {geometry.distances[i]:.4g} away from {centre_text}, where its image is"
            f" {geometry.distances[i] / geometry.focal[i]:.4g} wide"
        )
    if not misses_scene.any():
        offset = np.median(geometry.offsets, axis=0)  # [2]
        principal_point = np.median(labels[:, [POSE_NUMBERS + 2, POSE_NUMBERS + 5]], axis=0)  # [2]
        # With a principal point in the middle, the offset may come from the uncertain centre of the scene.
        limit = _MAX_OFFSET
        if np.abs(principal_point - 0.5).max() < _MAX_OFFSET / 2:
            limit += float(np.median(_pivot_offset(geometry, scene)))
        if np.abs(offset).max() > limit:
            findings.append(
                f"{centre_text}, is projected to {point_text(offset + 0.5)} of the image in the median, far"
                " from its middle (0.5, 0.5)"
            )
    is_stretched = geometry.focal_ratios > _MAX_FOCAL_RATIO
    if is_stretched.any():
        focal = labels[int(is_stretched.argmax()), [POSE_NUMBERS, POSE_NUMBERS + 4]]
        findings.append(
            f"the focal lengths fx and fy of {is_stretched.sum()} of {count} cameras differ by more than a"
            f" factor of {_MAX_FOCAL_RATIO:g}: {example(int(is_stretched.argmax()))} has"
            f" {numbers_text(focal)}"
        )
    return findings, bool(is_misplaced.any())


def _median_angle(labels: np.ndarray, scene: Scene) -> float:
    """Return the median angle between optical axes and the direction to the scene's centre, in degrees."""
    return float(np.median(_geometry(labels, scene).angles))


def _scale_for(labels: np.ndarray, scene: Scene) -> float | None:
    """Return a factor on the translations that makes the distances suit the cube, or None.

    It is a power of ten (a change of units) if possible. Otherwise it gives the scene's usual distance, or,
    if that is unknown, images that the cube fills as in EG3D's presets.
    """
    geometry = _geometry(labels, scene)
    median_distance = float(np.median(geometry.distances))
    if median_distance <= 0:
        return None
    usual_distance = scene.radius or _USUAL_SIDES * scene.box_sides[0] * float(np.median(geometry.focal))
    for factor in (1e-3, 1e-2, 1e-1, 10.0, 100.0, 1000.0, float(f"{usual_distance / median_distance:.3g}")):
        scaled_labels = apply_cures(labels, (), factor)
        if not _is_misplaced(_geometry(scaled_labels, scene), scene).any():
            return factor
    return None


def _passing_cures(labels: np.ndarray, scene: Scene) -> list[tuple[float, tuple[str, ...], float]]:
    """Return the combinations of cures after which all checks pass.

    Returns: for each combination the median angle between axes and centre in degrees, the names of the cures,
        and the factor on the translations. The combination without any cure is one of them.
    """
    # Evenly spaced, because neighbours in a set often come from the same source.
    step = max(1, len(labels) // _TRIED_LABELS)
    tried_labels = labels[::step].astype(np.float64)
    passing = []
    for count in range(len(CURES) + 1):
        for cures in itertools.combinations(CURES, count):
            if "pixels" in cures and is_divided(tried_labels).all():
                continue
            try:
                cured_labels = apply_cures(tried_labels, cures)
            except ValueError:
                continue  # `pixels` is impossible
            if next(number_faults(cured_labels), None) is not None:
                continue
            scale = 1.0
            findings, is_misplaced = _findings(cured_labels, scene, str)
            if is_misplaced:
                factor = _scale_for(cured_labels, scene)
                if factor is None:
                    continue
                scale = factor
                cured_labels = apply_cures(cured_labels, (), scale)
                findings, _ = _findings(cured_labels, scene, str)
            if not findings:
                passing.append((_median_angle(cured_labels, scene), cures, scale))
    return passing


def _best_cures(passing: list) -> tuple[float, tuple[str, ...], float] | None:
    """Return the best of the combinations of `_passing_cures`, or None if there are none.

    The optical axes of right poses come nearest to the centre. Of combinations that are equally near, the one
    with the fewest cures is chosen, first without a change of units.
    """
    if not passing:
        return None
    limit = 1.2 * min(angle for angle, _, _ in passing) + 0.5  # degrees
    return min(
        (candidate for candidate in passing if candidate[0] <= limit),
        key=lambda candidate: (candidate[2] != 1, len(candidate[1]), candidate[0]),
    )


def diagnose(
    labels: np.ndarray, image_names: Sequence[str], scene: Scene, uncured_labels: np.ndarray | None = None
) -> Diagnosis:
    """Check cameras against a scene, and name the likely mistake and its cure.

    Args:
        labels: camera labels [n, 25]. Labels with a `number_faults` get a proposal, but no findings.
        image_names: name of each image, for messages.
        scene: region that the cameras have to show.
        uncured_labels: labels [n, 25] before the cures that the user chose, to which the proposed cures are
            applied; None: `labels`.
    """
    assert labels.ndim == 2 and labels.shape[1] == LABEL_NUMBERS
    labels = labels.astype(np.float64)
    has_faults = next(number_faults(labels), None) is not None
    findings: list[str] = []
    is_misplaced = False
    if not has_faults:
        findings, is_misplaced = _findings(labels, scene, lambda i: repr(image_names[i]))
    is_only_distance = is_misplaced and len(findings) == 1
    is_one_pose = len(labels) > 1 and float(np.ptp(labels[:, :POSE_NUMBERS], axis=0).max()) < 1e-5
    best = _best_cures(_passing_cures(labels if uncured_labels is None else uncured_labels, scene))
    if not findings and not has_faults and best is not None and not is_one_pose:
        # All checks pass. Another convention is likely if its optical axes pass much nearer to the centre.
        own_angle = _median_angle(labels, scene)
        if own_angle > _SUSPICIOUS_DEGREES and best[0] < own_angle / _SUSPICIOUS_RATIO:
            findings.append(
                f"the optical axes miss the centre of the scene, {point_text(scene.pivot)}, by"
                f" {own_angle:.3g} degrees in the median, but only by {best[0]:.2g} in another convention"
            )
    if best is not None and not has_faults and not _suits_passing_part(labels, best[1], scene):
        best = None
    cures = None
    scale = 1.0
    remedy = ""
    if findings or has_faults:
        if best is not None:
            _, cures, scale = best
        elif findings:
            remedy = _remedy_without_cure(labels, scene, is_only_distance)
    if is_one_pose:
        findings.append(
            f"all {len(labels)} images have the same pose, so they do not show the scene from several sides"
        )
        if cures is None:
            remedy = remedy or "Check that each label is the camera of its own image."
    return Diagnosis(findings=tuple(findings), cures=cures, scale=scale, remedy=remedy)


def _suits_passing_part(labels: np.ndarray, cures: tuple[str, ...], scene: Scene) -> bool:
    """Return False if cures spoil those cameras [n, 25] of a set that look at the scene without the cures.

    The set then mixes two conventions. Nearly frontal cameras look at the scene in several conventions, but
    their optical axes pass nearest to the centre in the right one.
    """
    misses_scene = _misses_scene(_geometry(labels, scene), scene)
    if not misses_scene.any() or misses_scene.all():
        return True
    own_angle = _median_angle(labels[~misses_scene], scene)
    return (
        _median_angle(apply_cures(labels[~misses_scene], cures), scene) < _SUSPICIOUS_RATIO * own_angle + 0.5
    )


def _remedy_without_cure(labels: np.ndarray, scene: Scene, is_only_distance: bool) -> str:
    """Return a sentence on cameras [n, 25] that no combination of cures makes right.

    Args: labels: [n, 25]; scene: scene; is_only_distance: True if only their distance is unusual.
    """
    if is_only_distance:
        return "Scale or shift the positions in the labels, so that every camera stands outside of the cube."
    misses_scene = _misses_scene(_geometry(labels, scene), scene)
    if misses_scene.any() and not misses_scene.all():
        for cures in (("opengl",), ("world2cam",), ("transpose",), ("world2cam", "opengl")):
            cured_labels = apply_cures(labels[misses_scene], cures)
            if not _misses_scene(_geometry(cured_labels, scene), scene).any():
                return (
                    f"Probably two conventions are mixed: in {misses_scene.sum()} or more of the labels,"
                    f" {' and '.join(CURES[name] for name in cures)}. Convert the parts of the set one by"
                    " one, or correct these labels in the file."
                )
    return (
        "Write cam2world with the camera axes x right, y down, z forward, in a world whose y axis points up"
        " and whose origin is the centre of the subject."
    )


def describe_remedy(diagnosis: Diagnosis, fixing: str) -> str:
    """Return sentences that name the likely mistake of a set and what to do, or an empty text.

    Args:
        diagnosis: of the set, with findings or faults.
        fixing: start of the sentence whose end are the flags of `data convert`, such as "Add". Empty: there
            is no such command, so only the mistake is named.
    """
    if diagnosis.cures is None:
        return diagnosis.remedy
    mistakes = [CURES[name] for name in diagnosis.cures]
    flags = [f"--fix-cameras={','.join(diagnosis.cures)}"] if diagnosis.cures else []
    if diagnosis.scale != 1:
        mistakes.append("the positions have another unit or scale")
        flags.append(f"--camera-scale={diagnosis.scale:g}")
    if not flags:
        return "The labels pass as they are: leave out --fix-cameras and --camera-scale."
    return f"Probably {', and '.join(mistakes)}." + (f" {fixing} {' '.join(flags)}." if fixing else "")


def describe_cameras(labels: np.ndarray, scene: Scene) -> str:
    """Return a line on the distance, the focal length and the direction of cameras [n, 25]."""
    geometry = _geometry(labels.astype(np.float64), scene)

    def spread(values: np.ndarray) -> str:
        """Return the median of numbers, with their range if they differ."""
        low_text, median_text, high_text = (f"{q:.2f}" for q in np.quantile(values, (0, 0.5, 1)))
        return median_text if low_text == high_text else f"{median_text} ({low_text} to {high_text})"

    return (
        f"Cameras: distance to {point_text(scene.pivot)} {spread(geometry.distances)}, focal length"
        f" {spread(geometry.focal)} image sizes, angle between the optical axis and the centre"
        f" {spread(geometry.angles)} degrees."
    )
