"""`train.py --mode=offline`: tunes a stage of a flow generator on labels of stored assets.

The labels are thumbs or scores of single assets, or rankings of the assets of a prompt. The training reads
the stored latents of the assets, so no samples are generated.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.core.cli import combine_decorators, option, options_from_settings
from eg3d_rlhf.experiments.mode import Flags
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.flow_flags import (
    TOY,
    WHAT,
    adapter_settings,
    arms_help_values,
    arms_table_flags,
    check_arms_flags,
    control_flag,
    geometry_stage_flag,
    make_arms_mode,
    make_shared_fields,
    make_source,
    parse_arm_names,
    tuning_flags,
    with_control,
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
    SIMULATED_KINDS,
    OfflineRun,
    OfflineSource,
    SinglesConfig,
)
from eg3d_rlhf.tuning.flow.training.settings import RANDOMISED, DpoConfig, StageTraining, TrainConfig
from training.input_paths import check_label_lines

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.tuning.flow.base.problem import Problem
    from eg3d_rlhf.tuning.flow.base.single_labels import Labelled
    from eg3d_rlhf.tuning.flow.training.arm_runs import Opened

# Default settings for the bundled toy generator. They were chosen by the scores of its evaluator on the
# prompts CHOOSING, with simulated labels and training seeds that the table does not use.

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
    # batch: number of assets per update with nft, number of groups per update with dgpo
    "nft": SinglesConfig(loss="nft", trust=0.1, steps=100, batch=32, **_TOY),
    "dgpo": SinglesConfig(loss="dgpo", beta=50.0, steps=100, batch=4, **_TOY),
}
TOY_DPO = TrainConfig(dpo=DpoConfig(beta=20.0), steps=100, batch=16, **_TOY)


def default_run(pipeline: str, loss: str) -> OfflineRun:
    """Return the default settings of a run.

    Args:
        pipeline: folder of the generator, or the name of the toy.
        loss: name of the loss on single assets, "nft" or "dgpo".
    """
    # The toy has settings that were tuned on it; other generators get the settings of published code.
    if pipeline == TOY:
        return OfflineRun(
            singles=TOY_SINGLES[loss],
            dpo=TOY_DPO,
            choosing=Choosing(per_condition=4),
            evaluation=Evaluation(per_condition=4),
        )
    return OfflineRun(singles=SinglesConfig(loss=loss), dpo=TrainConfig(), evaluation=Evaluation(batch=4))


def check_assets(path: Path) -> None:
    """Raise FileNotFoundError if --assets names nothing that exists."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. Name the folder of assets that `flow sample` wrote, or its list."
        )


def check_labels(labels: str) -> None:
    """Raise FileNotFoundError if --labels is no name of simulated labels, and no file."""
    if labels not in SIMULATED_KINDS:
        check_label_lines(labels)


what_flags = combine_decorators(
    options_from_settings(OfflineSource),
    option(
        "--assets",
        group=WHAT,
        metavar="DIR|PATH",
        type=PATH,
        check=check_assets,
        show_default="the labelled assets of the toy",
        help=(
            "Folder of the labelled assets, which `eg3d-rlhf flow sample` wrote, or the list of the assets in"
            " such a folder."
        ),
    ),
    option(
        "--labels",
        group=WHAT,
        metavar="PATH",
        check=check_labels,
        show_default="the ranks in the list; for the toy thumbs, with dgpo ranks",
        help=(
            "File of people's labels of the assets: thumbs, scores, ranks or pairs"
            " (docs/guides/single-labels.md). For the toy also the name of its simulated labels:"
            f" {' or '.join(SIMULATED_KINDS)}."
        ),
    ),
    geometry_stage_flag,
)
train_flags = combine_decorators(tuning_flags, options_from_settings(SinglesConfig))
arms_flag = option(
    "--arms",
    group=TABLE,
    metavar="LIST",
    show_default=f"{LABELS}, and its control {RANDOMISED}",
    help=(
        f"Arms to train and compare, separated by commas: {', '.join(ARMS)}. labels is trained with --loss on"
        " single assets; randomised and inverted are its controls; dpo is trained on pairs."
    ),
)


