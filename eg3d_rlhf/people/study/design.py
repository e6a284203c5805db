"""Defines the design of a study, a pre-registration: every choice that could influence the result is made and
written to a file with a hash before the first answer. Also plans the study's campaign.
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
from eg3d_rlhf.core.cli import naming
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
FORMAT = 1  # of the design's file
_OUT = "Exclusions"  # title of the group of flags in the help
TRAINING_PAIRS = len(SHAPE_DAMAGES)  # one for each kind of damage
GOLD_PAIRS = 24  # more than an annotator is shown in most studies; after that, gold pairs are repeated
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
    """One of the two generators that are compared."""

    label: str  # name in reports; annotators never see it
    source: str  # network file, run folder or folder of assets; '' is the bundled generator
    generator: str  # SHA-256 in hex of the weights; for assets, of the hashes of their files


@dataclass(frozen=True, kw_only=True)
class ExclusionRules:
    """Rules by which annotators and trials are left out of the primary result."""

    gold_accuracy: float = _out_knob(
        0.75, "Annotators whose accuracy on gold checks is lower are left out.", metavar="0..1", low=0, high=1
    )
    gold_least: int = _out_knob(
        3, "Least number of answered gold checks before --gold-accuracy applies.", low=1
    )
    fast_milliseconds: int = _out_knob(
        600, "Trials answered faster than this are left out, in milliseconds.", low=0
    )
    fast_share: float = _out_knob(
        0.25,
        "Annotators with a larger share of such fast trials are left out.",
        metavar="0..1",
        low=0,
        high=1,
    )
    least_share: float = _out_knob(
        0.5,
        "Annotators who answered less than this part of their share are left out.",
        metavar="0..1",
        low=0,
        high=1,
    )

    def __post_init__(self):
        check_knobs(self)


@dataclass(frozen=True, kw_only=True)
class StudyDesign:
    """Everything that is decided before the first answer."""

    name: str  # of the study and its campaign
    a: Contender
    b: Contender
    trials: int  # number of answers to pairs after which the study is complete
    annotators: int = knob(1, "Number of people who answer.", "Study", low=1)
    annotators_per_pair: int = 1  # number of different annotators who answer each pair
    seed: int = knob(0, "Random seed of latents, gold checks, order and sides.", "Study", low=0)
    psi: float = knob(0.7, "Truncation psi.", "Shapes", metavar="0..2", low=0, high=2, rare=True)
    level: float = knob(10.0, "Raw density sigma_raw at the surface.", "Shapes", rare=True)
    resolution: int = knob(
        128,
        "Grid points per axis at which the density is sampled.",
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
        "One trial of this many is a gold check, whose answer is known. 0: no gold checks.",
        "Study",
        metavar="TRIALS",
        low=0,
    )
    up: str = knob(UP, "Axis that points up in asset files.", "Shapes", choices=("y", "z"))
    view: str = knob("front", "View from which a pair is first shown.", "Shapes", choices=VIEWS, rare=True)
    ties: str = knob("half", "Score of ties: half a win, or excluded.", "Study", choices=("half", "excluded"))
    until: str | None = knob(
        None,
        "Time at which the study ends in any case, in ISO 8601 with an offset from UTC.",
        "Study",
        metavar="TIME",
        shown="no end",
        rare=True,
    )
    confidence: float = 0.95  # of the intervals
    resamples: int = _out_knob(4000, "Number of bootstrap resamples in the report.", low=100)
    shapes: int | None = None  # of generators with a finite number of shapes: seeds 0 to shapes - 1
    # Asset files in place of generators: seed i is {"prompt", "seed", "a": {"file", "hash", "kind"}, "b": the
    # same}.
    assets: tuple[Mapping, ...] = field(default=(), hash=False)
    prompts: Mapping = field(default_factory=dict, hash=False)  # of assets: {name: {"text", "image", "hash"}}
    exclusions: ExclusionRules = field(default_factory=ExclusionRules)
    # The calculation that gave `trials`, from eg3d_rlhf.people.study.power.
    power: dict = field(default_factory=dict, hash=False)
    # UTC; answers must be later
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    plan: tuple[str, ...] = PLAN

    def __post_init__(self):
        # With equal weights every answer would be noise.
        if self.a.generator == self.b.generator:
            weights = self.a.generator[:12]
            raise ValueError(
                f"a and b: expected two different generators, got the weights {weights}... twice. Name"
                " another network for b."
            )
        check_knobs(self)
        if self.trials < 1 or not 1 <= self.annotators_per_pair <= self.annotators:
            got = f"{self.trials} and {self.annotators_per_pair}"
            raise ValueError(
                f"expected trials >= 1 and annotators_per_pair in 1..{self.annotators} (annotators), got"
                f" {got}. Correct them."
            )
        if self.shapes is not None and self.latents > self.shapes:
            most = self.shapes * self.annotators_per_pair
            raise ValueError(
                f"n: {self.shapes} pairs of shapes allow at most {most} trials, got {self.trials}. Use"
                f" --n={most}."
            )
        # Every trial would be a gold check, and none would compare the generators.
        if self.gold_every == 1:
            raise ValueError("gold_every must be 0 (none) or >= 2, got 1. Use 10.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {self.confidence}. Use 0.95.")
        try:
            # A time without an offset would depend on the time zone of the server.
            valid = self.until is None or datetime.fromisoformat(self.until).tzinfo is not None
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(
                f"until must be an ISO 8601 time with its offset from UTC, got {self.until!r}. Write"
                " 2030-01-31T18:00+00:00."
            )

    @property
    def latents(self) -> int:
        """Number of compared latents."""
        # The last latent may be answered by fewer annotators than the others.
        return math.ceil(self.trials / self.annotators_per_pair)

    @property
    def share(self) -> int:
        """Number of trials per annotator if all answer equally many."""
        return math.ceil(self.trials / self.annotators)

    @property
    def quota(self) -> int:
        """Number of trials and gold checks after which an annotator is finished: her share, and a tenth more
        if there are several annotators, because some stop early.
        """
        trials = self.share if self.annotators == 1 else math.ceil(1.1 * self.share)
        total = trials
        # The first trial of every `gold_every` is a gold check, so `total` contains ceil(total / gold_every)
        # of them.
        while self.gold_every and total - math.ceil(total / self.gold_every) < trials:
            total += 1
        return total

    def seeds(self) -> tuple[list[int], list[int]]:
        """Return the seeds of the compared latents, and further ones for gold and training pairs. All are
        different as long as there are enough shapes.
        """
        spare = 64  # more than the gold and training pairs need
        available = MAX_SEED if self.shapes is None else self.shapes
        chosen = (
            np.random.default_rng(self.seed)
            .choice(available, size=min(available, self.latents + spare), replace=False)
            .tolist()
        )
        further = chosen[self.latents :]
        # With few shapes the compared ones are used again.
        return chosen[: self.latents], list(
            itertools.islice(itertools.cycle(further + chosen[: self.latents]), spare)
        )

    def to_dict(self) -> dict:
        """Return the design as JSON values, with its hash."""
        # Through JSON: tuples become lists, as they are when the file is read again.
        content = {"format": FORMAT, **json.loads(json.dumps(asdict(self))), "latent_seeds": self.seeds()[0]}
        # Fields that are left out at these values, so that older designs without them keep their hash.
        absent = {"assets": [], "prompts": {}, "up": UP, "view": "front"}
        content = {
            name: value for name, value in content.items() if name not in absent or value != absent[name]
        }
        return {**content, "hash": content_hash(content)}

    @property
    def hash(self) -> str:
        """SHA-256 in hex of the design."""
        return self.to_dict()["hash"]


def content_hash(content: dict) -> str:
    """Return the SHA-256 in hex of canonical JSON, without the field `hash`."""
    hashed = {k: v for k, v in content.items() if k != "hash"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_design(path: str | Path, design: StudyDesign) -> Path:
    """Write a design to a new file, readable for its owner only, because it contains which side is which.

    Raises: FileExistsError if the file exists.
    """
    path = Path(path)
    # A design is written once: overwriting it would be a change after the fact.
    if path.exists():
        raise FileExistsError(
            f"{path}: there is a design already. Continue that study, or name another folder."
        )
    write_atomic(path, (json.dumps(design.to_dict(), indent=1) + "\n").encode(), private=True)
    return path


def read_design(path: str | Path, recorded: str | None = None) -> StudyDesign:
    """Read a design and check that it was not changed since it was written.

    Args:
        path: of the file.
        recorded: hash that the campaign contains; None: only the hash in the file is checked.

    Raises: FileNotFoundError, ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a study's design, found no file. Name the study's folder, or create the study"
            " first."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stamp = content["hash"]
        version = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a study's design as JSON, but it cannot be read ({error}). Restore the file."
        ) from None
    if version != FORMAT:
        raise ValueError(
            f"{path}: expected a design of format {FORMAT}, got {version}. Use the version that created it."
        )
    if content_hash(content) != stamp or recorded not in (None, stamp):
        raise ValueError(
            f"{path}: expected the design with hash {(recorded or stamp)[:12]}..., but the file was changed"
            " after the study was designed. Restore it from a copy, or design a new study."
        )
    # Fields that older designs do not have get their defaults.
    values = {field.name: content[field.name] for field in fields(StudyDesign) if field.name in content}
    values |= {
        "a": Contender(**content["a"]),
        "b": Contender(**content["b"]),
        "exclusions": ExclusionRules(**content["exclusions"]),
    }
    return StudyDesign(
        **{**values, "plan": tuple(content["plan"]), "assets": tuple(content.get("assets", ()))}
    )


