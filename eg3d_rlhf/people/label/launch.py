"""Planning of a labelling campaign from flags, and start of the label server.

A campaign that is stored already is continued instead of planned.
"""

import functools
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from eg3d_rlhf.core.cli import combine_decorators, file_hash, option, prefix_errors
from eg3d_rlhf.people.label.assets.collection import (
    Collection,
    answered_pairs,
    answers_of,
    plan_assets,
    prompts_json,
    read_collection,
)
from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.people.label.entities import (
    JUDGE,
    LOCAL,
    PAIR_TOTAL,
    CampaignSettings,
    JudgementRow,
    Kind,
    Mode,
    PlannedPair,
    StoredCampaign,
)
from eg3d_rlhf.people.label.pairing import PairingOptions, check_surfaces, plan, reward_ensemble
from eg3d_rlhf.people.label.preparation import Preparation
from eg3d_rlhf.people.label.server.options import AppOptions, is_loopback
from eg3d_rlhf.people.label.shape_files import DEFAULT_FOLDER, ShapeCache
from eg3d_rlhf.people.label.store_labels import LabelFilters, kept_judgements, store_preferences
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES, Ensemble, Scored, check_rewards
from eg3d_rlhf.preferences.provenance import ALL
from training.config import knobs_of

if TYPE_CHECKING:
    from eg3d_rlhf.generators import LoadedGenerator
    from eg3d_rlhf.people.label.store import Store

# Names of the flags that become fields of CampaignSettings, and not of PairingOptions.
SETTINGS = (
    *(field.name for field, _, _ in knobs_of(CampaignSettings)),
    "show_render",
    "both_bad",
    "questions",
    "reveal",
)
FLAGS = "flags"  # key of a campaign's `extra` under which the flags are stored
_MESHES = ("glb", "obj", "ply")  # kinds of files that a mesh reward can read
_server_option = functools.partial(option, group="Server")


def with_defaults(flags: Mapping, *settings_classes: type) -> dict:
    """Replace the value None of each flag that was not passed by the default of the setting of this name.

    Args:
        flags: value of each flag; None for a flag that was not passed.
        settings_classes: dataclasses whose settings (fields made by `training.config.knob`) have the names of
            the flags.
    """
    defaults: dict = {}
    for settings_class in settings_classes:
        defaults |= {field.name: field.default for field, _, _ in knobs_of(settings_class)}
    return {name: defaults.get(name) if value is None else value for name, value in flags.items()}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Labelling campaign as the flags of a command describe it."""

    name: str  # name of the campaign
    network: str | None  # network file; None: the bundled generator
    # name of the earlier campaign whose results decide the pairs of this round of a tournament; None: no
    # results
    after: str | None
    pairing: PairingOptions
    settings: Mapping  # values of the flags in SETTINGS
    # folder or list of asset files that are compared instead of samples of a generator
    assets: str | None = None
    up: str = "y"  # axis of the asset files that points up
    lenient: bool = False  # True leaves out asset files that cannot be shown, and reports them

    def to_json(self) -> dict:
        """Return the flags as JSON values, as a campaign's `extra` stores them."""
        # The values must equal those that are read from JSON at the next start, so tuples become lists.
        pairing_flags = {**asdict(self.pairing), "rewards": list(self.pairing.rewards)}
        settings_flags = {**self.settings, "questions": list(self.settings["questions"])}
        # a campaign on a generator has no flags of asset files
        asset_flags = {"assets": self.assets, "up": self.up} if self.assets else {}
        return {
            "network": self.network,
            **asset_flags,
            "after": self.after,
            **pairing_flags,
            **settings_flags,
        }

    def campaign_settings(self, extra: Mapping) -> CampaignSettings:
        """Return the settings of the campaign.

        Args:
            extra: further JSON values that are stored with the campaign.
        """
        # A campaign of pairs uses the default mode and the default scale.
        scale_settings = {"mode": Mode.SINGLE, "scale": self.pairing.single} if self.pairing.single else {}
        all_settings = {**self.settings, **scale_settings}
        return CampaignSettings(name=self.name, seed=self.pairing.seed, extra=dict(extra), **all_settings)


