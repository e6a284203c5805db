"""WORK: the folder of all steps with a flow generator: sampling, labelling, tuning, study and export.

    work.json                   settings of `flow new`: pipeline, prompts of each split, campaign, seeds
    inputs/                     the images, or prompts.txt
    conditioning.safetensors    embeddings of all prompts, by the generator's encoder
    drawn/base/                 assets of the untuned generator, their latents, ranking.jsonl and
                                prompts.jsonl, for people to compare
    labels.db                   people's answers
    tune-00/                    STAGE/ and control/STAGE/ of a training
    drawn/tuned-00/ ...         assets of test prompts, for study-00/

Prompts are split by a hash of their names. Assets of the prompts to train on and to choose on are sampled and
shown to annotators. Assets of the test prompts are sampled for `study` only, after all training and choosing.
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

FORMAT = 1  # version of work.json
FILE = "work.json"
REWARD = "latent-reward.safetensors"  # ensemble that scores samples
BASE = "base"  # folder below drawn/ for assets of the untuned generator
TRAIN, CHOOSE, TEST = SPLITS = ("train", "choose", "test")
SHOWN = (TRAIN, CHOOSE)  # what annotators see
SHARES = (0.6, 0.2, 0.2)  # shares of the prompts, in the order of SPLITS
# values in work.json: prompts that are texts, or prompts that are names of images
KINDS = ("prompts", "pictures")


def check_new(folder: Path) -> None:
    """Raise ValueError for a folder that is a WORK already."""
    if (folder / FILE).exists():
        raise ValueError(
            f"WORK: expected a new folder, got {folder} with a {FILE}. Continue with its next step, or name"
            " another folder."
        )


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Settings of a training in WORK."""

    circular: CircularSettings  # `human` sets the training on people's pairs; the other fields set the loop
    stages: tuple[str, ...] = ()  # stages to tune; empty: all that have pairs
    # circular loop: earlier stages learn from samples that the last stage improved, not from people's pairs
    loop: bool = False
    control: bool = True  # also train the control on randomised labels


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A person's answer to a comparison of two assets of drawn/base."""

    condition: str  # prompt of both assets
    left: str  # name of the asset's file
    right: str
    choice: str  # left, right or tie
    annotator: str
    repeat: bool  # the same person had answered this pair before
    time: float  # seconds since 1970

    @property
    def pair(self) -> frozenset[str]:
        """Return the names of both files, in no order: a pair may be shown with its sides swapped."""
        return frozenset((self.left, self.right))

    @property
    def preferred(self) -> str | None:
        """Return the file of the preferred asset, or None at a tie."""
        return {"left": self.left, "right": self.right}.get(self.choice)


