"""Crops and cameras of the faces in photographs: `poses_of`, for lists of photographs in Python.

    from eg3d_rlhf import poses_of

    (photo,) = poses_of(["portrait.jpg"])
    pose = photo.poses[0]                   # photo.reason says why, if there is none
    pose.label                              # [25], EG3D's camera label
    pose.crop(photo.image())                # uint8 [512, 512, 3], EG3D's crop

Two small networks find the faces and their landmarks (`eg3d_rlhf.models.face`); the crop and the camera
follow from the landmarks (`face_geometry`). The labels have a mean error of about 4 degrees and are not equal
to the official ones; see docs/guides/photographs.md for what was measured. Neither the score of a face nor
the error of a fit predicts the error of its label, so no confidence is returned.
"""

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from eg3d_rlhf.photographs.crops import cut_crop, outside_share
from eg3d_rlhf.photographs.face_geometry import (
    CROP_SIZE,
    CropFrame,
    angles_of,
    camera_label,
    face_rotation,
    fit_crop,
    five_points,
    roll_of,
)
from eg3d_rlhf.photographs.settings import parse_face_choice
from training.image_reading import read_image

if TYPE_CHECKING:
    from eg3d_rlhf.models.face.finder import Face, FaceFinder

# Limits of usable faces. The yaw is that of the head against the camera.
WARN_YAW = 45.0  # degrees
MAX_YAW = 60.0  # degrees; the landmarks of profiles are guesses
MAX_OUTSIDE = 0.15  # largest share of the crop outside of the photograph
WARN_WIDTH = 256.0  # pixels of the photograph; narrower crops are enlarged more than twofold
MIN_WIDTH = 64.0  # pixels of the photograph

ImageSource = str | Path | np.ndarray | PIL.Image.Image


@dataclass(frozen=True, kw_only=True, eq=False)
class FacePose:
    """Crop and camera of one face in a photograph."""

    label: np.ndarray  # float64 [25], EG3D's camera label of the crop
    frame: CropFrame  # square of the photograph that the crop shows
    outside: float  # share of the crop outside of the photograph, in 0..1
    quarter_turns: int  # clockwise quarter turns of the face in the photograph, 0 to 3; 0 within 45 degrees
    number: int  # 1 for the largest face of the photograph
    reason: str = ""  # why the face is not good enough for a training set; "" if it is
    warnings: tuple[str, ...] = ()

    @property
    def angles(self) -> tuple[float, float, float]:
        """Yaw, pitch and roll in degrees, see `face_geometry.angles_of`."""
        return angles_of(self.label)

    def crop(self, photograph: PIL.Image.Image, size: int = CROP_SIZE) -> np.ndarray:
        """Cut the crop out of the photograph, uint8 [size, size, 3], reflected outside of it.

        Raises: ValueError if no part of the crop lies in the photograph.
        """
        return cut_crop(photograph, self.frame, size)


@dataclass(frozen=True, kw_only=True, eq=False)
class PhotoPoses:
    """Faces of one photograph."""

    source: ImageSource = field(repr=False)
    faces: int = 0  # number of faces that were found
    poses: tuple[FacePose, ...] = ()  # chosen faces, the largest one first
    reason: str = ""  # why there is no pose; "" if there is one
    warnings: tuple[str, ...] = ()

    def image(self) -> PIL.Image.Image:
        """Return the upright photograph in RGB, in whose pixels the crops are stated."""
        return open_photograph(self.source)


def open_photograph(source: ImageSource, name: str = "") -> PIL.Image.Image:
    """Read a photograph as people see it: upright, 8 bits, RGB, transparent parts on white.

    Args:
        source: path of an image file; or pixels, uint8 [H, W, 3] or [H, W]; or an image of Pillow.
        name: description of the file, with which messages begin; "": its path.
    Raises: ValueError for a file that cannot be read, and for an array of another kind.
    """
    if isinstance(source, PIL.Image.Image):
        return source.convert("RGB")
    if isinstance(source, np.ndarray):
        # A fourth channel may be opacity or CMYK, so the user has to convert it.
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.shape[2:] not in ((), (3,)):
            raise ValueError(
                f"photograph: expected uint8 pixels of the shape [H, W, 3] or [H, W], got {source.dtype}"
                f" {list(source.shape)}. Convert the array."
            )
        return PIL.Image.fromarray(source).convert("RGB")
    return read_image(Path(source), name or str(source)).convert("RGB")


@functools.cache
def _finder(device: str) -> "FaceFinder":
    """Load the networks once in each process."""
    from eg3d_rlhf.models.face.finder import load_face_finder

    return load_face_finder(device)


@functools.cache
def _canonical() -> np.ndarray:
    """Return the landmarks [L, 3] of the canonical face in cm."""
    from eg3d_rlhf.models.face.finder import canonical_face

    return canonical_face()


