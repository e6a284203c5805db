"""Score the shapes of several generators by one reward: raw, aligned to the reward's crop, and with
calibrated density.

The reward was trained on the shapes of one generator, the reference generator. For every other generator, the
report states the share of shapes outside the reference's distribution, and the stability of the ranks. The
`level` of a generator is the density at which its surfaces are extracted.
Shapes: N latents, M entries of an embedding of the reward network, P points, Q quantiles, D x H x W grid
points.
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
from eg3d_rlhf.core.cli import choose_device, file_hash, prefix_errors
from eg3d_rlhf.core.seeds import ALIGNMENT, LATENTS
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.core.statistics import RANK_INTERVAL, spearman
from eg3d_rlhf.evaluation.settings import ScoreOptions
from eg3d_rlhf.experiments import pages, style
from eg3d_rlhf.experiments.media.sheet import SUPERSAMPLE, Row, look, paint, sheet, shrink, to_uint8
from eg3d_rlhf.experiments.pages import Facts, Finding, Job, seed_range, write_page
from eg3d_rlhf.generators import Generator, LoadedGenerator, camera, load_generator
from eg3d_rlhf.generators.placed import Placed, Placement, Similarity, scaled_density, ws_of_placed
from eg3d_rlhf.geometry.level_set import LevelSet
from eg3d_rlhf.geometry.mesh import extract_mesh, largest_part
from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward
from eg3d_rlhf.rewards.stated_accuracy import announce_reward
from training.storage import write_atomic

# Alignment and calibration of a foreign generator, which is one that the reward was not trained on: the
# position of its shapes and the scale of its density are mapped to those of the reference generator.


QUANTILES = 64  # number of quantiles of the density above the level, and below it
KEPT = 0.8  # share of nearest neighbours that the alignment uses
_POINTS = 6000  # largest number of points of a surface
_ROUNDS = 100  # largest number of iterations of the alignment
_STILL = 1e-7  # the alignment ends when scale and shift (world units) change by less than this


@torch.no_grad()
def yield_fields(
    generator: Generator, seeds: Sequence[int], psi: float, cutoff: int | None, batch_size: int = 8
):
    """Yield the shapes of seeds as fields of at most `batch_size` shapes.

    Args:
        psi: truncation.
        cutoff: number of layers that truncation affects; None if it affects all layers.
        batch_size: largest number of shapes in a field.
    """
    for start in range(0, len(seeds), batch_size):
        yield generator.field(ws_of_placed(generator, seeds[start : start + batch_size], psi, cutoff))


def mean_surface(
    generator: Generator, seeds: Sequence[int], psi: float, cutoff: int | None, resolution: int
) -> np.ndarray:
    """Return points [P, 3] on the front half of the surface of the generator's typical shape.

    The typical shape is the median density over the seeds at each grid point, cut at the generator's level:
    half of the samples are solid there. So it does not depend on the density's scale. The faces that close
    the surface at the border of the cube are left out.

    Args:
        seeds: seeds over which the median is taken.
        psi: truncation.
        cutoff: number of layers that truncation affects; None if it affects all layers.
        resolution: grid points per edge of the cube.

    Raises: ValueError if the median density has no surface.
    """
    spec = SlabSpec.from_bounds(generator.bounds, resolution)
    # [N, D, H, W], on the CPU, since the median needs the grids of all samples at once
    density_grids = torch.cat(
        [field.density_grid(spec).cpu() for field in yield_fields(generator, seeds, psi, cutoff)]
    )
    vertices, _, _ = largest_part(*extract_mesh(density_grids.quantile(0.5, dim=0), spec, generator.level))
    # Points within 1.5 voxels of the cube's faces close the surface at the border; they are not the shape's.
    is_inside = np.abs(vertices - np.array(spec.centre)).max(axis=1) < spec.box_warp / 2 - 1.5 * spec.voxel
    # The front half: z points to the front, and the points are in front of the mean z.
    # [P, 3]
    front_points = vertices[is_inside & (vertices[:, 2] > vertices[is_inside, 2].mean())].astype(np.float64)
    # An even subset bounds the cost of the neighbour searches.
    return front_points[np.linspace(0, len(front_points) - 1, min(len(front_points), _POINTS)).astype(int)]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Position and scale of a foreign generator's surface relative to the reference generator's surface."""

    similarity: Similarity  # from the reference's world to the foreign one
    residual: float  # root mean square distance of the neighbours used, in the reference's world units


