"""A whole reward training: labels and a generator in; a stored reward, its test figures and its learning curves out."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from eg3d_rlhf.core.cli import ASSETS
from eg3d_rlhf.core.seeds import refuse_held_out
from eg3d_rlhf.experiments.run import Run, recorded
from eg3d_rlhf.generators import LoadedGenerator, load_generator
from eg3d_rlhf.preferences.dataset import ANCHOR_PSI, Splits, anchor_seeds, common_value, numbered, on_wrong_faces, split_by_seed
from eg3d_rlhf.preferences.labels import LabelSource, Preference, labels_hash, load_labels, write_labels
from eg3d_rlhf.preferences.unpaired import UnpairedPreference, load_unpaired, split_unpaired
from eg3d_rlhf.rewards.amounts import too_few, too_few_shapes
from eg3d_rlhf.rewards.cache import ObservationCache, cache_name, observe_seeds, untuned
from eg3d_rlhf.rewards.ensembles import AVERAGE, CHOICES, check_joining, combine
from eg3d_rlhf.rewards.evaluation import (
    Network,
    collect_curves,
    evaluate,
    evaluate_unpaired,
    fit_temperature,
    margins,
    plot_curves,
    score_seeds,
)
from eg3d_rlhf.rewards.networks import RewardNetwork, preset
from eg3d_rlhf.rewards.observations import Observation, observation_of
from eg3d_rlhf.rewards.reward import Reward
from eg3d_rlhf.rewards.train import TrainData, TrainOptions, TrainState, new_network, train_reward
from training.config import check_knobs, knob
from training.distributed import SINGLE, Ranks, launch_identity, leave
from training.networks import state_hash
from training.storage import write_atomic

BUNDLED_LABELS = ASSETS / "labels.jsonl"
KEPT = "labels.jsonl"  # the labels of a growing source, as they were when the run began
MEMBER_STRIDE = 1000  # between the seeds of an ensemble's members


@dataclass(frozen=True, kw_only=True)
class RewardRun:
    """What a run reads and where it writes; `train` decides the rest."""

    out: Path  # folder for everything written
    network: Path | None = knob(
        None, "Generator of the labelled seeds: a network file or a run folder.", "Data", metavar="FILE", shown="the bundled generator"
    )
    more_networks: tuple[Path, ...] = ()  # of further generators that labels name
    labels: LabelSource = LabelSource.of_file(BUNDLED_LABELS)
    unpaired: Path | None = knob(None, "Labels of single shapes, .jsonl.", "Data", metavar="FILE", shown="none")
    observation: str = "sigma"  # kind of what the reward reads
    resolution: int | None = knob(
        None, "Of the observation: grid points per axis of the whole cube, before the crop; pixels.", "Data", metavar="POINTS", low=16,
        high=512, shown="of a slab, 256 for paper, else 64",
    )
    points: int | None = knob(
        None, "Of an observation of points: points of a cloud.", "Data", low=1, high=16384, shown="512, and 2048 for published-points"
    )
    crop: tuple[float, float, float, float, float, float] | None = None  # of the observation: trimmed shares (x, x, y, y, z, z)
    psi: float | None = knob(None, "Truncation of the labelled shapes.", "Data", low=0, high=2, shown="the labels', else 1")
    cutoff: int = knob(14, "Layers that truncation reaches.", "Data", metavar="LAYERS", low=0, shown="14")
    any_generator: bool = False  # accept labels made with another generator
    wrong_faces: bool = False  # a control: each label is about other shapes than those that are read
    fractions: tuple[float, float, float] = (0.70, 0.15, 0.15)  # train, val, test shares of the labels
    split_seed: int = knob(0, "Which labels are held out, whatever --seed is.", "Data", low=0, shown="0")
    cache: Path | None = None  # folder that keeps observations between runs; None keeps them in RAM
    slab_batch: int = knob(16, "Shapes drawn at once.", "Run", low=1, shown="16")
    members: int = knob(1, "Train so many networks with different seeds, and join them.", "Network", low=1, shown="1")
    aggregate: str | None = knob(
        None, "What members become. Their scores are standardised, but for the default; warm is the mean of their weights.", "Network",
        choices=CHOICES, shown="the mean of raw scores",
    )
    strength: float | None = knob(
        None, "Of the aggregate: k of lcb, lambda of uwo, beta of softmin.", "Network", above=0, shown="1, 0.5, 0.5"
    )
    shared_start: bool = False  # members go on from one network that is trained first
    resume: bool = False  # continue the state in `out`
    device: str = "cpu"
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self):
        check_knobs(self)
        check_joining(self.aggregate, self.strength)
        if self.unpaired is not None and self.more_networks:
            raise ValueError(f"--unpaired: expected labels of one generator, got --more-network={self.more_networks[0]}. Leave one out.")
        if self.unpaired is not None and self.wrong_faces:
            raise ValueError(f"--wrong-faces: expected pairs alone, got --unpaired={self.unpaired}. Leave one of the two out.")
        if self.members < 2 and (self.aggregate is not None or self.shared_start):
            flag = "--shared-start" if self.aggregate is None else f"--aggregate={self.aggregate}"
            raise ValueError(f"--members: expected 2 or more with {flag}, got {self.members}. Five are usual.")

    def to_dict(self) -> dict:
        """Plain JSON values."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k != "labels"}
        values["more_networks"] = [str(path) for path in self.more_networks]
        return {**values, "network": values["network"] or "bundled", **self.labels.settings}

    def read_unpaired(self) -> list[UnpairedPreference]:
        """Labels of single shapes; none where there is no file."""
        return [] if self.unpaired is None else load_unpaired(self.unpaired)


