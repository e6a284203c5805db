"""The job `study`: designs and serves a blind comparison of two generators, and reports the results.

People see two shapes side by side without knowing which generator made them, and choose the better shape. The
design fixes the pairs, the number of trials and the analysis before the first answer. The subcommands `power`
and `simulate` compute how many trials a study needs.
"""

import contextlib
import functools
from dataclasses import asdict
from pathlib import Path

import click

from eg3d_rlhf.core.cli import (
    GroupedCommand,
    GroupedGroup,
    check_extra,
    choose_device,
    option,
    options_from_settings,
)
from eg3d_rlhf.core.input_paths import check_network
from eg3d_rlhf.modes.annotators import add_annotator, annotators, new_token, revoke
from eg3d_rlhf.modes.judge_labelling import (
    answer_with_judge,
    judge_labelling_options,
    judge_request,
    read_calibration,
)
from eg3d_rlhf.modes.label_origin import labels_from_option
from eg3d_rlhf.modes.shared_flags import FOLDER, count_option, print_json, rare_option
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.assets.collection import is_asset_folder
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
from eg3d_rlhf.preferences.provenance import ALL

_study_option = functools.partial(option, group="Study")

database = option(
    "--db",
    metavar="URL",
    show_default="study.db in the folder of --outdir",
    help="URL of the database in which the answers are stored.",
)


@click.command("report", cls=GroupedCommand, job="study report")
@option(
    "--outdir",
    metavar="DIR",
    type=FOLDER,
    show_default=str(OUTDIR),
    help="Folder of the study, into which the report is written.",
)
@database
@option(
    "--interim",
    is_flag=True,
    help="Write a report before the study is over; the report is marked as interim.",
)
@option(
    "--images",
    metavar="INT",
    type=click.IntRange(0, 50),
    default=6,
    help=(
        "Number of pairs with the highest, and of pairs with the lowest win rate of b that the report shows"
        " as images. With 0, no generator is loaded."
    ),
)
@labels_from_option()
def report(outdir: Path | None, db: str | None, interim: bool, images: int, labels_from: str) -> None:
    """Analyse a finished study as its design states, and write report.html and report.json. The result is
    that of people; --labels-from=all adds a panel for each judge that answered (study --judge).
    """
    # Imported here, so that --help is printed without loading this module.
    from eg3d_rlhf.people.study import study_report as reports

    # The command `study` stores its --outdir and --db here, in case they precede the word `report`.
    study_folder = click.get_current_context().meta.get("folder", Folder(OUTDIR))
    # A --db before the word `report` belongs to the --outdir before this word. It is ignored if another
    # folder is named.
    folder = Folder(outdir or study_folder.path, db or (study_folder.db if outdir is None else None))
    # raises an error if there is no design or no database
    design, answer_rows = study_rows(folder, ALL)
    # Finished assets have no generator that could render them again, so the report has no images of them.
    image_count = 0 if design.assets else images
    if image_count:
        click.echo(f"analysing, and rendering up to {2 * image_count} pairs ...", err=True)
    # --interim allows a report before the stopping rule is met.
    report_content = reports.compute(
        design, answer_rows, interim, image_count, str(choose_device("auto")), labels_from=labels_from
    )
    # the page, and its numbers as JSON
    for written_file in reports.write(report_content, folder.path):
        click.echo(written_file)
    for sentence in report_content["conclusions"]:
        click.echo(f"- {sentence}")
    click.echo(report_content["label_use"]["text"])


