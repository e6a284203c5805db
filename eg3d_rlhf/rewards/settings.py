"""Settings of reward training: its data and its optimisation.

This module does not import torch, so that `--help` is quick.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from eg3d_rlhf.core.cli import ASSETS
from eg3d_rlhf.preferences.labels import LabelSource
from eg3d_rlhf.preferences.settings import LossWeights
from eg3d_rlhf.rewards.aggregates import CHOICES, check_joining
from eg3d_rlhf.rewards.presets import preset, presets_of
from eg3d_rlhf.rewards.slab_crops import BUNDLED_CROPS
from training.config import check_knobs, knob

TRAINING = "Training"  # title of the group of flags in --help


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Settings of the optimisation of a reward network. The defaults are those of the preset `small`.

    Raises: ValueError for a value that is outside its range or has no effect.
    """

    preset: str = "small"  # name of the architecture, see eg3d_rlhf.rewards.presets.preset
    backbone: str = knob(
        "",
        "File with the weights of the network's frozen backbone, for example resnet50.pth. Only presets with"
        " a ResNet-50 have a backbone.",
        "Network",
        metavar="FILE",
        shown="none",
    )
    epochs: int = knob(
        10,
        "Largest number of epochs. An epoch is a pass over the training pairs; without a loss on pairs, over"
        " the labels of single shapes.",
        TRAINING,
        low=1,
    )
    patience: int = knob(
        5,
        "Stop the training after this number of epochs without a better validation accuracy (or an equal"
        " accuracy with a lower log loss).",
        TRAINING,
        metavar="EPOCHS",
        low=1,
        rare=True,
    )
    batch: int = knob(16, "Number of labelled pairs in each training step.", TRAINING, metavar="PAIRS", low=1)
    unpaired_batch: int = knob(
        64,
        "Number of labels of single shapes in each training step. It must be even, since one half of these"
        " shapes is labelled as preferred and the other half is not.",
        TRAINING,
        metavar="SHAPES",
        low=2,
        rare=True,
    )
    lr: float = knob(2e-3, "Initial learning rate of the Adam optimiser.", TRAINING, above=0, high=1)
    # True: the learning rate falls to 0 along a half cosine over `epochs`. False: it is constant.
    cosine: bool = True
    weight_decay: float = knob(
        1e-4,
        "Weight decay of the Adam optimiser. It is an L2 penalty, or decoupled from the gradient as in AdamW"
        " where the preset sets `decoupled`.",
        TRAINING,
        low=0,
        rare=True,
    )
    decoupled: bool = False  # use AdamW, which applies the weight decay separately from the gradient
    reference_samples: int = knob(
        0,
        "Number of reference samples. These are samples at truncation psi 0.25, and the network is trained to"
        " score them above every labelled shape. 0 trains without reference samples.",
        TRAINING,
        metavar="SEEDS",
        low=0,
    )
    # Augment observations at random, see Observation.augment. Density grids, for example, are mirrored along
    # x with probability one half.
    mirror: bool = True
    weights: LossWeights = field(
        default_factory=lambda: LossWeights(scalar=1.0, bradley_terry=0.1, reconstruction=0.0)
    )
    seed: int = 0  # random seed of initialisation, order of pairs, reference samples, mirroring and bootstrap
    # Train on a bootstrap sample of the labels: as many labels, which are sampled with replacement
    bootstrap: bool = False
    # SHA-256 of the network from whose weights training starts; '' for a random initialisation
    start: str = ""

    def __post_init__(self):
        check_knobs(self)
        if self.unpaired_batch % 2:
            raise ValueError(
                f"--set unpaired_batch: expected an even number, got {self.unpaired_batch}. Choose an even"
                " number, since one half of the shapes of a step is labelled as preferred and the other half"
                " is not."
            )
        if self.reference_samples and not self.weights.on_pairs:
            raise ValueError(
                f"--reference-samples={self.reference_samples} has no effect, because all loss terms on pairs"
                " have the weight 0. Remove --reference-samples."
            )