@dataclass(frozen=True)
class Listener:
    """Hooks for progress: a bar over an iterable's length, a line per epoch, and warnings."""

    bar: Callable[[int, str], Callable[[int], None]] = lambda total, what: lambda done: None  # (total, what) -> advance(by)
    epoch: Callable[[dict], None] = lambda record: None
    warn: Callable[[str], None] = lambda text: None


def run_reward_training(run: RewardRun, listen: Listener | None = None, ranks: Ranks = SINGLE) -> dict | None:
    """Train, choose the epoch on validation pairs, score the test pairs once, write everything; returns the report, on rank 0.

    Ranks draw shapes, train and score validation pairs together; rank 0 alone tests and writes.
    Writes reward.safetensors and .json, report.json, curves.json and .png, stats.jsonl, training_options.json, state.pt; also labels.jsonl
    when they come from a store, which may go on growing.
    Raises: ValueError or FileNotFoundError for labels, networks and folders that do not fit; StoppedError after SIGTERM or SIGINT.
    """
    listen = listen or Listener()
    begun = recorded(run.out) if ranks.main else {}
    if ranks.restarts and ranks.broadcast(begun.get("launch") == launch_identity()):
        run = replace(run, resume=True)
    if ranks.broadcast((run.out / "state.pt").exists()) and not run.resume:
        raise ValueError(f"reward training: expected a new folder, got {run.out} with a run in it. Pass --resume, or another --out.")
    labels = read_labels(run.labels, run.out if run.resume else None, ranks)
    unpaired = run.read_unpaired()
    refuse_held_out((seed for label in labels for seed in (label.winner, label.loser)), f"--labels={run.labels.settings['labels']}")
    refuse_held_out((label.seed for label in unpaired), f"--unpaired={run.unpaired}")
    generators = open_generators(run, [*labels, *unpaired])
    stated = common_value([*labels, *unpaired], "psi")
    if run.psi is not None and stated is not None and abs(run.psi - stated) > 1e-6:
        raise ValueError(f"--psi: expected the labels' own {stated}, got {run.psi}. Leave it out.")
    psi = next((value for value in (run.psi, stated) if value is not None), 1.0)
    judged = on_wrong_faces(labels, run.split_seed) if run.wrong_faces else labels
    observation, splits = what_is_read(run, generators), split_by_seed(judged, run.fractions, run.split_seed)
    new_network(run.train, run.observation).check(observation.shape)  # a mistake leaves no folder behind
    if ranks.main:
        run.out.mkdir(parents=True, exist_ok=True)
    inputs = {"network": generators[0].path, **{f"network {i + 2}": g.path for i, g in enumerate(generators[1:])}}
    inputs |= {name: file for name, file in (("labels", run.labels.file), ("unpaired", run.unpaired)) if file is not None}
    with Run(run.out, run.to_dict(), inputs, ranks=ranks) as record:
        if run.resume and ranks.broadcast(bool(begun)):
            record.resume(free=None)  # the state's file knows its options
        else:
            record.begin()
        if ranks.main and run.labels.file is None and not (run.out / KEPT).is_file():
            write_labels(run.out / KEPT, labels)
        return _run_locked(run, record, labels, unpaired, splits, generators, observation, psi, listen, ranks)


