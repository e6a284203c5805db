"""`train.py --mode=offline`: tunes a stage on labels of single assets, or on rankings of them, with stored
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

# Default settings for the bundled toy. They were chosen with its evaluator on CHOOSING, with simulated people
# and training seeds that
# the table does not use.

LORA = LoraConfig(rank=16, alpha=32)
_TOY: dict[str, Any] = {
    "lora": LORA,
    "lr": 1e-3,  # of AdamW
    "warmup": 10,  # updates until the full learning rate
    "held_out_every": 25,  # updates between evaluations
    "log_every": 5,  # updates per line of stats.jsonl
    "checkpoint_every": 50,  # updates between resumable states
    "max_drop": 1.0,  # of the win rate; 1: never stops early
}
TOY_SINGLES = {
    "nft": SinglesConfig(loss="nft", trust=0.1, steps=100, batch=32, **_TOY),
    "dgpo": SinglesConfig(loss="dgpo", beta=50.0, steps=100, batch=4, **_TOY),
}
TOY_DPO = TrainConfig(dpo=DpoConfig(beta=20.0), steps=100, batch=16, **_TOY)


def default_run(pipeline: str, loss: str) -> OfflineRun:
    """Return the default settings of a run, by generator and loss."""
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
        show_default="those of the toy",
        help="Labelled assets: a folder that `eg3d-rlhf flow sample` wrote, or its list.",
    ),
    option(
        "--labels",
        group=WHAT,
        metavar="PATH",
        show_default="the ranks in the list; for the toy thumbs, with dgpo ranks",
        help=(
            "People's labels of these assets: thumbs, scores, ranks or pairs (docs/guides/single-labels.md)."
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
    help=f"Arms to train and compare, comma-separated: {', '.join(ARMS)}.",
)


def check(flags: Flags) -> None:
    """Reject flags that would have no effect. Raises: ValueError naming them."""
    toy = (flags["pipeline"] or TOY) == TOY
    flags.belong(("assets",), not toy, "--pipeline=DIR")
    flags.belong(("trust",), flags["loss"] in (None, NFT), "--loss=nft")
    flags.belong(("group", "group_beta"), flags["loss"] == "dgpo", "--loss=dgpo")
    check_arms(flags, "," in flags["arms"])
    if not toy and flags["assets"] is None:
        raise ValueError(
            "--assets is required with --pipeline=DIR. Name the folder that `flow sample` wrote."
        )


def resolve(flags: Flags) -> OfflineRun:
    """Build the settings of the run from the flags. Raises: ValueError naming a flag that does not fit."""
    check(flags)
    defaults = default_run(flags["pipeline"] or TOY, flags["loss"] or NFT)
    tuned = tuned_as(flags, defaults.singles.lora)
    return OfflineRun(
        singles=replace(defaults.singles, **flags.of(SinglesConfig), **tuned),
        # only the settings that every training of a stage shares; the others are those of the single-asset
        # losses
        dpo=replace(defaults.dpo, **flags.of(StageTraining), lora=tuned["lora"]),
        source=source_of(OfflineSource, flags),
        assets=None if flags["assets"] is None else str(flags["assets"]),
        labels=flags["labels"],
        **fields_of(flags, defaults, names_of(flags)),
    )


def shown_by_help(run: OfflineRun) -> list[object]:
    """Return the settings that --help shows as defaults: those of training on single assets."""
    return [arms_shown(run, run.singles.lora), run.singles, run]


def open_offline(settings: OfflineRun, device: str) -> "Opened":
    """Open the problem and the labelled assets of a run; see mode_of_arms."""
    from eg3d_rlhf.experiments.version_0_1 import conditioning_file
    from eg3d_rlhf.tuning.flow.families.opening import open_problem

    source = settings.source
    # without --pairs and --conditioning, the embeddings are those in the folder of the assets
    if settings.assets is not None and source.pairs is None and source.conditions is None:
        folder = Path(settings.assets)
        source = replace(
            source, conditions=str(conditioning_file(folder if folder.is_dir() else folder.parent))
        )
    problem = open_problem(source, device)
    return problem, labelled_of(settings, problem)


def labelled_of(settings: OfflineRun, problem: "Problem") -> "Labelled":
    """Read the assets and their labels, or take those of the toy."""
    from eg3d_rlhf.tuning.flow.base.single_labels import read_labelled
    from training.progress import tqdm

    if settings.assets is None:
        assert problem.labelled is not None, "`check` rejects other generators without --assets"
        kind = settings.own_kind if settings.own_kind in OWN_KINDS else OWN_KINDS[0]
        labelled = problem.labelled[kind]
        # --labels names a kind of the toy's labels, or a file with other labels of the same assets
        return labelled if settings.own_kind in OWN_KINDS else labelled.said_by(Path(settings.own_kind))
    family = family_of(Path(settings.source.pipeline))
    with tqdm(desc="assets", unit="asset", disable=None, leave=False) as bar:
        labels = None if settings.labels is None else Path(settings.labels)
        return read_labelled(Path(settings.assets), labels, problem.pipeline, family.candidate, bar.update)


def check_opened(settings: OfflineRun, opened: "Opened", run: "Run") -> None:
    """Raise ValueError if a problem and its labels lack something that the run needs."""
    from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
    from eg3d_rlhf.tuning.flow.training.offline.train_singles import check_singles

    if settings.labels is not None and settings.labels not in OWN_KINDS:
        run.inputs["labels"] = Path(settings.labels)
    # all seeds have the same data, so the first one is enough for the checks
    bench = settings.bench(opened, settings.training_seeds[0])
    for arm in (LABELS, DPO):
        # skip the kind of arms (on labels, or DPO on pairs) that the run does not have
        if not any(name.startswith(DPO) == (arm == DPO) for name in settings.arms):
            continue
        if arm == LABELS:
            conditioned = ConditionedStage(bench.stage, bench.problem.pipeline)
            check_singles(conditioned, bench.answers(arm), settings.singles.loss)
        elif not bench.answers(arm):
            raise ValueError("--arms=dpo needs people's pairs. Name them with --pairs, or remove the arm.")


OFFLINE = mode_of_arms(
    "offline",
    OfflineRun,
    lambda settings: settings.singles.loss,
    open_offline,
    check_opened,
    resolve=resolve,
    defaults=lambda flags: shown_by_help(resolve(flags)),
    flags=together(what_flags, train_flags, arms_flag, arms_table_flags),
    help=f"""Tune one stage of a flow generator on people's labels of single assets: thumbs or scores
    (--loss={LOSSES[0]}), or rankings that are not split into pairs (--loss={LOSSES[1]}), by default of the
    bundled toy. Training generates no samples except for win rates. --resume=RUN resumes a run that was
    stopped.

    \b
    Examples:
        python train.py --mode=offline
        python train.py --mode=offline --loss=dgpo --stage=structure
        python train.py --mode=offline --pipeline=ROOT --assets=ASSETS --labels=thumbs.jsonl --stage=structure
    """,
)
MODES.add("offline", OFFLINE)
