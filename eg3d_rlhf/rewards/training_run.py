"""Run a complete reward training, from labels to the reward, its figures and its curves."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eg3d_rlhf.core.seeds import refuse_held_out
from eg3d_rlhf.experiments.mode import Mode
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.generators import LoadedGenerator, load_generator, ws_of_seeds
from eg3d_rlhf.preferences.dataset import (
    ANCHOR_PSI,
    Splits,
    anchor_seeds,
    common_value,
    numbered,
    on_wrong_faces,
    split_by_seed,
)
from eg3d_rlhf.preferences.labels import LabelSource, Preference, labels_hash, load_labels, write_labels
from eg3d_rlhf.preferences.unpaired import UnpairedPreference, load_unpaired, split_unpaired
from eg3d_rlhf.rewards.aggregates import AVERAGE
from eg3d_rlhf.rewards.cache import ObservationCache, cache_file, observe_seeds, untuned
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
from training.distributed import SINGLE, Ranks, leave
from training.networks import state_hash
from training.progress import tqdm
from training.storage import write_atomic

STATE = "state.pt"  # in the run's folder: training state of the first member
REPORT = "report.json"  # in the run's folder: figures of the held-out pairs
# in the run's folder: labels of a store at the start of the run, since a store can grow
KEPT = "labels.jsonl"
MEMBER_STRIDE = 1000  # difference between the seeds of two consecutive members of an ensemble


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Opened and checked inputs of a training."""

    labels: list[Preference]
    unpaired: list[UnpairedPreference]
    splits: Splits
    generators: list[LoadedGenerator]  # the first one is that of --network
    observation: Observation
    psi: float  # truncation of the labelled shapes


def open_training(settings: RewardRun, run: Run) -> Opened:
    """Open labels and generators, and create the observation.

    Raises: ValueError or FileNotFoundError if they do not fit together.
    """
    labels = read_labels(settings.labels, run.folder if run.resumed else None, run.ranks)
    unpaired = [] if settings.unpaired is None else load_unpaired(settings.unpaired)
    refuse_held_out(
        # Held-out latents are reserved for evaluation, so labels of them are rejected.
        (seed for label in labels for seed in (label.winner, label.loser)),
        f"--labels={settings.labels.settings['labels']}",
    )
    refuse_held_out((label.seed for label in unpaired), f"--unpaired={settings.unpaired}")
    generators = open_generators(settings, [*labels, *unpaired], run.device)
    stated = common_value([*labels, *unpaired], "psi")
    if settings.psi is not None and stated is not None and abs(settings.psi - stated) > 1e-6:
        raise ValueError(
            f"--set psi: the labels were made with psi={stated}, got {settings.psi}. Remove --set psi."
        )
    # Settings first, then the labels, then no truncation. psi = 0 is a valid value, so `or` would be wrong.
    psi = next((value for value in (settings.psi, stated) if value is not None), 1.0)
    pairs = on_wrong_faces(labels, settings.split_seed) if settings.wrong_faces else labels
    # All generators must be observed in the same way, or scores could not be compared.
    observation = create_observation(settings, generators)
    splits = split_by_seed(pairs, settings.fractions, settings.split_seed)
    # Checked before the run's folder is created, so that a mistake leaves no folder.
    new_network(settings.train, settings.observation).check(observation.shape)
    run.inputs |= {
        "network": generators[0].path,
        **{f"network {i + 2}": g.path for i, g in enumerate(generators[1:])},
    }
    files = (("labels", settings.labels.file), ("unpaired", settings.unpaired))
    run.inputs |= {name: file for name, file in files if file is not None}
    return Opened(
        labels=labels,
        unpaired=unpaired,
        splits=splits,
        generators=generators,
        observation=observation,
        psi=psi,
    )


