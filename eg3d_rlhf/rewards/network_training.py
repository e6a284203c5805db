"""Train a reward network on labelled pairs, on unpaired labels, or on both.

Training uses the paper's losses and reference samples, stops early by the accuracy on validation pairs, and
resumes exactly. Source: arXiv 2606.27305 (2026), reward training. The test split is never read here.
Letters: N observations (winners, losers, reference samples in blocks), P pairs, B blocks, U unpaired labels,
M entries of an embedding, W ranks.
"""

import contextlib
import io
import json
import math
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.process import StoppedError, StopRequest
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.losses import PreferenceLoss, UnpairedOutput, median_distance, reconstruction_loss
from eg3d_rlhf.preferences.unpaired import UnpairedPreference, batches_of, redrawn
from eg3d_rlhf.rewards.cache import ObservationCache
from eg3d_rlhf.rewards.evaluation import auc, log_loss, margins, score_seeds
from eg3d_rlhf.rewards.networks import RewardNetwork, RewardOutput, builder_of
from eg3d_rlhf.rewards.observations import Observation, SigmaSlab
from eg3d_rlhf.rewards.presets import preset
from eg3d_rlhf.rewards.settings import TrainOptions
from training.distributed import SINGLE, Ranks
from training.phases import RowDraws, sum_over_ranks
from training.storage import checksum, write_atomic

# The file from which a reward training resumes. It holds everything that changes during training, and the
# options of the run.


def save_state(path: Path, state: "TrainState", options: "TrainOptions") -> None:
    """Write everything that a resumed run needs, atomically."""
    values = {
        "epoch": state.epoch,
        "history": state.history,
        "best_epoch": state.best_epoch,
        "options": asdict(options),
    }
    # Without unpaired labels there is no bandwidth, and the key is left out, as in earlier files.
    values |= {} if state.bandwidth is None else {"bandwidth": state.bandwidth}
    tensors = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "best": state.best,
    }
    buffer = io.BytesIO()
    # JSON inside a tensor file: torch.load with weights_only=True reads tensors and strings, but runs no
    # code.
    torch.save({**tensors, "plain": json.dumps(values), "sha256": checksum(_flat(tensors), values)}, buffer)
    write_atomic(path, buffer.getvalue())


def _flat(value, name: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors in nested dictionaries and lists, by path."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    tensors = {name: value} if isinstance(value, torch.Tensor) else {}
    for key, part in items:
        tensors.update(_flat(part, f"{name}/{key}"))
    return tensors


def load_state(path: Path, state: "TrainState", options: "TrainOptions") -> None:
    """Read a state on rank 0, from which every rank continues.

    Raises: ValueError if the file is damaged or foreign, or if its run had other options.
    """
    content = (
        {"file": torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())}
        if state.ranks.main
        else None
    )
    # Ranks on other machines may not see the file.
    data = state.ranks.broadcast_named(content)["file"]
    try:
        stored = torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
        values = json.loads(stored["plain"])
        if stored.pop("sha256") != checksum(_flat(stored), values):
            raise ValueError("the checksum does not match")
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError) as error:
        cause = type(error).__name__
        raise ValueError(
            f"train_reward({path.name}): expected a training state, got an invalid file ({cause}). Delete"
            " it to start training again."
        ) from error
    # Through JSON, so that tuples become lists, as in the file.
    requested = json.loads(json.dumps(asdict(options)))
    started = version_0_1.settings(values["options"])
    changed = sorted(name for name, value in requested.items() if started.get(name) != value)
    if changed:
        raise ValueError(
            f"train_reward({path.name}): the run was started with other {', '.join(changed)}. Use the"
            " options of the run, or delete the file to start training again."
        )
    state.model.load_state_dict(stored["model"])
    state.optimizer.load_state_dict(stored["optimizer"])
    state.epoch = values["epoch"]
    state.history = values["history"]
    state.best_epoch = values["best_epoch"]
    state.best = stored["best"]
    state.bandwidth = values.get("bandwidth")


