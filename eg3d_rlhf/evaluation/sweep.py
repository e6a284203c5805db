"""Sweep the weights of the reward and of density consistency: gain in reward against distance and geometry.

A cell is a pair of weights with a training seed. Each cell is a resumable run of train.py, which is measured
against the network before tuning. The front consists of the settings that no other setting dominates
(Pareto). Letters: N latents or points, M measures.
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
from eg3d_rlhf.evaluation.trainings import Part, make_shown
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
REWARD = "reward"  # the one that the runs optimise
DISTANCE = "distance"  # from the generator before tuning, in raw density
GEOMETRY = "normal disagreement"  # between views; the simulated annotator does not use it
SECOND = "held-out reward"  # only where one is given
ORACLE = "oracle"  # utility of the simulated annotator without noise; for synthetic data alone
IMAGES = "kernel distance of images"  # only where data are given
LABELS = {
    REWARD: "change of the tuned reward",
    DISTANCE: "mean |σ - σ before|, raw density",
    GEOMETRY: "change of normal disagreement, degrees",
    SECOND: "change of the held-out reward",
    ORACLE: "change of the oracle's utility",
    IMAGES: "change of the images' kernel distance",
}
GOALS = {REWARD: 1, DISTANCE: -1, GEOMETRY: -1}  # measures of the front; 1: more is better, -1: less
# words for the facts of the page
SEEDS_INTERVAL = "95 % t interval over training seeds where there are two or more, else over latents"


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """A setting with a training seed."""

    lambda_r: float  # reward weight, >= 0
    lambda_sigma: float  # density consistency weight, >= 0; 0 is the run without that term
    seed: int

    @property
    def setting(self) -> str:
        """Return the weights in words; cells of one setting differ only in their seed."""
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

    A run with λ_r = 0 has no reward phase, so its λ_σ has no effect: it occurs once for each seed.
    Raises: ValueError for a negative value or an empty list.
    """
    for flag, values in (("--lambda-r", lambda_r), ("--lambda-sigma", lambda_sigma), ("--seeds", seeds)):
        if not values or min(values) < 0:
            raise ValueError(
                f"{flag}: expected one or more values >= 0, got {list(values)}. Separate them by commas, for"
                " example 0,1,10."
            )
    cells = [
        Cell(lambda_r=r, lambda_sigma=s if r else 0.0, seed=seed)
        for seed in seeds
        for r in lambda_r
        for s in lambda_sigma
    ]
    return list(dict.fromkeys(cells))  # removes repeated controls and keeps the order


def part_of(cell: Cell, folder: Path, kimg: float, more: Sequence[str] = ()) -> Part:
    """Return the run of train.py of a cell.

    Args: folder: parent of all cells' folders; kimg: length of the run, thousands of images; more: flags that
        all cells share.
    """
    # :g writes 10.0 as 10, so that equal weights give equal commands and folders
    weights = [
        f"--lambda-r={cell.lambda_r:g}",
        f"--lambda-sigma={cell.lambda_sigma:g}",
        f"--seed={cell.seed}",
        f"--kimg={kimg:g}",
    ]
    return Part.keyed(cell.name, folder, ["--reward=sigma", *weights, "--no-summary", *more])


def cell_jobs(comparison: Comparison, networks: Mapping[Cell, Path]) -> list[Job]:
    """List a job for each cell that measures its tuned network. Args: networks: file of each cell."""
    # what changes a measurement must be an input of the job, or a stored result would be reused wrongly
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
    """Return the job that computes the front from the findings of `cell_jobs`."""
    by_cell = {cell: findings[f"cell-{cell.name}"] for cell in cells}
    plots = {"reward-distance-geometry": plot_front, "other-measures": plot_others}
    return Job(
        key=KEY,
        title="Reward, distance and geometry",
        compute=partial(front, comparison, by_cell),
        plots=plots,
        inputs={cell.name: json_hash(finding.data) for cell, finding in by_cell.items()},
    )


def _kept(comparison: Comparison, name: str, make):
    """Return a measurement of the generator before tuning; compute it once for all cells."""
    # all that the value depends on, besides the comparison's other settings, which do not change
    case = (
        "sweep",
        name,
        comparison.before.hash,
        comparison.psi,
        comparison.n,
        comparison.images,
        comparison.seed,
    )
    if case not in comparison.memory:
        comparison.memory[case] = make()
    return comparison.memory[case]


