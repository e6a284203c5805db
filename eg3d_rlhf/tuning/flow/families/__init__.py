"""The registry of families of flow generators: what tells a family's folder, and what is done with it.

A family is a module of this package that FAMILIES names, or a plugin's file (docs/extending.md): it registers
a `FlowFamily`, and `train.py --mode=circular-dpo --pipeline=ROOT` and `eg3d-rlhf flow` then know its folders
by what lies in them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core.registry import Registry, load_plugins
from eg3d_rlhf.models.sparse import Latent
from eg3d_rlhf.tuning.flow.base.conditioning import Conditions
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.base.problem import Problem, ProblemSource
from eg3d_rlhf.tuning.flow.base.ranking import Candidates, drawn_candidate
from eg3d_rlhf.tuning.flow.base.stage import AssetReward

# (pipeline, pairs of its last stage, title)
Judge = Callable[[Any, Sequence[PreferencePair], str], AssetReward]
# (root, Conditions, *, dtype, device) -> Pipeline; without conditions nothing is sampled
Load = Callable[..., Any]
# of ProblemSource, read by all families
COMMON = ("pipeline", "pairs", "seed", "held_out", "splits", "conditions", "dtype", "precision")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of a folder, for `eg3d-rlhf flow check`: what its file should hold and what it does."""

    name: str
    file: Path
    expected: Mapping[str, Sequence[int]]  # shapes by name, of the folder's own settings
    found: Mapping[str, Any]  # tensors by name, of which only shapes and types are looked at; none: not there
    without: str = ""  # what cannot be done without it; "": it must be there
    released: tuple[int, int] | None = None  # tensors and numbers in all of the published one


@dataclass(frozen=True, kw_only=True)
class FlowFamily:
    """A kind of generator, and how its folders are read and written."""

    name: str
    layout: str  # what its folder holds, for messages
    recognises: Callable[[Path], bool]  # whether a folder is one of its own, by names and headers alone
    stages: tuple[str, ...]  # names of its stages, in order
    load: Load  # strictly by name and shape; ValueError for what is missing, unexpected or misshapen
    # (root): all that networks and settings come from, by name: their hashes identify a problem
    files: Callable[..., Mapping[str, Path]]
    # a reward of people's pairs; None: stages are trained one by one, and nothing is judged
    judge: Judge | None = None
    zero_null: bool = True  # the empty condition is zeros
    bundled: bool = False  # it comes with this package, and is called by its name in place of a folder's
    common: tuple[str, ...] = COMMON  # fields of ProblemSource that it reads as every other family does
    options: tuple[str, ...] = ()  # of ProblemSource, that it reads besides the common ones
    open: Callable[[ProblemSource, str | torch.device], Problem] | None = None  # in place of `open_folder`
    # (root, pictures by name, device)
    embed: Callable[[Path, Mapping[str, Path], torch.device], Conditions] | None = None
    # (root, texts, device)
    embed_texts: Callable[[Path, Sequence[str], torch.device], Conditions] | None = None
    show: Callable[..., Path] | None = None  # write (asset, path without ending) to look at; returns the file
    # (pipeline, condition, latents by stage): JSON that the list
    facts: Callable[[Any, str, Mapping[str, Latent]], Mapping] | None = None
    # of drawn assets says besides
    # (folder of drawn assets, its list, pipeline): said of them
    remark: Callable[[Path, Sequence[Mapping], Any], str] | None = None
    up: str = "y"  # axis of what `show` writes that points up
    # per axis of the grid that show reads an asset on, its third argument; None: nothing to choose
    cells: int | None = None
    # (root, tuned stages): its folder with others of these, an export.Release
    release: Callable[[Path, Sequence[str]], Any] | None = None
    loaded_by: str = ""  # how the original's own program opens an exported folder {out}
    # (file, pipeline, stage, latent): each in its own format
    write_latent: Callable[[Path, Any, str, Latent], None] | None = None
    # (root, *, device): a pipeline that encodes assets which others made; with "views" among
    encoder: Callable[..., Any] | None = None
    # the options also share, views
    candidate: Candidates = drawn_candidate  # reads a line of a ranked list
    # (pipeline, stage, report): what imported pairs state besides
    pair_meta: Callable[[Any, str, Mapping], Mapping] | None = None
    # (pipeline, stage) -> shape of a condition, [L, E], or by name; for estimates
    told: Callable[[Any, str], Any] | None = None
    # of a folder; None: it is opened to see whether it fits
    networks: Callable[[Path], Sequence[Network]] | None = None
    version: str = ""  # which release it is, in words
    # of a bundled generator: all that it knows, and what it is told where none are given
    prompts: tuple[str, ...] = ()
    batch: int = 1  # assets that are drawn at once, unless told otherwise
    address: str = ""  # where its folder is published
    notice: str = ""  # printed once when a folder is opened: licences that exclude somebody


FAMILIES: Registry[FlowFamily] = Registry(
    "flow family",
    {
        "toy": "eg3d_rlhf.tuning.flow.toy.bundled",
        "trellis": "eg3d_rlhf.tuning.flow.families.trellis",
        "trellis2": "eg3d_rlhf.tuning.flow.families.trellis2",
        "hunyuan3d": "eg3d_rlhf.tuning.flow.families.hunyuan3d",
        "sam3d": "eg3d_rlhf.tuning.flow.families.sam3d",
    },
)
_told: set[str] = set()


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def register(family: FlowFamily) -> FlowFamily:
    return FAMILIES.add(family.name, family)


def bundled_family(name: str) -> FlowFamily | None:
    """The family that comes with this package under a name, if there is one."""
    family = FAMILIES[name] if name in FAMILIES else None
    return family if family is not None and family.bundled else None


def family_of(root: Path, say: Callable[[str], None] = tell) -> FlowFamily:
    """The family of a folder, or the bundled one of that name; its notice is said once.

    Raises: FileNotFoundError for no folder, or one of no known family.
    """
    root, bundled = Path(root), bundled_family(str(root))
    if bundled is not None:
        return bundled
    load_plugins()  # any of theirs may know the folder
    for family in FAMILIES.values():
        if root.is_dir() and family.recognises(root):
            if family.notice and family.name not in _told:
                _told.add(family.name)
                say(family.notice)
            return family
    if not root.is_dir() or not any(root.iterdir()):
        got = "an empty folder" if root.is_dir() else "no such folder" if not root.exists() else "a file"
        addresses = [family.address for family in FAMILIES.values() if family.address]
        same = [address for address in addresses if address.rpartition("/")[2].lower() == root.name.lower()]
        fetch = " or ".join(same or addresses)
        raise FileNotFoundError(
            f"pipeline: expected a generator's folder, got {got}: {root}. Name it, or fetch one: {fetch}"
        )
    layouts = "; ".join(f"{family.name}: {family.layout}" for family in FAMILIES.values())
    raise FileNotFoundError(
        f"pipeline: expected the folder of a known generator ({layouts}), got {root}. Name such a folder."
    )


def check_stages(who: str, family: FlowFamily, names: Sequence[str]) -> None:
    """Raise ValueError for names that are no stages of a family."""
    unknown = sorted(set(names) - set(family.stages))
    if unknown:
        raise ValueError(
            f"{who}: expected stages among {', '.join(family.stages)}, got {', '.join(unknown)}. Name a"
            " stage."
        )
