"""Mode `train.py --mode=reward` (also `reward train`): trains a reward on labels of a generator's shapes.

Rewards of meshes are trained in mesh_reward.py. Without flags: the bundled labels of the bundled generator,
density slabs at 64 points per axis, the 'heads' network; the epoch is chosen on 15 % of the labels and the
accuracy is measured on another 15 %. This takes a few minutes on two cores and writes
runs/NNNNN-reward-labels-heads-s0.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import option, options_of, together
from eg3d_rlhf.experiments.mode import Flags, Mode
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.shared_flags import FOLDER, PATH, name_option, rare_option
from eg3d_rlhf.people.label.store_labels import LabelFilters, label_source, labels_source, source_stem
from eg3d_rlhf.preferences.labels import LabelSource
from eg3d_rlhf.rewards.presets import preset as find_preset
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS, RewardRun, default_options, record, with_changes

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.rewards.training_run import Opened
    from training.distributed import Ranks

HELP = """Train a reward network on labelled pairs of seeds, on labels of single seeds, or on both, with
the generator that produced the shapes.

With no options: the bundled generator and labels and a small network; a few minutes on two cores. Writes the
reward, its accuracy on held-out pairs with a 95 % interval, and its learning curves into a run folder.

\b
Example:
    python tools/train_reward.py --labels=runs/example/labels.jsonl --preset=tiny --epochs=2 --run-dir=reward
