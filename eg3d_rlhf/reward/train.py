"""Train a reward network on labelled pairs: the paper's losses and anchors, early stopping on validation pairs, exact resume.

Source: arXiv 2606.27305 (2026), reward training. The test split is never read here.
Letters: N observations (winners, losers, anchors in blocks), P pairs, B blocks, W ranks.
"""

import contextlib
import io
import json
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from eg3d_rlhf.observations import Observation, SigmaSlab
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.losses import LossWeights, PreferenceLoss
from eg3d_rlhf.reward.cache import ObservationCache
from eg3d_rlhf.reward.evaluation import log_loss, margins, score_seeds
from eg3d_rlhf.reward.networks import RewardNetwork, preset, readers_of
from eg3d_rlhf.run.process import StopRequest
from training.config import check_knobs, knob
from training.distributed import SINGLE, Ranks
from training.rounds import RowDraws, sum_over_ranks
from training.storage import checksum, write_atomic

TRAINING = "Training"  # title of its flags


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that decides a training run besides its data; the defaults are those of the small preset."""

    preset: str = "small"  # architecture, see eg3d_rlhf.reward.networks.preset
    epochs: int = knob(10, "Passes, at most.", TRAINING, low=1)
    patience: int = knob(5, "Stop after so many epochs without a better validation accuracy.", TRAINING, metavar="EPOCHS", low=1)
    batch: int = knob(16, "Pairs per step.", TRAINING, metavar="PAIRS", low=1)
    lr: float = knob(2e-3, "Adam's learning rate at the start.", TRAINING, above=0, high=1)
    cosine: bool = True  # learning rate falls to 0 along a half cosine over `epochs`; False keeps it
    weight_decay: float = knob(1e-4, "L2 inside Adam.", TRAINING, low=0)
    decoupled: bool = False  # AdamW: decay apart from the gradient
    anchors: int = knob(0, "High-quality anchors (psi 0.25) that should beat every labelled shape.", TRAINING, metavar="SEEDS", low=0)
    mirror: bool = True  # augment what is observed, see Observation.augment; slabs are flipped along x with probability one half
    weights: LossWeights = field(default_factory=lambda: LossWeights(scalar=1.0, bradley_terry=0.1, reconstruction=0.0))
    seed: int = knob(0, "Initialisation, order, anchors, flips, bootstrap.", "Run", low=0, shown="0")
    bootstrap: bool = False  # train on as many pairs, drawn with replacement by the seed
    start: str = ""  # SHA-256 of the network that training goes on from; '' begins anew

    def __post_init__(self):
        check_knobs(self)


def default_options(name: str | None = None, kind: str = "sigma") -> TrainOptions:
    """The settings that suit a preset of the networks that read `kind`. Raises: ValueError for an unknown one."""
    chosen = preset(name, kind)
    return TrainOptions(preset=name or next(iter(readers_of(kind).presets)), **chosen.train)


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """What training may see."""

    train: Sequence[Preference]
    val: Sequence[Preference]
    store: ObservationCache  # of all their seeds
    anchors: Sequence[int] = ()  # seeds of the training anchors
    anchor_store: ObservationCache | None = None  # of those
    observation: Observation = SigmaSlab()


class StoppedError(Exception):
    """SIGTERM or SIGINT arrived; what was trained up to the last whole epoch is in the state file."""


@dataclass(frozen=True)
class Share:
    """This rank's items of a step: every W-th; where a short last step leaves none, the first item with weight 0."""

    count: int  # items of the step, over all ranks
    ranks: Ranks = SINGLE

    @property
    def rows(self) -> list[int]:
        """Places in the step."""
        return list(range(self.count))[self.ranks.rank :: self.ranks.world] or [0]

    @property
    def weight(self) -> float:
        """Share of the step's mean that a mean over `rows` contributes."""
        return len(range(self.ranks.rank, self.count, self.ranks.world)) / self.count

    def of_blocks(self, drawn: np.ndarray) -> np.ndarray:
        """The entries of these items among values drawn for B blocks of `count` items, [B * count] -> [B * len(rows)]."""
        return drawn.reshape(-1, self.count)[:, self.rows].reshape(-1)

    def update(self, model: torch.nn.Module, figures: dict[str, float], stop: bool) -> tuple[dict[str, float], bool]:
        """Sum gradients over ranks; returns the step's mean figures and whether any rank was asked to stop.

        The figure 'strength' is a norm over samples, its squares add up; the others are means.
        """
        if self.ranks.world == 1:
            return figures, stop
        real = float(self.weight > 0)
        parts = [value**2 * real if name == "strength" else value * self.weight for name, value in figures.items()]
        sums = torch.tensor([*parts, float(stop)], dtype=torch.float32, device=next(model.parameters()).device)
        sum_over_ranks(self.ranks, model.parameters(), [sums])
        *totals, stops = sums.tolist()
        return {k: v**0.5 if k == "strength" else v for k, v in zip(figures, totals, strict=True)}, stops > 0


