"""`train.py --mode=offline`: a stage is tuned by labels of single assets, or by rankings of them, on stored
latents.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.core.cli import option, options_of, together
from eg3d_rlhf.experiments.mode import Flags
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.flow_flags import (
    TOY,
    WHAT,
    arms_shown,
    arms_table_flags,
    check_arms,
    fields_of,
    mode_of_arms,
    names_of,
    source_of,
    stage_flag,
    tuned_as,
    tuning_flags,
)
from eg3d_rlhf.modes.shared_flags import PATH
from eg3d_rlhf.tuning.flow.base.settings import TABLE, Choosing, Evaluation
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.training.offline.settings import (
    ARMS,
    DPO,
    LABELS,
    LOSSES,
    NFT,
    OWN_KINDS,
    OfflineRun,
    OfflineSource,
    SinglesConfig,
)
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig, StageTraining, TrainConfig

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.tuning.flow.base.problem import Problem
    from eg3d_rlhf.tuning.flow.base.single_labels import Labelled
    from eg3d_rlhf.tuning.flow.training.arm_runs import Opened

# The default runs, of the bundled toy; chosen with its chooser on CHOOSING, by people and training seeds that
# the table does not use.

LORA = LoraConfig(rank=16, alpha=32)
_TOY: dict[str, Any] = {
    "lora": LORA,
    "lr": 1e-3,
    "warmup": 10,
    "held_out_every": 25,
    "log_every": 5,
    "checkpoint_every": 50,
    "max_drop": 1.0,
}
TOY_SINGLES = {
    "nft": SinglesConfig(loss="nft", trust=0.1, steps=100, batch=32, **_TOY),
    "dgpo": SinglesConfig(loss="dgpo", beta=50.0, steps=100, batch=4, **_TOY),
}
TOY_DPO = TrainConfig(dpo=DpoConfig(beta=20.0), steps=100, batch=16, **_TOY)


def default_run(pipeline: str, loss: str) -> OfflineRun:
    """What a run does where it is not told otherwise."""
    if pipeline == TOY:
        return OfflineRun(
            singles=TOY_SINGLES[loss],
            dpo=TOY_DPO,
            choosing=Choosing(per_condition=4),
            evaluation=Evaluation(per_condition=4),
        )
    return OfflineRun(singles=SinglesConfig(loss=loss), dpo=TrainConfig(), evaluation=Evaluation(batch=4))


what_flags = together(
    options_of(OfflineSource),
    option(
        "--assets",
        group=WHAT,
        metavar="DIR|PATH",
        type=PATH,
        show_default="the toy's own",
        help="The folder that `eg3d-rlhf flow sample` wrote, or its list.",
    ),
    option(
        "--labels",
        group=WHAT,
        metavar="PATH",
        show_default="the list's ranks; of the toy thumbs, with dgpo ranks",
        help=(
            "What people said of these assets: thumbs, scores, ranks or pairs (docs/guides/single-labels.md)."
        ),
    ),
    stage_flag,
)
train_flags = together(tuning_flags, options_of(SinglesConfig))
arms_flag = option(
    "--arms",
    group=TABLE,
    metavar="LIST",
    default=LABELS,
    help=f"What is trained and compared, with commas: {', '.join(ARMS)}.",
)


def check(flags: Flags) -> None:
    """Refuse what would have no effect. Raises: ValueError naming it."""
    toy = (flags["pipeline"] or TOY) == TOY
    flags.belong(("assets",), not toy, "--pipeline=DIR")
    flags.belong(("trust",), flags["loss"] in (None, NFT), "--loss=nft")
    flags.belong(("group", "group_beta"), flags["loss"] == "dgpo", "--loss=dgpo")
    check_arms(flags, "," in flags["arms"])
    if not toy and flags["assets"] is None:
        raise ValueError(
            "--assets: expected the folder that `flow sample` wrote beside --pipeline=DIR, got none. Name it."
        )


def resolve(flags: Flags) -> OfflineRun:
    """The run that the flags describe. Raises: ValueError naming what does not fit."""
    check(flags)
    defaults = default_run(flags["pipeline"] or TOY, flags["loss"] or NFT)
    tuned = tuned_as(flags, defaults.singles.lora)
    return OfflineRun(
        singles=replace(defaults.singles, **flags.of(SinglesConfig), **tuned),
        # what every training of a stage has
        dpo=replace(defaults.dpo, **flags.of(StageTraining), lora=tuned["lora"]),
        source=source_of(OfflineSource, flags),
        assets=None if flags["assets"] is None else str(flags["assets"]),
        labels=flags["labels"],
        **fields_of(flags, defaults, names_of(flags)),
    )


def shown_by_help(run: OfflineRun) -> list[object]:
    """Return what --help takes defaults from: the settings of training on single assets."""
    return [arms_shown(run, run.singles.lora), run.singles, run]


def open_offline(settings: OfflineRun, device: str) -> "Opened":
    """Open the problem and the labelled assets of a run; see mode_of_arms."""
    from eg3d_rlhf.experiments.version_0_1 import conditioning_file
    from eg3d_rlhf.tuning.flow.families.opening import open_problem

    source = settings.source
    if settings.assets is not None and source.pairs is None and source.conditions is None:
        folder = Path(settings.assets)
        source = replace(
            source, conditions=str(conditioning_file(folder if folder.is_dir() else folder.parent))
        )
    problem = open_problem(source, device)
    return problem, labelled_of(settings, problem)


def labelled_of(settings: OfflineRun, problem: "Problem") -> "Labelled":
    """Read the assets and their labels, or take the toy's."""
    from eg3d_rlhf.tuning.flow.base.single_labels import read_labelled
    from training.progress import tqdm

    if settings.assets is None:
        assert problem.labelled is not None, "`check` refuses other generators without --assets"
        own = problem.labelled[settings.own_kind if settings.own_kind in OWN_KINDS else OWN_KINDS[0]]
        return own if settings.own_kind in OWN_KINDS else own.said_by(Path(settings.own_kind))
    family = family_of(Path(settings.source.pipeline))
    with tqdm(desc="assets", unit="asset", disable=None, leave=False) as bar:
        labels = None if settings.labels is None else Path(settings.labels)
        return read_labelled(Path(settings.assets), labels, problem.pipeline, family.candidate, bar.update)


