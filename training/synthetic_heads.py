"""Dataset of renders of synthetic heads: `synthetic:people64` and variants, which are rendered once into a
zip archive.

    synthetic:people<R>[@key=value[,key=value ...]]     keys: n, seed, yaw, pitch

R is the number of pixels per edge, n the number of images, seed the random seed, and yaw and pitch are
standard deviations in radians. The archive has EG3D's dataset format. Image i depends only on the seed, on i,
and on the options other than n. The cameras are similar to FFHQ's: radius 2.7, focal length 4.2647 image
sizes (18.83 degrees along the diagonal), pivot at the origin, and normally distributed yaw and pitch with a
frontal mean.

The images show intact heads, because a damaged scan looks the same from the front.

Shapes: n is the number of images, R of pixels per edge, S and A are the numbers of shape and appearance
coordinates of a latent.
"""

import functools
import hashlib
import json
import math
import os
import re
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from training.dataset import in_order
from training.dataset_convert import ZIP_DATE, png
from training.heads import people
from training.input_paths import SYNTHETIC_PREFIX
from training.progress import tqdm
from training.rendering.cameras import (
    FFHQ_FOCAL,
    FFHQ_RADIUS,
    camera_position,
    intrinsics_matrix,
    look_at,
    pack_label,
)

FORMAT_VERSION = 1  # part of the file name's hash; it has to be raised if the same options give other files

_GROUP = 32  # number of images that a worker renders in one task
_MAX_PROCESSES = 16  # largest number of worker processes


@dataclass(frozen=True, kw_only=True)
class PeopleOptions:
    """Options of a set of synthetic heads, which determine its images and its file name."""

    resolution: int = 64  # pixels per edge, a multiple of 8 from 8 to 1024
    n: int = 4000  # number of images, >= 1
    seed: int = 0  # random seed, >= 0
    yaw: float = 0.5  # standard deviation of the yaw, radians, in [0, pi]
    # Standard deviation of the pitch parameter of `camera_position`, radians, in [0, pi / 2].
    pitch: float = 0.22

    def __post_init__(self):
        if self.resolution % 8 or not 8 <= self.resolution <= 1024:
            raise ValueError(
                f"synthetic people: resolution must be a multiple of 8 from 8 to 1024, got {self.resolution}."
                " Change the number in synthetic:people<R>."
            )
        if self.n < 1 or self.seed < 0:
            raise ValueError(
                f"synthetic people: n must be >= 1 and seed >= 0, got n={self.n} and seed={self.seed}. Change"
                " these values in synthetic:people<R>@n=...,seed=...."
            )
        if not (0 <= self.yaw <= math.pi and 0 <= self.pitch <= math.pi / 2):
            raise ValueError(
                "synthetic people: yaw must be in [0, 3.14] and pitch in [0, 1.57] radians, got"
                f" yaw={self.yaw} and pitch={self.pitch}. Change these values in"
                " synthetic:people<R>@yaw=...,pitch=...."
            )

    def stem(self) -> str:
        """Return the file name of the set without its suffix.

        The file name contains a hash of all options and of the versions of the format and of the head basis.
        """
        hashed_text = json.dumps([FORMAT_VERSION, people.VERSION, asdict(self)], sort_keys=True)
        return f"people{self.resolution}-n{self.n}-{hashlib.sha256(hashed_text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True)
class HeadsTruth:
    """Ground truth of the images of a set, float32."""

    shape: np.ndarray  # coordinates of identity and hair [n, S]
    appearance: np.ndarray  # coordinates of appearance and scan quality [n, A]
    labels: np.ndarray  # camera labels [n, 25]
    # Distance from the camera along the ray through each pixel's centre [n, R, R], world units;
    # inf: background.
    depth: np.ndarray