def open_generators(run: RewardRun, labels: Sequence[Preference | UnpairedPreference]) -> list[LoadedGenerator]:
    """The generators that drew the labelled shapes, the run's --network first.

    Raises: ValueError for labels of another one, and, where there are several, labels that name none.
    """
    found = [load_generator(source, run.device) for source in (run.network, *run.more_networks)]
    if run.any_generator and len(found) == 1:
        return found
    if run.any_generator:
        raise ValueError("--any-generator: expected one --network, got --more-network as well. Leave one of the two out.")
    hashes, counts = [g.hash for g in found], Counter(label.generator for label in labels)
    strange = [name for name in counts if name not in hashes and not (name is None and len(found) == 1)]
    if strange:
        names, wrong = ", ".join(f"{h[:12]}..." for h in hashes), strange[0]
        got = f"{counts[wrong]} labels that name no generator" if wrong is None else f"{counts[wrong]} labels of {wrong[:12]}..."
        raise ValueError(
            f"labels: expected judgements of generator {names}, got {got}. Pass the labels' --network, --more-network for a second "
            "one, or --any-generator if the seeds mean the same shapes."
        )
    return found


def what_is_read(run: RewardRun, generators: Sequence[LoadedGenerator]) -> Observation:
    """What the reward observes: as its preset says, or the run. Raises: ValueError where it would read generators differently."""
    given = {"resolution": run.resolution, "crop": run.crop, "points": run.points}
    settings = {**preset(run.train.preset, run.observation).observe, **{k: v for k, v in given.items() if v is not None}}
    first, *others = (observation_of(run.observation, g.generator, **settings) for g in generators)
    for other, generator in zip(others, generators[1:], strict=True):
        if other != first:
            raise ValueError(f"--more-network={generator.path}: expected bounds as --network's, got others. Leave it out.")
    return first


def read_labels(source: LabelSource, resumed: Path | None = None, ranks: Ranks = SINGLE) -> list[Preference]:
    """The labels of a source; a run that goes on in folder `resumed` gets those it began with. All ranks get rank 0's.

    Raises: as the source.
    """
    if source.file is not None:
        return source.read()
    if resumed is not None and (resumed / KEPT).is_file():
        return load_labels(resumed / KEPT)
    found = source.read()
    records = ranks.broadcast([label.to_dict() for label in found])  # somebody may have answered between two ranks' reading
    return [Preference.from_dict(record) for record in records]


