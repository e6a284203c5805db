"""The job `flow check`, which reports on one screen whether this package can use a flow generator's folder.

The `FlowFamily` of the folder lists its networks, and the encoder of prompts or images. The expected names
and shapes of their tensors come from the networks of this package, built from the settings in the folder;
tests/compat/test_family_*.py compare them with the networks of the original programs. Values are read only
with --deep.
"""

import math
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, argument, option
from eg3d_rlhf.experiments.mode import flags_of
from eg3d_rlhf.tuning.flow.base.family import (
    EmbedsImages,
    EmbedsText,
    Encodes,
    Exports,
    FitsRewards,
    FlowFamily,
    ListsNetworks,
    Network,
    Shows,
    sized_stages,
)
from eg3d_rlhf.tuning.flow.families import check_root, family_of

WIDTH = 118  # characters per line of the screen
LISTED = 12  # largest number of parts in one entry, such as files
FIRST = 8  # largest number of tensors that one fault names
_LICENCE = ("licen", "notice")  # beginnings of the names of licence files, in lower case
# Protocol that a family implements -> use of the folder that it makes possible
# and the ability that an encoder in the list of networks provides, see `Network.without`
DONE = {
    EmbedsImages: ("embed images", "embedding of images"),
    EmbedsText: ("embed texts", "embedding of texts"),
    Shows: ("sample", ""),
    Exports: ("export", ""),
}


@click.command(cls=GroupedCommand)
@argument(
    "root", check_root, metavar="ROOT", type=click.Path(path_type=Path, file_okay=False), required=False
)
@option(
    "--memory",
    is_flag=True,
    help=(
        "Do not check the files; estimate the GPU memory of sampling and of one training update. Without"
        " ROOT, the table of the published models is printed at once."
    ),
)
@option(
    "--deep",
    is_flag=True,
    help="Also read all weights, and report values that are NaN or infinite. This takes some seconds per GB.",
)
@option(
    "--tune",
    type=click.Choice(["lora", "full"]),
    default="lora",
    help="With --memory: parameters that the update tunes, only LoRA adapters or all parameters.",
)
@option(
    "--gpus",
    metavar="N",
    type=click.IntRange(1),
    default=1,
    help=(
        "With --memory and --tune=full: number of processes of torchrun, which divide the training state"
        " (FSDP2). The memory of one process is shown."
    ),
)
@option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="With --memory: data type of the weights, as in `flow tune --dtype`.",
)
@click.pass_context
def check(
    ctx: click.Context, root: Path | None, memory: bool, deep: bool, tune: str, gpus: int, dtype: str
) -> None:
    """Check whether this package can use the flow generator in the folder ROOT, and list which commands the
    generator supports. The exit code is 0 if all files fit, and 1 otherwise.

    \b
    Examples:
        eg3d-rlhf flow check /data/Hunyuan3D-2.1
        eg3d-rlhf flow check --memory --tune=full --gpus=4
    """
    flags = flags_of(ctx)
    flags.check_applies(("tune", "gpus", "dtype"), memory, "--memory is not given")
    flags.check_applies(("deep",), not memory, "--memory reads no weights")
    flags.check_applies(
        ("gpus",), tune == "full", "adapters are copied to every process, and only --tune=full is divided"
    )
    flags.check_applies(("dtype",), tune != "full", "--tune=full trains float32 weights")
    # the estimate needs settings only, so ROOT may be missing
    if memory:
        for line in memory_lines(root, tune, gpus, dtype):
            click.echo(line)
        click.echo(f"next: eg3d-rlhf flow check {root or 'ROOT'}")
        return
    if root is None:
        raise ValueError(
            "flow check: ROOT is missing. Name the folder of a generator, or add --memory to estimate the"
            " memory of the published models."
        )
    # imported here, because --help must not load this module
    from training.progress import tqdm

    # collects the family's notice about its licence, which `screen_lines` shows instead
    licence_remarks: list[str] = []
    family = family_of(root, licence_remarks.append)
    networks = list(family.networks(root)) if isinstance(family, ListsNetworks) else []
    with tqdm(networks, desc="checking", unit="network", leave=False) as checked_networks:
        all_faults = [fault for network in checked_networks for fault in find_faults(network, deep)]
    if not isinstance(family, ListsNetworks):
        # The family of a plugin need not list its networks. Then loading raises an error for files that do
        # not fit.
        family.load(root, None)
    for line in screen_lines(root, family, networks, all_faults):
        click.echo(line)
    if deep and networks and not all_faults:
        read_count = sum(math.prod(t.shape) for network in networks for t in network.tensors.values())
        for line in entry_lines("values", [f"all {read_count:,} numbers are finite"]):
            click.echo(line)
    if all_faults:
        click.echo("Download the files above again.")
        click.echo(f"next: eg3d-rlhf flow check {shlex.quote(str(root))}{' --deep' if deep else ''}")
        # For scripts: the exit code says whether the folder can be used.
        ctx.exit(1)
    # Without the encoder of the inputs, `flow new` cannot embed them.
    missing_encoders = [network for network in networks if network.embeds and not network.tensors]
    if missing_encoders and len(missing_encoders) == sum(network.embeds for network in networks):
        click.echo(f"next: {download_command(missing_encoders[0], family)}")
        return
    inputs = "--images=IMAGES" if isinstance(family, EmbedsImages) else "--prompts=FILE"
    if not isinstance(family, (EmbedsImages, EmbedsText)):
        inputs = "--conditioning=FILE"
    click.echo(f"next: eg3d-rlhf flow new WORK --pipeline={shlex.quote(str(root))} {inputs}")


