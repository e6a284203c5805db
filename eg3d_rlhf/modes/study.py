"""The job `study`: designs and serves a blind study, reports on it, and computes its power."""

import contextlib
import functools
from dataclasses import asdict
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, GroupedGroup, check_extra, choose_device, option, options_of
from eg3d_rlhf.modes.annotators import add_annotator, annotators, new_token, revoke
from eg3d_rlhf.modes.shared_flags import FOLDER, count_option, print_json, rare_option
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.db_flag import EXTRA, open_store, store_exists
from eg3d_rlhf.people.label.store_labels import without_password
from eg3d_rlhf.people.study import design as designs
from eg3d_rlhf.people.study.design import StudyDesign
from eg3d_rlhf.people.study.planning import (
    OUTDIR,
    Folder,
    flagged,
    make_design,
    power_options,
    prepare,
    study_rows,
)
from eg3d_rlhf.people.study.power import PowerOptions, SimulationOptions, coverage, exact_power, sample_size

_study_option = functools.partial(option, group="Study")

database = option(
    "--db", metavar="URL", show_default="study.db in the folder", help="URL of the database of the answers."
)


@click.command("report", cls=GroupedCommand, job="study report")
@option(
    "--outdir",
    metavar="DIR",
    type=FOLDER,
    show_default=str(OUTDIR),
    help="Folder of the study, in which the report is written.",
)
@database
@option(
    "--interim", is_flag=True, help="Report before the stopping rule is met; the report is marked as interim."
)
@option(
    "--images",
    metavar="INT",
    type=click.IntRange(0, 50),
    default=6,
    help="Number of best and of worst pairs to show as images; 0 needs no generator.",
)
def report(outdir: Path | None, db: str | None, interim: bool, images: int) -> None:
    """Analyse a finished study as its design states. Writes report.html and report.json."""
    from eg3d_rlhf.people.study import study_report as reports

    # --outdir and --db may stand before `report`
    outer = click.get_current_context().meta.get("folder", Folder(OUTDIR))
    folder = Folder(outdir or outer.path, db or (outer.db if outdir is None else None))
    design, rows = study_rows(folder)
    # assets have no generator that could render them again
    pairs = 0 if design.assets else images
    if pairs:
        click.echo(f"analysing, and rendering up to {2 * pairs} pairs ...", err=True)
    content = reports.compute(design, rows, interim, pairs, str(choose_device("auto")))
    for path in reports.write(content, folder.path):
        click.echo(path)
    for sentence in content["conclusions"]:
        click.echo(f"- {sentence}")


@click.command("power", cls=GroupedCommand)
@options_of(PowerOptions)
@count_option("--annotators", default=1, group="Power", help="Number of annotators.")
@count_option(
    "--annotators-per-pair",
    group="Power",
    show_default="2 where there are several",
    help="Number of annotators that answer each pair.",
)
@count_option("--n", help="Also compute the power of this number of independent decided trials.")
@option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def power(n: int | None, as_json: bool, **options) -> None:
    """Compute the number of trials that a study needs."""
    with flagged(options):
        size = sample_size(power_options(launch.filled(options, PowerOptions)))
    record = asdict(size)
    if n is not None:
        record["power_of_n"] = {
            "n": n,
            "power": float(exact_power(n, size.options.true_rate, size.options.alpha)),
        }
    if as_json:
        print_json(record)
        return
    click.echo(f"{size.trials} trials, {size.per_annotator} for each of {size.options.annotators} annotators")
    click.echo(
        f"  {size.decided} independent decided trials give power {size.attained:.3f} for a win rate of"
        f" {size.options.true_rate:g}"
    )
    click.echo(f"  design effect {size.design_effect:.2f}, ties {size.options.tie_share:.0%}")
    if n is not None:
        click.echo(f"  {n} independent decided trials give power {record['power_of_n']['power']:.3f}")


@click.command("simulate", cls=GroupedCommand)
@options_of(SimulationOptions)
@rare_option(
    "--random-sides/--fixed-sides",
    default=True,
    group="Truth",
    help="Randomise the sides. With --fixed-sides b is always on the left, which shows the bias.",
)
@rare_option(
    "--bootstrap-studies",
    metavar="INT",
    type=click.IntRange(min=0),
    default=0,
    help="Number of studies on which the bootstrap intervals are evaluated.",
)
@option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def simulate(bootstrap_studies: int, as_json: bool, **options) -> None:
    """Simulate studies with a known truth: how often each interval covers it, and how often each finds a
    difference.
    """
    with flagged(options):
        resolved = SimulationOptions(**launch.filled(options, SimulationOptions))
    result = coverage(resolved, bootstrap_studies)
    if as_json:
        print_json(result)
        return
    means = f"truth {result['truth']:.3f}, mean {result['mean_win_rate']:.3f}"
    click.echo(f"{result['options']['studies']} studies of {result['trials']} trials; {means}")
    click.echo(f"left chosen in {result['left_share']:.1%}; design effect {result['design_effect']:.2f}")
    click.echo(f"{'interval':<22} {'studies':>7} {'covers':>8} {'width':>7} {'excludes 50 %':>15}")
    for name, row in result["intervals"].items():
        click.echo(
            f"{name:<22} {row['studies']:>7} {row['coverage']:>8.1%} {row['width']:>7.3f}"
            f" {row['rejects_50_percent']:>15.1%}"
        )


