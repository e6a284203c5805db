"""Run a complete reward training: read labels, observe shapes, train, evaluate, and write all files.

The splits train, val and test are sets of labels: training pairs change the weights, validation pairs choose
the epoch, and test pairs are evaluated once, at the end.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.core.seeds import reject_held_out_seeds
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.experiments.mode import Mode
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.generators import LoadedGenerator, load_generator, ws_of_seeds
from eg3d_rlhf.generators.density_samples import sample_density
from eg3d_rlhf.preferences.dataset import (
    REFERENCE_PSI,
    Splits,
    common_value,
    describe_repeats,
    number_shapes,
    reference_seeds,
    split_by_seed,
    with_permuted_shapes,
)
from eg3d_rlhf.preferences.labels import (
    LabelSource,
    Preference,
    control_of,
    labels_hash,
    load_labels,
    write_labels,
)
from eg3d_rlhf.preferences.provenance import EVERYTHING, JUDGES, LabelUse
from eg3d_rlhf.preferences.unpaired import UnpairedPreference, read_unpaired, split_unpaired
from eg3d_rlhf.rewards import crop_report
from eg3d_rlhf.rewards.aggregates import AVERAGE
from eg3d_rlhf.rewards.cache import ObservationCache, cache_file, observe_seeds, observe_untuned
from eg3d_rlhf.rewards.ensembles import combine
from eg3d_rlhf.rewards.evaluation import (
    APART,
    Network,
    collect_curves,
    evaluate,
    evaluate_feature,
    evaluate_unpaired,
    fit_temperature,
    margins,
    plot_curves,
    score_seeds,
    too_few,
    too_few_shapes,
)
from eg3d_rlhf.rewards.network_training import TrainData, TrainState, new_network, train_reward
from eg3d_rlhf.rewards.networks import RewardNetwork
from eg3d_rlhf.rewards.observations import Observation, SigmaSlab, observation_of
from eg3d_rlhf.rewards.presets import preset
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.rewards.settings import RewardRun, TrainOptions, record
from eg3d_rlhf.rewards.slab_crops import BUNDLED_CROPS, choose_crop
from eg3d_rlhf.rewards.stated_accuracy import CONTROL
from training.distributed import SINGLE, Ranks, leave
from training.networks import state_hash
from training.progress import tqdm
from training.storage import write_atomic

# Names of files in the folder of the run
STATE = "state.pt"  # training state of the first member
REPORT = "report.json"  # results on the validation and test pairs
LABELS_COPY = (
    "labels.jsonl"  # copy of the labels at the start of the run, if they come from a store, which can grow
)
MEMBER_STRIDE = 1000  # difference between the random seeds of two consecutive members of an ensemble


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Opened and checked inputs of a training."""

    labels: list[Preference]  # labelled pairs
    unpaired: list[UnpairedPreference]  # labels of single shapes
    splits: Splits  # the pairs of the splits train, val and test
    generators: list[LoadedGenerator]  # generators of the labelled shapes; the first one is --network
    observation: Observation  # input of the reward
    psi: float  # truncation of the labelled shapes
    use: LabelUse  # numbers of labels of people and of judges


