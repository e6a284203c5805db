"""Options of `train.py --mode=circular-dpo`; flag_settings.py says what they mean."""

from pathlib import Path

import click

from eg3d_rlhf.cli import option, together
from eg3d_rlhf.flow.circular.problems import DTYPES
from eg3d_rlhf.flow.circular.settings import ROLES
from eg3d_rlhf.flow.dpo import KINDS, NOISES, PRESETS
from eg3d_rlhf.flow.weights import W2_NORMS
from eg3d_rlhf.preferences.preference_loss import AGGREGATIONS, WEIGHT_MODES

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
