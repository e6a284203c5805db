"""The GAN that the training loop trains: networks, real images, batches, G_ema, augmentation and snapshots.

G_ema is the exponential moving average of G's weights. Adaptive augmentation (ADA, Karras et al. 2020,
"Training generative adversarial networks with limited data") adjusts the augmentation probability p by the
signs of D's logits for real images.

Shapes: N is the number of images in a batch, Z is z_dim, K is c_dim, C is the number of channels, and an
image has H x W pixels.
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


def check_fit(nets: networks.Networks, config: GanConfig, loop: LoopConfig, process_count: int = 1) -> None:
    """Check the settings that have to fit the networks and the number of processes.

    Args:
        nets: networks that are trained.
        config: settings of adversarial training.
        loop: settings of the training loop.
        process_count: number of processes.
    Raises: ValueError, which names the flag, for a setting that does not fit.
    """
    batch = loop.batch
    batch_gpu = loop.batch_gpu
    minibatch_std_layer = nets.D.b4.mbstd
    superresolution = nets.G.superresolution
    if batch % (process_count * (batch_gpu or 1)):
        if batch_gpu is None:
            raise ValueError(
                f"--batch: expected a multiple of the number of processes, {process_count}, got {batch}. Use"
                " such a multiple."
            )
        raise ValueError(
            f"--batch: expected a multiple of {process_count * batch_gpu} ({process_count} processes x"
            f" --batch-gpu={batch_gpu}), got {batch}. Use such a multiple, or change --batch-gpu."
        )
    images_per_pass = batch_gpu or batch // process_count
    # A group has at most as many images as a forward pass. Without the layer there are no groups.
    group_size = (
        min(minibatch_std_layer.group_size or images_per_pass, images_per_pass)
        if minibatch_std_layer is not None
        else 1
    )
    if images_per_pass % group_size:
        flag = "--batch-gpu" if batch_gpu else "--batch"
        raise ValueError(
            f"{flag}: a forward pass has {images_per_pass} images, but D's minibatch standard deviation needs"
            f" a multiple of its group size {group_size}. Change {flag} or --mbstd-group."
        )
    is_conditioned = not nets.G.rendering_kwargs["c_gen_conditioning_zero"]
    if is_conditioned != config.gen_pose_cond:
        conditioning_text = (
            "is conditioned on the camera" if is_conditioned else "is not conditioned on the camera"
        )
        raise ValueError(
            f"--gen-pose-cond: this generator {conditioning_text}, but the setting is {config.gen_pose_cond}."
            " Start the run without this flag."
        )
    largest_resolution = max(config.nrr_initial, config.nrr_final or 0)
    if superresolution.only_enlarges and largest_resolution > superresolution.input_resolution:
        raise ValueError(
            f"--nrr-initial, --nrr-final: the super-resolution module {type(superresolution).__name__}"
            f" accepts renderings of at most {superresolution.input_resolution} pixels, got"
            f" {largest_resolution}. Set both flags to at most {superresolution.input_resolution}."
        )


def save_grid(
    images: np.ndarray | torch.Tensor, value_range: tuple[float, float], column_count: int, path: str | Path
) -> None:
    """Write images as one PNG file with a grid of images.

    Args:
        images: images [N, C, H, W], C = 1 or 3.
        value_range: value that becomes black, and value that becomes white.
        column_count: number of images in a row of the grid.
        path: path of the file.
    """
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu()
    pixels = np.asarray(images, dtype=np.float32)
    black_value, white_value = value_range
    # The bound avoids a division by 0 for a constant image, where the two values are equal.
    pixels = np.clip(
        np.rint((pixels - black_value) * (255 / max(white_value - black_value, 1e-12))), 0, 255
    ).astype(np.uint8)
    image_count, c, h, w = pixels.shape
    row_count = -(-image_count // column_count)  # image_count / columns, rounded up
    # Missing images of the last row are white.
    canvas = np.full([row_count * column_count, c, h, w], 255, dtype=np.uint8)
    canvas[:image_count] = pixels
    # Grid of images [rows, columns, C, H, W] to one image [rows * H, columns * W, C].
    canvas = (
        canvas.reshape(row_count, column_count, c, h, w)
        .transpose(0, 3, 1, 4, 2)
        .reshape(row_count * h, column_count * w, c)
    )
    # PIL expects greyscale images without a channel axis.
    PIL.Image.fromarray(canvas[:, :, 0] if c == 1 else canvas).save(path)


class Gan:
    """A generator, its discriminator and their data, in the form that `training.loop.TrainingLoop` trains.

    Args:
        nets: networks G, D and G_ema.
        dataset: real images and camera labels.
        config: settings of adversarial training.
        loop: settings of the training loop, of which the batch size and the seed are used.
        augment_pipe: augmentation of D's inputs with a buffer p, or None.
        ranks: position of this process among the processes of the run.
        workers: number of processes that decode images in advance; 0: this process decodes.
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
        # Forward passes of G change a buffer, w_avg of the mapping network. The loop averages the change
        # over rounds.
        self.moving: torch.nn.Module = nets.G
        self.ada_stats = Collector()
        self.collectors = {"ada_stats": self.ada_stats}
        # Images [N, C, H, W] in [-1, 1] and labels [N, K] of the next iteration, only the rows of this rank.
        self._fetched: tuple[torch.Tensor, torch.Tensor] | None = None

    def modules(self) -> dict[str, torch.nn.Module]:
        """Return the modules whose states a checkpoint contains, by name."""
        augment_module = {} if self.augment_pipe is None else {"augment": self.augment_pipe}
        return {"G": self.nets.G, "D": self.nets.D, "G_ema": self.nets.G_ema, **augment_module}

    def meta(self) -> dict:
        """Return the state besides modules that a checkpoint contains, as JSON values."""
        return {"neural_rendering_resolution": self.nets.G.neural_rendering_resolution}

    def restore(self, meta: dict) -> None:
        """Restore the state that `meta` returned."""
        for G in (self.nets.G, self.nets.G_ema):
            G.neural_rendering_resolution = meta["neural_rendering_resolution"]

    # Methods on data.

    def begin(self, cur_nimg: int, folder: Path | None = None) -> None:
        """Start the stream of real images. The loop calls this once, before the first iteration.

        Args:
            cur_nimg: number of images that the run has used before it is resumed; 0 for a new run.
            folder: run folder on rank 0, None on other ranks. A new run gets the files reals.png
                and fakes_init.png.
        """
        # The order of real images depends only on the seed and continues at cur_nimg. A resumed run therefore
        # uses the same images as an uninterrupted run.
        order_seed = derive_seed(self.loop.seed, "reals") % 2**32
        image_order = iter(
            InfiniteSampler(
                self.dataset, self.ranks.rank, self.ranks.world, seed=order_seed, start_index=cur_nimg
            )
        )
        self._batches = read_batches(
            self.dataset, image_order, self.loop.batch // self.ranks.world, self.workers
        )
        if folder is None:
            return
        grid_columns, grid_rows = self.config.grid
        # As in EG3D, the grid has the same latents and labels in the whole run, so that snapshots can
        # be compared.
        grid_z = (
            np.random.RandomState(self.loop.seed)
            .randn(grid_columns * grid_rows, self.nets.G_ema.z_dim)
            .astype(np.float32)
        )
        # The labels are those of the first images. The modulo repeats them if the set is smaller than
        # the grid.
        grid_c = np.stack(
            [self.dataset.get_label(i % len(self.dataset)) for i in range(grid_columns * grid_rows)]
        )
        self._grid = torch.from_numpy(grid_z).to(self.device), torch.from_numpy(grid_c).to(self.device)
        if cur_nimg == 0:
            real_images = np.stack(
                [self.dataset[i][0] for i in range(min(len(self.dataset), grid_columns * grid_rows))]
            )
            save_grid(real_images, (0, 255), grid_columns, folder / "reals.png")
            self._fakes(folder, "_init")

    def fetch(self) -> None:
        """Read this rank's images and labels of the next batch.

        Raises: ValueError or OSError if the data cannot be read.
        """
        images, camera_labels = map(self._to_device, next(self._batches))
        self._fetched = images.to(torch.float32).div_(127.5).sub_(1), camera_labels  # [0, 255] -> [-1, 1]

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        """Copy an array to the device. CUDA copies from pinned memory without blocking this process."""
        tensor = torch.from_numpy(array)
        return (
            tensor.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tensor.to(self.device)
        )

    def end(self) -> None:
        """End the processes that read images."""
        self._batches.close()

    def batch_for(self, phase: str, cur_nimg: int) -> Callable[[int], Batch]:
        """Return a function that returns the inputs of a phase for one round.

        The function has the index of the round as argument. It also seeds torch, so that random numbers in
        the losses are reproducible.

        Args: phase: name of the phase; cur_nimg: number of images before this iteration.
        """
        phase_seed = derive_seed(self.loop.seed, cur_nimg, phase)
        layout = self.layout
        # Generated images are rendered from the cameras of random training images.
        label_indices = np.random.RandomState(phase_seed % 2**32).randint(
            len(self.dataset), size=self.loop.batch
        )
        # [N, K]
        cameras = torch.from_numpy(np.stack([self.dataset.get_label(int(i)) for i in label_indices])).to(
            self.device
        )
        # Camera of the previous image of the batch. The roll is over the full batch, so the result does not
        # depend on the division into rounds.
        swap_c = torch.roll(cameras, 1, 0)

        def batch_of_round(round_index: int) -> Batch:
            """Seed torch, and return the rows of one round of this rank."""
            # Every round samples the latents of the full batch, and uses only its rows. Therefore the random
            # numbers in the losses begin at the same state of the generator in every round.
            torch.manual_seed(phase_seed)
            z = torch.randn([self.loop.batch, self.nets.G.z_dim], device=self.device)
            assert self._fetched is not None
            # `_fetched` contains only the rows of this rank, so its step is the number of rounds of
            # this rank. The other tensors contain the full batch, so their step is the number of rounds
            # of all ranks.
            real_images, real_c = (
                tensor[round_index :: layout.rounds_per_rank].contiguous() for tensor in self._fetched
            )
            row_slice = layout.rows(round_index)
            gen_z, gen_c, swap_c_of_round = (
                tensor[row_slice].contiguous() for tensor in (z, cameras, swap_c)
            )
            return Batch(
                real_images, real_c, gen_z, gen_c, cur_nimg, swap_c_of_round, range(layout.batch)[row_slice]
            )

        return batch_of_round

    # Methods that the loop calls after an iteration.

    def observe(self, stat_name: str, stat_values: torch.Tensor) -> None:
        """Record a statistic of a phase. ADA needs the signs of D's logits for real images.

        Args:
            stat_name: name of the statistic.
            stat_values: values of the statistic for the images of a round.
        """
        if stat_name == "Loss/signs/real":
            self.ada_stats.report(stat_name, stat_values)

    def after_step(self, cur_nimg: int, batch_idx: int) -> None:
        """Update G_ema, and every `ada_interval` iterations the augmentation probability p.

        Args:
            cur_nimg: number of images before this iteration.
            batch_idx: number of iterations, including this one.
        """
        self._update_ema(cur_nimg)
        config = self.config
        augment_pipe = self.augment_pipe
        if augment_pipe is None or config.aug != "ada" or batch_idx % config.ada_interval:
            return
        mean_sign = self.ada_stats.mean("Loss/signs/real", self.ranks.sum_)
        self.ada_stats.flush()
        if mean_sign is not None:
            # p increases if the mean sign of D's logits for real images exceeds the target, which indicates
            # overfitting, and decreases otherwise. A change from 0 to 1 needs ada_kimg thousand images.
            probability_step = (
                math.copysign(1, mean_sign - config.target) if mean_sign != config.target else 0.0
            )
            probability_step *= self.loop.batch * config.ada_interval / (config.ada_kimg * 1000)
            augment_pipe.p.copy_((augment_pipe.p + probability_step).clamp_min(0))

    @torch.no_grad()
    def _update_ema(self, cur_nimg: int) -> None:
        """Update G_ema: parameters are averaged with those of G, buffers are copied from G.

        Args: cur_nimg: number of images before this iteration.
        """
        config = self.config
        G = self.nets.G
        G_ema = self.nets.G_ema
        half_life = config.ema_kimg * 1000  # images
        if config.ema_rampup is not None:
            # A shorter half-life at the start of a run, so that the random initial weights are
            # forgotten soon.
            half_life = min(half_life, cur_nimg * config.ema_rampup)
        # With ema_rampup, the half-life is 0 in the first iteration. Then beta is 0, and G_ema becomes equal
        # to G.
        beta = 0.5 ** (self.loop.batch / max(half_life, 1e-8))
        for averaged_tensor, current_tensor in zip(G_ema.parameters(), G.parameters(), strict=True):
            averaged_tensor.copy_(current_tensor.lerp(averaged_tensor, beta))
        for averaged_tensor, current_tensor in zip(G_ema.buffers(), G.buffers(), strict=True):
            averaged_tensor.copy_(current_tensor)
        # These attributes belong to neither parameters() nor buffers().
        G_ema.neural_rendering_resolution = G.neural_rendering_resolution
        G_ema.rendering_kwargs = copy.copy(G.rendering_kwargs)

    # Methods that write files.

    def report(self, stats: dict) -> dict[str, str]:
        """Add the augmentation probability to the statistics of a tick.

        Args: stats: statistics by name; this method adds an entry to them.
        Returns: further fields of the status line, by name.
        """
        if self.augment_pipe is None:
            return {}
        p = float(self.augment_pipe.p)
        stats["Progress/augment"] = {"num": 1, "mean": p, "std": 0.0}
        return {"augment": f"{p:.3f}"}

    def snapshot(self, folder: Path, cur_nimg: int) -> None:
        """Write image grids of the fixed latents, and a network file.

        Args: folder: run folder; cur_nimg: number of images that the run has used.
        """
        tag = self.loop.tag(cur_nimg)
        self._fakes(folder, tag)
        self.nets.cur_nimg = cur_nimg
        networks.save(folder / f"network-snapshot-{tag}.safetensors", self.nets)

    @torch.no_grad()
    def _fakes(self, folder: Path, tag: str) -> None:
        """Write grids of final images, raw renders and depth maps of the fixed latents.

        The files are fakes<tag>.png, fakes<tag>_raw.png and fakes<tag>_depth.png. In the depth image, near is
        bright. The noise inputs of G are constant, so that snapshots differ only by the weights.
        """
        grid_z, grid_c = self._grid
        # Eight images at a time, to bound the memory.
        renders = [
            self.nets.G_ema(z=chunk_z, c=chunk_c, noise_mode="const")
            for chunk_z, chunk_c in zip(grid_z.split(8), grid_c.split(8), strict=True)
        ]
        column_count, _ = self.config.grid
        for image_key, suffix in (("image", ""), ("image_raw", "_raw")):
            images = torch.cat([render[image_key].cpu() for render in renders])
            save_grid(images, (-1, 1), column_count, folder / f"fakes{tag}{suffix}.png")
        nearness = -torch.cat([render["image_depth"].cpu() for render in renders])
        nearness_range = (float(nearness.min()), float(nearness.max()))
        save_grid(nearness, nearness_range, column_count, folder / f"fakes{tag}_depth.png")
