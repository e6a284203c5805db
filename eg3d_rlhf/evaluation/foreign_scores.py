"""Score the shapes of several generators by one reward: raw, aligned to the reward's crop, and with
calibrated density.

The reward was trained on one generator, the reference. For every other one the report states the share of
shapes outside the reference's distribution, and the stability of the ranks.
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

# Alignment and calibration of a foreign generator: the position of its shapes and the scale of its density,
# against the reference generator of the reward.


QUANTILES = 64  # quantiles of the density above the level, and as many below
KEPT = 0.8  # share of nearest neighbours that the alignment uses
# largest number of points of a surface; largest number of rounds of the alignment; its largest change at the
# end
_POINTS = 6000
_ROUNDS = 100
_STILL = 1e-7


@torch.no_grad()
def fields_of(generator: Generator, seeds: Sequence[int], psi: float, cutoff: int | None, batch: int = 8):
    """Yield the shapes of seeds, `batch` in a field."""
    for start in range(0, len(seeds), batch):
        yield generator.field(ws_of(generator, seeds[start : start + batch], psi, cutoff))


def mean_surface(
    generator: Generator, seeds: Sequence[int], psi: float, cutoff: int | None, resolution: int
) -> np.ndarray:
    """Return points [P, 3] of the front half of the typical shape: the surface where half of the samples have
    density above the level.

    The pointwise median does not depend on the density's scale. Caps at the cube's faces are left out.
    Raises: ValueError if the median shape has no surface.
    """
    spec = SlabSpec.of(generator.bounds, resolution)
    # [N, D, H, W]; the median over the samples is taken at each grid point
    # on the CPU: all samples at once
    cubes = torch.cat([field.density_grid(spec).cpu() for field in fields_of(generator, seeds, psi, cutoff)])
    vertices, _, _ = largest_part(*extract_mesh(cubes.quantile(0.5, dim=0), spec, generator.level))
    # Points within 1.5 voxels of the cube's faces are caps, not surface.
    inside = np.abs(vertices - np.array(spec.centre)).max(axis=1) < spec.box_warp / 2 - 1.5 * spec.voxel
    points = vertices[inside & (vertices[:, 2] > vertices[inside, 2].mean())].astype(np.float64)  # [P, 3]
    # An even subset bounds the cost of the neighbour searches.
    return points[np.linspace(0, len(points) - 1, min(len(points), _POINTS)).astype(int)]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Position and scale of a foreign surface relative to the reference's."""

    similarity: Similarity  # from the reference's world to the foreign one
    residual: float  # root mean square distance of the kept neighbours, in the reference's units


def align(foreign: np.ndarray, reference: np.ndarray) -> Alignment:
    """Find the scale and shift that map points [P, 3] of the reference onto a foreign surface, without
    rotation.

    The method is iterated closest points in both directions. The farthest fifth of the neighbours is left
    out, so that parts which one surface lacks do not count.
    """
    # Start: equal centres and equal root mean square radii
    centre = foreign.mean(axis=0)
    middle = reference.mean(axis=0)
    scale = float(
        np.sqrt(((foreign - centre) ** 2).sum(1).mean() / ((reference - middle) ** 2).sum(1).mean())
    )
    shift = centre - scale * middle  # foreign = scale * reference + shift
    tree = cKDTree(reference)  # the reference does not move
    residual = np.inf  # replaced in the first round
    for _ in range(_ROUNDS):
        aligned_points = (foreign - shift) / scale
        # First from foreign points to the reference, then from the reference to foreign points
        foreign_distances, reference_neighbours = tree.query(aligned_points)
        reference_distances, foreign_neighbours = cKDTree(aligned_points).query(reference)
        kept_foreign = foreign_distances <= np.quantile(foreign_distances, KEPT)
        kept_reference = reference_distances <= np.quantile(reference_distances, KEPT)
        p = np.concatenate([foreign[kept_foreign], foreign[foreign_neighbours[kept_reference]]])
        q = np.concatenate([reference[reference_neighbours[kept_foreign]], reference[kept_reference]])
        residual = float(
            np.sqrt(
                np.square(
                    np.concatenate([foreign_distances[kept_foreign], reference_distances[kept_reference]])
                ).mean()
            )
        )
        # Least squares for p = scale * q + shift, in closed form
        p_mean = p.mean(axis=0)  # centroids of the matched points
        q_mean = q.mean(axis=0)
        before = np.append(shift, scale)  # to see when the fit stands still
        scale = float(((p - p_mean) * (q - q_mean)).sum() / ((q - q_mean) ** 2).sum())
        shift = p_mean - scale * q_mean
        if np.abs(np.append(shift, scale) - before).max() < _STILL:
            break
    return Alignment(
        similarity=Similarity(scale, (float(shift[0]), float(shift[1]), float(shift[2]))), residual=residual
    )


