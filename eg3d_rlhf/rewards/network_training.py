"""Train a reward network on labelled pairs, on unpaired labels, or on both: the paper's losses and anchors,
early stopping on validation pairs, exact resume.

Source: arXiv 2606.27305 (2026), reward training. The test split is never read here.
Letters: N observations (winners, losers, anchors in blocks), P pairs, B blocks, W ranks.
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

# The file that a reward training goes on from: everything that changes while it trains, with the options that
# it was begun with.


def save_state(path: Path, state: "TrainState", options: "TrainOptions") -> None:
    """Write all that a resume needs, whole or not at all."""
    plain = {
        "epoch": state.epoch,
        "history": state.history,
        "best_epoch": state.best_epoch,
        "options": asdict(options),
    }
    plain |= {} if state.bandwidth is None else {"bandwidth": state.bandwidth}
    tensors = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "best": state.best,
    }
    buffer = io.BytesIO()
    torch.save({**tensors, "plain": json.dumps(plain), "sha256": checksum(_flat(tensors), plain)}, buffer)
    write_atomic(path, buffer.getvalue())


def _flat(value, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dictionaries and lists, by path."""
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
    """Read on rank 0; every rank continues from the same bytes.

    Raises: ValueError for a foreign file, and for other options.
    """
    held = (
        {"file": torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())}
        if state.ranks.main
        else None
    )
    data = state.ranks.broadcast_named(held)["file"]
    try:
        stored = torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
        plain = json.loads(stored["plain"])
        if stored.pop("sha256") != checksum(_flat(stored), plain):
            raise ValueError("other bytes than were written")
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError) as error:
        what = type(error).__name__
        raise ValueError(
            f"train_reward({path.name}): expected a training state, got {what}. Delete it to start over."
        ) from error
    wanted = json.loads(json.dumps(asdict(options)))
    begun = version_0_1.settings(plain["options"])
    changed = sorted(name for name, value in wanted.items() if begun.get(name) != value)
    if changed:
        raise ValueError(
            f"train_reward({path.name}): expected the options it was begun with, got other"
            f" {', '.join(changed)}. Use those."
        )
    state.model.load_state_dict(stored["model"])
    state.optimizer.load_state_dict(stored["optimizer"])
    state.epoch = plain["epoch"]
    state.history = plain["history"]
    state.best_epoch = plain["best_epoch"]
    state.best = stored["best"]
    state.bandwidth = plain.get("bandwidth")


# How the ranks of a reward training divide a step: which items each takes, what they exchange, and the same
# random numbers as of one rank.


