"""Training a reward on labels of a generator's shapes. That of meshes is mesh_reward.py."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, options_of
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.people.label.store_labels import LabelFilters, label_source, labels_source, source_stem
from eg3d_rlhf.preferences.unpaired import source_of_unpaired
from eg3d_rlhf.rewards.networks import preset as find_preset
from eg3d_rlhf.rewards.run import BUNDLED_LABELS, Listener, RewardRun, run_reward_training
from eg3d_rlhf.rewards.train import default_options, with_changes
from training.distributed import process_group
from training.progress import tqdm

BY_PRESET = "by preset"
STORE = "Labels of a store"


def print_epoch(record: dict) -> None:
    """One fixed-width status line."""
    tqdm.write(
        f"member {record['member']}  epoch {record['epoch'] + 1:3d}  train {record['train_accuracy']:6.3f}  "
        f"val {record['val_accuracy']:6.3f}  val log loss {record['val_log_loss']:7.4f}  lr {record['lr']:.2e}  {record['seconds']:6.1f} s"
    )


def print_warning(text: str) -> None:
    """On stderr, before what takes time."""
    tqdm.write(f"Warning: {text}", file=sys.stderr)


def open_bar(total: int, what: str):
    """A progress bar with remaining time on stderr; returns its advance."""
    return tqdm(total=total, desc=what, unit="step" if what == "training" else "shape", dynamic_ncols=True).update


def unpaired_settings(unpaired: Path | None, alone: bool, options: dict) -> dict:
    """What unpaired labels change of the defaults: their terms have weight, and, alone, nothing is learnt from pairs.

    The error counts in units of the score, 25 (reward - score / 5)^2, beside the divergence; beside pairs both count 25 times less.
    """
    if unpaired is None:
        return {}
    paired = {name: 0 for name in ("pairs", "scalar", "bradley_terry")} if alone else {}
    changed = {**paired, **({"regression": 25.0, "divergence": 1.0} if alone else {"regression": 1.0, "divergence": 0.04})}
    if not any(options[name] for name in paired) and alone:
        changed["anchors"] = 0
    return {name: value for name, value in changed.items() if options[name] is None}


def resolve(out, labels, observation, preset, device, options: dict) -> RewardRun:
    """Command-line values -> the run, with the preset's defaults for what was not given."""
    names = set(RewardRun.__dataclass_fields__)
    unpaired = options["unpaired"]
    options |= unpaired_settings(unpaired, labels is None, options)
    labels = labels or unpaired or BUNDLED_LABELS
    source = label_source(labels, LabelFilters(**{k: options.pop(k) for k in LabelFilters.__dataclass_fields__}))
    if labels is unpaired:
        source = source_of_unpaired(unpaired, options["split_seed"] or 0)
    given = {k: v for k, v in options.items() if k in names and v is not None}
    given = {**{k: v for k, v in find_preset(preset, observation).observe.items() if k in names}, **given}
    defaults = default_options(preset, observation)
    if options["bootstrap"] is None:
        options["bootstrap"] = given.get("members", 1) > 1
    train = with_changes(defaults, **{k: v for k, v in options.items() if k not in names})
    out = out or Path("runs") / f"reward-{source_stem(labels)}-{train.preset}-s{train.seed}"
    return RewardRun(out=out, labels=source, observation=observation, device=str(choose_device(device)), train=train, **given)


@click.command("train", cls=GroupedCommand)
@option("--labels", group="Data", metavar="FILE|URL", type=labels_source, default=None,
        show_default="the bundled labels, or --unpaired alone", help="Labels of pairs, .jsonl or .csv, or a labelling store, such as sqlite:///labels.db.")
@option("--observation", group="Data", metavar="KIND", default="sigma",
        help="What the reward reads of a shape: sigma, its density slab; points, a cloud on its surface; lifted-points or "
        "published-points, a cloud lifted from depth.")
@option("--crop", group="Data", metavar="X X Y Y Z Z", type=click.FloatRange(0, 0.9), nargs=6, default=None,
        show_default="of a slab, a head's for heads, else the paper's", help="Shares trimmed from each face of the cube.")
@option("--any-generator", group="Data", is_flag=True, help="Accept labels that name another generator.")
@option("--wrong-faces", group="Data", is_flag=True,
        help="A control: read other shapes than those that were labelled. Accuracy must then be near one half.")
@option("--more-network", "more_networks", group="Data", metavar="FILE", type=click.Path(path_type=Path), multiple=True,
        show_default="none", help="A further generator that labels name; may be given again.")
@option("--fractions", group="Data", metavar="TRAIN VAL TEST", type=click.FloatRange(0, 1), nargs=3, default=(0.7, 0.15, 0.15),
        help="Shares of the labels per split.")
