"""Interpreter of pickle opcodes, protocols 2 to 5. It produces plain data and inert records.

It imports nothing and calls nothing that a file names. `Rules` define the meaning of names, calls and states;
anything that they do not accept ends the reading. The work is limited by a `Budget` of opcodes and of decoded
bytes, which the stream and the tensor streams inside it share.
"""

import dataclasses
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

MAX_OPCODES = 1_000_000  # a published snapshot has about 40,000
MAX_INTEGER_BYTES = 16  # torch's magic number has 10
MAX_NAME = 200  # characters of a module or class name
# Longer texts are not decoded: only source code and bytes of protocol 2 are that long.
LONG_TEXT = 1 << 16
MAX_TEXT = 1 << 27  # bytes; of one long text (such as a tensor of protocol 2), and of all short ones together


class RejectedError(ValueError):
    """The reason why a stream is rejected, as the middle of a sentence: 'the global os.system', 'the end
    of the file'.
    """


@dataclasses.dataclass
class Budget:
    """The work that is still allowed for one file."""

    # Bytes that texts may be decoded into; initially the size of the file. A text that is referred to several
    # times counts each time.
    decoded: int
    opcodes: int = MAX_OPCODES  # opcodes, or other work of the same order
    texts: int = MAX_TEXT  # bytes of short texts

    def spend(self, *, opcodes: int = 0, decoded: int = 0, texts: int = 0) -> None:
        """Subtract from the budget. Raises: RejectedError if it is exhausted."""
        self.opcodes = self.opcodes - opcodes
        self.decoded = self.decoded - decoded
        self.texts = self.texts - texts
        if self.opcodes < 0:
            raise RejectedError(f"more than {MAX_OPCODES} opcodes")
        if self.decoded < 0:
            raise RejectedError("more decoded bytes than the file holds")
        if self.texts < 0:
            raise RejectedError(f"more than {MAX_TEXT} bytes of text")


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that the stream refers to. It is never looked up."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Return module.name."""
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class LongText:
    """A text of more than LONG_TEXT bytes, as undecoded UTF-8."""

    utf8: memoryview


def describe(value: Any) -> str:
    """Describe a value in a few printable characters on one line, even if it is very large or nested."""
    if isinstance(value, Global):
        return shorten(value.path)
    if isinstance(value, str):
        return repr(shorten(value))
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    # Only the number of members; they may be nested without end.
    if isinstance(value, (list, tuple, dict, set, frozenset, memoryview)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def shorten(text: str, limit: int = 80) -> str:
    """Escape control characters in a text, and truncate it to `limit` characters."""
    # Truncated first, so that a text of gigabytes is not escaped.
    short = text if len(text) <= limit else text[:limit] + "..."
    return short.encode("unicode_escape").decode("ascii")


def is_key(value: Any) -> bool:
    """Return True for a value that may be a key of a dictionary or a member of a set.

    Its hash must be cheap and must not be chosen by an attacker. Tuples are excluded, because hashing nested
    ones can take exponential time, and so are large integers, which can be made to collide.
    """
    return value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < 1 << 60)


def decode(utf8: bytes) -> str:
    """Decode UTF-8. Lone surrogates, which pickle can write, are rejected. Raises: RejectedError."""
    try:
        return utf8.decode("utf-8")
    except UnicodeDecodeError:
        raise RejectedError("a text that is not UTF-8") from None


def members(items: list) -> list:
    """Return items that may be members of a set. Raises: RejectedError for others."""
    for item in items:
        if not is_key(item):
            raise RejectedError(f"a set member that is {describe(item)}")
    return items


def fill(target: dict, *, items: list) -> dict:
    """Add alternating keys and values to `target` and return it. Raises: RejectedError."""
    if len(items) % 2:
        raise RejectedError("a key without its value")
    # Later keys replace earlier ones, as in pickle.
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not is_key(key):
            raise RejectedError(f"a dictionary key that is {describe(key)}")
        target[key] = value
    return target


class Rules:
    """The meaning of a stream's records. Each method raises RejectedError for anything that it does not
    accept.

    This base class accepts nothing.

    Args: budget: shared by all streams of a file; asked: counts the names that the streams refer to.
    """

    inside = ""  # addition to messages that says where

    def __init__(self, budget: Budget, asked: Counter):
        self.budget = budget
        self.asked = asked

    def find(self, name: Global) -> Global:
        """Return the name if it is accepted."""
        raise RejectedError(f"the global {describe(name)}{self.inside}")

    def reduce(self, function: Any, args: tuple) -> Any:
        """Return the record of a function call."""
        raise RejectedError(f"a call of {describe(function)}{self.inside}")

    def new(self, cls: Any, args: tuple) -> Any:
        """Return the record of an object without state."""
        raise RejectedError(f"an object of {describe(cls)}{self.inside}")

    def build(self, record: Any, state: Any) -> None:
        """Set the state of a record."""
        raise RejectedError(f"a state for {describe(record)}{self.inside}")

    def persistent(self, pid: Any) -> Any:
        """Return the record of an object that is stored outside of the stream."""
        raise RejectedError(f"a persistent id ({describe(pid)})")


