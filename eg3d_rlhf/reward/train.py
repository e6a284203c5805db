"""Train a reward network on labelled pairs: the paper's losses and anchors, early stopping on validation pairs, exact resume.

Source: arXiv 2606.27305 (2026), reward training. The test split is never read here.
Shape letters: N slabs, P pairs, D, H, W = z, y, x.
"""

import io
import json
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.losses import LossWeights, PreferenceLoss
from eg3d_rlhf.reward.config import preset
from eg3d_rlhf.reward.evaluation import log_loss, margins
from eg3d_rlhf.reward.model import RewardModel
from eg3d_rlhf.reward.shared import Share, StoppedError, shared_scores
from eg3d_rlhf.reward.slabs import SlabStore
from eg3d_rlhf.run.process import StopRequest
from training.distributed import SINGLE, Ranks
from training.storage import checksum, write_atomic


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that decides a training run besides its data; the defaults are those of the small preset."""

    preset: str = "small"  # architecture, see eg3d_rlhf/reward/config.py
    epochs: int = 10  # passes over the training pairs, at most; >= 1
    patience: int = 5  # epochs without a better validation accuracy before stopping; >= 1
    batch: int = 16  # pairs per step
    lr: float = 2e-3  # Adam's learning rate at the start
    cosine: bool = True  # learning rate falls to 0 along a half cosine over `epochs`; False keeps it
    weight_decay: float = 1e-4  # L2, inside Adam
    decoupled: bool = False  # AdamW: decay apart from the gradient
    anchors: int = 0  # x_HQ seeds at psi 0.25, one per item; 0 trains on the labelled pairs alone
    mirror: bool = True  # flip a training slab along x with probability one half
    seed: int = 0  # initialisation, order, anchors, flips
    weights: LossWeights = field(default_factory=lambda: LossWeights(scalar=1.0, bradley_terry=0.1, reconstruction=0.0))

    def __post_init__(self):
        preset(self.preset)
        for name, least in (("epochs", 1), ("patience", 1), ("batch", 1), ("weight_decay", 0), ("anchors", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"TrainOptions.{name}: expected at least {least}, got {getattr(self, name)}. Raise it.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"TrainOptions.lr: expected a positive number, got {self.lr}. Use 1e-5 for 'paper', 2e-3 for small presets.")


PAPER_OPTIONS = TrainOptions(
    preset="paper", epochs=10, patience=10, batch=1, lr=1e-5, cosine=False, anchors=1000, mirror=False, weights=LossWeights()
)


HEADS_OPTIONS = TrainOptions(preset="heads", epochs=12, patience=12, batch=8, lr=1e-3, weight_decay=0.3, decoupled=True)


def default_options(preset_name: str) -> TrainOptions:
    """The paper's settings for 'paper', quick ones for the small presets."""
    if preset_name == "heads":
        return HEADS_OPTIONS
    return PAPER_OPTIONS if preset_name == "paper" else TrainOptions(preset=preset_name)


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """What training may see."""

    train: Sequence[Preference]
    val: Sequence[Preference]
    store: SlabStore  # slabs of all their seeds
    anchors: Sequence[int] = ()  # seeds of the training anchors
    anchor_store: SlabStore | None = None  # their slabs


@dataclass
class TrainState:
    """Everything that changes while training; what a resume needs."""

    model: RewardModel
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # epochs done
    history: list[dict] = field(default_factory=list)  # one record per epoch
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # state dict of the best epoch so far
    best_epoch: int = -1
    ranks: Ranks = SINGLE  # this process among those of the run
    request: StopRequest = field(default_factory=StopRequest)

    @property
    def best_record(self) -> dict:
        """The best epoch's record."""
        return self.history[self.best_epoch]


