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
# Uses of the loop's pairs: unchanged; only the regulariser of their loss; the pairs with a random half or all
# of them inverted; fine-tuning on their preferred samples; and the people's pairs that they were made from.
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
        1, "New pairs for each human pair; each has a noise of its own.", name="loop_pairs", low=1, rare=True
    )
    batch: int = 16  # assets at once; bounds memory, and does not change the result beyond rounding
    chunk: int = 64  # human pairs in a chunk; finished chunks survive an interruption


@dataclass(frozen=True, kw_only=True)
class Weighing(Knobs):
    """Selection and weights of the loop's pairs; the pairs themselves do not depend on them."""

    use_w1: bool = True  # drop pairs whose tuned sample has no higher reward
    use_w2: bool = True  # weight the others by the difference of the rewards
    roles: str = _loop(
        TUNED,
        "Preferred sample of a pair: the tuned network's, as in the paper, or the one with the higher"
        " reward.",
        choices=ROLES,
        rare=True,
    )


def anchored(config: TrainConfig) -> TrainConfig:
    """Return the same training with the loop's regularisation.

    The weight of the rejected half is 0.5, half the preferred sample's own error is added, and beta is
    multiplied by 4. The options `--loop-*` set other values.
    """
    # the loop's pairs are separated so soon that plain DPO raises the errors of both sides
    dpo = replace(config.dpo, loser_weight=0.5, sft_weight=0.5, beta=4 * config.dpo.beta)
    return replace(config, dpo=dpo)


def supervised(config: TrainConfig) -> TrainConfig:
    """Return the same training with plain flow matching on the preferred samples as its loss."""
    return replace(config, dpo=DpoConfig(kind="sft", condition_dropout=config.dpo.condition_dropout))


@dataclass(frozen=True, kw_only=True)
class CircularSettings:
    """Everything that decides a run besides the problem."""

    human: TrainConfig = field(default_factory=TrainConfig)  # DPO on people's pairs
    loop: TrainConfig = field(default_factory=lambda: anchored(TrainConfig()))  # DPO on the loop's pairs
    # fine-tuning of the ablation's supervised groups
    sft: TrainConfig = field(default_factory=lambda: supervised(TrainConfig()))
    loop_pairs: LoopPairsConfig = field(default_factory=LoopPairsConfig)
    weighing: Weighing = field(default_factory=Weighing)
    # None: no win rate while training; the last update is kept
    choosing: Choosing | None = field(default_factory=Choosing)
    # number of rounds of the whole loop; each starts from the networks of the round before, which are then
    # the reference
    rounds: int = 1
    seed: int = 0  # of all noises, and of the trainings


BASE = "base"
PEOPLE = "people"
LOOP = "loop"
SUPERVISED = "supervised"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Group of the ablation: the trainings of one row of the table."""

    title: str  # of the row
    first: str = BASE  # what the stages before the last learn from
    last: str = BASE  # what the last stage learns from
    use_w1: bool = True  # as in Weighing
    use_w2: bool = True
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
ALL = GROUPS | ARMS


def letters(text: str) -> list[str]:
    """Parse a list of groups such as "a..i", "a,d,i" or "a..d,regulariser", and return them in order.

    Raises: ValueError for other text.
    """
    # the base is always included, since all groups are compared with it
    names: set[str] = {"i"}
    for part in text.replace(" ", "").split(","):
        low, dots, high = part.partition("..")
        ends = [low, high if dots else low]
        if part in ARMS:
            names.add(part)
            continue
        if not all(end in GROUPS for end in ends) or ends[0] > ends[1]:
            arms = ", ".join(ARMS)
            raise ValueError(
                f"groups: expected letters of a..i such as a,b,d or a..i, and arms among {arms}, got"
                f" {text!r}. Correct the list."
            )
        names.update(letter for letter in GROUPS if ends[0] <= letter <= ends[1])
    return [name for name in ALL if name in names]


@dataclass(frozen=True, kw_only=True)
class AblationPlan:
    """Plan of an ablation: the groups, the training seeds, and the evaluation."""

    groups: tuple[str, ...] = tuple(GROUPS)
    seeds: tuple[int, ...] = (0, 1, 2)  # of training; the noises of the evaluation are the same for all
    evaluation: Evaluation = Evaluation()

    def tasks(self) -> dict[str, list[str]]:
        """Return the tasks, each with the tasks that it waits for.

        Tasks that others wait for come first, so that they start early.
        Names: "<seed>/<what is trained>/<stages>", "<seed>/pairs", "<seed>/<letter>" for a group's own
        training and scores.
        """
        wanted = [ALL[letter] for letter in self.groups]
        shared = [(kind, part) for part in ("last", "first") for kind in (PEOPLE, SUPERVISED)]
        shared = [
            (kind, part) for kind, part in shared if any(getattr(group, part) == kind for group in wanted)
        ]
        # the loop starts from the last stage trained on people's pairs
        looping = any(group.first == LOOP for group in wanted)
        tasks: dict[str, list[str]] = {}
        for kind, part in shared:  # PEOPLE/last comes first: the loop waits for it
            tasks |= {f"{seed}/{kind}/{part}": [] for seed in self.seeds}
            if (kind, part) == (PEOPLE, "last") and looping:
                tasks |= {f"{seed}/pairs": [f"{seed}/{PEOPLE}/last"] for seed in self.seeds}
        for letter in self.groups:
            # the base has no training, so its scores are the same for all seeds
            for seed in self.seeds if letter != "i" else self.seeds[:1]:
                group = ALL[letter]
                first = ALL[letter].first
                needs = [f"{seed}/{group.last}/last"] if group.last != BASE else []
                needs += (
                    [f"{seed}/pairs" if first == LOOP else f"{seed}/{first}/first"] if first != BASE else []
                )
                tasks[f"{seed}/{letter}"] = needs
        return tasks


@dataclass(frozen=True, kw_only=True)
class CircularRun:
    """Settings of a run: the loop, one stage alone, or an ablation."""

    circular: CircularSettings
    source: ProblemSource = ProblemSource()  # networks and people's pairs
    stage: str | None = None  # train this stage alone, on people's pairs
    groups: tuple[str, ...] | None = None  # of the ablation; None: no ablation
    training_seeds: tuple[int, ...] = ()  # of the ablation
    evaluation: Evaluation = Evaluation()  # for the table that ends a run
    summary: bool = True  # end a run with that table, if the problem has an evaluator for it
    artefacts: str = "runs/artefacts"  # folder that runs share

    @property
    def plan(self) -> AblationPlan:
        """Return the plan of the ablation."""
        return AblationPlan(groups=self.groups or (), seeds=self.training_seeds, evaluation=self.evaluation)

    def facts(self, problem: "Problem") -> dict:
        """Return the entries of a table's file that describe the run, JSON."""
        return {
            "problem": dict(problem.identity),
            "settings": asdict(self.circular),
            "evaluation": asdict(self.evaluation),
            "versions": versions(),
        }
