"""Opens the store of --db, and checks whether it exists. The optional dependencies [label] are imported only
when a store is opened.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from eg3d_rlhf.core.cli import naming

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

EXTRA = "label"  # optional dependencies in pyproject.toml; long commands check for them before they start
DB = "sqlite:///runs/labels/labels.db"
DATABASE = "Database: sqlite:///FILE or postgresql://user@host/database."


def sqlite_file(url: str) -> Path | None:
    """Return the file of an SQLite URL, or None for other databases."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def store_exists(url: str) -> bool:
    """Return True if there is a store at a URL. A store on a server counts as existing: it is not asked."""
    path = sqlite_file(url)
    return path is None or path.is_file()


@contextmanager
def open_store(url: str, create: bool) -> Iterator["Store"]:
    """Open the store of --db and close it at the end. The folder of a new SQLite file is created."""
    from eg3d_rlhf.people.label.store import Store

    path = sqlite_file(url)
    # Errors of the URL and of the database are reported as errors of the flag --db.
    with naming("--db"):
        if create and path is not None:
            # Readable for the owner only: the store contains hashes of tokens and people's answers.
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
        store = Store.open(url, create)
    with store:
        yield store
