"""Training a reward on labels of a generator's shapes, `train.py --mode=reward`, too. That of meshes is
mesh_reward.py.

With no flags: the bundled labels of the bundled generator, slabs of its density at 64 points per axis, the
'heads' network, the epoch chosen on 15 % of the labels and judged on another 15 %; a few minutes on two
cores, into runs/NNNNN-reward-labels-heads-s0.
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

HELP = """Train a reward network from labelled pairs of seeds, from labels of single seeds, or from both, and
the generator that drew them.

With no options: the bundled generator and labels, a small network, a few minutes on two cores. Writes the
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
        help="Labels of pairs, .jsonl or .csv, or a labelling store, such as sqlite:///labels.db.",
    ),
    _data_option(
        "--observation",
        metavar="KIND",
        default="sigma",
        help=(
            "What the reward reads of a shape: sigma, its density slab; points, a cloud on its surface;"
            " lifted-points or published-points, a cloud lifted from depth."
        ),
    ),
    _data_option(
        "--crop",
        metavar="X X Y Y Z Z",
        type=click.FloatRange(0, 0.9),
        nargs=6,
        default=None,
        show_default="that of the observation",
        help="Shares trimmed from each face of the cube.",
    ),
    _data_option(
        "--any-generator", is_flag=True, rare=True, help="Accept labels that name another generator."
    ),
    _data_option(
        "--wrong-faces",
        is_flag=True,
        help=(
            "A control: read other shapes than those that were labelled. Accuracy must then be near one half."
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
        help="A further generator that labels name; may be given again.",
    ),
    _data_option(
        "--fractions",
        rare=True,
        metavar="TRAIN VAL TEST",
        type=click.FloatRange(0, 1),
        nargs=3,
        default=None,
        help="Shares of the labels per split.",
    ),
    name_option("--campaign", group=STORE, show_default="all that collect preferences", help="Campaign."),
    _rare_store_option(
        "--annotator",
        "annotators",
        metavar="NAME",
        multiple=True,
        help="Annotator; may be given again.",
        show_default="all",
    ),
    _rare_store_option(
        "--least-gold-accuracy",
        metavar="0..1",
        type=click.FloatRange(0, 1),
        show_default="any",
        help="Leave out annotators who got fewer gold checks right, or answered none.",
    ),
    _rare_store_option(
        "--drop-repeats", is_flag=True, help="Keep each annotator's first answer to a pair alone."
    ),
    _rare_store_option(
        "--min-milliseconds", metavar="MS", type=click.IntRange(min=0), help="Leave out faster answers."
    ),
    _rare_store_option(
        "--since",
        metavar="TIME",
        show_default="the beginning",
        help="Received from then on: ISO 8601, or seconds since 1970.",
    ),
    _rare_store_option(
        "--criterion",
        metavar="NAME",
        show_default="which is better",
        help="Take the votes on this criterion.",
    ),
    name_option(
        "--preset",
        group="Network",
        help=(
            "Architecture, with training defaults; heads, paper, small, small-slice or tiny for sigma;"
            " pointnet, pointnet2 or curvenet for points; small, coarse or resnet50 for depth, with -3 for"
            " three views."
        ),
    ),
    options_of(RewardRun),
    rare_option(
        "--bootstrap/--no-bootstrap",
        group="Network",
        default=None,
        help="Draw the training pairs with replacement, for each member by its own seed.",
    ),
    option(
        "--shared-start",
        group="Network",
        is_flag=True,
        help="Train one network first, from which all members go on; --aggregate=warm does so anyway.",
    ),
    rare_option(
        "--cosine/--no-cosine", group="Training", default=None, help="Let the learning rate fall to 0."
    ),
    rare_option(
        "--mirror/--no-mirror",
        group="Training",
        default=None,
        help="Augment what is read at random: slabs are flipped left-right.",
    ),
    option(
        "--run-dir",
        group="Run",
        metavar="FOLDER",
        type=FOLDER,
        show_default="a numbered one in --outdir",
        help="Folder of the run itself.",
    ),
    option(
        "--cache",
        group="Run",
        metavar="FOLDER",
        type=FOLDER,
        show_default="RAM alone",
        help="Keep what is drawn here between runs.",
    ),
)


