"""Creation and continuation of a blind study: its folder, its design, and its labelling campaign.

The design is made from flags when a study is created, and is read from the folder when the study is
continued.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import prefix_errors
from eg3d_rlhf.people.label.assets.collection import is_asset_folder
from eg3d_rlhf.people.label.assets.damage import DAMAGED_KINDS
from eg3d_rlhf.people.label.db_flag import open_store, store_exists
from eg3d_rlhf.people.label.entities import JudgementRow, Kind
from eg3d_rlhf.people.label.pairing import check_surfaces
from eg3d_rlhf.people.study import design as designs
from eg3d_rlhf.people.study.design import ExclusionRules, StudyDesign
from eg3d_rlhf.people.study.power import PowerOptions, SampleSize, sample_size
from eg3d_rlhf.preferences.provenance import PEOPLE
from training.config import knobs_of

if TYPE_CHECKING:
    from eg3d_rlhf.generators import LoadedGenerator
    from eg3d_rlhf.people.label.store import Store

OUTDIR = Path("runs/study")  # default of --outdir
# names of the flags that set the knobs of each class
EXCLUSION_FLAGS, POWER_FLAGS, DESIGN_FLAGS = (
    tuple(field.name for field, _, _ in knobs_of(kind))
    for kind in (ExclusionRules, PowerOptions, StudyDesign)
)
# names of the flags whose values become fields of the design unchanged
DIRECT_FLAGS = tuple(name for name in DESIGN_FLAGS if name not in EXCLUSION_FLAGS)


@dataclass(frozen=True)
class Folder:
    """Folder of a study, which contains its design and, by default, its database."""

    path: Path
    db: str | None = None  # URL of the label store; None: an SQLite file in the folder

    @property
    def design(self) -> Path:
        """Return the path of the design."""
        return self.path / "design.json"

    @property
    def url(self) -> str:
        """Return the URL of the label store."""
        return self.db or f"sqlite:///{self.path / 'study.db'}"


def power_options(flags: Mapping) -> PowerOptions:
    """Return the options of the power calculation.

    Args:
        flags: values of all flags, by name.
    """
    # By default two annotators answer each pair, so that their agreement can be measured.
    annotators_per_pair = flags["annotators_per_pair"] or min(2, flags["annotators"])
    return PowerOptions(
        annotators=flags["annotators"],
        annotators_per_pair=annotators_per_pair,
        **{name: flags[name] for name in POWER_FLAGS},
    )


def planned_trials(flags: Mapping, warn: Callable[[str], None]) -> "tuple[int, SampleSize | None]":
    """Return the number of trials, and the result of the power calculation.

    Args:
        flags: values of all flags, by name.
        warn: function that is called with a line if --n is smaller than the calculated number of trials, or
            if no number of trials is enough.

    Returns:
        The value of --n or, without --n, the calculated number; and the result of the calculation, or None if
        no number of trials is enough.

    Raises:
        ValueError: no number of trials is enough, and --n is missing.
    """
    try:
        power_result = sample_size(power_options(flags))
    except ValueError as error:
        if flags["n"] is None:
            raise
        warn(f"--n={flags['n']}: no number of trials has the required power: {error}")
        return flags["n"], None
    # A smaller study is allowed, because the user may not find enough annotators.
    if flags["n"] is not None and flags["n"] < power_result.trials:
        warn(
            f"--n={flags['n']}: a study that shows a win rate of {flags['true_rate']:g} with power"
            f" {flags['power']:g} needs {power_result.trials} trials"
        )
    return flags["n"] or power_result.trials, power_result


def network_of_side(flags: Mapping, side: str) -> Path | None:
    """Return the network of one side of a study of generators; None is the bundled generator.

    A side without a flag is the network from which the tuned network of the other side began.

    Args: flags: values of all flags, by name; side: "a" or "b".
    Raises: ValueError if the other side is a run whose network before tuning was moved or changed.
    """
    # imported here, because this module imports torch, which would slow down --help
    from eg3d_rlhf.experiments.network_before import network_before

    other_network = flags["b" if side == "a" else "a"]
    if flags[side] is not None:
        return Path(flags[side])
    if other_network is None:
        return None
    before_path = network_before([Path(other_network)], f"--{side}")
    return None if before_path == bundled.GENERATOR else before_path


def make_design(
    name: str, flags: Mapping, warn: Callable[[str], None], written_flags: Collection[str] = ()
) -> StudyDesign:
    """Make the design of a study from flags.

    Both generators are loaded, because the design contains their hashes.

    Args:
        name: name of the study.
        flags: values of all flags, by name.
        warn: function that is called with lines for the user.
        written_flags: names of the flags that the user passed.

    Raises:
        ValueError: a flag does not fit; the message names it.
    """
    # imported here, because this module imports torch, which would slow down --help
    from eg3d_rlhf.core.field import LEVEL
    from eg3d_rlhf.generators import load_generator

    with flagged(flags):
        n_trials, power_result = planned_trials(flags, warn)
        exclusion_rules = ExclusionRules(**{rule: flags[rule] for rule in EXCLUSION_FLAGS})
    contender_by_side = {}
    generator_by_side = {}
    asset_fields: dict[str, Any] = {}
    if compares_assets(flags):
        contenders, asset_pairs, prompts = designs.read_sides(Path(flags["a"]), Path(flags["b"]), warn)
        contender_by_side = {
            side: replace(contender, label=flags[f"label_{side}"] or contender.label)
            for side, contender in contenders.items()
        }
        asset_fields = {"assets": tuple(asset_pairs), "prompts": prompts}
        can_be_damaged = any(
            all(asset_pair[side]["kind"] in DAMAGED_KINDS for side in ("a", "b"))
            for asset_pair in asset_pairs
        )
        if flags["gold_every"] and not can_be_damaged:
            warn(
                "There are no gold checks and no practice pairs, because they need damaged shapes, and"
                " videos cannot be damaged."
            )
            # The design must state that there are no gold checks.
            flags = {**flags, "gold_every": 0}
    for side in () if asset_fields else ("a", "b"):
        source = network_of_side(flags, side)
        with prefix_errors(f"--{side}"):
            default_label = "bundled" if source is None else _name_of(source)
            generator_by_side[side] = load_generator(source)
            contender_by_side[side] = designs.contender(
                flags[f"label_{side}"] or default_label, generator_by_side[side]
            )
    n_shapes = (
        len(asset_fields["assets"])
        if asset_fields
        else common_shapes(generator_by_side["a"], generator_by_side["b"])
    )
    # StudyDesign checks this, too. This message names the flags.
    if contender_by_side["a"].generator == contender_by_side["b"].generator:
        raise ValueError(
            f"--a, --b: both flags name the same weights {contender_by_side['a'].generator[:12]}... Pass"
            " another network with --b."
        )
    # With equal labels, the report could not distinguish the generators.
    if contender_by_side["a"].label == contender_by_side["b"].label:
        raise ValueError(
            f"--label-a, --label-b: both generators have the name {contender_by_side['a'].label!r}. Pass two"
            " different names with these flags."
        )
    # Shapes of both generators are shown at one level, that of the tuned network if it has one.
    if not asset_fields and "level" not in written_flags:
        levels = [generator_by_side[side].generator.level for side in ("b", "a")]
        own_levels = [level for level in levels if level != LEVEL]
        if own_levels:
            flags = {**flags, "level": own_levels[0]}
            warn(f"Surface level: {own_levels[0]:g}, the level in the network file.")
    with flagged(flags):
        # In floating point, 1 - alpha may differ from the decimal number. The confidence is rounded, because
        # designs are compared.
        return StudyDesign(
            name=name,
            a=contender_by_side["a"],
            b=contender_by_side["b"],
            trials=n_trials,
            annotators_per_pair=power_options(flags).annotators_per_pair,
            confidence=round(1 - flags["alpha"], 12),
            exclusions=exclusion_rules,
            power=asdict(power_result) if power_result else {},
            shapes=n_shapes,
            **asset_fields,
            **{flag: flags[flag] for flag in DIRECT_FLAGS},
        )


def _name_of(network: Path) -> str:
    """Return a name for a network.

    It is the name of the file without its suffix, or the entire name of the run folder, because a folder such
    as '00000-x.v1.5' has no suffix.
    """
    return (network.resolve().name if network.is_dir() else network.stem) or str(network)


def compares_assets(flags: Mapping) -> bool:
    """Return True if --a and --b are folders of asset files, and False if both are generators.

    Raises:
        ValueError: only one of them is a folder of asset files.
    """
    a_is_folder, b_is_folder = (
        flags[side] is not None and is_asset_folder(Path(flags[side])) for side in ("a", "b")
    )
    if a_is_folder != b_is_folder:
        folder_flag = "--a" if a_is_folder else "--b"
        raise ValueError(
            f"--a, --b: {folder_flag} is a folder of assets, but the other flag names a generator. Pass"
            " two folders of asset files, or two generators."
        )
    return a_is_folder


def common_shapes(a: "LoadedGenerator", b: "LoadedGenerator") -> int | None:
    """Return the number of shapes of two generators, or None if they have a shape for every seed.

    Only a generator that is a file of optimised assets (text-to-3D) has a finite number of shapes.

    Raises:
        ValueError: the prompts and seeds of the two files differ.
    """
    from eg3d_rlhf.generators import shape_count

    a_count, b_count = (shape_count(loaded_generator.generator) for loaded_generator in (a, b))
    # "pairs" contains the prompts and seeds of the assets of a file
    a_pairs, b_pairs = (loaded_generator.nets.training_set.get("pairs") for loaded_generator in (a, b))
    if a_count != b_count or a_pairs != b_pairs:
        raise ValueError(
            "--a, --b: the two files contain assets of different prompts or seeds, which cannot be compared."
            " Pass two files whose assets were optimised for the same prompts and seeds."
        )
    return a_count


@contextlib.contextmanager
def flagged(flags: Mapping) -> Iterator[None]:
    """Replace the name of a setting at the beginning of an error message by the name of its flag.

    Args:
        flags: values of all flags, by name.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        first_word = re.split(r"\W", message, maxsplit=1)[0]
        if first_word in flags:
            message = f"--{first_word.replace('_', '-')}{message[len(first_word) :]}"
        raise ValueError(message) from error


