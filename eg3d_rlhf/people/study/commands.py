"""The command line of the blind study: design and serve it, report on it, and the calculations beside it."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eg3d_rlhf.core.cli import GroupedCommand, check_extra, choose_device, naming, option, options_of
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.access import add_annotator, annotators, new_token, revoke
from eg3d_rlhf.people.label.assets.collection import is_asset_folder
from eg3d_rlhf.people.label.assets.damage import DAMAGED_KINDS
from eg3d_rlhf.people.label.commands import LabelGroup
from eg3d_rlhf.people.label.db_flag import EXTRA, open_store, store_exists
from eg3d_rlhf.people.label.entities import JudgementRow, Kind
from eg3d_rlhf.people.label.store_labels import without_password
from eg3d_rlhf.people.study import design as designs
from eg3d_rlhf.people.study import report as reports
from eg3d_rlhf.people.study.analysis import sort_rows
from eg3d_rlhf.people.study.design import ExclusionRules, StudyDesign
from eg3d_rlhf.people.study.power import (
    PowerOptions,
    SampleSize,
    SimulationOptions,
    coverage,
    exact_power,
    sample_size,
)
from training.config import knobs_of

if TYPE_CHECKING:
    from eg3d_rlhf.generators import LoadedGenerator
    from eg3d_rlhf.people.label.store import Store

OUTDIR = Path("runs/study")
RULES, POWER, OWN = (
    tuple(field.name for field, _, _ in knobs_of(kind))
    for kind in (ExclusionRules, PowerOptions, StudyDesign)
)
FREE = tuple(name for name in OWN if name not in RULES)  # go into the design as they are


@dataclass(frozen=True)
class Folder:
    """Where a study lives."""

    path: Path
    db: str | None = None  # store's URL; None: an SQLite file in the folder

    @property
    def design(self) -> Path:
        return self.path / "design.json"

    @property
    def url(self) -> str:
        return self.db or f"sqlite:///{self.path / 'study.db'}"


def power_options(flags: Mapping) -> PowerOptions:
    """What the flags say about the power calculation."""
    per_pair = flags["annotators_per_pair"] or min(2, flags["annotators"])
    return PowerOptions(
        annotators=flags["annotators"], annotators_per_pair=per_pair, **{name: flags[name] for name in POWER}
    )


def planned_trials(flags: Mapping, warn: Callable[[str], None]) -> tuple[int, SampleSize | None]:
    """The number of trials: --n, or what the power calculation asks for;
    warns where --n falls short of it.
    """
    try:
        size = sample_size(power_options(flags))
    except ValueError as error:
        if flags["n"] is None:
            raise
        warn(f"--n={flags['n']}: the power calculation finds no number that would do ({error})")
        return flags["n"], None
    if flags["n"] is not None and flags["n"] < size.trials:
        warn(
            f"--n={flags['n']}: {size.trials} trials would show a win rate of {flags['true_rate']:g} with"
            f" power {flags['power']:g}"
        )
    return flags["n"] or size.trials, size


def make_design(name: str, flags: Mapping, warn: Callable[[str], None]) -> StudyDesign:
    """The design that the flags describe; loads both generators for their hashes."""
    from eg3d_rlhf.generators import load_generator

    with flagged(flags):
        trials, size = planned_trials(flags, warn)
        rules = ExclusionRules(**{rule: flags[rule] for rule in RULES})
    sides = {}
    loaded = {}
    assets: dict[str, Any] = {}
    if of_assets(flags):
        contenders, rows, prompts = designs.read_sides(Path(flags["a"]), Path(flags["b"]), warn)
        sides = {side: replace(c, label=flags[f"label_{side}"] or c.label) for side, c in contenders.items()}
        assets = {"assets": tuple(rows), "prompts": prompts}
        if flags["gold_every"] and not any(
            all(row[side]["kind"] in DAMAGED_KINDS for side in ("a", "b")) for row in rows
        ):
            warn("no gold checks and no practice: videos cannot be damaged on purpose")
            flags = {**flags, "gold_every": 0}
    for side in () if assets else ("a", "b"):
        with naming(f"--{side}"):
            label = "bundled" if flags[side] is None else _name_of(Path(flags[side]))
            loaded[side] = load_generator(flags[side])
            sides[side] = designs.contender(flags[f"label_{side}"] or label, loaded[side])
    shapes = len(assets["assets"]) if assets else common_shapes(loaded["a"], loaded["b"])
    if sides["a"].generator == sides["b"].generator:
        raise ValueError(
            "--a, --b: expected two different generators, got the same weights twice. Name another network"
            " for --b."
        )
    if sides["a"].label == sides["b"].label:
        raise ValueError(
            f"--label-a, --label-b: expected two names to tell them apart, got {sides['a'].label!r} twice."
            " Give them."
        )
    with flagged(flags):
        return StudyDesign(
            name=name,
            a=sides["a"],
            b=sides["b"],
            trials=trials,
            annotators_per_pair=power_options(flags).annotators_per_pair,
            confidence=round(1 - flags["alpha"], 12),
            exclusions=rules,
            power=asdict(size) if size else {},
            shapes=shapes,
            **assets,
            **{flag: flags[flag] for flag in FREE},
        )


def _name_of(network: Path) -> str:
    """Of a file its name without the ending; of a run folder all of it, as '00000-x.v1.5' has none."""
    return (network.resolve().name if network.is_dir() else network.stem) or str(network)


def of_assets(flags: Mapping) -> bool:
    """Whether --a and --b are folders of finished assets. Raises: ValueError where one of them alone is."""
    known = [flags[side] is not None and is_asset_folder(Path(flags[side])) for side in ("a", "b")]
    if known[0] != known[1]:
        raise ValueError(
            "--a, --b: expected two generators or two folders of assets, got one of each. Name the other"
            " one's assets."
        )
    return known[0]


def common_shapes(a: "LoadedGenerator", b: "LoadedGenerator") -> int | None:
    """How many shapes two generators have whose shapes can be counted; None for others.

    Raises: ValueError where they do not correspond.
    """
    from eg3d_rlhf.generators import count_of

    counts = [count_of(loaded.generator) for loaded in (a, b)]
    pairs = [loaded.nets.training_set.get("pairs") for loaded in (a, b)]
    if counts[0] != counts[1] or pairs[0] != pairs[1]:
        raise ValueError(
            "--a, --b: expected two files of assets of the same prompts and seeds, got others. Name two arms"
            " of one run."
        )
    return counts[0]


@contextlib.contextmanager
def flagged(flags: Mapping) -> Iterator[None]:
    """An error that begins with a setting's name is given the name of its flag."""
    try:
        yield
    except ValueError as error:
        name = re.split(r"\W", str(error), maxsplit=1)[0]
        raise ValueError(
            f"--{name.replace('_', '-')}{str(error)[len(name) :]}" if name in flags else str(error)
        ) from error


