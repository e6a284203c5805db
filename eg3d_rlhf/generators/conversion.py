"""Conversion of networks to other file formats, and of EG3D networks to PanoHead networks.

The converted network has the same shapes as the original, so it is a network of another family with a known
ground truth.

Letters: C plane channels, D slices, F decoded features.
"""

import inspect
import io
import math
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.generators import FAMILIES, load_networks
from eg3d_rlhf.geometry.slab import interpolation
from training import networks, storage
from training.superresolution import SuperresolutionHybrid, module_by_name
from training.triplane import TriPlaneGenerator

SLICES = 3
# Extent of the three slices in sides of the box from which reads inside the box do not fade: the centres of
# the slices then lie on the faces and in the middle of the box.
EXACT = 1.5
# constructor arguments that EG3D's own networks lack
OURS = (
    "plane_resolution",
    "plane_channels",
    "plane_layout",
    "decoder_hidden_dim",
    "decoder_features",
    "neural_rendering_resolution",
)
SUFFIXES = (".safetensors", ".pt", ".pth")
_LATTICE = 257  # positions along the slices at which the weights of the slices are fitted


def slice_shares(extent: float, slices: int = SLICES) -> tuple[torch.Tensor, float]:
    """Fit weights s [D] of slices, so that their blend reproduces a plane in the least-squares sense over the
    box.

    A read at t blends slices with hat functions T(t) [D], so sum_d T_d(t) s_d should be 1.

    Returns: s, and the largest |sum - 1| over the box.
    """
    # Samples of the hat functions at positions over the box, in units of the extent.
    matrix, touched = interpolation(torch.linspace(-1, 1, _LATTICE, dtype=torch.float64) / extent, slices)
    hats = torch.zeros(_LATTICE, slices, dtype=torch.float64)
    # hat functions of all slices; those that the box does not reach stay 0
    hats[:, touched] = matrix.double()
    ones = torch.ones(_LATTICE, 1, dtype=torch.float64)
    # Overdetermined: 257 positions, 3 slices.
    shares = torch.linalg.lstsq(hats, ones).solution
    return shares[:, 0], float((hats @ shares - ones).abs().max())


def to_tri_grid(nets: networks.Networks, extent: float = EXACT) -> tuple[networks.Networks, float]:
    """Convert EG3D networks to PanoHead networks with the same output.

    Each plane becomes three slices. The white (or black) background becomes the constant of a background
    network. The style layer of raw colours becomes the identity. The camera's offset becomes 0. D is the same
    object.

    Args:
        extent: sides of the box that the slices cover. From `EXACT` on, density, colours and images equal
            those of `nets` up to rounding. At 1, as in published networks, features fade towards the faces of
            the box.
    Returns: the networks, and the largest relative error of the features over the box.
    Raises: ValueError for networks of another family.
    """
    if nets.architecture != networks.EG3D:
        raise ValueError(
            f"tri-grid: expected a generator of the family {networks.EG3D}, got one of {nets.architecture}."
            " Choose an EG3D network."
        )
    shares, residual = slice_shares(extent)
    original_rendering = nets.G_kwargs["rendering_kwargs"]
    G_ema: Any = nets.G_ema
    size = G_ema.plane_resolution
    # Options of PanoHead; the others keep the values of the file.
    rendering = {
        **original_rendering,
        "triplane_size": size,
        "triplane_depth": SLICES,
        "triplane_extent": extent,
        "side_margin": None,
        "white_back": False,
        "decoder_activation": "sigmoid",
        "use_torgb_raw": True,
        "use_background": True,
    }
    kwargs = {
        **{k: v for k, v in nets.G_kwargs.items() if k != "plane_resolution"},
        "rendering_kwargs": rendering,
    }
    # Explicit, because the default layouts of the families differ.
    kwargs["plane_layout"] = G_ema.plane_layout
    # A feature of empty space is -1 in -1..1, so white is -1 + 2.
    background = 2.0 if original_rendering.get("white_back", False) else 0.0
    network_class = FAMILIES["panohead"].module
    # G is needed only to continue training.
    G = None if nets.G is None else _converted(network_class, kwargs, nets.G, shares, background)
    converted = _converted(network_class, kwargs, G_ema, shares, background)
    other_fields = nets.D_kwargs, nets.training_set, nets.cur_nimg, "panohead"
    return networks.Networks(G, nets.D, converted, kwargs, *other_fields), residual


@torch.no_grad()
def _converted(
    network_class: type[torch.nn.Module], kwargs: dict, G: Any, shares: torch.Tensor, background: float
) -> Any:
    """Build a PanoHead network and copy the parameters of an EG3D network into it."""
    with torch.random.fork_rng(devices=[]):
        # Fixed values for the features of the background, which tuning may use later
        torch.manual_seed(0)
        network: Any = network_class(**kwargs)
    # References: copying into them changes the network.
    state = network.state_dict()
    for name, value in G.state_dict().items():
        if name.startswith("backbone.synthesis.") and name.endswith((".torgb.weight", ".torgb.bias")):
            # [3 C, ...] -> [3 C, D, ...]: every channel once per slice, times the slice's weight
            sliced = value.unflatten(0, (-1, 1)) * shares.to(value).view(-1, *[1] * (value.ndim - 1))
            value = sliced.flatten(0, 1)
        state[name].copy_(value)
    # these are references to the parameters: the background network's output becomes 0
    for name, value in state.items():
        if name.startswith("bcg_synthesis.") and ".torgb." in name and ".affine." not in name:
            value.zero_()
    features = network.torgb.weight.shape[1]
    # The style becomes its bias, 1, and the convolution the identity. sqrt(F) cancels its weight gain.
    network.torgb.affine.weight.zero_()
    network.torgb.weight.copy_(torch.eye(3, features)[..., None, None] * math.sqrt(features))
    last = getattr(network.bcg_synthesis, f"b{network.bcg_synthesis.img_resolution}")
    last.torgb.bias.fill_(background)  # the constant background
    final = getattr(network.t_mapping, f"fc{network.t_mapping.num_layers - 1}")
    # the offset of the camera becomes 0
    final.weight.zero_()
    # An attribute, not part of the state dict.
    network.neural_rendering_resolution = G.neural_rendering_resolution
    return network.train(G.training).requires_grad_(False)


