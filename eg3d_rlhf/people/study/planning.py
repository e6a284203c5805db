"""Creates or continues the folder of a blind study: its design, from flags or read again, and its
campaign.
"""

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
EXCLUSION_FLAGS, POWER_FLAGS, DESIGN_FLAGS = (  # names of the flags that belong to each class
    tuple(field.name for field, _, _ in knobs_of(kind))
    for kind in (ExclusionRules, PowerOptions, StudyDesign)
)
# These flags become fields of the design without a change.
DIRECT_FLAGS = tuple(name for name in DESIGN_FLAGS if name not in EXCLUSION_FLAGS)


@dataclass(frozen=True)
class Folder:
    """Folder of a study, with its design and, by default, its database."""

    path: Path
    db: str | None = None  # URL of the store; None: an SQLite file in the folder

    @property
    def design(self) -> Path:
        """Path of the design."""
        return self.path / "design.json"

    @property
    def url(self) -> str:
        """URL of the store."""
        return self.db or f"sqlite:///{self.path / 'study.db'}"


def power_options(flags: Mapping) -> PowerOptions:
    """Return the options of the power calculation from the flags."""
    # By default two annotators answer each pair, which shows how far they agree.
    per_pair = flags["annotators_per_pair"] or min(2, flags["annotators"])
    return PowerOptions(
        annotators=flags["annotators"],
        annotators_per_pair=per_pair,
        **{name: flags[name] for name in POWER_FLAGS},
    )


def planned_trials(flags: Mapping, warn: Callable[[str], None]) -> "tuple[int, SampleSize | None]":
    """Return the number of trials and the power calculation. The number is --n, or the result of the
    calculation. `warn` is called with a line if --n is smaller than that.
    """
    try:
        size = sample_size(power_options(flags))
    except ValueError as error:
        # Without --n the calculation must succeed.
        if flags["n"] is None:
            raise
        warn(f"--n={flags['n']}: no number of trials has the required power ({error})")
        return flags["n"], None
    # A smaller study is allowed: the user may not find enough annotators.
    if flags["n"] is not None and flags["n"] < size.trials:
        warn(
            f"--n={flags['n']}: showing a win rate of {flags['true_rate']:g} with power {flags['power']:g}"
            f" needs {size.trials} trials"
        )
    return flags["n"] or size.trials, size


def make_design(name: str, flags: Mapping, warn: Callable[[str], None]) -> StudyDesign:
    """Make the design that the flags describe. Both generators are loaded for their hashes."""
    from eg3d_rlhf.generators import load_generator

    with flagged(flags):
        trials, size = planned_trials(flags, warn)
        rules = ExclusionRules(**{rule: flags[rule] for rule in EXCLUSION_FLAGS})
    sides = {}
    loaded = {}
    assets: dict[str, Any] = {}
    if compares_assets(flags):
        contenders, rows, prompts = designs.read_sides(Path(flags["a"]), Path(flags["b"]), warn)
        sides = {side: replace(c, label=flags[f"label_{side}"] or c.label) for side, c in contenders.items()}
        assets = {"assets": tuple(rows), "prompts": prompts}
        if flags["gold_every"] and not any(
            all(row[side]["kind"] in DAMAGED_KINDS for side in ("a", "b")) for row in rows
        ):
            warn("no gold checks and no training pairs: videos cannot be damaged deliberately")
            # The design states what will be done: no gold checks.
            flags = {**flags, "gold_every": 0}
    for side in () if assets else ("a", "b"):
        with naming(f"--{side}"):
            label = "bundled" if flags[side] is None else _name_of(Path(flags[side]))
            loaded[side] = load_generator(flags[side])
            sides[side] = designs.contender(flags[f"label_{side}"] or label, loaded[side])
    shapes = len(assets["assets"]) if assets else common_shapes(loaded["a"], loaded["b"])
    # Checked before the design is made, so that the message names the flags.
    if sides["a"].generator == sides["b"].generator:
        raise ValueError(
            "--a, --b: expected two different generators, got the same weights twice. Name another network"
            " for --b."
        )
    # Both sides would have the same name in the report.
    if sides["a"].label == sides["b"].label:
        raise ValueError(
            f"--label-a, --label-b: expected two different names, got {sides['a'].label!r} twice. Give both"
            " flags."
        )
    with flagged(flags):
        # The confidence is rounded, because 1 - 0.05 is 0.95 only up to rounding errors, and the design is
        # compared.
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
            **{flag: flags[flag] for flag in DIRECT_FLAGS},
        )


