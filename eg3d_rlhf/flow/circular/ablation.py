"""The nine groups of Circular-DPO's table 2: which stage learned from what, trained with several seeds, judged on the same noises.

Groups of a seed share what they have in common: (a), (b), (d), (g) and (h) the last stage, (a), (g) and (h) the loop's pairs, (b) and (c)
the first stage. Names go by stage: the paper's "step 1" in (c) is the first stage, while the method's first step trains the last.
With more than two stages, "first" stands for all stages before the last.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from eg3d_rlhf.flow.circular import table
from eg3d_rlhf.flow.circular.artefacts import Artefact
from eg3d_rlhf.flow.circular.loop import CircularLoop, Lineage, NoPairsError, loop_of
from eg3d_rlhf.flow.circular.settings import CircularRun
from eg3d_rlhf.flow.circular.table import BASE, GROUPS, LOOP, PEOPLE, SUPERVISED, AblationPlan, Group
from eg3d_rlhf.flow.circular.task_pool import Report, run_tasks
from eg3d_rlhf.flow.problem import Problem
from eg3d_rlhf.flow.tuning.train import StoppedError


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
            lineage = self._trained(loop, what, part[0])
            return {stage: _training(line[-1]) for stage, line in lineage.items()}
        group = GROUPS[what]
        lineage = self._lines(loop, group)
        judged = loop.judged(lineage, self.plan.judging)
        trained = {stage: _training(line[-1]) for stage, line in lineage.items()}
        return {"scores": judged.record, "trainings": trained, "reused": judged.reused}

    def _trained(self, loop: CircularLoop, kind: str, part: str) -> dict[str, tuple[Artefact, ...]]:
        """The last stage, or those before it, each trained from the base."""
        names = [stage.name for stage in loop.problem.pipeline.stages]
        chosen = names[-1:] if part == "last" else names[:-1]
        return {name: (loop.from_people(name, supervised=kind == SUPERVISED),) for name in chosen}

    def _lines(self, loop: CircularLoop, group: Group) -> Lineage:
        if group.first == LOOP:
            return self._looped(loop, group)[0]
        lineage = self._trained(loop, group.last, "last") if group.last != BASE else {}
        return lineage | (self._trained(loop, group.first, "first") if group.first != BASE else {})

    def _looped(self, loop: CircularLoop, group: Group | None) -> tuple[dict, dict[str, Artefact]]:
        """The loop's networks and pairs; without a group, up to the pairs that all groups share."""
        lineage = self._trained(loop, PEOPLE, "last")
        pairs: dict[str, Artefact] = {}
        for name in reversed([stage.name for stage in loop.problem.pipeline.stages][:-1]):
            pairs[name] = loop.pairs(name, lineage)
            if group is None:
                break
            weighing = replace(loop.settings.weighing, use_w1=group.use_w1, use_w2=group.use_w2)
            try:
                lineage[name] = (loop.from_loop(name, pairs[name], lineage, weighing),)
            except NoPairsError as error:  # the group is then what it is without this training; its table says so
                loop.say(f"Warning: {error}")
        return lineage, pairs


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


def handler_of(run: CircularRun, device: str, alone: bool, report: Report) -> Ablation:
    """What a process does tasks with; on one thread where it is not alone."""
    if not alone:
        torch.set_num_threads(1)
    problem = run.problem(device)
    return Ablation(plan=run.plan, loop_of=partial(loop_of, run, problem, on_updates=report))


def ablate(run: CircularRun, problem: Problem, folder: Path, device: str, workers: int) -> None:
    """Train and judge all groups on worker processes, and write the table."""
    plan, tasks = run.plan, run.plan.tasks()
    last = problem.pipeline.stages[-1].name
    steps = {PEOPLE: run.circular.human.steps, LOOP: run.circular.loop.steps, SUPERVISED: run.circular.sft.steps}
    pairs = len(problem.human_pairs(last))
    units = {task: cost(task, plan, steps, len(problem.held_out_conditions), pairs) for task in tasks}
    print(f"{len(tasks)} tasks on {workers} processes; what they print is in {folder / 'logs'}.", flush=True)
    with WorkBar(units) as bar:
        expected = (ValueError, OSError, StoppedError)
        arguments = (run, device, workers == 1)
        results = run_tasks(tasks, handler_of, arguments, workers, folder / "logs", bar.done, bar.progress, expected)
    data = _data(run, problem, results)
    for path in table.write(data, folder):
        print(f"Written: {path}")
    print(table.markdown(data))


class WorkBar:
    """A bar over the work of all tasks, and the time that is left of it."""

    def __init__(self, units: Mapping[str, float]):
        self._units, self._begun = units, dict.fromkeys(units, 0.0)
        self._bar = tqdm(total=round(sum(units.values())), unit="update", desc="ablation", dynamic_ncols=True, smoothing=0.05)

    def __enter__(self) -> "WorkBar":
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()

    def progress(self, name: str, units: float) -> None:
        """Of a task under way; an estimate, so never more than all of it."""
        self._advance(name, min(units, self._units[name] - self._begun[name]))

    def done(self, name: str, result: Mapping) -> None:
        """A task has ended; what was found and not made says nothing of the time that others take."""
        self._bar.set_description(f"ablation, done {name}", refresh=False)
        left = self._units[name] - self._begun[name]
        if _reused(result):
            self._bar.total -= round(left)
            self._bar.refresh()
        else:
            self._advance(name, left)

    def _advance(self, name: str, units: float) -> None:
        before = round(self._begun[name])
        self._begun[name] += units
        self._bar.update(round(self._begun[name]) - before)


def _reused(result: Mapping) -> bool:
    return bool(result["reused"]) if "reused" in result else all(one["reused"] for one in result.values())


def _data(run: CircularRun, problem: Problem, results: Mapping[str, Mapping]) -> dict:
    plan = run.plan
    loop = {str(seed): results[f"{seed}/pairs"] for seed in plan.seeds if f"{seed}/pairs" in results}
    known = {"training_seeds": list(plan.seeds), **run.facts(problem)}
    trained = {letter: trainings(results, letter, plan.seeds) for letter in plan.groups}
    return table.table(collect(results, plan), plan.seeds, trained, loop, known)
