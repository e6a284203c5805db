"""What a reward says of several generators: raw, with their shapes laid where it looks, and with their
density on the scale it knows.

It learnt from one generator, the reference. Of every other one a report says how far outside of that it lies,
and how steady its ranks are.
Letters: N latents, K neighbours or samples, M entries of an embedding, P points, Q quantiles.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.spatial import cKDTree

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import choose_device, file_hash, naming
from eg3d_rlhf.core.seeds import ALIGNMENT, LATENTS
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.core.statistics import RANK_INTERVAL, spearman
from eg3d_rlhf.evaluation.settings import ScoreOptions
from eg3d_rlhf.experiments import pages, style
from eg3d_rlhf.experiments.media.sheet import SUPERSAMPLE, Row, look, paint, sheet, shrink, to_uint8
from eg3d_rlhf.experiments.pages import Facts, Finding, Job, seed_range, write_page
from eg3d_rlhf.generators import Generator, LoadedGenerator, camera, load_generator
from eg3d_rlhf.generators.placed import Place, Placed, Similarity, scaled_density, ws_of
from eg3d_rlhf.geometry.level_set import LevelSet
from eg3d_rlhf.geometry.mesh import extract_mesh, largest_part
from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward
from training.storage import write_atomic

# Where a foreign generator's shapes lie, and on what scale its density is, against the generator that a
# reward knows.


QUANTILES = 64  # of the density above the level, and as many below
KEPT = 0.8  # share of nearest neighbours that a fit goes by
# of a surface, at most; of the fit, at most; the largest change that ends it
_POINTS = 6000
_ROUNDS = 100
_STILL = 1e-7


@torch.no_grad()
def fields_of(generator: Generator, seeds: Sequence[int], psi: float, cutoff: int | None, batch: int = 8):
    for start in range(0, len(seeds), batch):
        yield generator.field(ws_of(generator, seeds[start : start + batch], psi, cutoff))


def mean_surface(
    generator: Generator, seeds: Sequence[int], psi: float, cutoff: int | None, resolution: int
) -> np.ndarray:
    """Points [P, 3] of the front half of the typical shape: where half of the samples have density above the
    level.

    The pointwise median asks for no scale of the density. Caps at the cube's faces are left out.
    Raises: ValueError where the median shape has no surface.
    """
    spec = SlabSpec.of(generator.bounds, resolution)
    cubes = torch.cat([field.density_grid(spec).cpu() for field in fields_of(generator, seeds, psi, cutoff)])
    vertices, _, _ = largest_part(*extract_mesh(cubes.quantile(0.5, dim=0), spec, generator.level))
    inside = np.abs(vertices - np.array(spec.centre)).max(axis=1) < spec.box_warp / 2 - 1.5 * spec.voxel
    points = vertices[inside & (vertices[:, 2] > vertices[inside, 2].mean())].astype(np.float64)
    return points[np.linspace(0, len(points) - 1, min(len(points), _POINTS)).astype(int)]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How a foreign surface lies on the reference's."""

    similarity: Similarity  # from the reference's world to the foreign one
    residual: float  # root mean square distance of the kept neighbours, the reference's units


def align(foreign: np.ndarray, reference: np.ndarray) -> Alignment:
    """Scale and shift that lay points [P, 3] of the reference on those of a foreign surface; no rotation.

    Iterated nearest neighbours, both ways, the farthest fifth left out: parts that one surface lacks do not
    count.
    """
    centre = foreign.mean(axis=0)
    middle = reference.mean(axis=0)
    scale = float(
        np.sqrt(((foreign - centre) ** 2).sum(1).mean() / ((reference - middle) ** 2).sum(1).mean())
    )
    shift = centre - scale * middle
    tree = cKDTree(reference)
    residual = np.inf
    for _ in range(_ROUNDS):
        laid = (foreign - shift) / scale
        there, near = tree.query(laid)
        back, far = cKDTree(laid).query(reference)
        one = there <= np.quantile(there, KEPT)
        other = back <= np.quantile(back, KEPT)
        p = np.concatenate([foreign[one], foreign[far[other]]])
        q = np.concatenate([reference[near[one]], reference[other]])
        residual = float(np.sqrt(np.square(np.concatenate([there[one], back[other]])).mean()))
        p_mean = p.mean(axis=0)
        q_mean = q.mean(axis=0)
        before = np.append(shift, scale)
        scale = float(((p - p_mean) * (q - q_mean)).sum() / ((q - q_mean) ** 2).sum())
        shift = p_mean - scale * q_mean
        if np.abs(np.append(shift, scale) - before).max() < _STILL:
            break
    return Alignment(
        similarity=Similarity(scale, (float(shift[0]), float(shift[1]), float(shift[2]))), residual=residual
    )


