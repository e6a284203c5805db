"""Network files: networks together with their constructor arguments, built, saved and loaded as one file."""

import copy
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training import storage
from training.discriminator import DualDiscriminator
from training.triplane import TriPlaneGenerator

EG3D = "eg3d"  # architecture of files that do not name one
RENDERED = "neural_rendering_resolution"  # key in the header of networks that have this attribute

# Classes of G and D, built from G_kwargs and D_kwargs. None: there is no D.
Classes = tuple[type[torch.nn.Module], type[torch.nn.Module] | None]


def classes_of_eg3d(name: str) -> Classes:
    """Return the classes of G and D of EG3D's architecture.

    Raises: ValueError for another name. `eg3d_rlhf.generators` handles the other families.
    """
    if name != EG3D:
        raise ValueError(
            f"network: expected the architecture {EG3D}, got {name!r}. Read the file with"
            " eg3d_rlhf.generators.load_networks."
        )
    return TriPlaneGenerator, DualDiscriminator


@dataclasses.dataclass
class Networks:
    """A generator, its moving average and its discriminator, with their constructor arguments."""

    G: Any  # modules of any family, with attributes of their own; G and D may be None
    D: Any
    G_ema: Any
    G_kwargs: dict
    D_kwargs: dict | None
    training_set: dict  # description of the training images: name, resolution
    cur_nimg: int = 0  # images seen
    architecture: str = EG3D

    def to(self, device) -> "Networks":
        """Move all modules to a device."""
        for module in (self.G, self.D, self.G_ema):
            if module is not None:
                module.to(device)
        return self


def build(G_kwargs: dict, D_kwargs: dict, training_set: dict) -> Networks:
    """Build new networks of EG3D's architecture. G_ema starts as a copy of G."""
    G = TriPlaneGenerator(**G_kwargs)
    D = DualDiscriminator(**D_kwargs)
    # A copy, not a second construction: that would draw other random weights.
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    # Frozen between phases; each phase of the loop enables the gradients of its own network.
    G = G.train().requires_grad_(False)
    D = D.train().requires_grad_(False)
    return Networks(G, D, G_ema, G_kwargs, D_kwargs, training_set)


def save(path: str | Path, networks: Networks, only_ema: bool = False) -> None:
    """Write a network file: safetensors with a JSON header. `only_ema` leaves G and D out."""
    modules = (
        {"G_ema": networks.G_ema} if only_ema else {"G": networks.G, "D": networks.D, "G_ema": networks.G_ema}
    )
    tensors = {
        f"{name}.{k}": v
        for name, module in modules.items()
        if module is not None
        for k, v in module.state_dict().items()
    }
    meta: dict[str, Any] = {
        "architecture": networks.architecture,
        "G_kwargs": networks.G_kwargs,
        "D_kwargs": networks.D_kwargs,
        "training_set": networks.training_set,
        "cur_nimg": networks.cur_nimg,
    }
    # The rendering resolution changes during training. It is part of the state, but not a tensor.
    if hasattr(networks.G_ema, RENDERED):
        meta[RENDERED] = networks.G_ema.neural_rendering_resolution
    storage.write_tensors(path, "network", tensors, meta)


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    freeze_layers: int | None = None,
    classes: Callable[[str], Classes] = classes_of_eg3d,
) -> Networks:
    """Read a network file.

    Args:
        path: network file.
        device: device of the loaded modules.
        freeze_layers: make the first layers of D, so many of them, buffers under their own names (Freeze-D,
            Mo et al. 2020). None leaves D as it was when it was saved.
        classes: function from the name of an architecture to the classes of G and D.
    Raises: FileNotFoundError; ValueError if the file is truncated, of another kind, or of another
        architecture.
    """
    tensors, meta = storage.read_tensors(path, "network")
    name = meta.get("architecture", EG3D)
    make_G, make_D = classes(name)
    # The arguments in the file are changed as well, so that a snapshot of this run builds the same D again.
    if freeze_layers is not None and any(k.startswith("D.") for k in tensors):
        meta["D_kwargs"]["block_kwargs"] = {
            **meta["D_kwargs"].get("block_kwargs", {}),
            "freeze_layers": freeze_layers,
        }
    modules: dict[str, Any] = {}
    for part, make, kwargs in (
        ("G_ema", make_G, meta["G_kwargs"]),
        ("G", make_G, meta["G_kwargs"]),
        ("D", make_D, meta["D_kwargs"]),
    ):
        part_tensors = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        # A file that was saved with only_ema holds neither G nor D. G_ema is required.
        is_stored = bool(part_tensors) or part == "G_ema"
        modules[part] = module = _make(make, kwargs, f"{path} ({part})") if is_stored else None
        if module is not None:
            storage.load_strict(module, part_tensors, f"{path} ({part})")
            module.train(part != "G_ema").requires_grad_(False)
            if part != "D" and RENDERED in meta:
                module.neural_rendering_resolution = meta[RENDERED]
    facts: dict[str, Any] = {k: meta[k] for k in ("G_kwargs", "D_kwargs", "training_set", "cur_nimg")}
    return Networks(**modules, **facts, architecture=name).to(device)


def _make(cls: Any, kwargs: dict, who: str) -> torch.nn.Module:
    """Build a network from the arguments in a file. Raises: ValueError for unknown or missing arguments."""
    try:
        return cls(**kwargs)
    except (TypeError, KeyError) as error:
        wanted = f"the constructor arguments of {cls.__name__}"
        raise ValueError(
            f"{who}: expected {wanted}, got others ({error}). Use a file that this version"
            " of the package wrote."
        ) from None


def set_mbstd_group(networks: Networks, group: int | None) -> None:
    """Set the group size of D's minibatch standard deviation layer, which has no weights; None keeps it."""
    if group is not None and networks.D.b4.mbstd is not None:
        # Both the module and the arguments: a snapshot of this run has to build the same layer.
        networks.D.b4.mbstd.group_size = group
        assert networks.D_kwargs is not None
        networks.D_kwargs["epilogue_kwargs"] = {
            **networks.D_kwargs.get("epilogue_kwargs", {}),
            "mbstd_group_size": group,
        }


def state_hash(module: torch.nn.Module) -> str:
    """Return a SHA-256 over names, shapes and bytes of a module's state.

    Preference labels store this hash to identify the generator whose samples were labelled.
    """
    digest = hashlib.sha256()
    # Sorted: the order in which modules were registered must not change the identity.
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