@dataclass
class TrainState:
    """Everything that changes while training; what a resume needs."""

    model: RewardNetwork
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # epochs done
    history: list[dict] = field(default_factory=list)  # one record per epoch
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # state dict of the best epoch so far
    best_epoch: int = -1
    ranks: Ranks = SINGLE  # this process among those of the run
    request: StopRequest = field(default_factory=StopRequest)


def train_reward(
    data: TrainData, options: TrainOptions, *, device: str | torch.device = "cpu", state_file: Path | None = None,
    on_step: Callable[[], None] | None = None, on_epoch: Callable[[dict], None] | None = None, ranks: Ranks = SINGLE,
    start: RewardNetwork | None = None,
) -> TrainState:
    """Train until `epochs` or `patience` run out; returns the state with the best epoch's weights in the model.

    Every draw depends on (seed, epoch) alone, so a run resumed from `state_file` equals an uninterrupted one.

    Args:
        state_file: written after each epoch; a matching one that exists is continued.
        on_step, on_epoch: for progress bars and logs; on_epoch gets the epoch's record.
        ranks: this process among those that train together; each step's pairs are divided among them.
        start: the network whose weights training goes on from; `options.start` names it.
    Raises: ValueError when the pairs are missing, or when `state_file` belongs to other options; StoppedError after SIGTERM or SIGINT.
    """
    if not data.train or not data.val:
        raise ValueError(f"train_reward: expected training and validation pairs, got {len(data.train)} and {len(data.val)}. Label more.")
    if options.bootstrap:
        drawn = np.random.default_rng([options.seed, len(data.train)]).integers(len(data.train), size=len(data.train))
        data = replace(data, train=[data.train[i] for i in drawn])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = readers_of(data.observation.kind).build(preset(options.preset, data.observation.kind).network).to(device)
    family = torch.optim.AdamW if options.decoupled else torch.optim.Adam
    state = TrainState(model, family(model.parameters(), lr=options.lr, weight_decay=options.weight_decay), ranks=ranks)
    model.calibrate(lambda: data.store.take([seed for label in data.train for seed in (label.winner, label.loser)], device))
    if start is not None:
        model.load_state_dict(start.state_dict())
    if state_file is not None and ranks.broadcast(state_file.is_file()):
        _load_state(state_file, state, options)
    ranks.broadcast_((*model.parameters(), *model.buffers()))
    while state.epoch < options.epochs and state.epoch - 1 - state.best_epoch < options.patience:
        with state.request:
            record = _epoch(state, data, options, on_step)
        state.history.append(record)
        state.epoch += 1
        if record is max(state.history, key=lambda one: (one["val_accuracy"], -one["val_log_loss"])):  # the first of equal ones
            state.best_epoch = record["epoch"]
            state.best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if state_file is not None and ranks.main:
            _save_state(state_file, state, options)
        if on_epoch:
            on_epoch(record)
    model.load_state_dict(state.best)
    model.eval().requires_grad_(False)
    return state


def _epoch(state: TrainState, data: TrainData, options: TrainOptions, on_step: Callable[[], None] | None) -> dict:
    """One pass over the training pairs, then the validation pairs. Returns the epoch's record."""
    began = time.monotonic()
    rng = np.random.default_rng([options.seed, state.epoch])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    steps = math.ceil(len(data.train) / options.batch)
    sums: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        torch.manual_seed(int(rng.integers(2**62)))
        state.model.train()
        order = rng.permutation(len(data.train))
        for step in range(steps):
            if options.cosine:
                done = (state.epoch + step / steps) / options.epochs
                state.optimizer.param_groups[0]["lr"] = options.lr * 0.5 * (1 + math.cos(math.pi * done))
            items = [data.train[i] for i in order[step * options.batch : (step + 1) * options.batch]]
            for name, value in _step(state, items, data, options, rng, generator).items():
                sums[name] = sums.get(name, 0.0) + value * len(items) / len(order)
            if on_step:
                on_step()
    correct = sums.pop("correct")
    state.model.eval()
    scores = score_seeds(state.model, data.store, [seed for label in data.val for seed in (label.winner, label.loser)], state.ranks)
    margin = margins(scores, data.val)
    return {
        "epoch": state.epoch, "seconds": time.monotonic() - began, "lr": state.optimizer.param_groups[0]["lr"], "loss": sums,
        "train_accuracy": correct, "val_accuracy": float((margin > 0).mean()), "val_log_loss": log_loss(margin),
    }  # fmt: skip


