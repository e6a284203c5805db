"""`eg3d-rlhf flow export`: out goes the tuned generator, of a folder of the six commands or of runs of
train.py.
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
@option("--outdir", required=True, metavar="DIR", type=FOLDER, help="New folder to write.")
@option("--adapter", is_flag=True, help="PEFT's folder of every tuned stage, in place of whole networks.")
@name_option("--tune", "name", show_default="the latest", help="Of WORK: a training, such as tune-00.")
@option(
    "--pipeline",
    "root",
    metavar="ROOT",
    type=FOLDER,
    show_default="as it was tuned",
    help="Folder of the generator.",
)
@option(
    "--weights",
    metavar="STAGE=PATH",
    multiple=True,
    help="Weights of a stage from elsewhere: a folder or file (with --pipeline).",
)
def export_command(
    sources: Sequence[Path],
    outdir: Path,
    adapter: bool,
    name: str | None,
    root: Path | None,
    weights: Sequence[str],
) -> None:
    """The tuned generator in its released layout, which the original's own program loads. RUN is a run's
    folder of train.py; stages that several tuned go out together.

    \b
    Examples:
        eg3d-rlhf flow export WORK --outdir=TUNED
        eg3d-rlhf flow export WORK --outdir=ADAPTERS --adapter
        eg3d-rlhf flow export runs/00000-a runs/00001-b --outdir=TUNED
    """
    from eg3d_rlhf.models.policies import ADAPTER, CONFIG, link
    from eg3d_rlhf.tuning.flow.base.export import export

    root, tuned = tuned_of(sources, name, root, weights)
    if outdir.exists() and any(outdir.iterdir()):
        raise ValueError(f"--outdir: expected a new folder, got {outdir} with files in it. Name another.")
    if adapter:
        whole = [stage for stage, path in tuned.items() if not (path / ADAPTER).is_file()]
        if whole:
            raise ValueError(
                f"--adapter: expected stages tuned by adapters, got every parameter of {', '.join(whole)}."
                " Leave it out."
            )
        for stage, path in tuned.items():
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
    """The generator that was tuned, and its tuned weights by stage. Raises: FileNotFoundError, ValueError."""
    from eg3d_rlhf.experiments.run import recorded
    from eg3d_rlhf.models.policies import META

    roots = [] if given is None else [given]
    found = list[tuple[str, Path]]()
    for source in sources:
        if (source / FILE).is_file():
            work = Work.open(source)
            work.check_pipeline()
            roots.append(Path(work.pipeline))
            found += work.tuned(work.training(name)).items()
        else:
            read = (recorded(source).get("run") or {}).get("source") or {}
            stages = sorted(path.parent.name for path in source.glob(f"*/{META}"))
            if not read or not stages:
                raise FileNotFoundError(
                    f"export: expected WORK or a finished run of train.py, got no tuned stage in {source}."
                    " Finish it."
                )
            roots.append(Path(read["pipeline"]))
            found += [(stage, source / stage) for stage in stages]
    parted = [text.partition("=") for text in weights]
    odd = [name + sign + path for name, sign, path in parted if not (name and path)]
    if odd or (parted and not roots):
        raise ValueError(
            f"--weights: expected STAGE=PATH and --pipeline=ROOT, got {' '.join(odd) or 'no --pipeline'}."
            " Name both."
        )
    if not found and not parted:
        raise ValueError(
            "export: expected WORK, runs of train.py or --weights, got none. Name what was tuned."
        )
    root = roots[0]
    if given is None and any(place.resolve() != root.resolve() for place in roots):
        raise ValueError(
            f"export: expected stages of one generator, got those of {root} and {roots[-1]}. Export them one"
            " by one."
        )
    check_stages("export", family_of(root), [stage for stage, _ in found])
    twice = [stage for stage, path in found if dict(found)[stage] != path]
    if twice:
        raise ValueError(f"export: expected a stage of one training, got {twice[0]} of two. Leave one out.")
    return root, dict(found) | {stage: Path(path) for stage, _, path in parted}
