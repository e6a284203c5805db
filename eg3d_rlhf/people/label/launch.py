"""What the labelling tools start: a campaign planned from flags or taken up again, its store, and the
server's flags.
"""

import functools
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from eg3d_rlhf.core.cli import naming, option, together
from eg3d_rlhf.people.label.assets.collection import (
    Collection,
    answers_of,
    conditions,
    plan_assets,
    read_collection,
)
from eg3d_rlhf.people.label.assets.scores import mesh_ensemble
from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.people.label.entities import LOCAL, CampaignSettings, Kind, Mode, PlannedPair, StoredCampaign
from eg3d_rlhf.people.label.pairing import PairingOptions, plan, reward_ensemble
from eg3d_rlhf.people.label.preparation import Preparation
from eg3d_rlhf.people.label.server.options import AppOptions, is_loopback
from eg3d_rlhf.people.label.shape_files import DEFAULT_FOLDER, ShapeCache
from eg3d_rlhf.people.label.store_labels import LabelFilters, kept_judgements, store_preferences
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES, Ensemble
from training.config import knobs_of

if TYPE_CHECKING:
    from eg3d_rlhf.generators import LoadedGenerator
    from eg3d_rlhf.people.label.store import Store

SETTINGS = (
    *(field.name for field, _, _ in knobs_of(CampaignSettings)),
    "show_render",
    "both_bad",
    "questions",
    "reveal",
)
FLAGS = "flags"  # where a campaign's `extra` keeps what it was planned from
_server_option = functools.partial(option, group="Server")


