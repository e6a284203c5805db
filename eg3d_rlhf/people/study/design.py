"""A study's design: all that could be chosen to please, chosen and written down before the first answer, with
a hash; and its campaign.
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

UP = "y"
FORMAT = 1
_OUT = "Exclusions"  # title of flags
TRAINING_PAIRS = len(SHAPE_DAMAGES)  # one of each kind
GOLD_PAIRS = 24  # more than an annotator meets in most studies; beyond, the rarest come again
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
    """One of the two generators."""

    label: str  # how reports call it; annotators never see it
    source: str  # file or run folder; '' is the bundled generator
    generator: str  # sha256 hex of the weights


@dataclass(frozen=True, kw_only=True)
class ExclusionRules:
    """Who and what is left out of the primary result."""

    gold_accuracy: float = _out_knob(
        0.75, "Annotators below it on gold checks are left out.", metavar="0..1", low=0, high=1
    )
    gold_least: int = _out_knob(3, "... after so many checks.", low=1)
    fast_milliseconds: int = _out_knob(600, "Faster trials are left out.", low=0)
    fast_share: float = _out_knob(
        0.25, "Annotators with more fast trials are left out.", metavar="0..1", low=0, high=1
    )
    least_share: float = _out_knob(
        0.5, "Annotators who did less of their share are left out.", metavar="0..1", low=0, high=1
    )

    def __post_init__(self):
        check_knobs(self)


@dataclass(frozen=True, kw_only=True)
class StudyDesign:
    """All that is decided beforehand."""

    name: str
    a: Contender
    b: Contender
    trials: int  # answers to pairs after which the study is over
    annotators: int = knob(1, "People who are asked.", "Study", low=1)
    annotators_per_pair: int = 1
    seed: int = knob(0, "Decides latents, checks, order and sides.", "Study", low=0)
    psi: float = knob(0.7, "Truncation.", "Shapes", metavar="0..2", low=0, high=2, rare=True)
    level: float = knob(10.0, "Raw density of the surface.", "Shapes", rare=True)
    resolution: int = knob(
        128, "Grid points per axis.", "Shapes", metavar="POINTS", low=16, high=512, rare=True
    )
    triangles: int = knob(30_000, "Per shape, about.", "Shapes", low=100, high=10**6, rare=True)
    gold_every: int = knob(
        10, "One gold check in so many trials of an annotator; 0: none.", "Study", metavar="TRIALS", low=0
    )
    up: str = knob(
        UP, "Of finished assets: the axis that points up in their files.", "Shapes", choices=("y", "z")
    )
    view: str = knob("front", "Where a pair is first looked at from.", "Shapes", choices=VIEWS, rare=True)
    ties: str = knob("half", "How ties count.", "Study", choices=("half", "excluded"))
    until: str | None = knob(
        None,
        "ISO 8601 with offset: over then in any case.",
        "Study",
        metavar="TIME",
        shown="no end",
        rare=True,
    )
    confidence: float = 0.95
    resamples: int = _out_knob(4000, "Of the bootstraps in the report.", low=100)
    shapes: int | None = None  # of generators whose shapes can be counted: seeds 0 to shapes - 1 name them
    # finished assets in place of generators: seed i is {"prompt", "seed", "a": {"file", "hash", "kind"}, "b":
    # the same}
    assets: tuple[Mapping, ...] = field(default=(), hash=False)
    prompts: Mapping = field(default_factory=dict, hash=False)  # of assets: {name: {"text", "image", "hash"}}
    exclusions: ExclusionRules = field(default_factory=ExclusionRules)
    # the calculation behind `trials`, as eg3d_rlhf.people.study.power gives it
    power: dict = field(default_factory=dict, hash=False)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    plan: tuple[str, ...] = PLAN

    def __post_init__(self):
        if self.a.generator == self.b.generator:
            twice = self.a.generator[:12]
            raise ValueError(
                f"a and b: expected two different generators, got the weights {twice}... twice. Name another"
                " network for b."
            )
        check_knobs(self)
        if self.trials < 1 or not 1 <= self.annotators_per_pair <= self.annotators:
            got = f"{self.trials} and {self.annotators_per_pair}"
            raise ValueError(
                f"expected trials >= 1 and annotators_per_pair in 1..{self.annotators} annotators, got {got}."
            )
        if self.shapes is not None and self.latents > self.shapes:
            most = self.shapes * self.annotators_per_pair
            raise ValueError(
                f"n: expected at most {most} trials of {self.shapes} pairs of shapes, got {self.trials}. Use"
                f" --n={most}."
            )
        if self.gold_every == 1:
            raise ValueError("gold_every must be 0 (none) or >= 2, got 1. Use 10.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {self.confidence}.")
        try:
            known = self.until is None or datetime.fromisoformat(self.until).tzinfo is not None
        except ValueError:
            known = False
        if not known:
            raise ValueError(
                f"until must be an ISO 8601 time with its offset from UTC, got {self.until!r}. Write"
                " 2030-01-31T18:00+00:00."
            )

    @property
    def latents(self) -> int:
        return math.ceil(self.trials / self.annotators_per_pair)

    @property
    def share(self) -> int:
        return math.ceil(self.trials / self.annotators)

    @property
    def quota(self) -> int:
        """Trials and gold checks after which an annotator is done: her share, and a tenth more where others
        leave off.
        """
        wanted = self.share if self.annotators == 1 else math.ceil(1.1 * self.share)
        total = wanted
        while self.gold_every and total - math.ceil(total / self.gold_every) < wanted:
            total += 1
        return total

    def seeds(self) -> tuple[list[int], list[int]]:
        """Seeds of the compared latents, and further ones for gold checks and training: all different, while
        there are shapes left.
        """
        spare = 64
        known = MAX_SEED if self.shapes is None else self.shapes
        drawn = (
            np.random.default_rng(self.seed)
            .choice(known, size=min(known, self.latents + spare), replace=False)
            .tolist()
        )
        return drawn[: self.latents], list(
            itertools.islice(itertools.cycle(drawn[self.latents :] + drawn[: self.latents]), spare)
        )

    def to_dict(self) -> dict:
        content = {"format": FORMAT, **json.loads(json.dumps(asdict(self))), "latent_seeds": self.seeds()[0]}
        # of generators' shapes, and in earlier designs
        absent = {"assets": [], "prompts": {}, "up": UP, "view": "front"}
        content = {
            name: value for name, value in content.items() if name not in absent or value != absent[name]
        }
        return {**content, "hash": content_hash(content)}

    @property
    def hash(self) -> str:
        return self.to_dict()["hash"]


def content_hash(content: dict) -> str:
    """sha256 hex of canonical JSON, the hash itself aside."""
    bare = {k: v for k, v in content.items() if k != "hash"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_design(path: str | Path, design: StudyDesign) -> Path:
    """Write the file once, for its owner alone: it says which side is which.

    Raises: FileExistsError where there is one.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(
            f"{path}: expected no design yet, got one. Go on with that study, or name another folder."
        )
    write_atomic(path, (json.dumps(design.to_dict(), indent=1) + "\n").encode(), private=True)
    return path


