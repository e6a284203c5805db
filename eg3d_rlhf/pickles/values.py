"""What the pickle machine deals in: refusals, budgets, names, long texts, and values told in a few characters."""

import dataclasses
from typing import Any

MAX_OPCODES = 1_000_000  # a published snapshot has about 40,000
MAX_INTEGER_BYTES = 16  # torch's magic number has 10
MAX_NAME = 200  # characters of a module or class name
LONG_TEXT = 1 << 16  # longer texts stay undecoded: nothing but source code and protocol 2's bytes are that long
MAX_TEXT = 1 << 27  # bytes, of one long text (a tensor of protocol 2 is one) and of all short ones together


class Refusal(ValueError):
    """Why a stream is not read, as the middle of a sentence: 'the global os.system', 'the end of the file'."""


@dataclasses.dataclass
class Budget:
    """What may still be spent on one file."""

    decoded: int  # bytes that texts may become; the file's size
    opcodes: int = MAX_OPCODES
    texts: int = MAX_TEXT  # bytes of short texts

    def work(self, steps: int = 1) -> None:
        """Spend opcodes, or as much work as so many. Raises: Refusal where none are left."""
        self.opcodes -= steps
        if self.opcodes < 0:
            raise Refusal(f"more than {MAX_OPCODES} opcodes")

    def decode(self, size: int) -> None:
        """Spend bytes. Raises: Refusal where none are left, as when one text is named over and over."""
        self.decoded -= size
        if self.decoded < 0:
            raise Refusal("more decoded bytes than the file holds")

    def read_text(self, size: int) -> None:
        """Spend bytes of short texts. Raises: Refusal where none are left."""
        self.texts -= size
        if self.texts < 0:
            raise Refusal(f"more than {MAX_TEXT} bytes of text")


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that the stream asked for; never looked up."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """module.name"""
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class LongText:
    """A text of more than LONG_TEXT bytes, as UTF-8."""

    utf8: memoryview


def brief(value: Any) -> str:
    """A value in a few printable characters of one line, however large or nested it is."""
    if isinstance(value, Global):
        return brief_text(value.path)
    if isinstance(value, str):
        return repr(brief_text(value))
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (list, tuple, dict, set, frozenset, memoryview)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def brief_text(text: str, limit: int = 80) -> str:
    """Text with control characters escaped, cut at `limit`."""
    short = text if len(text) <= limit else text[:limit] + "..."
    return short.encode("unicode_escape").decode("ascii")


def is_key(value: Any) -> bool:
    """Keys of cheap and unforgeable hash: no tuples (their hash may take forever), no integers that collide on purpose."""
    return value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < 1 << 60)


def decode(utf8: bytes) -> str:
    """UTF-8 (lone surrogates, which pickle could write, are not admitted). Raises: Refusal."""
    try:
        return utf8.decode("utf-8")
    except UnicodeDecodeError:
        raise Refusal("a text that is not UTF-8") from None


def members(items: list) -> list:
    """Items that may enter a set. Raises: Refusal."""
    for item in items:
        if not is_key(item):
            raise Refusal(f"a set member that is {brief(item)}")
    return items