def check_resumed(
    campaign: StoredCampaign,
    flags: Mapping,
    written_flags: set[str],
    other_campaign_flag: str = "--campaign=NAME",
) -> dict:
    """Check that the flags of a command agree with the flags from which a stored campaign was planned.

    Args:
        campaign: stored campaign that is continued.
        flags: values of the flags of the command.
        written_flags: names of the flags that the user passed on the command line. Other flags are not
            compared.
        other_campaign_flag: flag that names another campaign, for the message.

    Returns:
        Values of the flags from which the campaign was planned.

    Raises:
        ValueError: the campaign was not planned from flags, or a flag was passed with another value.
    """
    campaign_name = campaign.settings.name
    # campaigns of studies and of imports have no flags
    stored_flags = campaign.settings.extra.get(FLAGS)
    if stored_flags is None:
        raise ValueError(
            f"--campaign={campaign_name}: this campaign was not planned by this command, so this command"
            " cannot continue it. Choose another name."
        )
    # A flag that was not passed keeps its stored value, even if its default has changed.
    for flag in sorted(written_flags & set(flags)):
        if stored_flags.get(flag) != flags[flag]:
            # the flag --criteria sets the field `questions`, which is a list
            flag_name = {"questions": "criteria"}.get(flag, flag.replace("_", "-"))
            given_text, stored_text = (
                ",".join(value) or "none" if isinstance(value, list) else value
                for value in (flags[flag], stored_flags.get(flag))
            )
            raise ValueError(
                f"--{flag_name}={given_text}: the campaign {campaign_name!r} was planned with the value"
                f" {stored_text}. Remove the flag, or start another campaign with {other_campaign_flag}."
            )
    return stored_flags


def plan_campaign(
    store: "Store | None",
    request: Request,
    report_line: Callable[[str], None],
    load_ensemble: Callable[[Collection], Ensemble] | None = None,
    earlier_judgements: Sequence[JudgementRow] = (),
) -> tuple[CampaignSettings, list[PlannedPair]]:
    """Plan a new campaign. It is not stored.

    Args:
        store: store that contains the campaign `request.after`; None: there is no store yet.
        request: campaign as the flags describe it.
        report_line: function that is called with lines of progress.
        load_ensemble: function that makes the ensemble which scores asset files, for strategies that use
            scores. None: the ensemble consists of the mesh rewards that the request names.
        earlier_judgements: judgements about asset files whose pairs are not asked again.

    Returns:
        Settings and pairs of the campaign.

    Raises:
        ValueError: a flag does not fit; the message names it.
    """
    from eg3d_rlhf.generators import load_generator

    strategy = STRATEGIES[request.pairing.strategy]
    filters = None
    if request.after is not None:
        with prefix_errors("--after"):
            if store is None:
                raise ValueError(
                    f"the campaign {request.after!r} of an earlier round cannot be read, because there is no"
                    " database. Pass the database that contains it with --db."
                )
            filters = LabelFilters(campaign=request.after)
    if request.assets is not None:
        with prefix_errors("--assets"):
            collection = read_collection(Path(request.assets), report_line, request.lenient)
        ensemble = None
        # rewards are loaded only for strategies that use scores
        if strategy.least_rewards:
            make_ensemble = load_ensemble or partial(
                mesh_ensemble, request.pairing.strategy, request.pairing.rewards
            )
            ensemble = make_ensemble(collection)
        with prefix_errors("--after"):
            # Judgements and not preferences are read, because a preference names seeds, which assets do not
            # have.
            judgement_rows = kept_judgements(store, filters, Mode.LABEL) if store and filters else []
            preferences = answers_of(collection, judgement_rows)
        with prefix_errors("--assets"):
            asset_plan = plan_assets(
                request.pairing,
                collection,
                report_line,
                preferences,
                ensemble,
                answered_pairs(collection, earlier_judgements),
            )
        extra_values = {
            FLAGS: request.to_json(),
            "plan": asset_plan.report,
            "conditions": prompts_json(collection),
            "up": request.up,
        }
        return request.campaign_settings(extra_values), asset_plan.pairs
    with prefix_errors("--after"):
        # The results are read before the generator is loaded, so that an unknown campaign is reported
        # immediately.
        earlier_preferences = store_preferences(store, filters) if store and filters else []
    if request.pairing.learns:
        request.pairing.check_learning()
    with prefix_errors("--network"):
        generator = load_generator(request.network)
        warning = check_surfaces(
            generator.generator,
            request.pairing.first_seed,
            request.pairing.psi,
            request.pairing.level,
            "Pass --set level={level}",
        )
    if warning is not None:
        report_line(f"Warning: --network: {warning}")
    unit_noun = "shapes" if request.pairing.single else "pairs"
    report_line(f"planning {request.pairing.pairs} {unit_noun} ({request.pairing.strategy}) ...")
    ensemble = None
    # A campaign that learns from its answers needs no rewards.
    if strategy.least_rewards and not request.pairing.learns:
        ensemble = reward_ensemble(request.pairing, generator)
    campaign_plan = plan(request.pairing, generator, earlier_preferences, ensemble)
    total_values: dict = {PAIR_TOTAL: request.pairing.pairs} if request.pairing.learns else {}
    extra_values = {FLAGS: request.to_json(), "plan": campaign_plan.report, **total_values}
    # The results page shows the warning until the first shape has failed.
    if warning is not None:
        extra_values["surface_warning"] = warning
    return request.campaign_settings(extra_values), campaign_plan.pairs


