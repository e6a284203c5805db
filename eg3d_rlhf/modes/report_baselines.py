"""The job `report baselines`, which compares cheap ways to improve samples with tuning.

It never trains. For a generator with latents it measures truncation, best of n, filters, moves of latents, a
search in w, and the runs that are given; for a folder WORK of a flow generator, settings of sampling, best of
n, filters of meshes and tuned networks.
"""

from pathlib import Path

import click
from click.core import ParameterSource

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, file_hash, option, parse_names, prefix_errors
from eg3d_rlhf.core.seeds import LATENTS, VALIDATION
from eg3d_rlhf.evaluation.baselines.rungs import (
    KINDS,
    NOTHING,
    CollateralBound,
    Inputs,
    control_rungs,
    list_rungs,
)
from eg3d_rlhf.modes.reward_training import check_label_file
from eg3d_rlhf.modes.shared_flags import FILE, FOLDER, PATH, print_json, shared
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS
from training.input_paths import existing_path

# kinds of rungs that --only accepts
SELECTABLE = tuple(kind for kind in KINDS if kind != NOTHING)


def check_run(path: Path) -> None:
    """Raise FileNotFoundError if there is no network, run or training of WORK at a path."""
    existing_path(path, "run")


def _run_option(name: str, help_text: str):
    """Return an option that takes tuned networks or runs, one for each training seed."""
    return option(
        name,
        group="What",
        metavar="FILE|RUN",
        type=PATH,
        check=check_run,
        multiple=True,
        default=(),
        help=help_text,
    )


def _bound_option(name: str, default: float, help_text: str):
    """Return an option that sets a part of the collateral bound."""
    return option(
        name,
        group="Collateral bound",
        metavar="FLOAT",
        type=click.FloatRange(min=0),
        default=default,
        help=help_text,
    )


# flags that have no effect on a folder WORK
GENERATOR_FLAGS = (
    "network",
    "reward_ckpt",
    "heldout_reward",
    "labels",
    "control",
    "steered_run",
    "steered_control",
    "data",
    "validation",
    "psi",
    "identity_bound",
    "front_bound",
    "only",
    "jobs",
)