def pose_of_face(
    face: "Face", number: int, photograph_size: tuple[int, int], keep_roll: bool = False
) -> FacePose:
    """Compute the crop and the camera of a face.

    Args:
        face: face with its landmarks.
        number: number of the face, 1 for the largest one.
        photograph_size: (width, height) of the photograph in pixels.
        keep_roll: see `poses_of`.
    """
    frame = fit_crop(face.landmarks, _canonical(), keep_roll)
    # Landmarks are those of the crop, since the camera belongs to the crop and not to the photograph.
    label = camera_label(face_rotation(frame.to_crop(face.landmarks), _canonical()))
    outside = outside_share(frame, photograph_size)
    # Not the number of turns that the finder tried: it finds a face at its side in several of them.
    roll = roll_of(five_points(face.landmarks[:, :2]))
    quarter_turns = round(roll / (math.pi / 2)) % 4
    yaw = abs(angles_of(label)[0])
    warnings = []
    if quarter_turns:
        warnings.append(f"the face is turned by {90 * quarter_turns} degrees in the photograph")
    if WARN_YAW < yaw <= MAX_YAW:
        warnings.append(f"nearly a profile: the yaw is {yaw:.0f} degrees, and labels above 45 are worse")
    if MIN_WIDTH <= frame.width < WARN_WIDTH:
        warnings.append(f"the crop has only {frame.width:.0f} pixels, and is enlarged to {CROP_SIZE}")
    reason = ""
    # One reason is enough to leave the face out, so only the first one is stated.
    if yaw > MAX_YAW:
        reason = f"profile: the yaw is {yaw:.0f} degrees, but at most {MAX_YAW:.0f} are used"
    elif frame.width < MIN_WIDTH:
        reason = (
            f"the crop has only {frame.width:.0f} pixels, but at least {MIN_WIDTH:.0f} are needed; use a"
            " larger photograph"
        )
    elif outside > MAX_OUTSIDE:
        reason = (
            f"{100 * outside:.0f} % of the crop lie outside of the photograph, but at most"
            f" {100 * MAX_OUTSIDE:.0f} % are filled by reflection"
        )
    return FacePose(
        label=label,
        frame=frame,
        outside=outside,
        quarter_turns=quarter_turns,
        number=number,
        reason=reason,
        warnings=tuple(warnings),
    )


def poses_of_photograph(
    source: ImageSource,
    photograph: PIL.Image.Image,
    face: str = "largest",
    keep_roll: bool = False,
    device: str = "cpu",
) -> PhotoPoses:
    """Find the faces of a photograph that has been read. See `poses_of` for the arguments."""
    choice = parse_face_choice(face)
    found_faces = _finder(device).find(np.array(photograph))
    count = len(found_faces)
    if not count:
        return PhotoPoses(source=source, reason="no face was found; remove the photograph, or crop it nearer")
    if isinstance(choice, int) and choice > count:
        return PhotoPoses(
            source=source,
            faces=count,
            reason=f"face {choice} was asked for, but there are only {count}; choose --face=largest",
        )
    # Faces are counted from 1 in the order of `find`, the widest first.
    numbers = range(1, count + 1) if choice == "all" else [1 if choice == "largest" else int(choice)]
    warnings: tuple[str, ...] = ()
    if choice == "largest" and count > 1:
        warnings = (f"{count} faces; the largest one is used (--face=all or --face=NUMBER for others)",)
    return PhotoPoses(
        source=source,
        faces=count,
        poses=tuple(
            pose_of_face(found_faces[number - 1], number, photograph.size, keep_roll) for number in numbers
        ),
        warnings=warnings,
    )


def poses_of(
    images: Iterable[ImageSource], face: str | int = "largest", keep_roll: bool = False, device: str = "cpu"
) -> list[PhotoPoses]:
    """Find EG3D's crop and camera of the faces in photographs.

    Args:
        images: paths of image files, pixels uint8 [H, W, 3] or [H, W], or images of Pillow.
        face: "largest", "all", or the number of the face in the order of their sizes, 1 for the largest.
        keep_roll: False: crops are turned so that the face is upright, as in EG3D's training sets. True:
            crops are parallel to the photograph, and the camera has the roll.
        device: device of the networks, such as "cpu" or "cuda".
    Returns: one entry for each photograph, in the same order. A photograph that cannot be read or shows no
    face has
        no poses, but a reason.
    Raises: ValueError for another value of `face`.

    >>> grey_wall = np.full((480, 640, 3), 128, np.uint8)
    >>> photo = poses_of([grey_wall])[0]
    >>> photo.faces, photo.poses
    (0, ())
    """
    # A wrong value raises before the first photograph is read.
    parse_face_choice(str(face))
    results = []
    for source in images:
        # A reason is one line, but names of files may contain line breaks.
        name = re.sub(r"\s+", " ", str(source)) if isinstance(source, str | Path) else "photograph"
        try:
            photograph = open_photograph(source, name)
        except ValueError as error:
            # One photograph must not stop the others.
            results.append(PhotoPoses(source=source, reason=str(error)))
            continue
        results.append(poses_of_photograph(source, photograph, str(face), keep_roll, device))
    return results
