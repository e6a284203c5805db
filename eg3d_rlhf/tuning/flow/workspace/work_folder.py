"""WORK: the folder in which a flow generator is drawn from, labelled, tuned, tested and exported, and which
remembers all of it.

    work.json                   what `new` was given and chose: pipeline, conditions of each split, campaign,
                                seeds
    inputs/                     the pictures, or prompts.txt
    conditioning.safetensors    embeddings of all conditions, by the generator's own encoder
    drawn/base/                 assets of the generator as it is, their latents, ranking.jsonl and
                                prompts.jsonl, for people to compare
    labels.db                   what people answered
    tune-00/                    STAGE/ and control/STAGE/ of a training
    drawn/tuned-00/ ...         assets of test conditions, for study-00/

Conditions are divided by a hash of their names. Those to train on and to choose on are drawn and shown; those
of the test are drawn for `study` alone, once everything is trained and chosen.
"""

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.tuning.flow.base.family import FlowFamily
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.training.circular.settings import CircularSettings

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.entities import JudgementRow
    from eg3d_rlhf.tuning.flow.base.conditioning import Conditions

FORMAT = 1
FILE = "work.json"
REWARD = "latent-reward.safetensors"  # ensemble that scores samples
BASE = "base"  # name of what the untuned generator drew
TRAIN, CHOOSE, TEST = SPLITS = ("train", "choose", "test")
SHOWN = (TRAIN, CHOOSE)  # what annotators see
SHARES = (0.6, 0.2, 0.2)  # of the conditions
KINDS = ("prompts", "pictures")


def check_new(folder: Path) -> None:
    """Raise ValueError for a folder that is a WORK already."""
    if (folder / FILE).exists():
        raise ValueError(
            f"WORK: expected a new folder, got {folder} with a {FILE}. Go on with it, or name another."
        )


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a training in WORK trains, and with what beside it."""

    circular: CircularSettings  # `human` is how stages learn from people's pairs; the rest is the loop's
    stages: tuple[str, ...] = ()  # none: all that have pairs
    # stages before the last learn from what the one behind made better, in place of people's pairs
    loop: bool = False
    control: bool = True


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a person said of two assets of drawn/base, by the names of their files."""

    condition: str
    left: str
    right: str
    choice: str  # left, right or tie
    annotator: str
    repeat: bool  # the same person had answered this pair before
    time: float  # seconds since 1970

    @property
    def pair(self) -> frozenset[str]:
        return frozenset((self.left, self.right))

    @property
    def preferred(self) -> str | None:
        """None at a tie."""
        return {"left": self.left, "right": self.right}.get(self.choice)


