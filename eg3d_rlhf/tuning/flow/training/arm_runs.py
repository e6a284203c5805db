"""A run of arms on one stage, trained with one seed or several, and judged on the same noises of held-out
conditions.

What arms learn from is theirs: samples and their rewards in online/, labels of single assets in offline/, and
beside either DPO on pairs.

    <arm>-<seed>/        a training, see train.py; its policy/, and done.json with its scores once it is
                         judged
    <stage>/             the weights of the first arm's first seed
    <name>.json, .md     the table

Where a problem has a chooser, arms keep the network of their best win rate on the conditions to choose on,
which are not the table's; the controls keep their last one, as it is what they are there to show.

Shape letters: K training seeds, C conditions, S noises per condition.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core.cli import versions
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.experiments.table import INTERVAL, Table, write
from eg3d_rlhf.models.policies import link, tuned_model
from eg3d_rlhf.tuning.flow.base.evaluation import evaluate
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.sampling import voxels_for
from eg3d_rlhf.tuning.flow.base.settings import EVALUATORS
from eg3d_rlhf.tuning.flow.base.single_labels import Labelled
from eg3d_rlhf.tuning.flow.base.stage import FlowStage, Voxels
from eg3d_rlhf.tuning.flow.training.settings import CONTROLS, ArmsRun, TrainConfig
from eg3d_rlhf.tuning.flow.training.trainer import POLICY, StageResult
from training.distributed import SINGLE, Ranks
from training.progress import tqdm

BASE = "base"  # the task of the untuned network
Opened = tuple[Problem, Labelled | None]  # assets that people judged, where arms learn from such
# (settings, device) -> what arms are trained on; pickled by name
Open = Callable[[Any, str], Opened]


@dataclass(frozen=True)
class Bench(ABC):
    """What the arms of a run are trained on, by one training seed."""

    problem: Problem
    stage: FlowStage
    dpo: TrainConfig  # of arms that train on pairs

    @abstractmethod
    def inputs(self) -> dict:
        """JSON: what results depend on besides the problem, DPO's settings and those of the table."""

    @abstractmethod
    def train(self, arm: str, out: Path, **options: Any) -> StageResult:
        """Train an arm in a folder, or go on with it there.

        Args: options: those that all trainings of a stage have.
        """

    @abstractmethod
    def figures(self, arm: str, done: StageResult, model: torch.nn.Module, seed: int, ranks: Ranks) -> dict:
        """What is known of a training besides its scores, JSON. Args: seed: of the table's noises."""


def folder_of(folder: Path, task: str) -> Path:
    """Return the folder of a task; in a run of version 0.1 it may have the former name of its arm."""
    former = folder / version_0_1.former_task(task)
    return former if former.exists() else folder / task


def work(settings: Any, opened: Opened, run: Run, open: Open) -> None:
    """Do what is left to do of a run, and write its results: one training in this process, on all ranks;
    several on a pool.

    Args: settings: an ArmsRun; open: opens its problem in worker processes.
    """
    problem, _ = opened
    folder = run.folder
    settings = replace(settings, summary=settings.summary and settings.has_table(problem))
    tasks = [f"{arm}-{seed}" for seed in settings.training_seeds for arm in settings.arms]
    if len(tasks) == 1:
        results = {tasks[0]: Worker(settings, folder, opened, run.ranks)(tasks[0])}
        results |= (
            {BASE: Worker(settings, folder, opened)(BASE)} if run.ranks.main and settings.summary else {}
        )
    else:
        needs: Mapping[str, list[str]] = {name: [] for name in ([BASE] if settings.summary else []) + tasks}
        print(
            f"{len(needs)} tasks on {run.jobs} processes; what several print is in {folder / 'logs'}.",
            flush=True,
        )
        results = pooled("arms", needs, worker_of, (settings, folder, run.device, open), run.jobs, folder)
    if not run.ranks.main:
        return
    stage = settings.stage_in(problem).name
    for file in sorted((folder_of(folder, tasks[0]) / POLICY).iterdir()):
        link(file, folder / stage / file.name)
    print(f"Weights of {settings.arms[0]} in {folder / stage}.")
    if settings.summary:
        facts = {
            "stage": stage,
            "problem": dict(problem.identity),
            "run": asdict(settings),
            "versions": versions(),
        }
        data = table(results, settings, facts)
        for path in write(data, folder, settings.NAME, settings.markdown):
            print(f"Written: {path}")
        print(settings.markdown(data))
    run.done()


