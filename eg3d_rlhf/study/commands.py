"""The command line of the blind study: design and serve it, report on it, and the calculations beside it."""

import contextlib
import copy
import json
from dataclasses import MISSING
from pathlib import Path

import click

from eg3d_rlhf.cli import GroupedCommand, choose_device, option
from eg3d_rlhf.label.commands import LabelGroup, add_annotator, annotators, revoke
from eg3d_rlhf.label.launch import (
    ServerFlags,
    check_annotators,
    given_flags,
    open_store,
    refuse_flags_before,
    serve_campaign,
    server_options,
)
from eg3d_rlhf.label.preferences import without_password
from eg3d_rlhf.label.shape_cache import DEFAULT_FOLDER
from eg3d_rlhf.study import report as reports
from eg3d_rlhf.study.design import ExclusionRules, StudyDesign, read_design
from eg3d_rlhf.study.launch import Folder, flagged, make_design, planned_trials, power_options, prepare, study_rows
from eg3d_rlhf.study.power import PowerOptions, SimulationOptions, coverage, exact_power, sample_size

OUTDIR = Path("runs/study")
_P, _S = PowerOptions(), SimulationOptions()


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
@option("--true-rate", metavar="0..1", type=float, default=_P.true_rate, help="Win rate among decided trials that must be shown.")
@option("--alpha", metavar="0..1", type=float, default=_P.alpha, help="False alarms.")
@option("--power", metavar="0..1", type=float, default=_P.power, help="Chance of showing the true rate.")
@option("--tie-share", metavar="0..1", type=float, default=_P.tie_share, help="Share of ties that is expected.")
@option("--annotators", metavar="INT", type=click.IntRange(min=1), default=_P.annotators, help="People who are asked.")
@option("--annotators-per-pair", metavar="INT", type=click.IntRange(min=1), default=None,
        show_default="2 where there are several", help="To judge each pair.")
@option("--annotator-icc", metavar="0..1", type=float, default=_P.annotator_icc, help="Correlation within annotators that is expected.")
@option("--latent-icc", metavar="0..1", type=float, default=_P.latent_icc, help="Correlation within pairs that is expected.")
@option("--n", metavar="INT", type=click.IntRange(min=1), default=None, help="Also give the power of so many independent decided trials.")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def power(n: int | None, as_json: bool, **options) -> None:
    """How many trials a study needs."""
    with flagged(options):
        size = sample_size(power_options(options))
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
@option("--studies", metavar="INT", type=click.IntRange(min=1), default=_S.studies, help="How many are simulated.")
@option("--annotators", metavar="INT", type=click.IntRange(min=1), default=_S.annotators, help="Per study.")
@option("--latents", metavar="INT", type=click.IntRange(min=1), default=_S.latents, help="Pairs per study.")
@option("--annotators-per-pair", metavar="INT", type=click.IntRange(min=1), default=_S.annotators_per_pair, help="To judge each pair.")
@option("--preference", metavar="0..1", type=float, default=_S.preference, help="True win rate of b among decided trials.")
@option("--left-bias", metavar="0..1", type=float, default=_S.left_bias, help="Chance of taking the left of two equals.")
@option("--annotator-sd", metavar="LOG-ODDS", type=float, default=_S.annotator_sd, help="Spread of the annotators.")
@option("--latent-sd", metavar="LOG-ODDS", type=float, default=_S.latent_sd, help="Spread of the pairs.")
@option("--tie-share", metavar="0..1", type=float, default=_S.tie_share, help="Share of ties.")
@option("--ties", type=click.Choice(["half", "excluded"]), default=_S.ties, help="How ties count.")
@option("--random-sides/--fixed-sides", default=_S.random_sides, help="Fixed: b is always on the left, which no study may do.")
@option("--seed", metavar="INT", type=click.IntRange(min=0), default=_S.seed, help="Of the simulation.")
@option("--bootstrap-studies", metavar="INT", type=click.IntRange(min=0), default=0, help="Evaluate the bootstraps on so many of them.")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def simulate(bootstrap_studies: int, as_json: bool, **options) -> None:
    """Studies with a known truth: how often each interval covers it, and how often each finds a difference."""
    with flagged(options):
        resolved = SimulationOptions(**options)
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


def default(owner: type, name: str) -> object:
    """The default of a field."""
    value = owner.__dataclass_fields__[name].default
    assert value is not MISSING, name
    return value


def owned(owner: type, name: str, group: str, **kwargs):
    """An option named and set as its owner's field."""
    return option(f"--{name.replace('_', '-')}", default=default(owner, name), group=group, **kwargs)


SHARE, RATE = click.FloatRange(0, 1), click.FloatRange(0, 1, min_open=True, max_open=True)


@click.command("study", cls=LabelGroup, invoke_without_command=True)
@option("--a", metavar="PATH", default=None, show_default="the bundled generator", group="Study", help="Network file or run folder.")
@option("--b", metavar="PATH", default=None, show_default="the bundled generator", group="Study", help="The one it is compared with.")
@option("--label-a", metavar="NAME", default=None, show_default="the file's name", group="Study", help="How reports call a.")
@option("--label-b", metavar="NAME", default=None, show_default="the file's name", group="Study", help="How reports call b.")
@option("--n", metavar="INT", type=click.IntRange(min=1), default=None, show_default="from the power calculation", group="Study",
        help="Trials after which the study is over.")