def read_design(path: str | Path, recorded: str | None = None) -> StudyDesign:
    """Read a design and refuse one that was changed since it was written."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a study's design, got no file. Name the study's folder, or create the study"
            " first."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stamp = content["hash"]
        version = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a study's design as JSON, got something else ({error}). Restore it."
        ) from None
    if version != FORMAT:
        raise ValueError(
            f"{path}: expected a design of format {FORMAT}, got {version}. Use the version that made it."
        )
    if content_hash(content) != stamp or recorded not in (None, stamp):
        wrong = (
            f"expected the design with hash {(recorded or stamp)[:12]}..., got another: it was altered after"
            " the study was designed"
        )
        raise ValueError(f"{path}: {wrong}. Restore it from a copy, or design a new study.")
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
    """Whether the stopping rule is met: all trials answered, or the time over."""
    now = now or datetime.now(UTC)
    return answered >= design.trials or (
        design.until is not None and now >= datetime.fromisoformat(design.until)
    )


def contender(label: str, loaded: "LoadedGenerator") -> Contender:
    """A generator as the design names it; the bundled one is known by its place, wherever that is."""
    source = "" if loaded.path == bundled.GENERATOR else str(loaded.path.resolve())
    return Contender(label=label, source=source, generator=loaded.hash)


def study_pairs(design: StudyDesign) -> list[PlannedPair]:
    """Training, then trials, with gold pairs in between so that they are prepared in time.

    `first` is a and `second` is b, from the same latent, at the same psi, level, resolution and number of
    triangles. A gold pair is one latent of one generator, whole and damaged; generators and kinds of damage
    take turns, so nothing but the damage gives the answer.
    """
    seeds, spare = design.seeds()
    damages = DAMAGES if design.assets else SHAPE_DAMAGES
    if design.assets:  # a video cannot be damaged
        spare = [i for i in spare if all(design.assets[i][side]["kind"] in DAMAGED_KINDS for side in "ab")]
    rng = np.random.default_rng([design.seed, 1])
    sides = (design.a, design.b)
    # a block is a latent, drawn at random, with a shape of each generator
    compared = [(side, seed) for seed in seeds for side in sides]
    items = Items(
        members=[Item(prompt=str(seed), source=side.generator) for side, seed in compared], ordered=True
    )
    blocks = STRATEGIES["blocks"].plan(items, [], rng, StrategyOptions(pairs=len(seeds)))
    shapes = [shape_of(design, side, seed) for side, seed in compared]
    trials = [PlannedPair(first=shapes[first], second=shapes[second]) for first, second in blocks.pairs]
    training = known_answers(
        [shape_of(design, design.a, seed) for seed in spare[:TRAINING_PAIRS]], Kind.TRAINING, rng, damages
    )
    checks = spare[TRAINING_PAIRS : TRAINING_PAIRS + GOLD_PAIRS] if design.gold_every else []
    gold = known_answers(
        [shape_of(design, sides[i // len(damages) % 2], seed) for i, seed in enumerate(checks)],
        Kind.GOLD,
        rng,
        damages,
    )
    # gold as densely as it will be asked for
    starts = range(0, len(trials), design.gold_every or len(trials))
    mixed = [
        pair
        for i, start in enumerate(starts)
        for pair in (*gold[i : i + 1], *trials[start : start + starts.step])
    ]
    return [*training, *mixed, *gold[len(starts) :]]


def campaign_settings(design: StudyDesign) -> CampaignSettings:
    """The campaign of a study; it keeps the design's hash."""
    return CampaignSettings(
        name=design.name,
        mode=Mode.STUDY,
        seed=design.seed,
        annotators_per_pair=design.annotators_per_pair,
        repeat_share=0.0,
        swap_share=0.0,
        gold_every=design.gold_every,
        trials_per_annotator=design.quota,
        view=design.view,
        show_render=False,
        extra={
            # answers stay once they are in
            "design_hash": design.hash,
            "trials": design.trials,
            "until": design.until,
            **({"conditions": dict(design.prompts), "up": design.up} if design.assets else {}),
        },
    )


