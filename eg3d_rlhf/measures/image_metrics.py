"""Distances between a generator's images and a dataset's: FID and KID where the features are Inception's, the
same formulas elsewhere.

Fakes are drawn as EG3D's metrics draw them: z normal, cameras those of randomly chosen images of the set,
conditioning and rendering camera the same, no truncation, noise random.
Shape letters: N images, C channels, R resolution, K camera numbers (25).
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.experiments.run import recorded
from eg3d_rlhf.generators import Generator, LoadedGenerator, device_of, latents
from eg3d_rlhf.measures.distances import collect, kernel_inception_distance
from eg3d_rlhf.measures.features import HeadFactorFeatures, InceptionFeatures, to_resolution
from training.dataset import ImageFolderDataset
from training.storage import write_atomic

FULL = 50_000
METRICS: dict[str, tuple[str, int | None]] = {  # name: formula, images (None: as many as asked for)
    "fid": ("frechet", None),
    "kid": ("kernel", None),
    "fid50k_full": ("frechet", FULL),
    "kid50k_full": ("kernel", FULL),
    "faces": ("faces", None),
}

Network = HeadFactorFeatures | InceptionFeatures


@dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """What is measured on how many images."""

    metrics: tuple[str, ...] = ("fid", "kid")
    n: int | None = None  # fakes for fid and kid, >= 2; None is 50,000
    seed: int = 0  # of latents, cameras, noise and subsets
    batch: int = 8  # images at once

    def __post_init__(self) -> None:
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics or len(set(self.metrics)) < len(self.metrics):
            got = ", ".join(self.metrics) or "none"
            raise ValueError(
                f"--metrics: expected some of {', '.join(METRICS)}, each once, got {got}. Correct the list."
            )
        fixed = [name for name in self.metrics if METRICS[name][1] is not None]
        if fixed and self.n is not None:
            raise ValueError(
                f"--n: expected none with {fixed[0]}, which takes {FULL:,} images, got {self.n}. Use fid or"
                " kid with --n."
            )
        if self.n is not None and self.n < 2 or self.batch < 1 or self.seed < 0:
            raise ValueError(
                f"--n: expected n >= 2, batch >= 1 and seed >= 0, got {self.n}, {self.batch}, {self.seed}."
                " Raise it."
            )

    @property
    def images(self) -> int:
        """Fakes to draw; the metrics of one call share them."""
        return self.n or FULL


def real_batches(dataset: ImageFolderDataset, batch: int) -> Iterator[torch.Tensor]:
    """All images of a set, float [N, 3, R, R] in [-1, 1]; greyscale is repeated."""
    for start in range(0, len(dataset), batch):
        pixels = np.stack([dataset[i][0] for i in range(start, min(start + batch, len(dataset)))])
        yield torch.from_numpy(pixels).float().expand(-1, 3, -1, -1) / 127.5 - 1


@torch.no_grad()
def fake_batches(generator: Generator, cameras: np.ndarray, options: MetricOptions) -> Iterator[torch.Tensor]:
    """options.images fakes, float [N, 3, R, R], seen from cameras drawn from `cameras` [len, K].

    Repeats with the seed at the same batch size. torch's global generator is put back after every batch.
    """
    device = device_of(generator)
    chosen = np.random.RandomState(options.seed).randint(len(cameras), size=options.images)
    first = options.seed * options.images  # seeds of z: other runs get others
    for start in range(0, options.images, options.batch):
        stop = min(start + options.batch, options.images)
        z = latents(range(first + start, first + stop), generator.z_dim).to(device)
        c = torch.from_numpy(cameras[chosen[start:stop]]).to(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(first + start)
            images = generator.field(generator.mapping(z, c), noise_mode="random").render(c).image
        yield images.expand(-1, 3, -1, -1)


def _told(
    batches: Iterable[torch.Tensor], tell: Callable[[int], object], faces: list[np.ndarray] | None
) -> Iterator[torch.Tensor]:
    """The batches, of which a bar is told when they are done, and `faces` which of their images have one."""
    for batch in batches:
        yield batch
        if faces is not None:
            faces.append(faces_found(batch))
        tell(len(batch))


def evaluate(
    generator: LoadedGenerator,
    dataset: ImageFolderDataset,
    network: Network,
    options: MetricOptions,
    bar: Callable[[int, str], Any],
) -> list[dict]:
    """One record per metric: {'results': {name: value}, 'metric', 'features', 'images', 'reals', 'seed',
    'snapshot', 'total_time', ...}.

    Args: dataset with 25-number labels; bar: gets a number of images and a title, returns what is told the
        size of each batch.
    Raises: ValueError when the set's resolution is not the generator's, a set has fewer than two images, or a
        feature is not finite.
    """
    resolution = generator.generator.img_resolution
    if dataset.resolution != resolution:
        raise ValueError(
            f"--data: expected images of {resolution}x{resolution} as the generator's, got"
            f" {dataset.resolution}x{dataset.resolution}. Convert the set with tools/dataset_tool.py."
        )
    started = time.time()
    cameras = dataset.get_labels()
    faces: tuple[list, list] | tuple[None, None] = ([], []) if "faces" in options.metrics else (None, None)
    real = collect(
        network,
        _told(
            real_batches(dataset, options.batch), bar(len(dataset), "features of the real images"), faces[0]
        ),
    )
    made = fake_batches(generator.generator, cameras, options)
    fake = collect(network, _told(made, bar(options.images, "features of generated images"), faces[1]))
    records = []
    for metric in options.metrics:
        formula = METRICS[metric][0]
        name = metric
        # a figure under our own features must not pass for an FID
        if formula != "faces" and not isinstance(network, InceptionFeatures):
            name = f"{formula}_offline{metric[3:]}"
        if formula == "faces":
            results = {
                who: float(np.concatenate(part).mean())
                for who, part in zip(("faces_reals", "faces"), faces, strict=True)
                if part
            }
        elif formula == "frechet":
            results = {name: fake[0].distance(real[0])}
        else:
            results = dict(
                zip(
                    (name, f"{name}_std"),
                    kernel_inception_distance(real[1], fake[1], seed=options.seed),
                    strict=True,
                )
            )
        records.append(
            {
                "results": results,
                "metric": name,
                "features": network.name,
                "dimensions": network.dim,
                "images": options.images,
                "reals": len(dataset),
                "seed": options.seed,
                "snapshot": generator.path.name,
                "snapshot_sha256": generator.hash,
                "timestamp": time.time(),
                "total_time": time.time() - started,
            }
        )
    return records


def training_options(network: Path) -> dict:
    """'data' and 'mirror' of the run, ours or EG3D's, that a network file lies in; empty where it lies in
    none.
    """
    values = recorded(network.parent)
    theirs = values.get("training_set_kwargs")
    if isinstance(theirs, dict):
        return {"data": theirs.get("path"), "mirror": theirs.get("xflip", False)}
    return {name: values[name] for name in ("data", "mirror") if name in values}


def append_records(folder: Path, records: list[dict]) -> None:
    """Add each record as a line of <folder>/metric-<name>.jsonl, EG3D's file names."""
    for record in records:
        path = folder / f"metric-{record['metric']}.jsonl"
        before = path.read_text() if path.is_file() else ""
        write_atomic(path, (before + json.dumps(record) + "\n").encode())


