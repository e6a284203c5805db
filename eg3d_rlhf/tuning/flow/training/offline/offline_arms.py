"""A run of offline tuning: arms trained with one seed or several, and evaluated on the same noises of
held-out conditions.

    labels                       the loss of single assets on what people said of them
    randomised, inverted         controls: r shuffled within conditions must have no effect, 1 - r must do
    harm dpo                          DPO on the problem's pairs
    dpo-randomised, dpo-inverted the same pairs, each inverted at random, or all inverted

What a run writes, and which networks arms keep: see flow/arms.py.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.tuning.flow.base.single_labels import Labelled
from eg3d_rlhf.tuning.flow.training.arm_runs import Bench
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import used
from eg3d_rlhf.tuning.flow.training.circular.settings import INVERTED, RANDOMISED
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.offline.settings import DPO, SinglesConfig
from eg3d_rlhf.tuning.flow.training.offline.train_singles import train_singles
from eg3d_rlhf.tuning.flow.training.pair_training import train_stage
from eg3d_rlhf.tuning.flow.training.trainer import StageResult
from training.distributed import Ranks


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
        return used(pairs, RANDOMISED if arm.endswith(RANDOMISED) else INVERTED, self.dpo.seed, pairs)

    def train(self, arm: str, out: Path, **options: Any) -> StageResult:
        what = (ConditionedStage(self.stage, self.problem.pipeline), self.answers(arm))
        return (
            train_stage(*what, self.dpo, out, **options)
            if arm.startswith(DPO)
            else train_singles(*what, self.singles, out, **options)
        )

    def figures(self, arm: str, done: StageResult, model: torch.nn.Module, seed: int, ranks: Ranks) -> dict:
        return {"answers": len(self.answers(arm))}