# Division of a training step among ranks: the items of each rank, the values that ranks exchange, and random
# numbers that equal those of a single rank.


@dataclass(frozen=True)
class Share:
    """This rank's items of a step: every W-th item.

    If a short last step has no item for a rank, the rank takes the first item with weight 0, because all
    ranks must take part in the exchange of gradients.
    """

    count: int  # items of the step, over all ranks
    ranks: Ranks = SINGLE

    @property
    def rows(self) -> list[int]:
        """Indices of this rank's items in the step."""
        return list(range(self.count))[self.ranks.rank :: self.ranks.world] or [0][: self.count]

    @property
    def weight(self) -> float:
        """Share of the step's mean that a mean over `rows` contributes, 0..1."""
        return len(range(self.ranks.rank, self.count, self.ranks.world)) / max(self.count, 1)

    def of_blocks(self, drawn: np.ndarray) -> np.ndarray:
        """Select the entries of these items from values of B blocks of `count` items.

        [B * count] -> [B * len(rows)].
        """
        return drawn.reshape(-1, self.count)[:, self.rows].reshape(-1)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Collect values [len(rows), ...] of every rank into those of the complete step, [count, ...].

        Differentiable only in the values of this rank.
        """
        if self.ranks.world == 1:
            return values
        gathered = values.new_zeros(self.count, *values.shape[1:])
        rows = torch.tensor(self.rows, device=values.device)
        # A rank without items must not overwrite the first item, which belongs to rank 0.
        if not self.weight:
            return self.ranks.sum_(gathered, "exchange embeddings")
        gathered[rows] = values.detach()
        # The sum has no graph; index_copy puts this rank's values with their graph in their places.
        return self.ranks.sum_(gathered, "exchange embeddings").index_copy(0, rows, values)

    def update(
        self, model: torch.nn.Module, figures: dict[str, float], stop: bool, weights: Mapping[str, float]
    ) -> tuple[dict[str, float], bool]:
        """Sum gradients over ranks.

        Args: weights: share that this rank's figure contributes to the mean, by figure; else `weight`.
        Returns: the step's mean figures, and whether any rank was asked to stop.
        """
        if self.ranks.world == 1:
            return figures, stop
        real = float(self.weight > 0)
        # 'strength' is a norm over samples, so its squares are summed. The other figures are means.
        parts = [
            value**2 * real if name == "strength" else value * weights.get(name, self.weight)
            for name, value in figures.items()
        ]
        sums = torch.tensor(
            [*parts, float(stop)], dtype=torch.float32, device=next(model.parameters()).device
        )
        # Figures and the request to stop travel with the gradients, in one exchange.
        sum_over_ranks(self.ranks, model.parameters(), [sums])
        *totals, stops = sums.tolist()
        return {k: v**0.5 if k == "strength" else v for k, v in zip(figures, totals, strict=True)}, stops > 0


class Step:
    """The pairs and the unpaired labels of a step, with this rank's shares of them."""

    def __init__(self, items: Sequence[Preference], shapes: Sequence[UnpairedPreference], ranks: Ranks):
        self.items = items
        self.shapes = shapes
        self.ranks = ranks
        self.of_items = Share(len(items), ranks)
        self.of_shapes = Share(len(shapes), ranks)

    def draws(self, rows: int) -> contextlib.AbstractContextManager:
        """Return a context in which random numbers equal those of the complete step on one rank.

        Args: rows: number of observations of pairs in the forward pass. They come block by block, and the
            observations of unpaired labels follow.
        """
        if self.ranks.world == 1:
            return contextlib.nullcontext()
        blocks = rows // max(len(self.of_items.rows), 1)  # winners, losers, and perhaps reference samples
        places = [block * len(self.items) + row for block in range(blocks) for row in self.of_items.rows]
        return RowDraws(
            [*places, *(blocks * len(self.items) + row for row in self.of_shapes.rows)],
            blocks * len(self.items) + len(self.shapes),
        )


