"""What a run of Circular-DPO does, and on what: settings as the run folder keeps them, and the objects that they stand for."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from eg3d_rlhf import run_folder
from eg3d_rlhf.cli import versions
from eg3d_rlhf.flow.circular.ablation import AblationPlan
from eg3d_rlhf.flow.circular.artefacts import ArtefactStore
from eg3d_rlhf.flow.circular.judging import Judging
from eg3d_rlhf.flow.circular.loop import CircularLoop
from eg3d_rlhf.flow.circular.problems import ProblemSource, open_problem
from eg3d_rlhf.flow.circular.settings import CircularSettings
from eg3d_rlhf.flow.circular.settings_file import from_dict
from eg3d_rlhf.flow.problem import Problem
from eg3d_rlhf.flow.stage import stage_of
from training.distributed import SINGLE, Ranks


@dataclass(frozen=True, kw_only=True)
class CircularRun:
    """What a run does, and on what."""

    circular: CircularSettings
    source: ProblemSource = ProblemSource()  # networks and people's pairs
    stage: str | None = None  # train this stage alone, on people's pairs
    groups: tuple[str, ...] | None = None  # of the ablation; None: no ablation
    training_seeds: tuple[int, ...] = ()  # of the ablation
    judging: Judging = Judging()  # for the table that ends a run
    summary: bool = True  # end a run with that table, where the problem has a judge for it
    artefacts: str = "runs/artefacts"  # folder that runs share

    @property
    def plan(self) -> AblationPlan:
        """The ablation's."""
        return AblationPlan(groups=self.groups, seeds=self.training_seeds, judging=self.judging)

    @property
    def name(self) -> str:
        """For the run folder."""
        what = f"ablation-{''.join(self.groups)}" if self.groups else f"stage-{self.stage}" if self.stage else "loop"
        return f"circular-dpo-{Path(self.source.pipeline).name}-{what}"

    def problem(self, device: str) -> Problem:
        """Read networks and pairs."""
        return open_problem(self.source, device)


def read_run(folder: Path) -> tuple[CircularRun, dict]:
    """Settings and problem's identity of a run folder."""
    path = folder / run_folder.OPTIONS
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"--resume: expected a run folder with {run_folder.OPTIONS}, got {folder}. Check the path.") from None
    except ValueError:
        raise ValueError(f"--resume: expected {path} as it was written, got damaged JSON. Restore it.") from None
    if record.get("mode") != "circular-dpo":
        raise ValueError(f"--resume: expected a run of --mode=circular-dpo, got one of --mode=gan in {folder}. Leave --mode out.")
    return from_dict(CircularRun, record["run"], str(path)), record["problem"]


def check(run: CircularRun, problem: Problem) -> None:
    """What only the problem can judge. Raises: ValueError naming the flag."""
    if run.stage is not None:
        stage_of(problem.pipeline, run.stage)
    if run.groups is not None and problem.final is None:
        raise ValueError("--ablate: expected a problem with a judge for the table, got one without. The toy has one.")


def say(line: str) -> None:
    """Print above a progress bar."""
    tqdm.write(line)


def loop_of(run: CircularRun, problem: Problem, seed: int, ranks: Ranks = SINGLE, **hooks: Callable) -> CircularLoop:
    """The steps of a run for a training seed; hooks: of CircularLoop."""
    store = ArtefactStore(Path(run.artefacts), ranks, say)
    return CircularLoop(problem=problem, settings=run.circular.with_seed(seed), store=store, ranks=ranks, say=say, **hooks)


def facts(run: CircularRun, problem: Problem) -> dict:
    """What a reader of a table needs besides it."""
    return {
        "problem": dict(problem.identity), "settings": run.circular.to_dict(), "judging": asdict(run.judging), "versions": versions(),
    }


def planned(run: CircularRun) -> dict:
    """What `--dry-run` prints."""
    values = asdict(run)
    return {**values, "tasks": run.plan.tasks()} if run.groups is not None else values