def open_generators(
    settings: RewardRun, labels: Sequence[Preference | UnpairedPreference], device: str = "cpu"
) -> list[LoadedGenerator]:
    """Open the generators of the labelled shapes, the one of --network first.

    Raises: ValueError if labels belong to another generator, or do not name one where there are several.
    """
    generators = [load_generator(source, device) for source in (settings.network, *settings.more_networks)]
    # The user states that the seeds mean the same shapes, so hashes are not compared.
    if settings.any_generator and len(generators) == 1:
        return generators
    if settings.any_generator:
        raise ValueError(
            "--set any_generator: applies to one --network, got more_networks as well. Remove one of the two"
            " settings."
        )
    # Labels may omit the generator if there is only one.
    hashes = [g.hash for g in generators]
    counts = Counter(label.generator for label in labels)
    unknown = [name for name in counts if name not in hashes and not (name is None and len(generators) == 1)]
    if unknown:
        names = ", ".join(f"{h[:12]}..." for h in hashes)
        wrong = unknown[0]
        got = (
            f"{counts[wrong]} labels that name no generator"
            if wrong is None
            else f"{counts[wrong]} labels of {wrong[:12]}..."
        )
        raise ValueError(
            f"labels: expected labels of the generator {names}, got {got}. Pass the generator of the labels"
            " with --network, and a second one with --set more_networks=FILE. If the seeds mean the same"
            " shapes, use --set any_generator=true. To label shapes of this generator: eg3d-rlhf label"
            " synthetic --out=FILE."
        )
    return generators


def create_observation(settings: RewardRun, generators: Sequence[LoadedGenerator]) -> Observation:
    """Create the observation of the reward from the settings of its preset and of the run.

    Raises: ValueError if generators need different observations.
    """
    changes = {"resolution": settings.resolution, "crop": settings.crop, "points": settings.points}
    observe = {
        **preset(settings.train.preset, settings.observation).observe,
        **{k: v for k, v in changes.items() if v is not None},
    }
    first, *others = (observation_of(settings.observation, g.generator, **observe) for g in generators)
    # Observations contain cameras and bounds, so equality means that networks can read all generators.
    for other, generator in zip(others, generators[1:], strict=True):
        if other != first:
            raise ValueError(
                f"--set more_networks={generator.path}: this generator has other bounds or cameras than"
                " that of --network. Remove it, or use a generator with the same bounds."
            )
    return first


def read_labels(source: LabelSource, resumed: Path | None = None, ranks: Ranks = SINGLE) -> list[Preference]:
    """Read the labels of a source. All ranks get those of rank 0.

    A run that resumes in folder `resumed` gets the labels with which it started.
    Raises: as the source.
    """
    if source.file is not None:
        return source.read()
    if resumed is not None and (resumed / KEPT).is_file():
        return load_labels(resumed / KEPT)
    # A store can get an answer between the reading of two ranks, so only rank 0 reads it.
    records = ranks.broadcast([label.to_dict() for label in source.read()])
    return [Preference.from_dict(record) for record in records]


