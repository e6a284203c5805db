"""Settings of offline tuning, and the arms of its runs.

Offline tuning trains on stored assets with labels. This file imports no torch, so that `--help` is quick.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from eg3d_rlhf.tuning.flow.training.settings import ArmsRun, ArmsSource, Columns, PassConfig, train_knob
from training.config import knob

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.base.problem import Problem
    from eg3d_rlhf.tuning.flow.training.arm_runs import Opened
    from eg3d_rlhf.tuning.flow.training.offline.train_singles import OfflineBench

# losses of single assets; DGPO compares the assets of a prompt
NFT, DGPO = LOSSES = ("nft", "dgpo")
_loss = functools.partial(knob, group="Loss of single assets")


@dataclass(frozen=True, kw_only=True)
class SinglesConfig(PassConfig):
    """Settings of a training on labels of single assets.

    The defaults suit large generators.
    """

    loss: str = _loss(
        NFT,
        "Loss of the labelled assets. nft: DiffusionNFT on each asset by itself; dgpo: DGPO on up to --group"
        " assets of one prompt, which are ordered by their labels.",
        choices=LOSSES,
    )
    trust: float = _loss(
        0.3,
        "nft: product of the loss's factors C and b. A larger value keeps the flow closer to the untuned"
        " network.",
        above=0,
    )
    beta: float = _loss(
        100.0,
        "dgpo: factor beta of a group's margin, per unit of flow-matching error.",
        name="group_beta",
        above=0,
    )
    kl: float | None = _loss(
        None,
        "Weight of the squared difference from the untuned network's velocities in the loss.",
        low=0,
        shown="nft 0.03, dgpo 0.01",
    )
    group: int = _loss(
        8,
        "dgpo: largest number of assets of one prompt that are compared at once. If a prompt has more assets,"
        " some are chosen at random in every pass over the data.",
        low=2,
    )
    steps: int = train_knob(1000, "Number of updates in the training of a stage.", metavar="UPDATES", low=1)
    batch: int = train_knob(
        8,
        "Number of assets in an update, over all processes and passes. With dgpo it is the number of groups.",
        metavar="ASSETS",
        low=1,
    )
    batch_gpu: int | None = train_knob(
        None,
        "Number of assets that a process computes in one pass. It changes the memory that an update takes,"
        " not its result.",
        metavar="ASSETS",
        low=1,
        shown="batch",
    )

    @property
    def distance(self) -> float:
        """Return the weight of the squared distance: --kl if it is given, otherwise the loss's default."""
        # 0 is a value of its own, so `or` would be wrong here
        return self.kl if self.kl is not None else {NFT: 0.03, DGPO: 0.01}[self.loss]


LABELS = "labels"  # arm of the loss of single assets
DPO = "dpo"  # arm that is trained on pairs
ARMS = {
    LABELS: "labels of single assets",
    "randomised": "randomised labels (within prompts)",
    "inverted": "inverted labels",
    DPO: "DPO on pairs",
    "dpo-randomised": "DPO, randomised pairs",
    "dpo-inverted": "DPO, inverted pairs",
}
# names of the losses in the table
TITLES = {"nft": "NFT", DGPO: "DGPO"}
SIMULATED_KINDS = ("thumbs", "ranks")  # kinds of labels that the toy's simulated annotators give


@dataclass(frozen=True, kw_only=True)
class OfflineSource(ArmsSource):
    """Source of the toy's assets that its simulated annotators label."""

    labelled: str = knob(
        "own",
        "Source of the assets that the toy generator's simulated annotators label. own: samples of the"
        " generator itself; others: assets with twice the rate of defects.",
        "What is trained",
        choices=("own", "others"),
        rare=True,
    )


@dataclass(frozen=True, kw_only=True)
class OfflineRun(ArmsRun):
    """Settings of a run of offline arms, with the columns of the table that ends the run."""

    NAME: ClassVar[str] = "offline"
    TITLE: ClassVar[str] = "Labels of single assets against the base"
    BEFORE: ClassVar[Columns] = {
        "arm": lambda name, arm: arm["title"],
        "answers": lambda name, arm: arm["answers"],
    }
    ARMS: ClassVar[Collection[str]] = ARMS
    LISTED: ClassVar[str] = ", ".join(ARMS)
    MEETING: ClassVar[bool] = True

    singles: SinglesConfig
    source: OfflineSource = OfflineSource()
    assets: str | None = None  # list of generated assets with latents, or its folder; None: assets of the toy
    # file of labels, or one of OWN_KINDS; None: the ranks of the list in `assets`, and for the toy the kind
    # of labels that the loss needs
    labels: str | None = None
    arms: tuple[str, ...] = (LABELS,)

    @property
    def label_kind(self) -> str:
        """Return the kind of labels that the toy's simulated annotators give."""
        # DGPO compares the assets of a prompt, so it needs ranks; NFT needs a label of each asset
        return self.labels or ("ranks" if self.singles.loss == DGPO else "thumbs")

    def bench(self, opened: "Opened", seed: int) -> "OfflineBench":
        # imported here, since it imports torch
        from eg3d_rlhf.tuning.flow.training.offline.train_singles import OfflineBench

        problem, labelled = opened
        assert labelled is not None  # the job opens labels for every offline run
        stage = self.stage_in(problem)
        return OfflineBench(
            problem, stage, self.dpo.for_stage(stage, seed), labelled, self.singles.for_stage(stage, seed)
        )

    def has_table(self, problem: "Problem") -> bool:
        return problem.final is not None

    def row(
        self, arm: str, trainings: Sequence[Mapping], rates: Mapping, scores: Mapping, base: Mapping
    ) -> dict:
        # the DPO arms train on pairs, so the loss of single assets is not part of their title
        title = ARMS[arm] if arm.startswith(DPO) else f"{TITLES[self.singles.loss]}, {ARMS[arm]}"
        return {"title": title, "answers": trainings[0]["answers"]}