def prepare(
    folder: Folder,
    name: str,
    flags: Mapping,
    written_flags: set[str],
    report_line: Callable[[str], None],
    needs_people: bool = True,
) -> StudyDesign:
    """Read the design of the study in a folder, or create the study if there is none.

    The file of the design is written first, and then the campaign, which contains the hash of the design.
    Neither is changed later.

    Args:
        folder: folder of the study.
        name: name of a new study.
        flags: values of all flags, by name.
        written_flags: names of the flags that the user passed on the command line.
        report_line: function that is called with lines of progress.
        needs_people: False for a panel of a judge, which may answer after people have finished.

    Raises:
        ValueError: a flag contradicts the design, the design was changed or is missing, an asset file has
            changed, or the study is complete.
    """
    from eg3d_rlhf.people.study import study_report as reports
    from eg3d_rlhf.people.study.analysis import sort_rows

    is_new = not folder.design.exists()
    # A campaign whose design is missing must not get another design.
    if is_new and store_exists(folder.url):
        with open_store(folder.url, create=False) as store:
            if store.campaign(name) is not None:
                raise ValueError(
                    f"{folder.design}: the design of the study {name!r} is missing, but its campaign exists."
                    " Restore the file, or use another --name."
                )
    if is_new:
        surface_flags = sorted(written_flags & {"psi", "level", "resolution", "triangles"})
        if "up" in written_flags and not compares_assets(flags):
            raise ValueError(
                "--up can be used for folders of asset files only, because the y axis of a generator's"
                " shapes always points up. Remove --up."
            )
        if surface_flags and compares_assets(flags):
            raise ValueError(
                f"--{surface_flags[0]} cannot be used for asset files, because their surfaces are fixed."
                f" Remove --{surface_flags[0]}."
            )
        new_design = make_design(name, flags, report_line, written_flags)
        if not new_design.assets:
            check_contenders(new_design, flags, report_line)
        designs.write_design(folder.design, new_design)
    with open_store(folder.url, create=True) as store:
        design = checked_design(folder, store, name if "name" in written_flags or is_new else None)
        # A new design passes this check as well.
        check_given(design, flags, written_flags)
        if design.assets:
            designs.check_files(design)
        # Loading a generator checks that its file contains the weights that the design names.
        for side in () if design.assets else ("a", "b"):
            with prefix_errors(f"--{side}"):
                reports.load_contender(getattr(design, side))
        if store.campaign(design.name) is None:
            store.create_campaign(designs.campaign_settings(design), designs.study_pairs(design))
        # The rules of the analysis decide which answers are trials.
        answered_count = len(sort_rows(design, list(store.judgements(design.name))).trials)
    if needs_people and designs.stopped(design, answered_count):
        raise ValueError(
            f"study {design.name}: the stopping rule is met ({answered_count} of {design.trials} trials), so"
            " no further answers are collected. Make the report with: python tools/study.py report"
            f" --outdir={folder.path}"
        )
    report_line(
        f"study {design.name!r}: {answered_count} of {design.trials} trials answered; design {folder.design},"
        f" hash {design.hash[:16]}"
    )
    return design


