"""The store at --db: the flag, and opening what it names. Imports nothing heavy."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eg3d_rlhf.core.cli import naming, option
from eg3d_rlhf.people.label.store import Store

DB = "sqlite:///runs/labels/labels.db"
DATABASE = "Database: sqlite:///FILE or postgresql://user@host/database."
database = option("--db", metavar="URL", default=None, show_default=DB, help=DATABASE,  # here or before the sub-command
                  callback=lambda ctx, _, given: given or ctx.obj or DB)


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite URL; None for other databases."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def store_exists(url: str) -> bool:
    """Whether there is a store at a URL; one on a server counts as there."""
    path = sqlite_file(url)
    return path is None or path.is_file()


@contextmanager
def open_store(url: str, create: bool) -> Iterator[Store]:
    """The store at --db, closed afterwards; the folder of a new SQLite file is made."""
    path = sqlite_file(url)
    with naming("--db"):
        if create and path is not None:
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
        store = Store.open(url, create)
    with store:
        yield store