@dataclass(frozen=True, eq=False)
class DensityMap:
    """Increasing, piecewise linear map of raw density; the outermost slopes continue beyond the ends."""

    knots: torch.Tensor  # [Q] of the foreign density, increasing
    values: torch.Tensor  # [Q] of the reference's density, increasing

    def __call__(self, sigma: torch.Tensor) -> torch.Tensor:
        """Map densities of any shape. Differentiable in sigma."""
        knots = self.knots.to(sigma)
        values = self.values.to(sigma)
        # The clamp extends the outermost segments. searchsorted needs no gradient: the map is linear in each
        # segment.
        place = torch.searchsorted(knots, sigma.detach().contiguous()).clamp(1, len(knots) - 1)
        low = knots[place - 1]  # ends of each density's segment
        high = knots[place]
        return values[place - 1] + (sigma - low) / (high - low) * (values[place] - values[place - 1])


def calibrate_density(
    foreign: np.ndarray, reference: np.ndarray, level: float, reference_level: float
) -> DensityMap:
    """Fit the map that gives pooled foreign densities the reference's quantiles, above the level and below
    it.

    Below the level, too: a self-normalised slab depends on its emptiest point. The foreign level maps to the
    reference's level.
    Raises: ValueError if one of them has too few values on one side of its level.
    """
    sides = []
    for above in (False, True):
        both = ((foreign, level), (reference, reference_level))  # values with their level
        side_values = [values[(values > least) if above else (values < least)] for values, least in both]
        if min(map(len, side_values)) < QUANTILES:
            where = "above" if above else "below"
            raise ValueError(
                f"calibration: expected {QUANTILES} densities {where} the level in the reward's crop, got"
                f" {min(map(len, side_values))}. The shapes lie elsewhere. Leave the network out."
            )
        sides.append([np.quantile(values, np.linspace(0, 1, QUANTILES)) for values in side_values])
    # Below, level, above
    knots = np.concatenate([sides[0][0], [level], sides[1][0]])
    values = np.concatenate([sides[0][1], [reference_level], sides[1][1]])
    # Equal quantiles make steps of zero width, which would divide by zero.
    rising = np.concatenate([[True], np.diff(np.maximum.accumulate(knots)) > 1e-6 * max(abs(level), 1.0)])
    return DensityMap(torch.from_numpy(knots[rising]).float(), torch.from_numpy(values[rising]).float())


def pooled(
    generator: Generator, seeds: Sequence[int], spec: SlabSpec, psi: float, cutoff: int | None
) -> np.ndarray:
    """Return the densities of seeds at all points of a grid, in one flat array."""
    grids = [field.density_grid(spec).flatten().cpu() for field in fields_of(generator, seeds, psi, cutoff)]
    return torch.cat(grids).double().numpy()


STAGES = ("raw", "aligned", "calibrated")
# number of neighbours in the embedding; quantile of the reference's neighbour distances that counts as
# outside; share of shapes outside above which ranks are not meaningful
NEIGHBOURS = 5
RARE = 0.99
MOST_OUTSIDE = 0.5
STEADY = 0.8  # least acceptable rank correlation under a change that should not matter
# pixels of a mesh in a strip; number of meshes in a row
PIXELS = 160
STRIP = 5