def check_contenders(design: StudyDesign, flags: Mapping, report_line: Callable[[str], None]) -> None:
    """Look at the density of samples of both generators before the design is written.

    Args:
        design: design of a study of two generators.
        flags: values of all flags, by name.
        report_line: function that is called with a warning if some samples have no surface.

    Raises:
        ValueError: no sample of a generator has a surface at the level of the design.
    """
    # imported here, because this module imports torch, which would slow down --help
    from eg3d_rlhf.generators import load_generator

    for side in ("a", "b"):
        with prefix_errors(f"--{side}"):
            warning = check_surfaces(
                load_generator(flags[side]).generator,
                0,
                design.psi,
                design.level,
                "Pass --set level={level}",
            )
        if warning is not None:
            report_line(f"Warning: --{side}: {warning}")


def checked_design(folder: Folder, store: "Store", name: str | None = None) -> StudyDesign:
    """Read the design of a folder, and compare it with the hash that the campaign contains.

    Args:
        folder: folder of the study.
        store: label store of the study.
        name: name that the study must have; None: any name.

    Raises:
        FileNotFoundError: there is no design.
        ValueError: the design was changed, or has another name.
    """
    design = designs.read_design(folder.design)
    if name is not None and design.name != name:
        raise ValueError(
            f"--name={name}: the study in {folder.path} has the name {design.name!r}. Remove --name to"
            " continue it, or use another --outdir for a new study."
        )
    campaign = store.campaign(design.name)
    if campaign is not None:
        designs.read_design(folder.design, str(campaign.settings.extra.get("design_hash")))
    return design


