"""Settings of RewardCS, the reward of meshes: how meshes become patches, the size of its network, and its
training. Imports no torch.
"""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path

from training.config import check_knobs, knob

PATCHIFIER_NAMES = ("regions", "maps")  # the functions of these names stand in patches.py
SOURCE_NAMES = ("heads", "janus")  # drawn meshes, see dataset.py
AREAS = ("share", "raw")
PLACES = ("centre", "box", "world")


@dataclass(frozen=True, kw_only=True)
class PatchOptions:
    """What a reward of meshes reads; its file says so."""

    kind: str = "regions"  # of PATCHIFIER_NAMES
    patches: int = 64
    faces: int = 64  # of a patch; a power of 4 for maps
    area: str = "share"  # of AREAS
    place: str = "centre"  # of PLACES: where centres are measured from

    def __post_init__(self) -> None:
        for name, known in (("kind", PATCHIFIER_NAMES), ("area", AREAS), ("place", PLACES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"PatchOptions: expected {name} of {', '.join(known)}, got {getattr(self, name)!r}."
                    " Choose one."
                )


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Size. MeshMAE's own: 64 faces, width 768, 12 blocks, 12 heads."""

    faces: int = 64  # of a patch
    width: int = 64
    depth: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        if min(self.faces, self.width, self.heads) < 1 or self.depth < 0 or self.width % self.heads:
            raise ValueError(
                f"EncoderOptions: expected positive numbers and a width that the heads divide, got {self}."
                " Correct it."
            )


DATA = "Data"
_rare_data_knob = functools.partial(knob, group=DATA, rare=True)
NET = "Network"
_rare_net_knob = functools.partial(knob, group=NET, rare=True)
TRAIN = "Training"
_rare_train_knob = functools.partial(knob, group=TRAIN, rare=True)


@dataclass(frozen=True, kw_only=True)
class MeshRewardTraining:
    """One training; with one thread it repeats to the byte on the same machine."""

    source: str = knob(
        "heads", "Drawn meshes: smooth heads, or the default problem's objects.", DATA, choices=SOURCE_NAMES
    )
    data: Path | None = knob(
        None,
        "Meshes with scores or labels, .jsonl, in place of drawn ones.",
        DATA,
        metavar="FILE",
        shown="none",
    )
    shapes: int = knob(840, "Drawn meshes; one in 20 lies between the thresholds.", DATA, low=20)
    data_seed: int = _rare_data_knob(
        0, "Of the drawn meshes and of which are held out, whatever --seed is.", low=0
    )
    held_out: float = _rare_data_knob(0.25, "Share of the meshes for the figures.", above=0, below=1)
    resolution: int = _rare_data_knob(20, "Cells of the lattice per edge.", low=4, high=128)
    patchifier: str = _rare_net_knob("regions", "How meshes become patches.", choices=PATCHIFIER_NAMES)
    patches: int = _rare_net_knob(64, "Patches of a mesh.", low=4)
    faces: int = _rare_net_knob(64, "Faces of a patch.", low=1)
    area: str = _rare_net_knob("share", "Areas as shares of the mesh's, or as they are.", choices=AREAS)
    place: str = _rare_net_knob(
        "centre",
        "Where centres are measured from: the surface's, its box's least corner, the origin.",
        choices=PLACES,
    )
    width: int = _rare_net_knob(64, "Width of the encoder.", low=4)
    depth: int = _rare_net_knob(3, "Blocks of the encoder.", low=0)
    heads: int = _rare_net_knob(4, "Heads of attention.", low=1)
    divergence: float = knob(1.0, "Weight lambda of the Cauchy-Schwarz term.", TRAIN, low=0)
    divergence_ramp: float = _rare_train_knob(
        0.5, "Share of the steps over which lambda rises from 0: scores are learnt first.", low=0, high=1
    )
    bandwidth: float = _rare_train_knob(
        0.7, "Least width of the kernel; the batch's median distance where that is larger.", above=0
    )
    regression: float = _rare_train_knob(
        25.0, "Weight of the squared error of score / 5: 25 counts it in units of the score.", above=0
    )
    steps: int = knob(400, "Updates.", TRAIN, low=1)
    batch: int = _rare_train_knob(64, "Meshes of an update, half of each kind.", low=4)
    lr: float = knob(1e-3, "Of AdamW, after a warm-up, falling to 0 along a cosine.", TRAIN, above=0)
    weight_decay: float = _rare_train_knob(0.05, "Of AdamW.", low=0)
    forget: float = _rare_train_knob(0.25, "Share of prompts that are taken as unknown.", low=0, high=1)
    turns: bool = _rare_train_knob(
        True, "Turn meshes by random quarters about the upward axis, and mirror them."
    )
    randomised: bool = _rare_train_knob(
        False, "A control: permute the labels. The AUC must then be near 0.5."
    )
    area_only: bool = _rare_train_knob(False, "A control: read areas alone. It must not see a second nose.")
    seed: int = knob(0, "Of initialisation and order.", TRAIN, low=0, flag=False)

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.batch % 2:
            raise ValueError(
                f"--set batch: expected an even number, got {self.batch}. Half of each kind are drawn."
            )
        if self.turns and self.place == "box":
            raise ValueError(
                "place: expected centre or world with turns, got box, which no mesh is turned about. Add"
                " --set turns=false."
            )
        self.encoder, self.read  # noqa: B018  their own checks

    def to_dict(self) -> dict:
        """JSON values."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()
        }

    @property
    def read(self) -> PatchOptions:
        """How meshes become patches."""
        return PatchOptions(
            kind=self.patchifier, patches=self.patches, faces=self.faces, area=self.area, place=self.place
        )

    @property
    def encoder(self) -> EncoderOptions:
        """Sizes of the network."""
        return EncoderOptions(faces=self.faces, width=self.width, depth=self.depth, heads=self.heads)