class Seen(NamedTuple):
    scores: np.ndarray  # [N]
    embedding: np.ndarray  # [N, M]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Reward, its reference generator, and the generators to score."""

    reward: Reward
    reward_hash: str
    reference: LoadedGenerator
    networks: Mapping[str, LoadedGenerator]  # by name
    options: ScoreOptions = ScoreOptions()

    @property
    def seeds(self) -> range:
        """Return the held-out latents that are scored."""
        return LATENTS.take(self.options.n, self.options.seed)

    @property
    def shared(self) -> dict:
        """Return the inputs of every network's scores."""
        return {**asdict(self.options), "reward": self.reward_hash, "reference": self.reference.hash}

    @property
    def spec(self) -> SlabSpec:
        """Return the grid for comparing densities: the reward's, or one over the reference's whole cube if
        the reward has none.
        """
        reward_spec = getattr(self.reward.observation, "spec", None)
        return (
            reward_spec
            if isinstance(reward_spec, SlabSpec)
            else SlabSpec.of(self.reference.generator.bounds, self.options.resolution)
        )

    @functools.cached_property
    def surface(self) -> np.ndarray:
        """Compute the surface points of the reference's typical shape, [P, 3]."""
        o = self.options
        return mean_surface(self.reference.generator, ALIGNMENT.take(o.fit), o.psi, o.cutoff, o.resolution)

    @functools.cached_property
    def density(self) -> np.ndarray:
        """Compute the reference's densities, pooled over the latents for alignment."""
        return pooled(
            self.reference.generator,
            ALIGNMENT.take(self.options.fit),
            self.spec,
            self.options.psi,
            self.options.cutoff,
        )

    @functools.cached_property
    def known(self) -> tuple[cKDTree, float]:
        """Build the search tree of the reference's embeddings and the distance that counts as outside.

        The distance is the one to the fifth neighbour that 1 % of the reference's shapes exceed.
        """
        points = self.see(self.reference.generator, ALIGNMENT.take(self.options.known)).embedding
        tree = cKDTree(points)
        # One neighbour more: each point of the tree is its own nearest.
        return tree, float(np.quantile(tree.query(points, NEIGHBOURS + 1)[0][:, -1], RARE))

    @functools.cached_property
    def reference_scores(self) -> Seen:
        """Score the reference's shapes of the scored latents."""
        return self.see(self.reference.generator, self.seeds)

    @torch.no_grad()
    def see(self, generator: Generator, seeds: Sequence[int], psi: float | None = None) -> Seen:
        """Compute scores and embeddings of seeds, in batches."""
        o = self.options
        scores = []
        embeddings = []
        for start in range(0, len(seeds), o.batch):
            ws = ws_of(generator, seeds[start : start + o.batch], o.psi if psi is None else psi, o.cutoff)
            # The embedding is computed once; the score follows from it.
            embedding = self.reward.network.embed(self.reward.observation.observe(generator.field(ws)))
            embeddings.append(embedding.double().cpu().numpy())
            scores.append(self.reward.network.score_embedding(embedding).double().cpu().numpy())
        return Seen(np.concatenate(scores), np.concatenate(embeddings))

    def outside(self, embedding: np.ndarray) -> float:
        """Return the share of shapes that are farther from the reference's embeddings than 99 % of the
        reference's are.
        """
        tree, least = self.known  # `least`: distance that counts as outside
        return float((tree.query(embedding, NEIGHBOURS)[0][:, -1] > least).mean())

    def places(self, generator: Generator) -> tuple[dict[str, Place], Alignment]:
        """Return a generator's placement as it is, aligned, and calibrated as well; and the alignment."""
        o = self.options
        bounds = self.reference.generator.bounds
        cameras = self.reference.generator.cameras
        # latents that are not scored
        surface = mean_surface(generator, ALIGNMENT.take(o.fit), o.psi, o.cutoff, o.resolution)
        alignment = align(surface, self.surface)
        # A scaled world needs a scaled density: optical depth is density times length.
        aligned = Place(
            alignment.similarity,
            bounds,
            cameras=cameras,
            density=partial(scaled_density, factor=alignment.similarity.scale),
        )
        # Densities are compared where the reward reads them, after the alignment.
        shown = Placed(generator, aligned)
        values = pooled(shown, ALIGNMENT.take(o.fit), self.spec, o.psi, o.cutoff)
        mapping = calibrate_density(values, self.density, shown.level, self.reference.generator.level)
        calibrated = replace(aligned, density=lambda sigma: mapping(aligned.density(sigma)))
        raw = Place(Similarity.of_boxes(generator.bounds, bounds), bounds, cameras=cameras)
        return {"raw": raw, "aligned": aligned, "calibrated": calibrated}, alignment

    def facts(self, name: str | None = None) -> Facts:
        """Return the facts of one network, or of all of them."""
        networks = {key: loaded.hash for key, loaded in self.networks.items() if name in (None, key)}
        return Facts(
            n=self.options.n,
            seeds=seed_range(self.seeds),
            psi=self.options.psi,
            interval=RANK_INTERVAL,
            networks={**networks, "reference": self.reference.hash, "reward": self.reward_hash},
        )


