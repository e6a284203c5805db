"""The nine groups of Circular-DPO's table 2: which stage learned from what, trained with several seeds, judged on the same noises.

Groups of a seed share what they have in common: (a), (b), (d), (g) and (h) the last stage, (a), (g) and (h) the loop's pairs, (b) and (c)
the first stage. Names go by stage: the paper's "step 1" in (c) is the first stage, while the method's first step trains the last.
With more than two stages, "first" stands for all stages before the last.
"""

from collections.abc import Callable, Mapping
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
from eg3d_rlhf.flow.circular.task_pool import run_tasks
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
        networks = self._lines(loop, group)
        judged = loop.judged(networks, self.plan.judging)
        trained = {stage: _training(line[-1]) for stage, line in networks.items()}
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


def handler_of(run: CircularRun, device: str, alone: bool) -> Ablation:
    """What a process does tasks with; on one thread where it is not alone."""
    if not alone:
        torch.set_num_threads(1)
    return Ablation(plan=run.plan, loop_of=partial(loop_of, run, run.problem(device)))


def ablate(run: CircularRun, problem: Problem, folder: Path, device: str, workers: int) -> None:
    """Train and judge all groups on worker processes, and write the table."""
    plan, tasks = run.plan, run.plan.tasks()
    steps = {PEOPLE: run.circular.human.steps, LOOP: run.circular.loop.steps, SUPERVISED: run.circular.sft.steps}
    pairs = len(problem.human_pairs(problem.pipeline.stages[-1].name))
    units = {task: round(cost(task, plan, steps, len(problem.held_out_conditions), pairs)) for task in tasks}
    print(f"{len(tasks)} tasks on {workers} processes; what they print is in {folder / 'logs'}.", flush=True)
    with tqdm(total=sum(units.values()), unit="update", desc="ablation", dynamic_ncols=True, smoothing=0.05) as bar:

        def done(name: str, result: Mapping) -> None:
            bar.set_description(f"ablation, done {name}", refresh=False)
            if _reused(result):  # which says nothing of the time that others take
                bar.total -= units[name]
                bar.refresh()
            else:
                bar.update(units[name])

        expected = (ValueError, OSError, StoppedError)
        results = run_tasks(tasks, handler_of, (run, device, workers == 1), workers, folder / "logs", done, expected)
    data = tabled(results, plan, run.facts(problem))
    for path in table.write(data, folder):
        print(f"Written: {path}")
    print(table.markdown(data))


def _reused(result: Mapping) -> bool:
    return bool(result["reused"]) if "reused" in result else all(one["reused"] for one in result.values())


def tabled(results: Mapping[str, Mapping], plan: AblationPlan, facts: Mapping) -> dict:
    """The table of all tasks' results; the base's scores are the same for all training seeds."""
    seeds = plan.seeds
    scores = {x: [results[f"{seed if x != 'i' else seeds[0]}/{x}"]["scores"] for seed in seeds] for x in plan.groups}
    trained = {x: [results[f"{seed}/{x}"]["trainings"] if x != "i" else {} for seed in seeds] for x in plan.groups}
    loop = {str(seed): results[f"{seed}/pairs"] for seed in seeds if f"{seed}/pairs" in results}
    return table.table(scores, seeds, trained, loop, {"training_seeds": list(seeds), **facts})
