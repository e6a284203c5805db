"""The work folder (WORK in messages), which contains all steps with one flow generator.

The steps are sampling, labelling, tuning, study and export.

    work.json                   settings of `flow new`: generator, prompts of each split, labelling project,
                                seeds
    inputs/                     images that are prompts, or prompts.txt
    conditioning.safetensors    embeddings of all prompts, made by the generator's encoder
    drawn/base/                 assets of the untuned generator for people to compare, with their latents,
                                ranking.jsonl and prompts.jsonl
    labels.db                   people's answers
    tune-00/                    weights of a training in STAGE/, and weights of its control in control/STAGE/
    drawn/tuned-00/ ...         assets of the test prompts, for study-00/

The prompts are split by a hash of their names into prompts to train on, prompts to choose on and test
prompts. Only assets of the first two splits are shown to annotators. Assets of the test prompts are sampled
for `flow study`, after all training and choosing.
"""

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.preferences.provenance import PEOPLE_ONLY, LabelChoice, LabelUse
from eg3d_rlhf.tuning.flow.base.family import GEOMETRY, FlowFamily
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.training.circular.settings import CircularSettings

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.entities import JudgementRow
    from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning

FORMAT = 1  # version of work.json
FILE = "work.json"
REWARD = "latent-reward.safetensors"  # file of the ensemble of rewards that scores samples
BASE = "base"  # folder below drawn/ for assets of the untuned generator
TRAIN, CHOOSE, TEST = SPLITS = ("train", "choose", "test")
SHOWN = (TRAIN, CHOOSE)  # splits whose assets annotators see
SHARES = (0.6, 0.2, 0.2)  # shares of the prompts, in the order of SPLITS
# Values of `kind` in work.json: the prompts are texts ("prompts"), or names of images ("pictures").
KINDS = ("prompts", "pictures")


def check_new(folder: Path) -> None:
    """Raise ValueError if a folder is already a work folder."""
    if (folder / FILE).exists():
        raise ValueError(
            f"{folder} is already a work folder, since it contains {FILE}. Continue with the next step"
            f" in it, for example eg3d-rlhf flow sample {folder}, or name a new folder."
        )


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Settings of a training in a work folder."""

    # Settings of the circular loop; the field `human` contains those of the training on people's pairs.
    circular: CircularSettings
    stages: tuple[str, ...] = ()  # names of the stages to tune; (): all stages that have pairs
    # True: run the circular loop (Circular-DPO), in which earlier stages learn from samples that the last
    # stage has improved. False: train each stage on people's pairs.
    loop: bool = False
    control: bool = True  # True: also train a control on randomised labels


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A person's answer to a comparison of two assets of drawn/base."""

    condition: str  # prompt of both assets
    left: str  # name of the file of the asset on the left side
    right: str  # name of the file of the asset on the right side
    choice: str  # answer to the question that the answers are about: "left", "right" or "tie"
    annotator: str  # name of the person
    repeat: bool  # True if the same person had answered this pair before
    time: float  # time of the answer in seconds since 1970
    # Name of every question that was asked about the pair -> "left", "right" or "tie".
    votes: Mapping[str, str] = field(default_factory=dict)

    @property
    def pair(self) -> frozenset[str]:
        """Names of both files. Their order is left out, because a pair may be shown with swapped sides."""
        return frozenset((self.left, self.right))

    @property
    def preferred(self) -> str | None:
        """Name of the file of the preferred asset, or None for a tie."""
        return {"left": self.left, "right": self.right}.get(self.choice)