@dataclass(frozen=True)
class Share:
    """This rank's items of a step: every W-th; where a short last step leaves none, the first item with
    weight 0.
    """

    count: int  # items of the step, over all ranks
    ranks: Ranks = SINGLE

    @property
    def rows(self) -> list[int]:
        return list(range(self.count))[self.ranks.rank :: self.ranks.world] or [0][: self.count]

    @property
    def weight(self) -> float:
        """Share of the step's mean that a mean over `rows` contributes."""
        return len(range(self.ranks.rank, self.count, self.ranks.world)) / max(self.count, 1)

    def of_blocks(self, drawn: np.ndarray) -> np.ndarray:
        """The entries of these items among values drawn for B blocks of `count` items,
        [B * count] -> [B * len(rows)].
        """
        return drawn.reshape(-1, self.count)[:, self.rows].reshape(-1)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Values [len(rows), ...] of every rank as those of the whole step, [count, ...]. Differentiable in
        this rank's own.
        """
        if self.ranks.world == 1:
            return values
        whole = values.new_zeros(self.count, *values.shape[1:])
        rows = torch.tensor(self.rows, device=values.device)
        if not self.weight:
            return self.ranks.sum_(whole, "exchange embeddings")
        whole[rows] = values.detach()
        return self.ranks.sum_(whole, "exchange embeddings").index_copy(0, rows, values)

    def update(
        self, model: torch.nn.Module, figures: dict[str, float], stop: bool, weights: Mapping[str, float]
    ) -> tuple[dict[str, float], bool]:
        """Sum gradients over ranks; returns the step's mean figures and whether any rank was asked to stop.

        The figure 'strength' is a norm over samples, its squares add up; the others are means, of this rank's
        `weights`, else `weight`.
        """
        if self.ranks.world == 1:
            return figures, stop
        real = float(self.weight > 0)
        parts = [
            value**2 * real if name == "strength" else value * weights.get(name, self.weight)
            for name, value in figures.items()
        ]
        sums = torch.tensor(
            [*parts, float(stop)], dtype=torch.float32, device=next(model.parameters()).device
        )
        sum_over_ranks(self.ranks, model.parameters(), [sums])
        *totals, stops = sums.tolist()
        return {k: v**0.5 if k == "strength" else v for k, v in zip(figures, totals, strict=True)}, stops > 0


class Step:
    """The pairs and the unpaired labels of a step, and this rank's shares of them."""

    def __init__(self, items: Sequence[Preference], shapes: Sequence[UnpairedPreference], ranks: Ranks):
        self.items = items
        self.shapes = shapes
        self.ranks = ranks
        self.of_items = Share(len(items), ranks)
        self.of_shapes = Share(len(shapes), ranks)

    def draws(self, rows: int) -> contextlib.AbstractContextManager:
        """Inside: random numbers of the whole step, for a forward pass over `rows` of pairs, block by block,
        and then the shapes.
        """
        if self.ranks.world == 1:
            return contextlib.nullcontext()
        blocks = rows // max(len(self.of_items.rows), 1)
        places = [block * len(self.items) + row for block in range(blocks) for row in self.of_items.rows]
        return RowDraws(
            [*places, *(blocks * len(self.items) + row for row in self.of_shapes.rows)],
            blocks * len(self.items) + len(self.shapes),
        )


MOMENTUM = 0.9  # of the divergence's bandwidth over steps
LEAST_BANDWIDTH = 1e-3  # embeddings that fall together have no distance


def new_network(options: TrainOptions, kind: str) -> RewardNetwork:
    """An untrained network that reads `kind`.

    Raises: ValueError, FileNotFoundError for a backbone that does not fit.
    """
    description = dict(preset(options.preset, kind).network)
    if options.backbone and "backbone" not in description:
        raise ValueError(
            f"--backbone: expected none for preset {options.preset} of {kind}, got {options.backbone}. Leave"
            " it out."
        )
    return builder_of(kind)({**description, **({"backbone": options.backbone} if options.backbone else {})})


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """What training may see."""

    train: Sequence[Preference]
    val: Sequence[Preference]
    store: ObservationCache  # of all labelled seeds
    anchors: Sequence[int] = ()  # seeds of the training anchors
    anchor_store: ObservationCache | None = None  # of those
    observation: Observation = SigmaSlab()
    unpaired: Sequence[UnpairedPreference] = ()  # to learn from; every one with a preference
    unpaired_val: Sequence[UnpairedPreference] = ()

    def learns_pairs(self, options: TrainOptions) -> bool:
        """Whether steps are made of pairs; else they are made of unpaired labels, and pairs choose the epoch
        alone.
        """
        return options.weights.on_pairs or not self.unpaired

    def steps(self, options: TrainOptions) -> int:
        if self.learns_pairs(options):
            return math.ceil(len(self.train) / options.batch)
        return math.ceil(len(self.unpaired) / options.unpaired_batch)


