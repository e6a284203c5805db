"""Compile the C++ and CUDA sources of the ops once, and load the libraries.

    python -m torch_utils.build          compile everything that this machine can compile, into the cache
    python setup.py build_ops            the same with torch.utils.cpp_extension and ninja; afterwards no
    compiler is
                                         needed

Ops are compiled on first use into $EG3D_RLHF_CACHE/ops (default ~/.cache/eg3d-rlhf/ops). There is one library
per op and device, in a folder whose name is a hash of the sources, the flags, the compiler, the processor and
torch's version. A lock prevents two processes from building the same library at once. If a build fails or is
impossible, one warning names the log, and the op runs in plain torch.

$EG3D_RLHF_OPS=off turns compiled ops off. $CXX and $NVCC select other compilers. $EG3D_RLHF_AHEAD is the
folder for libraries that setup.py compiles, by default torch_utils/ops/ahead.

The sources torch_utils/ops/<op>.cpp and <op>.cu use torch's stable ABI (torch/csrc/stable). They need neither
the libraries of the CUDA toolkit nor Python's headers, and a CUDA library can be built on a machine without a
GPU.
"""

import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

SOURCES = Path(__file__).parent / "ops"
SUFFIX = {"cpu": ".cpp", "cuda": ".cu"}  # of the source, by device type
# By device type: environment variable that selects a compiler,
# names that are searched on the path, and description.
COMPILERS = {
    "cpu": ("CXX", ("g++", "c++", "clang++"), "a C++ compiler (Debian: apt install g++)"),
    "cuda": ("NVCC", ("nvcc",), "nvcc (the CUDA toolkit)"),
}
STABLE_ABI = "0x020b000000000000"  # oldest torch version that can load a library: 2.11
CUDA_TARGETS = ("80", "90")  # machine code for Ampere and Hopper; newer GPUs compile the PTX of the last one
_PROCESS_LOCK = threading.Lock()  # one build at a time among the threads of a process
_loaded: dict[tuple[str, str], bool] = {}  # (op, device type) -> whether the library is loaded; tried once
_warned: set[str] = set()  # reasons that were printed


class BuildError(RuntimeError):
    """Error of a compilation. The message states the reason and the path of the log."""


@dataclass(frozen=True)
class Recipe:
    """Commands that compile one library."""

    op: str
    device_type: str  # "cpu" or "cuda"
    commands: tuple[tuple[str, ...], ...]  # in order; {out} stands for the library, {obj} for an object file

    def folder(self) -> Path:
        """Return the folder of library and log, named by all that the library depends on."""
        # The paths of the checkout and of torch are removed: they do not change the library.
        roots = (str(SOURCES), str(Path(torch.__file__).parent))
        portable_commands = [
            [functools.reduce(lambda word, root: word.replace(root, ""), roots, word) for word in command]
            for command in self.commands
        ]
        depends = (
            portable_commands,
            torch.__version__,
            _compiler_version(self.commands[0][0]),
            _processor(),
        )
        return cache_dir() / f"{self.op}-{self.device_type}-{_digest(self.op, self.device_type, depends)}"


def _digest(op: str, device_type: str, depends: tuple) -> str:
    """Return a hash of an op's sources and of everything else that its library depends on."""
    digest = hashlib.sha256(repr(depends).encode())
    # All headers, since an op may include any of them.
    for path in [
        SOURCES / (op + SUFFIX[device_type]),
        *sorted(SOURCES.glob("*.h")),
        *sorted(SOURCES.glob("*.cuh")),
    ]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def ahead_folder() -> Path:
    """Return the folder for libraries that setup.py compiles: beside the sources, or $EG3D_RLHF_AHEAD."""
    return Path(os.environ.get("EG3D_RLHF_AHEAD") or SOURCES / "ahead")


def ahead(op: str, device_type: str) -> Path:
    """Return the path of the library that setup.py compiles of these sources, for this torch and processor.

    No compiler is needed to determine the path.
    """
    depends = (flags(device_type), torch.__version__, _processor())
    return ahead_folder() / f"{op}_{device_type}_{_digest(op, device_type, depends)}.so"


