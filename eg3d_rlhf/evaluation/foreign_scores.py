"""What a reward says of several generators: raw, with their shapes laid where it looks, and with their density on the scale it knows.

It learnt from one generator, the reference. Of every other one a report says how far outside of that it lies, and how steady its ranks are.
Letters: N latents, K neighbours, M entries of an embedding.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.spatial import cKDTree

from eg3d_rlhf.core.seeds import ALIGNMENT, LATENTS
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.core.statistics import RANK_INTERVAL, spearman
from eg3d_rlhf.evaluation.alignment import Alignment, align, calibrate_density, mean_surface, pooled
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.jobs import Facts, Finding, Job, seed_range
from eg3d_rlhf.experiments.media.sheet import Row, sheet, to_uint8
from eg3d_rlhf.generators import Generator, LoadedGenerator, camera
from eg3d_rlhf.generators.placed import Place, Placed, Similarity, scaled_density, ws_of
from eg3d_rlhf.geometry.level_set import LevelSet
from eg3d_rlhf.measures.surface_view import SUPERSAMPLE, look, paint, shrink
from eg3d_rlhf.rewards.reward import Reward
from training.config import check_knobs, knob
from training.storage import write_atomic

STAGES = ("raw", "aligned", "calibrated")
NEIGHBOURS, RARE, MOST_OUTSIDE = 5, 0.99, 0.5  # of an embedding; quantile of the reference's own; share above which ranks mean nothing
STEADY = 0.8  # least rank correlation under a change that should not matter
PIXELS, STRIP = 160, 5  # of a mesh in a strip; meshes in a row


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How many latents, and what is fitted on how many others."""

    n: int = knob(100, "Latents that are scored.", "Samples", metavar="LATENTS", low=16, high=LATENTS.count)
    psi: float = knob(0.7, "Truncation.", "Samples", above=0, high=2)
    cutoff: int = knob(14, "Layers that truncation reaches.", "Samples", low=0)
    seed: int = knob(0, "Other held-out latents per seed.", "Samples", low=0)
    fit: int = knob(64, "Further latents behind alignment and calibration.", "Samples", metavar="LATENTS", low=8, high=ALIGNMENT.count)
    known: int = knob(256, "Further latents of the reference that show what the reward knows.", "Samples", metavar="LATENTS",
                      low=16, high=ALIGNMENT.count)  # fmt: skip
    resolution: int = knob(64, "Edge of the cubes in which surfaces are looked for.", "Samples", metavar="VOXELS", low=24, high=256)
    batch: int = knob(8, "Shapes at once; bounds memory.", "Run", low=1)

    def __post_init__(self) -> None:
        check_knobs(self)


