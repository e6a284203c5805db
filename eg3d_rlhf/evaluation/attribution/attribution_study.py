"""Inputs and results of an attribution study.

A study has latents, their slabs before and after tuning, their regions, and the attributions by every method.
A `Study` computes each of these once. The reward's input is usually a slab, the normalised density on a grid.
Shapes: N latents, R regions, D, H, W grid points of the slab along z, y, x.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from eg3d_rlhf.core.cli import prefix_errors
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.attribution import regions
from eg3d_rlhf.evaluation.attribution import shapley as shapley_methods
from eg3d_rlhf.evaluation.attribution.settings import BOXES, HEAD, LANDMARKS, PEOPLE, Settings
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.geometry import depth_maps
from eg3d_rlhf.generators import latents
from eg3d_rlhf.rewards.observations import SigmaSlab
from training.heads import people

# number of antithetic orders for the noise baseline and for rewards with random weights
CHECK_ORDERS = 32
_CUBE = 64  # grid points per axis of the cube that meshes are extracted from


@dataclass
class Study:
    """Inputs and cached results of an attribution study, which the jobs of the report share."""

    comparison: Comparison
    settings: Settings
    progress: Callable[[str], None] = lambda text: None
    # index of a latent -> values of its coalitions by the reward
    _values: dict[int, shapley_methods.CoalitionValues] = field(default_factory=dict, repr=False)

    @cached_property
    def seeds(self) -> range:
        """Return the seeds of the held-out latents of the study."""
        return self.comparison.seeds()

    @property
    def spec(self) -> SlabSpec:
        """Return the grid of the slabs that the reward reads.

        Raises: ValueError if the reward does not read slabs.
        """
        observation = self.comparison.reward.observation
        if not isinstance(observation, SigmaSlab):
            label_shape = list(regions.region_shape(observation.shape))
            raise ValueError(
                f"--regions={self.settings.regions} needs a reward that reads slabs, but this reward reads"
                f" {observation.kind}. Pass a file of integer labels of shape {label_shape} with"
                " --regions=FILE."
            )
        return observation.spec

    @property
    def reads_slabs(self) -> bool:
        """Return True if the reward reads slabs.

        Only the values of a slab have positions, which surfaces and landmarks need.
        """
        return isinstance(self.comparison.reward.observation, SigmaSlab)

    @cached_property
    def score(self) -> shapley_methods.Score:
        """Return the function that scores normalised slabs."""
        # The network is used, not the reward, since the slabs are already normalised and must not be
        # normalised again.
        return self.comparison.reward.network.score

    @cached_property
    def slabs(self) -> dict[str, torch.Tensor]:
        """Return the reward's input before and after tuning.

        It is a normalised slab [N, 1, D, H, W], or another observation [N, ...] if the reward reads no slabs.
        """
        return {
            role: torch.cat(list(self.comparison.observed(generator, self.seeds)))
            for role, generator in (("before", self.comparison.before), ("after", self.comparison.after))
        }

    @cached_property
    def partitions(self) -> list[regions.Partition]:
        """Return the partition of each latent's slab into regions. The regions have the same names for all
        latents.

        Raises: ValueError, whose message begins with a flag, if the regions cannot be determined, or if they
            are too many for the exact method.
        """
        study_settings = self.settings
        # Fixed boxes are the same for every latent, so the list repeats one object.
        if study_settings.regions == BOXES:
            partitions = [regions.face_partition(self.spec)] * len(self.seeds)
        elif study_settings.regions in (LANDMARKS, HEAD):
            make_partition = (
                regions.landmark_partition if study_settings.regions == LANDMARKS else regions.head_partition
            )
            with prefix_errors(
                "--landmarks"
                if study_settings.landmarks is not None
                else f"--regions={study_settings.regions}"
            ):
                partitions = [
                    make_partition(latent_landmarks, self.spec) for latent_landmarks in self.landmarks
                ]
        elif study_settings.regions == PEOPLE:
            with prefix_errors(f"--regions={PEOPLE}"):
                partitions = [regions.people_partition(head, self.spec) for head in self.heads]
        else:
            with prefix_errors("--regions"):
                partitions = [
                    regions.read_masks(
                        study_settings.regions, regions.region_shape(self.comparison.reward.observation.shape)
                    )
                ] * len(self.seeds)
        region_count = len(partitions[0].names)  # all partitions have the same names
        # The exact method evaluates 2^R coalitions, which is too slow for a larger R.
        if study_settings.method == "exact" and region_count > regions.MAX_EXACT_REGIONS:
            raise ValueError(
                f"--method=exact evaluates at most {regions.MAX_EXACT_REGIONS} regions, but there are"
                f" {region_count}. Use --method=antithetic."
            )
        return partitions

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the regions, which are the same for every latent."""
        return self.partitions[0].names

    def study_of_head_parts(self) -> "Study":
        """Return a study of the same latents whose regions are the eight parts of the head.

        These are few enough for exact Shapley values. Slabs and landmarks are shared with this study.
        """
        head_study = Study(
            self.comparison, replace(self.settings, regions=HEAD, method="exact"), self.progress
        )
        # Assigning to a cached property stores the value, so that it is not computed again.
        head_study.score = self.score
        head_study.slabs = self.slabs
        head_study.landmarks = self.landmarks
        return head_study

    @cached_property
    def landmarks(self) -> list[np.ndarray]:
        """Return the world positions [98, 3] of each latent's landmarks.

        The user's 2-D points are lifted to 3-D by the frontal depth map before tuning.
        Raises: ValueError if no landmarks were given.
        """
        if self.settings.landmarks is None:
            raise ValueError(
                "these regions need 98 landmarks for each latent. Pass a JSON file of them with --landmarks,"
                " or use --regions=people or --regions=boxes."
            )
        pixel_landmarks = regions.read_landmarks(self.settings.landmarks)
        pixels_by_latent = [pixel_landmarks.landmarks_of_seed(seed) for seed in self.seeds]
        maps = depth_maps(self.comparison, self.comparison.before, self.seeds)
        # for each latent: 2-D points, world positions of the depth map's pixels [H, W, 3], and their mask
        # [H, W]
        depth_views = zip(pixels_by_latent, maps.points, maps.valid, strict=True)
        return [
            regions.back_project(landmark_pixels, pixel_landmarks.size, *depth_view)
            for landmark_pixels, *depth_view in depth_views
        ]

    @cached_property
    def heads(self) -> list[people.Head]:
        """Return the ground-truth heads of the latents.

        Raises: ValueError if the generator makes no synthetic heads, or if latents are truncated.
        """
        if not self.comparison.of_people:
            raise ValueError(
                "these regions need a generator of synthetic heads, but this generator was trained on"
                f" {self.comparison.data or 'other data'}. Use --regions=boxes."
            )
        # Truncation changes w, so that the sample no longer corresponds to the head of its latent z.
        if self.comparison.psi != 1:
            raise ValueError(
                f"--psi={self.comparison.psi:g} truncates the latents, so that they have no ground-truth"
                " heads, which these regions need. Use --psi=1."
            )
        return people.heads_from_latents(latents(list(self.seeds), self.comparison.before.generator.z_dim))

    @property
    def cube_spec(self) -> SlabSpec:
        """Return the grid over the whole scene from which meshes are extracted."""
        # The slab is only a part of the scene, but meshes show the entire head.
        return SlabSpec.from_bounds(self.comparison.before.generator.bounds, _CUBE)

    @torch.no_grad()
    def density_of_cube(self, role: str, seed: int) -> torch.Tensor:
        """Return the raw density of a latent on `cube_spec`, [1, _CUBE, _CUBE, _CUBE].

        Args: role: "before" or "after" tuning.
        """
        generator = self.comparison.generators()[role]
        return generator.generator.field(self.comparison.ws(generator, [seed])).density_grid(self.cube_spec)

    @property
    def level(self) -> float:
        """Return the density at which surfaces are extracted."""
        return self.comparison.before.generator.level

    def coalition_values(
        self,
        latent_index: int,
        score: shapley_methods.Score | None = None,
        tuned_slab: torch.Tensor | None = None,
    ) -> shapley_methods.CoalitionValues:
        """Return the function that computes the values of a latent's coalitions.

        Args:
            latent_index: index of the latent in `seeds`.
            score: function that scores slabs; None selects the reward.
            tuned_slab: slab after tuning; None selects the latent's own slab after tuning.
        """
        # Only the values of the reward and the latent's own slab are cached, since others are used once.
        if score is None and tuned_slab is None and latent_index in self._values:
            return self._values[latent_index]
        partition = self.partitions[latent_index]
        coalition_values = shapley_methods.CoalitionValues(
            score or self.score,
            self.slabs["before"][latent_index],
            self.slabs["after"][latent_index] if tuned_slab is None else tuned_slab,
            partition.labels,
            len(partition.names),
            self.comparison.batch,
        )
        if score is None and tuned_slab is None:
            self._values[latent_index] = coalition_values
        return coalition_values

    def _compute_for_check(
        self, coalition_values: shapley_methods.CoalitionValues, latent_index: int
    ) -> np.ndarray:
        """Compute Shapley values [R] for a control: exact ones if that is cheap, else from sampled orders.

        The controls are the noise baseline and rewards with random weights.
        """
        # The exact method evaluates 2^R coalitions, the sampled orders at most CHECK_ORDERS * R.
        exact_is_cheap = 1 << coalition_values.regions <= CHECK_ORDERS * coalition_values.regions
        method = "exact" if exact_is_cheap else "antithetic"
        # Each latent has its own seed, so that latents have different random orders.
        return shapley_methods.shapley(
            coalition_values,
            coalition_values.regions,
            coalition_values.difference(),
            method,
            CHECK_ORDERS,
            self.comparison.seed * 1000 + latent_index,
        ).values

    @cached_property
    def shapley(self) -> list[shapley_methods.Attribution]:
        """Return the Shapley values of each latent.

        Raises: ValueError if an efficiency gap exceeds the bound of the settings.
        """
        attributions = []  # one for each latent
        study_settings = self.settings
        for latent_index, seed in enumerate(self.seeds):
            coalition_values = self.coalition_values(latent_index)
            attributions.append(
                attribution := shapley_methods.shapley(
                    coalition_values,
                    coalition_values.regions,
                    coalition_values.difference(),
                    study_settings.method,
                    study_settings.permutations,
                    self.comparison.seed * 1000 + latent_index,
                )
            )
            self.progress(
                f"seed {seed}: reward difference {attribution.difference:+.4f}, efficiency gap"
                f" {attribution.gap:+.2e} ({attribution.relative_gap:.1e} of the difference)"
            )
        # Efficiency: the values must sum to the reward difference, which is computed without the coalitions.
        shapley_methods.check_gap(attributions, self.seeds, study_settings.gap_bound)
        return attributions

    @cached_property
    def integrated(self) -> list[shapley_methods.IntegratedGradients]:
        """Return the Integrated Gradients of each latent, from its slab before tuning to the one after."""
        study_settings = self.settings
        slabs_before = self.slabs["before"]
        slabs_after = self.slabs["after"]
        return [
            shapley_methods.integrated_gradients(
                self.comparison.reward.score_observed,
                slab_before,
                slab_after,
                attribution.difference,
                study_settings.steps,
                study_settings.most_steps,
                self.comparison.batch,
            )
            for slab_before, slab_after, attribution in zip(
                slabs_before, slabs_after, self.shapley, strict=True
            )
        ]

    @cached_property
    def methods(self) -> dict[str, np.ndarray]:
        """Return the attributions [N, R] of all latents to all regions, by the name of the method.

        The methods are Shapley values, Integrated Gradients, occlusion, and Shapley values of shuffled
        changes ("noise").
        """
        noise_values = []  # [R] for each latent
        for latent_index, partition in enumerate(self.partitions):
            # The noise baseline: in each region the same changes, but at shuffled positions.
            shuffled_slab = shapley_methods.shuffled_change(
                self.slabs["before"][latent_index],
                self.slabs["after"][latent_index],
                partition.labels,
                self.comparison.seed * 1000 + latent_index,
            )
            noise_values.append(
                self._compute_for_check(
                    self.coalition_values(latent_index, tuned_slab=shuffled_slab), latent_index
                )
            )
        # Attributions of voxels are summed over each region, so that all methods have values [R].
        integrated_values = [
            partition.sums(gradients.voxels).numpy()
            for partition, gradients in zip(self.partitions, self.integrated, strict=True)
        ]
        occlusion_values = [
            shapley_methods.occlusion(self.coalition_values(latent_index), len(self.names))
            for latent_index in range(len(self.seeds))
        ]
        return {
            "Shapley": np.stack([attribution.values for attribution in self.shapley]),
            "Integrated Gradients": np.stack(integrated_values),
            "occlusion": np.stack(occlusion_values),
            "noise": np.stack(noise_values),
        }

    def attribute_randomised(self, randomisation_index: int) -> np.ndarray:
        """Compute the Shapley values of a reward with random weights, for the first latents of the study.

        Args: randomisation_index: index of the random weights, 0 to --randomisations less 1, which determines
            their seed.
        Returns: Shapley values, [number of latents, R].
        """
        # With + 1 the seed of the first draw differs from that of the study.
        score = shapley_methods.randomise_weights(
            self.comparison.reward.network, 1000 * self.comparison.seed + randomisation_index + 1
        ).score
        latent_count = min(self.settings.checked, len(self.seeds))
        return np.stack(
            [
                self._compute_for_check(self.coalition_values(latent_index, score), latent_index)
                for latent_index in range(latent_count)
            ]
        )
