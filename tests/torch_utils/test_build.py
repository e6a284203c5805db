"""Building and loading the compiled ops: what happens when it works, fails, or is asked for twice at once."""

import errno
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.rejections import check_message
from tests.torch_utils.compilers import needs_cpp
from torch_utils import build

ROOT = Path(__file__).parents[2]

USE = """
import warnings, torch
from torch_utils import build
from torch_utils.ops.slab_density import slab_density
maps, w, b = [torch.ones(2, 3, 2, 1), torch.ones(2, 3, 1, 2)], torch.ones(3), torch.zeros(())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    values = [slab_density(maps, w, b, (2, 2, 2)) for _ in range(3)]
warned = len([c for c in caught if "slab_density" in str(c.message)])
print(warned, build.available("slab_density", "cpu"), round(float(values[0].sum()), 2))
print("".join(str(c.message) for c in caught))
"""


def python(code: str, cache: Path, **environment: str) -> subprocess.Popen:
    none = str(cache / "none")  # what this checkout's setup.py compiled stays out of sight
    env = {
        **os.environ,
        "EG3D_RLHF_CACHE": str(cache),
        "EG3D_RLHF_AHEAD": none,
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


@needs_cpp
@pytest.mark.long
def test_two_processes_build_one_library_once(tmp_path):
    both = [python(USE, tmp_path) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert all(out.startswith("0 True 51.05") for out in outputs), outputs
    (folder,) = (tmp_path / "ops").iterdir()
    assert sorted(
        p.name for p in folder.iterdir() if p.name.startswith("slab") or p.name.startswith("build")
    ) == [
        "build.log",
        "slab_density.so",
    ]
    library = folder / "slab_density.so"
    before = library.stat().st_mtime_ns
    assert python(USE, tmp_path).communicate()[0].startswith("0 True")
    assert library.stat().st_mtime_ns == before  # found, not built


@needs_cpp
@pytest.mark.long
def test_a_process_finds_what_setup_compiled_and_asks_for_no_compiler(tmp_path):
    ahead = str(tmp_path / "ahead")
    command = [sys.executable, "setup.py", "build_ops", "--only=slab_density"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "EG3D_RLHF_AHEAD": ahead}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "slab_density" in done.stdout, done.stderr
    out = python(USE, tmp_path, EG3D_RLHF_AHEAD=ahead, CXX="/no/compiler").communicate()[0]
    assert out.startswith("0 True 51.05"), out
    assert not (tmp_path / "ops").exists()


@needs_cpp
@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of the x86-64 instruction set")
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3"])
def test_the_ops_are_right_on_processors_with_shorter_vectors(level, tmp_path):
    compiler = tmp_path / "compiler"
    # the last one counts
    compiler.write_text(f'#!/bin/sh\nexec {build.compiler("cpu")} "$@" -march={level}\n')
    compiler.chmod(0o755)
    files = [path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not long and not gpu",
        *map(str, files),
    ]
    env = {**os.environ, "EG3D_RLHF_CACHE": str(tmp_path / "cache"), "CXX": str(compiler)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]
    assert list((tmp_path / "cache").glob("ops/*/volume_block_gradients.so")), "the ops were not built"


def test_a_failing_compiler_costs_one_warning_that_names_the_log_and_no_result(tmp_path):
    wrong = tmp_path / "failing-compiler"
    wrong.write_text(
        "#!/bin/sh\ncase $1 in --version) echo failing 1.0;; *) echo 'cc: rejected' >&2; exit 1;; esac\n"
    )
    wrong.chmod(0o755)
    out = python(USE, tmp_path / "a cache", CXX=str(wrong)).communicate()[0]
    assert out.startswith("1 False 51.05"), out
    (log,) = (tmp_path / "a cache" / "ops").glob("*/build.log")
    assert out.count(str(log)) == 1 and "cc: rejected" in log.read_text()
    assert "slab_density" in out


@pytest.mark.long
def test_a_missing_compiler_is_named_and_an_unwritable_cache_too(tmp_path):
    out = python(USE, tmp_path, CXX="no-such-compiler").communicate()[0]
    assert out.startswith("1 False 51.05") and "CXX=no-such-compiler" in out
    blocked = tmp_path / "file"
    blocked.write_text("")
    out = python(USE, blocked).communicate()[0]
    assert out.startswith("1 False 51.05") and "set EG3D_RLHF_CACHE" in out


@needs_cpp
@pytest.mark.parametrize("who", ["the compiler", "the log"])
def test_a_full_disk_costs_one_warning_for_all_ops_together(tmp_path, monkeypatch, who):
    monkeypatch.setenv("EG3D_RLHF_CACHE", str(tmp_path))
    monkeypatch.setenv("EG3D_RLHF_AHEAD", str(tmp_path / "none"))
    if who == "the compiler":
        full = tmp_path / "full-compiler"
        text = f"ld: final link failed: {os.strerror(errno.ENOSPC)}"
        full.write_text(
            f"#!/bin/sh\ncase $1 in --version) echo full 1.0;; *) echo '{text}' >&2; exit 1;; esac\n"
        )
        full.chmod(0o755)
        monkeypatch.setenv("CXX", str(full))
    else:
        for op in build.ops("cpu"):
            folder = build.recipe(op, "cpu").folder()
            folder.mkdir(parents=True)
            (folder / "build.log").symlink_to("/dev/full")
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not any(build.available(op, "cpu") for op in build.ops("cpu"))
    assert len(caught) == 1
    names = (str(tmp_path / "ops"), os.strerror(errno.ENOSPC), "EG3D_RLHF_CACHE")
    check_message(str(caught[0].message), names)
    assert not list(tmp_path.rglob("*.so"))


def test_switched_off_means_no_build_and_no_warning(tmp_path):
    out = python(USE, tmp_path, EG3D_RLHF_OPS="off").communicate()[0]
    assert out.startswith("0 False 51.05")
    assert not (tmp_path / "ops").exists()


def test_importing_compiles_nothing(tmp_path):
    code = """
import importlib, pkgutil
for package in ("torch_utils", "training", "eg3d_rlhf"):
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, package + "."):
        importlib.import_module(module.name)
print("done")
"""
    out = python(code, tmp_path, CXX="/no/compiler", NVCC="/no/compiler").communicate()[0]
    assert out.strip().endswith("done"), out
    assert not (tmp_path / "ops").exists()


@needs_cpp
def test_the_folder_changes_with_source_compiler_and_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("EG3D_RLHF_CACHE", str(tmp_path))
    names = {build.recipe("slab_density", "cpu").folder().name}
    with monkeypatch.context() as patch:
        patch.setattr(build, "_compiler_version", lambda compiler: "another")
        names.add(build.recipe("slab_density", "cpu").folder().name)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99")
        names.add(build.recipe("slab_density", "cpu").folder().name)
    monkeypatch.setattr(build, "SOURCES", shutil.copytree(build.SOURCES, tmp_path / "sources"))
    assert build.recipe("slab_density", "cpu").folder().name in names  # wherever the checkout lies
    for text in ("// one", "// two"):
        (tmp_path / "sources" / "slab_density.cpp").write_text(text)
        names.add(build.recipe("slab_density", "cpu").folder().name)
    assert len(names) == 5


def test_a_wheel_holds_every_file_that_is_compiled_or_included(monkeypatch):
    setuptools = pytest.importorskip(
        "setuptools", reason="setuptools is not installed: pip install setuptools"
    )
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution()
    distribution.parse_config_files()
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    command.manifest_files = {}  # nothing but what the tables of pyproject.toml say
    packed = {Path(file).name for file in command.find_data_files("torch_utils.ops", "torch_utils/ops")}
    wanted = {
        build.SOURCES / (op + suffix) for device, suffix in build.SUFFIX.items() for op in build.ops(device)
    }
    reached: set[Path] = set()
    while wanted - reached:
        path = (wanted - reached).pop()
        reached.add(path)
        included = [
            path.parent / name for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
        ]
        # the emulated device's header is the tests'
        wanted |= {other for other in included if other.exists()}
    assert {path.suffix for path in reached} == {".cpp", ".cu", ".h", ".cuh"}
    assert {path.name for path in reached} - packed == set()
    assert "torch_utils.ops" in command.packages and "tests" not in command.packages