def filled(flags: Mapping, *kinds: type) -> dict:
    """Flags with the defaults of settings' fields where none was given."""
    defaults = {field.name: field.default for kind in kinds for field, _, _ in knobs_of(kind)}
    return {name: defaults.get(name) if value is None else value for name, value in flags.items()}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the flags ask for."""

    name: str  # of the campaign
    network: str | None  # file; None: the bundled generator
    after: str | None  # tournament: the campaign whose results decide this round
    pairing: PairingOptions
    settings: Mapping  # values of SETTINGS
    assets: str | None = None  # folder or list of finished assets, in place of a generator
    up: str = "y"  # axis of the assets that points up
    lenient: bool = False  # assets that cannot be shown are left out, and told

    def to_json(self) -> dict:
        pairing = {**asdict(self.pairing), "rewards": list(self.pairing.rewards)}
        settings = {**self.settings, "questions": list(self.settings["questions"])}
        assets = {"assets": self.assets, "up": self.up} if self.assets else {}
        return {"network": self.network, **assets, "after": self.after, **pairing, **settings}

    def campaign_settings(self, extra: Mapping) -> CampaignSettings:
        how = {"mode": Mode.SINGLE, "scale": self.pairing.single} if self.pairing.single else {}
        settings = {**self.settings, **how}
        return CampaignSettings(name=self.name, seed=self.pairing.seed, extra=dict(extra), **settings)


def check_resumed(
    campaign: StoredCampaign, wanted: Mapping, given: set[str], another: str = "--campaign=NAME"
) -> dict:
    """The flags that a stored campaign was planned from. Args: another: the flag that names another one."""
    name = campaign.settings.name
    stored = campaign.settings.extra.get(FLAGS)
    if stored is None:
        raise ValueError(
            f"--campaign={name}: expected a campaign that was planned by this command, got another. Choose"
            " another name."
        )
    for flag in sorted(given & set(wanted)):
        if stored.get(flag) != wanted[flag]:
            wrong = (
                f"expected {stored.get(flag)}, with which campaign {name!r} was planned, got {wanted[flag]}"
            )
            raise ValueError(
                f"--{flag.replace('_', '-')}: {wrong}. Leave the flag out, or begin another with {another}."
            )
    return stored


def plan_campaign(
    store: "Store | None",
    request: Request,
    tell: Callable[[str], None],
    scorer: Callable[[Collection], Ensemble] | None = None,
) -> tuple[CampaignSettings, list[PlannedPair]]:
    """Plan a new campaign, which is not stored yet.

    Args: scorer: makes the ensemble that scores finished assets, for strategies that read scores; None: the
        mesh rewards that the request names.
    """
    from eg3d_rlhf.generators import load_generator

    strategy = STRATEGIES[request.pairing.strategy]
    chosen = None
    if request.after is not None:
        with naming("--after"):
            if store is None:
                raise ValueError(
                    f"expected a campaign of the database, got {request.after!r} and no database. Check --db."
                )
            chosen = LabelFilters(campaign=request.after)
    if request.assets is not None:
        with naming("--assets"):
            collection = read_collection(Path(request.assets), tell, request.lenient)
        ensemble = None
        if strategy.least_rewards:
            make = scorer or partial(mesh_ensemble, request.pairing.strategy, request.pairing.rewards)
            ensemble = make(collection)
        with naming("--after"):
            rows = kept_judgements(store, chosen, Mode.LABEL) if store and chosen else []
            answers = answers_of(collection, rows)
        with naming("--assets"):
            assets = plan_assets(request.pairing, collection, tell, answers, ensemble)
        extra = {
            FLAGS: request.to_json(),
            "plan": assets.report,
            "conditions": conditions(collection),
            "up": request.up,
        }
        return request.campaign_settings(extra), assets.pairs
    with naming("--after"):
        results = store_preferences(store, chosen) if store and chosen else []
    with naming("--network"):
        generator = load_generator(request.network)
    what = "shapes" if request.pairing.single else "pairs"
    tell(f"planning {request.pairing.pairs} {what} ({request.pairing.strategy}) ...")
    ensemble = reward_ensemble(request.pairing, generator) if strategy.least_rewards else None
    planned = plan(request.pairing, generator, results, ensemble)
    return request.campaign_settings({FLAGS: request.to_json(), "plan": planned.report}), planned.pairs


def with_access(store: "Store") -> list[str]:
    """Names of those who may log in."""
    return [person.name for person in store.annotators() if person.revoked is None and person.name != LOCAL]


def check_annotators(store: "Store | None", host: str, make: str) -> None:
    """Refuse to expose a server that nobody could use. Args: make: the command that makes an annotator."""
    if store is None or not with_access(store):
        raise ValueError(
            f"--host={host}: expected at least one annotator, as tokens are compulsory, got none. Make one"
            f" with: {make}"
        )


@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """How the server is reached."""

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
            raise ValueError(
                "--certificate, --key: expected both or neither. Give the PEM files of the certificate and of"
                " its key."
            )

    @classmethod
    def of(cls, flags: Mapping, folder: Path) -> "ServerFlags":
        chosen = {field.name: flags[field.name] for field in fields(cls)}
        return cls(**{**chosen, "access_log": flags["access_log"] or folder / "access.jsonl"})

    @property
    def exposed(self) -> bool:
        """Whether other machines reach the server; then tokens are compulsory."""
        return not is_loopback(self.host) or self.proxy is not None

    def to_dict(self) -> dict:
        reached = {
            "host": self.host,
            "port": self.port,
            "exposed": self.exposed,
            "https": self.certificate is not None,
        }
        return {**reached, "proxy": self.proxy, "title": self.title, "cache": str(self.cache)}


def server_options(access_log: str, title: str = "Heading of the page."):
    """A decorator: the flags that a labelling server takes; `access_log` says where that file lies by
    default.
    """
    file = click.Path(path_type=Path, dir_okay=False)
    pem = click.Path(path_type=Path, exists=True, dir_okay=False)
    flags = (
        _server_option(
            "--host",
            metavar="ADDRESS",
            default="127.0.0.1",
            help="Address to bind to. Any but loopback makes annotators' tokens compulsory.",
        ),
        _server_option(
            "--port", metavar="INT", type=click.IntRange(0, 65535), default=8000, help="0: a free one."
        ),
        _server_option(
            "--certificate", metavar="FILE", type=pem, help="PEM file; with --key, the server speaks https."
        ),
        _server_option("--key", metavar="FILE", type=pem, help="PEM file of the certificate's key."),
        _server_option(
            "--proxy",
            metavar="ADDRESS",
            help="Reverse proxy whose X-Forwarded headers are believed; makes tokens compulsory.",
        ),
        _server_option(
            "--access-log",
            metavar="FILE",
            type=file,
            show_default=access_log,
            rare=True,
            help="Requests as JSON lines, without tokens.",
        ),
        _server_option(
            "--cache",
            metavar="DIR",
            type=click.Path(path_type=Path, file_okay=False),
            default=DEFAULT_FOLDER,
            help="Where shapes are kept.",
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
    return together(*flags)


def serve_campaign(
    store: "Store",
    db: str,
    campaign: str,
    server: ServerFlags,
    announce: Callable[[str], list[str]],
    what: str,
) -> None:
    """Prepare a campaign's shapes and serve it until interrupted."""
    from eg3d_rlhf.people.label.server.app import serve

    cache = ShapeCache(server.cache)
    stored = store.campaign(campaign)
    if stored is not None:
        cache.forget_passing(shape for _, shape in store.shapes(stored.id) if shape.file)
    options = AppOptions(
        store=store,
        campaign=campaign,
        cache=cache,
        preparation=Preparation(db, campaign, cache),
        exposed=server.exposed,
        title=server.title,
        access_log=server.access_log,
    )

    def listening(address: str) -> None:
        for everywhere in ("//0.0.0.0:", "//[::]:"):
            address = address.replace(everywhere, f"//{socket.gethostname()}:")
        for line in announce(address):
            click.echo(line)
        if server.key is not None and server.key.stat().st_mode & 0o077:
            click.echo(f"--key: other accounts of this machine can read it; chmod 600 {server.key}")
        if server.exposed and server.certificate is None and server.proxy is None:
            click.echo(
                "tokens travel unencrypted: give --certificate and --key, or use a proxy with https, outside"
                " a trusted network"
            )

    try:
        serve(
            options,
            server.host,
            server.port,
            certificate=server.certificate,
            key=server.key,
            proxy=server.proxy,
            on_listening=listening,
        )
    except KeyboardInterrupt:
        click.echo(f"stopped; every {what} is kept, the same command goes on")


