"""Files that try to run something, to hang, or to fill the memory; run as a module it reads them all and
reports time and memory.

`python -m tests.generators.pickles.hostile MARKER` prints JSON: {name: [outcome, CPU seconds]}, and the peak
in MiB. A file that executes anything writes MARKER.
"""

import json
import pickle
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from eg3d_rlhf.generators import pickles
from eg3d_rlhf.generators.pickles.pickle_reader import MAX_OPCODES
from tests.generators.pickles import writer as w
from tests.generators.pickles.writer import (
    Built,
    Call,
    New,
    PersistentId,
    SnapshotWriter,
    dumps,
    ref,
    storage_bytes,
    tensor_of,
)

PROTO = b"\x80\x04"
RENDERER = ref("training.volumetric_rendering.renderer", "ImportanceRenderer")


def calls(marker: str) -> Iterator[tuple[str, bytes]]:
    """Calls of what no network needs, in protocols 2 and 4."""
    shell = f"touch {marker}"
    line = f"open({marker!r}, 'w').write('x')"
    getattr_ = ref("builtins", "getattr")
    chain = Call(getattr_, (Call(ref("builtins", "__import__"), ("os",)), "system"))
    attempts = {
        "os.system": Call(ref("os", "system"), (shell,)),
        "posix.system": Call(ref("posix", "system"), (shell,)),
        "eval": Call(ref("builtins", "eval"), (line,)),
        "exec": Call(ref("builtins", "exec"), (line,)),
        "python 2 names": Call(ref("__builtin__", "eval"), (line,)),
        "getattr chain": Call(chain, (shell,)),
        "getattr of an admitted name": Call(Call(getattr_, (w.FROM_BYTES, "__globals__")), ()),
        "dotted name": Call(ref("torch.storage", "_load_from_bytes.__globals__"), ()),
        "attrgetter": Call(ref("operator", "attrgetter"), ("system",)),
        "partial": Call(ref("functools", "partial"), (w.FROM_BYTES,)),
        "Popen": Call(ref("subprocess", "Popen"), (["touch", marker],)),
        "torch.load": Call(ref("torch", "load"), (marker,)),
        "pickle.loads": Call(ref("pickle", "loads"), (b"cos\nsystem\n",)),
        "hub": Call(ref("torch.hub", "load"), ("a/b", "c")),
        "a module as a name": Call(ref("training", "triplane"), ()),
        "empty name": Call(ref("", ""), ()),
        "a name of lines": Call(ref("os\nx", "sys\x1b[2Jtem"), ()),
        "new Popen": New(ref("subprocess", "Popen"), args=(["touch", marker],)),
        "new with arguments": New(RENDERER, args=(1,)),
        "a function as a class": New(w.TENSOR),
        "a class as a function": Call(RENDERER, ()),
        "a call of a text": Call("os.system", (shell,)),
    }
    for name, value in attempts.items():
        for protocol in (2, 4):
            if protocol == 4 or "lines" not in name:
                yield f"{name}, protocol {protocol}", dumps({"G_ema": value}, protocol)
    yield (
        "os.system before the network",
        PROTO + dumps(attempts["os.system"])[2:-1] + b"0" + dumps({"G_ema": None})[2:],
    )
    yield "protocol 0", f"cos\nsystem\n(V{shell}\ntR.".encode()
    yield "protocol 1", pickle.dumps({"G_ema": 1}, 1)
    for name, code in {
        "INST": b"ios\nsystem\n",
        "OBJ": b"o",
        "EXT1": b"\x82\x01",
        "NEWOBJ_EX": b"\x92",
        "NEXT_BUFFER": b"\x97",
    }.items():
        yield name, PROTO + b"((" + code + b"."


