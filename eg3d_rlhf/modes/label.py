"""The job `label`, which serves the labelling page, and its subcommands for the stored answers.

The answers are stored in a database. A labelling project, which the database calls a campaign, is a list of
planned pairs with the settings of its page. The subcommands export the answers, import answers, and rank
generators.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from eg3d_rlhf.core.cli import (
    GroupedCommand,
    GroupedGroup,
    check_extra,
    option,
    options_from_settings,
    prefix_errors,
)
from eg3d_rlhf.core.input_paths import check_latents_file, check_network, check_reward_file, find_network
from eg3d_rlhf.core.seeds import reject_held_out_seeds
from eg3d_rlhf.modes.annotators import PEOPLE, database, known_database
from eg3d_rlhf.modes.judge_labelling import (
    JudgeRequest,
    answer_with_judge,
    judge_labelling_options,
    judge_request,
    read_calibration,
)
from eg3d_rlhf.modes.label_origin import labels_from_option
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.assets.collection import check_collection_path, read_collection
from eg3d_rlhf.people.label.db_flag import DATABASE, DB, EXTRA, open_store, sqlite_file, store_exists
from eg3d_rlhf.people.label.entities import QUESTIONS, CampaignSettings, Kind, Mode, parse_questions
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.people.label.store_labels import (
    LabelFilters,
    export_assets,
    export_labels,
    export_mode,
    export_pairs,
    export_unpaired,
    label_use,
    store_label_use,
    without_password,
)
from eg3d_rlhf.preferences.labels import CSV_SUFFIXES
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES
from eg3d_rlhf.preferences.provenance import ALL, is_used
from training.storage import kind_of

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

MAKE = "python tools/label.py add-annotator NAME"  # command that adds an annotator, for messages


def _archive(function_name: str, *args, **options) -> Any:
    """Call a function of eg3d_rlhf/people/label/archive.py by its name, and return its result.

    That module needs an optional package. It is imported only here, so that --help works without the package.

    Args:
        function_name: name of the function.
        args: positional arguments of the function.
        options: keyword arguments of the function.
    """
    from eg3d_rlhf.people.label import archive

    return getattr(archive, function_name)(*args, **options)


# By value of --kind of an export: the allowed suffixes of the file, and the function that writes the file.
KINDS: dict[str, tuple[tuple[str, ...], Callable]] = {
    "labels": ((".jsonl", ".csv"), export_labels),
    "unpaired": ((".jsonl",), export_unpaired),
    "judgements": ((".jsonl",), functools.partial(_archive, "export_judgements")),
    "ranked-seeds": ((".csv",), functools.partial(_archive, "export_ranked_seeds")),
    "pairs-jsonl": ((".jsonl",), export_pairs),
    **{
        # the three exports of assets share one function
        kind: ((".jsonl",), functools.partial(export_assets, label_format=kind))
        for kind in ("asset-pairs", "rankings", "asset-scores")
    },
}
_pairs_option = functools.partial(option, group="Pairs")


class LabelGroup(GroupedGroup):
    """Command `label` with its subcommands. Shell completion also offers jobs such as `label elo`."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return completions of subcommands and flags, and of the jobs whose first word is `label`."""
        from eg3d_rlhf.modes.jobs import JobGroup

        # `label elo` is a job of its own and no subcommand of this group.
        return super().shell_complete(ctx, incomplete) + JobGroup("label").shell_complete(ctx, incomplete)