def annotators_with_access(store: "Store") -> list[str]:
    """Return the names of the annotators who may log in."""
    # LOCAL and judges have no token, so they cannot log in from another machine.
    return [
        annotator.name
        for annotator in store.annotators()
        if annotator.revoked is None and annotator.name != LOCAL and annotator.role != JUDGE
    ]


def check_annotators(store: "Store | None", host: str, add_command: str) -> None:
    """Check that an annotator can log in to a server that other machines can reach.

    Args:
        store: store of the annotators; None: there is no store yet.
        host: value of --host.
        add_command: command that adds an annotator, for the message.

    Raises:
        ValueError: there is no annotator who can log in.
    """
    if store is None or not annotators_with_access(store):
        raise ValueError(
            f"--host={host}: annotators must log in with a token, but there is no annotator yet. Add an"
            f" annotator with: {add_command}"
        )


@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """Values of the flags of a label server. The field of each flag has the name of the flag."""

    host: str
    port: int
    certificate: Path | None
    key: Path | None
    proxy: str | None
    access_log: Path
    title: str
    cache: Path

    def __post_init__(self):
        if (self.certificate is None) != (self.key is None):
            missing_flag = "--certificate" if self.certificate is None else "--key"
            raise ValueError(
                f"--certificate and --key must be given together, but {missing_flag} is missing. Add"
                f" {missing_flag} with its PEM file."
            )

    @classmethod
    def from_flags(cls, flags: Mapping, folder: Path) -> "ServerFlags":
        """Select the flags of the server from all flags of a command.

        Args:
            flags: values of all flags, by name.
            folder: folder of the access log if --access-log was not passed.
        """
        field_values = {field.name: flags[field.name] for field in fields(cls)}
        return cls(**{**field_values, "access_log": flags["access_log"] or folder / "access.jsonl"})

    @property
    def exposed(self) -> bool:
        """Return True if other machines can reach the server, so that tokens are required."""
        # Through a proxy, other machines can reach a server that listens on the loopback address.
        return not is_loopback(self.host) or self.proxy is not None

    def to_dict(self) -> dict:
        """Return the flags as --dry-run prints them, in JSON types."""
        address_flags = {
            "host": self.host,
            "port": self.port,
            "exposed": self.exposed,
            "https": self.certificate is not None,
        }
        return {**address_flags, "proxy": self.proxy, "title": self.title, "cache": str(self.cache)}


def server_options(access_log: str, title: str = "Heading of the page."):
    """Make the decorator that adds the flags of the label server to a command.

    Args:
        access_log: default of --access-log, as the help shows it.
        title: help text of --title.
    """
    file_type = click.Path(path_type=Path, dir_okay=False)
    pem_type = click.Path(path_type=Path, exists=True, dir_okay=False)
    flag_decorators = (
        _server_option(
            "--host",
            metavar="ADDRESS",
            default="127.0.0.1",
            help=(
                "IP address or name on which the server listens. The default can be reached from this machine"
                " only. With 0.0.0.0, other machines can reach the server, and annotators need a token."
            ),
        ),
        _server_option(
            "--port",
            metavar="INT",
            type=click.IntRange(0, 65535),
            default=8000,
            help="Port on which the server listens. 0: any free port.",
        ),
        _server_option(
            "--certificate",
            metavar="FILE",
            type=pem_type,
            help="PEM file of the server's TLS certificate. The server then uses https, and needs --key.",
        ),
        _server_option(
            "--key",
            metavar="FILE",
            type=pem_type,
            help="PEM file of the private key that belongs to the certificate of --certificate.",
        ),
        _server_option(
            "--proxy",
            metavar="ADDRESS",
            help=(
                "IP address of a reverse proxy in front of the server. Its X-Forwarded headers are trusted,"
                " and annotators need a token."
            ),
        ),
        _server_option(
            "--access-log",
            metavar="FILE",
            type=file_type,
            show_default=access_log,
            rare=True,
            help="Log file, to which one JSON line is written for each request. It contains no tokens.",
        ),
        _server_option(
            "--cache",
            metavar="DIR",
            type=click.Path(path_type=Path, file_okay=False),
            default=DEFAULT_FOLDER,
            help="Folder in which the server stores the shapes in the form that it sends to browsers.",
            rare=True,
        ),
        _server_option(
            "--title",
            metavar="TEXT",
            default=AppOptions.title,
            help=title,
            show_default="the question, in the annotator's language",
        ),
    )
    return combine_decorators(*flag_decorators)


