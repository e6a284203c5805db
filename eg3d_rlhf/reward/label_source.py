"""Where a reward training's labels come from: a file, or a labelling store, whose labels of the moment are kept with the run."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from eg3d_rlhf.label.preferences import LabelFilters, is_store_url, read_preferences, without_password
from eg3d_rlhf.preferences.labels import FIELDS, Preference, load_labels, write_labels
from training.distributed import SINGLE, Ranks

KEPT = "labels.jsonl"
ALL = LabelFilters()


def read_labels_of(
    source: Path | str, filters: LabelFilters = ALL, resumed: Path | None = None, ranks: Ranks = SINGLE
) -> list[Preference]:
    """Labels of a file or of a store's URL; a run that goes on in folder `resumed` gets those it began with. All ranks get rank 0's.

    Raises: as `load_labels` and `read_preferences`; ValueError for filters with a file.
    """
    check_filters(source, filters)
    if not is_store_url(source):
        return load_labels(source)
    if resumed is not None and (resumed / KEPT).is_file():
        return load_labels(resumed / KEPT)
    found = read_preferences(source, filters)
    records = ranks.broadcast([label.to_dict() for label in found])  # somebody may have answered between two ranks' reading
    return [_from_record(record) for record in records]


def check_filters(source: Path | str, filters: LabelFilters) -> None:
    """Raises: ValueError when a file is to be filtered."""
    given = [name for name, value in asdict(filters).items() if value != getattr(ALL, name)]
    if given and not is_store_url(source):
        flags = ", ".join("--" + {"annotators": "annotator"}.get(name, name).replace("_", "-") for name in given)
        raise ValueError(
            f"{flags}: expected a store in --labels, got the file {Path(source).name}. Leave {'it' if len(given) == 1 else 'them'} out, or "
            "write --labels=sqlite:///labels.db."
        )


def keep_labels(source: Path | str, labels: Sequence[Preference], folder: Path) -> None:
    """Write a store's labels into the run's folder, once."""
    if is_store_url(source) and not (folder / KEPT).is_file():
        write_labels(folder / KEPT, labels)


def source_name(source: Path | str, whole: bool = False) -> str:
    """What to call the labels: a file's name (`whole`: path), a store's URL without its password."""
    if is_store_url(source):
        return without_password(source)
    return str(source) if whole else Path(source).name


def _from_record(record: dict) -> Preference:
    known = {name: record[name] for name in FIELDS if name in record}
    return Preference(**known, extra={k: v for k, v in record.items() if k not in FIELDS})