@click.command("label", cls=LabelGroup, job="label", invoke_without_command=True)
@_pairs_option(
    "--network",
    metavar="PATH",
    check=check_network,
    show_default="the bundled generator",
    help="Generator whose shapes are labelled: a network file or a run folder.",
)
@_pairs_option(
    "--latents",
    metavar="FILE",
    check=check_latents_file,
    show_default="none; new samples of --network",
    help=(
        "File of latents (.safetensors) whose shapes are labelled, as generator improve writes it. Its"
        " latents are numbered from 0 on."
    ),
)
@_pairs_option(
    "--assets",
    metavar="PATH",
    check=check_collection_path,
    show_default="none; the shapes of --network are labelled",
    help=(
        "Finished assets to label (GLB, PLY, OBJ, splats, videos): a folder with files GENERATOR/PROMPT.glb,"
        " or a .jsonl file that lists the assets."
    ),
)
@_pairs_option(
    "--up",
    type=click.Choice(["y", "z"]),
    default="y",
    help="Coordinate axis that points up in the assets of --assets.",
)
# Flags of the choice of the pairs: number, strategy, seeds.
@options_from_settings(PairingOptions)
@_pairs_option(
    "--reward",
    "rewards",
    check=check_reward_file,
    metavar="FILE",
    multiple=True,
    show_default="--strategy=active: a reward of the answers so far; close: the bundled rewards",
    help=(
        "Reward file of the ensemble whose scores choose the pairs for --strategy=active or close. May be"
        " repeated."
    ),
)
@_pairs_option(
    "--after",
    metavar="NAME",
    help=(
        "Name of the campaign (labelling project) whose results decide the pairs of this round, in a"
        " tournament of several rounds."
    ),
)
# Flags of the page, such as the share of pairs that are shown twice.
@options_from_settings(CampaignSettings)
@_pairs_option(
    "--show-render/--no-show-render",
    default=False,
    rare=True,
    help="Offer annotators a button that shows the RGB render of a shape as well.",
)
@_pairs_option(
    "--both-bad/--no-both-bad",
    default=True,
    rare=True,
    help="Offer the answer 'both are bad'; without effect if single shapes are labelled (--single).",
)
@_pairs_option(
    "--criteria",
    "questions",
    metavar="LIST",
    default="",
    show_default="none",
    help=(
        "Further questions about each pair, besides which shape is better, separated by commas:"
        f" {', '.join(QUESTIONS)}, or NAME=TEXT for a question of your own."
    ),
)
@_pairs_option(
    "--reveal/--no-reveal",
    default=False,
    rare=True,
    help="Show annotators the names of the generators after each answer.",
)
@option("--db", metavar="URL", default=DB, help=DATABASE)
@option(
    "--campaign",
    metavar="NAME",
    default="labels",
    help="Name of the campaign (labelling project) in the database. An existing campaign is resumed.",
)
@option(
    "-n",
    "--dry-run",
    is_flag=True,
    help=(
        "Print the resolved settings as JSON and stop. With --assets, the files are read, and what the page"
        " cannot show is named."
    ),
)
@judge_labelling_options()
@launch.server_options("access.jsonl beside the database")
@click.pass_context
def main(
    ctx: click.Context,
    db: str,
    campaign: str,
    network: str | None,
    latents: str | None,
    assets: str | None,
    after: str | None,
    rewards: tuple,
    dry_run: bool,
    **flags,
) -> None:
    """Label pairs of shapes, or single shapes, in the browser. The command prints the address of the page.

    \b
    Example:
        python tools/label.py --network=runs/00001-x --pairs=1000
        python tools/label.py --assets=FOLDER --pairs=200 --campaign=chairs
        python tools/label.py add-annotator ann
        python tools/label.py --host=0.0.0.0
        python tools/label.py --judge=http://127.0.0.1:8000/v1 --judge-model=NAME --judge-family=qwen
    """
    # Subcommands read --db from `ctx.obj` if it does not follow their own name.
    ctx.obj = db
    # With a subcommand, this function does nothing else: click calls the subcommand next.
    if ctx.invoked_subcommand is not None:
        launch.reject_flags_before(ctx, "db")
        return
    # Fails at once if the packages of the label server are not installed.
    check_extra(EXTRA)
    judge = judge_request(ctx, flags, db)
    if judge is not None:
        read_calibration(judge)  # raises ValueError for a file that is no calibration of this judge
    if latents is not None:
        network, flags = _latents_as_network(ctx, latents, network, assets, flags)
    elif network is not None and kind_of(network) == "latents":
        raise ValueError(
            f"--network={network}: this is a file of latents and no network. Pass it with"
            f" --latents={network}."
        )
    request, given_names = _request(ctx, campaign, network, assets, after, rewards, flags)
    # A resumed campaign is compared with the flags that were typed; the file is its network.
    given_names |= {"network"} if latents is not None else set()
    if judge is not None and request.pairing.single:
        raise ValueError(
            f"--judge cannot be combined with --single={request.pairing.single}, because a judge compares"
            " pairs."
            " Remove one of them."
        )
    if judge is not None and request.pairing.learns:
        raise ValueError(
            f"--judge cannot be combined with --strategy={request.pairing.strategy} without rewards, which"
            " chooses pairs by the answers of people. Use --strategy=random."
        )
    # the settings of the flags, which are compared with the stored settings if the campaign is resumed
    requested_settings = request.to_json()
    server_flags = server_of(flags, db)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        click.echo(
            json.dumps(
                _dry_run(db, request, server_flags, requested_settings, given_names)
                | (judge.to_json() if judge is not None else {}),
                indent=1,
                default=str,
            )
        )
        return
    _start(db, request, server_flags, requested_settings, given_names, judge)


