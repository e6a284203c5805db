"""What is done beside serving a study: the report, the power calculation, the simulation."""

import json
from pathlib import Path

import click

from eg3d_rlhf.cli import GroupedCommand, choose_device, option
from eg3d_rlhf.study import report as reports
from eg3d_rlhf.study.launch import Folder, flagged, power_options, study_rows
from eg3d_rlhf.study.power import PowerOptions, exact_power, sample_size
from eg3d_rlhf.study.simulate import SimulationOptions, coverage

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
