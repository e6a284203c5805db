"""Settings of the training of a reward: what it reads, and how it learns. Imports no torch."""

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

TRAINING = "Training"  # title of its flags


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that decides a training run besides its data; the defaults are those of the small preset."""

    preset: str = "small"  # architecture, see eg3d_rlhf.rewards.presets.preset
    backbone: str = knob(
        "",
        "Weights of a frozen part that the preset has, such as resnet50.pth.",
        "Network",
        metavar="FILE",
        shown="none",
    )
    epochs: int = knob(10, "Passes, at most.", TRAINING, low=1)
    patience: int = knob(
        5,
        "Stop after so many epochs without a better validation accuracy.",
        TRAINING,
        metavar="EPOCHS",
        low=1,
        rare=True,
    )
    batch: int = knob(16, "Pairs per step.", TRAINING, metavar="PAIRS", low=1)
    unpaired_batch: int = knob(
        64, "Unpaired labels per step, half of them preferred.", TRAINING, metavar="SHAPES", low=2, rare=True
    )
    lr: float = knob(2e-3, "Adam's learning rate at the start.", TRAINING, above=0, high=1)
    cosine: bool = True  # learning rate falls to 0 along a half cosine over `epochs`; False keeps it
    weight_decay: float = knob(1e-4, "L2 inside Adam.", TRAINING, low=0, rare=True)
    decoupled: bool = False  # AdamW: decay apart from the gradient
    reference_samples: int = knob(
        0,
        "Reference samples of high quality (truncation 0.25) that should beat every labelled shape.",
        TRAINING,
        metavar="SEEDS",
        low=0,
    )
    # augment what is observed, see Observation.augment; slabs are flipped along x with probability one half
    mirror: bool = True
    weights: LossWeights = field(
        default_factory=lambda: LossWeights(scalar=1.0, bradley_terry=0.1, reconstruction=0.0)
    )
    seed: int = 0  # of initialisation, order, reference samples, flips, bootstrap
    bootstrap: bool = False  # train on as many pairs, drawn with replacement by the seed
    start: str = ""  # SHA-256 of the network that training goes on from; '' begins anew

    def __post_init__(self):
        check_knobs(self)
        if self.unpaired_batch % 2:
            raise ValueError(
                f"unpaired_batch: expected an even number, got {self.unpaired_batch}. Half of them are"
                " preferred."
            )
        if self.reference_samples and not self.weights.on_pairs:
            raise ValueError(
                "--reference-samples: expected 0 where nothing is learnt from pairs, got"
                f" {self.reference_samples}. Leave it out."
            )


def default_options(name: str | None = None, kind: str = "sigma") -> TrainOptions:
    """The settings that suit a preset of the networks that read `kind`.

    Raises: ValueError for an unknown one.
    """
    chosen = preset(name, kind)
    return TrainOptions(preset=name or next(iter(presets_of(kind))), **chosen.train)


def with_changes(options: TrainOptions, **changes) -> TrainOptions:
    """A copy with every change that is not None; names of LossWeights' fields (pairs, scalar, ...) change its
    `weights`.
    """
    given = {k: v for k, v in changes.items() if v is not None}
    weights = {k: given.pop(k) for k in list(given) if k in LossWeights.__dataclass_fields__}
    return replace(options, weights=replace(options.weights, **weights), **given)


BUNDLED_LABELS = ASSETS / "labels.jsonl"


@dataclass(frozen=True, kw_only=True)
class RewardRun:
    """What a training reads; `train` decides the rest."""

    network: Path | None = knob(
        None,
        "Generator of the labelled seeds: a network file or a run folder.",
        "Data",
        metavar="FILE",
        shown="the bundled generator",
    )
    more_networks: tuple[Path, ...] = ()  # of further generators that labels name
    labels: LabelSource = LabelSource.of_file(BUNDLED_LABELS)
    unpaired: Path | None = knob(
        None, "Labels of single shapes, .jsonl.", "Data", metavar="FILE", shown="none"
    )
    observation: str = "sigma"  # kind of what the reward reads
    resolution: int | None = knob(
        None,
        "Of the observation: grid points per axis of the whole cube, before the crop; pixels.",
        "Data",
        metavar="POINTS",
        low=16,
        high=512,
        shown="that of the observation",
    )
    points: int | None = knob(
        None,
        "Of an observation of points: points of a cloud.",
        "Data",
        low=1,
        high=16384,
        shown="that of the observation",
    )
    # of the observation: trimmed shares (x, x, y, y, z, z)
    crop: tuple[float, float, float, float, float, float] | None = None
    psi: float | None = knob(
        None,
        "Truncation of the labelled shapes.",
        "Data",
        low=0,
        high=2,
        shown="the labels', else 1",
        rare=True,
    )
    cutoff: int = knob(14, "Layers that truncation reaches.", "Data", metavar="LAYERS", low=0, rare=True)
    any_generator: bool = False  # accept labels made with another generator
    wrong_faces: bool = False  # a control: each label is about other shapes than those that are read
    fractions: tuple[float, float, float] = (0.70, 0.15, 0.15)  # train, val, test shares of the labels
    split_seed: int = knob(0, "Which labels are held out, whatever --seed is.", "Data", low=0, rare=True)
    cache: Path | None = None  # folder that keeps observations between runs; None keeps them in RAM
    slab_batch: int = knob(16, "Shapes drawn at once.", "Run", low=1, rare=True)
    members: int = knob(1, "Train so many networks with different seeds, and join them.", "Network", low=1)
    aggregate: str | None = knob(
        None,
        "What members become. Their scores are standardised, but for the default; warm is the mean of their"
        " weights.",
        "Network",
        choices=CHOICES,
        shown="the mean of raw scores",
    )
    strength: float | None = knob(
        None,
        "Of the aggregate: k of lcb, lambda of uwo, beta of softmin.",
        "Network",
        above=0,
        shown="1, 0.5, 0.5",
    )
    shared_start: bool = False  # members go on from one network that is trained first
    train: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self):
        check_knobs(self)
        check_joining(self.aggregate, self.strength)
        if self.unpaired is not None and self.more_networks:
            raise ValueError(
                f"--unpaired: expected labels of one generator, got more_networks={self.more_networks[0]}."
                " Leave one out."
            )
        if self.unpaired is not None and self.wrong_faces:
            raise ValueError(
                f"--wrong-faces: expected pairs alone, got --unpaired={self.unpaired}. Leave one of the two"
                " out."
            )
        if self.members < 2 and (self.aggregate is not None or self.shared_start):
            flag = "--shared-start" if self.aggregate is None else f"--aggregate={self.aggregate}"
            raise ValueError(
                f"--members: expected 2 or more with {flag}, got {self.members}. Five are usual."
            )

    def to_dict(self) -> dict:
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k != "labels"}
        values["more_networks"] = [str(path) for path in self.more_networks]
        return {**values, "network": values["network"] or "bundled", **self.labels.settings}

    @classmethod
    def from_dict(cls, values: Mapping, labels: LabelSource) -> Self:
        """Inverse of `to_dict`; entries that are no settings are left out.

        Args: labels: the source that it names.
        """
        names = cls.__dataclass_fields__.keys() & values.keys() - {"labels", "train"}
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value := values[name], list) else value for name in names
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