def new_state(options: TrainOptions, device: str | torch.device = "cpu") -> TrainState:
    """A freshly initialised model and optimiser; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = RewardModel(preset(options.preset))
    model.to(device)
    family = torch.optim.AdamW if options.decoupled else torch.optim.Adam
    return TrainState(model, family(model.parameters(), lr=options.lr, weight_decay=options.weight_decay))


def train_reward(
    data: TrainData,
    options: TrainOptions,
    *,
    device: str | torch.device = "cpu",
    state_file: Path | None = None,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    ranks: Ranks = SINGLE,
) -> TrainState:
    """Train until `epochs` or `patience` run out; returns the state with the best epoch's weights in the model.

    Every draw depends on (seed, epoch) alone, so a run resumed from `state_file` equals an uninterrupted one.

    Args:
        state_file: written after each epoch; a matching one that exists is continued.
        on_step, on_epoch: for progress bars and logs; on_epoch gets the epoch's record.
        ranks: this process among those that train together; each step's pairs are divided among them.
    Raises: ValueError when the pairs are missing, or when `state_file` belongs to other options; StoppedError after SIGTERM or SIGINT.
    """
    if not data.train or not data.val:
        raise ValueError(f"train_reward: expected training and validation pairs, got {len(data.train)} and {len(data.val)}. Label more.")
    state = new_state(options, device)
    state.ranks = ranks
    if state.model.arch.extractor == "strided":
        seeds = [seed for label in data.train for seed in (label.winner, label.loser)]
        state.model.extractor.calibrate(data.store.take(seeds, device))
    if state_file is not None and ranks.broadcast(state_file.is_file()):
        _load_state(state_file, state, options)
    ranks.broadcast_((*state.model.parameters(), *state.model.buffers()))
    while state.epoch < options.epochs and state.epoch - 1 - state.best_epoch < options.patience:
        with state.request:
            record = _epoch(state, data, options, on_step)
        state.history.append(record)
        state.epoch += 1
        if state.best_epoch < 0 or _rank(record) > _rank(state.best_record):
            state.best_epoch = record["epoch"]
            state.best = {k: v.detach().clone() for k, v in state.model.state_dict().items()}
        if state_file is not None and ranks.main:
            _save_state(state_file, state, options)
        if on_epoch:
            on_epoch(record)
    state.model.load_state_dict(state.best)
    state.model.eval().requires_grad_(False)
    return state


def _rank(record: dict) -> tuple[float, float]:
    """Higher is better: validation accuracy, then validation log loss."""
    return record["val_accuracy"], -record["val_log_loss"]


def _epoch(state: TrainState, data: TrainData, options: TrainOptions, on_step: Callable[[], None] | None) -> dict:
    """One pass over the training pairs, then the validation pairs. Returns the epoch's record."""
    began = time.monotonic()
    rng = np.random.default_rng([options.seed, state.epoch])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    steps = math.ceil(len(data.train) / options.batch)
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        torch.manual_seed(int(rng.integers(2**62)))
        sums = _train_steps(state, data, options, steps, rng, generator, on_step)
    correct = sums.pop("correct")
    state.model.eval()
    scores = shared_scores(state.model, data.store, [seed for label in data.val for seed in (label.winner, label.loser)], state.ranks)
    margin = margins(scores, data.val)
    return {
        "epoch": state.epoch, "seconds": time.monotonic() - began, "lr": state.optimizer.param_groups[0]["lr"], "loss": sums,
        "train_accuracy": correct, "val_accuracy": float((margin > 0).mean()), "val_log_loss": log_loss(margin),
    }  # fmt: skip


def _train_steps(state: TrainState, data: TrainData, options: TrainOptions, steps: int, rng, generator, on_step) -> dict[str, float]:
    """One pass of updates; returns mean loss terms and, as `correct`, the share ordered as labelled."""
    state.model.train()
    order = rng.permutation(len(data.train))
    sums: dict[str, float] = {}
    for step in range(steps):
        if options.cosine:
            done = (state.epoch + step / steps) / options.epochs
            state.optimizer.param_groups[0]["lr"] = options.lr * 0.5 * (1 + math.cos(math.pi * done))
        items = [data.train[i] for i in order[step * options.batch : (step + 1) * options.batch]]
        for name, value in _step(state, items, data, options, rng, generator).items():
            sums[name] = sums.get(name, 0.0) + value * len(items) / len(order)
        if on_step:
            on_step()
    return sums


def _step(
    state: TrainState,
    items: Sequence[Preference],
    data: TrainData,
    options: TrainOptions,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> dict[str, float]:
    """One update on a batch of pairs; returns its weighted loss terms and, as `correct`, the share ordered as labelled."""
    share = Share(len(items), state.ranks)
    slab, better, worse = _batch(items, share, data, options, rng, next(state.model.parameters()).device)
    loss = PreferenceLoss(options.weights)
    with share.draws():
        out = state.model(slab, reconstruct=options.weights.reconstruction > 0)
        terms = loss(out, better, worse, pair_logits=state.model.pair_logits, slab=slab, epoch=state.epoch, generator=generator)
    state.optimizer.zero_grad(set_to_none=True)
    (sum(terms.values()) * share.weight).backward()
    count = len(share.rows)
    correct = (out.scalar[:count] > out.scalar[count : 2 * count]).float().mean()
    figures = {**{name: float(value.detach()) for name, value in terms.items()}, "correct": float(correct)}
    figures, stop = share.update(state.model, figures, state.request.received is not None)
    if stop:
        raise StoppedError(f"stopped in epoch {state.epoch + 1}")
    state.optimizer.step()
    return figures


def _batch(items: Sequence[Preference], share: Share, data: TrainData, options: TrainOptions, rng: np.random.Generator, device):
    """Slabs [N, 1, D, H, W] in the order winners, losers, anchors, and index pairs (better, worse), int64 [P] each, of this rank's items.

    With anchors an item is the triple (anchor, winner, loser) and every ordered pair inside it is a comparison, anchor first.
    """
    items, total = [items[i] for i in share.rows], len(items)
    count = len(items)
    slab = data.store.take([i.winner for i in items] + [i.loser for i in items], device)
    row = torch.arange(count)
    better, worse = [row], [row + count]
    if data.anchors:
        drawn = [data.anchors[i] for i in share.of_blocks(rng.integers(len(data.anchors), size=total))]
        slab = torch.cat([slab, data.anchor_store.take(drawn, device)])
        better += [row + 2 * count, row + 2 * count]
        worse += [row, row + count]
    if options.mirror:
        flip = torch.from_numpy(share.of_blocks(rng.random(len(slab) // count * total)) < 0.5).to(device)
        slab = torch.where(flip[:, None, None, None, None], slab.flip(-1), slab)
    return slab, torch.cat(better).to(device), torch.cat(worse).to(device)


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
    wanted = json.loads(json.dumps(asdict(options)))
    changed = sorted(name for name, value in wanted.items() if plain["options"].get(name) != value)
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
