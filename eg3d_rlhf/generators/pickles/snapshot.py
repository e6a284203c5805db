"""A snapshot of EG3D as records: what it holds, what it asked for, and the tensors of its modules by state-dict name."""

import contextlib
import dataclasses
import math
import mmap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eg3d_rlhf.generators.pickles.machine import Budget, LongText, Machine, Refusal, brief, brief_text
from eg3d_rlhf.generators.pickles.records import ModuleRecord, SnapshotRules, SurveyRules, TensorRecord

MAX_DEPTH = 24  # modules in modules, lists in lists
MAX_NODES = 20_000  # modules and tensors of one network, or values of one option
MAX_KEY, MAX_OPTION = 200, 4096  # characters of a name, of an option
NETWORKS = ("G", "D", "G_ema")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a file holds."""

    who: str  # the file, for messages
    size: int  # bytes
    protocol: int
    networks: dict[str, ModuleRecord]  # of G, D, G_ema those that are there
    augment_pipe: ModuleRecord | None
    training_set: dict[str, Any]  # training_set_kwargs
    asked: dict[str, int]  # global -> how often


def read(path: str | Path) -> Snapshot:
    """Read a snapshot without running anything in it. The file is mapped into memory, tensors stay where they are.

    Raises: FileNotFoundError, ValueError (one line, whatever the file holds).
    """
    return parse(_mapped(path), str(path))


def parse(data: memoryview, who: str) -> Snapshot:
    """As `read`, of bytes."""
    asked: Counter = Counter()
    machine = Machine(data, 0, SnapshotRules(Budget(decoded=len(data)), asked))
    with refusing(who, machine):
        root = machine.run()
        if isinstance(root, ModuleRecord):  # a generator by itself
            root = {"G_ema": root}
        if not isinstance(root, dict):
            raise Refusal(f"{brief(root)} instead of a dictionary")
        found = {name: _module(root[name], name) for name in (*NETWORKS, "augment_pipe") if root.get(name) is not None}
        augment = found.pop("augment_pipe", None)
        training_set = plain(root.get("training_set_kwargs") or {})
        if not isinstance(training_set, dict):
            raise Refusal("training_set_kwargs that are not a dictionary")
        return Snapshot(who, len(data), machine.protocol, found, augment, training_set, dict(asked))


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a file asks for, whether or not it can be read."""

    protocol: int
    asked: dict[str, int]  # global -> how often
    stopped: str | None  # why the listing ended early


def survey(source: str | Path | memoryview) -> Survey:
    """List every global of a pickle, a path or bytes, admitted or not, without looking any up.

    Raises: FileNotFoundError, ValueError for an empty file.
    """
    data = source if isinstance(source, memoryview) else _mapped(source)
    asked: Counter = Counter()
    machine = Machine(data, 0, SurveyRules(Budget(decoded=len(data)), asked))
    stopped = None
    try:
        machine.run()
    except Refusal as refusal:
        stopped = f"{refusal} (byte {machine.position})"
    return Survey(machine.protocol, dict(asked), stopped)


@contextlib.contextmanager
def refusing(who: str, machine: Machine | None = None) -> Iterator[None]:
    """Turn a Refusal into the user's line: file, what was found and where."""
    try:
        yield
    except Refusal as refusal:
        where = f" (byte {machine.position})" if machine is not None else ""
        raise ValueError(
            f"{who}: expected a network pickle of EG3D, got {refusal}{where}. "
            "Nothing in it was run; get the file again from its source, or name another."
        ) from None


def _mapped(path: str | Path) -> memoryview:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a network pickle, got nothing there. Check the path.")
    with open(path, "rb") as file:
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: expected a network pickle, got an empty file. Get it again from its source.")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _module(value: Any, name: str) -> ModuleRecord:
    if not isinstance(value, ModuleRecord) or value.state is None:
        raise Refusal(f"{brief(value)} as {name}")
    return value


def plain(value: Any) -> Any:
    """Options as JSON knows them: tuples and sets become lists.

    Raises: Refusal for records among them, for more than MAX_NODES values or MAX_DEPTH levels.
    """
    count = 0

    def convert(value: Any, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise Refusal(f"options of more than {MAX_NODES} values or {MAX_DEPTH} levels")
        if value is None or isinstance(value, (bool, int)) or (isinstance(value, str) and len(value) <= MAX_OPTION):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        if isinstance(value, (list, tuple)):
            return [convert(v, depth + 1) for v in value]
        if isinstance(value, (set, frozenset)):
            return sorted((convert(v, depth + 1) for v in value), key=str)
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            return {k: convert(v, depth + 1) for k, v in value.items()}
        if isinstance(value, TensorRecord) and 0 < value.nbytes <= 1 << 12:
            return convert(value.tensor().tolist(), depth + 1)
        raise Refusal(f"an option that is {'a long text' if isinstance(value, (str, LongText)) else brief(value)}")

    return convert(value, 0)


def tensors(module: ModuleRecord, name: str) -> dict[str, TensorRecord]:
    """State-dict name -> tensor, of a module and those in it, in the order of torch's state_dict.

    Raises: Refusal for what is no module, and for more than MAX_NODES of them, as where modules contain themselves.
    """
    found: dict[str, TensorRecord] = {}
    count = 0

    def collect(record: Any, prefix: str, depth: int) -> None:
        nonlocal count
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise Refusal(f"more than {MAX_NODES} modules or {MAX_DEPTH} levels of them in {name}")
        state = _module(record, brief_text(prefix.removesuffix(".")) or name).state
        hidden = state.get("_non_persistent_buffers_set", set())
        if not isinstance(hidden, (set, frozenset)):
            raise Refusal(f"{brief(hidden)} as names of buffers")
        for part in ("_parameters", "_buffers", "_modules"):
            children = state.get(part, {})
            few = isinstance(children, dict) and len(children) <= MAX_NODES
            if not few or not all(isinstance(k, str) and len(k) <= MAX_KEY for k in children):
                raise Refusal(f"{part} that are not a dictionary of names")
            count += len(children)
            for key, value in children.items():
                if value is None or (part == "_buffers" and key in hidden):
                    continue
                if part == "_modules":
                    collect(value, f"{prefix}{key}.", depth + 1)
                elif not isinstance(value, TensorRecord):
                    raise Refusal(f"{brief(value)} as the tensor {brief_text(prefix + key)}")
                else:
                    found[prefix + key] = value

    collect(module, "", 0)
    return found