def default_options(name: str | None = None, kind: str = "sigma") -> TrainOptions:
    """Return the training settings of a preset.

    Args:
        name: name of the preset; None for the default preset of the kind.
        kind: kind of the observation that the network reads.
    Raises: ValueError if this kind has no preset of this name, or for settings of the preset that are
        unknown or out of range.
    """
    network_preset = preset(name, kind)
    unknown_names = sorted(network_preset.train.keys() - TrainOptions.__dataclass_fields__.keys())
    if unknown_names:
        # Presets of plugins may have any name.
        raise ValueError(
            f"the preset has unknown settings of training: {', '.join(unknown_names)}. Use names of fields of"
            " TrainOptions in eg3d_rlhf/rewards/settings.py."
        )
    # The preset's settings replace the defaults of TrainOptions.
    return TrainOptions(preset=name or next(iter(presets_of(kind))), **network_preset.train)


def with_changes(options: TrainOptions, **changes) -> TrainOptions:
    """Return a copy of the options with changed values.

    Args:
        options: options to copy.
        changes: new values by name of a field of TrainOptions or of LossWeights; a value of None changes
            nothing.
    """
    new_values = {name: value for name, value in changes.items() if value is not None}
    # list() makes a copy of the names, because entries are removed during the iteration.
    new_weights = {
        name: new_values.pop(name) for name in list(new_values) if name in LossWeights.__dataclass_fields__
    }
    return replace(options, weights=replace(options.weights, **new_weights), **new_values)


BUNDLED_LABELS = ASSETS / "labels.jsonl"


