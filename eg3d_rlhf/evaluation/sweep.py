"""A sweep over the weights of the reward and of density consistency: what each setting gains in reward and pays in distance and geometry.

One cell for each pair of weights and seed, each a real run of train.py, resumable; measured against the network before tuning.
Letters: N latents, S seeds.
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eg3d_rlhf.core.statistics import bootstrap_mean_interval, t_mean_interval
from eg3d_rlhf.evaluation import images, overoptimisation
from eg3d_rlhf.evaluation.comparison import Comparison, snapshots
from eg3d_rlhf.evaluation.geometry import VIEWS, view_measures
from eg3d_rlhf.evaluation.paired import BOOTSTRAP
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.jobs import Finding, Job, identity_of_file
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.measures.features import load_features
from eg3d_rlhf.measures.resampling import kernel_change_interval
from eg3d_rlhf.tuning.gan.phase import density_l1
from training import checkpoint

TITLE = "Sweep of the reward's and the consistency term's weight"
KEY = "front"
REWARD, DISTANCE, GEOMETRY = "reward", "distance", "normal disagreement"
SECOND, JUDGE, IMAGES = "held-out reward", "judge", "kernel distance of images"
LABELS = {
    REWARD: "change of the tuned reward", DISTANCE: "mean |σ - σ before|, raw density", GEOMETRY: "change of normal disagreement, degrees",
    SECOND: "change of the held-out reward", JUDGE: "change of the programmatic judge's utility",
    IMAGES: "change of the images' kernel distance",
}
GOALS = {REWARD: 1, DISTANCE: -1, GEOMETRY: -1}  # of the front: more is better, or less
SEEDS_INTERVAL = "95 % t interval over training seeds where there are two or more, else over latents"
LOG = "train.log"


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """One run of the grid."""

    lambda_r: float  # reward weight, >= 0
    lambda_sigma: float  # density consistency weight, >= 0; 0 is the run without that term
    seed: int

    @property
    def setting(self) -> str:
        """The weights, as reports name them."""
        return "control (λ_r = 0)" if self.lambda_r == 0 else f"λ_r = {self.lambda_r:g}, λ_σ = {self.lambda_sigma:g}"

    @property
    def name(self) -> str:
        """The cell as part of a file name."""
        return f"r{self.lambda_r:g}-sigma{self.lambda_sigma:g}-s{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all cells share, and where they lie."""

    folder: Path  # holds one folder for each cell
    script: Path  # train.py
    kimg: float  # length of a cell
    flags: Sequence[str] = ()  # further flags of train.py
    hashes: dict = field(default_factory=dict)  # SHA-256 of the files behind the flags: other files are other cells
    workers: int = 1  # cells trained at the same time

    def home(self, cell: Cell) -> Path:
        """Folder of a cell: its name, and eight digits over all that shapes its run."""
        text = json.dumps({"kimg": self.kimg, "flags": list(self.flags), "hashes": self.hashes}, sort_keys=True)
        return self.folder / f"{cell.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def grid(lambda_r: Sequence[float], lambda_sigma: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """Every combination, the cells of a seed together; λ_r = 0 once for each seed, since such a run has no reward phase.

    Raises: ValueError for a negative weight or an empty list.
    """
    for flag, values in (("--lambda-r", lambda_r), ("--lambda-sigma", lambda_sigma), ("--seeds", seeds)):
        if not values or min(values) < 0:
            raise ValueError(f"{flag}: expected one or more values >= 0, got {list(values)}. Write them with commas: 0,1,10.")
    cells = [Cell(lambda_r=r, lambda_sigma=s if r else 0.0, seed=seed) for seed in seeds for r in lambda_r for s in lambda_sigma]
    return list(dict.fromkeys(cells))


def finished(t: Training, cell: Cell) -> Path | None:
    """The network of a cell whose run has reached its length."""
    found = (path for run in _runs(t, cell) for kimg, path in snapshots(run)[::-1] if round(kimg * 1000) >= round(t.kimg * 1000))
    return next(found, None)


def begun(t: Training, cell: Cell) -> Path | None:
    """The newest run of a cell that can be continued."""
    return next((run for run in _runs(t, cell) if checkpoint.available(run)), None)


def _runs(t: Training, cell: Cell) -> list[Path]:
    return sorted((path for path in t.home(cell).glob("[0-9]*-*") if path.is_dir()), reverse=True)


def command(t: Training, cell: Cell) -> list[str]:
    """The command line that trains a cell, or goes on where it was interrupted."""
    start = [sys.executable, str(t.script)]
    run = begun(t, cell)
    if run is not None:
        return [*start, f"--resume={run}", "--resume-previous"]
    weights = [f"--lambda-r={cell.lambda_r:g}", f"--lambda-sigma={cell.lambda_sigma:g}", f"--seed={cell.seed}", f"--kimg={t.kimg:g}"]
    return [*start, "--reward=sigma", *weights, "--no-summary", f"--outdir={t.home(cell)}", *t.flags]


def train_all(cells: Sequence[Cell], t: Training, tell: Callable[[Cell], None] = lambda cell: None) -> dict[Cell, Path]:
    """Train what is not finished; returns every cell's network.

    An interrupt, or the failure of one cell, asks the others to stop; they write a checkpoint first.
    Args: tell: called for each cell when it is done.
    Raises: ValueError naming the cell that failed, its last line and its log.
    """
    waiting = [cell for cell in cells if finished(t, cell) is None]
    running: dict[Cell, subprocess.Popen] = {}
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // t.workers))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    for cell in set(cells) - set(waiting):
        tell(cell)
    try:
        while waiting or running:
            while waiting and len(running) < t.workers:
                cell = waiting.pop(0)
                log = t.home(cell) / LOG
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("ab") as out:
                    running[cell] = subprocess.Popen(command(t, cell), stdout=out, stderr=subprocess.STDOUT, env=environment)
            time.sleep(0.05)
            for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                _check(cell, t, running.pop(cell).returncode)
                tell(cell)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()
    return {cell: path for cell in cells if (path := finished(t, cell)) is not None}


def _check(cell: Cell, t: Training, status: int) -> None:
    """Raise ValueError where a cell has not reached its length."""
    if finished(t, cell) is None:
        log = t.home(cell) / LOG
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        how = "was stopped" if status in (0, -signal.SIGTERM, -signal.SIGINT) else f"ended with status {status}"
        raise ValueError(f"cell {cell.name}: expected a finished run, but it {how}: {last} See {log}; the same command goes on from there.")


def cell_jobs(c: Comparison, networks: Mapping[Cell, Path]) -> list[Job]:
    """One job for each trained cell."""
    shared: dict[str, Any] = {"n": c.n, "images": c.images, "data": c.data, "views": VIEWS, "inception": identity_of_file(c.inception)}
    return [
        c.job(f"cell-{cell.name}", f"{cell.setting}, seed {cell.seed}", partial(measure_cell, cell=cell, path=path),
              roles=("reward", "held-out"), **shared,
              files={"before": c.before.hash, "cell": identity_of_file(path), "reward": c.reward_hash})
        for cell, path in networks.items()
    ]


def front_job(c: Comparison, cells: Sequence[Cell], findings: Mapping[str, Finding]) -> Job:
    """The front over the findings of `cell_jobs`."""
    found = {cell: findings[f"cell-{cell.name}"] for cell in cells}
    plots = {"reward-distance-geometry": plot_front, "other-measures": plot_others}
    return Job(key=KEY, title="Reward, distance and geometry", compute=partial(front, c, found), plots=plots,
               inputs={cell.name: one.data for cell, one in found.items()})


def _kept(c: Comparison, name: str, make):
    """A value of the generator before tuning, computed once for all cells."""
    case = ("sweep", name, c.before.hash, c.psi, c.n, c.images, c.seed)
    if case not in c.memory:
        c.memory[case] = make()
    return c.memory[case]


def measure_cell(c: Comparison, _folder: Path, cell: Cell, path: Path) -> Finding:
    """Changes of every measure from before to one cell, per latent where the measure is."""
    seeds, after = c.seeds(), c.load(path)
    values = {REWARD: (c.scores(after, seeds) - c.scores(c.before, seeds)).double().numpy()}
    if c.held_out is not None:
        values[SECOND] = (c.scores(after, seeds, held_out=True) - c.scores(c.before, seeds, held_out=True)).double().numpy()
    start = _kept(c, "density", lambda: overoptimisation.densities(c, c.before, seeds))
    sigma = overoptimisation.densities(c, after, seeds)
    values[DISTANCE] = density_l1(sigma, start).double().numpy()
    if c.synthetic:
        values[JUDGE] = overoptimisation.judged(c, sigma) - _kept(c, "judge", lambda: overoptimisation.judged(c, start))
    values[GEOMETRY] = normals(c, after) - _kept(c, "normals", lambda: normals(c, c.before))
    steps = {name: bootstrap_mean_interval(v)._asdict() for name, v in values.items()}
    if c.data:
        network = load_features(c.inception, c.device)
        real, dataset = _kept(c, "reals", lambda: images.real_features(c, network))
        fakes = partial(images.fake_features, c, cameras=dataset.get_labels(), network=network)
        pair = _kept(c, "images", lambda: fakes(c.before)), fakes(after)
        found = kernel_change_interval(*pair, real, images.RESAMPLES, c.seed)
        steps[IMAGES] = {"mean": found.mean, "lo": found.lo, "hi": found.hi}
    facts = c.facts(seeds, interval=BOOTSTRAP, networks={"before": c.before.hash, "cell": after.hash, "reward": c.reward_hash})
    rows = [{"seed": seed, **{name: float(v[i]) for name, v in values.items() if i < len(v)}} for i, seed in enumerate(seeds)]
    return Finding(facts=facts, data={"cell": vars(cell), "network": after.hash, "measures": steps}, rows=rows)


def normals(c: Comparison, generator: LoadedGenerator) -> np.ndarray:
    """Disagreement of normals between neighbouring views [N / 2], degrees."""
    return view_measures(c, generator, c.seeds(max(2, c.n // 2))).normal


def pareto(values: np.ndarray) -> np.ndarray:
    """Which of points [N, M] none other equals or beats everywhere and beats somewhere; more is better; [N] bool."""
    at_least = np.all(values[None] >= values[:, None], axis=2)  # [i, j]: j is nowhere worse than i
    better = np.any(values[None] > values[:, None], axis=2)
    return ~np.any(at_least & better, axis=1)


def gather(found: Mapping[Cell, Finding]) -> list[dict]:
    """One entry for each setting: mean over seeds with interval, and the seeds' values."""
    rows: list[dict] = []
    for setting in dict.fromkeys(cell.setting for cell in found):
        own = {cell: one for cell, one in found.items() if cell.setting == setting}
        cell, first = next(iter(own.items()))
        measures = {}
        for name, step in first.data["measures"].items():
            each = [one.data["measures"][name]["mean"] for one in own.values()]
            measures[name] = {**(t_mean_interval(each)._asdict() if len(each) > 1 else step), "each": each}
        rows.append({"setting": setting, "lambda_r": cell.lambda_r, "lambda_sigma": cell.lambda_sigma if cell.lambda_r else None,
                     "seeds": [cell.seed for cell in own], "measures": measures})
    means = np.array([[sign * row["measures"][name]["mean"] for name, sign in GOALS.items()] for row in rows])
    for row, kept in zip(rows, pareto(means), strict=True):
        row["on_front"] = bool(kept)
    return rows


