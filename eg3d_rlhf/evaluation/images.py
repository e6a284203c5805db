"""Compare images before and after tuning: distance to the data, diversity, and change of the same latents.

Shapes: N images or latents, M images of the data, F features, R pixels per edge.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from eg3d_rlhf.core.field import Field, render_each
from eg3d_rlhf.core.seeds import IMAGES
from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.paired import BOOTSTRAP, NO_CONTROL, ROLES, span, span_apart
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.image_set_warnings import warn_about_images
from eg3d_rlhf.experiments.pages import Finding, Job, identity_of_file
from eg3d_rlhf.generators import LoadedGenerator, camera, latents
from eg3d_rlhf.measures import feature_sets, resampling
from eg3d_rlhf.measures.features import load_features
from eg3d_rlhf.measures.image_similarity import load_identity, load_lpips, psnr, ssim
from eg3d_rlhf.measures.measure import Measure
from eg3d_rlhf.rewards.observations import SigmaSlab
from training.dataset import ImageFolderDataset
from training.synthetic_heads import resolve_dataset

REALS_PER_FAKE = 4  # largest number of images of the data for each generated image
RESAMPLES = 100  # bootstrap resamples of the intervals of distances
SLABS = "σ slabs"
SLAB_CELLS = 32  # larger slabs are averaged to this number of cells per edge before they are compared
YAW = 0.3  # radians from frontal, since an oblique view shows more of the shape than a frontal one
NO_LPIPS = (
    "LPIPS is not measured, since no weights are bundled. Pass them with --lpips=FILE, a TorchScript file"
    " that is called as f(a, b) with two batches of images."
)
NO_IDENTITY = (
    "Identity drift is not measured: it needs a network that embeds faces, and none is bundled. Pass one with"
    " --identity=FILE, a TorchScript file that maps images [N, 3, H, W] in [-1, 1] to embeddings [N, F]."
)


def jobs(comparison: Comparison) -> list[Job]:
    """Return the jobs on images: distances to the data, diversity, appearance drift, and identity drift.

    A job whose dataset or network is missing is replaced by one that only states what is missing.
    """
    inception_identity = identity_of_file(comparison.inception)
    distances_title = "Images against the data"
    similarity_plots = {"similarity": plot_similarity}
    identity_title = "Does a latent keep its identity?"
    return [
        # If a job cannot be computed, its section of the page states the reason.
        (
            comparison.job(
                "image-distances",
                distances_title,
                distances,
                {"distances": plot_distances, "precision-recall": plot_precision_recall},
                ROLES,
                version=2,
                data=comparison.data,
                mirror=comparison.mirror,
                images=comparison.images,
                inception=inception_identity,
            )
            if comparison.data
            else comparison.absent(
                "image-distances", distances_title, "No dataset is recorded. Pass it with --data."
            )
        ),
        comparison.job(
            "diversity",
            "Diversity: do samples still differ from each other?",
            diversity,
            {"pairwise": plot_diversity},
            n=comparison.n,
            inception=inception_identity,
        ),
        comparison.job(
            "appearance-drift",
            "Do images of the same latent look the same?",
            appearance_drift,
            similarity_plots,
            ROLES,
            n=comparison.n,
            lpips=identity_of_file(comparison.lpips),
        ),
        (
            comparison.job(
                "identity-drift",
                identity_title,
                identity_drift,
                similarity_plots,
                ROLES,
                n=comparison.n,
                identity=identity_of_file(comparison.identity),
            )
            if comparison.identity is not None
            else comparison.absent("identity-drift", identity_title, NO_IDENTITY)
        ),
    ]


def open_data(comparison: Comparison) -> ImageFolderDataset:
    """Open the comparison's dataset with its cameras.

    Raises: ValueError if its images do not have the size of the generator's images.
    """
    dataset = ImageFolderDataset(
        resolve_dataset(comparison.data), use_labels=True, xflip=comparison.mirror, c_dim=25
    )
    if dataset.resolution != comparison.before.generator.img_resolution:
        image_pixels = comparison.before.generator.img_resolution  # pixels per edge
        raise ValueError(
            f"--data: the images have {dataset.resolution} pixels per edge, but those of the generator have"
            f" {image_pixels}. Pass a dataset whose images were resized to {image_pixels} pixels."
        )
    warn_about_images(dataset, comparison.before.generator, "the compared generators")
    return dataset


def real_features(comparison: Comparison, feature_network) -> tuple[np.ndarray, ImageFolderDataset]:
    """Compute features of images of the data, and return them with the opened dataset.

    A random subset of at most REALS_PER_FAKE * comparison.images images is used, which --seed determines.

    Args: feature_network: network that maps images [B, 3, R, R] in [-1, 1] to features, see `load_features`.
    Returns: features [M, F], and the dataset.
    """
    dataset = open_data(comparison)
    image_indices = np.random.RandomState(comparison.seed).permutation(len(dataset))[
        : REALS_PER_FAKE * comparison.images
    ]
    features_by_batch = []  # features [<= 64, F] of batches of the data
    for start in range(0, len(image_indices), 64):
        pixels = np.stack([dataset[int(i)][0] for i in image_indices[start : start + 64]])
        # [B, C, R, R] uint8 -> [B, 3, R, R] in [-1, 1]; grey images are repeated
        images = torch.from_numpy(pixels).to(comparison.device).float().expand(-1, 3, -1, -1) / 127.5 - 1
        features_by_batch.append(feature_network(images).cpu().numpy())
    return np.concatenate(features_by_batch), dataset


def images_of(
    comparison: Comparison,
    generator: LoadedGenerator,
    cameras: np.ndarray,
    seeds: Sequence[int],
    camera_indices: np.ndarray,
) -> Iterator[torch.Tensor]:
    """Yield images of seeds under cameras of the data, without truncation, in batches [<= comparison.batch,
    3, R, R].

    Args:
        cameras: cameras of the data, [M, 25].
        seeds: seeds of the latents.
        camera_indices: index of the camera on which each seed is conditioned, and from which it is rendered.
    """
    for start in range(0, len(seeds), comparison.batch):
        batch_seeds = seeds[start : start + comparison.batch]
        # The mapping is conditioned on the camera that renders, as in EG3D's training.
        camera_labels = torch.from_numpy(cameras[camera_indices[start : start + len(batch_seeds)]]).to(
            comparison.device
        )
        with torch.no_grad():
            field = generator.generator.field(  # ws of the mapping, untruncated
                generator.generator.mapping(
                    latents(batch_seeds, generator.generator.z_dim).to(comparison.device), camera_labels
                )
            )
        yield render_each(field, [camera_labels], seed=batch_seeds[0])[0].image


def fake_features(
    comparison: Comparison, generator: LoadedGenerator, cameras: np.ndarray, feature_network
) -> np.ndarray:
    """Compute features [N, F] of N = comparison.images generated images, rendered from cameras of the data.

    Latents, cameras and ray jitter are the same for all networks.

    Args:
        cameras: cameras of the data, [M, 25].
        feature_network: network that maps images to features, see `load_features`.
    """
    # The cameras depend on the seed alone, so that the images of different networks are paired.
    camera_indices = np.random.RandomState(comparison.seed).randint(len(cameras), size=comparison.images)
    batches = images_of(
        comparison, generator, cameras, comparison.seeds(comparison.images, IMAGES), camera_indices
    )
    return np.concatenate([feature_network(images.expand(-1, 3, -1, -1)).cpu().numpy() for images in batches])


def distances(comparison: Comparison, _folder: Path) -> Finding:
    """Measure the distances of each network's images to the data, their changes, and precision and recall."""
    feature_network = load_features(comparison.inception, comparison.device)
    data_features, dataset = real_features(comparison, feature_network)  # [M, F]
    cameras = dataset.get_labels()  # [M, 25]
    features_by_role = {
        role: fake_features(comparison, generator, cameras, feature_network)
        for role, generator in comparison.generators().items()
    }
    intervals_by_distance = {"kernel": (resampling.kernel_interval, resampling.kernel_change_interval)}
    # The covariance of fewer images than features is singular, so a Fréchet distance would be meaningless.
    if min(comparison.images, len(data_features)) > feature_network.dim:
        intervals_by_distance = {
            "Fréchet": (resampling.frechet_interval, resampling.frechet_change_interval),
            **intervals_by_distance,
        }
    distance_rows = []  # distances of each network
    change_rows = []  # since before tuning, paired by latent and camera
    for distance_name, (distance_interval, change_interval) in intervals_by_distance.items():
        for role, features in features_by_role.items():
            distance_rows.append(
                {
                    "distance": distance_name,
                    "role": role,
                    **distance_interval(features, data_features, RESAMPLES, comparison.seed)._asdict(),
                }
            )
            if role != "before":
                change_rows.append(
                    {
                        "distance": distance_name,
                        "role": role,
                        **change_interval(
                            features_by_role["before"], features, data_features, RESAMPLES, comparison.seed
                        )._asdict(),
                    }
                )
    # Precision and recall use as many images of the data as generated images, so that both sets of samples
    # have the same density.
    precision_recall_by_role = {
        role: feature_sets.precision_recall(features, data_features[: comparison.images])
        for role, features in features_by_role.items()
    }
    precision_recall_rows = [
        {
            "measure": measure_name,
            "role": role,
            "value": getattr(precision_recall, measure_name),
            "lo": interval.lo,
            "hi": interval.hi,
        }
        for role, precision_recall in precision_recall_by_role.items()
        for measure_name, interval in precision_recall.intervals().items()
    ]
    facts = comparison.facts(
        comparison.seeds(comparison.images, IMAGES),
        ROLES,
        f"95 % {resampling.METHOD}, {RESAMPLES} resamples; Wilson for precision and recall",
        unit=f"images against {len(data_features):,} of the data, features {feature_network.name}",
        psi=1.0,
    )
    finding_data = {
        "distances": distance_rows,
        "changes": change_rows,
        "precision_recall": precision_recall_rows,
    }
    return Finding(
        facts=facts,
        data=finding_data,
        rows=[
            *distance_rows,
            *({**change_row, "distance": f"{change_row['distance']}, change"} for change_row in change_rows),
            *precision_recall_rows,
        ],
        says=_describe_distances(
            comparison, distance_rows, change_rows, precision_recall_rows, feature_network.dim
        ),
    )