@dataclass(frozen=True, kw_only=True)
class RewardRun:
    """Settings of a reward training: its data, the number of networks, and their optimisation.

    Raises: ValueError for a value that is outside its range, has no effect, or contradicts another value.
    """

    network: Path | None = knob(
        None,
        "Generator of the labelled shapes: a network file or a run folder.",
        "Data",
        metavar="FILE",
        shown="the bundled generator",
    )
    more_networks: tuple[Path, ...] = ()  # files of further generators that the labels name
    labels: LabelSource = LabelSource.from_file(BUNDLED_LABELS)
    unpaired: Path | None = knob(
        None,
        "File with labels of single shapes (.jsonl), which state for each shape whether it is preferred.",
        "Data",
        metavar="FILE",
        shown="none",
    )
    observation: str = "sigma"  # kind of observation that the reward reads
    resolution: int | None = knob(
        None,
        "Resolution of the input of the reward: for grids of densities, and for points on the surface, the"
        " number of grid points per axis of the complete cube before the crop; for depth maps and points from"
        " depth maps, the number of pixels per edge.",
        "Data",
        metavar="POINTS",
        low=16,
        high=512,
        shown="the default of the observation",
    )
    points: int | None = knob(
        None,
        "Number of points of each cloud, for --observation=points and other clouds.",
        "Data",
        low=1,
        high=16384,
        shown="the default of the observation",
    )
    # Shares of the cube that are trimmed from its faces (x, x, y, y, z, z) for density grids; None chooses
    # them by the generator, see eg3d_rlhf.rewards.slab_crops
    crop: tuple[float, float, float, float, float, float] | None = None
    level: float | None = knob(
        None,
        "Raw density sigma_raw at the surface of the labelled shapes. Without --crop, the crop of the density"
        " grid is measured there. The reward's file states it, so that tuning uses the same level.",
        "Data",
        shown="the level that the labels state, else that of the generator",
        rare=True,
    )
    psi: float | None = knob(
        None,
        "Truncation psi at which the labelled shapes are generated.",
        "Data",
        low=0,
        high=2,
        shown="the psi that the labels state, or 1",
        rare=True,
    )
    cutoff: int = knob(
        14,
        "Number of layers whose latents are truncated, counted from the first layer.",
        "Data",
        metavar="LAYERS",
        low=0,
        rare=True,
    )
    any_generator: bool = False  # accept labels that were made with another generator
    # Train a control without a learnable signal: each label is applied to shapes that were not compared
    wrong_faces: bool = False
    fractions: tuple[float, float, float] = (0.70, 0.15, 0.15)  # shares of the labels for train, val and test
    split_seed: int = knob(
        0,
        "Random seed of the split into training, validation and test labels. --seed does not change the"
        " split.",
        "Data",
        low=0,
        rare=True,
    )
    cache: Path | None = None  # folder that keeps observations between runs; None keeps them in memory only
    slab_batch: int = knob(
        16,
        "Number of shapes that the generator makes at once for the input of the reward. A smaller number"
        " needs less memory.",
        "Run",
        low=1,
        rare=True,
    )
    members: int = knob(
        1,
        "Number of networks to train with different random seeds. Their scores are combined into one reward.",
        "Network",
        low=1,
    )
    aggregate: str | None = knob(
        None,
        "Function that combines the scores of the networks of an ensemble (see --members), which are"
        " standardised first. mean: the mean; min: the lowest score; lcb: the mean minus k standard"
        " deviations; uwo: the mean minus lambda times the variance; softmin: a smooth minimum (for k and"
        " lambda, see --strength). warm does not combine scores, but averages the networks' weights.",
        "Network",
        choices=CHOICES,
        shown="the mean of raw scores",
    )
    strength: float | None = knob(
        None,
        "Strength of the function that combines scores: k of --aggregate=lcb, lambda of uwo, or beta of"
        " softmin.",
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
                f"--unpaired={self.unpaired} allows one generator only, but --set more_networks names a"
                f" further one: {self.more_networks[0]}. Remove --unpaired or --set more_networks."
            )
        if self.unpaired is not None and self.wrong_faces:
            raise ValueError(
                f"--wrong-faces applies to pairs only and cannot be combined with --unpaired={self.unpaired}."
                " Remove --wrong-faces or --unpaired."
            )
        if self.members < 2 and (self.aggregate is not None or self.shared_start):
            flag = "--shared-start" if self.aggregate is None else f"--aggregate={self.aggregate}"
            raise ValueError(
                f"{flag} needs at least two networks, got --members={self.members}. Pass, for example,"
                f" --members=5, or remove {flag}."
            )

    def to_dict(self) -> dict:
        """Return the settings as JSON values, with the settings of the label source at the top level."""
        # JSON has no type for paths.
        json_values = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
            if name != "labels"
        }
        json_values["more_networks"] = [str(path) for path in self.more_networks]
        return {**json_values, "network": json_values["network"] or "bundled", **self.labels.settings}

    @classmethod
    def from_dict(cls, values: Mapping, labels: LabelSource) -> Self:
        """Create the settings from JSON values.

        Args:
            values: result of `to_dict`; entries that are not settings are ignored.
            labels: source of the labels, which `values` describes.
        """
        field_names = cls.__dataclass_fields__.keys() & values.keys() - {"labels", "train"}
        field_values: dict[str, Any] = {}
        for name in field_names:
            value = values[name]
            # JSON has lists where the dataclass has tuples.
            field_values[name] = tuple(value) if isinstance(value, list) else value
        for name in ("unpaired", "cache"):
            if field_values.get(name) is not None:
                field_values[name] = Path(field_values[name])
        field_values["network"] = (
            None if field_values["network"] == "bundled" else Path(field_values["network"])
        )
        field_values["more_networks"] = tuple(map(Path, field_values["more_networks"]))
        train_values = {**values["train"], "weights": LossWeights(**values["train"]["weights"])}
        return cls(labels=labels, train=TrainOptions(**train_values), **field_values)


def record(settings: RewardRun, opened: object) -> Mapping[str, Any]:
    """Return the settings that the folder of a training records, as JSON values.

    Args:
        settings: settings of the training.
        opened: opened inputs of the training, with the observation.
    """
    recorded_values = {"mode": "reward", **settings.to_dict()}
    # A run that resumes must read the grid points of its start, so the crop that was chosen is recorded.
    spec = getattr(getattr(opened, "observation", None), "spec", None)
    if settings.observation in BUNDLED_CROPS and spec is not None:
        recorded_values["crop"] = list(spec.crop)
    return recorded_values