def check_opened(settings: OfflineRun, opened: "Opened", run: "Run") -> None:
    """Raise ValueError where a problem and its labels lack what the run needs."""
    from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
    from eg3d_rlhf.tuning.flow.training.offline.train_singles import check_singles

    if settings.labels is not None and settings.labels not in OWN_KINDS:
        run.inputs["labels"] = Path(settings.labels)
    bench = settings.bench(opened, settings.training_seeds[0])
    for arm in (LABELS, DPO):
        if not any(name.startswith(DPO) == (arm == DPO) for name in settings.arms):
            continue
        if arm == LABELS:
            conditioned = ConditionedStage(bench.stage, bench.problem.pipeline)
            check_singles(conditioned, bench.answers(arm), settings.singles.loss)
        elif not bench.answers(arm):
            raise ValueError(
                "--arms=dpo: expected people's pairs, got none. Name --pairs, or leave the arm out."
            )


OFFLINE = mode_of_arms(
    "offline",
    OfflineRun,
    lambda settings: settings.singles.loss,
    open_offline,
    check_opened,
    resolve=resolve,
    defaults=lambda flags: shown_by_help(resolve(flags)),
    flags=together(what_flags, train_flags, arms_flag, arms_table_flags),
    help=f"""Tuning of one stage of a flow generator by what people said of single assets: thumbs or scores
    (--loss={LOSSES[0]}), or rankings that are not cut into pairs (--loss={LOSSES[1]}), by default of the
    bundled toy. Nothing is sampled while it trains but for win rates. A run that was stopped goes on with
    --resume=RUN.

    \b
    Examples:
        python train.py --mode=offline
        python train.py --mode=offline --loss=dgpo --stage=structure
        python train.py --mode=offline --pipeline=ROOT --assets=ASSETS --labels=thumbs.jsonl --stage=structure
    """,
)
MODES.add("offline", OFFLINE)