def _describe_distances(
    comparison: Comparison,
    distance_rows: list,
    change_rows: list,
    precision_recall_rows: list,
    feature_count: int,
) -> list[str]:
    """Describe the changes of the distances, precision and recall, and their limits, in sentences.

    Args:
        distance_rows: distances of each network.
        change_rows: changes of the distances.
        precision_recall_rows: precision and recall of each network.
        feature_count: number of features.
    """
    sentences = []
    for change_row in change_rows:
        # The distance before tuning is stated, since a change is only meaningful relative to it.
        row_before = next(
            distance_row
            for distance_row in distance_rows
            if distance_row["distance"] == change_row["distance"] and distance_row["role"] == "before"
        )
        direction_text = (
            "farther from"
            if change_row["lo"] > 0
            else "nearer to"
            if change_row["hi"] < 0
            else "neither shown nearer to nor farther from"
        )
        sentences.append(
            f"{change_row['distance']} distance, {change_row['role']} minus before:"
            f" {span(change_row['mean'], change_row['lo'], change_row['hi'], '+.4g')} on"
            f" {row_before['mean']:.4g}: images are {direction_text} the data."
        )
    # Precision and recall have intervals, but no paired test here.
    values_before, values_after = (
        {
            measure_row["measure"]: measure_row["value"]
            for measure_row in precision_recall_rows
            if measure_row["role"] == role
        }
        for role in ("before", "after")
    )
    sentences += [
        f"{measure_name.capitalize()} {values_before[measure_name]:.3f} -> {value_after:.3f}."
        for measure_name, value_after in values_after.items()
    ]
    radius_text = f"the {feature_sets.MANIFOLD_NEIGHBOURS}rd neighbour's reach"
    sentences.append(
        f"Precision and recall count the data within {radius_text}, at this number of images only."
    )
    if not any(distance_row["distance"] == "Fréchet" for distance_row in distance_rows):
        sentences.append(
            f"No Fréchet distance: it needs more images than the {feature_count} features. Raise --images."
        )
    # With few samples, the estimate of the Fréchet distance is too high.
    elif comparison.images < resampling.SAFE_SAMPLES * feature_count:
        condition_text = f"With under {resampling.SAFE_SAMPLES * feature_count:,} images"
        sentences.append(
            f"{condition_text} the Fréchet distances stay too high, their change less so. Raise --images."
        )
    sentences.append(
        "These distances cannot be compared with published FIDs, unless the network of --inception is the"
        " usual one."
    )
    return sentences