MOMENTUM = 0.9  # of the moving average of the divergence's bandwidth over steps
LEAST_BANDWIDTH = 1e-3  # if all embeddings coincide, their median distance is 0, which is no bandwidth


def new_network(options: TrainOptions, kind: str) -> RewardNetwork:
    """Create an untrained network that reads observations of `kind`.

    Raises: ValueError, FileNotFoundError if the backbone's file is missing or does not fit.
    """
    description = dict(preset(options.preset, kind).network)
    if options.backbone and "backbone" not in description:
        raise ValueError(
            f"--backbone: preset {options.preset} of {kind} has no backbone, got {options.backbone}. Remove"
            " --backbone."
        )
    return builder_of(kind)({**description, **({"backbone": options.backbone} if options.backbone else {})})


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """Data of a training."""

    train: Sequence[Preference]
    val: Sequence[Preference]
    store: ObservationCache  # observations of all labelled seeds
    anchors: Sequence[int] = ()  # seeds of the reference samples
    anchor_store: ObservationCache | None = None  # observations of the reference samples
    observation: Observation = SigmaSlab()
    unpaired: Sequence[UnpairedPreference] = ()  # for training; each has a preference
    unpaired_val: Sequence[UnpairedPreference] = ()  # for validation

    def learns_pairs(self, options: TrainOptions) -> bool:
        """Return whether steps consist of pairs.

        Otherwise they consist of unpaired labels, and pairs are used only to choose the epoch.
        """
        return options.weights.on_pairs or not self.unpaired

    def steps(self, options: TrainOptions) -> int:
        """Number of steps of an epoch."""
        if self.learns_pairs(options):
            return math.ceil(len(self.train) / options.batch)
        return math.ceil(len(self.unpaired) / options.unpaired_batch)


@dataclass
class TrainState:
    """Everything that changes during training and that a resumed run needs."""

    model: RewardNetwork
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # number of finished epochs
    history: list[dict] = field(default_factory=list)  # one record per epoch
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # state dict of the best epoch so far
    best_epoch: int = -1
    bandwidth: float | None = None  # of the divergence's kernel, as a moving average over steps
    ranks: Ranks = SINGLE  # this process among those of the run
    request: StopRequest = field(default_factory=StopRequest)


def train_reward(
    data: TrainData,
    options: TrainOptions,
    *,
    device: str | torch.device = "cpu",
    state_file: Path | None = None,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    ranks: Ranks = SINGLE,
    start: RewardNetwork | None = None,
) -> TrainState:
    """Train until `epochs` or `patience` are exhausted, and put the best epoch's weights into the model.

    Random numbers depend only on (seed, epoch), so a run that is resumed from `state_file` equals an
    uninterrupted run.

    Args:
        state_file: written after each epoch; if it exists and matches the options, training resumes from it.
        on_step, on_epoch: callbacks for progress and logs; on_epoch gets the epoch's record.
        ranks: this process among those that train together; the pairs of each step are divided among them.
        start: network from whose weights training starts; `options.start` states its hash.
    Returns: the state after training.
    Raises: ValueError if pairs are missing or `state_file` belongs to other options; StoppedError after
        SIGTERM or SIGINT.
    """
    if not data.train or not data.val:
        raise ValueError(
            f"train_reward: expected training and validation pairs, got {len(data.train)} and"
            f" {len(data.val)}. Label more pairs."
        )
    _check_unpaired(data, options)
    # Members of an ensemble differ more if each is trained on its own bootstrap sample of the labels.
    if options.bootstrap:
        drawn = np.random.default_rng([options.seed, len(data.train)]).integers(
            len(data.train), size=len(data.train)
        )
        resampled = redrawn(data.unpaired, np.random.default_rng([options.seed, len(data.unpaired), 1]))
        data = replace(data, train=[data.train[i] for i in drawn], unpaired=resampled)
    # A private random state, so that the initialisation depends only on the seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = new_network(options, data.observation.kind).to(device)
    family = torch.optim.AdamW if options.decoupled else torch.optim.Adam
    state = TrainState(
        model, family(model.parameters(), lr=options.lr, weight_decay=options.weight_decay), ranks=ranks
    )
    seeds = [seed for label in data.train for seed in (label.winner, label.loser)] + [
        label.seed for label in data.unpaired
    ]
    # Before the weights of `start`, which then also replace what was calibrated.
    model.calibrate(lambda: data.store.take(seeds, device))
    if start is not None:
        model.load_state_dict(start.state_dict())
    if state_file is not None and ranks.broadcast(state_file.is_file()):
        load_state(state_file, state, options)
    # All ranks start from the weights and buffers of rank 0.
    ranks.broadcast_((*model.parameters(), *model.buffers()))
    while state.epoch < options.epochs and state.epoch - 1 - state.best_epoch < options.patience:
        with state.request:
            record = _epoch(state, data, options, on_step)
        state.history.append(record)
        state.epoch += 1
        # max() returns the first of equal records, so a later epoch must be better to become the best one.
        if record is max(state.history, key=lambda epoch: (epoch["val_accuracy"], -epoch["val_log_loss"])):
            state.best_epoch = record["epoch"]
            state.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if state_file is not None and ranks.main:
            save_state(state_file, state, options)
        if on_epoch:
            on_epoch(record)
    model.load_state_dict(state.best)
    model.eval().requires_grad_(False)
    return state


