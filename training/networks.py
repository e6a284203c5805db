"""Networks together with the arguments that made them: built, saved and loaded as one file."""

import copy
import dataclasses
import hashlib
from pathlib import Path

import torch

from training import storage
from training.discriminator import DualDiscriminator
from training.triplane import TriPlaneGenerator

EG3D = "eg3d"  # architecture of the files that name none
RENDERED = "neural_rendering_resolution"  # in the header of networks that have one


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a network file's name of an architecture stands for."""

    name: str
    G: type[torch.nn.Module]  # built from the file's G_kwargs
    D: type[torch.nn.Module] | None  # built from its D_kwargs; None where there is no discriminator


ARCHITECTURES = {EG3D: Architecture(EG3D, TriPlaneGenerator, DualDiscriminator)}


def register(architecture: Architecture) -> None:
    """Make an architecture known by its name."""
    ARCHITECTURES[architecture.name] = architecture


def architecture(name: str) -> Architecture:
    """The architecture called `name`. Raises: ValueError naming those that are known."""
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"network: expected an architecture of {known}, got {name!r}. Name the plugin that brings it (docs/extending.md).")
    return ARCHITECTURES[name]


def architecture_of(path: str | Path) -> str:
    """The architecture that a network file names. Raises: as `training.storage.read_meta`."""
    return storage.read_meta(path, "network").get("architecture", EG3D)


@dataclasses.dataclass
class Networks:
    """A generator, its moving average and its discriminator, with their constructor arguments."""

    G: torch.nn.Module | None
    D: torch.nn.Module | None
    G_ema: torch.nn.Module
    G_kwargs: dict
    D_kwargs: dict | None
    training_set: dict  # what the networks were trained on: name, resolution
    cur_nimg: int = 0
    architecture: str = EG3D

    def to(self, device) -> "Networks":
        """Move all modules."""
        for module in (self.G, self.D, self.G_ema):
            if module is not None:
                module.to(device)
        return self


def build(G_kwargs: dict, D_kwargs: dict, training_set: dict, name: str = EG3D) -> Networks:
    """Fresh networks of the architecture called `name`; the moving average starts as a copy of G."""
    kind = architecture(name)
    G = kind.G(**G_kwargs)
    D = kind.D(**D_kwargs)
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    G, D = G.train().requires_grad_(False), D.train().requires_grad_(False)
    return Networks(G, D, G_ema, G_kwargs, D_kwargs, training_set, architecture=name)


def save(path: str | Path, networks: Networks, only_ema: bool = False) -> None:
    """Write a network file (safetensors + JSON header)."""
    modules = {"G_ema": networks.G_ema} if only_ema else {"G": networks.G, "D": networks.D, "G_ema": networks.G_ema}
    tensors = {f"{name}.{k}": v for name, module in modules.items() if module is not None for k, v in module.state_dict().items()}
    meta = {
        "architecture": networks.architecture, "G_kwargs": networks.G_kwargs, "D_kwargs": networks.D_kwargs,
        "training_set": networks.training_set, "cur_nimg": networks.cur_nimg,
    }
    if hasattr(networks.G_ema, RENDERED):  # the state of EG3D's networks that is no tensor
        meta[RENDERED] = networks.G_ema.neural_rendering_resolution
    storage.write_tensors(path, "network", tensors, meta)


def load(path: str | Path, device: str | torch.device = "cpu", freeze_layers: int | None = None) -> Networks:
    """Read a network file.

    Args:
        freeze_layers: the first so many layers of D become buffers, under their own names (Freeze-D, Mo et al. 2020); None leaves D as it
            was when it was saved.

    Raises: FileNotFoundError, ValueError (truncated, foreign, other architecture).
    """
    tensors, meta = storage.read_tensors(path, "network")
    kind = architecture(meta.get("architecture", EG3D))
    G_ema = kind.G(**meta["G_kwargs"])
    storage.load_strict(G_ema, _part(tensors, "G_ema."), f"{path} (G_ema)")
    G = D = None
    if any(k.startswith("G.") for k in tensors):
        G = kind.G(**meta["G_kwargs"])
        storage.load_strict(G, _part(tensors, "G."), f"{path} (G)")
        G.train().requires_grad_(False)
    if any(k.startswith("D.") for k in tensors):
        if freeze_layers is not None:
            meta["D_kwargs"]["block_kwargs"] = {**meta["D_kwargs"].get("block_kwargs", {}), "freeze_layers": freeze_layers}
        D = kind.D(**meta["D_kwargs"])
        storage.load_strict(D, _part(tensors, "D."), f"{path} (D)")
        D.train().requires_grad_(False)
    for module in (G, G_ema):
        if module is not None and RENDERED in meta:
            module.neural_rendering_resolution = meta[RENDERED]
    G_ema.eval().requires_grad_(False)
    networks = Networks(G, D, G_ema, meta["G_kwargs"], meta["D_kwargs"], meta["training_set"], meta["cur_nimg"], kind.name)
    return networks.to(device)


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def state_hash(module: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of a module's state: the identity under which labels refer to a generator."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
