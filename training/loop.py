"""The training loop: phases in order, moving average, ticks, snapshots, checkpoints. Knows nothing of rewards.

Random numbers derive from (seed, images seen, phase name) alone, so that a resumed run matches an uninterrupted one and a further phase
changes no draw of the others.

Shapes: N batch, Z z_dim, K c_dim.
"""

import copy
import dataclasses
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from torch_utils.training_stats import Collector
from training import checkpoint, networks
from training.config import LoopConfig, OptimizerConfig
from training.dataset import ImageFolderDataset
from training.gan_phases import Batch, GanPhases, Loss
from training.image_grid import save_fakes, save_grid
from training.sampler import InfiniteSampler


@dataclasses.dataclass(kw_only=True)
class Phase:
    """One optimisation step on one network, every `interval` iterations, with its loss scaled by `gain`."""

    name: str
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    losses: Callable[[Batch], Iterator[Loss]]
    interval: int = 1
    gain: float = 1.0
    state: torch.nn.Module | None = None  # what the phase itself must carry through a checkpoint
    own_optimizer: bool = False  # saved apart from the network's GAN optimizer


def lazy_adam(module: torch.nn.Module, config: OptimizerConfig, interval: int | None) -> torch.optim.Adam:
    """Adam corrected for lazy regularisation (Karras et al. 2020, appendix B): with r = I/(I+1), lr*r and betas**r.

    Args:
        interval: iterations between regularisations, or None for no correction.
    """
    r = interval / (interval + 1) if interval else 1.0
    parameters = list(module.parameters())
    return torch.optim.Adam(parameters, lr=config.lr * r, betas=(config.beta1**r, config.beta2**r), eps=config.eps)


