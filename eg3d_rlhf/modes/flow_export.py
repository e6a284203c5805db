"""The job `flow export`, which writes a tuned flow generator as a folder that its original program can load.

The tuned weights come from a WORK folder, from runs of train.py, or from folders that --weights names.
"""

import contextlib
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, option
from eg3d_rlhf.experiments.run_record import recorded
from eg3d_rlhf.models.lora_settings import POLICY_FILE
from eg3d_rlhf.modes.shared_flags import FOLDER, name_option, rare_option
from eg3d_rlhf.tuning.flow.base.family import check_stages
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.workspace.work_folder import FILE, Work

# Share of an update that may be lost by rounding without a warning. In the tests of the families, merged
# updates of a usual size lose less.
MAX_ROUNDING = 0.05


@click.command("export", cls=GroupedCommand, job="flow export")
@click.argument("sources", metavar="[WORK|RUN...]", nargs=-1, type=FOLDER)
@option("--outdir", required=True, metavar="DIR", type=FOLDER, help="New or empty folder to write into.")
@option(
    "--adapter", is_flag=True, help="Write a PEFT adapter folder per tuned stage instead of full networks."
)
@name_option(
    "--tune",
    "name",
    show_default="the latest training",
    help="Name of the training in WORK whose weights are exported, such as tune-00.",
)
@option(
    "--pipeline",
    "root",
    metavar="ROOT",
    type=FOLDER,
    show_default="the generator that was tuned",
    help="Folder of the untuned generator, from which all files that were not tuned are taken.",
)
@option(
    "--weights",
    metavar="STAGE=PATH",
    multiple=True,
    help="Name of a stage, and the folder or file of its tuned weights; needs --pipeline. May be repeated.",
)
@rare_option(
    "--alpha",
    metavar="FLOAT",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    show_default="that of adapter_config.json",
    help=(
        "Scale of adapters that --weights names and that have no adapter_config.json beside them; for DSO's"
        " checkpoints, twice their rank."
    ),
)
def export_command(
    sources: Sequence[Path],
    outdir: Path,
    adapter: bool,
    name: str | None,
    root: Path | None,
    weights: Sequence[str],
    alpha: float | None,
) -> None:
    """Write the tuned generator in the layout of the released generator, so that its original program can
    load it. RUN is a run folder of train.py. Stages that several runs tuned are exported together.

    \b
    Examples:
        eg3d-rlhf flow export WORK --outdir=TUNED
        eg3d-rlhf flow export WORK --outdir=ADAPTERS --adapter
        eg3d-rlhf flow export runs/00000-a runs/00001-b --outdir=TUNED
    """
    if alpha is not None and (adapter or not weights):
        raise ValueError(
            "--set alpha= applies only to adapters that --weights=STAGE=PATH names, and not with --adapter."
            " Remove it: a training of this package records alpha."
        )
    # stage -> folder of its tuned weights
    root, weights_by_stage = find_tuned_weights(sources, name, root, weights)
    # An export is never mixed with other files.
    if outdir.exists() and any(outdir.iterdir()):
        raise ValueError(f"--outdir: {outdir} is not empty. Name a new or an empty folder.")
    again = [
        *(shlex.quote(str(source)) for source in sources),
        *([] if name is None else [f"--tune={shlex.quote(name)}"]),
        *([f"--pipeline={shlex.quote(str(root))}"] if weights else []),
        *(f"--weights={shlex.quote(weight)}" for weight in weights),
    ]
    with removing_on_error(outdir):
        write_export(root, weights_by_stage, outdir, adapter, alpha, again)


@contextlib.contextmanager
def removing_on_error(outdir: Path) -> Iterator[None]:
    """Remove what the block has written to a new or empty folder if it raises an error or is stopped."""
    existed = outdir.exists()
    try:
        yield
    except BaseException:
        for path in outdir.iterdir() if outdir.exists() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if outdir.exists() and not existed:
            outdir.rmdir()
        raise


