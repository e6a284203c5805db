"""`train.py --mode=reward` (also `reward train`): trains a reward on labels of a generator's shapes.

Without flags, the network 'heads' is trained on the bundled labels of the bundled generator. Its input is the
density slab, a cropped grid of densities with 64 points per axis. The epoch is chosen on 15 % of the labels,
and the accuracy is measured on another 15 %. The training takes a few minutes on two cores and writes the
folder runs/NNNNN-reward-labels-heads-s0. Rewards of meshes are trained in mesh_reward.py.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import combine_decorators, option, options_from_settings, prefix_errors
from eg3d_rlhf.core.input_paths import check_network
from eg3d_rlhf.experiments.mode import Flags, Mode
from eg3d_rlhf.experiments.run_record import recorded
from eg3d_rlhf.modes import MODES
from eg3d_rlhf.modes.label_origin import ORIGIN_FLAGS, choice_from_flags, learning_options
from eg3d_rlhf.modes.shared_flags import FOLDER, PATH, name_option, rare_option
from eg3d_rlhf.people.label.store_labels import LabelFilters, label_source, labels_source, source_stem
from eg3d_rlhf.preferences.labels import CSV_SUFFIXES, JSONL_SUFFIXES, LabelSource, check_label_path
from eg3d_rlhf.preferences.provenance import PEOPLE, PEOPLE_ONLY, LabelChoice
from eg3d_rlhf.rewards.observation_kinds import OBSERVATIONS
from eg3d_rlhf.rewards.presets import preset as find_preset
from eg3d_rlhf.rewards.presets import presets_of
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS, RewardRun, default_options, record, with_changes
from eg3d_rlhf.rewards.slab_crops import BUNDLED, BUNDLED_CROPS, FFHQ, known_crop

if TYPE_CHECKING:
    from eg3d_rlhf.experiments.run import Run
    from eg3d_rlhf.rewards.training_run import Opened
    from training.distributed import Ranks

HELP = """Train a reward network on labelled pairs of samples, on labels of single samples, or on both. The
samples are generated again from their seeds, with the generator that people labelled.

Without options, a small network is trained on the bundled labels of the bundled generator; this takes a few
minutes on two cores. The run folder contains the reward, its accuracy on held-out pairs with a 95 % interval,
and its learning curves.

\b
Example:
    python tools/train_reward.py --labels=runs/example/labels.jsonl --preset=tiny --epochs=2 --run-dir=reward