@dataclass(frozen=True)
class Labels:
    """People's answers in a work folder to one question, and their votes on pairs of assets."""

    answers: Sequence[Answer]
    folder: Path  # folder of the assets
    # numbers of answers of people and of judges in the labelling projects
    use: LabelUse | None = None

    def answers_to(self, question: str) -> "Labels":
        """Return the answers to another question. The result is empty if the question was not asked."""
        return Labels(
            [
                replace(answer, choice=answer.votes[question])
                for answer in self.answers
                if question in answer.votes
            ],
            self.folder,
            self.use,
        )

    @functools.cached_property
    def wins(self) -> Counter[tuple[str, str]]:
        """Number of answers that prefer one asset to another: (preferred file, rejected file) -> number."""
        wins: Counter[tuple[str, str]] = Counter()
        for answer in self.answers:
            if answer.preferred is not None:
                is_left = answer.choice == "left"
                wins[(answer.left, answer.right) if is_left else (answer.right, answer.left)] += 1
        return wins

    @property
    def pairs(self) -> int:
        """Number of different pairs that people answered."""
        return len({answer.pair for answer in self.answers})

    @property
    def ties(self) -> int:
        """Number of answers that prefer neither asset."""
        return sum(answer.preferred is None for answer in self.answers)

    @property
    def repeats(self) -> tuple[int, int]:
        """Consistency of annotators who answered the same pair several times.

        The first number counts the repeated answers that equal the annotator's first answer to the pair. The
        second number counts all repeated answers.
        """
        repetitions = self._repetitions()
        return sum(first == repeated for first, repeated in repetitions), len(repetitions)

    @property
    def random_repeats(self) -> float:
        """Share of repeated answers that would equal the first answer if people had answered at random.

        A person who answers at random prefers both assets equally often, and has the share t of ties that was
        observed. Two such answers are equal with the probability t^2 + (1 - t)^2 / 2.
        """
        answers = [answer for repetition in self._repetitions() for answer in repetition]
        tie_share = answers.count(None) / max(len(answers), 1)
        return tie_share**2 + (1 - tie_share) ** 2 / 2

    def _repetitions(self) -> list[tuple[str | None, str | None]]:
        """Return the preferred assets of the first and of the repeated answer for each repeated answer."""
        first_answers: dict[tuple[str, frozenset[str]], str | None] = {}
        repetitions = []
        # Sorted by time, because a repeated answer is compared with the first one.
        for answer in sorted(self.answers, key=lambda answer: answer.time):
            annotator_and_pair = (answer.annotator, answer.pair)
            if answer.repeat and annotator_and_pair in first_answers:
                repetitions.append((first_answers[annotator_and_pair], answer.preferred))
            first_answers.setdefault(annotator_and_pair, answer.preferred)
        return repetitions

    def votes(self, a: Path | None, b: Path | None) -> tuple[int, int]:
        """Return the number of votes for asset a and for asset b in comparisons of the two.

        Args:
            a: path of the file of the first asset; None for an asset without a file, which has no votes.
            b: path of the file of the second asset, or None.
        """
        if a is None or b is None:
            return 0, 0
        # Answers contain file names only. Assets of other folders with the same names have no votes.
        both_in_folder = a.resolve().parent == b.resolve().parent == self.folder.resolve()
        return (self.wins[a.name, b.name], self.wins[b.name, a.name]) if both_in_folder else (0, 0)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Contents of work.json, and paths inside the work folder."""

    folder: Path  # the work folder
    pipeline: str  # absolute path of the generator's folder, or the name of a bundled generator
    family: str  # name of the generator's family
    stages: tuple[str, ...]  # names of the generator's stages
    kind: str  # kind of the prompts, one of KINDS
    up: str  # axis of sampled assets that points up, "y" or "z"
    splits: Mapping[str, Sequence[str]]  # name of a split, see SPLITS -> its prompts
    # Name of a file of the generator -> [SHA-256, size in bytes, time of the last change in ns].
    files: Mapping[str, Sequence]
    seed: int = 0  # seed of the split of the prompts, of the labelling project and of the training
    each: int = 4  # number of assets of each prompt
    precision: str = "float32"  # data type of the flow networks' passes
    batch: int = 1  # number of assets that are sampled together, and of pairs in one pass of the training
    campaign: str = "labels"  # name of the labelling project in the database
    # If the prompts are names of images: prompt -> name of the image's file in inputs/.
    inputs: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT  # version of work.json

    # ---- creation and reading

    @classmethod
    def open(cls, folder: Path) -> "Work":
        """Read the work.json of a work folder.

        Raises: FileNotFoundError if there is no work.json; ValueError if it is damaged or of another version.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} is not a work folder, since it contains no {FILE}. Make one with `eg3d-rlhf"
                " flow new`."
            )
        # The entries of the file are the fields of this class. A missing or unknown entry raises TypeError.
        try:
            entries = json.loads(path.read_text())
            if entries["format"] != FORMAT:
                raise ValueError(
                    f"the file has the format {entries['format']!r} of another version, and this version"
                    f" reads format {FORMAT}. Use that version, or make a new work folder with `eg3d-rlhf"
                    " flow new`"
                )
            work = cls(folder=Path(folder), **{**entries, "stages": tuple(entries["stages"])})
            _check_splits(work.splits, "splits", _RESTORE)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: the file has missing or unknown entries ({error}). Restore it from a copy, or make"
                " a new work folder with `eg3d-rlhf flow new`."
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removesuffix('.')}.") from None
        return work

    def write(self) -> "Work":
        """Write work.json into the work folder, and return this object.

        Raises: ValueError if there is a work.json already, or if a split has no prompt.
        """
        from training.storage import write_atomic

        _check_splits(self.splits, "splits", _RESTORE)
        check_new(self.folder)
        # The path of the folder is not stored, so that the folder can be moved.
        entries = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_atomic(self.folder / FILE, (json.dumps(entries, indent=1, ensure_ascii=False) + "\n").encode())
        return self

    def check_pipeline(self) -> FlowFamily:
        """Check that the generator's files have not changed since `flow new`, and return its family.

        Raises: ValueError or FileNotFoundError for changed or missing files.
        """
        # The notice about the licence is not printed, because `flow new` has printed it already.
        family = family_of(Path(self.pipeline), print_line=lambda licence: None)
        generator_files = family.files(Path(self.pipeline))
        if family.name != self.family or set(generator_files) != set(self.files):
            raise self._changed_error(
                f"it is now a generator of the family {family.name} with the files"
                f" {', '.join(sorted(generator_files))[:120]}"
            )
        for name, path in generator_files.items():
            # Weights are large, so a file is hashed only if its size or its time of change differs.
            recorded_hash, *recorded_stamp = self.files[name]
            if recorded_stamp != stamp_of(path) and file_hash(path) != recorded_hash:
                raise self._changed_error(f"the contents of {path.name} differ")
        return family

    def _changed_error(self, change: str) -> ValueError:
        """Return the error for a generator whose files have changed. `change` describes the change."""
        return ValueError(
            f"{self.folder}: the generator {self.pipeline} has changed since this folder was made: {change}."
            " Restore its files, or make a new work folder with `eg3d-rlhf flow new`."
        )

    # ---- prompts and their conditioning

    def names(self, *splits: str) -> tuple[str, ...]:
        """Return the prompts of the named splits, in their order; without names, those of all splits."""
        return tuple(name for split in splits or SPLITS for name in self.splits[split])

    def conditioning(self, *splits: str) -> "Conditioning":
        """Read the embeddings of the prompts of the named splits, and of the empty prompt if there is one.

        Embeddings of other splits are left out, so that a test prompt cannot be used by mistake.
        """
        from eg3d_rlhf.tuning.flow.base.conditioning import NULL, Conditioning, read_conditioning

        all_embeddings = read_conditioning(self.conditions_file)
        prompts = self.names(*splits)
        all_embeddings.select(prompts)  # raises an error for a prompt without an embedding
        tokens = {
            name: all_embeddings.tokens[name] for name in (*prompts, NULL) if name in all_embeddings.tokens
        }
        return Conditioning(tokens=tokens, encoder=all_embeddings.encoder, zero_null=all_embeddings.zero_null)

    @property
    def conditions_file(self) -> Path:
        """Path of the file with the prompts' embeddings; version 0.1 wrote it under another name."""
        from eg3d_rlhf.experiments.version_0_1 import conditioning_file

        return conditioning_file(self.folder)

    @property
    def kind_word(self) -> str:
        """Word for the inputs in messages: "prompts" or "images"."""
        return "prompts" if self.kind == "prompts" else "images"

    # ---- paths

    def asset_folder(self, name: str = BASE) -> Path:
        """Return the path of the folder drawn/NAME with sampled assets."""
        return self.folder / "drawn" / name

    @property
    def database(self) -> str:
        """URL of the database of people's answers."""
        return f"sqlite:///{self.folder / 'labels.db'}"

    def numbered(self, step: str) -> list[Path]:
        """Return the numbered folders of a step, in the order of their numbers.

        Args:
            step: step, such as "tune" for the folders tune-00, tune-01, ...
        """
        folders = [
            path
            for path in self.folder.glob(f"{step}-*")
            if re.fullmatch(rf"{step}-\d+", path.name) and path.is_dir()
        ]
        # Sorted as texts, tune-100 would come before tune-99.
        return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))

    def next(self, step: str) -> Path:
        """Return the path of a new numbered folder for a step such as "tune", without creating the folder."""
        folders = self.numbered(step)
        next_number = int(folders[-1].name.rpartition("-")[2]) + 1 if folders else 0
        return self.folder / f"{step}-{next_number:02d}"

    def tuned(self, tune: Path, control: bool = False) -> dict[str, Path]:
        """Return the folders with tuned weights of a training: name of a stage -> folder.

        Stages whose labels carried no learnable signal have no such folder and are left out.

        Args:
            tune: folder of the training, such as tune-00.
            control: True for the weights of the control.
        """
        from eg3d_rlhf.models.policies import META

        weights_folder = tune / "control" if control else tune
        return {
            stage: weights_folder / stage
            for stage in self.stages
            if (weights_folder / stage / META).is_file()
        }

    def training(self, name: str | None = None) -> Path:
        """Return the folder of a training that has tuned weights.

        Args:
            name: name of the folder, such as tune-00; None for the latest training.
        Raises: FileNotFoundError if there is no such training; ValueError if it has no tuned weights.
        """
        folders = {training_folder.name: training_folder for training_folder in self.numbered("tune")}
        if not folders:
            raise FileNotFoundError(
                f"{self.folder}: there is no training yet. Train with: eg3d-rlhf flow tune {self.folder}"
            )
        if name is not None and name not in folders:
            raise FileNotFoundError(
                f"{self.folder}: there is no training {name}. Name one of {', '.join(folders)}, or"
                f" train with: eg3d-rlhf flow tune {self.folder}"
            )
        training_folder = folders[name] if name else list(folders.values())[-1]
        if not self.tuned(training_folder):
            if not (training_folder / "report.json").is_file():
                raise ValueError(
                    f"{training_folder}: the training has no tuned weights yet, because it is not finished."
                    " Resume it with the same eg3d-rlhf flow tune; eg3d-rlhf flow status"
                    f" {self.folder} prints the command."
                )
            raise ValueError(
                f"{training_folder}: the training has no tuned weights, because its labels carried no"
                f" learnable signal. Label more pairs of more {self.kind_word}; eg3d-rlhf flow status"
                f" {self.folder} prints the command."
            )
        return training_folder

    # ---- sampled assets and answers

    def lines(self, name: str = BASE) -> list[dict]:
        """Read the list of sampled assets in drawn/NAME, one dictionary for each asset.

        Raises: FileNotFoundError if there is no list, that is, before all assets are sampled.
        """
        from eg3d_rlhf.tuning.flow.base.ranking import RANKING

        path = self.asset_folder(name) / RANKING
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder}: no assets were sampled yet, since there is no {path}. Sample them with:"
                f" eg3d-rlhf flow sample {self.folder}"
            )
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def labels(self, campaigns: Sequence[str] = (), choice: LabelChoice = PEOPLE_ONLY) -> Labels:
        """Read people's answers on assets of the prompts to train on and to choose on, or answers of judges.

        The result holds the answers to the question about the geometry. That is the only question of a
        labelling project without further questions, and of every project of version 0.1.

        Args:
            campaigns: names of labelling projects in the database; (): the project of the work folder.
            choice: selection of the answers by their origin.
        Raises: FileNotFoundError or ValueError if there are no answers, or if an answer is about another
            asset.
        """
        from eg3d_rlhf.people.label.entities import Mode
        from eg3d_rlhf.people.label.store_labels import LabelFilters, kept_judgements
        from eg3d_rlhf.preferences.provenance import ALL

        if not (self.folder / "labels.db").is_file():
            raise FileNotFoundError(
                f"{self.folder}: there are no answers of people yet. To label pairs, run: eg3d-rlhf flow"
                f" label {self.folder}"
            )
        shown_files = {(line["condition"], line["seed"]): line["look_at"] for line in self.lines()}
        judgements = []
        with open_store(self.database, create=False) as store:
            for campaign_name in campaigns or (self.campaign,):
                if store.campaign(campaign_name) is None:
                    project_flag = (
                        "" if campaign_name == self.campaign else f" --set campaign={campaign_name}"
                    )
                    raise ValueError(
                        f"labels.db: the database has no labelling project {campaign_name!r} yet. Label pairs"
                        f" with: eg3d-rlhf flow label {self.folder}{project_flag}"
                    )
                # The database may contain judgements of other modes, such as studies.
                filters = LabelFilters(campaign=campaign_name, labels_from=ALL)
                judgements += kept_judgements(store, filters, Mode.LABEL)
        judgements, use = choice.select(judgements, lambda judgement: judgement.provenance)
        # Stages learn from further questions, too, so the gate tests the judge of each of them.
        for question in {name for judgement in judgements for name in judgement.votes}:
            voted = [judgement for judgement in judgements if question in judgement.votes]
            # the origin of the vote, as a record that names no other field of the judgement
            choice.select([judgement.provenance_of(question) for judgement in voted], dict)
        answers = list(self._answers(judgements, shown_files))
        if not answers and use.judges:
            raise ValueError(
                f"{self.folder}: the answers are {use.people} of people and {use.judges} of judges, and"
                f" --labels-from={choice.labels_from} leaves none. Use another value of --labels-from, or"
                f" label pairs with: eg3d-rlhf flow label {self.folder}"
            )
        if not answers:
            raise ValueError(
                f"{self.folder}: there are no answers of people yet. To label pairs, run: eg3d-rlhf flow"
                f" label {self.folder}"
            )
        return Labels(answers, self.asset_folder(), use)

    def _answers(
        self, judgements: "Sequence[JudgementRow]", shown_files: Mapping[tuple[str, int], str]
    ) -> Iterator[Answer]:
        """Yield the answers in rows of the database.

        Args:
            judgements: rows of the database.
            shown_files: (prompt, seed) of an asset -> name of its file.
        Raises: ValueError if an asset is not in the list, if its file has changed since it was shown, or if
            its prompt is a test prompt.
        """
        from eg3d_rlhf.people.label.entities import Kind

        # Test prompts are excluded, so that no network is trained on them.
        allowed_prompts = set(self.names(*SHOWN))
        # (file name, hash in the row) -> True if the file has this hash. Each file is hashed only once.
        is_unchanged: dict[tuple[str, str], bool] = {}
        for judgement in judgements:
            file_names = []
            for shape in (judgement.left, judgement.right):
                file_name = shown_files.get((shape.condition, shape.seed))
                if file_name is not None and (file_name, shape.file) not in is_unchanged:
                    is_unchanged[file_name, shape.file] = _has_hash(
                        self.asset_folder() / file_name, shape.file
                    )
                if (
                    file_name is None
                    or not is_unchanged[file_name, shape.file]
                    or shape.condition not in allowed_prompts
                ):
                    raise ValueError(
                        f"labels.db: the answer on the asset of {shape.condition!r} with seed {shape.seed}"
                        f" cannot be used: the asset is missing in {self.asset_folder()}, its file has"
                        " changed since people saw it, or its prompt belongs to the study. Restore that"
                        " folder from a copy, or label again."
                    )
                file_names.append(file_name)
            overall_choice = "tie" if judgement.choice.equal else judgement.choice.value
            # A project without a question about the geometry asks which shape is better, which is about the
            # geometry. The votes on the questions that it does ask follow.
            question_votes = {GEOMETRY: overall_choice, **judgement.votes}
            yield Answer(
                condition=judgement.left.condition,
                left=file_names[0],
                right=file_names[1],
                choice=question_votes[GEOMETRY],
                annotator=judgement.annotator,
                votes=question_votes,
                repeat=judgement.kind in (Kind.REPEAT, Kind.SWAP),
                time=judgement.received_at,
            )