@dataclass(frozen=True, eq=False)
class DensityMap:
    """A rising, piecewise linear map of raw density, carried on with its outermost slopes."""

    knots: torch.Tensor  # [Q] of the foreign density, rising
    values: torch.Tensor  # [Q] of the reference's, rising

    def __call__(self, sigma: torch.Tensor) -> torch.Tensor:
        """Differentiable in sigma."""
        knots = self.knots.to(sigma)
        values = self.values.to(sigma)
        place = torch.searchsorted(knots, sigma.detach().contiguous()).clamp(1, len(knots) - 1)
        low = knots[place - 1]
        high = knots[place]
        return values[place - 1] + (sigma - low) / (high - low) * (values[place] - values[place - 1])


def calibrate_density(
    foreign: np.ndarray, reference: np.ndarray, level: float, reference_level: float
) -> DensityMap:
    """The map under which pooled values of foreign density have the quantiles of the reference's, above the
    level and below it.

    Below it, too: a self-normalised slab reads how empty the emptiest place is. The level becomes the level.
    Raises: ValueError where one of them has no values on one side of its level.
    """
    sides = []
    for above in (False, True):
        both = ((foreign, level), (reference, reference_level))
        own = [values[(values > least) if above else (values < least)] for values, least in both]
        if min(map(len, own)) < QUANTILES:
            where = "above" if above else "below"
            raise ValueError(
                f"calibration: expected {QUANTILES} densities {where} the level where the reward looks, got"
                f" {min(map(len, own))}. The shapes lie elsewhere: leave the network out."
            )
        sides.append([np.quantile(values, np.linspace(0, 1, QUANTILES)) for values in own])
    knots = np.concatenate([sides[0][0], [level], sides[1][0]])
    values = np.concatenate([sides[0][1], [reference_level], sides[1][1]])
    rising = np.concatenate([[True], np.diff(np.maximum.accumulate(knots)) > 1e-6 * max(abs(level), 1.0)])
    return DensityMap(torch.from_numpy(knots[rising]).float(), torch.from_numpy(values[rising]).float())


def pooled(
    generator: Generator, seeds: Sequence[int], spec: SlabSpec, psi: float, cutoff: int | None
) -> np.ndarray:
    """Densities of seeds at all points of a grid, in one row."""
    grids = [field.density_grid(spec).flatten().cpu() for field in fields_of(generator, seeds, psi, cutoff)]
    return torch.cat(grids).double().numpy()


STAGES = ("raw", "aligned", "calibrated")
# of an embedding; quantile of the reference's own; share above which ranks mean nothing
NEIGHBOURS = 5
RARE = 0.99
MOST_OUTSIDE = 0.5
STEADY = 0.8  # least rank correlation under a change that should not matter
# of a mesh in a strip; meshes in a row
PIXELS = 160
STRIP = 5