def measure_cell(comparison: Comparison, _folder: Path, cell: Cell, path: Path) -> Finding:
    """Measure the change of every measure from the network before tuning to that of a cell.

    Measures of single latents give one value per latent; the kernel distance gives one value for all.
    """
    seeds = comparison.seeds()
    after = comparison.load(path)
    values = {
        REWARD: (comparison.scores(after, seeds) - comparison.scores(comparison.before, seeds))
        .double()
        .numpy()
    }
    if comparison.held_out is not None:
        values[SECOND] = (
            (
                comparison.scores(after, seeds, held_out=True)
                - comparison.scores(comparison.before, seeds, held_out=True)
            )
            .double()
            .numpy()
        )
    start = _kept(
        comparison, "density", lambda: rewards.densities(comparison, comparison.before, seeds)
    )  # [N, D, H, W]
    sigma = rewards.densities(comparison, after, seeds)  # [N, D, H, W]
    values[DISTANCE] = density_l1(sigma, start).double().numpy()  # [N]
    if comparison.synthetic:
        values[ORACLE] = utilities(after.generator, seeds) - _kept(
            comparison, "oracle", lambda: utilities(comparison.before.generator, seeds)
        )
    values[GEOMETRY] = normals(comparison, after) - _kept(
        comparison, "normals", lambda: normals(comparison, comparison.before)
    )
    steps = compute_means(values)  # mean and interval over latents
    if comparison.data:
        network = load_features(comparison.inception, comparison.device)
        real, dataset = _kept(comparison, "reals", lambda: images.real_features(comparison, network))
        fakes = partial(images.fake_features, comparison, cameras=dataset.get_labels(), network=network)
        # features of the same latents and cameras under both networks
        pair = _kept(comparison, "images", lambda: fakes(comparison.before)), fakes(after)
        change = kernel_change_interval(*pair, real, images.RESAMPLES, comparison.seed)
        steps[IMAGES] = {"mean": change.mean, "lo": change.lo, "hi": change.hi}
    facts = comparison.facts(
        seeds,
        interval=BOOTSTRAP,
        networks={"before": comparison.before.hash, "cell": after.hash, "reward": comparison.reward_hash},
    )
    # geometry is measured on half the latents, so the later rows lack it
    rows = [
        {"seed": seed, **{name: float(v[i]) for name, v in values.items() if i < len(v)}}
        for i, seed in enumerate(seeds)
    ]
    # the front reads "measures" and "network" from here, not from the networks
    return Finding(
        facts=facts, data={"cell": vars(cell), "network": after.hash, "measures": steps}, rows=rows
    )


