"""The procedural dataset of heads: `synthetic:heads64` and its relatives, rendered once into a zip in EG3D's dataset format.

    synthetic:heads<R>[@key=value[,key=value ...]]      keys: n, seed, background (white|flat), yaw, pitch
    synthetic:people<R>[@key=value[,key=value ...]]     heads of people, whole; the same keys, white background

Image i of seed s depends on (s, i) and the options alone, not on n, on the number of processes or on the machine's load. Cameras follow
FFHQ: radius 2.7, focal length 4.2647 image sizes (18.83 degrees along the diagonal), pivot at the origin, yaw and pitch normal about
frontal.

Shape letters: n images, R resolution, S shape and A appearance parameters.
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
from training.heads.family import draw_parameters
from training.heads.render import BACKGROUNDS, render_heads
from training.progress import tqdm
from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS, camera_position, intrinsics_matrix, look_at, pack_label

PREFIX = "synthetic:"
FORMAT_VERSION = 1  # raise it whenever the same options would give other files

_GROUP = 32  # images rendered together; groups are fixed so that results do not depend on scheduling
_MAX_PROCESSES = 16


@dataclass(frozen=True, kw_only=True)
class HeadsOptions:
    """What identifies a synthetic set; part of its file name."""

    resolution: int = 64  # pixels, multiple of 8, 8 .. 1024
    n: int = 4000  # images
    seed: int = 0  # >= 0
    background: str = "white"  # white | flat
    yaw: float = 0.5  # standard deviation about frontal, radians
    pitch: float = 0.22  # standard deviation about level, radians of the sampler's pitch parameter

    def __post_init__(self):
        if self.resolution % 8 or not 8 <= self.resolution <= 1024:
            raise ValueError(f"synthetic heads: resolution must be a multiple of 8 from 8 to 1024, got {self.resolution}.")
        if self.n < 1 or self.seed < 0:
            raise ValueError(f"synthetic heads: n must be >= 1 and seed >= 0, got n={self.n}, seed={self.seed}.")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"synthetic heads: background must be one of {', '.join(BACKGROUNDS)}, got {self.background!r}.")
        if not (0 <= self.yaw <= math.pi and 0 <= self.pitch <= math.pi / 2):
            raise ValueError(f"synthetic heads: yaw must lie in [0, 3.14] and pitch in [0, 1.57] radians, got {self.yaw} and {self.pitch}.")

    def stem(self) -> str:
        """File name without its extension; the hash covers every option and the format's version."""
        identity = json.dumps([FORMAT_VERSION, asdict(self)], sort_keys=True)
        return f"heads{self.resolution}-n{self.n}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True)
class PeopleOptions(HeadsOptions):
    """What identifies a set of pictures of people."""

    def __post_init__(self):
        super().__post_init__()
        if self.background != "white":
            raise ValueError(f"synthetic people: background must be white, got {self.background!r}. Leave it out.")

    def stem(self) -> str:
        """As for the procedural heads; the basis counts, too."""
        identity = json.dumps([FORMAT_VERSION, "people", people.VERSION, asdict(self)], sort_keys=True)
        return f"people{self.resolution}-n{self.n}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True)
class HeadsTruth:
    """What the renderer knew about each image of a set."""

    shape: np.ndarray  # [n, S] float32, `heads.SHAPE_NAMES`
    appearance: np.ndarray  # [n, A] float32, `heads.APPEARANCE_NAMES`
    labels: np.ndarray  # [n, 25] float32 camera labels
    depth: np.ndarray  # [n, R, R] float32 distance along the unit ray through the pixel's centre, inf on the background