# Share of pictures in which an outside detector finds a face: scikit-image's cascade of local binary
# patterns, which learnt from photographs and comes with the package.
#
# It is strict: of pictures of the family's true heads from in front, yaw and pitch drawn as for training, it
# finds three in four. A share that falls says that faces were harmed. Images are float [N, 3, H, W] in
# [-1, 1].

FACE_PIXELS = 128  # of the pictures that it reads
SMALLEST_FACE = 40  # of a face


def faces_found(images: torch.Tensor) -> np.ndarray:
    """Whether there is a face in each of images [N, 3, H, W]: [N] bool.

    Raises: ValueError without scikit-image.
    """
    try:
        from skimage.data import lbp_frontal_face_cascade_filename
        from skimage.feature import Cascade
    except ImportError:
        raise ValueError(
            "detector of faces: expected scikit-image, found none. Install it: pip install 'eg3d-rlhf[dev]'."
        ) from None
    detector = Cascade(lbp_frontal_face_cascade_filename())
    pixels = (
        (to_resolution(images, FACE_PIXELS) * 127.5 + 127.5)
        .round()
        .clamp(0, 255)
        .byte()
        .permute(0, 2, 3, 1)
        .contiguous()
        .cpu()
        .numpy()
    )
    size = {"min_size": (SMALLEST_FACE, SMALLEST_FACE), "max_size": (FACE_PIXELS - 1, FACE_PIXELS - 1)}
    return np.array(
        [
            bool(detector.detect_multi_scale(img=image, scale_factor=1.1, step_ratio=1, **size))
            for image in pixels
        ]
    )