def check(flags: Flags) -> None:
    """Raise ValueError if flags were given that have no effect, naming them, or if --assets is missing."""
    is_toy = (flags["pipeline"] or TOY) == TOY
    flags.check_applies(
        ("assets",), not is_toy, "the toy generator makes its own assets; only --pipeline=DIR reads them"
    )
    flags.check_applies(("trust",), flags["loss"] in (None, NFT), "the loss is not nft (--loss=nft)")
    flags.check_applies(
        ("group", "group_beta"), flags["loss"] == "dgpo", "the loss is not dgpo (--loss=dgpo)"
    )
    # a comma: several arms
    check_arms_flags(flags, len(select_arms(flags)) > 1)
    if not is_toy and flags["assets"] is None:
        raise ValueError(
            "--assets is missing, which --pipeline=DIR needs. Name the folder of assets that `flow sample`"
            " wrote."
        )


def resolve(flags: Flags) -> OfflineRun:
    """Build the settings of the run from the flags. A flag that is None gets the default of the generator.

    Raises: ValueError that names a flag without an effect, or a value that is not allowed.
    """
    check(flags)
    defaults = default_run(flags["pipeline"] or TOY, flags["loss"] or NFT)
    adapter_fields = adapter_settings(flags, defaults.singles.lora)
    return OfflineRun(
        singles=replace(defaults.singles, **flags.values_for(SinglesConfig), **adapter_fields),
        # The DPO arm gets only the settings that all trainings of a stage share, because the other flags set
        # the losses on single assets.
        dpo=replace(defaults.dpo, **flags.values_for(StageTraining), lora=adapter_fields["lora"]),
        source=make_source(OfflineSource, flags),
        assets=None if flags["assets"] is None else str(flags["assets"]),
        labels=flags["labels"],
        # stage, arms, seeds and evaluation
        **{**make_shared_fields(flags, defaults, select_arms(flags)), "stage": tuned_stage(flags)},
    )


def tuned_stage(flags: Flags) -> str | None:
    """Return the name of the stage to tune, or None for the last stage.

    Labels answer a question about the geometry unless --stage names a stage of textures.
    """
    pipeline = flags["pipeline"] or TOY
    # The missing folder is named when the generator is opened.
    if flags["stage"] is not None or pipeline == TOY or not Path(pipeline).is_dir():
        return flags["stage"]
    # imported here, because --help must not load these modules
    from eg3d_rlhf.tuning.flow.families.opening import geometry_stage

    return geometry_stage(pipeline)


def select_arms(flags: Flags) -> tuple[str, ...]:
    """Return the names of the arms that the flags select."""
    return with_control(flags, LABELS, RANDOMISED) if flags["arms"] is None else parse_arm_names(flags)


def shown_by_help(run: OfflineRun) -> list[object]:
    """Return the objects from which --help reads defaults: the settings of training on single assets."""
    return [arms_help_values(run, run.singles.lora), run.singles, run]


