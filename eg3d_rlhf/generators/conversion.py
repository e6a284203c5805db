"""Conversion of networks to other file formats, and of EG3D networks to PanoHead networks.

A converted network generates the same shapes as the original. Tests use it as a PanoHead network whose
correct output is known.

Shapes: C is the number of plane channels, D of slices, F of decoded features.
"""

import copy
import io
import math
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core.input_paths import check_suffix
from eg3d_rlhf.generators import FAMILIES, load_networks, pickles
from eg3d_rlhf.generators.state_dicts import stock_content
from eg3d_rlhf.geometry.plane_maps import interpolation_matrix
from training import networks, steering, storage

SLICES = 3  # number of slices that replace each plane
# Smallest extent of the three slices, in sides of the box, for which features do not fade towards the faces
# of the box. The centres of the slices then lie on two faces and in the middle of the box.
EXACT = 1.5
_LATTICE = 257  # positions along the slices at which the weights of the slices are fitted


def fit_slice_weights(extent: float, slice_count: int = SLICES) -> tuple[torch.Tensor, float]:
    """Fit one weight per slice of a tri-grid, so that the interpolated slices reproduce a single plane.

    At the position t across the slices, a tri-grid interpolates linearly: slice d has the weight T_d(t), a
    hat function. Every slice d is the plane times s_d, so the sum over d of T_d(t) s_d should be 1 for all t
    in the box. The function solves this in the least-squares sense.

    Args:
        extent: extent of the slices, in sides of the box.
        slice_count: number of slices D.
    Returns: the weights s [D], and the largest error |sum_d T_d(t) s_d - 1| over the box.
    """
    # Values of the hat functions at positions over the box, in units of the extent. `interpolation_matrix`
    # returns the columns only for slices that the positions reach.
    interpolation_weights, reached_slices = interpolation_matrix(
        torch.linspace(-1, 1, _LATTICE, dtype=torch.float64) / extent, slice_count
    )
    hat_values = torch.zeros(_LATTICE, slice_count, dtype=torch.float64)
    hat_values[:, reached_slices] = interpolation_weights.double()
    ones = torch.ones(_LATTICE, 1, dtype=torch.float64)
    # 257 equations for the weights of 3 slices: [257, D] x = [257, 1].
    slice_weights = torch.linalg.lstsq(hat_values, ones).solution  # [D, 1]
    return slice_weights[:, 0], float((hat_values @ slice_weights - ones).abs().max())


def to_tri_grid(nets: networks.Networks, extent: float = EXACT) -> tuple[networks.Networks, float]:
    """Convert EG3D networks to PanoHead networks with the same output.

    Each plane becomes three slices. PanoHead's background network becomes constant, with the white or black
    background of the EG3D network. PanoHead's layer for raw colours becomes the identity, and its camera
    offset becomes 0. The discriminator D is the same object as in `nets`.

    Args:
        nets: EG3D networks.
        extent: extent of the slices, in sides of the box. If it is at least `EXACT`, the density, colours and
            images equal those of `nets` except for rounding. With 1, as in published networks, features fade
            towards the faces of the box.
    Returns: the converted networks, and the largest relative error of the features over the box.
    Raises: ValueError for networks of another family, or whose xy plane has two slices.
    """
    if nets.architecture != networks.EG3D:
        raise ValueError(
            f"tri-grid: expected a network of the family {networks.EG3D}, got the family {nets.architecture}."
            " Pass an EG3D network."
        )
    _check_slices(nets, "tri-grid")
    slice_weights, largest_error = fit_slice_weights(extent)
    original_rendering_options = nets.G_kwargs["rendering_kwargs"]
    G_ema: Any = nets.G_ema
    plane_resolution = G_ema.plane_resolution
    # PanoHead's additional options. All other options keep their values.
    rendering_options = {
        **original_rendering_options,
        "triplane_size": plane_resolution,
        "triplane_depth": SLICES,
        "triplane_extent": extent,
        "side_margin": None,
        "white_back": False,
        "decoder_activation": "sigmoid",
        "use_torgb_raw": True,
        "use_background": True,
    }
    converted_kwargs = {
        # PanoHead's network takes its plane resolution from the option triplane_size.
        **{
            argument_name: argument
            for argument_name, argument in nets.G_kwargs.items()
            if argument_name != "plane_resolution"
        },
        "rendering_kwargs": rendering_options,
    }
    # Explicit, because the default layouts of the families differ.
    converted_kwargs["plane_layout"] = G_ema.plane_layout
    # An empty pixel has the colour -1 before the background is added, and white is 1, so white needs 2.
    background_value = 2.0 if original_rendering_options.get("white_back", False) else 0.0
    network_class = FAMILIES["panohead"].module
    # Files without training state contain no G.
    converted_G = (
        None
        if nets.G is None
        else _build_converted(network_class, converted_kwargs, nets.G, slice_weights, background_value)
    )
    converted_G_ema = _build_converted(
        network_class, converted_kwargs, G_ema, slice_weights, background_value
    )
    original_steering = steering.steering_of(G_ema)
    if original_steering is not None:
        for network in (converted_G, converted_G_ema):
            if network is not None:
                steering.attach(network, copy.deepcopy(original_steering))
    other_fields = nets.D_kwargs, nets.training_set, nets.cur_nimg, "panohead"
    return networks.Networks(
        converted_G, nets.D, converted_G_ema, converted_kwargs, *other_fields
    ), largest_error


