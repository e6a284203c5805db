"""Peak memory that one path needs on top of its inputs, in a process of its own.

    python -m benchmarks.memory NAME SIZE DEVICE PATH THREADS TINY          prints bytes
"""

import subprocess
import sys
import threading
from pathlib import Path

import torch

from benchmarks.rows import Row

REPO = Path(__file__).resolve().parents[1]
LOOKS_APART_S = 0.001
SLACK = 8 * 2**20  # bytes between a mark just restarted and the resident memory read after it


class PeakMeter:
    """High-water mark since its making: resident memory on a CPU, allocated memory on a GPU.

    Linux restarts a process's mark on request; where that is not allowed (some containers), a thread looks at the resident memory every
    millisecond instead, which may miss a shorter peak.
    """

    def __init__(self, device: str):
        self._device = device
        self._watch: threading.Thread | None = None
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        self._before = self._peak = resident_bytes("VmRSS")
        if not restart_mark():
            self._done = threading.Event()
            self._watch = threading.Thread(target=self._look, daemon=True)
            self._watch.start()

    def _look(self) -> None:
        while not self._done.wait(LOOKS_APART_S):
            self._peak = max(self._peak, resident_bytes("VmRSS"))

    def extra_bytes(self) -> int:
        """Bytes at the peak beyond those at the beginning, >= 1. Ends the measurement."""
        if self._device == "cuda":
            torch.cuda.synchronize()
            return max(torch.cuda.max_memory_allocated() - self._before, 1)
        if self._watch is None:
            return max(resident_bytes("VmHWM") - self._before, 1)
        self._done.set()
        self._watch.join()
        return max(self._peak - self._before, resident_bytes("VmRSS") - self._before, 1)


def restart_mark() -> bool:
    """Set this process's high-water mark back to its present size; returns whether that was done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return resident_bytes("VmHWM") <= resident_bytes("VmRSS") + SLACK


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, from /proc (Linux), else the peak that getrusage knows."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def extra_bytes_in_subprocess(row: Row, device: str, path: str, tiny: bool) -> int:
    """Peak while the row's case runs one path once, in a fresh process that has warmed up on a tiny case.

    Raises: RuntimeError with what the process wrote on stderr.
    """
    arguments = [row.name, row.size, device, path, str(torch.get_num_threads()), str(int(tiny))]
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", *arguments], cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{row.name}: the memory measurement of the {path} path failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def main(name: str, size: str, device: str, path: str, threads: str, tiny: str) -> None:
    """The process that measures."""
    from benchmarks.rows import all_rows  # the module of that name, not this one run as __main__

    torch.set_num_threads(int(threads))
    (row,) = (row for row in all_rows() if (row.name, row.size) == (name, size))
    for small in (True, tiny == "1"):
        case = row.make(device, small)
        case.prepare()
        torch.manual_seed(0)
        meter = PeakMeter(device)
        case.call(path)
        used = meter.extra_bytes()
    print(used)


if __name__ == "__main__":
    main(*sys.argv[1:])