def align(foreign_surface: np.ndarray, reference_surface: np.ndarray) -> Alignment:
    """Find the scale and shift that map the reference's surface onto a foreign surface, without rotation.

    The method is iterated closest points (Besl and McKay 1992) in both directions. The farthest fifth of the
    neighbours is left out in every iteration, so that parts which one of the surfaces lacks do not count.

    Args:
        foreign_surface: points of the foreign surface, [P, 3].
        reference_surface: points of the reference's surface, [P, 3].
    """
    # Start: equal centres and equal root mean square radii
    foreign_centre = foreign_surface.mean(axis=0)
    reference_centre = reference_surface.mean(axis=0)
    scale = float(
        np.sqrt(
            ((foreign_surface - foreign_centre) ** 2).sum(1).mean()
            / ((reference_surface - reference_centre) ** 2).sum(1).mean()
        )
    )
    shift = foreign_centre - scale * reference_centre  # foreign = scale * reference + shift
    reference_tree = cKDTree(reference_surface)  # the reference does not move
    residual = np.inf  # replaced in the first round
    for _ in range(_ROUNDS):
        aligned_points = (foreign_surface - shift) / scale
        # First from foreign points to the reference, then from the reference to foreign points
        foreign_distances, reference_neighbours = reference_tree.query(aligned_points)
        reference_distances, foreign_neighbours = cKDTree(aligned_points).query(reference_surface)
        is_kept_foreign = foreign_distances <= np.quantile(
            foreign_distances, KEPT
        )  # mask of the foreign points
        # mask of the reference points
        is_kept_reference = reference_distances <= np.quantile(reference_distances, KEPT)
        foreign_points = np.concatenate(
            [foreign_surface[is_kept_foreign], foreign_surface[foreign_neighbours[is_kept_reference]]]
        )
        reference_points = np.concatenate(
            [reference_surface[reference_neighbours[is_kept_foreign]], reference_surface[is_kept_reference]]
        )
        residual = float(
            np.sqrt(
                np.square(
                    np.concatenate(
                        [foreign_distances[is_kept_foreign], reference_distances[is_kept_reference]]
                    )
                ).mean()
            )
        )
        # Least squares for foreign_points = scale * reference_points + shift, in closed form
        foreign_mean = foreign_points.mean(axis=0)  # centroids of the matched points
        reference_mean = reference_points.mean(axis=0)
        previous_fit = np.append(shift, scale)  # the loop ends when the fit no longer changes
        scale = float(
            ((foreign_points - foreign_mean) * (reference_points - reference_mean)).sum()
            / ((reference_points - reference_mean) ** 2).sum()
        )
        shift = foreign_mean - scale * reference_mean
        if np.abs(np.append(shift, scale) - previous_fit).max() < _STILL:
            break
    return Alignment(
        similarity=Similarity(scale, (float(shift[0]), float(shift[1]), float(shift[2]))), residual=residual
    )


@dataclass(frozen=True, eq=False)
class DensityMap:
    """Increasing, piecewise linear map from a foreign generator's raw density to the reference's raw density.

    Beyond the first and the last knot the outermost linear segments continue.
    """

    knots: torch.Tensor  # [Q] densities of the foreign generator, increasing
    values: torch.Tensor  # [Q] densities of the reference to which the knots are mapped, increasing

    def __call__(self, sigma: torch.Tensor) -> torch.Tensor:
        """Map densities of any shape. Differentiable in sigma."""
        knots = self.knots.to(sigma)
        values = self.values.to(sigma)
        # Index of the knot at the upper end of each density's segment. The clamp extends the outermost
        # segments. searchsorted needs no gradient, since the map is linear in each segment.
        upper_index = torch.searchsorted(knots, sigma.detach().contiguous()).clamp(1, len(knots) - 1)
        lower_knots = knots[upper_index - 1]  # ends of each density's segment
        upper_knots = knots[upper_index]
        return values[upper_index - 1] + (sigma - lower_knots) / (upper_knots - lower_knots) * (
            values[upper_index] - values[upper_index - 1]
        )


