"""Compute distances between a generator's images and a dataset's images, and the share of images with a face.

The distances are FID and KID (see distances.py), if the features are those of an Inception network. With the
bundled features the same formulas are reported under other names, for example frechet_offline. Generated
images ("fakes") are rendered as by EG3D's metrics (Chan et al. 2022): the latent z is sampled from a standard
normal distribution, cameras are those of randomly chosen images of the dataset, the mapping network is
conditioned on the rendering camera, the truncation trick is not used, and noise inputs are random.

Shapes: N images, R pixels per side, K numbers per camera (25).
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

FULL = 50_000  # number of fakes of the metrics fid50k_full and kid50k_full, and the default for fid and kid
# For each metric its formula and its number of fakes; None: the number of --n.
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
    """Settings of `evaluate`: the metrics to compute and the number of generated images."""

    metrics: tuple[str, ...] = ("fid", "kid")  # names in METRICS
    n: int | None = None  # number of fakes for fid, kid and faces, >= 2; None means 50,000
    seed: int = 0  # random seed of latents, cameras, noise and subsets, >= 0
    batch: int = 8  # number of images that are rendered at once, >= 1

    def __post_init__(self) -> None:
        unknown_names = [name for name in self.metrics if name not in METRICS]
        if unknown_names or not self.metrics or len(set(self.metrics)) < len(self.metrics):
            given_names = ", ".join(self.metrics) or "an empty list"
            raise ValueError(
                f"--metrics: {given_names} is empty, or contains an unknown or a repeated name. Name one or"
                f" more of {', '.join(METRICS)}, each at most once."
            )
        # Metrics that have a number in their name cannot take another number of fakes.
        fixed_size_metrics = [name for name in self.metrics if METRICS[name][1] is not None]
        if fixed_size_metrics and self.n is not None:
            raise ValueError(
                f"--n: {self.n} images cannot be combined with the metric {fixed_size_metrics[0]}, which"
                f" always uses {FULL:,} images. Remove --n, or name the metrics fid and kid in --metrics."
            )
        if self.n is not None and self.n < 2:
            raise ValueError(f"--n: at least 2 images are needed, got {self.n}. Use a larger number.")
        if self.batch < 1:
            raise ValueError(f"--batch: at least 1 is needed, got {self.batch}. Use a larger number.")
        if self.seed < 0:
            raise ValueError(f"--seed: the seed must be at least 0, got {self.seed}. Use a larger number.")

    @property
    def images(self) -> int:
        """Number of fakes to generate. All metrics of one call are computed from the same fakes."""
        return self.n or FULL


def real_batches(dataset: ImageFolderDataset, batch: int) -> Iterator[torch.Tensor]:
    """Yield all images of a dataset in batches, float [N, 3, R, R] in [-1, 1].

    Greyscale images are repeated over 3 channels.

    Args:
        dataset: dataset of images and labels; only the images are used.
        batch: number of images N of a batch; the last batch may have fewer.
    """
    for batch_start in range(0, len(dataset), batch):
        # An item of the dataset is the pair (image, label).
        pixels = np.stack([dataset[i][0] for i in range(batch_start, min(batch_start + batch, len(dataset)))])
        # The images are uint8, 0..255. expand repeats the channel of greyscale images.
        yield torch.from_numpy(pixels).float().expand(-1, 3, -1, -1) / 127.5 - 1


@torch.no_grad()
def fake_batches(
    generator: Generator, cameras: np.ndarray, metric_options: MetricOptions
) -> Iterator[torch.Tensor]:
    """Yield generated images in batches, float [N, 3, R, R], `metric_options.images` in total.

    The same seed gives the same images if the batch size is the same. torch's global random generator is
    restored after every batch.

    Args:
        generator: generator that renders the images.
        cameras: all cameras of the dataset, [number of images, K]; each fake uses a randomly chosen one.
        metric_options: number of images, batch size and seed.
    """
    device = device_of(generator)
    # With replacement, since there can be more fakes than images in the dataset.
    camera_indices = np.random.RandomState(metric_options.seed).randint(
        len(cameras), size=metric_options.images
    )
    first_latent_seed = (
        metric_options.seed * metric_options.images
    )  # each --seed has its own range of latent seeds
    for batch_start in range(0, metric_options.images, metric_options.batch):
        batch_end = min(batch_start + metric_options.batch, metric_options.images)
        z = latents(
            range(first_latent_seed + batch_start, first_latent_seed + batch_end), generator.z_dim
        ).to(device)
        c = torch.from_numpy(cameras[camera_indices[batch_start:batch_end]]).to(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # The rendering noise reads torch's global generator, so every batch has its own seed.
            torch.manual_seed(first_latent_seed + batch_start)
            images = generator.field(generator.mapping(z, c), noise_mode="random").render(c).image
        yield images.expand(-1, 3, -1, -1)  # repeats the channel of greyscale images


def _with_progress(
    batches: Iterable[torch.Tensor], advance: Callable[[int], object], face_masks: list[np.ndarray] | None
) -> Iterator[torch.Tensor]:
    """Yield the batches unchanged, and advance a progress bar by the size of each finished batch.

    Args:
        batches: batches of images [N, 3, R, R] in [-1, 1].
        advance: function that advances the progress bar by a number of images.
        face_masks: list to which the result of `detect_faces` is appended for each batch; None skips the
            detector.
    """
    for batch in batches:
        # Yield first: the bar advances when the consumer has finished with the batch.
        yield batch
        if face_masks is not None:
            face_masks.append(detect_faces(batch))
        advance(len(batch))


def evaluate(
    generator: LoadedGenerator,
    dataset: ImageFolderDataset,
    network: Network,
    metric_options: MetricOptions,
    bar: Callable[[int, str], Any],
) -> list[dict]:
    """Compute the metrics of a generator against a dataset.

    Args:
        generator: generator of a network file.
        dataset: real images with cameras of 25 numbers as labels.
        network: feature network.
        metric_options: metrics, number of fakes, seed and batch size.
        bar: function that opens a progress bar from a number of images and a title. It returns a function
            that advances the bar by a number of images.

    Returns: a list of one record per metric, in the order of `metric_options.metrics`. A record is a
        dictionary of JSON values. Its entry 'results' is a dictionary of the metric's values by name;
        the other entries describe how they were computed.
    Raises: ValueError if the resolutions of dataset and generator differ, a set has fewer than two images, or
        a feature is not finite.
    """
    resolution = generator.generator.img_resolution
    if dataset.resolution != resolution:
        raise ValueError(
            f"--data: the images have {dataset.resolution}x{dataset.resolution} pixels, but the generator"
            f" renders {resolution}x{resolution}. Convert the dataset with tools/dataset_tool.py."
        )
    start_time = time.time()
    # Fakes have the distribution of the dataset's cameras.
    cameras = dataset.get_labels()
    face_masks: tuple[list, list] | tuple[None, None] = (
        ([], []) if "faces" in metric_options.metrics else (None, None)
    )
    real_statistics, real_features = collect(
        network,
        _with_progress(
            real_batches(dataset, metric_options.batch),
            bar(len(dataset), "features of the real images"),
            face_masks[0],
        ),
    )
    # `fake_batches` is a Python generator: a batch is rendered when
    # `collect` requests it, so that only one batch is in memory.
    fake_image_batches = fake_batches(generator.generator, cameras, metric_options)
    fake_statistics, fake_features = collect(
        network,
        _with_progress(
            fake_image_batches, bar(metric_options.images, "features of generated images"), face_masks[1]
        ),
    )
    records = []
    for metric in metric_options.metrics:
        formula = METRICS[metric][0]
        metric_name = metric
        # Only Inception features give a FID or KID. Other features get another name, e.g. frechet_offline.
        if formula != "faces" and not isinstance(network, InceptionFeatures):
            # the part after "fid" or "kid", such as 50k_full, is kept
            metric_name = f"{formula}_offline{metric[3:]}"
        if formula == "faces":
            results_by_name = {
                result_name: float(np.concatenate(batch_masks).mean())
                for result_name, batch_masks in zip(("faces_reals", "faces"), face_masks, strict=True)
                if batch_masks
            }
        elif formula == "frechet":
            results_by_name = {metric_name: fake_statistics.distance(real_statistics)}
        else:
            results_by_name = dict(
                zip(
                    (metric_name, f"{metric_name}_std"),
                    kernel_inception_distance(real_features, fake_features, seed=metric_options.seed),
                    strict=True,
                )
            )
        records.append(
            {
                "results": results_by_name,
                "metric": metric_name,
                "features": network.name,
                "dimensions": network.dim,
                "images": metric_options.images,
                "reals": len(dataset),
                "seed": metric_options.seed,
                "snapshot": generator.path.name,
                "snapshot_sha256": generator.hash,
                "timestamp": time.time(),
                # Includes the features of the reals, which all metrics of the call share.
                "total_time": time.time() - start_time,
            }
        )
    return records


def training_options(network: Path) -> dict:
    """Read on which dataset a network was trained, from the record in the folder of the network file.

    The folder can be a run folder of this package or of EG3D.

    Returns: a dictionary of 'data', the path of the dataset, and 'mirror', True if the run also trained on
        mirrored images. The dictionary is empty if the folder holds no options of a run.
    """
    recorded_options = recorded(network.parent)
    eg3d_data = recorded_options.get("training_set_kwargs")  # only in options that EG3D's train.py wrote
    if isinstance(eg3d_data, dict):
        return {"data": eg3d_data.get("path"), "mirror": eg3d_data.get("xflip", False)}
    return {
        option_name: recorded_options[option_name]
        for option_name in ("data", "mirror")
        if option_name in recorded_options
    }


def append_records(folder: Path, records: list[dict]) -> None:
    """Append each record as a line of JSON to FOLDER/metric-NAME.jsonl, where NAME is its 'metric'.

    EG3D writes its metrics to files of the same names.

    Args:
        folder: folder of the files.
        records: records of `evaluate`.
    """
    for metric_record in records:
        path = folder / f"metric-{metric_record['metric']}.jsonl"
        # Rewrite the file as a whole: an interrupted append could leave half a line.
        earlier_lines = path.read_text() if path.is_file() else ""
        write_atomic(path, (earlier_lines + json.dumps(metric_record) + "\n").encode())


# Share of images in which an independent detector finds a face: scikit-image's cascade of local binary
# patterns, which was trained on photographs and is part of that package.
#
# The detector misses many faces: it finds one in three of four images of ground-truth synthetic heads, with
# yaw and pitch sampled as for training. Only a change of the share is therefore informative: if it falls,
# tuning has damaged faces.

FACE_PIXELS = 128  # side of the images that the detector reads, in pixels
SMALLEST_FACE = 40  # side of the smallest face that the detector searches for, in pixels


def detect_faces(images: torch.Tensor) -> np.ndarray:
    """Return bool [N]: True for each image in which the detector finds at least one face.

    Args:
        images: images, float [N, 3, H, W] in [-1, 1].

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
    # The weights of the cascade are a file of the scikit-image package.
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
    size_limits = {"min_size": (SMALLEST_FACE, SMALLEST_FACE), "max_size": (FACE_PIXELS - 1, FACE_PIXELS - 1)}
    # The detector returns a list of boxes, which is empty if the image shows no face. step_ratio=1 tests
    # every position of the window.
    return np.array(
        [
            bool(detector.detect_multi_scale(img=image, scale_factor=1.1, step_ratio=1, **size_limits))
            for image in pixels
        ]
    )