def memory_lines(root: Path | None, tune: str, gpus: int, dtype: str) -> Iterator[str]:
    """Yield the lines of a table with the GPU memory of sampling and of one training update.

    Forward passes are computed in bfloat16. A folder's estimate takes some seconds to minutes for each stage.
    The published models' is read from a file of this package.

    Args:
        root: folder of a generator; None: the published models of all families.
        tune: "lora" for adapters, "full" for all weights.
        gpus: number of processes that divide the training state of full tuning.
        dtype: data type of the weights.
    """
    # imported here because they import all families
    from eg3d_rlhf.tuning.flow.workspace.estimate import estimate, rows_of, table
    from eg3d_rlhf.tuning.flow.workspace.published_memory import DEVICE, PRECISION, published_costs

    if root is not None:
        costs_of_folder = estimate(
            sized_stages(family_of(root), root),
            precision=PRECISION,
            dtype=dtype,
            tune=tune,
            gpus=gpus,
            device_type=DEVICE,
        )
        yield table(costs_of_folder)
        return
    for name, costs in published_costs().items():
        rows = rows_of([cost for cost in costs if cost.what in ("sample", tune)], dtype=dtype, gpus=gpus)
        yield name
        yield f"{table(rows)}\n"


def find_faults(network: Network, deep: bool = False) -> list[str]:
    """Find the reasons why later commands would reject a network.

    Args:
        network: network of a generator.
        deep: True to read all values, too, and to report those that are not finite.
    Returns: texts about adapters that are not merged, or about the missing, the unexpected and the misshapen
        tensors, at most FIRST of each kind; about values that are not finite; and the faults that the family
        has found. The list is empty if all fits, or if the folder may lack this network.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.models.weights import nonfinite_names, shapes, unmerged_layers, unmerged_message

    if not network.tensors:
        # An optional network (`without` is set) may be missing. `screen_lines` reports it.
        return (
            list(network.faults)
            if network.without
            else [f"{network.name} has no tensors in {network.file}. Download this file again."]
        )
    if adapted_layers := unmerged_layers(network.tensors.keys() - network.expected.keys()):
        return [unmerged_message(f"{network.name}, {network.file}", adapted_layers)]
    value_faults = list(network.faults)
    if deep and (faulty_names := nonfinite_names(network.tensors)):
        names_text = ", ".join(faulty_names[:FIRST]) + (" ..." if len(faulty_names) > FIRST else "")
        value_faults.append(
            f"{network.name} has values that are NaN or infinite, in {len(faulty_names)} of"
            f" {len(network.tensors)} tensors: {names_text}. Download {network.file.name} again, or use an"
            " earlier checkpoint."
        )
    # lists, because `shapes` returns the shapes in the file's header as lists
    expected_shapes = {name: list(shape) for name, shape in network.expected.items()}
    present_shapes = shapes(network.tensors)
    shared_names = sorted(expected_shapes.keys() & present_shapes.keys())
    faulty_tensors = {
        "missing": sorted(expected_shapes.keys() - present_shapes.keys()),
        "unexpected": sorted(present_shapes.keys() - expected_shapes.keys()),
        "misshapen": [
            f"{name} {present_shapes[name]} instead of {expected_shapes[name]}"
            for name in shared_names
            if present_shapes[name] != expected_shapes[name]
        ],
    }
    # only the kinds of faults that occur
    fault_text = "; ".join(
        f"{fault_kind}: {', '.join(tensor_texts[:FIRST])}{' ...' if len(tensor_texts) > FIRST else ''}"
        for fault_kind, tensor_texts in faulty_tensors.items()
        if tensor_texts
    )
    if not fault_text:
        return value_faults
    return [
        f"{network.name} does not hold the tensors that its settings describe: {fault_text}. Download"
        f" {network.file.name} again.",
        *value_faults,
    ]


def download_command(network: Network, family: FlowFamily) -> str:
    """Return the command that gets a missing encoder of prompts or images.

    The message about the missing encoder contains it, if its files are on a hub or in a Python package.
    """
    command = re.search(r"hf download [\w./-]*\w|pip install '[^']+'", network.missing)
    return command.group() if command else f"download {find_address(network, family)}"


def find_address(network: Network, family: FlowFamily) -> str:
    """Return the address at which a network is published, or "" if it is not known."""
    return network.address or family.address


def screen_lines(
    root: Path, family: FlowFamily, networks: Sequence[Network], faults: Sequence[str]
) -> Iterator[str]:
    """Yield the lines of the screen: files, networks, licence, supported commands, and faults.

    Args:
        root: folder of the generator.
        family: family of the generator.
        networks: networks of the folder; empty if the family does not list them.
        faults: texts of `find_faults` for all networks.
    """
    # name -> path of the files that the family loads
    path_by_name = dict(family.files(root))
    # resolved, so that a link and its target count as the same file
    used_paths = {
        path.resolve() for path in (*path_by_name.values(), *(network.file for network in networks))
    }
    # hidden files and folders, such as a download's cache, are not listed
    hidden_paths = set(root.rglob(".*"))
    all_files = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not {path, *path.parents} & hidden_paths
    ]
    yield from entry_lines("family", [f"{family.name} ({family.version or family.layout})"])
    yield from entry_lines(
        "read",
        [
            f"{_relative_path(path, root)} ({_format_size(path.stat().st_size)})"
            for path in _existing_files(path_by_name.values())
        ],
    )
    yield from entry_lines(
        "not read", [_relative_path(path, root) for path in all_files if path.resolve() not in used_paths]
    )
    for network in networks:
        yield from entry_lines("network", [_describe_network(network)])
    # A licence may restrict the use of the generator, so it is always shown.
    yield from entry_lines("licence", [family.notice or "see the licence of the publisher"])
    licence_names = _join_paths(find_licences(root), root)
    yield from entry_lines("", [f"licence files: {licence_names or 'none found; see the publisher'}"])
    # optional networks that the folder lacks
    missing_networks = [network for network in networks if network.without and not network.tensors]
    # A family supports a command if it implements the Protocol of this command. A family of several kinds of
    # pipelines implements more; the encoder that it lists for this folder decides.
    encoder_uses = {network.without: bool(network.tensors) for network in networks if network.embeds}
    supported_uses = [
        use
        for protocol, (use, ability) in DONE.items()
        if isinstance(family, protocol) and (not ability or not encoder_uses or encoder_uses.get(ability))
    ]
    # without it the folder cannot make pairs of the user's assets
    missing_asset_encoders = [network for network in missing_networks if not network.embeds]
    # the loop needs a reward of finished assets that can be fitted to the pairs
    if not isinstance(family, FitsRewards):
        loop_support = ["but not --loop: tune the stages one by one"]
    else:
        loop_support = [] if missing_asset_encoders else ["the loop"]
    stage_names = ", ".join(family.stages_in(root))
    yield from entry_lines("can", [*supported_uses, f"tune {stage_names}", *loop_support])
    if isinstance(family, Encodes) and not missing_asset_encoders:
        yield from entry_lines("", ["train on pairs of your own assets"])
    for network in missing_networks:
        if not network.faults:
            yield from entry_lines("cannot", [describe_missing(network, family)])
    for fault in faults:
        yield from entry_lines("FAULT", [fault])
    yield from entry_lines(
        "",
        [
            "everything fits"
            if not faults and not missing_networks
            else f"all files that are here fit; {counted(len(missing_networks), 'network')} missing"
            if not faults
            else f"{counted(len(faults), 'fault')} found: the folder cannot be used as it is"
        ],
    )


def counted(count: int, noun: str) -> str:
    """Return a number with its noun and the verb be: "1 network is", "2 networks are"."""
    return f"1 {noun} is" if count == 1 else f"{count} {noun}s are"


def describe_missing(network: Network, family: FlowFamily) -> str:
    """Describe an optional network that is missing: what is impossible without it, and how to get it."""
    address = find_address(network, family)
    # The message of an encoder states where it was searched for, and its address.
    remedy = network.missing or (f"It is published at {address}." if address else "")
    return f"{network.name} is missing. It is needed for {network.without}. {remedy}".strip()


def find_licences(root: Path) -> list[Path]:
    """List the licence files in a folder and its subfolders, and in the folder that contains it."""
    # files of the folder itself, without hidden folders such as .git
    inner_paths = [
        path
        for path in sorted(root.rglob("*"))
        if not any(path_part.startswith(".") for path_part in path.relative_to(root).parts)
    ]
    return [
        path
        for path in (*inner_paths, *sorted(root.parent.glob("*")))
        if path.name.lower().startswith(_LICENCE) and path.is_file()
    ]


def entry_lines(title: str, texts: Iterable[str]) -> list[str]:
    """Format one entry of the screen: a title, and parts separated by commas, wrapped to WIDTH characters.

    Args:
        title: word in the first ten columns of the first line.
        texts: parts of the entry; at most LISTED are shown, then the number of the others. Without parts, the
            entry shows the word none.

    Returns: the lines of the entry.
    """
    texts = list(texts)
    # long lists end with the number of parts that are left out
    shown_parts = texts[:LISTED] + ([f"{len(texts) - LISTED} more"] if len(texts) > LISTED else [])
    # textwrap returns no line for an empty text, hence "none"
    # 10: width of the column of titles
    lines = textwrap.wrap(
        ", ".join(shown_parts), WIDTH - 10, break_long_words=False, break_on_hyphens=False
    ) or ["none"]
    return [f"{title if not line_index else '':<10}{line}" for line_index, line in enumerate(lines)]


def _describe_network(network: Network) -> str:
    """Describe a network in one line.

    The line holds the number of tensors, the number of their elements, their dtypes, and the information
    whether these two numbers equal the numbers of the released network.
    """
    tensors = network.tensors
    if not tensors:
        return f"{network.name}: missing"
    # number of elements of all tensors; computed from the shapes, so no data is read
    number_count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    dtype_counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    # A fine-tuned copy has the sizes of the released network; another variant of the model has other sizes.
    has_released_size = network.released == (len(tensors), number_count)
    comparison_text = ""
    if network.released is not None:
        comparison_text = ", as released" if has_released_size else ", other sizes than released"
    return (
        f"{network.name}: {len(tensors)} tensors, {number_count:,} numbers,"
        f" {' and '.join(dtype_counts)}{comparison_text}"
    )


def _existing_files(paths: Iterable[Path]) -> list[Path]:
    """Return the paths that are existing files, each path once, in their order."""
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def _relative_path(path: Path, root: Path) -> str:
    """Return a path relative to the folder `root`, or the unchanged path if it lies outside this folder."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _join_paths(paths: Sequence[Path], root: Path) -> str:
    """Join paths relative to the folder `root` with spaces, each path once."""
    return " ".join(dict.fromkeys(_relative_path(path, root) for path in paths))


def _format_size(byte_count: int) -> str:
    """Format a file size: GB from 1e8 bytes on, MB from 1e4 bytes on, else bytes (1 MB = 1e6 bytes)."""
    return (
        f"{byte_count / 1e9:.2f} GB"
        if byte_count >= 1e8
        else f"{byte_count / 1e6:.2f} MB"
        if byte_count >= 1e4
        else f"{byte_count} bytes"
    )
