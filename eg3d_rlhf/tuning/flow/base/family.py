"""Interface of a family of flow generators, which recognises, reads and writes folders of generators.

A family is a class with the attributes and methods of `FlowFamily`. An instance of it is registered by name
(families/__init__.py). Its method `load` returns a `Pipeline` (stage.py). Abilities that only some families
have are separate protocols, which callers test by `isinstance`:

    Shows             writes an asset to a file that people look at
    EmbedsText        makes the conditioning of texts
    EmbedsImages      makes the conditioning of images
    Encodes           reads assets of the user, which its pipeline can encode
    Exports           writes a folder in the published layout with tuned networks
    FitsRewards       fits a reward of finished assets to preference pairs
    Opens             opens a tuning problem in its own way
    StatesFacts       adds facts about a sampled asset to the list of assets
    WritesLatents     writes latents of sampled assets in the format of the original program
    ImportsSamples    reads samples of another project as pairs
    ListsNetworks     lists the networks that a folder contains and should contain
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:  # `--help` imports this module, and would be slow with torch
    import torch
    from torch import nn

    from eg3d_rlhf.models.sparse import Latent
    from eg3d_rlhf.models.weights import State
    from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning
    from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
    from eg3d_rlhf.tuning.flow.base.problem import Problem
    from eg3d_rlhf.tuning.flow.base.ranking import Candidate, Imported
    from eg3d_rlhf.tuning.flow.base.settings import EncodingSource, ProblemSource
    from eg3d_rlhf.tuning.flow.base.stage import AssetReward, FlowStage

Family = TypeVar("Family", bound="FlowFamily")
# Fields of ProblemSource that families use by default.
COMMON = ("pipeline", "pairs", "seed", "held_out", "splits", "conditions", "dtype", "precision")
# Shape of the conditioning of one sample: that of tokens [L, E]; or name of a tensor -> its shape.
ConditioningShape = Sequence[int] | Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of a generator's folder, which `eg3d-rlhf flow check` compares with its file."""

    name: str  # name of the network
    file: Path  # file of its weights
    # Name of a tensor -> shape that follows from the settings of the folder.
    expected: Mapping[str, Sequence[int]]
    # Name of a tensor in the file -> tensor, of which only the shape and the data type are read; empty
    # without a file.
    tensors: Mapping[str, Any]
    without: str = ""  # description of what cannot be done without this network; "" if it is required
    # Number of tensors and number of weights of the published network, or None.
    released: tuple[int, int] | None = None
    address: str = ""  # address of the file if it is not the family's address
    embeds: bool = False  # True for a network that only embeds prompts or images
    # Message of the error that a command raises for an encoder that is not on this machine; "" otherwise.
    missing: str = ""
    # Reasons, besides the names and shapes of tensors, why later commands reject the network.
    faults: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Stored:
    """File of a generator's folder that contains the network of one stage."""

    file: str  # path of the file relative to the folder
    # Function that loads the untuned network. Its argument is the data type; None for the data types of the
    # file.
    load: Callable[[torch.dtype | None], nn.Module]
    # Function that writes tensors to a file in the data types of the original file, with all its other
    # contents.
    write: Callable[[Path, State], None]


@dataclass(frozen=True, kw_only=True)
class Release:
    """Description of an exported folder, in which the networks of some stages are replaced."""

    # Path relative to the folder -> original file, which is linked (or copied if the file system has no
    # links), or the bytes to write.
    files: Mapping[str, Path | bytes]
    networks: Mapping[str, Stored]  # name of a stage whose network is replaced -> its file
    elsewhere: Sequence[str] = ()  # names of models to which the folder refers and which it does not contain


@dataclass(frozen=True, kw_only=True)
class SizedStage:
    """A stage whose network has shapes but no weights, for estimates of memory and time."""

    stage: FlowStage
    conditioning: ConditioningShape  # shape of the conditioning of one sample