def front(c: Comparison, found: Mapping[Cell, Finding], _folder: Path) -> Finding:
    """All settings with their measures; those that no other setting beats are on the front."""
    rows = gather(found)
    columns = {"": "mean", " lo": "lo", " hi": "hi"}
    table = [
        {"setting": row["setting"], "front": "on the front" if row["on_front"] else "", "training seeds": " ".join(map(str, row["seeds"])),
         **{f"{name}{end}": m[key] for name, m in row["measures"].items() for end, key in columns.items()}}
        for row in rows
    ]
    networks = {"before": c.before.hash, "reward": c.reward_hash} | {cell.name: one.data["network"] for cell, one in found.items()}
    facts = c.facts(c.seeds(), interval=SEEDS_INTERVAL, unit=f"latents for each of {len(found)} runs", networks=networks)
    kept = [row for row in rows if row["on_front"]]
    says = [
        f"On the front, by means ({len(kept)} of {len(rows)} settings): " + "; ".join(row["setting"] for row in kept) + ".",
        "On the front: no other setting has at least this reward with no more distance and no more disagreement of normals.",
    ]
    for without, row in itertools.product(rows, rows):
        if row["lambda_r"] and row["lambda_r"] == without["lambda_r"] and row["lambda_sigma"] and without["lambda_sigma"] == 0:
            share = 1 - row["measures"][DISTANCE]["mean"] / max(without["measures"][DISTANCE]["mean"], 1e-12)
            gain = row["measures"][REWARD]["mean"] / (without["measures"][REWARD]["mean"] or 1e-12)
            says.append(f"At λ_r = {row['lambda_r']:g}, λ_σ = {row['lambda_sigma']:g} takes {share:.1%} off the distance of the run "
                        f"without the consistency term, at {gain:.1%} of its reward.")
    if max(len(row["seeds"]) for row in rows) < 2:
        says.append("One training seed for each setting: the intervals run over latents, and do not tell how runs differ. Add --seeds.")
    says += [
        "The front goes by means alone: settings whose intervals overlap may change places in another run.",
        "The reward phase has an optimiser (Adam) of its own, whose step does not depend on the size of its loss: what matters is "
        "λ_σ / λ_r, and without the consistency term all λ_r > 0 train nearly alike.",
        "The distance is what the consistency term holds down; it orders how far a run went, not how good its shapes are.",
    ]
    return Finding(facts=facts, data={"rows": rows}, rows=table, says=says)