def server_of(flags: Mapping, db: str) -> launch.ServerFlags:
    """Build the settings of the web server.

    Its access log lies beside the file of the database by default.

    Args:
        flags: values of the command line.
        db: URL of the database.
    """
    # The database of a database server has no folder, so its access log is written to runs/labels.
    path = sqlite_file(db)
    return launch.ServerFlags.from_flags(flags, path.parent if path else Path("runs/labels"))


def _request(
    ctx: click.Context,
    campaign: str,
    network: str | None,
    assets: str | None,
    after: str | None,
    rewards: tuple,
    flags: dict,
) -> tuple[launch.Request, set[str]]:
    """Check the flags, and build the description of a labelling project from them.

    Args:
        ctx: context of the command.
        campaign: name of the project.
        network: value of --network.
        assets: value of --assets.
        after: value of --after.
        rewards: values of --reward.
        flags: values of the other flags.

    Returns: the description, and the names of the flags that were typed.

    Raises: ValueError or FileNotFoundError that names the flag.
    """
    given_names = launch.given_flags(ctx)
    if assets is not None:
        _reject_generator_flags(ctx, given_names)
    elif "up" in given_names:
        raise ValueError(
            "--up has an effect only with --assets, because the shapes of a generator always stand upright."
            " Remove --up."
        )
    # replaces None by the default of the setting
    flags = launch.with_defaults(flags, PairingOptions, CampaignSettings)
    if after is not None and not STRATEGIES[flags["strategy"]].reads_answers:
        strategy_names = " or ".join(
            strategy_name for strategy_name, strategy in STRATEGIES.items() if strategy.reads_answers
        )
        raise ValueError(
            f"--after cannot be combined with --strategy={flags['strategy']}, which does not read earlier"
            f" answers. Use --strategy={strategy_names}, or remove --after."
        )
    # `rewards` comes from the flag --reward, the other fields have the names of their flags.
    pairing_options = PairingOptions(
        rewards=rewards,
        **{
            setting_name: flags[setting_name]
            for setting_name in PairingOptions.__dataclass_fields__
            if setting_name != "rewards"
        },
    )
    network_file = find_network(network).resolve() if network else None
    # settings that are stored with the campaign
    campaign_settings = {setting_name: flags[setting_name] for setting_name in launch.SETTINGS}
    campaign_settings["questions"] = tuple(
        question_name.strip() for question_name in flags["questions"].split(",") if question_name.strip()
    )
    # A single shape has no second side, so sides cannot be swapped, and 'both are bad' is no answer.
    if pairing_options.single:
        campaign_settings |= {
            setting_name: value
            for setting_name, value in (("swap_share", 0.0), ("both_bad", False))
            if setting_name not in given_names
        }
    request = launch.Request(
        name=campaign,
        # Paths are absolute: the campaign may be resumed from another folder.
        network=str(network_file) if network_file else None,
        after=after,
        pairing=pairing_options,
        settings=campaign_settings,
        assets=str(Path(assets).resolve()) if assets else None,
        up=flags["up"],
    )
    # This question asks how well an asset matches its prompt.
    if "prompt" in campaign_settings["questions"] and assets is None:
        raise ValueError(
            "--criteria: the question 'prompt' needs --assets, because the shapes of a generator have no"
            " prompts. Remove prompt from --criteria."
        )
    parse_questions(campaign_settings["questions"])  # raises ValueError for an unknown criterion
    request.campaign_settings({})  # checks the shares of repeated and swapped pairs before anything slow
    return request, given_names


