"""Study of steering on the bundled heads: labels against error reduction, over draws of labels.

Each draw labels its own samples with the simulated annotator; draw k begins at the seed 40,000 + 4,000 k, and
its smaller sets of labels are the first labels of its larger ones. For each set of labels, `find_direction`
sees the labels alone. The written networks are then measured on held-out latents against the ground-truth
heads, which steering itself does not know. Controls are moved by the strength of the true labels, also
if no direction is found. All parts are kept in a store, so that the same command resumes.

The arm "active" labels the first pairs of the draw, and then pairs that the posterior of a linear reward
chooses in batches, as a labelling campaign does (`eg3d_rlhf.people.label.active`). All answers are known
before the next batch is chosen. Its candidates are samples of the second half of the draw's seeds.

Shapes: N latents of a set, n grid points per edge.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.seeds import LATENTS, VALIDATION
from eg3d_rlhf.core.statistics import t_mean_interval
from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.evaluation.settings import ACTIVE, STEERING_LABEL_KINDS, STEERING_LABELS
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.experiments.table import markdown_rows
from eg3d_rlhf.generators import LoadedGenerator, as_generator, latents, load_generator
from eg3d_rlhf.measures.people import face_depth, volume_error
from eg3d_rlhf.people.label.active import candidate_count, random_places
from eg3d_rlhf.preferences.labels import Preference, invert, write_labels
from eg3d_rlhf.preferences.pair_strategies import FIRST_LABELS, LEARNT_BATCH, StrategyOptions
from eg3d_rlhf.preferences.settings import AnnotationOptions
from eg3d_rlhf.preferences.synthetic import annotate
from eg3d_rlhf.rewards import linear
from eg3d_rlhf.rewards.active_pairs import ActiveReward
from eg3d_rlhf.rewards.cache import ObservationCache
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS
from eg3d_rlhf.tuning.gan.steering import CUTOFF, collect_samples, direction_of
from eg3d_rlhf.tuning.gan.steering_directions import randomise
from eg3d_rlhf.tuning.gan.steering_settings import SteerOptions
from training.progress import tqdm
from training.steering import Steering, attach
from training.storage import write_atomic

FIRST_SEED = 40_000  # first seed of draw 0
DRAW_SEEDS = 4_000  # seeds of a draw, two for each of 2,000 labels
ACTIVE_LABELS = 400  # largest number of labels of the arm "active", whose fits grow with it
CHUNK = 25  # labels that are annotated at once, and kept in the store
VERSION = 2  # of the computation; part of the inputs in the store
SUMMARY = "steering-study.json"
TABLE = "steering-study.md"
ARRAYS = "steering-study.safetensors"
# Sets of held-out latents: the published tables of steering, the README's 64, and the set for choices
SETS: dict[str, Callable[[], Sequence[int]]] = {
    "held-out": lambda: LATENTS.take(172, shift_count=1),
    "readme": lambda: LATENTS.take(64),
    "validation": lambda: VALIDATION.take(64),
}
METRICS = ("error_reduction", "intact_degraded", "identity_kept", "face_moved_voxels", "variety_ratio")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of a study.

    Raises: ValueError for values that are not allowed.
    """

    outdir: Path  # folder of the study
    network: Path | None = None  # generator; None: the bundled one
    labels: tuple[int, ...] = STEERING_LABELS  # numbers of labels
    draws: int = 10
    arms: tuple[str, ...] = STEERING_LABEL_KINDS
    sets: tuple[str, ...] = ("held-out", "readme")
    strength: float = 1.0
    target: float = 0.7  # error reduction for which the number of labels is stated

    def __post_init__(self) -> None:
        largest = max(self.labels)
        if min(self.labels) < linear.MIN_LABELS or largest > DRAW_SEEDS // 2:
            raise ValueError(
                f"--labels: expected numbers from {linear.MIN_LABELS} to {DRAW_SEEDS // 2}, got"
                f" {', '.join(map(str, self.labels))}. Choose numbers in this range."
            )
        if FIRST_SEED + DRAW_SEEDS * self.draws > LATENTS.first:
            raise ValueError(
                f"--draws: expected at most {(LATENTS.first - FIRST_SEED) // DRAW_SEEDS} draws, got"
                f" {self.draws}. The seeds of further draws are held out."
            )
        if ACTIVE in self.arms and largest > ACTIVE_LABELS:
            raise ValueError(
                f"--labels: expected at most {ACTIVE_LABELS} labels with --arms={ACTIVE}, got {largest}."
                " Choose fewer labels."
            )


