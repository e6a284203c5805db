"""Making a study from flags, or taking it up again: its folder, its design file, its campaign."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from eg3d_rlhf.cli import naming
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.label.entities import JudgementRow, Kind
from eg3d_rlhf.label.launch import open_store, sqlite_file
from eg3d_rlhf.label.store import Store
from eg3d_rlhf.study.analysis import sort_rows
from eg3d_rlhf.study.design import (
    ExclusionRules,
    StudyDesign,
    campaign_settings,
    contender,
    read_design,
    stopped,
    study_pairs,
    write_design,
)
from eg3d_rlhf.study.power import PowerOptions, SampleSize, sample_size

RULES = tuple(ExclusionRules.__dataclass_fields__)
POWER = ("true_rate", "power", "tie_share", "annotator_icc", "latent_icc")
FREE = ("seed", "psi", "level", "resolution", "triangles", "gold_every", "ties", "until", "resamples")  # go into the design as they are


@dataclass(frozen=True)
class Folder:
    """Where a study lives."""

    path: Path
    db: str | None = None  # store's URL; None: an SQLite file in the folder

    @property
    def design(self) -> Path:
        """The design file."""
        return self.path / "design.json"

    @property
    def url(self) -> str:
        """The store's URL."""
        return self.db or f"sqlite:///{self.path / 'study.db'}"

    @property
    def has_store(self) -> bool:
        """Whether there is a store; one on a server counts as there."""
        file = sqlite_file(self.url)
        return file is None or file.is_file()


def power_options(flags: Mapping) -> PowerOptions:
    """What the flags say about the power calculation."""
    per_pair = flags["annotators_per_pair"] or min(2, flags["annotators"])
    wishes = {name: flags[name] for name in POWER}
    return PowerOptions(alpha=flags["alpha"], annotators=flags["annotators"], annotators_per_pair=per_pair, **wishes)


def planned_trials(flags: Mapping, warn: Callable[[str], None]) -> tuple[int, SampleSize | None]:
    """The number of trials: --n, or what the power calculation asks for; warns where --n falls short of it."""
    try:
        size = sample_size(power_options(flags))
    except ValueError as error:
        if flags["n"] is None:
            raise
        warn(f"--n={flags['n']}: the power calculation finds no number that would do ({error})")
        return flags["n"], None
    if flags["n"] is not None and flags["n"] < size.trials:
        warn(f"--n={flags['n']}: {size.trials} trials would show a win rate of {flags['true_rate']:g} with power {flags['power']:g}")
    return flags["n"] or size.trials, size


def make_design(name: str, flags: Mapping, warn: Callable[[str], None] = lambda text: None) -> StudyDesign:
    """The design that the flags describe; loads both generators for their hashes.

    Raises: ValueError, OSError naming the flag.
    """
    with flagged(flags):
        trials, size = planned_trials(flags, warn)
        rules = ExclusionRules(**{rule: flags[rule] for rule in RULES})
    sides = {}
    for side in ("a", "b"):
        with naming(f"--{side}"):
            sides[side] = contender(flags[f"label_{side}"] or label_of(flags[side]), load_generator(flags[side]))
    if sides["a"].generator == sides["b"].generator:
        raise ValueError("--a, --b: expected two different generators, got the same weights twice. Name another network for --b.")
    if sides["a"].label == sides["b"].label:
        raise ValueError(f"--label-a, --label-b: expected two names to tell them apart, got {sides['a'].label!r} twice. Give them.")
    with flagged(flags):
        return StudyDesign(
            name=name, a=sides["a"], b=sides["b"], trials=trials, annotators=flags["annotators"],
            annotators_per_pair=power_options(flags).annotators_per_pair, confidence=round(1 - flags["alpha"], 12),
            exclusions=rules, power=size.to_dict() if size else {}, **{flag: flags[flag] for flag in FREE},
        )  # fmt: skip


@contextlib.contextmanager
def flagged(flags: Mapping) -> Iterator[None]:
    """An error that begins with a setting's name is given the name of its flag."""
    try:
        yield
    except ValueError as error:
        name = re.split(r"\W", str(error), maxsplit=1)[0]
        raise ValueError(f"--{name.replace('_', '-')}{str(error)[len(name):]}" if name in flags else str(error)) from error


