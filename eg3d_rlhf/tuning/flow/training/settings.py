"""Settings of the trainings of a stage, and of runs of arms.

An arm is one way of training that a run compares with others, for example a loss, or the same loss with
randomised labels as its control. This file imports no torch, so that `--help` is quick.
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
    """Settings that all trainings of a stage have. The defaults suit TRELLIS."""

    # adapters to train; None trains every parameter
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    steps: int = train_knob(3000, "Number of updates in the training of a stage.", metavar="UPDATES", low=1)
    lr: float = train_knob(5e-6, "Learning rate of the AdamW optimiser.", above=0)
    recompute: str = _rare_train_knob(
        "auto",
        "Whether the blocks of the network are recomputed in the backward pass, which takes less memory and a"
        " third more time. auto: they are recomputed only if the memory is too small without it.",
        choices=("auto", "on", "off"),
    )
    schedule: str = _rare_train_knob(
        "constant",
        "Schedule of the learning rate after the warm-up. constant: it stays at --lr; cosine: it falls to 2 %"
        " of --lr at the last update.",
        choices=("constant", "cosine"),
    )
    optimizer: str = _rare_train_knob(
        "adamw",
        "Optimiser. adamw: AdamW of PyTorch; adamw8bit: AdamW of the bitsandbytes library, whose state takes"
        " a quarter of the memory.",
        choices=("adamw", "adamw8bit"),
    )
    warmup: int = _rare_train_knob(
        100, "Number of first updates in which the learning rate rises from 0.", metavar="UPDATES", low=0
    )
    weight_decay: float = _rare_train_knob(0.01, "Decoupled weight decay of the AdamW optimiser.", low=0)
    clip: float = _rare_train_knob(
        1.0,
        "Largest norm of the gradient over all trained parameters. A gradient with a larger norm is scaled"
        " down to it.",
        above=0,
    )
    held_out_every: int = _rare_train_knob(
        100,
        "Number of updates between evaluations on held-out data (win rate, or accuracy on held-out pairs)."
        " The first evaluation takes place before any update.",
        metavar="UPDATES",
        low=1,
    )
    patience: int = _rare_train_knob(
        5, "Number of evaluations in a row without a new best value, after which training stops.", low=1
    )
    max_drop: float = _rare_train_knob(
        0.2, "Fall of the win rate (0..1) below its best value, at which training stops at once.", above=0
    )
    log: str = train_knob(
        "",
        "Comma-separated loggers to use besides stats.jsonl: tensorboard, wandb, trackio.",
        metavar="NAMES",
    )
    samples: int = _rare_train_knob(
        4,
        "Number of assets that every evaluation renders into one image in the run's folder samples/. 0 writes"
        " no images.",
        metavar="ASSETS",
        low=0,
    )
    log_every: int = _rare_train_knob(
        10, "Number of updates that one line of stats.jsonl summarises.", metavar="UPDATES", low=1
    )
    checkpoint_every: int = _rare_train_knob(
        200, "Number of updates between checkpoints that a run can resume from.", metavar="UPDATES", low=1
    )
    seed: int = 0  # >= 0: random seed of orders, times, noises and adapters

    def __post_init__(self):
        check_knobs(self)
        logs.named(self.log)  # raises ValueError for an unknown logger

    def for_stage(self, stage: "FlowStage", seed: int) -> Self:
        """Return a copy of the settings with another seed, and with adapters on the layers of a stage.

        The layers are `stage.lora_targets`. If the settings name layers other than the defaults of
        LoraConfig, these layers are kept.
        """
        lora = self.lora
        # the default targets stand for "not given"
        if lora is not None and lora.targets == LoraConfig().targets:
            lora = replace(lora, targets=stage.lora_targets)
        return replace(self, lora=lora, seed=seed)

    @property
    def needs_reference(self) -> bool:
        """Return True if the loss compares the policy with a frozen reference, as most losses do."""
        return True


KINDS = ("sigmoid", "sft", "dro")
_loss = functools.partial(knob, group="Preference loss")
_rare_loss = functools.partial(_loss, rare=True)


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Settings of the loss of a preference pair.

    The losses are DPO for diffusion (Wallace et al. 2023), and fine-tuning and direct reward optimisation
    (DRO) as in DSO (Li et al. 2025); dpo.pair_loss has their formulas. The times are sampled by the stage's
    path.
    """

    kind: str = _loss(
        "sigmoid",
        "Loss of a preference pair. sigmoid: DPO on the margin; sft: flow-matching error of the preferred"
        " sample alone; dro: this error minus loser_weight times the error of the rejected sample. dro has"
        " neither a reference nor a lower bound.",
        name="loss",
        choices=KINDS,
    )
    beta: float = _loss(
        250.0,
        "Factor beta of the margin in the DPO loss. It includes the factor 1/2 or the number of sampling"
        " steps that other programs multiply separately.",
        above=0,
    )
    loser_weight: float = _rare_loss(
        1.0,
        "Weight of the rejected sample in the margin. A weight below 1 limits likelihood displacement.",
        low=0,
    )
    sft_weight: float = _rare_loss(
        0.0, "Weight with which the preferred sample's flow-matching error is added to the loss.", low=0
    )
    condition_dropout: float = _rare_loss(
        0.0,
        "Share of the pairs (0..1) that are trained with the empty conditioning.",
        low=0,
        high=1,
        name="conditioning_dropout",
    )

    @property
    def remedy(self) -> str:
        """Return a sentence with changes of these settings that limit likelihood displacement.

        It names only changes that are not made yet.
        """
        changes = []
        # 0.5 is the weight of `flow tune`; below it, half of the present weight is the next step
        weight = 0.5 if self.loser_weight > 0.5 else self.loser_weight / 2
        if self.kind != "sft" and weight > 0:
            changes.append(f"lower loser_weight from {self.loser_weight:g} to {weight:g}")
        if self.kind != "sft" and not self.sft_weight:
            changes.append("add the preferred sample's error (sft_weight=0.5)")
        if self.kind == "sigmoid":
            changes.append(f"raise beta above {self.beta:g}")
        return f"To limit it, {', '.join([*changes, 'lower the learning rate'])}, or train fewer updates."

    def __post_init__(self):
        check_knobs(self)
        # sft has no rejected half, and its loss already is the preferred error: both would have no effect
        ignored_names = ("loser_weight", "sft_weight") if self.kind == "sft" else ()
        for name in ignored_names:
            setting_value = getattr(self, name)
            # the attribute of the class is the field's default, which stands for "not given"
            if setting_value != getattr(DpoConfig, name):
                raise ValueError(
                    f"DpoConfig.{name}: the loss {self.kind} does not use this setting, got {setting_value}."
                    " Remove the setting, or choose another loss."
                )

    @property
    def needs_reference(self) -> bool:
        """Return True if the loss compares the policy with a frozen reference: only "sigmoid" (DPO) does."""
        return self.kind == "sigmoid"