def changed(trial: Trial, generator: Generator, place: Place) -> dict[str, np.ndarray]:
    """Compute scores [N] of the same latents under changes that should not matter, and at another
    truncation.
    """
    o = trial.options
    # Half a voxel of the grid, in the generator's world
    half = trial.spec.voxel / 2 * place.similarity.scale  # world units of the generator
    scores_by_change = {
        "mirrored": trial.see(Placed(generator, replace(place, mirrored=True)), trial.seeds).scores
    }
    for axis, way in enumerate(("sideways", "up", "forward")):
        x, y, z = (value + half * (i == axis) for i, value in enumerate(place.similarity.shift))
        moved = replace(place, similarity=replace(place.similarity, shift=(x, y, z)))
        scores_by_change[f"half a voxel {way}"] = trial.see(Placed(generator, moved), trial.seeds).scores
    lower = o.psi * 5 / 7
    return {
        **scores_by_change,
        f"ψ {lower:.2g}": trial.see(Placed(generator, place), trial.seeds, lower).scores,
    }


def correlation(first: np.ndarray, second: np.ndarray) -> dict | None:
    """Compute the rank correlation with its interval; None if one side is constant."""
    try:
        return spearman(first, second)._asdict()
    except ValueError:
        return None


def score(trial: Trial, name: str, folder: Path) -> Finding:
    """Score one generator at every stage, and measure how reliable the scores are."""
    generator = trial.networks[name].generator
    places, alignment = trial.places(generator)
    seen = {stage: trial.see(Placed(generator, place), trial.seeds) for stage, place in places.items()}
    last = seen["calibrated"].scores  # the stage that ranks are taken from
    agreement = {
        what: correlation(last, scores)
        for what, scores in changed(trial, generator, places["calibrated"]).items()
    }
    data = {
        "alignment": {**asdict(alignment.similarity), "residual": alignment.residual},
        "scores": {stage: stage_scores.scores.tolist() for stage, stage_scores in seen.items()},
        "summary": {stage: summary(stage_scores.scores) for stage, stage_scores in seen.items()},
        "outside": {stage: trial.outside(stage_scores.embedding) for stage, stage_scores in seen.items()},
        "reference": {
            stage: correlation(stage_scores.scores, trial.reference_scores.scores)
            for stage, stage_scores in seen.items()
        },
        "agreement": agreement,
    }
    rows = [
        {"seed": seed, **{stage: float(stage_scores.scores[i]) for stage, stage_scores in seen.items()}}
        for i, seed in enumerate(trial.seeds)
    ]
    images = strip(trial, name, last, folder)
    return Finding(facts=trial.facts(name), data=data, rows=rows, says=says(data), images=images)