class Seen(NamedTuple):
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
        return LATENTS.take(self.options.n, self.options.seed)

    @property
    def shared(self) -> dict:
        """Return what every network's scores depend on."""
        return {**asdict(self.options), "reward": self.reward_hash, "reference": self.reference.hash}

    @property
    def spec(self) -> SlabSpec:
        """The grid in which densities are compared: the one that the reward reads, else the reference's whole
        cube.
        """
        own = getattr(self.reward.observation, "spec", None)
        return (
            own
            if isinstance(own, SlabSpec)
            else SlabSpec.of(self.reference.generator.bounds, self.options.resolution)
        )

    @functools.cached_property
    def surface(self) -> np.ndarray:
        """Of the reference's typical shape, [P, 3]."""
        o = self.options
        return mean_surface(self.reference.generator, ALIGNMENT.take(o.fit), o.psi, o.cutoff, o.resolution)

    @functools.cached_property
    def density(self) -> np.ndarray:
        """The reference's, pooled over further latents."""
        return pooled(
            self.reference.generator,
            ALIGNMENT.take(self.options.fit),
            self.spec,
            self.options.psi,
            self.options.cutoff,
        )

    @functools.cached_property
    def known(self) -> tuple[cKDTree, float]:
        """The reference's embeddings, and the distance to the fifth neighbour that one in a hundred of them
        exceeds.
        """
        points = self.see(self.reference.generator, ALIGNMENT.take(self.options.known)).embedding
        tree = cKDTree(points)
        return tree, float(np.quantile(tree.query(points, NEIGHBOURS + 1)[0][:, -1], RARE))

    @functools.cached_property
    def own(self) -> Seen:
        """The reference's shapes of the latents that are scored."""
        return self.see(self.reference.generator, self.seeds)

    @torch.no_grad()
    def see(self, generator: Generator, seeds: Sequence[int], psi: float | None = None) -> Seen:
        o = self.options
        scores = []
        embeddings = []
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
        o = self.options
        bounds = self.reference.generator.bounds
        cameras = self.reference.generator.cameras
        surface = mean_surface(generator, ALIGNMENT.take(o.fit), o.psi, o.cutoff, o.resolution)
        found = align(surface, self.surface)
        aligned = Place(
            found.similarity,
            bounds,
            cameras=cameras,
            density=partial(scaled_density, factor=found.similarity.scale),
        )
        shown = Placed(generator, aligned)
        values = pooled(shown, ALIGNMENT.take(o.fit), self.spec, o.psi, o.cutoff)
        mapping = calibrate_density(values, self.density, shown.level, self.reference.generator.level)
        calibrated = replace(aligned, density=lambda sigma: mapping(aligned.density(sigma)))
        raw = Place(Similarity.of_boxes(generator.bounds, bounds), bounds, cameras=cameras)
        return {"raw": raw, "aligned": aligned, "calibrated": calibrated}, found

    def facts(self, name: str | None = None) -> Facts:
        networks = {key: one.hash for key, one in self.networks.items() if name in (None, key)}
        return Facts(
            n=self.options.n,
            seeds=seed_range(self.seeds),
            psi=self.options.psi,
            interval=RANK_INTERVAL,
            networks={**networks, "reference": self.reference.hash, "reward": self.reward_hash},
        )


def changed(trial: Trial, generator: Generator, place: Place) -> dict[str, np.ndarray]:
    """Scores [N] of the same latents under changes that should not matter, and at another truncation."""
    o = trial.options
    half = trial.spec.voxel / 2 * place.similarity.scale
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
    agreement = {
        what: correlation(last, scores)
        for what, scores in changed(trial, generator, places["calibrated"]).items()
    }
    data = {
        "alignment": {**asdict(found.similarity), "residual": found.residual},
        "scores": {stage: one.scores.tolist() for stage, one in seen.items()},
        "summary": {stage: summary(one.scores) for stage, one in seen.items()},
        "outside": {stage: trial.outside(one.embedding) for stage, one in seen.items()},
        "reference": {stage: correlation(one.scores, trial.own.scores) for stage, one in seen.items()},
        "agreement": agreement,
    }
    rows = [
        {"seed": seed, **{stage: float(one.scores[i]) for stage, one in seen.items()}}
        for i, seed in enumerate(trial.seeds)
    ]
    picture = strip(trial, name, last, folder)
    return Finding(facts=trial.facts(name), data=data, rows=rows, says=says(data), images=picture)


def summary(scores: np.ndarray) -> dict[str, float]:
    names = ("min", "low", "median", "high", "max")
    quantiles = dict(zip(names, np.quantile(scores, [0, 0.25, 0.5, 0.75, 1]).tolist(), strict=True))
    return {"mean": float(scores.mean()), "standard_deviation": float(scores.std(ddof=1)), **quantiles}