"""
STORE = "Labels of a store"
_rare_store_option = functools.partial(option, group=STORE, rare=True)
_data_option = functools.partial(option, group="Data")

flags_of_rewards = together(
    _data_option(
        "--labels",
        metavar="FILE|URL",
        type=labels_source,
        help="File of labelled pairs (.jsonl, .csv), or a label database, such as sqlite:///labels.db.",
    ),
    _data_option(
        "--observation",
        metavar="KIND",
        default="sigma",
        help=(
            "Input of the reward: sigma, the density slab; points, a point cloud on the surface;"
            " lifted-points or published-points, a point cloud lifted from depth maps."
        ),
    ),
    _data_option(
        "--crop",
        metavar="X X Y Y Z Z",
        type=click.FloatRange(0, 0.9),
        nargs=6,
        default=None,
        show_default="that of the observation",
        help="Shares of the cube that are cropped at each of its six faces.",
    ),
    _data_option(
        "--any-generator", is_flag=True, rare=True, help="Accept labels that name another generator."
    ),
    _data_option(
        "--wrong-faces",
        is_flag=True,
        help=(
            "Control: read other shapes than those that were labelled. The accuracy must then be near 50 %."
        ),
    ),
    _data_option(
        "--more-network",
        "more_networks",
        rare=True,
        metavar="FILE",
        type=PATH,
        multiple=True,
        show_default="none",
        help="Another generator whose shapes were labelled. May be repeated.",
    ),
    _data_option(
        "--fractions",
        rare=True,
        metavar="TRAIN VAL TEST",
        type=click.FloatRange(0, 1),
        nargs=3,
        default=None,
        help="Shares of the labels for training, validation and test.",
    ),
    name_option(
        "--campaign",
        group=STORE,
        show_default="all that collect preferences",
        help="Campaign of the database whose labels are used.",
    ),
    _rare_store_option(
        "--annotator",
        "annotators",
        metavar="NAME",
        multiple=True,
        help="Annotator whose labels are used. May be repeated.",
        show_default="all",
    ),
    _rare_store_option(
        "--least-gold-accuracy",
        metavar="0..1",
        type=click.FloatRange(0, 1),
        show_default="any",
        help="Leave out annotators with a lower accuracy on gold pairs, or without gold pairs.",
    ),
    _rare_store_option(
        "--drop-repeats", is_flag=True, help="Keep only each annotator's first answer to a pair."
    ),
    _rare_store_option(
        "--min-milliseconds",
        metavar="MS",
        type=click.IntRange(min=0),
        help="Leave out answers that were given faster than this.",
    ),
    _rare_store_option(
        "--since",
        metavar="TIME",
        show_default="the beginning",
        help="Use only answers received from this time on: ISO 8601, or seconds since 1970.",
    ),
    _rare_store_option(
        "--criterion",
        metavar="NAME",
        show_default="which is better",
        help="Train on the votes on this criterion.",
    ),
    name_option(
        "--preset",
        group="Network",
        help=(
            "Architecture, with its training defaults: heads, paper, small, small-slice or tiny for sigma;"
            " pointnet, pointnet2 or curvenet for points; small, coarse or resnet50 for depth, with -3 for"
            " three views."
        ),
    ),
    options_of(RewardRun),
    rare_option(
        "--bootstrap/--no-bootstrap",
        group="Network",
        default=None,
        help="Resample the training pairs with replacement, with another seed for each member.",
    ),
    option(
        "--shared-start",
        group="Network",
        is_flag=True,
        help="Train one network first, from which all members continue; implied by --aggregate=warm.",
    ),
    rare_option(
        "--cosine/--no-cosine",
        group="Training",
        default=None,
        help="Decay the learning rate to 0 with a cosine schedule.",
    ),
    rare_option(
        "--mirror/--no-mirror",
        group="Training",
        default=None,
        help="Augment the inputs at random: slabs are flipped left-right.",
    ),
    option(
        "--run-dir",
        group="Run",
        metavar="FOLDER",
        type=FOLDER,
        show_default="a numbered one in --outdir",
        help="Folder of this run.",
    ),
    option(
        "--cache",
        group="Run",
        metavar="FOLDER",
        type=FOLDER,
        show_default="memory only",
        help="Folder that caches the generated shapes between runs.",
    ),
)


def unpaired_settings(unpaired: Path | None, alone: bool, options: dict) -> dict:
    """Return the defaults that unpaired labels change: their loss terms get a weight; without pairs, the pair
    terms get weight 0.

    The error counts in units of the score, 25 (reward - score / 5)^2, beside the divergence; beside pairs
    both count 25 times less.
    """
    if unpaired is None:
        return {}
    paired = {name: 0 for name in ("pairs", "scalar", "bradley_terry")} if alone else {}
    changed = {
        **paired,
        **({"regression": 25.0, "divergence": 1.0} if alone else {"regression": 1.0, "divergence": 0.04}),
    }
    if not any(options[name] for name in paired) and alone:
        changed["reference_samples"] = 0
    # a value that was given as a flag stays
    return {name: value for name, value in changed.items() if options[name] is None}


def resolve(flags: Flags) -> RewardRun:
    """Build the settings of the run from the flags, with the preset's defaults for the others."""
    apart = (
        "labels",
        "observation",
        "preset",
        "outdir",
        "run_dir",
        "desc",
        "device",
        "resume",
        "dry_run",
        "timeout",
    )
    # flags that are no setting of the training are dropped
    options = {name: value for name, value in flags.items() if name not in apart}
    names = set(RewardRun.__dataclass_fields__)
    unpaired = flags["unpaired"]
    observation = flags["observation"]
    options |= unpaired_settings(unpaired, flags["labels"] is None, options)
    labels = flags["labels"] or unpaired or BUNDLED_LABELS
    # filters apply to a label database; those that were not given are left out
    filters = {k: value for k in LabelFilters.__dataclass_fields__ if (value := options.pop(k)) is not None}
    source = source_named(labels, unpaired, options["split_seed"] or 0, filters)
    given = {k: v for k, v in options.items() if k in names and v is not None}
    # flags override what the preset says about the observation
    given = {
        **{k: v for k, v in find_preset(flags["preset"], observation).observe.items() if k in names},
        **given,
    }
    defaults = default_options(flags["preset"], observation)
    # an ensemble's members must differ in their training data
    if options["bootstrap"] is None:
        options["bootstrap"] = given.get("members", 1) > 1
    # settings of the training; the others belong to the run
    trained = with_changes(defaults, **{k: v for k, v in options.items() if k not in names})
    return RewardRun(labels=source, observation=observation, train=trained, **given)


