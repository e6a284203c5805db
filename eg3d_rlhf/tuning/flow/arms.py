"""What runs of arms on one stage share (online/, offline/): their trainings as tasks on a pool, the first arm's weights, and the table.

    <arm>-<seed>/        a training, see train.py; its policy/, and done.json with its scores once it is judged
    <stage>/             the weights of the first arm's first seed
    <name>.json, .md     the table
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eg3d_rlhf.core.cli import versions
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.experiments.table import markdown_rows, of_seeds, with_interval, write
from eg3d_rlhf.models.policies import link
from eg3d_rlhf.tuning.flow.train import POLICY
from training.distributed import SINGLE, Ranks
from training.progress import tqdm

BASE = "base"  # the task of the untuned network
Worker = Callable[[str], dict]  # a task, "<arm>-<seed>" or BASE -> its results as JSON; what is done already is read


def train_arms(settings: Any, run: Run, here: Callable[[Ranks], Worker], elsewhere: Callable[..., Worker]) -> dict[str, dict]:
    """Results by task: one training in this process, on all ranks; several on a pool.

    Args:
        settings: of the run, a dataclass with arms, training_seeds and summary; here: makes what does tasks in this process.
        elsewhere: (settings, folder, device, alone) -> what does them in another process.
    """
    folder, ranks = run.folder, run.ranks
    tasks = [f"{arm}-{seed}" for seed in settings.training_seeds for arm in settings.arms]
    if len(tasks) == 1:
        results = {tasks[0]: here(ranks)(tasks[0])}
        return results | ({BASE: here(SINGLE)(BASE)} if ranks.main and settings.summary else {})
    needs: Mapping[str, list[str]] = {name: [] for name in ([BASE] if settings.summary else []) + tasks}
    print(f"{len(needs)} tasks on {run.jobs} processes; what several print is in {folder / 'logs'}.", flush=True)
    with tqdm(total=len(needs), desc="arms", unit="task", dynamic_ncols=True) as bar:
        arguments, expected = (settings, folder, run.device, run.jobs == 1), (ValueError, OSError, StoppedError)
        return run_tasks(needs, elsewhere, arguments, run.jobs, folder / "logs", lambda name, result: bar.update(), expected)


def finish_arms(
    settings: Any, run: Run, stage: str, identity: Mapping, name: str, table: Callable[[Mapping], dict], markdown: Callable[[Mapping], str]
) -> None:
    """The weights of the first arm's first seed, then the table.

    Args: identity: JSON of the problem; name: of the table's files; table: of the facts that a reader of it needs besides.
    """
    folder: Path = run.folder
    for file in sorted((folder / f"{settings.arms[0]}-{settings.training_seeds[0]}" / POLICY).iterdir()):
        link(file, folder / stage / file.name)
    print(f"Weights of {settings.arms[0]} in {folder / stage}.")
    if settings.summary:
        data = table({"stage": stage, "problem": dict(identity), "run": asdict(settings), "versions": versions()})
        for path in write(data, folder, name, markdown):
            print(f"Written: {path}")
        print(markdown(data))
    run.done()


def pair_by_pair(data: Mapping) -> list[str]:
    """Lines of a table's markdown: arms against each other; none where there is one arm."""
    if not data["pairwise"]:
        return []
    seeds = [f"seed {seed}" for seed in data["training_seeds"]]
    rows = [[*name.split("_vs_"), with_interval(rated), *of_seeds(rated)] for name, rated in data["pairwise"].items()]
    return ["", f"## Pair by pair, {data['judge']} judge", "", *markdown_rows(["arm", "against", "wins", *seeds], rows)]