def _name_of(network: Path) -> str:
    """Return a network's name: of a file without its suffix; of a run folder complete, because '00000-x.v1.5'
    has no suffix.
    """
    return (network.resolve().name if network.is_dir() else network.stem) or str(network)


def compares_assets(flags: Mapping) -> bool:
    """Return True if --a and --b are folders of assets. Raises: ValueError if only one of them is."""
    folders = [flags[side] is not None and is_asset_folder(Path(flags[side])) for side in ("a", "b")]
    if folders[0] != folders[1]:
        raise ValueError(
            "--a, --b: expected two generators or two folders of assets, got one of each. Name another"
            " folder or network."
        )
    return folders[0]


def common_shapes(a: "LoadedGenerator", b: "LoadedGenerator") -> int | None:
    """Return the number of shapes of two generators with a finite number of shapes; None for others.

    Raises: ValueError if their shapes do not correspond.
    """
    from eg3d_rlhf.generators import count_of

    # Generators of files have a finite number of shapes; others one per seed.
    counts = [count_of(loaded.generator) for loaded in (a, b)]
    pairs = [loaded.nets.training_set.get("pairs") for loaded in (a, b)]
    if counts[0] != counts[1] or pairs[0] != pairs[1]:
        raise ValueError(
            "--a, --b: expected two files of assets of the same prompts and seeds, but they differ. Name"
            " two arms of one run."
        )
    return counts[0]


@contextlib.contextmanager
def flagged(flags: Mapping) -> Iterator[None]:
    """Turn the name of a setting at the beginning of an error into the name of its flag."""
    try:
        yield
    except ValueError as error:
        name = re.split(r"\W", str(error), maxsplit=1)[0]
        raise ValueError(
            f"--{name.replace('_', '-')}{str(error)[len(name) :]}" if name in flags else str(error)
        ) from error


def prepare(
    folder: Folder, name: str, flags: Mapping, given: set[str], report: Callable[[str], None]
) -> StudyDesign:
    """Open the study of a folder, or create it if there is none.

    The design file is written first, then the campaign, which contains the hash of the design. Neither is
    ever changed.

    Args:
        folder: of the study.
        name: of a new study.
        flags: values of all flags.
        given: names of the flags that were written on the command line.
        report: called with lines of progress.

    Raises: ValueError for other flags than those of the design, and if the study is complete.
    """
    from eg3d_rlhf.people.study import study_report as reports
    from eg3d_rlhf.people.study.analysis import sort_rows

    new = not folder.design.exists()
    # A campaign without its design file must not get a new design.
    if new and store_exists(folder.url):
        with open_store(folder.url, create=False) as store:
            if store.campaign(name) is not None:
                raise ValueError(
                    f"{folder.design}: the file of study {name!r} is missing, but its campaign exists."
                    " Restore the file, or use another --name."
                )
    if new:
        wrong = sorted(given & {"psi", "level", "resolution", "triangles"}) if compares_assets(flags) else []
        if "up" in given and not compares_assets(flags):
            raise ValueError(
                "--up can be used for folders of assets only; shapes of generators always have y up. Remove"
                " --up."
            )
        if wrong:
            raise ValueError(
                f"--{wrong[0]} cannot be used for assets, whose surfaces are fixed. Remove --{wrong[0]}."
            )
        designs.write_design(folder.design, make_design(name, flags, report))
    with open_store(folder.url, create=True) as store:
        design = checked_design(folder, store, name if "name" in given or new else None)
        # Also right after the design was made: both paths run the same checks.
        check_given(design, flags, given)
        if design.assets:
            designs.check_files(design)
        # Loading both generators checks that their files still contain the weights of the design.
        for side in () if design.assets else ("a", "b"):
            with naming(f"--{side}"):
                reports.load_contender(getattr(design, side))
        if store.campaign(design.name) is None:
            store.create_campaign(designs.campaign_settings(design), designs.study_pairs(design))
        # Counted by the rules of the analysis, not by the number of rows.
        answered = len(sort_rows(design, list(store.judgements(design.name))).trials)
    if designs.stopped(design, answered):
        raise ValueError(
            f"study {design.name}: the stopping rule is met ({answered} of {design.trials} trials), so no"
            " further answers are collected. Make the report with: python tools/study.py report"
            f" --outdir={folder.path}"
        )
    report(
        f"study {design.name!r}: {answered} of {design.trials} trials answered; design {folder.design}, hash"
        f" {design.hash[:16]}"
    )
    return design