def open_training(settings: RewardRun, run: Run) -> Opened:
    """Open and check the labels and the generators of a training, and create the observation of the reward.

    Args:
        settings: settings of the training.
        run: folder, device and ranks of the run; the opened files are added to `run.inputs`.
    Raises: FileNotFoundError if a file is missing; ValueError if labels, generators and network do not match.
    """
    labels, use = read_counted_labels(settings.labels, run.folder if run.resumed else None, run.ranks)
    unpaired: list[UnpairedPreference] = []
    if settings.unpaired is not None:
        unpaired, unpaired_use = read_unpaired(settings.unpaired, settings.labels.choice)
        # Without labels of pairs, the labels of single shapes are the source of the pairs, and counted once.
        if settings.labels.file != settings.unpaired:
            use += unpaired_use
    # The copy of a resumed run does not hold the labels that were left out.
    use = replace(use, uncalibrated=settings.labels.choice.uncalibrated)
    if run.ranks.is_main:
        print(use.text(), flush=True)
    # Held-out seeds are reserved for evaluation, so labels of their shapes are rejected.
    reject_held_out_seeds(
        (seed for label in labels for seed in (label.winner, label.loser)),
        f"--labels={settings.labels.settings['labels']}",
    )
    reject_held_out_seeds((label.seed for label in unpaired), f"--unpaired={settings.unpaired}")
    generators = open_generators(settings, [*labels, *unpaired], run.device)
    label_psi = common_value([*labels, *unpaired], "psi")
    if settings.psi is not None and label_psi is not None and abs(settings.psi - label_psi) > 1e-6:
        raise ValueError(
            f"--set psi={settings.psi} contradicts the labels, which were made with psi={label_psi}. Remove"
            " --set psi."
        )
    # The value of the settings has priority over the value of the labels; without both, there is no
    # truncation. psi = 0 is a valid value, so `or` would be wrong.
    psi = next((psi_value for psi_value in (settings.psi, label_psi) if psi_value is not None), 1.0)
    pairs = with_permuted_shapes(labels, settings.split_seed) if settings.wrong_faces else labels
    observation = create_observation(settings, generators, run.ranks)
    splits = split_by_seed(pairs, settings.fractions, settings.split_seed)
    # The network is checked before the run's folder is created, so that an error leaves no folder.
    new_network(settings.train, observation).check(observation.shape)
    # The record of the run names the generators "network", "network 2", "network 3", ...
    run.inputs["network"] = generators[0].path
    for generator_number, generator in enumerate(generators[1:], start=2):
        run.inputs[f"network {generator_number}"] = generator.path
    if settings.labels.file is not None:
        run.inputs["labels"] = settings.labels.file
    if settings.unpaired is not None:
        run.inputs["unpaired"] = settings.unpaired
    return Opened(
        labels=labels,
        unpaired=unpaired,
        splits=splits,
        generators=generators,
        observation=observation,
        psi=psi,
        use=use,
    )


def level_of_labels(labels: Sequence[Preference | UnpairedPreference]) -> float | None:
    """Return the raw density at the surface of the labelled shapes; None if the labels do not state it.

    Labels of several levels cause a warning, and the most frequent level is returned.
    """
    count_by_level = Counter(
        float(level) for label in labels if (level := label.extra.get("level")) not in (None, "")
    )
    if not count_by_level:
        return None
    level = count_by_level.most_common(1)[0][0]
    if len(count_by_level) > 1:
        counts_text = ", ".join(f"{level:g} ({count})" for level, count in count_by_level.most_common())
        print(
            f"Warning: --labels: the labelled shapes are surfaces at different levels, with numbers of"
            f" labels: {counts_text}. People saw different shapes of the same seeds. Select one campaign with"
            f" --campaign=NAME, or choose the level with --set level. This training uses {level:g}.",
            file=sys.stderr,
            flush=True,
        )
    return level


def open_generators(
    settings: RewardRun, labels: Sequence[Preference | UnpairedPreference], device: str = "cpu"
) -> list[LoadedGenerator]:
    """Open the generators of the labelled shapes, and check that they are the generators of the labels.

    Args:
        settings: settings of the training.
        labels: labels of pairs and of single shapes.
        device: device of the generators.
    Returns: the generators, the generator of --network first.
    Raises: ValueError if labels belong to a generator that was not passed, or if there are several generators
        and labels do not name theirs.
    """
    level = level_of_labels(labels) if settings.level is None else settings.level
    generators = [
        load_generator(network_source, device, level)
        for network_source in (settings.network, *settings.more_networks)
    ]
    # With this setting, the user states that the seeds give the same shapes, so hashes are not compared.
    if settings.any_generator and len(generators) == 1:
        return generators
    if settings.any_generator:
        raise ValueError(
            "--set any_generator=true cannot be combined with --set more_networks, because it applies to a"
            " single --network. Remove --set any_generator or --set more_networks."
        )
    generator_hashes = [generator.hash for generator in generators]
    # Number of labels by the hash of their generator; the key None counts labels that do not name it.
    label_count_by_hash = Counter(label.generator for label in labels)
    if len(generators) > 1 and label_count_by_hash[None]:
        raise ValueError(
            f"labels: {label_count_by_hash[None]} labels do not name their generator, which they must if"
            " there are several generators. Pass one generator only, without --set more_networks."
        )
    unknown_hashes = [
        generator_hash
        for generator_hash in label_count_by_hash
        if generator_hash is not None and generator_hash not in generator_hashes
    ]
    if unknown_hashes:
        passed_generators = ", ".join(f"{generator_hash[:12]}..." for generator_hash in generator_hashes)
        unknown_hash = unknown_hashes[0]
        raise ValueError(
            f"labels: {label_count_by_hash[unknown_hash]} labels belong to the generator"
            f" {unknown_hash[:12]}..., which is not among the generators of this run ({passed_generators})."
            " Pass the generator of the labels with --network, and a second one with --set"
            " more_networks=FILE. If the seeds give the same shapes, use --set any_generator=true. To label"
            " shapes of this generator: eg3d-rlhf label synthetic --out=FILE."
        )
    return generators


