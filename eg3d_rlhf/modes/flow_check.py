"""The job `flow check`, which reports on one screen whether this package can use a flow generator's folder.

The `FlowFamily` of the folder lists its networks and the tensors that each must hold. The expected names and
shapes are those of our networks, built from the folder's own settings; they equal the original's
(tests/compat/test_family_*.py). Only the headers of the weight files are read.
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

# columns of the screen; files listed per row (LISTED) and names listed per fault (FIRST)
WIDTH = 118
LISTED = 12
FIRST = 8
_LICENCE = ("licen", "notice")  # how names of such files begin
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
    help="Estimate the memory of sampling and of an update instead; without ROOT, for the published models.",
)
@click.pass_context
def check(ctx: click.Context, root: Path | None, memory: bool) -> None:
    """Check whether ROOT is a usable flow generator's folder, and list what can be done with it. The exit
    code is 0 only if every file fits.

    \b
    Example:
        eg3d-rlhf flow check /data/Hunyuan3D-2.1
    """
    # the estimate needs settings only, so ROOT may be missing
    if memory:
        for line in memory_of(root):
            click.echo(line)
        return
    if root is None:
        raise ValueError("flow check needs the folder of a generator, or --memory. Name the folder.")
    remarks: list[str] = []
    family = family_of(root, remarks.append)
    networks = list(family.networks(root)) if isinstance(family, ListsNetworks) else []
    problems = [problem for network in networks for problem in faults(network)]
    if not isinstance(family, ListsNetworks):
        # a plugin that lists no networks: loading raises an error for what does not fit
        family.load(root, None)
    for line in screen(root, family, networks, problems):
        click.echo(line)
    if problems:
        ctx.exit(1)


def memory_of(root: Path | None) -> Iterator[str]:
    """Estimate the memory of adapter training and of sampling, with passes in bfloat16. Yields lines.

    The estimate takes some seconds to minutes for each stage.
    """
    from eg3d_rlhf.tuning.flow.workspace.estimate import (
        estimate,
        table,
    )  # imported here because it imports all families

    if root is not None:
        yield table(estimate(sized_stages(family_of(root), root), precision="bfloat16"))
        return
    for name, stages in released_sizes().items():
        yield name
        yield f"{table(estimate(stages(), precision='bfloat16', name=name))}\n"


def faults(network: Network) -> list[str]:
    """Return a line for each fault of a network: missing, unexpected and misshapen tensors, the first
    eight.
    """
    from eg3d_rlhf.models.weights import shapes

    if not network.tensors:
        # a network that the folder may lack is no fault; `screen` says what cannot be done without it
        return (
            [] if network.without else [f"{network.name} has no tensors in {network.file}. Restore the file."]
        )
    # shapes as lists, as `shapes` reads them from the file's header
    expected = {name: list(shape) for name, shape in network.expected.items()}
    present = shapes(network.tensors)
    shared = sorted(expected.keys() & present.keys())
    odd = {
        "missing": sorted(expected.keys() - present.keys()),
        "unexpected": sorted(present.keys() - expected.keys()),
        "misshapen": [
            f"{name} {present[name]} instead of {expected[name]}"
            for name in shared
            if present[name] != expected[name]
        ],
    }
    # only kinds of faults that occur
    listed = (
        f"{kind}: {', '.join(names[:FIRST])}{' ...' if len(names) > FIRST else ''}"
        for kind, names in odd.items()
        if names
    )
    got = "; ".join(listed)
    return (
        [f"{network.name} does not hold the tensors of its settings: {got}. Restore {network.file.name}."]
        if got
        else []
    )


def screen(
    root: Path, family: FlowFamily, networks: Sequence[Network], problems: Sequence[str]
) -> Iterator[str]:
    """Yield the lines of the screen: files, networks, licence, what the folder can be used for, faults."""
    # name -> path of the files that the family loads
    read = dict(family.files(root))
    # resolved, so that a link and its target count as the same file
    used = {path.resolve() for path in (*read.values(), *(network.file for network in networks))}
    # hidden files and folders, such as a download's cache, are not listed
    hidden = set(root.rglob(".*"))
    there = [
        path for path in sorted(root.rglob("*")) if path.is_file() and not {path, *path.parents} & hidden
    ]
    yield from rows("family", [f"{family.name} ({family.version or family.layout})"])
    yield from rows(
        "read", [f"{_short(path, root)} ({_bytes(path.stat().st_size)})" for path in _existing(read.values())]
    )
    yield from rows("not read", [_short(path, root) for path in there if path.resolve() not in used])
    for network in networks:
        yield from rows("network", [_described(network)])
    yield from rows("licence", [family.notice or "see the publisher's"])
    yield from rows("", [f"files of it: {_names(licences(root), root) or 'none: fetch them'}"])
    # a family offers what it implements a Protocol for
    can = [words for protocol, words in DONE.items() if isinstance(family, protocol)]
    # optional networks that the folder lacks, with what is impossible without them
    lost = [
        f"{network.name} is missing, so there is no {network.without}"
        for network in networks
        if network.without and not network.tensors
    ]
    # the loop needs a reward of finished assets that can be fitted to the pairs
    loop = (
        ["no loop: tune stages one by one"]
        if not isinstance(family, FitsRewards)
        else []
        if lost
        else ["the loop"]
    )
    yield from rows("can", [*can, f"tune {', '.join(family.stages)}", *loop])
    if isinstance(family, Encodes) and not lost:
        yield from rows("", ["train on pairs of your own assets"])
    for line in lost:
        yield from rows("cannot", [line])
    for problem in problems:
        yield from rows("FAULT", [problem])
    yield from rows(
        "",
        [
            "everything fits"
            if not problems
            else f"{len(problems)} faults: the folder cannot be used as it is"
        ],
    )


def licences(root: Path) -> list[Path]:
    """List the licence files in a folder and beside it."""
    # files of the folder itself, without hidden folders such as .git
    below = [
        path
        for path in sorted(root.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    return [
        path
        for path in (*below, *sorted(root.parent.glob("*")))
        if path.name.lower().startswith(_LICENCE) and path.is_file()
    ]


def rows(title: str, parts: Iterable[str]) -> list[str]:
    """Wrap comma-separated parts into lines, of which the first has the title."""
    parts = list(parts)
    # long lists end with the number of parts that are left out
    shown = parts[:LISTED] + ([f"{len(parts) - LISTED} more"] if len(parts) > LISTED else [])
    # textwrap returns no line for an empty text, hence "none"
    wrapped = textwrap.wrap(", ".join(shown), WIDTH - 10, break_long_words=False, break_on_hyphens=False) or [
        "none"
    ]
    return [f"{title if not number else '':<10}{line}" for number, line in enumerate(wrapped)]


def _described(network: Network) -> str:
    """Describe a network by its number of tensors, its size and its dtypes."""
    tensors = network.tensors
    if not tensors:
        return f"{network.name}: missing"
    # numbers in all tensors; from shapes alone, no data is read
    size = sum(math.prod(tensor.shape) for tensor in tensors.values())
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    # a fine-tuned copy has the published sizes, another variant of the model has not
    same = network.released == (len(tensors), size)
    sizes = "" if network.released is None else ", as released" if same else ", other sizes than released"
    return f"{network.name}: {len(tensors)} tensors, {size:,} numbers, {' and '.join(kinds)}{sizes}"


def _existing(paths: Iterable[Path]) -> list[Path]:
    """Drop repeated paths and those that are no files, keeping the order."""
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def _short(path: Path, root: Path) -> str:
    """Write a path relative to the folder where it lies below it."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _names(paths: Sequence[Path], root: Path) -> str:
    """Join short paths with spaces, each once."""
    return " ".join(dict.fromkeys(_short(path, root) for path in paths))


def _bytes(size: int) -> str:
    """Write a file size in decimal units."""
    return (
        f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB" if size >= 1e4 else f"{size} bytes"
    )
