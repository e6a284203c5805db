"""Interface of a family of flow generators: how its folders are recognised, read and written.

A family is a class with the attributes and methods of `FlowFamily`; its instance is registered by name
(families/__init__.py). `load` gives a `Pipeline` (stage.py), whose stages are trained and which decodes. What
only some families can do has a protocol of its own, and callers ask for it by `isinstance`:

    Shows             writes an asset to a file that people look at
    EmbedsText        makes conditioning of texts
    EmbedsImages      makes conditioning of images
    Encodes           has a pipeline that encodes assets of the user's own
    Exports           writes a folder in its released layout with tuned networks
    FitsRewards       fits a reward of finished assets to preference pairs
    Opens             opens a problem in a way of its own
    StatesFacts       has facts of a sampled asset for the list
    WritesLatents     keeps latents of sampled assets in its own program's format
    ImportsSamples    reads samples of another project as pairs
    ListsNetworks     says which networks a folder holds and should hold
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:  # families are looked up for --help, which is spared torch
    import torch
    from torch import nn

    from eg3d_rlhf.models.sparse import Latent
    from eg3d_rlhf.models.weights import State
    from eg3d_rlhf.tuning.flow.base.conditioning import Conditions
    from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
    from eg3d_rlhf.tuning.flow.base.problem import Problem
    from eg3d_rlhf.tuning.flow.base.ranking import Candidate, Imported
    from eg3d_rlhf.tuning.flow.base.settings import EncodingSource, ProblemSource
    from eg3d_rlhf.tuning.flow.base.stage import AssetReward, FlowStage

Family = TypeVar("Family", bound="FlowFamily")
# fields of ProblemSource that every family reads
COMMON = ("pipeline", "pairs", "seed", "held_out", "splits", "conditions", "dtype", "precision")
# shape of the conditioning of one sample: tokens [L, E], or of several tensors by name
ConditioningShape = Sequence[int] | Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of a folder, for `eg3d-rlhf flow check`: what its file should hold and what it does."""

    name: str
    file: Path
    expected: Mapping[str, Sequence[int]]  # shapes by name, of the folder's own settings
    tensors: Mapping[str, Any]  # those in the file by name; only shapes and types are read; empty: no file
    without: str = ""  # what cannot be done without it; "": it must be there
    released: tuple[int, int] | None = None  # tensors and numbers in all of the published one


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A file of a folder that holds a stage's network."""

    file: str
    # the network that was tuned, in a type, or in those of its file (None)
    load: Callable[[torch.dtype | None], nn.Module]
    # (file to write, tensors): in the file's own types, with all else that it held
    write: Callable[[Path, State], None]


@dataclass(frozen=True, kw_only=True)
class Release:
    """A folder with other networks of some stages; files are named relative to it."""

    # all that stays, linked, or copied where the file system cannot; or what is written
    files: Mapping[str, Path | bytes]
    networks: Mapping[str, Stored]  # by stage
    elsewhere: Sequence[str] = ()  # names of models that are not on this machine, and stay references


@dataclass(frozen=True, kw_only=True)
class SizedStage:
    """A stage whose network has shapes and no numbers, for estimates of memory and time."""

    stage: FlowStage
    conditioning: ConditioningShape


