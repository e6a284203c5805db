"""The nine groups of Circular-DPO's table 2: which stage learned from what, trained with several seeds, judged on the same noises.

Groups of a seed share what they have in common: (a), (b), (d), (g) and (h) the last stage, (a), (g) and (h) the loop's pairs, (b) and (c)
the first stage. Names go by stage: the paper's "step 1" in (c) is the first stage, while the method's first step trains the last.
With more than two stages, "first" stands for all stages before the last.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from eg3d_rlhf.flow.circular.artefacts import Artefact
from eg3d_rlhf.flow.circular.judging import Judging
from eg3d_rlhf.flow.circular.loop import CircularLoop, Lines, NoPairsError

BASE, PEOPLE, LOOP, SUPERVISED = "base", "people", "loop", "supervised"


@dataclass(frozen=True, kw_only=True)
class Group:
    """What one row of the table trains."""

    title: str
    first: str = BASE  # what the stages before the last learn from
    last: str = BASE  # what the last stage learns from
    use_w1: bool = True
    use_w2: bool = True


GROUPS = {
    "a": Group(title="full loop", first=LOOP, last=PEOPLE),
    "b": Group(title="both stages on people's pairs, no loop", first=PEOPLE, last=PEOPLE),
    "c": Group(title="first stage alone, people's pairs", first=PEOPLE),
    "d": Group(title="last stage alone, people's pairs", last=PEOPLE),
    "e": Group(title="first stage fine-tuned on the preferred", first=SUPERVISED),
    "f": Group(title="last stage fine-tuned on the preferred", last=SUPERVISED),
    "g": Group(title="full loop without the filter w1", first=LOOP, last=PEOPLE, use_w1=False),
    "h": Group(title="full loop without the weight w2", first=LOOP, last=PEOPLE, use_w2=False),
    "i": Group(title="base"),
}


def letters(text: str) -> list[str]:
    """"a..i", "a,d,i" or "a..d,i" as groups in order, the base always among them since all are compared with it.

    Raises: ValueError for other text.
    """
    found: set[str] = {"i"}
    for part in text.replace(" ", "").split(","):
        low, dots, high = part.partition("..")
        ends = [low, high if dots else low]
        if not all(end in GROUPS for end in ends) or ends[0] > ends[1]:
            raise ValueError(f"groups: expected letters of a..i such as a,b,d or a..i, got {text!r}. Correct it.")
        found.update(letter for letter in GROUPS if ends[0] <= letter <= ends[1])
    return sorted(found)


@dataclass(frozen=True, kw_only=True)
class AblationPlan:
    """Which groups are trained, how often, and how they are judged."""

    groups: tuple[str, ...] = tuple(GROUPS)
    seeds: tuple[int, ...] = (0, 1, 2)  # of training; assets are judged on the same noises whatever the seed
    judging: Judging = Judging()

    def __post_init__(self):
        unknown = [letter for letter in self.groups if letter not in GROUPS]
        if unknown or "i" not in self.groups or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"AblationPlan: expected groups of a..i with i, and different seeds, got {self.groups} and {self.seeds}.")

    def tasks(self) -> dict[str, list[str]]:
        """What is to be done, and what each waits for, in an order that lets what others wait for start early.

        Names: "<seed>/<what is trained>/<stages>", "<seed>/pairs", "<seed>/<letter>" for a group's own training and scores.
        """
        wanted = [GROUPS[letter] for letter in self.groups]
        shared = [(kind, part) for part in ("last", "first") for kind in (PEOPLE, SUPERVISED)]
        shared = [(kind, part) for kind, part in shared if any(getattr(group, part) == kind for group in wanted)]
        looping = any(group.first == LOOP for group in wanted)
        tasks: dict[str, list[str]] = {}
        for kind, part in shared:  # PEOPLE/last comes first: the loop waits for it
            tasks |= {f"{seed}/{kind}/{part}": [] for seed in self.seeds}
            if (kind, part) == (PEOPLE, "last") and looping:
                tasks |= {f"{seed}/pairs": [f"{seed}/{PEOPLE}/last"] for seed in self.seeds}
        for letter in self.groups:
            for seed in self.seeds if letter != "i" else self.seeds[:1]:
                tasks[f"{seed}/{letter}"] = self._needs(seed, GROUPS[letter])
        return tasks

    @staticmethod
    def _needs(seed: int, group: Group) -> list[str]:
        needs = [f"{seed}/{group.last}/last"] if group.last != BASE else []
        if group.first == LOOP:
            return [*needs, f"{seed}/pairs"]
        return needs + ([f"{seed}/{group.first}/first"] if group.first != BASE else [])


@dataclass(kw_only=True)
class Ablation:
    """The tasks of a plan, done with the steps of a loop; `loop_of` makes it for a training seed."""

    plan: AblationPlan
    loop_of: Callable[[int], CircularLoop]

    def __call__(self, task: str) -> dict:
        """Do one task; returns JSON: the scores of a group, what is known of a step."""
        seed, what, *part = task.split("/")
        loop = self.loop_of(int(seed))
        if what == "pairs":
            _, pairs = self._looped(loop, None)
            return {stage: {**artefact.record, "reused": artefact.reused} for stage, artefact in pairs.items()}
        if part:
            lines = self._trained(loop, what, part[0])
            return {stage: _training(line[-1]) for stage, line in lines.items()}
        group = GROUPS[what]
        lines = self._lines(loop, group)
        judged = loop.judged(lines, self.plan.judging)
        trained = {stage: _training(line[-1]) for stage, line in lines.items()}
        return {"scores": judged.record, "trainings": trained, "reused": judged.reused}

    def _trained(self, loop: CircularLoop, kind: str, part: str) -> dict[str, tuple[Artefact, ...]]:
        """The last stage, or those before it, each trained from the base."""
        names = [stage.name for stage in loop.problem.pipeline.stages]
        chosen = names[-1:] if part == "last" else names[:-1]
        return {name: (loop.from_people(name, supervised=kind == SUPERVISED),) for name in chosen}

    def _lines(self, loop: CircularLoop, group: Group) -> Lines:
        if group.first == LOOP:
            return self._looped(loop, group)[0]
        lines = self._trained(loop, group.last, "last") if group.last != BASE else {}
        return lines | (self._trained(loop, group.first, "first") if group.first != BASE else {})

    def _looped(self, loop: CircularLoop, group: Group | None) -> tuple[dict, dict[str, Artefact]]:
        """The loop's networks and pairs; without a group, up to the pairs that all groups share."""
        lines = self._trained(loop, PEOPLE, "last")
        pairs: dict[str, Artefact] = {}
        for name in reversed([stage.name for stage in loop.problem.pipeline.stages][:-1]):
            pairs[name] = loop.pairs(name, lines)
            if group is None:
                break
            weighing = replace(loop.settings.weighing, use_w1=group.use_w1, use_w2=group.use_w2)
            try:
                lines[name] = (loop.from_loop(name, pairs[name], lines, weighing),)
            except NoPairsError as error:  # the group is then what it is without this training; its table says so
                loop.say(f"Warning: {error}")
        return lines, pairs


