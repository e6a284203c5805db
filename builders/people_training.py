"""Train a tri-plane generator on density and colour of synthetic scans, at points and mostly without
rendering.

The loss is L = mean |sigma - sigma*| / 10 + w mean |colour - colour*|. sigma* is the density of the scan
(`people.density_of`), whose damage is sampled anew at every step, as the edition of the heads determines it
(`training.heads.editions`). colour* is the shaded colour of the nearest
surface point of the ground-truth head, and w its weight. In the last stage, an error of rendered windows of
front images is added.

A latent has 64 coordinates with a root mean square of 1: 46 coordinates of the ground-truth head and 18 of
the damage. The length of the sampled damage therefore follows from the length of the head's coordinates.

Shapes: N number of heads, P number of points, Q = 18 coordinates of damage, E number of empty voxels, H
number of heads of the pool, R pixels per side of an image, L number of style vectors, W their width,
C channels of a plane.
"""

import copy
import functools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builders.people_pool import NAMED, POINT_STEP
from builders.people_renders import write_renders
from torch_utils.ops import upfirdn2d
from training import checkpoint, storage
from training import networks as nets
from training.config import GanConfig, NetworkConfig, networks_for
from training.dataset import ImageFolderDataset
from training.gan_phases import Batch, GanPhases
from training.heads.editions import scan_distance
from training.heads.people import EYE, OUTSIDE, UNIT, density_of, heads_from_latents, render_head
from training.phases import cosine, lazy_adam
from training.progress import log_bar, tqdm
from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS, camera_position, intrinsics_matrix, look_at
from training.synthetic_heads import resolve_dataset

PLANES = 128  # texels per side of a plane
PIXELS = 64  # pixels per side of the images of the discriminator
CHANNELS = 24  # channels of a plane
HIDDEN = 64  # hidden units of the decoder
SIDE = 1.24  # side of the cube with its margin, in which the points of the pool are, in world units
EMPTY_VOXELS = 62  # voxels per axis of the cube with its margin, of the map of empty space


@dataclass(frozen=True, kw_only=True)
class PeopleTraining:
    """Settings of the training. Tuples have one value per stage."""

    steps: tuple[int, ...] = (6000, 6000, 7000)  # training steps
    lr: tuple[float, ...] = (
        0.02,
        0.012,
        0.01,
    )  # initial learning rate, which decays along a cosine in each stage
    colour: tuple[float, ...] = (4.0, 8.0, 8.0)  # weight w of the error of colour
    planes: tuple[int, ...] = (64, 128, 128)  # texels per side of the planes that are trained
    pictures: tuple[float, ...] = (0.0, 0.0, 4.0)  # weight of the error of windows of front images
    heads: int = 4  # heads per step
    candidates: int = 16_000  # points per head and step, from which the following points are selected
    near: int = 4500  # points near the scan's surface
    behind: int = 2000  # points at the back of the head, where scans differ most
    hard: int = 1500  # points with the largest error of the network's density
    others: int = 500  # random points
    empty: int = 12_000  # further points in space that is empty in every scan
    debris: int = 400  # points of these that are used: those with the highest density of the network
    reach: float = 0.02  # distance up to which a point is near the surface, world units
    unseen: float = 0.2  # weight of colours at points that camera rays do not reach
    eyes: float = 3.0  # weight of colours near the eyes
    window: int = 24  # pixels per side of a window
    edge: float = 0.015  # depth at which a head has its full density, world units
    soft: float = 0.35  # share of the first stage's steps in which this depth is doubled
    ema: float = 0.995  # decay per step of the moving average of the weights
    seed: int = 0
    save_every: int = 500  # steps between checkpoints
    log_every: int = 100  # steps between lines of the log
    edition: int = 3  # edition of the heads, which determines the damage of scans; see heads/editions.py
    plane_slices: int = 1  # slices of the xy plane; see training/triplane.py
    renders_every: int = 0  # steps between the images of fixed latents (people_renders.py); 0: none


