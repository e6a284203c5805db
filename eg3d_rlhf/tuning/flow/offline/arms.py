"""A run of offline tuning: arms trained with one seed or several, and judged on the same noises of held-out conditions.

    labels                       the loss of single assets on what people said of them
    shuffled, inverted           controls: r shuffled within conditions must do nothing, 1 - r must do harm
    dpo                          DPO on the problem's pairs
    dpo-shuffled, dpo-inverted   the same pairs, each turned over by a coin, or all of them

Where a problem has a chooser, arms keep the network of their best win rate on the conditions to choose on, which are not the table's; the
controls keep their last one, as it is what they are there to show.

What a run writes: see arms.py.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.experiments.table import INTERVAL, Table, markdown_rows, of_seeds, with_interval
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.tuning.flow.arms import BASE, finish_arms, pair_by_pair, train_arms
from eg3d_rlhf.tuning.flow.circular.loop_pairs import SHUFFLED, TURNED, used
from eg3d_rlhf.tuning.flow.conditions import CONDITIONS
from eg3d_rlhf.tuning.flow.families import family_of, open_problem
from eg3d_rlhf.tuning.flow.offline.singles import Labelled, read_labelled
from eg3d_rlhf.tuning.flow.offline.train_singles import DGPO, SinglesConfig, train_singles
from eg3d_rlhf.tuning.flow.problem import JUDGES, Choosing, Judging, Problem, ProblemSource, judged
from eg3d_rlhf.tuning.flow.stage import stage_of
from eg3d_rlhf.tuning.flow.train import POLICY, StageResult
from eg3d_rlhf.tuning.flow.train_pairs import TrainConfig, train_stage
from training.config import knob
from training.distributed import SINGLE, Ranks
from training.progress import tqdm

LABELS, DPO = "labels", "dpo"
ARMS = {
    LABELS: "labels of single assets", "shuffled": "labels shuffled within conditions", "inverted": "labels inverted",
    DPO: "DPO on pairs", "dpo-shuffled": "DPO, pairs turned over by a coin", "dpo-inverted": "DPO, pairs inverted",
}  # fmt: skip
TITLES = {"nft": "NFT", DGPO: "DGPO"}
OWN_KINDS = ("thumbs", "ranks")  # what the toy's own people say of single assets


@dataclass(frozen=True, kw_only=True)
class OfflineSource(ProblemSource):
    """What a problem is read from; pairs are not needed."""

    needs_pairs: ClassVar[bool] = False
    labelled: str = knob("own", "Toy: who made the assets that people judged: the generator's own, or others', with twice the defects.",
                         "What is trained", choices=("own", "others"), rare=True)


@dataclass(frozen=True, kw_only=True)
class OfflineRun:
    singles: SinglesConfig
    dpo: TrainConfig  # of the arms that train on pairs
    source: OfflineSource = OfflineSource()
    assets: str | None = None  # list of drawn assets with their latents, or its folder; None: the toy's own
    labels: str | None = None  # a file, or one of OWN_KINDS; None: the list's ranks, of the toy what the loss is for
    stage: str | None = None  # None: the last
    arms: tuple[str, ...] = (LABELS,)
    training_seeds: tuple[int, ...] = (0,)
    choosing: Choosing | None = None  # None: no win rate while training; the last update is kept
    judging: Judging = Judging()  # of the table that ends a run
    summary: bool = True  # end with it

    def __post_init__(self):
        odd = [arm for arm in self.arms if arm not in ARMS]
        if odd or not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"--arms: expected some of {', '.join(ARMS)}, each once, got {', '.join(self.arms) or 'none'}. Name them.")

    @property
    def own_kind(self) -> str:
        """What the toy's people are asked for."""
        return self.labels or ("ranks" if self.singles.loss == DGPO else "thumbs")


