"""Networks in other formats, and a generator of EG3D as one of PanoHead's kind with the same shapes: a
foreign family with a known truth.

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
# sides of the box along which three slices lie so that reads do not fade inside it: their centres are its
# faces and middle
EXACT = 1.5
OURS = (
    "plane_resolution",
    "plane_channels",
    "plane_layout",
    "decoder_hidden_dim",
    "decoder_features",
    "neural_rendering_resolution",
)
SUFFIXES = (".safetensors", ".pt", ".pth")
_LATTICE = 257  # positions along the slices at which the blend is solved


def slice_shares(extent: float, slices: int = SLICES) -> tuple[torch.Tensor, float]:
    """Shares s [D] of a plane that its slices hold, so that their blend is as near to the plane as can be, in
    least squares along the box.

    A read at t blends slices by hats T(t) [D]; sum_d T_d(t) s_d should be 1. Returns: s, and the largest
    |sum - 1| over the box.
    """
    matrix, touched = interpolation(torch.linspace(-1, 1, _LATTICE, dtype=torch.float64) / extent, slices)
    hats = torch.zeros(_LATTICE, slices, dtype=torch.float64)
    hats[:, touched] = matrix.double()
    ones = torch.ones(_LATTICE, 1, dtype=torch.float64)
    shares = torch.linalg.lstsq(hats, ones).solution
    return shares[:, 0], float((hats @ shares - ones).abs().max())


def to_tri_grid(nets: networks.Networks, extent: float = EXACT) -> tuple[networks.Networks, float]:
    """Networks of EG3D as PanoHead's: every plane becomes three slices, the white (or black) behind it a
    background network's constant, raw colours an identity style layer, and the camera's move nought. D is the
    same object.

    Args: extent: sides of the box along which the slices lie. From `EXACT` on density, colours and pictures
    are those of `nets` up to rounding; at 1, as in published networks, features fade towards the faces.
    Returns: the networks, and the largest relative error of the features over the box.
    Raises: ValueError for networks of another family.
    """
    if nets.architecture != networks.EG3D:
        raise ValueError(
            f"tri-grid: expected a generator of {networks.EG3D}, got one of {nets.architecture}. Name another"
            " file."
        )
    shares, residual = slice_shares(extent)
    stated = nets.G_kwargs["rendering_kwargs"]
    G_ema: Any = nets.G_ema
    size = G_ema.plane_resolution
    rendering = {
        **stated,
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
    kwargs["plane_layout"] = G_ema.plane_layout
    behind = 2.0 if stated.get("white_back", False) else 0.0  # features in -1..1 begin at -1 where nothing is
    make = FAMILIES["panohead"].module
    G = None if nets.G is None else _converted(make, kwargs, nets.G, shares, behind)
    converted = _converted(make, kwargs, G_ema, shares, behind)
    rest = nets.D_kwargs, nets.training_set, nets.cur_nimg, "panohead"
    return networks.Networks(G, nets.D, converted, kwargs, *rest), residual


@torch.no_grad()
def _converted(make: type[torch.nn.Module], kwargs: dict, G: Any, shares: torch.Tensor, behind: float) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the background's features, which tuning may use
        made: Any = make(**kwargs)
    state = made.state_dict()
    for name, value in G.state_dict().items():
        if name.startswith("backbone.synthesis.") and name.endswith((".torgb.weight", ".torgb.bias")):
            # [3 C, D, ...]
            sliced = value.unflatten(0, (-1, 1)) * shares.to(value).view(-1, *[1] * (value.ndim - 1))
            value = sliced.flatten(0, 1)
        state[name].copy_(value)
    for name, value in state.items():  # references to the parameters
        if name.startswith("bcg_synthesis.") and ".torgb." in name and ".affine." not in name:
            value.zero_()
    features = made.torgb.weight.shape[1]
    made.torgb.affine.weight.zero_()
    made.torgb.weight.copy_(torch.eye(3, features)[..., None, None] * math.sqrt(features))
    last = getattr(made.bcg_synthesis, f"b{made.bcg_synthesis.img_resolution}")
    last.torgb.bias.fill_(behind)
    final = getattr(made.t_mapping, f"fc{made.t_mapping.num_layers - 1}")
    final.weight.zero_()
    made.neural_rendering_resolution = G.neural_rendering_resolution
    return made.train(G.training).requires_grad_(False)


def foreign_sizes(nets: networks.Networks) -> list[str]:
    """What of a generator EG3D hard-wires differently, as 'name = value'; empty where a checkout of EG3D can
    build it.
    """
    defaults = {k: p.default for k, p in inspect.signature(TriPlaneGenerator).parameters.items()}
    sizes = ("plane_resolution", "plane_channels", "decoder_hidden_dim", "decoder_features")
    unsupported = [] if nets.architecture == networks.EG3D else [f"architecture = {nets.architecture}"]
    unsupported += [
        f"{k} = {nets.G_kwargs[k]}" for k in sizes if nets.G_kwargs.get(k, defaults[k]) != defaults[k]
    ]
    sr = nets.G_kwargs.get("sr_kwargs") or {}
    module = module_by_name(nets.G_kwargs["rendering_kwargs"]["superresolution_module"])
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
    if nets.G_kwargs["w_dim"] != 512:
        unsupported.append(f"w_dim = {nets.G_kwargs['w_dim']}")
    return unsupported


def stock_content(nets: networks.Networks, only_ema: bool = False) -> dict:
    """Plain containers and tensors: 'G', 'D', 'G_ema' (state dicts), 'G_kwargs', 'D_kwargs'
    (EG3D's constructor arguments), 'plane_axes' [3, 3, 3], 'neural_rendering_resolution', 'training_set'
    (JSON-able).
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
        state = {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}
        if name != "D" and std is not None:  # training adds it to G
            state["dataset_label_std"] = torch.tensor(std, dtype=torch.float32)
        content[name] = state
    return content


def check_suffix(out: Path) -> None:
    """Raise ValueError for a file of another kind."""
    if out.suffix not in SUFFIXES:
        raise ValueError(
            f"--out: expected a file ending in {' or '.join(SUFFIXES)}, got {out.name}. Choose one."
        )


def write(nets: networks.Networks, out: Path, only_ema: bool = False) -> dict[str, int]:
    """Write networks in the format of out's suffix: our .safetensors, or .pt (`stock_content`), and read them
    back to compare.

    Returns: network -> number of tensors.
    Raises: ValueError for another suffix; OSError.
    """
    check_suffix(out)
    names = [n for n in (("G_ema",) if only_ema else ("G", "D", "G_ema")) if getattr(nets, n) is not None]
    if out.suffix == ".safetensors":
        networks.save(out, nets, only_ema)
        again = load_networks(out)
        states = {n: getattr(again, n).state_dict() for n in names}
    else:
        buffer = io.BytesIO()
        torch.save(stock_content(nets, only_ema), buffer)
        storage.write_atomic(out, buffer.getvalue())
        again = torch.load(out, weights_only=True)
        states = {n: again[n] for n in names}
    for name in names:
        for key, tensor in getattr(nets, name).state_dict().items():
            if not torch.equal(states[name][key], tensor.cpu()):
                raise OSError(
                    f"{out}: expected {name}.{key} as it was written, got other numbers. Check the disk."
                )
    return {n: len(states[n]) for n in names}
