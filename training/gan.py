"""What the loop trains where it trains a GAN: networks, real images, batches, moving average, augmentation
strength, snapshots.

Letters: N batch, Z z_dim, K c_dim, C channels, H x W pixels.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from torch_utils.training_stats import Collector
from training import networks
from training.config import GanConfig, LoopConfig
from training.dataset import ImageFolderDataset, InfiniteSampler, read_batches
from training.distributed import SINGLE, Ranks
from training.gan_phases import Batch
from training.phases import Layout, derive_seed


def check_fit(nets: networks.Networks, config: GanConfig, loop: LoopConfig, world: int = 1) -> None:
    """Settings that only the networks and the number of processes can judge.

    Raises: ValueError naming the flag.
    """
    batch = loop.batch
    part = loop.batch_gpu
    std = nets.D.b4.mbstd
    module = nets.G.superresolution
    if batch % (world * (part or 1)):
        raise ValueError(
            f"--batch: expected a multiple of {world} processes x --batch-gpu={part or 1}, got {batch}."
            " Change one of them."
        )
    size = part or batch // world
    group = min(std.group_size or size, size) if std is not None else 1
    if size % group:
        flag = "--batch-gpu" if part else "--batch"
        raise ValueError(
            f"{flag}: expected a multiple of D's minibatch-std group of {group}, got {size}. Change it or"
            " --mbstd-group."
        )
    conditioned = not nets.G.rendering_kwargs["c_gen_conditioning_zero"]
    if conditioned != config.gen_pose_cond:
        kind = "conditioned on the camera" if conditioned else "that ignores the camera"
        raise ValueError(
            f"--gen-pose-cond: expected {conditioned} for a generator {kind}, got {config.gen_pose_cond}."
            " Leave it out."
        )
    rendered = max(config.nrr_initial, config.nrr_final or 0)
    if module.only_enlarges and rendered > module.input_resolution:
        wanted = f"at most {module.input_resolution} pixels for {type(module).__name__}"
        raise ValueError(f"--nrr-initial, --nrr-final: expected {wanted}, got {rendered}. Lower them.")


def save_grid(
    images: np.ndarray | torch.Tensor, value_range: tuple[float, float], columns: int, path: str | Path
) -> None:
    """Write images [N, C, H, W] (C 1 or 3) as one PNG, `columns` to a row; `value_range` maps to black and
    white.
    """
    x = np.asarray(images.detach().cpu() if isinstance(images, torch.Tensor) else images, dtype=np.float32)
    low, high = value_range
    x = np.clip(np.rint((x - low) * (255 / max(high - low, 1e-12))), 0, 255).astype(np.uint8)
    n, c, h, w = x.shape
    rows = -(-n // columns)
    canvas = np.full([rows * columns, c, h, w], 255, dtype=np.uint8)
    canvas[:n] = x
    canvas = canvas.reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    PIL.Image.fromarray(canvas[:, :, 0] if c == 1 else canvas).save(path)


class Gan:
    """A generator, its discriminator and their data, as the subject of `training.loop.TrainingLoop`.

    Args:
        nets: G, D and G_ema; dataset: real images; config: of the game; loop: batch and seed.
        augment_pipe: ADA module with buffer p, or None; workers: processes that decode images ahead, 0: this
            one.
    """

    def __init__(
        self,
        nets: networks.Networks,
        dataset: ImageFolderDataset,
        config: GanConfig,
        loop: LoopConfig,
        *,
        augment_pipe: Any = None,
        ranks: Ranks = SINGLE,
        workers: int = 0,
    ):
        assert nets.G is not None and nets.D is not None
        self.nets = nets
        self.dataset = dataset
        self.config = config
        self.loop = loop
        self.augment_pipe = augment_pipe
        self.ranks = ranks
        self.workers = workers
        self.device = next(nets.G.parameters()).device
        self.layout = Layout(loop.batch, ranks, loop.batch_gpu)
        self.moving: torch.nn.Module = nets.G  # its w_avg moves in forward passes
        self.ada_stats = Collector()
        self.collectors = {"ada_stats": self.ada_stats}
        self._fetched: tuple[torch.Tensor, torch.Tensor] | None = None  # images of the next iteration

    def modules(self) -> dict[str, torch.nn.Module]:
        """What a checkpoint holds, by name."""
        pipe = {} if self.augment_pipe is None else {"augment": self.augment_pipe}
        return {"G": self.nets.G, "D": self.nets.D, "G_ema": self.nets.G_ema, **pipe}

    def meta(self) -> dict:
        """What else it holds, as JSON."""
        return {"neural_rendering_resolution": self.nets.G.neural_rendering_resolution}

    def restore(self, meta: dict) -> None:
        """Inverse of `meta`."""
        for G in (self.nets.G, self.nets.G_ema):
            G.neural_rendering_resolution = meta["neural_rendering_resolution"]

    # Data.

    def begin(self, cur_nimg: int, folder: Path | None = None) -> None:
        """Start the stream of images after `cur_nimg` of them; in `folder`, on the rank that writes, show the
        start of a new run.
        """
        seed = derive_seed(self.loop.seed, "reals") % 2**32
        order = iter(
            InfiniteSampler(self.dataset, self.ranks.rank, self.ranks.world, seed=seed, start_index=cur_nimg)
        )
        self._batches = read_batches(self.dataset, order, self.loop.batch // self.ranks.world, self.workers)
        if folder is None:
            return
        columns, rows = self.config.grid
        z = (
            np.random.RandomState(self.loop.seed)
            .randn(columns * rows, self.nets.G_ema.z_dim)
            .astype(np.float32)
        )
        c = np.stack([self.dataset.get_label(i % len(self.dataset)) for i in range(columns * rows)])
        self._grid = torch.from_numpy(z).to(self.device), torch.from_numpy(c).to(self.device)
        if cur_nimg == 0:
            reals = np.stack([self.dataset[i][0] for i in range(min(len(self.dataset), columns * rows))])
            save_grid(reals, (0, 255), columns, folder / "reals.png")
            self._fakes(folder, "_init")

    def fetch(self) -> None:
        """Take images and labels of this rank's rows of the next batch. Raises: ValueError, OSError."""
        images, labels = map(self._moved, next(self._batches))
        self._fetched = images.to(torch.float32).div_(127.5).sub_(1), labels

    def _moved(self, x: np.ndarray) -> torch.Tensor:
        """On the device; CUDA copies from pinned memory, while this process goes on."""
        tensor = torch.from_numpy(x)
        return (
            tensor.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tensor.to(self.device)
        )

    def end(self) -> None:
        """End the processes that read images."""
        self._batches.close()

    def batch_for(self, phase: str, cur_nimg: int) -> Callable[[int], Batch]:
        """The batch of a phase: a function of the round that seeds torch and gives the round's rows."""
        seed = derive_seed(self.loop.seed, cur_nimg, phase)
        layout = self.layout
        picks = np.random.RandomState(seed % 2**32).randint(len(self.dataset), size=self.loop.batch)
        # [N, K]
        c = torch.from_numpy(np.stack([self.dataset.get_label(int(i)) for i in picks])).to(self.device)
        swap_c = torch.roll(c, 1, 0)

        def rows(turn: int) -> Batch:
            torch.manual_seed(seed)  # every round draws what follows the latents of the whole batch
            z = torch.randn([self.loop.batch, self.nets.G.z_dim], device=self.device)
            assert self._fetched is not None
            # of the rows that this rank has
            real, real_c = (x[turn :: layout.here].contiguous() for x in self._fetched)
            gen_z, gen_c, other_c = (x[layout.rows(turn)].contiguous() for x in (z, c, swap_c))
            return Batch(
                real, real_c, gen_z, gen_c, cur_nimg, other_c, range(layout.batch)[layout.rows(turn)]
            )

        return rows

    # After an iteration.

    def observe(self, name: str, values: torch.Tensor) -> None:
        """A statistic of a phase: ADA follows D's signs on real images."""
        if name == "Loss/signs/real":
            self.ada_stats.report(name, values)

    def after_step(self, cur_nimg: int, batch_idx: int) -> None:
        """Move the average and, in its turn, the augmentation.

        Args: images before the iteration; iterations with it.
        """
        self._update_ema(cur_nimg)
        config = self.config
        pipe = self.augment_pipe
        if pipe is None or config.aug != "ada" or batch_idx % config.ada_interval:
            return
        mean = self.ada_stats.mean("Loss/signs/real", self.ranks.sum_)
        self.ada_stats.flush()
        if mean is not None:
            step = math.copysign(1, mean - config.target) if mean != config.target else 0.0
            step *= self.loop.batch * config.ada_interval / (config.ada_kimg * 1000)
            pipe.p.copy_((pipe.p + step).clamp_min(0))

    @torch.no_grad()
    def _update_ema(self, cur_nimg: int) -> None:
        config = self.config
        G = self.nets.G
        G_ema = self.nets.G_ema
        half_life = config.ema_kimg * 1000
        if config.ema_rampup is not None:
            half_life = min(half_life, cur_nimg * config.ema_rampup)
        beta = 0.5 ** (self.loop.batch / max(half_life, 1e-8))
        for average, current in zip(G_ema.parameters(), G.parameters(), strict=True):
            average.copy_(current.lerp(average, beta))
        for average, current in zip(G_ema.buffers(), G.buffers(), strict=True):
            average.copy_(current)
        G_ema.neural_rendering_resolution = G.neural_rendering_resolution
        G_ema.rendering_kwargs = copy.copy(G.rendering_kwargs)

    # Files.

    def report(self, stats: dict) -> dict[str, str]:
        """Add to a tick's statistics; returns fields for the status line."""
        if self.augment_pipe is None:
            return {}
        p = float(self.augment_pipe.p)
        stats["Progress/augment"] = {"num": 1, "mean": p, "std": 0.0}
        return {"augment": f"{p:.3f}"}

    def snapshot(self, folder: Path, cur_nimg: int) -> None:
        """Pictures of the fixed latents, and the networks."""
        tag = self.loop.tag(cur_nimg)
        self._fakes(folder, tag)
        self.nets.cur_nimg = cur_nimg
        networks.save(folder / f"network-snapshot-{tag}.safetensors", self.nets)

    @torch.no_grad()
    def _fakes(self, folder: Path, tag: str) -> None:
        """fakes<tag>.png, fakes<tag>_raw.png and fakes<tag>_depth.png (near is bright),
        with constant noise.
        """
        parts = [
            self.nets.G_ema(z=z, c=c, noise_mode="const")
            for z, c in zip(*(x.split(8) for x in self._grid), strict=True)
        ]
        for name, end in (("image", ""), ("image_raw", "_raw"), ("image_depth", "_depth")):
            x = torch.cat([part[name].cpu() for part in parts])
            x, span = (x, (-1, 1)) if end != "_depth" else (-x, (float(-x.max()), float(-x.min())))
            save_grid(x, span, self.config.grid[0], folder / f"fakes{tag}{end}.png")
