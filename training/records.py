"""What a run writes at its ticks: status line, statistics, timings, image grids. One process of the run does so."""

import json
import resource
import time
from pathlib import Path

import numpy as np
import torch

from training.config import LoopConfig
from training.dataset import ImageFolderDataset
from training.image_grid import save_fakes, save_grid


class Records:
    """The files of a run folder, apart from checkpoints and networks.

    Args:
        run_dir: the folder; config: of the loop; dataset: for the reals and the cameras of the fakes.
    """

    def __init__(self, run_dir: Path, config: LoopConfig, dataset: ImageFolderDataset):
        self.run_dir, self.config, self.dataset = run_dir, config, dataset
        self.lines = 0  # of stats.jsonl
        self._start_nimg, self._start_time = 0, time.time()

    def begin(self, G_ema: torch.nn.Module, nimg: int) -> None:
        """Make the folder, fix the grid's latents and cameras, and show the start of a new run."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        columns, rows = self.config.grid
        device = next(G_ema.parameters()).device
        z = np.random.RandomState(self.config.seed).randn(columns * rows, G_ema.z_dim).astype(np.float32)
        c = np.stack([self.dataset.get_label(i % len(self.dataset)) for i in range(columns * rows)])
        self._grid = torch.from_numpy(z).to(device), torch.from_numpy(c).to(device)
        if nimg == 0:
            reals = np.stack([self.dataset[i][0] for i in range(min(len(self.dataset), columns * rows))])
            save_grid(reals, (0, 255), columns, self.run_dir / "reals.png")
            self.fakes(G_ema, "_init")
        self._start_nimg, self._start_time = nimg, time.time()

    def fakes(self, G_ema: torch.nn.Module, tag: str) -> None:
        """Image grids of the fixed latents."""
        save_fakes(G_ema, *self._grid, self.config.grid[0], self.run_dir, tag)

    def stats(self, tick: int, nimg: int, stats: dict) -> None:
        """One line of stats.jsonl."""
        with open(self.run_dir / "stats.jsonl", "a") as file:
            file.write(json.dumps({"tick": tick, "nimg": nimg, **stats}, sort_keys=True) + "\n")
        self.lines += 1

    def status(self, tick: int, nimg: int, extra: dict[str, str]) -> None:
        """Print the status line and note the timing."""
        elapsed = time.time() - self._start_time
        rate = elapsed / max((nimg - self._start_nimg) / 1000, 1e-9)
        eta = rate * max(self.config.total_kimg - nimg / 1000, 0)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        fields = {
            "tick": f"{tick:<5d}", "kimg": f"{nimg / 1000:<8.2f}", "time": f"{format_time(elapsed):<12s}",
            "sec/kimg": f"{rate:<7.1f}", "eta": f"{format_time(eta):<12s}", "mem_gb": f"{memory:<5.2f}", **extra,
        }
        print(" ".join(f"{k} {v}" for k, v in fields.items()), flush=True)
        with open(self.run_dir / "timing.jsonl", "a") as file:
            record = {"tick": tick, "nimg": nimg, "seconds": elapsed, "sec_per_kimg": rate, "mem_gb": memory}
            file.write(json.dumps(record) + "\n")


def format_time(seconds: float) -> str:
    """'1h 02m 03s', '2m 03s' or '3s'."""
    s = int(seconds)
    if s >= 3600:
        return f"{s // 3600}h {s // 60 % 60:02d}m {s % 60:02d}s"
    return f"{s // 60}m {s % 60:02d}s" if s >= 60 else f"{s}s"