@click.command("study", cls=GroupedGroup, invoke_without_command=True)
@_study_option(
    "--a",
    metavar="PATH",
    show_default="the bundled generator",
    help="First generator: a network file, a run folder, or a folder of finished assets, PROMPT.glb.",
)
@_study_option(
    "--b", metavar="PATH", show_default="the bundled generator", help="Second generator or folder of assets."
)
@_study_option(
    "--label-a", metavar="NAME", show_default="the file's name", rare=True, help="Name of a in reports."
)
@_study_option(
    "--label-b", metavar="NAME", show_default="the file's name", rare=True, help="Name of b in reports."
)
@_study_option(
    "--n",
    metavar="INT",
    type=click.IntRange(min=1),
    show_default="from the power calculation",
    help="Number of trials after which the study ends.",
)
@_study_option(
    "--annotators-per-pair",
    metavar="INT",
    type=click.IntRange(min=1),
    show_default="2 where there are several",
    help="Number of different annotators that answer each pair.",
)
@options_of(StudyDesign, PowerOptions)
@option("--outdir", metavar="DIR", type=FOLDER, default=OUTDIR, help="Folder of the study.")
@rare_option(
    "--name", metavar="NAME", default=None, show_default="the folder's name", help="Name of the study."
)
@database
@option("-n", "--dry-run", is_flag=True, help="Print the design or the study's state as JSON and stop.")
@launch.server_options("access.jsonl in the folder", "Heading of the page that annotators see.")
@click.pass_context
def main(ctx: click.Context, outdir: Path, name: str | None, db: str | None, dry_run: bool, **flags) -> None:
    """Compare two generators blind: design the study, serve it and print the address. `report` analyses it.

    \b
    Example:
        python tools/study.py --a=before --b=after --n=300 --annotators=6
    """
    flags = launch.filled(flags, StudyDesign, PowerOptions)
    folder = Folder(outdir, db)
    name = name or outdir.resolve().name
    ctx.obj = folder.url
    ctx.meta["folder"] = folder
    # a subcommand takes its flags after its name
    if ctx.invoked_subcommand is not None:
        launch.refuse_flags_before(ctx, "outdir", "db")
        return
    check_extra(EXTRA)
    server = launch.ServerFlags.of(flags, outdir)
    if dry_run:
        print_json(_dry_run(folder, name, flags, server))
        return
    make = f"python tools/study.py --outdir={folder.path} add-annotator NAME"
    # reachable from other machines: every annotator needs a login
    if server.exposed:
        with (
            open_store(folder.url, create=True) if store_exists(folder.url) else contextlib.nullcontext()
        ) as known:
            launch.check_annotators(known, server.host, make)
    design = prepare(folder, name, flags, launch.given_flags(ctx), lambda text: click.echo(text, err=True))
    with open_store(folder.url, create=False) as store:
        have = len(launch.with_access(store))
        launch.serve_campaign(
            store,
            folder.url,
            design.name,
            server,
            lambda address: _announcement(address, design, make, have),
            "answer",
        )


def _announcement(address: str, design: StudyDesign, make: str, have: int) -> list[str]:
    """Return the lines that are printed when the server starts."""
    # negative if more people have access than are planned
    missing = design.annotators - have
    need = f"{have} have a login token, {missing} need one ({make})" if missing > 0 else "all have a token"
    tokens = f"{design.annotators} annotators are planned: {need}; they log in at {address}login"
    return [f"study at {address}  (Ctrl-C stops)", *([tokens] if design.annotators > 1 else [])]


def _dry_run(folder: "Folder", name: str, flags: dict, server: launch.ServerFlags) -> dict:
    """Return what --dry-run prints: the design of a new study, or the state of an existing one."""
    # an existing design is never changed
    new = not folder.design.exists()
    made = make_design(name, flags, lambda text: click.echo(f"Warning: {text}", err=True)) if new else None
    design = made or designs.read_design(folder.design)
    # without the long lists of latents and trials
    content = {k: v for k, v in design.to_dict().items() if k not in ("latent_seeds", "plan")}
    return {
        "action": "design" if new else "resume",
        "outdir": str(folder.path),
        "db": without_password(folder.url),
        **server.to_dict(),
        "latents": design.latents,
        "trials_per_annotator": design.quota,
        "design": content,
    }


def shown_by_help(context: click.Context) -> list[object]:
    """Return the values that --help shows as defaults."""
    flags = launch.filled(context.params, StudyDesign, PowerOptions)
    folder = Folder(flags["outdir"], flags["db"])
    return [
        {
            "db": folder.url,
            "name": flags["name"] or folder.path.resolve().name,
            "access_log": launch.ServerFlags.of(flags, folder.path).access_log,
            "annotators_per_pair": power_options(flags).annotators_per_pair,
        }
    ]


main.resolved = shown_by_help
for command in (report, power, simulate, add_annotator, new_token, revoke, annotators):
    main.add_command(command)
