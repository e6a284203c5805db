"""Files of plain state dicts (.pt, .pth), which a checkout of EG3D can load with a few lines of code.

Such a file is a dict of dicts, lists, numbers, texts and tensors that torch.save wrote. `stock_content` makes
this dict and `load` builds networks from it again. No code from a file is executed.
"""

import inspect
import math
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core.input_paths import STATE_DICT_SUFFIXES
from eg3d_rlhf.models import weights
from training import networks
from training.rendering.renderer import generate_planes
from training.superresolution import SuperresolutionHybrid, module_by_name
from training.triplane import TriPlaneGenerator

SUFFIXES = STATE_DICT_SUFFIXES
# Constructor arguments of our networks that EG3D's networks do not have.
OURS = (
    "plane_resolution",
    "plane_channels",
    "plane_layout",
    "plane_slices",
    "decoder_hidden_dim",
    "decoder_features",
    "neural_rendering_resolution",
)
LABEL_STD = "dataset_label_std"  # buffer that EG3D's training adds to G and G_ema
# Key of the entries that only this project reads: the name of the family, all constructor arguments of G and
# the number of training images.
_RECORD = "eg3d_rlhf"


def settings_unknown_to_eg3d(nets: networks.Networks) -> list[str]:
    """List settings of a generator that EG3D's code does not support, as texts 'name = value'.

    EG3D's code has fixed values for them. An empty list means that EG3D's code can build the network.
    """
    if nets.architecture != networks.EG3D:
        # The other settings of another family mean nothing to EG3D's code.
        return [f"architecture = {nets.architecture}"]
    # The defaults of our constructor are the fixed values in EG3D's code.
    constructor_parameters = inspect.signature(TriPlaneGenerator).parameters
    unsupported_settings = []
    for setting_name in (
        "plane_resolution",
        "plane_channels",
        "plane_slices",
        "decoder_hidden_dim",
        "decoder_features",
    ):
        default_value = constructor_parameters[setting_name].default
        if nets.G_kwargs.get(setting_name, default_value) != default_value:
            unsupported_settings.append(f"{setting_name} = {nets.G_kwargs[setting_name]}")
    sr_kwargs = nets.G_kwargs.get("sr_kwargs") or {}
    sr_class = module_by_name(nets.G_kwargs["rendering_kwargs"]["superresolution_module"])
    # EG3D's code has only subclasses of this module.
    if not issubclass(sr_class, SuperresolutionHybrid):
        unsupported_settings.append(f"superresolution_module = {sr_class.__name__}")
    else:
        built_in_values = {
            "input_resolution": sr_class.default_input_resolution,
            "block_channels": list(sr_class.default_block_channels),
        }
        for setting_name, built_in_value in built_in_values.items():
            # None selects the built-in value.
            if setting_name in sr_kwargs and sr_kwargs[setting_name] not in (None, built_in_value):
                unsupported_settings.append(f"sr_kwargs.{setting_name} = {sr_kwargs[setting_name]}")
    # EG3D's super-resolution modules have the fixed w_dim 512.
    if nets.G_kwargs["w_dim"] != 512:
        unsupported_settings.append(f"w_dim = {nets.G_kwargs['w_dim']}")
    return unsupported_settings


def stock_content(nets: networks.Networks, only_ema: bool = False) -> dict:
    """Return networks as dicts, lists, numbers, texts and tensors, for a .pt file that EG3D's code can use.

    Args:
        nets: networks of EG3D's family. A checkout can use them if `settings_unknown_to_eg3d` is empty.
        only_ema: True: leave out G and D.
    Returns: a dict with the keys 'G', 'D', 'G_ema' (state dicts), 'G_kwargs', 'D_kwargs' (EG3D's constructor
        arguments), 'plane_axes' [3, 3, 3], 'neural_rendering_resolution', 'training_set' (JSON values), and
        'eg3d_rlhf', which only `load` reads.
    Raises: ValueError for networks of another family.
    """
    if nets.architecture != networks.EG3D:
        raise ValueError(
            f"--out: a .pt file can hold a generator of the family {networks.EG3D} only, got the family"
            f" {nets.architecture}. Write --out=NAME.safetensors."
        )
    # Arguments that EG3D's super-resolution modules do not accept are removed.
    sr_kwargs = {
        entry_name: argument
        for entry_name, argument in (nets.G_kwargs.get("sr_kwargs") or {}).items()
        if entry_name not in ("input_resolution", "block_channels")
    }
    G_ema: Any = nets.G_ema
    file_content: dict = {
        "G_kwargs": {
            **{
                entry_name: argument
                for entry_name, argument in nets.G_kwargs.items()
                if entry_name not in OURS
            },
            "sr_kwargs": sr_kwargs,
        },
        "D_kwargs": nets.D_kwargs,
        "plane_axes": G_ema.renderer.plane_axes.detach().cpu().clone(),
        "training_set": nets.training_set,
        "neural_rendering_resolution": G_ema.neural_rendering_resolution,
        _RECORD: {
            "architecture": nets.architecture,
            "G_kwargs": nets.G_kwargs,
            "cur_nimg": nets.cur_nimg,
        },
    }
    label_std = nets.training_set.get("label_std")
    for entry_name in ("G_ema",) if only_ema else ("G", "D", "G_ema"):
        network = getattr(nets, entry_name)
        if network is None:
            continue
        # On the CPU, so that the file can be loaded on any machine. Cloned, because a tensor that is a view
        # would be stored with its full storage.
        state_dict = {
            tensor_name: tensor.detach().cpu().clone() for tensor_name, tensor in network.state_dict().items()
        }
        # EG3D's training adds this buffer to G and G_ema.
        if entry_name != "D" and label_std is not None:
            state_dict[LABEL_STD] = torch.tensor(label_std, dtype=torch.float32)
        file_content[entry_name] = state_dict
    return file_content


