"""The training loop: phases in order, moving average, ticks, snapshots, checkpoints. Knows nothing of rewards.

Random numbers derive from (seed, images seen, phase name, place in the batch) alone, so that a resumed run matches an uninterrupted one, a
further phase changes no draw of the others, and neither ranks nor accumulation rounds change what a sample meets.

Shapes: N batch, Z z_dim, K c_dim.
"""

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from torch_utils.training_stats import Collector
from training import checkpoint, networks, storage
from training.config import LoopConfig, snapshot_tag
from training.dataset import ImageFolderDataset
from training.distributed import SINGLE, Ranks
from training.gan_phases import Batch
from training.phases import LossNotFiniteError, Phase, derive_seed, gan_phases, lazy_adam  # noqa: F401 (also found here)
from training.records import Records, format_time  # noqa: F401 (format_time: also found here)
from training.rounds import GradientSum, Layout, MovingAverages, sum_over_ranks
from training.sampler import InfiniteSampler
from training.signals import StopRequest


class TrainingLoop:
    """Runs phases on one device, alone or as one of several ranks.

    Args:
        nets: G, D and G_ema; dataset: real images; phases: in the order in which they run; config: loop settings.
        run_dir: where everything is written; options: the resolved configuration, stored in checkpoints.
        augment_pipe: ADA module with buffer p, or None.
        on_tick: called once per tick, on rank 0, with (loop, stats); returns fields to add to the status line.
        ranks: this process among those of the run; all build the same loop.
    """

    def __init__(
        self, nets: networks.Networks, dataset: ImageFolderDataset, phases: list[Phase], config: LoopConfig, run_dir: Path, *,
        options: dict | None = None, augment_pipe: torch.nn.Module | None = None,
        on_tick: Callable[["TrainingLoop", dict], dict[str, str]] | None = None, ranks: Ranks = SINGLE,
    ):
        self.nets, self.dataset, self.phases, self.config, self.run_dir = nets, dataset, phases, config, run_dir
        self.options, self.augment_pipe, self.on_tick, self.ranks = options or {}, augment_pipe, on_tick, ranks
        self.device = next(nets.G.parameters()).device
        self.layout = Layout(config.batch, ranks, config.batch_gpu)
        self.records = Records(run_dir, config, dataset)
        self.cur_nimg, self.batch_idx, self.cur_tick = 0, 0, 0
        self.next_tick: int | None = None  # images at which the tick under way ends
        self.stats, self.ada_stats = Collector(), Collector()
        self.last_checkpoint: Path | None = None
        self.stopped: str | None = None  # name of the signal that ended the run early
        self._fetched: tuple[torch.Tensor, torch.Tensor] | None = None  # images of the next iteration

    @property
    def stats_lines(self) -> int:
        """Lines of stats.jsonl so far."""
        return self.records.lines

    # One iteration.

    def step(self) -> None:
        """Run every phase that is due, then the moving average and the augmentation heuristic."""
        real_img, real_c = self._fetched or self._fetch_real()
        self._fetched = None
        for phase in self.phases:
            if self.batch_idx % phase.interval == 0:
                self._run_phase(phase, real_img, real_c)
        self._update_ema()
        self.cur_nimg += self.config.batch
        self.batch_idx += 1
        self._update_ada()

    def _fetch_real(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of this rank's rows of the batch."""
        items = [self.dataset[next(self._sampler)] for _ in range(self.config.batch // self.ranks.world)]
        images = torch.from_numpy(np.stack([image for image, _ in items])).to(self.device).to(torch.float32) / 127.5 - 1
        return images, torch.from_numpy(np.stack([label for _, label in items])).to(self.device)

    def _latents(self, seed: int) -> torch.Tensor:
        """Seed everything; z [N, Z] of the whole batch."""
        torch.manual_seed(seed)
        return torch.randn([self.config.batch, self.nets.G.z_dim], device=self.device)

    def _run_phase(self, phase: Phase, real_img: torch.Tensor, real_c: torch.Tensor) -> None:
        seed, layout = derive_seed(self.config.seed, self.cur_nimg, phase.name), self.layout
        picks = np.random.RandomState(seed % 2**32).randint(len(self.dataset), size=self.config.batch)
        c = torch.from_numpy(np.stack([self.dataset.get_label(int(i)) for i in picks])).to(self.device)
        swap_c = torch.roll(c, 1, 0)
        averages, gradients = MovingAverages(self.nets.G, layout.total), GradientSum(phase.module.parameters(), layout.here)
        bad = torch.zeros(1, device=self.device)
        phase.optimizer.zero_grad(set_to_none=True)
        phase.module.requires_grad_(True)
        for turn in range(layout.here):
            z = self._latents(seed)  # every round draws what follows the latents of the whole batch
            real = (x[layout.local_rows(turn)].contiguous() for x in (real_img, real_c))
            gen_z, gen_c, other_c = (x[layout.rows(turn)].contiguous() for x in (z, c, swap_c))
            with layout.draws(turn):
                self._backward(phase, Batch(*real, gen_z, gen_c, self.cur_nimg, other_c), bad)
            averages.end_round()
            gradients.end_round()
        gradients.finish()
        phase.module.requires_grad_(False)
        sum_over_ranks(self.ranks, phase.module.parameters(), [*averages.steps, bad])
        averages.finish()
        if self.ranks.world > 1 and bad:
            raise self._not_finite(phase, "one on another rank that is not")
        for parameter in phase.module.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        phase.optimizer.step()

    def _backward(self, phase: Phase, batch: Batch, bad: torch.Tensor) -> None:
        """Add the gradients of one round; a loss that is not finite is noted in `bad`, or an error where no other rank waits."""
        for loss in phase.losses(batch):
            value = loss.value.mean()
            if not torch.isfinite(value):
                if self.ranks.world == 1:
                    raise self._not_finite(phase, str(value.item()))
                bad += 1
            (value * (phase.gain / self.layout.total)).backward()
            for name, stat in loss.stats.items():
                self.stats.report(name, stat)
                if name == "Loss/signs/real":
                    self.ada_stats.report(name, stat)

    def _not_finite(self, phase: Phase, got: str) -> LossNotFiniteError:
        good = self.last_checkpoint or "none was written yet"
        return LossNotFiniteError(
            f"phase {phase.name}, iteration {self.batch_idx} ({self.cur_nimg} images): expected a finite loss, got {got}. "
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
        mean = self.ada_stats.mean("Loss/signs/real", self.ranks.sum_)
        self.ada_stats.flush()
        if mean is not None:
            step = math.copysign(1, mean - config.ada_target) if mean != config.ada_target else 0.0
            step *= config.batch * config.ada_interval / (config.ada_kimg * 1000)
            pipe.p.copy_((pipe.p + step).clamp_min(0))

    # The whole run.

    def run(self) -> None:
        """Train to `total_kimg`, writing status lines, stats.jsonl, image grids, snapshots and checkpoints into run_dir.

        SIGTERM and SIGINT end it after the current iteration, with a checkpoint; `stopped` then names the signal.
        Raises: ValueError where a loss or the data fail, OSError where the folder cannot be written; both name the last checkpoint.
        """
        config = self.config
        self.ranks.broadcast_(t for m in self._modules().values() for t in (*m.parameters(), *m.buffers()))
        if self.ranks.main:
            with self._writing():
                self.records.begin(self.nets.G_ema, self.cur_nimg)
        seed = derive_seed(config.seed, "reals") % 2**32
        sampler = InfiniteSampler(self.dataset, self.ranks.rank, self.ranks.world, seed=seed, start_index=self.cur_nimg)
        self._sampler = iter(sampler)
        total, interval = round(config.total_kimg * 1000), round(config.kimg_per_tick * 1000)
        self.next_tick = self.next_tick or self.cur_nimg + interval
        with StopRequest() as request:
            while self.cur_nimg < total:
                if not self._may_go_on(request):
                    return
                self.step()
                if self.cur_nimg >= min(self.next_tick, total):
                    self.next_tick = self.cur_nimg + interval
                    self._tick(done=self.cur_nimg >= total)

    def _may_go_on(self, request: StopRequest) -> bool:
        """Fetch the next images; False, after a checkpoint, where a rank was asked to stop, an error where one cannot read its data."""
        error = None
        try:
            self._fetched = self._fetch_real()
        except (ValueError, OSError) as caught:
            error = caught
        stop, failed = self.ranks.any(request.received is not None, error is not None)
        if not stop and not failed:
            return True
        with self._writing():
            self.last_checkpoint = self.save_checkpoint()
        if failed:
            cause = next(text for text in self.ranks.gather(None if error is None else str(error).strip()) if text is not None)
            raise ValueError(f"{cause} Stopped at {self.cur_nimg} images; continue with --resume={self.run_dir}.") from error
        self.stopped = next(name for name in self.ranks.gather(request.received) if name is not None)
        if self.ranks.main:
            print(f"{self.stopped}: stopped at {self.cur_nimg} images. Continue with --resume={self.run_dir}", flush=True)
        return False

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say, where the folder cannot be written, what is safe."""
        try:
            yield
        except OSError as error:
            good = f"Last good checkpoint: {self.last_checkpoint or 'none was written yet'}"
            cause = str(error).rstrip(".")
            raise OSError(f"run folder {self.run_dir}: expected to write into it, got: {cause}. {good}; continue with --resume.") from error

    def _tick(self, done: bool) -> None:
        config = self.config
        self.cur_tick += 1
        stats = self.stats.flush(self.ranks.sum_)
        with self._writing():
            if self.ranks.main:
                self._record(stats, snapshot=done or (config.snapshot_ticks > 0 and self.cur_tick % config.snapshot_ticks == 0))
            if done or self.cur_tick % config.checkpoint_ticks == 0:
                self.last_checkpoint = self.save_checkpoint()

    def _record(self, stats: dict, snapshot: bool) -> None:
        extra = {}
        if self.augment_pipe is not None:
            stats["Progress/augment"] = {"num": 1, "mean": float(self.augment_pipe.p), "std": 0.0}
            extra = {"augment": f"{float(self.augment_pipe.p):.3f}"}
        if self.on_tick is not None:
            extra = {**self.on_tick(self, stats), **extra}
        self.records.stats(self.cur_tick, self.cur_nimg, stats)
        self.records.status(self.cur_tick, self.cur_nimg, extra)
        if snapshot:
            tag = snapshot_tag(self.cur_nimg, self.config)
            self.records.fakes(self.nets.G_ema, tag)
            self.nets.cur_nimg = self.cur_nimg
            networks.save(self.run_dir / f"network-snapshot-{tag}.safetensors", self.nets)

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
        """Write the resumable state of this moment, on rank 0; all ranks take part. Returns its path."""
        every = self.ranks.gather({"stats": self.stats.state(), "ada_stats": self.ada_stats.state()})
        if not self.ranks.main:
            return checkpoint.path_of(self.run_dir, self.cur_nimg)
        tensors = {f"{name}.{k}": v for name, m in self._modules().items() for k, v in m.state_dict().items()}
        for name, optimizer in self._optimizers().items():
            tensors.update(checkpoint.optimizer_tensors(name, optimizer))
        meta = {
            "cur_nimg": self.cur_nimg, "batch_idx": self.batch_idx, "cur_tick": self.cur_tick, "stats_lines": self.stats_lines,
            "next_tick": self.next_tick, "rank_stats": every, "options": self.options,
            "neural_rendering_resolution": self.nets.G.neural_rendering_resolution,
        }
        return checkpoint.write(self.run_dir, self.cur_nimg, tensors, meta)

    def resume(self, source: Path, fall_back: bool = False) -> None:
        """Continue exactly where a checkpoint of this run was written; later lines of stats.jsonl are dropped. All ranks take part."""
        tensors, meta, path = checkpoint.read(source, fall_back) if self.ranks.main else (None, None, None)
        meta, path = self.ranks.broadcast(meta), Path(self.ranks.broadcast(str(path)))
        tensors = self.ranks.broadcast_named(tensors)
        for name, module in self._modules().items():
            part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            storage.load_strict(module, part, f"{path} ({name})")
        for name, optimizer in self._optimizers().items():
            checkpoint.restore_optimizer(name, optimizer, tensors)
        self.cur_nimg, self.batch_idx, self.cur_tick = meta["cur_nimg"], meta["batch_idx"], meta["cur_tick"]
        self.next_tick = meta.get("next_tick")  # files of earlier versions were written at ticks only
        self._restore_stats(meta)
        for G in (self.nets.G, self.nets.G_ema):
            G.neural_rendering_resolution = meta["neural_rendering_resolution"]
        self.records.lines, self.last_checkpoint = meta["stats_lines"], path
        if self.ranks.main:
            self._drop_later_lines()
            print(f"Resumed from {path} at {self.cur_nimg} images.", file=sys.stderr)

    def _restore_stats(self, meta: dict) -> None:
        """Each rank's own sums, so that the order of additions stays; another number of ranks shares those of the old ones."""
        every = meta.get("rank_stats") or [{name: meta[name] for name in ("stats", "ada_stats")}]  # earlier versions had one rank
        mine = every[self.ranks.rank :: self.ranks.world] or [{name: {} for name in ("stats", "ada_stats")}]
        for name, collector in (("stats", self.stats), ("ada_stats", self.ada_stats)):
            zero = {key: [0.0, 0.0, 0.0] for key in every[0][name]}
            for state in (one[name] for one in mine):
                zero = {key: [a + b for a, b in zip(value, state.get(key, [0.0] * 3), strict=True)] for key, value in zero.items()}
            collector.restore(zero)

    def _drop_later_lines(self) -> None:
        storage.remove_temporaries(self.run_dir)
        stats_file = self.run_dir / "stats.jsonl"
        if stats_file.exists():
            lines = stats_file.read_text(errors="replace").splitlines(keepends=True)[: self.stats_lines]
            storage.write_atomic(stats_file, "".join(lines).encode())