def cache_dir() -> Path:
    """Return $EG3D_RLHF_CACHE/ops, or ~/.cache/eg3d-rlhf/ops."""
    return Path(os.environ.get("EG3D_RLHF_CACHE") or Path.home() / ".cache" / "eg3d-rlhf") / "ops"


def ops(device_type: str) -> list[str]:
    """Return the names of the ops that have a source for a device type."""
    return sorted(path.stem for path in SOURCES.glob("*" + SUFFIX[device_type]))


def switched_off() -> bool:
    """Return whether $EG3D_RLHF_OPS turns compiled ops off."""
    return os.environ.get("EG3D_RLHF_OPS", "auto").lower() in ("off", "0", "torch", "ref")


@torch.compiler.assume_constant_result  # torch.compile calls it while tracing
def available(op: str, device_type: str) -> bool:
    """Return whether the compiled op is loaded, after building it if necessary.

    On CUDA it must also pass its check on the current device. Tries at most once per process and never
    raises.
    """
    key = (op, device_type)
    is_loaded = _loaded[key] if key in _loaded else _load(*key)
    if is_loaded and device_type == "cuda":
        # Imported here: cuda_check imports the ops, which import this module.
        from torch_utils import cuda_check

        return cuda_check.passes(op, torch.device("cuda"))
    return is_loaded


def _load(op: str, device_type: str) -> bool:
    """Build and load a library. If that fails, print one warning and return False."""
    # Held during the build as well: threads of one process wait here, other processes at the file lock.
    with _PROCESS_LOCK:
        key = (op, device_type)
        # Another thread may have loaded it while this one waited for the lock.
        if key in _loaded:
            return _loaded[key]
        _loaded[key] = False
        if not switched_off() and device_type in SUFFIX and op in ops(device_type):
            try:
                torch.ops.load_library(str(build(op, device_type)))
                _loaded[key] = True
            except (BuildError, OSError) as error:
                # torch's own exception hides the loader's message.
                reason = str(error if isinstance(error, BuildError) else error.__cause__ or error)
                # A missing compiler is the same reason for every op, and is printed once.
                if reason not in _warned:
                    _warned.add(reason)
                    warnings.warn(
                        f"op {op} ({device_type}): plain torch is used, which is slower. {reason}",
                        stacklevel=4,
                    )
        return _loaded[key]


def compiler(device_type: str) -> str:
    """Return the compiler that an environment variable selects, or the first one on the path.

    Raises: BuildError if there is none.
    """
    variable, names, what = COMPILERS[device_type]
    named = os.environ.get(variable)
    # A compiler that the user selected is not replaced by another one.
    for name in (named,) if named else names:
        if shutil.which(name):
            return name
    wanted = f"{variable}={named}" if named else what
    raise BuildError(f"{wanted} was not found. Install it, or select a compiler with ${variable}.")