def calibrate_density(
    foreign_densities: np.ndarray,
    reference_densities: np.ndarray,
    foreign_level: float,
    reference_level: float,
) -> DensityMap:
    """Fit a map after which the foreign densities have the quantiles of the reference's densities.

    Quantiles are matched separately above and below the level. Those below matter as well, since the reward
    normalises each slab by its smallest and largest density. The foreign level maps to the reference's level.

    Args:
        foreign_densities: densities of the foreign generator's samples, in one flat array.
        reference_densities: densities of the reference's samples, in one flat array.
        foreign_level: level of the foreign generator's surfaces.
        reference_level: level of the reference's surfaces.

    Raises: ValueError if one of the arrays has fewer than QUANTILES values on one side of its level.
    """
    quantiles_by_side = []  # [below, above], each [foreign, reference]
    for is_above in (False, True):
        # values with their level
        densities_with_level = (
            (foreign_densities, foreign_level),
            (reference_densities, reference_level),
        )
        side_values = [
            densities[(densities > side_level) if is_above else (densities < side_level)]
            for densities, side_level in densities_with_level
        ]
        if min(map(len, side_values)) < QUANTILES:
            side_name = "above" if is_above else "below"
            raise ValueError(
                f"calibration: only {min(map(len, side_values))} densities are {side_name} the level in the"
                f" reward's crop; {QUANTILES} are needed. The shapes lie outside the crop, so this network"
                " cannot be scored. Remove it from --network."
            )
        quantiles_by_side.append(
            [np.quantile(densities, np.linspace(0, 1, QUANTILES)) for densities in side_values]
        )
    # Quantiles below the level, then the level, then the quantiles above it
    foreign_knots = np.concatenate([quantiles_by_side[0][0], [foreign_level], quantiles_by_side[1][0]])
    reference_knots = np.concatenate([quantiles_by_side[0][1], [reference_level], quantiles_by_side[1][1]])
    # Equal quantiles would make segments of zero width, hence a division by zero; only the first is kept.
    is_kept = np.concatenate(
        [[True], np.diff(np.maximum.accumulate(foreign_knots)) > 1e-6 * max(abs(foreign_level), 1.0)]
    )
    return DensityMap(
        torch.from_numpy(foreign_knots[is_kept]).float(), torch.from_numpy(reference_knots[is_kept]).float()
    )


def pool_densities(
    generator: Generator, seeds: Sequence[int], spec: SlabSpec, psi: float, cutoff: int | None
) -> np.ndarray:
    """Return the raw densities of the shapes of seeds at all points of the grid `spec`, in one flat float64
    array.

    Args:
        psi: truncation.
        cutoff: number of layers that truncation affects; None if it affects all layers.
    """
    grids = [
        field.density_grid(spec).flatten().cpu() for field in yield_fields(generator, seeds, psi, cutoff)
    ]
    return torch.cat(grids).double().numpy()


STAGES = ("raw", "aligned", "calibrated")
NEIGHBOURS = 5  # the distance to this neighbour in the embedding decides if a shape is outside
RARE = 0.99  # quantile of the reference's neighbour distances beyond which a shape counts as outside
MAX_OUTSIDE_SHARE = 0.5  # share of shapes outside above which ranks are not meaningful
STEADY = 0.8  # smallest acceptable rank correlation under a change that should not matter
PIXELS = 160  # pixels per edge of a rendered mesh
STRIP = 5  # number of meshes in a row