@dataclass
class TrainState:
    """Everything that changes while training; what a resume needs."""

    model: RewardNetwork
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # epochs done
    history: list[dict] = field(default_factory=list)  # one record per epoch
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # state dict of the best epoch so far
    best_epoch: int = -1
    bandwidth: float | None = None  # of the divergence's kernel: a moving average
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
    """Train until `epochs` or `patience` run out; returns the state with the best epoch's weights in the
    model.

    Every draw depends on (seed, epoch) alone, so a run resumed from `state_file` equals an uninterrupted one.

    Args:
        state_file: written after each epoch; a matching one that exists is continued.
        on_step, on_epoch: for progress bars and logs; on_epoch gets the epoch's record.
        ranks: this process among those that train together; each step's pairs are divided among them.
        start: the network whose weights training goes on from; `options.start` names it.
    Raises: ValueError when the pairs are missing, or when `state_file` belongs to other options; StoppedError
        after SIGTERM or SIGINT.
    """
    if not data.train or not data.val:
        raise ValueError(
            f"train_reward: expected training and validation pairs, got {len(data.train)} and"
            f" {len(data.val)}. Label more."
        )
    _check_unpaired(data, options)
    if options.bootstrap:
        drawn = np.random.default_rng([options.seed, len(data.train)]).integers(
            len(data.train), size=len(data.train)
        )
        again = redrawn(data.unpaired, np.random.default_rng([options.seed, len(data.unpaired), 1]))
        data = replace(data, train=[data.train[i] for i in drawn], unpaired=again)
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
    model.calibrate(lambda: data.store.take(seeds, device))
    if start is not None:
        model.load_state_dict(start.state_dict())
    if state_file is not None and ranks.broadcast(state_file.is_file()):
        load_state(state_file, state, options)
    ranks.broadcast_((*model.parameters(), *model.buffers()))
    while state.epoch < options.epochs and state.epoch - 1 - state.best_epoch < options.patience:
        with state.request:
            record = _epoch(state, data, options, on_step)
        state.history.append(record)
        state.epoch += 1
        # the first of equal ones
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
    """Raise ValueError where weights and unpaired labels do not go together."""
    used = options.weights.regression or options.weights.divergence
    kinds = {label.preferred for label in data.unpaired}
    if data.unpaired and not used:
        raise ValueError(
            "--unpaired: expected --regression or --divergence above 0 with it, got neither. Set one, or"
            " leave it out."
        )
    if used and kinds != {True, False}:
        got = "none of one kind" if kinds else "none"
        raise ValueError(
            f"--regression, --divergence: expected unpaired labels of both kinds, got {got}. Pass --unpaired,"
            " or label more."
        )


def _epoch(
    state: TrainState, data: TrainData, options: TrainOptions, on_step: Callable[[], None] | None
) -> dict:
    """One pass over the training pairs, or unpaired labels, then the validation pairs. Returns the epoch's
    record.
    """
    began = time.monotonic()
    rng = np.random.default_rng([options.seed, state.epoch])
    draws = np.random.default_rng([options.seed, state.epoch, 1])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    steps = data.steps(options)
    shapes = batches_of(data.unpaired, options.unpaired_batch, draws)
    sums: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        torch.manual_seed(int(rng.integers(2**62)))
        state.model.train()
        order = rng.permutation(len(data.train) if data.learns_pairs(options) else 0)
        for step in range(steps):
            if options.cosine:
                done = (state.epoch + step / steps) / options.epochs
                state.optimizer.param_groups[0]["lr"] = options.lr * 0.5 * (1 + math.cos(math.pi * done))
            items = [data.train[i] for i in order[step * options.batch : (step + 1) * options.batch]]
            part, whole = (len(items), len(order)) if items else (1, steps)
            batch = Step(items, next(shapes) if data.unpaired else [], state.ranks)
            for name, value in _step(state, batch, data, options, (rng, draws), generator).items():
                sums[name] = sums.get(name, 0.0) + value * part / whole
            if on_step:
                on_step()
    correct = sums.pop("correct")
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
    """One update on a batch; returns its weighted loss terms and, as `correct`, the share of pairs ordered as
    labelled.
    """
    device = next(state.model.parameters()).device
    weights = options.weights
    loss = PreferenceLoss(weights)
    terms = {}
    figures = {}
    paired = _batch(batch.items, batch.of_items, data, options, rngs[0], device) if batch.items else None
    shown = [] if paired is None else [paired[0]]
    if batch.shapes:
        shown.append(_shapes(batch.shapes, batch.of_shapes, data, options, rngs[1], device))
    rows = 0 if paired is None else len(paired[0])
    with batch.draws(rows):
        out = state.model(
            shown[0] if len(shown) == 1 else torch.cat(shown), reconstruct=weights.reconstruction > 0
        )
    if paired is not None:
        count = len(batch.of_items.rows)
        of_pairs = out.rows(0, rows)
        # Inside: those of blocks of pairs
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
            (of_pairs.scalar[:count] > of_pairs.scalar[count : 2 * count]).float().mean()
        )
    if batch.shapes:
        unpaired, correct = _unpaired(out.rows(rows, len(out.scalar)), batch, state)
        terms |= loss.unpaired(unpaired)
        if paired is None:
            figures["correct"] = correct
            if out.reconstruction is not None:
                terms["reconstruction"] = (
                    weights.reconstruction * reconstruction_loss(out.reconstruction, shown[0]).mean()
                )
    return _update(state, batch, terms, figures)