def streams(marker: str) -> Iterator[tuple[str, bytes]]:
    """Tensor streams inside."""
    evil = Call(ref("os", "system"), (f"touch {marker}",))
    body = bytes(16)
    key = "94017442461968"
    inner = {
        "a call in the id": storage_bytes(body, 4, pid=evil),
        "a call in the magic": storage_bytes(body, 4, magic=evil),
        "a call in the system": storage_bytes(body, 4, system=evil),
        "a storage that is os.system": storage_bytes(body, 4, ref("os", "system")),
        "a stream in a stream": storage_bytes(body, 4, pid=Call(w.FROM_BYTES, (storage_bytes(body, 4),))),
        "zip": b"PK\x03\x04" + bytes(100),
        "empty": b"",
        "another magic": storage_bytes(body, 4, magic=1),
        "big endian": storage_bytes(body, 4, system={"little_endian": False}),
        "build in the id": storage_bytes(body, 4, pid=Built({}, {})),
        "100 GB claimed twice": storage_bytes(body, 25_000_000_000),
        "100 GB claimed in front": storage_bytes(body, 25_000_000_000, claimed=4),
        "100 GB claimed after it": storage_bytes(body, 4, claimed=25_000_000_000),
        "less than nothing": storage_bytes(body, -4, claimed=-4),
        "more than int64": storage_bytes(body, 1 << 80, claimed=4),
        "cut": storage_bytes(body, 4)[:-5],
        "longer": storage_bytes(body + b"x", 4),
    }
    ids = {
        "view": ("storage", ref("torch", "FloatStorage"), key, "cpu", 4, ("v", 0, 2)),
        "module": ("module", 1, 2, 3, 4, 5),
        "text": "os.system",
        "boolean": ("storage", ref("torch", "FloatStorage"), key, "cpu", True, None),
        "nested": ((((),),),),
        "class": w.ORDERED,
        "float": ("storage", ref("torch", "FloatStorage"), key, "cpu", 4.0, None),
        "short": ("storage",),
    }
    inner.update(
        {f"id: {name}": storage_bytes(body, 4, pid=PersistentId(value)) for name, value in ids.items()}
    )
    for name, stream in inner.items():
        yield f"stream: {name}", dumps({"G_ema": tensor_of(stream, (4,), (1,))})
    for name, value in {"storage": ids["view"], "text": "os.system", "call": evil}.items():
        yield f"persistent id outside: {name}", dumps({"G_ema": PersistentId(value)})


def states(marker: str) -> Iterator[tuple[str, bytes]]:
    """BUILD on what takes no state."""
    code = f"open({marker!r}, 'w')"
    storage = Call(w.FROM_BYTES, (storage_bytes(bytes(16), 4),))
    dtype = Call(ref("numpy", "dtype"), ("f8", False, True))
    targets = {
        "dict": {},
        "list": [],
        "text": "x",
        "global": RENDERER,
        "storage": storage,
        "bytes": b"x",
        "number": 1,
        "tensor": tensor_of(storage_bytes(bytes(16), 4), (4,), (1,)),
        "ordered": Call(w.ORDERED, ()),
        "dtype": dtype,
        "none": None,
    }
    for name, target in targets.items():
        yield (
            f"state for {name}",
            dumps({"G_ema": Built(target, {"__setstate__": code, "__class__": code, "__dict__": {}})}),
        )
    yield "two states", dumps({"G_ema": Built(New(RENDERER, {"a": 1}), {"b": 1})})
    yield "a state of slots", dumps({"G_ema": New(RENDERER, (None, {"__class__": code}))})
    yield "a state with other keys", dumps({"G_ema": New(RENDERER, {1: 2})})
    yield (
        "a state that names methods",
        dumps({"G_ema": New(RENDERER, {"__reduce__": code, "__class__": code, "forward": code})}),
    )
    yield "a module inside an option", dumps({"G_ema": None, "training_set_kwargs": {"x": New(RENDERER, {})}})
    yield "a file of something else", dumps(["G_ema"])


def doubled(item: bytes, join: bytes, times: int) -> bytes:
    """A value that contains the last one twice, over and over: 2^times leaves in a few bytes."""
    return item + b"".join(b"\x94h" + bytes([i]) + join for i in range(times))