class Measured(NamedTuple):
    """Scores and embeddings that the reward network computes for N shapes."""

    scores: np.ndarray  # [N]
    embedding: np.ndarray  # [N, M]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Reward, its reference generator, and the generators to score."""

    reward: Reward
    reward_hash: str  # SHA-256 of the reward's file
    reference: LoadedGenerator  # the generator that the reward was trained on
    networks: Mapping[str, LoadedGenerator]  # by name
    options: ScoreOptions = ScoreOptions()

    @property
    def seeds(self) -> range:
        """Return the seeds of the held-out latents that are scored."""
        return LATENTS.take(self.options.n, self.options.seed)

    @property
    def shared_inputs(self) -> dict:
        """Return the inputs that the scores of every network depend on, as JSON values."""
        return {**asdict(self.options), "reward": self.reward_hash, "reference": self.reference.hash}

    @property
    def spec(self) -> SlabSpec:
        """Return the grid on which densities are compared.

        It is the grid of the reward's observation. A reward without a grid, for example of depth images, gets
        a grid over the reference generator's whole cube.
        """
        reward_spec = getattr(self.reward.observation, "spec", None)
        return (
            reward_spec
            if isinstance(reward_spec, SlabSpec)
            else SlabSpec.from_bounds(self.reference.generator.bounds, self.options.resolution)
        )

    @functools.cached_property
    def reference_surface(self) -> np.ndarray:
        """Return the surface points [P, 3] of the reference generator's typical shape, see `mean_surface`."""
        score_options = self.options
        return mean_surface(
            self.reference.generator,
            ALIGNMENT.take(score_options.fit),
            score_options.psi,
            score_options.cutoff,
            score_options.resolution,
        )

    @functools.cached_property
    def reference_density(self) -> np.ndarray:
        """Return the reference generator's densities for the latents of the alignment, in one flat array."""
        return pool_densities(
            self.reference.generator,
            ALIGNMENT.take(self.options.fit),
            self.spec,
            self.options.psi,
            self.options.cutoff,
        )

    @functools.cached_property
    def outside_criterion(self) -> tuple[cKDTree, float]:
        """Compute the criterion by which a shape counts as outside the reference's distribution.

        Returns: a search tree of the embeddings of the reference's shapes, and a distance. A shape is outside
            if its fifth nearest embedding in the tree is farther away than this distance, which 1 % of the
            reference's own shapes exceed.
        """
        embeddings = self.measure_seeds(
            self.reference.generator, ALIGNMENT.take(self.options.known)
        ).embedding
        embedding_tree = cKDTree(embeddings)
        # One neighbour more, since each point of the tree is its own nearest; [0]: distances, without indices
        return embedding_tree, float(
            np.quantile(embedding_tree.query(embeddings, NEIGHBOURS + 1)[0][:, -1], RARE)
        )

    @functools.cached_property
    def reference_measured(self) -> Measured:
        """Return scores and embeddings of the reference generator's shapes for the scored latents."""
        return self.measure_seeds(self.reference.generator, self.seeds)

    @torch.no_grad()
    def measure_seeds(self, generator: Generator, seeds: Sequence[int], psi: float | None = None) -> Measured:
        """Compute the scores and embeddings of a generator's shapes, in batches.

        Args: psi: truncation; None selects the truncation of the options.
        """
        score_options = self.options
        scores = []  # [n] for each batch
        embeddings = []  # [n, M] for each batch
        for start in range(0, len(seeds), score_options.batch):
            ws = ws_of_placed(
                generator,
                seeds[start : start + score_options.batch],
                score_options.psi if psi is None else psi,
                score_options.cutoff,
            )
            # The embedding is computed once; the score follows from it.
            embedding = self.reward.network.embed(self.reward.observation.observe(generator.field(ws)))
            embeddings.append(embedding.double().cpu().numpy())
            scores.append(self.reward.network.score_embedding(embedding).double().cpu().numpy())
        return Measured(np.concatenate(scores), np.concatenate(embeddings))

    def share_outside(self, embedding: np.ndarray) -> float:
        """Return the share of embeddings [N, M] outside the reference's distribution.

        A shape is outside if it is farther from the reference's embeddings than 99 % of the reference's own
        shapes are.
        """
        embedding_tree, outside_distance = self.outside_criterion
        # [0]: distances, without indices; [:, -1]: to the farthest of the neighbours
        return float((embedding_tree.query(embedding, NEIGHBOURS)[0][:, -1] > outside_distance).mean())

    def placements(self, generator: Generator) -> tuple[dict[str, Placement], Alignment]:
        """Compute the placement of a generator's shapes at every stage (raw, aligned, calibrated), and their
        alignment.

        Returns: a dict with a placement for each of STAGES, and the alignment. The placement 'raw' maps the
            generator's cube onto the reference's cube, 'aligned' maps its typical surface onto the
            reference's surface, and 'calibrated' also maps the density.
        """
        score_options = self.options
        bounds = self.reference.generator.bounds
        cameras = self.reference.generator.cameras
        # ALIGNMENT: other latents than those that are scored
        surface_points = mean_surface(
            generator,
            ALIGNMENT.take(score_options.fit),
            score_options.psi,
            score_options.cutoff,
            score_options.resolution,
        )
        alignment = align(surface_points, self.reference_surface)
        # A scaled world needs a scaled density: optical depth is density times length.
        aligned_placement = Placement(
            alignment.similarity,
            bounds,
            cameras=cameras,
            density=partial(scaled_density, factor=alignment.similarity.scale),
        )
        # Densities are compared where the reward reads them, after the alignment.
        placed_generator = Placed(generator, aligned_placement)
        densities = pool_densities(
            placed_generator,
            ALIGNMENT.take(score_options.fit),
            self.spec,
            score_options.psi,
            score_options.cutoff,
        )
        density_map = calibrate_density(
            densities, self.reference_density, placed_generator.level, self.reference.generator.level
        )
        calibrated_placement = replace(
            aligned_placement, density=lambda sigma: density_map(aligned_placement.density(sigma))
        )
        raw_placement = Placement(Similarity.from_bounds(generator.bounds, bounds), bounds, cameras=cameras)
        return {
            "raw": raw_placement,
            "aligned": aligned_placement,
            "calibrated": calibrated_placement,
        }, alignment

    def facts(self, network_name: str | None = None) -> Facts:
        """Return the facts that a page states: the number of latents, their seeds, truncation, interval and
        hashes.

        Args: network_name: name of the network whose hash is stated; None states the hashes of all networks.
        """
        hash_by_network = {
            other_name: loaded_generator.hash
            for other_name, loaded_generator in self.networks.items()
            if network_name in (None, other_name)
        }
        return Facts(
            n=self.options.n,
            seeds=seed_range(self.seeds),
            psi=self.options.psi,
            interval=RANK_INTERVAL,
            networks={**hash_by_network, "reference": self.reference.hash, "reward": self.reward_hash},
        )