"""
STORE = "Labels of a store"


def check_label_file(labels: str | Path) -> None:
    """Raise ValueError or FileNotFoundError if --labels names no file of labels, and no store."""
    if isinstance(labels, Path):
        check_label_path(labels, (*JSONL_SUFFIXES, *CSV_SUFFIXES), "pairs")


def check_unpaired_file(labels: Path) -> None:
    """Raise ValueError or FileNotFoundError if --unpaired names no file of labels of single shapes."""
    # A table can hold labels of pairs only, which are converted.
    if labels.suffix.lower() in CSV_SUFFIXES:
        check_label_path(labels, (*JSONL_SUFFIXES, *CSV_SUFFIXES), "pairs")
    else:
        check_label_path(labels, JSONL_SUFFIXES, "shapes")


_rare_store_option = functools.partial(option, group=STORE, rare=True)
_data_option = functools.partial(option, group="Data")
# The option --labels of commands that learn from labelled pairs; arguments of `option` may be added.
labels_option = functools.partial(
    option,
    "--labels",
    metavar="FILE|URL",
    type=labels_source,
    check=check_label_file,
    help="File of labelled pairs (.jsonl, .csv), or URL of a label database, as sqlite:///labels.db.",
)

reward_flags = combine_decorators(
    # Labels, and the generator whose samples are generated again.
    labels_option(group="Data"),
    _data_option(
        "--observation",
        metavar="KIND",
        check=OBSERVATIONS.check,
        default="sigma",
        help=(
            "Input of the reward network. sigma: grid of densities (the slab); points: point cloud on all"
            " sides of the surface; lifted-points: point cloud of the side that a frontal camera sees, with"
            " one scale for all shapes; published-points: point cloud of arXiv 2606.27305, which includes"
            " the background and is scaled separately for each sample."
        ),
    ),
    _data_option(
        "--crop",
        metavar="X X Y Y Z Z",
        type=click.FloatRange(0, 0.9),
        nargs=6,
        default=None,
        show_default="by the generator",
        help=(
            "Shares of the cube's edge that are cropped at its six faces, at the lower and the upper end of"
            " the x, y and z axis. By default, the bundled generator has the crop of its rewards, EG3D FFHQ"
            " has the crop of arXiv 2606.27305, and the crop of any other generator is measured."
        ),
    ),
    _data_option(
        # Seeds of another generator stand for other shapes, so this is an error by default.
        "--any-generator",
        is_flag=True,
        rare=True,
        help="Accept labels that were given for samples of another generator.",
    ),
    _data_option(
        # A reward that is accurate on wrong shapes has not learned from the shapes.
        "--wrong-faces",
        is_flag=True,
        help=(
            "As a control, replace each labelled shape by another shape. The accuracy must then be near 50 %."
        ),
    ),
    _data_option(
        "--more-network",
        "more_networks",
        check=check_network,
        rare=True,
        metavar="FILE",
        type=PATH,
        multiple=True,
        show_default="none",
        help="Network file of a further generator whose samples were labelled. May be repeated.",
    ),
    _data_option(
        "--fractions",
        rare=True,
        metavar="TRAIN VAL TEST",
        type=click.FloatRange(0, 1),
        nargs=3,
        default=None,
        help="Shares of the labels that are used for training, validation and test.",
    ),
    name_option(
        "--campaign",
        group=STORE,
        show_default="all that collect preferences",
        help="Name of the campaign (labelling project) in the database whose labels are used.",
    ),
    _rare_store_option(
        "--annotator",
        "annotators",
        metavar="NAME",
        multiple=True,
        help="Name of an annotator whose labels are used. May be repeated.",
        show_default="all",
    ),
    _rare_store_option(
        # Filters of the answers; they apply to a label database only.
        "--least-gold-accuracy",
        metavar="0..1",
        type=click.FloatRange(0, 1),
        show_default="no limit",
        help=(
            "Smallest accuracy of an annotator on gold pairs, whose correct answer is known. Labels of less"
            " accurate annotators, and of annotators without gold pairs, are left out."
        ),
    ),
    _rare_store_option(
        "--drop-repeats",
        is_flag=True,
        help="Use only the first answer of each annotator to a pair that was shown several times.",
    ),
    _rare_store_option(
        # Very fast answers are probably given without looking.
        "--min-milliseconds",
        metavar="MS",
        type=click.IntRange(min=0),
        show_default="no limit",
        help="Shortest time of an answer in milliseconds; faster answers are left out.",
    ),
    _rare_store_option(
        "--since",
        metavar="TIME",
        show_default="the beginning",
        help="Earliest time of the used answers, in ISO 8601 format or in seconds since 1970.",
    ),
    learning_options("Data"),
    _rare_store_option(
        # A database may hold answers to several questions about each pair.
        "--criterion",
        metavar="NAME",
        show_default="which is better",
        help="Name of the question whose answers are the labels, one of --criteria of eg3d-rlhf label.",
    ),
    name_option(
        # The network, and the settings of an ensemble.
        "--preset",
        group="Network",
        help=(
            "Architecture of the network, with default settings of its training. For sigma: heads, paper,"
            " small, small-slice or tiny; for points: pointnet, pointnet2 or curvenet; for depth: small,"
            " coarse or resnet50, and with the ending -3 for three views. For sigma, the default is heads,"
            " and paper if --network has the rendering options of EG3D FFHQ."
        ),
    ),
    options_from_settings(RewardRun, checks={"network": check_network, "unpaired": check_unpaired_file}),
    rare_option(
        # None as default: by default only ensembles resample their training pairs.
        "--bootstrap/--no-bootstrap",
        group="Network",
        default=None,
        help=(
            "Resample the training pairs with replacement, with a different seed for each member of an"
            " ensemble. By default, only ensembles do so."
        ),
    ),
    option(
        "--shared-start",
        group="Network",
        is_flag=True,
        help=(
            "Train one network first, and start the training of every member of an ensemble from it."
            " --aggregate=warm implies this."
        ),
    ),
    rare_option(
        # None as default: the preset decides.
        "--cosine/--no-cosine",
        group="Training",
        default=None,
        help="Decrease the learning rate to 0 with a cosine schedule.",
    ),
    rare_option(
        # None as default: the preset decides.
        "--mirror/--no-mirror",
        group="Training",
        default=None,
        help="Augment the training inputs by flipping them left-right at random.",
    ),
    option(
        # Folders. --outdir, which is a flag of all modes, is the parent of numbered folders.
        "--run-dir",
        group="Run",
        metavar="FOLDER",
        type=FOLDER,
        show_default="a numbered folder in --outdir",
        help="Folder of this run, into which all results are written.",
    ),
    option(
        "--cache",
        group="Run",
        metavar="FOLDER",
        type=FOLDER,
        show_default="memory only",
        help="Folder in which generated shapes are stored, so that further runs need not generate them.",
    ),
)


def unpaired_settings(unpaired: Path | None, has_no_pairs: bool, given_settings: dict) -> dict:
    """Return the default settings that change if there are labels of single shapes (unpaired labels).

    The loss terms of unpaired labels get a weight above 0. If there are no pairs, the loss terms of pairs get
    the weight 0. Without pairs, the regression term is 25 (reward - score / 5)^2, the squared error in units
    of the score, beside the divergence with weight 1. With pairs, both weights are 25 times smaller.

    Args:
        unpaired: file of unpaired labels; None: there are none, and the result is empty.
        has_no_pairs: True if there are no labels of pairs.
        given_settings: settings by name; None: not given.

    Returns: new values of settings that were not given, by name.
    """
    if unpaired is None:
        return {}
    if has_no_pairs:
        pair_weights = {name: 0 for name in ("pairs", "scalar", "bradley_terry")}
        changed_settings = {**pair_weights, "regression": 25.0, "divergence": 1.0}
        # Reference samples need a loss term of pairs, so they are off unless a flag switches such a term on.
        if not any(given_settings[name] for name in pair_weights):
            changed_settings["reference_samples"] = 0
    else:
        changed_settings = {"regression": 1.0, "divergence": 0.04}
    # A value that was given by a flag is not changed.
    return {name: value for name, value in changed_settings.items() if given_settings[name] is None}


def known_generator(network: Path | None) -> str | None:
    """Return how a generator's crop is known, 'bundled' or 'ffhq'; None if the crop has to be measured.

    A file that does not exist gives None; opening the run names it.

    Args:
        network: network file or run folder; None: the bundled generator.
    """
    # Without a file, nothing is read, so that --help is quick.
    if network is None:
        return BUNDLED
    if not network.exists():
        return None
    # imported here, because --help must not load this module
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.rewards.slab_crops import recognised

    return recognised(load_generator(network).generator)


def choose_by_generator(flags: Flags, setting_values: dict) -> str | None:
    """Set the crop if it is known for the generator, and return the name of the preset.

    Args:
        flags: values of the flags.
        setting_values: settings of the run by name; `crop` is changed.
    """
    observation = flags["observation"]
    is_cropped = observation in BUNDLED_CROPS
    if not is_cropped:
        return flags["preset"]
    origin = known_generator(flags["network"])
    if flags["crop"] is None and flags["level"] is None and origin is not None:
        setting_values["crop"] = known_crop(origin, observation)
    # the recipe of the paper for the generator of the paper
    is_published = origin == FFHQ and observation == "sigma"
    return "paper" if flags["preset"] is None and is_published else flags["preset"]


def resolve(flags: Flags) -> RewardRun:
    """Build the settings of the run from the flags.

    A flag that is None gets the default of the preset. The defaults of --preset and --crop depend on the
    generator.

    Raises: ValueError that names a flag with a wrong value.
    """
    # flags that are handled by name below, and flags that are no settings of a training
    other_flags = (
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
        *ORIGIN_FLAGS,
    )
    setting_values = {name: value for name, value in flags.items() if name not in other_flags}
    # fields of the run; the other settings belong to its training
    run_field_names = set(RewardRun.__dataclass_fields__)
    unpaired_path = flags["unpaired"]
    observation = flags["observation"]
    # Defaults that depend on the kind of labels; given flags are not changed.
    setting_values |= unpaired_settings(unpaired_path, flags["labels"] is None, setting_values)
    # without any labels, the bundled labels of the bundled generator
    labels = flags["labels"] or unpaired_path or BUNDLED_LABELS
    # Filters of the answers in a label database. `pop` removes them from the settings of the training.
    filter_values = {
        name: value
        for name in LabelFilters.__dataclass_fields__
        if name not in ORIGIN_FLAGS and (value := setting_values.pop(name)) is not None
    }
    choice = choice_from_flags(*(flags[name] for name in ORIGIN_FLAGS))
    # None: the seed of the split was not given, and its default is 0
    run_label_source = open_label_source(
        labels, unpaired_path, setting_values["split_seed"] or 0, filter_values, choice
    )
    preset_name = choose_by_generator(flags, setting_values)
    # settings of the run: the preset's settings of the observation, replaced by flags that were given
    preset_values = find_preset(preset_name, observation).observe
    run_values = {name: value for name, value in preset_values.items() if name in run_field_names}
    shown_preset_name = preset_name or next(iter(presets_of(observation)))
    # A preset may belong to a plugin, whose values were never checked.
    with prefix_errors(f"--preset={shown_preset_name} of --observation={observation}"):
        defaults = default_options(preset_name, observation)
        RewardRun(labels=run_label_source, observation=observation, train=defaults, **run_values)
    run_values |= {
        name: value for name, value in setting_values.items() if name in run_field_names and value is not None
    }
    # The members of an ensemble should differ in their training data, hence the bootstrap by default.
    if setting_values["bootstrap"] is None:
        setting_values["bootstrap"] = run_values.get("members", 1) > 1
    # all other settings belong to the training
    train_options = with_changes(
        defaults, **{name: value for name, value in setting_values.items() if name not in run_field_names}
    )
    return RewardRun(labels=run_label_source, observation=observation, train=train_options, **run_values)


def shown_by_help(flags: Flags) -> list[object]:
    """Return the objects from which --help reads the defaults of the flags: the settings of this run."""
    run = resolve(flags)
    setting_names = ("preset", "bootstrap", "cosine", "mirror")
    # values that are not fields of the run come first
    return [
        {name: getattr(run.train, name) for name in setting_names},
        {"labels": run.labels.settings["labels"], "crop": run.crop, "fractions": run.fractions},
        run,
    ]


def shown_by_dry_run(run: RewardRun) -> dict:
    """Return the settings as --dry-run prints them: a crop that is measured at the start is called so."""
    is_measured = run.crop is None and run.observation in BUNDLED_CROPS
    return run.to_dict() | ({"crop": "measured at the start"} if is_measured else {})


def open_label_source(
    labels: str | Path,
    unpaired: Path | None,
    split_seed: int,
    filters: dict | None,
    choice: LabelChoice = PEOPLE_ONLY,
) -> LabelSource:
    """Open the labels of a file or a database.

    If there are only labels of single shapes, pairs are made from them, so that the labels can be split into
    training, validation and test.

    Args:
        labels: path of the file, or URL of the database.
        unpaired: file of labels of single shapes; None: there are none.
        split_seed: random seed of the split.
        filters: values of LabelFilters by name; None: no filters.
        choice: selection of the labels by their origin.

    Raises: ValueError for a file with another content.
    """
    file_or_database_source = label_source(labels, LabelFilters(**(filters or {})), choice)
    # If labels of pairs exist as well, `labels` names them, and they are not made from single shapes.
    if unpaired is None or Path(labels) != unpaired:
        return file_or_database_source
    # imported here, because --help must not load this module
    from eg3d_rlhf.preferences.unpaired import unpaired_source

    # `split_seed` decides which shapes form a pair.
    return unpaired_source(Path(labels), split_seed, choice)


def open_run(settings: RewardRun, run: "Run") -> "Opened":
    """Open the labels and the generators of a run; see `open_training` for the checks."""
    # imported here, because --help must not load this module
    from eg3d_rlhf.rewards.training_run import open_training

    return open_training(settings, run)


def work(settings: RewardRun, training_data: "Opened", run: "Run") -> None:
    """Train the reward, evaluate it on held-out labels, and write the results into the run folder."""
    # imported here, because --help must not load this module
    from eg3d_rlhf.rewards.training_run import train_and_evaluate

    train_and_evaluate(settings, training_data, run)


def read_record(folder: Path) -> dict:
    """Read training_options.json of a reward's training.

    Raises: ValueError if the folder is not the folder of a reward's training.
    """
    recorded_values = recorded(folder)
    if not {"train", "labels"} <= recorded_values.keys():
        raise ValueError(
            f"--resume: {folder} is not the folder of a reward's training. Name a folder that `reward train`"
            " wrote."
        )
    return recorded_values


def read_settings(folder: Path, flags: Flags, ranks: "Ranks") -> RewardRun:
    """Read the settings of a run from its folder, for --resume.

    Args:
        folder: folder of the run.
        flags: not used.
        ranks: the processes of torchrun.

    Raises: ValueError if the folder is not the folder of a reward's training.
    """
    # a resumed run takes all settings from its record
    del flags
    # The first process reads the file and sends the content to the other processes.
    recorded_values = ranks.broadcast(read_record(folder) if ranks.is_main else None)
    unpaired_path = None if recorded_values["unpaired"] is None else Path(recorded_values["unpaired"])
    # JSON has no tuples, so the names of the annotators were stored as a list.
    filter_values = recorded_values["filters"] and {
        **recorded_values["filters"],
        "annotators": tuple(recorded_values["filters"]["annotators"]),
    }
    return RewardRun.from_dict(
        recorded_values,
        open_label_source(
            labels_source(recorded_values["labels"]),
            unpaired_path,
            recorded_values["split_seed"],
            filter_values,
            # records of labels of people have no such entries
            choice_from_flags(
                recorded_values.get("labels_from", PEOPLE),
                tuple(recorded_values.get("calibrations", ())),
                recorded_values.get("uncalibrated", False),
            ),
        ),
    )


class RewardMode(Mode[RewardRun]):
    """Mode of train.py whose run folder can be named with --run-dir."""

    def start(
        self, settings: RewardRun, outdir: Path, flags: Flags | None = None, ranks: "Ranks | None" = None
    ) -> Path:
        """Start a run as `Mode.start` does, in the folder of --run-dir if this flag was given.

        After torchrun has restarted the processes, the run in this folder is resumed.

        Returns: the folder of the run.

        Raises: ValueError if the folder already contains a run that another launch has begun.
        """
        # imported here, because --help must not load these modules
        from eg3d_rlhf.rewards.training_run import STATE
        from training.distributed import SINGLE, launch_identity

        # None: a numbered folder in --outdir
        folder = (flags or Flags()).get("run_dir")
        ranks = ranks or SINGLE
        if folder is None:
            return super().start(settings, outdir, flags, ranks)
        # True if this launch of torchrun has begun the run before a restart. Rank 0 reads the folder for all.
        is_own_run = ranks.restarts and ranks.broadcast(
            recorded(folder).get("launch") == launch_identity() if ranks.is_main else None
        )
        has_state = ranks.broadcast((folder / STATE).exists() if ranks.is_main else None)
        if has_state and not is_own_run:
            raise ValueError(
                f"--run-dir: {folder} already contains a run. Use --resume={folder} to resume it, or name"
                " another folder with --run-dir."
            )
        if has_state:
            return self.resume(settings, folder, flags, ranks)
        # no run in the folder yet
        return self.begin(settings, folder, flags, ranks)


MODES.add(
    "reward",
    RewardMode(
        name="reward",
        help=HELP,
        settings=RewardRun,
        open=open_run,
        work=work,
        flags=reward_flags,
        resolve=resolve,
        # the folder's name states labels, preset and seed
        title=lambda settings, _: (
            f"reward-{source_stem(settings.labels.settings['labels'])}"
            f"-{settings.train.preset}-s{settings.train.seed}"
        ),
        record=record,
        recorded=read_settings,
        check_resume=read_record,
        shown=shown_by_dry_run,
        defaults=shown_by_help,
        # a resumed run has the settings of its record, so none can differ
        changes=None,
    ),
)
train = MODES["reward"].command
