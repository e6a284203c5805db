"""The command line of the blind study: design and serve it, report on it, and the calculations beside it."""

import contextlib
import copy
import json
from pathlib import Path

import click

from eg3d_rlhf.cli import GroupedCommand, choose_device, option, options_of
from eg3d_rlhf.label import launch
from eg3d_rlhf.label.commands import LabelGroup, add_annotator, annotators, revoke
from eg3d_rlhf.label.preferences import without_password
from eg3d_rlhf.label.shape_files import DEFAULT_FOLDER
from eg3d_rlhf.study import report as reports
from eg3d_rlhf.study.design import StudyDesign, read_design
from eg3d_rlhf.study.launch import Folder, flagged, make_design, planned_trials, power_options, prepare, study_rows
from eg3d_rlhf.study.power import PowerOptions, SimulationOptions, coverage, exact_power, sample_size

OUTDIR = Path("runs/study")


@click.command("report", cls=GroupedCommand)
@option("--outdir", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), default=None, show_default=str(OUTDIR),
        help="The study's folder; the report goes there.")
@option("--db", metavar="URL", default=None, show_default="study.db in the folder", help="Database of the answers.")
@option("--interim", is_flag=True, help="Report before the stopping rule is met, and mark it so.")
@option("--pictures", metavar="INT", type=click.IntRange(0, 50), default=6, help="Pairs shown of either end; 0 needs no generator.")
@option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the pictures' shapes are computed.")
def report(outdir: Path | None, db: str | None, interim: bool, pictures: int, device: str) -> None:
    """Analyse a finished study as designed: report.html and report.json."""
    outer = click.get_current_context().meta.get("folder", Folder(OUTDIR))
    folder = Folder(outdir or outer.path, db or (outer.db if outdir is None else None))
    design, rows = study_rows(folder)
    if pictures:
        click.echo(f"analysing, and drawing up to {2 * pictures} pairs ...", err=True)
    found = reports.compute(design, rows, interim, pictures, str(choose_device(device)))
    for path in reports.write(found, folder.path):
        click.echo(path)
    for sentence in found["conclusions"]:
        click.echo(f"- {sentence}")


@click.command("power", cls=GroupedCommand)
@options_of(PowerOptions)
@option("--annotators", metavar="INT", type=click.IntRange(min=1), default=1, group="Power", help="People who are asked.")
@option("--annotators-per-pair", metavar="INT", type=click.IntRange(min=1), default=None, group="Power",
        show_default="2 where there are several", help="To judge each pair.")
@option("--n", metavar="INT", type=click.IntRange(min=1), default=None, help="Also give the power of so many independent decided trials.")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def power(n: int | None, as_json: bool, **options) -> None:
    """How many trials a study needs."""
    with flagged(options):
        size = sample_size(power_options(launch.filled(options, PowerOptions)))
    record = size.to_dict()
    if n is not None:
        record["power_of_n"] = {"n": n, "power": exact_power(n, size.options.true_rate, size.options.alpha)}
    if as_json:
        click.echo(json.dumps(record, indent=1))
        return
    click.echo(f"{size.trials} trials, {size.per_annotator} for each of {size.options.annotators} annotators")
    click.echo(f"  {size.decided} independent decided trials give power {size.attained:.3f} for a win rate of {size.options.true_rate:g}")
    click.echo(f"  design effect {size.design_effect:.2f}, ties {size.options.tie_share:.0%}")
    if n is not None:
        click.echo(f"  {n} independent decided trials give power {record['power_of_n']['power']:.3f}")


@click.command("simulate", cls=GroupedCommand)
@options_of(SimulationOptions)
@option("--random-sides/--fixed-sides", default=True, group="Truth", help="Fixed: b is always on the left, which no study may do.")
@option("--bootstrap-studies", metavar="INT", type=click.IntRange(min=0), default=0, help="Evaluate the bootstraps on so many of them.")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def simulate(bootstrap_studies: int, as_json: bool, **options) -> None:
    """Studies with a known truth: how often each interval covers it, and how often each finds a difference."""
    with flagged(options):
        resolved = SimulationOptions(**launch.filled(options, SimulationOptions))
    found = coverage(resolved, bootstrap_studies)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    means = f"truth {found['truth']:.3f}, mean {found['mean_win_rate']:.3f}"
    click.echo(f"{found['options']['studies']} studies of {found['trials']} trials; {means}")
    click.echo(f"left chosen in {found['left_share']:.1%}; design effect {found['design_effect']:.2f}")
    click.echo(f"{'interval':<22} {'studies':>7} {'covers':>8} {'width':>7} {'leaves 0.5 out':>15}")
    for name, row in found["intervals"].items():
        click.echo(f"{name:<22} {row['studies']:>7} {row['coverage']:>8.1%} {row['width']:>7.3f} {row['rejects_half']:>15.1%}")


