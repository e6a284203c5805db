"""Dataset of rendered heads of people: `synthetic:people64` and variants, rendered once into a zip.

    synthetic:people<R>[@key=value[,key=value ...]]     keys: n, seed, yaw, pitch

The zip is in EG3D's dataset format. Image i of seed s depends on (s, i) and on the options. It depends
neither on n, nor on the number of processes, nor on the load of the machine. Cameras follow FFHQ: radius 2.7,
focal length 4.2647 image sizes (18.83 degrees along the diagonal), pivot at the origin, yaw and pitch
normally distributed about frontal.

The images show intact heads: from the front a damaged scan looks the same.

Shape letters: n images, R resolution, S shape and A appearance coordinates of a latent.
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
from training.progress import tqdm
from training.rendering.cameras import (
    FFHQ_FOCAL,
    FFHQ_RADIUS,
    camera_position,
    intrinsics_matrix,
    look_at,
    pack_label,
)

PREFIX = "synthetic:"
FORMAT_VERSION = 1  # part of the file name; raise it whenever the same options would give other files

_GROUP = 32  # images rendered together
_MAX_PROCESSES = 16


@dataclass(frozen=True, kw_only=True)
class PeopleOptions:
    """Options that identify a set of rendered people. They are part of its file name."""

    resolution: int = 64  # pixels, multiple of 8, from 8 to 1024
    n: int = 4000  # images
    seed: int = 0  # >= 0
    yaw: float = 0.5  # standard deviation about frontal, radians
    pitch: float = 0.22  # standard deviation about level, radians of the sampler's pitch parameter

    def __post_init__(self):
        if self.resolution % 8 or not 8 <= self.resolution <= 1024:
            raise ValueError(
                f"synthetic people: resolution must be a multiple of 8 from 8 to 1024, got {self.resolution}."
                " Change the number in synthetic:people<R>."
            )
        if self.n < 1 or self.seed < 0:
            raise ValueError(
                f"synthetic people: n must be >= 1 and seed >= 0, got n={self.n}, seed={self.seed}. Change"
                " the values in the dataset's name."
            )
        if not (0 <= self.yaw <= math.pi and 0 <= self.pitch <= math.pi / 2):
            raise ValueError(
                f"synthetic people: yaw must lie in [0, 3.14], pitch in [0, 1.57] radians, got {self.yaw} and"
                f" {self.pitch}. Change the values in the dataset's name."
            )

    def stem(self) -> str:
        """Return the file name without its extension.

        The hash in it covers every option and the versions of the format and of the basis.
        """
        identity = json.dumps([FORMAT_VERSION, people.VERSION, asdict(self)], sort_keys=True)
        return f"people{self.resolution}-n{self.n}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True)
class HeadsTruth:
    """Ground truth of each image of a set."""

    shape: np.ndarray  # [n, S] float32, coordinates of identity and hair
    appearance: np.ndarray  # [n, A] float32, coordinates of appearance and scan quality
    labels: np.ndarray  # [n, 25] float32 camera labels
    # [n, R, R] float32 distance along the unit ray through the pixel's centre, inf on the background
    depth: np.ndarray


def parse_name(name: str) -> PeopleOptions:
    """Return the options in a dataset name such as `synthetic:people64@n=500,seed=3`.

    Raises: ValueError if the name does not follow the grammar or a value is out of range.
    """
    match = re.fullmatch(r"synthetic:people(\d+)(?:@(.+))?", name)
    if match is None:
        raise ValueError(
            f"dataset name: expected 'synthetic:people<R>[@key=value,...]', got {name!r}. Use"
            " synthetic:people64."
        )
    kinds = {"n": int, "seed": int, "yaw": float, "pitch": float}
    values = {}
    # Options may be separated by commas or by further @.
    for item in re.split("[,@]", match[2]) if match[2] else []:
        key, _, text = item.partition("=")
        if key not in kinds:
            raise ValueError(
                f"dataset name: expected one of the keys {', '.join(kinds)} in {name!r}, got {key!r}. Write"
                " key=value with one of them."
            )
        try:
            values[key] = kinds[key](text)
        except ValueError as error:
            raise ValueError(
                f"dataset name: expected {key}=<{kinds[key].__name__}> in {name!r}, got {text!r}. Correct the"
                " value."
            ) from error
    return PeopleOptions(resolution=int(match[1]), **values)


def head_parameters(options: PeopleOptions, indices: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return shape [n, S], appearance [n, A] and camera labels [n, 25] of the images `indices`, as float32.

    Nothing is rendered. Shape and appearance of an image are the coordinates of a latent of unit root mean
    square.
    """
    latents = []
    angles = []
    for i in indices:
        # A generator per image: its values depend on (seed, i) only, so groups can be rendered in any order.
        rng = np.random.default_rng([options.seed, i])
        latents.append(people.scaled(rng.standard_normal((1, people.LATENT)))[0].astype(np.float32))
        angles.append(math.pi / 2 + rng.standard_normal(2) * [options.yaw, options.pitch])
    # float64 until the label is complete, then rounded once.
    yaws, pitches = torch.from_numpy(np.array(angles)).split(1, dim=1)  # [n, 1] float64
    poses = look_at(camera_position(yaws, pitches, FFHQ_RADIUS), torch.zeros(3, dtype=torch.float64)).float()
    shape, appearance = np.split(np.stack(latents), [people.SHAPE], axis=1)
    return shape, appearance, pack_label(poses, intrinsics_matrix(FFHQ_FOCAL)).numpy()