def scores_under_changes(trial: Trial, generator: Generator, placement: Placement) -> dict[str, np.ndarray]:
    """Compute the scores of the same latents under changes of their placement, and at a lower truncation.

    Args: placement: placement without the change.
    Returns: scores [N] by name of the change. A mirrored shape, or one shifted by half a voxel, should get a
        similar score as without the change. The last key is the lower truncation, under which scores may
        change.
    """
    score_options = trial.options
    half_voxel = trial.spec.voxel / 2 * placement.similarity.scale  # world units of the generator
    scores_by_change = {
        "mirrored": trial.measure_seeds(
            Placed(generator, replace(placement, mirrored=True)), trial.seeds
        ).scores
    }
    for axis, direction in enumerate(("sideways", "up", "forward")):
        x, y, z = (
            coordinate + half_voxel * (shift_axis == axis)
            for shift_axis, coordinate in enumerate(placement.similarity.shift)
        )
        shifted_placement = replace(placement, similarity=replace(placement.similarity, shift=(x, y, z)))
        scores_by_change[f"half a voxel {direction}"] = trial.measure_seeds(
            Placed(generator, shifted_placement), trial.seeds
        ).scores
    lower_psi = score_options.psi * 5 / 7  # 0.5 for the default truncation 0.7
    return {
        **scores_by_change,
        f"ψ {lower_psi:.2g}": trial.measure_seeds(
            Placed(generator, placement), trial.seeds, lower_psi
        ).scores,
    }


def correlate_ranks(first_scores: np.ndarray, second_scores: np.ndarray) -> dict | None:
    """Compute Spearman's rank correlation with its interval, as a dict with the keys mean, lo and hi.

    Return None if all scores of one argument are equal, since there are no ranks then.
    """
    try:
        return spearman(first_scores, second_scores)._asdict()
    except ValueError:  # `spearman` rejects constant scores
        return None


def score(trial: Trial, network_name: str, folder: Path) -> Finding:
    """Score one generator at every stage (raw, aligned, calibrated), and measure how reliable the scores are.

    Args:
        network_name: key of the generator in `trial.networks`.
        folder: folder for the image.
    """
    generator = trial.networks[network_name].generator
    placement_by_stage, alignment = trial.placements(generator)
    measurements_by_stage = {
        stage: trial.measure_seeds(Placed(generator, placement), trial.seeds)
        for stage, placement in placement_by_stage.items()
    }
    calibrated_scores = measurements_by_stage["calibrated"].scores  # the stage that ranks are taken from
    correlation_by_change = {
        change_name: correlate_ranks(calibrated_scores, scores)
        for change_name, scores in scores_under_changes(
            trial, generator, placement_by_stage["calibrated"]
        ).items()
    }
    finding_data = {
        "alignment": {**asdict(alignment.similarity), "residual": alignment.residual},
        "scores": {
            stage: stage_measurements.scores.tolist()
            for stage, stage_measurements in measurements_by_stage.items()
        },
        "summary": {
            stage: summarise(stage_measurements.scores)
            for stage, stage_measurements in measurements_by_stage.items()
        },
        "outside": {
            stage: trial.share_outside(stage_measurements.embedding)
            for stage, stage_measurements in measurements_by_stage.items()
        },
        "reference": {
            stage: correlate_ranks(stage_measurements.scores, trial.reference_measured.scores)
            for stage, stage_measurements in measurements_by_stage.items()
        },
        "agreement": correlation_by_change,
    }
    table_rows = [
        {
            "seed": seed,
            **{
                stage: float(stage_measurements.scores[latent_index])
                for stage, stage_measurements in measurements_by_stage.items()
            },
        }
        for latent_index, seed in enumerate(trial.seeds)
    ]
    image_by_caption = strip(trial, network_name, calibrated_scores, folder)
    return Finding(
        facts=trial.facts(network_name),
        data=finding_data,
        rows=table_rows,
        says=describe_scores(finding_data),
        images=image_by_caption,
    )