def bombs(marker: str, opcodes: int = MAX_OPCODES) -> Iterator[tuple[str, bytes]]:
    """Memory, recursion, hashing, lengths; the deepest of about so many opcodes."""
    del marker
    laughs = doubled(b"K\x01", b"\x86", 64)
    yield "a tuple bomb as a key", PROTO + b"}" + laughs + b"Ns."
    yield "a tuple bomb in a set", PROTO + b"\x8f(" + laughs + b"\x90."
    yield "a tuple bomb in a frozenset", PROTO + b"(" + laughs + b"\x91."
    yield "a tuple bomb as options", PROTO + b"}\x8c\x13training_set_kwargs" + laughs + b"s."
    yield "a tuple bomb as everything", PROTO + laughs + b"."
    yield "a tuple bomb as arguments", PROTO + b"ctorch._utils\n_rebuild_tensor_v2\n" + laughs + b"R."
    depth = opcodes // 2 - 10
    for name, code in {
        "lists": b"]",
        "tuples": b")",
        "marks": b"(",
        "sets": b"\x8f",
        "dictionaries": b"}",
    }.items():
        yield f"{2 * depth} {name}", PROTO + code * (2 * depth) + b"."
    yield "deep tuples", PROTO + b")" + b"\x85" * depth + b"."
    yield "deep lists", PROTO + b"]" * depth + b"a" * (depth - 1) + b"."
    yield "deep options", PROTO + b"}\x8c\x13training_set_kwargs" + b"]" * 9999 + b"a" * 9998 + b"s."
    yield "endless opcodes", PROTO + b"N0" * (3 * MAX_OPCODES) + b"."
    yield "memo from nowhere", PROTO + b"j\xff\xff\xff\xff."
    yield "memo far out", PROTO + b"Nr\xff\xff\xff\xff0" * 1000 + b"j\xff\xff\xff\xff."
    yield "many names", b"\x80\x02" + b"".join(f"c{i:0>99}\nx\n".encode() for i in range(10000)) + b"."
    for name, code in {"text": b"\x8d", "bytes": b"\x8e", "bytearray": b"\x96", "frame": b"\x95"}.items():
        for size in (1 << 37, (1 << 63) - 1, (1 << 64) - 1):
            yield f"{name} of {size}", PROTO + code + struct.pack("<Q", size) + b"x."
    yield "an integer of 255 bytes", PROTO + b"\x8a\xff" + b"\xff" * 255 + b"."
    yield "an integer of 1 GB", PROTO + b"\x8b" + struct.pack("<i", 1 << 30) + b"x" * 100 + b"."
    yield "an integer of less than 0 bytes", PROTO + b"\x8b" + struct.pack("<i", -5) + b"."
    colliding = ((k * (2**61 - 1)).to_bytes(10, "little") for k in range(1, 9999))  # all of hash 0
    yield "colliding keys", PROTO + b"}(" + b"".join(b"\x8a\x0a" + k + b"N" for k in colliding) + b"u."
    text = b"X" + struct.pack("<I", 4 << 20) + b"\xc3\xa9" * (2 << 20) + b"q\x00"
    again = b"c_codecs\nencode\nh\x00\x8c\x06latin1\x86R0"
    yield "one text, decoded again and again", PROTO + text + again * 9999 + b"."
    yield "texts that are not UTF-8", PROTO + b"\x8c\x02\xff\xfe."
    yield "bytes above 255", dumps({"G_ema": Call(ref("_codecs", "encode"), ("\u0400", "latin1"))})
    yield "another codec", dumps({"G_ema": Call(ref("_codecs", "encode"), ("x", "rot13"))})
    items = b"}(" + b"".join(b"\x8c\x06" + f"{i:06d}".encode() + b"N" for i in range(100_000)) + b"uq\x000"
    new = b"ctraining.triplane\nOSGDecoder\nq\x010"
    yield "one state for many modules", PROTO + items + new + b"h\x01)\x81h\x00b0" * 99_999 + b"."