def label_draw(
    generator: LoadedGenerator, draw: int, count: int, store: Store, on_labels: Callable[[int], None]
) -> list[Preference]:
    """Return the first labels of a draw, by the simulated annotator. Each sample is in one pair.

    The noise has the temperature of the bundled labels, so that it does not depend on the number of labels.

    Args:
        generator: generator of synthetic heads.
        draw: number k of the draw.
        count: number of labels.
        store: store of the labels.
        on_labels: function that is called with the number of labels after each chunk.
    """
    # The temperature is that of the simulated annotator: higher values give noisier labels.
    temperature = json.loads(BUNDLED_LABELS.with_suffix(".meta.json").read_text())["temperature"]
    records: list[dict[str, Any]] = []
    # Rounded up. Labels are stored in chunks, so a larger number of labels extends the stored ones.
    for chunk in range(-(-count // CHUNK)):
        # Each draw has its own range of seeds, and each pair takes two of them, so samples are independent.
        first = FIRST_SEED + DRAW_SEEDS * draw + 2 * CHUNK * chunk
        pairs = [(seed, seed + 1) for seed in range(first, first + 2 * CHUNK, 2)]
        inputs = {"generator": generator.hash, "first": first, "pairs": CHUNK, "temperature": temperature}

        # The default arguments bind the present values. A closure would see those of the last iteration.
        def make(_folder: Path, pairs=pairs, first=first) -> tuple[list[Path], dict[str, Any]]:
            """Label one chunk."""
            # the noise of a chunk depends on its first seed
            options = AnnotationOptions(seed=first)
            annotation = annotate(generator.generator, options, pairs=pairs, temperature=temperature)
            return [], {"labels": [label.to_dict() for label in annotation.preferences(generator.hash)]}

        records += store.make("labels", inputs, make).record["labels"]
        on_labels(CHUNK)
    return [Preference.from_dict(record) for record in records[:count]]


def active_draw(
    generator: LoadedGenerator, draw: int, count: int, store: Store, observations: ObservationCache
) -> list[Preference]:
    """Return the first labels of a draw whose pairs are chosen by a linear reward of the earlier labels.

    Args:
        generator: generator of synthetic heads.
        draw: number k of the draw.
        count: number of labels.
        store: store of the labels.
        observations: observations of samples, which all fits share.
    """
    temperature = json.loads(BUNDLED_LABELS.with_suffix(".meta.json").read_text())["temperature"]
    first = FIRST_SEED + DRAW_SEEDS * draw
    # Random pairs are those of the arm "labels", in the same order.
    labels = label_draw(generator, draw, FIRST_LABELS, store, lambda _: None)
    observation = linear.slab_of(generator.generator, SteerOptions().resolution)
    pool = StrategyOptions().pool
    random_count = FIRST_LABELS
    while len(labels) < count:
        places = random_places(len(labels), LEARNT_BATCH)
        random_seeds = range(first + 2 * random_count, first + 2 * (random_count + sum(places)), 2)
        inputs = {
            "generator": generator.hash,
            "draw": draw,
            "labels": len(labels),
            "temperature": temperature,
            "pool": pool,
            "version": VERSION,
        }

        def make(
            _folder: Path, labels=tuple(labels), places=places, random_seeds=random_seeds
        ) -> tuple[list[Path], dict[str, Any]]:
            """Choose and label one batch."""
            reward = ActiveReward.fit(generator, labels, observation, observations)
            used_seeds = {seed for label in labels for seed in (label.winner, label.loser)}
            start = first + DRAW_SEEDS // 2
            all_candidates = range(start, start + candidate_count(pool, len(labels) + LEARNT_BATCH))
            candidates = [seed for seed in all_candidates if seed not in used_seeds]
            chosen_pairs = [pair[:2] for pair in reward.choose(candidates, places.count(False))]
            random_pairs = [(seed, seed + 1) for seed in random_seeds]
            pairs = [(random_pairs if is_random else chosen_pairs).pop(0) for is_random in places]
            # Odd, so that the noise differs from that of every chunk of random pairs, whose seeds are even.
            options = AnnotationOptions(seed=first + 2 * len(labels) + 1)
            annotation = annotate(generator.generator, options, pairs=pairs, temperature=temperature)
            return [], {"labels": [label.to_dict() for label in annotation.preferences(generator.hash)]}

        records = store.make("active-labels", inputs, make).record["labels"]
        labels += [Preference.from_dict(record) for record in records]
        random_count += sum(places)
    return labels[:count]


def measure_set(
    generator: LoadedGenerator,
    steering: Steering | None,
    seeds: Sequence[int],
    before: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Measure heads against the ground truth of their latents.

    Args:
        generator: generator of synthetic heads.
        steering: move of the latents; None: no move.
        seeds: seeds of the latents, [N].
        before: measurements without a move, which latents that are not moved keep; None without a move.
    Returns: missing and extra volume [N], depth and relief of the faces [N, R, C], and is_moved [N].
    """
    z = latents(seeds, generator.generator.z_dim)
    network = generator.G
    # all latents, unless a steering in z leaves some of them bitwise alone
    is_moved = np.ones(len(seeds), dtype=bool)
    if steering is not None:
        # Copies, since attaching changes the class of the network in place.
        network = attach(copy.deepcopy(network), copy.deepcopy(steering))
        if steering.space == "z":
            # Only samples below the threshold are moved in z. In w,
            # layers move separately, so all samples are computed.
            is_moved = (steering.move_z(z) != z).any(dim=1).numpy()
    moved_seeds = [seed for seed, moved in zip(seeds, is_moved, strict=True) if moved]
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("missing", "extra", "depth", "relief")}
    for start in range(0, len(moved_seeds), heads.AT_ONCE):
        batch_seeds = moved_seeds[start : start + heads.AT_ONCE]
        # [n, 64, 64, 64], negative inside
        shapes = heads.sample_shapes(as_generator(network), batch_seeds)
        # Targets of the unmoved latents: steering should remove the defect and not exchange the head.
        truths = heads.ground_truth_heads(generator.generator, batch_seeds)
        for shape, truth in zip(shapes, truths, strict=True):
            error = volume_error(shape, truth)
            rows["missing"].append(np.array(error.missing))
            rows["extra"].append(np.array(error.extra))
            # float32, because the depth maps [R, C] are most of the stored data.
            rows["depth"].append(face_depth(shape).astype(np.float32))
            rows["relief"].append(heads.face_relief_or_nan(shape).astype(np.float32))
    measured = {name: np.stack(values) for name, values in rows.items() if values}
    if before is not None:
        # Rows of samples that were not moved are copied, so that they are bitwise equal to those before.
        merged = {name: before[name].copy() for name in rows}
        for name, values in measured.items():
            merged[name][is_moved] = values
        measured = merged
    return {**measured, "is_moved": is_moved}


def compute_metrics(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Compute METRICS of one steering, with the number of heads that are still defective."""
    is_defective = heads.find_defective(before)
    error_before = heads.back_of_head_error(before)
    error_after = heads.back_of_head_error(after)
    variety_before = heads.variety(before)
    variety_after = heads.variety(after)
    return {
        "error_reduction": heads.error_reduction(error_before[is_defective], error_after[is_defective]),
        "intact_degraded": heads.intact_degraded(before, after),
        "identity_kept": heads.identity_kept(before, after),
        # NaN for faces without a surface, which the median leaves out.
        "face_moved_voxels": float(np.nanmedian(heads.face_distance_moved(before, after))),
        "variety_ratio": variety_after / variety_before if variety_before and variety_after else None,
        "still_defective": int(heads.find_defective(after)[is_defective].sum()),
        "defective": int(is_defective.sum()),
        "intact": int((~is_defective).sum()),
        "moved_share": float(after["is_moved"].mean()),
    }


def fit_draw(
    generator: LoadedGenerator,
    labels: Sequence[Preference],
    arm: str,
    draw: int,
    observations: ObservationCache,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Find the direction of one set of labels.

    Args:
        generator: generator of the samples.
        labels: labels of the draw.
        arm: name of the arm, which decides what is done with the labels.
        draw: number of the draw, from which the randomised labels follow.
        observations: cache that the fits of a draw share.
    Returns: the arrays of the direction, and facts about it as JSON values.
    """
    fit_labels = list(labels)
    if arm == "randomised":
        # The number of labels enters the seed, so that sets
        # of 25 and 100 labels are randomised independently.
        fit_labels = randomise(labels, np.random.default_rng([draw, len(labels), 13]))
    if arm == "inverted":
        fit_labels = [invert(label) for label in labels]
    collected = collect_samples(generator, fit_labels, SteerOptions(), store=observations)
    direction = direction_of(collected.samples, collected.labels)
    arrays = {
        "vector": direction.vector,
        "mean": direction.mean,
        "std": np.array(direction.std),
    }
    cosines = direction.cosines
    assert cosines is not None
    return arrays, {
        "candidate": direction.candidate,
        "space": direction.space,
        "is_found": direction.is_found,
        "accuracy": direction.accuracy["accuracy"],
        "accuracy_interval": list(direction.accuracy["interval_95"]),
        "half_cosine": cosines.labels,
        "half_cosine_randomised": cosines.bound,
        "ridge": collected.samples.reward_ridge,
    }


def work(plan: Plan) -> list[Path]:
    """Compute all missing parts of a study, and write its files. Return their paths.

    The folder "labels" gets the labels of each draw, drawK.jsonl.
    """
    generator = load_generator(plan.network)
    store = Store(plan.outdir / "store", renew=True)
    # Small sets are prefixes of large ones within a draw, so the effect of more labels is paired.
    counts = sorted(set(plan.labels))
    condition_count = plan.draws * len(counts) * len(plan.arms)
    rows: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    with tqdm(total=condition_count, desc="steering", unit="direction", dynamic_ncols=True) as progress_bar:
        before_by_set: dict[str, dict[str, np.ndarray]] = {}
        for set_name in plan.sets:
            before_by_set[set_name] = store.arrays(
                "before",
                {"version": VERSION, "generator": generator.hash, "set": set_name},
                partial(measure_set, generator, None, SETS[set_name]()),
            )
            arrays[f"{set_name}/before/error"] = heads.back_of_head_error(before_by_set[set_name])
        for draw in range(plan.draws):
            # Each draw starts from the unlabelled samples alone, so memory does not grow with the draws.
            observations = _shared_observations(generator, plan.outdir / "observations")
            for count in counts:
                random_labels = label_draw(generator, draw, count, store, lambda _: None)
                for arm in plan.arms:
                    labels = random_labels
                    if arm == ACTIVE:
                        labels = active_draw(generator, draw, count, store, observations)
                    inputs = {
                        "version": VERSION,
                        "generator": generator.hash,
                        "labels_file": file_hash(BUNDLED_LABELS.with_suffix(".meta.json")),
                        "draw": draw,
                        "labels": count,
                        "arm": arm,
                    }

                    def make(folder: Path, labels=labels, arm=arm, draw=draw, cache=observations):
                        """Find the direction of one set of labels."""
                        direction_arrays, facts = fit_draw(generator, labels, arm, draw, cache)
                        path = folder / "direction.safetensors"
                        write_atomic(path, safetensors.numpy.save(direction_arrays))
                        return [path], facts

                    # A direction does not depend on the strength, so it is stored once for all strengths.
                    artefact = store.make("direction", inputs, make)
                    vectors = safetensors.numpy.load_file(artefact.folder / "direction.safetensors")
                    row = {"draw": draw, "labels": count, "arm": arm, **artefact.record, "sets": {}}
                    # Controls are moved by the same strength, also without evidence for their direction.
                    steering = _steering(artefact.record["space"], vectors, plan.strength)
                    for set_name in plan.sets:
                        before = before_by_set[set_name]
                        # Unlike the direction, the measurement depends on
                        # the strength and on the set of latents.
                        after = store.arrays(
                            "after",
                            {**inputs, "set": set_name, "strength": plan.strength},
                            partial(measure_set, generator, steering, SETS[set_name](), before),
                        )
                        row["sets"][set_name] = compute_metrics(before, after)
                        name = f"{set_name}/{arm}/{count}/{draw}"
                        arrays[f"{name}/error"] = heads.back_of_head_error(after)
                        arrays[f"{name}/face_moved"] = heads.face_distance_moved(before, after)
                    rows.append(row)
                    progress_bar.update()
            # Labels of random pairs. The first N lines are the set of N labels, so that other commands can
            # tune, steer or train a reward by the same sets.
            folder = plan.outdir / "labels"
            folder.mkdir(exist_ok=True)
            write_labels(folder / f"draw{draw}.jsonl", random_labels)
    return write(plan, generator, rows, arrays)


def _shared_observations(generator: LoadedGenerator, cache: Path) -> ObservationCache:
    """Return a new cache with the observations of the unlabelled samples, which all draws use."""
    options = SteerOptions()
    observation = linear.slab_of(generator.generator, options.resolution)
    seeds = linear.unlabelled_seeds(options.unlabelled, [])
    return linear.observe_samples(generator, observation, seeds, psi=1.0, cutoff=CUTOFF, cache=cache)


def _steering(space: str, vectors: Mapping[str, np.ndarray], strength: float) -> Steering:
    """Return the move along a stored direction."""
    return Steering(space, len(vectors["vector"]), strength).set_direction(
        torch.from_numpy(vectors["vector"]),
        torch.from_numpy(vectors["mean"]).float(),
        float(vectors["std"]),
    )


def summarise(rows: Sequence[Mapping[str, Any]], sets: Sequence[str]) -> list[dict[str, Any]]:
    """Summarise rows over draws: mean, 95 % t interval and values of each metric.

    In the arms "labels" and "active", a draw without a direction is not steered: its error reduction and its
    harm count as 0, and nothing of it moves. Controls are moved in any case.
    """
    summary = []
    arms_and_counts = dict.fromkeys((row["arm"], row["labels"]) for row in rows)
    for arm, count in arms_and_counts:
        # The draws are the independent repetitions, so intervals are over draws and not over latents.
        draws = [row for row in rows if (row["arm"], row["labels"]) == (arm, count)]
        for set_name in sets:
            entry: dict[str, Any] = {
                "arm": arm,
                "labels": count,
                "set": set_name,
                "draws": len(draws),
                "directions": sum(row["is_found"] for row in draws),
            }
            for metric in METRICS:
                # Metrics of a sample that nothing changes. The command writes
                # no network in this case, so a user keeps the old one.
                unmoved = {"identity_kept": 1.0, "variety_ratio": 1.0}.get(metric, 0.0)
                values = [unmoved if not _is_steered(row) else row["sets"][set_name][metric] for row in draws]
                entry[metric] = _mean_interval([value for value in values if value is not None])
            summary.append(entry)
    return summary


def _is_steered(row: Mapping[str, Any]) -> bool:
    """Return True if a row's network is steered: a direction is found, or the arm is a control."""
    return bool(row["is_found"]) or row["arm"] not in ("labels", ACTIVE)


def labels_to_target(
    rows: Sequence[Mapping[str, Any]], set_name: str, target: float
) -> dict[str, dict[str, Any]]:
    """Compute the smallest number of labels from which on a draw keeps an error reduction.

    "From which on" means at this number and at every larger one that was measured: a reduction that is
    reached once by chance and lost again does not count.

    Args: rows: rows of the study; set_name: set of latents; target: error reduction, 0..1.
    Returns: by arm, "labels" and "active" where they were measured: "values", the number of labels of each
        draw, None where the target is not kept; "reached", how many draws keep it; mean and 95 % t interval,
        None unless every draw keeps it. "difference" is active minus random, paired over draws.
    """
    result: dict[str, dict[str, Any]] = {}
    for arm in ("labels", ACTIVE):
        reductions_by_draw: dict[int, dict[int, float]] = {}
        for row in rows:
            if row["arm"] == arm:
                reduction = row["sets"][set_name]["error_reduction"] if _is_steered(row) else 0.0
                reductions_by_draw.setdefault(row["draw"], {})[row["labels"]] = reduction
        if not reductions_by_draw:
            continue
        smallest_counts = []
        for draw in sorted(reductions_by_draw):
            smallest_count = None
            for count in sorted(reductions_by_draw[draw], reverse=True):
                if reductions_by_draw[draw][count] < target:
                    break
                smallest_count = count
            smallest_counts.append(smallest_count)
        result[arm] = _complete_interval(smallest_counts)
    if len(result) == 2:
        differences = [
            None if random is None or active is None else active - random
            for random, active in zip(result["labels"]["values"], result[ACTIVE]["values"], strict=True)
        ]
        result["difference"] = _complete_interval(differences)
    return result


def _complete_interval(values: Sequence[int | None]) -> dict[str, Any]:
    """Return the values, how many are known, and mean and 95 % t interval if all are known."""
    known_values = [float(value) for value in values if value is not None]
    is_complete = len(known_values) == len(values)
    summary = _mean_interval(known_values if is_complete else [])
    return {**summary, "values": list(values), "reached": len(known_values)}


def active_differences(rows: Sequence[Mapping[str, Any]], set_name: str) -> list[dict[str, Any]]:
    """Compute the error reduction of active minus random pairs, paired over draws, by number of labels."""
    reductions = {
        (row["arm"], row["labels"], row["draw"]): (
            row["sets"][set_name]["error_reduction"] if _is_steered(row) else 0.0
        )
        for row in rows
    }
    counts = sorted({count for arm, count, _ in reductions if arm == ACTIVE})
    differences = []
    for count in counts:
        values = [
            reduction - reductions["labels", count, draw]
            for (arm, row_count, draw), reduction in reductions.items()
            if arm == ACTIVE and row_count == count and ("labels", count, draw) in reductions
        ]
        if values:
            differences.append({"labels": count, **_mean_interval(values)})
    return differences


def _mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, 95 % t interval over draws (None with fewer than two), and the values."""
    interval = None
    if len(values) > 1:
        # Few draws, hence the t interval: it is wider than a normal one with the same variance.
        _, low, high = t_mean_interval(values)
        interval = [low, high]
    return {
        "mean": float(np.mean(values)) if values else None,
        "interval_95": interval,
        "values": list(values),
    }


def write(
    plan: Plan,
    generator: LoadedGenerator,
    rows: Sequence[Mapping[str, Any]],
    arrays: Mapping[str, np.ndarray],
) -> list[Path]:
    """Write the JSON, the table and the arrays by latent of a study. Return their paths."""
    summary = summarise(rows, plan.sets)
    content = {
        "generator": generator.hash,
        "strength": plan.strength,
        "first_seed": FIRST_SEED,
        "draw_seeds": DRAW_SEEDS,
        "sets": {name: [SETS[name]()[0], SETS[name]()[-1]] for name in plan.sets},
        "interval": "95 % t interval over draws of labels",
        "summary": summary,
        "target": plan.target,
        "labels_to_target": {name: labels_to_target(rows, name, plan.target) for name in plan.sets},
        "active_minus_random": {name: active_differences(rows, name) for name in plan.sets},
        "rows": rows,
    }
    paths = [plan.outdir / SUMMARY, plan.outdir / TABLE, plan.outdir / ARRAYS]
    write_atomic(paths[0], (json.dumps(content, indent=1) + "\n").encode())
    lines = [*table(summary), "", *target_table(content)]
    write_atomic(paths[1], ("\n".join(lines) + "\n").encode())
    contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    write_atomic(paths[2], safetensors.numpy.save(contiguous))
    return paths


def table(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table in Markdown."""

    def cell(entry: Mapping[str, Any], metric: str, form: str) -> str:
        """Format the mean of a metric with its interval."""
        value = entry[metric]
        if value["mean"] is None:
            return ""
        text = format(value["mean"], form)
        if value["interval_95"] is not None:
            low, high = value["interval_95"]
            text += f" [{low:{form}}, {high:{form}}]"
        return text

    headings = (
        "latents",
        "arm",
        "labels",
        "directions found",
        "error reduction",
        "intact heads degraded",
        "identity kept",
        "face moved, voxels",
        "variety, after / before",
    )
    return markdown_rows(
        headings,
        [
            (
                entry["set"],
                entry["arm"],
                entry["labels"],
                f"{entry['directions']} of {entry['draws']}",
                cell(entry, "error_reduction", ".1%"),
                cell(entry, "intact_degraded", ".1%"),
                cell(entry, "identity_kept", ".1%"),
                cell(entry, "face_moved_voxels", ".3f"),
                cell(entry, "variety_ratio", ".3f"),
            )
            for entry in summary
        ],
    )


def target_table(content: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of labels to the target, in Markdown.

    Args: content: content of the JSON file.
    """

    def interval(entry: Mapping[str, Any], form: str) -> str:
        """Format a mean with its interval."""
        if entry["mean"] is None:
            return ""
        text = format(entry["mean"], form)
        if entry["interval_95"] is not None:
            text += " [{:{form}}, {:{form}}]".format(*entry["interval_95"], form=form)
        return text

    names = {"labels": "random", ACTIVE: "active", "difference": "active minus random"}
    rows = [
        (set_name, names[arm], f"{entry['reached']} of {len(entry['values'])}", interval(entry, ".0f"))
        for set_name, by_arm in content["labels_to_target"].items()
        for arm, entry in by_arm.items()
    ]
    headings = (
        "latents",
        "pairs",
        "draws that keep it",
        f"labels to {content['target']:.0%} error reduction",
    )
    lines = markdown_rows(headings, rows)
    difference_rows = [
        (set_name, entry["labels"], interval(entry, "+.1%"))
        for set_name, entries in content["active_minus_random"].items()
        for entry in entries
    ]
    if difference_rows:
        headings_of_differences = ("latents", "labels", "error reduction, active minus random")
        lines += ["", *markdown_rows(headings_of_differences, difference_rows)]
    return lines