def summarise(scores: np.ndarray) -> dict[str, float]:
    """Compute the mean, the standard deviation, the quartiles and the range of scores [N].

    Returns: dict with "mean", "standard_deviation", "min", "low" (first quartile), "median", "high" (third
        quartile) and "max".
    """
    quantile_names = ("min", "low", "median", "high", "max")
    quantile_by_name = dict(
        zip(quantile_names, np.quantile(scores, [0, 0.25, 0.5, 0.75, 1]).tolist(), strict=True)
    )
    return {"mean": float(scores.mean()), "standard_deviation": float(scores.std(ddof=1)), **quantile_by_name}


@torch.no_grad()
def strip(trial: Trial, network_name: str, scores: np.ndarray, folder: Path) -> dict[str, str]:
    """Render the meshes with the highest and the lowest scores, in the generator's own world.

    Args:
        network_name: key of the generator in `trial.networks`.
        scores: calibrated scores [N] of the trial's seeds.
        folder: folder for the image.

    Returns: the file name of the image by its caption.
    """
    generator = trial.networks[network_name].generator
    score_options = trial.options
    best_first = np.argsort(-scores, kind="stable")  # indices of the latents, highest score first
    sheet_rows: list[Row] = []
    for row_name, chosen_indices in (("best", best_first[:STRIP]), ("worst", best_first[::-1][:STRIP])):
        cell_images = []
        for latent_index in chosen_indices:
            # The unplaced generator: the image shows the shape as its generator makes it, extracted on 96
            # grid points per edge and seen from 0.4 rad to the side.
            surface = LevelSet.from_field(
                generator.field(
                    ws_of_placed(
                        generator, [trial.seeds[int(latent_index)]], score_options.psi, score_options.cutoff
                    )
                ),
                96,
            )
            cell_images.append(
                to_uint8(shrink(paint(look(surface, camera(generator, 0.4), PIXELS * SUPERSAMPLE))).cpu())
            )
        captions = [
            f"{trial.seeds[int(latent_index)]}: {scores[int(latent_index)]:.2f}"
            for latent_index in chosen_indices
        ]
        sheet_rows.append(Row(cells=cell_images, name=row_name, captions=captions, parted=bool(sheet_rows)))
    # Named by number, since a network's name may hold characters that file names may not.
    image_name = f"strip-{list(trial.networks).index(network_name)}.png"
    Image.fromarray(sheet("", sheet_rows, name_width=90)).save(folder / image_name)
    return {f"{network_name}: highest and lowest calibrated reward, seed and reward below": image_name}


def describe_scores(finding_data: Mapping) -> list[str]:
    """Describe the scores of a generator in sentences, from the data that `score` computes."""
    alignment = finding_data["alignment"]
    outside_share = finding_data["outside"]["calibrated"]  # share of shapes
    shift_text = ", ".join(f"{coordinate:+.3f}" for coordinate in alignment["shift"])  # along x, y, z
    medians_text = ", ".join(f"{stage} {finding_data['summary'][stage]['median']:.2f}" for stage in STAGES)
    sentences = [
        f"Median reward: {medians_text}.",
        (
            f"The generator's shapes are {alignment['scale']:.3f} times as large as the reference's and are"
            f" shifted by ({shift_text}); the typical distance of the surfaces is"
            f" {alignment['residual']:.4f}."
        ),
        f"{outside_share:.0%} of the shapes lie outside the reference's distribution (1 % of the reference's"
        " do).",
    ]
    if outside_share > MAX_OUTSIDE_SHARE:
        sentences.insert(
            0, "Ranks not meaningful: more than half of the shapes lie outside the reference's distribution."
        )
    # None where the scores under a change are constant, so that there is no correlation
    correlation_by_change = {
        change_name: interval and interval["mean"]
        for change_name, interval in finding_data["agreement"].items()
    }
    correlation_text = ", ".join(
        f"{change_name} {'none' if correlation is None else format(correlation, '.2f')}"
        for change_name, correlation in correlation_by_change.items()
    )
    sentences.append(f"Rank correlation of the calibrated reward with itself: {correlation_text}.")
    # The last entry is the other truncation, under which ranks may change.
    unstable_changes = [
        change_name
        for change_name, correlation in list(correlation_by_change.items())[:-1]
        if correlation is None or correlation < STEADY
    ]
    if unstable_changes:
        sentences.append(
            f"Unstable: the rank correlation under {' and '.join(unstable_changes)} is below {STEADY:g}."
        )
    return sentences