def tensors(marker: str) -> Iterator[tuple[str, bytes]]:
    """Claims about tensors, and networks that are larger than their file."""
    del marker
    stream = storage_bytes(bytes(16), 4)
    huge = 5 * 10**5
    claims = {
        "100 GB": ((huge, 50_000), (50_000, 1)),
        "100 GB by stride 0": ((huge, 50_000), (0, 0)),
        "backwards": ((2,), (-1,)),
        "beyond the end": ((2, 2), (3, 1)),
        "without end": ((1 << 61, 1 << 61), (1, 1)),
        "boolean": ((True,), (1,)),
        "floats": ((4.0,), (1,)),
        "lists": ([4], [1]),
        "ranks": ((4,), (1, 1)),
        "64 axes": ((1,) * 64, (1,) * 64),
        "nothing at the far end": ((0, 1 << 70), (1, 1)),
    }
    for name, (shape, stride) in claims.items():
        yield f"tensor: {name}", dumps({"G_ema": tensor_of(stream, shape, stride)})
    yield "tensor: offset", dumps({"G_ema": tensor_of(stream, (1,), (1,), offset=4)})
    yield "tensor: offset below 0", dumps({"G_ema": tensor_of(stream, (1,), (1,), offset=-1)})
    yield "tensor on a text", dumps({"G_ema": Call(w.TENSOR, ("x", 0, (1,), (1,), False, {}))})
    nets = w.stock_networks()
    writer = SnapshotWriter()
    stated = {
        "a network of 100 GB": {"channel_base": 1 << 24, "channel_max": 1 << 16},
        "a billion layers": {"mapping_kwargs": {"num_layers": 10**9}},
        "a size of a text": {"z_dim": "512"},
        "a size of True": {"z_dim": True},
        "an image of 2^60": {"img_resolution": 1 << 60},
        "an unknown argument": {"hook": "os.system"},
        "an odd size": {"img_resolution": 100},
        "no channels": {"channel_base": 1},
        "65536 wide": {"w_dim": 65536},
    }
    for name, change in stated.items():
        yield name, dumps({"G_ema": writer.generator(nets.G_ema, {**nets.G_kwargs, **change})})
    for name, change in {
        "a module of another path": {"superresolution_module": "os.system"},
        "no module": {"superresolution_module": None},
        "a box of a text": {"box_warp": "1"},
        "samples": {"depth_resolution": 10**12},
        "nothing": {"sr_antialias": None},
    }.items():
        rendering = writer.easy({**w.RENDERING, **change})
        yield (
            f"rendering: {name}",
            dumps({"G_ema": writer.generator(nets.G_ema, nets.G_kwargs, rendering_kwargs=rendering)}),
        )
    for name, value in {"huge": 1 << 40, "text": "64", "zero": 0}.items():
        yield (
            f"nrr: {name}",
            dumps({"G_ema": writer.generator(nets.G_ema, nets.G_kwargs, neural_rendering_resolution=value)}),
        )
    shared = tensor_of(storage_bytes(bytes(1 << 20), 1 << 18), (1 << 18,), (1,))
    state = {"_parameters": {f"p{i}": shared for i in range(9999)}}
    G = writer.generator(nets.G_ema, nets.G_kwargs)
    G.args[0]["state"].update(state)
    yield "one storage as 10 GB of tensors", dumps({"G_ema": G})
    G = writer.generator(nets.G_ema, nets.G_kwargs)
    G.args[0]["state"]["_modules"]["renderer"].state.pop("plane_axes")
    yield "no plane axes", dumps({"G_ema": G})
    G = writer.generator(nets.G_ema, nets.G_kwargs)
    G.args[0]["state"]["_modules"]["renderer"].state["plane_axes"] = w.tensor(torch.zeros(3, 3, 3))
    yield "other plane axes", dumps({"G_ema": G})
    yield "D alone", dumps({"D": writer.discriminator(nets.D, nets.D_kwargs)})
    yield "modules of modules of modules", PROTO + nested_modules()


def nested_modules() -> bytes:
    """A module that is its own child, as G_ema."""
    new = b"ctraining.triplane\nOSGDecoder\n)\x81q\x00"
    return b"}\x8c\x05G_ema" + new + b"}\x8c\x08_modules}\x8c\x01ah\x00s\x8c\x01bh\x00ssbs."


