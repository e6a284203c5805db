"""Jobs on network files: `generator inspect` describes the networks in a file, and `generator convert` writes
them in another format.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eg3d_rlhf.core.cli import GroupedCommand, argument, file_hash, option
from eg3d_rlhf.core.input_paths import check_network, check_suffix, find_network

if TYPE_CHECKING:
    import torch

    from eg3d_rlhf.generators import Generator
    from training import networks


def describe_file(file_or_folder: str | Path | None) -> dict[str, Any]:
    """Describe a network file itself: path, size in bytes and SHA-256.

    The description of a pickle also holds its protocol and the globals (classes and functions) that it
    imports.

    Args:
        file_or_folder: network file or run folder; None: the bundled generator.

    Raises: FileNotFoundError for a missing file; ValueError for a pickle that imports globals that are not
        allowed, naming them.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.generators import pickles

    network_path = find_network(file_or_folder)
    check_network(network_path)
    file_facts: dict[str, Any] = {
        "path": str(network_path),
        "bytes": network_path.stat().st_size,
        "sha256": file_hash(network_path),
    }
    if network_path.suffix.lower() == ".pkl":
        # The pickle is parsed; the code in it is not run.
        snapshot = pickles.read(network_path)
        file_facts |= {"protocol": snapshot.protocol, "globals": dict(sorted(snapshot.name_counts.items()))}
    return file_facts


def describe_networks(file_or_folder: str | Path | None, seed_count: int = 256) -> dict[str, Any]:
    """Load the networks of a file, and describe them.

    The description holds their tensors, the arguments of their constructors, the density of eight samples,
    and statistics of w.

    Args:
        file_or_folder: network file or run folder; None: the bundled generator.
        seed_count: number of latents over which the statistics are computed.

    Raises: ValueError or OSError of `load_networks` for a file that cannot be loaded.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.generators import as_generator, load_networks, tasks_text
    from training.progress import working
    from training.steering import steering_of

    nets = load_networks(find_network(file_or_folder))
    G = nets.G_ema
    network_steering = steering_of(G)
    module_by_name = {name: getattr(nets, name) for name in ("G", "D", "G_ema")}
    # a file may lack some of the three networks
    module_by_name = {name: module for name, module in module_by_name.items() if module is not None}
    with working("density of eight samples"):
        density = describe_density(as_generator(G))
    description = {
        "family": nets.architecture,
        # what this project can do with this file
        "tasks": tasks_text(nets.architecture, list(module_by_name)),
        "networks": {name: describe_module(network) for name, network in module_by_name.items()},
        # with these arguments, the networks can be built again
        "constructor": {"G": nets.G_kwargs, "D": nets.D_kwargs},
        "training_set": nets.training_set,
        "cur_nimg": nets.cur_nimg,
        # the move of latents that is part of the mapping, see training/steering.py
        "steering": "none" if network_steering is None else network_steering.describe(),
        # whether meshes of samples have a surface
        "density": density,
    }
    # A generator of another family has no feature planes, and is described by its general sizes only.
    if not hasattr(G, "plane_layout"):
        return description | {
            "generator": {
                name: getattr(as_generator(G), name)
                for name in ("z_dim", "w_dim", "num_ws", "img_resolution", "level")
            }
        }
    # the layout determines onto which coordinates the three planes project
    plane_facts = {"layout": G.plane_layout, "resolution": G.plane_resolution, "channels": G.plane_channels}
    # With two slices, one half of the xy plane's channels counts in front and the other half at the back.
    if G.plane_slices > 1:
        plane_facts["slices"] = G.plane_slices
    return description | {
        "generator": {
            **{
                name: getattr(G, name)
                for name in (
                    "z_dim",
                    "c_dim",
                    "w_dim",
                    "num_ws",
                    "img_resolution",
                    "neural_rendering_resolution",
                )
            },
            "planes": plane_facts,
            "superresolution": type(G.superresolution).__name__,
            "rendering_kwargs": G.rendering_kwargs,
        },
        # the statistics show how strong a truncation by psi is
        "psi": psi_statistics(nets, seed_count),
    }


def describe_density(generator: "Generator") -> dict[str, Any]:
    """Look at the density of eight samples: its range, the share above the surface level, a proposed level.

    See `DensityCheck` for the entries. The entry `remedy` is added if some samples have no surface.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.generators.density_samples import LEVEL_REMEDY, check_density

    check = check_density(generator)
    problem = check.problem(LEVEL_REMEDY)
    return check.to_dict() | ({} if problem is None else {"remedy": problem})


def describe_module(module: "torch.nn.Module") -> dict[str, Any]:
    """Describe a network.

    The description holds its class, the number of its tensors, the numbers of elements of its parameters and
    of its buffers, the number of elements that are not finite, and the hash of its state.
    """
    # imported here, because --help must not load these modules
    import torch

    from training import networks

    # parameters and buffers
    state_dict = module.state_dict()
    parameters = dict(module.named_parameters())
    return {
        "class": type(module).__name__,
        "tensors": len(state_dict),
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "buffers": sum(tensor.numel() for name, tensor in state_dict.items() if name not in parameters),
        "not_finite": sum(int((~torch.isfinite(tensor)).sum()) for tensor in state_dict.values()),
        # equal hashes mean equal weights, also in files of different formats
        "hash": networks.state_hash(module),
    }