def _run_locked(
    run: RewardRun, record: Run, labels: list[Preference], unpaired: list[UnpairedPreference], splits: Splits,
    generators: list[LoadedGenerator], observation: Observation, psi: float, listen: Listener, ranks: Ranks,
) -> dict | None:
    generator = generators[0]
    shapes: list[tuple[str, int]] = []
    if len(generators) > 1:
        splits, shapes = numbered(splits)
    single = split_unpaired(unpaired, splits, run.fractions, run.split_seed)
    learns = bool(run.train.weights.on_pairs) or not unpaired
    few = too_few(splits.counts(), run.fractions) if learns else ""
    if unpaired and not few:
        few = too_few_shapes(*(sum(label.preferred is kind for label in single["test"]) for kind in (True, False)))
    if few:
        listen.warn(few)
    data = collect_observations(run, splits, single, shapes, generators, observation, psi, listen, ranks)
    states, start = _train(run, record, data, listen, ranks)
    ranks.barrier()
    leave()  # the others need not wait for the figures
    if not ranks.main:
        return None
    model: Network = states[0].model
    if len(states) > 1:
        observed = untuned(generator.generator, observation, psi, run.cutoff, run.slab_batch)
        model = combine([state.model for state in states], run.aggregate, run.strength, observed)
    report = assess(run, model, states, data, splits) | {"too_few": few}
    digest = "+".join(labels_hash(found) for found in (labels if run.labels.file != run.unpaired else [], unpaired) if found)
    report |= {"labels_file": run.labels.name, "labels_sha256": digest, "generator": generator.hash, "psi": psi}
    if unpaired:
        counts = {name: len(part) for name, part in single.items()} | {"unused": len(unpaired) - sum(map(len, single.values()))}
        figures = {name: evaluate_unpaired(model, states[0].model, data.store, single[name]) for name in ("val", "test")}
        report["unpaired"] = {"file": run.unpaired and run.unpaired.name, "splits": counts, **figures}
    provenance = {
        "generator": generator.hash, "architecture": generator.generator.architecture, "psi": psi, "truncation_cutoff": run.cutoff,
        "labels": report["labels_sha256"], "preset": run.train.preset, "seed": run.train.seed, "temperature": report["temperature"],
        "test_accuracy": report["test"]["labels"], "test_accuracy_clean": report["test"].get("clean"),
        "score_mean": report["score_mean"], "score_std": report["score_std"], **({"start": start} if start else {}),
    }  # fmt: skip
    if run.wrong_faces:
        provenance["wrong_faces"] = True
    if len(generators) > 1:
        provenance["generators"] = [g.hash for g in generators]
    Reward(observation, model, provenance).save(run.out / "reward.safetensors")
    write_atomic(run.out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    context = {"pairs": len(splits.train), "validation": len(splits.val), "seed": run.train.seed, "preset": run.train.preset}
    context |= {"member": f"1 of {len(states)}", "generator": generator.hash[:8]}
    record.write("curves.json", collect_curves(states[0].history, states[0].best_epoch, context))
    plot_curves(run.out / "curves.json", run.out / "curves.png")
    return report


def collect_observations(
    run: RewardRun, splits: Splits, single: Mapping[str, Sequence[UnpairedPreference]], shapes: list[tuple[str, int]],
    generators: list[LoadedGenerator], observation: Observation, psi: float, listen: Listener, ranks: Ranks,
) -> TrainData:
    """What is seen of every labelled seed at `psi` and of the training anchors at 0.25, drawn or read from the cache.

    Args: single: unpaired labels by split.
    shapes: generator and seed of the numbers in the splits, where there are several generators; anchors are the first one's.
    """

    def filled(seeds: Iterable[int], psi: float, what: str, generator: LoadedGenerator = generators[0]) -> ObservationCache:
        unique = list(dict.fromkeys(seeds))
        cache = None if run.cache is None else run.cache / cache_name(generator.hash, observation, psi, run.cutoff)
        store = ObservationCache(observe_seeds(generator.generator, observation, psi=psi, cutoff=run.cutoff), cache)
        if store.fill(unique, run.slab_batch, listen.bar(-(-len(unique) // ranks.world), what), ranks) and ranks.main:
            store.save()
        return store

    seeds = [seed for part in (splits.train, splits.val, splits.test) for label in part for seed in (label.winner, label.loser)]
    seeds += [label.seed for part in single.values() for label in part]
    labelled = [seed for _, seed in shapes] or seeds
    anchors = anchor_seeds(run.train.anchors, run.fractions, exclude=labelled)["train"] if run.train.anchors else ()
    if shapes:
        parts = {g.hash: filled([seed for name, seed in shapes if name == g.hash], psi, "shapes", g) for g in generators}
        store = ObservationCache(lambda numbers: torch.cat([parts[name].take([seed]) for name, seed in (shapes[n] for n in numbers)]))
        store.fill(seeds, run.slab_batch)
    else:
        store = filled(seeds, psi, "shapes")
    anchor_store = filled(anchors, ANCHOR_PSI, "anchors") if anchors else None
    return TrainData(
        train=splits.train, val=splits.val, store=store, anchors=anchors, anchor_store=anchor_store, observation=observation,
        unpaired=single["train"], unpaired_val=single["val"],
    )


def _train(run: RewardRun, record: Run, data: TrainData, listen: Listener, ranks: Ranks) -> tuple[list[TrainState], str]:
    """Train every member of the ensemble, each from its own seed; the first member's is the run's.

    Returns: the members, and the SHA-256 of the network that they went on from, '' where there is none. It counts as member 0.
    """
    shared = run.shared_start or run.aggregate == AVERAGE
    advance = listen.bar(data.steps(run.train) * run.train.epochs * (run.members + shared), "training")

    def train(number: int, options: TrainOptions, name: str, start: RewardNetwork | None = None) -> TrainState:
        def on_epoch(epoch: dict) -> None:
            record.stats({"member": number, **epoch})
            if ranks.main:
                listen.epoch({"member": number, **epoch})

        return train_reward(
            data, options, device=run.device, state_file=run.out / name, ranks=ranks, on_step=lambda: advance(1), on_epoch=on_epoch,
            start=start,
        )

    start = train(0, replace(run.train, bootstrap=False), "state-start.pt").model if shared else None
    digest = "" if start is None else state_hash(start)
    each = [replace(run.train, seed=run.train.seed + MEMBER_STRIDE * member, start=digest) for member in range(run.members)]
    names = ["state.pt", *(f"state-{member + 1}.pt" for member in range(1, run.members))]
    return [train(i + 1, options, name, start) for i, (options, name) in enumerate(zip(each, names, strict=True))], digest


def assess(run: RewardRun, model: Network, states: list[TrainState], data: TrainData, splits: Splits) -> dict:
    """Figures of validation and test pairs, the test pairs for the first and only time; temperature and score scale from elsewhere."""
    train_seeds = [seed for label in data.train for seed in (label.winner, label.loser)]
    scores = torch.tensor(list(score_seeds(model, data.store, train_seeds).values()), dtype=torch.float64)
    val_scores = score_seeds(model, data.store, [seed for label in data.val for seed in (label.winner, label.loser)])
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
        "members": [evaluate(state.model, data.store, splits.val, temperature) for state in states] if len(states) > 1 else [],
        "seconds_training": sum(record["seconds"] for state in states for record in state.history),
        "preset": run.train.preset,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": run.train.seed,
    }
