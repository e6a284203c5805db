"""Design of a blind study, which is its pre-registration, and plan of its labelling campaign.

A study compares the shapes of two generators, a and b. Every choice that could influence the result is made
before the first answer, and is written into a file with a hash.
"""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import prefix_errors
from eg3d_rlhf.people.label.assets import reading
from eg3d_rlhf.people.label.assets.collection import Collection, prompts_json, read_generator
from eg3d_rlhf.people.label.assets.damage import DAMAGED_KINDS, DAMAGES
from eg3d_rlhf.people.label.entities import DAMAGES as SHAPE_DAMAGES
from eg3d_rlhf.people.label.entities import VIEWS, CampaignSettings, Kind, Mode, PlannedPair, Shape
from eg3d_rlhf.people.label.pairing import known_answers
from eg3d_rlhf.preferences.labels import MAX_SEED
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES, Item, Items, StrategyOptions
from training.config import check_knobs, knob
from training.storage import write_atomic

if TYPE_CHECKING:
    from eg3d_rlhf.generators import LoadedGenerator

UP = "y"  # default axis that points up in asset files
FORMAT = 1  # version of the file of a design
_OUT = "Exclusions"  # title of a group of flags in the help
TRAINING_PAIRS = len(SHAPE_DAMAGES)  # number of practice pairs: one for each kind of damage
# Number of gold pairs. An annotator is shown fewer in most studies; when all have been shown, they are
# repeated.
GOLD_PAIRS = 24
# The pre-registered plan, which is stored in every design and printed in the report. It is part of the hash
# of a design, so its text must not change: equal settings would give another hash than in version 0.1.
PLAN = (
    (
        "The win rate is the mean score of b over the counted trials: 1 where b was preferred, 0 where a was;"
        " ties by `ties`."
    ),
    (
        "Primary: the interval of the win rate that allows for trials sharing annotators and latents (two-way"
        " clustered variance, Wilson's form, t quantile); b differs from a where it leaves out one half."
    ),
    (
        "Beside it: Wilson's interval and the exact binomial test on decided trials, which take trials as"
        " independent; percentile bootstraps over annotators, over latents and over both."
    ),
    (
        "Trials are the first `trials` answers to pairs in order of receipt; gold checks, training and what"
        " was taken back are not trials; skipped pairs use a trial up and have no score."
    ),
    "Exclusions by the rules written here and no others; the result without them is shown beside.",
    "The report is made once, after the stopping rule is met; what is looked at before is marked as interim.",
)
_out_knob = functools.partial(knob, group=_OUT, rare=True)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One of the two generators that a study compares."""

    label: str  # name in reports, which annotators never see
    source: str  # path of a network file, a run folder or a folder of assets; '' is the bundled generator
    generator: str  # SHA-256 in hex of the weights; for assets, SHA-256 of the hashes of their files


@dataclass(frozen=True, kw_only=True)
class ExclusionRules:
    """Rules by which annotators and trials are left out of the primary result."""

    gold_accuracy: float = _out_knob(
        0.75,
        "Share of correct gold checks below which an annotator is left out.",
        metavar="0..1",
        low=0,
        high=1,
    )
    gold_least: int = _out_knob(
        3, "Number of answered gold checks from which on --gold-accuracy applies to an annotator.", low=1
    )
    fast_milliseconds: int = _out_knob(
        600, "Time to answer in milliseconds below which a trial is left out.", low=0
    )
    fast_share: float = _out_knob(
        0.25,
        "Share of trials faster than --fast-milliseconds above which an annotator is left out.",
        metavar="0..1",
        low=0,
        high=1,
    )
    least_share: float = _out_knob(
        0.5,
        "Part of the planned trials per annotator below which an annotator is left out.",
        metavar="0..1",
        low=0,
        high=1,
    )

    def __post_init__(self):
        check_knobs(self)


@dataclass(frozen=True, kw_only=True)
class StudyDesign:
    """Choices of a study that are made before the first answer."""

    name: str  # name of the study and of its campaign
    a: Contender
    b: Contender
    trials: int  # number of answers to pairs after which the study is complete
    annotators: int = knob(1, "Number of annotators among whom the trials are divided.", "Study", low=1)
    annotators_per_pair: int = 1  # number of different annotators who answer each pair
    seed: int = knob(0, "Random seed for choosing latents, gold checks, order and sides.", "Study", low=0)
    psi: float = knob(
        0.7,
        "Truncation psi of the latents. With 1, latents are not truncated.",
        "Shapes",
        metavar="0..2",
        low=0,
        high=2,
        rare=True,
    )
    level: float = knob(10.0, "Raw density sigma_raw at the surface of a shape.", "Shapes", rare=True)
    resolution: int = knob(
        128,
        "Number of grid points per axis at which the density is sampled.",
        "Shapes",
        metavar="POINTS",
        low=16,
        high=512,
        rare=True,
    )
    triangles: int = knob(
        30_000, "Approximate number of triangles per shape.", "Shapes", low=100, high=10**6, rare=True
    )
    gold_every: int = knob(
        10,
        "Show one gold check per so many trials: a pair whose correct answer is known. 0: no gold checks.",
        "Study",
        metavar="TRIALS",
        low=0,
    )
    up: str = knob(UP, "Axis that points up in asset files.", "Shapes", choices=("y", "z"))
    view: str = knob("front", "View from which a pair is first shown.", "Shapes", choices=VIEWS, rare=True)
    ties: str = knob(
        "half",
        "Rule for ties: half counts a tie as half a win of each generator, and excluded leaves ties out of"
        " the win rate.",
        "Study",
        choices=("half", "excluded"),
    )
    until: str | None = knob(
        None,
        "Time at which the study ends even if trials are missing, in ISO 8601 with an offset from UTC.",
        "Study",
        metavar="TIME",
        shown="no end",
        rare=True,
    )
    confidence: float = 0.95  # level of the intervals, between 0 and 1
    resamples: int = _out_knob(4000, "Number of resamples of each bootstrap in the report.", low=100)
    # number of shapes, if the generators have a finite number (seeds 0 to shapes - 1); None: a shape for
    # every seed
    shapes: int | None = None
    # Pairs of asset files, in a study that compares asset files instead of generators; () otherwise. Seed i
    # of the study is the entry {"prompt", "seed", "a": {"file", "hash", "kind"}, "b": {"file", "hash",
    # "kind"}} at index i.
    assets: tuple[Mapping, ...] = field(default=(), hash=False)
    # name of a prompt -> {"text", "image", "hash"}
    prompts: Mapping = field(default_factory=dict, hash=False)
    exclusions: ExclusionRules = field(default_factory=ExclusionRules)
    # result of the power calculation (eg3d_rlhf.people.study.power.SampleSize) in JSON types; {}: none
    power: dict = field(default_factory=dict, hash=False)
    # time at which the design was made, in UTC; answers must be later
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    plan: tuple[str, ...] = PLAN

    def __post_init__(self):
        if self.a.generator == self.b.generator:
            raise ValueError(
                f"a and b: both generators have the weights {self.a.generator[:12]}..., so there is nothing"
                " to compare. Use another network for b."
            )
        # raises ValueError for a knob that is out of its range
        check_knobs(self)
        if self.trials < 1:
            raise ValueError(f"trials={self.trials} is too small. Use at least one trial.")
        if not 1 <= self.annotators_per_pair <= self.annotators:
            raise ValueError(
                f"annotators_per_pair={self.annotators_per_pair} must be between 1 and the number of"
                f" annotators, {self.annotators}. Use another number."
            )
        if self.shapes is not None and self.latent_count > self.shapes:
            max_trials = self.shapes * self.annotators_per_pair
            raise ValueError(
                f"n: {self.trials} trials were requested, but {self.shapes} pairs of shapes allow at most"
                f" {max_trials} trials. Use --n={max_trials}."
            )
        # With 1, every trial would be a gold check, and no trial would compare the generators.
        if self.gold_every == 1:
            raise ValueError(
                "gold_every=1 is not allowed. Use 0 for no gold checks, or a number >= 2, such as 10."
            )
        if not 0 < self.confidence < 1:
            raise ValueError(
                f"confidence={self.confidence} must be between 0 and 1. Use a level such as 0.95."
            )
        try:
            # A time without an offset would depend on the time zone of the server.
            is_valid = self.until is None or datetime.fromisoformat(self.until).tzinfo is not None
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"until={self.until!r} must be a time in ISO 8601 with its offset from UTC. Write it like"
                " 2030-01-31T18:00+00:00."
            )

    @property
    def latent_count(self) -> int:
        """Return the number of latents that are compared."""
        # rounded up: the last latent may be answered by fewer annotators than the others
        return math.ceil(self.trials / self.annotators_per_pair)

    @property
    def trials_per_annotator(self) -> int:
        """Return the number of trials per annotator if all annotators answer the same number, rounded up."""
        return math.ceil(self.trials / self.annotators)

    @property
    def trial_quota(self) -> int:
        """Return the number of trials, gold checks included, after which an annotator is finished.

        With several annotators, each gets a tenth more trials than `trials_per_annotator`, because some
        annotators stop early.
        """
        pair_trials = (
            self.trials_per_annotator if self.annotators == 1 else math.ceil(1.1 * self.trials_per_annotator)
        )
        trial_count = pair_trials
        # At most ceil(total / gold_every) of `total` trials are gold checks. `total` is increased until
        # enough others are left.
        while self.gold_every and trial_count - math.ceil(trial_count / self.gold_every) < pair_trials:
            trial_count += 1
        return trial_count

    def seeds(self) -> tuple[list[int], list[int]]:
        """Choose the seeds of a study at random.

        Returns:
            Seeds of the compared latents, and 64 seeds for gold and practice pairs. If there are enough
            shapes, all these seeds are different. Otherwise seeds of the compared latents are used again.
        """
        spare_count = 64  # more than the gold and practice pairs need
        available_count = MAX_SEED if self.shapes is None else self.shapes
        rng = np.random.default_rng(self.seed)
        drawn_count = min(available_count, self.latent_count + spare_count)
        all_seeds = rng.choice(available_count, size=drawn_count, replace=False).tolist()
        compared_seeds = all_seeds[: self.latent_count]
        unused_seeds = all_seeds[self.latent_count :]
        # `cycle` repeats the seeds if there are too few
        spare_seeds = itertools.islice(itertools.cycle(unused_seeds + compared_seeds), spare_count)
        return compared_seeds, list(spare_seeds)

    def to_dict(self) -> dict:
        """Return the design in JSON types, with its hash."""
        # Passing through JSON turns tuples into lists, as in a design that is read from its file.
        design_json = {
            "format": FORMAT,
            **json.loads(json.dumps(asdict(self))),
            "latent_seeds": self.seeds()[0],
        }
        # Older designs do not have these fields. They are left out at their defaults, so that the hash of an
        # older design stays the same.
        defaults_of_new_fields = {"assets": [], "prompts": {}, "up": UP, "view": "front"}
        design_json = {
            name: value
            for name, value in design_json.items()
            if name not in defaults_of_new_fields or value != defaults_of_new_fields[name]
        }
        return {**design_json, "hash": content_hash(design_json)}

    @property
    def hash(self) -> str:
        """Return the SHA-256 of the design as hexadecimal digits."""
        return self.to_dict()["hash"]


def content_hash(design_json: dict) -> str:
    """Return the SHA-256 of a design in canonical JSON, as hexadecimal digits.

    Args:
        design_json: design in JSON types; its field "hash" is not hashed.
    """
    hashed_content = {name: value for name, value in design_json.items() if name != "hash"}
    canonical_json = json.dumps(hashed_content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical_json.encode()).hexdigest()


def write_design(path: str | Path, design: StudyDesign) -> Path:
    """Write a design to a new file, and return its path.

    The file is readable for its owner only, because annotators must not see which generators are compared.

    Raises:
        FileExistsError: the file exists.
    """
    path = Path(path)
    # A design must not be changed after the first answer, so an existing file is never overwritten.
    if path.exists():
        raise FileExistsError(
            f"{path}: this folder contains a design already. Continue that study, or choose another folder."
        )
    write_atomic(path, (json.dumps(design.to_dict(), indent=1) + "\n").encode(), private=True)
    return path


def read_design(path: str | Path, recorded_hash: str | None = None) -> StudyDesign:
    """Read a design, and check that it was not changed since it was written.

    Args:
        path: path of the file.
        recorded_hash: hash that the campaign contains; None: only the hash in the file is checked.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is no design of this version, or was changed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no design of a study. Pass the folder of the study, or create the study first."
        )
    try:
        design_json = json.loads(path.read_text(encoding="utf-8"))
        stored_hash = design_json["hash"]
        version = design_json["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: the design of the study cannot be read as JSON: {error}. Use a copy of the original"
            " file."
        ) from None
    if version != FORMAT:
        raise ValueError(
            f"{path}: the design has format {version}, but this program needs format {FORMAT}. Use the"
            " version of the program that created the design."
        )
    if content_hash(design_json) != stored_hash or recorded_hash not in (None, stored_hash):
        raise ValueError(
            f"{path}: the file was changed after the study was designed, because its hash is not"
            f" {(recorded_hash or stored_hash)[:12]}... Use a copy of the original file, or design a new"
            " study."
        )
    # Fields that an older design does not have get their defaults.
    field_values = {
        field.name: design_json[field.name] for field in fields(StudyDesign) if field.name in design_json
    }
    field_values |= {
        "a": Contender(**design_json["a"]),
        "b": Contender(**design_json["b"]),
        "exclusions": ExclusionRules(**design_json["exclusions"]),
    }
    return StudyDesign(
        **{**field_values, "plan": tuple(design_json["plan"]), "assets": tuple(design_json.get("assets", ()))}
    )


