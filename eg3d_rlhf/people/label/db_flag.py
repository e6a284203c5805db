"""Opening of the label store that --db names.

The optional dependencies [label] are imported only when a store is opened.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from eg3d_rlhf.core.cli import prefix_errors

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

# Name of the optional dependencies in pyproject.toml. Long commands check that they are installed before they
# start.
EXTRA = "label"
DB = "sqlite:///runs/labels/labels.db"  # default of --db
# help text of --db
DATABASE = "Database of the labels: sqlite:///FILE or postgresql://user@host/database."


def sqlite_file(url: str) -> Path | None:
    """Return the path of the file that an SQLite URL names, or None for the URL of another database."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def store_exists(url: str) -> bool:
    """Return True if there is a label store at a URL.

    A store in PostgreSQL is assumed to exist, so that no connection is needed.
    """
    path = sqlite_file(url)
    return path is None or path.is_file()


@contextmanager
def open_store(url: str, create: bool) -> Iterator["Store"]:
    """Open the label store of --db inside the context, and close it at the end.

    Args:
        url: value of --db.
        create: True creates the store, and the folder of its SQLite file, if they do not exist.

    Raises:
        ValueError, OSError: the store cannot be opened. The message names --db.
    """
    from eg3d_rlhf.people.label.store import Store

    path = sqlite_file(url)
    # Errors of the URL and of the database are reported as errors of the flag --db.
    with prefix_errors("--db"):
        if create and path is not None:
            # The folder is accessible for its owner only, because the store contains hashes of tokens and the
            # answers of the annotators.
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
        store = Store.open(url, create)
    with store:
        yield store
