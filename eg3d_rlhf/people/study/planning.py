"""A blind study's folder: its design, made from flags or read again, and its campaign in the store."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.core.cli import naming
from eg3d_rlhf.people.label.assets.collection import is_asset_folder
from eg3d_rlhf.people.label.assets.damage import DAMAGED_KINDS
from eg3d_rlhf.people.label.db_flag import open_store, store_exists
from eg3d_rlhf.people.label.entities import JudgementRow, Kind
from eg3d_rlhf.people.study import design as designs
from eg3d_rlhf.people.study.design import ExclusionRules, StudyDesign
from eg3d_rlhf.people.study.power import PowerOptions, SampleSize, sample_size
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


def planned_trials(flags: Mapping, warn: Callable[[str], None]) -> "tuple[int, SampleSize | None]":
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
    from eg3d_rlhf.people.study import study_report as reports
    from eg3d_rlhf.people.study.analysis import sort_rows

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
    from eg3d_rlhf.people.study import study_report as reports

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


def study_rows(folder: Folder) -> "tuple[StudyDesign, list[JudgementRow]]":
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
