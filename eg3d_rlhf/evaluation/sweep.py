"""Sweep the weight λ_r of the reward and the weight λ_σ of the density-consistency term.

A setting is a pair of weights; a cell is a setting with a training seed. Each cell is a resumable run of
train.py, whose network is compared with the network before tuning. The page plots the gain in reward against
the distance from the network before tuning and against geometry. The Pareto front consists of the settings
that no other setting dominates.
Shapes: N latents or points, M measures.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eg3d_rlhf.core.statistics import t_mean_interval
from eg3d_rlhf.evaluation import images, rewards
from eg3d_rlhf.evaluation.comparison import Comparison, Sources, load_comparison
from eg3d_rlhf.evaluation.geometry import VIEWS, view_measures
from eg3d_rlhf.evaluation.paired import BOOTSTRAP, compute_means
from eg3d_rlhf.evaluation.trainings import Part, make_with_progress_bar
from eg3d_rlhf.experiments import pages, style
from eg3d_rlhf.experiments.pages import Finding, Job, identity_of_file, write_page
from eg3d_rlhf.experiments.store import json_hash
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.measures.features import load_features
from eg3d_rlhf.measures.resampling import kernel_change_interval
from eg3d_rlhf.tuning.gan.heldout_metrics import utilities
from eg3d_rlhf.tuning.gan.phase import density_l1
from training.config import number_text

TITLE = "Sweep of the reward's and the consistency term's weight"
KEY = "front"
REWARD = "reward"  # the reward that the runs optimise
DISTANCE = "distance"  # from the generator before tuning, in raw density
GEOMETRY = "normal disagreement"  # between views; the simulated annotator does not use this measure
HELDOUT = "held-out reward"  # measured only if a held-out reward is given
ORACLE = "oracle"  # utility of the simulated annotator without noise; for synthetic data alone
IMAGES = "kernel distance of images"  # measured only if a dataset is given
LABELS = {
    REWARD: "change of the tuned reward",
    DISTANCE: "mean |σ - σ before|, raw density",
    GEOMETRY: "change of normal disagreement, degrees",
    HELDOUT: "change of the held-out reward",
    ORACLE: "change of the oracle's utility",
    IMAGES: "change of the images' kernel distance",
}
GOALS = {REWARD: 1, DISTANCE: -1, GEOMETRY: -1}  # measures of the front; 1: more is better, -1: less
# description of the intervals on the page
SEEDS_INTERVAL = "95 % t interval over training seeds where there are two or more, else over latents"


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """A pair of weights with a training seed."""

    lambda_r: float  # reward weight, >= 0
    lambda_sigma: float  # density consistency weight, >= 0; 0 is the run without that term
    seed: int

    @property
    def setting(self) -> str:
        """Return the weights in words. Cells of the same setting differ only in their seed."""
        return (
            "control (λ_r = 0)"
            if self.lambda_r == 0
            else f"λ_r = {self.lambda_r:g}, λ_σ = {self.lambda_sigma:g}"
        )

    @property
    def name(self) -> str:
        """Return the name of the cell in folders and keys."""
        return f"r{self.lambda_r:g}-sigma{self.lambda_sigma:g}-s{self.seed}"


def grid(lambda_r: Sequence[float], lambda_sigma: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """List every combination of weights and seeds, grouped by seed.

    A run with λ_r = 0 has no reward phase, so λ_σ has no effect; there is one such run for each seed.

    Args:
        lambda_r, lambda_sigma: values of the two weights, >= 0.
        seeds: training seeds, >= 0.
    Raises: ValueError if a list is empty or contains a negative value.
    """
    for flag, flag_values in (("--lambda-r", lambda_r), ("--lambda-sigma", lambda_sigma), ("--seeds", seeds)):
        if not flag_values:
            raise ValueError(f"{flag} has no value. Pass one or more values >= 0, for example {flag}=0,1,10.")
        if min(flag_values) < 0:
            raise ValueError(
                f"{flag}={','.join(map(str, flag_values))} contains a negative value. Pass only values >= 0."
            )
    # With λ_r = 0, λ_σ is set to 0, since it has no effect.
    cells = [
        Cell(lambda_r=reward_weight, lambda_sigma=sigma_weight if reward_weight else 0.0, seed=seed)
        for seed in seeds
        for reward_weight in lambda_r
        for sigma_weight in lambda_sigma
    ]
    return list(dict.fromkeys(cells))  # removes repeated controls and keeps the order


def make_part(cell: Cell, folder: Path, kimg: float, more_flags: Sequence[str] = ()) -> Part:
    """Return the command (`Part`) of train.py that trains a cell.

    Args:
        folder: parent of all cells' folders.
        kimg: length of the run, in thousands of images.
        more_flags: further flags of train.py, which all cells share.
    """
    # The format :g writes 10.0 as 10, so that equal weights give equal commands and folders.
    weight_flags = [
        f"--lambda-r={cell.lambda_r:g}",
        f"--lambda-sigma={cell.lambda_sigma:g}",
        f"--seed={cell.seed}",
        f"--kimg={number_text(kimg)}",
    ]
    return Part.keyed(cell.name, folder, ["--reward=sigma", *weight_flags, "--no-summary", *more_flags])


def cell_jobs(comparison: Comparison, path_by_cell: Mapping[Cell, Path]) -> list[Job]:
    """Return a job for each cell, which measures its tuned network.

    Args: path_by_cell: network file of each cell.
    """
    # Everything that changes a measurement must be an input of the job, else a stored result of other inputs
    # would be used.
    shared_inputs: dict[str, Any] = {
        "n": comparison.n,  # latents
        "images": comparison.images,  # of the kernel distance
        "data": comparison.data,
        "views": VIEWS,  # of the geometry measure
        "inception": identity_of_file(comparison.inception),
    }
    return [
        comparison.job(
            f"cell-{cell.name}",
            f"{cell.setting}, seed {cell.seed}",
            partial(measure_cell, cell=cell, network_path=network_path),
            roles=("reward", "held-out"),
            **shared_inputs,
            files={
                "before": comparison.before.hash,
                "cell": identity_of_file(network_path),
                "reward": comparison.reward_hash,
            },
        )
        for cell, network_path in path_by_cell.items()
    ]


def front_job(comparison: Comparison, cells: Sequence[Cell], finding_by_key: Mapping[str, Finding]) -> Job:
    """Return the job that computes the Pareto front.

    Args: finding_by_key: findings of the jobs of `cell_jobs`, by their keys.
    """
    finding_by_cell = {cell: finding_by_key[f"cell-{cell.name}"] for cell in cells}
    plot_by_name = {"reward-distance-geometry": plot_front, "other-measures": plot_others}
    return Job(
        key=KEY,
        title="Reward, distance and geometry",
        compute=partial(front, comparison, finding_by_cell),
        plots=plot_by_name,
        inputs={cell.name: json_hash(finding.data) for cell, finding in finding_by_cell.items()},
    )


def _compute_once(comparison: Comparison, measurement_name: str, compute):
    """Return a measurement of the generator before tuning, which is computed once for all cells.

    Args:
        measurement_name: name of the measurement.
        compute: function without arguments that computes it.
    """
    # All settings that the value depends on. The other settings are the same for all cells.
    cache_key = (
        "sweep",
        measurement_name,
        comparison.before.hash,
        comparison.psi,
        comparison.n,
        comparison.images,
        comparison.seed,
    )
    if cache_key not in comparison.memory:
        comparison.memory[cache_key] = compute()
    return comparison.memory[cache_key]


def measure_cell(comparison: Comparison, _folder: Path, cell: Cell, network_path: Path) -> Finding:
    """Compute the change of every measure from the network before tuning to the network of a cell.

    Most measures have a value for each latent. The kernel distance of images has one value for all latents.
    Args: network_path: network file of the cell.
    """
    seeds = comparison.seeds()  # N held-out latents
    tuned_network = comparison.load(network_path)
    changes_by_measure = {
        REWARD: (comparison.scores(tuned_network, seeds) - comparison.scores(comparison.before, seeds))
        .double()
        .numpy()
    }
    if comparison.held_out is not None:
        changes_by_measure[HELDOUT] = (
            (
                comparison.scores(tuned_network, seeds, held_out=True)
                - comparison.scores(comparison.before, seeds, held_out=True)
            )
            .double()
            .numpy()
        )
    # [N, D, H, W]
    density_before = _compute_once(
        comparison, "density", lambda: rewards.densities(comparison, comparison.before, seeds)
    )
    density_after = rewards.densities(comparison, tuned_network, seeds)  # [N, D, H, W]
    changes_by_measure[DISTANCE] = density_l1(density_after, density_before).double().numpy()  # [N]
    if comparison.synthetic:
        changes_by_measure[ORACLE] = utilities(tuned_network.generator, seeds) - _compute_once(
            comparison, "oracle", lambda: utilities(comparison.before.generator, seeds)
        )
    changes_by_measure[GEOMETRY] = normal_disagreement(comparison, tuned_network) - _compute_once(
        comparison, "normals", lambda: normal_disagreement(comparison, comparison.before)
    )
    interval_by_measure = compute_means(changes_by_measure)  # mean and interval over latents
    # The kernel distance needs images of the data.
    if comparison.data:
        feature_network = load_features(comparison.inception, comparison.device)
        real_features, dataset = _compute_once(
            comparison, "reals", lambda: images.real_features(comparison, feature_network)
        )
        compute_fake_features = partial(
            images.fake_features, comparison, cameras=dataset.get_labels(), feature_network=feature_network
        )
        # features of the same latents and cameras under both networks
        features_before_and_after = (
            _compute_once(comparison, "images", lambda: compute_fake_features(comparison.before)),
            compute_fake_features(tuned_network),
        )
        distance_change = kernel_change_interval(
            *features_before_and_after, real_features, images.RESAMPLES, comparison.seed
        )
        interval_by_measure[IMAGES] = {
            "mean": distance_change.mean,
            "lo": distance_change.lo,
            "hi": distance_change.hi,
        }
    facts = comparison.facts(
        seeds,
        interval=BOOTSTRAP,
        networks={
            "before": comparison.before.hash,
            "cell": tuned_network.hash,
            "reward": comparison.reward_hash,
        },
    )
    # Geometry is measured on the first half of the latents, so the later rows do not have it.
    latent_rows = [
        {
            "seed": seed,
            **{
                measure_name: float(latent_changes[latent_index])
                for measure_name, latent_changes in changes_by_measure.items()
                if latent_index < len(latent_changes)
            },
        }
        for latent_index, seed in enumerate(seeds)
    ]
    # `front` reads these data, so that it need not load the networks.
    return Finding(
        facts=facts,
        data={"cell": vars(cell), "network": tuned_network.hash, "measures": interval_by_measure},
        rows=latent_rows,
    )


def normal_disagreement(comparison: Comparison, generator: LoadedGenerator) -> np.ndarray:
    """Measure the disagreement of normals between neighbouring views, in degrees, on half of the latents, [N
    / 2].
    """
    # Half of the latents are used to save time, since several views of each are rendered.
    return view_measures(comparison, generator, comparison.seeds(max(2, comparison.n // 2))).normal


def pareto(points: np.ndarray) -> np.ndarray:
    """Return a mask [N] of the points on the Pareto front, which no other point dominates.

    A point dominates another one if it is at least as good in every column and better in at least one.
    Args: points: [N, M], where more is better.
    """
    # All pairs of points are compared: [1, N, M] with [N, 1, M] -> [N, N]
    is_as_good = np.all(points[None] >= points[:, None], axis=2)  # [i, j]: j is nowhere worse than i
    is_better = np.any(points[None] > points[:, None], axis=2)  # [i, j]: j is better than i somewhere
    return ~np.any(is_as_good & is_better, axis=1)


def combine_seeds(all_findings: Mapping[Cell, Finding]) -> list[dict]:
    """Return a row for each setting: the mean over seeds with its interval, and the value of each seed.

    "on_front" is True in the rows of settings on the Pareto front.
    """
    setting_rows: list[dict] = []
    for setting in dict.fromkeys(cell.setting for cell in all_findings):
        finding_by_cell = {cell: finding for cell, finding in all_findings.items() if cell.setting == setting}
        first_cell, first_finding = next(iter(finding_by_cell.items()))
        statistics_by_measure = {}  # statistics by measure
        for measure_name, latent_interval in first_finding.data["measures"].items():
            seed_means = [
                finding.data["measures"][measure_name]["mean"] for finding in finding_by_cell.values()
            ]
            # With one seed there is no interval over seeds, so the interval over latents is used.
            statistics_by_measure[measure_name] = {
                **(t_mean_interval(seed_means)._asdict() if len(seed_means) > 1 else latent_interval),
                "each": seed_means,
            }
        setting_rows.append(
            {
                "setting": setting,
                "lambda_r": first_cell.lambda_r,
                "lambda_sigma": first_cell.lambda_sigma if first_cell.lambda_r else None,
                "seeds": [cell.seed for cell in finding_by_cell],  # in the order of "each"
                "measures": statistics_by_measure,
            }
        )
    # [settings, M]; the sign turns "less is better" into "more is better"
    goal_means = np.array(
        [
            [sign * setting_row["measures"][measure_name]["mean"] for measure_name, sign in GOALS.items()]
            for setting_row in setting_rows
        ]
    )
    for setting_row, is_on_front in zip(setting_rows, pareto(goal_means), strict=True):
        setting_row["on_front"] = bool(is_on_front)
    return setting_rows


def front(comparison: Comparison, finding_by_cell: Mapping[Cell, Finding], _folder: Path) -> Finding:
    """Compute the table of all settings, and mark the settings on the Pareto front."""
    setting_rows = combine_seeds(finding_by_cell)
    suffix_by_key = {"": "mean", " lo": "lo", " hi": "hi"}
    # Each row of the CSV has three columns for each measure: the mean and the ends of its interval.
    csv_rows = [
        {
            "setting": setting_row["setting"],
            "front": "on the front" if setting_row["on_front"] else "",
            "training seeds": " ".join(map(str, setting_row["seeds"])),
            **{
                f"{measure_name}{suffix}": statistics[statistic_key]
                for measure_name, statistics in setting_row["measures"].items()
                for suffix, statistic_key in suffix_by_key.items()
            },
        }
        for setting_row in setting_rows
    ]
    hash_by_network = {"before": comparison.before.hash, "reward": comparison.reward_hash}
    # The page states the hashes of all networks.
    hash_by_network |= {cell.name: finding.data["network"] for cell, finding in finding_by_cell.items()}
    facts = comparison.facts(
        comparison.seeds(),
        interval=SEEDS_INTERVAL,
        unit=f"latents for each of {len(finding_by_cell)} runs",
        networks=hash_by_network,
    )
    front_rows = [setting_row for setting_row in setting_rows if setting_row["on_front"]]
    sentences = [
        f"On the front, by means ({len(front_rows)} of {len(setting_rows)} settings): "
        + "; ".join(setting_row["setting"] for setting_row in front_rows)
        + ".",
        (
            "A setting is on the front if no other setting has at least the same reward with no more distance"
            " and no more disagreement of normals."
        ),
    ]
    # Each setting with the consistency term is compared with the setting of the same λ_r without this term.
    for base_row, setting_row in itertools.product(setting_rows, setting_rows):
        if (
            setting_row["lambda_r"]
            and setting_row["lambda_r"] == base_row["lambda_r"]
            and setting_row["lambda_sigma"]
            and base_row["lambda_sigma"] == 0
        ):
            distance_reduction = 1 - setting_row["measures"][DISTANCE]["mean"] / max(
                base_row["measures"][DISTANCE]["mean"], 1e-12
            )
            relative_gain = setting_row["measures"][REWARD]["mean"] / (
                base_row["measures"][REWARD]["mean"] or 1e-12
            )
            sentences.append(
                f"At λ_r = {setting_row['lambda_r']:g}, λ_σ = {setting_row['lambda_sigma']:g} reduces the"
                f" distance by {distance_reduction:.1%} relative to the run without the consistency term, and"
                f" reaches {relative_gain:.1%} of that run's change of the reward."
            )
    if max(len(setting_row["seeds"]) for setting_row in setting_rows) < 2:
        sentences.append(
            "There is one training seed for each setting, so the intervals cover latents and not the"
            " variation between runs. Pass several seeds to --seeds."
        )
    sentences += [
        (
            "The front is computed from means alone. Settings whose intervals overlap may change places in"
            " another run."
        ),
        (
            "The reward phase has its own optimiser (Adam), whose step does not depend on the scale of the"
            " loss. Only the ratio λ_σ / λ_r matters, and without the consistency term all λ_r > 0 train"
            " nearly alike."
        ),
        (
            "The consistency term penalises the distance. The distance orders runs by how far they moved, not"
            " by the quality of their shapes."
        ),
    ]
    return Finding(facts=facts, data={"rows": setting_rows}, rows=csv_rows, says=sentences)


def _panel(axes, setting_rows: list[dict], x_measure: str, y_measure: str) -> None:
    """Plot two measures of all settings against each other, with the intervals of both.

    Args:
        setting_rows: result of `combine_seeds`.
        x_measure, y_measure: names of the two measures.
    """
    for setting_index, setting_row in enumerate(setting_rows):
        statistics_by_measure = setting_row["measures"]
        colour = style.CYCLE[setting_index % len(style.CYCLE)]  # colours repeat if there are many settings
        axes.errorbar(
            statistics_by_measure[x_measure]["mean"],
            statistics_by_measure[y_measure]["mean"],
            xerr=style.errors(statistics_by_measure[x_measure]),
            yerr=style.errors(statistics_by_measure[y_measure]),
            color=colour,
            linewidth=1,
            marker="o" if setting_index < len(style.CYCLE) else "s",
            markersize=6,
            markerfacecolor=colour if setting_row["on_front"] else "none",  # filled: on the front
            label=setting_row["setting"] + (" (front)" if setting_row["on_front"] else ""),
        )
        if len(setting_row["seeds"]) > 1:
            # Small dots show the single seeds.
            axes.plot(
                statistics_by_measure[x_measure]["each"],
                statistics_by_measure[y_measure]["each"],
                ".",
                color=colour,
                markersize=3,
            )
    axes.axhline(0, color=style.colour("noise"), linewidth=0.8)
    axes.set(xlabel=LABELS[x_measure], ylabel=LABELS[y_measure])


def plot_front(finding_data: dict):
    """Plot the reward over the distance and over geometry. Filled points are on the Pareto front.

    Args: finding_data: data of the finding of `front`.
    """
    figure, axes = style.figure(column_count=2)
    # A dashed line joins the settings on the front in order of distance.
    front_rows = sorted(
        (setting_row for setting_row in finding_data["rows"] if setting_row["on_front"]),
        key=lambda setting_row: setting_row["measures"][DISTANCE]["mean"],
    )
    front_line = [
        [setting_row["measures"][measure_name]["mean"] for setting_row in front_rows]
        for measure_name in (DISTANCE, REWARD)
    ]
    axes[0].plot(*front_line, "--", color=style.colour("noise"), linewidth=0.8)
    _panel(axes[0], finding_data["rows"], DISTANCE, REWARD)
    _panel(axes[1], finding_data["rows"], GEOMETRY, REWARD)
    axes[0].legend(fontsize=6)
    return figure


def plot_others(finding_data: dict):
    """Plot, over the distance, the measures that do not define the front.

    If no such measure was computed, plot the tuned reward.

    Args: finding_data: data of the finding of `front`.
    """
    measure_names = [
        measure_name
        for measure_name in (HELDOUT, ORACLE, IMAGES)
        if measure_name in finding_data["rows"][0]["measures"]
    ] or [REWARD]
    figure, axes = style.figure(column_count=len(measure_names))
    for axis, measure_name in zip(
        np.atleast_1d(axes), measure_names, strict=True
    ):  # one column: axes is no array
        _panel(axis, finding_data["rows"], DISTANCE, measure_name)
    return figure


def write(
    comparison: Comparison, path_by_cell: Mapping[Cell, Path], page_folder: Path, quiet: bool = False
) -> Finding:
    """Measure the cells, compute the Pareto front, and write the page; return the finding of the front.

    Args:
        path_by_cell: network file of each cell.
        quiet: True hides the progress.
    """
    finding_by_key = pages.run(cell_jobs(comparison, path_by_cell), page_folder, quiet=quiet)
    page_job = front_job(comparison, list(path_by_cell), finding_by_key)
    front_findings = pages.run([page_job], page_folder, quiet=True)
    introduction = (
        f"{len(path_by_cell)} runs of train.py started from {comparison.before.path.name}. Each is compared"
        f" with it on the same {comparison.n} held-out latents. The data of every run are in"
        " data/cell-*.json."
    )
    write_page(
        page_folder / "index.html",
        TITLE,
        introduction,
        [page_job],
        front_findings,
        front_findings[KEY].says[:1],
    )
    return front_findings[KEY]


def make_cells(part_by_cell: Mapping[Cell, Part], process_count: int) -> None:
    """Train the cells that are not finished.

    Args:
        part_by_cell: training of each cell, as `make_part` returns it.
        process_count: number of runs of train.py at the same time.
    """
    # OMP_NUM_THREADS is used if the user has set it. Else the cores are divided among the runs.
    thread_count = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // process_count))
    make_with_progress_bar(
        [[part] for part in part_by_cell.values()], process_count, thread_count, "training", "cell"
    )


def measure_cells(part_by_cell: Mapping[Cell, Part], sources: Sources, page_folder: Path) -> Finding:
    """Measure the finished cells, and write the page; return the finding of the front.

    Args:
        part_by_cell: training of each cell, of which at least one is finished.
        sources: networks, rewards and data that the user named.
    Raises: ValueError if no training has a network.
    """
    # A comparison cannot be loaded without a tuned network, so the first one is loaded.
    path_by_cell = {
        cell: network_path
        for cell, part in part_by_cell.items()
        if (network_path := part.network()) is not None
    }
    if not path_by_cell:
        raise ValueError(
            f"--outdir: none of the {len(part_by_cell)} trainings in {page_folder} has a network to measure."
            " Run the same command again to train them."
        )
    return write(
        load_comparison(replace(sources, after=next(iter(path_by_cell.values())))), path_by_cell, page_folder
    )