def fresh_networks(seed: int, plane_slices: int = 1) -> nets.Networks:
    """Build untrained networks with the sizes of the bundled generator, and planes of 128 x 128 texels.

    Args: seed: seed of the initial weights; plane_slices: number of slices of the xy plane.
    """
    torch.manual_seed(seed)
    network_settings = NetworkConfig(cfg="heads64", cbase=2048, cmax=64, plane_layout="fixed")
    G_kwargs, D_kwargs = networks_for(network_settings, PIXELS, GanConfig(gen_pose_cond=False))
    G_kwargs.update(plane_resolution=PLANES, plane_channels=CHANNELS, decoder_hidden_dim=HIDDEN)
    if plane_slices > 1:
        G_kwargs["plane_slices"] = plane_slices
    networks = nets.build(G_kwargs, D_kwargs, {"name": "synthetic:people64", "resolution": PIXELS})
    for module in (networks.G, networks.G_ema):
        # The first stage does not train the last layer, so its contribution to the planes begins at zero.
        torch.nn.init.zeros_(module.backbone.synthesis.b128.torgb.weight)
        module.neural_rendering_resolution = PIXELS
    return networks


class Pool:
    """Heads of all files of a pool (people_pool.py), with their points, distances and colours."""

    def __init__(self, folder: Path, file_count: int | None = None):
        """Read the files chunk-*.npz of a folder: the first `file_count` in order, or all of them."""
        self.z = np.zeros((0, 64), np.float32)  # latents [H, 64]
        # Points, distances and colours of each head; see `people_pool.head_points`.
        self._heads = list[tuple[np.ndarray, np.ndarray, np.ndarray]]()
        for path in sorted(folder.glob("chunk-*.npz"))[:file_count]:
            with np.load(path) as data:
                self.z = np.concatenate([self.z, data["z"]])
                self._heads += list(zip(data["points"], data["distance"], data["colour"], strict=True))

    @functools.cached_property
    def empty(self) -> torch.Tensor:
        """Lower corners [E, 3] of the voxels that are empty in every scan, in world units.

        Voxels in which no head has a point are not included.
        """
        # Smallest distance of any head in each voxel.
        smallest_distance = np.full((EMPTY_VOXELS,) * 3, np.inf, np.float32)
        for points, distance, _ in self._heads:
            # Index of the voxel of each point.
            x, y, z = (
                np.floor((points * np.float32(POINT_STEP) / SIDE + 0.5) * EMPTY_VOXELS)
                .astype(int)
                .clip(0, EMPTY_VOXELS - 1)
                .T
            )
            # `at` also handles several points in one voxel.
            np.minimum.at(smallest_distance, (x, y, z), distance)
        # Lower corners of all voxels, [62, 62, 62, 3] in world units.
        corner = (np.moveaxis(np.indices(smallest_distance.shape), 0, -1) / EMPTY_VOXELS - 0.5).astype(
            np.float32
        ) * np.float32(SIDE)
        x, y, z = np.moveaxis(corner, -1, 0)
        # Damage may add matter at the back of the head, so this region is never empty.
        may_be_swollen = (np.abs(x) < 0.27) & (np.abs(y + 0.06) < 0.3) & (z > -0.40) & (z < 0)
        return torch.from_numpy(
            corner[(smallest_distance > 0.03) & np.isfinite(smallest_distance) & ~may_be_swollen]
        )

    def draw(
        self, rng: np.random.Generator, head_indices: np.ndarray, point_count: int
    ) -> tuple[torch.Tensor, ...]:
        """Read a batch of heads with P successive points of each, which the file has in random order.

        Args:
            rng: random generator, which chooses the first point.
            head_indices: indices of the N heads in the pool.
            point_count: P, number of points of each head.
        Returns: coordinates of the ground-truth heads [N, 46], points [N, P, 3] and signed distances [N, P]
            in world units, and colours [N, P, 3] of 0..1.
        """
        samples = []
        for head_index in head_indices:
            head_points, distance, colour = self._heads[head_index]
            start = rng.integers(len(head_points) - point_count)
            selection = slice(start, start + point_count)
            samples.append(
                (
                    head_points[selection] * np.float32(POINT_STEP),
                    distance[selection].astype(np.float32),
                    colour[selection] / np.float32(255),
                )
            )
        return torch.from_numpy(self.z[head_indices, :NAMED]), *(
            torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples, strict=True)
        )


