"""What a policy is compared with: a network that is never trained, or its errors computed before.

Shape letters as in sparse.py; P pairs.
"""

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from eg3d_rlhf.experiments.store import json_hash
from eg3d_rlhf.models.lora import adapted_layers, adapters_off, lora_parameters
from eg3d_rlhf.models.sparse import Batch, feats_of, with_feats
from eg3d_rlhf.tuning.flow.conditions import Condition
from eg3d_rlhf.tuning.flow.dpo import PairDraw
from eg3d_rlhf.tuning.flow.generate import evaluating
from eg3d_rlhf.tuning.flow.stage import FlowStage
from training.distributed import SINGLE, Ranks
from training.storage import read_tensors, write_tensors

KIND = "reference errors"
DrawKey = tuple[str, int]  # id of a pair and epoch, which together with the seed name what is drawn for it
Row = tuple[float, float, float]  # time, error of the preferred, error of the rejected


class Reference(Protocol):
    """The frozen side of a preference loss."""

    def errors(self, stage: FlowStage, draw: PairDraw, keys: Sequence[DrawKey]) -> torch.Tensor:
        """Flow-matching errors [2P] of a batch of pairs, float32, in the order of the draw; without gradient.

        Args: keys [P]: what was drawn.
        """


class FrozenModel:
    """A network as it is. It shares no parameter that is trained with the policy."""

    def __init__(self, model: nn.Module, policy: nn.Module | None = None):
        self._model, self._policy = model, policy
        self._check()

    def _check(self) -> None:
        _refuse_trainable(type(self).__name__, self._model.named_parameters())
        policy = [] if self._policy is None else self._policy.named_parameters()
        trained = {place: name for name, p in policy if p.requires_grad for place in _places(p)}
        names = [trained[place] for p in self._model.parameters() for place in _places(p) if place in trained]
        if names:
            shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            raise ValueError(
                f"{type(self).__name__}: expected parameters apart from those that are trained, got a reference that would train with the "
                f"policy ({shown}). Use FrozenCopy."
            )

    def velocity(self, stage: FlowStage, x_t: Batch, t: torch.Tensor, cond: Condition, step: float | None = None) -> Batch:
        """v at times t [N] in 0..1, and for steps of that length where it is given; without gradient."""
        self._check()
        with torch.no_grad(), evaluating(self._model):
            return stage.velocity(x_t, t, cond, self._model, step)

    def errors(self, stage: FlowStage, draw: PairDraw, keys: Sequence[DrawKey]) -> torch.Tensor:
        """See Reference."""
        with torch.no_grad():
            v = self.velocity(stage, draw.x_t, draw.t, draw.cond)
            return stage.path.errors(with_feats(v, feats_of(v).float()), draw.x_0, draw.eps).float()


class FrozenCopy(FrozenModel):
    """A copy of a network as it is now, adapters included: for training all parameters, at the price of the memory."""

    def __init__(self, model: nn.Module):
        super().__init__(copy.deepcopy(model).requires_grad_(False).eval())


class AdapterOff(FrozenModel):
    """The policy itself with its adapters off: no memory, and exactly the base."""

    def __init__(self, model: nn.Module):
        if not adapted_layers(model):
            raise ValueError("AdapterOff: expected a network with adapters, got one without. Call add_lora, or use FrozenCopy.")
        super().__init__(model)

    def _check(self) -> None:
        adapters = {id(p) for p in lora_parameters(self._model)}
        _refuse_trainable("AdapterOff", ((name, p) for name, p in self._model.named_parameters() if id(p) not in adapters))

    def velocity(self, stage: FlowStage, x_t: Batch, t: torch.Tensor, cond: Condition, step: float | None = None) -> Batch:
        """v of the base."""
        with adapters_off(self._model):
            return super().velocity(stage, x_t, t, cond, step)