def _check_unpaired(data: TrainData, options: TrainOptions) -> None:
    """Raise ValueError if the weights of the loss and the unpaired labels do not match."""
    used = options.weights.regression or options.weights.divergence
    kinds = {label.preferred for label in data.unpaired}
    if data.unpaired and not used:
        raise ValueError(
            "--unpaired: has no effect without --regression or --divergence above 0. Set one of them, or"
            " remove --unpaired."
        )
    if used and kinds != {True, False}:
        got = "none of one kind" if kinds else "none"
        raise ValueError(
            "--regression, --divergence: expected unpaired labels of both kinds (preferred and not"
            f" preferred), got {got}. Pass --unpaired, or label more shapes."
        )


def _epoch(
    state: TrainState, data: TrainData, options: TrainOptions, on_step: Callable[[], None] | None
) -> dict:
    """Run one epoch of training, and then evaluate the validation pairs.

    Returns: the epoch's record.
    """
    began = time.monotonic()
    # Streams depend on the seed and the epoch only, so a resumed epoch draws the same numbers. The second
    # stream serves unpaired labels: with or without them, the order of the pairs is the same.
    rng = np.random.default_rng([options.seed, state.epoch])
    draws = np.random.default_rng([options.seed, state.epoch, 1])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    steps = data.steps(options)
    shapes = batches_of(data.unpaired, options.unpaired_batch, draws)
    sums: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):  # dropout reads the global generator
        torch.manual_seed(int(rng.integers(2**62)))
        state.model.train()
        order = rng.permutation(len(data.train) if data.learns_pairs(options) else 0)
        for step in range(steps):
            if options.cosine:
                # Half a cosine over all epochs, updated at every step
                done = (state.epoch + step / steps) / options.epochs
                state.optimizer.param_groups[0]["lr"] = options.lr * 0.5 * (1 + math.cos(math.pi * done))
            items = [data.train[i] for i in order[step * options.batch : (step + 1) * options.batch]]
            # Figures are averaged over pairs, so that a short last step counts less.
            part, total = (len(items), len(order)) if items else (1, steps)
            batch = Step(items, next(shapes) if data.unpaired else [], state.ranks)
            for name, value in _step(state, batch, data, options, (rng, draws), generator).items():
                sums[name] = sums.get(name, 0.0) + value * part / total
            if on_step:
                on_step()
    correct = sums.pop("correct")
    # Dropout off for validation.
    state.model.eval()
    scores = score_seeds(
        state.model,
        data.store,
        [seed for label in data.val for seed in (label.winner, label.loser)],
        state.ranks,
    )
    margin = margins(scores, data.val)
    record = {
        "epoch": state.epoch,
        "seconds": time.monotonic() - began,
        "lr": state.optimizer.param_groups[0]["lr"],
        "loss": sums,
        "train_accuracy": correct,
        "val_accuracy": float((margin > 0).mean()),
        "val_log_loss": log_loss(margin),
    }
    if data.unpaired_val:
        scores = score_seeds(
            state.model, data.store, [label.seed for label in data.unpaired_val], state.ranks
        )
        record["val_auc"] = auc(
            *(
                [scores[label.seed] for label in data.unpaired_val if label.preferred is kind]
                for kind in (True, False)
            )
        )
    return record