def _check_slices(nets: networks.Networks, who: str) -> None:
    """Raise ValueError if the xy plane of a network has two slices, which other layouts cannot represent.

    Args: nets: networks of any family; who: start of the message.
    """
    if nets.G_kwargs.get("plane_slices", 1) != 1:
        raise ValueError(
            f"{who}: this network has plane_slices={nets.G_kwargs['plane_slices']}: half of the channels of"
            " its xy plane count in front and half at the back, which the original's planes cannot represent."
            " Write a .safetensors file, or convert a network without slices."
        )


@torch.no_grad()
def _build_converted(
    network_class: type[torch.nn.Module],
    constructor_arguments: dict,
    G: Any,
    slice_weights: torch.Tensor,
    background_value: float,
) -> Any:
    """Build a PanoHead network and copy the parameters of an EG3D network into it.

    Args:
        network_class: class of the PanoHead network.
        constructor_arguments: constructor arguments of the PanoHead network.
        G: EG3D network.
        slice_weights: weight of each slice, [D].
        background_value: constant output of the background network.
    """
    with torch.random.fork_rng(devices=[]):
        # The background network has features without effect on the output, which later tuning may change. The
        # seed makes their random initial values reproducible.
        torch.manual_seed(0)
        network: Any = network_class(**constructor_arguments)
    # The state dict holds references, so copying into its tensors changes the network.
    state_dict = network.state_dict()
    # The converted network gets its steering afterwards, see `to_tri_grid`.
    weights_alone = {
        tensor_name: tensor
        for tensor_name, tensor in G.state_dict().items()
        if not tensor_name.startswith(f"{steering.ATTRIBUTE}.")
    }
    for tensor_name, tensor in weights_alone.items():
        if tensor_name.startswith("backbone.synthesis.") and tensor_name.endswith(
            (".torgb.weight", ".torgb.bias")
        ):
            # Each output channel of the plane is repeated for D slices and multiplied by the slice's weight:
            # [3 C, ...] -> [3 C, 1, ...] * [D, 1, ...] -> [3 C, D, ...] -> [3 C D, ...]
            weights_along_slices = slice_weights.to(tensor).view(-1, *[1] * (tensor.ndim - 1))
            tensor = (tensor.unflatten(0, (-1, 1)) * weights_along_slices).flatten(0, 1)
        state_dict[tensor_name].copy_(tensor)
    # The output layers of the background network become 0, apart from the affine layers of their styles.
    for tensor_name, tensor in state_dict.items():
        if (
            tensor_name.startswith("bcg_synthesis.")
            and ".torgb." in tensor_name
            and ".affine." not in tensor_name
        ):
            tensor.zero_()
    feature_count = network.torgb.weight.shape[1]  # F
    # With a weight of 0, the style of the colour layer is its bias, which is 1.
    network.torgb.affine.weight.zero_()
    # [3, F, 1, 1]: a 1 x 1 convolution that returns the first three features. The layer multiplies its
    # weights by 1 / sqrt(F), which sqrt(F) cancels.
    network.torgb.weight.copy_(torch.eye(3, feature_count)[..., None, None] * math.sqrt(feature_count))
    last_block = getattr(network.bcg_synthesis, f"b{network.bcg_synthesis.img_resolution}")
    last_block.torgb.bias.fill_(background_value)
    # The network t_mapping computes the offset of the camera, which becomes 0.
    last_layer = getattr(network.t_mapping, f"fc{network.t_mapping.num_layers - 1}")
    last_layer.weight.zero_()
    # The attribute is not part of the state dict.
    network.neural_rendering_resolution = G.neural_rendering_resolution
    return network.train(G.training).requires_grad_(False)


