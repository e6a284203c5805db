"""Plans a campaign from flags or continues a stored one, and starts the label server with its flags."""

import functools
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from eg3d_rlhf.core.cli import file_hash, naming, option, together
from eg3d_rlhf.people.label.assets.collection import (
    Collection,
    answers_of,
    plan_assets,
    prompts_json,
    read_collection,
)
from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.people.label.entities import LOCAL, CampaignSettings, Kind, Mode, PlannedPair, StoredCampaign
from eg3d_rlhf.people.label.pairing import PairingOptions, plan, reward_ensemble
from eg3d_rlhf.people.label.preparation import Preparation
from eg3d_rlhf.people.label.server.options import AppOptions, is_loopback
from eg3d_rlhf.people.label.shape_files import DEFAULT_FOLDER, ShapeCache
from eg3d_rlhf.people.label.store_labels import LabelFilters, kept_judgements, store_preferences
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES, Ensemble, Scored, check_rewards
from training.config import knobs_of

if TYPE_CHECKING:
    from eg3d_rlhf.generators import LoadedGenerator
    from eg3d_rlhf.people.label.store import Store

# Names of the flags that become settings of the campaign and not of its pairs.
SETTINGS = (
    *(field.name for field, _, _ in knobs_of(CampaignSettings)),
    "show_render",
    "both_bad",
    "questions",
    "reveal",
)
FLAGS = "flags"  # key of a campaign's `extra` under which the flags are stored
_MESHES = ("glb", "obj", "ply")  # kinds of files that a mesh reward reads
_server_option = functools.partial(option, group="Server")


def filled(flags: Mapping, *kinds: type) -> dict:
    """Replace flags that were not given by the defaults of the settings' fields."""
    defaults = {field.name: field.default for kind in kinds for field, _, _ in knobs_of(kind)}
    # None means that the flag was not given; no flag has None as a value of its own.
    return {name: defaults.get(name) if value is None else value for name, value in flags.items()}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A campaign as the flags describe it."""

    name: str  # of the campaign
    network: str | None  # network file; None: the bundled generator
    after: str | None  # name of the campaign whose results decide this round of a tournament
    pairing: PairingOptions
    settings: Mapping  # values of SETTINGS
    assets: str | None = None  # folder or list of finished assets, in place of a generator
    up: str = "y"  # axis of the assets that points up
    lenient: bool = False  # leave out assets that cannot be shown, and report them

    def to_json(self) -> dict:
        """Return the flags as JSON values, as a campaign's `extra` stores them."""
        # JSON has no tuples. A stored list must equal the flags of the next start.
        pairing = {**asdict(self.pairing), "rewards": list(self.pairing.rewards)}
        settings = {**self.settings, "questions": list(self.settings["questions"])}
        # Left out for generators, whose campaigns have no such flags.
        assets = {"assets": self.assets, "up": self.up} if self.assets else {}
        return {"network": self.network, **assets, "after": self.after, **pairing, **settings}

    def campaign_settings(self, extra: Mapping) -> CampaignSettings:
        """Return the settings of the campaign."""
        # Single shapes have a mode and a scale of their own; pairs use the defaults.
        scale = {"mode": Mode.SINGLE, "scale": self.pairing.single} if self.pairing.single else {}
        settings = {**self.settings, **scale}
        return CampaignSettings(name=self.name, seed=self.pairing.seed, extra=dict(extra), **settings)


def check_resumed(
    campaign: StoredCampaign, wanted: Mapping, given: set[str], another: str = "--campaign=NAME"
) -> dict:
    """Compare flags with those that a stored campaign was planned from, and return the stored ones.

    Args:
        campaign: that is continued.
        wanted: values of the flags now.
        given: names of the flags that were written on the command line.
        another: the flag that names another campaign, for the message.

    Raises: ValueError if a flag was written with another value.
    """
    name = campaign.settings.name
    # Campaigns of studies and imports contain no flags.
    stored = campaign.settings.extra.get(FLAGS)
    if stored is None:
        raise ValueError(
            f"--campaign={name}: this campaign was not planned by this command, so it cannot be continued"
            " here. Choose another name."
        )
    # Flags that were not written keep their stored value, whatever their default is now.
    for flag in sorted(given & set(wanted)):
        if stored.get(flag) != wanted[flag]:
            raise ValueError(
                f"--{flag.replace('_', '-')}: campaign {name!r} was planned with {stored.get(flag)}, got"
                f" {wanted[flag]}. Remove the flag, or start another campaign with {another}."
            )
    return stored


