"""`train.py --mode=offline`: a stage is tuned by labels of single assets, or by rankings of them, on stored latents."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from eg3d_rlhf.core.cli import option, options_of, together
from eg3d_rlhf.experiments.mode import RUN, Flags, Mode, refuse_torchrun
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.models.lora import LoraConfig
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.circular_dpo import (
    COUNT,
    OWN,
    TOY,
    WHAT,
    WHOLE,
    check_tuning,
    kept,
    problems_own,
    source_of,
    tuned_as,
    tuning_flags,
)
from eg3d_rlhf.tuning.flow.dpo import DpoConfig
from eg3d_rlhf.tuning.flow.offline.arms import (
    ARMS,
    DPO,
    LABELS,
    OWN_KINDS,
    OfflineRun,
    OfflineSource,
    bench_of,
    open_offline,
    work,
)
from eg3d_rlhf.tuning.flow.offline.singles import Labelled
from eg3d_rlhf.tuning.flow.offline.train_singles import LOSSES, NFT, SinglesConfig, check_singles
from eg3d_rlhf.tuning.flow.problem import TABLE, Choosing, Judging, Problem
from eg3d_rlhf.tuning.flow.stage import stage_of
from eg3d_rlhf.tuning.flow.train import StageTraining
from eg3d_rlhf.tuning.flow.train_pairs import TrainConfig

# The default runs, of the bundled toy; chosen with its chooser on CHOOSING, by people and training seeds that the table does not use.

LORA = LoraConfig(rank=16, alpha=32)
_TOY: dict[str, Any] = {
    "lora": LORA, "lr": 1e-3, "warmup": 10, "held_out_every": 25, "log_every": 5, "checkpoint_every": 50, "max_drop": 1.0,
}  # fmt: skip
TOY_SINGLES = {
    "nft": SinglesConfig(loss="nft", trust=0.1, steps=100, batch=32, **_TOY),
    "dgpo": SinglesConfig(loss="dgpo", beta=50.0, steps=100, batch=4, **_TOY),
}
TOY_DPO = TrainConfig(dpo=DpoConfig(beta=20.0), steps=100, batch=16, **_TOY)


def default_run(pipeline: str, loss: str) -> OfflineRun:
    """What a run does where it is not told otherwise."""
    if pipeline == TOY:
        return OfflineRun(singles=TOY_SINGLES[loss], dpo=TOY_DPO, choosing=Choosing(per_condition=4), judging=Judging(per_condition=4))
    return OfflineRun(singles=SinglesConfig(loss=loss), dpo=TrainConfig(), judging=Judging(batch=4))


FILE = click.Path(path_type=Path)
what_flags = together(
    options_of(OfflineSource),
    option("--assets", group=WHAT, metavar="DIR|FILE", type=FILE, default=None, show_default="the toy's own",
           help="The folder that `eg3d-rlhf flow draw` wrote, or its list."),
    option("--labels", group=WHAT, metavar="FILE", default=None, show_default="the list's ranks; of the toy thumbs, with dgpo ranks",
           help="What people said of these assets: thumbs, scores, ranks or pairs (docs/guides/single-labels.md)."),
    option("--stage", group=WHAT, metavar="NAME", default=None, show_default="the last", help="Which stage is tuned."),
)
train_flags = together(tuning_flags, options_of(SinglesConfig, everywhere=OWN))
table_flags = together(
    option("--arms", group=TABLE, metavar="LIST", default=LABELS, help=f"What is trained and compared, with commas: {', '.join(ARMS)}."),
    problems_own("--seeds", TABLE, "INT", COUNT, "Trainings of each arm, from --seed on.", "1; 3 with several arms"),
    problems_own("--choose-noises", TABLE, "INT", WHOLE,
        "Assets per condition behind a win rate in training, which chooses the network that is kept; 0: the last is.", rare=True),
    option("--no-summary", group=RUN, rare=True, is_flag=True, help="Skip the table that ends a run."),
    options_of(Judging, everywhere=OWN),
)


def check(flags: Flags) -> None:
    """Refuse what would have no effect. Raises: ValueError naming it."""
    toy = (flags["pipeline"] or TOY) == TOY
    flags.belong(("assets",), not toy, "--pipeline=DIR")
    flags.belong(("trust",), flags["loss"] in (None, NFT), "--loss=nft")
    flags.belong(("group", "group_beta"), flags["loss"] == "dgpo", "--loss=dgpo")
    flags.belong(("jobs",), "," in flags["arms"] or (flags["seeds"] or 1) > 1, "several trainings (--arms, --seeds)")
    flags.belong(("table_noises", "judge_batch"), not flags["no_summary"], "the table, which --no-summary leaves out")
    check_tuning(flags)
    if not toy and flags["assets"] is None:
        raise ValueError("--assets: expected the folder that `flow draw` wrote beside --pipeline=DIR, got none. Name it.")


def resolve(flags: Flags) -> OfflineRun:
    """The run that the flags describe. Raises: ValueError naming what does not fit."""
    check(flags)
    defaults, seed = default_run(flags["pipeline"] or TOY, flags["loss"] or NFT), flags["seed"]
    arms = tuple(name.strip() for name in flags["arms"].split(","))
    tuned = tuned_as(flags, defaults.singles.lora)
    choosing = defaults.choosing
    if flags["choose_noises"] is not None:
        choosing = replace(choosing or Choosing(), per_condition=flags["choose_noises"]) if flags["choose_noises"] else None
    count = flags["seeds"] or (3 if len(arms) > 1 else 1)
    return OfflineRun(
        singles=replace(defaults.singles, **flags.of(SinglesConfig), **tuned),
        dpo=replace(defaults.dpo, **flags.of(StageTraining), lora=tuned["lora"]),  # what every training of a stage has
        source=source_of(OfflineSource, flags), assets=None if flags["assets"] is None else str(flags["assets"]), labels=flags["labels"],
        stage=flags["stage"], arms=arms, training_seeds=tuple(range(seed, seed + count)), choosing=choosing,
        judging=replace(defaults.judging, **flags.of(Judging)), summary=not flags["no_summary"],
    )


def open_run(settings: OfflineRun, run: Run) -> tuple[Problem, Labelled]:
    """The problem and the labelled assets of a run. Raises: ValueError where they have not what the run needs."""
    refuse_torchrun(len(settings.arms) * len(settings.training_seeds) > 1, "--arms, --seeds")
    if settings.labels is not None and settings.labels not in OWN_KINDS:
        run.inputs["labels"] = Path(settings.labels)
    problem, labelled = open_offline(settings, run.device)
    bench = bench_of(settings, (problem, labelled), settings.training_seeds[0])
    if any(not arm.startswith(DPO) for arm in settings.arms):
        singles = labelled.singles(bench.stage, bench.conditions)
        check_singles(problem.pipeline, stage_of(problem.pipeline, bench.stage), singles, settings.singles.loss)
    if any(arm.startswith(DPO) for arm in settings.arms) and not problem.human_pairs(bench.stage):
        raise ValueError("--arms=dpo: expected people's pairs, got none. Name --pairs, or leave the arm out.")
    return problem, labelled


def title(settings: OfflineRun, opened: tuple[Problem, Labelled]) -> str:
    stage = settings.stage or opened[0].pipeline.stages[-1].name
    return f"offline-{settings.singles.loss}-{Path(settings.source.pipeline).name}-{stage}"


def record(settings: OfflineRun, opened: tuple[Problem, Labelled]) -> dict:
    return {"mode": "offline", "run": asdict(settings), "problem": dict(opened[0].identity), "labels": opened[1].identity}


OFFLINE = Mode(
    name="offline",
    settings=OfflineRun,
    open=open_run,
    work=work,
    title=title,
    flags=together(what_flags, train_flags, table_flags),
    resolve=resolve,
    record=record,
    recorded=kept(OfflineRun, "offline")["recorded"],
    jobs="several trainings",
    help=f"""Tuning of one stage of a flow generator by what people said of single assets: thumbs or scores (--loss={LOSSES[0]}), or
    rankings that are not cut into pairs (--loss={LOSSES[1]}), by default of the bundled toy. Nothing is sampled while it trains but for
    win rates. A run that was stopped goes on with --resume=RUN.

    \b
    Examples:
        python train.py --mode=offline
        python train.py --mode=offline --loss=dgpo --stage=structure
        python train.py --mode=offline --pipeline=ROOT --assets=ASSETS --labels=thumbs.jsonl --stage=structure
    """,
)
MODES.add("offline", OFFLINE)