def flags(device_type: str) -> list[str]:
    """Return the compiler flags for a device type, without the paths of sources and headers."""
    common = ["-std=c++20", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    if device_type == "cpu":
        # Not on macOS, whose clang has no OpenMP.
        native = [] if platform.system() == "Darwin" else ["-march=native", "-fopenmp"]
        # The two math flags give up errno and floating-point traps, and no accuracy.
        return [
            "-O3",
            "-fPIC",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wall",
            "-Wno-unknown-pragmas",
            *native,
            *common,
        ]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_TARGETS]
    # PTX as well, which the driver of a newer GPU compiles when the library is loaded.
    targets.append(f"-gencode=arch=compute_{CUDA_TARGETS[-1]},code=compute_{CUDA_TARGETS[-1]}")
    return ["-O3", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr", "-DUSE_CUDA", *targets, *common]


def recipe(op: str, device_type: str) -> Recipe:
    """Return the commands for one library. Raises: BuildError if this machine has no compiler for it."""
    include = Path(torch.__file__).parent / "include"
    headers = [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-I{SOURCES}"]
    source = str(SOURCES / (op + SUFFIX[device_type]))
    # The library is linked against torch, but not against Python: the stable ABI does not need it.
    torch_libraries = [f"-L{include.parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    cxx = compiler("cpu")
    if device_type == "cpu":
        linking = ["-shared", *(["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else [])]
        return Recipe(
            op,
            device_type,
            ((cxx, *linking, *flags("cpu"), *headers, source, "-o", "{out}", *torch_libraries),),
        )
    nvcc = compiler("cuda")
    compile_ = (nvcc, *flags("cuda"), *headers, "-c", source, "-o", "{obj}")
    toolkit = Path(shutil.which(nvcc) or nvcc).resolve().parents[1]
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] + [
        toolkit,
        Path("/usr/local/cuda"),
    ]
    # CUDA's runtime is linked statically, so that the machine that loads the library needs no toolkit. One of
    # these folders has libcudart_static.a.
    folders = [root / sub for root in roots for sub in ("lib64", "lib", "targets/x86_64-linux/lib")]
    libraries = [f"-L{folder}" for folder in folders if folder.is_dir()]
    link = (
        cxx,
        "-shared",
        "{obj}",
        "-o",
        "{out}",
        *torch_libraries,
        *libraries,
        "-lcudart_static",
        "-ldl",
        "-lrt",
        "-lpthread",
    )
    return Recipe(op, device_type, (compile_, link))


def build(op: str, device_type: str) -> Path:
    """Return the op's library: the one of setup.py, or that of the cache, which is compiled if necessary.

    Raises: BuildError with the path of the log.
    """
    # First, since it needs no compiler: determining the recipe below asks the compiler for its version.
    if ahead(op, device_type).exists():
        return ahead(op, device_type)
    todo = recipe(op, device_type)
    folder = todo.folder()
    library = folder / f"{op}.so"
    log = folder / "build.log"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A lock of the operating system, which is released when its process dies.
        with FileLock(folder / "lock"):
            if library.exists():  # another process has built it meanwhile
                return library
            # The library gets its final name when it is complete, so
            # its existence means that it can be loaded.
            names = {"{out}": "building.so", "{obj}": "building.o"}
            with open(log, "w") as output:
                for words in todo.commands:
                    command = [names.get(word, word) for word in words]
                    print("$", shlex.join(command), file=output, flush=True)
                    done = subprocess.run(
                        # LC_ALL=C: the message about a full disk is compared below, in English.
                        command,
                        cwd=folder,
                        capture_output=True,
                        text=True,
                        env={**os.environ, "LC_ALL": "C"},
                    )
                    if done.returncode and os.strerror(errno.ENOSPC) in done.stderr:
                        # On a full disk the log would be cut off as well, so the error is raised directly.
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    print(done.stdout + done.stderr, file=output, flush=True)
                    if done.returncode:
                        raise BuildError(f"The build failed. See {log}.")
            os.replace(folder / "building.so", library)  # atomic: under its name, the library is complete
    except OSError as error:
        remedy = "Free space, or set EG3D_RLHF_CACHE to a folder that is writable."
        raise BuildError(f"{cache_dir()}: {error.strerror or error}. {remedy}") from error
    return library


@functools.cache
def _compiler_version(compiler: str) -> str:
    """Return the compiler's description of its version."""
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} --version: {error}") from error


@functools.cache
def _processor() -> str:
    """Return the processor's name and features, on which code for the native machine depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    # A set: every core has the same lines.
    return "\n".join(
        sorted({line for line in lines if line.split("\t")[0].strip() in ("model name", "flags", "Features")})
    )


def main() -> int:
    """Build all ops for this machine's compilers and print the outcome of each.

    Returns 1 if one that should build did not, else 0.
    """
    failed = 0
    for device_type, op in [(kind, name) for kind in SUFFIX for name in ops(kind)]:
        try:
            outcome = str(build(op, device_type))
        except BuildError as error:
            # A machine without nvcc is normal; one without a C++ compiler is not.
            missing = "was not found" in str(error)
            failed |= not missing or device_type == "cpu"
            outcome = f"{'not built' if missing else 'FAILED'}: {error}"
        print(f"{op:20s} {device_type:5s} {outcome}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