class FrontImages:
    """Front images of the ground-truth heads of a pool, with the positions of eyes, nose and mouth in
    them.
    """

    # Positions of both eyes, nose and mouth in world units, [4, 3].
    LANDMARKS = np.array(
        [
            [UNIT * EYE[0], UNIT * EYE[1], 0.13],
            [-UNIT * EYE[0], UNIT * EYE[1], 0.13],
            [0, -0.06, 0.16],
            [0, -0.11, 0.15],
        ]
    )

    def __init__(self, z: np.ndarray, seed: int, image_side: int = 128, cache: Path | None = None):
        """Render an image of each head from a random camera near the front.

        Args:
            z: latents of the heads, [H, 64].
            seed: seed of the cameras.
            image_side: R, pixels per side.
            cache: file of the images, which is read if it holds those of these heads and cameras, and written
                otherwise; None: none. Thousands of images take minutes, and a resumed run needs them again.
        """
        # The constant 3 makes the stream differ from other streams with the same seed.
        rng = np.random.default_rng([seed, 3])
        self.size = image_side
        # Standard deviations of 0.4 (yaw) and 0.2 (pitch) radians about the frontal view.
        yaw, pitch = torch.from_numpy(math.pi / 2 + rng.standard_normal((2, len(z), 1)) * [[[0.4]], [[0.2]]])
        poses = look_at(camera_position(yaw, pitch, FFHQ_RADIUS), torch.zeros(3, dtype=torch.float64)).float()
        self.poses = poses
        self.intrinsics = intrinsics_matrix(FFHQ_FOCAL)
        self.images = self._rendered(z, cache)  # [H, R, R, 3]
        # Positions in the frames of the cameras, [H, 4, 3].
        in_camera = np.einsum(
            "hpd,hdc->hpc", self.LANDMARKS - poses[:, None, :3, 3].numpy(), poses[:, :3, :3].numpy()
        )
        # Columns and rows in the images, [H, 4, 2] in pixels.
        self.landmark_pixels = (in_camera[..., :2] / in_camera[..., 2:] * FFHQ_FOCAL + 0.5) * image_side

    def _rendered(self, z: np.ndarray, cache: Path | None) -> torch.Tensor:
        """Return the images [H, R, R, 3] as bytes, from the cache if it holds them."""
        if cache is not None and cache.exists():
            with np.load(cache) as content:
                if np.array_equal(content["z"], z) and np.array_equal(content["poses"], self.poses.numpy()):
                    return torch.from_numpy(content["images"])
        images = np.empty((len(z), self.size, self.size, 3), np.uint8)
        # One head after the other, because the meshes of thousands of heads take gigabytes.
        for i in tqdm(range(len(z)), desc="front images", unit="head"):
            head = heads_from_latents(z[i : i + 1])[0]
            image = render_head(head, self.poses[i].numpy(), FFHQ_FOCAL, self.size)[0]
            images[i] = np.round(255 * image)
        if cache is not None:
            temporary_path = cache.with_name(f".{cache.name}")
            with open(temporary_path, "wb") as file:
                np.savez(file, z=z, poses=self.poses.numpy(), images=images)
            temporary_path.replace(cache)
        return torch.from_numpy(images)

    def windows(self, rng: np.random.Generator, image_indices: np.ndarray, edge: int) -> torch.Tensor:
        """Choose a random window around an eye, the nose or the mouth in each image.

        Args:
            rng: random generator.
            image_indices: indices of the N images.
            edge: pixels per side of a window.
        Returns: flat indices [N, edge^2] of the pixels of the windows.
        """
        # The centre is shifted by up to 8 pixels, so that windows differ.
        centre = self.landmark_pixels[
            image_indices, rng.choice(4, len(image_indices), p=[0.35, 0.35, 0.1, 0.2])
        ] + rng.uniform(-8, 8, (len(image_indices), 2))
        # Column and row of the upper left pixel, [N, 2]; windows stay in the image.
        upper_left = np.clip(np.round(centre - edge / 2).astype(int), 0, self.size - edge)
        row, column = np.divmod(np.arange(edge * edge), edge)
        return torch.from_numpy((upper_left[:, 1:] + row) * self.size + upper_left[:, :1] + column)

    def loss(
        self, G: Any, planes: torch.Tensor, image_indices: np.ndarray, pixels: torch.Tensor
    ) -> torch.Tensor:
        """Compute the error of rendered windows.

        It is the mean absolute error of colours of 0..1, plus the mean absolute errors of the differences
        between vertical and between horizontal neighbours.

        Args:
            G: generator.
            planes: planes of the heads, [N, 3, C, 128, 128].
            image_indices: indices of the N images.
            pixels: pixels of the windows, from `windows`.
        Returns: errors [N].
        """
        # The same pixels for all three coordinates of a ray, and for all three channels of a colour.
        pixel_indices = pixels.unsqueeze(2).expand(-1, -1, 3)
        rays = G.ray_sampler(
            self.poses[image_indices], self.intrinsics.expand(len(image_indices), 3, 3), self.size
        )
        origins, directions = (ray_vectors.gather(1, pixel_indices) for ray_vectors in rays)
        # Colours of -1..1 become 0..1; further feature channels are left out.
        colour = G.renderer(planes, G.decoder, origins, directions, G.rendering_kwargs)[0][..., :3] / 2 + 0.5
        colour_error = colour - self.images[image_indices].flatten(1, 2).gather(1, pixel_indices) / 255
        edge = math.isqrt(pixels.shape[1])
        window_error = colour_error.unflatten(1, (edge, edge))  # [N, edge, edge, 3]
        return (
            colour_error.abs().mean(dim=[1, 2])
            + window_error.diff(dim=1).abs().mean(dim=[1, 2, 3])
            + window_error.diff(dim=2).abs().mean(dim=[1, 2, 3])
        )