def describe(path: str | Path) -> dict:
    """Read the description of a .pt file: 'networks' (names), 'G_kwargs', 'D_kwargs', 'training_set',
    'neural_rendering_resolution', 'cur_nimg' and 'architecture', as in the header of our network files.

    Raises: FileNotFoundError if there is no such file; ValueError for a file of another kind.
    """
    return _describe(_read(path), path)


def load(
    path: str | Path, device: str | torch.device = "cpu", freeze_layers: int | None = None
) -> networks.Networks:
    """Read a .pt file that `eg3d-rlhf generator convert` wrote.

    Args:
        path: path of the file.
        device: device of the networks.
        freeze_layers: number of first layers of D that are never trained; None: the number in the file.
    Raises: FileNotFoundError if there is no such file; ValueError for a file of another kind, or for tensors
        that do not fit the constructor arguments.
    """
    file_content = _read(path)
    description = _describe(file_content, path)
    # All .pt files that were ever written hold EG3D's family; the classes of other families are not loaded.
    tensors = {
        f"{network_name}.{tensor_name}": tensor
        for network_name in description["networks"]
        for tensor_name, tensor in file_content[network_name].items()
        if tensor_name != LABEL_STD
    }
    return networks.from_tensors(tensors, description, str(path), freeze_layers).to(device)


def _read(path: str | Path) -> dict:
    """Return the content of a .pt file after a check of the types of its entries.

    Raises: FileNotFoundError and ValueError, see `load`.
    """
    file_content = weights.read_content(path, "network")
    required_types = {"G_ema": dict, "G_kwargs": dict, "plane_axes": torch.Tensor, "training_set": dict}
    missing_names = [
        entry_name
        for entry_name, entry_type in required_types.items()
        if not isinstance(file_content, dict) or not isinstance(file_content.get(entry_name), entry_type)
    ]
    if missing_names:
        raise ValueError(
            f"{path}: expected a .pt file that `eg3d-rlhf generator convert` wrote, got a file without"
            f" {', '.join(missing_names)}. Name that file, a network file (.safetensors or .pkl) or a run"
            " folder."
        )
    for network_name in ("G", "D", "G_ema"):
        state_dict = file_content.get(network_name, {})
        if not isinstance(state_dict, dict) or not all(
            isinstance(tensor, torch.Tensor) for tensor in state_dict.values()
        ):
            raise ValueError(
                f"{path}: its entry {network_name} must hold only tensors by name. Convert the original"
                " network file again."
            )
    return file_content


def _describe(file_content: dict, path: str | Path) -> dict:
    """Return the description of the networks in a file, see `describe`."""
    record = file_content.get(_RECORD)
    if not isinstance(record, dict):
        record = {}
    description = {
        "architecture": networks.EG3D,
        # Files of version 0.1 have no record. They hold EG3D's sizes, and the layout follows from the axes.
        "G_kwargs": {**file_content["G_kwargs"], "plane_layout": _layout(file_content["plane_axes"], path)},
        "cur_nimg": 0,
        **record,
        "D_kwargs": file_content.get("D_kwargs"),
        "training_set": file_content["training_set"],
        "networks": [name for name in ("G", "D", "G_ema") if name in file_content],
    }
    resolution = file_content.get("neural_rendering_resolution")
    return description if resolution is None else {**description, networks.RENDERED: resolution}


def _layout(plane_axes: torch.Tensor, path: str | Path) -> str:
    """Return the name of the plane layout of EG3D's family that has these axes [3, 3, 3]."""
    for layout in ("eg3d", "fixed"):
        layout_axes = generate_planes(layout)
        if plane_axes.numel() == math.prod(layout_axes.shape) and torch.equal(
            plane_axes.float(), layout_axes
        ):
            return layout
    raise ValueError(
        f"{path}: its plane_axes belong to no plane layout of EG3D (eg3d, fixed). Convert the original"
        " network file again."
    )