def summary(scores: np.ndarray) -> dict[str, float]:
    """Summarise scores [N]: mean, standard deviation and quartiles."""
    names = ("min", "low", "median", "high", "max")
    quantiles = dict(zip(names, np.quantile(scores, [0, 0.25, 0.5, 0.75, 1]).tolist(), strict=True))
    return {"mean": float(scores.mean()), "standard_deviation": float(scores.std(ddof=1)), **quantiles}


@torch.no_grad()
def strip(trial: Trial, name: str, scores: np.ndarray, folder: Path) -> dict[str, str]:
    """Render the meshes with the highest and the lowest scores, in the generator's own world."""
    generator = trial.networks[name].generator
    o = trial.options
    order = np.argsort(-scores, kind="stable")  # best first
    rows: list[Row] = []
    for title, chosen in (("best", order[:STRIP]), ("worst", order[::-1][:STRIP])):
        cells = []
        for i in chosen:
            # The unplaced generator: the image shows the shape as its generator makes it.
            surface = LevelSet.of(
                generator.field(ws_of(generator, [trial.seeds[int(i)]], o.psi, o.cutoff)), 96
            )
            cells.append(
                to_uint8(shrink(paint(look(surface, camera(generator, 0.4), PIXELS * SUPERSAMPLE))).cpu())
            )
        captions = [f"{trial.seeds[int(i)]}: {scores[int(i)]:.2f}" for i in chosen]
        rows.append(Row(cells=cells, name=title, captions=captions, parted=bool(rows)))
    file = f"strip-{list(trial.networks).index(name)}.png"  # a name may hold characters that files may not
    Image.fromarray(sheet("", rows, names=90)).save(folder / file)
    return {f"{name}: highest and lowest calibrated reward, seed and reward below": file}


def says(data: Mapping) -> list[str]:
    """Describe a generator's scores."""
    place = data["alignment"]
    outside = data["outside"]["calibrated"]  # share of shapes
    shift = ", ".join(f"{value:+.3f}" for value in place["shift"])  # along x, y, z
    medians = ", ".join(f"{stage} {data['summary'][stage]['median']:.2f}" for stage in STAGES)
    lines = [
        f"Median reward: {medians}.",
        (
            f"The generator's shapes are {place['scale']:.3f} times as large as the reference's and are"
            f" shifted by ({shift}); the typical distance of the surfaces is {place['residual']:.4f}."
        ),
        f"{outside:.0%} of the shapes lie outside the reference's distribution (1 % of the reference's do).",
    ]
    if outside > MOST_OUTSIDE:
        lines.insert(
            0, "Ranks not meaningful: more than half of the shapes lie outside the reference's distribution."
        )
    kept = {what: interval and interval["mean"] for what, interval in data["agreement"].items()}
    listed = ", ".join(
        f"{what} {'none' if value is None else format(value, '.2f')}" for what, value in kept.items()
    )
    lines.append(f"Rank correlation of the calibrated reward with itself: {listed}.")
    # The last entry is the other truncation, under which ranks may change.
    unstable = [what for what, value in list(kept.items())[:-1] if value is None or value < STEADY]
    if unstable:
        lines.append(f"Unstable: the rank correlation under {' and '.join(unstable)} is below {STEADY:g}.")
    return lines


def compare(trial: Trial, findings: Mapping[str, Finding], _folder: Path) -> Finding:
    """Compare all generators by their scores."""
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
        "A latent has another shape in another network, unless one descends from the other: compare medians"
        " and spreads, not seeds. To compare ranks within a network: the paper's reward kept 0.84 (EG3D) and"
        " 0.91 (HyPlaneHead) under mirroring, and 0.67 where densities were clipped to their percentiles."
    )
    return Finding(
        facts=trial.facts(),
        data={"networks": data, "reference": summary(trial.reference_scores.scores)},
        rows=rows,
        says=lines,
    )