@click.command("power", cls=GroupedCommand)
@options_from_settings(PowerOptions)
@count_option("--annotators", default=1, group="Power", help="Number of people who answer.")
@count_option(
    "--annotators-per-pair",
    group="Power",
    show_default="2 with several annotators, else 1",
    help="Number of different people who answer each pair.",
)
@count_option(
    "--n",
    show_default="none",
    help="Number of independent trials without ties for which the power is also computed.",
)
@option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def power(n: int | None, as_json: bool, **options) -> None:
    """Compute the number of trials (answered pairs) that a study needs to detect a given win rate."""
    with flagged(options):
        # errors inside name the flag of the wrong value
        study_size = sample_size(power_options(launch.with_defaults(options, PowerOptions)))
    # The power of --n is added to the same JSON.
    power_values = asdict(study_size)
    if n is not None:
        power_values["power_of_n"] = {
            "n": n,
            # exact: from the binomial distribution, not from an approximation
            "power": float(exact_power(n, study_size.options.true_rate, study_size.options.alpha)),
        }
    if as_json:
        print_json(power_values)
        return
    click.echo(
        f"{study_size.trials} trials, {study_size.per_annotator} for each of {study_size.options.annotators}"
        " annotators"
    )
    click.echo(
        f"  {study_size.decided} independent trials without ties give power {study_size.attained:.3f} for a"
        f" win rate of {study_size.options.true_rate:g}"
    )
    click.echo(f"  design effect {study_size.design_effect:.2f}, ties {study_size.options.tie_share:.0%}")
    if n is not None:
        power_of_n = power_values["power_of_n"]["power"]
        click.echo(f"  {n} independent trials without ties give power {power_of_n:.3f}")


@click.command("simulate", cls=GroupedCommand)
@options_from_settings(SimulationOptions)
@rare_option(
    # Random sides are the reason why a preference for one side does not bias a study.
    "--random-sides/--fixed-sides",
    default=True,
    group="Truth",
    help=(
        "Show the shapes of a and b on random sides. With --fixed-sides, b is always on the left, so that a"
        " preference for one side biases the result."
    ),
)
@rare_option(
    "--bootstrap-studies",
    metavar="INT",
    type=click.IntRange(min=0),
    default=0,
    help="Number of simulated studies for which bootstrap intervals are also computed.",
)
@option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def simulate(bootstrap_studies: int, as_json: bool, **options) -> None:
    """Simulate studies whose true win rate is known. The table shows for each kind of interval how often it
    contains the true win rate, and how often it excludes 50 %.
    """
    with flagged(options):
        # the default of each setting replaces a flag that was not given
        simulation_options = SimulationOptions(**launch.with_defaults(options, SimulationOptions))
    # An interval at 95 % should contain the true rate in 95 % of the studies.
    coverage_result = coverage(simulation_options, bootstrap_studies)
    if as_json:
        print_json(coverage_result)
        return
    mean_text = f"truth {coverage_result['truth']:.3f}, mean {coverage_result['mean_win_rate']:.3f}"
    click.echo(
        f"{coverage_result['options']['studies']} studies of {coverage_result['trials']} trials; {mean_text}"
    )
    click.echo(
        f"left chosen in {coverage_result['left_share']:.1%}; design effect"
        f" {coverage_result['design_effect']:.2f}"
    )
    click.echo(f"{'interval':<22} {'studies':>7} {'covers':>8} {'width':>7} {'excludes 50 %':>15}")
    for interval_kind, interval_row in coverage_result["intervals"].items():
        click.echo(
            f"{interval_kind:<22} {interval_row['studies']:>7} {interval_row['coverage']:>8.1%}"
            f" {interval_row['width']:>7.3f} {interval_row['rejects_50_percent']:>15.1%}"
        )


def check_side(source: str) -> None:
    """Check that a side of a study is a folder of assets, or a network."""
    if not is_asset_folder(Path(source)):
        check_network(source)


