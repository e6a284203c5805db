"""Settings of a Circular-DPO run, and how a run folder keeps them as JSON."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TypeVar

from eg3d_rlhf.core.cli import versions
from eg3d_rlhf.tuning.flow.circular.loop_pairs import LoopPairsConfig, Weighing
from eg3d_rlhf.tuning.flow.circular.table import AblationPlan
from eg3d_rlhf.tuning.flow.dpo import DpoConfig
from eg3d_rlhf.tuning.flow.problem import TOY, Choosing, Judging, Problem, ProblemSource
from eg3d_rlhf.tuning.flow.stage import FlowStage
from eg3d_rlhf.tuning.flow.train_pairs import TrainConfig


def anchored(config: TrainConfig) -> TrainConfig:
    """The same training with the loop's anchors: its pairs part so soon that plain DPO runs away from both sides.

    Half a weight on the rejected, half the preferred's own error, four times the beta; see docs of `--loop-*` for other anchors.
    """
    dpo = replace(config.dpo, loser_weight=0.5, sft_weight=0.5, beta=4 * config.dpo.beta)
    return replace(config, dpo=dpo)


def supervised(config: TrainConfig) -> TrainConfig:
    """Plain flow matching on the preferred ones, trained otherwise alike."""
    return replace(config, dpo=DpoConfig(kind="sft", noise=config.dpo.noise, condition_dropout=config.dpo.condition_dropout))


@dataclass(frozen=True, kw_only=True)
class CircularSettings:
    """Everything that decides a run besides the problem."""

    human: TrainConfig = field(default_factory=TrainConfig)  # DPO on people's pairs
    loop: TrainConfig = field(default_factory=lambda: anchored(TrainConfig()))  # DPO on the loop's pairs
    sft: TrainConfig = field(default_factory=lambda: supervised(TrainConfig()))  # of the ablation's supervised groups
    loop_pairs: LoopPairsConfig = field(default_factory=LoopPairsConfig)
    weighing: Weighing = field(default_factory=Weighing)
    choosing: Choosing | None = field(default_factory=Choosing)  # None: no win rate while training; the last update is kept
    rounds: int = 1  # of the whole loop; each starts from the networks of the one before, which are then the reference
    seed: int = 0  # of everything drawn; also the trainings'

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"CircularSettings.rounds: expected at least 1, got {self.rounds}. Raise it.")
        if self.sft.dpo.kind != "sft":
            raise ValueError(f"CircularSettings.sft: expected a loss of kind 'sft', got {self.sft.dpo.kind!r}. Use supervised().")
        if not self.loop.dpo.needs_reference:
            raise ValueError(f"CircularSettings.loop: expected a loss of two sides, got {self.loop.dpo.kind!r}. Use sigmoid, say.")

    def training(self, config: TrainConfig, stage: FlowStage) -> TrainConfig:
        """A step's training at a stage: this run's seed, and adapters on the stage's own layers unless others were asked for."""
        lora = config.lora
        if lora is not None and lora.targets == type(lora)().targets:
            lora = replace(lora, targets=stage.lora_targets)
        return replace(config, lora=lora, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class CircularRun:
    """What a run does, and on what."""

    circular: CircularSettings
    source: ProblemSource = ProblemSource()  # networks and people's pairs
    stage: str | None = None  # train this stage alone, on people's pairs
    groups: tuple[str, ...] | None = None  # of the ablation; None: no ablation
    training_seeds: tuple[int, ...] = ()  # of the ablation
    judging: Judging = Judging()  # for the table that ends a run
    summary: bool = True  # end a run with that table, where the problem has a judge for it
    artefacts: str = "runs/artefacts"  # folder that runs share

    @property
    def plan(self) -> AblationPlan:
        """The ablation's."""
        return AblationPlan(groups=self.groups or (), seeds=self.training_seeds, judging=self.judging)

    def facts(self, problem: Problem) -> dict:
        """What a reader of a table needs besides it."""
        return {
            "problem": dict(problem.identity), "settings": asdict(self.circular), "judging": asdict(self.judging), "versions": versions(),
        }


def default_settings(pipeline: str) -> CircularSettings:
    """What a run does where it is not told otherwise: settings that suit the toy, or for TRELLIS those of public code."""
    if pipeline == TOY:
        from eg3d_rlhf.tuning.flow.toy.bundled import TOY_DEFAULTS

        return TOY_DEFAULTS
    return CircularSettings(loop_pairs=LoopPairsConfig(batch=4, chunk=16), choosing=Choosing(per_condition=1, batch=4))


Settings = TypeVar("Settings")


def from_dict(kind: type[Settings], values: Mapping, who: str = "") -> Settings:
    """A dataclass from what `dataclasses.asdict` made of it, after a journey through JSON.

    Raises: ValueError naming a field that is unknown or of the wrong sort.
    """
    who = who or kind.__name__
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{who}: expected settings of this version, got unknown ones: {', '.join(unknown)}. Start a new run.")
    made = dict(values)
    for name, value in values.items():
        for option in (hints[name], *typing.get_args(hints[name])) if value is not None else ():
            if dataclasses.is_dataclass(option):
                if not isinstance(value, Mapping):
                    raise ValueError(f"{who}.{name}: expected settings by name, got {value!r}. Start a new run.")
                made[name] = from_dict(option, value, f"{who}.{name}")
            elif typing.get_origin(option) is tuple:
                made[name] = tuple(value)
    return kind(**made)
