"""Settings of a run of GRPO: what is tuned, on what, in which arms, and how it is judged."""

from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from eg3d_rlhf.models.lora import LoraConfig
from eg3d_rlhf.tuning.flow.dpo import DpoConfig
from eg3d_rlhf.tuning.flow.grpo.arms import ARMS, OWN
from eg3d_rlhf.tuning.flow.grpo.groups import GrpoConfig
from eg3d_rlhf.tuning.flow.problem import TOY, Choosing, Judging, ProblemSource
from eg3d_rlhf.tuning.flow.stage import FlowStage
from eg3d_rlhf.tuning.flow.train import StageTraining
from eg3d_rlhf.tuning.flow.train_pairs import TrainConfig

Settings = TypeVar("Settings", bound=StageTraining)


@dataclass(frozen=True, kw_only=True)
class OnlineSource(ProblemSource):
    """What a problem is read from; pairs are not needed."""

    needs_pairs: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class GrpoRun:
    """What a run does, and on what."""

    grpo: GrpoConfig
    dpo: TrainConfig  # of the arms that train on pairs
    source: OnlineSource = OnlineSource()
    stage: str | None = None  # None: the last
    reward: str = OWN
    arms: tuple[str, ...] = ("grpo",)
    training_seeds: tuple[int, ...] = (0,)
    choosing: Choosing | None = None  # None: no win rate while training; the last update is kept
    judging: Judging = Judging()  # of the table that ends a run
    summary: bool = True  # end with it

    def __post_init__(self):
        odd = [arm for arm in self.arms if arm not in ARMS]
        if odd or not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"--arms: expected some of {', '.join(ARMS)}, each once, got {', '.join(self.arms) or 'none'}. Name them.")


def placed(config: Settings, stage: FlowStage, seed: int) -> Settings:
    """A training's settings at a stage: its seed, and adapters on the stage's own layers unless others were asked for."""
    lora = config.lora
    if lora is not None and lora.targets == LoraConfig().targets:
        lora = replace(lora, targets=stage.lora_targets)
    return replace(config, lora=lora, seed=seed)


_TOY_LORA = LoraConfig(rank=16, alpha=32)
TOY_RUN = GrpoRun(  # chosen with the chooser on the conditions to choose on, by a training seed that the table does not use
    grpo=GrpoConfig(
        lora=_TOY_LORA, steps=50, batch=8, group=8, lr=1e-3, warmup=5, passes=1, trained_steps=3, kl=0.1, held_out_every=25, log_every=5,
        checkpoint_every=10, max_drop=1.0,
    ),
    dpo=TrainConfig(
        dpo=DpoConfig(beta=60.0), lora=_TOY_LORA, steps=100, batch=16, lr=1e-3, warmup=10, held_out_every=25, log_every=5,
        checkpoint_every=50, max_drop=1.0,
    ),
    choosing=Choosing(per_condition=4), judging=Judging(per_condition=4),
)  # fmt: skip


def default_run(pipeline: str) -> GrpoRun:
    """What a run does where it is not told otherwise."""
    return TOY_RUN if pipeline == TOY else GrpoRun(grpo=GrpoConfig(), dpo=TrainConfig(), judging=Judging(batch=4))