def prepare(
    folder: Folder, name: str, flags: Mapping, given: set[str], tell: Callable[[str], None]
) -> StudyDesign:
    """The study of a folder, made if there is none.

    The design file comes first, then the campaign, which keeps the design's hash; neither is ever written
    again.
    """
    new = not folder.design.exists()
    if new and store_exists(folder.url):
        with open_store(folder.url, create=False) as store:
            if store.campaign(name) is not None:
                raise ValueError(
                    f"{folder.design}: expected the design of study {name!r}, got no file. Restore it, or use"
                    " another --name."
                )
    if new:
        wrong = sorted(given & {"psi", "level", "resolution", "triangles"}) if of_assets(flags) else []
        if "up" in given and not of_assets(flags):
            raise ValueError(
                "--up: expected folders of assets as --a and --b, got generators, whose shapes stand upright."
                " Leave it out."
            )
        if wrong:
            raise ValueError(
                f"--{wrong[0]}: expected no such flag with assets, which are finished. Leave it out."
            )
        designs.write_design(folder.design, make_design(name, flags, tell))
    with open_store(folder.url, create=True) as store:
        design = checked_design(folder, store, name if "name" in given or new else None)
        check_given(design, flags, given)
        if design.assets:
            designs.check_files(design)
        for side in () if design.assets else ("a", "b"):
            with naming(f"--{side}"):
                reports.load_contender(getattr(design, side))
        if store.campaign(design.name) is None:
            store.create_campaign(designs.campaign_settings(design), designs.study_pairs(design))
        answered = len(sort_rows(design, list(store.judgements(design.name))).trials)
    if designs.stopped(design, answered):
        met = (
            f"expected an open study, got one whose stopping rule is met ({answered} of {design.trials}"
            " trials)"
        )
        raise ValueError(
            f"study {design.name}: {met}. Make the report: python tools/study.py report"
            f" --outdir={folder.path}"
        )
    tell(
        f"study {design.name!r}: {answered} of {design.trials} trials answered; design {folder.design}, hash"
        f" {design.hash[:16]}"
    )
    return design


