"""Network files, which contain the networks G, D and G_ema together with their constructor arguments."""

import copy
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training import steering, storage
from training.discriminator import DualDiscriminator
from training.triplane import TriPlaneGenerator

EG3D = "eg3d"  # name of EG3D's architecture, and of the architecture of files that name none
RENDERED = "neural_rendering_resolution"  # key of the rendering resolution in the header of a file

# Classes of G and D of an architecture. The class of D is None if the architecture has no discriminator.
Classes = tuple[type[torch.nn.Module], type[torch.nn.Module] | None]


def classes_of_eg3d(architecture_name: str) -> Classes:
    """Return the classes of G and D of EG3D's architecture.

    Raises: ValueError for another name. `eg3d_rlhf.generators` handles the other families.
    """
    if architecture_name != EG3D:
        raise ValueError(
            f"network: expected the architecture {EG3D}, got {architecture_name!r}. Read a file of another"
            " architecture with eg3d_rlhf.generators.load_networks."
        )
    return TriPlaneGenerator, DualDiscriminator


@dataclasses.dataclass
class Networks:
    """A generator, its moving average and its discriminator, with their constructor arguments.

    The modules have the type Any, because each architecture has its own classes.
    """

    G: Any  # generator, or None if the file contains only G_ema
    D: Any  # discriminator, or None if there is none
    G_ema: Any  # generator with the moving average of G's weights
    G_kwargs: dict  # constructor arguments of G and G_ema
    D_kwargs: dict | None  # constructor arguments of D; None without D
    training_set: dict  # description of the training images, such as name and resolution
    cur_nimg: int = 0  # number of images that were used for training
    architecture: str = EG3D  # name of the architecture

    def to(self, device) -> "Networks":
        """Move all modules to a device, in place, and return the object."""
        for module in (self.G, self.D, self.G_ema):
            if module is not None:
                module.to(device)
        return self


def build(G_kwargs: dict, D_kwargs: dict, training_set: dict) -> Networks:
    """Build new networks of EG3D's architecture with random weights. G_ema is a copy of G.

    Args:
        G_kwargs: constructor arguments of G.
        D_kwargs: constructor arguments of D.
        training_set: description of the training images.
    """
    generator = TriPlaneGenerator(**G_kwargs)
    discriminator = DualDiscriminator(**D_kwargs)
    G_ema = copy.deepcopy(generator).eval().requires_grad_(False)
    # Parameters are frozen between phases. Each phase of the training loop enables the gradients of
    # its network.
    generator = generator.train().requires_grad_(False)
    discriminator = discriminator.train().requires_grad_(False)
    return Networks(generator, discriminator, G_ema, G_kwargs, D_kwargs, training_set)


def save(path: str | Path, networks: Networks, only_ema: bool = False) -> None:
    """Write a network file, which is a safetensors file with a JSON header.

    Args: path: path of the file; networks: networks to write; only_ema: True: leave out G and D.
    """
    modules = (
        {"G_ema": networks.G_ema} if only_ema else {"G": networks.G, "D": networks.D, "G_ema": networks.G_ema}
    )
    tensors = {}
    for module_name, module in modules.items():
        if module is not None:
            for tensor_name, tensor in module.state_dict().items():
                tensors[f"{module_name}.{tensor_name}"] = tensor
    meta: dict[str, Any] = {
        "architecture": networks.architecture,
        "G_kwargs": networks.G_kwargs,
        "D_kwargs": networks.D_kwargs,
        "training_set": networks.training_set,
        "cur_nimg": networks.cur_nimg,
    }
    # The rendering resolution changes during training, but is not part of the state dict.
    if hasattr(networks.G_ema, RENDERED):
        meta[RENDERED] = networks.G_ema.neural_rendering_resolution
    # Absent from files without steering, so that their bytes do not change.
    network_steering = steering.steering_of(networks.G_ema)
    if network_steering is not None:
        meta[steering.ATTRIBUTE] = network_steering.describe()
    storage.write_tensors(path, "network", tensors, meta)


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    freeze_layers: int | None = None,
    classes: Callable[[str], Classes] = classes_of_eg3d,
) -> Networks:
    """Read a network file.

    G_ema is in eval mode, G and D are in training mode, and all parameters are frozen.

    Args:
        path: path of the network file.
        device: device of the loaded modules.
        freeze_layers: number of first layers of D that are never trained (Freeze-D, Mo et al. 2020). Their
            weights are buffers. None: the number in the file.
        classes: function that returns the classes of G and D for the name of an architecture.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no network file, or its architecture is unknown.
    """
    tensors, meta = storage.read_tensors(path, "network")
    return from_tensors(tensors, meta, str(path), freeze_layers, classes).to(device)


