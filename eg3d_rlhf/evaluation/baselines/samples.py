"""Samples of the rungs of `report baselines`: the worker's part, which loads networks and measures points.

A task is one piece of work that is stored: a preparation ("find ..."), which chooses something on validation
latents by the reward, or a point, whose samples are measured on the held-out latents.
Shapes: N latents, L style vectors, W w_dim, Z z_dim, n grid points per edge.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core.field import render_each
from eg3d_rlhf.core.registry import load_plugins
from eg3d_rlhf.core.seeds import BEST_OF_N, LATENTS, VALIDATION
from eg3d_rlhf.evaluation import filters, heads
from eg3d_rlhf.evaluation.baselines import directions, rungs
from eg3d_rlhf.evaluation.baselines.frontier import choose_share
from eg3d_rlhf.evaluation.baselines.measurements import (
    CorrectedField,
    Measured,
    changed_share,
    cube_grids,
    measure_shapes,
    score,
    stack,
)
from eg3d_rlhf.evaluation.baselines.rungs import Inputs, Rung
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.generators import Generator, camera, latents, load_generator
from eg3d_rlhf.measures.features import load_features
from eg3d_rlhf.preferences.labels import load_labels
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.gan.latent_search import Ascent, improve
from eg3d_rlhf.tuning.gan.steering import collect_samples, direction_of
from eg3d_rlhf.tuning.gan.steering_settings import SteerOptions
from training.dataset import ImageFolderDataset
from training.heads.people_mesh import BACK, grid_points
from training.steering import Steering
from training.synthetic_heads import resolve_dataset

BATCH = 8  # samples at once
LABEL_ORDER = 6  # separates the random order of labels from other random streams of the same seed
IMAGE_PIXELS = 128  # largest number of pixels per edge of the images that are compared
MAX_REALS = 1500  # largest number of images of the data

FIND_CANDIDATES = "find candidates"
FIND_FILTERS = "find filters"
FIND_PRINCIPAL = f"find {rungs.PRINCIPAL}"
FIND_EIGENVECTOR = f"find {rungs.EIGENVECTOR}"
FIND_STEERING = f"find {rungs.STEERING}"
FIND_SEARCH = f"find {rungs.SEARCH}"
FILTERS = "filters"
DATA = "data"
IMAGES_OF = "images of "  # start of a task that renders the images of a point


def point(rung: Rung, strength: float, index: int = 0) -> str:
    """Return the name of the task that measures a point of a rung.

    Args:
        rung: the rung.
        strength: strength of the point.
        index: index of the network, for a rung with several training seeds.
    """
    return f"{rung.key} @{strength:g}" + (f" #{index}" if rung.networks else "")


def finder_of(rung: Rung) -> str:
    """Return the name of the task that finds the direction of a rung."""
    return FIND_STEERING if rung.kind == rungs.STEERING else f"find {rung.key}"


def rung_direction(rung: Rung, arrays: Measured) -> dict[str, np.ndarray]:
    """Select the direction of a rung from the arrays of its task."""
    return select_direction(arrays, rung.labels or 0) if rung.kind == rungs.STEERING else arrays


def select_direction(arrays: Measured, label_count: int) -> dict[str, np.ndarray]:
    """Select the direction of a number of labels from the result of `Workbench.steering`."""
    prefix = f"{label_count}: "
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def image_task(point_task: str) -> str:
    """Return the name of the task that renders and describes the images of a point."""
    return f"{IMAGES_OF}{point_task}"


class Workbench:
    """Networks of a report, and the functions that make and measure samples.

    Args:
        inputs: files and settings of the report.
        store: store of the tasks' results, from which preparations are read.
        inputs_by_task: inputs of each task, which are the key of its result.
    """

    def __init__(self, inputs: Inputs, store: Store, inputs_by_task: Mapping[str, Mapping]):
        self.inputs = inputs
        self.device = torch.device(inputs.device)
        self.loaded = load_generator(inputs.network, self.device)
        self.generator: Generator = self.loaded.generator
        self.reward = load_reward(inputs.reward, self.device)
        # The held-out reward only measures. No method of this class optimises or chooses by it.
        self.rewards = {"reward": self.reward}
        if inputs.heldout_reward is not None:
            self.rewards["heldout"] = load_reward(inputs.heldout_reward, self.device)
        # Disjoint ranges of seeds, so that nothing is chosen on the latents that are reported.
        self.seeds = LATENTS.take(inputs.latents, inputs.seed)
        self.validation_seeds = VALIDATION.take(inputs.validation)
        self._store = store
        self._inputs_by_task = inputs_by_task

    def load(self, task: str) -> dict[str, np.ndarray]:
        """Return the arrays of a preparation that is done."""
        return self._store.load_arrays("baselines", self._inputs_by_task[task])

    @torch.no_grad()
    def ws(
        self,
        seeds: Sequence[int],
        *,
        psi: float | None = None,
        steering: Steering | None = None,
        generator: Generator | None = None,
    ) -> torch.Tensor:
        """Compute the style vectors [N, L, W] of seeds, conditioned on the frontal camera.

        Args:
            seeds: seeds of the latents.
            psi: truncation; None: that of the report.
            steering: move of the latents; None: none.
            generator: another generator than the untuned one.
        """
        generator = self.generator if generator is None else generator
        # [N, Z]. Latents depend on their seeds alone and not on the batch.
        z = latents(list(seeds), generator.z_dim).to(self.device)
        ws = generator.mapping(
            # A steering acts in z or in w. The move in the other
            # space returns its input unchanged, so both are called.
            z if steering is None else steering.to(self.device).move_z(z),
            # The conditioning camera is the frontal one for all rungs. With generator pose conditioning,
            # EG3D's mapping would otherwise change the shape with the view.
            camera(generator, n=len(z)),
            truncation_psi=self.inputs.psi if psi is None else psi,
            truncation_cutoff=heads.CUTOFF,
        )
        return ws if steering is None else steering.move_ws(ws)

    @torch.no_grad()
    def measure(self, ws: torch.Tensor, seeds: Sequence[int], generator: Generator | None = None) -> Measured:
        """Measure the samples of style vectors.

        Args:
            ws: style vectors [N, L, W].
            seeds: seeds whose ground-truth heads are the targets.
            generator: another generator than the untuned one.
        Returns: arrays with one row for each sample, see `measurements`. "ws" are the style vectors.
        """
        generator = self.generator if generator is None else generator
        batches = []
        # ws_batch: [n, L, W]; grids: [n, 64, 64, 64]
        for ws_batch, seed_batch in zip(ws.split(BATCH), _split(seeds), strict=True):
            field = generator.field(ws_batch)
            grids = cube_grids(field, self.device)
            batches.append(
                {**score(field, self.rewards), **measure_shapes(grids, self.ground_truth(seed_batch))}
            )
        return {**stack(batches), "ws": ws.cpu().numpy()}

    def ground_truth(self, seeds: Sequence[int]) -> np.ndarray | None:
        """Return the ground-truth heads of seeds, or None if the latents have none."""
        return heads.ground_truth_heads(self.generator, seeds) if self.inputs.has_ground_truth else None

    @torch.no_grad()
    def mean_reward(self, steering: Steering) -> float:
        """Compute the mean reward of the validation latents under a move."""
        scores = [
            self.reward.score(self.generator.field(batch))
            for batch in self.ws(self.validation_seeds, steering=steering).split(BATCH)
        ]
        return float(torch.cat(scores).mean())

    # Preparations.

    @torch.no_grad()
    def candidates(self) -> Measured:
        """Score by the reward, for each latent, the latent's own sample and those of further latents.

        Returns: "seeds" and "scores", [N, largest number of samples], and "seconds" for one sample.
        """
        extra_count = max(rungs.BEST_OF_COUNTS) - 1
        extra_seeds = np.array(BEST_OF_N.take(extra_count * len(self.seeds), self.inputs.seed))
        # [N, n]: column 0 is the latent's own sample, so best of 1 would equal doing nothing.
        seeds = np.concatenate(
            [np.array(self.seeds)[:, None], extra_seeds.reshape(len(self.seeds), extra_count)], axis=1
        )
        start_time = time.monotonic()
        scores = [
            self.reward.score(self.generator.field(batch)).cpu()
            # Row by row: [N n] seeds, which the reshape below turns back into [N, n].
            for batch in self.ws(seeds.ravel().tolist()).split(BATCH)
        ]
        return {
            "seeds": seeds,
            "scores": torch.cat(scores).numpy().astype(np.float64).reshape(seeds.shape),
            "seconds": np.array((time.monotonic() - start_time) / seeds.size),
        }

    def principal_direction(self) -> Measured:
        """Choose among the principal directions of w, either sign, by the reward on validation latents."""
        start_time = time.monotonic()
        moves = directions.principal_moves(self.generator, self.inputs.psi, self.device, self.inputs.seed)
        # The strength is that of the default here. The direction
        # is chosen once and then measured at every strength.
        scores = [self.mean_reward(move) for move in moves]
        return directions.to_arrays(moves[int(np.argmax(scores))], time.monotonic() - start_time) | {
            "scores": np.array(scores)
        }

    def searched_ws(self, step_counts: Sequence[int]) -> list[torch.Tensor]:
        """Improve the held-out latents by the reward, with the gate.

        Args: step_counts: numbers of steps.
        Returns: style vectors [N, L, W] after each number of steps.
        """
        return self._ws_after(self._ascend(max(step_counts)), step_counts)

    def _ascend(self, step_count: int) -> Ascent:
        """Run the search for the held-out latents."""
        return improve(
            self.generator, self.ws(self.seeds), self.reward, steps=step_count, gate=True, batch=BATCH
        )

    @staticmethod
    def _ws_after(ascent: Ascent, step_counts: Sequence[int]) -> list[torch.Tensor]:
        """Return the style vectors after each number of steps; a sample with a high reward has no steps."""
        # The path holds every step, so one search gives the results of all smaller numbers of steps.
        return [ascent.ws_at(np.minimum(ascent.steps, count)) for count in step_counts]

    def search(self) -> Measured:
        """Improve the held-out latents by the reward, with the gate.

        Returns: "ws" after each number of steps, [number of step counts, N, L, W]; "is_unchanged" [N]; and
            "seconds" of one step of one sample.
        """
        ascent = self._ascend(max(rungs.STEPS))
        return {
            "ws": torch.stack(self._ws_after(ascent, rungs.STEPS)).cpu().numpy(),
            "is_unchanged": ascent.gated,
            "seconds": np.array(ascent.seconds / len(self.seeds) / max(rungs.STEPS)),
        }

    def shapes(self, ws: torch.Tensor) -> np.ndarray:
        """Compute the shapes [N, n, n, n] of style vectors, negative inside."""
        with torch.no_grad():
            return np.concatenate(
                [cube_grids(self.generator.field(batch), self.device) for batch in ws.split(BATCH)]
            )

    def steering(self, label_file: Path) -> Measured:
        """Find the directions of several numbers of labels, each of which contains the smaller ones.

        Args: label_file: file of the labels.
        Returns: arrays of `directions.to_arrays` for each number, as "<number>: <name>", and whether these
            labels determine a direction, as "<number>: is_found". The seconds of a number contain the time in
            which its samples were observed.
        """
        labels = load_labels(label_file)
        order = np.random.default_rng([self.inputs.seed, LABEL_ORDER]).permutation(len(labels))
        options = SteerOptions(seed=self.inputs.seed)
        start_time = time.monotonic()
        # The samples of all labels contain those of fewer labels, so that each is observed once.
        everything = collect_samples(self.loaded, labels, options)
        seconds_of_sample = (time.monotonic() - start_time) / len(everything.samples.seeds)
        arrays: Measured = {}
        for label_count in rungs.label_subsets(len(labels)):
            start_time = time.monotonic()
            collected = collect_samples(
                self.loaded,
                [labels[index] for index in order[:label_count]],
                options,
                store=everything.store,
            )
            direction = direction_of(collected.samples, collected.labels, options.space, options.seed)
            seconds = time.monotonic() - start_time + seconds_of_sample * len(collected.samples.seeds)
            # The time includes the observation of the samples, which
            # a user with this number of labels would need as well.
            move_arrays = directions.to_arrays(direction.to_steering(), seconds)
            move_arrays["is_found"] = np.array(direction.is_found)
            arrays |= {f"{label_count}: {name}": array for name, array in move_arrays.items()}
        return arrays

    def move(self, rung: Rung) -> dict[str, np.ndarray]:
        """Return the direction of a rung, see `directions.to_arrays`."""
        return rung_direction(rung, self.load(finder_of(rung)))

    def eigenvector(self) -> Measured:
        """Choose among the directions that change backs most for what they change in front, by the reward."""
        start_time = time.monotonic()
        # The eigenvectors need no labels. Only the choice among them uses the reward.
        moves = directions.back_moves(self.generator, self.device, self.inputs.seed)
        scores = [self.mean_reward(move) for move in moves]
        return directions.to_arrays(moves[int(np.argmax(scores))], time.monotonic() - start_time) | {
            "scores": np.array(scores)
        }

    def filter_functions(self, grids_for_means: np.ndarray) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """Return the filters by name. A filter takes and returns a grid [n, n, n], negative inside.

        Args: grids_for_means: shapes of other latents, [V, n, n, n], whose median and mean are used.
        """
        closings = {
            f"closing {radius}": partial(filters.morphological_closing, radius=radius)
            for radius in rungs.CLOSING_RADII
        }
        if not self.inputs.has_ground_truth:
            return {**closings, **{name: filters.FILTERS[name] for name in rungs.GENERAL_FILTERS[1:]}}
        # At psi 0 all layers below the cutoff get the mean w, whose shape is the average head.
        shape_at_psi_0 = cube_grids(self.generator.field(self.ws([0], psi=0.0)), self.device)[0]
        union_shapes = {
            "median back": np.median(grids_for_means, axis=0),
            "mean back": grids_for_means.mean(axis=0),
            "psi 0 at the back": shape_at_psi_0,
        }
        return {
            **{name: partial(_at_back, apply_closing) for name, apply_closing in closings.items()},
            **{
                # The minimum of two grids is the union of their shapes, since grids are negative inside.
                name: partial(_at_back, partial(np.minimum, union_shape))
                for name, union_shape in union_shapes.items()
            },
        }

    @torch.no_grad()
    def filter_samples(self, seeds: Sequence[int], grids_for_means: np.ndarray | None) -> Measured:
        """Apply every filter to the samples of seeds, and measure the results.

        Args:
            seeds: seeds of the latents.
            grids_for_means: shapes whose median and mean are used; None: the shapes of `seeds` themselves.
        Returns: measurements of each filter, as "<filter>: <name>"; with the changed share of each sample
            under "changed" and the seconds for one sample under "seconds".
        """
        ws = self.ws(seeds)
        fields = [self.generator.field(batch) for batch in ws.split(BATCH)]
        grid_batches = [cube_grids(field, self.device) for field in fields]
        # [V, n, n, n] on validation latents, where the filter is chosen.
        if grids_for_means is None:
            grids_for_means = np.concatenate(grid_batches)
        arrays: Measured = {}
        for filter_name, apply_filter in self.filter_functions(grids_for_means).items():
            batches = []
            filter_seconds = 0.0
            for field, grids, seed_batch in zip(fields, grid_batches, _split(seeds), strict=True):
                start_time = time.monotonic()
                filtered = np.stack([apply_filter(grid) for grid in grids])
                filter_seconds += time.monotonic() - start_time
                # grids = level - density. A lower value after the filter
                # is therefore a positive correction of the density.
                corrected = CorrectedField(field, grids - filtered)
                batches.append(
                    {
                        **score(corrected, self.rewards),
                        **measure_shapes(filtered, self.ground_truth(seed_batch)),
                        "changed": changed_share(grids, filtered, self.inputs.has_ground_truth),
                    }
                )
            measured = stack(batches) | {"seconds": np.array(filter_seconds / len(seeds))}
            arrays |= {f"{filter_name}: {name}": array for name, array in measured.items()}
        return arrays

    @cached_property
    def validation_grids(self) -> np.ndarray:
        """Shapes of the validation latents, [V, n, n, n]."""
        return self.shapes(self.ws(self.validation_seeds))

    def weighed_shapes(self, rung_name: str) -> tuple[np.ndarray, float]:
        """Apply a filter to the held-out shapes where it changes more than a share of their volume.

        Args: rung_name: name in rungs.BACK_FILTERS or rungs.GENERAL_FILTERS.
        Returns: shapes [N, n, n, n], and the share, which was chosen by the reward on validation latents.
        """
        filter_name, share_index = choose_filter(rung_name, self.validation_filters)
        grids = self.shapes(self.ws(self.seeds))
        apply_filter = self.filter_functions(self.validation_grids)[filter_name]
        filtered = np.stack([apply_filter(grid) for grid in grids])
        changed = changed_share(grids, filtered, self.inputs.has_ground_truth)
        # [N] -> [N, 1, 1, 1], which selects complete shapes.
        is_filtered = changed > rungs.SHARES[share_index]
        return np.where(is_filtered[:, None, None, None], filtered, grids), rungs.SHARES[share_index]

    @cached_property
    def validation_filters(self) -> Measured:
        """Measurements of the untuned and the filtered samples of the validation latents."""
        before = self.measure(self.ws(self.validation_seeds), self.validation_seeds)
        return {
            **{f"{rungs.NOTHING}: {name}": array for name, array in before.items()},
            **self.filter_samples(self.validation_seeds, None),
        }

    # Points.

    def sample_point(self, rung: Rung, strength: float, index: int) -> Measured:
        """Measure one point of a rung on the held-out latents.

        Returns: the arrays of `measure`, and "seconds", the time that the rung adds to a sample.
        """
        start_time = time.monotonic()
        seeds: Sequence[int] = self.seeds
        generator = self.generator
        if rung.kind == rungs.TRUNCATION:
            ws = self.ws(seeds, psi=strength)
        elif rung.kind == rungs.BEST_OF:
            candidates = self.load(FIND_CANDIDATES)
            # [N, count] -> [N]; a larger count reads more columns of the same scores.
            choice = candidates["scores"][:, : int(strength)].argmax(axis=1)
            # The seeds of the chosen samples replace those of the latents, also for the ground truth.
            seeds = candidates["seeds"][np.arange(len(choice)), choice].tolist()
            ws = self.ws(seeds)
            # the time of scoring the samples among which the reward chose
            start_time = time.monotonic() - candidates["seconds"].item() * strength * len(seeds)
        elif rung.kind in (rungs.PRINCIPAL, rungs.EIGENVECTOR, rungs.STEERING):
            move_arrays = self.move(rung)
            # Labels that determine no direction move no sample.
            is_moved = rung.kind != rungs.STEERING or bool(move_arrays["is_found"].item())
            ws = self.ws(seeds, steering=directions.from_arrays(move_arrays, strength) if is_moved else None)
        elif rung.kind == rungs.NETWORK:
            generator = load_generator(rung.networks[index], self.device).generator
            ws = self.ws(seeds, generator=generator)
        elif rung.kind == rungs.SEARCH:
            # The search was one task for all numbers of steps, [counts, N, L, W].
            searched = self.load(FIND_SEARCH)
            ws = torch.from_numpy(searched["ws"][rung.strengths.index(strength)]).to(self.device)
            start_time = time.monotonic() - searched["seconds"].item() * strength * len(seeds)
        else:
            ws = self.ws(seeds)
        # Subtracting the earlier cost from the start adds it to the measured time.
        seconds = (time.monotonic() - start_time) / len(seeds)
        # A tuned network generates as fast as the untuned one, so it adds no time to a sample.
        if rung.kind in (rungs.NOTHING, rungs.NETWORK):
            seconds = 0.0
        return {**self.measure(ws, seeds, generator), "seconds": np.array(seconds)}

    # Images.

    @cached_property
    def _data_cameras(self) -> torch.Tensor | None:
        """Camera labels [N, 25] of the data, one for each held-out latent; None without data."""
        if not self.inputs.data:
            return None
        labels = _open_data(self.inputs.data).get_labels()
        # RandomState has a fixed stream of numbers in all numpy versions, which default_rng does not promise.
        choice = np.random.RandomState(self.inputs.seed).randint(len(labels), size=len(self.seeds))
        return torch.from_numpy(labels[choice]).to(self.device)

    @torch.no_grad()
    def images(self, ws: np.ndarray, network: Path | None) -> Measured:
        """Render the samples of style vectors.

        Args:
            ws: style vectors [N, L, W].
            network: network file; None: the untuned generator.
        Returns: "images" [N, 3, R, R] uint8, R at most IMAGE_PIXELS, from the front; and with data "features"
            [N, F] of renders from cameras of the data.
        """
        generator = self.generator if network is None else load_generator(network, self.device).generator
        cameras = self._data_cameras
        feature_network = None if cameras is None else load_features(None, self.device)
        images = []
        features = []
        for start in range(0, len(ws), BATCH):
            ws_batch = torch.from_numpy(ws[start : start + BATCH]).to(self.device)
            field = generator.field(ws_batch)
            # Two renderings of one field: the front for SSIM,
            # and a camera of the data for the image distance.
            labels = [camera(generator, n=len(ws_batch))]
            if cameras is not None:
                labels.append(cameras[start : start + BATCH])
            renderings = render_each(field, labels, seed=start)
            front = renderings[0].image
            # Area interpolation averages whole pixels, so it causes no aliasing, which SSIM would count.
            if front.shape[-1] > IMAGE_PIXELS:
                front = torch.nn.functional.interpolate(front, size=IMAGE_PIXELS, mode="area")
            # [-1, 1] -> [0, 255]; rounding, because a plain cast truncates.
            images.append((front * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy())
            if feature_network is not None:
                # A grey image has one channel, which is repeated to
                # the three that the feature network expects.
                features.append(feature_network(renderings[1].image.expand(-1, 3, -1, -1)).cpu().numpy())
        return {"images": np.concatenate(images)} | (
            {"features": np.concatenate(features)} if features else {}
        )

    def images_of_task(self, task: str, network: Path | None) -> Measured:
        """Render the samples of a point that is measured, see `images`."""
        return self.images(self.load(task)["ws"], network)

    def data_features(self) -> Measured:
        """Compute features [M, F] of images of the data."""
        dataset = _open_data(self.inputs.data)
        feature_network = load_features(None, self.device)
        # A random subset, since neighbouring images of a dataset often show the same subject.
        indices = np.random.RandomState(self.inputs.seed).permutation(len(dataset))[:MAX_REALS]
        features = []
        for start in range(0, len(indices), 64):
            # [n, C, R, R] uint8, as EG3D's datasets return them.
            pixels = np.stack([dataset[int(i)][0] for i in indices[start : start + 64]])
            images = torch.from_numpy(pixels).to(self.device).float().expand(-1, 3, -1, -1) / 127.5 - 1
            features.append(feature_network(images).cpu().numpy())
        return {"features": np.concatenate(features)}


def filter_arrays(arrays: Measured, filter_name: str) -> Measured:
    """Select the measurements of one filter from the result of `Workbench.filter_samples`."""
    prefix = f"{filter_name}: "
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def choose_filter(rung_name: str, validation: Measured) -> tuple[str, int]:
    """Choose the filter of a rung, and the index of its share, by the reward on validation latents.

    Args:
        rung_name: name in rungs.BACK_FILTERS or rungs.GENERAL_FILTERS.
        validation: measurements of `Workbench.validation_filters`.
    """
    candidates = (
        [f"closing {radius}" for radius in rungs.CLOSING_RADII]
        if rung_name == "morphological closing"
        else [rung_name]
    )
    scores_before = filter_arrays(validation, rungs.NOTHING)["reward"]
    choices = {}
    for candidate in candidates:
        filtered = filter_arrays(validation, candidate)
        choices[candidate] = choose_share(
            scores_before, filtered["reward"], filtered["changed"], rungs.SHARES
        )
    # The best mean reward of each candidate at its best share; ties go to the first candidate.
    best_candidate = max(choices, key=lambda candidate: choices[candidate][1])
    return best_candidate, choices[best_candidate][0]


def _open_data(data: str) -> ImageFolderDataset:
    """Open a dataset with its cameras."""
    return ImageFolderDataset(resolve_dataset(data), use_labels=True, c_dim=25)


def _split(seeds: Sequence[int]) -> list[Sequence[int]]:
    """Split seeds into batches of BATCH."""
    return [seeds[start : start + BATCH] for start in range(0, len(seeds), BATCH)]


def _at_back(apply_filter: Callable[[np.ndarray], np.ndarray], grid: np.ndarray) -> np.ndarray:
    """Apply a filter at the back of the head alone.

    Args:
        apply_filter: function of a grid [n, n, n], negative inside.
        grid: shape of a head, [n, n, n].
    """
    # The axis 2 of the points is z, which grows towards the camera in front.
    return np.where(grid_points(len(grid))[..., 2] < BACK, apply_filter(grid), grid)


def prepare_worker(
    folder: Path, inputs: Inputs, inputs_by_task: Mapping[str, Mapping], rung_list: Sequence[Rung]
) -> Callable[[str], None]:
    """Load the networks in a worker process, and return the function that runs and stores a task.

    Args:
        folder: folder of the store.
        inputs: files and settings of the report.
        inputs_by_task: inputs of each task.
        rung_list: all rungs and controls.
    """
    store = Store(folder, renew=True)
    torch.set_num_threads(1)  # there is one process per core; more threads would compete
    load_plugins()
    workbench = Workbench(inputs, store, inputs_by_task)
    functions: dict[str, Callable[[], Measured]] = {
        FIND_CANDIDATES: workbench.candidates,
        FIND_FILTERS: lambda: workbench.validation_filters,
        FIND_PRINCIPAL: workbench.principal_direction,
        FIND_EIGENVECTOR: workbench.eigenvector,
        FILTERS: lambda: workbench.filter_samples(workbench.seeds, workbench.validation_grids),
        FIND_STEERING: lambda: workbench.steering(inputs.labels or Path()),
        FIND_SEARCH: workbench.search,
        DATA: workbench.data_features,
    }
    for rung in rung_list:
        for strength in rung.strengths if rung.kind != rungs.FILTER else ():
            for index in range(max(1, len(rung.networks))):
                task = point(rung, strength, index)
                functions[task] = partial(workbench.sample_point, rung, strength, index)
                functions[image_task(task)] = partial(
                    workbench.images_of_task, task, rung.networks[index] if rung.networks else None
                )

    def run_and_store(task: str) -> None:
        store.arrays("baselines", inputs_by_task[task], functions[task])

    return run_and_store
