"""The store at --db: whether there is one, and opening it. Nothing of the extra is imported
before one is opened.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from eg3d_rlhf.core.cli import naming

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

EXTRA = "label"  # of pyproject.toml; what does much before it opens a store looks for it first
DB = "sqlite:///runs/labels/labels.db"
DATABASE = "Database: sqlite:///FILE or postgresql://user@host/database."


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite URL; None for other databases."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def store_exists(url: str) -> bool:
    """Whether there is a store at a URL; one on a server counts as there."""
    path = sqlite_file(url)
    return path is None or path.is_file()


@contextmanager
def open_store(url: str, create: bool) -> Iterator["Store"]:
    """The store at --db, closed afterwards; the folder of a new SQLite file is made."""
    from eg3d_rlhf.people.label.store import Store

    path = sqlite_file(url)
    with naming("--db"):
        if create and path is not None:
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
        store = Store.open(url, create)
    with store:
        yield store
