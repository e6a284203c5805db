"""A run of GRPO from its settings to its folder: arms trained with one seed or several, judged on the same noises of held-out conditions.

    <arm>-<seed>/          a training, see flow/tuning/train.py; its policy/, and scores.json once it is judged
    <stage>/               the weights of GRPO's first seed
    grpo.json, grpo.md     the table
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from eg3d_rlhf.core.cli import versions
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.experiments.table import write
from eg3d_rlhf.models.policies import link, tuned_model
from eg3d_rlhf.tuning.flow.grpo import report
from eg3d_rlhf.tuning.flow.grpo.arms import Bench, drift, reward_of
from eg3d_rlhf.tuning.flow.grpo.groups import Task
from eg3d_rlhf.tuning.flow.grpo.settings import GrpoRun, placed
from eg3d_rlhf.tuning.flow.problem import Problem, judged, open_problem
from eg3d_rlhf.tuning.flow.stage import stage_of
from training.distributed import SINGLE, Ranks
from training.progress import tqdm
from training.storage import write_atomic

SCORES = "scores.json"
BASE = "base"


def bench_of(settings: GrpoRun, problem: Problem, seed: int) -> Bench:
    """What the arms of a training seed share."""
    stage = stage_of(problem.pipeline, settings.stage or problem.pipeline.stages[-1].name)
    reward = reward_of(settings.reward, problem)
    task = Task(pipeline=problem.pipeline, stage=stage, reward=reward, conditions=problem.train_conditions)
    return Bench(
        problem=replace(problem, reward=reward), task=task, grpo=placed(settings.grpo, stage, seed), dpo=placed(settings.dpo, stage, seed),
        choosing=settings.choosing, known={**problem.identity, "reward": settings.reward},
    )


def work(settings: GrpoRun, problem: Problem, run: Run) -> None:
    """Do what is left to do of a run, and write its results."""
    folder, ranks = run.folder, run.ranks
    settings = replace(settings, summary=settings.summary and bool(problem.held_out_conditions))
    tasks = [f"{arm}-{seed}" for seed in settings.training_seeds for arm in settings.arms]
    if len(tasks) == 1:
        results = {tasks[0]: Worker(settings, folder, problem, ranks)(tasks[0])}
        if ranks.main and settings.summary:
            results[BASE] = Worker(settings, folder, problem)(BASE)
    else:
        needs: Mapping[str, list[str]] = {name: [] for name in ([BASE] if settings.summary else []) + tasks}
        print(f"{len(needs)} tasks on {run.jobs} processes; what several print is in {folder / 'logs'}.", flush=True)
        with tqdm(total=len(needs), desc="arms", unit="task", dynamic_ncols=True) as bar:
            arguments = (settings, folder, run.device, run.jobs == 1)
            expected = (ValueError, OSError, StoppedError)
            results = run_tasks(needs, worker_of, arguments, run.jobs, folder / "logs", lambda name, result: bar.update(), expected)
    if not ranks.main:
        return
    stage = bench_of(settings, problem, settings.training_seeds[0]).task.stage.name
    if "grpo" in settings.arms:
        source = folder / f"grpo-{settings.training_seeds[0]}" / "policy"
        for file in sorted(source.iterdir()):
            link(file, folder / stage / file.name)
        print(f"Weights in {folder / stage}.")
    if settings.summary:
        facts = {"stage": stage, "problem": dict(problem.identity), "run": asdict(settings), "versions": versions()}
        data = report.table(results, settings.arms, settings.training_seeds, facts)
        for path in write(data, folder, "grpo", report.markdown):
            print(f"Written: {path}")
        print(report.markdown(data))
    run.done()


@dataclass
class Worker:
    """Does tasks, "<arm>-<seed>" or "base", and returns their results as JSON; what is done already is read."""

    settings: GrpoRun
    folder: Path
    problem: Problem
    ranks: Ranks = SINGLE
    say: Callable[[str], None] = tqdm.write

    def __call__(self, task: str) -> dict:
        """Train and judge."""
        path = self.folder / task / SCORES
        done = self.ranks.broadcast(json.loads(path.read_text()) if self.ranks.main and path.exists() else None)
        if done is not None:
            return done
        arm, _, seed = task.rpartition("-")
        bench = bench_of(self.settings, self.problem, int(seed) if arm else self.settings.training_seeds[0])
        result = self._trained(arm, bench, path.parent) if arm else {"models": {}}
        models = result.pop("models")
        if self.ranks.main and self.settings.summary:
            result["scores"] = judged(bench.problem, models, self.settings.judging)["scores"]
        if self.ranks.main:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, (json.dumps(result) + "\n").encode())
        return result

    def _trained(self, arm: str, bench: Bench, folder: Path) -> dict:
        stage = bench.task.stage
        done = bench.train(arm, folder, self.ranks, self.say)
        model = tuned_model(stage.model, done.weights)
        planned = bench.grpo.steps * bench.grpo.batch * bench.grpo.group
        drawn = planned if arm == "dpo" else sum(line.get("samples", 0) for line in done.stats)
        held = list(bench.problem.held_out_conditions)
        far = drift(bench.task, model, bench.grpo, held, self.settings.judging.seed) if held and self.ranks.main else None
        return {
            "models": {stage.name: model}, "kept_step": done.kept_step, "warnings": done.warnings, "samples": drawn, "kl": far,
            "win_rates": [[line["step"], line["win_rate"]] for line in done.stats if "win_rate" in line],
        }


def worker_of(settings: GrpoRun, folder: Path, device: str, alone: bool) -> Worker:
    """What a process does tasks with; on one thread where it is not alone."""
    if not alone:
        torch.set_num_threads(1)
    return Worker(settings, folder, open_problem(settings.source, device))
