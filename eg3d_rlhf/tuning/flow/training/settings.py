"""Settings of the trainings of a stage, and of runs of arms.

An arm is one way of training that a run compares with others. This file imports no torch, so that `--help` is
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
        "Recompute blocks in the backward pass, which takes less memory and a third more time. auto: only if "
        "the memory is too small otherwise.",
        choices=("auto", "on", "off"),
    )
    schedule: str = _rare_train_knob(
        "constant",
        "Schedule of the learning rate after the warm-up. cosine: falls to 2 % of --lr at the last update.",
        choices=("constant", "cosine"),
    )
    optimizer: str = _rare_train_knob(
        "adamw",
        "Optimiser. adamw8bit: AdamW of bitsandbytes, whose state takes a quarter of the memory.",
        choices=("adamw", "adamw8bit"),
    )
    warmup: int = _rare_train_knob(
        100, "Length of the warm-up, in which the learning rate rises from 0.", metavar="UPDATES", low=0
    )
    weight_decay: float = _rare_train_knob(0.01, "Decoupled weight decay of AdamW.", low=0)
    clip: float = _rare_train_knob(
        1.0, "Largest norm of the gradient over all parameters; a larger one is scaled down.", above=0
    )
    held_out_every: int = _rare_train_knob(
        100,
        "Interval of evaluations (win rate, accuracy on held-out pairs). The first comes before any update.",
        metavar="UPDATES",
        low=1,
    )
    patience: int = _rare_train_knob(
        5, "Training stops after this many evaluations in a row without a new best one.", low=1
    )
    max_drop: float = _rare_train_knob(
        0.2, "Training stops at once if the win rate falls by this much below its best.", above=0
    )
    log: str = train_knob("", "Loggers besides stats.jsonl: tensorboard,wandb,trackio.", metavar="NAMES")
    samples: int = _rare_train_knob(
        4,
        "Number of assets in the strip of renders that every evaluation writes to the run's folder samples/.",
        metavar="ASSETS",
        low=0,
    )
    log_every: int = _rare_train_knob(
        10, "Updates that one line of stats.jsonl summarises.", metavar="UPDATES", low=1
    )
    checkpoint_every: int = _rare_train_knob(
        200, "Interval of resumable checkpoints.", metavar="UPDATES", low=1
    )
    seed: int = 0  # >= 0: random seed of orders, times, noises and adapters

    def __post_init__(self):
        check_knobs(self)
        logs.named(self.log)  # raises ValueError for an unknown logger

    def at(self, stage: "FlowStage", seed: int) -> Self:
        """Return a copy with a seed, and with adapters on the stage's own layers unless others were given."""
        lora = self.lora
        # the default targets stand for "not given"
        if lora is not None and lora.targets == LoraConfig().targets:
            lora = replace(lora, targets=stage.lora_targets)
        return replace(self, lora=lora, seed=seed)

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss compares the policy with a frozen reference."""
        return True


KINDS = ("sigmoid", "sft", "dro")
_loss = functools.partial(knob, group="Preference loss")
_rare_loss = functools.partial(_loss, rare=True)


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Loss of a batch of pairs. The times are sampled by the stage's path."""

    kind: str = _loss(
        "sigmoid",
        "Loss of a pair. sigmoid: DPO on the margin; sft: flow matching on the preferred sample; dro: "
        "preferred minus --loser-weight x rejected error, which has neither a reference nor a lower bound.",
        name="loss",
        choices=KINDS,
    )
    beta: float = _loss(
        250.0,
        "Factor of the margin. It includes any factor 1/2 or number of steps of other conventions.",
        above=0,
    )
    loser_weight: float = _rare_loss(
        1.0, "Weight of the rejected half of the margin; below 1 it limits likelihood displacement.", low=0
    )
    sft_weight: float = _rare_loss(
        0.0, "Weight of the flow-matching error of the preferred sample, which is added to the loss.", low=0
    )
    condition_dropout: float = _rare_loss(
        0.0,
        "Share of the pairs that are trained with the empty conditioning.",
        low=0,
        high=1,
        name="conditioning_dropout",
    )

    def __post_init__(self):
        check_knobs(self)
        # sft has no rejected half, and its loss already is the preferred error: both would have no effect
        for name in ("loser_weight", "sft_weight") if self.kind == "sft" else ():
            if getattr(self, name) != getattr(DpoConfig, name):
                raise ValueError(
                    f"DpoConfig.{name}: has no effect with the loss {self.kind}, got {getattr(self, name)}."
                    " Leave it out."
                )

    @property
    def needs_reference(self) -> bool:
        return self.kind == "sigmoid"


