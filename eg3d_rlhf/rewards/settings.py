"""Settings of reward training: its data and its optimisation. This module does not import torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from eg3d_rlhf.core.cli import ASSETS
from eg3d_rlhf.preferences.labels import LabelSource
from eg3d_rlhf.preferences.settings import LossWeights
from eg3d_rlhf.rewards.aggregates import CHOICES, check_joining
from eg3d_rlhf.rewards.presets import preset, presets_of
from training.config import check_knobs, knob

TRAINING = "Training"  # title of the group of flags in --help


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Settings of a training run, apart from its data. The defaults are those of the small preset."""

    preset: str = "small"  # architecture, see eg3d_rlhf.rewards.presets.preset
    backbone: str = knob(
        "",
        "File with the weights of the preset's frozen backbone, for example resnet50.pth.",
        "Network",
        metavar="FILE",
        shown="none",
    )
    epochs: int = knob(10, "Largest number of passes over the training pairs.", TRAINING, low=1)
    patience: int = knob(
        5,
        "Stop after this number of epochs without a better validation accuracy.",
        TRAINING,
        metavar="EPOCHS",
        low=1,
        rare=True,
    )
    batch: int = knob(16, "Pairs in each training step.", TRAINING, metavar="PAIRS", low=1)
    unpaired_batch: int = knob(
        64,
        "Unpaired labels in each training step. Half of them are preferred.",
        TRAINING,
        metavar="SHAPES",
        low=2,
        rare=True,
    )
    lr: float = knob(2e-3, "Initial learning rate of Adam.", TRAINING, above=0, high=1)
    # the learning rate falls to 0 along a half cosine over `epochs`; False keeps it constant
    cosine: bool = True
    weight_decay: float = knob(1e-4, "Weight decay of Adam (L2 penalty).", TRAINING, low=0, rare=True)
    decoupled: bool = False  # use AdamW, which applies the weight decay separately from the gradient
    reference_samples: int = knob(
        0,
        "Number of reference samples (truncation psi 0.25), which should score above every labelled shape.",
        TRAINING,
        metavar="SEEDS",
        low=0,
    )
    # Augment observations at random, see Observation.augment; slabs are flipped along x with probability one
    # half.
    mirror: bool = True
    weights: LossWeights = field(
        default_factory=lambda: LossWeights(scalar=1.0, bradley_terry=0.1, reconstruction=0.0)
    )
    seed: int = 0  # of initialisation, order of pairs, reference samples, flips and bootstrap
    bootstrap: bool = False  # train on an equal number of pairs that are sampled with replacement
    # SHA-256 of the network from whose weights training starts; '' for a random initialisation
    start: str = ""

    def __post_init__(self):
        check_knobs(self)
        if self.unpaired_batch % 2:
            raise ValueError(
                f"unpaired_batch: expected an even number, got {self.unpaired_batch}, since half of the"
                " labels are preferred. Choose an even number."
            )
        if self.reference_samples and not self.weights.on_pairs:
            raise ValueError(
                "--reference-samples: has no effect without a loss on pairs, got"
                f" {self.reference_samples}. Remove --reference-samples."
            )


def default_options(name: str | None = None, kind: str = "sigma") -> TrainOptions:
    """Return the settings that suit a preset of the networks that read `kind`; None takes the default preset.

    Raises: ValueError for an unknown preset.
    """
    # The preset's settings replace the defaults of TrainOptions.
    chosen = preset(name, kind)
    return TrainOptions(preset=name or next(iter(presets_of(kind))), **chosen.train)


def with_changes(options: TrainOptions, **changes) -> TrainOptions:
    """Return a copy of the options with every change that is not None.

    Names of fields of LossWeights (pairs, scalar, ...) change `weights`.
    """
    given = {k: v for k, v in changes.items() if v is not None}
    # list(), because entries are removed during the iteration.
    weights = {k: given.pop(k) for k in list(given) if k in LossWeights.__dataclass_fields__}
    return replace(options, weights=replace(options.weights, **weights), **given)


BUNDLED_LABELS = ASSETS / "labels.jsonl"