class FlowFamily(Protocol):
    """Interface of a family of generators. A class with this base class inherits the defaults."""

    name: str  # name of the family
    layout: str  # contents of a folder in words, for messages
    stages: tuple[str, ...]  # names of the stages in order
    # Names of the stages that decide colours and materials and leave the geometry as it is. People answer a
    # question of its own about them, see `question_of`.
    textures: tuple[str, ...] = ()
    version: str = ""  # published version that is supported, in words
    address: str = ""  # address at which the folder is published
    # Text that is printed once when a folder is opened, such as the restrictions of a licence.
    notice: str = ""
    # Code by which the original program opens an exported folder, {out}, or its pipeline.yaml, {settings}.
    loaded_by: str = ""
    up: str = "y"  # axis of shown assets that points up
    # Number of cells per axis of the grid from which `show` extracts a surface; None: no grid.
    cells: int | None = None
    zero_null: bool = True  # True: the empty conditioning is zeros
    batch: int = 1  # default number of assets that are sampled together
    # True: the generator is part of this package, and its name is used in place of a folder.
    bundled: bool = False
    prompts: tuple[str, ...] = ()  # all prompts of a bundled generator
    common: tuple[str, ...] = COMMON  # fields of ProblemSource that this family uses in the usual way
    options: tuple[str, ...] = ()  # additional fields of ProblemSource that this family uses

    def recognises(self, root: Path) -> bool:
        """Return True if a folder contains a generator of this family.

        Only names and headers of files are read.
        """

    def stages_in(self, root: Path) -> tuple[str, ...]:
        """Return the names of the stages of the generator in a folder, in order.

        They are the stages of the family, unless a file in the folder leaves some of them out.
        """
        return self.stages

    def files(self, root: Path, stages: Sequence[str] | None = None) -> Mapping[str, Path]:
        """Return the files of networks and settings, whose hashes identify a problem: name -> path.

        Args:
            root: folder of the generator.
            stages: names of the stages that are trained; None for all stages.
        """

    def load(
        self,
        root: Path,
        conditioning: Conditioning | None,
        *,
        stages: Sequence[str] | None = None,
        dtype: torch.dtype | None = ...,
        device: str | torch.device = "cpu",
    ) -> Any:
        """Read a generator, a `Pipeline`, from a folder. The names and shapes of all tensors have to match.

        Args:
            root: folder of the generator.
            conditioning: embeddings of the prompts; None if nothing will be sampled.
            stages: names of the stages whose flow networks are needed. Other flow networks may have no
                weights, and a last stage may be left out. None: all stages. () is enough to encode, to decode
                and to estimate memory.
            dtype: data type of the flow networks' weights, by default float32; None for the data types of the
                files.
            device: device of the generator.
        Raises: FileNotFoundError for a missing file; ValueError for a tensor with an unexpected name or
        shape.
        """

    def condition(self, pipeline: Any, stage: str) -> ConditioningShape | None:
        """Return the shape of a stage's conditioning, or None if the family does not define it.

        Memory and time can be estimated only if it is defined.
        """
        return None

    def configured(self: Family, source: EncodingSource) -> Family:
        """Return this family with the encoding settings of `source`, if the family encodes assets.

        By default a family has no such settings, and is returned unchanged.
        """
        return self

    def check_pairs(self, pipeline: Any, folder: Path, stage: str, meta: Mapping) -> None:
        """Raise ValueError if pairs belong to another generator.

        Args:
            pipeline: generator.
            folder: folder of the pairs.
            stage: name of the stage.
            meta: metadata of the pairs, from `pair_meta`.
        """
        return None

    def pair_meta(self, pipeline: Any, stage: str, report: Mapping) -> Mapping:
        """Return metadata that is stored with the pairs of a stage, and which `check_pairs` reads.

        Args:
            pipeline: generator.
            stage: name of the stage.
            report: values for JSON about the source of the pairs, see `Imported.report`.
        """
        return {"family": self.name}

    def candidate(self, record: dict, name: str, folder: Path, pipeline: Any, ranked: bool) -> Candidate:
        """Make a candidate for pairs from a line of the list of assets.

        Args:
            record: line of the list, as a dictionary.
            name: name of the asset.
            folder: folder of the list.
            pipeline: generator to which the latents belong.
            ranked: True if the line must have a rank.
        """
        from eg3d_rlhf.tuning.flow.base.ranking import asset_candidate, sampled_candidate

        read_line = asset_candidate(self.read_asset) if isinstance(self, Encodes) else sampled_candidate
        return read_line(record, name, folder, pipeline, ranked)

    def remark(self, folder: Path, lines: Sequence[Mapping], pipeline: Any) -> str:
        """Return a line of text about sampled assets, or "".

        Args:
            folder: folder of the assets.
            lines: lines of the list of these assets, as dictionaries.
            pipeline: generator.
        """
        return ""

    def released(self) -> Mapping[str, Callable[[], list[SizedStage]]]:
        """Return the published generators: name -> function that returns its stages without weights."""
        return {}


@runtime_checkable
class Shows(Protocol):
    """Family that can write assets to files that people look at."""

    def show(self, asset: Any, path: Path, *cells: int) -> Path:
        """Write an asset to a file.

        Args:
            asset: decoded asset.
            path: path of the file without its ending.
            cells: number of cells per axis of the grid from which the surface is extracted, if the family has
                `cells`.
        Returns: path of the file with its ending.
        """