@dataclass(frozen=True, kw_only=True)
class PassConfig(StageTraining):
    """Settings of a training whose updates are batches of examples, computed in passes.

    A pass is one forward and backward computation; the gradients of all passes of an update are summed.
    """

    batch: int = 4  # examples per update, over all processes and passes
    batch_gpu: int | None = None  # examples per pass and process; decides memory, not the result

    def __post_init__(self):
        super().__post_init__()
        if self.batch_gpu is not None and self.batch % self.batch_gpu:
            got = f"batch={self.batch}, got {self.batch_gpu}"
            raise ValueError(
                f"{type(self).__name__}.batch_gpu: expected a divisor of {got}. Choose a divisor."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PassConfig):
    """Everything that decides a training on pairs besides its networks and pairs."""

    dpo: DpoConfig = field(default_factory=DpoConfig)  # the loss
    batch: int = train_knob(4, "Batch size of an update, over all processes.", metavar="PAIRS", low=1)
    batch_gpu: int | None = train_knob(
        None,
        "Pairs per pass and process; decides memory, not the result.",
        metavar="PAIRS",
        low=1,
        shown="batch",
    )

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss of pairs compares the policy with a frozen reference."""
        return self.dpo.needs_reference


CONTROLS = ("randomised", "inverted")  # endings of the names of control arms
# title of a column -> function that makes the cell from an arm's name and its row of the table
Columns = Mapping[str, Callable[[str, Mapping], Any]]


@dataclass(frozen=True, kw_only=True)
class ArmsSource(ProblemSource):
    """Source that a problem is read from; pairs are not needed."""

    needs_pairs: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class ArmsRun(ABC):
    """Settings of a run of several arms, and the layout of its table."""

    NAME: ClassVar[str]  # name of the table's files
    TITLE: ClassVar[str]  # title of the table
    MORE: ClassVar[str] = ""  # further facts, after those that every table states
    BEFORE: ClassVar[Columns]  # columns to the left of the evaluator's
    AFTER: ClassVar[Columns] = {}  # columns to the right of the evaluator's
    ARMS: ClassVar[Collection[str]]  # names of all arms
    LISTED: ClassVar[str]  # the same names as a text for messages
    MEETING: ClassVar[bool] = False  # whether controls are compared with other arms, too

    dpo: TrainConfig  # of the arms that train on pairs
    source: ArmsSource = field(default_factory=ArmsSource)
    stage: str | None = None  # stage to tune; None: the last
    arms: tuple[str, ...] = ()  # names of the arms to train, each once
    training_seeds: tuple[int, ...] = (0,)  # each arm is trained once with each of them
    choosing: Choosing | None = None  # None: no win rate while training; the last update is kept
    evaluation: Evaluation = Evaluation()  # of the table that ends a run
    summary: bool = True  # whether the run ends with a table

    def __post_init__(self):
        if (
            any(arm not in self.ARMS for arm in self.arms)
            or not self.arms
            or len(set(self.arms)) < len(self.arms)
        ):
            got = ", ".join(self.arms) or "none"
            raise ValueError(
                f"--arms: expected some of {self.LISTED}, each at most once, got {got}. Name one or more."
            )

    @abstractmethod
    def bench(self, opened: "Opened", seed: int) -> "Bench":
        """Make the training data of all arms for one training seed."""

    @abstractmethod
    def has_table(self, problem: "Problem") -> bool:
        """Return whether the problem has what the table evaluates with."""

    @abstractmethod
    def row(
        self, arm: str, trainings: Sequence[Mapping], rates: Mapping, scores: Mapping, base: Mapping
    ) -> dict:
        """Return the run's own entries of an arm's row, JSON.

        Args: trainings: one a seed; rates: win rates against the base; scores, base: scores of the arm and of
            the base, all by name of the evaluator.
        """

    def stage_in(self, problem: "Problem") -> "FlowStage":
        """Return the stage that is tuned. Raises: ValueError for an unknown name."""
        # imported here, since it imports torch
        from eg3d_rlhf.tuning.flow.base.stage import stage_of

        return stage_of(problem.pipeline, self.stage or problem.pipeline.stages[-1].name)

    def markdown(self, data: Mapping) -> str:
        """Format the table as Markdown: arms against the base, held-out measures, arms against each other.

        The last two parts are left out if the data has none.
        """
        # imported here, to keep `--help` quick
        from eg3d_rlhf.experiments.table import markdown_rows, of_seeds, with_interval

        evaluator = data["evaluator"]
        seeds = [f"seed {seed}" for seed in data["training_seeds"]]
        rows = []
        for name, arm in data["arms"].items():
            won = arm["evaluators"][evaluator]
            before = [cell(name, arm) for cell in self.BEFORE.values()]
            after = [cell(name, arm) for cell in self.AFTER.values()]
            kept_steps = ", ".join(map(str, arm["kept_step"]))  # one a training seed
            rows.append([*before, with_interval(won), *of_seeds(won), *after, kept_steps])
        facts = (
            f"Stage {data['stage']}; {data['conditions']} held-out prompts x {data['noises']} noises x"
            f" {len(seeds)} training seeds; ties count half. Brackets: {data['interval']}.{self.MORE}"
        )
        head = [*self.BEFORE, f"{evaluator} evaluator, wins against base", *seeds, *self.AFTER, "kept update"]
        lines = [f"# {self.TITLE}", "", facts, "", *markdown_rows(head, rows)]
        # all arms have the same measures, so the first arm's names are the columns
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
            # the key "a_vs_b" gives the first two cells
            rows = [
                [*name.split("_vs_"), with_interval(rated), *of_seeds(rated)]
                for name, rated in data["pairwise"].items()
            ]
            lines += [
                "",
                f"## Arms against each other, {evaluator} evaluator",
                "",
                *markdown_rows(["arm", "against", "wins", *seeds], rows),
            ]
        return "\n".join(lines) + "\n"