@click.command("baselines", cls=GroupedCommand, job="report baselines")
@click.argument("folder", metavar="[WORK]", required=False, type=FOLDER)
@shared(
    "network reward-ckpt heldout-reward",
    reward_ckpt={
        "help": "Reward file that the rungs use.",
        "show_default": "the bundled reward, for the bundled generator",
    },
    heldout_reward={
        "help": "Reward file that no rung uses, which measures their gain where there is no ground truth.",
        "show_default": "the bundled held-out reward, for the bundled reward",
    },
)
@option(
    "--labels",
    group="What",
    metavar="FILE",
    type=FILE,
    check=check_label_file,
    show_default="the bundled labels, for the bundled generator",
    help="File of pairwise labels for steering. Without labels, steering is left out.",
)
@_run_option(
    "--run",
    "Tuned network or run. May be repeated, for several training seeds. Of a folder WORK: a training such as"
    " WORK/tune-00; without it, the latest one.",
)
@_run_option("--control", "The same tuned with --lambda-r=0. May be repeated.")
@_run_option("--steered-run", "Network or run that was tuned from a steered network. May be repeated.")
@_run_option("--steered-control", "The same tuned with --lambda-r=0. May be repeated.")
@shared(
    "data",
    data={
        "help": "Dataset to which image distances are measured.",
        "show_default": "the bundled dataset, for the bundled generator; else none",
    },
)
@option(
    "--latents",
    group="Samples",
    metavar="INT",
    type=click.IntRange(min=4, max=LATENTS.count),
    default=64,
    help="Number of held-out latents on which all rungs are measured, or of assets of a folder WORK.",
)
@option(
    "--validation",
    group="Samples",
    metavar="INT",
    type=click.IntRange(min=4, max=VALIDATION.count),
    default=32,
    help="Number of validation latents, on which filters and directions are chosen by the reward.",
)
@shared("psi seed", psi={"default": 1.0})
@_bound_option("--identity-bound", CollateralBound.identity, "Smallest share of latents that keep identity.")
@_bound_option(
    "--front-bound",
    CollateralBound.front,
    "Largest median distance by which fronts move, in voxels of a 64^3 grid.",
)
@_bound_option("--variety-bound", CollateralBound.variety, "Smallest variety, relative to that before.")
@_bound_option(
    "--harm-bound",
    CollateralBound.harm,
    "Largest share of intact samples that are degraded, where there is a ground truth.",
)
@option(
    "--only",
    group="Run",
    metavar="LIST",
    default=",".join(SELECTABLE),
    help="Kinds of rungs to measure, separated by commas.",
)
@shared(
    "outdir device jobs dry-run",
    outdir={
        "default": "runs/baselines",
        "help": "Folder to write into. For a folder WORK it is WORK/baselines, if the flag is not given.",
    },
    jobs={"help": "Number of worker processes."},
    dry_run="Print the rungs, the resolved settings and the missing runs as JSON and stop.",
)
@click.pass_context
def baselines(
    ctx: click.Context,
    folder: Path | None,
    network: Path | None,
    reward_ckpt: Path | None,
    heldout_reward: Path | None,
    labels: Path | None,
    data: str | None,
    identity_bound: float,
    front_bound: float,
    variety_bound: float,
    harm_bound: float,
    only: str,
    outdir: Path,
    device: str,
    jobs: int,
    dry_run: bool,
    **settings,
) -> None:
    """Compare ways to improve samples, from cheap to dear, on the same held-out latents and by the same
    measures: nothing, truncation, best of n, filters, moves of latents with and without labels, a search by
    the reward, and the tuned networks of --run and --steered-run. Nothing is trained.

    Rungs with a strength are compared at the same collateral change: each is shown at its largest strength
    that keeps identity, front and variety. The report names the cheapest rung that suffices, and the commands
    of the runs that were not given. The same command resumes after an interruption. The results are
    baselines.json, baselines.md, baselines.png, baselines-latents.safetensors and index.html.

    For the folder WORK of a flow generator, the rungs are: settings of the sampler, best of n by the latent
    reward, filters of meshes, the tuned generator, and the tuned generator with best of n.

    \b
    Examples:
        eg3d-rlhf report baselines WORK
        eg3d-rlhf report baselines --run=runs/00000-tuned --control=runs/00001-control --outdir=baselines
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.evaluation.baselines import report

    bound = CollateralBound(
        identity=identity_bound, front=front_bound, variety=variety_bound, harm=harm_bound
    )
    if folder is not None:
        _report_work(ctx, folder, bound, outdir, device, dry_run, settings)
        return
    inputs, label_count, reward_labels = resolve(
        network=network,
        reward_ckpt=reward_ckpt,
        heldout_reward=heldout_reward,
        labels=labels,
        data=data,
        device=str(choose_device(device)),
        only=tuple(parse_names("--only", only, SELECTABLE)),
        settings=settings,
    )
    rung_list = list_rungs(inputs, label_count, reward_labels)

    def path_text(path: Path | None) -> str | None:
        return None if path is None else str(path)

    # --dry-run ends here; nothing has been written so far
    if dry_run:
        print_json(
            {
                "rungs": {rung.key: list(map(rung.strength_text, rung.strengths)) for rung in rung_list},
                "controls": [rung.key for rung in control_rungs(inputs)],
                "network": path_text(inputs.network),
                "reward_ckpt": str(inputs.reward),
                "heldout_reward": path_text(inputs.heldout_reward),
                "labels": path_text(inputs.labels),
                "run": list(map(str, inputs.runs)),
                "control": list(map(str, inputs.controls)),
                "steered_run": list(map(str, inputs.steered_runs)),
                "steered_control": list(map(str, inputs.steered_controls)),
                "data": inputs.data,
                "latents": inputs.latents,
                "validation": inputs.validation,
                "psi": inputs.psi,
                "seed": inputs.seed,
                "has_ground_truth": inputs.has_ground_truth,
                **{f"{name}_bound": value for name, value in vars(bound).items()},
                "only": list(inputs.only),
                "device": inputs.device,
                "jobs": jobs,
                "missing": report.missing_commands(inputs, rung_list),
                "outdir": str(outdir),
            }
        )
        return
    # Workers on one GPU would compete for its memory.
    worker_count = jobs if inputs.device == "cpu" else 1
    _, paths = report.work(inputs, rung_list, bound, outdir, worker_count)
    _print_report(outdir, paths)


def _report_work(
    ctx: click.Context,
    folder: Path,
    bound: CollateralBound,
    outdir: Path,
    device: str,
    dry_run: bool,
    settings: dict,
) -> None:
    """Report the baselines of a flow generator's folder WORK. See `baselines` for the arguments."""
    from eg3d_rlhf.evaluation.baselines.flows import FlowInputs, measure_work
    from eg3d_rlhf.tuning.flow.workspace.work_folder import Work

    def is_given(name: str) -> bool:
        return ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE

    for name in GENERATOR_FLAGS:
        if is_given(name):
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect on a folder WORK of a flow generator. Remove it,"
                " or remove WORK."
            )
    work = Work.open(folder)
    trainings = settings["run"]
    if len(trainings) > 1:
        raise ValueError("--run: a folder WORK is compared with one training. Pass --run once.")
    if trainings and not work.tuned(trainings[0]):
        raise ValueError(
            f"--run={trainings[0]} holds no tuned network of {folder}. Pass a training of this folder, such"
            f" as {folder}/tune-00, whose labels carried a learnable signal."
        )
    successful_trainings = [training for training in work.numbered("tune") if work.tuned(training)]
    inputs = FlowInputs(
        work=folder,
        tuned=next(iter([*trainings, *reversed(successful_trainings)]), None),
        assets=settings["latents"],
        seed=settings["seed"],
        device=str(choose_device(device)),
    )
    report_folder = outdir if is_given("outdir") else folder / "baselines"
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        print_json(
            {
                **{name: str(value) for name, value in vars(inputs).items()},
                "bound": vars(bound),
                "outdir": str(report_folder),
            }
        )
        return
    _, paths = measure_work(inputs, bound, report_folder)
    _print_report(report_folder, paths)