def shown_by_help(flags: Flags) -> list[object]:
    """Return the settings of the run that the flags describe, from which --help takes its defaults."""
    run = resolve(flags)
    names = ("preset", "bootstrap", "cosine", "mirror")
    return [
        {name: getattr(run.train, name) for name in names},
        {"labels": run.labels.settings["labels"], "crop": run.crop, "fractions": run.fractions},
        run,
    ]


def source_named(
    labels: str | Path, unpaired: Path | None, split_seed: int, filters: dict | None
) -> LabelSource:
    """Open labels by the name of their file or database; labels of single shapes alone are turned into pairs.

    Raises: ValueError.
    """
    source = label_source(labels, LabelFilters(**(filters or {})))
    # pairs are given as well, so they decide the split
    if unpaired is None or Path(labels) != unpaired:
        return source
    from eg3d_rlhf.preferences.unpaired import source_of_unpaired

    return source_of_unpaired(Path(labels), split_seed)


def open_run(settings: RewardRun, run: "Run") -> "Opened":
    """Open labels and generators, as `open_training` does."""
    from eg3d_rlhf.rewards.training_run import open_training

    return open_training(settings, run)


def work(settings: RewardRun, opened: "Opened", run: "Run") -> None:
    """Train, evaluate on held-out labels, and write the results."""
    from eg3d_rlhf.rewards.training_run import train_and_judge

    train_and_judge(settings, opened, run)


def settings_of(folder: Path, flags: Flags, ranks: "Ranks") -> RewardRun:
    """Read the settings from a run's folder. Raises: ValueError for another folder."""
    from eg3d_rlhf.experiments.run import recorded

    del flags
    # one process reads the file
    values = ranks.broadcast(recorded(folder) if ranks.main else None)
    if not {"train", "labels"} <= (values or {}).keys():
        raise ValueError(f"--resume: {folder} is not the folder of a reward's training. Name another folder.")
    unpaired = None if values["unpaired"] is None else Path(values["unpaired"])
    filters = values["filters"] and {
        **values["filters"],
        "annotators": tuple(values["filters"]["annotators"]),
    }
    return RewardRun.from_dict(
        values, source_named(labels_source(values["labels"]), unpaired, values["split_seed"], filters)
    )


class RewardMode(Mode[RewardRun]):
    """Mode whose run folder can be named with `--run-dir`."""

    def start(
        self, settings: RewardRun, outdir: Path, flags: Flags | None = None, ranks: "Ranks | None" = None
    ) -> Path:
        """Start a run as `Mode.start` does. Raises: ValueError if --run-dir already contains a run."""
        from eg3d_rlhf.experiments.run import recorded
        from eg3d_rlhf.rewards.training_run import STATE
        from training.distributed import SINGLE, launch_identity

        folder = (flags or Flags()).get("run_dir")
        ranks = ranks or SINGLE
        if folder is None:
            return super().start(settings, outdir, flags, ranks)
        # torchrun restarted this launch: the folder was begun by it, so it resumes
        launched = ranks.restarts and ranks.broadcast(
            recorded(folder).get("launch") == launch_identity() if ranks.main else None
        )
        if taken := ranks.broadcast((folder / STATE).exists() if ranks.main else None):
            if not launched:
                raise ValueError(
                    f"--run-dir: {folder} contains a run. Pass --resume={folder}, or another --run-dir."
                )
        return (
            self.go_on(settings, folder, flags, ranks)
            if taken
            else self.begin(settings, folder, flags, ranks)
        )


MODES.add(
    "reward",
    RewardMode(
        name="reward",
        help=HELP,
        settings=RewardRun,
        open=open_run,
        work=work,
        flags=flags_of_rewards,
        resolve=resolve,
        title=lambda settings, _: (
            f"reward-{source_stem(settings.labels.settings['labels'])}"
            f"-{settings.train.preset}-s{settings.train.seed}"
        ),
        record=record,
        recorded=settings_of,
        shown=RewardRun.to_dict,
        defaults=shown_by_help,
        changes=None,
    ),
)
train = MODES["reward"].command