def _has_hash(path: Path, expected_hash: str) -> bool:
    """Return True if a file exists and still has the hash that was stored when people saw its asset."""
    from eg3d_rlhf.people.label.assets import reading

    if not path.is_file():
        return False
    if file_hash(path) == expected_hash:
        return True
    # The hash of a file that is shown with a material includes its material and texture files.
    examination = reading.examine_or_reason([path])[0] if path.suffix in (".obj", ".ply") else None
    return isinstance(examination, reading.Examined) and examination.hash == expected_hash


def divide(names: Sequence[str], seed: int, shares: Sequence[float] = SHARES) -> dict[str, tuple[str, ...]]:
    """Split prompts by a hash of their names: name of a split -> its prompts.

    Args:
        names: prompts.
        seed: seed of the split.
        shares: shares of the prompts for the splits, in the order of SPLITS; their sum is 1. Prompts that
            remain after rounding are trained on.
    Raises: ValueError if the shares are not valid, or if a split would have no prompt.
    """
    if len(shares) != len(SPLITS) or any(share < 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        given_shares = ", ".join(f"{share:g}" for share in shares)
        raise ValueError(
            f"--split: expected shares of {', '.join(SPLITS)} that add up to 1, got {given_shares}. Write for"
            " example --split=0.6,0.2,0.2."
        )
    # Sorted by a hash, so that the split does not depend on the order of the prompts.
    hashed_order = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    # A split with a share above 0 gets at least one prompt.
    choose_count, test_count = (max(round(share * len(hashed_order)), int(share > 0)) for share in shares[1:])
    prompts_by_split = {
        TEST: set(hashed_order[:test_count]),
        CHOOSE: set(hashed_order[test_count : test_count + choose_count]),
        TRAIN: set(hashed_order[test_count + choose_count :]),
    }
    # Within a split, the prompts have the same order as in `names`.
    splits = {split: tuple(name for name in names if name in prompts_by_split[split]) for split in SPLITS}
    remedy = "Give more prompts, or use other shares, such as --split=0.6,0.2,0.2."
    _check_splits(splits, "--split", remedy)
    return splits


def describe_splits(splits: Mapping[str, Sequence[str]]) -> str:
    """Describe the sizes of the splits.

    The prompts to choose on serve two purposes in `flow tune`: one part chooses checkpoints, and the other is
    held out for the test against the control. The prompts of the split TEST are those of the study.
    """
    counts = {split: len(splits.get(split, ())) for split in SPLITS}
    return (
        f"{counts[TRAIN]} to train on, {counts[CHOOSE]} to choose on and to hold out, {counts[TEST]} for the"
        " study"
    )


# Remedy for a damaged work.json.
_RESTORE = "Restore the file from a copy, or make a new work folder with `eg3d-rlhf flow new`."


def _check_splits(splits: Mapping[str, Sequence[str]], who: str, remedy: str) -> None:
    """Raise ValueError if a split has no prompt, or if a prompt is in two splits.

    Args:
        splits: name of a split -> its prompts.
        who: beginning of the message.
        remedy: last sentence of the message about a split without prompts.
    """
    counts = {split: len(splits.get(split, ())) for split in SPLITS}
    if not all(counts.values()):
        raise ValueError(
            f"{who}: each split needs at least one prompt, but there are {describe_splits(splits)}. {remedy}"
        )
    occurrences = Counter(name for split in SPLITS for name in splits[split])
    repeated_prompts = [name for name, count in occurrences.items() if count > 1]
    if repeated_prompts:
        raise ValueError(f"{who}: the prompt {repeated_prompts[0]!r} is in two splits. {_RESTORE}")


def stamp_of(path: Path) -> list[int]:
    """Return the stamp of a file: its size in bytes and the time of its last change in ns.

    A file with an unchanged stamp is not hashed again.
    """
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def hashes(files: Mapping[str, Path]) -> dict[str, list]:
    """Return the hashes and stamps of a generator's files, in the form of `Work.files`."""
    return {name: [file_hash(path), *stamp_of(path)] for name, path in files.items()}