def open_offline(settings: OfflineRun, device: str | torch.device = "cpu") -> tuple[Problem, Labelled]:
    """The problem of a run and its labelled assets. Raises: ValueError or OSError for what is missing or does not fit."""
    source = settings.source
    if settings.assets is not None and source.pairs is None and source.conditions is None:
        folder = Path(settings.assets)
        source = replace(source, conditions=str((folder if folder.is_dir() else folder.parent) / CONDITIONS))
    problem = open_problem(source, device)
    return problem, labelled_of(settings, problem)


def labelled_of(settings: OfflineRun, problem: Problem) -> Labelled:
    """The assets and what was said of them."""
    if settings.assets is None:
        if problem.human_singles is None:
            raise ValueError("--assets: expected the folder that `flow draw` wrote beside --pipeline=DIR, got none. Name it.")
        own = problem.human_singles(settings.own_kind if settings.own_kind in OWN_KINDS else OWN_KINDS[0])
        return own if settings.own_kind in OWN_KINDS else own.said_by(Path(settings.own_kind))
    family = family_of(Path(settings.source.pipeline))
    with tqdm(desc="assets", unit="asset", disable=None, leave=False) as bar:
        labels = None if settings.labels is None else Path(settings.labels)
        return read_labelled(Path(settings.assets), labels, problem.pipeline, family.candidate, bar.update)


@dataclass(frozen=True, kw_only=True)
class Bench:
    problem: Problem
    labelled: Labelled
    stage: str
    singles: SinglesConfig
    dpo: TrainConfig
    choosing: Choosing | None

    @property
    def conditions(self) -> Collection[str] | None:
        """To train on; None: all, where no judge is there to hold some for."""
        judged = self.problem.final is not None or self.problem.chooser is not None
        return self.problem.train_conditions if judged else None

    def train(self, arm: str, out: Path, ranks: Ranks = SINGLE, say: Callable[[str], None] = print) -> tuple[StageResult, int]:
        """Train an arm in a folder, or go on with it there; returns it and how many answers it learns from."""
        problem, stage = self.problem, self.stage
        control = arm not in (LABELS, DPO)
        chooser = None if self.choosing is None or control else self.choosing.held_out(problem, stage, {}, {})
        if arm.startswith(DPO):
            pairs = problem.human_pairs(stage)
            if control:
                pairs = used(pairs, SHUFFLED if arm.endswith("shuffled") else TURNED, self.dpo.seed, problem.human_pairs)
            done = train_stage(problem.pipeline, stage, pairs, self.dpo, out, held_out=chooser, ranks=ranks, resume=True, say=say)
            return done, len(pairs)
        singles = self.labelled.singles(stage, self.conditions, arm, self.singles.seed)
        done = train_singles(problem.pipeline, stage, singles, self.singles, out, held_out=chooser, ranks=ranks, resume=True, say=say)
        return done, len(singles)


def bench_of(settings: OfflineRun, opened: tuple[Problem, Labelled], seed: int) -> Bench:
    problem, labelled = opened
    stage = stage_of(problem.pipeline, settings.stage or problem.pipeline.stages[-1].name)
    return Bench(
        problem=problem, labelled=labelled, stage=stage.name, singles=settings.singles.at(stage, seed), dpo=settings.dpo.at(stage, seed),
        choosing=settings.choosing,
    )


# The table that ends it.


def table(results: Mapping[str, Mapping], settings: OfflineRun, facts: Mapping) -> dict:
    """The whole table as JSON. Args: results: by task; facts: what a reader of the file needs besides."""
    seeds, arms = settings.training_seeds, settings.arms
    base = {name: np.array([values]) for name, values in results[BASE]["scores"].items()}  # [1, C, S]
    arrays = {arm: {name: np.array([results[f"{arm}-{seed}"]["scores"][name] for seed in seeds]) for name in base} for arm in arms}
    rates, rows = Table(scores=arrays, base=base, seeds=seeds), {}
    for arm in arms:
        trainings, against = [results[f"{arm}-{seed}"] for seed in seeds], rates.against_base(arm)
        rows[arm] = {
            "title": ARMS[arm] if arm.startswith(DPO) else f"{TITLES[settings.singles.loss]}, {ARMS[arm]}",
            "answers": trainings[0]["answers"], "judges": {name: against[name] for name in JUDGES if name in against},
            **{key: [training[key] for training in trainings] for key in ("kept_step", "warnings")},
        }  # fmt: skip
    judge = next(name for name in JUDGES if name in base)
    return {
        "arms": rows, "pairwise": rates.pairwise(judge), "judge": judge, **rates.sizes, "training_seeds": list(seeds),
        "interval": INTERVAL, **facts,
    }