def check_given(design: StudyDesign, flags: Mapping, written_flags: set[str]) -> None:
    """Check that the flags that the user passed agree with the design, which cannot be changed.

    Args:
        design: design of the study.
        flags: values of all flags, by name.
        written_flags: names of the flags that the user passed on the command line.

    Raises:
        ValueError: a flag has another value than the design.
    """
    from eg3d_rlhf.people.study import study_report as reports

    design_flags = {
        **{flag: getattr(design, flag) for flag in DIRECT_FLAGS},
        **asdict(design.exclusions),
        "n": design.trials,
        "annotators_per_pair": design.annotators_per_pair,
        "label_a": design.a.label,
        "label_b": design.b.label,
        **{name: design.power.get("options", {}).get(name) for name in POWER_FLAGS if design.power},
        "alpha": round(1 - design.confidence, 12),
    }
    # Flags that were not passed are not compared, because their defaults may have changed since the design
    # was made.
    for flag in sorted(written_flags & set(design_flags)):
        if flags[flag] != design_flags[flag]:
            raise ValueError(
                f"--{flag.replace('_', '-')}={flags[flag]}: the study was designed with the value"
                f" {design_flags[flag]}. Remove the flag, or design a new study in another --outdir."
            )
    for side in ("a", "b"):
        if side in written_flags:
            with prefix_errors(f"--{side}"):
                if not design.assets:
                    # Another path is allowed if the file has the same weights.
                    reports.load_contender(replace(getattr(design, side), source=flags[side]))
                elif str(Path(flags[side]).resolve()) != getattr(design, side).source:
                    raise ValueError(
                        f"the study was designed with the folder {getattr(design, side).source}, not with"
                        f" {flags[side]}. Remove --{side}."
                    )


def study_rows(folder: Folder, labels_from: str = PEOPLE) -> "tuple[StudyDesign, list[JudgementRow]]":
    """Return the design of a study, and its answers to trials and gold checks.

    Args:
        folder: folder of the study.
        labels_from: "people", "judges" or "all"; by default answers of judges are left out.

    Raises:
        FileNotFoundError: there is no design, or no label store.
        ValueError: the design was changed, or the store does not contain the campaign of the study.
    """
    # This raises a clear error for a missing or changed design before the store is opened.
    designs.read_design(folder.design)
    with open_store(folder.url, create=False) as store:
        design = checked_design(folder, store)
        if store.campaign(design.name) is None:
            raise ValueError(
                f"study {design.name}: the database {folder.url} does not contain the campaign of the study."
                " Pass the database of the study with --db."
            )
        judgement_rows = [
            judgement
            for judgement in store.judgements(design.name, labels_from=labels_from)
            if judgement.kind in (Kind.PAIR, Kind.GOLD)
        ]
        return design, judgement_rows