def _panel(axes, rows: list[dict], x: str, y: str) -> None:
    for i, row in enumerate(rows):
        here, colour = row["measures"], style.CYCLE[i % len(style.CYCLE)]
        axes.errorbar(here[x]["mean"], here[y]["mean"], xerr=style.errors(here[x]), yerr=style.errors(here[y]), color=colour, linewidth=1,
                      marker="o" if i < len(style.CYCLE) else "s", markersize=6, markerfacecolor=colour if row["on_front"] else "none",
                      label=row["setting"] + (" (front)" if row["on_front"] else ""))
        if len(row["seeds"]) > 1:
            axes.plot(here[x]["each"], here[y]["each"], ".", color=colour, markersize=3)
    axes.axhline(0, color=style.colour("noise"), linewidth=0.8)
    axes.set(xlabel=LABELS[x], ylabel=LABELS[y])


def plot_front(data: dict):
    """Reward over distance, and over geometry; filled points are on the front."""
    drawn, axes = style.figure(columns=2)
    ordered = sorted((row for row in data["rows"] if row["on_front"]), key=lambda row: row["measures"][DISTANCE]["mean"])
    path = [[row["measures"][name]["mean"] for row in ordered] for name in (DISTANCE, REWARD)]
    axes[0].plot(*path, "--", color=style.colour("noise"), linewidth=0.8)
    _panel(axes[0], data["rows"], DISTANCE, REWARD)
    _panel(axes[1], data["rows"], GEOMETRY, REWARD)
    axes[0].legend(fontsize=6)
    return drawn


def plot_others(data: dict):
    """Measures that are no goal of the front, over the distance."""
    names = [name for name in (SECOND, JUDGE, IMAGES) if name in data["rows"][0]["measures"]] or [REWARD]
    drawn, axes = style.figure(columns=len(names))
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        _panel(axis, data["rows"], DISTANCE, name)
    return drawn