def refuse_flags_before(ctx: click.Context, *allowed: str) -> None:
    """Sub-commands take these parameters alone from before their name.

    Raises: ValueError naming the others that were given.
    """
    if used := named_flags(ctx, given_flags(ctx) - set(allowed)):
        names = " and ".join(f"--{name}" for name in allowed)
        raise ValueError(
            f"{', '.join(used)}: expected only {names} before {ctx.invoked_subcommand}. Write other flags"
            " after it."
        )


def given_flags(ctx: click.Context) -> set[str]:
    """Names of the parameters that are on the command line."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def named_flags(ctx: click.Context, names: set[str]) -> list[str]:
    """Of these parameters, rare ones among them, the flags as the code writes them."""
    return [
        p.opts[0]
        for p in (*ctx.command.params, *getattr(ctx.command, "rare", {}).values())
        if p.name in names
    ]


# ---- a campaign of labels for one round of tuning

LEAST_ANSWERED = 0.9  # share of the pairs, skips included
# as label.py asks, unless told otherwise
ASKED = {"show_render": False, "both_bad": True, "questions": (), "reveal": False}


def label_command(url: str, campaign: str) -> str:
    """What people start to label."""
    return f"python tools/label.py --db={url} --campaign={campaign}"


def make_round(url: str, name: str, network: Path, pairing: PairingOptions) -> bool:
    """Plan and store a campaign on the shapes of `network`; one that is there is left as it is. Returns
    whether it was made.
    """
    with open_store(url, create=True) as store:
        if store.campaign(name) is not None:
            return False
        defaults = filled(dict.fromkeys(SETTINGS), CampaignSettings) | ASKED
        request = Request(
            name=name, network=str(network.resolve()), after=None, pairing=pairing, settings=defaults
        )
        store.create_campaign(*plan_campaign(store, request, print))
        return True


def round_labels(url: str, name: str, generator: "LoadedGenerator", pairs: int) -> list[Preference]:
    """The labels of a campaign of `pairs` pairs."""
    with open_store(url, create=False) as store:
        judged = len({row.pair for row in store.judgements(name) if row.kind is Kind.PAIR})
        labels = store_preferences(store, LabelFilters(campaign=name))
    least = max(1, round(LEAST_ANSWERED * pairs))
    if judged < least:
        remedy = f"Label on: {label_command(url, name)}"
        raise ValueError(
            f"{name}: expected answers to at least {least} of {pairs} pairs, got {judged}. {remedy}"
        )
    strange = {label.generator for label in labels} - {generator.hash}
    if strange:
        got = str(strange.pop())[:12]
        raise ValueError(
            f"{name}: expected judgements of generator {generator.hash[:12]}..., got some of {got}... Restore"
            " the database."
        )
    return labels