def _step(
    state: TrainState,
    batch: Step,
    data: TrainData,
    options: TrainOptions,
    rngs: tuple[np.random.Generator, np.random.Generator],
    generator: torch.Generator,
) -> dict[str, float]:
    """Update the network on one batch.

    Returns: the weighted loss terms and, as `correct`, the share of pairs that are ordered as labelled.
    """
    device = next(state.model.parameters()).device
    weights = options.weights
    loss = PreferenceLoss(weights)
    terms = {}
    figures = {}
    paired = _batch(batch.items, batch.of_items, data, options, rngs[0], device) if batch.items else None
    observations = [] if paired is None else [paired[0]]
    if batch.shapes:
        observations.append(_shapes(batch.shapes, batch.of_shapes, data, options, rngs[1], device))
    rows = 0 if paired is None else len(paired[0])
    # One forward pass for pairs and unpaired labels: batch normalisation, if any, sees both.
    with batch.draws(rows):
        out = state.model(
            observations[0] if len(observations) == 1 else torch.cat(observations),
            reconstruct=weights.reconstruction > 0,
        )
    if paired is not None:
        count = len(batch.of_items.rows)
        of_pairs = out.rows(0, rows)
        # The loss of pairs draws random numbers for blocks of pairs.
        with (
            contextlib.nullcontext()
            if batch.ranks.world == 1
            else RowDraws(batch.of_items.rows, len(batch.items), blocks=True)
        ):
            terms = loss(
                of_pairs,
                *paired[1:],
                pair_logits=state.model.pair_logits,
                observed=paired[0],
                epoch=state.epoch,
                generator=generator,
            )
        figures["correct"] = float(
            # Blocks: the first `count` rows are winners, the next `count` are losers.
            (of_pairs.scalar[:count] > of_pairs.scalar[count : 2 * count]).float().mean()
        )
    if batch.shapes:
        # Pairs, if there are any, already contribute `correct` and the reconstruction.
        unpaired, correct = _unpaired(out.rows(rows, len(out.scalar)), batch, state)
        terms |= loss.unpaired(unpaired)
        if paired is None:
            figures["correct"] = correct
            if out.reconstruction is not None:
                terms["reconstruction"] = (
                    weights.reconstruction * reconstruction_loss(out.reconstruction, observations[0]).mean()
                )
    return _update(state, batch, terms, figures)


def _update(
    state: TrainState, batch: Step, terms: dict[str, torch.Tensor], figures: dict[str, float]
) -> dict[str, float]:
    """Take an optimiser step on the terms of all ranks, and return the mean figures."""
    main = batch.of_items if batch.items else batch.of_shapes
    evenly = 1 / batch.ranks.world
    # Every rank computes the divergence of the complete step, but differentiates only its own embeddings. The
    # sum of gradients over ranks is then the gradient of the divergence, so its weight is 1.
    scales = {"regression": batch.of_shapes.weight, "divergence": 1.0}
    state.optimizer.zero_grad(set_to_none=True)
    # Scaled by this rank's share, so that the sum over ranks is the mean over the step.
    cast(torch.Tensor, sum(value * scales.get(name, main.weight) for name, value in terms.items())).backward()
    figures = {**{name: float(value.detach()) for name, value in terms.items()}, **figures}
    # Figures that every rank computes for the complete step are averaged evenly.
    weights = {
        "regression": batch.of_shapes.weight,
        "divergence": evenly,
        **({} if batch.items else {"correct": evenly}),
    }
    figures, stop = main.update(state.model, figures, state.request.received is not None, weights)
    # All ranks stop at the same step, before the update, since a rank that waits for another would hang.
    if stop:
        raise StoppedError(f"stopped in epoch {state.epoch + 1}")
    state.optimizer.step()
    return figures