def checked_design(folder: Folder, store: "Store", name: str | None = None) -> StudyDesign:
    """The folder's design, held against the hash that the store's campaign keeps."""
    design = designs.read_design(folder.design)
    if name is not None and design.name != name:
        raise ValueError(
            f"--name: expected {design.name!r}, the study in {folder.path}, got {name!r}. A new one needs"
            " another --outdir."
        )
    campaign = store.campaign(design.name)
    if campaign is not None:
        designs.read_design(folder.design, str(campaign.settings.extra.get("design_hash")))
    return design


def check_given(design: StudyDesign, flags: Mapping, given: set[str]) -> None:
    """Flags on the command line must say what the design says: it cannot be changed by them."""
    stored = {
        **{flag: getattr(design, flag) for flag in FREE},
        **asdict(design.exclusions),
        "n": design.trials,
        "annotators_per_pair": design.annotators_per_pair,
        "label_a": design.a.label,
        "label_b": design.b.label,
        **{name: design.power.get("options", {}).get(name) for name in POWER if design.power},
        "alpha": round(1 - design.confidence, 12),
    }
    for flag in sorted(given & set(stored)):
        if flags[flag] != stored[flag]:
            wrong = f"expected {stored[flag]}, as the study was designed, got {flags[flag]}"
            raise ValueError(
                f"--{flag.replace('_', '-')}: {wrong}. Leave the flag out, or design a new study in another"
                " --outdir."
            )
    for side in ("a", "b"):
        if side in given:
            with naming(f"--{side}"):
                if not design.assets:
                    reports.load_contender(replace(getattr(design, side), source=flags[side]))
                elif str(Path(flags[side]).resolve()) != getattr(design, side).source:
                    raise ValueError(
                        f"expected {getattr(design, side).source}, as designed, got {flags[side]}. Leave the"
                        " flag out."
                    )


def study_rows(folder: Folder) -> tuple[StudyDesign, list[JudgementRow]]:
    """The design and the judgements of a folder. Raises: ValueError, FileNotFoundError."""
    designs.read_design(folder.design)
    with open_store(folder.url, create=False) as store:
        design = checked_design(folder, store)
        if store.campaign(design.name) is None:
            raise ValueError(
                f"study {design.name}: expected its campaign in {folder.url}, got none. Name its database"
                " with --db."
            )
        return design, [r for r in store.judgements(design.name) if r.kind in (Kind.PAIR, Kind.GOLD)]


@click.command("report", cls=GroupedCommand)
@option(
    "--outdir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    show_default=str(OUTDIR),
    help="The study's folder; the report goes there.",
)
@option(
    "--db",
    metavar="URL",
    default=None,
    show_default="study.db in the folder",
    help="Database of the answers.",
)
@option("--interim", is_flag=True, help="Report before the stopping rule is met, and mark it so.")
@option(
    "--pictures",
    metavar="INT",
    type=click.IntRange(0, 50),
    default=6,
    help="Pairs shown of either end; 0 needs no generator.",
)
def report(outdir: Path | None, db: str | None, interim: bool, pictures: int) -> None:
    """Analyse a finished study as designed: report.html and report.json."""
    outer = click.get_current_context().meta.get("folder", Folder(OUTDIR))
    folder = Folder(outdir or outer.path, db or (outer.db if outdir is None else None))
    design, rows = study_rows(folder)
    pictures = 0 if design.assets else pictures
    if pictures:
        click.echo(f"analysing, and drawing up to {2 * pictures} pairs ...", err=True)
    content = reports.compute(design, rows, interim, pictures, str(choose_device("auto")))
    for path in reports.write(content, folder.path):
        click.echo(path)
    for sentence in content["conclusions"]:
        click.echo(f"- {sentence}")


