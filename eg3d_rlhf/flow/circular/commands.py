"""`train.py --mode=circular-dpo`: preference training of a generator in stages, as a loop, of one stage, or as an ablation."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import click

from eg3d_rlhf.cli import GroupedCommand, choose_device, option, together
from eg3d_rlhf.flow.circular.run import read_run, resume, start
from eg3d_rlhf.flow.circular.settings import ROLES, Choosing, CircularRun, CircularSettings, default_settings
from eg3d_rlhf.flow.circular.table import Judging, letters
from eg3d_rlhf.flow.dpo import KINDS, NOISES, PRESETS, DpoConfig, beta_T
from eg3d_rlhf.flow.lora import LoraConfig
from eg3d_rlhf.flow.problem import DTYPES, ProblemSource
from eg3d_rlhf.flow.tuning.train import StoppedError
from eg3d_rlhf.flow.tuning.update import TrainConfig
from eg3d_rlhf.flow.weights import W2_NORMS
from eg3d_rlhf.preferences.preference_loss import AGGREGATIONS, WEIGHT_MODES
from eg3d_rlhf.run.process import sigterm_interrupts
from training.distributed import process_group

RUN, WHAT, LOSS, TRAIN, LOOP, TABLE = "Run", "What is trained", "Preference loss", "Training", "The loop", "Judging and ablation"
OWN = "the problem's own"
COUNT, WHOLE, POSITIVE = click.IntRange(min=1), click.IntRange(min=0), click.FloatRange(min=0, min_open=True)
WEIGHT, SHARE = click.FloatRange(min=0), click.FloatRange(0, 1)
FOLDER = click.Path(path_type=Path, file_okay=False)


def _own(name: str, group: str, metavar: str, kind, help: str, shown: str = OWN):
    """An option that leaves the problem's default alone where it is not given."""
    return option(name, group=group, metavar=metavar, type=kind, default=None, show_default=shown, help=help)