@dataclass(frozen=True)
class Labels:
    """People's answers, and their votes on pairs."""

    answers: Sequence[Answer]
    folder: Path  # folder of the assets

    @functools.cached_property
    def wins(self) -> Counter[tuple[str, str]]:
        """Count how often the first asset was preferred to the second, by (first, second)."""
        decided = [answer for answer in self.answers if answer.preferred is not None]
        return Counter((a.left, a.right) if a.choice == "left" else (a.right, a.left) for a in decided)

    @property
    def pairs(self) -> int:
        """Count the different pairs that were answered."""
        return len({answer.pair for answer in self.answers})

    @property
    def ties(self) -> int:
        """Count the answers that prefer neither asset."""
        return sum(answer.preferred is None for answer in self.answers)

    @property
    def repeats(self) -> tuple[int, int]:
        """Compare the answers of annotators who saw a pair twice.

        Returns (answers equal to the annotator's first, repeated answers).
        """
        first: dict[tuple[str, frozenset[str]], str | None] = {}
        same = asked = 0
        # by time, because a repeat is compared with the annotator's first answer
        for answer in sorted(self.answers, key=lambda answer: answer.time):
            key = (answer.annotator, answer.pair)
            if answer.repeat and key in first:
                same = same + (answer.preferred == first[key])
                asked = asked + 1
            first.setdefault(key, answer.preferred)
        return same, asked

    def votes(self, a: Path | None, b: Path | None) -> tuple[int, int]:
        """Count the votes for the first and for the second asset, given their files."""
        if a is None or b is None:
            return 0, 0
        # answers hold file names only: an asset of another folder with an equal name has no votes
        there = a.resolve().parent == b.resolve().parent == self.folder.resolve()
        return (self.wins[a.name, b.name], self.wins[b.name, a.name]) if there else (0, 0)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Contents of work.json, and paths inside WORK."""

    folder: Path
    pipeline: str  # absolute, or the name of a bundled generator
    family: str
    stages: tuple[str, ...]
    kind: str  # one of KINDS
    up: str  # "y" or "z": axis of sampled assets that points up
    splits: Mapping[str, Sequence[str]]  # prompts, by SPLITS
    files: Mapping[str, Sequence]  # files of the pipeline, by name: SHA-256, bytes, time of change in ns
    seed: int = 0  # of the split of prompts, the campaign and the training
    each: int = 4  # assets per prompt
    precision: str = "float32"  # of the flows' passes
    batch: int = 1  # assets sampled at once, and pairs in one pass
    campaign: str = "labels"
    # for prompts that are images: their files in inputs/, by prompt
    inputs: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    # ---- making, opening

    @classmethod
    def open(cls, folder: Path) -> "Work":
        """Read a WORK. Raises: FileNotFoundError for none; ValueError for a damaged or another version's."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"WORK: expected a folder made by `eg3d-rlhf flow new`, got no {FILE} in {folder}. Make it"
                " with that command."
            )
        # the fields of the file are the fields of this class: a missing or unknown one raises TypeError
        try:
            written = json.loads(path.read_text())
            if written["format"] != FORMAT:
                raise ValueError(
                    f"expected format {FORMAT}, got {written['format']!r} of another version. Use that"
                    " version, or make a new WORK"
                )
            made = cls(folder=Path(folder), **{**written, "stages": tuple(written["stages"])})
            _check_splits(made.splits)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected the fields that `flow new` writes, got missing or unknown ones ({error})."
                " Restore the file."
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}.") from None
        return made

    def write(self) -> "Work":
        """Write work.json. Raises: ValueError where there is one already, or for an empty split."""
        from training.storage import write_atomic

        _check_splits(self.splits)
        check_new(self.folder)
        # the folder is not stored, so that WORK can be moved
        fields = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_atomic(self.folder / FILE, (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode())
        return self

    def check_pipeline(self) -> FlowFamily:
        """Check that the generator's files are those of `flow new`, and return its family.

        Raises: ValueError or FileNotFoundError for changed or missing files.
        """
        # the licence's notice is not printed again: `flow new` has shown it
        family = family_of(Path(self.pipeline), say=lambda licence: None)
        files = family.files(Path(self.pipeline))
        if family.name != self.family or set(files) != set(self.files):
            raise self._changed(f"{family.name} with {', '.join(sorted(files))[:120]}")
        for name, path in files.items():
            # a file is hashed only if its size or time changed: weights are large
            digest, *stamp = self.files[name]
            if stamp != stamp_of(path) and file_hash(path) != digest:
                raise self._changed(f"another {path.name}")
        return family

    def _changed(self, got: str) -> ValueError:
        """Make the error for a changed pipeline."""
        when = f"as it was when {self.folder} was made"
        return ValueError(
            f"WORK: expected {self.pipeline} {when}, got {got}. Restore it, or make a new WORK."
        )

    # ---- prompts and their conditioning

    def names(self, *splits: str) -> tuple[str, ...]:
        """Return the prompts of some splits, by default of all, in their order."""
        return tuple(name for split in splits or SPLITS for name in self.splits[split])

    def conditions(self, *splits: str) -> "Conditions":
        """Read the embeddings of the prompts of some splits, and of the empty prompt if there is one.

        Other embeddings are left out, so that a test prompt cannot be used by mistake.
        """
        from eg3d_rlhf.tuning.flow.base.conditioning import NULL, Conditions, read_conditions

        read = read_conditions(self.conditions_file)
        wanted = self.names(*splits)
        read.select(wanted)  # raises for prompts without an embedding
        tokens = {name: read.tokens[name] for name in (*wanted, NULL) if name in read.tokens}
        return Conditions(tokens=tokens, encoder=read.encoder, zero_null=read.zero_null)

    @property
    def conditions_file(self) -> Path:
        """Return the file of embeddings, which has another name where version 0.1 wrote it."""
        from eg3d_rlhf.experiments.version_0_1 import conditioning_file

        return conditioning_file(self.folder)

    # ---- places

    def drawn(self, name: str = BASE) -> Path:
        """Return the folder of sampled assets with a name."""
        return self.folder / "drawn" / name

    @property
    def database(self) -> str:
        """Return the URL of the database of people's answers."""
        return f"sqlite:///{self.folder / 'labels.db'}"

    def numbered(self, what: str) -> list[Path]:
        """List the folders such as tune-00, in the order of their numbers."""
        there = [
            path
            for path in self.folder.glob(f"{what}-*")
            if re.fullmatch(rf"{what}-\d+", path.name) and path.is_dir()
        ]
        # by number: as texts, tune-100 would come before tune-99
        return sorted(there, key=lambda path: int(path.name.rpartition("-")[2]))

    def next(self, what: str) -> Path:
        """Return the path of the next numbered folder, which does not exist yet."""
        there = self.numbered(what)
        return self.folder / f"{what}-{int(there[-1].name.rpartition('-')[2]) + 1 if there else 0:02d}"

    def tuned(self, tune: Path, control: bool = False) -> dict[str, Path]:
        """Return the tuned weights of a training such as tune-00, or of its control, by stage.

        Stages whose labels carried no learnable signal are left out.
        """
        from eg3d_rlhf.models.policies import META

        place = tune / "control" if control else tune
        return {stage: place / stage for stage in self.stages if (place / stage / META).is_file()}

    def training(self, name: str | None = None) -> Path:
        """Return a training's folder, by default the latest one.

        Raises: FileNotFoundError for no such training; ValueError for one without tuned weights.
        """
        there = {path.name: path for path in self.numbered("tune")}
        if not there or (name is not None and name not in there):
            got = ", ".join(there) or "none"
            raise FileNotFoundError(
                f"WORK: expected {name or 'a training'}, got {got}. Train with: eg3d-rlhf flow tune"
                f" {self.folder}"
            )
        path = there[name] if name else list(there.values())[-1]
        # an interrupted training has a folder, but no weights yet
        if not self.tuned(path):
            raise ValueError(
                f"{path}: expected tuned weights, got none: the training was stopped, or its labels carried"
                " no learnable signal. Tune again, or label more pairs first."
            )
        return path

    # ---- sampled assets and answers

    def lines(self, name: str = BASE) -> list[dict]:
        """Read the list of sampled assets. Raises: FileNotFoundError for none."""
        from eg3d_rlhf.tuning.flow.base.ranking import RANKING

        path = self.drawn(name) / RANKING
        if not path.is_file():
            raise FileNotFoundError(
                f"WORK: expected sampled assets, got no {path}. Sample them with: eg3d-rlhf flow sample"
                f" {self.folder}"
            )
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def labels(self) -> Labels:
        """Read people's answers, for training and for choosing checkpoints.

        Raises: FileNotFoundError or ValueError for no answers, or for answers on other assets or test
            prompts.
        """
        from eg3d_rlhf.people.label.entities import Mode
        from eg3d_rlhf.people.label.store_labels import LabelFilters, kept_judgements

        if not (self.folder / "labels.db").is_file():
            raise FileNotFoundError(
                "WORK: expected people's answers, got none yet. Label pairs with: eg3d-rlhf flow label"
                f" {self.folder}"
            )
        drawn = {(line["condition"], line["seed"]): line["look_at"] for line in self.lines()}
        with open_store(self.database, create=False) as store:
            if store.campaign(self.campaign) is None:
                raise ValueError(
                    f"labels.db: expected campaign {self.campaign!r}, got none. Label pairs with: eg3d-rlhf"
                    f" flow label {self.folder}"
                )
            # only judgements of labelling, without those of other modes of the store
            rows = kept_judgements(store, LabelFilters(campaign=self.campaign), Mode.LABEL)
        answers = list(self._answers(rows, drawn))
        if not answers:
            raise ValueError(
                "WORK: expected people's answers, got none yet. Label pairs with: eg3d-rlhf flow label"
                f" {self.folder}"
            )
        return Labels(answers, self.drawn())

    def _answers(
        self, rows: "Sequence[JudgementRow]", drawn: Mapping[tuple[str, int], str]
    ) -> Iterator[Answer]:
        """Convert rows of the database to answers; each asset must still be the file that was shown."""
        from eg3d_rlhf.people.label.entities import Kind

        # test prompts must not be trained on, even where their assets were labelled
        shown = set(self.names(*SHOWN))
        # (file, hash in the row): each file is hashed once, however many answers it has
        known: dict[tuple[str, str], bool] = {}
        for row in rows:
            names = []
            for shape in (row.left, row.right):
                name = drawn.get((shape.condition, shape.seed))
                if name is not None and (name, shape.file) not in known:
                    known[name, shape.file] = _is(self.drawn() / name, shape.file)
                if name is None or not known[name, shape.file] or shape.condition not in shown:
                    got = f"an answer on {shape.condition!r}, seed {shape.seed}"
                    raise ValueError(
                        f"labels.db: expected answers on the assets of {self.drawn()}, got {got}. Restore"
                        " that folder, or label again."
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
    """Return whether a file has the hash of the file that was shown."""
    from eg3d_rlhf.people.label.assets import reading

    if not path.is_file():
        return False
    if file_hash(path) == digest:
        return True
    # an .obj is shown together with its material and textures, which its hash then includes
    examined = reading.looked_at([path])[0] if path.suffix == ".obj" else None
    return isinstance(examined, reading.Examined) and examined.hash == digest


def divide(names: Sequence[str], seed: int, shares: Sequence[float] = SHARES) -> dict[str, tuple[str, ...]]:
    """Split prompts by a hash of their names.

    Args: shares: of the prompts, in the order of SPLITS; prompts that rounding leaves over are trained on.
    Raises: ValueError where a split would be empty.
    """
    if len(shares) != len(SPLITS) or any(share < 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        got = ", ".join(f"{share:g}" for share in shares)
        raise ValueError(
            f"--split: expected shares of {', '.join(SPLITS)} that add up to 1, got {got}. Write for example"
            " 0.6,0.2,0.2."
        )
    # the hash makes the split independent of the order in which prompts are listed
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    # a share above 0 gets at least one prompt
    choose, test = (max(round(share * len(order)), int(share > 0)) for share in shares[1:])
    splits = {TEST: order[:test], CHOOSE: order[test : test + choose], TRAIN: order[test + choose :]}
    # within a split, prompts keep the order in which they were given
    made = {split: tuple(name for name in names if name in set(splits[split])) for split in SPLITS}
    _check_splits(made)
    return made


def _check_splits(splits: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for a split without a prompt, or for a prompt in two splits."""
    counts = {split: len(splits.get(split, ())) for split in SPLITS}
    empty = [split for split, count in counts.items() if not count]
    if empty:
        got = ", ".join(f"{count} to {split}" for split, count in counts.items())
        raise ValueError(
            f"--split: expected prompts to train, choose and test on, got {got}. Give more prompts, or other"
            " shares."
        )
    twice = [
        name
        for name, count in Counter(name for split in SPLITS for name in splits[split]).items()
        if count > 1
    ]
    if twice:
        raise ValueError(
            f"splits: expected every prompt in one split, got {twice[0]!r} in two. Restore the file."
        )


def stamp_of(path: Path) -> list[int]:
    """Return the size in bytes and the time of the last change in ns, which save reading a file again."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def hashes(files: Mapping[str, Path]) -> dict[str, list]:
    """Hash a pipeline's files, in the form of `Work.files`."""
    return {name: [file_hash(path), *stamp_of(path)] for name, path in files.items()}