def create_observation(
    settings: RewardRun, generators: Sequence[LoadedGenerator], ranks: Ranks = SINGLE
) -> Observation:
    """Create the observation that the reward reads, from the settings of its preset and of the run.

    Settings of the run have priority over settings of the preset.

    Args:
        settings: settings of the training.
        generators: generators of the labelled shapes.
        ranks: processes of the run, which read the same grid points.
    Raises: ValueError if the generators need different observations, because scores of their shapes could not
        be compared.
    """
    crop = settings.crop
    # Kinds without a crop read the complete cube, or renders; kinds of plugins choose their crop themselves.
    if crop is None and settings.observation in BUNDLED_CROPS:
        # One crop for all generators, because scores of their shapes are compared.
        choice = choose_crop(
            [generator.generator for generator in generators], settings.observation, settings.level
        )
        if settings.level is not None and choice.level != settings.level:
            raise ValueError(
                f"--set level={settings.level:g}: none of eight samples has a surface at this level. Pass"
                f" --set level={choice.level or 0:g}, or leave it out."
            )
        # Rounding on another device could change a measured share by a step, so all ranks take rank 0's.
        crop = tuple(ranks.broadcast(list(choice.crop)))
    run_settings = {"resolution": settings.resolution, "crop": crop, "points": settings.points}
    observation_settings = {
        **preset(settings.train.preset, settings.observation).observe,
        **{name: value for name, value in run_settings.items() if value is not None},
    }
    first_observation, *other_observations = (
        observation_of(settings.observation, generator.generator, **observation_settings)
        for generator in generators
    )
    # Observations contain cameras and bounds. If they are equal, a network can read shapes of all generators.
    for observation, generator in zip(other_observations, generators[1:], strict=True):
        if observation != first_observation:
            raise ValueError(
                f"--set more_networks={generator.path}: the bounds or cameras of this generator differ from"
                " those of --network. Remove it, or pass a generator with the same bounds and cameras."
            )
    return first_observation


def read_labels(
    source: LabelSource, resumed_folder: Path | None = None, ranks: Ranks = SINGLE
) -> list[Preference]:
    """Read the labels of a source, without their numbers by origin. See `read_counted_labels`."""
    return read_counted_labels(source, resumed_folder, ranks)[0]


def read_counted_labels(
    source: LabelSource, resumed_folder: Path | None = None, ranks: Ranks = SINGLE
) -> tuple[list[Preference], LabelUse]:
    """Read the labels of a source, and their numbers by origin. All ranks get the same labels.

    Args:
        source: file or store of the labels.
        resumed_folder: folder of the run that resumes, or None for a new run. A run that resumes gets the
            labels with which it started.
        ranks: processes of the run.
    Raises: FileNotFoundError if the source is missing; ValueError if it contains no valid labels.
    """
    if source.file is not None:
        return source.read_counted()
    if resumed_folder is not None and (resumed_folder / LABELS_COPY).is_file():
        # The copy holds only the labels that were used.
        return EVERYTHING.select(
            load_labels(resumed_folder / LABELS_COPY, EVERYTHING), lambda label: label.extra
        )
    # A store can receive a label after one rank has read it and before another rank does. Therefore only
    # rank 0 reads it.
    labels, use = source.read_counted()
    json_records = ranks.broadcast([label.to_dict() for label in labels])
    return [Preference.from_dict(json_record) for json_record in json_records], use


