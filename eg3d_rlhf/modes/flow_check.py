"""The job `flow check`, which reports on one screen whether this package can use a flow generator's folder.

The `FlowFamily` of the folder lists its networks. The expected names and shapes of their tensors come from
the networks of this package, built from the settings in the folder; tests/compat/test_family_*.py compare
them with the networks of the original programs. Only the headers of the weight files are read.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, option
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
from eg3d_rlhf.tuning.flow.families import family_of, released_sizes

WIDTH = 118  # characters per line of the screen
LISTED = 12  # largest number of parts in one entry, such as files
FIRST = 8  # largest number of tensors that one fault names
_LICENCE = ("licen", "notice")  # beginnings of the names of licence files, in lower case
# Protocol that a family implements -> use of the folder that it makes possible
DONE = {
    EmbedsImages: "embed images",
    EmbedsText: "embed texts",
    Shows: "sample",
    Exports: "export",
}


@click.command(cls=GroupedCommand)
@click.argument("root", metavar="ROOT", type=click.Path(path_type=Path, file_okay=False), required=False)
@option(
    "--memory",
    is_flag=True,
    help=(
        "Do not check the files; estimate the GPU memory of sampling and of one training update. Without"
        " ROOT, the published models of all families are estimated."
    ),
)
@click.pass_context
def check(ctx: click.Context, root: Path | None, memory: bool) -> None:
    """Check whether this package can use the flow generator in the folder ROOT, and list which commands the
    generator supports. The exit code is 0 if all files fit, and 1 otherwise.

    \b
    Example:
        eg3d-rlhf flow check /data/Hunyuan3D-2.1
    """
    # the estimate needs settings only, so ROOT may be missing
    if memory:
        for line in memory_lines(root):
            click.echo(line)
        click.echo(f"next: eg3d-rlhf flow check {root or 'ROOT'}")
        return
    if root is None:
        raise ValueError(
            "flow check: ROOT is missing. Name the folder of a generator, or add --memory to estimate the"
            " memory of the published models."
        )
    # collects the family's notice about its licence, which `screen_lines` shows instead
    licence_remarks: list[str] = []
    family = family_of(root, licence_remarks.append)
    networks = list(family.networks(root)) if isinstance(family, ListsNetworks) else []
    all_faults = [fault for network in networks for fault in find_faults(network)]
    if not isinstance(family, ListsNetworks):
        # The family of a plugin need not list its networks. Then loading raises an error for files that do
        # not fit.
        family.load(root, None)
    for line in screen_lines(root, family, networks, all_faults):
        click.echo(line)
    if all_faults:
        click.echo(f"next: download the files above again, then eg3d-rlhf flow check {root}")
        # For scripts: the exit code says whether the folder can be used.
        ctx.exit(1)
    inputs = "--images=IMAGES" if isinstance(family, EmbedsImages) else "--prompts=FILE"
    if not isinstance(family, (EmbedsImages, EmbedsText)):
        inputs = "--conditioning=FILE"
    click.echo(f"next: eg3d-rlhf flow new WORK --pipeline={root} {inputs}")


def memory_lines(root: Path | None) -> Iterator[str]:
    """Estimate the GPU memory of sampling and of adapter training, and yield the lines of a table.

    Forward passes are computed in bfloat16. The estimate takes some seconds to minutes for each stage.

    Args:
        root: folder of a generator; None: the published models of all families.
    """
    # imported here because it imports all families
    from eg3d_rlhf.tuning.flow.workspace.estimate import estimate, table

    if root is not None:
        yield table(estimate(sized_stages(family_of(root), root), precision="bfloat16"))
        return
    for name, stages in released_sizes().items():
        yield name
        yield f"{table(estimate(stages(), precision='bfloat16', name=name))}\n"


def find_faults(network: Network) -> list[str]:
    """Compare the tensors of a network with the expected tensors.

    Returns: a list with one text that names the missing, the unexpected and the misshapen tensors, at most
        FIRST of each kind. The list is empty if all tensors fit, or if the folder may lack this network.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.models.weights import shapes

    if not network.tensors:
        # An optional network (`without` is set) may be missing. `screen_lines` reports it.
        return (
            []
            if network.without
            else [f"{network.name} has no tensors in {network.file}. Download this file again."]
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
        return []
    return [
        f"{network.name} does not hold the tensors that its settings describe: {fault_text}. Download"
        f" {network.file.name} again."
    ]


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
    # A family supports a command if it implements the Protocol of this command.
    supported_uses = [use for protocol, use in DONE.items() if isinstance(family, protocol)]
    # optional networks that the folder lacks, with what is impossible without them
    missing_networks = [
        f"{network.name} is missing, so there is no {network.without}"
        for network in networks
        if network.without and not network.tensors
    ]
    # the loop needs a reward of finished assets that can be fitted to the pairs
    if not isinstance(family, FitsRewards):
        loop_support = ["but not --loop: tune the stages one by one"]
    else:
        loop_support = [] if missing_networks else ["the loop"]
    yield from entry_lines("can", [*supported_uses, f"tune {', '.join(family.stages)}", *loop_support])
    if isinstance(family, Encodes) and not missing_networks:
        yield from entry_lines("", ["train on pairs of your own assets"])
    for line in missing_networks:
        yield from entry_lines("cannot", [line])
    for fault in faults:
        yield from entry_lines("FAULT", [fault])
    yield from entry_lines(
        "",
        ["everything fits" if not faults else f"{len(faults)} faults: the folder cannot be used as it is"],
    )


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