class Seen(NamedTuple):
    """What a reward makes of N shapes."""

    scores: np.ndarray  # [N]
    embedding: np.ndarray  # [N, M]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A reward, the generator that it knows, and those that it is asked about."""

    reward: Reward
    reward_hash: str
    reference: LoadedGenerator
    networks: Mapping[str, LoadedGenerator]  # by name
    options: ScoreOptions = ScoreOptions()

    @property
    def seeds(self) -> range:
        """The latents that are scored."""
        return LATENTS.take(self.options.n, self.options.seed)

    @property
    def spec(self) -> SlabSpec:
        """The grid in which densities are compared: the one that the reward reads, else the reference's whole cube."""
        own = getattr(self.reward.observation, "spec", None)
        return own if isinstance(own, SlabSpec) else SlabSpec.of(self.reference.generator.bounds, self.options.resolution)

    @functools.cached_property
    def surface(self) -> np.ndarray:
        """Of the reference's typical shape, [P, 3]."""
        o = self.options
        return mean_surface(self.reference.generator, ALIGNMENT.take(o.fit), o.psi, o.cutoff, o.resolution)

    @functools.cached_property
    def density(self) -> np.ndarray:
        """The reference's, pooled over further latents."""
        return pooled(self.reference.generator, ALIGNMENT.take(self.options.fit), self.spec, self.options.psi, self.options.cutoff)

    @functools.cached_property
    def known(self) -> tuple[cKDTree, float]:
        """The reference's embeddings, and the distance to the fifth neighbour that one in a hundred of them exceeds."""
        points = self.see(self.reference.generator, ALIGNMENT.take(self.options.known)).embedding
        tree = cKDTree(points)
        return tree, float(np.quantile(tree.query(points, NEIGHBOURS + 1)[0][:, -1], RARE))

    @functools.cached_property
    def own(self) -> Seen:
        """The reference's shapes of the latents that are scored."""
        return self.see(self.reference.generator, self.seeds)

    @torch.no_grad()
    def see(self, generator: Generator, seeds: Sequence[int], psi: float | None = None) -> Seen:
        """Scores and embeddings of seeds."""
        o, scores, embeddings = self.options, [], []
        for start in range(0, len(seeds), o.batch):
            ws = ws_of(generator, seeds[start : start + o.batch], o.psi if psi is None else psi, o.cutoff)
            embedding = self.reward.network.embed(self.reward.observation.observe(generator.field(ws)))
            embeddings.append(embedding.double().cpu().numpy())
            scores.append(self.reward.network.score_embedding(embedding).double().cpu().numpy())
        return Seen(np.concatenate(scores), np.concatenate(embeddings))

    def outside(self, embedding: np.ndarray) -> float:
        """Share of shapes that are farther from what the reward knows than one in a hundred of these."""
        tree, least = self.known
        return float((tree.query(embedding, NEIGHBOURS)[0][:, -1] > least).mean())

    def places(self, generator: Generator) -> tuple[dict[str, Place], Alignment]:
        """A generator's world as it is, aligned, and calibrated as well."""
        o, bounds, cameras = self.options, self.reference.generator.bounds, self.reference.generator.cameras
        surface = mean_surface(generator, ALIGNMENT.take(o.fit), o.psi, o.cutoff, o.resolution)
        found = align(surface, self.surface)
        aligned = Place(found.similarity, bounds, cameras=cameras, density=partial(scaled_density, factor=found.similarity.scale))
        shown = Placed(generator, aligned)
        values = pooled(shown, ALIGNMENT.take(o.fit), self.spec, o.psi, o.cutoff)
        mapping = calibrate_density(values, self.density, shown.level, self.reference.generator.level)
        calibrated = replace(aligned, density=lambda sigma: mapping(aligned.density(sigma)))
        raw = Place(Similarity.of_boxes(generator.bounds, bounds), bounds, cameras=cameras)
        return {"raw": raw, "aligned": aligned, "calibrated": calibrated}, found

    def facts(self, name: str | None = None) -> Facts:
        """What a figure states."""
        networks = {key: one.hash for key, one in self.networks.items() if name in (None, key)}
        return Facts(n=self.options.n, seeds=seed_range(self.seeds), psi=self.options.psi, interval=RANK_INTERVAL,
                     networks={**networks, "reference": self.reference.hash, "reward": self.reward_hash})  # fmt: skip


def changed(trial: Trial, generator: Generator, place: Place) -> dict[str, np.ndarray]:
    """Scores [N] of the same latents under changes that should not matter, and at another truncation."""
    o, half = trial.options, trial.spec.voxel / 2 * place.similarity.scale
    found = {"mirrored": trial.see(Placed(generator, replace(place, mirrored=True)), trial.seeds).scores}
    for axis, way in enumerate(("sideways", "up", "forward")):
        x, y, z = (value + half * (i == axis) for i, value in enumerate(place.similarity.shift))
        moved = replace(place, similarity=replace(place.similarity, shift=(x, y, z)))
        found[f"half a voxel {way}"] = trial.see(Placed(generator, moved), trial.seeds).scores
    lower = o.psi * 5 / 7
    return {**found, f"ψ {lower:.2g}": trial.see(Placed(generator, place), trial.seeds, lower).scores}


