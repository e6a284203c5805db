"""Run several arms on one stage: train each arm with one seed or more, and evaluate all arms on the same
noises of held-out prompts.

An arm is one way of training. The runs of online/ have arms that train on samples and their rewards, those of
offline/ have arms that train on labels of single assets, and both have an arm that trains on pairs by DPO.

    <arm>-<seed>/        a training, see trainer.py; its policy/, and done.json with its scores once they are
                         measured
    <stage>/             the weights of the first arm's first seed
    <name>.json, .md     the table

If a problem has a chooser (an evaluator for early stopping), arms keep the network with the best win rate on
the choosing prompts, which are not those of the table. Controls keep their last network, because choosing the
best one would hide the harm that a control should show.

Shapes: K training seeds, C prompts, S noises per prompt.
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
from eg3d_rlhf.tuning.flow.base.export import NO_TABLE, export_command
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.sampling import voxels_for
from eg3d_rlhf.tuning.flow.base.settings import EVALUATORS
from eg3d_rlhf.tuning.flow.base.single_labels import Labelled
from eg3d_rlhf.tuning.flow.base.stage import FlowStage, Voxels
from eg3d_rlhf.tuning.flow.training.settings import CONTROLS, ArmsRun, TrainConfig
from eg3d_rlhf.tuning.flow.training.trainer import POLICY, StageResult
from training import rehearsal
from training.distributed import SINGLE, Ranks
from training.progress import tqdm

BASE = "base"  # name of the task that scores the untuned network
# a problem, and its labelled assets for arms that are trained on them
Opened = tuple[Problem, Labelled | None]
# function from settings and a device to the problem and its labels; it is pickled by name for worker
# processes
Open = Callable[[Any, str], Opened]


@dataclass(frozen=True)
class Bench(ABC):
    """Training data and settings of the arms of a run, for one training seed."""

    problem: Problem
    stage: FlowStage
    dpo: TrainConfig  # settings of arms that train on pairs

    @abstractmethod
    def inputs(self) -> dict:
        """Return the inputs of the results that are hashed in addition to the common ones, as JSON.

        The common inputs are the problem, the settings of DPO, and the settings of the evaluation.
        """

    @abstractmethod
    def train(self, arm: str, out: Path, **options: Any) -> StageResult:
        """Train an arm in a folder, or resume its training there.

        Args:
            arm: name of the arm.
            out: folder of the training.
            options: keyword arguments of trainer.train.
        """

    @abstractmethod
    def measure(
        self, arm: str, stage_result: StageResult, model: torch.nn.Module, seed: int, ranks: Ranks
    ) -> dict:
        """Return metrics of a finished training, other than its scores, as JSON.

        Args:
            arm: name of the arm.
            stage_result: result of the training.
            model: the tuned network.
            seed: seed of the noises of the table.
            ranks: processes that train together.
        """


def folder_of(folder: Path, task: str) -> Path:
    """Return the folder of a task in the folder of a run.

    In a run that version 0.1 started, this is the folder with the arm's former name, if there is one.
    """
    former_folder = folder / version_0_1.former_task(task)
    return former_folder if former_folder.exists() else folder / task


def work(settings: Any, opened: Opened, run: Run, open_problem: Open) -> None:
    """Do the remaining tasks of a run, and write its results.

    A single training, or an arm and its control, run in this process, on all ranks. Other trainings run on a
    pool of processes.

    Args:
        settings: settings of the run, an ArmsRun.
        opened: the problem and its labels, opened in this process.
        run: folder, ranks and device of the run.
        open_problem: function that opens the problem and its labels in a worker process.
    """
    problem, _ = opened
    folder = run.folder
    # without an evaluator there is no table
    has_table = settings.has_table(problem)
    settings = replace(settings, summary=settings.summary and has_table)
    tasks = [f"{arm}-{seed}" for seed in settings.training_seeds for arm in settings.arms]
    if rehearsal.active():
        return rehearse(settings, opened, run)
    # An arm and its control are trained one after the other, so that torchrun can share each of them.
    if len(tasks) == 1 or settings.is_controlled:
        if settings.is_controlled and run.ranks.is_main:
            print(
                f"Control: after {settings.arms[0]}, {settings.arms[1]} is trained for as long. Leave it out"
                " with --no-control.",
                flush=True,
            )
        # the base is scored by rank 0 alone, after the trainings
        worker = Worker(settings, folder, opened, run.ranks)
        results = {task: worker(task) for task in tasks}
        if run.ranks.is_main and settings.summary:
            results[BASE] = Worker(settings, folder, opened)(BASE)
    else:
        all_tasks = ([BASE] if settings.summary else []) + tasks
        # no task waits for another one
        needs: Mapping[str, list[str]] = {name: [] for name in all_tasks}
        print(
            f"{len(needs)} tasks run on {run.jobs} processes. Their output is in {folder / 'logs'}.",
            flush=True,
        )
        results = pooled(
            "arms", needs, worker_of, (settings, folder, run.device, open_problem), run.jobs, folder
        )
    if not run.ranks.is_main:
        return
    stage = settings.stage_in(problem).name
    # links, not copies: the weights of a large stage would double the size of the run
    for policy_file in sorted((folder_of(folder, tasks[0]) / POLICY).iterdir()):
        link(policy_file, folder / stage / policy_file.name)
    print(f"The weights of the arm {settings.arms[0]} are in {folder / stage}.")
    if settings.summary:
        facts = {
            "stage": stage,
            "problem": dict(problem.identity),
            "run": asdict(settings),
            "versions": versions(),
        }
        table_data = table(results, settings, facts)
        for path in write(table_data, folder, settings.NAME, settings.markdown):
            print(f"The table was written to {path}.")
        print(settings.markdown(table_data))
    elif not has_table:
        print(NO_TABLE)
    run.done()
    print(f"next: {export_command(folder)}")


def rehearse(settings: ArmsRun, opened: Opened, run: Run) -> None:
    """Do the first tick of each arm with the first training seed, and the first batch of the evaluation.

    Args:
        settings: settings of the run.
        opened: the problem and its labels.
        run: folder, ranks and device of the run.
    """
    seeds = settings.training_seeds
    task_count = len(settings.arms) * len(seeds)
    # as in `work`: a single training, or an arm and its control, have all threads of this process
    process_count = 1 if task_count == 1 or settings.is_controlled else min(run.jobs, task_count)
    thread_count = torch.get_num_threads()
    torch.set_num_threads(1 if process_count > 1 else thread_count)
    try:
        worker = Worker(settings, run.folder, opened, run.ranks)
        with rehearsal.section(times=len(seeds) / process_count):
            for arm in settings.arms:
                worker(f"{arm}-{seeds[0]}")
        if run.ranks.is_main and settings.summary:
            with rehearsal.section(times=1 / process_count):
                Worker(settings, run.folder, opened)(BASE)
    finally:
        torch.set_num_threads(thread_count)


def pooled(
    title: str,
    needs: Mapping[str, Sequence[str]],
    setup: Callable[..., Callable[[str], dict]],
    setup_arguments: tuple,
    jobs: int,
    folder: Path,
) -> dict[str, dict]:
    """Do tasks on a pool of processes with a progress bar, and return their results by name.

    Args:
        title: title of the progress bar.
        needs: names of the tasks, each with the names of the tasks that it waits for.
        setup: function that returns a callable, which does the task whose name it is given. Each process
            calls `setup` once, with `setup_arguments` and a bool: True if there is only one process.
        setup_arguments: first arguments of `setup`.
        jobs: number of processes.
        folder: folder whose subfolder logs/ receives the output of the tasks.
    """
    with tqdm(total=len(needs), desc=title, unit="task", dynamic_ncols=True) as bar:
        # errors that a user can cause are shown without a traceback
        user_errors = (ValueError, OSError, StoppedError)
        return run_tasks(
            needs,
            setup,
            (*setup_arguments, jobs == 1),
            jobs,
            folder / "logs",
            lambda name, task_result: bar.update(),
            user_errors,
        )


@dataclass
class Worker:
    """Worker of a run, which does tasks and returns their results as JSON.

    A task is "<arm>-<seed>", or BASE for the scores of the untuned network. The result of a task that was
    finished earlier is read from its folder.
    """

    settings: ArmsRun
    folder: Path  # folder of the run
    opened: Opened
    ranks: Ranks = SINGLE
    say: Callable[[str], None] = tqdm.write  # prints the status lines of trainings
    cached_voxels: list[Voxels] | None = None  # result of `_given`, once it is computed

    def __call__(self, task: str) -> dict:
        settings = self.settings
        arm, _, seed = task.rpartition("-")  # the task BASE has no arm and no seed
        # the task BASE scores the untuned network once for all training seeds, with the data of the first one
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
            task_result: dict = {}
            models: dict[str, torch.nn.Module] = {}
            if arm:
                # controls keep their last network, see the module
                win_rate_function = None
                if choosing is not None and not arm.endswith(CONTROLS):
                    # no other stage is tuned, on either side of the comparison
                    win_rate_function = choosing.held_out(bench.problem, bench.stage.name, {}, {}, self.ranks)
                stage_result = bench.train(
                    arm, folder, held_out=win_rate_function, ranks=self.ranks, resume=True, say=self.say
                )
                models = {bench.stage.name: tuned_model(bench.stage.model, stage_result.weights)}
                task_result = {
                    **stage_result.record(),
                    **bench.measure(
                        arm, stage_result, models[bench.stage.name], settings.evaluation.seed, self.ranks
                    ),
                }
            if self.ranks.is_main and settings.summary:
                # all arms and seeds are scored on the same noises, so that they can be compared pair by pair
                task_result["scores"] = evaluate(
                    bench.problem, models, settings.evaluation, given_outputs=self._given(bench)
                )["scores"]
            return [folder / POLICY] if arm else [], task_result

        # hashed=False: the folder has the plain name of the task, since it belongs to this run alone
        store = Store(self.folder, self.ranks, hashed=False)
        return dict(store.make(folder_of(self.folder, task).name, inputs, maker).record)

    def _given(self, bench: Bench) -> Mapping[str, Sequence[Voxels]]:
        """Return {name of the tuned stage: voxels that the earlier stages hand to it}, one entry per sample.

        The mapping is empty if the first stage is tuned. The voxels are the same for all arms, and are
        generated once in a process.
        """
        stage_name = bench.stage.name
        pipeline = bench.problem.pipeline
        if stage_name == pipeline.stages[0].name:
            return {}  # the first stage starts from noise alone
        if self.cached_voxels is None:
            prompts, seeds = self.settings.evaluation.crossed(bench.problem)
            # the assets of the first batch of `evaluate`, which are all that a rehearsal samples
            assets_per_prompt = self.settings.evaluation.per_condition
            first_count = max(1, self.settings.evaluation.batch // assets_per_prompt) * assets_per_prompt
            with rehearsal.timed(rehearsal.SUMMARY, "samples of earlier stages"):
                # None: the earlier stages have their own, untuned networks
                self.cached_voxels = voxels_for(
                    pipeline,
                    stage_name,
                    rehearsal.first(prompts, first_count),
                    rehearsal.first(seeds, first_count),
                    None,
                    self.settings.evaluation.batch,
                )
        return {stage_name: self.cached_voxels}


def worker_of(settings: Any, folder: Path, device: str, open_problem: Open, single_process: bool) -> Worker:
    """Create the worker of a process, which does the tasks of a run there.

    Args:
        settings: settings of the run, an ArmsRun.
        folder: folder of the run.
        device: device of the process.
        open_problem: function that opens the problem and its labels.
        single_process: whether this is the only process; otherwise it computes with one thread.
    """
    # more threads than cores would slow all processes down
    if not single_process:
        torch.set_num_threads(1)
    return Worker(settings, folder, open_problem(settings, device))


# The table that ends a run.


def table(results: Mapping[str, Mapping], settings: ArmsRun, facts: Mapping) -> dict:
    """Make the table of a run, as JSON.

    Args:
        results: results of the tasks, by name of the task.
        settings: settings of the run.
        facts: further entries, which describe the run.
    """
    seeds = settings.training_seeds
    arms = settings.arms
    # [1, C, S]: the base has no training seed, so an axis of size 1 broadcasts over the seeds of the arms
    base_scores = {
        name: np.array([scores_of_prompts]) for name, scores_of_prompts in results[BASE]["scores"].items()
    }
    scores: dict[str, dict[str, np.ndarray]] = {}  # arm -> evaluator -> [K, C, S]
    for arm in arms:
        arm_scores = [results[f"{arm}-{seed}"]["scores"] for seed in seeds]
        scores[arm] = {
            name: np.array([seed_scores[name] for seed_scores in arm_scores]) for name in base_scores
        }
    rates = Table(scores=scores, base=base_scores, seeds=seeds)
    row_by_arm = {}
    for arm in arms:
        trainings = [results[f"{arm}-{seed}"] for seed in seeds]
        win_rates = rates.against_base(arm)
        row_by_arm[arm] = {
            "evaluators": {name: win_rates[name] for name in EVALUATORS if name in win_rates},
            **{key: [training[key] for training in trainings] for key in ("kept_step", "warnings")},
            **settings.row(arm, trainings, win_rates, scores[arm], base_scores),
        }
    # the first of EVALUATORS that the problem has, in order of preference
    evaluator = next(name for name in EVALUATORS if name in base_scores)
    compared_arms = [
        arm for arm in arms if settings.MEETING or settings.is_controlled or not arm.endswith(CONTROLS)
    ]
    return {
        "arms": row_by_arm,
        "pairwise": rates.pairwise(evaluator, compared_arms),
        "evaluator": evaluator,
        **rates.sizes,
        "training_seeds": list(seeds),
        "interval": INTERVAL,
        **facts,
    }
