"""Settings of RewardCS, the reward of meshes: patches, network sizes, and training.

This module does not import torch, so that --help stays fast.
"""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path

from training.config import check_knobs, knob

PATCHIFIER_NAMES = ("regions", "maps")  # names of functions in patchifiers.py
SOURCE_NAMES = ("heads", "janus")  # sources of generated meshes, see dataset.py
AREAS = ("share", "raw")  # see patchifiers.py
PLACES = ("centre", "box", "world")  # see `patchifiers.placed`


@dataclass(frozen=True, kw_only=True)
class PatchOptions:
    """Form in which a mesh reward reads meshes. It is stored in the reward's file."""

    kind: str = "regions"  # one of PATCHIFIER_NAMES
    patches: int = 64  # patches of a mesh
    faces: int = 64  # faces of a patch; a power of 4 for maps
    area: str = "share"  # one of AREAS
    place: str = "centre"  # one of PLACES: origin and unit of face centres

    def __post_init__(self) -> None:
        for name, known in (("kind", PATCHIFIER_NAMES), ("area", AREAS), ("place", PLACES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"PatchOptions: expected {name} to be one of {', '.join(known)}, got"
                    f" {getattr(self, name)!r}. Choose one of these."
                )


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Sizes of the encoder. Those of MeshMAE are 64 faces, width 768, 12 blocks and 12 heads."""

    faces: int = 64  # of a patch
    width: int = 64  # of a token; a multiple of `heads`
    depth: int = 3  # transformer blocks
    heads: int = 4  # attention heads

    def __post_init__(self) -> None:
        if min(self.faces, self.width, self.heads) < 1 or self.depth < 0 or self.width % self.heads:
            raise ValueError(
                "EncoderOptions: expected positive numbers and a width that is a multiple of heads, got"
                f" {self}. Change these values."
            )


DATA = "Data"
_rare_data_knob = functools.partial(knob, group=DATA, rare=True)
NET = "Network"
_rare_net_knob = functools.partial(knob, group=NET, rare=True)
TRAIN = "Training"
_rare_train_knob = functools.partial(knob, group=TRAIN, rare=True)


@dataclass(frozen=True, kw_only=True)
class MeshRewardTraining:
    """Settings of one training. With one thread, its result is identical on the same machine."""

    source: str = knob(
        "heads",
        "Source of generated meshes: smooth heads, or objects of the default problem.",
        DATA,
        choices=SOURCE_NAMES,
    )
    data: Path | None = knob(
        None,
        "File that lists meshes with scores or labels (.jsonl). They replace generated meshes.",
        DATA,
        metavar="FILE",
        shown="none",
    )
    shapes: int = knob(
        840,
        "Number of generated meshes. One in 20 lies between the thresholds and has no label.",
        DATA,
        low=20,
    )
    data_seed: int = _rare_data_knob(
        0,
        "Random seed of the generated meshes and of the held-out ones. It does not depend on --seed.",
        low=0,
    )
    held_out: float = _rare_data_knob(
        0.25, "Share of the meshes that are held out for the test figures.", above=0, below=1
    )
    resolution: int = _rare_data_knob(20, "Cells of the lattice along each edge.", low=4, high=128)
    patchifier: str = _rare_net_knob(
        "regions", "Method that divides meshes into patches.", choices=PATCHIFIER_NAMES
    )
    patches: int = _rare_net_knob(64, "Number of patches of a mesh.", low=4)
    faces: int = _rare_net_knob(64, "Number of faces of a patch.", low=1)
    area: str = _rare_net_knob(
        "share", "Unit of areas: shares of the mesh's area, or raw values.", choices=AREAS
    )
    place: str = _rare_net_knob(
        "centre",
        "Origin of face centres: the surface's centre, the least corner of its box, or the world's origin.",
        choices=PLACES,
    )
    width: int = _rare_net_knob(64, "Width of the encoder.", low=4)
    depth: int = _rare_net_knob(3, "Number of transformer blocks of the encoder.", low=0)
    heads: int = _rare_net_knob(4, "Number of attention heads.", low=1)
    divergence: float = knob(1.0, "Weight lambda of the Cauchy-Schwarz divergence.", TRAIN, low=0)
    divergence_ramp: float = _rare_train_knob(
        0.5,
        "Share of the steps during which lambda increases from 0, so that scores are learned first.",
        low=0,
        high=1,
    )
    bandwidth: float = _rare_train_knob(
        0.7,
        "Least bandwidth of the kernel. The median distance of the batch is used where it is larger.",
        above=0,
    )
    regression: float = _rare_train_knob(
        25.0,
        "Weight of the squared error of score / 5. The value 25 measures it in units of the score.",
        above=0,
    )
    steps: int = knob(400, "Number of updates.", TRAIN, low=1)
    batch: int = _rare_train_knob(64, "Meshes in each update, half of them preferred.", low=4)
    lr: float = knob(
        1e-3, "Peak learning rate of AdamW, after a warm-up and before a cosine decay to 0.", TRAIN, above=0
    )
    weight_decay: float = _rare_train_knob(0.05, "Weight decay of AdamW.", low=0)
    forget: float = _rare_train_knob(0.25, "Share of prompts that training treats as unknown.", low=0, high=1)
    turns: bool = _rare_train_knob(
        True, "Rotate meshes by random quarter turns about the upward axis, and mirror some of them."
    )
    randomised: bool = _rare_train_knob(
        False, "Control: permute the labels at random. The AUC must then be close to 0.5."
    )
    area_only: bool = _rare_train_knob(
        False, "Control: read only areas. The reward must then not detect a second nose."
    )
    seed: int = knob(
        0, "Random seed of the initialisation and the order of meshes.", TRAIN, low=0, flag=False
    )

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.batch % 2:
            raise ValueError(
                f"--set batch: expected an even number, got {self.batch}, since half of the meshes are"
                " preferred. Choose an even number."
            )
        if self.turns and self.place == "box":
            raise ValueError(
                "place: box cannot be combined with turns, because a rotation changes the box. Add --set"
                " turns=false, or use place=centre or place=world."
            )
        # Creating both objects checks their values.
        self.encoder, self.read  # noqa: B018

    def to_dict(self) -> dict:
        """Return JSON values."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()
        }

    @property
    def read(self) -> PatchOptions:
        """Form in which meshes are read."""
        return PatchOptions(
            kind=self.patchifier, patches=self.patches, faces=self.faces, area=self.area, place=self.place
        )

    @property
    def encoder(self) -> EncoderOptions:
        """Sizes of the encoder."""
        return EncoderOptions(faces=self.faces, width=self.width, depth=self.depth, heads=self.heads)