class Machine:
    """One run of the interpreter over one stream.

    Args: data: the bytes; start: position of the stream's first byte; rules: see `Rules`.
    """

    def __init__(self, data: memoryview, start: int, rules: Rules):
        self.data = data
        self.position = start
        self.rules = rules
        self.stack: list = []
        self.below: list[list] = []  # stacks below the open marks
        self.memo: dict[int, Any] = {}
        self.protocol = 0

    def run(self) -> Any:
        """Return the value of the stream. `position` is then the byte after it. Raises: RejectedError."""
        # PROTO, the first opcode from protocol 2 on
        if self.u1() != 0x80:
            raise RejectedError("a stream that does not begin like a pickle of protocol 2 or later")
        self.protocol = self.u1()
        if not 2 <= self.protocol <= 5:
            raise RejectedError(f"pickle protocol {self.protocol}")
        while True:
            self.rules.budget.spend(opcodes=1)
            code = self.u1()
            if code == 0x2E:  # STOP
                if len(self.stack) != 1 or self.below:
                    raise RejectedError("a stream that ends with values to spare")
                return self.pop()
            # The table is the complete list of accepted opcodes.
            operation = OPERATIONS.get(code)
            if operation is None:
                raise RejectedError(f"opcode 0x{code:02x}, which network pickles do not use")
            operation(self)

    # Reading.

    def take(self, size: int) -> memoryview:
        """Return the next bytes without copying. Raises: RejectedError if the file is shorter than the
        stream claims.
        """
        remaining = len(self.data) - self.position
        if size > remaining:
            raise RejectedError(
                "the end of the file" if size <= 8 else f"a claim of {size} bytes where {remaining} are left"
            )
        self.position += size
        return self.data[self.position - size : self.position]

    def u1(self) -> int:
        """Read one byte."""
        return self.take(1)[0]

    def number(self, form: str) -> Any:
        """Read one number in a format of `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        """Read text up to a newline, at most MAX_NAME characters."""
        # At most the accepted length is read, even if no newline follows.
        window = bytes(self.data[self.position : self.position + MAX_NAME + 1])
        length = window.find(b"\n")
        if length < 0:
            raise RejectedError(f"a name of more than {MAX_NAME} characters or the end of the file")
        self.position += length + 1
        return decode(window[:length])

    def text(self, size: int) -> "str | LongText":
        """Read a text of `size` bytes."""
        if size > MAX_TEXT:
            raise RejectedError(f"a text of {size} bytes")
        view = self.take(size)
        # Source code of megabytes stays undecoded.
        if size > LONG_TEXT:
            return LongText(view)
        self.rules.budget.spend(texts=size)
        return decode(bytes(view))

    def integer(self, size: int) -> int:
        """Read an integer in little-endian two's complement."""
        if not 0 <= size <= MAX_INTEGER_BYTES:
            raise RejectedError(f"an integer of {size} bytes")
        return int.from_bytes(self.take(size), "little", signed=True)

    # Stack.

    def push(self, value: Any) -> None:
        """Push a value onto the stack."""
        self.stack.append(value)

    def top(self, kind: type | tuple = object) -> Any:
        """Return the topmost value. Raises: RejectedError unless it has the type `kind`."""
        if not self.stack:
            raise RejectedError("an opcode without its operands")
        if not isinstance(self.stack[-1], kind):
            raise RejectedError(f"an opcode for another operand than {describe(self.stack[-1])}")
        return self.stack[-1]

    def pop(self, kind: type | tuple = object) -> Any:
        """Remove the topmost value and return it."""
        value = self.top(kind)
        del self.stack[-1]
        return value

    def pop_to_mark(self) -> list:
        """Remove and return everything above the last mark."""
        if not self.below:
            raise RejectedError("an opcode without its mark")
        items = self.stack
        self.stack = self.below.pop()
        return items

    def mark(self) -> None:
        """Open a mark."""
        # Values below the mark are out of reach until it is closed, as in pickle.
        self.below.append(self.stack)
        self.stack = []

    # Containers.

    def tuple_of(self, count: int) -> None:
        """Replace the topmost `count` values by a tuple."""
        if len(self.stack) < count:
            raise RejectedError("an opcode without its operands")
        # In place of the values, as in pickle.
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def extend(self, items: list, kind: type) -> None:
        """Add items to the list or set on top of the stack."""
        # The type check keeps the stream from extending an arbitrary record.
        target = self.top(kind)
        target.extend(items) if kind is list else target.update(members(items))

    # Memo.

    def put(self, index: int) -> None:
        """Store the topmost value under an index of the memo."""
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        """Push a value of the memo."""
        if index not in self.memo:
            raise RejectedError(f"memo entry {index} before it is stored")
        self.push(self.memo[index])

    # Names, calls and states: the rules decide.

    def find(self, module: str, name: str) -> None:
        """Push a name if the rules accept it."""
        # STACK_GLOBAL takes the names from the stack, where texts may be long.
        if max(len(module), len(name)) > MAX_NAME:
            raise RejectedError(f"a name of more than {MAX_NAME} characters")
        requested = Global(module, name)
        # Counted before the rules decide, so that a rejected name is listed too.
        self.rules.asked[requested.path] += 1
        self.push(self.rules.find(requested))

    def frame(self) -> None:
        """Check the length of a frame (FRAME). The stream is already in memory, so frames need no
        buffering.
        """
        if (size := self.number("<Q")) > (remaining := len(self.data) - self.position):
            raise RejectedError(f"a frame of {size} bytes where {remaining} are left")