@torch.no_grad()
def strip(trial: Trial, name: str, scores: np.ndarray, folder: Path) -> dict[str, str]:
    """The meshes that the reward likes best, and least, drawn in the generator's own world."""
    generator = trial.networks[name].generator
    o = trial.options
    order = np.argsort(-scores, kind="stable")
    rows: list[Row] = []
    for title, chosen in (("best", order[:STRIP]), ("worst", order[::-1][:STRIP])):
        cells = []
        for i in chosen:
            surface = LevelSet.of(
                generator.field(ws_of(generator, [trial.seeds[int(i)]], o.psi, o.cutoff)), 96
            )
            cells.append(
                to_uint8(shrink(paint(look(surface, camera(generator, 0.4), PIXELS * SUPERSAMPLE))).cpu())
            )
        captions = [f"{trial.seeds[int(i)]}: {scores[int(i)]:.2f}" for i in chosen]
        rows.append(Row(cells=cells, name=title, captions=captions, parted=bool(rows)))
    file = f"strip-{list(trial.networks).index(name)}.png"
    Image.fromarray(sheet("", rows, names=90)).save(folder / file)
    return {f"{name}: highest and lowest calibrated reward, seed and reward below": file}


def says(data: Mapping) -> list[str]:
    place = data["alignment"]
    outside = data["outside"]["calibrated"]
    shift = ", ".join(f"{value:+.3f}" for value in place["shift"])
    medians = ", ".join(f"{stage} {data['summary'][stage]['median']:.2f}" for stage in STAGES)
    lines = [
        f"Median reward: {medians}.",
        (
            f"Its shapes are {place['scale']:.3f} times as large as the reference's and lie at ({shift});"
            f" typical distance of the surfaces {place['residual']:.4f}."
        ),
        f"{outside:.0%} of its shapes lie outside what the reward knows (1 % of the reference's own do).",
    ]
    if outside > MOST_OUTSIDE:
        lines.insert(
            0, "Ranks not meaningful: more than half of the shapes lie outside what the reward knows."
        )
    kept = {what: found and found["mean"] for what, found in data["agreement"].items()}
    listed = ", ".join(
        f"{what} {'none' if value is None else format(value, '.2f')}" for what, value in kept.items()
    )
    lines.append(f"Rank correlation of the calibrated reward with itself: {listed}.")
    loose = [what for what, value in list(kept.items())[:-1] if value is None or value < STEADY]
    if loose:
        lines.append(f"Unsteady: {' and '.join(loose)}, ranks should keep {STEADY:g} at least, and do not.")
    return lines


def compare(trial: Trial, findings: Mapping[str, Finding], _folder: Path) -> Finding:
    data = {
        name: {**finding.data["summary"]["calibrated"], **finding.data["summary"]}
        for name, finding in findings.items()
    }
    rows = [
        {
            "network": name,
            "stage": stage,
            **finding.data["summary"][stage],
            "outside": finding.data["outside"][stage],
            "correlation with the reference's": (finding.data["reference"][stage] or {}).get("mean"),
        }
        for name, finding in findings.items()
        for stage in STAGES
    ]
    lines = [f"{name}: {line}" for name, finding in findings.items() for line in finding.says[:1]]
    lines.append(
        "A latent means another shape to another network, unless one descends from the other: compare medians"
        " and spreads, not seeds. To compare ranks within a network: the paper's reward kept 0.84 (EG3D) and"
        " 0.91 (HyPlaneHead) under mirroring, and 0.67 where densities were clipped to their percentiles."
    )
    return Finding(
        facts=trial.facts(),
        data={"networks": data, "reference": summary(trial.own.scores)},
        rows=rows,
        says=lines,
    )


