"""Settings of the trainings of a stage, and of runs of arms. This file imports no torch, so that `--help` is
quick.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from eg3d_rlhf.experiments import logs
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.tuning.flow.base.settings import Choosing, Evaluation, ProblemSource
from training.config import check_knobs, knob

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.base.problem import Problem
    from eg3d_rlhf.tuning.flow.base.stage import FlowStage
    from eg3d_rlhf.tuning.flow.training.arm_runs import Bench, Opened

train_knob = functools.partial(knob, group="Training")
_rare_train_knob = functools.partial(train_knob, rare=True)


@dataclass(frozen=True, kw_only=True)
class StageTraining:
    """Settings of any training of a stage; the defaults suit TRELLIS."""

    # adapters to train; None trains every parameter
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    steps: int = train_knob(3000, "Length of a stage's training.", metavar="UPDATES", low=1)
    lr: float = train_knob(5e-6, "AdamW's learning rate.", above=0)
    recompute: str = _rare_train_knob(
        "auto",
        "Compute blocks again in the backward pass: less memory, a third more time. auto: where "
        "memory needs it.",
        choices=("auto", "on", "off"),
    )
    schedule: str = _rare_train_knob(
        "constant",
        "Of the learning rate after its rise; cosine: down to 2 % of it at the last update.",
        choices=("constant", "cosine"),
    )
    optimizer: str = _rare_train_knob(
        "adamw",
        "adamw8bit: bitsandbytes' AdamW, whose state takes a quarter of the memory.",
        choices=("adamw", "adamw8bit"),
    )
    warmup: int = _rare_train_knob(
        100, "Over which the learning rate rises from 0.", metavar="UPDATES", low=0
    )
    weight_decay: float = _rare_train_knob(0.01, "AdamW's, apart from the gradient.", low=0)
    clip: float = _rare_train_knob(1.0, "Largest norm of the gradient over all parameters.", above=0)
    held_out_every: int = _rare_train_knob(
        100,
        "Between evaluations: win rate, accuracy on held-out pairs. One comes before the first.",
        metavar="UPDATES",
        low=1,
    )
    patience: int = _rare_train_knob(
        5, "Evaluations in a row without a new best, after which training stops.", low=1
    )
    max_drop: float = _rare_train_knob(0.2, "Below the best win rate, at which it stops at once.", above=0)
    log: str = train_knob("", "Beside stats.jsonl: tensorboard,wandb,trackio.", metavar="NAMES")
    samples: int = _rare_train_knob(
        4,
        "In a strip of pictures at every evaluation, in the run's folder samples/.",
        metavar="ASSETS",
        low=0,
    )
    log_every: int = _rare_train_knob(10, "Per line of stats.jsonl.", metavar="UPDATES", low=1)
    checkpoint_every: int = _rare_train_knob(200, "Between resumable states.", metavar="UPDATES", low=1)
    seed: int = 0  # >= 0: of everything that is drawn

    def __post_init__(self):
        check_knobs(self)
        logs.named(self.log)

    def at(self, stage: "FlowStage", seed: int) -> Self:
        """With a seed, and adapters on the stage's own layers unless others were asked for."""
        lora = self.lora
        if lora is not None and lora.targets == LoraConfig().targets:
            lora = replace(lora, targets=stage.lora_targets)
        return replace(self, lora=lora, seed=seed)

    @property
    def needs_reference(self) -> bool:
        return True


KINDS = ("sigmoid", "sft", "dro")
_loss = functools.partial(knob, group="Preference loss")
_rare_loss = functools.partial(_loss, rare=True)


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """The loss of a batch of pairs; the path decides the times."""

    kind: str = _loss(
        "sigmoid",
        "Of the margin; sft: flow matching on the preferred; dro: preferred minus --loser-weight x rejected "
        "error, which no reference and no lower bound holds.",
        name="loss",
        choices=KINDS,
    )
    beta: float = _loss(
        250.0, "Multiplies the margin, as one number: any factor 1/2 or number of steps included.", above=0
    )
    loser_weight: float = _rare_loss(
        1.0, "Of the rejected half of the margin; below 1 keeps a policy from running away from it.", low=0
    )
    sft_weight: float = _rare_loss(0.0, "Of the preferred's own error, added.", low=0)
    condition_dropout: float = _rare_loss(
        0.0,
        "Share of the pairs that are trained without their conditioning.",
        low=0,
        high=1,
        name="conditioning_dropout",
    )

    def __post_init__(self):
        check_knobs(self)
        for name in ("loser_weight", "sft_weight") if self.kind == "sft" else ():
            if getattr(self, name) != getattr(DpoConfig, name):
                raise ValueError(
                    f"DpoConfig.{name}: expected it unset with {self.kind}, got {getattr(self, name)}. Leave"
                    " it out."
                )

    @property
    def needs_reference(self) -> bool:
        return self.kind == "sigmoid"