# Opcode -> operation; names as in pickletools. Arguments are evaluated in the order in which they are
# written, so the topmost value of the stack comes first.
OPERATIONS: dict[int, Callable[[Machine], object]] = {
    0x95: Machine.frame,  # FRAME
    0x28: Machine.mark,  # MARK
    0x32: lambda m: m.push(m.top()),  # DUP
    # POP; it also closes an empty mark
    0x30: lambda m: m.stack.pop() if m.stack else m.pop_to_mark(),
    0x31: lambda m: m.pop_to_mark(),  # POP_MARK
    0x4E: lambda m: m.push(None),  # NONE
    0x88: lambda m: m.push(True),  # NEWTRUE
    0x89: lambda m: m.push(False),  # NEWFALSE
    0x4A: lambda m: m.push(m.number("<i")),  # BININT
    0x4B: lambda m: m.push(m.u1()),  # BININT1
    0x4D: lambda m: m.push(m.number("<H")),  # BININT2
    0x8A: lambda m: m.push(m.integer(m.u1())),  # LONG1
    0x8B: lambda m: m.push(m.integer(m.number("<i"))),  # LONG4
    0x47: lambda m: m.push(m.number(">d")),  # BINFLOAT
    0x58: lambda m: m.push(m.text(m.number("<I"))),  # BINUNICODE
    0x8C: lambda m: m.push(m.text(m.u1())),  # SHORT_BINUNICODE
    0x8D: lambda m: m.push(m.text(m.number("<Q"))),  # BINUNICODE8
    0x42: lambda m: m.push(m.take(m.number("<I"))),  # BINBYTES
    0x43: lambda m: m.push(m.take(m.u1())),  # SHORT_BINBYTES
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),  # BINBYTES8
    0x96: lambda m: m.push(m.take(m.number("<Q"))),  # BYTEARRAY8
    0x29: lambda m: m.push(()),  # EMPTY_TUPLE
    0x74: lambda m: m.push(tuple(m.pop_to_mark())),  # TUPLE
    0x85: lambda m: m.tuple_of(1),  # TUPLE1
    0x86: lambda m: m.tuple_of(2),  # TUPLE2
    0x87: lambda m: m.tuple_of(3),  # TUPLE3
    0x5D: lambda m: m.push([]),  # EMPTY_LIST
    0x6C: lambda m: m.push(m.pop_to_mark()),  # LIST
    0x61: lambda m: m.extend([m.pop()], list),  # APPEND
    0x65: lambda m: m.extend(m.pop_to_mark(), list),  # APPENDS
    0x7D: lambda m: m.push({}),  # EMPTY_DICT
    0x64: lambda m: m.push(fill({}, items=m.pop_to_mark())),  # DICT
    0x73: lambda m: fill(items=[m.pop(), m.pop()][::-1], target=m.top(dict)),  # SETITEM
    0x75: lambda m: fill(items=m.pop_to_mark(), target=m.top(dict)),  # SETITEMS
    0x8F: lambda m: m.push(set()),  # EMPTY_SET
    0x90: lambda m: m.extend(m.pop_to_mark(), set),  # ADDITEMS
    0x91: lambda m: m.push(frozenset(members(m.pop_to_mark()))),  # FROZENSET
    0x71: lambda m: m.put(m.u1()),  # BINPUT
    0x72: lambda m: m.put(m.number("<I")),  # LONG_BINPUT
    0x94: lambda m: m.put(len(m.memo)),  # MEMOIZE
    0x68: lambda m: m.get(m.u1()),  # BINGET
    0x6A: lambda m: m.get(m.number("<I")),  # LONG_BINGET
    0x63: lambda m: m.find(m.line(), m.line()),  # GLOBAL
    0x93: lambda m: m.find(name=m.pop(str), module=m.pop(str)),  # STACK_GLOBAL
    0x52: lambda m: m.push(m.rules.reduce(args=m.pop(tuple), function=m.pop())),  # REDUCE
    0x81: lambda m: m.push(m.rules.new(args=m.pop(tuple), cls=m.pop())),  # NEWOBJ
    0x62: lambda m: m.rules.build(state=m.pop(), record=m.top()),  # BUILD
    0x51: lambda m: m.push(m.rules.persistent(m.pop())),  # BINPERSID
}