def parse_name(name: str) -> PeopleOptions:
    """Parse a dataset name such as `synthetic:people64@n=500,seed=3`.

    Raises: ValueError if the name does not have this form, or if a value is out of range.
    """
    name_match = re.fullmatch(r"synthetic:people(\d+)(?:@(.+))?", name)
    if name_match is None:
        raise ValueError(
            f"dataset name: expected 'synthetic:people<R>[@key=value,...]', got {name!r}. Write, for example,"
            " synthetic:people64@n=500."
        )
    value_types = {"n": int, "seed": int, "yaw": float, "pitch": float}
    value_by_key = {}
    # name_match[2] is the text after the first @, or None. Options may be separated by commas or by further
    # @.
    for assignment in re.split("[,@]", name_match[2]) if name_match[2] else []:
        option_key, _, value_text = assignment.partition("=")
        if option_key not in value_types:
            raise ValueError(
                f"dataset name: {option_key!r} in {name!r} is no option. Use key=value with one of the keys"
                f" {', '.join(value_types)}."
            )
        try:
            value_by_key[option_key] = value_types[option_key](value_text)
        except ValueError as error:
            raise ValueError(
                f"dataset name: the value of {option_key} in {name!r} must be of the type"
                f" {value_types[option_key].__name__}, got {value_text!r}. Write a number after"
                f" {option_key}=."
            ) from error
    return PeopleOptions(resolution=int(name_match[1]), **value_by_key)