@style.plot("small", size=(9.4, 4.0), ylabel="reward", title="Rewards: median, quartiles, ends")
def plot_scores(axes, data: dict):
    """Plot a bar from quartile to quartile per generator and stage, over the band of the reference's
    quartiles.
    """
    reference = data["reference"]
    names = list(data["networks"])
    axes.axhspan(
        reference["low"],
        reference["high"],
        color=style.colour("noise"),
        alpha=0.2,
        label="reference, quartiles",
    )
    # The stages of one generator stand side by side, .22 apart.
    for j, stage in enumerate(STAGES):
        for i, name in enumerate(names):
            row = data["networks"][name][stage]
            x = i + 0.22 * (j - 1)  # the middle stage is on the tick
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
    """Return one part per generator, and a function from their findings, by generator, to the comparison."""
    parts = [
        Job(
            key=f"network-{i}",
            title=name,
            compute=partial(score, trial, name),
            inputs={**trial.shared, "name": name, "network": loaded.hash},
        )
        for i, (name, loaded) in enumerate(trial.networks.items())
    ]

    hashes = {name: loaded.hash for name, loaded in trial.networks.items()}
    return parts, lambda findings: Job(
        key="comparison",
        title="All generators",
        compute=partial(compare, trial, findings),
        plots={"rewards": plot_scores},
        inputs={**trial.shared, "networks": hashes},
    )


def named(loaded: list[LoadedGenerator]) -> dict[str, LoadedGenerator]:
    """Name the generators as shortly as possible: by file, else by folder and file, else by path."""
    for name in (lambda path: path.stem, lambda path: f"{path.parent.name}/{path.stem}", str):
        names = {name(generator.path): generator for generator in loaded}
        # This kind of name is unique for every file.
        if len(names) == len(loaded):
            break
    return names


def trial_of(networks, reward, reference, device: str, options: ScoreOptions) -> Trial:
    """Load the networks that the flags name. Raises: ValueError, FileNotFoundError naming the flag."""
    where = choose_device(device)
    with naming("--reference"):
        known = load_generator(reference, where)  # the generator that the reward was trained on
    path = reward or bundled.REWARD
    with naming("--reward"):
        loaded = load_reward(path, where)
    check_reward(loaded, known.generator, "--reference")
    loaded_networks = []
    place = Place(bounds=known.generator.bounds, cameras=known.generator.cameras)
    # A network that is named twice is scored once.
    for source in dict.fromkeys(networks or [reference]):
        with naming("--network"):
            loaded_networks.append(load_generator(source, where))
            misfits = loaded.observation.misfits(Placed(loaded_networks[-1].generator, place))
            if misfits:
                raise ValueError(
                    f"{loaded_networks[-1].path}: expected a generator with {'; with '.join(misfits)}. Leave"
                    " it out."
                )
    return Trial(
        reward=loaded,
        reward_hash=file_hash(path),
        reference=known,
        networks=named(loaded_networks),
        options=options,
    )


def write(trial: Trial, out: Path) -> dict[str, Finding]:
    """Score the generators, and write <out>/index.html and scores.json; return the finding of each one."""
    parts, compared = jobs(trial)
    findings = pages.run(parts, out)
    by_name = {name: findings[part.key] for name, part in zip(trial.networks, parts, strict=True)}
    seeds = list(trial.seeds)  # the same for every network
    values = {
        **trial.shared,
        "networks": {
            name: {**finding.data, "seeds": seeds, "says": list(finding.says)}
            for name, finding in by_name.items()
        },
    }
    write_atomic(out / "scores.json", (json.dumps(values, indent=1) + "\n").encode())
    # The comparison needs the findings of all generators.
    last = compared(by_name)
    findings |= pages.run([last], out, quiet=True)
    introduction = (
        f"{trial.options.n} latents each. The reward was trained on shapes of {trial.reference.path.name}."
        " Raw: its crop is the same share of each generator's own cube. Aligned: each generator's typical"
        " surface is mapped onto the reference's by scale and shift. Calibrated: densities, too, get the"
        " reference's quantiles. Alignment and calibration were fitted on other latents."
    )
    page = out / "index.html"
    write_page(
        page, "Scores across generators", introduction, [last, *parts], findings, findings[last.key].says
    )
    return by_name