@option("--annotators", metavar="INT", type=click.IntRange(min=1), default=default(StudyDesign, "annotators"), group="Study",
        help="People who are asked.")
@option("--annotators-per-pair", metavar="INT", type=click.IntRange(min=1), default=None, show_default="2 where there are several",
        group="Study", help="Different annotators to judge each pair.")
@owned(StudyDesign, "seed", "Study", metavar="INT", type=click.IntRange(min=0), help="Decides latents, checks, order and sides.")
@owned(StudyDesign, "ties", "Study", type=click.Choice(["half", "excluded"]), help="How ties count.")
@owned(StudyDesign, "until", "Study", metavar="TIME", show_default="no end", help="ISO 8601 with offset: over then in any case.")
@owned(StudyDesign, "gold_every", "Study", metavar="TRIALS", type=click.IntRange(min=0), help="One gold check in so many trials; 0: none.")
@owned(PowerOptions, "true_rate", "Power", metavar="0..1", type=SHARE, help="Win rate among decided trials that must be shown.")
@owned(PowerOptions, "alpha", "Power", metavar="0..1", type=RATE, help="False alarms; intervals are of 1 - alpha.")
@owned(PowerOptions, "power", "Power", metavar="0..1", type=RATE, help="Chance of showing the true rate.")
@owned(PowerOptions, "tie_share", "Power", metavar="0..1", type=SHARE, help="Share of ties that is expected.")
@owned(PowerOptions, "annotator_icc", "Power", metavar="0..1", type=SHARE, help="Correlation within annotators that is expected.")
@owned(PowerOptions, "latent_icc", "Power", metavar="0..1", type=SHARE, help="Correlation within pairs that is expected.")
@owned(StudyDesign, "psi", "Shapes", metavar="0..2", type=click.FloatRange(0, 2), help="Truncation.")
@owned(StudyDesign, "level", "Shapes", metavar="FLOAT", type=float, help="Raw density of the surface.")
@owned(StudyDesign, "resolution", "Shapes", metavar="POINTS", type=click.IntRange(16, 512), help="Grid points per axis.")
@owned(StudyDesign, "triangles", "Shapes", metavar="INT", type=click.IntRange(100, 10**6), help="Per shape, about.")
@owned(ExclusionRules, "gold_accuracy", "Exclusions", metavar="0..1", type=SHARE, help="Annotators below it on gold checks are left out.")
@owned(ExclusionRules, "gold_least", "Exclusions", metavar="INT", type=click.IntRange(min=1), help="... after so many checks.")
@owned(ExclusionRules, "fast_milliseconds", "Exclusions", metavar="INT", type=click.IntRange(min=0), help="Faster trials are left out.")
@owned(ExclusionRules, "fast_share", "Exclusions", metavar="0..1", type=SHARE, help="Annotators with more fast trials are left out.")
@owned(ExclusionRules, "least_share", "Exclusions", metavar="0..1", type=SHARE, help="Annotators who did less of their share are left out.")
@owned(StudyDesign, "resamples", "Exclusions", metavar="INT", type=click.IntRange(min=100), help="Of the bootstraps in the report.")
@option("--outdir", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), default=OUTDIR, help="The study's folder.")
@option("--name", metavar="NAME", default=None, show_default="the folder's name", help="Of the study.")
@option("--db", metavar="URL", default=None, show_default="study.db in the folder", help="Database of the answers.")
@option("--cache", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_FOLDER, help="Where shapes are kept.")
@option("-n", "--dry-run", is_flag=True, help="Print the design or the study's state as JSON and stop.")
@server_options("access.jsonl in the folder", "Heading of the page; annotators read it.")
@click.pass_context
def main(ctx: click.Context, outdir: Path, name: str | None, db: str | None, dry_run: bool, **flags) -> None:
    """Compare two generators blind: designs the study, serves it and prints the address; then `report`.

    \b
    Example:
        python tools/study.py --a=before --b=after --n=300 --annotators=6
    """
    folder, name = Folder(outdir, db), name or outdir.resolve().name
    ctx.obj, ctx.meta["folder"] = folder.url, folder
    if ctx.invoked_subcommand is not None:
        refuse_flags_before(ctx, "outdir", "db")
        return
    server = ServerFlags.of(flags, outdir)
    if dry_run:
        click.echo(json.dumps(_dry_run(folder, name, flags, server), indent=1))
        return
    make = f"python tools/study.py --outdir={folder.path} add-annotator NAME"
    if server.exposed:
        with open_store(folder.url, create=True) if folder.has_store else contextlib.nullcontext() as known:
            check_annotators(known, server.host, make)
    design, _ = prepare(folder, name, flags, given_flags(ctx), lambda text: click.echo(text, err=True))
    with open_store(folder.url, create=False) as store:
        serve_campaign(store, folder.url, design.name, server, lambda address: _announcement(address, design, make), "answer")


def _announcement(address: str, design: StudyDesign, make: str) -> list[str]:
    tokens = f"{design.annotators} annotators are planned: each needs a token ({make}) and logs in at {address}login"
    return [f"study at {address}  (Ctrl-C stops)", *([tokens] if design.annotators > 1 else [])]


def _dry_run(folder: Folder, name: str, flags: dict, server: ServerFlags) -> dict:
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
        if parameter.name == "db":
            parameter.show_default = "the study's"
    return clone


for command in (report, power, simulate, *(beside(c) for c in (add_annotator, revoke, annotators))):
    main.add_command(command)
