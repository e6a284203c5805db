"""The job `flow export`, which writes the tuned generator of a WORK folder, or of runs of train.py, in its
released layout.
"""

from collections.abc import Sequence
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, option
from eg3d_rlhf.modes.shared_flags import FOLDER, name_option, print_json
from eg3d_rlhf.tuning.flow.base.family import check_stages
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.workspace.work_folder import FILE, Work


@click.command("export", cls=GroupedCommand, job="flow export")
@click.argument("sources", metavar="[WORK|RUN...]", nargs=-1, type=FOLDER)
@option("--outdir", required=True, metavar="DIR", type=FOLDER, help="New or empty folder to write.")
@option(
    "--adapter", is_flag=True, help="Write a PEFT adapter folder per tuned stage instead of full networks."
)
@name_option("--tune", "name", show_default="the latest", help="Training of WORK to export, such as tune-00.")
@option(
    "--pipeline",
    "root",
    metavar="ROOT",
    type=FOLDER,
    show_default="the one that was tuned",
    help="Folder of the untuned generator.",
)
@option(
    "--weights",
    metavar="STAGE=PATH",
    multiple=True,
    help="Folder or file of a stage's tuned weights (needs --pipeline). May be repeated.",
)
def export_command(
    sources: Sequence[Path],
    outdir: Path,
    adapter: bool,
    name: str | None,
    root: Path | None,
    weights: Sequence[str],
) -> None:
    """Write the tuned generator in its released layout, which the original's own program loads. RUN is a run
    folder of train.py; stages tuned by several runs are exported together.

    \b
    Examples:
        eg3d-rlhf flow export WORK --outdir=TUNED
        eg3d-rlhf flow export WORK --outdir=ADAPTERS --adapter
        eg3d-rlhf flow export runs/00000-a runs/00001-b --outdir=TUNED
    """
    from eg3d_rlhf.models.policies import ADAPTER, CONFIG, link
    from eg3d_rlhf.tuning.flow.base.export import export

    # stage -> folder of its tuned weights
    root, tuned = tuned_of(sources, name, root, weights)
    # never mix an export with other files
    if outdir.exists() and any(outdir.iterdir()):
        raise ValueError(f"--outdir: {outdir} has files in it. Name a new folder.")
    # copy PEFT's two files per stage and print how to load them
    if adapter:
        full_stages = [stage for stage, path in tuned.items() if not (path / ADAPTER).is_file()]
        if full_stages:
            raise ValueError(
                f"--adapter: every parameter of {', '.join(full_stages)} was tuned, so there is no adapter."
                " Remove --adapter."
            )
        for stage, path in tuned.items():
            # a hard link where the file system allows it: adapters are large
            for file in (ADAPTER, CONFIG):
                link(path / file, outdir / stage / file)
            click.echo(
                f"{outdir / stage}: PeftModel.from_pretrained(network of stage {stage},"
                f" {str(outdir / stage)!r})"
            )
        return
    family = family_of(root)
    print_json(export(family, root, outdir, tuned))
    click.echo(f"{outdir}: {family.loaded_by.format(out=outdir) or 'as any folder of ' + family.name}")


def tuned_of(
    sources: Sequence[Path], name: str | None, given: Path | None, weights: Sequence[str]
) -> tuple[Path, dict[str, Path]]:
    """Return the folder of the generator that was tuned, and the tuned weights by stage.

    Raises: FileNotFoundError, ValueError.
    """
    from eg3d_rlhf.experiments.run import recorded
    from eg3d_rlhf.models.policies import META

    # one root for each source; they must agree unless --pipeline decides
    roots = [] if given is None else [given]
    tuned = list[tuple[str, Path]]()  # (stage, folder of its weights)
    for source in sources:
        if (source / FILE).is_file():
            work = Work.open(source)
            work.check_pipeline()
            roots.append(Path(work.pipeline))
            tuned += work.tuned(work.training(name)).items()
        else:
            source_record = (recorded(source).get("run") or {}).get("source") or {}
            # a stage's folder is complete once it has its metadata file
            stages = sorted(path.parent.name for path in source.glob(f"*/{META}"))
            if not source_record or not stages:
                raise FileNotFoundError(
                    f"flow export: {source} is neither WORK nor a finished run of train.py: it has no"
                    " tuned stage."
                    " Finish the run, or name another folder."
                )
            roots.append(Path(source_record["pipeline"]))
            tuned += [(stage, source / stage) for stage in stages]
    # (stage, "=", path); without "=" sign and path are empty
    parted = [text.partition("=") for text in weights]
    odd = [name + sign + path for name, sign, path in parted if not (name and path)]
    if odd or (parted and not roots):
        raise ValueError(
            f"--weights needs STAGE=PATH and --pipeline=ROOT, got {' '.join(odd) or 'no --pipeline'}."
            " Give both."
        )
    # nothing to export
    if not tuned and not parted:
        raise ValueError(
            "flow export needs WORK, runs of train.py or --weights, got none. Name what was tuned."
        )
    root = roots[0]
    # with --pipeline, the user vouches for the generator
    if given is None and any(place.resolve() != root.resolve() for place in roots):
        raise ValueError(
            f"flow export writes one generator, got stages of {root} and {roots[-1]}. Export them one by one."
        )
    check_stages("export", family_of(root), [stage for stage, _ in tuned])
    # the dictionary keeps the last weights of a stage, so others of the same stage differ from it
    twice = [stage for stage, path in tuned if dict(tuned)[stage] != path]
    if twice:
        raise ValueError(f"flow export: stage {twice[0]} was tuned in two trainings. Leave one out.")
    return root, dict(tuned) | {stage: Path(path) for stage, _, path in parted}
