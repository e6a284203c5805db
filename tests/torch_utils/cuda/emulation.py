"""Runs the CUDA kernels on the CPU: emulate/<op>.cpp compiled with a C++ compiler and AddressSanitizer, one
process per call.

A program reads its arguments from a file and writes its results to another (emulate/exchange.h). It ends with
a message when a kernel touches memory outside its buffers, or when threads of a block disagree about a
barrier (emulate/device.h).
"""

import functools
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils import build

HERE = Path(__file__).parent / "emulate"
FLAGS = (
    "-std=c++20",
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-Wall",
    "-Wno-unknown-pragmas",
)
COMPILER = next(
    (name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None
)
needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason="no C++ compiler on this machine: install Debian's package g++, or set CXX"
)


@functools.cache
def program(source: Path) -> Path:
    """The compiled form of an emulated op, from the cache of compiled ops when nothing that it includes has
    changed.
    """
    command = [COMPILER, *FLAGS, f"-I{build.SOURCES}", f"-I{HERE}", str(source)]
    # without the paths: another checkout with the same sources finds what this one compiled (10 to 20 s)
    digest = hashlib.sha256(repr((FLAGS, build._compiler_version(COMPILER))).encode())
    for path in [source, *sorted(HERE.glob("*.h")), *sorted(build.SOURCES.glob("*.cuh"))]:
        digest.update(path.read_bytes())
    target = build.cache_dir().parent / "emulated" / f"{source.stem}-{digest.hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        building = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(building)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        os.replace(building, target)
    return target


def pack(arguments: Sequence[int | float | torch.Tensor | None]) -> bytes:
    """Arguments as exchange.h reads them."""
    chunks = []
    for argument in arguments:
        if argument is None:
            data = b""
        elif isinstance(argument, torch.Tensor):
            data = argument.detach().contiguous().numpy().tobytes()
        else:
            data = struct.pack("<q" if isinstance(argument, int) else "<d", argument)
        chunks.append(struct.pack("<q", len(data)) + data)
    return b"".join(chunks)


def run(source: Path, folder: Path, arguments: Sequence, order: int = 0) -> subprocess.CompletedProcess:
    """One call; `order` 1 runs threads and blocks from the last to the first.
    The results lie in folder/out.
    """
    (folder / "in").write_bytes(pack(arguments))
    command = [str(program(source)), str(folder / "in"), str(folder / "out"), str(order)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def emulate(
    op: str,
    folder: Path,
    arguments: Sequence,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    order: int = 0,
) -> list[torch.Tensor]:
    """Results of an op's kernels on the emulated device, in the shapes that it should give."""
    done = run(HERE / f"{op}.cpp", folder, arguments, order)
    assert done.returncode == 0, done.stderr[-3000:]
    values = torch.from_numpy(np.fromfile(folder / "out", dtype=np.dtype(str(dtype).removeprefix("torch."))))
    assert values.numel() == sum(int(np.prod(shape)) for shape in shapes)
    return [
        part.reshape(tuple(shape))
        for part, shape in zip(values.split([int(np.prod(s)) for s in shapes]), shapes, strict=True)
    ]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest difference, relative to the largest expected value, below the tolerance; NaN nowhere."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs()
    assert bool((difference <= tolerance * expected.abs().max().clamp_min(1e-30)).all()), float(
        difference.max() / expected.abs().max()
    )