def shape_of(design: StudyDesign, of: Contender, seed: int) -> Shape:
    """One contender's shape of a latent, or its asset number `seed`."""
    if design.assets:
        row = design.assets[seed]
        asset = row["a" if of == design.a else "b"]
        return Shape.of_asset(
            generator=of.generator,
            source=asset["file"],
            seed=seed,
            file=asset["hash"],
            condition=row["prompt"],
        )
    return Shape(
        generator=of.generator,
        source=of.source,
        seed=seed,
        psi=design.psi,
        level=design.level,
        resolution=design.resolution,
        triangles=design.triangles,
    )


# ---- studies of finished assets: two folders of assets of the same prompts, in place of two generators


def read_sides(
    a: Path, b: Path, tell: Callable[[str], None]
) -> tuple[dict[str, Contender], list[dict], dict]:
    """Both contenders by side, the pairs of assets that they have in common, and their prompts, as a design
    keeps them.
    """
    collections: dict[str, Collection] = {}
    for side, folder in (("a", a), ("b", b)):
        with naming(f"--{side}"):
            collections[side] = read_generator(folder)
    by = {side: {(asset.prompt, asset.seed): asset for asset in c.assets} for side, c in collections.items()}
    common = sorted(key for key in by["a"] if key in by["b"] and by["a"][key].hash != by["b"][key].hash)
    if not common:
        raise ValueError(
            "--a, --b: expected assets of the same prompts that differ, got none. Name the files of both"
            " after their prompts."
        )
    left = sum(len(c) for c in by.values()) - 2 * len(common)
    if left:
        tell(
            f"{left} assets are left out: the other folder has none of their prompt and seed, or the same"
            " file"
        )
    rows = [
        {
            "prompt": prompt,
            "seed": seed,
            **{
                side: {
                    "file": str(by[side][prompt, seed].path),
                    "hash": by[side][prompt, seed].hash,
                    "kind": by[side][prompt, seed].kind,
                }
                for side in by
            },
        }
        for prompt, seed in common
    ]
    contenders = {
        side: Contender(
            label=folder.resolve().name, source=str(folder.resolve()), generator=_digest(rows, side)
        )
        for side, folder in (("a", a), ("b", b))
    }
    used = {prompt for prompt, _ in common}
    prompts = {
        name: kept
        for c in (collections["b"], collections["a"])
        for name, kept in prompts_json(c).items()
        if name in used
    }
    return contenders, rows, prompts


def check_files(design: StudyDesign) -> None:
    """Raises: ValueError naming the files of a design that are not what they were when it was made."""
    files = [(Path(row[side]["file"]), row[side]["hash"]) for row in design.assets for side in ("a", "b")]
    for (path, expected), examined in zip(files, reading.examine([path for path, _ in files]), strict=True):
        if examined.hash != expected:
            raise ValueError(
                f"{path.name}: expected the file that the study was designed with, got a changed one."
                " Restore it."
            )


def _digest(rows: list[dict], side: str) -> str:
    return hashlib.sha256(
        json.dumps([[row["prompt"], row["seed"], row[side]["hash"]] for row in rows]).encode()
    ).hexdigest()