@option("--campaign", group=STORE, metavar="NAME", default=None, show_default="all that collect preferences", help="Campaign.")
@option("--annotator", "annotators", group=STORE, metavar="NAME", multiple=True, help="Annotator; may be given several times.",
        show_default="all")
@option("--least-gold-accuracy", group=STORE, metavar="0..1", type=click.FloatRange(0, 1), default=None, show_default="any",
        help="Leave out annotators who got fewer gold checks right, or answered none.")
@option("--drop-repeats", group=STORE, is_flag=True, help="Keep each annotator's first answer to a pair alone.")
@option("--min-milliseconds", group=STORE, metavar="MS", type=click.IntRange(min=0), default=0, help="Leave out faster answers.")
@option("--since", group=STORE, metavar="TIME", default=None, show_default="the beginning",
        help="Received from then on: ISO 8601, or seconds since 1970.")
@option("--question", group=STORE, metavar="NAME", default=None, show_default="which is better", help="Take the votes on this question.")
@option("--preset", group="Network", metavar="NAME", default=None, show_default="heads for sigma, else the observation's first",
        help="Architecture, with training defaults; heads, paper, small, small-slice or tiny for sigma; pointnet, pointnet2 or curvenet "
        "for points; small, coarse or resnet50 for depth, with -3 for three views.")
@options_of(RewardRun, everywhere=BY_PRESET)
@option("--bootstrap/--no-bootstrap", group="Network", default=None, show_default="with several members",
        help="Draw the training pairs with replacement, for each member by its own seed.")
@option("--shared-start", group="Network", is_flag=True,
        help="Train one network first, from which all members go on; --aggregate=warm does so anyway.")
@option("--cosine/--no-cosine", group="Training", default=None, show_default=BY_PRESET, help="Let the learning rate fall to 0.")
@option("--mirror/--no-mirror", group="Training", default=None, show_default=BY_PRESET,
        help="Augment what is read at random: slabs are flipped left-right.")
@option("--out", group="Run", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False), default=None,
        show_default="runs/reward-<labels>-<preset>-s<seed>", help="Folder to write.")
@option("--cache", group="Run", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False), default=None,
        show_default="RAM alone", help="Keep what is drawn here between runs.")
@option("--resume", group="Run", is_flag=True, help="Continue the run in --out.")
@option("--device", group="Run", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute.")
@option("--timeout", group="Run", metavar="MINUTES", type=click.FloatRange(min=0, min_open=True), default=30,
        help="With torchrun: how long processes wait for each other before the run ends with an error.")
@option("--dry-run", group="Run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def train(out, labels, observation, preset, device, timeout, dry_run, **options) -> None:
    """Train a reward network from labelled pairs of seeds, from labels of single seeds, or from both, and the generator that drew them.

    With no options: the bundled generator and labels, a small network, a few minutes on two cores. Writes the reward, its accuracy on
    held-out pairs with a 95 % interval, and its learning curves into a run folder.

    \b
    Example:
        python tools/train_reward.py --labels=runs/example/labels.jsonl --preset=tiny --epochs=2 --out=runs/example/reward
    """
    run = resolve(out, labels, observation, preset, device, options)
    if dry_run:
        click.echo(json.dumps(run.to_dict(), indent=1))
        return
    with process_group(choose_device(device), timeout) as ranks:
        run = replace(run, device=str(ranks.device)) if ranks.world > 1 else run
        if ranks.main:
            click.echo(f"training reward '{run.train.preset}' on {run.labels.name} into {run.out}", err=True)
        try:
            report = run_reward_training(run, Listener(bar=open_bar, epoch=print_epoch, warn=print_warning) if ranks.main else None, ranks)
        except StoppedError as stopped:
            if ranks.main:
                click.echo(f"{str(stopped).capitalize()}; whole epochs are kept. Continue with --resume --out={run.out}")
            return
    if report is None:
        return
    for name, title in (("labels", "test pairs ordered as labelled"), ("clean", "test pairs ordered as without label noise")):
        if name in report["test"]:
            r = report["test"][name]
            low, high = r["interval_95"]
            click.echo(f"{title}: {r['correct']}/{r['n']} = {r['accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    if "unpaired" in report:
        test = report["unpaired"]["test"]
        (good, others), (low, high) = test["n"], test["auc_interval_95"]
        kinds = f"{good} preferred, {others} others"
        click.echo(f"unpaired test labels: AUC {test['auc']:.3f} ({kinds}), 95 % interval {low:.3f} to {high:.3f}")
    if report["too_few"]:
        click.echo(report["too_few"].replace("below", "above"))
    click.echo(f"expected calibration error {report['test']['calibration_error']:.3f}; reward written to {run.out / 'reward.safetensors'}")