def normals(comparison: Comparison, generator: LoadedGenerator) -> np.ndarray:
    """Return the disagreement of normals between neighbouring views [N / 2], in degrees."""
    # half the latents, since several views of each are rendered
    return view_measures(comparison, generator, comparison.seeds(max(2, comparison.n // 2))).normal


def pareto(values: np.ndarray) -> np.ndarray:
    """Return a mask [N] of the Pareto-optimal points of `values` [N, M], where more is better.

    A point is dominated if another one is at least as good in every column and better in one.
    """
    # [1, N, M] against [N, 1, M] -> [N, N]
    at_least = np.all(values[None] >= values[:, None], axis=2)  # [i, j]: j is nowhere worse than i
    better = np.any(values[None] > values[:, None], axis=2)  # [i, j]: j is better than i somewhere
    return ~np.any(at_least & better, axis=1)


def gather(by_cell: Mapping[Cell, Finding]) -> list[dict]:
    """Combine the cells of each setting: mean over seeds with its interval, and the value of each seed."""
    rows: list[dict] = []
    for setting in dict.fromkeys(cell.setting for cell in by_cell):
        of_setting = {cell: finding for cell, finding in by_cell.items() if cell.setting == setting}
        cell, first = next(iter(of_setting.items()))
        measures = {}
        for name, step in first.data["measures"].items():
            each = [finding.data["measures"][name]["mean"] for finding in of_setting.values()]
            # with one seed there is no interval over seeds: that over latents stays
            measures[name] = {**(t_mean_interval(each)._asdict() if len(each) > 1 else step), "each": each}
        rows.append(
            {
                "setting": setting,
                "lambda_r": cell.lambda_r,
                "lambda_sigma": cell.lambda_sigma if cell.lambda_r else None,
                "seeds": [cell.seed for cell in of_setting],  # in the order of "each"
                "measures": measures,
            }
        )
    # [settings, M]; the sign turns "less is better" into "more is better"
    means = np.array([[sign * row["measures"][name]["mean"] for name, sign in GOALS.items()] for row in rows])
    for row, kept in zip(rows, pareto(means), strict=True):
        row["on_front"] = bool(kept)
    return rows


def front(comparison: Comparison, by_cell: Mapping[Cell, Finding], _folder: Path) -> Finding:
    """Compute the table of all settings, and mark those on the front, which no other setting dominates."""
    rows = gather(by_cell)
    columns = {"": "mean", " lo": "lo", " hi": "hi"}
    # a row of the CSV: each measure in three columns, the mean and the ends of its interval
    table = [
        {
            "setting": row["setting"],
            "front": "on the front" if row["on_front"] else "",
            "training seeds": " ".join(map(str, row["seeds"])),
            **{f"{name}{end}": m[key] for name, m in row["measures"].items() for end, key in columns.items()},
        }
        for row in rows
    ]
    networks = {"before": comparison.before.hash, "reward": comparison.reward_hash}
    # the hashes of all networks stand in the facts of the page
    networks |= {cell.name: finding.data["network"] for cell, finding in by_cell.items()}
    facts = comparison.facts(
        comparison.seeds(),
        interval=SEEDS_INTERVAL,
        unit=f"latents for each of {len(by_cell)} runs",
        networks=networks,
    )
    kept = [row for row in rows if row["on_front"]]
    sentences = [
        f"On the front, by means ({len(kept)} of {len(rows)} settings): "
        + "; ".join(row["setting"] for row in kept)
        + ".",
        (
            "A setting is on the front if no other setting has at least the same reward with no more distance"
            " and no more disagreement of normals."
        ),
    ]
    # each setting with the consistency term against the one of the same λ_r without it
    for without, row in itertools.product(rows, rows):
        if (
            row["lambda_r"]
            and row["lambda_r"] == without["lambda_r"]
            and row["lambda_sigma"]
            and without["lambda_sigma"] == 0
        ):
            share = 1 - row["measures"][DISTANCE]["mean"] / max(without["measures"][DISTANCE]["mean"], 1e-12)
            gain = row["measures"][REWARD]["mean"] / (without["measures"][REWARD]["mean"] or 1e-12)
            sentences.append(
                f"At λ_r = {row['lambda_r']:g}, λ_σ = {row['lambda_sigma']:g} reduces the distance by"
                f" {share:.1%} relative to the run without the consistency term, and reaches {gain:.1%} of"
                " that run's change of the reward."
            )
    if max(len(row["seeds"]) for row in rows) < 2:
        sentences.append(
            "There is one training seed for each setting, so the intervals cover latents and not the"
            " variation between runs. Name several with --seeds."
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


def _panel(axes, rows: list[dict], x: str, y: str) -> None:
    """Plot two measures of all settings against each other, with the intervals of both."""
    for i, row in enumerate(rows):
        here = row["measures"]
        colour = style.CYCLE[i % len(style.CYCLE)]
        axes.errorbar(
            here[x]["mean"],
            here[y]["mean"],
            xerr=style.errors(here[x]),
            yerr=style.errors(here[y]),
            color=colour,
            linewidth=1,
            marker="o" if i < len(style.CYCLE) else "s",
            markersize=6,
            markerfacecolor=colour if row["on_front"] else "none",  # filled: on the front
            label=row["setting"] + (" (front)" if row["on_front"] else ""),
        )
        if len(row["seeds"]) > 1:
            # small dots: the single seeds
            axes.plot(here[x]["each"], here[y]["each"], ".", color=colour, markersize=3)
    axes.axhline(0, color=style.colour("noise"), linewidth=0.8)
    axes.set(xlabel=LABELS[x], ylabel=LABELS[y])


def plot_front(data: dict):
    """Plot reward over distance, and reward over geometry; filled points are on the front."""
    figure, axes = style.figure(columns=2)
    # the dashed line joins the settings of the front in order of distance
    ordered = sorted(
        (row for row in data["rows"] if row["on_front"]), key=lambda row: row["measures"][DISTANCE]["mean"]
    )
    path = [[row["measures"][name]["mean"] for row in ordered] for name in (DISTANCE, REWARD)]
    axes[0].plot(*path, "--", color=style.colour("noise"), linewidth=0.8)
    _panel(axes[0], data["rows"], DISTANCE, REWARD)
    _panel(axes[1], data["rows"], GEOMETRY, REWARD)
    axes[0].legend(fontsize=6)
    return figure


def plot_others(data: dict):
    """Plot the measures that do not define the front over distance; the tuned reward where there is none."""
    names = [name for name in (SECOND, ORACLE, IMAGES) if name in data["rows"][0]["measures"]] or [REWARD]
    figure, axes = style.figure(columns=len(names))
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):  # one column: axes is no array
        _panel(axis, data["rows"], DISTANCE, name)
    return figure


def write(comparison: Comparison, networks: Mapping[Cell, Path], out: Path, quiet: bool = False) -> Finding:
    """Measure the cells, compute the front, write the page; return the finding of the front."""
    findings = pages.run(cell_jobs(comparison, networks), out, quiet=quiet)
    job = front_job(comparison, list(networks), findings)
    fronts = pages.run([job], out, quiet=True)
    introduction = (
        f"{len(networks)} runs of train.py started from {comparison.before.path.name}. Each is compared with it on the"
        f" same {comparison.n} held-out latents. The data of every run are in data/cell-*.json."
    )
    write_page(out / "index.html", TITLE, introduction, [job], fronts, fronts[KEY].says[:1])
    return fronts[KEY]


def make_cells(parts: Mapping[Cell, Part], jobs: int) -> None:
    """Train the cells that are not finished."""
    # the user's OMP_NUM_THREADS wins; else the cores are divided among the runs
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs))
    make_shown([[part] for part in parts.values()], jobs, threads, "training", "cell")


def measure_cells(parts: Mapping[Cell, Part], sources: Sources, out: Path) -> Finding:
    """Measure the finished cells and write the page; return the finding of the front."""
    # a comparison needs a tuned network; `measure_cell` loads the one of each cell itself
    networks = {cell: path for cell, part in parts.items() if (path := part.network()) is not None}
    return write(load_comparison(replace(sources, after=next(iter(networks.values())))), networks, out)
