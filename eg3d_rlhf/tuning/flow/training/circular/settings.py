"""Settings of Circular-DPO's loop, and the groups of the paper's table 2.

This file imports no torch, so that `--help` is quick.
"""

import functools
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from eg3d_rlhf.core.cli import versions
from eg3d_rlhf.tuning.flow.base.settings import Choosing, Evaluation, ProblemSource
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig, TrainConfig
from training.config import Knobs, knob

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.base.problem import Problem

REWARD = "reward"
TUNED = "tuned"
ROLES = (TUNED, REWARD)
# Uses of the loop's pairs, in the order of USES: the pairs unchanged; only the regulariser of their loss; the
# pairs with a random half of them inverted; all pairs inverted; fine-tuning on their preferred samples; and
# the people's pairs that the loop's pairs were made from.
PAIRS, REGULARISER, RANDOMISED, INVERTED, WINNERS, PEOPLES = USES = (
    "pairs",
    "regulariser",
    "randomised",
    "inverted",
    "winners",
    "people",
)
_loop = functools.partial(knob, group="The loop")


@dataclass(frozen=True, kw_only=True)
class LoopPairsConfig(Knobs):
    """Settings of how the loop's pairs are made."""

    per_pair: int = _loop(
        1,
        "Number of new pairs that are made from each human pair. Each new pair has its own noise.",
        name="loop_pairs",
        low=1,
        rare=True,
    )
    batch: int = 16  # number of assets at once; bounds memory, changes the result only by rounding
    chunk: int = 64  # number of human pairs in a chunk; finished chunks survive an interruption


@dataclass(frozen=True, kw_only=True)
class Weighing(Knobs):
    """Selection and weights of the loop's pairs; the pairs themselves do not depend on them."""

    use_w1: bool = True  # drop pairs whose tuned sample has no higher reward
    use_w2: bool = True  # weight the remaining pairs by the difference of their rewards
    roles: str = _loop(
        TUNED,
        "Preferred sample of a loop pair. tuned: the sample of the tuned network, as in the paper; reward:"
        " the sample with the higher reward.",
        choices=ROLES,
        rare=True,
    )


def with_regulariser(config: TrainConfig) -> TrainConfig:
    """Return the settings of a training with the loop's regularisation added.

    The weight of the rejected sample is 0.5, half of the preferred sample's own error is added to the loss,
    and beta is multiplied by 4. The settings loop_loser_weight, loop_sft_weight and loop_beta (--set) replace
    these values.
    """
    # the loop's pairs are separated so soon that plain DPO raises the errors of both samples
    dpo = replace(config.dpo, loser_weight=0.5, sft_weight=0.5, beta=4 * config.dpo.beta)
    return replace(config, dpo=dpo)


def with_fine_tuning_loss(config: TrainConfig) -> TrainConfig:
    """Return the settings of a training with the loss replaced: flow matching on the preferred samples."""
    return replace(config, dpo=DpoConfig(kind="sft", condition_dropout=config.dpo.condition_dropout))


@dataclass(frozen=True, kw_only=True)
class CircularSettings:
    """Settings of the loop's trainings, its pairs and its rounds."""

    human: TrainConfig = field(default_factory=TrainConfig)  # DPO on people's pairs
    loop: TrainConfig = field(
        default_factory=lambda: with_regulariser(TrainConfig())
    )  # DPO on the loop's pairs
    # fine-tuning of the ablation's supervised groups
    sft: TrainConfig = field(default_factory=lambda: with_fine_tuning_loss(TrainConfig()))
    loop_pairs: LoopPairsConfig = field(default_factory=LoopPairsConfig)
    weighing: Weighing = field(default_factory=Weighing)
    # None: no win rate is measured in training, and the last update is kept
    choosing: Choosing | None = field(default_factory=Choosing)
    # number of rounds of the loop; each round starts from the networks of the previous round, which are then
    # its reference
    rounds: int = 1
    seed: int = 0  # random seed of all noises and of the trainings


