"""Networks from a snapshot: the architecture from its constructor arguments, the tensors copied name by name."""

import dataclasses
import math
import sys
from pathlib import Path

import torch

from eg3d_rlhf.pickles import options
from eg3d_rlhf.pickles.snapshot import Snapshot, read, refusing, tensors
from eg3d_rlhf.pickles.tensors import TensorRecord
from eg3d_rlhf.pickles.values import Refusal, brief, brief_text
from training import networks, storage
from training.discriminator import DualDiscriminator
from training.triplane import TriPlaneGenerator

SLACK = 1 << 24  # bytes by which tensors may outweigh the file: small ones may share a storage


@dataclasses.dataclass(frozen=True)
class Plan:
    """One network, checked and not yet built."""

    cls: type[torch.nn.Module]
    kwargs: dict
    tensors: dict[str, TensorRecord]

    def build(self) -> torch.nn.Module:
        """The network with the file's tensors."""
        module = self.cls(**self.kwargs)
        module.load_state_dict({k: v.tensor() for k, v in self.tensors.items()}, strict=True)
        return module


def load(path: str | Path, device: str | torch.device = "cpu", freeze_layers: int | None = None) -> networks.Networks:
    """Read an EG3D pickle (network-snapshot-*.pkl, ffhq512-128.pkl, ...) without running anything in it.

    Args:
        freeze_layers: as in `training.networks.load`.
    Returns: as `training.networks.load`; `training_set` holds 'options' (training_set_kwargs), 'label_std' (dataset_label_std of G_ema) and
        'augment' ('options' and 'p' of ADA) where the file has them. cur_nimg is not in such files, and 0.
    Raises: FileNotFoundError; ValueError of one line for anything that is not such a file, with missing, unexpected and misshapen names.
    """
    return rebuild(read(path), freeze_layers).to(device)


def rebuild(snapshot: Snapshot, freeze_layers: int | None = None) -> networks.Networks:
    """As `load`, of a snapshot that was read."""
    plans = plan(snapshot, freeze_layers)
    built = {name: p.build() for name, p in plans.items()}
    G, D, G_ema = (built.get(name) for name in ("G", "D", "G_ema"))
    with refusing(snapshot.who):
        for name, module in (("G", G), ("G_ema", G_ema)):
            if module is not None:
                module.neural_rendering_resolution = options.neural_rendering_resolution(snapshot.networks[name])
        training_set = _training_set(snapshot)
    for module in (G, D):
        if module is not None:
            module.train().requires_grad_(False)
    G_ema.eval().requires_grad_(False)
    D_kwargs = plans["D"].kwargs if "D" in plans else None
    return networks.Networks(G, D, G_ema, plans["G_ema"].kwargs, D_kwargs, training_set)


def plan(snapshot: Snapshot, freeze_layers: int | None = None) -> dict[str, Plan]:
    """Check every network of a snapshot against the architecture that it states, before anything of its size is allocated.

    Raises: ValueError of one line.
    """
    with refusing(snapshot.who):
        if "G_ema" not in snapshot.networks:
            raise Refusal("a file without G_ema")
        plans = {name: _generator(snapshot, name) for name in ("G_ema", "G") if name in snapshot.networks}
        if "G" in plans and plans["G"].kwargs != plans["G_ema"].kwargs:
            ours, theirs = plans["G_ema"].kwargs, plans["G"].kwargs
            differing = sorted(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
            raise Refusal(f"G and G_ema that differ in {', '.join(differing)}")
        D = snapshot.networks.get("D")
        if D is not None and D.class_name != "DualDiscriminator":
            print(f"Warning: {snapshot.who}: D of class {brief(D.class_name)} ignored; only a DualDiscriminator is read.", file=sys.stderr)
        elif D is not None:
            kwargs = options.discriminator_kwargs(D)
            if freeze_layers is not None:
                kwargs["block_kwargs"] = {**kwargs.get("block_kwargs", {}), "freeze_layers": freeze_layers}
            plans["D"] = Plan(DualDiscriminator, kwargs, tensors(D, "D"))
        total = sum(t.nbytes for p in plans.values() for t in p.tensors.values())
        if total > snapshot.size + SLACK:
            raise Refusal(f"tensors of {total} bytes in a file of {snapshot.size}")
    for name, one in plans.items():
        _check_shapes(one, f"{snapshot.who} ({name})")
    return plans


def _generator(snapshot: Snapshot, name: str) -> Plan:
    module = snapshot.networks[name]
    options.neural_rendering_resolution(module)
    found = tensors(module, name)
    found.pop("dataset_label_std", None)
    return Plan(TriPlaneGenerator, options.generator_kwargs(module), found)


def _check_shapes(one: Plan, who: str) -> None:
    """Build on the meta device, where nothing is allocated, and compare names and shapes.

    Raises: ValueError where the arguments make no network, or another one than the tensors belong to.
    """
    try:
        with torch.device("meta"):
            module = one.cls(**one.kwargs)
    except (RuntimeError, ZeroDivisionError) as error:  # sizes beyond what torch can count, or layers without channels
        reason = brief_text(str(error))
        raise ValueError(f"{who}: expected a network of possible size, got {reason}. Get the file again from its source.") from None
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
    kinds = sorted({str(t.storage.dtype) for t in one.tensors.values() if not t.storage.dtype.is_floating_point})
    if kinds:
        raise ValueError(f"{who}: expected tensors of floating-point numbers, got {', '.join(kinds)}. Get the file again from its source.")
    if any(math.prod(t.shape) > 1 << 40 for t in one.tensors.values()):
        raise ValueError(f"{who}: expected tensors of possible size, got one above 2^40 elements. Get the file again from its source.")
    own = {k: (v.shape, v.device) for k, v in module.state_dict().items()}  # filters are real: a few numbers
    like = {k: own[k][1] if k in own and own[k][0] == t.shape else "meta" for k, t in one.tensors.items()}
    storage.load_strict(module, {k: torch.empty(t.shape, device=like[k]) for k, t in one.tensors.items()}, who)


def _training_set(snapshot: Snapshot) -> dict:
    stated: dict = dict(snapshot.training_set)
    path = stated.get("path")
    described: dict = {"name": Path(path).stem if isinstance(path, str) else "", "resolution": stated.get("resolution")}
    if stated:
        described["options"] = stated
    std = options.label_std(snapshot.networks["G_ema"])
    if std is not None:
        described["label_std"] = std
    if snapshot.augment_pipe is not None:
        described["augment"] = options.augmentation(snapshot.augment_pipe)
    return described


