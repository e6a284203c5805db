"""The file that a reward training goes on from: everything that changes while it trains, with the options that it was begun with."""

import io
import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from training.storage import checksum, write_atomic

if TYPE_CHECKING:
    from eg3d_rlhf.rewards.train import TrainOptions, TrainState

_LATER = ("backbone", "bootstrap", "start", "unpaired_batch")  # options that files of earlier versions lack


def save_state(path: Path, state: "TrainState", options: "TrainOptions") -> None:
    """Write all that a resume needs, whole or not at all."""
    plain = {"epoch": state.epoch, "history": state.history, "best_epoch": state.best_epoch, "options": asdict(options)}
    plain |= {} if state.bandwidth is None else {"bandwidth": state.bandwidth}
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


def load_state(path: Path, state: "TrainState", options: "TrainOptions") -> None:
    """Read on rank 0; every rank continues from the same bytes. Raises: ValueError for a foreign file, and for other options."""
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
    wanted, defaults = json.loads(json.dumps(asdict(options))), asdict(type(options)())
    begun = {**{name: defaults[name] for name in _LATER}, **plain["options"]}
    begun["weights"] = {"regression": 0.0, "divergence": 0.0, **begun.get("weights", {})}
    changed = sorted(name for name, value in wanted.items() if begun.get(name) != value)
    if changed:
        raise ValueError(f"train_reward({path.name}): expected the options it was begun with, got other {', '.join(changed)}. Use those.")
    state.model.load_state_dict(stored["model"])
    state.optimizer.load_state_dict(stored["optimizer"])
    state.epoch, state.history, state.best_epoch = plain["epoch"], plain["history"], plain["best_epoch"]
    state.best, state.bandwidth = stored["best"], plain.get("bandwidth")
