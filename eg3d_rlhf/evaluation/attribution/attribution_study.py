"""One attribution study: the latents, their slabs before and after tuning, their regions, and every method's
result, each computed once.

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

CHECK_ORDERS = 32  # of the noise baseline and of rewards with re-drawn weights
_CUBE = 64  # grid points per axis of meshes


@dataclass
class Study:
    """Everything that the parts of the report share."""

    c: Comparison
    settings: Settings
    progress: Callable[[str], None] = lambda text: None
    _values: dict[int, game.CoalitionValues] = field(default_factory=dict, repr=False)

    @cached_property
    def seeds(self) -> range:
        return self.c.seeds()

    @property
    def spec(self) -> SlabSpec:
        """Of the slabs that the reward reads. Raises: ValueError where it reads something else."""
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
        """Whether the reward reads slabs: only they have places, on a surface or about landmarks."""
        return isinstance(self.c.reward.observation, SigmaSlab)

    @cached_property
    def score(self) -> game.Score:
        return self.c.reward.network.score

    @cached_property
    def slabs(self) -> dict[str, torch.Tensor]:
        """What the reward reads by role, before and after tuning: normalised slabs [N, 1, D, H, W], or
        another observation.
        """
        return {
            role: torch.cat(list(self.c.observed(g, self.seeds)))
            for role, g in (("before", self.c.before), ("after", self.c.after))
        }

    @cached_property
    def partitions(self) -> list[regions.Partition]:
        """One partition per latent; all have the same names. Raises: ValueError naming the flag."""
        s = self.settings
        if s.regions == BOXES:
            found = [regions.face_partition(self.spec)] * len(self.seeds)
        elif s.regions in (LANDMARKS, HEAD):
            divide = regions.landmark_partition if s.regions == LANDMARKS else regions.head_partition
            with naming("--landmarks" if s.landmarks is not None else f"--regions={s.regions}"):
                found = [divide(points, self.spec) for points in self.landmarks]
        elif s.regions == PEOPLE:
            with naming(f"--regions={PEOPLE}"):
                found = [regions.people_partition(head, self.spec) for head in self.heads]
        else:
            with naming("--regions"):
                found = [
                    regions.read_masks(s.regions, regions.region_shape(self.c.reward.observation.shape))
                ] * len(self.seeds)
        count = len(found[0].names)
        if s.method == "exact" and count > regions.MOST_EXACT:
            raise ValueError(
                f"--method=exact: expected at most {regions.MOST_EXACT} regions, got {count}. Use"
                " --method=antithetic."
            )
        return found

    @property
    def names(self) -> tuple[str, ...]:
        return self.partitions[0].names

    def of_the_head(self) -> "Study":
        """The same latents, slabs and landmarks under the partition of the whole head, which is small enough
        for exact values.
        """
        other = Study(self.c, replace(self.settings, regions=HEAD, method="exact"), self.progress)
        # in place of computing them again
        other.score = self.score
        other.slabs = self.slabs
        other.landmarks = self.landmarks
        return other

    @cached_property
    def landmarks(self) -> list[np.ndarray]:
        """98 world positions [L, 3] per latent: the user's through the frontal depth map."""
        if self.settings.landmarks is None:
            raise ValueError(
                "expected a JSON file of 98 points, got none. Name --landmarks, or use --regions=people or"
                " boxes."
            )
        wanted = regions.read_landmarks(self.settings.landmarks)
        pixels = [wanted.of(seed) for seed in self.seeds]
        maps = depth_maps(self.c, self.c.before, self.seeds)
        views = zip(pixels, maps.points, maps.valid, strict=True)
        return [regions.back_project(points, wanted.size, *view) for points, *view in views]

    @cached_property
    def heads(self) -> list[people.Head]:
        """The whole heads that the latents name."""
        if not self.c.of_people:
            raise ValueError(
                f"expected a generator of heads of people, got one of {self.c.data or 'other data'}. Use"
                " --regions=boxes."
            )
        if self.c.psi != 1:
            raise ValueError(
                f"expected --psi=1, got {self.c.psi:g}: a truncated latent names no head. Change one."
            )
        return people.named_people(latents(list(self.seeds), self.c.before.generator.z_dim))

    @property
    def cube_spec(self) -> SlabSpec:
        return SlabSpec.of(self.c.before.generator.bounds, _CUBE)

    @torch.no_grad()
    def cube(self, role: str, seed: int) -> torch.Tensor:
        """Raw density [1, D, H, W] of a latent over the whole scene."""
        generator = self.c.generators()[role]
        return generator.generator.field(self.c.ws(generator, [seed])).density_grid(self.cube_spec)

    @property
    def level(self) -> float:
        return self.c.before.generator.level

    def values(
        self, i: int, score: game.Score | None = None, tuned: torch.Tensor | None = None
    ) -> game.CoalitionValues:
        """Values of latent i's coalitions; those of the reward itself are kept, those of another score or
        slab are not.
        """
        if score is None and tuned is None and i in self._values:
            return self._values[i]
        partition = self.partitions[i]
        made = game.CoalitionValues(
            score or self.score,
            self.slabs["before"][i],
            self.slabs["after"][i] if tuned is None else tuned,
            partition.labels,
            len(partition.names),
            self.c.batch,
        )
        if score is None and tuned is None:
            self._values[i] = made
        return made

    def _checked(self, values: game.CoalitionValues, i: int) -> np.ndarray:
        """Shapley values for a comparison: exact where that is cheap, else from CHECK_ORDERS antithetic
        orders.
        """
        exactly = 1 << values.regions <= CHECK_ORDERS * values.regions
        method = "exact" if exactly else "antithetic"
        return game.shapley(
            values, values.regions, values.difference(), method, CHECK_ORDERS, self.c.seed * 1000 + i
        ).values

    @cached_property
    def shapley(self) -> list[game.Attribution]:
        """Shapley values per latent. Raises: ValueError where an efficiency gap is above the bound."""
        found = []
        s = self.settings
        for i, seed in enumerate(self.seeds):
            values = self.values(i)
            found.append(
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
        game.check_gap(found, self.seeds, s.gap_bound)
        return found

    @cached_property
    def integrated(self) -> list[game.IntegratedGradients]:
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
        """Attributions [N, R] by method."""
        noisy = []
        for i, partition in enumerate(self.partitions):
            slab = game.shuffled_change(
                self.slabs["before"][i], self.slabs["after"][i], partition.labels, self.c.seed * 1000 + i
            )
            noisy.append(self._checked(self.values(i, tuned=slab), i))
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
        """Shapley values [checked, R] of a reward with re-drawn weights, on the first latents."""
        score = game.redrawn(self.c.reward.network, 1000 * self.c.seed + draw + 1).score
        count = min(self.settings.checked, len(self.seeds))
        return np.stack([self._checked(self.values(i, score), i) for i in range(count)])