def checked_design(folder: Folder, store: "Store", name: str | None = None) -> StudyDesign:
    """Read the folder's design and compare it with the hash in the store's campaign. Raises: ValueError."""
    design = designs.read_design(folder.design)
    if name is not None and design.name != name:
        raise ValueError(
            f"--name: the study in {folder.path} is called {design.name!r}, got {name!r}. Use another"
            " --outdir for a new study."
        )
    campaign = store.campaign(design.name)
    if campaign is not None:
        designs.read_design(folder.design, str(campaign.settings.extra.get("design_hash")))
    return design


def check_given(design: StudyDesign, flags: Mapping, given: set[str]) -> None:
    """Check that flags on the command line agree with the design, which they cannot change. Raises:
    ValueError.
    """
    from eg3d_rlhf.people.study import study_report as reports

    stored = {
        **{flag: getattr(design, flag) for flag in DIRECT_FLAGS},
        **asdict(design.exclusions),
        "n": design.trials,
        "annotators_per_pair": design.annotators_per_pair,
        "label_a": design.a.label,
        "label_b": design.b.label,
        **{name: design.power.get("options", {}).get(name) for name in POWER_FLAGS if design.power},
        "alpha": round(1 - design.confidence, 12),
    }
    # Only flags that were written: defaults may have changed since the design.
    for flag in sorted(given & set(stored)):
        if flags[flag] != stored[flag]:
            raise ValueError(
                f"--{flag.replace('_', '-')}: the study was designed with {stored[flag]}, got {flags[flag]}."
                " Remove the flag, or design a new study in another --outdir."
            )
    for side in ("a", "b"):
        if side in given:
            with naming(f"--{side}"):
                if not design.assets:
                    # Another path is allowed if it has the same weights.
                    reports.load_contender(replace(getattr(design, side), source=flags[side]))
                elif str(Path(flags[side]).resolve()) != getattr(design, side).source:
                    raise ValueError(
                        f"the study was designed with {getattr(design, side).source}, got {flags[side]}."
                        " Remove the flag."
                    )


def study_rows(folder: Folder) -> "tuple[StudyDesign, list[JudgementRow]]":
    """Return the design and the judgements of a folder. Raises: ValueError, FileNotFoundError."""
    designs.read_design(folder.design)
    with open_store(folder.url, create=False) as store:
        design = checked_design(folder, store)
        if store.campaign(design.name) is None:
            raise ValueError(
                f"study {design.name}: there is no such campaign in {folder.url}. Name the study's database"
                " with --db."
            )
        return design, [r for r in store.judgements(design.name) if r.kind in (Kind.PAIR, Kind.GOLD)]