def pooled(
    title: str,
    needs: Mapping[str, Sequence[str]],
    setup: Callable[..., Callable[[str], dict]],
    arguments: tuple,
    jobs: int,
    folder: Path,
) -> dict[str, dict]:
    """Results of tasks on processes, with a bar.

    Args: setup: (*arguments, alone) -> what does them; title: of the bar.
    """
    with tqdm(total=len(needs), desc=title, unit="task", dynamic_ncols=True) as bar:
        expected = (ValueError, OSError, StoppedError)
        return run_tasks(
            needs,
            setup,
            (*arguments, jobs == 1),
            jobs,
            folder / "logs",
            lambda name, result: bar.update(),
            expected,
        )


@dataclass
class Worker:
    """Does tasks, "<arm>-<seed>" or BASE, and returns their results as JSON; what is done already is read."""

    settings: ArmsRun
    folder: Path
    opened: Opened
    ranks: Ranks = SINGLE
    say: Callable[[str], None] = tqdm.write
    left: list[Voxels] | None = None

    def __call__(self, task: str) -> dict:
        settings = self.settings
        arm, _, seed = task.rpartition("-")
        bench = settings.bench(self.opened, int(seed) if arm else settings.training_seeds[0])
        choosing = settings.choosing
        inputs = {
            "task": version_0_1.former_task(task),
            "problem": bench.problem.identity,
            "dpo": asdict(bench.dpo),
            "judging": asdict(settings.evaluation),
            "choosing": None if choosing is None else asdict(choosing),
            "summary": settings.summary,
            **version_0_1.former_settings(bench.inputs()),
        }

        def maker(folder: Path) -> tuple[list[Path], dict]:
            result: dict = {}
            models: dict[str, torch.nn.Module] = {}
            if arm:
                chosen = choosing is not None and not arm.endswith(CONTROLS)
                chooser = (
                    choosing.held_out(bench.problem, bench.stage.name, {}, {}, self.ranks)
                    if choosing and chosen
                    else None
                )
                done = bench.train(arm, folder, held_out=chooser, ranks=self.ranks, resume=True, say=self.say)
                models = {bench.stage.name: tuned_model(bench.stage.model, done.weights)}
                result = {
                    **done.record(),
                    **bench.figures(
                        arm, done, models[bench.stage.name], settings.evaluation.seed, self.ranks
                    ),
                }
            if self.ranks.main and settings.summary:
                result["scores"] = evaluate(
                    bench.problem, models, settings.evaluation, given=self._given(bench)
                )["scores"]
            return [folder / POLICY] if arm else [], result

        store = Store(self.folder, self.ranks, hashed=False)
        return dict(store.make(folder_of(self.folder, task).name, inputs, maker).record)

    def _given(self, bench: Bench) -> Mapping[str, Sequence[Voxels]]:
        """What the stages before leave to the stage that is tuned: the same for all arms, and drawn once in a
        process.
        """
        name = bench.stage.name
        pipeline = bench.problem.pipeline
        if name == pipeline.stages[0].name:
            return {}
        if self.left is None:
            conditions, seeds = self.settings.evaluation.crossed(bench.problem)
            self.left = voxels_for(pipeline, name, conditions, seeds, None, self.settings.evaluation.batch)
        return {name: self.left}


def worker_of(settings: Any, folder: Path, device: str, open: Open, alone: bool) -> Worker:
    """Make what does the tasks of a process; on one thread where it is not alone."""
    if not alone:
        torch.set_num_threads(1)
    return Worker(settings, folder, open(settings, device))


# The table that ends it.


def table(results: Mapping[str, Mapping], settings: ArmsRun, facts: Mapping) -> dict:
    """The whole table as JSON. Args: results: by task; facts: what a reader of the file needs besides."""
    seeds = settings.training_seeds
    arms = settings.arms
    base = {name: np.array([values]) for name, values in results[BASE]["scores"].items()}  # [1, C, S]
    arrays = {
        arm: {name: np.array([results[f"{arm}-{seed}"]["scores"][name] for seed in seeds]) for name in base}
        for arm in arms
    }
    rates = Table(scores=arrays, base=base, seeds=seeds)
    rows = {}
    for arm in arms:
        trainings = [results[f"{arm}-{seed}"] for seed in seeds]
        against = rates.against_base(arm)
        rows[arm] = {
            "evaluators": {name: against[name] for name in EVALUATORS if name in against},
            **{key: [training[key] for training in trainings] for key in ("kept_step", "warnings")},
            **settings.row(arm, trainings, against, arrays[arm], base),
        }
    evaluator = next(name for name in EVALUATORS if name in base)
    meeting = [arm for arm in arms if settings.MEETING or not arm.endswith(CONTROLS)]
    return {
        "arms": rows,
        "pairwise": rates.pairwise(evaluator, meeting),
        "evaluator": evaluator,
        **rates.sizes,
        "training_seeds": list(seeds),
        "interval": INTERVAL,
        **facts,
    }