def train_and_evaluate(settings: RewardRun, opened: Opened, run: Run) -> None:
    """Train a reward, evaluate it once on the test pairs, write all files, and print a summary.

    All ranks observe shapes, train, and score validation pairs together. Only rank 0 evaluates test pairs and
    writes files: reward.safetensors and .json, report.json, curves.json and .png, stats.jsonl,
    training_options.json and state.pt. If the labels come from a store, which can grow, it also writes
    labels.jsonl.

    Args:
        settings: settings of the training.
        opened: result of `open_training`.
        run: folder, device and ranks of the run.
    Raises: StoppedError after SIGTERM or SIGINT.
    """
    labels = opened.labels
    unpaired = opened.unpaired
    splits = opened.splits
    generators = opened.generators
    psi = opened.psi
    if run.ranks.is_main and settings.labels.file is None and not (run.folder / LABELS_COPY).is_file():
        write_labels(run.folder / LABELS_COPY, labels)
    generator = generators[0]
    shape_keys: list[tuple[str, int]] = []
    # With several generators, a seed does not identify a shape. In `splits`, numbers of shapes then replace
    # the seeds.
    if len(generators) > 1:
        splits, shape_keys = number_shapes(splits)
    unpaired_splits = split_unpaired(unpaired, splits, settings.fractions, settings.split_seed)
    # Pairs are training data only if the loss has terms on pairs.
    trains_on_pairs = bool(settings.train.weights.on_pairs) or not unpaired
    warning = too_few(splits.pair_counts(), settings.fractions) if trains_on_pairs else ""
    if unpaired and not warning:
        # Different shapes, since several labels of one shape are no new evidence.
        preferred_count, other_count = (
            len({label.seed for label in unpaired_splits["test"] if label.preferred is is_preferred})
            for is_preferred in (True, False)
        )
        warning = too_few_shapes(preferred_count, other_count)
    repeats_note = describe_repeats([*splits.train, *splits.val, *splits.test]) if trains_on_pairs else ""
    if run.ranks.is_main:
        if repeats_note:
            print(repeats_note, flush=True)
        if warning:
            print(f"Warning: {warning}", file=sys.stderr, flush=True)
        report_crop(settings, opened, run.folder)
        if settings.train.preset == "paper" and str(run.device) == "cpu":
            print(
                "The network of the paper takes hours without a GPU. For a first result in minutes:"
                " --preset=tiny, which reads the same crop with 64 grid points per axis.",
                flush=True,
            )
    train_data = collect_observations(settings, opened, splits, unpaired_splits, shape_keys, run.ranks)
    member_states, start_hash = _train_members(settings, run, train_data)
    # No rank ends before all ranks have finished their training.
    run.ranks.barrier()
    leave()  # leaves the process group: only rank 0 has further work
    if not run.ranks.is_main:
        return
    # The file of a single network has no aggregate.
    model: Network = member_states[0].model
    if len(member_states) > 1:
        observations = observe_untuned(
            generator.generator, opened.observation, psi, settings.cutoff, settings.slab_batch
        )
        model = combine(
            [state.model for state in member_states], settings.aggregate, settings.strength, observations
        )
    report_values = assess(settings, model, member_states, train_data, splits) | {"too_few": warning}
    # A simple baseline for comparison: the order of the test pairs by their volume alone. Numbers of shapes
    # (with several generators) do not identify a seed of the first generator.
    if (
        isinstance(opened.observation, SigmaSlab)
        and not shape_keys
        and any(label.clean is not None for label in splits.test)
    ):
        report_values["test_by_volume"] = evaluate_feature(
            volumes(settings, opened, splits.test), splits.test
        )
    # If --labels and --unpaired name the same file, its hash is stated once.
    label_sets = (labels if settings.labels.file != settings.unpaired else [], unpaired)
    report_values["labels_file"] = settings.labels.name
    report_values["label_use"] = opened.use.to_dict()
    report_values["labels_sha256"] = "+".join(labels_hash(label_set) for label_set in label_sets if label_set)
    report_values |= {"generator": generator.hash, "psi": psi}
    if unpaired:
        unpaired_counts = {split_name: len(split) for split_name, split in unpaired_splits.items()}
        unpaired_counts["unused"] = len(unpaired) - sum(map(len, unpaired_splits.values()))
        unpaired_results = {
            split_name: evaluate_unpaired(
                model, member_states[0].model, train_data.store, unpaired_splits[split_name]
            )
            for split_name in ("val", "test")
        }
        report_values["unpaired"] = {
            "file": settings.unpaired and settings.unpaired.name,
            "splits": unpaired_counts,
            **unpaired_results,
        }
    train_options = settings.train
    provenance = {
        "generator": generator.hash,
        "architecture": generator.generator.architecture,
        "psi": psi,
        "truncation_cutoff": settings.cutoff,
        # tuning with this reward takes this level
        **({} if generator.generator.level == LEVEL else {"level": generator.generator.level}),
        "labels": report_values["labels_sha256"],
        "preset": train_options.preset,
        "seed": train_options.seed,
        "temperature": report_values["temperature"],
        "test_accuracy": report_values["test"]["labels"],
        "test_accuracy_clean": report_values["test"].get("clean"),
        # A reader of the reward learns from it how many labels the accuracy rests on.
        "pairs": report_values["pairs"],
        # Labels of judges are stated in the reward, so that its users see them.
        **({"label_use": opened.use.to_dict()} if opened.use.used[JUDGES] else {}),
        "score_mean": report_values["score_mean"],
        "score_std": report_values["score_std"],
    }
    if start_hash:
        provenance["start"] = start_hash
    # Labels that are declared a control make the reward one, which jobs that tune accept as it is.
    if control := control_of(settings.labels.file) or control_of(settings.unpaired):
        provenance[CONTROL] = control
    if settings.wrong_faces:
        # The entry shows that this reward is a control, whose labels belong to other shapes.
        provenance["wrong_faces"] = True
    if len(generators) > 1:
        provenance["generators"] = [member.hash for member in generators]
    reward_path = Reward(opened.observation, model, provenance).save(run.folder / "reward.safetensors")
    write_atomic(run.folder / REPORT, (json.dumps(report_values, indent=1) + "\n").encode())
    curve_context = {
        "pairs": len(splits.train),
        "validation": len(splits.val),
        "seed": train_options.seed,
        "preset": train_options.preset,
        "member": f"1 of {len(member_states)}",
        "generator": generator.hash[:8],
    }
    run.write(
        "curves.json", collect_curves(member_states[0].history, member_states[0].best_epoch, curve_context)
    )
    plot_curves(run.folder / "curves.json", run.folder / "curves.png")
    print("\n".join(summary_lines(report_values, reward_path)), flush=True)