def _unpaired(out: RewardOutput, batch: Step, state: TrainState) -> tuple[UnpairedOutput, float]:
    """Prepare the input of the unpaired loss terms.

    Returns: that input, and the share of the step's pairs of a preferred and another shape that are in order.
    """
    device = out.scalar.device
    share = batch.of_shapes
    target = torch.tensor([batch.shapes[i].target for i in share.rows], dtype=out.scalar.dtype, device=device)
    preferred = torch.tensor([label.preferred is True for label in batch.shapes], device=device)
    # [U, M + 1]: unit embeddings and the score of all ranks' shapes, in one exchange
    gathered = share.gather(
        torch.cat([torch.nn.functional.normalize(out.embedding), out.scalar.detach()[:, None]], 1)
    )
    # The bandwidth is the median distance of a step, smoothed over steps.
    now = max(float(median_distance(gathered[:, :-1])), LEAST_BANDWIDTH)
    state.bandwidth = now if state.bandwidth is None else MOMENTUM * state.bandwidth + (1 - MOMENTUM) * now
    scores = gathered[:, -1].detach()
    correct = float((scores[preferred][:, None] > scores[~preferred]).float().mean())
    embedding = gathered[:, :-1]
    return (
        UnpairedOutput(
            scalar=out.scalar,
            target=target,
            embedding=embedding,
            preferred=preferred,
            bandwidth=state.bandwidth,
        ),
        correct,
    )


def _shapes(
    labels: Sequence[UnpairedPreference],
    share: Share,
    data: TrainData,
    options: TrainOptions,
    draws: np.random.Generator,
    device,
):
    """Return observations [U, ...] of this rank's unpaired labels."""
    observations = data.store.take([labels[i].seed for i in share.rows], device)
    # Random numbers are drawn for all labels, and then selected, so that they equal those of a single
    # rank.
    return (
        data.observation.augment(observations, draws.random(len(labels))[share.rows])
        if options.mirror
        else observations
    )


def _batch(
    items: Sequence[Preference],
    share: Share,
    data: TrainData,
    options: TrainOptions,
    rng: np.random.Generator,
    device,
):
    """Return this rank's observations and comparisons.

    Observations [N, ...] are in the order winners, losers, reference samples. Comparisons are index pairs
    (better, worse), int64 [P] each. With reference samples, an item is the triple (reference, winner, loser),
    and every ordered pair inside it is a comparison: reference before winner and loser, winner before loser.
    """
    items, total = [items[i] for i in share.rows], len(items)
    count = len(items)
    observations = data.store.take([i.winner for i in items] + [i.loser for i in items], device)
    row = torch.arange(count)
    better = [row]
    worse = [row + count]
    if data.anchors and data.anchor_store is not None:
        # One random reference sample per item of the complete step, then this rank's
        drawn = [data.anchors[i] for i in share.of_blocks(rng.integers(len(data.anchors), size=total))]
        observations = torch.cat([observations, data.anchor_store.take(drawn, device)])
        better += [row + 2 * count, row + 2 * count]
        worse += [row, row + count]
    if options.mirror:
        observations = data.observation.augment(
            observations, share.of_blocks(rng.random(len(observations) // count * total))
        )
    return observations, torch.cat(better).to(device), torch.cat(worse).to(device)