_LINE_INTERVAL = 30.0  # seconds between two lines on the preparation of shapes


def _print_progress(preparation: Preparation) -> None:
    """Print how many shapes are prepared, at once and every 30 seconds, until all are.

    Args: preparation: worker that prepares the shapes.
    """
    next_line = 0.0
    # the file of an earlier worker is outdated until the server starts this one
    while not preparation.running:
        time.sleep(0.2)
    while True:
        progress = preparation.progress()
        if progress["finished"] or preparation.gave_up:
            if next_line and progress["finished"]:
                failed_text = f", {progress['failed']} failed" if progress["failed"] else ""
                click.echo(
                    f"shapes: {progress['done']} of {progress['total']} are ready{failed_text}", err=True
                )
            return
        # nothing is known before the worker has opened the campaign
        if progress["total"] and time.monotonic() >= next_line:
            seconds_left = progress["seconds_left"]
            left_text = "" if seconds_left is None else f", about {math.ceil(seconds_left / 60)} min left"
            click.echo(f"shapes: {progress['done']} of {progress['total']} are ready{left_text}", err=True)
            next_line = time.monotonic() + _LINE_INTERVAL
        time.sleep(1)


def serve_campaign(
    store: "Store",
    db: str,
    campaign: str,
    server: ServerFlags,
    announce: Callable[[str], list[str]],
    answer_noun: str,
) -> None:
    """Serve a campaign until it is interrupted, and prepare its shapes in the meantime.

    Args:
        store: store that contains the campaign.
        db: URL of the store.
        campaign: name of the campaign.
        server: flags of the server.
        announce: function (URL of the server) -> lines that are printed when the server listens.
        answer_noun: noun for one answer, such as "label", in the line that is printed at the end.
    """
    from eg3d_rlhf.people.label.server.app import serve

    cache = ShapeCache(server.cache)
    stored_campaign = store.campaign(campaign)
    if stored_campaign is not None:
        # A missing asset file may have been restored since the last start, so it is tried again.
        cache.forget_temporary_failures(shape for _, shape in store.shapes(stored_campaign.id) if shape.file)
    options = AppOptions(
        store=store,
        campaign=campaign,
        cache=cache,
        # The preparation runs in another process, which opens the store by its URL.
        preparation=Preparation(db, campaign, cache),
        exposed=server.exposed,
        title=server.title,
        access_log=server.access_log,
    )

    def print_addresses(address: str) -> None:
        """Print the address of the server, and warnings about unsafe settings."""
        # The addresses 0.0.0.0 and [::] mean all interfaces, and a browser cannot open them.
        for wildcard_address in ("//0.0.0.0:", "//[::]:"):
            address = address.replace(wildcard_address, f"//{socket.gethostname()}:")
        for line in announce(address):
            click.echo(line)
        # 0o077 are the permissions of the group and of others
        if server.key is not None and server.key.stat().st_mode & 0o077:
            click.echo(
                "warning: other accounts of this machine can read the private key. Run chmod 600"
                f" {server.key}"
            )
        if server.exposed and server.certificate is None and server.proxy is None:
            click.echo(
                "warning: tokens are sent without encryption. Outside a trusted network, use --certificate"
                " and --key, or a proxy with https."
            )

    if options.preparation is not None:
        threading.Thread(target=_print_progress, args=(options.preparation,), daemon=True).start()
    try:
        serve(
            options,
            server.host,
            server.port,
            certificate=server.certificate,
            key=server.key,
            proxy=server.proxy,
            on_listening=print_addresses,
        )
    # Every answer was on the disk before the page got its reply, so an interrupt loses no answer.
    except KeyboardInterrupt:
        click.echo(f"Stopped. Every {answer_noun} is stored. Run the same command again to continue.")