@dataclass(frozen=True, kw_only=True)
class PassConfig(StageTraining):
    """Settings of a training whose updates are batches of examples, computed in passes.

    A pass is one forward and backward computation; the gradients of all passes of an update are summed.
    """

    batch: int = 4  # number of examples in an update, over all processes and passes
    # number of examples that a process computes in one pass, None for all of its examples; decides the memory
    # that an update takes, but not its result
    batch_gpu: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.batch_gpu is not None and self.batch % self.batch_gpu:
            raise ValueError(
                f"{type(self).__name__}.batch_gpu: {self.batch_gpu} does not divide batch={self.batch}."
                " Choose a batch_gpu that divides the batch."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PassConfig):
    """Settings of a training on preference pairs."""

    dpo: DpoConfig = field(default_factory=DpoConfig)  # the loss
    batch: int = train_knob(4, "Number of pairs in an update, over all processes.", metavar="PAIRS", low=1)
    batch_gpu: int | None = train_knob(
        None,
        "Number of pairs that a process computes in one pass. It changes the memory that an update takes, not"
        " its result.",
        metavar="PAIRS",
        low=1,
        shown="batch",
    )

    @property
    def needs_reference(self) -> bool:
        """Return True if the loss of pairs compares the policy with a frozen reference."""
        return self.dpo.needs_reference


RANDOMISED = "randomised"
CONTROLS = (RANDOMISED, "inverted")  # endings of the names of control arms
# title of a column -> function from an arm's name and its entry in the table to the cell
Columns = Mapping[str, Callable[[str, Mapping], Any]]


