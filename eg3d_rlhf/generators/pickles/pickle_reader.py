"""The pickle machine: opcodes of protocols 2 to 5 to plain data and inert records. It imports nothing and
calls nothing that a file names.

What a name, a call or a state means is up to the `Rules`; whatever they do not admit ends the reading. Work
is bounded by a `Budget` that the stream and the tensor streams inside it share: opcodes, and bytes that are
decoded.
"""

import dataclasses
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

MAX_OPCODES = 1_000_000  # a published snapshot has about 40,000
MAX_INTEGER_BYTES = 16  # torch's magic number has 10
MAX_NAME = 200  # characters of a module or class name
# longer texts stay undecoded: nothing but source code and protocol 2's bytes are that long
LONG_TEXT = 1 << 16
MAX_TEXT = 1 << 27  # bytes, of one long text (a tensor of protocol 2 is one) and of all short ones together


class Refusal(ValueError):
    """Why a stream is not read, as the middle of a sentence:
    'the global os.system', 'the end of the file'.
    """


@dataclasses.dataclass
class Budget:
    """What may still be spent on one file."""

    # bytes that texts may become; the file's size. One text named over and over spends them, too
    decoded: int
    opcodes: int = MAX_OPCODES  # or as much work as so many
    texts: int = MAX_TEXT  # bytes of short texts

    def spend(self, *, opcodes: int = 0, decoded: int = 0, texts: int = 0) -> None:
        """Take from what is left. Raises: Refusal where none is."""
        self.opcodes = self.opcodes - opcodes
        self.decoded = self.decoded - decoded
        self.texts = self.texts - texts
        if self.opcodes < 0:
            raise Refusal(f"more than {MAX_OPCODES} opcodes")
        if self.decoded < 0:
            raise Refusal("more decoded bytes than the file holds")
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
    """Keys of cheap and unforgeable hash: no tuples (their hash may take forever), no integers that collide
    on purpose.
    """
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


