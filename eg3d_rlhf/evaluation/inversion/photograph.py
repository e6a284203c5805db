"""Crop and camera of a photograph that is the target of an inversion, if the user gave no camera.

The face is found, and the photograph is cropped as EG3D's training images are (`eg3d_rlhf.photographs`). An
image that has the size of the generator's images is a crop already, so it is never cropped again: only its
camera is estimated. Where no camera can be estimated, such an image has the frontal camera, as every image
without --camera had before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from eg3d_rlhf.generators import Generator
from eg3d_rlhf.generators import camera as camera_of
from eg3d_rlhf.photographs.face_geometry import CropFrame, angles_of
from eg3d_rlhf.photographs.pose_sheet import draw_axes
from eg3d_rlhf.photographs.poses import PhotoPoses, open_photograph, poses_of_photograph
from training.dataset_convert import png
from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS
from training.storage import write_atomic

# Largest difference of the focal length and of the distance from those of EG3D's labels of faces, relative.
_CAMERA_TOLERANCE = 0.01
# A crop lies as in EG3D's training images if its corners are at most this far from those of the estimated
# crop, in widths of the crop. The estimates themselves err by 0.016 (mean corner, 8.2 of 512 pixels).
_CROP_TOLERANCE = 0.05
CROP_FILE = "photograph-crop.png"  # the target, in the run folder
AXES_FILE = "photograph-axes.png"  # the target with the axes of the head, as its camera draws them


@dataclass(frozen=True, kw_only=True)
class TargetPhoto:
    """Camera of a target, and its crop."""

    label: tuple[float, ...]  # 25 numbers
    frame: CropFrame | None  # square of the photograph; None: the image is the target as it is
    notes: tuple[str, ...] = ()  # sentences for the user

    def record(self) -> dict[str, Any]:
        """Return the JSON values from which `from_record` makes an equal object, without the notes."""
        frame = self.frame
        return {
            "label": list(self.label),
            "frame": None if frame is None else [*frame.centre, frame.width, frame.angle],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "TargetPhoto":
        """Make the object of an earlier call from its record in training_options.json."""
        values = record["frame"]
        frame = None
        if values is not None:
            frame = CropFrame(centre=(values[0], values[1]), width=values[2], angle=values[3])
        return cls(label=tuple(record["label"]), frame=frame)

    def camera(self, generator: Generator) -> torch.Tensor:
        """Return the camera label [1, 25] on the device of the generator."""
        # `to` takes over both the dtype and the device of the generator's label.
        return torch.tensor([self.label]).to(camera_of(generator))


def has_face_cameras(generator: Generator) -> bool:
    """Return True if a generator's cameras are those of EG3D's faces: focal length 4.26, distance 2.7."""
    label = camera_of(generator)[0]
    focal = float(label[16])  # in sides of the image
    # Numbers 3, 7 and 11 are the translation of cam2world, whose rows follow each other.
    distance = float(torch.linalg.vector_norm(label[3:12:4]))
    return (
        abs(focal / FFHQ_FOCAL - 1) < _CAMERA_TOLERANCE
        and abs(distance / FFHQ_RADIUS - 1) < _CAMERA_TOLERANCE
    )


def find_target(generator: Generator, image_path: Path) -> tuple[TargetPhoto | None, tuple[str, ...]]:
    """Estimate the crop and the camera of an image file.

    Args:
        generator: generator, whose images have R pixels per edge.
        image_path: image file.
    Returns: the crop and the camera, or None if the image is taken as it is with the frontal camera; and
        sentences for the user.
    Raises: ValueError for a file that cannot be read, and for a photograph, that is an image of another size,
        without a usable face, or for a generator whose cameras are not those of EG3D's faces.
    """
    resolution = generator.img_resolution
    photograph = open_photograph(image_path, str(image_path))
    has_size = photograph.size == (resolution, resolution)
    size_text = f"{image_path} has {photograph.width} x {photograph.height} pixels"
    remedy = f"Crop it to {resolution} x {resolution} pixels as the generator's images, and add --camera."
    if not has_face_cameras(generator):
        if has_size:
            return None, ()
        raise ValueError(
            f"{size_text}, and the cameras of this generator are not those of EG3D's faces, for which crops"
            f" are found. {remedy}"
        )
    photo = poses_of_photograph(image_path, photograph)
    # Without a face, the photograph has the reason, and there is no pose at 0.
    reason = photo.reason or photo.poses[0].reason
    # An image of this size needs no crop, so it is used although no usable face was found.
    if reason and has_size:
        return None, (
            f"The image has the generator's size and is used as it is, with the frontal camera ({reason})."
            " Add --camera if the head is turned.",
        )
    if reason:
        raise ValueError(f"{size_text}, and cannot be cropped to its face: {reason}. {remedy}")
    target = _sized_target(photo, resolution) if has_size else _cropped_target(photo)
    return target, target.notes


def _angle_text(label: np.ndarray) -> str:
    """Describe the angles of a camera label [25]."""
    yaw, pitch, roll = angles_of(label)
    return f"yaw {yaw:.0f}, pitch {pitch:.0f}, roll {roll:.0f} degrees"


def _sized_target(photo: PhotoPoses, resolution: int) -> TargetPhoto:
    """Return the target for an image of the generator's size, which is not cropped again.

    Args: photo: its faces; resolution: pixels per edge R of the image.
    """
    pose = photo.poses[0]
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    # Offsets of the corners of the estimated crop from those of the image, in sides of the image.
    offsets = pose.frame.to_photograph(corners, 1) / resolution - corners
    shift = float(np.linalg.norm(offsets, axis=1).max())
    notes = [
        f"The image has the generator's size and is used as it is. Its camera is estimated:"
        f" {_angle_text(pose.label)}, with a mean error of about 4 degrees.",
    ]
    if shift > _CROP_TOLERANCE:
        notes.append(
            f"Warning: the face does not lie as in EG3D's crops of FFHQ, whose corners are up to"
            f" {shift * resolution:.0f} pixels away. If the generator was trained on such crops, crop the"
            " image with data poses, and pass the crop."
        )
    notes += [f"Warning: {warning}." for warning in photo.warnings]
    return TargetPhoto(label=tuple(pose.label.tolist()), frame=None, notes=tuple(notes))


def _cropped_target(photo: PhotoPoses) -> TargetPhoto:
    """Return the target for a photograph, which is cropped as EG3D's images are."""
    pose = photo.poses[0]
    notes = [
        f"The face in the photograph was cropped ({pose.frame.width:.0f} pixels wide, {CROP_FILE}), and its"
        f" camera is estimated: {_angle_text(pose.label)}, with a mean error of about 4 degrees. Check"
        f" {AXES_FILE}; --camera with a crop replaces both.",
        *(f"Warning: {warning}." for warning in (*photo.warnings, *pose.warnings)),
    ]
    return TargetPhoto(label=tuple(pose.label.tolist()), frame=pose.frame, notes=tuple(notes))


def write_target(folder: Path, target: TargetPhoto, pixels: np.ndarray) -> None:
    """Write the target as the inversion sees it, and once more with the axes of the head.

    Args:
        folder: run folder.
        target: camera of the target.
        pixels: the target, uint8 [R, R, 3].
    """
    image = PIL.Image.fromarray(pixels)
    write_atomic(folder / CROP_FILE, png(image))
    write_atomic(folder / AXES_FILE, png(PIL.Image.fromarray(draw_axes(image, np.array(target.label)))))
