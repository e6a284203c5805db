"""Store URLs as text, without the database packages: telling them from file names, and naming them in messages and folders."""

import re
from pathlib import Path

_STORE = re.compile(r"(sqlite|postgresql|postgres)(\+\w+)?:")
_PASSWORD = re.compile(r"(//[^:/@]*):[^/]*@")


def is_store_url(source: object) -> bool:
    """Whether `source` names a store and not a file."""
    return isinstance(source, str) and _STORE.match(source) is not None


def without_password(url: str) -> str:
    """The URL as it may be shown and written down."""
    return _PASSWORD.sub(r"\1:***@", url)


def labels_source(source: str | Path) -> str | Path:
    """A store's URL as it is, anything else as a path."""
    return source if is_store_url(source) else Path(source)


def source_stem(source: str | Path) -> str:
    """A short name: the file's or database's, without its ending."""
    text = source.split("?")[0] if is_store_url(source) else str(source)
    return Path(text).stem