BASE = "base"
PEOPLE = "people"
LOOP = "loop"
SUPERVISED = "supervised"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Group of the ablation: the trainings of one row of the table."""

    title: str  # title of the row
    first: str = BASE  # data that the stages before the last learn from; BASE: they are not trained
    last: str = BASE  # data that the last stage learns from; BASE: it is not trained
    use_w1: bool = True  # selection by w1, as in Weighing
    use_w2: bool = True  # weights w2, as in Weighing
    use: str = PAIRS  # use of the loop's pairs, one of USES


GROUPS = {
    "a": Group(title="full loop", first=LOOP, last=PEOPLE),
    "b": Group(title="both stages on people's pairs, no loop", first=PEOPLE, last=PEOPLE),
    "c": Group(title="first stage alone, people's pairs", first=PEOPLE),
    "d": Group(title="last stage alone, people's pairs", last=PEOPLE),
    "e": Group(title="first stage fine-tuned on the preferred", first=SUPERVISED),
    "f": Group(title="last stage fine-tuned on the preferred", last=SUPERVISED),
    "g": Group(title="full loop without the selection by w1", first=LOOP, last=PEOPLE, use_w1=False),
    "h": Group(title="full loop without the weight w2", first=LOOP, last=PEOPLE, use_w2=False),
    "i": Group(title="base"),
}
# Group (a) with another use of the loop's pairs: controls of the preferences in these pairs.
ARMS = {
    "regulariser": Group(
        title="full loop, the regulariser without the preference term",
        first=LOOP,
        last=PEOPLE,
        use=REGULARISER,
    ),
    "randomised": Group(title="full loop, randomised pairs", first=LOOP, last=PEOPLE, use=RANDOMISED),
    "inverted": Group(title="full loop, inverted pairs", first=LOOP, last=PEOPLE, use=INVERTED),
    "fed_winners": Group(
        title="full loop, fine-tuning on the preferred of its pairs", first=LOOP, last=PEOPLE, use=WINNERS
    ),
    "people_first": Group(
        title="full loop, on the people's pairs that its pairs come from",
        first=LOOP,
        last=PEOPLE,
        use=PEOPLES,
    ),
}
# Row of the table of a run without --ablate: the control that is trained on randomised answers of people.
CONTROL = "control"
ALL = GROUPS | ARMS | {CONTROL: Group(title="the same trainings on randomised answers of people")}


def parse_groups(group_list: str) -> list[str]:
    """Parse a list of groups such as "a..i", "a,d,i" or "a..d,regulariser", and return their names in order.

    The base, group "i", is always among them.

    Raises: ValueError for a part that is neither a letter, a range of letters nor the name of an arm.
    """
    # the base is always included, since all groups are compared with it
    group_names: set[str] = {"i"}
    for group_text in group_list.replace(" ", "").split(","):
        range_start, separator, range_end = group_text.partition("..")
        bounds = [range_start, range_end if separator else range_start]
        if group_text in ARMS:
            group_names.add(group_text)
            continue
        if not all(bound in GROUPS for bound in bounds) or bounds[0] > bounds[1]:
            arm_names = ", ".join(ARMS)
            raise ValueError(
                f"--ablate: {group_text!r} in {group_list!r} is not a group. Write letters from a to i, such"
                f" as a,b,d or a..i, or arms among {arm_names}."
            )
        group_names.update(letter for letter in GROUPS if bounds[0] <= letter <= bounds[1])
    return [group_name for group_name in ALL if group_name in group_names]


@dataclass(frozen=True, kw_only=True)
class AblationPlan:
    """Plan of an ablation: the groups, the training seeds, and the evaluation."""

    groups: tuple[str, ...] = tuple(GROUPS)
    seeds: tuple[int, ...] = (0, 1, 2)  # training seeds; all of them share the noises of the evaluation
    evaluation: Evaluation = Evaluation()

    def tasks(self) -> dict[str, list[str]]:
        """Return the names of all tasks, each with the names of the tasks that it waits for.

        A name is "<seed>/<data>/<stages>" for a training that several groups share, "<seed>/pairs" for the
        loop's pairs, and "<seed>/<group>" for the training and the scores of one group. Tasks that others
        wait for come first, so that they start early.
        """
        groups = [ALL[letter] for letter in self.groups]
        # the loop starts from the last stage trained on people's pairs
        has_loop = any(group.first == LOOP for group in groups)
        tasks: dict[str, list[str]] = {}
        # trainings that groups share; PEOPLE/last comes first, since the loop's pairs wait for it
        for stage_position in ("last", "first"):  # the two fields of Group
            for data_name in (PEOPLE, SUPERVISED):
                if not any(getattr(group, stage_position) == data_name for group in groups):
                    continue
                tasks |= {f"{seed}/{data_name}/{stage_position}": [] for seed in self.seeds}
                if (data_name, stage_position) == (PEOPLE, "last") and has_loop:
                    # the pairs are made from samples of the tuned last stage
                    tasks |= {f"{seed}/pairs": [f"{seed}/{PEOPLE}/last"] for seed in self.seeds}
        for letter in self.groups:
            group = ALL[letter]
            # "i" is the base, which has no training, so its scores are the same for all seeds
            seeds = self.seeds if letter != "i" else self.seeds[:1]
            for seed in seeds:
                needed_tasks = []
                if group.last != BASE:
                    needed_tasks.append(f"{seed}/{group.last}/last")
                if group.first == LOOP:
                    needed_tasks.append(f"{seed}/pairs")
                elif group.first != BASE:
                    needed_tasks.append(f"{seed}/{group.first}/first")
                tasks[f"{seed}/{letter}"] = needed_tasks
        return tasks


@dataclass(frozen=True, kw_only=True)
class CircularRun:
    """Settings of a run: the loop, one stage alone, or an ablation."""

    circular: CircularSettings
    source: ProblemSource = ProblemSource()  # networks and people's pairs
    stage: str | None = None  # stage to train alone, on people's pairs; None: the loop or the ablation
    groups: tuple[str, ...] | None = None  # groups of the ablation; None: no ablation
    training_seeds: tuple[int, ...] = ()  # training seeds of the ablation
    # True: also train a control on randomised labels; runs of earlier versions had none
    control: bool = False
    evaluation: Evaluation = Evaluation()  # settings of the table that ends a run
    summary: bool = True  # whether a run ends with the table, if the problem has a final evaluator
    artefacts: str = "runs/artefacts"  # folder of the artefacts that runs share

    @property
    def plan(self) -> AblationPlan:
        """Return the plan of the ablation."""
        return AblationPlan(groups=self.groups or (), seeds=self.training_seeds, evaluation=self.evaluation)

    def facts(self, problem: "Problem") -> dict:
        """Return the entries of a table's file that describe the run, as JSON."""
        return {
            "problem": dict(problem.identity),
            "settings": asdict(self.circular),
            "evaluation": asdict(self.evaluation),
            "versions": versions(),
        }