def fresh_damage(head_coordinates: torch.Tensor) -> torch.Tensor:
    """Sample coordinates of damage [N, Q] with torch's global random generator.

    Their direction is uniform. Their length is such that all 64 coordinates have a root mean square of 1.

    Args: head_coordinates: coordinates of the ground-truth heads, [N, 46].
    """
    quality = torch.randn(len(head_coordinates), 64 - NAMED)
    length = (64 - head_coordinates.square().sum(dim=1, keepdim=True)).clamp_min(0).sqrt()
    return quality / quality.norm(dim=1, keepdim=True) * length


def planes_of(G: Any, ws: torch.Tensor, block_resolution: int) -> torch.Tensor:
    """Compute tri-planes with the blocks of the backbone up to a resolution, and upsample them.

    Args:
        G: generator.
        ws: style vectors [N, L, W].
        block_resolution: texels per side of the last block that is used.
    Returns: planes [N, 3, C, 128, 128].
    """
    network = G.backbone.synthesis
    features: Any = None
    image: Any = None
    start = 0
    for resolution in network.block_resolutions:
        block = getattr(network, f"b{resolution}")
        if resolution > block_resolution:
            image = upfirdn2d.upsample2d(image, block.resample_filter)
            continue
        # Style vectors of the block; the one of its ToRGB layer is also the first one of the next block.
        features, image = block(features, image, ws.narrow(1, start, block.num_conv + block.num_torgb))
        start += block.num_conv
    return image.unflatten(1, (3, G.plane_channels))


