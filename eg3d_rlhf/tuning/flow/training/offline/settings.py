"""Settings of offline tuning, and the arms of its runs. This file imports no torch, so that `--help` is
quick.
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

NFT, DGPO = LOSSES = ("nft", "dgpo")
_loss = functools.partial(knob, group="Loss of single assets")


@dataclass(frozen=True, kw_only=True)
class SinglesConfig(PassConfig):
    """Everything that decides a training besides its networks and assets;
    the defaults suit large generators.
    """

    loss: str = _loss(
        NFT,
        "nft: DiffusionNFT of each asset; dgpo: of up to --group assets of a condition together, by their"
        " order.",
        choices=LOSSES,
    )
    trust: float = _loss(
        0.3, "nft: C b, how tightly a flow is held to the one that drew the assets.", above=0
    )
    beta: float = _loss(
        100.0, "dgpo: multiplies the margin of a group, per unit of error.", name="group_beta", above=0
    )
    kl: float | None = _loss(
        None,
        "Weight of the squared distance from the untuned velocities.",
        low=0,
        shown="nft 0.03, dgpo 0.01",
    )
    group: int = _loss(
        8, "dgpo: most assets of a condition that are compared at once, drawn anew in every pass.", low=2
    )
    steps: int = train_knob(1000, "Length of a stage's training.", metavar="UPDATES", low=1)
    batch: int = train_knob(
        8, "Per update, over all processes and passes; of dgpo groups.", metavar="ASSETS", low=1
    )
    batch_gpu: int | None = train_knob(
        None, "Per pass and process: decides memory, not the result.", metavar="ASSETS", low=1, shown="batch"
    )

    @property
    def distance(self) -> float:
        """The weight that applies."""
        return self.kl if self.kl is not None else {NFT: 0.03, DGPO: 0.01}[self.loss]


LABELS = "labels"
DPO = "dpo"
ARMS = {
    LABELS: "labels of single assets",
    "randomised": "randomised labels (within conditions)",
    "inverted": "inverted labels",
    DPO: "DPO on pairs",
    "dpo-randomised": "DPO, randomised pairs",
    "dpo-inverted": "DPO, inverted pairs",
}
TITLES = {"nft": "NFT", DGPO: "DGPO"}
OWN_KINDS = ("thumbs", "ranks")  # what the toy's own people say of single assets


@dataclass(frozen=True, kw_only=True)
class OfflineSource(ArmsSource):
    """Where the toy's people judge its own assets."""

    labelled: str = knob(
        "own",
        "Toy: who made the assets that people judged: the generator's own, or others', with twice the"
        " defects.",
        "What is trained",
        choices=("own", "others"),
        rare=True,
    )


@dataclass(frozen=True, kw_only=True)
class OfflineRun(ArmsRun):
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
    assets: str | None = None  # list of drawn assets with their latents, or its folder; None: the toy's own
    # a file, or one of OWN_KINDS; None: the list's ranks, of the toy what the loss is for
    labels: str | None = None
    arms: tuple[str, ...] = (LABELS,)

    @property
    def own_kind(self) -> str:
        """What the toy's people are asked for."""
        return self.labels or ("ranks" if self.singles.loss == DGPO else "thumbs")

    def bench(self, opened: "Opened", seed: int) -> "OfflineBench":
        from eg3d_rlhf.tuning.flow.training.offline.train_singles import OfflineBench

        problem, labelled = opened
        assert labelled is not None
        stage = self.stage_in(problem)
        return OfflineBench(problem, stage, self.dpo.at(stage, seed), labelled, self.singles.at(stage, seed))

    def has_table(self, problem: "Problem") -> bool:
        return problem.final is not None

    def row(
        self, arm: str, trainings: Sequence[Mapping], rates: Mapping, scores: Mapping, base: Mapping
    ) -> dict:
        title = ARMS[arm] if arm.startswith(DPO) else f"{TITLES[self.singles.loss]}, {ARMS[arm]}"
        return {"title": title, "answers": trainings[0]["answers"]}