@dataclass(frozen=True, kw_only=True)
class RewardRun:
    """Data of a reward training, and its members; `train` holds the settings of the optimisation."""

    network: Path | None = knob(
        None,
        "Generator of the labelled shapes: a network file or a run folder.",
        "Data",
        metavar="FILE",
        shown="the bundled generator",
    )
    more_networks: tuple[Path, ...] = ()  # files of further generators that the labels name
    labels: LabelSource = LabelSource.of_file(BUNDLED_LABELS)
    unpaired: Path | None = knob(
        None, "File with labels of single shapes (.jsonl).", "Data", metavar="FILE", shown="none"
    )
    observation: str = "sigma"  # kind of observation that the reward reads
    resolution: int | None = knob(
        None,
        "Resolution of the observation: grid points per axis of the complete cube before the crop, or"
        " pixels.",
        "Data",
        metavar="POINTS",
        low=16,
        high=512,
        shown="the default of the observation",
    )
    points: int | None = knob(
        None,
        "Number of points of a cloud, for observations of points.",
        "Data",
        low=1,
        high=16384,
        shown="the default of the observation",
    )
    # Of the observation: shares of the cube that are trimmed from the faces (x, x, y, y, z, z)
    crop: tuple[float, float, float, float, float, float] | None = None
    psi: float | None = knob(
        None,
        "Truncation psi of the labelled shapes.",
        "Data",
        low=0,
        high=2,
        shown="that of the labels, or 1",
        rare=True,
    )
    cutoff: int = knob(
        14, "Number of layers that truncation changes.", "Data", metavar="LAYERS", low=0, rare=True
    )
    any_generator: bool = False  # accept labels that were made with another generator
    wrong_faces: bool = False  # control: each label is applied to other shapes than those that were compared
    fractions: tuple[float, float, float] = (0.70, 0.15, 0.15)  # shares of the labels for train, val and test
    split_seed: int = knob(
        0,
        "Random seed of the split into training, validation and test labels. It does not depend on --seed.",
        "Data",
        low=0,
        rare=True,
    )
    cache: Path | None = None  # folder that keeps observations between runs; None keeps them in memory only
    slab_batch: int = knob(16, "Number of shapes that are observed at once.", "Run", low=1, rare=True)
    members: int = knob(
        1, "Number of networks to train with different seeds and to combine.", "Network", low=1
    )
    aggregate: str | None = knob(
        None,
        "How the members' scores are combined. Scores are standardised, except with the default. warm"
        " averages the members' weights instead.",
        "Network",
        choices=CHOICES,
        shown="the mean of raw scores",
    )
    strength: float | None = knob(
        None,
        "Strength of the aggregate: k of lcb, lambda of uwo, or beta of softmin.",
        "Network",
        above=0,
        shown="1 for lcb, 0.5 for uwo and softmin",
    )
    shared_start: bool = False  # train one network first, from which all members start
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self):
        check_knobs(self)
        check_joining(self.aggregate, self.strength)
        if self.unpaired is not None and self.more_networks:
            raise ValueError(
                "--unpaired: unpaired labels must come from one generator, but another one is given:"
                f" {self.more_networks[0]}. Remove --unpaired or the other generator."
            )
        if self.unpaired is not None and self.wrong_faces:
            raise ValueError(
                f"--wrong-faces: applies to pairs only, got --unpaired={self.unpaired}. Remove one of the two"
                " flags."
            )
        if self.members < 2 and (self.aggregate is not None or self.shared_start):
            flag = "--shared-start" if self.aggregate is None else f"--aggregate={self.aggregate}"
            raise ValueError(
                f"--members: expected 2 or more with {flag}, got {self.members}. Use --members=5, for"
                " example."
            )

    def to_dict(self) -> dict:
        """Return JSON values, in which the labels are given by the settings of their source."""
        # JSON has no paths.
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k != "labels"}
        values["more_networks"] = [str(path) for path in self.more_networks]
        return {**values, "network": values["network"] or "bundled", **self.labels.settings}

    @classmethod
    def from_dict(cls, values: Mapping, labels: LabelSource) -> Self:
        """Create the settings from the values of `to_dict`. Entries that are not settings are ignored.

        Args: labels: the source that the values name.
        """
        names = cls.__dataclass_fields__.keys() & values.keys() - {"labels", "train"}
        given: dict[str, Any] = {
            # JSON has lists where the dataclass has tuples.
            name: tuple(value) if isinstance(value := values[name], list) else value
            for name in names
        }
        given |= {name: Path(given[name]) for name in ("unpaired", "cache") if given.get(name) is not None}
        given["network"] = None if given["network"] == "bundled" else Path(given["network"])
        given["more_networks"] = tuple(map(Path, given["more_networks"]))
        train = {**values["train"], "weights": LossWeights(**values["train"]["weights"])}
        return cls(labels=labels, train=TrainOptions(**train), **given)


def record(settings: RewardRun, opened: object) -> Mapping[str, Any]:
    """Return what the folder of a training records of its settings."""
    del opened
    return {"mode": "reward", **settings.to_dict()}
