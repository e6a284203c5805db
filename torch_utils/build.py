"""Compile the C++ and CUDA halves of the ops, once, and load them.

    python -m torch_utils.build          compile everything that this machine can compile, into the cache
    python setup.py build_ops            the same with torch.utils.cpp_extension and ninja; no compiler is
                                         asked for afterwards

Ops are compiled on first use into $EG3D_RLHF_CACHE/ops (default ~/.cache/eg3d-rlhf/ops), one library per op
and device, in a folder whose name is a hash of the sources, the flags, the compiler, the processor and
torch's version. A lock keeps two processes from building the same library at once. Where a build fails or is
impossible, one warning names the log, and plain torch does the work.

$EG3D_RLHF_OPS=off switches compiled ops off; $CXX and $NVCC name other compilers; $EG3D_RLHF_AHEAD another
folder for what setup.py compiles, which is torch_utils/ops/ahead.

Sources: torch_utils/ops/<op>.cpp and <op>.cu, against torch's stable ABI (torch/csrc/stable), so that neither
the CUDA toolkit's libraries nor Python's headers are needed and a CUDA library can be built where there is no
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
SUFFIX = {"cpu": ".cpp", "cuda": ".cu"}
COMPILERS = {  # by device: the variable that names one, what is looked for, in words
    "cpu": ("CXX", ("g++", "c++", "clang++"), "a C++ compiler (Debian: apt install g++)"),
    "cuda": ("NVCC", ("nvcc",), "nvcc (the CUDA toolkit)"),
}
STABLE_ABI = "0x020b000000000000"  # oldest torch that a library serves: 2.11
CUDA_TARGETS = ("80", "90")  # Ampere and Hopper as machine code; newer ones take the PTX of the last
_PROCESS_LOCK = threading.Lock()
_loaded: dict[tuple[str, str], bool] = {}
_warned: set[str] = set()


class BuildError(RuntimeError):
    """An op could not be compiled; the message says why and where the log is."""


@dataclass(frozen=True)
class Recipe:
    """How one library is made."""

    op: str
    device_type: str  # "cpu" or "cuda"
    commands: tuple[tuple[str, ...], ...]  # in order; {out} stands for the library, {obj} for an object file

    def folder(self) -> Path:
        """Where library and log lie; its name changes with whatever the result depends on."""
        # a library is the same wherever checkout and torch lie
        roots = (str(SOURCES), str(Path(torch.__file__).parent))
        told = [
            [functools.reduce(lambda word, root: word.replace(root, ""), roots, word) for word in command]
            for command in self.commands
        ]
        depends = (told, torch.__version__, _compiler_version(self.commands[0][0]), _processor())
        return cache_dir() / f"{self.op}-{self.device_type}-{_digest(self.op, self.device_type, depends)}"


def _digest(op: str, device_type: str, depends: tuple) -> str:
    """Hash of an op's sources and of whatever else its library depends on."""
    digest = hashlib.sha256(repr(depends).encode())
    for path in [
        SOURCES / (op + SUFFIX[device_type]),
        *sorted(SOURCES.glob("*.h")),
        *sorted(SOURCES.glob("*.cuh")),
    ]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def ahead_folder() -> Path:
    """Where setup.py puts libraries: beside the sources, or $EG3D_RLHF_AHEAD."""
    return Path(os.environ.get("EG3D_RLHF_AHEAD") or SOURCES / "ahead")


def ahead(op: str, device_type: str) -> Path:
    """The library that setup.py compiles of these sources for this torch and processor; no compiler is needed
    to name it.
    """
    depends = (flags(device_type), torch.__version__, _processor())
    return ahead_folder() / f"{op}_{device_type}_{_digest(op, device_type, depends)}.so"


def cache_dir() -> Path:
    """$EG3D_RLHF_CACHE/ops, or ~/.cache/eg3d-rlhf/ops."""
    return Path(os.environ.get("EG3D_RLHF_CACHE") or Path.home() / ".cache" / "eg3d-rlhf") / "ops"


def ops(device_type: str) -> list[str]:
    """Names of the ops that have a source for a device."""
    return sorted(path.stem for path in SOURCES.glob("*" + SUFFIX[device_type]))


def switched_off() -> bool:
    """Whether $EG3D_RLHF_OPS says that plain torch does the work."""
    return os.environ.get("EG3D_RLHF_OPS", "auto").lower() in ("off", "0", "torch", "ref")


