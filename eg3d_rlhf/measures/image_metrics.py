"""Compute distances between a generator's images and a dataset's images, and the share of images with a face.

The distances are FID and KID with Inception features. With other features the same formulas have other names.
Fakes are generated as EG3D's metrics generate them: z is normal, cameras are those of randomly chosen images
of the dataset, the mapping network is conditioned on the rendering camera, there is no truncation, and noise
is random.
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

FULL = 50_000  # fakes of the metrics that are named after them
# name: (formula, number of fakes). None: the number that the user asks for.
METRICS: dict[str, tuple[str, int | None]] = {
    "fid": ("frechet", None),
    "kid": ("kernel", None),
    "fid50k_full": ("frechet", FULL),
    "kid50k_full": ("kernel", FULL),
    "faces": ("faces", None),
}

Network = HeadFactorFeatures | InceptionFeatures


@dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """Settings of a call of `evaluate`: the metrics and the number of images."""

    metrics: tuple[str, ...] = ("fid", "kid")
    n: int | None = None  # number of fakes for fid and kid, >= 2; None means 50,000
    seed: int = 0  # of latents, cameras, noise and subsets, >= 0
    batch: int = 8  # images that are rendered at once, >= 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics or len(set(self.metrics)) < len(self.metrics):
            got = ", ".join(self.metrics) or "none"
            raise ValueError(
                f"--metrics: expected some of {', '.join(METRICS)}, each at most once, got {got}. Correct the"
                " list."
            )
        # Metrics that have a number in their name cannot take another number of fakes.
        fixed = [name for name in self.metrics if METRICS[name][1] is not None]
        if fixed and self.n is not None:
            raise ValueError(
                f"--n: {fixed[0]} always uses {FULL:,} images, got --n={self.n}. Remove --n, or use the"
                " metrics fid or kid."
            )
        if self.n is not None and self.n < 2 or self.batch < 1 or self.seed < 0:
            raise ValueError(
                f"--n: expected n >= 2, batch >= 1 and seed >= 0, got {self.n}, {self.batch}, {self.seed}."
                " Increase it."
            )

    @property
    def images(self) -> int:
        """Number of fakes to generate. All metrics of one call share them."""
        return self.n or FULL


def real_batches(dataset: ImageFolderDataset, batch: int) -> Iterator[torch.Tensor]:
    """Yield all images of a dataset as float [N, 3, R, R] in [-1, 1].

    Greyscale is repeated over 3 channels.
    """
    for start in range(0, len(dataset), batch):
        pixels = np.stack([dataset[i][0] for i in range(start, min(start + batch, len(dataset)))])
        # 0..255 to [-1, 1]
        yield torch.from_numpy(pixels).float().expand(-1, 3, -1, -1) / 127.5 - 1


@torch.no_grad()
def fake_batches(generator: Generator, cameras: np.ndarray, options: MetricOptions) -> Iterator[torch.Tensor]:
    """Yield options.images fakes, float [N, 3, R, R], rendered from cameras that are sampled from `cameras`
    [len, K].

    The same seed gives the same images if the batch size is the same. torch's global generator is restored
    after every batch.
    """
    device = device_of(generator)
    # With replacement, since there can be more fakes than images.
    chosen = np.random.RandomState(options.seed).randint(len(cameras), size=options.images)
    first = options.seed * options.images  # each --seed has its own range of latent seeds
    for start in range(0, options.images, options.batch):
        stop = min(start + options.batch, options.images)
        z = latents(range(first + start, first + stop), generator.z_dim).to(device)
        c = torch.from_numpy(cameras[chosen[start:stop]]).to(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # The rendering noise reads torch's global generator, so every batch has its own seed.
            torch.manual_seed(first + start)
            images = generator.field(generator.mapping(z, c), noise_mode="random").render(c).image
        yield images.expand(-1, 3, -1, -1)


def _with_progress(
    batches: Iterable[torch.Tensor], advance: Callable[[int], object], faces: list[np.ndarray] | None
) -> Iterator[torch.Tensor]:
    """Yield the batches unchanged, and advance a progress bar by the size of each finished one.

    If `faces` is a list, append for each batch which of its images show a face.
    """
    for batch in batches:
        # Yield first: the bar advances when the consumer has finished with the batch.
        yield batch
        if faces is not None:
            faces.append(faces_found(batch))
        advance(len(batch))


def evaluate(
    generator: LoadedGenerator,
    dataset: ImageFolderDataset,
    network: Network,
    options: MetricOptions,
    bar: Callable[[int, str], Any],
) -> list[dict]:
    """Compute the metrics of a generator against a dataset.

    Args: dataset: images with 25-number camera labels; bar: called with a number of images and a title,
        returns a function that advances the progress by a number of images.
    Returns: one record per metric: {'results': {name: value}, 'metric', 'features', 'images', 'reals',
        'seed', 'snapshot', 'total_time', ...}.
    Raises: ValueError if the resolutions of dataset and generator differ, a set has fewer than two images, or
        a feature is not finite.
    """
    resolution = generator.generator.img_resolution
    if dataset.resolution != resolution:
        raise ValueError(
            f"--data: expected images of {resolution}x{resolution} pixels, as the generator renders, got"
            f" {dataset.resolution}x{dataset.resolution}. Convert the dataset with tools/dataset_tool.py."
        )
    started = time.time()
    # Fakes have the distribution of the dataset's cameras.
    cameras = dataset.get_labels()
    faces: tuple[list, list] | tuple[None, None] = ([], []) if "faces" in options.metrics else (None, None)
    real = collect(
        network,
        _with_progress(
            real_batches(dataset, options.batch), bar(len(dataset), "features of the real images"), faces[0]
        ),
    )
    # A generator: each batch is rendered when `collect` asks for it.
    fakes = fake_batches(generator.generator, cameras, options)
    fake = collect(
        network, _with_progress(fakes, bar(options.images, "features of generated images"), faces[1])
    )
    records = []
    for metric in options.metrics:
        formula = METRICS[metric][0]
        name = metric
        # Only Inception features give a FID or KID. Other features get another name, e.g. frechet_offline.
        if formula != "faces" and not isinstance(network, InceptionFeatures):
            name = f"{formula}_offline{metric[3:]}"
        if formula == "faces":
            results = {
                subset: float(np.concatenate(part).mean())
                for subset, part in zip(("faces_reals", "faces"), faces, strict=True)
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
                # Includes the features of the reals, which all metrics of the call share.
                "total_time": time.time() - started,
            }
        )
    return records


def training_options(network: Path) -> dict:
    """Read 'data' and 'mirror' from the options of the run, ours or EG3D's, whose folder holds a network
    file.

    Returns an empty dictionary if the file is in no run folder.
    """
    values = recorded(network.parent)
    eg3d_data = values.get("training_set_kwargs")  # only in options that EG3D's train.py wrote
    if isinstance(eg3d_data, dict):
        return {"data": eg3d_data.get("path"), "mirror": eg3d_data.get("xflip", False)}
    return {name: values[name] for name in ("data", "mirror") if name in values}


def append_records(folder: Path, records: list[dict]) -> None:
    """Append each record as a line to <folder>/metric-<name>.jsonl, the file names that EG3D uses."""
    for record in records:
        path = folder / f"metric-{record['metric']}.jsonl"
        # Rewrite the file as a whole: an interrupted append could leave half a line.
        before = path.read_text() if path.is_file() else ""
        write_atomic(path, (before + json.dumps(record) + "\n").encode())


# Share of images in which an independent detector finds a face: scikit-image's cascade of local binary
# patterns, which was trained on photographs and is part of that package.
#
# The detector is strict. Of frontal images of the family's ground-truth heads, with yaw and pitch sampled as
# for training, it finds a face in three of four. If the share falls, tuning has damaged faces. Images are
# float [N, 3, H, W] in [-1, 1].

FACE_PIXELS = 128  # edge of the images that the detector reads
SMALLEST_FACE = 40  # pixels; smaller detections are not searched


def faces_found(images: torch.Tensor) -> np.ndarray:
    """Return for each of images [N, 3, H, W] whether the detector finds a face, as [N] bool.

    Raises: ValueError if scikit-image is not installed.
    """
    try:
        from skimage.data import lbp_frontal_face_cascade_filename
        from skimage.feature import Cascade
    except ImportError:
        raise ValueError(
            "The face detector needs scikit-image, which is not installed. Install it: pip install"
            " 'eg3d-rlhf[dev]'."
        ) from None
    # The file is part of scikit-image.
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