def head_parameters(options: PeopleOptions, indices: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the latents and cameras of some images, float32, without rendering them.

    Args: options: options of the set; indices: indices of n images.
    Returns: shape [n, S] and appearance [n, A], which together are latents of unit root mean square, and
        camera labels [n, 25].
    """
    latents = []
    yaws_and_pitches = []
    for i in indices:
        # Each image has its own random generator, so that images can be rendered in any order.
        rng = np.random.default_rng([options.seed, i])
        latents.append(
            people.normalise_latents(rng.standard_normal((1, people.LATENT)))[0].astype(np.float32)
        )
        yaws_and_pitches.append(math.pi / 2 + rng.standard_normal(2) * [options.yaw, options.pitch])
    # The poses are computed in float64 and rounded once.
    yaws, pitches = torch.from_numpy(np.array(yaws_and_pitches)).split(1, dim=1)  # [n, 1] float64
    poses = look_at(camera_position(yaws, pitches, FFHQ_RADIUS), torch.zeros(3, dtype=torch.float64)).float()
    shape_coordinates, appearance_coordinates = np.split(np.stack(latents), [people.SHAPE], axis=1)
    return shape_coordinates, appearance_coordinates, pack_label(poses, intrinsics_matrix(FFHQ_FOCAL)).numpy()


def _render_group(options: PeopleOptions, group_index: int) -> tuple[list[bytes], np.ndarray]:
    """Render a group of images, in a worker process.

    Args:
        options: options of the set.
        group_index: index of the group of `_GROUP` images. The last group may be smaller.
    Returns: the PNG bytes of each image, and the depth offsets [images, R, R] as float16. An offset is the
        depth minus the camera's radius, which float16 stores with a smaller error than the depth.
    """
    shape_coordinates, appearance_coordinates, camera_labels = head_parameters(
        options, range(group_index * _GROUP, min((group_index + 1) * _GROUP, options.n))
    )
    intact_heads = people.heads_from_latents(
        np.concatenate([shape_coordinates, appearance_coordinates], axis=1)
    )
    poses = camera_labels[:, :16].reshape(-1, 4, 4)
    renders = [
        people.render_head(intact_head, pose, FFHQ_FOCAL, options.resolution)
        for intact_head, pose in zip(intact_heads, poses, strict=True)
    ]
    images = np.stack([image for image, _ in renders])  # [images, R, R, 3] in 0..1
    depths = np.stack([depth for _, depth in renders])  # [images, R, R]
    pixels = np.round(images * 255).astype(np.uint8)
    encoded_images = [png(PIL.Image.fromarray(image_pixels)) for image_pixels in pixels]
    return encoded_images, (depths - FFHQ_RADIUS).astype(np.float16)


def write_heads(
    options: PeopleOptions, path: Path, processes: int | None = None, progress: bool = True
) -> None:
    """Render a set into a zip archive, and write its ground truth to a file with the suffix .npz.

    Both files are written under temporary names, and renamed when they are complete, the archive last. An
    existing archive is therefore complete.

    Args:
        options: options of the set.
        path: path of the archive, which ends in .zip.
        processes: number of worker processes; None: one for each available core. The files do not depend
            on this number.
        progress: True: show a progress bar.
    """
    core_count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    group_count = math.ceil(options.n / _GROUP)
    processes = min(processes or core_count, _MAX_PROCESSES)
    death_message = "synthetic heads: a worker process was killed. Free memory, and start the command again."
    rendered_groups = in_order(
        functools.partial(_render_group, options), range(group_count), processes, death_message
    )
    shape_coordinates, appearance_coordinates, camera_labels = head_parameters(options, range(options.n))
    image_names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(options.n)]
    all_depth_offsets = np.empty((options.n, options.resolution, options.resolution), np.float16)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The names contain the process id, so that two processes can render the same set at the same time.
    temporary_paths = {
        suffix: path.with_name(f".{path.stem}.{os.getpid()}{suffix}") for suffix in (".zip", ".npz")
    }
    try:
        with (
            zipfile.ZipFile(temporary_paths[".zip"], "w", zipfile.ZIP_STORED) as archive,
            tqdm(
                total=options.n, desc=f"rendering {path.name}", unit="head", disable=not progress
            ) as progress_bar,
        ):
            for group_index, (encoded_images, depth_offsets) in enumerate(rendered_groups):
                group_rows = slice(group_index * _GROUP, group_index * _GROUP + len(encoded_images))
                all_depth_offsets[group_rows] = depth_offsets
                for image_name, encoded_image in zip(image_names[group_rows], encoded_images, strict=True):
                    # With a constant date, the same options give the same bytes.
                    archive.writestr(zipfile.ZipInfo(image_name, ZIP_DATE), encoded_image)
                progress_bar.update(len(encoded_images))
            label_rows = [
                [image_name, camera_label.tolist()]
                for image_name, camera_label in zip(image_names, camera_labels, strict=True)
            ]
            archive.writestr(zipfile.ZipInfo("dataset.json", ZIP_DATE), json.dumps({"labels": label_rows}))
        np.savez(
            temporary_paths[".npz"],
            shape=shape_coordinates,
            appearance=appearance_coordinates,
            labels=camera_labels,
            depth_offset=all_depth_offsets,
        )
        # The archive is renamed last, because an existing archive has to be complete, with its ground truth.
        os.replace(temporary_paths[".npz"], path.with_suffix(".npz"))
        os.replace(temporary_paths[".zip"], path)
    finally:
        for temporary_path in temporary_paths.values():
            temporary_path.unlink(missing_ok=True)


def resolve_dataset(
    name: str | Path, cache_dir: Path | None = None, processes: int | None = None, progress: bool = True
) -> Path:
    """Return the path of a dataset. A synthetic set is rendered if it is not in the cache.

    Args:
        name: name `synthetic:...` of a synthetic set, or the path of another set, which is
            returned unchanged.
        cache_dir: folder of rendered sets; None: $EG3D_RLHF_CACHE, or ~/.cache/eg3d-rlhf if it is not set.
        processes: number of worker processes, see `write_heads`.
        progress: True: show a progress bar.
    Raises: ValueError for an invalid synthetic name; OSError if the cache cannot be written.
    """
    if not str(name).startswith(SYNTHETIC_PREFIX):
        return Path(name)
    people_options = parse_name(str(name))
    archive_path = (
        Path(cache_dir or os.environ.get("EG3D_RLHF_CACHE") or Path.home() / ".cache" / "eg3d-rlhf")
        / f"{people_options.stem()}.zip"
    )
    # If one of the two files is missing, both are written again.
    if not (archive_path.exists() and archive_path.with_suffix(".npz").exists()):
        try:
            write_heads(people_options, archive_path, processes, progress)
        except OSError as error:
            raise OSError(
                f"{archive_path}: the rendered images cannot be written: {error.strerror or error}. Free"
                " space, or set the environment variable EG3D_RLHF_CACHE to another folder."
            ) from error
    return archive_path


def load_truth(path: Path) -> HeadsTruth:
    """Read the ground truth of a synthetic set.

    Args: path: path of the archive, as `resolve_dataset` returns it.
    Raises: ValueError if there is no .npz file in the same folder.
    """
    truth_path = Path(path).with_suffix(".npz")
    if not truth_path.exists():
        raise ValueError(
            f"load_truth: the file {truth_path} with the ground truth is missing. Only synthetic sets have"
            " such a file. Pass the name of the set (synthetic:people<R>@...), with which the set is rendered"
            " again."
        )
    with np.load(truth_path) as truth_arrays:
        depth = truth_arrays["depth_offset"].astype(np.float32) + FFHQ_RADIUS  # see `_render_group`
        return HeadsTruth(
            shape=truth_arrays["shape"],
            appearance=truth_arrays["appearance"],
            labels=truth_arrays["labels"],
            depth=depth,
        )