def report_crop(settings: RewardRun, opened: Opened, folder: Path) -> None:
    """Print how much of the surface of a few samples the reward reads, and write crop.json and crop.png.

    Observations that are no grids of densities, such as depth maps, have no such report.

    Args:
        settings: settings of the training.
        opened: result of `open_training`; the samples belong to its first generator.
        folder: folder of the run.
    """
    spec = getattr(opened.observation, "spec", None)
    if not isinstance(spec, SlabSpec):
        return
    generator = opened.generators[0].generator
    samples = sample_density(generator, psi=opened.psi, cutoff=settings.cutoff)
    problem = samples.check(generator.level).problem(
        f"The labels state the level {generator.level:g}. Label such shapes with --set level={{level}}"
        if level_of_labels([*opened.labels, *opened.unpaired]) is not None
        else "Pass --set level={level}"
    )
    if problem is not None:
        print(f"Warning: --network: {problem}", file=sys.stderr, flush=True)
    crop = crop_report.compute(generator, spec, samples)
    crop_report.write(crop, folder)
    print(f"{crop_report.summary(crop)} crop.png shows them.", flush=True)


@torch.no_grad()
def volumes(settings: RewardRun, opened: Opened, labels: Iterable[Preference]) -> dict[int, float]:
    """Compute the share of the slab's grid points that each labelled shape fills.

    The density itself is evaluated, because the slabs that the reward reads are normalised per shape.

    Args:
        settings: settings of the training.
        opened: result of `open_training`; shapes belong to its first generator.
        labels: pairs of shapes whose volumes are computed.
    Returns: share in 0..1 by seed.
    """
    generator = opened.generators[0].generator
    observation = opened.observation
    assert isinstance(observation, SigmaSlab)
    seeds = list(dict.fromkeys(seed for label in labels for seed in (label.winner, label.loser)))
    shares: dict[int, float] = {}
    for start in range(0, len(seeds), settings.slab_batch):
        # Batches as in training, since the fields of a batch must fit into memory.
        batch_seeds = seeds[start : start + settings.slab_batch]
        field = generator.field(ws_of_seeds(generator, batch_seeds, opened.psi, settings.cutoff))
        density = field.density_grid(observation.spec)  # [N, D, H, W]
        batch_shares = (density > generator.level).flatten(1).double().mean(dim=1)
        shares.update(zip(batch_seeds, batch_shares.tolist(), strict=True))
    return shares