def open_offline(settings: OfflineRun, device: str) -> "Opened":
    """Open the generator of a run with its evaluators (the problem), and the labelled assets.

    Args:
        settings: settings of the run.
        device: device on which the networks are loaded.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.experiments.version_0_1 import conditioning_file
    from eg3d_rlhf.tuning.flow.families.opening import open_stage

    problem_source = settings.source
    # Without --pairs and --conditioning, the embeddings of the prompts are read from the folder of assets.
    if settings.assets is not None and problem_source.pairs is None and problem_source.conditions is None:
        # --assets may be the list of the assets, which lies in their folder
        assets_path = Path(settings.assets)
        problem_source = replace(
            problem_source,
            conditions=str(conditioning_file(assets_path if assets_path.is_dir() else assets_path.parent)),
        )
    problem = open_stage(problem_source, settings.stage, device)
    return problem, read_labelled_assets(settings, problem)


def read_labelled_assets(settings: OfflineRun, problem: "Problem") -> "Labelled":
    """Read the labelled assets of --assets and their labels, or return the labelled assets of the toy."""
    # imported here, because --help must not load these modules
    from eg3d_rlhf.tuning.flow.base.single_labels import read_labelled
    from training.progress import tqdm

    if settings.assets is None:
        assert problem.labelled is not None, "`check` rejects other generators without --assets"
        label_kind = settings.label_kind if settings.label_kind in SIMULATED_KINDS else SIMULATED_KINDS[0]
        labelled_assets = problem.labelled[label_kind]
        # --labels is the name of a kind of the toy's labels, or a file with other labels of the same assets.
        return (
            labelled_assets
            if settings.label_kind in SIMULATED_KINDS
            else labelled_assets.with_labels_of(Path(settings.label_kind))
        )
    family = family_of(Path(settings.source.pipeline))
    with tqdm(desc="assets", unit="asset", leave=False) as progress_bar:
        labels_path = None if settings.labels is None else Path(settings.labels)
        # Reads the list of the assets and their labels; `candidate` reads the stored latents of a line.
        return read_labelled(
            Path(settings.assets), labels_path, problem.pipeline, family.candidate, progress_bar.update
        )


def check_opened(settings: OfflineRun, problem_and_labels: "Opened", run: "Run") -> None:
    """Raise ValueError if a problem and its labels lack something that the arms of the run need.

    Args:
        settings: settings of the run.
        problem_and_labels: the problem and the labelled assets.
        run: the run, to whose inputs the file of labels is added.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
    from eg3d_rlhf.tuning.flow.training.offline.train_singles import check_singles

    if settings.labels is not None and settings.labels not in SIMULATED_KINDS:
        run.inputs["labels"] = Path(settings.labels)
    labelled_assets = problem_and_labels[1]
    # Only labels of a file have an origin; the toy's labels are simulated.
    if labelled_assets is not None and labelled_assets.use is not None and run.ranks.is_main:
        print(labelled_assets.use.text(), flush=True)
    # All training seeds have the same data, so the first seed is enough for the checks.
    bench = settings.bench(problem_and_labels, settings.training_seeds[0])
    for arm_kind in (LABELS, DPO):
        # There are two kinds of arms: DPO on pairs, whose names begin with "dpo", and losses on labels. Skip
        # the kind of which the run has no arm.
        if not any(arm_name.startswith(DPO) == (arm_kind == DPO) for arm_name in settings.arms):
            continue
        if arm_kind == LABELS:
            conditioned_stage = ConditionedStage(bench.stage, bench.problem.pipeline)
            check_singles(conditioned_stage, bench.answers(arm_kind), settings.singles.loss)
        elif not bench.answers(arm_kind):
            raise ValueError(
                "--arms=dpo needs pairs that people labelled. Name their folder with --pairs, or remove dpo"
                " from --arms."
            )


OFFLINE = make_arms_mode(
    "offline",
    OfflineRun,
    # middle part of the run folder's name
    lambda settings: settings.singles.loss,
    open_offline,
    check_opened,
    resolve=resolve,
    defaults=lambda flags: shown_by_help(resolve(flags)),
    flags=combine_decorators(what_flags, control_flag, train_flags, arms_flag, arms_table_flags),
    help=f"""Tune one stage of a flow generator on people's labels of single assets, by default the bundled
    toy. The labels are thumbs or scores (--loss={LOSSES[0]}), or rankings that are not split into pairs
    (--loss={LOSSES[1]}). The training generates no samples except for win rates. A control on randomised
    labels is trained, too. --resume=RUN resumes a run that was stopped.

    \b
    Examples:
        python train.py --mode=offline
        python train.py --mode=offline --loss=dgpo --stage=structure
        python train.py --mode=offline --pipeline=ROOT --assets=ASSETS --labels=thumbs.jsonl --stage=structure
    """,
)
MODES.add("offline", OFFLINE)