def plan_campaign(
    store: "Store | None",
    request: Request,
    report: Callable[[str], None],
    scorer: Callable[[Collection], Ensemble] | None = None,
) -> tuple[CampaignSettings, list[PlannedPair]]:
    """Plan a new campaign. It is not stored.

    Args:
        store: in which `request.after` is looked up.
        request: the flags.
        report: called with lines of progress.
        scorer: makes the ensemble that scores asset files, for strategies that read scores. None: the mesh
            rewards that the request names.
    """
    from eg3d_rlhf.generators import load_generator

    strategy = STRATEGIES[request.pairing.strategy]
    filters = None
    if request.after is not None:
        with naming("--after"):
            if store is None:
                raise ValueError(
                    f"{request.after!r} is the campaign of an earlier round, but there is no database. Check"
                    " --db."
                )
            filters = LabelFilters(campaign=request.after)
    if request.assets is not None:
        with naming("--assets"):
            collection = read_collection(Path(request.assets), report, request.lenient)
        ensemble = None
        # Rewards are loaded only for strategies that use them.
        if strategy.least_rewards:
            make = scorer or partial(mesh_ensemble, request.pairing.strategy, request.pairing.rewards)
            ensemble = make(collection)
        with naming("--after"):
            # Answers of the earlier round: rows, because asset pairs have no seeds.
            rows = kept_judgements(store, filters, Mode.LABEL) if store and filters else []
            answers = answers_of(collection, rows)
        with naming("--assets"):
            assets = plan_assets(request.pairing, collection, report, answers, ensemble)
        extra = {
            FLAGS: request.to_json(),
            "plan": assets.report,
            "conditions": prompts_json(collection),
            "up": request.up,
        }
        return request.campaign_settings(extra), assets.pairs
    with naming("--after"):
        # Read before the generator is loaded: an unknown campaign is reported at once.
        results = store_preferences(store, filters) if store and filters else []
    with naming("--network"):
        generator = load_generator(request.network)
    what = "shapes" if request.pairing.single else "pairs"
    report(f"planning {request.pairing.pairs} {what} ({request.pairing.strategy}) ...")
    ensemble = reward_ensemble(request.pairing, generator) if strategy.least_rewards else None
    planned = plan(request.pairing, generator, results, ensemble)
    return request.campaign_settings({FLAGS: request.to_json(), "plan": planned.report}), planned.pairs


def with_access(store: "Store") -> list[str]:
    """Return the names of annotators who may log in."""
    # LOCAL has no token, so it cannot log in from another machine.
    return [person.name for person in store.annotators() if person.revoked is None and person.name != LOCAL]


def check_annotators(store: "Store | None", host: str, command: str) -> None:
    """Raise ValueError if no annotator could log in to a server that other machines can reach.

    Args:
        command: that adds an annotator, for the message.
    """
    if store is None or not with_access(store):
        raise ValueError(
            f"--host={host}: annotators must log in with a token, but there is no annotator yet. Add one"
            f" with: {command}"
        )


@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """Flags of the server: its address, certificate, proxy and files."""

    host: str
    port: int
    certificate: Path | None
    key: Path | None
    proxy: str | None
    access_log: Path
    title: str
    cache: Path

    def __post_init__(self):
        # One without the other cannot be used.
        if (self.certificate is None) != (self.key is None):
            raise ValueError(
                "--certificate and --key must be given together: the PEM files of the certificate and of"
                " its key. Add the other one."
            )

    @classmethod
    def of(cls, flags: Mapping, folder: Path) -> "ServerFlags":
        """Select the flags of the server; the access log lies in `folder` by default."""
        # The fields have the names of the flags.
        chosen = {field.name: flags[field.name] for field in fields(cls)}
        return cls(**{**chosen, "access_log": flags["access_log"] or folder / "access.jsonl"})

    @property
    def exposed(self) -> bool:
        """True if other machines reach the server. Then tokens are required."""
        # Through a proxy, other machines reach a server on loopback.
        return not is_loopback(self.host) or self.proxy is not None

    def to_dict(self) -> dict:
        """Return the flags for --dry-run."""
        address = {
            "host": self.host,
            "port": self.port,
            "exposed": self.exposed,
            "https": self.certificate is not None,
        }
        return {**address, "proxy": self.proxy, "title": self.title, "cache": str(self.cache)}