@runtime_checkable
class EmbedsText(Protocol):
    """Family that can make the conditioning of texts."""

    def embed_texts(self, root: Path, texts: Sequence[str], device: torch.device) -> Conditioning:
        """Return the embeddings of texts, by the text encoder in the folder `root`."""


@runtime_checkable
class EmbedsImages(Protocol):
    """Family that can make the conditioning of images."""

    def embed_images(self, root: Path, images: Mapping[str, Path], device: torch.device) -> Conditioning:
        """Return the embeddings of images (prompt -> file), by the image encoder in the folder `root`."""


@runtime_checkable
class Encodes(Protocol):
    """Family that can encode assets of the user as latents."""

    def read_asset(self, path: Path) -> Any:
        """Read an asset of the user in the form that the method `encode` of the generator needs."""


@runtime_checkable
class Exports(Protocol):
    """Family whose generators can be exported in their published layout."""

    def release(self, root: Path, stages: Sequence[str]) -> Release:
        """Describe the exported folder, in which the networks of some stages are replaced.

        Args:
            root: folder of the original generator.
            stages: names of the stages whose networks are replaced.
        """


@runtime_checkable
class FitsRewards(Protocol):
    """Family that can fit a reward of finished assets to preference pairs."""

    def fit_reward(self, pipeline: Any, pairs: Sequence[PreferencePair], title: str) -> AssetReward:
        """Return a reward that is fitted to pairs of the last stage when it is first called.

        Args:
            pipeline: generator.
            pairs: pairs of the last stage.
            title: title of the progress bar.
        """


@runtime_checkable
class Opens(Protocol):
    """Family that opens a tuning problem in its own way."""

    def open(self, source: ProblemSource, device: str | torch.device) -> Problem:
        """Open the tuning problem that `source` describes, on a device."""


@runtime_checkable
class StatesFacts(Protocol):
    """Family that adds facts about a sampled asset to the list of assets."""

    def facts(self, pipeline: Any, condition: str, latents: Mapping[str, Latent]) -> Mapping:
        """Return additional values for JSON in the asset's line, from its prompt and its latents."""


@runtime_checkable
class WritesLatents(Protocol):
    """Family that writes latents of sampled assets in the format of the original program."""

    def write_latent(self, path: Path, pipeline: Any, stage: str, latent: Latent) -> None:
        """Write the latent of a stage to a file."""


@runtime_checkable
class ImportsSamples(Protocol):
    """Family that can read samples of another project as pairs."""

    def read_samples(self, folder: Path, pipeline: Any) -> Imported:
        """Read the pairs in a folder of the other project."""


@runtime_checkable
class ListsNetworks(Protocol):
    """Family that can list the networks of a folder."""

    def networks(self, root: Path) -> Sequence[Network]:
        """Return the networks that the folder `root` contains or should contain."""


# Names of the questions about a pair of assets from which stages learn. They are criteria of `flow label`.
GEOMETRY = "geometry"
TEXTURE = "texture"


def question_of(family: FlowFamily, stage: str) -> str:
    """Return the question from whose answers a stage learns: TEXTURE for stages of textures, else GEOMETRY.

    A stage that decides both geometry and colours, such as the second stage of TRELLIS, learns from GEOMETRY.
    """
    return TEXTURE if stage in family.textures else GEOMETRY


def check_stages(who: str, existing_stages: Sequence[str], stage_names: Sequence[str]) -> None:
    """Raise ValueError if a name is not a stage of a generator.

    Args:
        who: beginning of the message.
        existing_stages: names of the generator's stages.
        stage_names: names to check.
    """
    unknown_stages = sorted(set(stage_names) - set(existing_stages))
    if unknown_stages:
        raise ValueError(
            f"{who}: this generator has no stage {', '.join(unknown_stages)}. Use stages among"
            f" {', '.join(existing_stages)}."
        )


def sized_stages(family: FlowFamily, root: Path) -> list[SizedStage]:
    """Return all stages of a generator with shapes but without weights, from the settings in its folder.

    Raises: ValueError if the family does not define the shape of its conditioning; the errors of `load`.
    """
    # With stages=() the pipeline has all its stages, but the weights of no flow network are read.
    pipeline = family.load(root, None, stages=())
    sized_stage_list = []
    for stage in pipeline.stages:
        conditioning_shape = family.condition(pipeline, stage.name)
        if conditioning_shape is None:
            raise ValueError(
                f"estimate: the family {family.name} does not define the shape of its conditioning. Add the"
                " method `condition` to it."
            )
        sized_stage_list.append(SizedStage(stage=stage, conditioning=conditioning_shape))
    return sized_stage_list