@style.plot("small", size=(9.4, 4.0), ylabel="reward", title="Rewards: median, quartiles, ends")
def plot_scores(axes, data: dict):
    """A bar from quartile to quartile per generator and stage; the reference's own quartiles behind."""
    reference = data["reference"]
    names = list(data["networks"])
    axes.axhspan(
        reference["low"],
        reference["high"],
        color=style.colour("noise"),
        alpha=0.2,
        label="reference, quartiles",
    )
    for j, stage in enumerate(STAGES):
        for i, name in enumerate(names):
            row = data["networks"][name][stage]
            x = i + 0.22 * (j - 1)
            axes.plot([x, x], [row["min"], row["max"]], color=style.CYCLE[j], linewidth=1)
            axes.bar(
                [x],
                [row["high"] - row["low"]],
                0.16,
                bottom=row["low"],
                color=style.CYCLE[j],
                label=None if i else stage,
            )
            axes.plot([x], [row["median"]], "_", color="white", markersize=9)
    axes.set_xticks(range(len(names)), names)


def jobs(trial: Trial) -> tuple[list[Job], Callable[[Mapping[str, Finding]], Job]]:
    """One part per generator, and a function from their findings, by generator, to the comparison."""
    parts = [
        Job(
            key=f"network-{i}",
            title=name,
            compute=partial(score, trial, name),
            inputs={**trial.shared, "name": name, "network": one.hash},
        )
        for i, (name, one) in enumerate(trial.networks.items())
    ]

    hashes = {name: one.hash for name, one in trial.networks.items()}
    return parts, lambda findings: Job(
        key="comparison",
        title="All generators",
        compute=partial(compare, trial, findings),
        plots={"rewards": plot_scores},
        inputs={**trial.shared, "networks": hashes},
    )


def named(loaded: list[LoadedGenerator]) -> dict[str, LoadedGenerator]:
    """Generators by a short name: the file's, else its folder's with it, else the path."""
    for name in (lambda path: path.stem, lambda path: f"{path.parent.name}/{path.stem}", str):
        names = {name(generator.path): generator for generator in loaded}
        if len(names) == len(loaded):
            break
    return names


def trial_of(networks, reward, reference, device: str, options: ScoreOptions) -> Trial:
    """Load what the flags name. Raises: ValueError, FileNotFoundError naming the flag."""
    where = choose_device(device)
    with naming("--reference"):
        known = load_generator(reference, where)
    path = reward or bundled.REWARD
    with naming("--reward"):
        loaded = load_reward(path, where)
    check_reward(loaded, known.generator, "--reference")
    found = []
    place = Place(bounds=known.generator.bounds, cameras=known.generator.cameras)
    for source in dict.fromkeys(networks or [reference]):
        with naming("--network"):
            found.append(load_generator(source, where))
            misfits = loaded.observation.misfits(Placed(found[-1].generator, place))
            if misfits:
                raise ValueError(
                    f"{found[-1].path}: expected a generator with {'; with '.join(misfits)}. Leave it out."
                )
    return Trial(
        reward=loaded, reward_hash=file_hash(path), reference=known, networks=named(found), options=options
    )


def write(trial: Trial, out: Path) -> dict[str, Finding]:
    """Score the generators, and write <out>/index.html and scores.json; return the finding of each one."""
    parts, compared = jobs(trial)
    findings = pages.run(parts, out)
    by_name = {name: findings[part.key] for name, part in zip(trial.networks, parts, strict=True)}
    seeds = list(trial.seeds)
    values = {
        **trial.shared,
        "networks": {
            name: {**one.data, "seeds": seeds, "says": list(one.says)} for name, one in by_name.items()
        },
    }
    write_atomic(out / "scores.json", (json.dumps(values, indent=1) + "\n").encode())
    last = compared(by_name)
    findings |= pages.run([last], out, quiet=True)
    introduction = (
        f"{trial.options.n} latents each. The reward learnt from shapes of {trial.reference.path.name}. Raw:"
        " its crop as a share of each generator's own cube. Aligned: each generator's typical surface is"
        " laid on the reference's by scale and shift. Calibrated: densities, too, are given the reference's"
        " quantiles. Alignment and calibration were fitted on other latents."
    )
    page = out / "index.html"
    write_page(
        page, "Scores across generators", introduction, [last, *parts], findings, findings[last.key].says
    )
    return by_name