def stopped(design: StudyDesign, answered: int, now: datetime | None = None) -> bool:
    """Return True if the stopping rule is met: all trials are answered, or the time is over."""
    now = now or datetime.now(UTC)
    return answered >= design.trials or (
        design.until is not None and now >= datetime.fromisoformat(design.until)
    )


def contender(label: str, loaded: "LoadedGenerator") -> Contender:
    """Return the contender of a loaded generator. The bundled one has an empty source, because its path
    differs from installation to installation.
    """
    source = "" if loaded.path == bundled.GENERATOR else str(loaded.path.resolve())
    return Contender(label=label, source=source, generator=loaded.hash)


def study_pairs(design: StudyDesign) -> list[PlannedPair]:
    """Plan the pairs of a study: training pairs, then trials with gold pairs between them, so that gold pairs
    are prepared in time.

    In a trial, `first` is a and `second` is b, from the same latent, at the same psi, level, resolution and
    number of triangles. A gold pair shows one latent of one generator, intact and damaged. Generators and
    kinds of damage take turns, so only the damage gives the answer.
    """
    seeds, spare = design.seeds()
    damages = DAMAGES if design.assets else SHAPE_DAMAGES
    if design.assets:  # videos cannot be damaged
        spare = [
            seed for seed in spare if all(design.assets[seed][side]["kind"] in DAMAGED_KINDS for side in "ab")
        ]
    rng = np.random.default_rng([design.seed, 1])
    sides = (design.a, design.b)
    # A block consists of a latent and its shapes of both generators. The order of blocks is random.
    compared = [(side, seed) for seed in seeds for side in sides]
    items = Items(
        members=[Item(prompt=str(seed), source=side.generator) for side, seed in compared], ordered=True
    )
    blocks = STRATEGIES["blocks"].plan(items, [], rng, StrategyOptions(pairs=len(seeds)))
    shapes = [contender_shape(design, side, seed) for side, seed in compared]
    trials = [PlannedPair(first=shapes[first], second=shapes[second]) for first, second in blocks.pairs]
    training = known_answers(
        [contender_shape(design, design.a, seed) for seed in spare[:TRAINING_PAIRS]],
        Kind.TRAINING,
        rng,
        damages,
    )
    # The latents of training pairs come first, so gold pairs use others.
    checks = spare[TRAINING_PAIRS : TRAINING_PAIRS + GOLD_PAIRS] if design.gold_every else []
    gold = known_answers(
        [contender_shape(design, sides[i // len(damages) % 2], seed) for i, seed in enumerate(checks)],
        Kind.GOLD,
        rng,
        damages,
    )
    # One gold pair before every `gold_every` trials, as often as annotators are shown one.
    starts = range(0, len(trials), design.gold_every or len(trials))
    mixed = [
        pair
        for i, start in enumerate(starts)
        for pair in (*gold[i : i + 1], *trials[start : start + starts.step])
    ]
    return [*training, *mixed, *gold[len(starts) :]]


def campaign_settings(design: StudyDesign) -> CampaignSettings:
    """Return the settings of a study's campaign. They contain the hash of the design."""
    return CampaignSettings(
        name=design.name,
        mode=Mode.STUDY,
        seed=design.seed,
        # A study has no repeats: each answer of an annotator must be a new trial.
        annotators_per_pair=design.annotators_per_pair,
        repeat_share=0.0,
        swap_share=0.0,
        gold_every=design.gold_every,
        trials_per_annotator=design.quota,
        view=design.view,
        show_render=False,
        extra={
            # With these values the store rejects changes of answers once the study is complete.
            "design_hash": design.hash,
            "trials": design.trials,
            "until": design.until,
            **({"conditions": dict(design.prompts), "up": design.up} if design.assets else {}),
        },
    )


def contender_shape(design: StudyDesign, side: Contender, seed: int) -> Shape:
    """Return the shape of a contender: that of a latent's seed, or its asset of that number."""
    if design.assets:
        row = design.assets[seed]
        asset = row["a" if side == design.a else "b"]
        return Shape.of_asset(
            generator=side.generator,
            source=asset["file"],
            seed=seed,
            file=asset["hash"],
            condition=row["prompt"],
        )
    return Shape(
        generator=side.generator,
        source=side.source,
        seed=seed,
        psi=design.psi,
        level=design.level,
        resolution=design.resolution,
        triangles=design.triangles,
    )


# ---- studies of asset files: two folders with assets of the same prompts, in place of two generators


def read_sides(
    a: Path, b: Path, report: Callable[[str], None]
) -> tuple[dict[str, Contender], list[dict], dict]:
    """Read both folders of assets.

    Returns: both contenders by side, the pairs of assets that the folders have in common, and their prompts,
    in the form of a design. Raises: ValueError if there is no common pair.
    """
    collections: dict[str, Collection] = {}
    for side, folder in (("a", a), ("b", b)):
        with naming(f"--{side}"):
            collections[side] = read_generator(folder)
    by_key = {
        side: {(asset.prompt, asset.seed): asset for asset in c.assets} for side, c in collections.items()
    }
    # Equal files cannot be distinguished, so they are no pair.
    common = sorted(
        key for key in by_key["a"] if key in by_key["b"] and by_key["a"][key].hash != by_key["b"][key].hash
    )
    if not common:
        raise ValueError(
            "--a, --b: expected different assets of the same prompts, found none. Name the files of both"
            " folders after their prompts."
        )
    unused = sum(len(c) for c in by_key.values()) - 2 * len(common)
    if unused:
        report(
            f"{unused} assets are left out: the other folder has no asset of their prompt and seed, or the"
            " same file"
        )
    rows = [
        {
            "prompt": prompt,
            "seed": seed,
            **{
                side: {
                    "file": str(by_key[side][prompt, seed].path),
                    "hash": by_key[side][prompt, seed].hash,
                    "kind": by_key[side][prompt, seed].kind,
                }
                for side in by_key
            },
        }
        for prompt, seed in common
    ]
    # The digest of all files takes the place of the hash of weights.
    contenders = {
        side: Contender(
            label=folder.resolve().name, source=str(folder.resolve()), generator=_digest(rows, side)
        )
        for side, folder in (("a", a), ("b", b))
    }
    # Prompts of assets that are not compared are left out.
    used = {prompt for prompt, _ in common}
    prompts = {
        name: prompt
        # a comes second, so its prompts replace those of b with the same name.
        for c in (collections["b"], collections["a"])
        for name, prompt in prompts_json(c).items()
        if name in used
    }
    return contenders, rows, prompts


def check_files(design: StudyDesign) -> None:
    """Raise ValueError for files of a design that have changed since it was made."""
    files = [(Path(row[side]["file"]), row[side]["hash"]) for row in design.assets for side in ("a", "b")]
    for (path, expected), examined in zip(files, reading.examine([path for path, _ in files]), strict=True):
        if examined.hash != expected:
            raise ValueError(
                f"{path.name}: the file has changed since the study was designed. Use the original file."
            )


def _digest(rows: list[dict], side: str) -> str:
    """Return the SHA-256 in hex of a side's files; it takes the place of the hash of a generator's
    weights.
    """
    return hashlib.sha256(
        json.dumps([[row["prompt"], row["seed"], row[side]["hash"]] for row in rows]).encode()
    ).hexdigest()