def foreign_sizes(nets: networks.Networks) -> list[str]:
    """List settings of a generator that EG3D's code has hard-wired to other values, as 'name = value'.

    An empty list means that EG3D's own code can build the network.
    """
    # Sizes that EG3D's code does not take as arguments.
    defaults = {k: p.default for k, p in inspect.signature(TriPlaneGenerator).parameters.items()}
    sizes = ("plane_resolution", "plane_channels", "decoder_hidden_dim", "decoder_features")
    unsupported = [] if nets.architecture == networks.EG3D else [f"architecture = {nets.architecture}"]
    unsupported += [
        f"{k} = {nets.G_kwargs[k]}" for k in sizes if nets.G_kwargs.get(k, defaults[k]) != defaults[k]
    ]
    sr = nets.G_kwargs.get("sr_kwargs") or {}
    module = module_by_name(nets.G_kwargs["rendering_kwargs"]["superresolution_module"])
    # EG3D's code has no other super-resolution modules.
    if not issubclass(module, SuperresolutionHybrid):
        unsupported.append(f"superresolution_module = {module.__name__}")
    else:
        built_in = {
            "input_resolution": module.default_input_resolution,
            "block_channels": list(module.default_block_channels),
        }
        unsupported += [
            f"sr_kwargs.{k} = {sr[k]}" for k, v in built_in.items() if k in sr and sr[k] not in (None, v)
        ]
    # EG3D's super-resolution modules have 512 built in.
    if nets.G_kwargs["w_dim"] != 512:
        unsupported.append(f"w_dim = {nets.G_kwargs['w_dim']}")
    return unsupported


def stock_content(nets: networks.Networks, only_ema: bool = False) -> dict:
    """Return networks as plain containers and tensors, for a .pt file.

    Keys: 'G', 'D', 'G_ema' (state dicts), 'G_kwargs', 'D_kwargs' (EG3D's constructor arguments), 'plane_axes'
    [3, 3, 3], 'neural_rendering_resolution', 'training_set' (JSON values).
    """
    sr = {
        k: v
        for k, v in (nets.G_kwargs.get("sr_kwargs") or {}).items()
        if k not in ("input_resolution", "block_channels")
    }
    G_ema: Any = nets.G_ema
    content: dict = {
        "G_kwargs": {**{k: v for k, v in nets.G_kwargs.items() if k not in OURS}, "sr_kwargs": sr},
        "D_kwargs": nets.D_kwargs,
        "plane_axes": G_ema.renderer.plane_axes.detach().cpu().clone(),
        "training_set": nets.training_set,
        "neural_rendering_resolution": G_ema.neural_rendering_resolution,
    }
    std = nets.training_set.get("label_std")
    for name in ("G_ema",) if only_ema else ("G", "D", "G_ema"):
        module = getattr(nets, name)
        if module is None:
            continue
        # Copies on the CPU, so that the file loads on any machine.
        state = {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}
        # EG3D's training adds this buffer to G
        if name != "D" and std is not None:
            state["dataset_label_std"] = torch.tensor(std, dtype=torch.float32)
        content[name] = state
    return content


def check_suffix(out: Path) -> None:
    """Raise ValueError if the suffix is not that of a network file."""
    if out.suffix not in SUFFIXES:
        raise ValueError(
            f"--out: expected a file ending in {' or '.join(SUFFIXES)}, got {out.name}. Change the suffix."
        )


def write(nets: networks.Networks, out: Path, only_ema: bool = False) -> dict[str, int]:
    """Write networks in the format of the file's suffix: our .safetensors, or .pt (`stock_content`).

    The file is read again, and all tensors are compared.

    Returns: network -> number of tensors.
    Raises: ValueError for another suffix; OSError if the file differs.
    """
    check_suffix(out)
    names = [n for n in (("G_ema",) if only_ema else ("G", "D", "G_ema")) if getattr(nets, n) is not None]
    if out.suffix == ".safetensors":
        networks.save(out, nets, only_ema)
        reloaded = load_networks(out)
        states = {n: getattr(reloaded, n).state_dict() for n in names}
    else:
        # Through memory, because the file has to be written atomically.
        buffer = io.BytesIO()
        torch.save(stock_content(nets, only_ema), buffer)
        storage.write_atomic(out, buffer.getvalue())
        # Executes no code.
        reloaded = torch.load(out, weights_only=True)
        states = {n: reloaded[n] for n in names}
    for name in names:
        for key, tensor in getattr(nets, name).state_dict().items():
            # Bitwise; every tensor is compared.
            if not torch.equal(states[name][key], tensor.cpu()):
                raise OSError(
                    f"{out}: expected {name}.{key} as it was written, got other values. Check the disk."
                )
    return {n: len(states[n]) for n in names}
