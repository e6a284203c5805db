"""Labels out of a store: as a file in the open label format, and straight into training.

Whole stores move with `export_judgements` and `import_judgements` (whole_export.py, whole_import.py), published tables of seeds with
`import_ranked_seeds` and `export_ranked_seeds` (ranked_seeds.py).
"""

from pathlib import Path

from eg3d_rlhf.label.filters import LabelFilters, to_preference
from eg3d_rlhf.label.ranked_seeds import export_ranked_seeds, import_ranked_seeds
from eg3d_rlhf.label.records import Mode
from eg3d_rlhf.label.store import Store
from eg3d_rlhf.label.urls import without_password
from eg3d_rlhf.label.whole_export import export_judgements
from eg3d_rlhf.label.whole_import import import_judgements
from eg3d_rlhf.preferences.labels import Preference, write_labels

__all__ = [
    "export_judgements", "export_labels", "export_ranked_seeds", "import_judgements", "import_ranked_seeds", "preferences_from_store",
    "preferences_of",
]  # fmt: skip


def preferences_of(store: Store, **filters) -> list[Preference]:
    """Labels of a store in order of receipt; filters as `LabelFilters`.

    Raises: ValueError for an unknown campaign or annotator, a study, and pairs that the label format cannot name.
    """
    chosen = LabelFilters(**filters)
    _check_names(store, chosen)
    rows = chosen.keep(store.judgements(chosen.campaign, chosen.annotators))
    return [to_preference(row) for row in rows]


def preferences_from_store(url: str, **filters) -> list[Preference]:
    """Labels of the store at a URL. Raises as `Store.open` and `preferences_of`, and ValueError when no label is left."""
    with Store.open(url, create=False) as store:
        labels = preferences_of(store, **filters)
    if not labels:
        name = without_password(url)
        raise ValueError(f"{name}: expected at least one label, got none that passes the filters. Label some pairs first, or ask for less.")
    return labels


def export_labels(store: Store, path: str | Path, **filters) -> Path:
    """Write .jsonl or .csv in the open label format, with everything known of each judgement as further fields. Returns the path."""
    return write_labels(path, preferences_of(store, **filters))


def _check_names(store: Store, filters: LabelFilters) -> None:
    if filters.campaign is not None:
        campaign = store.campaign(filters.campaign)
        if campaign is None:
            known = ", ".join(found.settings.name for found in store.campaigns()) or "none"
            raise ValueError(f"campaign: expected one of the store's ({known}), got {filters.campaign!r}. Name one of them.")
        if campaign.settings.mode is not Mode.LABEL:
            raise ValueError(f"campaign {filters.campaign}: expected one that collects preferences, got a study. Name another.")
    names = {annotator.name for annotator in store.annotators()}
    unknown = sorted(set(filters.annotators) - names)
    if unknown:
        listed = ", ".join(sorted(names)) or "none"
        raise ValueError(f"annotator: expected some of the store's ({listed}), got {', '.join(unknown)}. Name others.")