@click.command("power", cls=GroupedCommand)
@options_of(PowerOptions)
@option(
    "--annotators",
    metavar="INT",
    type=click.IntRange(min=1),
    default=1,
    group="Power",
    help="People who are asked.",
)
@option(
    "--annotators-per-pair",
    metavar="INT",
    type=click.IntRange(min=1),
    default=None,
    group="Power",
    show_default="2 where there are several",
    help="To judge each pair.",
)
@option(
    "--n",
    metavar="INT",
    type=click.IntRange(min=1),
    default=None,
    help="Also give the power of so many independent decided trials.",
)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def power(n: int | None, as_json: bool, **options) -> None:
    """How many trials a study needs."""
    with flagged(options):
        size = sample_size(power_options(launch.filled(options, PowerOptions)))
    record = asdict(size)
    if n is not None:
        record["power_of_n"] = {
            "n": n,
            "power": float(exact_power(n, size.options.true_rate, size.options.alpha)),
        }
    if as_json:
        click.echo(json.dumps(record, indent=1))
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
@option(
    "--random-sides/--fixed-sides",
    default=True,
    group="Truth",
    rare=True,
    help="No: b is always on the left, which no study may do.",
)
@option(
    "--bootstrap-studies",
    metavar="INT",
    type=click.IntRange(min=0),
    default=0,
    rare=True,
    help="Evaluate the bootstraps on so many.",
)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def simulate(bootstrap_studies: int, as_json: bool, **options) -> None:
    """Studies with a known truth: how often each interval covers it,
    and how often each finds a difference.
    """
    with flagged(options):
        resolved = SimulationOptions(**launch.filled(options, SimulationOptions))
    result = coverage(resolved, bootstrap_studies)
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    means = f"truth {result['truth']:.3f}, mean {result['mean_win_rate']:.3f}"
    click.echo(f"{result['options']['studies']} studies of {result['trials']} trials; {means}")
    click.echo(f"left chosen in {result['left_share']:.1%}; design effect {result['design_effect']:.2f}")
    click.echo(f"{'interval':<22} {'studies':>7} {'covers':>8} {'width':>7} {'leaves 0.5 out':>15}")
    for name, row in result["intervals"].items():
        click.echo(
            f"{name:<22} {row['studies']:>7} {row['coverage']:>8.1%} {row['width']:>7.3f}"
            f" {row['rejects_half']:>15.1%}"
        )


@click.command("study", cls=LabelGroup, invoke_without_command=True)
@option(
    "--a",
    metavar="PATH",
    default=None,
    show_default="the bundled generator",
    group="Study",
    help="Network file or run folder; or a folder of finished assets, PROMPT.glb.",
)
@option(
    "--b",
    metavar="PATH",
    default=None,
    show_default="the bundled generator",
    group="Study",
    help="The one it is compared with.",
)
@option(
    "--label-a",
    metavar="NAME",
    default=None,
    show_default="the file's name",
    group="Study",
    rare=True,
    help="How reports call a.",
)
@option(
    "--label-b",
    metavar="NAME",
    default=None,
    show_default="the file's name",
    group="Study",
    rare=True,
    help="How reports call b.",
)
@option(
    "--n",
    metavar="INT",
    type=click.IntRange(min=1),
    default=None,
    show_default="from the power calculation",
    group="Study",
    help="Trials after which the study is over.",
)
@option(
    "--annotators-per-pair",
    metavar="INT",
    type=click.IntRange(min=1),
    default=None,
    show_default="2 where there are several",
    group="Study",
    help="Different annotators to judge each pair.",
)
@options_of(StudyDesign, PowerOptions)
@option(
    "--outdir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=OUTDIR,
    help="The study's folder.",
)
@option(
    "--name", metavar="NAME", default=None, show_default="the folder's name", help="Of the study.", rare=True
)
@option(
    "--db",
    metavar="URL",
    default=None,
    show_default="study.db in the folder",
    help="Database of the answers.",
)
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
    folder = Folder(outdir, db)
    name = name or outdir.resolve().name
    ctx.obj = folder.url
    ctx.meta["folder"] = folder
    if ctx.invoked_subcommand is not None:
        launch.refuse_flags_before(ctx, "outdir", "db")
        return
    check_extra(EXTRA)
    server = launch.ServerFlags.of(flags, outdir)
    if dry_run:
        click.echo(json.dumps(_dry_run(folder, name, flags, server), indent=1))
        return
    make = f"python tools/study.py --outdir={folder.path} add-annotator NAME"
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
    missing = design.annotators - have
    need = f"{have} have a token, {missing} need one ({make})" if missing > 0 else "all have a token"
    tokens = f"{design.annotators} annotators are planned: {need}; they log in at {address}login"
    return [f"study at {address}  (Ctrl-C stops)", *([tokens] if design.annotators > 1 else [])]


def _dry_run(folder: Folder, name: str, flags: dict, server: launch.ServerFlags) -> dict:
    new = not folder.design.exists()
    made = make_design(name, flags, lambda text: click.echo(f"Warning: {text}", err=True)) if new else None
    design = made or designs.read_design(folder.design)
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


for command in (report, power, simulate, add_annotator, new_token, revoke, annotators):
    main.add_command(command)