def _print_report(report_folder: Path, paths: list[Path]) -> None:
    """Print the table of a report, and the names of the written files."""
    names = ", ".join(path.name for path in paths)
    click.echo(f"\n{(report_folder / 'baselines.md').read_text()}\nWritten to {report_folder}: {names}")


def resolve(
    *,
    network: Path | None,
    reward_ckpt: Path | None,
    heldout_reward: Path | None,
    labels: Path | None,
    data: str | None,
    device: str,
    only: tuple[str, ...],
    settings: dict,
) -> tuple[Inputs, int, int | None]:
    """Fill in the defaults, and check that the files fit the generator.

    Returns: the inputs of the report, the number of labels, and the number of labels of the reward (None if
        it is unknown).
    Raises: ValueError or FileNotFoundError, with the name of the flag.
    """
    from eg3d_rlhf.evaluation.comparison import annotator_can_score
    from eg3d_rlhf.generators import load_generator, shape_count
    from eg3d_rlhf.preferences.labels import labels_hash, load_labels
    from eg3d_rlhf.rewards.linear import check_labels
    from eg3d_rlhf.rewards.reward import check_reward, load_reward
    from training.heads import people

    with prefix_errors("--network"):
        loaded = load_generator(network, device)
    generator = loaded.generator
    if shape_count(generator) is not None:
        raise ValueError(
            f"--network: a file of the family {generator.architecture} holds finished shapes and no latents."
            " Choose the best of its shapes by their scores (eg3d-rlhf score)."
        )
    is_bundled = loaded.path == bundled.GENERATOR
    if reward_ckpt is None:
        if not is_bundled:
            raise ValueError(
                "--reward-ckpt is missing. The bundled reward fits the bundled generator only; pass the file"
                " of a reward of this generator (eg3d-rlhf reward train makes one)."
            )
        reward_ckpt = bundled.REWARD
    with prefix_errors("--reward-ckpt"):
        reward = load_reward(reward_ckpt, device)
    check_reward(reward, generator, "--reward-ckpt")
    if heldout_reward is None and file_hash(reward_ckpt) == file_hash(bundled.REWARD):
        heldout_reward = bundled.HELDOUT_REWARD
    if heldout_reward is not None:
        with prefix_errors("--heldout-reward"):
            heldout = load_reward(heldout_reward, device)
        check_reward(heldout, generator, "--heldout-reward")
        if heldout.shares_network_with(reward):
            raise ValueError(
                f"--heldout-reward={heldout_reward} is the reward of --reward-ckpt or a member of it, so it"
                " cannot be an evaluator. Pass a reward that was trained on other labels or with another"
                " seed."
            )
    labels = BUNDLED_LABELS if labels is None and is_bundled else labels
    label_list = []
    if labels is not None:
        with prefix_errors("--labels"):
            label_list = load_labels(labels)
            check_labels(loaded, label_list)
    # A reward states the hash of its labels, not their number.
    is_trained_on_labels = labels is not None and labels_hash(label_list) in reward.labels
    data = (bundled.DATA if is_bundled else "") if data is None else data
    has_ground_truth = (
        settings["psi"] == 1
        and annotator_can_score(loaded, data or None)
        and generator.z_dim == people.LATENT
    )
    for flag, paths in (
        ("--run", settings["run"]),
        ("--control", settings["control"]),
        ("--steered-run", settings["steered_run"]),
        ("--steered-control", settings["steered_control"]),
    ):
        for path in paths:
            with prefix_errors(flag):
                tuned = load_generator(path, device).generator
            if tuned.z_dim != generator.z_dim or tuned.bounds != generator.bounds:
                raise ValueError(
                    f"{flag}: {path} has other latents or another cube than the generator of --network. Pass"
                    " a network that was tuned from it."
                )
    inputs = Inputs(
        network=None if is_bundled else loaded.path,
        reward=reward_ckpt,
        heldout_reward=heldout_reward,
        labels=labels,
        runs=settings["run"],
        controls=settings["control"],
        steered_runs=settings["steered_run"],
        steered_controls=settings["steered_control"],
        data=data,
        latents=settings["latents"],
        validation=settings["validation"],
        psi=settings["psi"],
        seed=settings["seed"],
        device=device,
        has_ground_truth=has_ground_truth,
        only=only,
    )
    return inputs, len(label_list), len(label_list) if is_trained_on_labels else None
