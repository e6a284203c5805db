"""Settings of RewardCS, the reward of meshes: how meshes become patches, the size of its network, and its
training. Imports no torch.
"""

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
NET = "Network"
TRAIN = "Training"


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
    data_seed: int = knob(
        0, "Of the drawn meshes and of which are held out, whatever --seed is.", DATA, low=0, rare=True
    )
    held_out: float = knob(0.25, "Share of the meshes for the figures.", DATA, above=0, below=1, rare=True)
    resolution: int = knob(20, "Cells of the lattice per edge.", DATA, low=4, high=128, rare=True)
    patchifier: str = knob("regions", "How meshes become patches.", NET, choices=PATCHIFIER_NAMES, rare=True)
    patches: int = knob(64, "Patches of a mesh.", NET, low=4, rare=True)
    faces: int = knob(64, "Faces of a patch.", NET, low=1, rare=True)
    area: str = knob("share", "Areas as shares of the mesh's, or as they are.", NET, choices=AREAS, rare=True)
    place: str = knob(
        "centre",
        "Where centres are measured from: the surface's, its box's least corner, the origin.",
        NET,
        choices=PLACES,
        rare=True,
    )
    width: int = knob(64, "Width of the encoder.", NET, low=4, rare=True)
    depth: int = knob(3, "Blocks of the encoder.", NET, low=0, rare=True)
    heads: int = knob(4, "Heads of attention.", NET, low=1, rare=True)
    divergence: float = knob(1.0, "Weight lambda of the Cauchy-Schwarz term.", TRAIN, low=0)
    divergence_ramp: float = knob(
        0.5,
        "Share of the steps over which lambda rises from 0: scores are learnt first.",
        TRAIN,
        low=0,
        high=1,
        rare=True,
    )
    bandwidth: float = knob(
        0.7,
        "Least width of the kernel; the batch's median distance where that is larger.",
        TRAIN,
        above=0,
        rare=True,
    )
    regression: float = knob(
        25.0,
        "Weight of the squared error of score / 5: 25 counts it in units of the score.",
        TRAIN,
        above=0,
        rare=True,
    )
    steps: int = knob(400, "Updates.", TRAIN, low=1)
    batch: int = knob(64, "Meshes of an update, half of each kind.", TRAIN, low=4, rare=True)
    lr: float = knob(1e-3, "Of AdamW, after a warm-up, falling to 0 along a cosine.", TRAIN, above=0)
    weight_decay: float = knob(0.05, "Of AdamW.", TRAIN, low=0, rare=True)
    forget: float = knob(0.25, "Share of prompts that are taken as unknown.", TRAIN, low=0, high=1, rare=True)
    turns: bool = knob(
        True, "Turn meshes by random quarters about the upward axis, and mirror them.", TRAIN, rare=True
    )
    shuffled: bool = knob(
        False, "A control: deal the labels anew. AUC must then be near one half.", TRAIN, rare=True
    )
    area_only: bool = knob(
        False, "A control: read areas alone. It must not see a second nose.", TRAIN, rare=True
    )
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
