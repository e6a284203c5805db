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
    Raises: ValueError if a list is empty or contains a negative value.
    """
    for flag, values in (("--lambda-r", lambda_r), ("--lambda-sigma", lambda_sigma), ("--seeds", seeds)):
        if not values or min(values) < 0:
            raise ValueError(
                f"{flag}={','.join(map(str, values))}: one or more values >= 0 are needed. Separate them by"
                f" commas, for example {flag}=0,1,10."
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
    """Return the run of train.py that trains a cell.

    Args:
        folder: parent of all cells' folders.
        kimg: length of the run, in thousands of images.
        more_flags: further flags of train.py, which all cells share.
    """
    # The format :g writes 10.0 as 10, so that equal weights give equal commands and folders.
    weights = [
        f"--lambda-r={cell.lambda_r:g}",
        f"--lambda-sigma={cell.lambda_sigma:g}",
        f"--seed={cell.seed}",
        f"--kimg={kimg:g}",
    ]
    return Part.keyed(cell.name, folder, ["--reward=sigma", *weights, "--no-summary", *more_flags])


def cell_jobs(comparison: Comparison, networks: Mapping[Cell, Path]) -> list[Job]:
    """Return a job for each cell, which measures its tuned network. Args: networks: network file by cell."""
    # Everything that changes a measurement must be an input of the job, else a stored result of other inputs
    # would be used.
    shared: dict[str, Any] = {
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
            partial(measure_cell, cell=cell, path=path),
            roles=("reward", "held-out"),
            **shared,
            files={
                "before": comparison.before.hash,
                "cell": identity_of_file(path),
                "reward": comparison.reward_hash,
            },
        )
        for cell, path in networks.items()
    ]


def front_job(comparison: Comparison, cells: Sequence[Cell], findings: Mapping[str, Finding]) -> Job:
    """Return the job that computes the Pareto front. Args: findings: findings of `cell_jobs` by key."""
    by_cell = {cell: findings[f"cell-{cell.name}"] for cell in cells}
    plots = {"reward-distance-geometry": plot_front, "other-measures": plot_others}
    return Job(
        key=KEY,
        title="Reward, distance and geometry",
        compute=partial(front, comparison, by_cell),
        plots=plots,
        inputs={cell.name: json_hash(finding.data) for cell, finding in by_cell.items()},
    )


def _compute_once(comparison: Comparison, name: str, compute):
    """Return a measurement of the generator before tuning, which is computed once for all cells.

    Args:
        name: name of the measurement.
        compute: function without arguments that computes it.
    """
    # All settings that the value depends on. The other settings are the same for all cells.
    cache_key = (
        "sweep",
        name,
        comparison.before.hash,
        comparison.psi,
        comparison.n,
        comparison.images,
        comparison.seed,
    )
    if cache_key not in comparison.memory:
        comparison.memory[cache_key] = compute()
    return comparison.memory[cache_key]


def measure_cell(comparison: Comparison, _folder: Path, cell: Cell, path: Path) -> Finding:
    """Compute the change of every measure from the network before tuning to the network of a cell.

    Most measures have a value for each latent. The kernel distance of images has one value for all latents.
    Args: path: network file of the cell.
    """
    seeds = comparison.seeds()  # N held-out latents
    tuned_network = comparison.load(path)
    values = {
        REWARD: (comparison.scores(tuned_network, seeds) - comparison.scores(comparison.before, seeds))
        .double()
        .numpy()
    }
    if comparison.held_out is not None:
        values[HELDOUT] = (
            (
                comparison.scores(tuned_network, seeds, held_out=True)
                - comparison.scores(comparison.before, seeds, held_out=True)
            )
            .double()
            .numpy()
        )
    density_before = _compute_once(
        comparison, "density", lambda: rewards.densities(comparison, comparison.before, seeds)
    )  # [N, D, H, W]
    density_after = rewards.densities(comparison, tuned_network, seeds)  # [N, D, H, W]
    values[DISTANCE] = density_l1(density_after, density_before).double().numpy()  # [N]
    if comparison.synthetic:
        values[ORACLE] = utilities(tuned_network.generator, seeds) - _compute_once(
            comparison, "oracle", lambda: utilities(comparison.before.generator, seeds)
        )
    values[GEOMETRY] = normal_disagreement(comparison, tuned_network) - _compute_once(
        comparison, "normals", lambda: normal_disagreement(comparison, comparison.before)
    )
    interval_by_measure = compute_means(values)  # mean and interval over latents
    # The kernel distance needs images of the data.
    if comparison.data:
        network = load_features(comparison.inception, comparison.device)
        real_features, dataset = _compute_once(
            comparison, "reals", lambda: images.real_features(comparison, network)
        )
        compute_fake_features = partial(
            images.fake_features, comparison, cameras=dataset.get_labels(), network=network
        )
        # features of the same latents and cameras under both networks
        features_before_and_after = (
            _compute_once(comparison, "images", lambda: compute_fake_features(comparison.before)),
            compute_fake_features(tuned_network),
        )
        change = kernel_change_interval(
            *features_before_and_after, real_features, images.RESAMPLES, comparison.seed
        )
        interval_by_measure[IMAGES] = {"mean": change.mean, "lo": change.lo, "hi": change.hi}
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
    rows = [
        {
            "seed": seed,
            **{
                name: float(measure_values[latent_index])
                for name, measure_values in values.items()
                if latent_index < len(measure_values)
            },
        }
        for latent_index, seed in enumerate(seeds)
    ]
    # `front` reads these data, so that it need not load the networks.
    return Finding(
        facts=facts,
        data={"cell": vars(cell), "network": tuned_network.hash, "measures": interval_by_measure},
        rows=rows,
    )


def normal_disagreement(comparison: Comparison, generator: LoadedGenerator) -> np.ndarray:
    """Return the disagreement of normals between neighbouring views, [N / 2], in degrees."""
    # Half of the latents are used to save time, since several views of each are rendered.
    return view_measures(comparison, generator, comparison.seeds(max(2, comparison.n // 2))).normal


def pareto(values: np.ndarray) -> np.ndarray:
    """Return a mask [N] of the points that no other point dominates (Pareto front).

    A point dominates another one if it is at least as good in every column and better in at least one.
    Args: values: [N, M], where more is better.
    """
    # All pairs of points are compared: [1, N, M] with [N, 1, M] -> [N, N]
    at_least = np.all(values[None] >= values[:, None], axis=2)  # [i, j]: j is nowhere worse than i
    better = np.any(values[None] > values[:, None], axis=2)  # [i, j]: j is better than i somewhere
    return ~np.any(at_least & better, axis=1)


def combine_seeds(by_cell: Mapping[Cell, Finding]) -> list[dict]:
    """Return a row for each setting: the mean over seeds with its interval, and the value of each seed."""
    rows: list[dict] = []
    for setting in dict.fromkeys(first_cell.setting for first_cell in by_cell):
        finding_by_cell = {
            first_cell: finding for first_cell, finding in by_cell.items() if first_cell.setting == setting
        }
        first_cell, first_finding = next(iter(finding_by_cell.items()))
        measures = {}  # statistics by measure
        for name, latent_interval in first_finding.data["measures"].items():
            seed_means = [finding.data["measures"][name]["mean"] for finding in finding_by_cell.values()]
            # With one seed there is no interval over seeds, so the interval over latents is used.
            measures[name] = {
                **(t_mean_interval(seed_means)._asdict() if len(seed_means) > 1 else latent_interval),
                "each": seed_means,
            }
        rows.append(
            {
                "setting": setting,
                "lambda_r": first_cell.lambda_r,
                "lambda_sigma": first_cell.lambda_sigma if first_cell.lambda_r else None,
                "seeds": [first_cell.seed for first_cell in finding_by_cell],  # in the order of "each"
                "measures": measures,
            }
        )
    # [settings, M]; the sign turns "less is better" into "more is better"
    means = np.array([[sign * row["measures"][name]["mean"] for name, sign in GOALS.items()] for row in rows])
    for row, is_on_front in zip(rows, pareto(means), strict=True):
        row["on_front"] = bool(is_on_front)
    return rows


def front(comparison: Comparison, by_cell: Mapping[Cell, Finding], _folder: Path) -> Finding:
    """Compute the table of all settings, and mark the settings on the Pareto front."""
    rows = combine_seeds(by_cell)
    suffix_by_key = {"": "mean", " lo": "lo", " hi": "hi"}
    # Each row of the CSV has three columns for each measure: the mean and the ends of its interval.
    table = [
        {
            "setting": row["setting"],
            "front": "on the front" if row["on_front"] else "",
            "training seeds": " ".join(map(str, row["seeds"])),
            **{
                f"{name}{suffix}": statistics[key]
                for name, statistics in row["measures"].items()
                for suffix, key in suffix_by_key.items()
            },
        }
        for row in rows
    ]
    networks = {"before": comparison.before.hash, "reward": comparison.reward_hash}
    # The page states the hashes of all networks.
    networks |= {cell.name: finding.data["network"] for cell, finding in by_cell.items()}
    facts = comparison.facts(
        comparison.seeds(),
        interval=SEEDS_INTERVAL,
        unit=f"latents for each of {len(by_cell)} runs",
        networks=networks,
    )
    front_rows = [row for row in rows if row["on_front"]]
    sentences = [
        f"On the front, by means ({len(front_rows)} of {len(rows)} settings): "
        + "; ".join(row["setting"] for row in front_rows)
        + ".",
        (
            "A setting is on the front if no other setting has at least the same reward with no more distance"
            " and no more disagreement of normals."
        ),
    ]
    # Each setting with the consistency term is compared with the setting of the same λ_r without this term.
    for base_row, row in itertools.product(rows, rows):
        if (
            row["lambda_r"]
            and row["lambda_r"] == base_row["lambda_r"]
            and row["lambda_sigma"]
            and base_row["lambda_sigma"] == 0
        ):
            distance_reduction = 1 - row["measures"][DISTANCE]["mean"] / max(
                base_row["measures"][DISTANCE]["mean"], 1e-12
            )
            relative_gain = row["measures"][REWARD]["mean"] / (base_row["measures"][REWARD]["mean"] or 1e-12)
            sentences.append(
                f"At λ_r = {row['lambda_r']:g}, λ_σ = {row['lambda_sigma']:g} reduces the distance by"
                f" {distance_reduction:.1%} relative to the run without the consistency term, and reaches"
                f" {relative_gain:.1%} of"
                " that run's change of the reward."
            )
    if max(len(row["seeds"]) for row in rows) < 2:
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
    return Finding(facts=facts, data={"rows": rows}, rows=table, says=sentences)


def _panel(axes, rows: list[dict], x_measure: str, y_measure: str) -> None:
    """Plot two measures of all settings against each other, with the intervals of both."""
    for setting_index, row in enumerate(rows):
        measures = row["measures"]
        colour = style.CYCLE[setting_index % len(style.CYCLE)]  # colours repeat if there are many settings
        axes.errorbar(
            measures[x_measure]["mean"],
            measures[y_measure]["mean"],
            xerr=style.errors(measures[x_measure]),
            yerr=style.errors(measures[y_measure]),
            color=colour,
            linewidth=1,
            marker="o" if setting_index < len(style.CYCLE) else "s",
            markersize=6,
            markerfacecolor=colour if row["on_front"] else "none",  # filled: on the front
            label=row["setting"] + (" (front)" if row["on_front"] else ""),
        )
        if len(row["seeds"]) > 1:
            # Small dots show the single seeds.
            axes.plot(
                measures[x_measure]["each"], measures[y_measure]["each"], ".", color=colour, markersize=3
            )
    axes.axhline(0, color=style.colour("noise"), linewidth=0.8)
    axes.set(xlabel=LABELS[x_measure], ylabel=LABELS[y_measure])


def plot_front(data: dict):
    """Plot the reward over the distance and over geometry. Filled points are on the Pareto front."""
    figure, axes = style.figure(columns=2)
    # A dashed line joins the settings on the front in order of distance.
    front_rows = sorted(
        (row for row in data["rows"] if row["on_front"]), key=lambda row: row["measures"][DISTANCE]["mean"]
    )
    front_line = [[row["measures"][name]["mean"] for row in front_rows] for name in (DISTANCE, REWARD)]
    axes[0].plot(*front_line, "--", color=style.colour("noise"), linewidth=0.8)
    _panel(axes[0], data["rows"], DISTANCE, REWARD)
    _panel(axes[1], data["rows"], GEOMETRY, REWARD)
    axes[0].legend(fontsize=6)
    return figure


def plot_others(data: dict):
    """Plot the measures that do not define the front over the distance.

    If no such measure was computed, plot the tuned reward.
    """
    names = [name for name in (HELDOUT, ORACLE, IMAGES) if name in data["rows"][0]["measures"]] or [REWARD]
    figure, axes = style.figure(columns=len(names))
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):  # one column: axes is no array
        _panel(axis, data["rows"], DISTANCE, name)
    return figure


def write(comparison: Comparison, networks: Mapping[Cell, Path], out: Path, quiet: bool = False) -> Finding:
    """Measure the cells, compute the Pareto front, and write the page; return the finding of the front."""
    findings = pages.run(cell_jobs(comparison, networks), out, quiet=quiet)
    job = front_job(comparison, list(networks), findings)
    front_findings = pages.run([job], out, quiet=True)
    introduction = (
        f"{len(networks)} runs of train.py started from {comparison.before.path.name}. Each is compared with"
        f" it on the same {comparison.n} held-out latents. The data of every run are in data/cell-*.json."
    )
    write_page(out / "index.html", TITLE, introduction, [job], front_findings, front_findings[KEY].says[:1])
    return front_findings[KEY]


def make_cells(parts: Mapping[Cell, Part], jobs: int) -> None:
    """Train the cells that are not finished. Args: jobs: number of runs at the same time."""
    # OMP_NUM_THREADS is used if the user has set it. Else the cores are divided among the runs.
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs))
    make_with_progress_bar([[part] for part in parts.values()], jobs, threads, "training", "cell")


def measure_cells(parts: Mapping[Cell, Part], sources: Sources, out: Path) -> Finding:
    """Measure the finished cells, and write the page; return the finding of the front."""
    # A comparison cannot be loaded without a tuned network, so the first one stands for all.
    networks = {cell: path for cell, part in parts.items() if (path := part.network()) is not None}
    return write(load_comparison(replace(sources, after=next(iter(networks.values())))), networks, out)