run_flags = together(
    option("--mode", group=RUN, type=click.Choice(["gan", "circular-dpo"]), default="circular-dpo", expose_value=False,
           help="What train.py trains; see train.py --help for gan."),
    option("--outdir", group=RUN, metavar="DIR", type=FOLDER, default=Path("runs"), help="Runs are numbered inside it."),
    option("--desc", group=RUN, metavar="TEXT", help="Added to the run folder's name."),
    option("--seed", group=RUN, type=WHOLE, default=0, help="Of everything that is drawn."),
    option("--device", group=RUN, type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run."),
    option("--resume", group=RUN, metavar="RUN", type=FOLDER, help="Go on with a run where it was, with its own flags."),
    option("-n", "--dry-run", group=RUN, is_flag=True, help="Print the resolved settings as JSON and stop."),
    option("--timeout", group=RUN, metavar="MINUTES", type=POSITIVE, default=30, help="With torchrun: longest wait for another process."),
    option("--artefacts", group=RUN, metavar="DIR", type=FOLDER, default=None, show_default="artefacts in --outdir",
           help="Finished steps, by the hash of all that they depend on; runs share them."),
    option("--no-summary", group=RUN, is_flag=True, help="Skip the table that ends a run of the loop or of one stage."),
    option("--workers", group=RUN, metavar="INT", type=COUNT, default=2, help="With --ablate: processes, of one thread each."),
)
what_flags = together(
    option("--pipeline", group=WHAT, metavar="toy|DIR", default="toy", help="The bundled toy, or a folder of TRELLIS networks."),
    option("--pairs", group=WHAT, metavar="DIR", type=FOLDER, default=None, show_default="the toy's own",
           help="People's pairs: a folder with one for each stage in it; tools/trellis_files.py imports them."),
    option("--conditions", group=WHAT, metavar="FILE|DIR", type=click.Path(path_type=Path), default=None, show_default="beside the pairs",
           help="Embeddings of TRELLIS's conditions."),
    option("--also", group=WHAT, metavar="DIR", multiple=True, type=FOLDER, help="Further folders to look for TRELLIS's models in."),
    option("--dtype", group=WHAT, type=click.Choice(DTYPES), default="float32", help="In which TRELLIS's flows are held."),
    option("--held-out", group=WHAT, metavar="0..1", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.2,
           help="Share of TRELLIS's conditions that is never trained on."),
    option("--flow-weights", group=WHAT, metavar="STAGE=FILE", multiple=True,
           help="Other weights of a TRELLIS flow, such as a training .pt."),
    option("--voxel-share", group=WHAT, metavar="FLOAT", type=POSITIVE, default=0.25,
           help="TRELLIS: a decoded asset's voxel is filled above this share of the mean opacity."),
    option("--views", group=WHAT, metavar="INT", type=COUNT, default=150, help="TRELLIS: pictures behind the features of a decoded asset."),
    option("--stage", group=WHAT, metavar="NAME", help="Train this stage alone, on people's pairs."),
    option("--ablate", group=WHAT, metavar="a..i", help="Train and compare groups of the paper's table 2: a..i, or letters with commas."),
)
loss_flags = together(
    option("--preset", group=LOSS, type=click.Choice(list(PRESETS)), default=None, show_default=OWN, help="Loss of public code."),
    _own("--loss", LOSS, "|".join(KINDS), click.Choice(KINDS), "Of the margin; sft: the preferred's own error; dro: no reference."),
    _own("--beta", LOSS, "FLOAT", POSITIVE, "Multiplies the margin, as one number: any factor 1/2 or number of steps included."),
    option("--beta-t", group=LOSS, metavar="T", type=POSITIVE, help="Multiply --beta by this, for papers that give beta and T."),
    _own("--pair-weight", LOSS, "inside|outside", click.Choice(WEIGHT_MODES), "Where w2 acts."),
    _own("--label-smoothing", LOSS, "0..0.5", click.FloatRange(0, 0.5, max_open=True), "Share of wrong labels, for sigmoid and robust."),
    _own("--margin", LOSS, "FLOAT", float, "Subtracted from beta times the margin."),
    _own("--loser-weight", LOSS, "FLOAT", WEIGHT, "Of the rejected half of the margin."),
    _own("--sft-weight", LOSS, "FLOAT", WEIGHT, "Of the preferred's own error, added."),
    _own("--aggregation", LOSS, "mean|drdpo", click.Choice(AGGREGATIONS), "Of a batch's losses."),
    _own("--drdpo-beta", LOSS, "FLOAT", POSITIVE, "Of drdpo."),
    _own("--noise", LOSS, "shared|independent", click.Choice(NOISES), "Of preferred and rejected."),
    _own("--condition-dropout", LOSS, "0..1", SHARE, "Share of pairs trained without their condition."),
    _own("--clamp", LOSS, "FLOAT", POSITIVE, "Bound of each one's improvement on the reference."),
)
train_flags = together(
    _own("--tune", TRAIN, "lora|full", click.Choice(["lora", "full"]), "Adapters, or every parameter."),
    _own("--lora-rank", TRAIN, "INT", COUNT, "Of the adapters."),
    _own("--lora-alpha", TRAIN, "FLOAT", POSITIVE, "Their update is multiplied by alpha / rank."),
    _own("--lora-dropout", TRAIN, "0..1", click.FloatRange(0, 1, max_open=True), "Of their inputs."),
    _own("--lora-targets", TRAIN, "LIST", str, "Last parts of layers' names, with commas.", "the stage's own"),
    _own("--lr", TRAIN, "FLOAT", POSITIVE, "AdamW's learning rate."),
    _own("--steps", TRAIN, "UPDATES", COUNT, "Length of a stage's training."),
    _own("--warmup", TRAIN, "UPDATES", WHOLE, "Over which the learning rate rises."),
    _own("--weight-decay", TRAIN, "FLOAT", WEIGHT, "AdamW's."),
    _own("--clip", TRAIN, "FLOAT", POSITIVE, "Largest norm of the gradient."),
    _own("--batch", TRAIN, "PAIRS", COUNT, "Per update, over all processes."),
    _own("--batch-gpu", TRAIN, "PAIRS", COUNT, "Per pass and process: decides memory, not the result.", "batch"),
    _own("--amp", TRAIN, "off|bf16", click.Choice(["off", "bf16"]), "Passes in bfloat16 (autocast)."),
    _own("--ema", TRAIN, "0..1", click.FloatRange(0, 1, min_open=True, max_open=True), "Decay of a moving average, which is then kept."),
    _own("--draws", TRAIN, "INT", COUNT, "Different times and noises per pair, then the first again."),
    _own("--cache-reference", TRAIN, "true|false", bool, "Keep the reference's errors per draw; wants --draws."),
    _own("--held-out-every", TRAIN, "UPDATES", COUNT, "Between win rates."),
    _own("--patience", TRAIN, "INT", COUNT, "Win rates without a new best, after which training stops."),
    _own("--max-drop", TRAIN, "FLOAT", POSITIVE, "Below the best win rate, at which it stops at once."),
    _own("--log-every", TRAIN, "UPDATES", COUNT, "Per line of stats.jsonl."),
    _own("--checkpoint-every", TRAIN, "UPDATES", COUNT, "Between resumable states."),
)
AS_STEP = "that of people's pairs where it is given, else the problem's own"
loop_flags = together(
    _own("--rounds", LOOP, "INT", COUNT, "Of the whole loop, each from the networks of the last, which are then the reference.", "1"),
    _own("--loop-pairs", LOOP, "INT", COUNT, "New pairs for each human pair."),
    _own("--loop-beta", LOOP, "FLOAT", POSITIVE, "Beta on the loop's pairs.", "in the problem's own ratio to --beta"),
    _own("--loop-loser-weight", LOOP, "FLOAT", WEIGHT, "The rejected's weight on the loop's pairs."),
    _own("--loop-sft-weight", LOOP, "FLOAT", WEIGHT, "The preferred's own error on the loop's pairs."),
    _own("--loop-lr", LOOP, "FLOAT", POSITIVE, "Learning rate on the loop's pairs.", AS_STEP),
    _own("--loop-steps", LOOP, "UPDATES", COUNT, "Length of training on the loop's pairs.", AS_STEP),
    _own("--tau", LOOP, "FLOAT", float, "Pairs with w1 at most this are dropped."),
    _own("--w1", LOOP, "true|false", bool, "Drop pairs by w1."),
    _own("--w2", LOOP, "true|false", bool, "Weigh pairs by w2."),
    _own("--w2-norm", LOOP, "|".join(W2_NORMS), click.Choice(W2_NORMS), "What the mean of w2 is made 1 over."),
    _own("--roles", LOOP, "op|reward", click.Choice(ROLES), "Preferred: the tuned network's, or whichever the reward prefers."),
)
table_flags = together(
    _own("--choose-noises", TABLE, "INT", WHOLE, "Assets per held-out condition behind a win rate in training; 0: none, no early stop."),
    _own("--judge-batch", TABLE, "INT", COUNT, "Assets at once; bounds memory."),
    _own("--seeds", TABLE, "INT", COUNT, "With --ablate: trainings of each group, from --seed on.", "3"),
    _own("--table-noises", TABLE, "INT", click.IntRange(min=2), "Assets per held-out condition and training behind the table.", "8"),
)


DPO_FIELDS = {
    "loss": "kind", "pair_weight": "weight_mode", **{name: name for name in (
        "label_smoothing", "margin", "loser_weight", "sft_weight", "aggregation", "drdpo_beta", "noise", "condition_dropout", "clamp",
    )},
}  # fmt: skip
TRAIN_FIELDS = (
    "lr", "steps", "warmup", "weight_decay", "clip", "batch", "batch_gpu", "ema", "draws", "cache_reference", "held_out_every", "patience",
    "max_drop", "log_every", "checkpoint_every",
)  # fmt: skip
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
LOOP_ONLY = (
    "rounds", "loop_pairs", "loop_beta", "loop_loser_weight", "loop_sft_weight", "loop_lr", "loop_steps", "tau", "w1", "w2", "w2_norm",
    "roles",
)  # fmt: skip
ABLATION_ONLY = ("seeds", "workers")
WITH_RESUME = ("resume", "device", "workers", "timeout", "dry_run")


def flag(name: str) -> str:
    """As users write it."""
    return "--" + name.replace("_", "-")


def check(flags: Mapping, given: set[str]) -> None:
    """Refuse what would have no effect.

    Args: given: names of the flags that were written. Raises: ValueError naming them.
    """
    if flags["resume"] is not None:
        extra = sorted(given - set(WITH_RESUME))
        if extra:
            raise ValueError(f"{', '.join(map(flag, extra))}: expected the run's own with --resume, got others. Leave out.")
        return
    _belongs(given, ABLATION_ONLY, flags["ablate"] is not None, "--ablate")
    _belongs(given, ("no_summary",), flags["ablate"] is None, "a run without --ablate")
    _belongs(given, ("table_noises",), not flags["no_summary"], "the table, which --no-summary leaves out")
    _belongs(given, LOOP_ONLY, flags["stage"] is None, "the loop, not to --stage")
    if flags["stage"] is not None and flags["ablate"] is not None:
        raise ValueError("--stage: expected a run of one stage or an --ablate of all, got both. Leave one out.")
    if flags["ablate"] is not None:
        for name in {"rounds", "w1", "w2"} & given:
            raise ValueError(f"{flag(name)}: expected the groups of --ablate to decide, got {flags[name]}. Leave it out.")
    if flags["tune"] == "full":
        _belongs(given, LORA_FIELDS, False, "--tune=lora")
    if flags["beta_t"] is not None and flags["beta"] is None:
        raise ValueError("--beta-t: expected --beta beside it, got none. Both are multiplied.")
    if flags["choose_noises"] == 0:
        _belongs(given, ("held_out_every", "patience", "max_drop"), False, "early stopping, which --choose-noises=0 leaves out")


def _belongs(given: set[str], names, applies: bool, where: str) -> None:
    extra = [flag(name) for name in names if name in given]
    if extra and not applies:
        raise ValueError(f"{', '.join(extra)}: belongs to {where}, and would have no effect here. Leave it out.")


def resolve(flags: Mapping, defaults: CircularSettings) -> CircularRun:
    """The run that the flags describe, with a problem's `defaults` for those that are None.

    Raises: ValueError naming what does not fit.
    """
    groups = None if flags["ablate"] is None else tuple(letters(flags["ablate"]))
    seed, batch = flags["seed"], flags["judge_batch"] or (defaults.choosing or Choosing()).batch
    paths = {name: None if flags[name] is None else str(flags[name]) for name in ("pairs", "conditions")}
    plain = {name: flags[name] for name in ("pipeline", "seed", "dtype", "held_out", "flow_weights", "voxel_share", "views")}
    run = CircularRun(
        circular=settings(flags, defaults), source=ProblemSource(**plain, **paths, also=tuple(map(str, flags["also"]))),
        stage=flags["stage"], groups=groups, training_seeds=tuple(range(seed, seed + (flags["seeds"] or 3))) if groups else (),
        judging=Judging(per_condition=flags["table_noises"] or Judging().per_condition, batch=batch),
        summary=not flags["no_summary"], artefacts=str(flags["artefacts"] or flags["outdir"] / "artefacts"),
    )
    if groups is not None:
        run.plan.tasks()  # validates
    return run


def settings(flags: Mapping, defaults: CircularSettings) -> CircularSettings:
    """The defaults with what the flags change."""
    human, loop, sft = (_training(flags, config) for config in (defaults.human, defaults.loop, defaults.sft))
    human = replace(human, dpo=_loss(flags, human.dpo))
    kept = {"noise": human.dpo.noise, "condition_dropout": human.dpo.condition_dropout}
    sft = replace(sft, dpo=replace(sft.dpo, **kept))
    loop = _loop(flags, loop, human, defaults)
    pairs = replace(defaults.loop_pairs, **_some(flags, {"loop_pairs": "per_pair", "judge_batch": "batch"}))
    filtered = _some(flags, {"tau": "tau", "w1": "use_w1", "w2": "use_w2", "w2_norm": "w2_norm", "roles": "roles"})
    weighing = replace(defaults.weighing, **filtered)
    return replace(
        defaults, human=human, loop=loop, sft=sft, loop_pairs=pairs, weighing=weighing, choosing=_choosing(flags, defaults.choosing),
        rounds=flags["rounds"] or defaults.rounds, seed=flags["seed"],
    )


def _some(flags: Mapping, names: Mapping[str, str]) -> dict:
    return {field: flags[name] for name, field in names.items() if flags[name] is not None}


def _training(flags: Mapping, config: TrainConfig) -> TrainConfig:
    """All but the loss."""
    given = _some(flags, {name: name for name in TRAIN_FIELDS})
    if flags["amp"] is not None:
        given["bf16"] = flags["amp"] == "bf16"
    return replace(config, lora=_lora(flags, config.lora), **given)


def _loss(flags: Mapping, dpo: DpoConfig) -> DpoConfig:
    """Of people's pairs."""
    given = _some(flags, DPO_FIELDS)
    if flags["beta"] is not None:
        given["beta"] = beta_T(flags["beta"], flags["beta_t"] or 1.0)
    return replace(PRESETS[flags["preset"]] if flags["preset"] is not None else dpo, **given)


def _lora(flags: Mapping, lora: LoraConfig | None) -> LoraConfig | None:
    tune = flags["tune"] or ("full" if lora is None else "lora")
    given = _some(flags, {f"lora_{name}": name for name in ("rank", "alpha", "dropout")})
    if flags["lora_targets"] is not None:
        given["targets"] = tuple(name.strip() for name in flags["lora_targets"].split(","))
    if tune == "full":
        if given:
            raise ValueError(f"{', '.join(flag('lora_' + name) for name in given)}: belongs to --tune=lora. Add that, or leave it out.")
        return None
    return replace(lora or LoraConfig(), **given)


def _loop(flags: Mapping, loop: TrainConfig, human: TrainConfig, defaults: CircularSettings) -> TrainConfig:
    """The loop's loss is people's with the loop's own anchors."""
    own = defaults.loop.dpo
    beta = human.dpo.beta * own.beta / defaults.human.dpo.beta  # in this order, so that the defaults' own is exact
    anchors = {"loser_weight": own.loser_weight, "sft_weight": own.sft_weight, "beta": beta}
    anchors |= _some(flags, {"loop_loser_weight": "loser_weight", "loop_sft_weight": "sft_weight", "loop_beta": "beta"})
    loss = own if not human.dpo.needs_reference else human.dpo
    return replace(loop, dpo=replace(loss, **anchors), **_some(flags, {"loop_lr": "lr", "loop_steps": "steps"}))


def _choosing(flags: Mapping, choosing: Choosing | None) -> Choosing | None:
    if flags["choose_noises"] == 0 or (choosing is None and flags["choose_noises"] is None):
        return None
    given = _some(flags, {"choose_noises": "per_condition", "judge_batch": "batch"})
    return replace(choosing or Choosing(), **given)


STOPPED = 130  # exit status


@click.command("train.py --mode=circular-dpo", cls=GroupedCommand, context_settings={
    "help_option_names": ["-h", "--help"], "max_content_width": 140,
})
@run_flags
@what_flags
@loss_flags
@train_flags
@loop_flags
@table_flags
@click.pass_context
def circular_dpo(context: click.Context, **given) -> None:
    """Preference training of a generator in stages (Circular-DPO), by default of the bundled toy: the last stage learns from people's
    pairs, and every stage before it from what the one behind it then makes better. A run that was stopped goes on with --resume=RUN,
    or with the same flags.

    \b
    Examples:
        python train.py --mode=circular-dpo
        python train.py --mode=circular-dpo --ablate=a..i
        python train.py --mode=circular-dpo --stage=structure --beta=100
    """
    written = {name for name in given if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE}
    check(given, written)
    run = None if given["resume"] is not None else resolve(given, default_settings(given["pipeline"]))
    if given["dry_run"]:
        run = run or read_run(given["resume"])[0]
        tasks = {"tasks": run.plan.tasks()} if run.groups is not None else {}
        click.echo(json.dumps({**asdict(run), **tasks}, indent=2, sort_keys=True))
        return
    if given["ablate"] is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--ablate: expected one process, got torchrun's several. Use --workers.")
    try:
        with sigterm_interrupts(), process_group(choose_device(given["device"]), given["timeout"]) as ranks:
            device = str(ranks.device) if ranks.world > 1 else str(choose_device(given["device"]))
            if run is None:
                resume(given["resume"], device, given["workers"], ranks)
            else:
                start(run, given["outdir"], given["desc"], device, given["workers"], ranks)
    except (StoppedError, KeyboardInterrupt) as stopped:
        why = f": {stopped}" if str(stopped) else "."
        click.echo(f"Stopped{why} The same command, or --resume=RUN, goes on from there.", err=True)
        sys.exit(STOPPED)