@click.command("study", cls=LabelGroup, invoke_without_command=True)
@option("--a", metavar="PATH", default=None, show_default="the bundled generator", group="Study", help="Network file or run folder.")
@option("--b", metavar="PATH", default=None, show_default="the bundled generator", group="Study", help="The one it is compared with.")
@option("--label-a", metavar="NAME", default=None, show_default="the file's name", group="Study", help="How reports call a.")
@option("--label-b", metavar="NAME", default=None, show_default="the file's name", group="Study", help="How reports call b.")
@option("--n", metavar="INT", type=click.IntRange(min=1), default=None, show_default="from the power calculation", group="Study",
        help="Trials after which the study is over.")
@option("--annotators-per-pair", metavar="INT", type=click.IntRange(min=1), default=None, show_default="2 where there are several",
        group="Study", help="Different annotators to judge each pair.")
@options_of(StudyDesign, PowerOptions)
@option("--outdir", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), default=OUTDIR, help="The study's folder.")
@option("--name", metavar="NAME", default=None, show_default="the folder's name", help="Of the study.")
@option("--db", metavar="URL", default=None, show_default="study.db in the folder", help="Database of the answers.")
@option("--cache", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_FOLDER, help="Where shapes are kept.")
@option("-n", "--dry-run", is_flag=True, help="Print the design or the study's state as JSON and stop.")
@launch.server_options("access.jsonl in the folder", "Heading of the page; annotators read it.")
@click.pass_context
def main(ctx: click.Context, outdir: Path, name: str | None, db: str | None, dry_run: bool, **flags) -> None:
    """Compare two generators blind: designs the study, serves it and prints the address; then `report`.

    \b
    Example:
        python tools/study.py --a=before --b=after --n=300 --annotators=6
    """
    flags = launch.filled(flags, StudyDesign, PowerOptions)
    folder, name = Folder(outdir, db), name or outdir.resolve().name
    ctx.obj, ctx.meta["folder"] = folder.url, folder
    if ctx.invoked_subcommand is not None:
        launch.refuse_flags_before(ctx, "outdir", "db")
        return
    server = launch.ServerFlags.of(flags, outdir)
    if dry_run:
        click.echo(json.dumps(_dry_run(folder, name, flags, server), indent=1))
        return
    make = f"python tools/study.py --outdir={folder.path} add-annotator NAME"
    if server.exposed:
        with launch.open_store(folder.url, create=True) if folder.has_store else contextlib.nullcontext() as known:
            launch.check_annotators(known, server.host, make)
    design, _ = prepare(folder, name, flags, launch.given_flags(ctx), lambda text: click.echo(text, err=True))
    with launch.open_store(folder.url, create=False) as store:
        launch.serve_campaign(store, folder.url, design.name, server, lambda address: _announcement(address, design, make), "answer")


def _announcement(address: str, design: StudyDesign, make: str) -> list[str]:
    tokens = f"{design.annotators} annotators are planned: each needs a token ({make}) and logs in at {address}login"
    return [f"study at {address}  (Ctrl-C stops)", *([tokens] if design.annotators > 1 else [])]


def _dry_run(folder: Folder, name: str, flags: dict, server: launch.ServerFlags) -> dict:
    """What would be done; nothing is written."""
    new = not folder.design.exists()
    if new:
        planned_trials(flags, lambda text: click.echo(f"Warning: {text}", err=True))
    design = make_design(name, flags) if new else read_design(folder.design)
    content = {k: v for k, v in design.to_dict().items() if k not in ("latent_seeds", "plan")}
    return {
        "action": "design" if new else "resume", "outdir": str(folder.path), "db": without_password(folder.url),
        **server.to_dict(), "latents": design.latents, "trials_per_annotator": design.quota,
        "design": content,
    }  # fmt: skip


def beside(command: click.Command) -> click.Command:
    """A sub-command of the labelling tool, on the study's database."""
    clone = copy.copy(command)
    clone.params = [copy.copy(p) for p in command.params]
    for parameter in clone.params:
        if isinstance(parameter, click.Option) and parameter.name == "db":
            parameter.show_default = "the study's"
    return clone


for command in (report, power, simulate, *(beside(c) for c in (add_annotator, revoke, annotators))):
    main.add_command(command)