def stopped(design: StudyDesign, answered_count: int, now: datetime | None = None) -> bool:
    """Return True if the stopping rule of a study is met: all trials are answered, or the end has passed.

    Args:
        design: design of the study.
        answered_count: number of answered trials.
        now: time; None: the current time.
    """
    now = now or datetime.now(UTC)
    return answered_count >= design.trials or (
        design.until is not None and now >= datetime.fromisoformat(design.until)
    )


def contender(label: str, loaded_generator: "LoadedGenerator") -> Contender:
    """Make the `Contender` of a loaded generator.

    Args:
        label: name in reports.
        loaded_generator: generator.
    """
    # The path of the bundled generator differs between installations, so its source is empty.
    source_path = "" if loaded_generator.path == bundled.GENERATOR else str(loaded_generator.path.resolve())
    return Contender(label=label, source=source_path, generator=loaded_generator.hash)


def study_pairs(design: StudyDesign) -> list[PlannedPair]:
    """Plan the pairs of a study: practice pairs, and then trials with gold pairs between them.

    In a trial, the first shape is of generator a and the second shape of generator b, from the same latent,
    and with the same psi, level, resolution and number of triangles. A gold pair consists of an undamaged and
    a damaged copy of one shape. The generators and the kinds of damage of the gold pairs alternate, so that
    only the damage decides which shape is better.

    Args:
        design: design of the study.

    Returns:
        Pairs in the order of their preparation.
    """
    seeds, spare_seeds = design.seeds()
    damage_kinds = DAMAGES if design.assets else SHAPE_DAMAGES
    if design.assets:  # videos cannot be damaged
        spare_seeds = [
            seed
            for seed in spare_seeds
            if all(design.assets[seed][side]["kind"] in DAMAGED_KINDS for side in ("a", "b"))
        ]
    # [seed, 1] is another random stream than the one of design.seeds()
    rng = np.random.default_rng([design.seed, 1])
    contenders = (design.a, design.b)
    # The strategy "blocks" pairs the two shapes of each latent, which form a block. With ordered=True it
    # keeps the order of the seeds, which is random already.
    contender_seeds = [(contender, seed) for seed in seeds for contender in contenders]
    strategy_items = Items(
        members=[Item(prompt=str(seed), source=contender.generator) for contender, seed in contender_seeds],
        ordered=True,
    )
    block_plan = STRATEGIES["blocks"].plan(strategy_items, [], rng, StrategyOptions(pairs=len(seeds)))
    compared_shapes = [contender_shape(design, contender, seed) for contender, seed in contender_seeds]
    trials = [
        PlannedPair(first=compared_shapes[first_index], second=compared_shapes[second_index])
        for first_index, second_index in block_plan.pairs
    ]
    practice_shapes = [contender_shape(design, design.a, seed) for seed in spare_seeds[:TRAINING_PAIRS]]
    practice_pairs = known_answers(practice_shapes, Kind.TRAINING, rng, damage_kinds)
    # Gold pairs use other latents than practice pairs.
    gold_seeds = spare_seeds[TRAINING_PAIRS : TRAINING_PAIRS + GOLD_PAIRS] if design.gold_every else []
    # known_answers uses the kinds of damage one after another. After each round of them, the generator
    # changes.
    gold_shapes = [
        contender_shape(design, contenders[index // len(damage_kinds) % 2], seed)
        for index, seed in enumerate(gold_seeds)
    ]
    gold_pairs = known_answers(gold_shapes, Kind.GOLD, rng, damage_kinds)
    # A gold pair comes before every `gold_every` trials, so that it is prepared when an annotator needs it.
    trials_per_gold = design.gold_every or len(trials)
    block_starts = range(0, len(trials), trials_per_gold)
    mixed_pairs: list[PlannedPair] = []
    for index, start in enumerate(block_starts):
        mixed_pairs += gold_pairs[index : index + 1]  # empty if there are no more gold pairs
        mixed_pairs += trials[start : start + trials_per_gold]
    return [*practice_pairs, *mixed_pairs, *gold_pairs[len(block_starts) :]]


def campaign_settings(design: StudyDesign) -> CampaignSettings:
    """Return the settings of the campaign of a study. They contain the hash of the design."""
    return CampaignSettings(
        name=design.name,
        mode=Mode.STUDY,
        seed=design.seed,
        annotators_per_pair=design.annotators_per_pair,
        # A study has no repeats, because each answer of an annotator must be a new trial.
        repeat_share=0.0,
        swap_share=0.0,
        gold_every=design.gold_every,
        trials_per_annotator=design.trial_quota,
        view=design.view,
        show_render=False,
        extra={
            "design_hash": design.hash,
            # With "trials" and "until", the store rejects changes of answers after the study is complete.
            "trials": design.trials,
            "until": design.until,
            # For the organiser's page and the terminal, which report gold checks while the study runs.
            "gold_rule": [design.exclusions.gold_accuracy, design.exclusions.gold_least],
            **({"conditions": dict(design.prompts), "up": design.up} if design.assets else {}),
        },
    )


def contender_shape(design: StudyDesign, contender: Contender, seed: int) -> Shape:
    """Return the shape that a generator of a study has for a seed.

    Args:
        design: design of the study.
        contender: generator, design.a or design.b.
        seed: seed of the latent; in a study of asset files, the index of the pair of files in design.assets.
    """
    if design.assets:
        asset_pair = design.assets[seed]
        asset_record = asset_pair["a" if contender == design.a else "b"]
        return Shape.from_asset(
            generator=contender.generator,
            source=asset_record["file"],
            seed=seed,
            file=asset_record["hash"],
            condition=asset_pair["prompt"],
        )
    return Shape(
        generator=contender.generator,
        source=contender.source,
        seed=seed,
        psi=design.psi,
        level=design.level,
        resolution=design.resolution,
        triangles=design.triangles,
    )


# ---- studies of asset files, which compare two folders with assets of the same prompts instead of two
# generators


def read_sides(
    folder_a: Path, folder_b: Path, report_line: Callable[[str], None]
) -> tuple[dict[str, Contender], list[dict], dict]:
    """Read the two folders of asset files that a study compares.

    Args:
        folder_a: folder of the first generator's assets.
        folder_b: folder of the second generator's assets.
        report_line: function that is called with lines of progress, and with a line for the user if assets
            are left out or shown without their textures.

    Returns:
        Dictionary of the contenders by side ("a", "b"); list of the pairs of assets, which is the value of
        StudyDesign.assets; dictionary of the prompts, which is the value of StudyDesign.prompts.

    Raises:
        ValueError: no prompt and seed has an asset in both folders, or the two assets of each of them are
            identical files.
    """
    collections: dict[str, Collection] = {}
    for side, folder in (("a", folder_a), ("b", folder_b)):
        with prefix_errors(f"--{side}"):
            collections[side] = read_generator(folder, report_line)
    # side -> (prompt, seed) -> asset
    assets_by_side = {
        side: {(asset.prompt, asset.seed): asset for asset in collection.assets}
        for side, collection in collections.items()
    }
    # Annotators cannot distinguish equal files, so these are not compared.
    common_keys = sorted(
        key
        for key in assets_by_side["a"]
        if key in assets_by_side["b"] and assets_by_side["a"][key].hash != assets_by_side["b"][key].hash
    )
    if not common_keys and not set(assets_by_side["a"]) & set(assets_by_side["b"]):
        raise ValueError(
            "--a, --b: no prompt and seed has an asset in both folders, so no pair can be compared. Give the"
            " file of a prompt the same name in both folders, such as chair.glb. If `flow sample` made the"
            " folders, sample both with the same seeds."
        )
    if not common_keys:
        raise ValueError(
            "--a, --b: the two files of each prompt are identical in both folders, so there is nothing to"
            " compare. Pass the folders of two different generators."
        )
    unused_count = sum(len(side_assets) for side_assets in assets_by_side.values()) - 2 * len(common_keys)
    if unused_count:
        report_line(
            f"{unused_count} assets are left out, because the other folder has no asset of their prompt and"
            " seed, or the same file."
        )
    asset_pairs = [
        {
            "prompt": prompt,
            "seed": seed,
            **{
                side: {
                    "file": str(assets_by_side[side][prompt, seed].path),
                    "hash": assets_by_side[side][prompt, seed].hash,
                    "kind": assets_by_side[side][prompt, seed].kind,
                }
                for side in assets_by_side
            },
        }
        for prompt, seed in common_keys
    ]
    contenders = {
        side: Contender(
            label=folder.resolve().name, source=str(folder.resolve()), generator=_digest(asset_pairs, side)
        )
        for side, folder in (("a", folder_a), ("b", folder_b))
    }
    # If the folders describe a prompt differently, the description in folder a is used.
    all_prompts = {**prompts_json(collections["b"]), **prompts_json(collections["a"])}
    compared_prompts = {prompt for prompt, _ in common_keys}
    prompts = {
        prompt_name: prompt for prompt_name, prompt in all_prompts.items() if prompt_name in compared_prompts
    }
    return contenders, asset_pairs, prompts


def check_files(design: StudyDesign) -> None:
    """Check that the asset files of a design have not changed since it was made.

    Raises:
        ValueError: a file has changed, or cannot be shown.
    """
    for side, contender in (("a", design.a), ("b", design.b)):
        asset_records = [asset_pair[side] for asset_pair in design.assets]
        paths = [Path(asset_record["file"]) for asset_record in asset_records]
        # the folder with which `read_sides` examined the files
        examined_files = reading.examine(paths, root=Path(contender.source))
        for path, asset_record, examined_file in zip(paths, asset_records, examined_files, strict=True):
            if examined_file.hash != asset_record["hash"]:
                raise ValueError(
                    f"{path.name}: the file has changed since the study was designed. Use the original file."
                )


def _digest(asset_pairs: list[dict], side: str) -> str:
    """Return a hash of the asset files of one side, which takes the place of a hash of a generator's weights.

    Args:
        asset_pairs: pairs of assets, see StudyDesign.assets.
        side: "a" or "b".
    """
    return hashlib.sha256(
        json.dumps(
            [
                [asset_pair["prompt"], asset_pair["seed"], asset_pair[side]["hash"]]
                for asset_pair in asset_pairs
            ]
        ).encode()
    ).hexdigest()