def _training(artefact: Artefact) -> dict:
    return {**artefact.record, "artefact": artefact.folder.name, "reused": artefact.reused}


def cost(task: str, plan: AblationPlan, steps: Mapping[str, int], conditions: int, pairs: int) -> float:
    """Rough work of a task, in training updates, for the bar's time left.

    Args: steps: updates by PEOPLE, LOOP and SUPERVISED; conditions: held-out ones; pairs: human ones.
    """
    _, what, *part = task.split("/")
    assets = plan.judging.per_condition * conditions / 4  # an asset costs about as much as a quarter of an update
    if part:
        return steps[what]
    if what == "pairs":
        return pairs / 2
    return assets + (steps[LOOP] if GROUPS[what].first == LOOP else 0)


def collect(results: Mapping[str, Mapping], plan: AblationPlan) -> dict[str, list[Mapping]]:
    """Scores by group, one entry for each training seed; the base's are the same for all."""
    return {
        letter: [results[f"{seed if letter != 'i' else plan.seeds[0]}/{letter}"]["scores"] for seed in plan.seeds]
        for letter in plan.groups
    }


def trainings(results: Mapping[str, Mapping], letter: str, seeds: Sequence[int]) -> list[Mapping]:
    """What was trained for a group, one entry for each seed."""
    return [results[f"{seed}/{letter}"]["trainings"] if letter != "i" else {} for seed in seeds]
