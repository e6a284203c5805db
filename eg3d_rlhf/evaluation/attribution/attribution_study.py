"""One attribution study: the latents, their slabs before and after tuning, their regions, and the result of
every method. Each of them is computed once.

Letters: N latents, R regions, K draws of weights, D, H, W = z, y, x of the slab.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from eg3d_rlhf.core.cli import naming
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.attribution import regions
from eg3d_rlhf.evaluation.attribution import shapley as game
from eg3d_rlhf.evaluation.attribution.settings import BOXES, HEAD, LANDMARKS, PEOPLE, Settings
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.geometry import depth_maps
from eg3d_rlhf.generators import latents
from eg3d_rlhf.rewards.observations import SigmaSlab
from training.heads import people

CHECK_ORDERS = 32  # antithetic orders of the noise baseline and of rewards with re-drawn weights
_CUBE = 64  # grid points per axis of the cube that meshes are extracted from


@dataclass
class Study:
    """Inputs and cached results that the parts of the report share."""

    c: Comparison
    settings: Settings
    progress: Callable[[str], None] = lambda text: None
    # latent's index -> values of its coalitions under the reward itself
    _values: dict[int, game.CoalitionValues] = field(default_factory=dict, repr=False)

    @cached_property
    def seeds(self) -> range:
        """Return the held-out latents of the study."""
        return self.c.seeds()

    @property
    def spec(self) -> SlabSpec:
        """Return the grid of the slabs that the reward reads. Raises: ValueError if it reads something
        else.
        """
        observation = self.c.reward.observation
        if not isinstance(observation, SigmaSlab):
            shape = list(regions.region_shape(observation.shape))
            raise ValueError(
                f"--regions={self.settings.regions}: expected a reward that reads slabs, got one that reads"
                f" {observation.kind}. Name integer labels of shape {shape} with --regions=FILE."
            )
        return observation.spec

    @property
    def reads_slabs(self) -> bool:
        """Return True if the reward reads slabs: only these have positions, on a surface or about
        landmarks.
        """
        return isinstance(self.c.reward.observation, SigmaSlab)

    @cached_property
    def score(self) -> game.Score:
        """Return the function that scores normalised slabs."""
        # The network alone, not the reward: the slabs are normalised already, and coalitions mix them as they
        # are.
        return self.c.reward.network.score

    @cached_property
    def slabs(self) -> dict[str, torch.Tensor]:
        """Return the reward's input by role, before and after tuning: normalised slabs [N, 1, D, H, W], or
        another observation.
        """
        return {
            role: torch.cat(list(self.c.observed(g, self.seeds)))
            for role, g in (("before", self.c.before), ("after", self.c.after))
        }

    @cached_property
    def partitions(self) -> list[regions.Partition]:
        """Return one partition per latent; all have the same names. Raises: ValueError naming the flag."""
        s = self.settings
        # Fixed boxes are the same for every latent; the list repeats one object.
        if s.regions == BOXES:
            partitions = [regions.face_partition(self.spec)] * len(self.seeds)
        elif s.regions in (LANDMARKS, HEAD):
            divide = regions.landmark_partition if s.regions == LANDMARKS else regions.head_partition
            with naming("--landmarks" if s.landmarks is not None else f"--regions={s.regions}"):
                partitions = [divide(points, self.spec) for points in self.landmarks]
        elif s.regions == PEOPLE:
            with naming(f"--regions={PEOPLE}"):
                partitions = [regions.people_partition(head, self.spec) for head in self.heads]
        else:
            with naming("--regions"):
                partitions = [
                    regions.read_masks(s.regions, regions.region_shape(self.c.reward.observation.shape))
                ] * len(self.seeds)
        count = len(partitions[0].names)
        # 2^R coalitions: the exact method is out of reach above MOST_EXACT regions.
        if s.method == "exact" and count > regions.MOST_EXACT:
            raise ValueError(
                f"--method=exact: expected at most {regions.MOST_EXACT} regions, got {count}. Use"
                " --method=antithetic."
            )
        return partitions

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the regions, the same for every latent."""
        return self.partitions[0].names

    def of_the_head(self) -> "Study":
        """Return a study of the same latents under the eight parts of the head, few enough for exact values.

        Slabs and landmarks are shared with this study.
        """
        other = Study(self.c, replace(self.settings, regions=HEAD, method="exact"), self.progress)
        # Setting a cached property stores the value, so that the copy does not compute it again.
        other.score = self.score
        other.slabs = self.slabs
        other.landmarks = self.landmarks
        return other

    @cached_property
    def landmarks(self) -> list[np.ndarray]:
        """Return 98 world positions [L, 3] per latent: the user's 2-D points, lifted by the frontal depth
        map.
        """
        if self.settings.landmarks is None:
            raise ValueError(
                "expected a JSON file of 98 points, got none. Name --landmarks, or use --regions=people or"
                " boxes."
            )
        pixel_landmarks = regions.read_landmarks(self.settings.landmarks)
        pixels = [pixel_landmarks.of(seed) for seed in self.seeds]
        maps = depth_maps(self.c, self.c.before, self.seeds)
        # One (pixels, world points [R, R, 3], valid [R, R]) per latent
        views = zip(pixels, maps.points, maps.valid, strict=True)
        return [regions.back_project(points, pixel_landmarks.size, *view) for points, *view in views]

    @cached_property
    def heads(self) -> list[people.Head]:
        """Return the ground-truth heads of the latents. Raises: ValueError if the latents have none."""
        if not self.c.of_people:
            raise ValueError(
                f"expected a generator of heads of people, got one of {self.c.data or 'other data'}. Use"
                " --regions=boxes."
            )
        # Truncation moves w off the mapping of z, so the sample is no longer the head of its latent.
        if self.c.psi != 1:
            raise ValueError(
                f"expected --psi=1, got {self.c.psi:g}: a truncated latent has no ground-truth head. Use"
                " --psi=1."
            )
        return people.named_people(latents(list(self.seeds), self.c.before.generator.z_dim))

    @property
    def cube_spec(self) -> SlabSpec:
        """Return the grid over the whole scene from which meshes are extracted."""
        # The whole scene, not only the slab: meshes show the entire head.
        return SlabSpec.of(self.c.before.generator.bounds, _CUBE)

    @torch.no_grad()
    def cube(self, role: str, seed: int) -> torch.Tensor:
        """Return the raw density [1, D, H, W] of a latent over the whole scene."""
        generator = self.c.generators()[role]
        return generator.generator.field(self.c.ws(generator, [seed])).density_grid(self.cube_spec)

    @property
    def level(self) -> float:
        """Return the density level of the surface."""
        return self.c.before.generator.level

    def values(
        self, i: int, score: game.Score | None = None, tuned: torch.Tensor | None = None
    ) -> game.CoalitionValues:
        """Return the values of latent i's coalitions.

        Those of the reward itself are kept; those of another score or slab are not.
        """
        # Only the reward's own values are cached: the other scores and slabs are used once.
        if score is None and tuned is None and i in self._values:
            return self._values[i]
        partition = self.partitions[i]
        coalition_values = game.CoalitionValues(
            score or self.score,
            self.slabs["before"][i],
            self.slabs["after"][i] if tuned is None else tuned,
            partition.labels,
            len(partition.names),
            self.c.batch,
        )
        if score is None and tuned is None:
            self._values[i] = coalition_values
        return coalition_values

    def _checked(self, values: game.CoalitionValues, i: int) -> np.ndarray:
        """Compute Shapley values for a comparison: exact if that is cheap, else from CHECK_ORDERS antithetic
        orders.
        """
        # 2^R coalitions against at most CHECK_ORDERS * R along the sampled orders
        exactly = 1 << values.regions <= CHECK_ORDERS * values.regions
        method = "exact" if exactly else "antithetic"
        # A seed per latent: latents of one study get different orders.
        return game.shapley(
            values, values.regions, values.difference(), method, CHECK_ORDERS, self.c.seed * 1000 + i
        ).values

    @cached_property
    def shapley(self) -> list[game.Attribution]:
        """Compute the Shapley values of each latent. Raises: ValueError if an efficiency gap is above the
        bound.
        """
        attributions = []
        s = self.settings
        for i, seed in enumerate(self.seeds):
            values = self.values(i)
            attributions.append(
                a := game.shapley(
                    values,
                    values.regions,
                    values.difference(),
                    s.method,
                    s.permutations,
                    self.c.seed * 1000 + i,
                )
            )
            self.progress(
                f"seed {seed}: reward difference {a.difference:+.4f}, efficiency gap {a.gap:+.2e}"
                f" ({a.relative_gap:.1e} of it)"
            )
        # Efficiency: the values must sum to the reward difference, which is computed apart from the
        # coalitions.
        game.check_gap(attributions, self.seeds, s.gap_bound)
        return attributions

    @cached_property
    def integrated(self) -> list[game.IntegratedGradients]:
        """Compute Integrated Gradients of each latent."""
        # Along the straight path from the slab before tuning to the one after it.
        s = self.settings
        before = self.slabs["before"]
        after = self.slabs["after"]
        return [
            game.integrated_gradients(
                self.c.reward.score_observed, x, y, a.difference, s.steps, s.most_steps, self.c.batch
            )
            for x, y, a in zip(before, after, self.shapley, strict=True)
        ]

    @cached_property
    def methods(self) -> dict[str, np.ndarray]:
        """Compute the attributions [N, R] of each method."""
        noisy = []
        for i, partition in enumerate(self.partitions):
            # Same change per region, shuffled in space: the baseline without shape.
            slab = game.shuffled_change(
                self.slabs["before"][i], self.slabs["after"][i], partition.labels, self.c.seed * 1000 + i
            )
            noisy.append(self._checked(self.values(i, tuned=slab), i))
        # Voxels are summed per region, so that all methods compare on [R].
        integrated = [
            p.sums(ig.voxels).numpy() for p, ig in zip(self.partitions, self.integrated, strict=True)
        ]
        occluded = [game.occlusion(self.values(i), len(self.names)) for i in range(len(self.seeds))]
        return {
            "Shapley": np.stack([a.values for a in self.shapley]),
            "Integrated Gradients": np.stack(integrated),
            "occlusion": np.stack(occluded),
            "noise": np.stack(noisy),
        }

    def redrawn(self, draw: int) -> np.ndarray:
        """Compute Shapley values [checked, R] of a reward with re-drawn weights, for the first latents."""
        # `+ 1` keeps the seed of the first draw apart from that of the study.
        score = game.redrawn(self.c.reward.network, 1000 * self.c.seed + draw + 1).score
        count = min(self.settings.checked, len(self.seeds))
        return np.stack([self._checked(self.values(i, score), i) for i in range(count)])