def parse_name(name: str) -> HeadsOptions:
    """Options of a dataset name such as `synthetic:heads64@n=500,seed=3`.

    Raises: ValueError when the name does not follow the grammar or a value is out of range.
    """
    match = re.fullmatch(r"synthetic:(heads|people)(\d+)(?:@(.+))?", name)
    if match is None:
        raise ValueError(
            f"parse_name: expected 'synthetic:heads<R>[@key=value,...]', got {name!r}. For example synthetic:heads64@n=500,seed=3, or "
            "synthetic:people64."
        )
    kinds = {"n": int, "seed": int, "background": str, "yaw": float, "pitch": float}
    values = {}
    for item in re.split("[,@]", match[3]) if match[3] else []:
        key, _, text = item.partition("=")
        if key not in kinds:
            raise ValueError(f"parse_name: expected one of the keys {', '.join(kinds)} in {name!r}, got {key!r}. Write key=value.")
        try:
            values[key] = kinds[key](text)
        except ValueError as error:
            raise ValueError(f"parse_name: expected {key}=<{kinds[key].__name__}> in {name!r}, got {text!r}.") from error
    kind = PeopleOptions if match[1] == "people" else HeadsOptions
    return kind(resolution=int(match[2]), **values)


def head_parameters(options: HeadsOptions, indices: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape [n, S], appearance [n, A] and camera labels [n, 25] (float32) of the images `indices`, without rendering them.

    Of people, the coordinates of their latents: identity and hair are the shape.
    """
    shapes, appearances, angles = [], [], []
    for i in indices:
        rng = np.random.default_rng([options.seed, i])
        shape, appearance = _draw_person(rng) if isinstance(options, PeopleOptions) else draw_parameters(rng)
        shapes.append(shape)
        appearances.append(appearance)
        angles.append(math.pi / 2 + rng.standard_normal(2) * [options.yaw, options.pitch])
    yaws, pitches = torch.from_numpy(np.array(angles)).split(1, dim=1)  # [n, 1] float64
    poses = look_at(camera_position(yaws, pitches, FFHQ_RADIUS), torch.zeros(3, dtype=torch.float64)).float()
    return np.stack(shapes), np.stack(appearances), pack_label(poses, intrinsics_matrix(FFHQ_FOCAL)).numpy()


def _draw_person(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shape [40] and appearance [24], with scan quality, of a latent: together of unit root mean square."""
    z = people.scaled(rng.standard_normal((1, people.LATENT)))[0].astype(np.float32)
    return z[: people.SHAPE], z[people.SHAPE :]


def _render_people(options: HeadsOptions, shape: np.ndarray, appearance: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [n, R, R, 3] in 0..1 and depths [n, R, R] along the unit rays; from the front a scan looks as the whole head does."""
    heads = people.named_people(np.concatenate([shape, appearance], axis=1))
    poses = labels[:, :16].reshape(-1, 4, 4)
    rendered = [people.picture(head, pose, FFHQ_FOCAL, options.resolution) for head, pose in zip(heads, poses, strict=True)]
    images, depths = (np.stack(column) for column in zip(*rendered, strict=True))
    return images, depths


def _render_group(options: HeadsOptions, group: int) -> tuple[list[bytes], np.ndarray]:
    """PNG bytes and depth offsets [32, R, R] float16 (depth less the camera's radius) of one full group."""
    parameters = head_parameters(options, range(group * _GROUP, (group + 1) * _GROUP))
    if isinstance(options, PeopleOptions):
        images, depths = _render_people(options, *parameters)
        pixels = np.round(images * 255).astype(np.uint8)
        return [png(PIL.Image.fromarray(p)) for p in pixels], (depths - FFHQ_RADIUS).astype(np.float16)
    shape, appearance, labels = map(torch.from_numpy, parameters)
    poses, intrinsics = labels[:, :16].reshape(-1, 4, 4), labels[:, 16:].reshape(-1, 3, 3)
    image, depth = render_heads(shape, appearance, poses, intrinsics, options.resolution, background=options.background)
    pixels = (image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()  # [n, R, R, 3]
    return [png(PIL.Image.fromarray(p)) for p in pixels], (depth - FFHQ_RADIUS).numpy().astype(np.float16)


def write_heads(options: HeadsOptions, path: Path, processes: int | None = None, progress: bool = True) -> None:
    """Render a set into `path` (zip, EG3D's format) and `path` with suffix .npz (the truth behind it).

    Both are written under temporary names and renamed when complete, the zip last: a zip that exists is whole.

    Args:
        path: target, ends in .zip; progress: show a progress bar with the remaining time.
        processes: workers; None uses the available cores. The bytes do not depend on it.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = math.ceil(options.n / _GROUP)
    processes = min(processes or available, _MAX_PROCESSES)
    killed = "synthetic heads: expected the workers to live, got one killed. Free memory and start again."
    groups = in_order(functools.partial(_render_group, options), range(count), processes, killed)
    shape, appearance, labels = head_parameters(options, range(options.n))
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(options.n)]
    depth = np.empty((options.n, options.resolution, options.resolution), np.float16)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {suffix: path.with_name(f".{path.stem}.{os.getpid()}{suffix}") for suffix in (".zip", ".npz")}
    try:
        with (
            zipfile.ZipFile(parts[".zip"], "w", zipfile.ZIP_STORED) as archive,
            tqdm(total=options.n, desc=f"rendering {path.name}", unit="head", disable=not progress) as bar,
        ):
            for group, (images, offsets) in enumerate(groups):
                first = group * _GROUP
                used = min(_GROUP, options.n - first)
                depth[first : first + used] = offsets[:used]
                for name, image in zip(names[first : first + used], images[:used], strict=True):
                    archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), image)
                bar.update(used)
            rows = [[name, label.tolist()] for name, label in zip(names, labels, strict=True)]
            archive.writestr(zipfile.ZipInfo("dataset.json", ZIP_DATE), json.dumps({"labels": rows}))
        np.savez(parts[".npz"], shape=shape, appearance=appearance, labels=labels, depth_offset=depth)
        os.replace(parts[".npz"], path.with_suffix(".npz"))
        os.replace(parts[".zip"], path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def resolve_dataset(name: str | Path, cache_dir: Path | None = None, processes: int | None = None, progress: bool = True) -> Path:
    """Path of a dataset: itself for a folder or zip; for a `synthetic:` name the cached zip, rendered first if it is not there.

    Args:
        name: path or dataset name; cache_dir: None is $EG3D_RLHF_CACHE, or ~/.cache/eg3d-rlhf; processes, progress: as in `write_heads`.
    Raises: ValueError when a synthetic name does not follow the grammar; OSError when the cache cannot be written.
    """
    if not str(name).startswith(PREFIX):
        return Path(name)
    options = parse_name(str(name))
    path = Path(cache_dir or os.environ.get("EG3D_RLHF_CACHE") or Path.home() / ".cache" / "eg3d-rlhf") / f"{options.stem()}.zip"
    if not (path.exists() and path.with_suffix(".npz").exists()):
        try:
            write_heads(options, path, processes, progress)
        except OSError as error:
            remedy = "Make room, or set EG3D_RLHF_CACHE to another folder."
            raise OSError(f"{path}: expected to write the rendered images, got: {error.strerror or error}. {remedy}") from error
    return path


def load_truth(path: Path) -> HeadsTruth:
    """Parameters, labels and depth of a set by the path that `resolve_dataset` returned.

    Raises: ValueError when the .npz beside the zip is missing.
    """
    source = Path(path).with_suffix(".npz")
    if not source.exists():
        raise ValueError(
            f"load_truth: expected {source} beside the dataset, got none. Only synthetic sets have it; delete the zip to render anew."
        )
    with np.load(source) as data:
        depth = data["depth_offset"].astype(np.float32) + FFHQ_RADIUS
        return HeadsTruth(shape=data["shape"], appearance=data["appearance"], labels=data["labels"], depth=depth)
