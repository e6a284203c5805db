"""A run of offline tuning: arms trained with one seed or several, and judged on the same noises of held-out
conditions.

    labels                       the loss of single assets on what people said of them
    shuffled, inverted           controls: r shuffled within conditions must do nothing, 1 - r must do harm
    dpo                          DPO on the problem's pairs
    dpo-shuffled, dpo-inverted   the same pairs, each turned over by a coin, or all of them

What a run writes, and which networks arms keep: see flow/arms.py.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.singles import Labelled
from eg3d_rlhf.tuning.flow.training.arm_runs import ArmsRun, ArmsSource, Bench, Columns, Opened
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import SHUFFLED, TURNED, used
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.offline.train_singles import DGPO, SinglesConfig, train_singles
from eg3d_rlhf.tuning.flow.training.pair_training import train_stage
from eg3d_rlhf.tuning.flow.training.trainer import StageResult
from training.config import knob
from training.distributed import Ranks

LABELS = "labels"
DPO = "dpo"
ARMS = {
    LABELS: "labels of single assets",
    "shuffled": "labels shuffled within conditions",
    "inverted": "labels inverted",
    DPO: "DPO on pairs",
    "dpo-shuffled": "DPO, pairs turned over by a coin",
    "dpo-inverted": "DPO, pairs inverted",
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

    def bench(self, opened: Opened, seed: int) -> "OfflineBench":
        problem, labelled = opened
        assert labelled is not None
        stage = self.stage_in(problem)
        return OfflineBench(problem, stage, self.dpo.at(stage, seed), labelled, self.singles.at(stage, seed))

    def has_table(self, problem: Problem) -> bool:
        return problem.final is not None

    def row(
        self, arm: str, trainings: Sequence[Mapping], rates: Mapping, scores: Mapping, base: Mapping
    ) -> dict:
        title = ARMS[arm] if arm.startswith(DPO) else f"{TITLES[self.singles.loss]}, {ARMS[arm]}"
        return {"title": title, "answers": trainings[0]["answers"]}


@dataclass(frozen=True)
class OfflineBench(Bench):
    """Answers that arms learn from."""

    labelled: Labelled
    singles: SinglesConfig

    @property
    def conditions(self) -> Collection[str] | None:
        """To train on; None: all, where no judge is there to hold some for."""
        judged = self.problem.final is not None or self.problem.chooser is not None
        return self.problem.train_conditions if judged else None

    def inputs(self) -> dict:
        return {"labels": self.labelled.identity, "singles": asdict(self.singles)}

    def answers(self, arm: str) -> list:
        """The pairs or single assets that an arm learns from."""
        if not arm.startswith(DPO):
            return self.labelled.singles(self.stage.name, self.conditions, arm, self.singles.seed)
        pairs = self.problem.train_pairs[self.stage.name]
        if arm == DPO:
            return list(pairs)
        return used(pairs, SHUFFLED if arm.endswith("shuffled") else TURNED, self.dpo.seed, pairs)

    def train(self, arm: str, out: Path, **options: Any) -> StageResult:
        what = (ConditionedStage(self.stage, self.problem.pipeline), self.answers(arm))
        return (
            train_stage(*what, self.dpo, out, **options)
            if arm.startswith(DPO)
            else train_singles(*what, self.singles, out, **options)
        )

    def figures(self, arm: str, done: StageResult, model: torch.nn.Module, seed: int, ranks: Ranks) -> dict:
        return {"answers": len(self.answers(arm))}