def summary_lines(report: dict, reward_path: Path) -> Iterator[str]:
    """Yield the lines that summarise the results of a training.

    Args:
        report: contents of report.json.
        reward_path: file of the reward.
    """
    test_results = report["test"]
    titles = {
        "labels": "test pairs in the order of their labels",
        "clean": "test pairs in the noise-free order",
        "apart": f"of these, pairs whose volume errors differ by at least {APART}",
    }
    # Accuracies of the volume alone, by the names of `titles`
    volume_accuracies = report.get("test_by_volume", {})
    for accuracy_name, title in titles.items():
        if accuracy_name in test_results:
            accuracy = test_results[accuracy_name]
            interval_low, interval_high = accuracy["interval_95"]
            accuracy_text = f"{accuracy['correct']}/{accuracy['n']} = {accuracy['accuracy']:.3f}"
            if accuracy["pairs"] < accuracy["n"]:
                accuracy_text += f" ({accuracy['n']} labels of {accuracy['pairs']} pairs)"
            baseline = (
                "; ordered by the volume in the slab alone:"
                f" {volume_accuracies[accuracy_name]['accuracy']:.3f}"
                if accuracy_name in volume_accuracies
                else ""
            )
            yield (
                f"{title}: {accuracy_text}, 95 % interval {interval_low:.3f} to {interval_high:.3f}{baseline}"
            )
    if "unpaired" in report:
        unpaired_test = report["unpaired"]["test"]
        preferred_count, other_count = unpaired_test["n"]
        interval_low, interval_high = unpaired_test["auc_interval_95"]
        yield (
            f"test labels of single shapes: AUC {unpaired_test['auc']:.3f} ({preferred_count} preferred"
            f" shapes, {other_count} other shapes), 95 % interval {interval_low:.3f} to {interval_high:.3f}"
        )
    if report["too_few"]:
        # At the start of the run the results follow the warning; here they precede it.
        yield report["too_few"].replace("below", "above")
    yield (
        f"expected calibration error {test_results['calibration_error']:.3f}; reward written to {reward_path}"
    )


def _bar(unit_count: int, title: str, unit_name: str, ranks: Ranks) -> Callable[[int], None]:
    """Show a progress bar on stderr of rank 0, and return a function that advances it by a number of units.

    Args:
        unit_count: number of units of the complete bar.
        title: text before the bar.
        unit_name: name of a unit.
        ranks: processes of the run.
    """
    progress_bar = tqdm(total=unit_count, desc=title, unit=unit_name, disable=not ranks.is_main)
    # `and None` discards the result of `update`.
    return lambda count: progress_bar.update(count) and None