def from_tensors(
    tensors: dict[str, torch.Tensor],
    meta: dict,
    path: str,
    freeze_layers: int | None = None,
    classes: Callable[[str], Classes] = classes_of_eg3d,
) -> Networks:
    """Build networks on the CPU from the content of a network file.

    Args:
        tensors: tensors by name, such as "G_ema.decoder.net.0.weight".
        meta: description of the file: constructor arguments, training set and number of images.
        path: path of the file, for messages.
        freeze_layers, classes: see `load`.
    Raises: ValueError if the tensors do not fit the arguments, or if the architecture is unknown.
    """
    architecture = meta.get("architecture", EG3D)
    G_class, D_class = classes(architecture)
    # The arguments themselves are changed, because snapshots of this run contain them.
    if freeze_layers is not None and any(tensor_name.startswith("D.") for tensor_name in tensors):
        meta["D_kwargs"]["block_kwargs"] = {
            **meta["D_kwargs"].get("block_kwargs", {}),
            "freeze_layers": freeze_layers,
        }
    modules: dict[str, Any] = {}
    for module_name, module_class, constructor_kwargs in (
        ("G_ema", G_class, meta["G_kwargs"]),
        ("G", G_class, meta["G_kwargs"]),
        ("D", D_class, meta["D_kwargs"]),
    ):
        prefix = f"{module_name}."
        module_tensors = {
            tensor_name.removeprefix(prefix): tensor
            for tensor_name, tensor in tensors.items()
            if tensor_name.startswith(prefix)
        }
        # A file that was saved with only_ema contains neither G nor D. G_ema is required: without its
        # tensors, `load_strict` raises an error.
        if not module_tensors and module_name != "G_ema":
            modules[module_name] = None
            continue
        who = f"{path} ({module_name})"
        module: Any = _make(module_class, constructor_kwargs, who)
        if module_name != "D" and steering.ATTRIBUTE in meta:
            steering.attach(module, steering.Steering(**meta[steering.ATTRIBUTE]))
        storage.load_strict(module, module_tensors, who)
        module.train(module_name != "G_ema").requires_grad_(False)
        if module_name != "D" and RENDERED in meta:
            module.neural_rendering_resolution = meta[RENDERED]
        modules[module_name] = module
    value_by_field: dict[str, Any] = {
        field_name: meta[field_name] for field_name in ("G_kwargs", "D_kwargs", "training_set", "cur_nimg")
    }
    return Networks(**modules, **value_by_field, architecture=architecture)


def _make(module_class: Any, constructor_kwargs: dict, who: str) -> torch.nn.Module:
    """Build a network from the constructor arguments in a file.

    Args:
        module_class: class of the network.
        constructor_kwargs: constructor arguments by name.
        who: file and network, for the message.
    Raises: ValueError for unknown or missing arguments.
    """
    try:
        return module_class(**constructor_kwargs)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{who}: the constructor arguments in the file do not fit the class {module_class.__name__}"
            f" ({error}). Use a file that this version of the package wrote."
        ) from None


def set_mbstd_group(networks: Networks, group_size: int | None) -> None:
    """Set the group size of D's minibatch standard deviation layer. The layer has no weights.

    Args:
        networks: networks whose D is changed in place.
        group_size: number of images in a group; None: no change.
    """
    if group_size is not None and networks.D.b4.mbstd is not None:
        # The constructor arguments are changed, too, because snapshots of this run contain them.
        networks.D.b4.mbstd.group_size = group_size
        assert networks.D_kwargs is not None
        networks.D_kwargs["epilogue_kwargs"] = {
            **networks.D_kwargs.get("epilogue_kwargs", {}),
            "mbstd_group_size": group_size,
        }


def state_hash(module: torch.nn.Module) -> str:
    """Compute the SHA-256 of a module's state dict, in hex.

    The hash covers the names, shapes, dtypes and bytes of all tensors. Files of preference labels contain
    this hash, which identifies the generator whose samples were labelled.
    """
    digest = hashlib.sha256()
    # Sorted, because the order in which submodules were registered must not change the hash.
    for tensor_name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{tensor_name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