def fill(target: dict, *, items: list) -> dict:
    """`target` with keys and values in turn. Raises: Refusal."""
    if len(items) % 2:
        raise Refusal("a key without its value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not is_key(key):
            raise Refusal(f"a dictionary key that is {brief(key)}")
        target[key] = value
    return target


class Rules:
    """What the records of a stream mean. Every method raises Refusal for what it does not admit; these admit
    nothing.

    Args: budget: shared by all streams of a file; asked: counts the names asked for.
    """

    inside = ""  # where, in messages

    def __init__(self, budget: Budget, asked: Counter):
        self.budget = budget
        self.asked = asked

    def find(self, name: Global) -> Global:
        """A name, if admitted."""
        raise Refusal(f"the global {brief(name)}{self.inside}")

    def reduce(self, function: Any, args: tuple) -> Any:
        """The record of a call."""
        raise Refusal(f"a call of {brief(function)}{self.inside}")

    def new(self, cls: Any, args: tuple) -> Any:
        """The record of an object without state."""
        raise Refusal(f"an object of {brief(cls)}{self.inside}")

    def build(self, record: Any, state: Any) -> None:
        """Give a record its state."""
        raise Refusal(f"a state for {brief(record)}{self.inside}")

    def persistent(self, pid: Any) -> Any:
        """The record of an object that is stored elsewhere."""
        raise Refusal(f"a persistent id ({brief(pid)})")


class Machine:
    """One run over one stream.

    Args:
        data: the stream; start: its first byte; rules: see `Rules`.
    """

    def __init__(self, data: memoryview, start: int, rules: Rules):
        self.data = data
        self.position = start
        self.rules = rules
        self.stack: list = []
        self.below: list[list] = []  # stacks under the open marks
        self.memo: dict[int, Any] = {}
        self.protocol = 0

    def run(self) -> Any:
        """The value of the stream; `position` is then the byte after it. Raises: Refusal."""
        if self.u1() != 0x80:
            raise Refusal("a stream that does not begin like a pickle of protocol 2 or later")
        self.protocol = self.u1()
        if not 2 <= self.protocol <= 5:
            raise Refusal(f"pickle protocol {self.protocol}")
        while True:
            self.rules.budget.spend(opcodes=1)
            code = self.u1()
            if code == 0x2E:  # STOP
                if len(self.stack) != 1 or self.below:
                    raise Refusal("a stream that ends with values to spare")
                return self.pop()
            operation = OPERATIONS.get(code)
            if operation is None:
                raise Refusal(f"opcode 0x{code:02x}, which network pickles do not use")
            operation(self)

    # Reading.

    def take(self, size: int) -> memoryview:
        """The next bytes, uncopied. Raises: Refusal where the file is shorter than claimed."""
        left = len(self.data) - self.position
        if size > left:
            raise Refusal(
                "the end of the file" if size <= 8 else f"a claim of {size} bytes where {left} are left"
            )
        self.position += size
        return self.data[self.position - size : self.position]

    def u1(self) -> int:
        """One byte."""
        return self.take(1)[0]

    def number(self, form: str) -> Any:
        """One number of struct's format."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        """Text up to a newline, at most MAX_NAME characters."""
        window = bytes(self.data[self.position : self.position + MAX_NAME + 1])
        length = window.find(b"\n")
        if length < 0:
            raise Refusal(f"a name of more than {MAX_NAME} characters or the end of the file")
        self.position += length + 1
        return decode(window[:length])

    def text(self, size: int) -> "str | LongText":
        """A text of so many bytes."""
        if size > MAX_TEXT:
            raise Refusal(f"a text of {size} bytes")
        view = self.take(size)
        if size > LONG_TEXT:
            return LongText(view)
        self.rules.budget.spend(texts=size)
        return decode(bytes(view))

    def integer(self, size: int) -> int:
        """Little-endian two's complement."""
        if not 0 <= size <= MAX_INTEGER_BYTES:
            raise Refusal(f"an integer of {size} bytes")
        return int.from_bytes(self.take(size), "little", signed=True)

    # Stack.

    def push(self, value: Any) -> None:
        """Onto the stack."""
        self.stack.append(value)

    def top(self, kind: type | tuple = object) -> Any:
        """The topmost value, which must be of a kind."""
        if not self.stack:
            raise Refusal("an opcode without its operands")
        if not isinstance(self.stack[-1], kind):
            raise Refusal(f"an opcode for another operand than {brief(self.stack[-1])}")
        return self.stack[-1]

    def pop(self, kind: type | tuple = object) -> Any:
        """Off the stack."""
        value = self.top(kind)
        del self.stack[-1]
        return value

    def pop_to_mark(self) -> list:
        """Everything above the last mark."""
        if not self.below:
            raise Refusal("an opcode without its mark")
        items = self.stack
        self.stack = self.below.pop()
        return items

    def mark(self) -> None:
        """Open a mark."""
        self.below.append(self.stack)
        self.stack = []

    # Containers.

    def tuple_of(self, count: int) -> None:
        """The topmost values as a tuple."""
        if len(self.stack) < count:
            raise Refusal("an opcode without its operands")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def extend(self, items: list, kind: type) -> None:
        """Items into the list or the set on top."""
        target = self.top(kind)
        target.extend(items) if kind is list else target.update(members(items))

    # Memo.

    def put(self, index: int) -> None:
        """Remember the topmost value."""
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        """A remembered value."""
        if index not in self.memo:
            raise Refusal(f"memo entry {index} before it is stored")
        self.push(self.memo[index])

    # Names, calls, states: the rules decide.

    def find(self, module: str, name: str) -> None:
        """A name, if the rules admit it."""
        if max(len(module), len(name)) > MAX_NAME:
            raise Refusal(f"a name of more than {MAX_NAME} characters")
        wanted = Global(module, name)
        self.rules.asked[wanted.path] += 1
        self.push(self.rules.find(wanted))

    def frame(self) -> None:
        """FRAME: the stream is in memory already; only its claim is checked."""
        if (size := self.number("<Q")) > (left := len(self.data) - self.position):
            raise Refusal(f"a frame of {size} bytes where {left} are left")


# arguments are evaluated as written: the topmost value first
OPERATIONS: dict[int, Callable[[Machine], object]] = {
    0x95: Machine.frame,
    0x28: Machine.mark,
    0x32: lambda m: m.push(m.top()),
    # POP also closes an empty mark
    0x30: lambda m: m.stack.pop() if m.stack else m.pop_to_mark(),
    0x31: lambda m: m.pop_to_mark(),
    0x4E: lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    0x4A: lambda m: m.push(m.number("<i")),
    0x4B: lambda m: m.push(m.u1()),
    0x4D: lambda m: m.push(m.number("<H")),
    0x8A: lambda m: m.push(m.integer(m.u1())),
    0x8B: lambda m: m.push(m.integer(m.number("<i"))),
    0x47: lambda m: m.push(m.number(">d")),
    0x58: lambda m: m.push(m.text(m.number("<I"))),
    0x8C: lambda m: m.push(m.text(m.u1())),
    0x8D: lambda m: m.push(m.text(m.number("<Q"))),
    0x42: lambda m: m.push(m.take(m.number("<I"))),
    0x43: lambda m: m.push(m.take(m.u1())),
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),
    0x96: lambda m: m.push(m.take(m.number("<Q"))),  # BYTEARRAY8
    0x29: lambda m: m.push(()),
    0x74: lambda m: m.push(tuple(m.pop_to_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    0x5D: lambda m: m.push([]),
    0x6C: lambda m: m.push(m.pop_to_mark()),
    0x61: lambda m: m.extend([m.pop()], list),
    0x65: lambda m: m.extend(m.pop_to_mark(), list),
    0x7D: lambda m: m.push({}),
    0x64: lambda m: m.push(fill({}, items=m.pop_to_mark())),
    0x73: lambda m: fill(items=[m.pop(), m.pop()][::-1], target=m.top(dict)),
    0x75: lambda m: fill(items=m.pop_to_mark(), target=m.top(dict)),
    0x8F: lambda m: m.push(set()),
    0x90: lambda m: m.extend(m.pop_to_mark(), set),
    0x91: lambda m: m.push(frozenset(members(m.pop_to_mark()))),
    0x71: lambda m: m.put(m.u1()),
    0x72: lambda m: m.put(m.number("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    0x68: lambda m: m.get(m.u1()),
    0x6A: lambda m: m.get(m.number("<I")),
    0x63: lambda m: m.find(m.line(), m.line()),
    0x93: lambda m: m.find(name=m.pop(str), module=m.pop(str)),
    0x52: lambda m: m.push(m.rules.reduce(args=m.pop(tuple), function=m.pop())),
    0x81: lambda m: m.push(m.rules.new(args=m.pop(tuple), cls=m.pop())),
    0x62: lambda m: m.rules.build(state=m.pop(), record=m.top()),
    0x51: lambda m: m.push(m.rules.persistent(m.pop())),  # BINPERSID
}