def correlation(first: np.ndarray, second: np.ndarray) -> dict | None:
    """Rank correlation with its interval; None where scores are all alike."""
    try:
        return spearman(first, second)._asdict()
    except ValueError:
        return None


def score(trial: Trial, name: str, folder: Path) -> Finding:
    """One generator: its scores at every stage, and what they are worth."""
    generator = trial.networks[name].generator
    places, found = trial.places(generator)
    seen = {stage: trial.see(Placed(generator, place), trial.seeds) for stage, place in places.items()}
    last = seen["calibrated"].scores
    agreement = {what: correlation(last, scores) for what, scores in changed(trial, generator, places["calibrated"]).items()}
    data = {
        "alignment": {**asdict(found.similarity), "residual": found.residual},
        "scores": {stage: one.scores.tolist() for stage, one in seen.items()},
        "summary": {stage: summary(one.scores) for stage, one in seen.items()},
        "outside": {stage: trial.outside(one.embedding) for stage, one in seen.items()},
        "reference": {stage: correlation(one.scores, trial.own.scores) for stage, one in seen.items()},
        "agreement": agreement,
    }
    rows = [{"seed": seed, **{stage: float(one.scores[i]) for stage, one in seen.items()}} for i, seed in enumerate(trial.seeds)]
    picture = strip(trial, name, last, folder)
    return Finding(facts=trial.facts(name), data=data, rows=rows, says=says(data), pictures=picture)


def summary(scores: np.ndarray) -> dict[str, float]:
    """Mean, deviation, and the ends and quartiles of scores."""
    names = ("min", "low", "median", "high", "max")
    quantiles = dict(zip(names, np.quantile(scores, [0, 0.25, 0.5, 0.75, 1]).tolist(), strict=True))
    return {"mean": float(scores.mean()), "deviation": float(scores.std(ddof=1)), **quantiles}


@torch.no_grad()
def strip(trial: Trial, name: str, scores: np.ndarray, folder: Path) -> dict[str, str]:
    """The meshes that the reward likes best, and least, drawn in the generator's own world."""
    generator, o, order = trial.networks[name].generator, trial.options, np.argsort(-scores, kind="stable")
    rows: list[Row] = []
    for title, chosen in (("best", order[:STRIP]), ("worst", order[::-1][:STRIP])):
        cells = []
        for i in chosen:
            surface = LevelSet.of(generator.field(ws_of(generator, [trial.seeds[int(i)]], o.psi, o.cutoff)), 96)
            cells.append(to_uint8(shrink(paint(look(surface, camera(generator, 0.4), PIXELS * SUPERSAMPLE))).cpu()))
        captions = [f"{trial.seeds[int(i)]}: {scores[int(i)]:.2f}" for i in chosen]
        rows.append(Row(cells=cells, name=title, captions=captions, parted=bool(rows)))
    file = f"strip-{list(trial.networks).index(name)}.png"
    Image.fromarray(sheet("", rows, names=90)).save(folder / file)
    return {f"{name}: highest and lowest calibrated reward, seed and reward below": file}


def says(data: Mapping) -> list[str]:
    """Sentences of one generator."""
    place, outside = data["alignment"], data["outside"]["calibrated"]
    shift = ", ".join(f"{value:+.3f}" for value in place["shift"])
    medians = ", ".join(f"{stage} {data['summary'][stage]['median']:.2f}" for stage in STAGES)
    lines = [
        f"Median reward: {medians}.",
        f"Its shapes are {place['scale']:.3f} times as large as the reference's and lie at ({shift}); typical distance of the surfaces "
        f"{place['residual']:.4f}.",
        f"{outside:.0%} of its shapes lie outside what the reward knows (1 % of the reference's own do).",
    ]
    if outside > MOST_OUTSIDE:
        lines.insert(0, "Ranks not meaningful: more than half of the shapes lie outside what the reward knows.")
    kept = {what: found and found["mean"] for what, found in data["agreement"].items()}
    listed = ", ".join(f"{what} {'none' if value is None else format(value, '.2f')}" for what, value in kept.items())
    lines.append(f"Rank correlation of the calibrated reward with itself: {listed}.")
    loose = [what for what, value in list(kept.items())[:-1] if value is None or value < STEADY]
    if loose:
        lines.append(f"Unsteady: {' and '.join(loose)}, ranks should keep {STEADY:g} at least, and do not.")
    return lines


