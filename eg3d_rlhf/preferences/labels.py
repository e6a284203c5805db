"""The open format of labels of pairs. A label states which of two seeds of a generator has the better
geometry.

A file contains one record per line, as JSON lines, or as CSV with a header.

| field     | meaning                                                                                     |
| --------- | ------------------------------------------------------------------------------------------- |
| winner    | seed of the preferred shape, z = RandomState(seed).randn(z_dim); required                   |
| loser     | seed of the other shape; required                                                           |
| generator | SHA-256, in hex, of the weights of the generator of the shapes                              |
| psi       | truncation with which the shapes were generated                                             |
| annotator | name of the person or program that gave the label                                           |
| time      | ISO 8601 text, or seconds since 1970                                                        |
| tie       | true if neither shape is preferred; the order of winner and loser then has no meaning       |
| clean     | seed that an annotator without noise prefers (or true for winner, false for loser)          |

All other fields are stored in `extra` and written again. Files are written atomically. The fields of a label
by a judge (a vision-language model) are described in `preferences.provenance`; such labels are read only if
the caller selects them.

Tables from spreadsheets and from pandas are read, too: with a byte order mark or in UTF-16; with semicolons
or tabs between the cells; with names of columns in capitals; with an index column without a name, which is
ignored; and with seeds such as 3.0.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eg3d_rlhf.preferences.provenance import PEOPLE_ONLY, LabelChoice, LabelUse, check_not_empty
from training.storage import write_atomic
from training.text_files import read_text

if TYPE_CHECKING:
    from eg3d_rlhf.preferences.unpaired import UnpairedPreference

FIELDS = ("winner", "loser", "generator", "psi", "annotator", "time", "tie", "clean")
MAX_SEED = 2**32 - 1  # the largest seed of numpy's RandomState
Label = TypeVar("Label")
# Function that reads a file and yields the number and the record of each line
Reader = Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]
# Truth values in CSV files, by their text in lower case
_TRUTH = {
    **dict.fromkeys(("true", "1", "1.0", "yes"), True),
    # pandas writes 0.0 and 1.0 if a column of truth values has missing cells
    **dict.fromkeys(("false", "0", "0.0", "no", ""), False),
}
# Characters that may separate the cells of a table. Spreadsheets use the semicolon where the comma is the
# decimal separator, and tabs for "Unicode text".
_DELIMITERS = (",", ";", "\t", "|")
CSV_SUFFIXES = (".csv", ".tsv")
JSONL_SUFFIXES = (".jsonl", ".ndjson")  # endings of files of JSON lines
_WHOLE_NUMBER = re.compile(r"(?<=\d)\.0+$")  # the decimals of an integer such as 3.0
_SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A label of one pair. The fields are described in the table of the module.

    Raises: ValueError for a value that is not allowed.

    >>> Preference(winner=3, loser=8).to_dict()
    {'winner': 3, 'loser': 8}
    """

    winner: int
    loser: int
    # A field that is None was not stated.
    generator: str | None = None
    psi: float | None = None
    annotator: str | None = None
    time: str | float | None = None
    tie: bool = False
    clean: int | None = None
    # Further fields of the record. They are not hashed, since a dict has no hash.
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("winner", "loser"):
            check_seed(name, getattr(self, name))
        if self.winner == self.loser:
            raise ValueError(
                f"winner and loser are the same seed, {self.winner}. Remove this label, or correct one of its"
                " seeds."
            )
        if self.clean is not None and self.clean not in (self.winner, self.loser):
            raise ValueError(
                f"expected clean to be {self.winner} or {self.loser}, got {self.clean!r}. Write the seed of"
                " the better shape, or remove the field clean."
            )
        check_psi(self.psi)

    @classmethod
    def from_dict(cls, label_record: Mapping[str, Any]) -> "Preference":
        """Create a label from the values that `to_dict` returned. Unknown names become `extra`."""
        return cls(
            **{name: value for name, value in label_record.items() if name in FIELDS},
            extra={name: value for name, value in label_record.items() if name not in FIELDS},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the label as JSON values. Fields that were not stated, and a false tie, are left out."""
        json_values = {}
        for name in FIELDS:
            field_value = getattr(self, name)
            if field_value is not None and not (name == "tie" and not field_value):
                json_values[name] = field_value
        return {**json_values, **self.extra}


@dataclass(frozen=True)
class LabelSource:
    """Source of the labels of a training: a file, or a store of labels that can grow.

    A training on a store writes a copy of the labels that it used to its run folder.
    """

    name: str  # name for messages, without secrets
    # function that returns the labels of a choice with their numbers by origin; raises OSError, ValueError
    read_choice: Callable[[LabelChoice], tuple[list[Preference], LabelUse]]
    # entries 'labels' and 'filters' of the settings of a run, and those of a choice that is not the default
    settings: Mapping[str, Any]
    file: Path | None = None  # the file; None for a store
    choice: LabelChoice = PEOPLE_ONLY  # selection of the labels by their origin

    @classmethod
    def from_file(cls, path: Path, choice: LabelChoice = PEOPLE_ONLY) -> "LabelSource":
        """Create the source of the labels of a .jsonl or .csv file.

        Args:
            path: the file.
            choice: selection of the labels by their origin.
        """
        return cls(
            path.name,
            functools.partial(read_labels, path),
            {"labels": str(path), "filters": None, **choice.to_dict()},
            path,
            choice,
        )

    def read(self) -> list[Preference]:
        """Return the labels; see `read_counted`."""
        return self.read_counted()[0]

    def read_counted(self) -> tuple[list[Preference], LabelUse]:
        """Return the labels, and the numbers of labels of each origin in the source.

        Raises: OSError or ValueError if the labels cannot be read, if none is left, or if labels of a judge
            have no calibration that passed.
        """
        return self.read_choice(self.choice)


def invert(label: Preference) -> Preference:
    """Return the label with winner and loser exchanged."""
    return replace(label, winner=label.loser, loser=label.winner)


def load_labels(path: str | Path, choice: LabelChoice = PEOPLE_ONLY) -> list[Preference]:
    """Read the labels of a .jsonl or .csv file.

    A .csv file may also be a table of ranked seeds, with the header (index, rank1, rank2).

    Args:
        path: the file.
        choice: selection of the labels by their origin; by default labels of judges are left out.
    Raises: FileNotFoundError if the file does not exist; ValueError, which names the line, for a record that
        is not valid, and for a file without labels.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load_labels(write_labels(Path(folder, "labels.jsonl"), [Preference(winner=3, loser=8)]))[0].winner
    3
    """
    return read_labels(path, choice)[0]


def read_labels(path: str | Path, choice: LabelChoice = PEOPLE_ONLY) -> tuple[list[Preference], LabelUse]:
    """Read the labels of a file, and count the labels of each origin. See `load_labels`."""
    reader_by_suffix: dict[str, Reader] = {
        **dict.fromkeys(JSONL_SUFFIXES, jsonl_records),
        **dict.fromkeys(CSV_SUFFIXES, _csv_records),
    }
    all_labels = read_records(Path(path), reader_by_suffix, _parse, "pairs")
    labels, use = choice.select(all_labels, lambda label: label.extra)
    check_not_empty(labels, use, Path(path).name)
    return labels, use


def check_label_path(path: Path, suffixes: Collection[str], plural_noun: str) -> None:
    """Check that a file of labels exists, and has the name of such a file.

    Args:
        path: file of labels.
        suffixes: allowed endings of the file name, in small letters.
        plural_noun: plural name of the labelled things, for messages.
    Raises: ValueError for another ending; FileNotFoundError if the file does not exist.
    """
    # Windows programs may write the ending in capitals.
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        remedy = f"Convert it to {next(iter(suffixes))}."
        if suffix in _SPREADSHEETS and ".csv" in suffixes:
            remedy = "Save it in the spreadsheet program as CSV."
        raise ValueError(
            f"labels: expected a file with the ending {' or '.join(suffixes)}, got {path.name}. {remedy}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"labels: the file {path} does not exist. Correct the path, or label some {plural_noun} first."
        )


def read_records(
    path: Path,
    reader_by_suffix: Mapping[str, Reader],
    parse: Callable[[Mapping[str, Any]], Label],
    plural_noun: str,
) -> list[Label]:
    """Read all labels of a file.

    Args:
        path: file of labels.
        reader_by_suffix: functions that read the records, by the ending of the file name.
        parse: function that converts a record to a label.
        plural_noun: plural name of the labelled things, for messages.
    Raises: FileNotFoundError if the file does not exist; ValueError, which names the line, for the first
        record that is not valid, and for a file without labels.
    """
    check_label_path(path, reader_by_suffix, plural_noun)
    labels = []
    for line_number, label_record in reader_by_suffix[path.suffix.lower()](path):
        try:
            labels.append(parse(label_record))
        except ValueError as error:
            raise ValueError(f"{path.name}, line {line_number}: {error}") from error
    if not labels:
        raise ValueError(
            f"{path.name}, line 1: the file is empty and contains no label. Add labels of {plural_noun}."
        )
    return labels


def write_labels(path: str | Path, labels: Iterable[Preference]) -> Path:
    """Write labels to a .jsonl or .csv file, depending on its ending, atomically. Return the path.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_labels(Path(folder, "labels.csv"), [Preference(winner=3, loser=8)]).name
    'labels.csv'
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(
            f"write_labels: expected a file name with the ending .jsonl or .csv, got {path.name}. Use, for"
            f" example, {path.stem}.jsonl."
        )
    # All records are needed first, since they determine the columns of a CSV file.
    label_records = [label.to_dict() for label in labels]
    if path.suffix == ".jsonl":
        file_text = "".join(json.dumps(label_record) + "\n" for label_record in label_records)
    else:
        # One column for each further field of any record; in other records its cell is empty.
        extra_names = sorted({name for label_record in label_records for name in label_record} - set(FIELDS))
        csv_buffer = io.StringIO()
        csv_writer = csv.DictWriter(csv_buffer, [*FIELDS, *extra_names], lineterminator="\n")
        csv_writer.writeheader()
        csv_writer.writerows(label_records)
        file_text = csv_buffer.getvalue()
    write_atomic(path, file_text.encode())
    return path


def declare_control(path: Path, control: str) -> None:
    """State beside a file of labels that they are a control. A reward that is trained on them states it, too.

    Args:
        path: file of the labels; the file NAME.meta.json is written into its folder.
        control: kind of control, for example "randomised labels".
    """
    write_atomic(path.with_suffix(".meta.json"), (json.dumps({"control": control}) + "\n").encode())


def control_of(path: Path | None) -> str:
    """Return the kind of control that the file NAME.meta.json beside a file of labels states, and '' if none.

    Args: path: file of the labels; None: the labels have no file.
    """
    meta_path = None if path is None else path.with_suffix(".meta.json")
    if meta_path is None or not meta_path.is_file():
        return ""
    with contextlib.suppress(ValueError):
        meta = json.loads(meta_path.read_text())
        if isinstance(meta, dict):
            # `label synthetic --randomised` writes the second entry
            return str(meta.get("control") or ("randomised labels" if meta.get("randomised") else ""))
    return ""


def labels_hash(labels: Iterable["Preference | UnpairedPreference"]) -> str:
    """Compute the SHA-256, in hex, of a list of labels, which depends on their order.

    The hash is that of one JSON line with sorted keys per label. It is the same whether labels without extra
    fields are stored in a .jsonl or a .csv file.
    """
    sha256 = hashlib.sha256()
    for label in labels:
        sha256.update((json.dumps(label.to_dict(), sort_keys=True) + "\n").encode())
    return sha256.hexdigest()


def jsonl_records(
    path: Path, example: str = "{'winner': ..., 'loser': ...}"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the JSON object of each line of a file. Empty lines are skipped.

    Args:
        path: the .jsonl file.
        example: example of a line, for messages.
    Raises: ValueError, which names file and line, for a line that is not a JSON object.
    """
    # Lines end at \n, \r\n or \r. str.splitlines would also end them at characters that JSON texts may hold.
    for line_number, line_text in enumerate(io.StringIO(read_text(path), newline=None), 1):
        if not line_text.strip():
            continue
        try:
            label_record = json.loads(line_text)
        except ValueError as error:
            raise ValueError(
                f"{path.name}, line {line_number}: the line is not valid JSON ({error}). Write one JSON"
                f" object per line, for example {example}."
            ) from error
        if not isinstance(label_record, dict):
            type_name = type(label_record).__name__
            raise ValueError(
                f"{path.name}, line {line_number}: expected a JSON object, got a value of type {type_name}."
                f" Write, for example, {example}."
            )
        yield line_number, label_record


def _field_name(name: str) -> str:
    """Return a name without outer spaces, and in lower case if it is a name of FIELDS or of a rank."""
    name = name.strip()
    return name.lower() if name.lower() in (*FIELDS, "rank1", "rank2") else name


def _read_header(header_line: str) -> tuple[str, list[str]]:
    """Return the delimiter and the names of the columns of a table of labels.

    The delimiter is the first of _DELIMITERS with which the header has the columns of labels. Names in
    capitals are accepted only if the header has no such columns otherwise.

    Args: header_line: first line of the table.
    Returns: the delimiter; and the names, where a column that is ignored has the name ''. Without a suitable
        delimiter, the names are those of a table with commas.
    """
    cells_by_delimiter = {
        delimiter: [name.strip() for name in next(csv.reader([header_line], delimiter=delimiter), [])]
        for delimiter in _DELIMITERS
    }
    for normalise in (str, _field_name):
        for delimiter, cells in cells_by_delimiter.items():
            names = [normalise(name) for name in cells]
            # In a table of ranked seeds, rank 1 is the winner. Other columns are its index, whose name may
            # differ, and perhaps a column without a name, which is the index of pandas.
            if names[-2:] == ["rank1", "rank2"] and len([name for name in names[:-2] if name]) <= 1:
                return delimiter, [""] * (len(names) - 2) + ["winner", "loser"]
            if {"winner", "loser"} <= set(names):
                return delimiter, names
    return ",", cells_by_delimiter[","]


def _open_table(path: Path) -> tuple[io.StringIO, str, list[str], int]:
    """Open a table of labels behind its header.

    Returns: the text after the header; the delimiter; the names of the columns, see `_read_header`; and the
        number of the header's line, from 1.
    """
    # newline="" keeps line ends inside quoted cells
    table_text = io.StringIO(read_text(path), newline="")
    header_line = table_text.readline()
    header_number = 1
    # Excel accepts, and some programs write, a first line that names the delimiter, such as "sep=;".
    if header_line.lower().startswith("sep="):
        header_line = table_text.readline()
        header_number = 2
    return table_text, *_read_header(header_line), header_number


def is_ranked_table(path: Path) -> bool:
    """Return True if a file of labels is a table of ranked seeds, which has no other columns."""
    # The header is the first line, or the second one after a line such as "sep=;".
    return any(
        "rank1" in line.lower() and [name for name in _read_header(line)[1] if name] == ["winner", "loser"]
        for line in read_text(path).splitlines()[:2]
    )


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the non-empty cells, by name, of each row of a CSV file with a header.

    Raises: ValueError, which names file and line, for a header or a row that is not valid.
    """
    table_text, delimiter, column_names, header_number = _open_table(path)
    if not {"winner", "loser"} <= set(column_names):
        raise ValueError(
            f"{path.name}, line {header_number}: expected a header with the columns winner and loser (or:"
            f" index, rank1, rank2), got {column_names}. Add the header."
        )
    names = [name for name in column_names if name]
    repeated_names = sorted({name for name in names if names.count(name) > 1})
    if repeated_names:
        raise ValueError(
            f"{path.name}, line {header_number}: expected each column once, but the header has"
            f" {', '.join(repeated_names)} more than once. Rename or remove one of the columns."
        )
    csv_rows = csv.reader(table_text, delimiter=delimiter)
    for row_cells in csv_rows:
        # A row may have several lines; line_num is the number of its last line after the header.
        line_number = csv_rows.line_num + header_number
        cells = [cell.strip() for cell in row_cells]
        # Empty lines are skipped.
        if not any(cells):
            continue
        # Spreadsheets may add empty cells at the end of a row.
        while len(cells) > len(column_names) and not cells[-1]:
            cells.pop()
        if len(cells) != len(column_names):
            raise ValueError(
                f"{path.name}, line {line_number}: expected {len(column_names)} cells as in the header, got"
                f" {len(cells)}. Add or remove cells."
            )
        # A column without a name is the index that pandas writes, or an empty column of a spreadsheet.
        yield (
            line_number,
            {name: cell for name, cell in zip(column_names, cells, strict=True) if name and cell},
        )


def _parse(label_record: Mapping[str, Any]) -> Preference:
    """Create a label from a record of a JSON line or of a CSV row.

    Raises: ValueError for a record that is not valid; the caller adds file and line to the message.
    """
    if "winner" not in label_record:
        # names in capitals, such as Winner
        label_record = {_field_name(name): value for name, value in label_record.items()}
    missing_names = [name for name in ("winner", "loser") if label_record.get(name) is None]
    if missing_names and "seed" in label_record:
        raise ValueError(
            f"this is a label of a single shape, without {' and '.join(missing_names)}. Pass a file of such"
            " labels with --unpaired."
        )
    if missing_names:
        raise ValueError(
            f"the label has no {' and no '.join(missing_names)}. Add this field, with the seed of the shape."
        )
    winner = parse_seed(label_record["winner"], "winner")
    loser = parse_seed(label_record["loser"], "loser")
    tie = label_record.get("tie", False)
    clean_seed = label_record.get("clean")
    # Values of JSON are bool, and values of CSV are text.
    is_tie = tie if isinstance(tie, bool) else _TRUTH.get(str(tie).lower())
    if is_tie is None:
        raise ValueError(
            f"expected tie to be true or false, got {tie!r}. Write true or false, or remove the field tie."
        )
    # `clean_seed` may also be true, which means the winner, or false, which means the loser.
    if str(clean_seed).lower() in ("true", "false"):
        clean_seed = winner if str(clean_seed).lower() == "true" else loser
    return Preference(
        winner=winner,
        loser=loser,
        tie=is_tie,
        clean=None if clean_seed is None else parse_seed(clean_seed, "clean"),
        **common_fields(label_record, FIELDS),
    )


def common_fields(label_record: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Parse the fields that labels of pairs and labels of single shapes have in common.

    Args:
        label_record: record of a JSON line or of a CSV row.
        names: names of all fields of the label; all others become `extra`.
    Returns: dict of the parsed values "generator", "annotator", "psi", "time" and "extra".
    Raises: ValueError for a value that is not valid; the caller adds file and line to the message.
    """
    return {
        **{
            name: None if label_record.get(name) is None else str(label_record[name])
            for name in ("generator", "annotator")
        },
        "psi": parse_number(label_record, "psi"),
        "time": parse_time(label_record.get("time")),
        "extra": {name: value for name, value in label_record.items() if name not in names},
    }


def check_seed(name: str, seed: object) -> None:
    """Raise ValueError if the field `name` is not an integer seed in its range."""
    # bool is a subclass of int.
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(
            f"expected {name} to be an integer seed from 0 to {MAX_SEED}, got {seed!r}. Write the seed with"
            " which the shape was generated."
        )


def check_psi(psi: float | None) -> None:
    """Raise ValueError if a truncation psi is outside 0..2. None is accepted."""
    if psi is not None and not (math.isfinite(psi) and 0 <= psi <= 2):
        raise ValueError(
            f"expected psi from 0 to 2, got {psi}. Write the truncation with which the shapes were generated."
        )


def parse_number(label_record: Mapping[str, Any], name: str) -> float | None:
    """Return the field `name` as a number, or None if it is missing.

    Raises: ValueError for a value that is no number; the caller adds file and line to the message.
    """
    field_value = label_record.get(name)
    try:
        return None if field_value is None else float(field_value)
    except (TypeError, ValueError):
        raise ValueError(
            f"expected {name} to be a number, got {field_value!r}. Write a number, or remove the field"
            f" {name}."
        ) from None


def parse_seed(field_value: Any, name: str) -> int:
    """Return the value of the field `name` as an integer seed.

    Raises: ValueError for a value that is no integer; the caller adds file and line to the message.
    """
    try:
        # int() would accept True, and would round 1.5 down.
        if isinstance(field_value, bool) or (isinstance(field_value, float) and not field_value.is_integer()):
            raise ValueError
        # pandas writes the integers of a column with missing cells as 3.0.
        return int(_WHOLE_NUMBER.sub("", field_value) if isinstance(field_value, str) else field_value)
    except (TypeError, ValueError):
        raise ValueError(
            f"expected {name} to be an integer seed, got {field_value!r}. Write the seed with which the shape"
            " was generated."
        ) from None


def parse_time(field_value: Any) -> str | float | None:
    """Return a time as seconds since 1970 or as ISO 8601 text, or None for None.

    Raises: ValueError for any other value; the caller adds file and line to the message.
    """
    if field_value is None:
        return None
    # A number, also as text, is a time in seconds.
    with contextlib.suppress(TypeError, ValueError):
        return float(field_value)
    try:
        datetime.fromisoformat(str(field_value))
    except ValueError:
        raise ValueError(
            f"expected time as ISO 8601 text or as seconds since 1970, got {field_value!r}. Write, for"
            " example, 2026-01-31T12:00:00, or remove the field time."
        ) from None
    return str(field_value)