class FlowFamily(Protocol):
    """A kind of generator. A class that names this one as its base inherits the defaults."""

    name: str
    layout: str  # what a folder holds, for messages
    stages: tuple[str, ...]  # names, in order
    version: str = ""  # which release is read, in words
    address: str = ""  # where the folder is published
    notice: str = ""  # printed once when a folder is opened, such as a licence's restrictions
    loaded_by: str = ""  # how the original's own program opens an exported folder {out}
    up: str = "y"  # axis of shown assets that points up
    cells: int | None = None  # per axis of the grid that `show` reads a surface on; None: no grid
    zero_null: bool = True  # the empty condition is zeros
    batch: int = 1  # assets that are sampled at once by default
    bundled: bool = False  # it comes with this package, and its name stands in place of a folder
    prompts: tuple[str, ...] = ()  # of a bundled generator: all that it knows
    common: tuple[str, ...] = COMMON  # fields of ProblemSource that it reads as every other family does
    options: tuple[str, ...] = ()  # those that it reads besides

    def recognises(self, root: Path) -> bool:
        """Return whether a folder is one of this family, by names and headers alone."""

    def files(self, root: Path, stages: Sequence[str] | None = None) -> Mapping[str, Path]:
        """Return all files that networks and settings come from, by name: their hashes identify a problem.

        Args: stages: those that there are pairs of; None: all.
        """

    def load(
        self,
        root: Path,
        conditions: Conditions | None,
        *,
        stages: Sequence[str] | None = None,
        dtype: torch.dtype | None = ...,
        device: str | torch.device = "cpu",
    ) -> Any:
        """Read a `Pipeline` from a folder, strictly by name and shape.

        Args:
            conditions: embeddings by prompt; None where nothing is sampled.
            stages: whose flows are needed; other flows may stay without weights, and a last stage may be left
                out. None: all. An empty list suffices to encode, to decode, and to estimate memory.
            dtype: of the flows' weights, by default float32; None keeps the file's.
        Raises: FileNotFoundError, ValueError for what is missing, unexpected or misshapen.
        """

    def condition(self, pipeline: Any, stage: str) -> ConditioningShape | None:
        """Return the shape of a stage's conditioning; None: not stated, and no memory is estimated."""
        return None

    def configured(self: Family, source: EncodingSource) -> Family:
        """Return this family with the `options` that a source sets."""
        return self

    def check_pairs(self, pipeline: Any, folder: Path, stage: str, meta: Mapping) -> None:
        """Raise ValueError for pairs of another pipeline; `meta` is what their writer stated."""
        return None

    def pair_meta(self, pipeline: Any, stage: str, report: Mapping) -> Mapping:
        """Return what imported pairs of a stage state besides, for `check_pairs`."""
        return {"family": self.name}

    def candidate(self, record: dict, name: str, folder: Path, pipeline: Any, ranked: bool) -> Candidate:
        """Read a line of a ranked list, by default of sampled assets or of the user's own."""
        from eg3d_rlhf.tuning.flow.base.ranking import asset_candidate, sampled_candidate

        read = asset_candidate(self.read_asset) if isinstance(self, Encodes) else sampled_candidate
        return read(record, name, folder, pipeline, ranked)

    def remark(self, folder: Path, lines: Sequence[Mapping], pipeline: Any) -> str:
        """Return a line about sampled assets, given their folder and list; "": none."""
        return ""

    def released(self) -> Mapping[str, Callable[[], list[SizedStage]]]:
        """Return the sizes of the published generators, by name."""
        return {}


@runtime_checkable
class Shows(Protocol):
    def show(self, asset: Any, path: Path, *cells: int) -> Path:
        """Write an asset to look at, at a path without ending; returns the file.

        Args: cells: per axis of the grid that a surface is read on, where the family has `cells`.
        """


@runtime_checkable
class EmbedsText(Protocol):
    def embed_texts(self, root: Path, texts: Sequence[str], device: torch.device) -> Conditions: ...


@runtime_checkable
class EmbedsImages(Protocol):
    def embed_images(self, root: Path, images: Mapping[str, Path], device: torch.device) -> Conditions: ...


@runtime_checkable
class Encodes(Protocol):
    def read_asset(self, path: Path) -> Any:
        """Read an asset of the user's own, which the pipeline's `encode` takes."""


@runtime_checkable
class Exports(Protocol):
    def release(self, root: Path, stages: Sequence[str]) -> Release:
        """Describe the folder with other networks of some stages."""


@runtime_checkable
class FitsRewards(Protocol):
    def fit_reward(self, pipeline: Any, pairs: Sequence[PreferencePair], title: str) -> AssetReward:
        """Fit a reward to pairs of the last stage, when it is first called; `title` is for the bar."""


@runtime_checkable
class Opens(Protocol):
    def open(self, source: ProblemSource, device: str | torch.device) -> Problem: ...


@runtime_checkable
class StatesFacts(Protocol):
    def facts(self, pipeline: Any, condition: str, latents: Mapping[str, Latent]) -> Mapping:
        """Return JSON that the list of sampled assets states besides."""


@runtime_checkable
class WritesLatents(Protocol):
    def write_latent(self, path: Path, pipeline: Any, stage: str, latent: Latent) -> None: ...


@runtime_checkable
class ImportsSamples(Protocol):
    def read_samples(self, folder: Path, pipeline: Any) -> Imported: ...


@runtime_checkable
class ListsNetworks(Protocol):
    def networks(self, root: Path) -> Sequence[Network]: ...


def check_stages(who: str, family: FlowFamily, names: Sequence[str]) -> None:
    """Raise ValueError for names that are no stages of a family."""
    unknown = sorted(set(names) - set(family.stages))
    if unknown:
        raise ValueError(
            f"{who}: expected stages among {', '.join(family.stages)}, got {', '.join(unknown)}. Name a"
            " stage."
        )


def sized_stages(family: FlowFamily, root: Path) -> list[SizedStage]:
    """Read the stages of a folder by its settings, without weights.

    Raises: ValueError for a family that does not state its conditioning; else as the family's `load`.
    """
    pipeline = family.load(root, None, stages=())
    shapes = {stage.name: family.condition(pipeline, stage.name) for stage in pipeline.stages}
    made = [
        SizedStage(stage=stage, conditioning=shape)
        for stage in pipeline.stages
        if (shape := shapes[stage.name]) is not None
    ]
    if len(made) < len(shapes):
        raise ValueError(
            f"estimate: expected a family that states the shape of its conditioning, got {family.name}."
            " Write its `condition`."
        )
    return made