@dataclass(frozen=True)
class Labels:
    """People's answers, and the votes on pairs that they make."""

    answers: Sequence[Answer]
    folder: Path  # of the assets

    @functools.cached_property
    def wins(self) -> Counter[tuple[str, str]]:
        """How often the first was preferred to the second."""
        decided = [answer for answer in self.answers if answer.preferred is not None]
        return Counter((a.left, a.right) if a.choice == "left" else (a.right, a.left) for a in decided)

    @property
    def pairs(self) -> int:
        """How many different pairs were answered."""
        return len({answer.pair for answer in self.answers})

    @property
    def ties(self) -> int:
        """How many answers were that neither is better."""
        return sum(answer.preferred is None for answer in self.answers)

    @property
    def repeats(self) -> tuple[int, int]:
        """Of pairs that a person answered again: how often the answer was the first one, and how many there
        were.
        """
        first: dict[tuple[str, frozenset[str]], str | None] = {}
        same = asked = 0
        for answer in sorted(self.answers, key=lambda answer: answer.time):
            key = (answer.annotator, answer.pair)
            if answer.repeat and key in first:
                same = same + (answer.preferred == first[key])
                asked = asked + 1
            first.setdefault(key, answer.preferred)
        return same, asked

    def votes(self, a: Path | None, b: Path | None) -> tuple[int, int]:
        """For the first, and for the second."""
        if a is None or b is None:
            return 0, 0
        there = a.resolve().parent == b.resolve().parent == self.folder.resolve()
        return (self.wins[a.name, b.name], self.wins[b.name, a.name]) if there else (0, 0)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a folder remembers."""

    folder: Path
    pipeline: str  # absolute, or the name of a bundled generator
    family: str
    stages: tuple[str, ...]
    kind: str  # of KINDS
    up: str  # y or z: which axis of drawn assets points up
    splits: Mapping[str, Sequence[str]]  # names of conditions, by SPLITS
    files: Mapping[str, Sequence]  # of the pipeline, by name: SHA-256, size, time of last change
    seed: int = 0  # divides the conditions; of campaign and training
    each: int = 4  # assets per condition
    precision: str = "float32"  # in which the flows compute
    batch: int = 1  # assets drawn at once, and pairs in one pass
    campaign: str = "labels"
    # of pictures: their files in inputs/, by condition
    inputs: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    # ---- making, opening

    @classmethod
    def open(cls, folder: Path) -> "Work":
        """Raises: FileNotFoundError for no WORK; ValueError for a damaged one, or one of another version."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"WORK: expected a folder that `eg3d-rlhf flow new` made, got no {FILE} in {folder}. Make it."
            )
        try:
            written = json.loads(path.read_text())
            if written["format"] != FORMAT:
                raise ValueError(
                    f"expected format {FORMAT}, got {written['format']!r}, of another version. Use that one,"
                    " or a new WORK"
                )
            made = cls(folder=Path(folder), **{**written, "stages": tuple(written["stages"])})
            _check_splits(made.splits)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected what `flow new` writes, got a file that lacks or adds something ({error})."
                " Restore it."
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}.") from None
        return made

    def write(self) -> "Work":
        """Make the folder's file. Raises: ValueError where there is one, or for splits that leave nothing."""
        from training.storage import write_atomic

        _check_splits(self.splits)
        check_new(self.folder)
        fields = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_atomic(self.folder / FILE, (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode())
        return self

    def check_pipeline(self) -> FlowFamily:
        """The generator's family, once its files are those that `new` saw.

        Raises: ValueError, FileNotFoundError.
        """
        family = family_of(Path(self.pipeline), say=lambda licence: None)  # `flow new` has shown it
        files = family.files(Path(self.pipeline))
        if family.name != self.family or set(files) != set(self.files):
            raise self._changed(f"{family.name} with {', '.join(sorted(files))[:120]}")
        for name, path in files.items():
            digest, *stamp = self.files[name]
            if stamp != stamp_of(path) and file_hash(path) != digest:
                raise self._changed(f"another {path.name}")
        return family

    def _changed(self, got: str) -> ValueError:
        when = f"as it was when {self.folder} was made"
        return ValueError(
            f"WORK: expected {self.pipeline} {when}, got {got}. Restore it, or make a new WORK."
        )

    # ---- conditions

    def names(self, *splits: str) -> tuple[str, ...]:
        """Conditions of splits, all by default, in their order."""
        return tuple(name for split in splits or SPLITS for name in self.splits[split])

    def conditions(self, *splits: str) -> "Conditions":
        """Embeddings of the conditions of splits and of the empty one, and of no others."""
        from eg3d_rlhf.tuning.flow.base.conditioning import NULL, Conditions, read_conditions

        read = read_conditions(self.conditions_file)
        wanted = self.names(*splits)
        read.select(wanted)  # raises for those that are missing
        tokens = {name: read.tokens[name] for name in (*wanted, NULL) if name in read.tokens}
        return Conditions(tokens=tokens, encoder=read.encoder, zero_null=read.zero_null)

    @property
    def conditions_file(self) -> Path:
        from eg3d_rlhf.experiments.version_0_1 import conditioning_file

        return conditioning_file(self.folder)

    # ---- places

    def drawn(self, name: str = BASE) -> Path:
        """Where a generator's assets lie."""
        return self.folder / "drawn" / name

    @property
    def database(self) -> str:
        """The URL of people's answers."""
        return f"sqlite:///{self.folder / 'labels.db'}"

    def numbered(self, what: str) -> list[Path]:
        """Folders such as tune-00, in order."""
        there = [
            path
            for path in self.folder.glob(f"{what}-*")
            if re.fullmatch(rf"{what}-\d+", path.name) and path.is_dir()
        ]
        return sorted(there, key=lambda path: int(path.name.rpartition("-")[2]))

    def next(self, what: str) -> Path:
        """A new one, not made yet."""
        there = self.numbered(what)
        return self.folder / f"{what}-{int(there[-1].name.rpartition('-')[2]) + 1 if there else 0:02d}"

    def tuned(self, tune: Path, control: bool = False) -> dict[str, Path]:
        """Tuned weights of a training such as tune-00, or of its control, by stage; empty where it kept
        nothing.
        """
        from eg3d_rlhf.models.policies import META

        place = tune / "control" if control else tune
        return {stage: place / stage for stage in self.stages if (place / stage / META).is_file()}

    def training(self, name: str | None = None) -> Path:
        """A training's folder, the latest by default, with tuned weights.

        Raises: FileNotFoundError, ValueError.
        """
        there = {path.name: path for path in self.numbered("tune")}
        if not there or (name is not None and name not in there):
            got = ", ".join(there) or "none"
            raise FileNotFoundError(
                f"WORK: expected {name or 'a training'}, got {got}. Tune: eg3d-rlhf flow tune {self.folder}"
            )
        path = there[name] if name else list(there.values())[-1]
        if not self.tuned(path):
            raise ValueError(
                f"{path}: expected tuned weights, got none: it was stopped, or its labels taught nothing."
                " Tune again."
            )
        return path

    # ---- what was drawn and said

    def lines(self, name: str = BASE) -> list[dict]:
        """The list of drawn assets. Raises: FileNotFoundError for none."""
        from eg3d_rlhf.tuning.flow.base.ranking import RANKING

        path = self.drawn(name) / RANKING
        if not path.is_file():
            raise FileNotFoundError(
                f"WORK: expected drawn assets, got no {path}. Draw them: eg3d-rlhf flow sample {self.folder}"
            )
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def labels(self) -> Labels:
        """People's answers, to be trained and chosen on.

        Raises: FileNotFoundError or ValueError for none, or for those of other assets or of test conditions.
        """
        from eg3d_rlhf.people.label.entities import Mode
        from eg3d_rlhf.people.label.store_labels import LabelFilters, kept_judgements

        if not (self.folder / "labels.db").is_file():
            raise FileNotFoundError(
                f"WORK: expected people's answers, got none yet. Label: eg3d-rlhf flow label {self.folder}"
            )
        drawn = {(line["condition"], line["seed"]): line["look_at"] for line in self.lines()}
        with open_store(self.database, create=False) as store:
            if store.campaign(self.campaign) is None:
                raise ValueError(
                    f"labels.db: expected campaign {self.campaign!r}, got none. Label: eg3d-rlhf flow label"
                    f" {self.folder}"
                )
            rows = kept_judgements(store, LabelFilters(campaign=self.campaign), Mode.LABEL)
        answers = list(self._answers(rows, drawn))
        if not answers:
            raise ValueError(
                f"WORK: expected people's answers, got none yet. Label: eg3d-rlhf flow label {self.folder}"
            )
        return Labels(answers, self.drawn())

    def _answers(
        self, rows: "Sequence[JudgementRow]", drawn: Mapping[tuple[str, int], str]
    ) -> Iterator[Answer]:
        from eg3d_rlhf.people.label.entities import Kind

        shown = set(self.names(*SHOWN))
        known: dict[tuple[str, str], bool] = {}
        for row in rows:
            names = []
            for shape in (row.left, row.right):
                name = drawn.get((shape.condition, shape.seed))
                if name is not None and (name, shape.file) not in known:
                    known[name, shape.file] = _is(self.drawn() / name, shape.file)
                if name is None or not known[name, shape.file] or shape.condition not in shown:
                    got = f"one of {shape.condition!r}, seed {shape.seed}"
                    raise ValueError(
                        f"labels.db: expected answers on the assets of {self.drawn()}, got {got}. Restore it,"
                        " or label again."
                    )
                names.append(name)
            yield Answer(
                condition=row.left.condition,
                left=names[0],
                right=names[1],
                choice="tie" if row.choice.equal else row.choice.value,
                annotator=row.annotator,
                repeat=row.kind in (Kind.REPEAT, Kind.SWAP),
                time=row.received_at,
            )


def _is(path: Path, digest: str) -> bool:
    """Whether a file is the one that was shown; an .obj is shown with its companions."""
    from eg3d_rlhf.people.label.assets import reading

    if not path.is_file():
        return False
    if file_hash(path) == digest:
        return True
    seen = reading.looked_at([path])[0] if path.suffix == ".obj" else None
    return isinstance(seen, reading.Examined) and seen.hash == digest


def divide(names: Sequence[str], seed: int, shares: Sequence[float] = SHARES) -> dict[str, tuple[str, ...]]:
    """Conditions by split, divided by a hash of their names.

    Args: shares: of SPLITS; what rounding leaves is trained on.
    Raises: ValueError where a split would have none.
    """
    if len(shares) != len(SPLITS) or any(share < 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        got = ", ".join(f"{share:g}" for share in shares)
        raise ValueError(
            f"--split: expected shares of {', '.join(SPLITS)} that add up to 1, got {got}. Write 0.6,0.2,0.2"
            " or so."
        )
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    choose, test = (max(round(share * len(order)), int(share > 0)) for share in shares[1:])
    splits = {TEST: order[:test], CHOOSE: order[test : test + choose], TRAIN: order[test + choose :]}
    made = {split: tuple(name for name in names if name in set(splits[split])) for split in SPLITS}
    _check_splits(made)
    return made


def _check_splits(splits: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for a split without a condition, or a condition in two."""
    counts = {split: len(splits.get(split, ())) for split in SPLITS}
    empty = [split for split, count in counts.items() if not count]
    if empty:
        got = ", ".join(f"{count} to {split}" for split, count in counts.items())
        raise ValueError(
            f"--split: expected conditions to train, choose and test on, got {got}. Give more, or other"
            " shares."
        )
    twice = [
        name
        for name, count in Counter(name for split in SPLITS for name in splits[split]).items()
        if count > 1
    ]
    if twice:
        raise ValueError(
            f"splits: expected every condition in one, got {twice[0]!r} in two. Restore the file."
        )


def stamp_of(path: Path) -> list[int]:
    """Size and time of last change: as long as they stay, a large file is not read again."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def hashes(files: Mapping[str, Path]) -> dict[str, list]:
    """Of a pipeline's files, as `Work.files` has them."""
    return {name: [file_hash(path), *stamp_of(path)] for name, path in files.items()}