def compare(trial: Trial, findings: Mapping[str, Finding], _folder: Path) -> Finding:
    """All generators side by side."""
    data = {name: {**found.data["summary"]["calibrated"], **found.data["summary"]} for name, found in findings.items()}
    rows = [
        {
            "network": name, "stage": stage, **found.data["summary"][stage], "outside": found.data["outside"][stage],
            "correlation with the reference's": (found.data["reference"][stage] or {}).get("mean"),
        }
        for name, found in findings.items() for stage in STAGES
    ]  # fmt: skip
    lines = [f"{name}: {line}" for name, found in findings.items() for line in found.says[:1]]
    lines.append(
        "A latent means another shape to another network, unless one descends from the other: compare medians and spreads, not seeds. To "
        "compare ranks within a network: the paper's reward kept 0.84 (EG3D) and 0.91 (HyPlaneHead) under mirroring, and 0.67 where "
        "densities were clipped to their percentiles."
    )
    return Finding(facts=trial.facts(), data={"networks": data, "own": summary(trial.own.scores)}, rows=rows, says=lines)


@style.plot("small", size=(9.4, 4.0), ylabel="reward", title="Rewards: median, quartiles, ends")
def plot_scores(axes, data: dict):
    """A bar from quartile to quartile per generator and stage; the reference's own quartiles behind."""
    own, names = data["own"], list(data["networks"])
    axes.axhspan(own["low"], own["high"], color=style.colour("noise"), alpha=0.2, label="reference, quartiles")
    for j, stage in enumerate(STAGES):
        for i, name in enumerate(names):
            one, x = data["networks"][name][stage], i + 0.22 * (j - 1)
            axes.plot([x, x], [one["min"], one["max"]], color=style.CYCLE[j], linewidth=1)
            axes.bar([x], [one["high"] - one["low"]], 0.16, bottom=one["low"], color=style.CYCLE[j], label=None if i else stage)
            axes.plot([x], [one["median"]], "_", color="white", markersize=9)
    axes.set_xticks(range(len(names)), names)


def jobs(trial: Trial) -> tuple[list[Job], Job]:
    """One part per generator, and, of their findings in <out>/data, the comparison."""
    shared = {**asdict(trial.options), "reward": trial.reward_hash, "reference": trial.reference.hash}
    keys = {name: f"network-{i}" for i, name in enumerate(trial.networks)}
    parts = [
        Job(key=keys[name], title=name, compute=partial(score, trial, name), inputs={**shared, "name": name, "network": one.hash})
        for name, one in trial.networks.items()
    ]

    def joined(folder: Path) -> Finding:
        stored = {name: json.loads((folder / f"{key}.json").read_text()) for name, key in keys.items()}
        findings = {name: Finding(facts=trial.facts(name), data=one["data"], says=one["says"]) for name, one in stored.items()}
        values = {name: {**finding.data, "seeds": list(trial.seeds), "says": finding.says} for name, finding in findings.items()}
        write_atomic(folder.parent / "scores.json", (json.dumps({**shared, "networks": values}, indent=1) + "\n").encode())
        return compare(trial, findings, folder)

    hashes = {name: one.hash for name, one in trial.networks.items()}
    return parts, Job(key="comparison", title="All generators", compute=joined, plots={"rewards": plot_scores},
                      inputs={**shared, "networks": hashes})  # fmt: skip