def write(
    nets: networks.Networks,
    out_path: Path,
    only_ema: bool = False,
    checkout_folder: Path | None = None,
    interpreter: Path | None = None,
) -> dict[str, int]:
    """Write networks to a file. Its suffix selects the format.

    A .safetensors file has the format of this project, a .pt or .pth file the content of `stock_content`. A
    .pkl file is a pickle of EG3D's classes, which a child process writes (pickles/checkout.py). The file is
    read again, and all tensors are compared.

    Args:
        nets: networks to write.
        out_path: path of the file.
        only_ema: True: write only G_ema. A .pkl file always contains G, D and G_ema.
        checkout_folder: user's clone of EG3D, for a .pkl file.
        interpreter: Python interpreter for a .pkl file; None: the interpreter of this process.
    Returns: name of each network in the file -> number of its tensors.
    Raises: ValueError for another suffix, for a network that the format cannot hold, or if a .pkl file cannot
        be written; OSError if the file does not contain the tensors that were written.
    """
    check_suffix(out_path)
    if out_path.suffix != ".safetensors" and steering.steering_of(nets.G_ema) is not None:
        raise ValueError(
            f"--out: {out_path.name} would lose the steering of this network, because the format"
            f" {out_path.suffix} holds weights alone. Add --drop-steering to write the network without it, or"
            f" write {out_path.stem}.safetensors."
        )
    if out_path.suffix != ".safetensors":
        _check_slices(nets, f"--out={out_path.name}")
    if out_path.suffix == ".safetensors":
        networks.save(out_path, nets, only_ema)
    elif out_path.suffix == pickles.SUFFIX:
        assert checkout_folder is not None
        pickles.write(nets, out_path, checkout_folder, interpreter)
    else:
        # `write_atomic` takes bytes, so the file is first written to memory.
        buffer = io.BytesIO()
        torch.save(stock_content(nets, only_ema), buffer)
        storage.write_atomic(out_path, buffer.getvalue())
    try:
        reread_networks = load_networks(out_path)
    except ValueError as error:
        out_path.unlink()
        raise ValueError(
            f"--out: the file was written but cannot be read again, and is deleted: {error}"
        ) from None
    tensor_counts = {}
    for network_name in ("G_ema",) if only_ema else ("G", "D", "G_ema"):
        network = getattr(nets, network_name)
        if network is None:
            continue
        written_state_dict = getattr(reread_networks, network_name).state_dict()
        for tensor_name, tensor in network.state_dict().items():
            # torch.equal demands equal values without any tolerance.
            if not torch.equal(written_state_dict[tensor_name], tensor.cpu()):
                raise OSError(
                    f"{out_path}: after writing, the file has other values of {network_name}.{tensor_name}"
                    " than the network. Check the disk, and write the file again."
                )
        # EG3D's files have one more tensor in G and G_ema, the standard deviation of the camera labels.
        has_label_std = network_name != "D" and "label_std" in nets.training_set
        is_stock = out_path.suffix != ".safetensors"
        tensor_counts[network_name] = len(written_state_dict) + (is_stock and has_label_std)
    return tensor_counts