def _refuse_trainable(who: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    names = [name for name, p in parameters if p.requires_grad]
    if names:
        shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        raise ValueError(f"{who}: expected frozen parameters, got a reference that would train ({shown}). Freeze it, or use FrozenCopy.")


def _places(p: nn.Parameter) -> list[int]:
    """What two tensors of the same memory have in common; nothing for those without memory."""
    start = p.untyped_storage().data_ptr() if p.device.type != "meta" else 0
    return [start] if start else []


class CachedErrors:
    """Errors of a reference, computed once per draw of a pair, in memory and, with a folder, on the disk: for runs that repeat the draws.

    Since a draw derives from (seed, pair's id, epoch) alone, a kept error is the one that would be computed. With every error kept the
    reference itself is not needed: pass None, and its memory is free.

    Args:
        reference: computes what is missing, a whole batch at a time.
        identity: JSON, everything that the errors depend on besides id and epoch: hashes of reference and pairs, seed, stage, path, the
            settings of the draw, the type computed in. Errors of another identity are never read.
        folder: where `save` writes, below a folder named by the identity; ranks write a file each and read all.
    """

    def __init__(self, reference: Reference | None, identity: Mapping, folder: str | Path | None = None, ranks: Ranks = SINGLE):
        self._reference, self._identity, self._rank = reference, json.loads(json.dumps(identity)), ranks.rank
        self._folder = None if folder is None else Path(folder) / f"reference-{json_hash(self._identity)[:16]}"
        self._epochs: dict[int, dict[str, Row]] = {}  # by epoch and id
        self._unsaved: set[int] = set()

    def errors(self, stage: FlowStage, draw: PairDraw, keys: Sequence[DrawKey]) -> torch.Tensor:
        """See Reference.

        Raises: ValueError for kept errors of other times (the draws differ, and so must the identity), for errors that are not finite, and
        for errors that are missing where there is no reference.
        """
        times = draw.t.chunk(2)[0].tolist()
        for key, t in zip(keys, times, strict=True):
            row = self._find(key)
            if row is not None and row[0] != t:
                raise ValueError(
                    f"CachedErrors: expected pair {key[0]} at t = {row[0]:.6f} in epoch {key[1]}, got {t:.6f}. "
                    "Other seeds or schedules want another identity."
                )
        missing = next((key for key in keys if self._find(key) is None), None)
        if missing is not None:
            if self._reference is None:
                raise ValueError(f"CachedErrors: expected those of pair {missing[0]} in epoch {missing[1]}, got none. Give the reference.")
            fresh = self._reference.errors(stage, draw, keys).chunk(2)
            for key, *found in zip(keys, times, fresh[0].tolist(), fresh[1].tolist(), strict=True):
                if not all(map(math.isfinite, found)):
                    got = f"{found[1:]} at {key[0]}"
                    raise ValueError(f"CachedErrors: expected finite errors of the reference, got {got}. Check its weights.")
                self._epochs[key[1]].setdefault(key[0], tuple(found))
                self._unsaved.add(key[1])
        rows = torch.tensor([self._find(key) for key in keys], dtype=torch.float64).float()  # [P, 3]
        return rows[:, 1:].T.flatten().to(draw.t.device)  # [2P]

    def _find(self, key: DrawKey) -> Row | None:
        """What is kept of a draw; its epoch is read from the disk at first."""
        name, epoch = key
        if epoch not in self._epochs:
            self._epochs[epoch] = {}
            for file in sorted(self._folder.glob(f"epoch-{epoch:06d}-*.safetensors")) if self._folder else []:
                tensors, meta = read_tensors(file, KIND)
                if meta["identity"] != self._identity:
                    raise ValueError(f"{file}: expected errors of this reference and these draws, got others. Delete the file.")
                self._epochs[epoch] |= dict(zip(meta["ids"], map(tuple, tensors["rows"].tolist()), strict=True))
        return self._epochs[epoch].get(name)

    def save(self) -> None:
        """Write what is new, if there is a folder."""
        if self._folder is None:
            return
        for epoch in sorted(self._unsaved):
            kept = self._epochs[epoch]
            meta = {"identity": self._identity, "epoch": epoch, "ids": list(kept)}
            rows = torch.tensor(list(kept.values()), dtype=torch.float64).float()  # [pairs, 3]
            write_tensors(self._folder / f"epoch-{epoch:06d}-{self._rank}.safetensors", KIND, {"rows": rows}, meta)
        self._unsaved.clear()