def views(
    comparison: Comparison,
    generator: LoadedGenerator,
    seeds: range,
    yaw: float = 0.0,
    jitter_seed: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yield images of seeds in batches [<= comparison.batch, 3, R, R].

    Args:
        yaw: yaw of the camera, in radians from frontal.
        jitter_seed: seed of the ray jitter, which is the same for every batch. If it is None, the jitter of
            each batch has the first seed of the batch.
    """
    for start, field in zip(
        range(0, len(seeds), comparison.batch), comparison.fields(generator, seeds), strict=True
    ):
        yield image_from(generator, field, yaw, seeds[start] if jitter_seed is None else jitter_seed)


@torch.no_grad()
def image_from(generator: LoadedGenerator, field: Field, yaw: float, seed: int) -> torch.Tensor:
    """Render images [N, 3, R, R] of a field, without changing torch's global random state.

    `render_each` cannot be used: EG3D's pose sampler consumes random numbers before the ray sampler does.

    Args:
        yaw: yaw of the camera, in radians from frontal.
        seed: seed of the ray jitter.
    """
    with torch.random.fork_rng(
        devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    ):
        torch.manual_seed(seed)  # for the stratified samples along the rays
        return field.render(camera(generator.generator, yaw=yaw)).image


def _cells(observations: torch.Tensor) -> np.ndarray:
    """Flatten observations [N, ...] to [N, cells].

    Slabs [N, 1, D, H, W] with more than SLAB_CELLS cells along an edge are first averaged to SLAB_CELLS cells
    along it.
    """
    # Observations with five axes are slabs. Pairwise distances of full slabs would need much memory.
    if observations.ndim == 5:
        # at most SLAB_CELLS
        depth, height, width = (min(edge, SLAB_CELLS) for edge in observations.shape[2:])
        observations = functional.adaptive_avg_pool3d(observations, (depth, height, width))
    return observations.flatten(1).cpu().numpy()


def diversity(comparison: Comparison, _folder: Path) -> Finding:
    """Compare how much samples differ from each other, in image features and in the reward's input.

    The measure is the mean distance between pairs of latents, and its ratio to the value before tuning.
    """
    seeds = comparison.seeds()  # N held-out latents
    feature_network = load_features(comparison.inception, comparison.device)
    observation_text = (
        SLABS
        if comparison.reward.observation.kind == SigmaSlab.kind
        else f"what the reward reads ({comparison.reward.observation.kind})"
    )
    distances_by_kind: dict[str, dict[str, np.ndarray]] = {"image features": {}, observation_text: {}}
    for role, generator in comparison.generators().items():
        # All latents have the same jitter, so that their distances do not include the noise of the rays.
        frontal_batches = views(comparison, generator, seeds, jitter_seed=seeds[0])  # batches of images
        # [N, F]
        features = np.concatenate(
            [feature_network(images.expand(-1, 3, -1, -1)).cpu().numpy() for images in frontal_batches]
        )
        # [N, cells]
        observation_values = np.concatenate(
            [_cells(observed_batch) for observed_batch in comparison.observed(generator, seeds)]
        )
        for kind_name, item_features in (
            ("image features", features),
            (observation_text, observation_values),
        ):
            distances_by_kind[kind_name][role] = feature_sets.pairwise_distances(item_features)
    # Ratios are relative to the diversity before tuning, which is one of the roles.
    diversity_rows: list[dict] = []
    for kind_name, distances_by_role in distances_by_kind.items():
        for role, pairwise_distances in distances_by_role.items():
            # to the diversity before tuning
            ratio = feature_sets.pairwise_ratio(distances_by_role["before"], pairwise_distances)
            diversity_rows.append(
                {
                    "of": kind_name,
                    "role": role,
                    **feature_sets.mean_pairwise(pairwise_distances)._asdict(),
                    "ratio": ratio.mean,
                    "ratio_lo": ratio.lo,
                    "ratio_hi": ratio.hi,
                }
            )
    sentences = []
    for diversity_row in (
        diversity_row for diversity_row in diversity_rows if diversity_row["role"] == "after"
    ):
        comparative_word = (
            "less"
            if diversity_row["ratio_hi"] < 1
            else "more"
            if diversity_row["ratio_lo"] > 1
            else "neither shown more nor less"
        )
        ratio_text = span_apart(
            diversity_row["ratio"], diversity_row["ratio_lo"], diversity_row["ratio_hi"], 1, 3
        )
        sentences.append(
            f"Mean pairwise distance of {diversity_row['of']}: {ratio_text} times that before; samples are"
            f" {comparative_word} diverse."
        )
    if observation_text == SLABS:
        sentences.append("Slabs are compared as the reward reads them, each normalised to 0 to 100.")
    sentences.append(
        "A collapse would show as a ratio near 0. Less diversity alone does not say whether defects or good"
        " variety disappeared."
    )
    return Finding(
        facts=comparison.facts(seeds, ROLES, feature_sets.METHOD),
        data={"rows": diversity_rows},
        rows=diversity_rows,
        says=sentences,
    )


def renderings(comparison: Comparison, generator: LoadedGenerator, seeds: range, yaw: float) -> torch.Tensor:
    """Return images [N, 3, R, R] of seeds on the CPU, with the same noise and ray jitter in every call.

    Args: yaw: yaw of the camera, in radians from frontal.
    """
    return torch.cat(
        [images.float().clamp(-1, 1).cpu() for images in views(comparison, generator, seeds, yaw)]
    )


def _drift(
    comparison: Comparison, measures: Sequence[Measure], yaw: float, meaning_text: str, *note_texts: str
) -> Finding:
    """Compare the images before tuning with the images of every other network, by measures of similarity.

    As a reference for unrelated images, each image before tuning is also compared with the image of another
    latent ("other latent").

    Args:
        measures: measures that take two batches of images and return one value per pair of images.
        yaw: yaw of the camera, in radians from frontal.
        meaning_text: sentence that explains what the measures mean.
        note_texts: further sentences.
    """
    seeds = comparison.seeds()  # N held-out latents
    images_by_role = {
        role: renderings(comparison, generator, seeds, yaw)
        for role, generator in comparison.generators().items()
    }
    batches_before = images_by_role.pop("before").split(comparison.batch)  # batches of the reference images
    # roll(1, 0) pairs image i with image i - 1.
    images_by_role["other latent"] = torch.cat(batches_before).roll(1, 0)
    values_by_measure = {measure.name: dict[str, list[float]]() for measure in measures}
    table_rows = []
    sentences = []
    for measure in measures:
        measure_name = measure.name
        text_by_role = {}  # role -> mean with interval
        for role, other_images in images_by_role.items():
            batch_pairs = zip(batches_before, other_images.split(comparison.batch), strict=True)
            # [N]; float64 for the bootstrap
            similarity_values = np.concatenate(
                [
                    measure.values(images_before.to(comparison.device), images_after.to(comparison.device))
                    for images_before, images_after in batch_pairs
                ]
            ).astype(np.float64)
            values_by_measure[measure_name][role] = similarity_values.tolist()
            interval = bootstrap_mean_interval(similarity_values)  # over latents
            table_rows.append({"measure": measure_name, "against": role, **interval._asdict()})
            text_by_role[role] = span(*interval, ".3f")
        control_text = f"; control {text_by_role['control']}" if "control" in text_by_role else ""
        sentences.append(
            f"{measure_name}, before against after: {text_by_role['after']}{control_text}; against another"
            f" latent {text_by_role['other latent']}."
        )
    return Finding(
        facts=comparison.facts(seeds, ROLES, BOOTSTRAP),
        data={"measures": values_by_measure, "rows": table_rows},
        rows=table_rows,
        says=[*sentences, meaning_text, *note_texts],
    )


def appearance_drift(comparison: Comparison, _folder: Path) -> Finding:
    """Compare images of the same latents before and after tuning by PSNR and SSIM, and by LPIPS if possible.

    LPIPS needs the weights of --lpips.
    """
    measures = [Measure("PSNR, dB", psnr, "higher", "dB"), Measure("SSIM", ssim, "higher", "-1..1")]
    if comparison.lpips is not None:
        measures.append(
            Measure("LPIPS", load_lpips(comparison.lpips, comparison.device), "lower", "distance")
        )
    missing_notes = [
        *([NO_LPIPS] if comparison.lpips is None else []),
        *([NO_CONTROL] if comparison.control is None else []),
    ]
    meaning_text = (
        "Drift is change, not harm: a better shape has to look different. The control shows how much change"
        " happens without the reward; another latent shows the value of unrelated images."
    )
    return _drift(comparison, measures, YAW, meaning_text, *missing_notes)


def identity_drift(comparison: Comparison, _folder: Path) -> Finding:
    """Compare the face embeddings of the same latents before and after tuning by their cosine similarity.

    The embeddings come from the network of --identity, applied to frontal images.
    """
    assert comparison.identity is not None  # `jobs` returns this job only with a network
    embed = load_identity(comparison.identity, comparison.device)  # images -> unit embeddings [N, F]
    meaning_text = (
        "Identity means what this network was trained to distinguish. On other images than those of its"
        " training, the similarity means little."
    )
    # Embeddings have unit length, so their scalar product is the cosine.
    return _drift(
        comparison,
        [
            Measure(
                "cosine similarity",
                lambda first_images, second_images: (embed(first_images) * embed(second_images)).sum(dim=1),
                "higher",
                "-1..1",
            )
        ],
        0.0,
        meaning_text,
    )


def _panels(table_rows: list[dict], column_name: str, value_key: str = "mean", **axes_settings: Any):
    """Draw a panel for each value of a column, with a point and its interval for each row.

    Args:
        table_rows: rows of the table, each with a "role" and an interval.
        column_name: name of the column.
        value_key: key of the plotted value in a row.
        axes_settings: settings of the axes, in which '{}' stands for the column's value.
    """
    # in the order of the rows
    column_values = list(dict.fromkeys(table_row[column_name] for table_row in table_rows))
    figure, axes = style.figure(column_count=len(column_values))
    for axis, column_value in zip(np.atleast_1d(axes), column_values, strict=True):
        panel_rows = [table_row for table_row in table_rows if table_row[column_name] == column_value]
        for role_index, table_row in enumerate(panel_rows):
            style.interval(axis, role_index, table_row, table_row["role"], value_key)
        axis.set_xticks(range(len(panel_rows)), [table_row["role"] for table_row in panel_rows])
        axis.set(
            xlim=(-0.5, len(panel_rows) - 0.5),
            **{
                setting_key: setting_value.format(column_value)
                if isinstance(setting_value, str)
                else setting_value
                for setting_key, setting_value in axes_settings.items()
            },
        )
    return figure


def plot_distances(finding_data: dict):
    """Plot the distances to the data with their intervals.

    Args: finding_data: data of the finding of `distances`.
    """
    return _panels(
        finding_data["distances"],
        "distance",
        ylabel="{} distance, squared feature units",
        title="{} distance to the data",
    )


def plot_precision_recall(finding_data: dict):
    """Plot precision and recall with their intervals.

    Args: finding_data: data of the finding of `distances`.
    """
    return _panels(
        finding_data["precision_recall"], "measure", "value", ylabel="{}, share", title="{}", ylim=(0, 1.02)
    )


def plot_diversity(finding_data: dict):
    """Plot the diversity of images and of the reward's input, with intervals.

    Args: finding_data: data of the finding of `diversity`.
    """
    return _panels(
        finding_data["rows"],
        "of",
        ylabel="mean pairwise RMS difference",
        title="Diversity of {}",
        ylim=(0, None),
    )


def plot_similarity(finding_data: dict):
    """Plot how similar images are to the image before tuning: the distribution over latents, by measure and
    role.

    Args: finding_data: data of the finding of `appearance_drift` or `identity_drift`.
    """
    figure, axes = style.figure(column_count=len(finding_data["measures"]))
    for axis, (measure_name, values_by_role) in zip(
        np.atleast_1d(axes), finding_data["measures"].items(), strict=True
    ):
        violins = axis.violinplot(list(values_by_role.values()), showextrema=False)  # one body per role
        for role_index, (body, role) in enumerate(zip(violins["bodies"], values_by_role, strict=True)):
            body.set_facecolor(style.colour(role))
            body.set_alpha(0.5)
            # The mean with its interval on top of the distribution
            interval_row = next(
                interval_row
                for interval_row in finding_data["rows"]
                if interval_row["measure"] == measure_name and interval_row["against"] == role
            )
            style.interval(axis, role_index + 1, interval_row, role, markersize=4)
        axis.set_xticks(range(1, len(values_by_role) + 1), list(values_by_role))
        axis.set(ylabel=measure_name, title=f"{measure_name}, against before")
    return figure
