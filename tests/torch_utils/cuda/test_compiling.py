"""Every CUDA source compiles without a GPU, loads into the installed torch, and holds code for the devices
that it is meant for.
"""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from tests.torch_utils.compilers import needs_nvcc, require
from torch_utils import build

KERNELS = {
    "slab_density": ["slab_density", "slab_density_backward"],
    "triplane_decode": ["triplane_decode", "triplane_decode_backward"],
    "bias_act": ["bias_act", "bias_act_backward", "bias_act_slope"],
    "upfirdn2d": ["upfirdn2d"],
    "ray_march": ["ray_march", "ray_march_backward", "importance_depths"],
}
FATBIN = 0xBA55ED50
PTX = 1
ELF = 2


def embedded(library: Path) -> set[tuple[int, int]]:
    """(kind, architecture) of the device code in a library, from the headers of its fat binaries.

    A fat binary is a header (magic, version, header size as u32, u16, u16; size as u64) and entries
    (kind u16, version u16, header size u32, payload size u64, ..., architecture u32 at 28).
    """
    data = library.read_bytes()
    entries = set()
    start = 0
    while (start := data.find(struct.pack("<I", FATBIN), start)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, start)
        at = start + header
        end = start + header + size
        while at < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, at)
            entries.add((kind, struct.unpack_from("<I", data, at + 28)[0]))
            at += entry_header + payload
        start = end
    return entries


def check_library(op: str) -> None:
    """Build, load, and look inside."""
    library = build.build(op, "cuda")
    __import__(f"torch_utils.ops.{op}")  # defines the schemas
    torch.ops.load_library(str(library))
    for name in KERNELS[op]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"eg3d_rlhf::{name}", "CUDA"), name
    assert embedded(library) >= {(ELF, 80), (ELF, 90), (PTX, 90)}
    if tool := shutil.which("cuobjdump"):
        listed = subprocess.run(
            [tool, "--list-elf", "--list-ptx", str(library)], capture_output=True, text=True
        ).stdout
        assert "sm_80" in listed and "sm_90" in listed and "ptx" in listed
    assert "warning" not in (library.parent / "build.log").read_text()
    # The loader unites unique symbols (type u) of all libraries. A guard united without its variable made
    # the second CUDA op of a process call a null pointer.
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert not [line for line in symbols.splitlines() if " u " in line and "eg3d" in line]


def test_every_source_is_in_the_table():
    assert set(build.ops("cuda")) == set(KERNELS)


@needs_nvcc
def test_one_source():
    check_library("ray_march")


@needs_nvcc
@pytest.mark.long
@pytest.mark.parametrize("op", sorted(KERNELS))
def test_all_sources(op):
    check_library(op)


@pytest.mark.parametrize("device_type", list(build.SUFFIX))
def test_a_build_that_fails_is_no_reason_to_skip_and_a_missing_compiler_is(
    device_type, tmp_path, monkeypatch
):
    monkeypatch.setenv("EG3D_RLHF_CACHE", str(tmp_path))
    variable = build.COMPILERS[device_type][0]
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(pytest.skip.Exception, match=f"{variable}=no-such-compiler"):
        require(device_type)
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv(variable, str(failing))
    with pytest.raises(pytest.fail.Exception, match=f"{tmp_path}.*build.log"):
        require(device_type)
