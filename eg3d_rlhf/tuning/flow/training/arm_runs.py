"""Run several arms on one stage: train each with one seed or more, and evaluate all on the same noises of
held-out prompts.

Each arm defines its training data: samples and their rewards in online/, labels of single assets in offline/,
and in both DPO on pairs.

    <arm>-<seed>/        a training, see trainer.py; its policy/, and done.json with its scores once they are
                         measured
    <stage>/             the weights of the first arm's first seed
    <name>.json, .md     the table

If a problem has a chooser, arms keep the network with the best win rate on the choosing prompts, which are
not those of the table. Controls keep their last network: choosing would hide the harm that they should show.

Shape letters: K training seeds, C prompts, S noises per prompt.
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
Opened = tuple[Problem, Labelled | None]  # labelled assets, for arms that are trained on them
# (settings, device) -> the problem and its labels; pickled by name for worker processes
Open = Callable[[Any, str], Opened]


@dataclass(frozen=True)
class Bench(ABC):
    """Training data and settings of the arms of a run, for one training seed."""

    problem: Problem
    stage: FlowStage
    dpo: TrainConfig  # of arms that train on pairs

    @abstractmethod
    def inputs(self) -> dict:
        """Return as JSON what results depend on besides the problem, DPO's settings and the table's."""

    @abstractmethod
    def train(self, arm: str, out: Path, **options: Any) -> StageResult:
        """Train an arm in a folder, or resume it there.

        Args: options: those that all trainings of a stage have.
        """

    @abstractmethod
    def figures(self, arm: str, done: StageResult, model: torch.nn.Module, seed: int, ranks: Ranks) -> dict:
        """Return the figures of a training besides its scores, JSON. Args: seed: of the table's noises."""


def folder_of(folder: Path, task: str) -> Path:
    """Return the folder of a task; in a run of version 0.1 it may have the former name of its arm."""
    former = folder / version_0_1.former_task(task)
    return former if former.exists() else folder / task


def work(settings: Any, opened: Opened, run: Run, open: Open) -> None:
    """Do the remaining tasks of a run, and write its results.

    A single training runs in this process, on all ranks. Several trainings run on a pool of processes.

    Args: settings: an ArmsRun; open: opens its problem in worker processes.
    """
    problem, _ = opened
    folder = run.folder
    # without an evaluator there is no table
    settings = replace(settings, summary=settings.summary and settings.has_table(problem))
    tasks = [f"{arm}-{seed}" for seed in settings.training_seeds for arm in settings.arms]
    if len(tasks) == 1:
        # the base is scored by rank 0 alone, after the training
        results = {tasks[0]: Worker(settings, folder, opened, run.ranks)(tasks[0])}
        results |= (
            {BASE: Worker(settings, folder, opened)(BASE)} if run.ranks.main and settings.summary else {}
        )
    else:
        needs: Mapping[str, list[str]] = {name: [] for name in ([BASE] if settings.summary else []) + tasks}
        print(
            f"{len(needs)} tasks on {run.jobs} processes; the output of several is in {folder / 'logs'}.",
            flush=True,
        )
        results = pooled("arms", needs, worker_of, (settings, folder, run.device, open), run.jobs, folder)
    if not run.ranks.main:
        return
    stage = settings.stage_in(problem).name
    # links, not copies: the weights of a large stage would double the size of the run
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
    """Do tasks on processes with a progress bar, and return their results by name.

    Args: needs: tasks, with the tasks that each one waits for; setup: (*arguments, alone) -> a callable that
        does a task, called once in a process; title: of the bar.
    """
    with tqdm(total=len(needs), desc=title, unit="task", dynamic_ncols=True) as bar:
        # errors of these types are the user's: they are shown without a traceback
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
    """Worker of a run: does tasks, "<arm>-<seed>" or BASE, and returns their results as JSON.

    The result of a task that was finished earlier is read from its folder.
    """

    settings: ArmsRun
    folder: Path  # of the run
    opened: Opened
    ranks: Ranks = SINGLE
    say: Callable[[str], None] = tqdm.write  # prints the status lines of trainings
    left: list[Voxels] | None = None  # cached result of `_given`

    def __call__(self, task: str) -> dict:
        settings = self.settings
        arm, _, seed = task.rpartition("-")  # the task BASE has no arm and no seed
        bench = settings.bench(self.opened, int(seed) if arm else settings.training_seeds[0])
        choosing = settings.choosing
        # the keys and values go into the hash that names finished work: they keep version 0.1's spelling
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
                # controls keep their last network, see the module
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
                # all arms and seeds are scored on the same noises, so that they can be compared pair by pair
                result["scores"] = evaluate(
                    bench.problem, models, settings.evaluation, given=self._given(bench)
                )["scores"]
            return [folder / POLICY] if arm else [], result

        store = Store(self.folder, self.ranks, hashed=False)
        return dict(store.make(folder_of(self.folder, task).name, inputs, maker).record)

    def _given(self, bench: Bench) -> Mapping[str, Sequence[Voxels]]:
        """Return the voxels that the earlier stages hand to the tuned stage.

        They are the same for all arms, and are generated once in a process.
        """
        name = bench.stage.name
        pipeline = bench.problem.pipeline
        if name == pipeline.stages[0].name:
            return {}  # the first stage starts from noise alone
        if self.left is None:
            prompts, seeds = self.settings.evaluation.crossed(bench.problem)
            self.left = voxels_for(pipeline, name, prompts, seeds, None, self.settings.evaluation.batch)
        return {name: self.left}


def worker_of(settings: Any, folder: Path, device: str, open: Open, alone: bool) -> Worker:
    """Create the worker of a process; one of several processes uses a single thread."""
    # more threads than cores would slow all processes down
    if not alone:
        torch.set_num_threads(1)
    return Worker(settings, folder, open(settings, device))


# The table that ends a run.


def table(results: Mapping[str, Mapping], settings: ArmsRun, facts: Mapping) -> dict:
    """Make the table as JSON. Args: results: by task; facts: entries that describe the run."""
    seeds = settings.training_seeds
    arms = settings.arms
    base = {name: np.array([values]) for name, values in results[BASE]["scores"].items()}  # [1, C, S]
    # [K, C, S] by arm and evaluator
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
    # the first of EVALUATORS that the problem has, in order of preference
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
