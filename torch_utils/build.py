"""Compile the C++ and CUDA sources of the custom ops, and load the compiled libraries.

    python -m torch_utils.build     compiles all ops for which this machine has a compiler, into the cache
    python setup.py build_ops       compiles all ops into the package, so that no compiler is needed later

Without these commands, an op is compiled at its first use. The cache is the folder $EG3D_RLHF_CACHE/ops
(default ~/.cache/eg3d-rlhf/ops). It has one folder for each op and kind of device, whose name contains a hash
of the sources, the compiler's flags and version, the processor and torch's version. A lock prevents two
processes from building the same library at once. If a library cannot be built, one warning gives the reason,
and the op is computed by plain torch.

Environment variables: EG3D_RLHF_OPS=off turns compiled ops off. CXX and NVCC select other compilers.
EG3D_RLHF_AHEAD is the folder of the libraries that setup.py compiles, by default torch_utils/ops/ahead.

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
SUFFIX = {"cpu": ".cpp", "cuda": ".cu"}  # suffix of the source by device type
# Compilers by device type: environment variable that selects one, names that are searched on the path, and
# the description in messages
COMPILERS = {
    "cpu": ("CXX", ("g++", "c++", "clang++"), "A C++ compiler (Debian: apt install g++)"),
    "cuda": ("NVCC", ("nvcc",), "The compiler nvcc (part of the CUDA toolkit)"),
}
STABLE_ABI = "0x020b000000000000"  # oldest torch version that can load a library: 2.11
# GPU architectures (Ampere, Hopper) that get machine code. Newer GPUs compile the PTX code of the last one.
CUDA_TARGETS = ("80", "90")
_PROCESS_LOCK = threading.Lock()  # lets only one thread of the process build a library at a time
_loaded: dict[tuple[str, str], bool] = {}  # by (op, device type): True if loaded, False if that failed
_warned: set[str] = set()  # reasons of failures that were printed already


class BuildError(RuntimeError):
    """Error of a compilation.

    The message gives the reason and, after a failed command, the path of the log.
    """


@dataclass(frozen=True)
class Recipe:
    """Commands that compile the library of one op for one kind of device."""

    op: str  # name of the op
    device_type: str  # "cpu" or "cuda"
    # Commands in order, as lists of words. The word {out} stands for the library, {obj} for an object file.
    commands: tuple[tuple[str, ...], ...]

    def folder(self) -> Path:
        """Return the cache folder of the compiled library and of the compiler's log.

        The folder's name contains a hash of everything on which the library depends.
        """
        # The paths of the checkout and of torch do not change the
        # library, so they are removed before hashing.
        source_folder = str(SOURCES)
        torch_folder = str(Path(torch.__file__).parent)
        portable_commands = [
            [word.replace(source_folder, "").replace(torch_folder, "") for word in command]
            for command in self.commands
        ]
        hash_inputs = (
            portable_commands,
            torch.__version__,
            _compiler_version(self.commands[0][0]),
            _processor(),
        )
        return cache_dir() / f"{self.op}-{self.device_type}-{_digest(self.op, self.device_type, hash_inputs)}"


def _digest(op: str, device_type: str, hash_inputs: tuple) -> str:
    """Compute a hash of an op's sources and of the other inputs of its library, as 16 hexadecimal digits.

    Args:
        op: name of the op.
        device_type: "cpu" or "cuda".
        hash_inputs: other values on which the library depends, such as flags and versions.
    """
    digest = hashlib.sha256(repr(hash_inputs).encode())
    # All headers are hashed, since an op may include any of them.
    for path in [
        SOURCES / (op + SUFFIX[device_type]),
        *sorted(SOURCES.glob("*.h")),
        *sorted(SOURCES.glob("*.cuh")),
    ]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def prebuilt_folder() -> Path:
    """Return the folder of the libraries that setup.py compiles.

    It is $EG3D_RLHF_AHEAD if that is set, and a folder beside the sources otherwise.
    """
    return Path(os.environ.get("EG3D_RLHF_AHEAD") or SOURCES / "ahead")


def prebuilt_library(op: str, device_type: str) -> Path:
    """Return the path at which setup.py stores the library of an op.

    The path depends on the present sources, torch and processor. The file may not exist. No compiler is
    needed to compute the path.

    Args:
        op: name of the op.
        device_type: "cpu" or "cuda".
    """
    hash_inputs = (flags(device_type), torch.__version__, _processor())
    return prebuilt_folder() / f"{op}_{device_type}_{_digest(op, device_type, hash_inputs)}.so"


def cache_dir() -> Path:
    """Return the cache folder: $EG3D_RLHF_CACHE/ops, or ~/.cache/eg3d-rlhf/ops if the variable is not set."""
    return Path(os.environ.get("EG3D_RLHF_CACHE") or Path.home() / ".cache" / "eg3d-rlhf") / "ops"


def ops(device_type: str) -> list[str]:
    """Return the sorted names of the ops that have a source file for `device_type`, "cpu" or "cuda"."""
    return sorted(path.stem for path in SOURCES.glob("*" + SUFFIX[device_type]))


def switched_off() -> bool:
    """Return True if the environment variable EG3D_RLHF_OPS turns compiled ops off."""
    return os.environ.get("EG3D_RLHF_OPS", "auto").lower() in ("off", "0", "torch", "ref")


@torch.compiler.assume_constant_result  # torch.compile calls this function while it traces
def available(op: str, device_type: str) -> bool:
    """Return True if the compiled op can be used. The library is built and loaded first if necessary.

    On CUDA, the op must also pass its check on the current device. An op is built at most once per process.
    The function never raises an error; a failure causes a warning.

    Args:
        op: name of the op.
        device_type: "cpu" or "cuda".
    """
    op_key = (op, device_type)
    is_loaded = _loaded[op_key] if op_key in _loaded else _load(*op_key)
    if is_loaded and device_type == "cuda":
        # Imported here: cuda_check imports the ops, which import this module.
        from torch_utils import cuda_check

        return cuda_check.passes(op, torch.device("cuda"))
    return is_loaded


def _load(op: str, device_type: str) -> bool:
    """Build and load the library of an op. Return True on success, and False after a warning otherwise.

    Each reason of a failure is printed only once.
    """
    # The lock covers the build, too: other threads wait here, and other processes wait at the file lock.
    with _PROCESS_LOCK:
        op_key = (op, device_type)
        # Another thread may have loaded the library while this thread waited for the lock.
        if op_key in _loaded:
            return _loaded[op_key]
        _loaded[op_key] = False
        if not switched_off() and device_type in SUFFIX and op in ops(device_type):
            try:
                torch.ops.load_library(str(build(op, device_type)))
                _loaded[op_key] = True
            except (BuildError, OSError) as error:
                # torch's own exception hides the loader's message.
                reason = str(error if isinstance(error, BuildError) else error.__cause__ or error)
                # A missing compiler is the same reason for every op, so it is printed only once.
                if reason not in _warned:
                    _warned.add(reason)
                    warnings.warn(
                        f"op {op} ({device_type}): plain torch is used, which is slower, because the compiled"
                        f" library is not available. {reason}",
                        stacklevel=4,  # the line that called the op
                    )
        return _loaded[op_key]


def compiler(device_type: str) -> str:
    """Return the name of the compiler for a device type.

    It is the compiler that an environment variable selects ("cpu": CXX, "cuda": NVCC), or otherwise the first
    known compiler on the path.

    Raises: BuildError if the selected compiler, or every known compiler, is missing.
    """
    environment_variable, compiler_names, compiler_description = COMPILERS[device_type]
    selected_name = os.environ.get(environment_variable)
    # A compiler that the user selected is not replaced by another one.
    for compiler_name in (selected_name,) if selected_name else compiler_names:
        if shutil.which(compiler_name):
            return compiler_name
    missing_compiler = (
        f"The compiler {environment_variable}={selected_name}" if selected_name else compiler_description
    )
    raise BuildError(
        f"{missing_compiler} was not found. Install it, or select another compiler with the environment"
        f" variable {environment_variable}."
    )


def flags(device_type: str) -> list[str]:
    """Return the compiler flags for "cpu" or "cuda", without the paths of sources and headers."""
    common_flags = ["-std=c++20", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    if device_type == "cpu":
        # The clang of macOS has no OpenMP.
        native_flags = [] if platform.system() == "Darwin" else ["-march=native", "-fopenmp"]
        # The two math flags switch off errno and floating-point traps. They do not change results.
        return [
            "-O3",
            "-fPIC",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wall",
            "-Wno-unknown-pragmas",
            *native_flags,
            *common_flags,
        ]
    target_flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_TARGETS]
    # Also PTX code, which the driver of a newer GPU compiles when the library is loaded.
    target_flags.append(f"-gencode=arch=compute_{CUDA_TARGETS[-1]},code=compute_{CUDA_TARGETS[-1]}")
    return [
        "-O3",
        "-Xcompiler",
        "-fPIC",
        "--expt-relaxed-constexpr",
        "-DUSE_CUDA",
        *target_flags,
        *common_flags,
    ]


def recipe(op: str, device_type: str) -> Recipe:
    """Return the commands that compile the library of an op.

    Args:
        op: name of the op.
        device_type: "cpu" or "cuda".

    Raises: BuildError if this machine has no C++ compiler or, for "cuda", no nvcc.
    """
    include_folder = Path(torch.__file__).parent / "include"
    header_flags = [f"-I{include_folder}", f"-I{include_folder}/torch/csrc/api/include", f"-I{SOURCES}"]
    source_path = str(SOURCES / (op + SUFFIX[device_type]))
    # The library is linked against torch, but not against Python: the stable ABI does not need it.
    torch_libraries = [f"-L{include_folder.parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    cxx = compiler("cpu")
    if device_type == "cpu":
        linking_flags = [
            "-shared",
            *(["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []),
        ]
        return Recipe(
            op,
            device_type,
            (
                (
                    cxx,
                    *linking_flags,
                    *flags("cpu"),
                    *header_flags,
                    source_path,
                    "-o",
                    "{out}",
                    *torch_libraries,
                ),
            ),
        )
    nvcc = compiler("cuda")
    compile_command = (nvcc, *flags("cuda"), *header_flags, "-c", source_path, "-o", "{obj}")
    # nvcc lies in the folder bin of the toolkit.
    toolkit_folder = Path(shutil.which(nvcc) or nvcc).resolve().parents[1]
    toolkit_folders = [
        Path(os.environ[variable]) for variable in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(variable)
    ] + [
        toolkit_folder,
        Path("/usr/local/cuda"),
    ]
    # CUDA's runtime is linked statically, so that the machine that loads the library needs no toolkit. One of
    # these folders has libcudart_static.a.
    library_folders = [
        toolkit_root / subfolder
        for toolkit_root in toolkit_folders
        for subfolder in ("lib64", "lib", "targets/x86_64-linux/lib")
    ]
    library_flags = [f"-L{folder}" for folder in library_folders if folder.is_dir()]
    link_command = (
        cxx,
        "-shared",
        "{obj}",
        "-o",
        "{out}",
        *torch_libraries,
        *library_flags,
        "-lcudart_static",
        "-ldl",
        "-lrt",
        "-lpthread",
    )
    return Recipe(op, device_type, (compile_command, link_command))


def build(op: str, device_type: str) -> Path:
    """Return the path of the library of an op, which is compiled if necessary.

    It is the library that setup.py compiled or, if there is none, the library in the cache.

    Args:
        op: name of the op.
        device_type: "cpu" or "cuda".

    Raises: BuildError if the library cannot be compiled.
    """
    # The library of setup.py is searched first, because this needs no compiler: the hash of the cache
    # contains the version of the compiler.
    if prebuilt_library(op, device_type).exists():
        return prebuilt_library(op, device_type)
    build_recipe = recipe(op, device_type)
    build_folder = build_recipe.folder()
    library_path = build_folder / f"{op}.so"
    log_path = build_folder / "build.log"
    if library_path.exists():
        return library_path
    try:
        build_folder.mkdir(parents=True, exist_ok=True)
        # A lock of the operating system, which is released when its process dies.
        with FileLock(build_folder / "lock"):
            if library_path.exists():  # another process has built it meanwhile
                return library_path
            # The library is built under another name and renamed at the end, so that a library with the final
            # name is always complete.
            temporary_names = {"{out}": "building.so", "{obj}": "building.o"}
            with open(log_path, "w") as log_file:
                for command_template in build_recipe.commands:
                    command = [temporary_names.get(word, word) for word in command_template]
                    print("$", shlex.join(command), file=log_file, flush=True)
                    finished_process = subprocess.run(
                        command,
                        cwd=build_folder,
                        capture_output=True,
                        text=True,
                        # English messages: the text about a full disk is compared below.
                        env={**os.environ, "LC_ALL": "C"},
                    )
                    if finished_process.returncode and os.strerror(errno.ENOSPC) in finished_process.stderr:
                        # On a full disk the log could not be written either, so the error is raised directly.
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    print(finished_process.stdout + finished_process.stderr, file=log_file, flush=True)
                    if finished_process.returncode:
                        raise BuildError(f"The compiler reported an error. Read its log {log_path}.")
            os.replace(build_folder / "building.so", library_path)  # atomic
    except OSError as error:
        raise BuildError(
            f"The library cannot be written to the cache {cache_dir()}: {error.strerror or error}. Free space"
            " on the disk, or set EG3D_RLHF_CACHE to another folder that is writable."
        ) from error
    return library_path


@functools.cache
def _compiler_version(compiler: str) -> str:
    """Return the output of `compiler --version`."""
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(
            f"The version of the compiler {compiler} cannot be read: {error}. Install the compiler again, or"
            " select another one with the environment variable CXX (C++) or NVCC (CUDA)."
        ) from error


@functools.cache
def _processor() -> str:
    """Return the name and the features of the processor, on which code with -march=native depends."""
    try:
        cpuinfo_lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    # A line is "key<tab>: value". The file repeats the same lines for every core, so they are put into a set.
    hashed_keys = ("model name", "flags", "Features")
    return "\n".join(
        sorted(
            {
                cpuinfo_line
                for cpuinfo_line in cpuinfo_lines
                if cpuinfo_line.split("\t")[0].strip() in hashed_keys
            }
        )
    )


def main() -> int:
    """Build all ops for which this machine has a compiler, and print a line for each op.

    Returns: the exit status, 1 if a build failed or there is no C++ compiler, and 0 otherwise. A missing nvcc
        is no failure.
    """
    has_failed = False
    for device_type, op in [(source_type, op_name) for source_type in SUFFIX for op_name in ops(source_type)]:
        try:
            outcome_text = str(build(op, device_type))
        except BuildError as error:
            is_compiler_missing = "was not found" in str(error)  # the text of `compiler`
            has_failed |= not is_compiler_missing or device_type == "cpu"
            outcome_text = f"{'not built' if is_compiler_missing else 'FAILED'}: {error}"
        print(f"{op:20s} {device_type:5s} {outcome_text}", flush=True)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