def train_and_judge(settings: RewardRun, opened: Opened, run: Run) -> None:
    """Train, choose the epoch, evaluate the test pairs once, write all files, and print figures.

    Ranks observe shapes, train, and score validation pairs together. Only rank 0 tests and writes.
    Writes reward.safetensors and .json, report.json, curves.json and .png, stats.jsonl, training_options.json
    and state.pt; also labels.jsonl if the labels come from a store, which can grow.
    Raises: StoppedError after SIGTERM or SIGINT.
    """
    labels = opened.labels
    unpaired = opened.unpaired
    splits = opened.splits
    generators = opened.generators
    psi = opened.psi
    if run.ranks.main and settings.labels.file is None and not (run.folder / KEPT).is_file():
        write_labels(run.folder / KEPT, labels)
    generator = generators[0]
    shapes: list[tuple[str, int]] = []
    # With several generators, a seed does not identify a shape, so shapes get numbers in place of seeds.
    if len(generators) > 1:
        splits, shapes = numbered(splits)
    single = split_unpaired(unpaired, splits, settings.fractions, settings.split_seed)
    # Pairs are training data only if the loss has terms on pairs.
    trains_on_pairs = bool(settings.train.weights.on_pairs) or not unpaired
    warning = too_few(splits.counts(), settings.fractions) if trains_on_pairs else ""
    if unpaired and not warning:
        warning = too_few_shapes(
            *(sum(label.preferred is kind for label in single["test"]) for kind in (True, False))
        )
    if warning and run.ranks.main:
        print(f"Warning: {warning}", file=sys.stderr, flush=True)
    data = collect_observations(settings, opened, splits, single, shapes, run.ranks)
    states, start = _train(settings, run, data)
    # All ranks have finished training before any of them ends.
    run.ranks.barrier()
    leave()  # only rank 0 has work left; the other ranks end here
    if not run.ranks.main:
        return
    # One network needs no aggregate, and its file then has the form of a single network.
    model: Network = states[0].model
    if len(states) > 1:
        observations = untuned(
            generator.generator, opened.observation, psi, settings.cutoff, settings.slab_batch
        )
        model = combine(
            [state.model for state in states], settings.aggregate, settings.strength, observations
        )
    report = assess(settings, model, states, data, splits) | {"too_few": warning}
    # A simple baseline: how many test pairs does the volume alone order correctly?
    if (
        isinstance(opened.observation, SigmaSlab)
        and not shapes
        and any(label.clean is not None for label in splits.test)
    ):
        report["test_by_volume"] = evaluate_feature(volumes(settings, opened, splits.test), splits.test)
    # If --labels and --unpaired name the same file, it counts once.
    label_sets = (labels if settings.labels.file != settings.unpaired else [], unpaired)
    report["labels_file"], report["labels_sha256"] = (
        settings.labels.name,
        "+".join(labels_hash(part) for part in label_sets if part),
    )
    report |= {"generator": generator.hash, "psi": psi}
    if unpaired:
        counts = {name: len(part) for name, part in single.items()} | {
            "unused": len(unpaired) - sum(map(len, single.values()))
        }
        figures = {
            name: evaluate_unpaired(model, states[0].model, data.store, single[name])
            for name in ("val", "test")
        }
        report["unpaired"] = {
            "file": settings.unpaired and settings.unpaired.name,
            "splits": counts,
            **figures,
        }
    options = settings.train
    provenance = {
        "generator": generator.hash,
        "architecture": generator.generator.architecture,
        "psi": psi,
        "truncation_cutoff": settings.cutoff,
        "labels": report["labels_sha256"],
        "preset": options.preset,
        "seed": options.seed,
        "temperature": report["temperature"],
        "test_accuracy": report["test"]["labels"],
        "test_accuracy_clean": report["test"].get("clean"),
        "score_mean": report["score_mean"],
        "score_std": report["score_std"],
        **({"start": start} if start else {}),
    }
    if settings.wrong_faces:
        # Recorded, so that a control is not mistaken for a reward.
        provenance["wrong_faces"] = True
    if len(generators) > 1:
        provenance["generators"] = [g.hash for g in generators]
    path = Reward(opened.observation, model, provenance).save(run.folder / "reward.safetensors")
    write_atomic(run.folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    context = {
        "pairs": len(splits.train),
        "validation": len(splits.val),
        "seed": options.seed,
        "preset": options.preset,
    }
    context |= {"member": f"1 of {len(states)}", "generator": generator.hash[:8]}
    run.write("curves.json", collect_curves(states[0].history, states[0].best_epoch, context))
    plot_curves(run.folder / "curves.json", run.folder / "curves.png")
    print("\n".join(lines_of(report, path)), flush=True)


@torch.no_grad()
def volumes(settings: RewardRun, opened: Opened, labels: Iterable[Preference]) -> dict[int, float]:
    """Compute the share of the slab that each labelled shape fills, by seed.

    The density itself is read, because observed slabs are normalised per shape.
    """
    generator = opened.generators[0].generator
    observation = opened.observation
    assert isinstance(observation, SigmaSlab)
    seeds = list(dict.fromkeys(seed for label in labels for seed in (label.winner, label.loser)))
    filled: dict[int, float] = {}
    for start in range(0, len(seeds), settings.slab_batch):
        # As many shapes as in training, since their fields must fit into memory.
        part = seeds[start : start + settings.slab_batch]
        density = generator.field(ws_of_seeds(generator, part, opened.psi, settings.cutoff)).density_grid(
            observation.spec
        )
        filled.update(
            zip(part, (density > generator.level).flatten(1).double().mean(dim=1).tolist(), strict=True)
        )
    return filled


def lines_of(report: dict, path: Path) -> Iterator[str]:
    """Yield the lines that summarise a report. Args: path: file of the reward."""
    test = report["test"]
    titles = {
        "labels": "test pairs in the order of their labels",
        "clean": "test pairs in the noise-free order",
        "apart": f"of these, pairs whose volume errors differ by at least {APART}",
    }
    by_volume = report.get("test_by_volume", {})
    for name, title in titles.items():
        if name in test:
            low, high = test[name]["interval_95"]
            counts = f"{test[name]['correct']}/{test[name]['n']} = {test[name]['accuracy']:.3f}"
            baseline = (
                f"; by the volume in the slab only: {by_volume[name]['accuracy']:.3f}"
                if name in by_volume
                else ""
            )
            yield f"{title}: {counts}, 95 % interval {low:.3f} to {high:.3f}{baseline}"
    if "unpaired" in report:
        single = report["unpaired"]["test"]
        good, others = single["n"]
        low, high = single["auc_interval_95"]
        kinds = f"{good} preferred, {others} others"
        yield (
            f"unpaired test labels: AUC {single['auc']:.3f} ({kinds}), 95 % interval {low:.3f} to {high:.3f}"
        )
    if report["too_few"]:
        # Here the warning follows the figures.
        yield report["too_few"].replace("below", "above")
    yield f"expected calibration error {test['calibration_error']:.3f}; reward written to {path}"


def _bar(total: int, title: str, unit: str, ranks: Ranks) -> Callable[[int], None]:
    """Show a progress bar on stderr of rank 0, and return a function that advances it."""
    bar = tqdm(total=total, desc=title, unit=unit, disable=not ranks.main)
    return lambda done: bar.update(done) and None


def collect_observations(
    settings: RewardRun,
    opened: Opened,
    splits: Splits,
    single: Mapping[str, Sequence[UnpairedPreference]],
    shapes: list[tuple[str, int]],
    ranks: Ranks = SINGLE,
) -> TrainData:
    """Observe labelled seeds at `psi` and reference samples at psi 0.25, or read them from the cache.

    Args: single: unpaired labels by split; shapes: generator and seed of the numbers in the splits, if there
        are several generators. Reference samples come from the first generator.
    """
    generators = opened.generators
    observation = opened.observation
    psi = opened.psi
    cutoff = settings.cutoff

    def filled(
        seeds: Iterable[int], psi: float, title: str, generator: LoadedGenerator = generators[0]
    ) -> ObservationCache:
        """Observe seeds of one generator, and store new observations in the cache file, if there is one."""
        unique = list(dict.fromkeys(seeds))
        cache = (
            None
            if settings.cache is None
            else cache_file(settings.cache, generator.hash, observation, psi, cutoff)
        )
        store = ObservationCache(
            observe_seeds(generator.generator, observation, psi=psi, cutoff=cutoff), cache
        )
        if (
            store.fill(
                unique,
                settings.slab_batch,
                _bar(-(-len(unique) // ranks.world), title, "shape", ranks),
                ranks,
            )
            and ranks.main
        ):
            store.save()
        return store

    seeds = [
        seed
        for part in (splits.train, splits.val, splits.test)
        for label in part
        for seed in (label.winner, label.loser)
    ]
    seeds += [label.seed for part in single.values() for label in part]
    labelled = [seed for _, seed in shapes] or seeds
    count = settings.train.reference_samples
    # Seeds of labelled shapes are not used for reference samples.
    references = anchor_seeds(count, settings.fractions, exclude=labelled)["train"] if count else ()
    if shapes:
        parts = {
            g.hash: filled([seed for name, seed in shapes if name == g.hash], psi, "shapes", g)
            for g in generators
        }
        # The numbers of `splits` are looked up in the caches of their generators.
        store = ObservationCache(
            lambda numbers: torch.cat(
                [parts[name].take([seed]) for name, seed in (shapes[n] for n in numbers)]
            )
        )
        store.fill(seeds, settings.slab_batch)
    else:
        store = filled(seeds, psi, "shapes")
    reference_store = filled(references, ANCHOR_PSI, "reference samples") if references else None
    return TrainData(
        train=splits.train,
        val=splits.val,
        store=store,
        anchors=references,
        anchor_store=reference_store,
        observation=observation,
        unpaired=single["train"],
        unpaired_val=single["val"],
    )


def _train(settings: RewardRun, run: Run, data: TrainData) -> tuple[list[TrainState], str]:
    """Train every member of the ensemble, each with its own seed; the first member has the run's seed.

    Returns: the members, and the SHA-256 of the network from which they were trained, '' if there is none.
        That network counts as member 0.
    """
    shared = settings.shared_start or settings.aggregate == AVERAGE
    options = settings.train
    advance = _bar(
        data.steps(options) * options.epochs * (settings.members + shared), "training", "step", run.ranks
    )

    def member(
        number: int, options: TrainOptions, name: str, start: RewardNetwork | None = None
    ) -> TrainState:
        """Train one network, and log its epochs."""

        def on_epoch(epoch: dict) -> None:
            run.stats({"member": number, **epoch})
            if run.ranks.main:
                tqdm.write(
                    f"member {number}  epoch {epoch['epoch'] + 1:3d}  train {epoch['train_accuracy']:6.3f} "
                    f" val {epoch['val_accuracy']:6.3f}  val log loss {epoch['val_log_loss']:7.4f}  lr"
                    f" {epoch['lr']:.2e}  {epoch['seconds']:6.1f} s"
                )

        return train_reward(
            data,
            options,
            device=run.device,
            state_file=run.folder / name,
            ranks=run.ranks,
            on_step=lambda: advance(1),
            on_epoch=on_epoch,
            start=start,
        )

    # The shared start sees all labels: a bootstrap sample would be common to all members.
    start = member(0, replace(options, bootstrap=False), "state-start.pt").model if shared else None
    digest = "" if start is None else state_hash(start)
    # The seeds of members are MEMBER_STRIDE apart; the first member has the run's seed.
    each = [
        replace(options, seed=options.seed + MEMBER_STRIDE * number, start=digest)
        for number in range(settings.members)
    ]
    names = [STATE, *(f"state-{number + 1}.pt" for number in range(1, settings.members))]
    return [
        member(i + 1, trained, name, start) for i, (trained, name) in enumerate(zip(each, names, strict=True))
    ], digest


def assess(
    settings: RewardRun, model: Network, states: list[TrainState], data: TrainData, splits: Splits
) -> dict:
    """Compute figures of validation and test pairs.

    The test pairs are evaluated here for the first and only time. The temperature comes from validation
    pairs, and the scale of scores from training pairs.
    """
    # The scale comes from training pairs, so that the test pairs influence no number of the reward.
    train_seeds = [seed for label in data.train for seed in (label.winner, label.loser)]
    scores = torch.tensor(list(score_seeds(model, data.store, train_seeds).values()), dtype=torch.float64)
    val_scores = score_seeds(
        model, data.store, [seed for label in data.val for seed in (label.winner, label.loser)]
    )
    # Fitted on validation pairs, since training pairs would give a temperature that is too small.
    temperature = fit_temperature(margins(val_scores, data.val))
    return {
        "test": evaluate(model, data.store, splits.test, temperature),
        "val": evaluate(model, data.store, splits.val, temperature),
        "temperature": temperature,
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "splits": splits.counts(),
        "best_epoch": states[0].best_epoch + 1,
        "epochs": states[0].epoch,
        "members": (
            [evaluate(state.model, data.store, splits.val, temperature) for state in states]
            if len(states) > 1
            else []
        ),
        "seconds_training": sum(record["seconds"] for state in states for record in state.history),
        "preset": settings.train.preset,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": settings.train.seed,
    }


TRAINING: Mode[RewardRun] = Mode(
    name="reward",
    help="Train a reward on preference labels.",
    settings=RewardRun,
    open=open_training,
    work=train_and_judge,
    record=record,
    shown=RewardRun.to_dict,
    changes=None,
)