def _render_group(options: PeopleOptions, group: int) -> tuple[list[bytes], np.ndarray]:
    """Return PNG bytes and depth offsets [32, R, R] of one group of images.

    An offset is the depth less the camera's radius, which float16 stores with a smaller error than the depth.
    """
    shape, appearance, labels = head_parameters(
        options, range(group * _GROUP, min((group + 1) * _GROUP, options.n))
    )
    heads = people.named_people(np.concatenate([shape, appearance], axis=1))
    poses = labels[:, :16].reshape(-1, 4, 4)
    rendered = [
        people.picture(head, pose, FFHQ_FOCAL, options.resolution)
        for head, pose in zip(heads, poses, strict=True)
    ]
    images, depths = (np.stack(column) for column in zip(*rendered, strict=True))
    pixels = np.round(images * 255).astype(np.uint8)  # [32, R, R, 3]
    return [png(PIL.Image.fromarray(p)) for p in pixels], (depths - FFHQ_RADIUS).astype(np.float16)


def write_heads(
    options: PeopleOptions, path: Path, processes: int | None = None, progress: bool = True
) -> None:
    """Render a set into `path` (zip, EG3D's format) and its ground truth into `path` with suffix .npz.

    Both are written under temporary names and renamed when complete, the zip last. A zip that exists is
    therefore complete.

    Args:
        options: identity of the set.
        path: target, ends in .zip.
        processes: number of worker processes; None: one per available core. The bytes do not depend on it.
        progress: show a progress bar with the remaining time.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = math.ceil(options.n / _GROUP)  # the last group may be smaller
    processes = min(processes or available, _MAX_PROCESSES)
    killed = "synthetic heads: a worker process was killed. Free memory and start again."
    groups = in_order(functools.partial(_render_group, options), range(count), processes, killed)
    shape, appearance, labels = head_parameters(options, range(options.n))
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(options.n)]
    depth = np.empty((options.n, options.resolution, options.resolution), np.float16)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, with the process id: two processes that render the same set do not disturb each other.
    parts = {suffix: path.with_name(f".{path.stem}.{os.getpid()}{suffix}") for suffix in (".zip", ".npz")}
    try:
        with (
            zipfile.ZipFile(parts[".zip"], "w", zipfile.ZIP_STORED) as archive,
            tqdm(total=options.n, desc=f"rendering {path.name}", unit="head", disable=not progress) as bar,
        ):
            for group, (images, offsets) in enumerate(groups):
                places = slice(group * _GROUP, group * _GROUP + len(images))
                depth[places] = offsets
                for name, image in zip(names[places], images, strict=True):
                    # A constant date: the same options give the same bytes.
                    archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), image)
                bar.update(len(images))
            rows = [[name, label.tolist()] for name, label in zip(names, labels, strict=True)]
            archive.writestr(zipfile.ZipInfo("dataset.json", ZIP_DATE), json.dumps({"labels": rows}))
        np.savez(parts[".npz"], shape=shape, appearance=appearance, labels=labels, depth_offset=depth)
        # The order matters: `resolve_dataset` takes an existing zip as complete.
        os.replace(parts[".npz"], path.with_suffix(".npz"))
        os.replace(parts[".zip"], path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def resolve_dataset(
    name: str | Path, cache_dir: Path | None = None, processes: int | None = None, progress: bool = True
) -> Path:
    """Return the path of a dataset.

    A folder or zip is returned as it is. A `synthetic:` name gives the cached zip, which is rendered first if
    it does not exist.

    Args:
        name: path or dataset name.
        cache_dir: folder; None: $EG3D_RLHF_CACHE, or ~/.cache/eg3d-rlhf.
        processes, progress: see `write_heads`.
    Raises: ValueError if a synthetic name does not follow the grammar; OSError if the cache cannot be
        written.
    """
    if not str(name).startswith(PREFIX):
        return Path(name)
    options = parse_name(str(name))
    path = (
        Path(cache_dir or os.environ.get("EG3D_RLHF_CACHE") or Path.home() / ".cache" / "eg3d-rlhf")
        / f"{options.stem()}.zip"
    )
    # A user may have deleted one of the two files; both are then rendered again.
    if not (path.exists() and path.with_suffix(".npz").exists()):
        try:
            write_heads(options, path, processes, progress)
        except OSError as error:
            remedy = "Make room, or set EG3D_RLHF_CACHE to another folder."
            raise OSError(
                f"{path}: expected to write the rendered images, got: {error.strerror or error}. {remedy}"
            ) from error
    return path


def load_truth(path: Path) -> HeadsTruth:
    """Read parameters, labels and depth of a set, given the path that `resolve_dataset` returned.

    Raises: ValueError if there is no .npz beside the zip.
    """
    source = Path(path).with_suffix(".npz")
    if not source.exists():
        raise ValueError(
            f"load_truth: expected {source} beside the dataset, got none. Only synthetic sets have this file."
            " Delete the zip to render the set again."
        )
    with np.load(source) as data:
        depth = data["depth_offset"].astype(np.float32) + FFHQ_RADIUS  # see `_render_group`
        return HeadsTruth(
            shape=data["shape"], appearance=data["appearance"], labels=data["labels"], depth=depth
        )