def _sample_indices(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Sample indices [N, count] of points at which a mask [N, P] is True.

    If there are fewer than `count` such points, other points are added at random.
    """
    # With noise of 0..1, points at which the mask is True have values of 1..2, above all other points.
    return (mask + torch.rand(mask.shape)).topk(count, dim=1, sorted=False).indices


def losses(
    G: Any,
    batch: tuple[torch.Tensor, ...],
    empty: torch.Tensor,
    options: PeopleTraining,
    edge: float,
    block_resolution: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the errors of density and colour of a batch; see the module's docstring.

    Args:
        G: generator.
        batch: coordinates of heads, points, distances and colours, from `Pool.draw`.
        empty: lower corners of empty voxels, from `Pool.empty`.
        options: settings.
        edge: depth at which a head has its full density, in world units.
        block_resolution: texels per side of the planes that are trained.
    Returns: mean absolute error of density divided by 10, [N]; weighted mean absolute error of colour near
        the surface, [N]; and the planes.
    """
    head_coordinates, points, distance, colour = batch
    quality = fresh_damage(head_coordinates)
    z = torch.cat([head_coordinates, quality], dim=1)
    # The mapping network gets zeros as conditioning [N, 25], because it does not use the camera.
    planes = planes_of(G, G.mapping(z, torch.zeros(len(z), 25), update_emas=True), block_resolution)
    decode = functools.partial(
        G.renderer.run_model, planes, G.decoder, sample_directions=None, options=G.rendering_kwargs
    )
    with torch.no_grad():
        distance_of_scan = scan_distance(options.edition, points, distance, z)
        target_density = density_of(distance_of_scan, edge)
        # Indices of the points near the surface, at the back of the head, and with the largest error.
        near_indices = _sample_indices(distance_of_scan.abs() < options.reach, options.near)
        # A swelling reaches farther from the intact head than these points.
        head_distance = distance if options.edition == 3 else torch.minimum(distance, distance_of_scan)
        back_indices = _sample_indices(
            (head_distance < 0.05) & (points[..., 2] < 0.04) & (points[..., 1] > -0.36), options.behind
        )
        density_error = (
            decode(sample_coordinates=points, sigma_only=True)["sigma"].squeeze(2) - target_density
        ).abs()
        hard_indices = density_error.topk(options.hard, dim=1, sorted=False).indices
        selected_indices = torch.cat(
            [
                near_indices,
                back_indices,
                hard_indices,
                torch.randint(points.shape[1], (len(head_coordinates), options.others)),
            ],
            dim=1,
        )
        # Random points in empty voxels, of which those with the highest density of the network are used.
        empty_points = empty[torch.randint(len(empty), (len(head_coordinates), options.empty))] + torch.rand(
            len(head_coordinates), options.empty, 3
        ) * (SIDE / EMPTY_VOXELS)
        dense_indices = (
            decode(sample_coordinates=empty_points, sigma_only=True)["sigma"]
            .squeeze(2)
            .topk(options.debris, dim=1, sorted=False)
            .indices
        )
        points = points.gather(1, selected_indices.unsqueeze(2).expand(-1, -1, 3))
        empty_points = empty_points.gather(1, dense_indices.unsqueeze(2).expand(-1, -1, 3))
        points = torch.cat([points, empty_points], dim=1)
        target_density = torch.cat(
            [target_density.gather(1, selected_indices), torch.full(dense_indices.shape, OUTSIDE)], dim=1
        )
        colour = colour.gather(1, near_indices.unsqueeze(2).expand(-1, -1, 3))
        depth = distance.gather(1, near_indices)
        # Weight 1 for points at which rays become opaque, and a small weight for hidden points.
        colour_weight = torch.where((depth > -options.edge) & (depth < options.edge / 3), 1.0, options.unseen)
        # The first o.near points are those near the surface.
        point_x, point_y, point_z = points[:, : options.near].unbind(2)
        eye_distance = torch.hypot(point_x.abs() - UNIT * EYE[0], point_y - UNIT * EYE[1])
        colour_weight = colour_weight * torch.where(
            (eye_distance < 0.035) & (point_z > 0.05), options.eyes, 1.0
        )
    prediction = decode(sample_coordinates=points)
    density = (prediction["sigma"].squeeze(2) - target_density).abs().mean(dim=1) / 10
    error = (prediction["rgb"][:, : options.near, :3] - colour).abs().mean(dim=2)
    return density, (error * colour_weight).sum(dim=1) / colour_weight.sum(dim=1), planes


@dataclass(frozen=True, kw_only=True)
class Step:
    """Settings of a training step."""

    stage: int  # index of the stage
    lr: float  # learning rate
    colour: float  # weight of the error of colour
    images: float  # weight of the error of windows of front images
    edge: float  # depth at which a head has its full density, world units
    planes: int  # texels per side of the planes that are trained


def schedule(options: PeopleTraining) -> Iterator[Step]:
    """Yield the settings of all training steps in order."""
    for stage, (steps, lr, colour, planes, images) in enumerate(
        zip(options.steps, options.lr, options.colour, options.planes, options.pictures, strict=True)
    ):
        for step in range(steps):
            # Densities with a softer border are easier to learn at first.
            edge = options.edge * (2 if stage == 0 and step < options.soft * steps else 1)
            yield Step(
                stage=stage,
                lr=cosine(lr, step / steps),
                colour=colour,
                images=images,
                edge=edge,
                planes=planes,
            )


def train(folder: Path, pool: Pool, options: PeopleTraining = PeopleTraining()) -> Path:
    """Train the generator, or resume from the newest complete checkpoint of a folder.

    Args:
        folder: folder of checkpoints, network.safetensors, log.jsonl and renders.
        pool: heads to train on.
        options: settings.
    Returns: path of network.safetensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    networks = fresh_networks(options.seed, options.plane_slices)
    G = networks.G.requires_grad_(True)
    G_ema = networks.G_ema
    optimizer = torch.optim.Adam(G.parameters(), lr=options.lr[0], betas=(0.9, 0.99))
    modules = torch.nn.ModuleDict({"G": G, "G_ema": G_ema})
    first_step = 0
    if checkpoint.available(folder):
        # fall_back: if the newest checkpoint is damaged, the previous one is read.
        tensors, checkpoint_meta, path = checkpoint.read(folder, fall_back=True)
        network_tensors = {name: tensors[name] for name in tensors if not name.startswith("optim_G.")}
        storage.load_strict(modules, network_tensors, str(path))
        checkpoint.restore_optimizer("optim_G", optimizer, tensors)
        first_step = checkpoint_meta["step"]
    step_count = sum(options.steps)
    start_time = time.time()
    sums = np.zeros(4)  # of the three errors since the last line of the log, and number of steps
    network_path = folder / "network.safetensors"
    front_images = None
    bar = log_bar(step_count, first_step, "training", "step")
    for step_number, step in enumerate(schedule(options)):
        # Steps before the checkpoint are skipped, so that the schedule is the same after a resume.
        if step_number < first_step:
            continue
        optimizer.param_groups[0]["lr"] = step.lr
        # The seed depends only on the step, so that a resumed run samples the same as an uninterrupted run.
        rng = np.random.default_rng([options.seed, step_number])
        torch.manual_seed(int(rng.integers(1 << 62)))
        head_indices = rng.integers(len(pool.z), size=options.heads)
        density, colour, planes = losses(
            G, pool.draw(rng, head_indices, options.candidates), pool.empty, options, step.edge, step.planes
        )
        loss = density + step.colour * colour
        image_error = torch.zeros(1)
        if step.images > 0:
            front_images = front_images or FrontImages(
                pool.z, options.seed, cache=folder / "front-images.npz"
            )
            image_error = front_images.loss(
                G, planes, head_indices, front_images.windows(rng, head_indices, options.window)
            )
            loss = loss + step.images * image_error
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        optimizer.step()
        with torch.no_grad():
            # In the first steps the average is the plain mean of all weights.
            decay = min(options.ema, 1 - 1 / (step_number + 1))
            for average_tensor, trained_tensor in zip(G_ema.parameters(), G.parameters(), strict=True):
                average_tensor.lerp_(trained_tensor, 1 - decay)
            for average_tensor, trained_tensor in zip(G_ema.buffers(), G.buffers(), strict=True):
                average_tensor.copy_(trained_tensor)
        sums += [*(float(error.detach().mean()) for error in (density, colour, image_error)), 1]
        if (step_number + 1) % options.log_every == 0:
            seconds_per_step = (time.time() - start_time) / (step_number + 1 - first_step)
            means = {
                name: round(float(error_sum / sums[3]), 4)
                # Three names: the fourth entry of `sums` is the number of steps.
                for name, error_sum in zip(("density", "colour", "picture"), sums, strict=False)
            }
            log_entry = {
                "step": step_number + 1,
                "stage": step.stage,
                "lr": round(step.lr, 5),
                **means,
                "seconds_a_step": round(seconds_per_step, 3),
                "minutes_left": round(seconds_per_step * (step_count - step_number - 1) / 60, 1),
            }
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(log_entry) + "\n")
            print(log_entry, flush=True)
            sums[:] = 0
        if (step_number + 1) % options.save_every == 0 or step_number + 1 == step_count:
            networks.cur_nimg = (step_number + 1) * options.heads
            nets.save(network_path, networks)
            save_renders = options.renders_every and (step_number + 1) % options.renders_every == 0
            if save_renders or (options.renders_every and step_number + 1 == step_count):
                write_renders(G_ema, folder / "renders" / f"step-{step_number + 1:06d}.png")
            tensors = {**modules.state_dict(), **checkpoint.optimizer_tensors("optim_G", optimizer)}
            checkpoint.write(
                folder, networks.cur_nimg, tensors, {"step": step_number + 1, "options": asdict(options)}
            )
        bar.update()
    bar.close()
    return network_path


@dataclass(frozen=True, kw_only=True)
class FrontTraining:
    """Settings for training the discriminator against a frozen generator."""

    data: str = "synthetic:people64"  # dataset of real images
    steps: int = 700
    batch: int = 8  # images per step
    lr: float = 0.002  # learning rate
    gamma: float = 0.2  # weight of the R1 regulariser (Mescheder et al. 2018)
    seed: int = 0


def train_discriminator(networks: nets.Networks, options: FrontTraining = FrontTraining()) -> list[float]:
    """Train the discriminator of `networks` in place.

    Generated images are those of G_ema, from cameras of the dataset.

    Args:
        networks: networks, of which G_ema is not changed.
        options: settings.
    Returns: loss of each step, without R1.
    """
    config = GanConfig(
        gen_pose_cond=False,
        gamma=options.gamma,
        dlr=options.lr,
        blur_fade_kimg=0,
        density_reg=0,
        nrr_initial=PIXELS,
    )
    dataset = ImageFolderDataset(resolve_dataset(options.data), resolution=PIXELS, c_dim=25)
    # A copy, because the phases may change the state of G.
    G = copy.deepcopy(networks.G_ema)
    D = networks.D.requires_grad_(True)
    phases = GanPhases(G, D, config)
    optimizer = lazy_adam(D, config.dlr, config.d_reg_interval)
    losses = []
    for step in range(options.steps):
        rng = np.random.default_rng([options.seed, step])
        torch.manual_seed(int(rng.integers(1 << 62)))
        # Real images with their labels, and cameras of other images for the generated ones.
        images, labels = zip(
            *(dataset[i] for i in rng.integers(len(dataset), size=options.batch)), strict=True
        )
        cameras = torch.from_numpy(
            np.stack([dataset.get_label(i) for i in rng.integers(len(dataset), size=options.batch)])
        )
        real = torch.from_numpy(np.stack(images)).float() / 127.5 - 1
        batch = Batch(
            real,
            torch.from_numpy(np.stack(labels)),
            torch.randn(options.batch, 64),
            cameras,
            step * options.batch,
        )
        # Lazy regularisation (Karras et al. 2020): R1 every d_reg_interval steps, with this interval as
        # weight.
        phases_of_step = [(phases.d_main, 1)]
        if step % config.d_reg_interval == 0:
            phases_of_step.append((phases.d_reg, config.d_reg_interval))
        for phase, gain in phases_of_step:
            optimizer.zero_grad(set_to_none=True)
            loss_sum = 0.0
            for loss in phase(batch):
                (loss.value.mean() * gain).backward()
                loss_sum += float(loss.value.detach().mean())
            optimizer.step()
            # Only the main loss is recorded, whose weight is 1.
            if gain == 1:
                losses.append(loss_sum)
        if (step + 1) % 50 == 0:
            print(
                f"discriminator: step {step + 1} of {options.steps}, loss {np.mean(losses[-50:]):.3f}",
                flush=True,
            )
    networks.D.requires_grad_(False)
    return losses