def collect_observations(
    settings: RewardRun,
    opened: Opened,
    splits: Splits,
    unpaired_splits: Mapping[str, Sequence[UnpairedPreference]],
    shape_keys: list[tuple[str, int]],
    ranks: Ranks = SINGLE,
) -> TrainData:
    """Observe all labelled shapes and the reference samples, or read their observations from the cache.

    Labelled shapes are observed at the truncation `opened.psi`, and reference samples at psi 0.25. Reference
    samples come from the first generator.

    Args:
        settings: settings of the training.
        opened: result of `open_training`.
        splits: labelled pairs by split.
        unpaired_splits: labels of single shapes by split.
        shape_keys: empty if the splits contain seeds. With several generators the splits contain numbers of
            shapes, and entry i is (hash of the generator, seed) of the shape with the number i.
        ranks: processes that share the work.
    Returns: the labels of the splits train and val, with the caches of all observations.
    """
    generators = opened.generators
    observation = opened.observation
    psi = opened.psi
    cutoff = settings.cutoff

    def observe(
        seeds: Iterable[int], psi: float, bar_title: str, generator: LoadedGenerator = generators[0]
    ) -> ObservationCache:
        """Return a cache with the observations of seeds, and save new ones if there is a cache file."""
        unique_seeds = list(dict.fromkeys(seeds))
        cache_path = None
        if settings.cache is not None:
            cache_path = cache_file(settings.cache, generator.hash, observation, psi, cutoff)
        store = ObservationCache(
            observe_seeds(generator.generator, observation, psi=psi, cutoff=cutoff), cache_path
        )
        # Each rank observes its share of the seeds; -(-a // b) is a / b rounded up.
        advance = _bar(-(-len(unique_seeds) // ranks.world), bar_title, "shape", ranks)
        missing_count = store.fill(unique_seeds, settings.slab_batch, advance, ranks)
        if missing_count and ranks.is_main:
            store.save()
        return store

    # Seeds of the labelled shapes. With several generators these are the numbers of `number_shapes`.
    shape_ids: list[int] = []
    for split in (splits.train, splits.val, splits.test):
        for label in split:
            shape_ids += [label.winner, label.loser]
    for unpaired_split in unpaired_splits.values():
        shape_ids += [unpaired_label.seed for unpaired_label in unpaired_split]
    labelled_seeds = [seed for _, seed in shape_keys] or shape_ids
    reference_count = settings.train.reference_samples
    reference_seed_list: Sequence[int] = ()
    if reference_count:
        # Seeds of labelled shapes are not used for reference samples.
        reference_seed_list = reference_seeds(
            reference_count, settings.fractions, unusable_seeds=labelled_seeds
        )["train"]
    if shape_keys:
        store_by_generator = {}
        for generator in generators:
            generator_seeds = [seed for name, seed in shape_keys if name == generator.hash]
            store_by_generator[generator.hash] = observe(generator_seeds, psi, "shapes", generator)

        def take_shapes(shape_numbers: Sequence[int]) -> torch.Tensor:
            """Return the observations of shapes, given by number, from the caches of their generators."""
            hashes_and_seeds = [shape_keys[shape_number] for shape_number in shape_numbers]
            return torch.cat([store_by_generator[name].take([seed]) for name, seed in hashes_and_seeds])

        store = ObservationCache(take_shapes)
        store.fill(shape_ids, settings.slab_batch)
    else:
        store = observe(shape_ids, psi, "shapes")
    reference_store = (
        observe(reference_seed_list, REFERENCE_PSI, "reference samples") if reference_seed_list else None
    )
    return TrainData(
        train=splits.train,
        val=splits.val,
        store=store,
        references=reference_seed_list,
        reference_store=reference_store,
        observation=observation,
        unpaired=unpaired_splits["train"],
        unpaired_val=unpaired_splits["val"],
    )


def _train_members(settings: RewardRun, run: Run, train_data: TrainData) -> tuple[list[TrainState], str]:
    """Train every member of the ensemble, each with its own random seed.

    If the members start from the weights of one network, this network is trained first. It is logged as
    member 0.

    Args:
        settings: settings of the training.
        run: folder, device and ranks of the run.
        train_data: labels and observations.
    Returns: the training states of the members, and the SHA-256 of the network from which they started. The
        hash is '' if the members have random initialisations.
    """
    # Averaged weights are only useful if the members start from one network.
    has_shared_start = settings.shared_start or settings.aggregate == AVERAGE
    train_options = settings.train
    network_count = settings.members + has_shared_start
    step_count = train_data.steps(train_options) * train_options.epochs * network_count
    advance = _bar(step_count, "training", "step", run.ranks)

    def train_member(
        member_number: int,
        train_options: TrainOptions,
        state_name: str,
        start_network: RewardNetwork | None = None,
    ) -> TrainState:
        """Train one network, and log its epochs.

        Args:
            member_number: number of the network in the log, from 1; 0 for the shared start.
            train_options: settings of its training.
            state_name: name of the file of its training state in the run's folder.
            start_network: network from whose weights training starts; None for a random initialisation.
        """

        def on_epoch(epoch_record: dict) -> None:
            """Write the record of an epoch to stats.jsonl, and print it."""
            run.stats({"member": member_number, **epoch_record})
            if run.ranks.is_main:
                tqdm.write(
                    f"member {member_number}  epoch {epoch_record['epoch'] + 1:3d}  train"
                    f" {epoch_record['train_accuracy']:6.3f}  val {epoch_record['val_accuracy']:6.3f}  val"
                    f" log loss {epoch_record['val_log_loss']:7.4f}  lr {epoch_record['lr']:.2e}"
                    f"  {epoch_record['seconds']:6.1f} s"
                )

        return train_reward(
            train_data,
            train_options,
            device=run.device,
            state_file=run.folder / state_name,
            ranks=run.ranks,
            on_step=lambda: advance(1),
            on_epoch=on_epoch,
            start=start_network,
        )

    start_network = None
    start_hash = ""
    if has_shared_start:
        # The network from which all members start is trained on all labels, because all members would share
        # its bootstrap sample.
        start_network = train_member(0, replace(train_options, bootstrap=False), "state-start.pt").model
        start_hash = state_hash(start_network)
    member_states = []
    for member_number in range(1, settings.members + 1):
        # The first member has the seed of the run.
        member_seed = train_options.seed + MEMBER_STRIDE * (member_number - 1)
        member_options = replace(train_options, seed=member_seed, start=start_hash)
        state_name = STATE if member_number == 1 else f"state-{member_number}.pt"
        member_states.append(train_member(member_number, member_options, state_name, start_network))
    return member_states, start_hash


def assess(
    settings: RewardRun,
    model: Network,
    member_states: list[TrainState],
    train_data: TrainData,
    splits: Splits,
) -> dict:
    """Evaluate a reward on the validation and test pairs.

    This is the only evaluation of the test pairs. The temperature is fitted on validation pairs, and mean and
    standard deviation of the scores are computed on training pairs.

    Args:
        settings: settings of the training.
        model: network or ensemble.
        member_states: training states of the members.
        train_data: labels and observations.
        splits: labelled pairs by split.
    Returns: JSON values, the contents of report.json.
    """
    # Training pairs give the scale of the scores, so that the test pairs have no influence on the reward.
    train_seeds = [seed for label in train_data.train for seed in (label.winner, label.loser)]
    train_scores = torch.tensor(
        list(score_seeds(model, train_data.store, train_seeds).values()), dtype=torch.float64
    )
    val_scores = score_seeds(
        model, train_data.store, [seed for label in train_data.val for seed in (label.winner, label.loser)]
    )
    # Training pairs would give a temperature that is too small.
    temperature = fit_temperature(margins(val_scores, train_data.val))
    return {
        "test": evaluate(model, train_data.store, splits.test, temperature),
        "val": evaluate(model, train_data.store, splits.val, temperature),
        "temperature": temperature,
        "score_mean": float(train_scores.mean()),
        "score_std": float(train_scores.std()),
        "splits": splits.counts(),
        "pairs": splits.pair_counts(),
        "best_epoch": member_states[0].best_epoch + 1,
        "epochs": member_states[0].epoch,
        "members": (
            [
                evaluate(member_state.model, train_data.store, splits.val, temperature)
                for member_state in member_states
            ]
            if len(member_states) > 1
            else []
        ),
        "seconds_training": sum(
            epoch_record["seconds"] for member_state in member_states for epoch_record in member_state.history
        ),
        "preset": settings.train.preset,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": settings.train.seed,
    }


TRAINING: Mode[RewardRun] = Mode(
    name="reward",
    help="Train a reward on preference labels.",
    settings=RewardRun,
    open=open_training,
    work=train_and_evaluate,
    record=record,
    shown=RewardRun.to_dict,
    changes=None,
)