def label_of(source: str | None) -> str:
    """How reports call a generator that was given no name."""
    return "bundled" if source is None else Path(source).stem or str(source)


def prepare(folder: Folder, name: str, flags: Mapping, given: set[str], tell: Callable[[str], None]) -> tuple[StudyDesign, bool]:
    """The study of a folder, made if there is none; whether it was new.

    The design file comes first, then the campaign, which keeps the design's hash; neither is ever written again.
    Raises: ValueError where the design was altered, flags contradict it, the generators changed, or the study is over.
    """
    new = not folder.design.exists()
    if new and folder.has_store:
        with open_store(folder.url, create=False) as store:
            if store.campaign(name) is not None:
                raise ValueError(
                    f"{folder.design}: expected the design of study {name!r}, which has a campaign, got no file. Restore it, or choose "
                    "another --name."
                )
    if new:
        write_design(folder.design, make_design(name, flags, tell))
    with open_store(folder.url, create=True) as store:
        design = checked_design(folder, store, name if "name" in given or new else None)
        check_given(design, flags, given)
        for side in ("a", "b"):
            with naming(f"--{side}"):
                _check_weights(getattr(design, side))
        if store.campaign(design.name) is None:
            store.create_campaign(campaign_settings(design), study_pairs(design))
        answered = len(sort_rows(design, list(store.judgements(design.name))).trials)
    if stopped(design, answered):
        raise ValueError(
            f"study {design.name}: expected an open study, got one whose stopping rule is met ({answered} of {design.trials} trials). "
            f"Make the report: python tools/study.py report --outdir={folder.path}"
        )
    tell(f"study {design.name!r}: {answered} of {design.trials} trials answered; design {folder.design}, hash {design.hash[:16]}")
    return design, new


def checked_design(folder: Folder, store: Store, name: str | None = None) -> StudyDesign:
    """The folder's design, held against the hash that the store's campaign keeps."""
    design = read_design(folder.design)
    if name is not None and design.name != name:
        raise ValueError(f"--name: expected {design.name!r}, the study in {folder.path}, got {name!r}. A new one needs another --outdir.")
    campaign = store.campaign(design.name)
    if campaign is not None:
        read_design(folder.design, str(campaign.settings.extra.get("design_hash")))
    return design


def check_given(design: StudyDesign, flags: Mapping, given: set[str]) -> None:
    """Flags on the command line must say what the design says: it cannot be changed by them."""
    stored = {
        **{flag: getattr(design, flag) for flag in FREE}, **asdict(design.exclusions), "n": design.trials, "annotators": design.annotators,
        "annotators_per_pair": design.annotators_per_pair, "alpha": round(1 - design.confidence, 12),
        "label_a": design.a.label, "label_b": design.b.label,
        **{name: design.power.get("options", {}).get(name) for name in POWER if design.power},
    }  # fmt: skip
    for flag in sorted(given & set(stored)):
        if flags[flag] != stored[flag]:
            raise ValueError(
                f"--{flag.replace('_', '-')}: expected {stored[flag]}, as the study was designed, got {flags[flag]}. Leave the flag out to "
                "go on with that study, or design a new one in another --outdir."
            )
    for side in ("a", "b"):
        if side in given:
            with naming(f"--{side}"):
                _check_weights(getattr(design, side), flags[side])


def _check_weights(of, source: str | None = None) -> None:
    from eg3d_rlhf.study.report import load_contender

    load_contender(of if source is None else type(of)(label=of.label, source=source, generator=of.generator))


def study_rows(folder: Folder) -> tuple[StudyDesign, list[JudgementRow]]:
    """The design and the judgements of a folder. Raises: ValueError, FileNotFoundError."""
    read_design(folder.design)
    with open_store(folder.url, create=False) as store:
        design = checked_design(folder, store)
        if store.campaign(design.name) is None:
            raise ValueError(f"study {design.name}: expected its campaign in {folder.url}, got none. Name its database with --db.")
        return design, [r for r in store.judgements(design.name) if r.kind in (Kind.PAIR, Kind.GOLD)]