def heads(marker: str) -> Iterator[tuple[str, bytes]]:
    """Full heads that state what their family does not know, or carry a call."""
    writer = SnapshotWriter()
    changes = {
        "panohead": {
            "depth 0": {"triplane_depth": 0},
            "huge size": {"triplane_size": 1 << 20},
            "odd size": {"triplane_size": 9},
            "activation": {"decoder_activation": "__import__('os')"},
            "flag": {"use_background": 2},
            "mode": {"render_mode": "Sphere"},
            "extent": {"triplane_extent": -1},
        },
        "spherehead": {
            "planes": {"triplane_depth": 2},
            "parsing": {"parsing_flag": True},
            "noise": {"superresolution_noise_mode": "x"},
        },
        "hyplanehead": {
            "mode": {"render_mode": "x" * 5000},
            "maps": {"multiplane_num": 2},
            "one flag": {"cir2squ_flag": False},
        },
    }
    for family, rows in changes.items():
        G, kwargs = w.head_generator(family)
        for name, change in rows.items():
            rendering = writer.easy({**kwargs["rendering_kwargs"], **change})
            yield (
                f"{family}: {name}",
                dumps({"G_ema": writer.generator(G, kwargs, rendering_kwargs=rendering)}),
            )
        lacking = {k: v for k, v in kwargs["rendering_kwargs"].items() if k != "triplane_size"}
        yield (
            f"{family}: no size",
            dumps({"G_ema": writer.generator(G, kwargs, rendering_kwargs=writer.easy(lacking))}),
        )
        yield (
            f"{family}: unknown argument",
            dumps({"G_ema": writer.generator(G, {**kwargs, "hook": "os.system"})}),
        )
        called = {**kwargs["rendering_kwargs"], "trans_reg": Call(ref("os", "system"), (f"touch {marker}",))}
        yield (
            f"{family}: a call among the options",
            dumps({"G_ema": writer.generator(G, kwargs, rendering_kwargs=called)}),
        )
        record = writer.generator(G, kwargs)
        record.args[0]["class_name"] = (
            "TriGridGenerator" if family == "hyplanehead" else "TriPlaneSingSphGenerator_flatten"
        )
        yield f"{family}: class of another family", dumps({"G_ema": record})
        record = writer.generator(G, kwargs)
        state = record.args[0]["state"]["_modules"]["decoder"].args[0]["state"]
        state["_modules"]["net"] = Call(ref("builtins", "eval"), (f"open({marker!r}, 'w')",))
        yield f"{family}: a call as a layer", dumps({"G_ema": record})


def misread(marker: str) -> Iterator[tuple[str, bytes]]:
    """Not such a file at all."""
    del marker
    yield from {
        "one byte": b"\x80",
        "text": b"hello\n" * 100,
        "zip": b"PK\x03\x04" + bytes(200),
        "stop": PROTO + b".",
        "mark": PROTO + b"(.",
        "nothing on the stack": PROTO + b"R.",
        "protocol 6": b"\x80\x06N.",
        "none": PROTO + b"N.",
        "pairs": PROTO + b"}(Nu.",
        "G that is a text": dumps({"G_ema": "x"}),
        "two values": PROTO + b"NN.",
        "append to a tuple": PROTO + b")Na.",
    }.items()


SOURCES: tuple[Callable[[str], Iterator[tuple[str, bytes]]], ...] = (
    calls,
    streams,
    states,
    bombs,
    tensors,
    misread,
    heads,
)


def attempt(data: bytes, who: str) -> str:
    """Read and build; return the error, or 'loaded'. Anything but ValueError is passed on."""
    try:
        pickles.rebuild(pickles.parse(memoryview(data), who))
    except ValueError as error:
        return str(error)
    return "loaded"


def main(marker: str, share: str = "1") -> None:
    """See the module; `share` of the opcodes that are allowed go into the deepest files."""
    outcomes = {}
    for source in SOURCES:
        more = (int(MAX_OPCODES * float(share)),) if source is bombs else ()
        for name, data in source(marker, *more):
            started = time.process_time()
            try:
                outcome = attempt(data, "FILE")
            except Exception as error:  # a bug: the test shows it
                outcome = f"{type(error).__name__}: {error}"
            outcomes[name] = [outcome, time.process_time() - started]
            del data
    # ru_maxrss would start from the peak of the process that started this one
    status = Path("/proc/self/status")
    if status.exists():
        peak = (
            next(
                int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")
            )
            / 1024
        )
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"outcomes": outcomes, "peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