@dataclass(frozen=True, kw_only=True)
class PassConfig(StageTraining):
    """A training whose updates are batches of examples, taken in passes."""

    batch: int = 4  # examples per update, over all processes and passes
    batch_gpu: int | None = None  # per pass and process; decides memory, not the result

    def __post_init__(self):
        super().__post_init__()
        if self.batch_gpu is not None and self.batch % self.batch_gpu:
            got = f"batch={self.batch}, got {self.batch_gpu}"
            raise ValueError(f"{type(self).__name__}.batch_gpu: expected a divisor of {got}. Choose one.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PassConfig):
    """Everything that decides a training on pairs besides its networks and pairs."""

    dpo: DpoConfig = field(default_factory=DpoConfig)  # what is minimised
    batch: int = train_knob(4, "Per update, over all processes and passes.", metavar="PAIRS", low=1)
    batch_gpu: int | None = train_knob(
        None, "Per pass and process: decides memory, not the result.", metavar="PAIRS", low=1, shown="batch"
    )

    @property
    def needs_reference(self) -> bool:
        return self.dpo.needs_reference


CONTROLS = ("randomised", "inverted")  # how their names end
# by title, a cell of an arm's name and its row of the table
Columns = Mapping[str, Callable[[str, Mapping], Any]]


@dataclass(frozen=True, kw_only=True)
class ArmsSource(ProblemSource):
    """What a problem is read from; pairs are not needed."""

    needs_pairs: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class ArmsRun(ABC):
    """Settings of a run, and what its table says."""

    NAME: ClassVar[str]  # of the table's files
    TITLE: ClassVar[str]
    MORE: ClassVar[str] = ""  # facts after those that every table states
    BEFORE: ClassVar[Columns]  # columns before and behind those of what the judge says
    BEHIND: ClassVar[Columns] = {}
    ARMS: ClassVar[Collection[str]]  # all that there are
    LISTED: ClassVar[str]  # the same in words
    MEETING: ClassVar[bool] = False  # controls are compared with other arms, too

    dpo: TrainConfig  # of the arms that train on pairs
    source: ArmsSource = field(default_factory=ArmsSource)
    stage: str | None = None  # None: the last
    arms: tuple[str, ...] = ()
    training_seeds: tuple[int, ...] = (0,)
    choosing: Choosing | None = None  # None: no win rate while training; the last update is kept
    evaluation: Evaluation = Evaluation()  # of the table that ends a run
    summary: bool = True  # end with it

    def __post_init__(self):
        if (
            any(arm not in self.ARMS for arm in self.arms)
            or not self.arms
            or len(set(self.arms)) < len(self.arms)
        ):
            got = ", ".join(self.arms) or "none"
            raise ValueError(f"--arms: expected some of {self.LISTED}, each once, got {got}. Name them.")

    @abstractmethod
    def bench(self, opened: "Opened", seed: int) -> "Bench":
        """Of a training seed."""

    @abstractmethod
    def has_table(self, problem: "Problem") -> bool:
        """Whether there is something to judge by."""

    @abstractmethod
    def row(
        self, arm: str, trainings: Sequence[Mapping], rates: Mapping, scores: Mapping, base: Mapping
    ) -> dict:
        """More of an arm's row, JSON, from its trainings, its rates against the base, its scores and the
        base's by evaluator.
        """

    def stage_in(self, problem: "Problem") -> "FlowStage":
        """The stage that is tuned. Raises: ValueError for one that is not there."""
        from eg3d_rlhf.tuning.flow.base.stage import stage_of

        return stage_of(problem.pipeline, self.stage or problem.pipeline.stages[-1].name)

    def markdown(self, data: Mapping) -> str:
        """Of the table: arms, what nobody trained on, and arms against each other, where there are such."""
        from eg3d_rlhf.experiments.table import markdown_rows, of_seeds, with_interval

        evaluator = data["evaluator"]
        seeds = [f"seed {seed}" for seed in data["training_seeds"]]
        rows = []
        for name, arm in data["arms"].items():
            won = arm["evaluators"][evaluator]
            before, behind = (
                [cell(name, arm) for cell in columns.values()] for columns in (self.BEFORE, self.BEHIND)
            )
            rows.append(
                [*before, with_interval(won), *of_seeds(won), *behind, ", ".join(map(str, arm["kept_step"]))]
            )
        facts = (
            f"Stage {data['stage']}; {data['conditions']} held-out conditions x {data['noises']} noises x"
            f" {len(seeds)} training seeds; ties count half. Brackets: {data['interval']}.{self.MORE}"
        )
        head = [*self.BEFORE, f"{evaluator} evaluator, wins against base", *seeds, *self.BEHIND, "kept"]
        lines = [f"# {self.TITLE}", "", facts, "", *markdown_rows(head, rows)]
        if measures := next(iter(data["arms"].values())).get("measures"):
            rows = [
                [name, *map(with_interval, arm["measures"].values())] for name, arm in data["arms"].items()
            ]
            lines += [
                "",
                "## Held-out measures, wins against base",
                "",
                *markdown_rows(["arm", *measures], rows),
            ]
        if data["pairwise"]:
            rows = [
                [*name.split("_vs_"), with_interval(rated), *of_seeds(rated)]
                for name, rated in data["pairwise"].items()
            ]
            lines += [
                "",
                f"## Pair by pair, {evaluator} evaluator",
                "",
                *markdown_rows(["arm", "against", "wins", *seeds], rows),
            ]
        return "\n".join(lines) + "\n"