def write_export(
    root: Path,
    weights_by_stage: Mapping[str, Path],
    outdir: Path,
    adapter: bool,
    alpha: float | None,
    again: Sequence[str],
) -> None:
    """Write the tuned networks, or their adapters, and print how they are loaded.

    Args:
        root: folder of the untuned generator.
        weights_by_stage: name of a stage -> folder or file of its tuned weights.
        outdir: new or empty folder.
        adapter: True to write the adapters instead of full networks.
        alpha: value of --set alpha.
        again: arguments of this command without --outdir and --adapter.
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.models.policies import ADAPTER, CONFIG, link
    from eg3d_rlhf.tuning.flow.base.export import export

    # An adapter folder of the library PEFT consists of two files per stage: weights and configuration.
    if adapter:
        stages_without_adapter = [
            stage for stage, path in weights_by_stage.items() if not (path / ADAPTER).is_file()
        ]
        if stages_without_adapter:
            raise ValueError(
                f"--adapter: the training changed all parameters of {', '.join(stages_without_adapter)}, so"
                " there is no adapter. Remove --adapter to export the full networks."
            )
        stages_without_config = [
            stage for stage, path in weights_by_stage.items() if not (path / CONFIG).is_file()
        ]
        if stages_without_config:
            raise ValueError(
                f"--adapter: the adapters of {', '.join(stages_without_config)} have no {CONFIG}, which"
                " states their scale. Copy it into their folder, or remove --adapter to export the full"
                " networks."
            )
        for stage, path in weights_by_stage.items():
            # a hard link where the file system allows it: adapters are large
            for file_name in (ADAPTER, CONFIG):
                link(path / file_name, outdir / stage / file_name)
            click.echo(
                f"{outdir / stage}: PeftModel.from_pretrained(network of stage {stage},"
                f" {str(outdir / stage)!r})"
            )
        click.echo("next: load each adapter with PEFT (pip install peft), as printed above")
        return
    family = family_of(root)
    report = export(family, root, outdir, weights_by_stage, alpha)
    for stage, stage_report in report["tuned"].items():
        click.echo(
            f"stage {stage}: {outdir / stage_report['file']}, {stage_report['dtype']};"
            f" {stage_report['rounding']:.1%} of the tuning is lost by rounding"
        )
    click.echo(f"{len(report['kept'])} other files are those of {root}")
    if report["elsewhere"]:
        click.echo(f"not in the folder, as in {root}: {', '.join(report['elsewhere'])}")
    lossy_stages = {
        stage: stage_report
        for stage, stage_report in report["tuned"].items()
        if stage_report["rounding"] > MAX_ROUNDING
    }
    for stage, stage_report in lossy_stages.items():
        click.echo(f"warning: {rounding_warning(stage, stage_report, outdir)}")
    # --adapter needs the configuration of each adapter, and adapters of all stages
    if lossy_stages and all(
        (path / file_name).is_file() for path in weights_by_stage.values() for file_name in (ADAPTER, CONFIG)
    ):
        adapter_folder = outdir.with_name(f"{outdir.name}-adapter")
        click.echo(
            f"next: eg3d-rlhf flow export {' '.join(again)} --outdir={shlex.quote(str(adapter_folder))}"
            " --adapter"
        )
        return
    # the family's instructions for loading the exported folder; plugins need not have any
    settings_file = next(iter(sorted(outdir.rglob("pipeline.yaml"))), outdir)
    loading = family.loaded_by.format(out=outdir, settings=settings_file)
    if loading:
        click.echo(f"next: in Python, with the original program: {loading}")
    else:
        click.echo(f"next: eg3d-rlhf flow check {shlex.quote(str(outdir))} --deep")


def rounding_warning(stage: str, stage_report: Mapping, outdir: Path) -> str:
    """Return a warning that much of the tuning of a stage is lost, with the remedy.

    Args:
        stage: name of the stage.
        stage_report: its part of the report of `export`.
        outdir: folder of the export.
    """
    remedy = (
        "Use its adapter, which keeps all of it: export it with --adapter, and load it with PEFT into the"
        " untuned network in float32."
        if stage_report["adapters"]
        else "The folder of the training keeps the float32 weights. Load those, or train longer or with a"
        " larger --lr, so that the update is larger than the rounding."
    )
    consequence = f" {outdir} generates nearly what the untuned generator does."
    return (
        f"{stage_report['rounding']:.1%} of the tuning of stage {stage} is lost, because the original file"
        f" has {stage_report['dtype']} weights, and many changes are smaller than its rounding."
        f"{consequence if stage_report['rounding'] > 0.5 else ''} {remedy}"
    )


def find_tuned_weights(
    sources: Sequence[Path],
    training_name: str | None,
    pipeline_folder: Path | None,
    weight_flags: Sequence[str],
) -> tuple[Path, dict[str, Path]]:
    """Find the generator that was tuned, and the tuned weights of its stages.

    Args:
        sources: WORK folders and run folders of train.py.
        training_name: name of a training in WORK, such as tune-00; None: the latest training.
        pipeline_folder: folder of the untuned generator from --pipeline; None: the generator that the sources
            record.
        weight_flags: values "STAGE=PATH" of --weights.

    Returns: the folder of the untuned generator, and a mapping from stages to folders or files of weights.

    Raises: FileNotFoundError for a source without tuned weights; ValueError for sources of different
        generators, for a stage that two sources tuned, and if nothing was tuned.
    """
    # Folder of the generator of each source. They must be equal unless --pipeline names the generator.
    generator_roots = [] if pipeline_folder is None else [pipeline_folder]
    stage_folders = list[tuple[str, Path]]()  # (stage, folder of its weights)
    for source in sources:
        if (source / FILE).is_file():
            work_folder = Work.open(source)
            # the training that --tune names, or the latest training
            training_folder = work_folder.training(training_name)
            # raises an error if the files of the generator have changed since `flow new`
            work_folder.check_pipeline()
            generator_roots.append(Path(work_folder.pipeline))
            stage_folders += work_folder.tuned(training_folder).items()
        else:
            # The result is empty for a folder without a record, and for a record of another kind of run.
            source_record = (recorded(source).get("run") or {}).get("source") or {}
            # a stage's folder is complete once it has its metadata file
            stages = sorted(path.parent.name for path in source.glob(f"*/{POLICY_FILE}"))
            if not source_record or not stages:
                raise FileNotFoundError(
                    f"flow export: {source} is neither WORK nor a finished run of train.py, because no"
                    " tuned stage was found in it. Resume the run until it is finished, or name another"
                    " folder."
                )
            # a run of train.py records the generator in its settings
            generator_roots.append(Path(source_record["pipeline"]))
            stage_folders += [(stage, source / stage) for stage in stages]
    # (stage, "=", path); sign and path are empty if the value has no "="
    weight_fields = [weight_text.partition("=") for weight_text in weight_flags]
    malformed_weights = [
        stage + separator + path for stage, separator, path in weight_fields if not (stage and path)
    ]
    if malformed_weights:
        raise ValueError(
            f"--weights: {malformed_weights[0]} is not of the form STAGE=PATH. Write the name of a stage, an"
            " equals sign and a path."
        )
    if weight_fields and not generator_roots:
        raise ValueError(
            "--weights=STAGE=PATH needs the folder of the untuned generator. Add --pipeline=ROOT."
        )
    if not stage_folders and not weight_fields:
        raise ValueError(
            "flow export: the tuned weights are missing. Name a WORK folder or runs of train.py, or add"
            " --weights=STAGE=PATH."
        )
    pipeline_root = generator_roots[0]
    # With --pipeline, the user decides which generator the weights belong to.
    if pipeline_folder is None and any(
        other_root.resolve() != pipeline_root.resolve() for other_root in generator_roots
    ):
        raise ValueError(
            f"flow export: the stages belong to different generators, {pipeline_root} and"
            f" {generator_roots[-1]}. Export the generators with separate commands."
        )
    # raises ValueError for a stage that this generator does not have
    stage_names = [stage for stage, _ in stage_folders]
    check_stages("export", family_of(pipeline_root).stages_in(pipeline_root), stage_names)
    # The dictionary holds the last folder of each stage. A stage with a different folder was tuned twice.
    repeated_stages = [stage for stage, path in stage_folders if dict(stage_folders)[stage] != path]
    if repeated_stages:
        raise ValueError(
            f"flow export: stage {repeated_stages[0]} was tuned in two of the named trainings. Remove one of"
            " them from the command."
        )
    # --weights replaces weights of the sources.
    return pipeline_root, dict(stage_folders) | {stage: Path(path) for stage, _, path in weight_fields}