def unpaired_settings(unpaired: Path | None, alone: bool, options: dict) -> dict:
    """What unpaired labels change of the defaults: their terms have weight, and, alone, nothing is learnt
    from pairs.

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
    return {name: value for name, value in changed.items() if options[name] is None}


def resolve(flags: Flags) -> RewardRun:
    """Command-line values -> the run, with the preset's defaults for what was not given."""
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
    options = {name: value for name, value in flags.items() if name not in apart}
    names = set(RewardRun.__dataclass_fields__)
    unpaired = flags["unpaired"]
    observation = flags["observation"]
    options |= unpaired_settings(unpaired, flags["labels"] is None, options)
    labels = flags["labels"] or unpaired or BUNDLED_LABELS
    filters = {k: value for k in LabelFilters.__dataclass_fields__ if (value := options.pop(k)) is not None}
    source = source_named(labels, unpaired, options["split_seed"] or 0, filters)
    given = {k: v for k, v in options.items() if k in names and v is not None}
    given = {
        **{k: v for k, v in find_preset(flags["preset"], observation).observe.items() if k in names},
        **given,
    }
    defaults = default_options(flags["preset"], observation)
    if options["bootstrap"] is None:
        options["bootstrap"] = given.get("members", 1) > 1
    trained = with_changes(defaults, **{k: v for k, v in options.items() if k not in names})
    return RewardRun(labels=source, observation=observation, train=trained, **given)


def shown_by_help(flags: Flags) -> list[object]:
    """Return what --help takes defaults from: the settings of the run that the flags describe."""
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
    """Labels by the name of their file or store; of single shapes alone, the pairs that they make.

    Raises: ValueError.
    """
    source = label_source(labels, LabelFilters(**(filters or {})))
    if unpaired is None or Path(labels) != unpaired:
        return source
    from eg3d_rlhf.preferences.unpaired import source_of_unpaired

    return source_of_unpaired(Path(labels), split_seed)


def open_run(settings: RewardRun, run: "Run") -> "Opened":
    """Open labels and generators, as `open_training` does."""
    from eg3d_rlhf.rewards.training_run import open_training

    return open_training(settings, run)


def work(settings: RewardRun, opened: "Opened", run: "Run") -> None:
    """Train, and write the figures, as `train_and_judge` does."""
    from eg3d_rlhf.rewards.training_run import train_and_judge

    train_and_judge(settings, opened, run)


def settings_of(folder: Path, flags: Flags, ranks: "Ranks") -> RewardRun:
    """Settings of a run's folder. Raises: ValueError for another folder."""
    from eg3d_rlhf.experiments.run import recorded

    del flags
    values = ranks.broadcast(recorded(folder) if ranks.main else None)
    if not {"train", "labels"} <= (values or {}).keys():
        raise ValueError(f"--resume: expected the folder of a reward's training, got {folder}. Name another.")
    unpaired = None if values["unpaired"] is None else Path(values["unpaired"])
    filters = values["filters"] and {
        **values["filters"],
        "annotators": tuple(values["filters"]["annotators"]),
    }
    return RewardRun.from_dict(
        values, source_named(labels_source(values["labels"]), unpaired, values["split_seed"], filters)
    )


class RewardMode(Mode[RewardRun]):
    """A mode whose run may have a folder of its own name, `--run-dir`."""

    def start(
        self, settings: RewardRun, outdir: Path, flags: Flags | None = None, ranks: "Ranks | None" = None
    ) -> Path:
        """As `Mode.start`. Raises: ValueError where --run-dir is taken."""
        from eg3d_rlhf.experiments.run import recorded
        from eg3d_rlhf.rewards.training_run import STATE
        from training.distributed import SINGLE, launch_identity

        folder = (flags or Flags()).get("run_dir")
        ranks = ranks or SINGLE
        if folder is None:
            return super().start(settings, outdir, flags, ranks)
        launched = ranks.restarts and ranks.broadcast(
            recorded(folder).get("launch") == launch_identity() if ranks.main else None
        )
        if taken := ranks.broadcast((folder / STATE).exists() if ranks.main else None):
            if not launched:
                raise ValueError(
                    f"--run-dir: expected a new folder, got {folder} with a run in it. Pass"
                    f" --resume={folder}, or another --run-dir."
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