def psi_statistics(nets: "networks.Networks", seed_count: int) -> dict[str, float]:
    """Measure how far latents lie from the centre of the truncation, w(psi) = w_avg + psi (w - w_avg).

    w is the output of the mapping network, which is conditioned on the frontal camera, and w_avg is the mean
    of w in training (StyleGAN, arXiv:1812.04948, appendix B).

    Args:
        nets: networks of the file.
        seed_count: number of latents, with the seeds 0 to seed_count - 1.

    Returns: a dictionary of numbers.
        seed_count: number of latents.
        w_avg_norm: Euclidean norm of w_avg.
        w_norm_mean: mean norm of w.
        distance_mean: mean distance between w and w_avg.
        distance_std: standard deviation of this distance.
        centre_error: distance between the mean of w and w_avg. It is small compared with distance_mean if
            w_avg is the mean for the frontal camera.
        component_std: standard deviation of a component of w, averaged over the components.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.generators import ws_of_seeds

    G_ema: Any = nets.G_ema
    # [W], stored in the network
    w_avg = G_ema.backbone.mapping.w_avg
    # psi is 1 by default. The mapping network repeats w for every layer, so the first layer is enough.
    w = ws_of_seeds(G_ema, range(seed_count))[:, 0]  # [N, W]
    distances = (w - w_avg).norm(dim=1)
    return {
        "seeds": seed_count,
        "w_avg_norm": float(w_avg.norm()),
        "w_norm_mean": float(w.norm(dim=1).mean()),
        "distance_mean": float(distances.mean()),
        # unbiased=False: divided by N, as numpy does by default
        "distance_std": float(distances.std(unbiased=False)),
        "centre_error": float((w.mean(dim=0) - w_avg).norm()),
        "component_std": float(w.std(dim=0, unbiased=False).mean()),
    }


def format_description(description: dict[str, Any], indent: int = 0) -> list[str]:
    """Format a nested description as lines, with two spaces of indentation per level.

    Args:
        description: values or further dictionaries by name.
        indent: level of indentation of the first level.
    """
    lines = []
    for entry_name, entry_value in description.items():
        # An empty dictionary is printed as a value, {}.
        is_nested = isinstance(entry_value, dict) and entry_value
        value_text = (
            ""
            if is_nested
            else f" {entry_value:.6g}"
            if isinstance(entry_value, float)
            else f" {entry_value}"
        )
        lines.append(f"{'  ' * indent}{entry_name}:{value_text}")
        lines += format_description(entry_value, indent + 1) if is_nested else []
    return lines


@click.command("inspect", cls=GroupedCommand)
@argument("file", check_network, type=click.Path(path_type=Path), required=False)
@option(
    "--n",
    metavar="LATENTS",
    type=click.IntRange(2, 100_000),
    default=256,
    help="Number of latents over which the statistics of w are computed.",
)
@option("--json", "as_json", is_flag=True, help="Print the description as JSON.")
def inspect_network(file: Path | None, n: int, as_json: bool) -> None:
    """Describe a network file: its architecture, sizes, plane layout, statistics of the truncation, density
    of eight samples and SHA-256. For a pickle, all globals that it imports are listed.

    FILE is a network file of this project, a pickle of EG3D (.pkl; its code is not run) or a run folder.
    Without FILE, the bundled generator is described.

    \b
    Example:
        eg3d-rlhf generator inspect assets/generator.safetensors
    """
    # The file is described first: a pickle that is not allowed raises an error before anything is loaded.
    description = describe_file(file)
    description.update(describe_networks(file, n))
    if as_json:
        click.echo(json.dumps(description, indent=1))
        return
    # The only line that asks for an action is printed last, where it is seen.
    remedy = description["density"].pop("remedy", None)
    click.echo("\n".join(format_description(description)))
    if remedy is not None:
        click.echo(f"Warning: {remedy}")


@click.command("convert", cls=GroupedCommand)
@argument("file", check_network, type=click.Path(path_type=Path))
@option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File to write; its ending, .safetensors, .pt or .pkl, selects the format.",
)
@option(
    "--eg3d",
    metavar="CHECKOUT",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help=(
        "Folder into which you cloned EG3D's repository. Required for --out=NAME.pkl, which is written with"
        " the classes in this folder."
    ),
)
@option(
    "--eg3d-python",
    metavar="INTERPRETER",
    type=click.Path(path_type=Path),
    show_default="the interpreter of this command",
    help="Python interpreter of the environment in which the checkout of --eg3d runs.",
)
@option("--only-ema", is_flag=True, help="Write only G_ema, the moving average of the generator.")
@option("--overwrite", is_flag=True, help="Replace an existing file.")
@option(
    "--drop-steering",
    is_flag=True,
    help="Write a steered network without its steering. Formats of other projects hold no steering.",
)
@option(
    "--tri-grid",
    metavar="NUM",
    type=click.FloatRange(min=1, max=100),
    help=(
        "Convert the feature planes to PanoHead's tri-grid, which has three slices per plane. NUM is the"
        " extent that the slices cover, in edge lengths of the rendered box. From 1.5 on, the density is"
        " unchanged; PanoHead uses 1."
    ),
)
def convert(
    file: Path,
    out: Path,
    eg3d: Path | None,
    eg3d_python: Path | None,
    only_ema: bool,
    overwrite: bool,
    drop_steering: bool,
    tri_grid: float | None,
) -> None:
    """Convert a network file to another format. FILE is a pickle of EG3D, whose code is not run, a network
    file of this project, or a run folder.

    --out=X.safetensors writes the format of this project. --out=X.pt writes a plain state dict for the code
    of EG3D; docs/reference/checkpoints.md shows how to load it. --out=X.pkl writes a pickle that EG3D's own
    tools open: a child process builds the classes of your checkout, which --eg3d names. --tri-grid converts
    a generator of EG3D to the architecture of PanoHead, with the same shapes. All of these files are accepted
    wherever a command takes a network.

    \b
    Example:
        eg3d-rlhf generator convert assets/generator.safetensors --out=runs/example/generator.pt
    """
    # Checked before the network is read, which takes time.
    check_suffix(out)
    # A network file may be the result of a long training.
    if out.exists() and not overwrite:
        raise ValueError(f"--out: {out} exists. Choose another file, or add --overwrite.")
    # Imported here, so that --help and errors are printed without loading these modules.
    from eg3d_rlhf.generators import load_networks, pickles
    from eg3d_rlhf.generators.conversion import to_tri_grid, write
    from eg3d_rlhf.generators.state_dicts import settings_unknown_to_eg3d
    from training.progress import working
    from training.steering import detach, steering_of

    _check_checkout_flags(out, eg3d, eg3d_python, only_ema)
    network_path = find_network(file)
    click.echo(f"Reading {network_path}.")
    # A pickle is parsed and its tensors are copied; its code is not run.
    nets = load_networks(network_path)
    if drop_steering:
        if steering_of(nets.G_ema) is None:
            raise ValueError(f"--drop-steering: {network_path} is not steered. Remove this flag.")
        for network in (nets.G, nets.G_ema):
            if network is not None:
                detach(network)
    if tri_grid is not None:
        # From NUM = 1.5 on, the residual is only a rounding error.
        nets, relative_residual = to_tri_grid(nets, tri_grid)
        click.echo(
            f"Tri-grid of 3 slices along {tri_grid:g} sides of the box: relative difference to the features"
            f" of the planes: {relative_residual:.2g}."
        )
    if out.suffix == pickles.SUFFIX:
        # Before the child process starts, which imports torch again.
        pickles.check_networks(nets)
        click.echo(f"Writing {out} with the classes in {eg3d}.")
    # settings of this network that are constants in the code of EG3D, with other values
    unknown_settings = settings_unknown_to_eg3d(nets)
    # The format of this project stores these sizes, a plain state dict does not.
    if out.suffix != ".safetensors" and unknown_settings:
        click.echo(
            "Warning: a checkout of EG3D cannot build this generator, because it hard-codes these sizes:"
            f" {', '.join(unknown_settings)}.",
            err=True,
        )
    with working(f"writing {out.name}"):
        # number of tensors per network
        tensor_counts = write(nets, out, only_ema, eg3d, eg3d_python)
    click.echo(
        f"{out}: "
        + ", ".join(
            f"{network_name} {tensor_count} tensors" for network_name, tensor_count in tensor_counts.items()
        )
        + "; the file was read back and compared equal."
    )


def _check_checkout_flags(
    out_path: Path, checkout_folder: Path | None, interpreter: Path | None, only_ema: bool
) -> None:
    """Raise ValueError if --eg3d, --eg3d-python or --only-ema do not fit the format of --out."""
    # imported here, because --help must not load this module
    from eg3d_rlhf.generators import pickles

    if out_path.suffix != pickles.SUFFIX:
        for flag, flag_value in (("--eg3d", checkout_folder), ("--eg3d-python", interpreter)):
            if flag_value is not None:
                raise ValueError(
                    f"{flag} has an effect only with --out=NAME{pickles.SUFFIX}, but --out={out_path}. Remove"
                    f" {flag}, or write --out={out_path.with_suffix(pickles.SUFFIX)}."
                )
        return
    if only_ema:
        raise ValueError(
            f"--only-ema cannot be combined with --out={out_path}: EG3D's tools open only pickles with G, D"
            " and G_ema. Remove --only-ema."
        )
    if checkout_folder is None:
        raise ValueError(
            f"--out={out_path}: a pickle is written with the classes of a checkout of EG3D. Add"
            f" --eg3d=CHECKOUT, or write --out={out_path.with_suffix('.pt')}."
        )
    pickles.find_code(checkout_folder)
