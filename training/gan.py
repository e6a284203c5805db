"""Subject of the training loop for GANs: networks, real images, batches, G_ema, augmentation, snapshots.

G_ema is the exponential moving average of G's weights. Adaptive augmentation (ADA, Karras et al. 2020,
"Training generative adversarial networks with limited data") adjusts its probability p from the signs of D on
real images.

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
    """Check the settings that depend on the networks and on the number of processes.

    Raises: ValueError naming the flag.
    """
    batch = loop.batch
    part = loop.batch_gpu
    std = nets.D.b4.mbstd
    module = nets.G.superresolution
    if batch % (world * (part or 1)):
        raise ValueError(
            f"--batch: expected a multiple of {world} processes x --batch-gpu={part or 1}, got {batch}."
            " Change --batch or --batch-gpu."
        )
    size = part or batch // world  # images per forward pass
    group = min(std.group_size or size, size) if std is not None else 1
    if size % group:
        flag = "--batch-gpu" if part else "--batch"
        raise ValueError(
            f"{flag}: expected a multiple of {group}, the group size of D's minibatch-std layer, got"
            f" {size}. Change {flag} or --mbstd-group."
        )
    conditioned = not nets.G.rendering_kwargs["c_gen_conditioning_zero"]
    if conditioned != config.gen_pose_cond:
        kind = "is conditioned on the camera" if conditioned else "ignores the camera"
        raise ValueError(
            f"--gen-pose-cond: expected {conditioned}, since this generator {kind}, got"
            f" {config.gen_pose_cond}. Leave the option out."
        )
    rendered = max(config.nrr_initial, config.nrr_final or 0)
    if module.only_enlarges and rendered > module.input_resolution:
        limit = f"at most {module.input_resolution} pixels for {type(module).__name__}"
        raise ValueError(
            f"--nrr-initial, --nrr-final: expected {limit}, got {rendered}. Lower both to that resolution."
        )


def save_grid(
    images: np.ndarray | torch.Tensor, value_range: tuple[float, float], columns: int, path: str | Path
) -> None:
    """Write images as one PNG.

    Args:
        images: [N, C, H, W], C = 1 or 3.
        value_range: values that become black and white.
        columns: images per row.
    """
    x = np.asarray(images.detach().cpu() if isinstance(images, torch.Tensor) else images, dtype=np.float32)
    low, high = value_range
    # A constant image has high == low; the smallest divisor keeps the result finite.
    x = np.clip(np.rint((x - low) * (255 / max(high - low, 1e-12))), 0, 255).astype(np.uint8)
    n, c, h, w = x.shape
    rows = -(-n // columns)  # rounded up
    canvas = np.full([rows * columns, c, h, w], 255, dtype=np.uint8)  # white where the last row has no image
    canvas[:n] = x
    # Grid of images [rows, columns, C, H, W] to one image [rows * H, columns * W, C].
    canvas = canvas.reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    PIL.Image.fromarray(canvas[:, :, 0] if c == 1 else canvas).save(path)


class Gan:
    """A generator, its discriminator and their data, as the subject of `training.loop.TrainingLoop`.

    Args:
        nets: G, D and G_ema.
        dataset: real images.
        config: settings of the adversarial training.
        loop: batch size and seed.
        augment_pipe: ADA module with buffer p, or None.
        ranks: this process among the processes of the run.
        workers: number of processes that decode images in advance. 0: decode in this process.
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
        # The module whose forward passes change its buffers (w_avg of the mapping network).
        self.moving: torch.nn.Module = nets.G
        self.ada_stats = Collector()
        self.collectors = {"ada_stats": self.ada_stats}
        # Images [N, C, H, W] in [-1, 1] and labels [N, K] of the next iteration, this rank's rows.
        self._fetched: tuple[torch.Tensor, torch.Tensor] | None = None

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return the modules that a checkpoint holds, by name."""
        pipe = {} if self.augment_pipe is None else {"augment": self.augment_pipe}
        return {"G": self.nets.G, "D": self.nets.D, "G_ema": self.nets.G_ema, **pipe}

    def meta(self) -> dict:
        """Return what a checkpoint holds besides modules, as JSON."""
        return {"neural_rendering_resolution": self.nets.G.neural_rendering_resolution}

    def restore(self, meta: dict) -> None:
        """Restore what `meta` returned."""
        for G in (self.nets.G, self.nets.G_ema):
            G.neural_rendering_resolution = meta["neural_rendering_resolution"]

    # Data.

    def begin(self, cur_nimg: int, folder: Path | None = None) -> None:
        """Start the stream of real images after the first `cur_nimg` of them.

        Args:
            folder: run folder, on the rank that writes. There, a new run gets reals.png and fakes_init.png.
        """
        # The order of real images depends on the seed alone and is continued at cur_nimg, so a resumed run
        # sees the images that an uninterrupted one would have seen.
        seed = derive_seed(self.loop.seed, "reals") % 2**32
        order = iter(
            InfiniteSampler(self.dataset, self.ranks.rank, self.ranks.world, seed=seed, start_index=cur_nimg)
        )
        self._batches = read_batches(self.dataset, order, self.loop.batch // self.ranks.world, self.workers)
        if folder is None:
            return
        columns, rows = self.config.grid
        # EG3D fixes the latents and labels of the grid for the whole run, so that snapshots can be compared.
        z = (
            np.random.RandomState(self.loop.seed)
            .randn(columns * rows, self.nets.G_ema.z_dim)
            .astype(np.float32)
        )
        # Labels of the first images; they repeat where the set has fewer than the grid.
        c = np.stack([self.dataset.get_label(i % len(self.dataset)) for i in range(columns * rows)])
        self._grid = torch.from_numpy(z).to(self.device), torch.from_numpy(c).to(self.device)
        if cur_nimg == 0:
            reals = np.stack([self.dataset[i][0] for i in range(min(len(self.dataset), columns * rows))])
            save_grid(reals, (0, 255), columns, folder / "reals.png")
            self._fakes(folder, "_init")

    def fetch(self) -> None:
        """Take images and labels of this rank's rows of the next batch.

        Raises: ValueError, OSError if the data cannot be read.
        """
        images, labels = map(self._moved, next(self._batches))
        self._fetched = images.to(torch.float32).div_(127.5).sub_(1), labels  # [0, 255] -> [-1, 1]

    def _moved(self, x: np.ndarray) -> torch.Tensor:
        """Move an array to the device. CUDA copies from pinned memory without blocking this process."""
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
        """Return a function that takes a round, seeds torch and returns that round's rows of the batch."""
        seed = derive_seed(self.loop.seed, cur_nimg, phase)
        layout = self.layout
        # Cameras of generated images: those of random training images.
        picks = np.random.RandomState(seed % 2**32).randint(len(self.dataset), size=self.loop.batch)
        # [N, K]
        c = torch.from_numpy(np.stack([self.dataset.get_label(int(i)) for i in picks])).to(self.device)
        # Rolled over the whole batch, before it is divided: a
        # round's swapped cameras may come from another round.
        swap_c = torch.roll(c, 1, 0)

        def rows(turn: int) -> Batch:
            """Seed torch and return the rows of this rank's round `turn`."""
            # Every round samples the latents of the whole batch and keeps its rows. The random numbers that
            # follow in the losses then continue from the same state in every round.
            torch.manual_seed(seed)
            z = torch.randn([self.loop.batch, self.nets.G.z_dim], device=self.device)
            assert self._fetched is not None
            # `_fetched` holds this rank's rows only, so its rounds are strided by the rank's number of
            # rounds. The other tensors hold the whole batch and are strided over all ranks.
            real, real_c = (x[turn :: layout.here].contiguous() for x in self._fetched)
            gen_z, gen_c, other_c = (x[layout.rows(turn)].contiguous() for x in (z, c, swap_c))
            return Batch(
                real, real_c, gen_z, gen_c, cur_nimg, other_c, range(layout.batch)[layout.rows(turn)]
            )

        return rows

    # After an iteration.

    def observe(self, name: str, values: torch.Tensor) -> None:
        """Receive a statistic of a phase. ADA uses D's signs on real images."""
        if name == "Loss/signs/real":
            self.ada_stats.report(name, values)

    def after_step(self, cur_nimg: int, batch_idx: int) -> None:
        """Update G_ema and, at its interval, the augmentation probability.

        Args:
            cur_nimg: number of images before this iteration.
            batch_idx: number of iterations, this one included.
        """
        self._update_ema(cur_nimg)
        config = self.config
        pipe = self.augment_pipe
        if pipe is None or config.aug != "ada" or batch_idx % config.ada_interval:
            return
        mean = self.ada_stats.mean("Loss/signs/real", self.ranks.sum_)
        self.ada_stats.flush()
        if mean is not None:
            # p rises while D is more certain of real images than the target, and falls otherwise. A change
            # from 0 to 1 takes ada_kimg thousand images.
            step = math.copysign(1, mean - config.target) if mean != config.target else 0.0
            step *= self.loop.batch * config.ada_interval / (config.ada_kimg * 1000)
            pipe.p.copy_((pipe.p + step).clamp_min(0))

    @torch.no_grad()
    def _update_ema(self, cur_nimg: int) -> None:
        """Move G_ema towards G. Parameters are averaged, buffers are copied."""
        config = self.config
        G = self.nets.G
        G_ema = self.nets.G_ema
        half_life = config.ema_kimg * 1000  # images
        if config.ema_rampup is not None:
            # At the start of a run the average must not be dominated by the random initial weights.
            half_life = min(half_life, cur_nimg * config.ema_rampup)
        # With ema_rampup the half-life is 0 in the first iteration, so beta is 0 and G_ema becomes G.
        beta = 0.5 ** (self.loop.batch / max(half_life, 1e-8))
        for average, current in zip(G_ema.parameters(), G.parameters(), strict=True):
            average.copy_(current.lerp(average, beta))
        for average, current in zip(G_ema.buffers(), G.buffers(), strict=True):
            average.copy_(current)
        # Plain attributes, which neither parameters() nor buffers() includes.
        G_ema.neural_rendering_resolution = G.neural_rendering_resolution
        G_ema.rendering_kwargs = copy.copy(G.rendering_kwargs)

    # Files.

    def report(self, stats: dict) -> dict[str, str]:
        """Add the augmentation probability to a tick's statistics and return fields for the status line."""
        if self.augment_pipe is None:
            return {}
        p = float(self.augment_pipe.p)
        stats["Progress/augment"] = {"num": 1, "mean": p, "std": 0.0}
        return {"augment": f"{p:.3f}"}

    def snapshot(self, folder: Path, cur_nimg: int) -> None:
        """Write images of the fixed latents, and the networks."""
        tag = self.loop.tag(cur_nimg)
        self._fakes(folder, tag)
        self.nets.cur_nimg = cur_nimg
        networks.save(folder / f"network-snapshot-{tag}.safetensors", self.nets)

    @torch.no_grad()
    def _fakes(self, folder: Path, tag: str) -> None:
        """Write fakes<tag>.png, fakes<tag>_raw.png and fakes<tag>_depth.png (near is bright).

        The noise inputs of G are constant, so that snapshots differ by the weights alone.
        """
        # Eight at a time, to bound the memory.
        parts = [
            self.nets.G_ema(z=z, c=c, noise_mode="const")
            for z, c in zip(*(x.split(8) for x in self._grid), strict=True)
        ]
        for name, end in (("image", ""), ("image_raw", "_raw"), ("image_depth", "_depth")):
            x = torch.cat([part[name].cpu() for part in parts])
            x, span = (x, (-1, 1)) if end != "_depth" else (-x, (float(-x.max()), float(-x.min())))
            save_grid(x, span, self.config.grid[0], folder / f"fakes{tag}{end}.png")