@click.command("study", cls=GroupedGroup, invoke_without_command=True)
@_study_option(
    # The two generators. Their names in reports do not appear on the page.
    "--a",
    metavar="PATH",
    check=check_side,
    show_default="the generator from which the other one was tuned; else the bundled generator",
    help=(
        "First generator: a network file, a file of latents, a run folder, or a folder of finished assets"
        " with files PROMPT.glb."
    ),
)
@_study_option(
    "--b",
    metavar="PATH",
    check=check_side,
    show_default="the generator from which the other one was tuned; else the bundled generator",
    help=(
        "Second generator: a network file, a file of latents, a run folder, or a folder of finished assets."
    ),
)
@_study_option(
    "--label-a",
    metavar="NAME",
    show_default="the name of the file",
    rare=True,
    help="Name of the first generator in reports.",
)
@_study_option(
    "--label-b",
    metavar="NAME",
    show_default="the name of the file",
    rare=True,
    help="Name of the second generator in reports.",
)
@_study_option(
    "--n",
    metavar="INT",
    type=click.IntRange(min=1),
    show_default="computed from the power",
    help="Number of trials (answered pairs) after which the study ends.",
)
@_study_option(
    "--annotators-per-pair",
    metavar="INT",
    type=click.IntRange(min=1),
    show_default="2 with several annotators, else 1",
    help="Number of different people who answer each pair.",
)
# Flags of the design, and of the computation of the number of trials.
@options_from_settings(StudyDesign, PowerOptions)
@option(
    "--outdir",
    metavar="DIR",
    type=FOLDER,
    default=OUTDIR,
    help="Folder of the study, into which its design and answers are written.",
)
@rare_option(
    "--name",
    metavar="NAME",
    default=None,
    show_default="the name of the folder",
    help="Name of the study in reports.",
)
@database
@option("-n", "--dry-run", is_flag=True, help="Print the design of the study as JSON and stop.")
@judge_labelling_options()
@option(
    "--same-judge",
    is_flag=True,
    group="Judge",
    rare=True,
    help=(
        "State in the report that a model of the judge's family made the labels of the training, so that its"
        " panel is no independent evaluation."
    ),
)
@launch.server_options("access.jsonl in the folder", "Heading of the page that annotators see.")
@click.pass_context
def main(
    ctx: click.Context,
    outdir: Path,
    name: str | None,
    db: str | None,
    dry_run: bool,
    same_judge: bool,
    **flags,
) -> None:
    """Compare two generators in a blind study: design the study, serve it in the browser, and print the
    address of the page. With --judge, a vision-language model answers the same pairs as a panel of its own.
    The subcommand `report` analyses the answers.

    \b
    Example:
        python tools/study.py --a=before --b=after --n=300 --annotators=6
    """
    flags = launch.with_defaults(flags, StudyDesign, PowerOptions)
    # None as db: study.db in the folder
    folder = Folder(outdir, db)
    name = name or outdir.resolve().name
    ctx.obj = folder.url
    ctx.meta["folder"] = folder
    # Subcommands read --outdir and --db from the context. Other flags must follow their name.
    if ctx.invoked_subcommand is not None:
        launch.reject_flags_before(ctx, "outdir", "db")
        return
    # Fails at once if the packages of the label server are not installed.
    check_extra(EXTRA)
    server_flags = launch.ServerFlags.from_flags(flags, outdir)
    judge = judge_request(ctx, flags, folder.url)
    if judge is not None:
        read_calibration(judge)  # raises ValueError for a file that is no calibration of this judge
    elif same_judge:
        raise ValueError("--set same_judge applies to the panel of a judge. Pass --judge=URL, or remove it.")
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        dry_run_values = _dry_run(folder, name, flags, server_flags)
        print_json(dry_run_values | (judge.to_json() if judge is not None else {}))
        return
    add_command = f"python tools/study.py --outdir={folder.path} add-annotator NAME"
    # Annotators on other machines must log in, so at least one must exist. If there is no database yet, the
    # null context yields None, and `check_annotators` raises ValueError.
    if server_flags.exposed:
        with (
            open_store(folder.url, create=True) if store_exists(folder.url) else contextlib.nullcontext()
        ) as store_or_none:
            launch.check_annotators(store_or_none, server_flags.host, add_command)
    # Opens the study in the folder, or designs a new one. A stored design is never changed.
    design = prepare(
        folder,
        name,
        flags,
        launch.given_flags(ctx),
        lambda text: click.echo(text, err=True),
        needs_people=judge is None,
    )
    with open_store(folder.url, create=False) as store:
        if judge is not None:
            answer_with_judge(store, design.name, judge, {"same_judge": same_judge})
            click.echo(
                f"next: python tools/study.py report --outdir={folder.path} --labels-from=all (people and"
                " judges apart)"
            )
            return
        login_count = len(launch.annotators_with_access(store))
        launch.serve_campaign(
            store,
            folder.url,
            design.name,
            server_flags,
            lambda address: _announcement(address, design, add_command, login_count),
            "answer",
        )