def server_options(access_log: str, title: str = "Heading of the page."):
    """Return a decorator that adds the server's flags to a command.

    Args:
        access_log: default place of that file, as the help shows it.
        title: help text of --title.
    """
    file = click.Path(path_type=Path, dir_okay=False)
    pem = click.Path(path_type=Path, exists=True, dir_okay=False)
    flags = (
        _server_option(
            "--host",
            metavar="ADDRESS",
            default="127.0.0.1",
            help="Address to listen on. With any address but loopback, annotators need a token.",
        ),
        _server_option(
            "--port",
            metavar="INT",
            type=click.IntRange(0, 65535),
            default=8000,
            help="Port to listen on. 0: any free port.",
        ),
        _server_option(
            "--certificate",
            metavar="FILE",
            type=pem,
            help="PEM file of the certificate. With --key, the server uses https.",
        ),
        _server_option("--key", metavar="FILE", type=pem, help="PEM file of the certificate's private key."),
        _server_option(
            "--proxy",
            metavar="ADDRESS",
            help="Address of a reverse proxy whose X-Forwarded headers are trusted. Annotators need a token.",
        ),
        _server_option(
            "--access-log",
            metavar="FILE",
            type=file,
            show_default=access_log,
            rare=True,
            help="File for the requests, as JSON lines without tokens.",
        ),
        _server_option(
            "--cache",
            metavar="DIR",
            type=click.Path(path_type=Path, file_okay=False),
            default=DEFAULT_FOLDER,
            help="Folder of prepared shapes.",
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
    unit: str,
) -> None:
    """Prepare a campaign's shapes and serve it until it is interrupted.

    Args:
        announce: returns the lines to print for the server's address.
        unit: name of what is stored, for the last line.
    """
    from eg3d_rlhf.people.label.server.app import serve

    cache = ShapeCache(server.cache)
    stored = store.campaign(campaign)
    if stored is not None:
        # Files of assets may have been restored since the last start.
        cache.forget_temporary_failures(shape for _, shape in store.shapes(stored.id) if shape.file)
    options = AppOptions(
        store=store,
        campaign=campaign,
        cache=cache,
        # The preparation runs in another process, which opens the database by its URL.
        preparation=Preparation(db, campaign, cache),
        exposed=server.exposed,
        title=server.title,
        access_log=server.access_log,
    )

    def listening(address: str) -> None:
        # An address that means all interfaces is no address that a browser can open.
        for everywhere in ("//0.0.0.0:", "//[::]:"):
            address = address.replace(everywhere, f"//{socket.gethostname()}:")
        for line in announce(address):
            click.echo(line)
        # Any permission for group or others.
        if server.key is not None and server.key.stat().st_mode & 0o077:
            click.echo(f"--key: other accounts of this machine can read it. Run chmod 600 {server.key}")
        if server.exposed and server.certificate is None and server.proxy is None:
            click.echo(
                "warning: tokens are sent without encryption. Outside a trusted network, use --certificate"
                " and --key, or a proxy with https."
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
    # Every answer was on the disk before it was acknowledged, so nothing is lost.
    except KeyboardInterrupt:
        click.echo(f"stopped. Every {unit} is stored. The same command continues.")


def refuse_flags_before(ctx: click.Context, *allowed: str) -> None:
    """Check that only allowed parameters stand before the name of a sub-command.

    Raises: ValueError with the names of the others.
    """
    if used := named_flags(ctx, given_flags(ctx) - set(allowed)):
        names = " and ".join(f"--{name}" for name in allowed)
        raise ValueError(
            f"{', '.join(used)}: only {names} may stand before {ctx.invoked_subcommand}. Write other flags"
            " after it."
        )


def given_flags(ctx: click.Context) -> set[str]:
    """Return the names of the parameters that were written on the command line."""
    # A default value is no statement of the user, also if it equals the written one.
    return {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def named_flags(ctx: click.Context, names: set[str]) -> list[str]:
    """Return the flags of these parameters as a user writes them, rare flags included."""
    return [
        p.opts[0]
        # Rare flags are not parameters of the command itself (see core.cli).
        for p in (*ctx.command.params, *getattr(ctx.command, "rare", {}).values())
        if p.name in names
    ]


# ---- a campaign of labels for one round of tuning

LEAST_ANSWERED = 0.9  # share of the pairs that must be answered; skips count as answers
# Settings of a round of tuning; tools/label.py has the same defaults.
ASKED = {"show_render": False, "both_bad": True, "questions": (), "reveal": False}


def label_command(url: str, campaign: str) -> str:
    """Return the command that starts labelling."""
    return f"python tools/label.py --db={url} --campaign={campaign}"


def make_round(url: str, name: str, network: Path, pairing: PairingOptions) -> bool:
    """Plan and store a campaign of shapes of `network`. Returns False if it exists already; it is not
    changed.
    """
    with open_store(url, create=True) as store:
        if store.campaign(name) is not None:
            return False
        # All settings at their defaults, then those of a round.
        defaults = filled(dict.fromkeys(SETTINGS), CampaignSettings) | ASKED
        request = Request(
            # An absolute path: labelling may be continued from another working directory.
            name=name,
            network=str(network.resolve()),
            after=None,
            pairing=pairing,
            settings=defaults,
        )
        store.create_campaign(*plan_campaign(store, request, print))
        return True


def round_labels(url: str, name: str, generator: "LoadedGenerator", pairs: int) -> list[Preference]:
    """Return the labels of a campaign of `pairs` pairs.

    Raises: ValueError for too few answers, and for labels of another generator.
    """
    with open_store(url, create=False) as store:
        # Different pairs: with several annotators per pair, answers outnumber them.
        answered = len({row.pair for row in store.judgements(name) if row.kind is Kind.PAIR})
        labels = store_preferences(store, LabelFilters(campaign=name))
    least = max(1, round(LEAST_ANSWERED * pairs))
    if answered < least:
        remedy = f"Continue to label with: {label_command(url, name)}"
        raise ValueError(
            f"{name}: expected answers to at least {least} of {pairs} pairs, got {answered}. {remedy}"
        )
    # A database from another run would train the reward on other shapes.
    foreign = {label.generator for label in labels} - {generator.hash}
    if foreign:
        actual = str(foreign.pop())[:12]
        raise ValueError(
            f"{name}: expected labels of generator {generator.hash[:12]}..., got labels of {actual}..."
            " Restore the database."
        )
    return labels


def mesh_ensemble(strategy: str, rewards: Sequence[str], collection: Collection) -> Ensemble:
    """Load mesh rewards (`eg3d-rlhf reward mesh`) as an ensemble that scores the assets of a collection by
    index.

    Raises: ValueError for too few rewards, for other kinds of rewards, and for assets that are no meshes.
    """
    if not rewards:
        least = STRATEGIES[strategy].least_rewards
        raise ValueError(
            f"--strategy={strategy}: expected {least} or more mesh rewards for asset files, got none. Train"
            " them with `eg3d-rlhf reward mesh` and name each by --reward=FILE. For assets that a flow has"
            f" sampled, use `eg3d-rlhf flow label WORK --strategy={strategy}`."
        )
    check_rewards(strategy, len(rewards))
    other = next((asset for asset in collection.assets if asset.kind not in _MESHES), None)
    if other is not None:
        raise ValueError(
            f"--strategy={strategy}: mesh rewards read meshes only, but {other.path.name} is of kind"
            f" {other.kind}. Use --strategy=random."
        )
    import torch

    from eg3d_rlhf.rewards.meshes.dataset import load_mesh
    from eg3d_rlhf.rewards.meshes.model import load_mesh_reward
    from eg3d_rlhf.rewards.meshes.patches import patches_of

    members = [load_mesh_reward(path) for path in rewards]

    @torch.no_grad()
    def score(indices: Sequence[int]) -> Scored:
        """Score assets: scores [M members, N], and embeddings [N, sum of widths]."""
        assets = [collection.assets[index] for index in indices]
        meshes = [load_mesh(asset.path) for asset in assets]
        # A prompt without a text, such as one with an image only, is represented by its name.
        prompts = [collection.prompts[asset.prompt].text or asset.prompt for asset in assets]
        # One embedding [N, D] per member; the head maps it to a score [N, 1].
        embeddings = [m.embed(patches_of(meshes, m.patches), prompts) for m in members]
        scores = [m.head(e)[:, 0] for m, e in zip(members, embeddings, strict=True)]
        return Scored(torch.stack(scores).double().numpy(), torch.cat(embeddings, dim=1).double().numpy())

    described = [{"file": Path(path).name, "sha256": file_hash(path), "members": 1} for path in rewards]
    return Ensemble(score, len(members), described)
