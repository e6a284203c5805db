"""Whether a folder of a flow generator is what this package reads, and what can be done with it, on one
screen.

Which networks lie in a folder, and what they should hold, its `FlowFamily` says. Names and shapes are those
of our networks of the folder's own settings, which are the original's (tests/compat/test_family_*.py); only
headers are read.
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

# columns; files and names that are listed
WIDTH = 118
LISTED = 12
FIRST = 8
_LICENCE = ("licen", "notice")  # how names of such files begin
DONE = {
    EmbedsImages: "conditions of pictures",
    EmbedsText: "conditions of texts",
    Shows: "sample",
    Exports: "export",
}


@click.command(cls=GroupedCommand)
@click.argument("root", metavar="ROOT", type=click.Path(path_type=Path, file_okay=False), required=False)
@option(
    "--memory",
    is_flag=True,
    help="Instead: memory of drawing and of an update, from settings; without ROOT, of those published.",
)
@click.pass_context
def check(ctx: click.Context, root: Path | None, memory: bool) -> None:
    """Whether ROOT is a flow generator's folder that can be used, and for what; exit code 0 only where
    everything fits.

    \b
    Example:
        eg3d-rlhf flow check /data/Hunyuan3D-2.1
    """
    if memory:
        for line in memory_of(root):
            click.echo(line)
        return
    if root is None:
        raise ValueError("flow check: expected the folder of a generator, got none. Name it.")
    told: list[str] = []
    family = family_of(root, told.append)
    networks = list(family.networks(root)) if isinstance(family, ListsNetworks) else []
    problems = [problem for network in networks for problem in faults(network)]
    if not isinstance(family, ListsNetworks):
        family.load(root, None)  # raises for what does not fit
    for line in screen(root, family, networks, problems):
        click.echo(line)
    if problems:
        ctx.exit(1)


def memory_of(root: Path | None) -> Iterator[str]:
    """Lines of what adapters' training and drawing take at passes in bfloat16; some seconds to minutes for
    each stage.
    """
    from eg3d_rlhf.tuning.flow.workspace.estimate import estimate, table  # only here: brings all families

    if root is not None:
        yield table(estimate(sized_stages(family_of(root), root), precision="bfloat16"))
        return
    for name, stages in released_sizes().items():
        yield name
        yield f"{table(estimate(stages(), precision='bfloat16', name=name))}\n"


def faults(network: Network) -> list[str]:
    """What does not fit, a line each: missing, unexpected and misshapen tensors, the first eight of them."""
    from eg3d_rlhf.models.weights import shapes

    if not network.found:
        return (
            []
            if network.without
            else [f"{network.name}: expected its tensors in {network.file}, got none. Restore the file."]
        )
    expected = {name: list(shape) for name, shape in network.expected.items()}
    found = shapes(network.found)
    shared = sorted(expected.keys() & found.keys())
    odd = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} {found[name]} instead of {expected[name]}"
            for name in shared
            if found[name] != expected[name]
        ],
    }
    listed = (
        f"{kind}: {', '.join(names[:FIRST])}{' ...' if len(names) > FIRST else ''}"
        for kind, names in odd.items()
        if names
    )
    got = "; ".join(listed)
    return (
        [f"{network.name}: expected the tensors of its settings, {got}. Restore {network.file.name}."]
        if got
        else []
    )


def screen(
    root: Path, family: FlowFamily, networks: Sequence[Network], problems: Sequence[str]
) -> Iterator[str]:
    """The lines."""
    read = dict(family.files(root))
    used = {path.resolve() for path in (*read.values(), *(network.file for network in networks))}
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
    can = [words for protocol, words in DONE.items() if isinstance(family, protocol)]
    lost = [
        f"{network.name} is not there: no {network.without}"
        for network in networks
        if network.without and not network.found
    ]
    loop = (
        ["no loop: stages one by one"]
        if not isinstance(family, FitsRewards)
        else []
        if lost
        else ["the loop"]
    )
    yield from rows("can", [*can, f"tune {', '.join(family.stages)}", *loop])
    if isinstance(family, Encodes) and not lost:
        yield from rows("", ["pairs of assets of your own"])
    for line in lost:
        yield from rows("cannot", [line])
    for problem in problems:
        yield from rows("FAULT", [problem])
    yield from rows(
        "", ["everything fits" if not problems else f"{len(problems)} faults: not usable as it is"]
    )


def licences(root: Path) -> list[Path]:
    """Files of a licence, in a folder or beside it."""
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
    """A titled line, wrapped."""
    parts = list(parts)
    shown = parts[:LISTED] + ([f"{len(parts) - LISTED} more"] if len(parts) > LISTED else [])
    wrapped = textwrap.wrap(", ".join(shown), WIDTH - 10, break_long_words=False, break_on_hyphens=False) or [
        "none"
    ]
    return [f"{title if not number else '':<10}{line}" for number, line in enumerate(wrapped)]


def _described(network: Network) -> str:
    tensors = network.found
    if not tensors:
        return f"{network.name}: not there"
    size = sum(math.prod(tensor.shape) for tensor in tensors.values())
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    same = network.released == (len(tensors), size)
    sizes = "" if network.released is None else ", as released" if same else ", other sizes than released"
    return f"{network.name}: {len(tensors)} tensors, {size:,} numbers, {' and '.join(kinds)}{sizes}"


def _existing(paths: Iterable[Path]) -> list[Path]:
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def _short(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _names(paths: Sequence[Path], root: Path) -> str:
    return " ".join(dict.fromkeys(_short(path, root) for path in paths))


def _bytes(size: int) -> str:
    return (
        f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB" if size >= 1e4 else f"{size} bytes"
    )