def _step(
    state: TrainState, items: Sequence[Preference], data: TrainData, options: TrainOptions, rng: np.random.Generator,
    generator: torch.Generator,
) -> dict[str, float]:
    """One update on a batch of pairs; returns its weighted loss terms and, as `correct`, the share ordered as labelled."""
    share = Share(len(items), state.ranks)
    observed, better, worse = _batch(items, share, data, options, rng, next(state.model.parameters()).device)
    loss = PreferenceLoss(options.weights)
    with contextlib.nullcontext() if state.ranks.world == 1 else RowDraws(share.rows, share.count, blocks=True):  # as in the whole step
        out = state.model(observed, reconstruct=options.weights.reconstruction > 0)
        terms = loss(out, better, worse, pair_logits=state.model.pair_logits, observed=observed, epoch=state.epoch, generator=generator)
    state.optimizer.zero_grad(set_to_none=True)
    cast(torch.Tensor, sum(terms.values()) * share.weight).backward()
    count = len(share.rows)
    correct = (out.scalar[:count] > out.scalar[count : 2 * count]).float().mean()
    figures = {**{name: float(value.detach()) for name, value in terms.items()}, "correct": float(correct)}
    figures, stop = share.update(state.model, figures, state.request.received is not None)
    if stop:
        raise StoppedError(f"stopped in epoch {state.epoch + 1}")
    state.optimizer.step()
    return figures


def _batch(items: Sequence[Preference], share: Share, data: TrainData, options: TrainOptions, rng: np.random.Generator, device):
    """Observations [N, ...] in the order winners, losers, anchors, and index pairs (better, worse), int64 [P] each, of this rank's items.

    With anchors an item is the triple (anchor, winner, loser) and every ordered pair inside it is a comparison, anchor first.
    """
    items, total = [items[i] for i in share.rows], len(items)
    count = len(items)
    observed = data.store.take([i.winner for i in items] + [i.loser for i in items], device)
    row = torch.arange(count)
    better, worse = [row], [row + count]
    if data.anchors and data.anchor_store is not None:
        drawn = [data.anchors[i] for i in share.of_blocks(rng.integers(len(data.anchors), size=total))]
        observed = torch.cat([observed, data.anchor_store.take(drawn, device)])
        better += [row + 2 * count, row + 2 * count]
        worse += [row, row + count]
    if options.mirror:
        observed = data.observation.augment(observed, share.of_blocks(rng.random(len(observed) // count * total)))
    return observed, torch.cat(better).to(device), torch.cat(worse).to(device)


def _save_state(path: Path, state: TrainState, options: TrainOptions) -> None:
    plain = {"epoch": state.epoch, "history": state.history, "best_epoch": state.best_epoch, "options": asdict(options)}
    tensors = {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict(), "best": state.best}
    buffer = io.BytesIO()
    torch.save({**tensors, "plain": json.dumps(plain), "sha256": checksum(_flat(tensors), plain)}, buffer)
    write_atomic(path, buffer.getvalue())


def _flat(value, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dictionaries and lists, by path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = {name: value} if isinstance(value, torch.Tensor) else {}
    for key, part in items:
        found.update(_flat(part, f"{name}/{key}"))
    return found


def _load_state(path: Path, state: TrainState, options: TrainOptions) -> None:
    """Read on rank 0; every rank continues from the same bytes."""
    held = {"file": torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())} if state.ranks.main else None
    data = state.ranks.broadcast_named(held)["file"]
    try:
        stored = torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
        plain = json.loads(stored["plain"])
        written = stored.pop("sha256", None)  # files of earlier versions have none
        if written is not None and written != checksum(_flat(stored), plain):
            raise ValueError("other bytes than were written")
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError) as error:
        what = type(error).__name__
        raise ValueError(f"train_reward({path.name}): expected a training state, got {what}. Delete it to start over.") from error
    wanted, later = json.loads(json.dumps(asdict(options))), {"bootstrap": False, "start": ""}  # files of earlier versions lack these
    changed = sorted(name for name, value in wanted.items() if {**later, **plain["options"]}.get(name) != value)
    if changed:
        raise ValueError(f"train_reward({path.name}): expected the options it was begun with, got other {', '.join(changed)}. Use those.")
    state.model.load_state_dict(stored["model"])
    state.optimizer.load_state_dict(stored["optimizer"])
    state.epoch, state.history, state.best_epoch = plain["epoch"], plain["history"], plain["best_epoch"]
    state.best = stored["best"]


def with_changes(options: TrainOptions, **changes) -> TrainOptions:
    """A copy with every change that is not None; names of LossWeights' fields (pairs, scalar, ...) change its `weights`."""
    given = {k: v for k, v in changes.items() if v is not None}
    weights = {k: given.pop(k) for k in list(given) if k in LossWeights.__dataclass_fields__}
    return replace(options, weights=replace(options.weights, **weights), **given)
