"""The open label format of pairs: which of two latent seeds has the better geometry. One record per line, as
JSON lines or as CSV with a header.

| field     | meaning                                                                                     |
| --------- | ------------------------------------------------------------------------------------------- |
| winner    | seed of the preferred shape, z = RandomState(seed).randn(z_dim); required                   |
| loser     | seed of the other shape; required                                                           |
| generator | SHA-256, in hex, of the weights of the generator of the shapes                              |
| psi       | truncation that the shapes were generated with                                              |
| annotator | name of the person or program that gave the label                                           |
| time      | ISO 8601 text, or seconds since 1970                                                        |
| tie       | true: no preference; winner and loser are then simply the two seeds                         |
| clean     | seed that a noise-free annotator prefers, if it is known (or true: winner, false: loser)    |

Other fields are kept in `extra` and written again. Readers stream; writers replace a file atomically.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from training.storage import write_atomic

if TYPE_CHECKING:
    from eg3d_rlhf.preferences.unpaired import UnpairedPreference

FIELDS = ("winner", "loser", "generator", "psi", "annotator", "time", "tie", "clean")
MAX_SEED = 2**32 - 1  # the largest seed of numpy's RandomState
Label = TypeVar("Label")
Reader = Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]  # yields the numbers and records of lines
# accepted texts of truth values in CSV
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A label of one pair. Fields as in the table above. Raises: ValueError.

    >>> Preference(winner=3, loser=8).to_dict()
    {'winner': 3, 'loser': 8}
    """

    winner: int
    loser: int
    # None in the following fields: unknown.
    generator: str | None = None
    psi: float | None = None
    annotator: str | None = None
    time: str | float | None = None
    tie: bool = False
    clean: int | None = None
    # Not hashed: dicts have no hash.
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("winner", "loser"):
            check_seed(name, getattr(self, name))
        if self.winner == self.loser:
            raise ValueError(f"expected two different seeds, got {self.winner} twice. Remove the line.")
        # None: no annotator without noise is known.
        if self.clean is not None and self.clean not in (self.winner, self.loser):
            raise ValueError(
                f"expected clean to be {self.winner} or {self.loser}, got {self.clean!r}. Write the seed of"
                " the better shape."
            )
        check_psi(self.psi)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Preference":
        """Return a label from what `to_dict` returned. Unknown names become `extra`."""
        return cls(
            **{k: v for k, v in record.items() if k in FIELDS},
            extra={k: v for k, v in record.items() if k not in FIELDS},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; fields without a value are left out."""
        fields = {name: getattr(self, name) for name in FIELDS}
        return {
            **{k: v for k, v in fields.items() if v is not None and not (k == "tie" and not v)},
            **self.extra,
        }


@dataclass(frozen=True)
class LabelSource:
    """The labels of a training: a file, or a source that grows while the training runs, so that the run
    stores a copy of the labels that it used.
    """

    name: str  # for messages; contains no secrets
    read: Callable[[], list[Preference]]  # returns the present labels; raises OSError, ValueError
    settings: Mapping[str, Any]  # 'labels' and 'filters' of a run's settings, as JSON values
    file: Path | None = None  # None: the labels may grow

    @classmethod
    def of_file(cls, path: Path) -> "LabelSource":
        """Return all labels of a .jsonl or .csv file as a source; see `load_labels`."""
        return cls(
            path.name, functools.partial(load_labels, path), {"labels": str(path), "filters": None}, path
        )


def load_labels(path: str | Path) -> list[Preference]:
    """Read all labels of a .jsonl or .csv file.

    Tables of ranked seeds with the header (index, rank1, rank2) are recognised by it.

    Raises: as `read_records`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load_labels(write_labels(Path(folder, "labels.jsonl"), [Preference(winner=3, loser=8)]))[0].winner
    3
    """
    readers: dict[str, Reader] = {".jsonl": jsonl_records, ".ndjson": jsonl_records, ".csv": _csv_records}
    return read_records(Path(path), readers, _parse, "pairs")


def read_records(
    path: Path, readers: Mapping[str, Reader], parse: Callable[[Mapping[str, Any]], Label], things: str
) -> list[Label]:
    """Read all labels of a file.

    Args: readers: of its records, by the name's ending; things: what is labelled.
    Raises: FileNotFoundError; ValueError with file, line and remedy for the first record that does not fit,
        and when there are none.
    """
    if path.suffix not in readers:
        raise ValueError(f"labels: expected a .jsonl or .csv file, got {path.name}. Rename or convert it.")
    if not path.is_file():
        raise FileNotFoundError(
            f"labels: expected a label file, got none at {path}. Check the path, or label some"
            f" {things} first."
        )
    labels = []
    for line, record in readers[path.suffix](path):
        try:
            labels.append(parse(record))
        except ValueError as error:
            raise ValueError(f"{path.name}, line {line}: {error}") from error
    if not labels:
        raise ValueError(
            f"{path.name}, line 1: expected at least one label, got an empty file. Label some {things} first."
        )
    return labels


def write_labels(path: str | Path, labels: Iterable[Preference]) -> Path:
    """Write labels as .jsonl or .csv, depending on the suffix, atomically. Returns the path.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_labels(Path(folder, "labels.csv"), [Preference(winner=3, loser=8)]).name
    'labels.csv'
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(
            f"write_labels: expected a name ending in .jsonl or .csv, got {path.name}. Change the suffix."
        )
    # All records at once: the columns of a CSV depend on all of them.
    records = [label.to_dict() for label in labels]
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(record) + "\n" for record in records)
    else:
        # Columns for all extra fields; a record without one leaves its cell empty.
        extra = sorted({key for record in records for key in record} - set(FIELDS))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [*FIELDS, *extra], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        text = buffer.getvalue()
    write_atomic(path, text.encode())
    return path