def reject_flags_before(ctx: click.Context, *allowed_parameters: str) -> None:
    """Check that only allowed flags precede the name of a sub-command.

    Args:
        ctx: context of the group.
        allowed_parameters: names of the allowed parameters.

    Raises:
        ValueError: another flag precedes the sub-command; the message names it.
    """
    if rejected_flags := named_flags(ctx, given_flags(ctx) - set(allowed_parameters)):
        allowed_text = " and ".join(f"--{name}" for name in allowed_parameters)
        raise ValueError(
            f"{', '.join(rejected_flags)}: only {allowed_text} may precede the sub-command"
            f" {ctx.invoked_subcommand}. Write the other flags after {ctx.invoked_subcommand}, or remove them"
            f" if {ctx.invoked_subcommand} does not accept them."
        )


def given_flags(ctx: click.Context) -> set[str]:
    """Return the names of the parameters that the user passed on the command line."""
    # The source of a parameter, and not its value, shows whether it was passed.
    return {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def named_flags(ctx: click.Context, parameter_names: set[str]) -> list[str]:
    """Return the flags of parameters as a user writes them, such as "--dry-run".

    Args:
        ctx: context of the command.
        parameter_names: names of the parameters.
    """
    # Flags that only --help-all shows are in the attribute `rare` of the command, see core.cli.
    parameters = (*ctx.command.params, *getattr(ctx.command, "rare", {}).values())
    return [parameter.opts[0] for parameter in parameters if parameter.name in parameter_names]


# ---- what a campaign costs

SECONDS = 8  # assumed time to look at a pair and to answer the first question
QUESTION_SECONDS = 4  # assumed time of each further question about the same pair


def campaign_line(store: "Store", campaign: StoredCampaign) -> str:
    """Return a line with the number of pairs and of trials of a campaign, the time and the answers so far.

    The number of trials is the one that the page shows: a person also answers repeated pairs and gold checks.
    """
    pair_count, trial_count = store.size(campaign.id, LOCAL)
    answers = [
        judgement
        for judgement in store.judgements(campaign.settings.name, labels_from=ALL)
        if judgement.kind is not Kind.TRAINING
    ]
    judged_count = sum(judgement.judge is not None for judgement in answers)
    answer_count = len(answers) - judged_count
    judge_text = f", and {judged_count} of judges" if judged_count else ""
    # one question besides the further ones: which shape is better
    seconds = SECONDS + QUESTION_SECONDS * len(campaign.settings.questions)
    return (
        f"{pair_count} pairs; {trial_count} to answer for one person, with repeats and gold checks: about"
        f" {format_duration(seconds * trial_count)} at {seconds} s each (estimated); {answer_count} answers"
        f" so far{judge_text}"
    )


def format_duration(seconds: float) -> str:
    """Format a duration in hours and minutes, rounded to minutes. A duration below one minute becomes 1 min.

    Args:
        seconds: duration in seconds.

    >>> format_duration(5400), format_duration(300)
    ('1 h 30 min', '5 min')
    """
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


# ---- a campaign of labels for one round of tuning

MIN_ANSWERED_SHARE = 0.9  # smallest share of the pairs that must be answered; a skip counts as an answer
# Settings of a campaign for a round of tuning; tools/label.py has the same defaults.
ASKED = {"show_render": False, "both_bad": True, "questions": (), "reveal": False}


def label_command(url: str, campaign: str) -> str:
    """Return the command that starts the label server of a campaign."""
    return f"python tools/label.py --db={url} --campaign={campaign}"


def make_round(url: str, name: str, network: Path, pairing: PairingOptions) -> bool:
    """Plan and store a campaign that compares shapes of a network.

    Args:
        url: URL of the store, which is created if it does not exist.
        name: name of the campaign.
        network: network file.
        pairing: options of the pairs.

    Returns:
        True if the campaign was made, and False if a campaign of this name exists, which is not changed.
    """
    with open_store(url, create=True) as store:
        if store.campaign(name) is not None:
            return False
        # ASKED replaces some of the defaults
        round_settings = with_defaults(dict.fromkeys(SETTINGS), CampaignSettings) | ASKED
        request = Request(
            # The path is absolute, because labelling may be continued from another working directory.
            name=name,
            network=str(network.resolve()),
            after=None,
            pairing=pairing,
            settings=round_settings,
        )
        store.create_campaign(*plan_campaign(store, request, print))
        return True


def round_labels(url: str, name: str, generator: "LoadedGenerator", pair_count: int) -> list[Preference]:
    """Return the labels of a campaign that was planned by `make_round`, if enough pairs are answered.

    Args:
        url: URL of the store.
        name: name of the campaign.
        generator: generator whose shapes the campaign compares.
        pair_count: number of pairs of the campaign.

    Raises:
        ValueError: too few pairs are answered, or the labels belong to another generator.
    """
    with open_store(url, create=False) as store:
        # Pairs and not answers are counted, because several annotators may answer one pair.
        answered_count = len(
            {judgement.pair for judgement in store.judgements(name) if judgement.kind is Kind.PAIR}
        )
        labels = store_preferences(store, LabelFilters(campaign=name))
    min_answered_count = max(1, round(MIN_ANSWERED_SHARE * pair_count))
    if answered_count < min_answered_count:
        raise ValueError(
            f"campaign {name}: at least {min_answered_count} of {pair_count} pairs must be answered, but"
            f" {answered_count} are. Continue to label with: {label_command(url, name)}"
        )
    # Labels of another generator, such as those of another run's database, would train the reward on other
    # shapes.
    other_generators = {label.generator for label in labels} - {generator.hash}
    if other_generators:
        other_hash = str(other_generators.pop())[:12]
        raise ValueError(
            f"campaign {name}: its labels belong to generator {other_hash}..., but the run tunes generator"
            f" {generator.hash[:12]}... Restore the database of this run."
        )
    return labels


def mesh_ensemble(strategy: str, rewards: Sequence[str], collection: Collection) -> Ensemble:
    """Load mesh rewards (`eg3d-rlhf reward mesh`) as an ensemble that scores asset files.

    Args:
        strategy: name of the strategy that uses the scores.
        rewards: reward files.
        collection: asset files. The ensemble scores them by their index.

    Raises:
        ValueError: there are too few rewards, a file contains another kind of reward, or an asset is not a
            mesh.
    """
    if not rewards:
        min_reward_count = STRATEGIES[strategy].least_rewards
        raise ValueError(
            f"--strategy={strategy} needs at least {min_reward_count} mesh rewards for asset files, but"
            " --reward is missing. Train mesh rewards with `eg3d-rlhf reward mesh`, and pass each of them"
            " with --reward=FILE. For assets that a flow has sampled, use `eg3d-rlhf flow label WORK"
            f" --strategy={strategy}`."
        )
    check_rewards(strategy, len(rewards))
    other_asset = next((asset for asset in collection.assets if asset.kind not in _MESHES), None)
    if other_asset is not None:
        raise ValueError(
            f"--strategy={strategy}: mesh rewards score meshes only, but {other_asset.path.name} is of kind"
            f" {other_asset.kind}. Use --strategy=random."
        )
    import torch

    from eg3d_rlhf.rewards.meshes.dataset import load_mesh
    from eg3d_rlhf.rewards.meshes.model import load_mesh_reward
    from eg3d_rlhf.rewards.meshes.patches import compute_mesh_patches

    members = [load_mesh_reward(path) for path in rewards]

    @torch.no_grad()
    def score(indices: Sequence[int]) -> Scored:
        """Return the scores [M, N] of N assets by M members, and embeddings [N, sum of widths]."""
        assets = [collection.assets[index] for index in indices]
        meshes = [load_mesh(asset.path) for asset in assets]
        # A prompt that has an image but no text is represented by its name.
        prompts = [collection.prompts[asset.prompt].text or asset.prompt for asset in assets]
        # Each member makes an embedding [N, D], and its head maps the embedding to a score [N, 1].
        embeddings = [
            member.embed(compute_mesh_patches(meshes, member.patches), prompts) for member in members
        ]
        scores = [member.head(embedding)[:, 0] for member, embedding in zip(members, embeddings, strict=True)]
        return Scored(torch.stack(scores).double().numpy(), torch.cat(embeddings, dim=1).double().numpy())

    member_descriptions = [
        {"file": Path(path).name, "sha256": file_hash(path), "members": 1} for path in rewards
    ]
    return Ensemble(score, len(members), member_descriptions)