def _update(
    state: TrainState, batch: Step, terms: dict[str, torch.Tensor], figures: dict[str, float]
) -> dict[str, float]:
    """Descend on the terms of all ranks; returns their figures."""
    main = batch.of_items if batch.items else batch.of_shapes
    evenly = 1 / batch.ranks.world
    # the divergence is of the whole step, on every rank
    scales = {"regression": batch.of_shapes.weight, "divergence": 1.0}
    state.optimizer.zero_grad(set_to_none=True)
    cast(torch.Tensor, sum(value * scales.get(name, main.weight) for name, value in terms.items())).backward()
    figures = {**{name: float(value.detach()) for name, value in terms.items()}, **figures}
    weights = {
        "regression": batch.of_shapes.weight,
        "divergence": evenly,
        **({} if batch.items else {"correct": evenly}),
    }
    figures, stop = main.update(state.model, figures, state.request.received is not None, weights)
    if stop:
        raise StoppedError(f"stopped in epoch {state.epoch + 1}")
    state.optimizer.step()
    return figures


def _unpaired(out: RewardOutput, batch: Step, state: TrainState) -> tuple[UnpairedOutput, float]:
    """What the unpaired terms read, and the share of the step's pairs of a preferred and another shape that
    are ordered so.
    """
    device = out.scalar.device
    share = batch.of_shapes
    target = torch.tensor([batch.shapes[i].target for i in share.rows], dtype=out.scalar.dtype, device=device)
    preferred = torch.tensor([label.preferred is True for label in batch.shapes], device=device)
    # [B, M + 1]
    whole = share.gather(
        torch.cat([torch.nn.functional.normalize(out.embedding), out.scalar.detach()[:, None]], 1)
    )
    now = max(float(median_distance(whole[:, :-1])), LEAST_BANDWIDTH)
    state.bandwidth = now if state.bandwidth is None else MOMENTUM * state.bandwidth + (1 - MOMENTUM) * now
    scores = whole[:, -1].detach()
    correct = float((scores[preferred][:, None] > scores[~preferred]).float().mean())
    embedding = whole[:, :-1]
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
    """Observations [U, ...] of this rank's unpaired labels."""
    observed = data.store.take([labels[i].seed for i in share.rows], device)
    return (
        data.observation.augment(observed, draws.random(len(labels))[share.rows])
        if options.mirror
        else observed
    )


def _batch(
    items: Sequence[Preference],
    share: Share,
    data: TrainData,
    options: TrainOptions,
    rng: np.random.Generator,
    device,
):
    """Observations [N, ...] in the order winners, losers, anchors, and index pairs (better, worse), int64 [P]
    each, of this rank's items.

    With anchors an item is the triple (anchor, winner, loser) and every ordered pair inside it is a
    comparison, anchor first.
    """
    items, total = [items[i] for i in share.rows], len(items)
    count = len(items)
    observed = data.store.take([i.winner for i in items] + [i.loser for i in items], device)
    row = torch.arange(count)
    better = [row]
    worse = [row + count]
    if data.anchors and data.anchor_store is not None:
        drawn = [data.anchors[i] for i in share.of_blocks(rng.integers(len(data.anchors), size=total))]
        observed = torch.cat([observed, data.anchor_store.take(drawn, device)])
        better += [row + 2 * count, row + 2 * count]
        worse += [row, row + count]
    if options.mirror:
        observed = data.observation.augment(
            observed, share.of_blocks(rng.random(len(observed) // count * total))
        )
    return observed, torch.cat(better).to(device), torch.cat(worse).to(device)