def compare(trial: Trial, finding_by_network: Mapping[str, Finding], _folder: Path) -> Finding:
    """Compare all generators by their scores.

    Args: finding_by_network: result of `score` by name of the network.
    """
    summary_by_network = {
        network_name: {**finding.data["summary"]["calibrated"], **finding.data["summary"]}
        for network_name, finding in finding_by_network.items()
    }
    table_rows = [
        {
            "network": network_name,
            "stage": stage,
            **finding.data["summary"][stage],
            "outside": finding.data["outside"][stage],
            "correlation with the reference's": (finding.data["reference"][stage] or {}).get("mean"),
        }
        for network_name, finding in finding_by_network.items()
        for stage in STAGES
    ]
    # The first sentence of each generator holds its medians, or the warning that its ranks mean nothing.
    sentences = [
        f"{network_name}: {sentence}"
        for network_name, finding in finding_by_network.items()
        for sentence in finding.says[:1]
    ]
    sentences.append(
        "A latent has another shape in another network, unless one descends from the other: compare medians"
        " and spreads, not seeds. To compare ranks within a network: the paper's reward kept 0.84 (EG3D) and"
        " 0.91 (HyPlaneHead) under mirroring, and 0.67 where densities were clipped to their percentiles."
    )
    return Finding(
        facts=trial.facts(),
        data={"networks": summary_by_network, "reference": summarise(trial.reference_measured.scores)},
        rows=table_rows,
        says=sentences,
    )


@style.plot("small", size=(9.4, 4.0), ylabel="reward", title="Rewards: median, quartiles, ends")  # inches
def plot_scores(axes, finding_data: dict):
    """Plot a bar from the first to the third quartile for each generator and stage.

    A grey band behind the bars shows the quartiles of the reference generator.

    Args: finding_data: data of the finding of `compare`.
    """
    reference_summary = finding_data["reference"]
    network_names = list(finding_data["networks"])
    axes.axhspan(
        reference_summary["low"],
        reference_summary["high"],
        color=style.colour("noise"),
        alpha=0.2,
        label="reference, quartiles",
    )
    # The bars of the stages of one generator are drawn side by side, 0.22 apart.
    for stage_index, stage in enumerate(STAGES):
        for network_index, network_name in enumerate(network_names):
            stage_summary = finding_data["networks"][network_name][stage]
            bar_position = network_index + 0.22 * (stage_index - 1)  # the middle stage is on the tick
            axes.plot(
                [bar_position, bar_position],
                [stage_summary["min"], stage_summary["max"]],
                color=style.CYCLE[stage_index],
                linewidth=1,
            )
            axes.bar(
                [bar_position],
                [stage_summary["high"] - stage_summary["low"]],
                0.16,
                bottom=stage_summary["low"],
                color=style.CYCLE[stage_index],
                label=None if network_index else stage,
            )
            axes.plot([bar_position], [stage_summary["median"]], "_", color="white", markersize=9)
    axes.set_xticks(range(len(network_names)), network_names)


def jobs(trial: Trial) -> tuple[list[Job], Callable[[Mapping[str, Finding]], Job]]:
    """Return one job for each generator, and a function that makes the job of the comparison.

    The function takes the findings of the first jobs, by the generator's name.
    """
    # The keys are numbers, since a name may hold characters that file names may not.
    score_jobs = [
        Job(
            key=f"network-{network_index}",
            title=network_name,
            compute=partial(score, trial, network_name),
            inputs={**trial.shared_inputs, "name": network_name, "network": loaded_generator.hash},
        )
        for network_index, (network_name, loaded_generator) in enumerate(trial.networks.items())
    ]

    hash_by_network = {
        network_name: loaded_generator.hash for network_name, loaded_generator in trial.networks.items()
    }
    return score_jobs, lambda finding_by_network: Job(
        key="comparison",
        title="All generators",
        compute=partial(compare, trial, finding_by_network),
        plots={"rewards": plot_scores},
        inputs={**trial.shared_inputs, "networks": hash_by_network},
    )


def name_generators(generators: list[LoadedGenerator]) -> dict[str, LoadedGenerator]:
    """Return a dict from names to generators. The names are unique and as short as possible.

    The names are the files' stems if these are unique, else folder and stem, else the full paths.
    """
    for make_name in (lambda path: path.stem, lambda path: f"{path.parent.name}/{path.stem}", str):
        generator_by_name = {make_name(generator.path): generator for generator in generators}
        # This kind of name is unique for every file.
        if len(generator_by_name) == len(generators):
            break
    return generator_by_name