def labels_hash(labels: Iterable["Preference | UnpairedPreference"]) -> str:
    """Compute the SHA-256, in hex, of the labels' canonical JSON lines, in order.

    It is the same for the .jsonl and the .csv file of one list of labels without extra fields.
    """
    digest = hashlib.sha256()
    for label in labels:
        # One canonical line at a time; the labels need not fit into memory twice.
        digest.update((json.dumps(label.to_dict(), sort_keys=True) + "\n").encode())
    return digest.hexdigest()


def jsonl_records(
    path: Path, example: str = "{'winner': ..., 'loser': ...}"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and object of each line. Raises: ValueError with file and line for other content."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            # Empty lines, such as the last one, are skipped.
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path.name}, line {number}: expected one JSON object, got: {error}. Correct the line."
                ) from error
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise ValueError(
                    f"{path.name}, line {number}: expected a JSON object, got {kind}. Write {example}."
                )
            yield number, record


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the non-empty cells of each row. Raises: ValueError with file and line."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.reader(file)
        header = [name.strip() for name in next(rows, [])]
        # A table of ranked seeds: rank 1 is the winner.
        ranked = header[1:] == ["rank1", "rank2"]
        names = ["index", "winner", "loser"] if ranked else header
        if not {"winner", "loser"} <= set(names):
            raise ValueError(
                f"{path.name}, line 1: expected a header with winner and loser (or: index, rank1, rank2), got"
                f" {header}. Add the header."
            )
        for row in rows:
            if not any(cell.strip() for cell in row):
                # an empty line, such as at the end of the file
                continue
            if len(row) != len(names):
                raise ValueError(
                    f"{path.name}, line {rows.line_num}: expected {len(names)} cells, got {len(row)}. Correct"
                    " the line."
                )
            record = dict(zip(names, (cell.strip() for cell in row), strict=True))
            if ranked:
                record.pop("index")
            # line_num counts lines of the file, which can be more than rows
            yield rows.line_num, {k: v for k, v in record.items() if v != ""}


def _parse(record: Mapping[str, Any]) -> Preference:
    """Parse a record from JSON or from text cells. Raises: ValueError without file and line."""
    missing = [name for name in ("winner", "loser") if record.get(name) is None]
    if missing:
        single = " Pass labels of single shapes with --unpaired." if "seed" in record else ""
        raise ValueError(
            f"expected winner and loser, got no {' and no '.join(missing)}. Add the missing seed.{single}"
        )
    winner = parse_seed(record["winner"], "winner")
    loser = parse_seed(record["loser"], "loser")
    tie = record.get("tie", False)
    clean = record.get("clean")
    # JSON has true and false, CSV has text.
    tied = tie if isinstance(tie, bool) else _TRUTH.get(str(tie).lower())
    if tied is None:
        raise ValueError(f"expected tie to be true or false, got {tie!r}. Correct it or leave it out.")
    # True and false are allowed for `clean`, too: they stand for winner and loser.
    if str(clean).lower() in ("true", "false"):
        clean = winner if str(clean).lower() == "true" else loser
    return Preference(
        winner=winner,
        loser=loser,
        tie=tied,
        clean=None if clean is None else parse_seed(clean, "clean"),
        **common_fields(record, FIELDS),
    )


def common_fields(record: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Parse the fields that labels of pairs and of single shapes share; what is not in `names` is `extra`."""
    return {
        **{k: None if record.get(k) is None else str(record[k]) for k in ("generator", "annotator")},
        "psi": parse_number(record, "psi"),
        "time": parse_time(record.get("time")),
        "extra": {k: v for k, v in record.items() if k not in names},
    }


def check_seed(name: str, seed: object) -> None:
    """Raise ValueError, without file and line, unless `seed` is an integer seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(
            f"expected {name} to be a seed from 0 to {MAX_SEED}, got {seed!r}. Write the latent's integer"
            " seed."
        )


def check_psi(psi: float | None) -> None:
    """Raise ValueError, without file and line, for a truncation outside 0..2. None is accepted."""
    if psi is not None and not (math.isfinite(psi) and 0 <= psi <= 2):
        raise ValueError(
            f"expected psi from 0 to 2, got {psi}. Write the truncation that the shapes were generated with."
        )


def parse_number(record: Mapping[str, Any], name: str) -> float | None:
    """Return a number from JSON or text, None if it is missing. Raises: ValueError without file and line."""
    value = record.get(name)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"expected {name} to be a number, got {value!r}. Correct it or leave it out."
        ) from None


def parse_seed(value: Any, name: str) -> int:
    """Return a seed from JSON or text. Raises: ValueError without file and line."""
    try:
        # int() would accept True and round 1.5
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"expected {name} to be an integer seed, got {value!r}. Write the latent's integer seed."
        ) from None


def parse_time(value: Any) -> str | float | None:
    """Return a time from JSON or text. Raises: ValueError without file and line."""
    if value is None:
        return None
    # First as seconds since 1970, then as ISO 8601.
    with contextlib.suppress(TypeError, ValueError):
        return float(value)
    try:
        datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError(
            f"expected time in ISO 8601 or seconds since 1970, got {value!r}. Correct it or leave it out."
        ) from None
    return str(value)