@dataclass(frozen=True, kw_only=True)
class ArmsSource(ProblemSource):
    """Source of a problem for runs of arms, which need no preference pairs."""

    needs_pairs: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class ArmsRun(ABC):
    """Settings of a run of several arms, with the columns of the table that ends the run."""

    NAME: ClassVar[str]  # name of the table's files
    TITLE: ClassVar[str]  # title of the table
    MORE: ClassVar[str] = ""  # text that follows the facts that every table states
    BEFORE: ClassVar[Columns]  # columns to the left of the win rate
    AFTER: ClassVar[Columns] = {}  # columns to the right of the win rate
    ARMS: ClassVar[Collection[str]]  # names of all arms
    LISTED: ClassVar[str]  # the same names as a text for messages
    MEETING: ClassVar[bool] = False  # whether controls are compared with other arms, too

    dpo: TrainConfig  # settings of the arms that train on pairs
    source: ArmsSource = field(default_factory=ArmsSource)
    stage: str | None = None  # name of the stage to tune; None: the last stage
    arms: tuple[str, ...] = ()  # names of the arms to train, each once
    training_seeds: tuple[int, ...] = (0,)  # seeds; each arm is trained once with each seed
    # True: `arms` are an arm and its control with randomised labels or rewards. Both are trained by one seed,
    # one after the other on all ranks. Runs of earlier versions had no such control.
    is_controlled: bool = False
    choosing: Choosing | None = None  # None: no win rate is measured in training, and the last update is kept
    evaluation: Evaluation = Evaluation()  # settings of the table that ends a run
    summary: bool = True  # whether the run ends with a table

    def __post_init__(self):
        given_names_text = ", ".join(self.arms)
        if not self.arms:
            raise ValueError(f"--arms: the list is empty. Name one or more of {self.LISTED}.")
        unknown_names = [arm for arm in self.arms if arm not in self.ARMS]
        if unknown_names:
            raise ValueError(
                f"--arms: {unknown_names[0]!r} is not an arm, got {given_names_text}. Choose arms among"
                f" {self.LISTED}."
            )
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(
                f"--arms: an arm is named more than once, got {given_names_text}. Name each arm only once."
            )

    @abstractmethod
    def bench(self, opened: "Opened", seed: int) -> "Bench":
        """Make the training data and settings of all arms for one training seed.

        Args: opened: the problem and its labels, see arm_runs.Opened; seed: training seed.
        """

    @abstractmethod
    def has_table(self, problem: "Problem") -> bool:
        """Return True if the problem has the evaluator and the prompts that the table needs."""

    @abstractmethod
    def row(
        self, arm: str, trainings: Sequence[Mapping], rates: Mapping, scores: Mapping, base: Mapping
    ) -> dict:
        """Return those entries of an arm's row in the table, as JSON, that only this kind of run has.

        Args:
            arm: name of the arm.
            trainings: records of the arm's trainings, one for each seed.
            rates: win rates of the arm against the base, by name of the evaluator.
            scores: scores of the arm by name of the evaluator, [K, C, S] each (letters as in arm_runs.py).
            base: scores of the untuned network by name of the evaluator, [1, C, S] each.
        """

    def stage_in(self, problem: "Problem") -> "FlowStage":
        """Return the stage of a problem that the run tunes.

        Raises: ValueError if the problem's pipeline has no stage of the name in `stage`.
        """
        # imported here, since it imports torch
        from eg3d_rlhf.tuning.flow.base.stage import stage_of

        return stage_of(problem.pipeline, self.stage or problem.pipeline.stages[-1].name)

    def markdown(self, table_data: Mapping) -> str:
        """Format the table as Markdown.

        The text has up to three parts: the arms against the base, the held-out measures, and the arms against
        each other. The second and third part are left out if the data does not have them.
        """
        # imported here, to keep `--help` quick
        from eg3d_rlhf.experiments.table import markdown_rows, win_rates_by_seed, with_interval

        evaluator = table_data["evaluator"]
        seed_titles = [f"seed {seed}" for seed in table_data["training_seeds"]]
        table_rows = []
        for name, arm_row in table_data["arms"].items():
            win_rates = arm_row["evaluators"][evaluator]
            left_cells = [cell(name, arm_row) for cell in self.BEFORE.values()]
            right_cells = [cell(name, arm_row) for cell in self.AFTER.values()]
            kept_steps = ", ".join(map(str, arm_row["kept_step"]))  # one a training seed
            table_rows.append(
                [
                    *left_cells,
                    with_interval(win_rates),
                    *win_rates_by_seed(win_rates),
                    *right_cells,
                    kept_steps,
                ]
            )
        # a table states whether it can show that a gain is due to the labels
        control_remark = (
            ""
            if any(name.endswith(RANDOMISED) for name in table_data["arms"])
            else " No arm was trained on randomised labels or rewards, so nothing here tests whether a gain"
            " is due to them."
        )
        facts = (
            f"Stage {table_data['stage']}; {table_data['conditions']} held-out prompts x"
            f" {table_data['noises']} noises x {len(seed_titles)} training seeds; ties count half. Brackets:"
            f" {table_data['interval']}.{self.MORE}{control_remark}"
        )
        header = [
            *self.BEFORE,
            f"{evaluator} evaluator, wins against base",
            *seed_titles,
            *self.AFTER,
            "kept update",
        ]
        markdown_lines = [f"# {self.TITLE}", "", facts, "", *markdown_rows(header, table_rows)]
        # all arms have the same measures, so the first arm's names are the columns
        if measures := next(iter(table_data["arms"].values())).get("measures"):
            table_rows = [
                [name, *map(with_interval, arm_row["measures"].values())]
                for name, arm_row in table_data["arms"].items()
            ]
            markdown_lines += [
                "",
                "## Held-out measures, wins against base",
                "",
                *markdown_rows(["arm", *measures], table_rows),
            ]
        if table_data["pairwise"]:
            # the key "a_vs_b" gives the first two cells
            table_rows = [
                [*name.split("_vs_"), with_interval(comparison), *win_rates_by_seed(comparison)]
                for name, comparison in table_data["pairwise"].items()
            ]
            markdown_lines += [
                "",
                f"## Arms against each other, {evaluator} evaluator",
                "",
                *markdown_rows(["arm", "against", "wins", *seed_titles], table_rows),
            ]
        return "\n".join(markdown_lines) + "\n"