def gan_phases(terms: GanPhases, G_opt: OptimizerConfig, D_opt: OptimizerConfig, config: LoopConfig) -> list[Phase]:
    """Gmain, Greg, Dmain, Dreg; without density regularisation there is no Greg and no correction of G's optimizer."""
    g_interval = config.g_reg_interval if terms.config.density_reg > 0 else None
    G_adam = lazy_adam(terms.G, G_opt, g_interval)
    D_adam = lazy_adam(terms.D, D_opt, config.d_reg_interval)
    phases = [Phase(name="Gmain" if g_interval else "Gboth", module=terms.G, optimizer=G_adam, losses=terms.g_main)]
    if g_interval:
        phases.append(Phase(name="Greg", module=terms.G, optimizer=G_adam, losses=terms.g_reg, interval=g_interval, gain=g_interval))
    interval = config.d_reg_interval
    phases.append(Phase(name="Dmain", module=terms.D, optimizer=D_adam, losses=terms.d_main))
    phases.append(Phase(name="Dreg", module=terms.D, optimizer=D_adam, losses=terms.d_reg, interval=interval, gain=interval))
    return phases


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable values."""
    digest = hashlib.sha256("/".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class LossNotFiniteError(ValueError):
    """A loss became NaN or infinite; the message names the phase, the iteration and the last good checkpoint."""


class TrainingLoop:
    """Runs phases on one device.

    Args:
        nets: G, D and G_ema; dataset: real images; phases: in the order in which they run; config: loop settings.
        run_dir: where everything is written; options: the resolved configuration, stored in checkpoints.
        augment_pipe: ADA module with buffer p, or None.
        on_tick: called once per tick with (loop, stats); returns fields to add to the status line.
    """

    def __init__(
        self, nets: networks.Networks, dataset: ImageFolderDataset, phases: list[Phase], config: LoopConfig, run_dir: Path, *,
        options: dict | None = None, augment_pipe: torch.nn.Module | None = None,
        on_tick: Callable[["TrainingLoop", dict], dict[str, str]] | None = None,
    ):
        self.nets, self.dataset, self.phases, self.config, self.run_dir = nets, dataset, phases, config, run_dir
        self.options, self.augment_pipe, self.on_tick = options or {}, augment_pipe, on_tick
        self.device = next(nets.G.parameters()).device
        self.cur_nimg, self.batch_idx, self.cur_tick = 0, 0, 0
        self.stats, self.ada_stats = Collector(), Collector()
        self.stats_lines = 0
        self.last_checkpoint: Path | None = None
        self.start_nimg, self.start_time = 0, time.time()

    # One iteration.

    def step(self) -> None:
        """Run every phase that is due, then the moving average and the augmentation heuristic."""
        real_img, real_c = self._fetch_real()
        for phase in self.phases:
            if self.batch_idx % phase.interval == 0:
                self._run_phase(phase, real_img, real_c)
        self._update_ema()
        self.cur_nimg += self.config.batch
        self.batch_idx += 1
        self._update_ada()

    def _fetch_real(self) -> tuple[torch.Tensor, torch.Tensor]:
        items = [self.dataset[next(self._sampler)] for _ in range(self.config.batch)]
        images = torch.from_numpy(np.stack([image for image, _ in items])).to(self.device).to(torch.float32) / 127.5 - 1
        return images, torch.from_numpy(np.stack([label for _, label in items])).to(self.device)

    def _run_phase(self, phase: Phase, real_img: torch.Tensor, real_c: torch.Tensor) -> None:
        seed = derive_seed(self.config.seed, self.cur_nimg, phase.name)
        torch.manual_seed(seed)
        n = self.config.batch
        z = torch.randn([n, self.nets.G.z_dim], device=self.device)
        picks = np.random.RandomState(seed % 2**32).randint(len(self.dataset), size=n)
        c = torch.from_numpy(np.stack([self.dataset.get_label(int(i)) for i in picks])).to(self.device)
        rounds = Batch(real_img, real_c, z, c, self.cur_nimg).split(self.config.batch_gpu or n)
        phase.optimizer.zero_grad(set_to_none=True)
        phase.module.requires_grad_(True)
        for batch in rounds:
            for loss in phase.losses(batch):
                value = loss.value.mean()
                self._check_finite(phase, value)
                (value * (phase.gain / len(rounds))).backward()
                for name, stat in loss.stats.items():
                    self.stats.report(name, stat)
                    if name == "Loss/signs/real":
                        self.ada_stats.report(name, stat)
        phase.module.requires_grad_(False)
        for parameter in phase.module.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        phase.optimizer.step()

    def _check_finite(self, phase: Phase, value: torch.Tensor) -> None:
        if not torch.isfinite(value):
            good = self.last_checkpoint or "none was written yet"
            raise LossNotFiniteError(
                f"phase {phase.name}, iteration {self.batch_idx} ({self.cur_nimg} images): expected a finite loss, got {value.item()}. "
                f"Last good checkpoint: {good}. Resume from it with a lower learning rate."
            )

    @torch.no_grad()
    def _update_ema(self) -> None:
        config, G, G_ema = self.config, self.nets.G, self.nets.G_ema
        half_life = config.ema_kimg * 1000
        if config.ema_rampup is not None:
            half_life = min(half_life, self.cur_nimg * config.ema_rampup)
        beta = 0.5 ** (config.batch / max(half_life, 1e-8))
        for average, current in zip(G_ema.parameters(), G.parameters(), strict=True):
            average.copy_(current.lerp(average, beta))
        for average, current in zip(G_ema.buffers(), G.buffers(), strict=True):
            average.copy_(current)
        G_ema.neural_rendering_resolution = G.neural_rendering_resolution
        G_ema.rendering_kwargs = copy.copy(G.rendering_kwargs)

    def _update_ada(self) -> None:
        config, pipe = self.config, self.augment_pipe
        if pipe is None or config.ada_target is None or self.batch_idx % config.ada_interval:
            return
        mean = self.ada_stats.mean("Loss/signs/real")
        self.ada_stats.flush()
        if mean is not None:
            step = math.copysign(1, mean - config.ada_target) if mean != config.ada_target else 0.0
            step *= config.batch * config.ada_interval / (config.ada_kimg * 1000)
            pipe.p.copy_((pipe.p + step).clamp_min(0))

    # The whole run.

    def run(self) -> None:
        """Train to `total_kimg`, writing status lines, stats.jsonl, image grids, snapshots and checkpoints into run_dir."""
        config = self.config
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._grid = self._fixed_grid()
        if self.cur_nimg == 0:
            reals = np.stack([self.dataset[i][0] for i in range(min(len(self.dataset), self._grid[0].shape[0]))])
            save_grid(reals, (0, 255), config.grid[0], self.run_dir / "reals.png")
            save_fakes(self.nets.G_ema, *self._grid, config.grid[0], self.run_dir, "_init")
        seed = derive_seed(config.seed, "reals") % 2**32
        self._sampler = iter(InfiniteSampler(self.dataset, seed=seed, start_index=self.cur_nimg))
        self.start_nimg, self.start_time = self.cur_nimg, time.time()
        total = round(config.total_kimg * 1000)
        next_tick = self.cur_nimg + round(config.kimg_per_tick * 1000)
        while self.cur_nimg < total:
            self.step()
            if self.cur_nimg >= min(next_tick, total):
                next_tick = self.cur_nimg + round(config.kimg_per_tick * 1000)
                self._tick(done=self.cur_nimg >= total)

    def _tick(self, done: bool) -> None:
        config = self.config
        self.cur_tick += 1
        stats = self.stats.flush()
        if self.augment_pipe is not None:
            stats["Progress/augment"] = {"num": 1, "mean": float(self.augment_pipe.p), "std": 0.0}
        extra = self.on_tick(self, stats) if self.on_tick is not None else {}
        self._write_stats(stats)
        self._print_status(extra)
        if done or (config.snapshot_ticks and self.cur_tick % config.snapshot_ticks == 0):
            tag = f"{self.cur_nimg // 1000:06d}"
            save_fakes(self.nets.G_ema, *self._grid, config.grid[0], self.run_dir, tag)
            self.nets.cur_nimg = self.cur_nimg
            networks.save(self.run_dir / f"network-snapshot-{tag}.safetensors", self.nets)
        if done or self.cur_tick % config.checkpoint_ticks == 0:
            self.last_checkpoint = self.save_checkpoint()

    def _fixed_grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        count = self.config.grid[0] * self.config.grid[1]
        z = np.random.RandomState(self.config.seed).randn(count, self.nets.G.z_dim).astype(np.float32)
        c = np.stack([self.dataset.get_label(i % len(self.dataset)) for i in range(count)])
        return torch.from_numpy(z).to(self.device), torch.from_numpy(c).to(self.device)

    def _write_stats(self, stats: dict) -> None:
        line = {"tick": self.cur_tick, "nimg": self.cur_nimg, **stats}
        with open(self.run_dir / "stats.jsonl", "a") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
        self.stats_lines += 1

    def _print_status(self, extra: dict[str, str]) -> None:
        elapsed = time.time() - self.start_time
        rate = elapsed / max((self.cur_nimg - self.start_nimg) / 1000, 1e-9)
        eta = rate * max(self.config.total_kimg - self.cur_nimg / 1000, 0)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        fields = {
            "tick": f"{self.cur_tick:<5d}", "kimg": f"{self.cur_nimg / 1000:<8.2f}", "time": f"{format_time(elapsed):<12s}",
            "sec/kimg": f"{rate:<7.1f}", "eta": f"{format_time(eta):<12s}", "mem_gb": f"{memory:<5.2f}", **extra,
        }
        if self.augment_pipe is not None:
            fields["augment"] = f"{float(self.augment_pipe.p):.3f}"
        print(" ".join(f"{k} {v}" for k, v in fields.items()), flush=True)
        with open(self.run_dir / "timing.jsonl", "a") as file:
            record = {"tick": self.cur_tick, "nimg": self.cur_nimg, "seconds": elapsed, "sec_per_kimg": rate, "mem_gb": memory}
            file.write(json.dumps(record) + "\n")

    # Checkpoints.

    def _modules(self) -> dict[str, torch.nn.Module]:
        modules = {"G": self.nets.G, "D": self.nets.D, "G_ema": self.nets.G_ema}
        if self.augment_pipe is not None:
            modules["augment"] = self.augment_pipe
        modules.update({f"phase_{p.name}": p.state for p in self.phases if p.state is not None})
        return modules

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        found: dict[str, torch.optim.Optimizer] = {}
        for phase in self.phases:
            name = f"optim_{phase.name}" if phase.own_optimizer else f"optim_{phase.name[0]}"
            assert found.setdefault(name, phase.optimizer) is phase.optimizer, f"{phase.name}: another {name}; set own_optimizer"
        return found

    def save_checkpoint(self) -> Path:
        """Write the resumable state of this moment."""
        tensors = {f"{name}.{k}": v for name, m in self._modules().items() for k, v in m.state_dict().items()}
        for name, optimizer in self._optimizers().items():
            tensors.update(checkpoint.optimizer_tensors(name, optimizer))
        meta = {
            "cur_nimg": self.cur_nimg, "batch_idx": self.batch_idx, "cur_tick": self.cur_tick, "stats_lines": self.stats_lines,
            "stats": self.stats.state(), "ada_stats": self.ada_stats.state(), "options": self.options,
            "neural_rendering_resolution": self.nets.G.neural_rendering_resolution,
        }
        return checkpoint.write(self.run_dir, self.cur_nimg, tensors, meta)

    def resume(self, source: Path, fall_back: bool = False) -> None:
        """Continue exactly where a checkpoint of this run was written; later lines of stats.jsonl are dropped."""
        tensors, meta, path = checkpoint.read(source, fall_back)
        for name, module in self._modules().items():
            part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            networks.storage.load_strict(module, part, f"{path} ({name})")
        for name, optimizer in self._optimizers().items():
            checkpoint.restore_optimizer(name, optimizer, tensors)
        self.cur_nimg, self.batch_idx, self.cur_tick = meta["cur_nimg"], meta["batch_idx"], meta["cur_tick"]
        self.stats.restore(meta["stats"])
        self.ada_stats.restore(meta["ada_stats"])
        for G in (self.nets.G, self.nets.G_ema):
            G.neural_rendering_resolution = meta["neural_rendering_resolution"]
        self.stats_lines, self.last_checkpoint = meta["stats_lines"], path
        networks.storage.remove_temporaries(self.run_dir)
        stats_file = self.run_dir / "stats.jsonl"
        if stats_file.exists():
            lines = stats_file.read_text().splitlines(keepends=True)[: self.stats_lines]
            networks.storage.write_atomic(stats_file, "".join(lines).encode())
        print(f"Resumed from {path} at {self.cur_nimg} images.", file=sys.stderr)


def format_time(seconds: float) -> str:
    """'1h 02m 03s', '2m 03s' or '3s'."""
    s = int(seconds)
    if s >= 3600:
        return f"{s // 3600}h {s // 60 % 60:02d}m {s % 60:02d}s"
    return f"{s // 60}m {s % 60:02d}s" if s >= 60 else f"{s}s"