def _find_reference(
    reward: Reward, reward_path: Path, network_paths: Sequence[Path], device: torch.device
) -> LoadedGenerator:
    """Return the generator whose shapes a reward was trained on, if it is bundled or among the networks.

    Raises: ValueError if the reward records another generator, or none.
    """
    training_hash = reward.provenance.get("generator")
    training_hashes = reward.provenance.get("generators", [training_hash])
    for network_path in (bundled.GENERATOR, *network_paths):
        with prefix_errors("--network"):
            candidate = load_generator(network_path, device)
        if candidate.hash in training_hashes:
            return candidate
    recorded_text = (
        "does not record the generator that it was trained on"
        if training_hash is None
        else f"was trained on shapes of the generator {training_hash[:12]}..., which is not the bundled one"
    )
    raise ValueError(
        f"--reference is missing, and {reward_path} {recorded_text}. Pass the file of that generator with"
        " --reference."
    )


def load_trial(network_paths, reward, reference_path, device: str, score_options: ScoreOptions) -> Trial:
    """Load the networks that the flags name.

    Args:
        network_paths: files or run folders of the generators to score. If the sequence is empty, only the
            reference generator is scored.
        reward: file of the reward; None selects the bundled reward.
        reference_path: file or run folder of the reference generator; None selects the generator whose hash
            the reward records, if it is the bundled one or one of the generators to score.
        device: name of the device.
        score_options: settings of the scores.

    Raises: ValueError or FileNotFoundError, with the name of the flag.
    """
    torch_device = choose_device(device)
    reward_path = reward or bundled.REWARD
    with prefix_errors("--reward"):
        loaded_reward = load_reward(reward_path, torch_device)
    # the generator that the reward was trained on
    if reference_path is None:
        reference_generator = _find_reference(loaded_reward, reward_path, network_paths, torch_device)
    else:
        with prefix_errors("--reference"):
            reference_generator = load_generator(reference_path, torch_device)
    check_reward(loaded_reward, reference_generator.generator, "--reference")
    loaded_networks = []
    placement = Placement(
        bounds=reference_generator.generator.bounds, cameras=reference_generator.generator.cameras
    )
    # A network that is named twice is scored once.
    for network_path in dict.fromkeys(network_paths or [reference_generator.path]):
        with prefix_errors("--network"):
            loaded_networks.append(load_generator(network_path, torch_device))
            misfits = loaded_reward.observation.misfits(Placed(loaded_networks[-1].generator, placement))
            if misfits:
                raise ValueError(
                    f"{loaded_networks[-1].path}: this reward needs a generator with"
                    f" {'; with '.join(misfits)}. Remove this file from --network."
                )
    # last, so that an error above is the only line that is printed
    announce_reward(loaded_reward, "--reward")
    return Trial(
        reward=loaded_reward,
        reward_hash=file_hash(reward_path),
        reference=reference_generator,
        networks=name_generators(loaded_networks),
        options=score_options,
    )


def write(trial: Trial, page_folder: Path) -> dict[str, Finding]:
    """Score the generators, and write index.html and scores.json into `page_folder`.

    Returns: the finding of each generator by its name.
    """
    score_jobs, make_comparison_job = jobs(trial)
    finding_by_key = pages.run(score_jobs, page_folder)
    finding_by_network = {
        network_name: finding_by_key[score_job.key]
        for network_name, score_job in zip(trial.networks, score_jobs, strict=True)
    }
    latent_seeds = list(trial.seeds)  # the same for every network
    json_values = {
        **trial.shared_inputs,
        "networks": {
            network_name: {**finding.data, "seeds": latent_seeds, "says": list(finding.says)}
            for network_name, finding in finding_by_network.items()
        },
    }
    write_atomic(page_folder / "scores.json", (json.dumps(json_values, indent=1) + "\n").encode())
    # The comparison needs the findings of all generators.
    comparison_job = make_comparison_job(finding_by_network)
    finding_by_key |= pages.run([comparison_job], page_folder, quiet=True)
    introduction = (
        f"{trial.options.n} latents each. The reward was trained on shapes of {trial.reference.path.name}."
        " Raw: its crop is the same share of each generator's own cube. Aligned: each generator's typical"
        " surface is mapped onto the reference's by scale and shift. Calibrated: densities, too, get the"
        " reference's quantiles. Alignment and calibration were fitted on other latents."
    )
    page_path = page_folder / "index.html"
    write_page(
        page_path,
        "Scores across generators",
        introduction,
        [comparison_job, *score_jobs],
        finding_by_key,
        finding_by_key[comparison_job.key].says,
    )
    return finding_by_network