def _announcement(address: str, design: StudyDesign, add_command: str, login_count: int) -> list[str]:
    """Return the lines that are printed when the server has started.

    Args:
        address: address of the page.
        design: design of the study.
        add_command: command that adds an annotator.
        login_count: number of annotators who have a login token.
    """
    lines = [f"study at {address}  (Ctrl-C stops)"]
    rules = design.exclusions
    if design.gold_every:
        lines.append(
            f"gold checks: one of {design.gold_every} trials shows a shape beside a damaged copy of it. The"
            f" report leaves out an annotator who answers fewer than {rules.gold_accuracy:.0%} of at least"
            f" {rules.gold_least} gold checks correctly; the result after five checks is printed here."
            " --gold-every=0 designs a study without them."
        )
    else:
        lines.append("gold checks: none")
    # A single person uses the server's own machine and needs no token.
    if design.annotators > 1:
        # negative if more annotators have a token than are planned
        missing_count = design.annotators - login_count
        token_text = (
            f"{login_count} have a login token, {missing_count} need one ({add_command})"
            if missing_count > 0
            else "all have a token"
        )
        lines.append(
            f"{design.annotators} annotators are planned: {token_text}; they log in at {address}login"
        )
    return lines


def _dry_run(folder: "Folder", name: str, flags: dict, server_flags: launch.ServerFlags) -> dict:
    """Return the JSON of --dry-run: the design of a new study, or the stored design of an existing study.

    Args:
        folder: folder and database of the study.
        name: name of a new study.
        flags: values of the command line.
        server_flags: settings of the web server.
    """
    # The design of an existing study is never changed.
    is_new = not folder.design.exists()
    if is_new:
        design = make_design(
            name,
            flags,
            lambda text: click.echo(f"Warning: {text}", err=True),
            launch.given_flags(click.get_current_context()),
        )
    else:
        design = designs.read_design(folder.design)
    # The lists of latents and trials are too long to print.
    design_values = {
        key: value for key, value in design.to_dict().items() if key not in ("latent_seeds", "plan")
    }
    return {
        "action": "design" if is_new else "resume",
        "outdir": str(folder.path),
        # the URL of a database server may contain a password
        "db": without_password(folder.url),
        **server_flags.to_dict(),
        "latents": design.latent_count,
        "trials_per_annotator": design.trial_quota,
        "design": design_values,
    }


def shown_by_help(context: click.Context) -> list[object]:
    """Return the values that --help shows as defaults, where they depend on other flags."""
    flags = launch.with_defaults(context.params, StudyDesign, PowerOptions)
    # Database, name and log follow from --outdir if they were not given.
    folder = Folder(flags["outdir"], flags["db"])
    return [
        {
            "db": folder.url,
            "name": flags["name"] or folder.path.resolve().name,
            "access_log": launch.ServerFlags.from_flags(flags, folder.path).access_log,
            "annotators_per_pair": power_options(flags).annotators_per_pair,
        }
    ]


main.resolved = shown_by_help
for command in (report, power, simulate, add_annotator, new_token, revoke, annotators):
    main.add_command(command)
