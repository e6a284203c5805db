"""Settings of RewardCS, a reward that reads meshes: patches, network sizes, and training.

A patch is a group of neighbouring faces of a mesh. This module does not import torch, so that `--help` is
quick.
"""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path

from training.config import check_knobs, knob

PATCHIFIER_NAMES = ("regions", "maps")  # names of functions in patchifiers.py
SOURCE_NAMES = ("heads", "janus")  # sources of generated meshes, see dataset.py
AREAS = ("share", "raw")  # units of areas, see patchifiers.py
PLACES = ("centre", "box", "world")  # coordinate frames of meshes, see `patchifiers.to_frame`


@dataclass(frozen=True, kw_only=True)
class PatchOptions:
    """Settings with which meshes are converted to patches. They are stored in the file of a reward.

    Raises: ValueError for a value that is not allowed.
    """

    kind: str = "regions"  # method that divides a mesh into patches, one of PATCHIFIER_NAMES
    patches: int = 64  # number of patches of a mesh
    faces: int = 64  # number of faces of a patch; a power of 4 for the kind "maps"
    area: str = "share"  # unit of areas, one of AREAS
    place: str = "centre"  # origin and unit of the centres of faces, one of PLACES

    def __post_init__(self) -> None:
        for name, allowed_values in (("kind", PATCHIFIER_NAMES), ("area", AREAS), ("place", PLACES)):
            if getattr(self, name) not in allowed_values:
                raise ValueError(
                    f"PatchOptions.{name}: expected one of {', '.join(allowed_values)}, got"
                    f" {getattr(self, name)!r}. Use one of these values."
                )


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Sizes of the mesh encoder. MeshMAE has 64 faces, width 768, 12 blocks and 12 heads.

    Raises: ValueError for a value outside its range.
    """

    faces: int = 64  # number of faces of a patch
    width: int = 64  # number of channels of a token; a multiple of `heads`
    depth: int = 3  # number of transformer blocks
    heads: int = 4  # number of attention heads

    def __post_init__(self) -> None:
        if min(self.faces, self.width, self.heads) < 1 or self.depth < 0 or self.width % self.heads:
            raise ValueError(
                "EncoderOptions: expected faces, width and heads of at least 1, a depth of at least 0, and a"
                f" width that is a multiple of heads, got faces {self.faces}, width {self.width}, heads"
                f" {self.heads} and depth {self.depth}. Use, for example, --set width=64 --set heads=4, and"
                " positive numbers of faces."
            )


DATA = "Data"
_rare_data_knob = functools.partial(knob, group=DATA, rare=True)
NET = "Network"
_rare_net_knob = functools.partial(knob, group=NET, rare=True)
TRAIN = "Training"
_rare_train_knob = functools.partial(knob, group=TRAIN, rare=True)


@dataclass(frozen=True, kw_only=True)
class MeshRewardTraining:
    """Settings of a training of RewardCS.

    With one thread, equal settings give the same result on the same machine.

    Raises: ValueError for a value that is outside its range or contradicts another value.
    """

    source: str = knob(
        "heads",
        "Kind of the generated training meshes: heads are smooth synthetic heads, and janus are box heads of"
        " the bundled text-to-3D test problem.",
        DATA,
        choices=SOURCE_NAMES,
    )
    data: Path | None = knob(
        None,
        "File that lists meshes (.jsonl), one line per mesh with its path, its prompt, and a score (0 to 5)"
        " or a label (1 preferred, 0 not). The training then uses these meshes instead of generated ones.",
        DATA,
        metavar="FILE",
        shown="none",
    )
    shapes: int = knob(
        840,
        "Number of generated meshes. One mesh in 20 has a score between the thresholds of preferred and other"
        " meshes, and is not used.",
        DATA,
        low=20,
    )
    data_seed: int = _rare_data_knob(
        0,
        "Random seed of the generated meshes, and of the choice of the meshes that are held out. --seed does"
        " not change them.",
        low=0,
    )
    held_out: float = _rare_data_knob(
        0.25, "Share of the meshes that are held out from training and used for the test.", above=0, below=1
    )
    resolution: int = _rare_data_knob(
        20, "Number of grid cells per axis on which generated meshes are extracted.", low=4, high=128
    )
    patchifier: str = _rare_net_knob(
        "regions",
        "Method that divides a mesh into patches of faces: regions groups neighbouring faces with similar"
        " normals; maps projects a subdivided coarse mesh onto the surface, as MeshMAE does.",
        choices=PATCHIFIER_NAMES,
    )
    patches: int = _rare_net_knob(64, "Number of patches into which each mesh is divided.", low=4)
    faces: int = _rare_net_knob(
        64,
        "Number of faces of each patch. It must be a power of 4 if patchifier is maps.",
        low=1,
    )
    area: str = _rare_net_knob(
        "share",
        "Unit in which the network reads the areas of faces: share is the share of the mesh's total area, and"
        " raw is the area in the squared unit of place, as in MeshMAE.",
        choices=AREAS,
    )
    place: str = _rare_net_knob(
        "centre",
        "Origin and unit of the coordinates that the network reads. centre: the centre of the surface, and"
        " the mean distance of the surface from this centre. box: the corner of the bounding box with the"
        " smallest coordinates, and the longest side of the box; it needs turns=false. world: unchanged"
        " coordinates.",
        choices=PLACES,
    )
    width: int = _rare_net_knob(
        64, "Number of channels of the encoder's tokens, a multiple of the number of heads.", low=4
    )
    depth: int = _rare_net_knob(3, "Number of transformer blocks of the encoder.", low=0)
    heads: int = _rare_net_knob(
        4, "Number of attention heads of the encoder. It must divide the width.", low=1
    )
    divergence: float = knob(
        1.0,
        "Weight lambda of the Cauchy-Schwarz divergence between the embeddings of preferred and other meshes."
        " The divergence is maximised.",
        TRAIN,
        low=0,
    )
    divergence_ramp: float = _rare_train_knob(
        0.5,
        "Share of the training steps over which the weight of the divergence increases from 0 to its final"
        " value, so that scores are learned first.",
        low=0,
        high=1,
    )
    bandwidth: float = _rare_train_knob(
        0.7,
        "Smallest bandwidth of the divergence's kernel, as a distance of embeddings of length 1. If the"
        " median distance of a batch is larger, that distance is used.",
        above=0,
    )
    regression: float = _rare_train_knob(
        25.0,
        "Weight of the squared difference between the predicted reward (0 to 1) and the score / 5. With 25,"
        " the difference is measured in units of the score (0 to 5).",
        above=0,
    )
    steps: int = knob(400, "Number of training steps.", TRAIN, low=1)
    batch: int = _rare_train_knob(
        64, "Number of meshes in each training step. Must be even: half of the meshes are preferred.", low=4
    )
    lr: float = knob(
        1e-3,
        "Peak learning rate of the AdamW optimiser. The rate increases linearly over the first twentieth of"
        " the steps, and then falls to 0 along a cosine.",
        TRAIN,
        above=0,
    )
    weight_decay: float = _rare_train_knob(0.05, "Weight decay of the AdamW optimiser.", low=0)
    forget: float = _rare_train_knob(
        0.25,
        "Probability that a training step treats the prompt of a mesh as unknown, so that the reward can also"
        " score meshes of new prompts.",
        low=0,
        high=1,
    )
    turns: bool = _rare_train_knob(
        True,
        "Augment training meshes: rotate them by random multiples of 90 degrees about the upward axis, and"
        " mirror half of them.",
    )
    randomised: bool = _rare_train_knob(
        False, "Control: permute the labels of training meshes at random. The AUC must then be close to 0.5."
    )
    area_only: bool = _rare_train_knob(
        False,
        "Control: let the network read only the areas of faces. The reward must then not detect a second"
        " nose.",
    )
    seed: int = knob(
        0,
        "Random seed of the network's initialisation, of the order of the meshes, and of their augmentation.",
        TRAIN,
        low=0,
        flag=False,
    )

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.batch % 2:
            raise ValueError(
                f"--set batch: expected an even number, got {self.batch}. Choose an even number, since half"
                " of the meshes of a step are preferred and the other half are not."
            )
        if self.turns and self.place == "box":
            raise ValueError(
                "--set place=box cannot be combined with turns=true, because a rotation changes the bounding"
                " box. Add --set turns=false, or use place=centre or place=world."
            )
        # These properties create objects that check their values.
        self.encoder, self.patch_options  # noqa: B018

    def to_dict(self) -> dict:
        """Return the settings as JSON values."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()
        }

    @property
    def patch_options(self) -> PatchOptions:
        """Settings with which meshes are converted to patches."""
        return PatchOptions(
            kind=self.patchifier, patches=self.patches, faces=self.faces, area=self.area, place=self.place
        )

    @property
    def encoder(self) -> EncoderOptions:
        """Sizes of the mesh encoder."""
        return EncoderOptions(faces=self.faces, width=self.width, depth=self.depth, heads=self.heads)
