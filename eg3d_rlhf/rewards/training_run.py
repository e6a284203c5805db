"""A whole reward training: labels and a generator in; a stored reward, its test figures and its learning
curves out.
"""

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
    evaluate_unpaired,
    fit_temperature,
    margins,
    ordered_by,
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

# in the run's folder: of the first member; figures of the held-out pairs
STATE = "state.pt"
REPORT = "report.json"
KEPT = "labels.jsonl"  # the labels of a growing source, as they were when the run began
MEMBER_STRIDE = 1000  # between the seeds of an ensemble's members


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What the settings of a training name, read and found to fit."""

    labels: list[Preference]
    unpaired: list[UnpairedPreference]
    splits: Splits
    generators: list[LoadedGenerator]  # the first is --network's
    observation: Observation
    psi: float


def open_training(settings: RewardRun, run: Run) -> Opened:
    """Labels, generators and what is read of their shapes.

    Raises: ValueError or FileNotFoundError for those that do not fit.
    """
    labels = read_labels(settings.labels, run.folder if run.resumed else None, run.ranks)
    unpaired = [] if settings.unpaired is None else load_unpaired(settings.unpaired)
    refuse_held_out(
        (seed for label in labels for seed in (label.winner, label.loser)),
        f"--labels={settings.labels.settings['labels']}",
    )
    refuse_held_out((label.seed for label in unpaired), f"--unpaired={settings.unpaired}")
    generators = open_generators(settings, [*labels, *unpaired], run.device)
    stated = common_value([*labels, *unpaired], "psi")
    if settings.psi is not None and stated is not None and abs(settings.psi - stated) > 1e-6:
        raise ValueError(f"--set psi: expected the labels' own {stated}, got {settings.psi}. Leave it out.")
    psi = next((value for value in (settings.psi, stated) if value is not None), 1.0)
    judged = on_wrong_faces(labels, settings.split_seed) if settings.wrong_faces else labels
    observation = what_is_read(settings, generators)
    splits = split_by_seed(judged, settings.fractions, settings.split_seed)
    # a mistake leaves no folder behind
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
    """The generators that drew the labelled shapes, --network's first.

    Raises: ValueError for labels of another one, or of none.
    """
    generators = [load_generator(source, device) for source in (settings.network, *settings.more_networks)]
    if settings.any_generator and len(generators) == 1:
        return generators
    if settings.any_generator:
        raise ValueError(
            "--set any_generator: expected one --network, got more_networks as well. Leave one of the two"
            " out."
        )
    hashes = [g.hash for g in generators]
    counts = Counter(label.generator for label in labels)
    strange = [name for name in counts if name not in hashes and not (name is None and len(generators) == 1)]
    if strange:
        names = ", ".join(f"{h[:12]}..." for h in hashes)
        wrong = strange[0]
        got = (
            f"{counts[wrong]} labels that name no generator"
            if wrong is None
            else f"{counts[wrong]} labels of {wrong[:12]}..."
        )
        raise ValueError(
            f"labels: expected judgements of generator {names}, got {got}. Pass the labels' --network, --set"
            " more_networks=FILE for a second one, or --set any_generator=true if the seeds mean the same"
            " shapes; or label this one's: eg3d-rlhf label synthetic --out=FILE."
        )
    return generators


def what_is_read(settings: RewardRun, generators: Sequence[LoadedGenerator]) -> Observation:
    """What the reward observes: as its preset says, or the run.

    Raises: ValueError where it would read generators differently.
    """
    given = {"resolution": settings.resolution, "crop": settings.crop, "points": settings.points}
    observe = {
        **preset(settings.train.preset, settings.observation).observe,
        **{k: v for k, v in given.items() if v is not None},
    }
    first, *others = (observation_of(settings.observation, g.generator, **observe) for g in generators)
    for other, generator in zip(others, generators[1:], strict=True):
        if other != first:
            raise ValueError(
                f"--set more_networks={generator.path}: expected bounds as --network's, got others. Leave it"
                " out."
            )
    return first


def read_labels(source: LabelSource, resumed: Path | None = None, ranks: Ranks = SINGLE) -> list[Preference]:
    """The labels of a source; a run that goes on in folder `resumed` gets those it began with. All ranks get
    rank 0's.

    Raises: as the source.
    """
    if source.file is not None:
        return source.read()
    if resumed is not None and (resumed / KEPT).is_file():
        return load_labels(resumed / KEPT)
    # somebody may have answered between two ranks' reading
    records = ranks.broadcast([label.to_dict() for label in source.read()])
    return [Preference.from_dict(record) for record in records]


def train_and_judge(settings: RewardRun, opened: Opened, run: Run) -> None:
    """Train, choose the epoch on validation pairs, score the test pairs once, write everything, and say how
    well it orders them.

    Ranks draw shapes, train and score validation pairs together; rank 0 alone tests and writes.
    Writes reward.safetensors and .json, report.json, curves.json and .png, stats.jsonl,
    training_options.json, state.pt; also labels.jsonl when they come from a store, which may go on growing.
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
    if len(generators) > 1:
        splits, shapes = numbered(splits)
    single = split_unpaired(unpaired, splits, settings.fractions, settings.split_seed)
    learns = bool(settings.train.weights.on_pairs) or not unpaired
    few = too_few(splits.counts(), settings.fractions) if learns else ""
    if unpaired and not few:
        few = too_few_shapes(
            *(sum(label.preferred is kind for label in single["test"]) for kind in (True, False))
        )
    if few and run.ranks.main:
        print(f"Warning: {few}", file=sys.stderr, flush=True)
    data = collect_observations(settings, opened, splits, single, shapes, run.ranks)
    states, start = _train(settings, run, data)
    run.ranks.barrier()
    leave()  # the others need not wait for the figures
    if not run.ranks.main:
        return
    model: Network = states[0].model
    if len(states) > 1:
        observed = untuned(generator.generator, opened.observation, psi, settings.cutoff, settings.slab_batch)
        model = combine([state.model for state in states], settings.aggregate, settings.strength, observed)
    report = assess(settings, model, states, data, splits) | {"too_few": few}
    if (
        isinstance(opened.observation, SigmaSlab)
        and not shapes
        and any(label.clean is not None for label in splits.test)
    ):
        report["test_by_volume"] = ordered_by(volumes(settings, opened, splits.test), splits.test)
    learnt = (labels if settings.labels.file != settings.unpaired else [], unpaired)
    report["labels_file"], report["labels_sha256"] = (
        settings.labels.name,
        "+".join(labels_hash(part) for part in learnt if part),
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
    """Share of the slab that each labelled shape fills, by seed: slabs themselves are on each shape's own
    scale.
    """
    generator = opened.generators[0].generator
    observation = opened.observation
    assert isinstance(observation, SigmaSlab)
    seeds = list(dict.fromkeys(seed for label in labels for seed in (label.winner, label.loser)))
    filled: dict[int, float] = {}
    for start in range(0, len(seeds), settings.slab_batch):
        part = seeds[start : start + settings.slab_batch]
        density = generator.field(ws_of_seeds(generator, part, opened.psi, settings.cutoff)).density_grid(
            observation.spec
        )
        filled.update(
            zip(part, (density > generator.level).flatten(1).double().mean(dim=1).tolist(), strict=True)
        )
    return filled


def lines_of(report: dict, path: Path) -> Iterator[str]:
    """What a report says, line by line. Args: path: of the reward."""
    test = report["test"]
    titles = {
        "labels": "test pairs ordered as labelled",
        "clean": "test pairs ordered as without label noise",
        "apart": f"those whose volume errors differ by at least {APART}",
    }
    by_volume = report.get("test_by_volume", {})
    for name, title in titles.items():
        if name in test:
            low, high = test[name]["interval_95"]
            counts = f"{test[name]['correct']}/{test[name]['n']} = {test[name]['accuracy']:.3f}"
            alone = (
                f"; by the slab's volume alone {by_volume[name]['accuracy']:.3f}" if name in by_volume else ""
            )
            yield f"{title}: {counts}, 95 % interval {low:.3f} to {high:.3f}{alone}"
    if "unpaired" in report:
        single = report["unpaired"]["test"]
        good, others = single["n"]
        low, high = single["auc_interval_95"]
        kinds = f"{good} preferred, {others} others"
        yield (
            f"unpaired test labels: AUC {single['auc']:.3f} ({kinds}), 95 % interval {low:.3f} to {high:.3f}"
        )
    if report["too_few"]:
        yield report["too_few"].replace("below", "above")
    yield f"expected calibration error {test['calibration_error']:.3f}; reward written to {path}"


def _bar(total: int, what: str, unit: str, ranks: Ranks) -> Callable[[int], None]:
    """A progress bar with remaining time on stderr, on rank 0; returns its advance."""
    bar = tqdm(total=total, desc=what, unit=unit, disable=not ranks.main)
    return lambda done: bar.update(done) and None


def collect_observations(
    settings: RewardRun,
    opened: Opened,
    splits: Splits,
    single: Mapping[str, Sequence[UnpairedPreference]],
    shapes: list[tuple[str, int]],
    ranks: Ranks = SINGLE,
) -> TrainData:
    """What is seen of every labelled seed at `psi` and of the training anchors at 0.25, drawn or read from
    the cache.

    Args: single: unpaired labels by split.
    shapes: generator and seed of the numbers in the splits, where there are several generators; anchors are
    the first one's.
    """
    generators = opened.generators
    observation = opened.observation
    psi = opened.psi
    cutoff = settings.cutoff

    def filled(
        seeds: Iterable[int], psi: float, what: str, generator: LoadedGenerator = generators[0]
    ) -> ObservationCache:
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
                unique, settings.slab_batch, _bar(-(-len(unique) // ranks.world), what, "shape", ranks), ranks
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
    wanted = settings.train.reference_samples
    anchors = anchor_seeds(wanted, settings.fractions, exclude=labelled)["train"] if wanted else ()
    if shapes:
        parts = {
            g.hash: filled([seed for name, seed in shapes if name == g.hash], psi, "shapes", g)
            for g in generators
        }
        store = ObservationCache(
            lambda numbers: torch.cat(
                [parts[name].take([seed]) for name, seed in (shapes[n] for n in numbers)]
            )
        )
        store.fill(seeds, settings.slab_batch)
    else:
        store = filled(seeds, psi, "shapes")
    anchor_store = filled(anchors, ANCHOR_PSI, "anchors") if anchors else None
    return TrainData(
        train=splits.train,
        val=splits.val,
        store=store,
        anchors=anchors,
        anchor_store=anchor_store,
        observation=observation,
        unpaired=single["train"],
        unpaired_val=single["val"],
    )


def _train(settings: RewardRun, run: Run, data: TrainData) -> tuple[list[TrainState], str]:
    """Train every member of the ensemble, each from its own seed; the first member's is the run's.

    Returns: the members, and the SHA-256 of the network that they went on from, '' where there is none. It
        counts as member 0.
    """
    shared = settings.shared_start or settings.aggregate == AVERAGE
    options = settings.train
    advance = _bar(
        data.steps(options) * options.epochs * (settings.members + shared), "training", "step", run.ranks
    )

    def member(
        number: int, options: TrainOptions, name: str, start: RewardNetwork | None = None
    ) -> TrainState:
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

    start = member(0, replace(options, bootstrap=False), "state-start.pt").model if shared else None
    digest = "" if start is None else state_hash(start)
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
    """Figures of validation and test pairs, the test pairs for the first and only time; temperature and score
    scale from elsewhere.
    """
    train_seeds = [seed for label in data.train for seed in (label.winner, label.loser)]
    scores = torch.tensor(list(score_seeds(model, data.store, train_seeds).values()), dtype=torch.float64)
    val_scores = score_seeds(
        model, data.store, [seed for label in data.val for seed in (label.winner, label.loser)]
    )
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
    help="Train a reward on labels.",
    settings=RewardRun,
    open=open_training,
    work=train_and_judge,
    record=record,
    shown=RewardRun.to_dict,
    changes=None,
)