def markdown(data: Mapping) -> str:
    judge, seeds = data["judge"], [f"seed {seed}" for seed in data["training_seeds"]]
    rows: list[list] = []
    for arm in data["arms"].values():
        won = arm["judges"][judge]
        rows.append([arm["title"], arm["answers"], with_interval(won), *of_seeds(won), ", ".join(map(str, arm["kept_step"]))])
    facts = (
        f"Stage {data['stage']}; {data['conditions']} held-out conditions x {data['noises']} noises x {len(seeds)} training seeds; ties "
        f"count half. Brackets: {data['interval']}."
    )
    head = ["arm", "answers", f"{judge} judge, wins against base", *seeds, "kept"]
    lines = ["# Labels of single assets against the base", "", facts, "", *markdown_rows(head, rows), *pair_by_pair(data)]
    return "\n".join(lines) + "\n"


# The run.


def work(settings: OfflineRun, opened: tuple[Problem, Labelled], run: Run) -> None:
    """Do what is left to do of a run, and write its results."""
    problem = opened[0]
    settings = replace(settings, summary=settings.summary and problem.final is not None)
    results = train_arms(settings, run, lambda ranks: Worker(settings, run.folder, opened, ranks), worker_of)
    if run.ranks.main:
        stage = bench_of(settings, opened, settings.training_seeds[0]).stage
        finish_arms(settings, run, stage, problem.identity, "offline", lambda facts: table(results, settings, facts), markdown)


@dataclass
class Worker:
    """Does tasks, "<arm>-<seed>" or "base", and returns their results as JSON; what is done already is read."""

    settings: OfflineRun
    folder: Path
    opened: tuple[Problem, Labelled]
    ranks: Ranks = SINGLE
    say: Callable[[str], None] = tqdm.write

    def __call__(self, task: str) -> dict:
        settings, (arm, _, seed) = self.settings, task.rpartition("-")
        bench = bench_of(settings, self.opened, int(seed) if arm else settings.training_seeds[0])
        inputs = {
            "task": task, "problem": bench.problem.identity, "labels": self.opened[1].identity, "singles": asdict(bench.singles),
            "dpo": asdict(bench.dpo), "choosing": None if bench.choosing is None else asdict(bench.choosing),
            "judging": asdict(settings.judging), "summary": settings.summary,
        }  # fmt: skip

        def maker(folder: Path) -> tuple[list[Path], dict]:
            result: dict = {}
            models: dict[str, torch.nn.Module] = {}
            if arm:
                done, answers = bench.train(arm, folder, self.ranks, self.say)
                models = {bench.stage: tuned_model(stage_of(bench.problem.pipeline, bench.stage).model, done.weights)}
                rates = [[line["step"], line["win_rate"]] for line in done.stats if "win_rate" in line]
                result = {"kept_step": done.kept_step, "warnings": done.warnings, "answers": answers, "win_rates": rates}
            if self.ranks.main and settings.summary:
                result["scores"] = judged(bench.problem, models, settings.judging)["scores"]
            return [folder / POLICY] if arm else [], result

        return dict(Store(self.folder, self.ranks, hashed=False).make(task, inputs, maker).record)


def worker_of(settings: OfflineRun, folder: Path, device: str, alone: bool) -> Worker:
    """What a process does tasks with; on one thread where it is not alone."""
    if not alone:
        torch.set_num_threads(1)
    return Worker(settings, folder, open_offline(settings, device))