def _latents_as_network(
    ctx: click.Context, latents: str, network: str | None, assets: str | None, flags: dict
) -> tuple[str, dict]:
    """Return the flags of a project on a file of latents, which is a generator with finitely many shapes.

    Args:
        ctx: context of the command.
        latents: value of --latents.
        network: value of --network.
        assets: value of --assets.
        flags: values of the other flags.

    Returns: the value of --network, and the values of the other flags.

    Raises: ValueError for a flag that has no effect on stored latents, or if a latent came from a seed that
        is held out for evaluation.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.generators.stored_latents import LatentsFile

    other_flags = [
        flag for flag, value in (("--network", network), ("--assets", assets)) if value is not None
    ] + launch.named_flags(ctx, launch.given_flags(ctx) & {"first_seed", "psi"})
    if other_flags:
        raise ValueError(
            f"{', '.join(other_flags)} cannot be combined with --latents={latents}, because the file states"
            f" its generator and its latents. Remove {', '.join(other_flags)}."
        )
    with prefix_errors("--latents"):
        stored = LatentsFile.load(latents)
    # Labels of improved held-out samples would train a reward on the samples of the evaluation.
    reject_held_out_seeds(stored.seeds, f"--latents={latents}")
    return latents, {**flags, "first_seed": 0, "psi": stored.psi}


def _reject_generator_flags(ctx: click.Context, given_names: set[str]) -> None:
    """Raise ValueError if flags were given that describe how a generator is sampled.

    Such flags have no effect on finished assets.

    Args:
        ctx: context of the command.
        given_names: names of the flags that were typed.
    """
    # names of the flags that decide how shapes are sampled and extracted from a generator
    sampling_flags = {
        "network",
        "show_render",
        "first_seed",
        "psi",
        "level",
        "resolution",
        "triangles",
        "pool",
    }
    if unsuitable_flags := launch.named_flags(ctx, given_names & sampling_flags):
        raise ValueError(
            f"{', '.join(unsuitable_flags)} cannot be combined with --assets, because no generator is"
            " sampled. Remove the flag."
        )


def _dry_run(
    db: str,
    request: launch.Request,
    server_flags: launch.ServerFlags,
    requested_settings: dict,
    given_names: set[str],
) -> dict:
    """Return the JSON of --dry-run: the name and the settings of the project, and whether it is resumed.

    Args:
        db: URL of the database.
        request: description of the labelling project.
        server_flags: settings of the web server.
        requested_settings: settings of the flags.
        given_names: names of the flags that were typed.
    """
    # An existing project is resumed with its stored settings, not with the settings of the flags.
    is_resumed = False
    if store_exists(db):
        with open_store(db, create=False) as store:
            stored_campaign = store.campaign(request.name)
            if stored_campaign is not None:
                is_resumed = True
                # raises ValueError if a typed flag differs from the stored value
                requested_settings = dict(
                    launch.check_resumed(stored_campaign, requested_settings, given_names)
                )
    read_assets = {}
    # Faults of asset files are named before people work with them. A resumed project is planned already.
    if request.assets is not None and not is_resumed:
        with prefix_errors("--assets"):
            collection = read_collection(Path(request.assets), lenient=request.lenient)
        read_assets = {
            "read": {
                "assets": len(collection.assets),
                "generators": collection.generators,
                "untextured": sum(asset.untextured for asset in collection.assets),
                "notes": collection.notes,
            }
        }
    return {
        "campaign": request.name,
        "action": "resume" if is_resumed else "plan",
        **read_assets,
        **requested_settings,
        **server_flags.to_dict(),
        # the URL of a database server may contain a password
        "db": without_password(db),
        "access_log": str(server_flags.access_log),
    }


def _start(
    db: str,
    request: launch.Request,
    server_flags: launch.ServerFlags,
    requested_settings: dict,
    given_names: set[str],
    judge: JudgeRequest | None,
) -> None:
    """Serve the labelling page of a project until Ctrl-C. Plan the pairs first if the project is new.

    A judge answers the pairs at once, and no page is served then.

    Args:
        db: URL of the database.
        request: description of the labelling project.
        server_flags: settings of the web server.
        requested_settings: settings of the flags.
        given_names: names of the flags that were typed.
        judge: judge that answers in place of people; None: people answer.

    Raises: ValueError if the project exists and was planned with other settings, or if annotators must log in
        and there is no annotator.
    """
    planned_campaign = None
    # Without a database, the pairs are planned before it is created, so that an error leaves no empty file.
    if not store_exists(db):
        if server_flags.exposed:
            # None: a database that does not exist has no annotators, so this always raises an error
            launch.check_annotators(None, server_flags.host, MAKE)
        # slow, because it generates shapes
        planned_campaign = launch.plan_campaign(None, request, click.echo)
    with open_store(db, create=True) as store:
        # Annotators on other machines must log in, so at least one must exist before the server starts.
        if server_flags.exposed:
            launch.check_annotators(store, server_flags.host, MAKE)
        campaign = store.campaign(request.name)
        if campaign is None:
            # `planned_campaign` is set if the database did not exist a moment ago
            campaign_settings, planned_pairs = planned_campaign or launch.plan_campaign(
                store, request, click.echo
            )
            store.create_campaign(campaign_settings, planned_pairs)
            state = "planned"
        else:
            # raises ValueError if a typed flag differs from the stored value
            launch.check_resumed(campaign, requested_settings, given_names)
            state = "resumed"
        campaign = store.campaign(request.name)
        assert campaign is not None
        click.echo(f"campaign {request.name!r}: {state}, {launch.campaign_line(store, campaign)}")
        if judge is not None:
            answer_with_judge(store, request.name, judge)
            return
        login_lines = []
        if server_flags.exposed:
            annotator_count = len(launch.annotators_with_access(store))
            login_lines.append(
                f"other machines can reach this server with a login token: {annotator_count} annotators can"
                " log in; add-annotator NAME adds one"
            )
        launch.serve_campaign(
            store,
            db,
            request.name,
            server_flags,
            lambda address: [f"label at {address}  (Ctrl-C stops)", *login_lines],
            "judgement",
        )


@click.command("export", cls=GroupedCommand, job="label export")
@click.argument("out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@option(
    "--kind",
    type=click.Choice(tuple(KINDS)),
    default="labels",
    help=(
        "Content of the file. labels: labelled pairs (.jsonl, .csv); unpaired: labels of single shapes"
        " (.jsonl); judgements: all answers with all their fields (.jsonl); ranked-seeds: a table of ranked"
        " seeds, as published with the paper of the density reward (.csv); asset-pairs: pairs of asset files"
        " (.jsonl); rankings: one ranking of assets for each prompt (.jsonl); asset-scores: scores of single"
        " assets (.jsonl); pairs-jsonl: pairs of asset files in the open format of data sets, with criterion"
        " and provenance (.jsonl)."
    ),
)
@option(
    "--campaign",
    metavar="NAME",
    default=None,
    show_default="all",
    help="Name of the campaign (labelling project) whose answers are exported.",
)
@option(
    "--annotator",
    "annotators",
    metavar="NAME",
    multiple=True,
    show_default="all",
    help="Name of an annotator whose answers are exported. May be repeated.",
)
@option(
    "--least-gold-accuracy",
    metavar="0..1",
    type=click.FloatRange(0, 1),
    show_default="no limit",
    help=(
        "Smallest accuracy of an annotator on gold pairs, whose correct answer is known. Answers of less"
        " accurate annotators, and of annotators without gold pairs, are left out."
    ),
)
@option(
    "--drop-repeats",
    is_flag=True,
    help="Export only the first answer of each annotator to a pair that was shown several times.",
)
@option(
    "--criterion",
    metavar="NAME",
    show_default="which is better",
    help="Name of the question whose answers are exported, one of --criteria of eg3d-rlhf label.",
)
@labels_from_option()
@option(
    "--from-pairs",
    is_flag=True,
    help=(
        "In labels of single shapes or assets (--kind=unpaired or asset-scores), also label both shapes of a"
        " pair as not good if its answer is 'both are bad'."
    ),
)
@database
@click.pass_context
def export(
    ctx: click.Context, out: Path, kind: str, campaign: str | None, db: str, from_pairs: bool, **filters
) -> None:
    """Write the labels or the judgements of a database to FILE."""
    if from_pairs and kind not in ("unpaired", "asset-scores"):
        raise ValueError(
            f"--from-pairs cannot be combined with --kind={kind}. Use --kind=unpaired or"
            " --kind=asset-scores, or remove --from-pairs."
        )
    if from_pairs and filters["criterion"]:
        raise ValueError(
            f"--from-pairs cannot be combined with --criterion={filters['criterion']}, because 'both are"
            " bad' is no answer to that question. Remove one of the flags."
        )
    allowed_suffixes, write_export = KINDS[kind]
    if out.suffix not in allowed_suffixes:
        raise ValueError(
            f"FILE: the name {out.name} does not end in {' or '.join(allowed_suffixes)}, as --kind={kind}"
            " requires. Choose a name with this ending."
        )
    # This export is a complete copy of all answers, so filters must not leave out any of them.
    if kind == "judgements":
        if used_filters := launch.named_flags(ctx, launch.given_flags(ctx) & set(filters)):
            raise ValueError(
                f"{', '.join(used_filters)} cannot be combined with --kind=judgements, which is unfiltered."
                " Remove the flag."
            )
        filters = {}
    with open_store(db, create=False) as store:
        # only two of the functions have the argument from_pairs
        write_export(store, out, campaign=campaign, **filters, **({"from_pairs": True} if from_pairs else {}))
        # The complete copy has no filters. For the others: who was left out, and why a file is empty.
        label_filters = None if kind == "judgements" else LabelFilters(campaign=campaign, **filters)
        remarks = []
        if label_filters is not None:
            mode = export_mode(kind, from_pairs)
            judgements = list(store.judgements(campaign, label_filters.annotators, labels_from=ALL))
            remarks = [store_label_use(store, label_filters, mode).text()]
            remarks += [label_filters.explain(judgements, mode), *label_filters.untrusted(judgements, mode)]
    with out.open(encoding="utf-8") as exported_file:
        # The first line of a CSV file is its header. True counts as 1.
        line_count = sum(1 for _ in exported_file) - (out.suffix == ".csv")
    click.echo(f"{out}: {line_count} line{'s' if line_count != 1 else ''} written")
    if from_pairs and not line_count:
        remarks.append("no pair was answered 'both are bad'")
    for remark in remarks:
        click.echo(remark, err=True)


@click.command("import", cls=GroupedCommand)
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@option(
    "--campaign",
    metavar="NAME",
    show_default="the name of the file",
    help="Name of the campaign (labelling project) that is created for a table of ranked seeds.",
)
@option(
    "--annotator",
    metavar="NAME",
    default=None,
    show_default="imported",
    help="Name of the annotator of a table of ranked seeds.",
)
@database
def import_(source: Path, campaign: str | None, annotator: str | None, db: str) -> None:
    """Import FILE into a database. FILE holds exported judgements (.jsonl) or a table of ranked seeds
    (.csv).
    """
    suffix = source.suffix.lower()
    if suffix not in (".jsonl", *CSV_SUFFIXES):
        raise ValueError(
            f"FILE: the name {source.name} ends neither in .jsonl (judgements) nor in .csv (ranked seeds)."
            " Name a file of one of these two kinds."
        )
    if suffix == ".jsonl" and (campaign or annotator):
        raise ValueError(
            "--campaign and --annotator apply to ranked seeds (.csv) only, because exported judgements"
            " (.jsonl) contain both names. Remove these flags."
        )
    with open_store(db, create=True) as store:
        if suffix in CSV_SUFFIXES:
            # One annotator, "imported" by default, is recorded for all answers of the table.
            judgement_count = _archive(
                "import_ranked_seeds", store, source, campaign, annotator or "imported"
            )
        else:
            judgement_count = _archive("import_judgements", store, source)
    click.echo(f"{source}: {judgement_count} judgements imported")


@click.command("leaderboard", cls=GroupedCommand, job="label leaderboard")
@option(
    "--campaign",
    metavar="NAME",
    show_default="all that collect preferences",
    help="Name of the campaign (labelling project) whose generators are ranked.",
)
@option(
    "--criterion",
    metavar="NAME",
    show_default="which is better",
    help="Name of the question whose answers are used, one of --criteria of eg3d-rlhf label.",
)
@labels_from_option()
@option("--json", "as_json", is_flag=True, help="Print the ranking as JSON.")
@database
def leaderboard(
    campaign: str | None, criterion: str | None, labels_from: str, as_json: bool, db: str
) -> None:
    """Rank the generators whose shapes were compared, and print 95 % intervals of their scores."""
    # Imported here, so that --help is printed without loading this module.
    from eg3d_rlhf.people.label.quality import as_text, leaderboard_of

    with open_store(db, create=False) as store:
        _check_campaign(store, campaign)
        # a list, because the rows cannot be read after the database is closed
        all_judgements = list(store.judgements(campaign, labels_from=ALL))
    judgements = [judgement for judgement in all_judgements if is_used(judgement.provenance, labels_from)]
    use = label_use((judgement for judgement in all_judgements if judgement.kind is Kind.PAIR), labels_from)
    # names of all questions with answers, except which shape is better
    criteria = sorted({question_name for judgement in judgements for question_name in judgement.votes})
    if criterion is not None and criterion not in criteria:
        raise ValueError(
            f"--criterion: the question {criterion} has no answers. Questions with answers:"
            f" {', '.join(criteria) or 'none'}. Use one of these names, or remove --criterion."
        )
    # Only answers to planned pairs of two generators count, not repeats, gold pairs or answers of studies.
    ranking = leaderboard_of(judgements, criterion)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "campaign": campaign,
                    "question": criterion,
                    **ranking.to_dict(),
                    "label_use": use.to_dict(),
                },
                indent=1,
                ensure_ascii=False,
            )
        )
    else:
        click.echo(use.text("answers"))
        click.echo(as_text(ranking))


def _check_campaign(store: "Store", campaign: str | None) -> None:
    """Raise ValueError if the campaign does not exist or does not collect preferences.

    Args:
        store: the opened database.
        campaign: name of the campaign; None: all campaigns that collect preferences, so nothing is checked.
    """
    stored_campaign = store.campaign(campaign) if campaign is not None else None
    if campaign is not None and stored_campaign is None:
        raise ValueError(
            f"--campaign: {campaign} is not in this database. Use one of the campaigns that `eg3d-rlhf label"
            " status` lists."
        )
    if stored_campaign is not None and stored_campaign.settings.mode is not Mode.LABEL:
        # A study is analysed by its own command, because its design fixes the analysis.
        remedy = (
            "Run tools/study.py report for its result."
            if stored_campaign.settings.mode is Mode.STUDY
            else "Name another campaign."
        )
        raise ValueError(
            f"--campaign: {campaign} does not collect preferences, because its mode is"
            f" {stored_campaign.settings.mode}. {remedy}"
        )


# `resolved` returns the values that --help shows as defaults (`GroupedCommand`).
main.resolved = lambda context: [{"access_log": server_of(context.params, context.params["db"]).access_log}]
for command in (*PEOPLE.values(), export, import_, leaderboard):
    command.resolved = known_database
    main.add_command(command)
