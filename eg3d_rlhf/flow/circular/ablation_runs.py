"""The ablation as a run: its tasks on worker processes, its table in the run folder."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from eg3d_rlhf.flow.circular import ablation_table
from eg3d_rlhf.flow.circular.ablation import LOOP, PEOPLE, SUPERVISED, Ablation, collect, cost, trainings
from eg3d_rlhf.flow.circular.run import CircularRun, facts, loop_of
from eg3d_rlhf.flow.circular.task_pool import Report, run_tasks
from eg3d_rlhf.flow.problem import Problem
from eg3d_rlhf.flow.tuning.train import StoppedError


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
    for path in ablation_table.write(data, folder):
        print(f"Written: {path}")
    print(ablation_table.markdown(data))


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
    known = {"training_seeds": list(plan.seeds), **facts(run, problem)}
    trained = {letter: trainings(results, letter, plan.seeds) for letter in plan.groups}
    return ablation_table.table(collect(results, plan), plan.seeds, trained, loop, known)