@torch.compiler.assume_constant_result  # torch.compile calls it while tracing
def available(op: str, device_type: str) -> bool:
    """Whether the compiled op is loaded, after building it if need be, and on CUDA whether it passes its
    check on the current device.

    Tries at most once per process and never raises.
    """
    key = (op, device_type)
    found = _loaded[key] if key in _loaded else _load(*key)
    if found and device_type == "cuda":
        from torch_utils import cuda_check  # imports the ops, which import this

        return cuda_check.passes(op, torch.device("cuda"))
    return found


def _load(op: str, device_type: str) -> bool:
    with _PROCESS_LOCK:
        key = (op, device_type)
        if key in _loaded:
            return _loaded[key]
        _loaded[key] = False
        if not switched_off() and device_type in SUFFIX and op in ops(device_type):
            try:
                torch.ops.load_library(str(build(op, device_type)))
                _loaded[key] = True
            except (BuildError, OSError) as error:
                # torch hides the loader's message
                reason = str(error if isinstance(error, BuildError) else error.__cause__ or error)
                if reason not in _warned:  # a missing compiler is the same news for every op
                    _warned.add(reason)
                    warnings.warn(
                        f"op {op} ({device_type}): plain torch is used, which is slower. {reason}",
                        stacklevel=4,
                    )
        return _loaded[key]


def compiler(device_type: str) -> str:
    """The compiler that an environment variable names, or the first that is found on the path.

    Raises: BuildError where there is none.
    """
    variable, names, what = COMPILERS[device_type]
    named = os.environ.get(variable)
    for name in (named,) if named else names:
        if shutil.which(name):
            return name
    wanted = f"{variable}={named}" if named else what
    raise BuildError(f"{wanted} was not found; install it, or name one in ${variable}.")


def flags(device_type: str) -> list[str]:
    """What a compiler is told of a device's sources, but for where they and torch's headers lie."""
    common = ["-std=c++20", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    if device_type == "cpu":
        native = [] if platform.system() == "Darwin" else ["-march=native", "-fopenmp"]
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
    targets.append(f"-gencode=arch=compute_{CUDA_TARGETS[-1]},code=compute_{CUDA_TARGETS[-1]}")
    return ["-O3", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr", "-DUSE_CUDA", *targets, *common]


def recipe(op: str, device_type: str) -> Recipe:
    """Commands for one library. Raises: BuildError where this machine has no compiler for it."""
    include = Path(torch.__file__).parent / "include"
    headers = [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-I{SOURCES}"]
    source = str(SOURCES / (op + SUFFIX[device_type]))
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
    # one has libcudart_static.a
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
    """The op's library: the one that setup.py compiled, or the cache's, compiled where that has none.

    Raises: BuildError with the path of the log.
    """
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
        with FileLock(folder / "lock"):  # released by the system when its holder dies
            if library.exists():  # another process was faster
                return library
            names = {"{out}": "building.so", "{obj}": "building.o"}
            with open(log, "w") as output:
                for words in todo.commands:
                    command = [names.get(word, word) for word in words]
                    print("$", shlex.join(command), file=output, flush=True)
                    done = subprocess.run(
                        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
                    )
                    if done.returncode and os.strerror(errno.ENOSPC) in done.stderr:
                        # the log would be as short as the library
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    print(done.stdout + done.stderr, file=output, flush=True)
                    if done.returncode:
                        raise BuildError(f"The build failed; see {log}.")
            os.replace(folder / "building.so", library)  # it appears under its name only when it is whole
    except OSError as error:
        remedy = "Make room, or set EG3D_RLHF_CACHE to a folder that can be written."
        raise BuildError(f"{cache_dir()}: {error.strerror or error}. {remedy}") from error
    return library


@functools.cache
def _compiler_version(compiler: str) -> str:
    """What the compiler says of itself."""
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} --version: {error}") from error


@functools.cache
def _processor() -> str:
    """The processor's name and features, on which code built for the native machine depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(
        sorted({line for line in lines if line.split("\t")[0].strip() in ("model name", "flags", "Features")})
    )


def main() -> int:
    """Build all ops for this machine's compilers and say how it went; 1 where something that should build did
    not.
    """
    failed = 0
    for device_type, op in [(kind, name) for kind in SUFFIX for name in ops(kind)]:
        try:
            outcome = str(build(op, device_type))
        except BuildError as error:
            missing = "was not found" in str(error)
            failed |= not missing or device_type == "cpu"
            outcome = f"{'not built' if missing else 'FAILED'}: {error}"
        print(f"{op:20s} {device_type:5s} {outcome}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
