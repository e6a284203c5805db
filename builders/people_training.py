"""Train a tri-plane generator on density and colour of synthetic scans, at points and without rendering.

L = mean |sigma - sigma*| / 10 + w mean |colour - colour*|. sigma* is the density of the scan
(`people.density_of`), whose damage is sampled anew at every step. colour* is the shaded colour of the nearest
surface point of the ground-truth head. The 46 coordinates of the ground-truth head and the 18 of the damage
have unit root mean square together, so the damage is sampled at the length that the head's coordinates leave.

Shape letters: N heads, Z = 64 coordinates, P points, K of them nearest to the surface, Q = 18 coordinates of
damage.
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
from torch_utils.ops import upfirdn2d
from training import checkpoint, storage
from training import networks as nets
from training.config import GanConfig, NetworkConfig, networks_for
from training.dataset import ImageFolderDataset
from training.gan_phases import Batch, GanPhases
from training.heads.people import EYE, OUTSIDE, UNIT, density_of, named_people, picture
from training.heads.people_damage import damaged
from training.phases import cosine, lazy_adam
from training.progress import tqdm
from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS, camera_position, intrinsics_matrix, look_at
from training.synthetic_heads import resolve_dataset

# texels of a plane's edge, pixels of the images that D sees
PLANES = 128
PIXELS = 64
# of a plane, of the decoder
CHANNELS = 24
HIDDEN = 64
SIDE = 1.24  # of the cube and its margin, where points of the pool lie
EMPTY_VOXELS = 62  # voxels along the edge of the cube and its margin, in which empty space is mapped


@dataclass(frozen=True, kw_only=True)
class PeopleTraining:
    """Settings of the stages; in each, the learning rate falls along a cosine."""

    steps: tuple[int, ...] = (6000, 6000, 7000)
    lr: tuple[float, ...] = (0.02, 0.012, 0.01)
    colour: tuple[float, ...] = (4.0, 8.0, 8.0)  # weight of colour against density
    # texels of the planes' edge that are trained; the first stage needs no more
    planes: tuple[int, ...] = (64, 128, 128)
    pictures: tuple[float, ...] = (0.0, 0.0, 4.0)  # weight of windows of front images
    heads: int = 4  # per step
    candidates: int = 16_000  # points of a head from which those of a step are selected
    near: int = 4500  # points near the scan's surface
    behind: int = 2000  # points at the back of the head, where scans differ most
    hard: int = 1500  # points with the largest error of the network
    others: int = 500  # points at random
    empty: int = 12_000  # further points, in space that is empty in every scan
    debris: int = 400  # of these, the points where the network has the highest density
    reach: float = 0.02  # distance up to which a point is near the surface, world units
    unseen: float = 0.2  # weight of colours that no ray meets
    eyes: float = 3.0  # weight of the colours of eyes
    window: int = 24  # pixels of a window's edge
    # depth at which a head is fully dense, world units; twice that in the soft share of the first stage
    edge: float = 0.015
    soft: float = 0.35
    ema: float = 0.995
    seed: int = 0
    save_every: int = 500  # steps


def fresh_networks(seed: int) -> nets.Networks:
    """Networks of the bundled kind with planes of 128 texels."""
    torch.manual_seed(seed)
    net = NetworkConfig(cfg="heads64", cbase=2048, cmax=64, plane_layout="fixed")
    G_kwargs, D_kwargs = networks_for(net, PIXELS, GanConfig(gen_pose_cond=False))
    G_kwargs.update(plane_resolution=PLANES, plane_channels=CHANNELS, decoder_hidden_dim=HIDDEN)
    made = nets.build(G_kwargs, D_kwargs, {"name": "synthetic:people64", "resolution": PIXELS})
    for module in (made.G, made.G_ema):
        # this layer is not trained in the first stage
        torch.nn.init.zeros_(module.backbone.synthesis.b128.torgb.weight)
        module.neural_rendering_resolution = PIXELS
    return made


class Pool:
    """Heads of all files of a folder, with their points."""

    def __init__(self, folder: Path):
        self.z = np.zeros((0, 64), np.float32)
        self._heads = list[tuple[np.ndarray, np.ndarray, np.ndarray]]()
        for path in sorted(folder.glob("chunk-*.npz")):
            with np.load(path) as data:
                self.z = np.concatenate([self.z, data["z"]])
                self._heads += list(zip(data["points"], data["distance"], data["colour"], strict=True))

    @functools.cached_property
    def empty(self) -> torch.Tensor:
        """Lowest corners [E, 3] of the voxels, world units, that every scan leaves empty. A voxel without a
        point is not among them.
        """
        least = np.full((EMPTY_VOXELS,) * 3, np.inf, np.float32)
        for at, distance, _ in self._heads:
            x, y, z = (
                np.floor((at * np.float32(POINT_STEP) / SIDE + 0.5) * EMPTY_VOXELS)
                .astype(int)
                .clip(0, EMPTY_VOXELS - 1)
                .T
            )
            np.minimum.at(least, (x, y, z), distance)
        corner = (np.moveaxis(np.indices(least.shape), 0, -1) / EMPTY_VOXELS - 0.5).astype(
            np.float32
        ) * np.float32(SIDE)
        x, y, z = np.moveaxis(corner, -1, 0)
        swollen = (np.abs(x) < 0.27) & (np.abs(y + 0.06) < 0.3) & (z > -0.40) & (z < 0)
        return torch.from_numpy(corner[(least > 0.03) & np.isfinite(least) & ~swollen])

    def draw(self, rng: np.random.Generator, rows: np.ndarray, points: int) -> tuple[torch.Tensor, ...]:
        """Return a batch: coordinates of ground-truth heads [N, 46], points [N, P, 3], distances, colours.

        Distances are [N, P], colours [N, P, 3]. The P points are neighbours in the file's random order.
        """
        parts = []
        for row in rows:
            at, distance, colour = self._heads[row]
            start = rng.integers(len(at) - points)
            piece = slice(start, start + points)
            parts.append(
                (
                    at[piece] * np.float32(POINT_STEP),
                    distance[piece].astype(np.float32),
                    colour[piece] / np.float32(255),
                )
            )
        return torch.from_numpy(self.z[rows, :NAMED]), *(
            torch.from_numpy(np.stack(x)) for x in zip(*parts, strict=True)
        )


class FrontImages:
    """A front image of each ground-truth head of a pool, and the positions of eyes, nose and mouth in it."""

    PLACES = np.array(
        [
            [UNIT * EYE[0], UNIT * EYE[1], 0.13],
            [-UNIT * EYE[0], UNIT * EYE[1], 0.13],
            [0, -0.06, 0.16],
            [0, -0.11, 0.15],
        ]
    )

    def __init__(self, z: np.ndarray, seed: int, size: int = 128):
        rng = np.random.default_rng([seed, 3])
        self.size = size
        yaw, pitch = torch.from_numpy(math.pi / 2 + rng.standard_normal((2, len(z), 1)) * [[[0.4]], [[0.2]]])
        poses = look_at(camera_position(yaw, pitch, FFHQ_RADIUS), torch.zeros(3, dtype=torch.float64)).float()
        self.poses = poses
        self.intrinsics = intrinsics_matrix(FFHQ_FOCAL)
        drawn = [
            picture(head, pose.numpy(), FFHQ_FOCAL, size)[0]
            for head, pose in zip(named_people(z), tqdm(poses), strict=True)
        ]
        self.images = torch.from_numpy(np.round(255 * np.stack(drawn)).astype(np.uint8))  # [H, R, R, 3]
        local = np.einsum(
            "hpd,hdc->hpc", self.PLACES - poses[:, None, :3, 3].numpy(), poses[:, :3, :3].numpy()
        )
        # [H, 4, 2] columns and rows
        self.places = (local[..., :2] / local[..., 2:] * FFHQ_FOCAL + 0.5) * size

    def windows(self, rng: np.random.Generator, rows: np.ndarray, edge: int) -> torch.Tensor:
        """Return indices [N, edge^2] of the pixels of a window in each of the images `rows`.

        The window lies around an eye, the nose or the mouth.
        """
        middle = self.places[rows, rng.choice(4, len(rows), p=[0.35, 0.35, 0.1, 0.2])] + rng.uniform(
            -8, 8, (len(rows), 2)
        )
        first = np.clip(np.round(middle - edge / 2).astype(int), 0, self.size - edge)  # [N, 2]
        row, column = np.divmod(np.arange(edge * edge), edge)
        return torch.from_numpy((first[:, 1:] + row) * self.size + first[:, :1] + column)

    def loss(self, G: Any, planes: torch.Tensor, rows: np.ndarray, pixels: torch.Tensor) -> torch.Tensor:
        """Compute the mean absolute error [N] of colours in 0..1, and of the differences of neighbours."""
        index = pixels.unsqueeze(2).expand(-1, -1, 3)
        rays = G.ray_sampler(self.poses[rows], self.intrinsics.expand(len(rows), 3, 3), self.size)
        origins, directions = (values.gather(1, index) for values in rays)
        colour = G.renderer(planes, G.decoder, origins, directions, G.rendering_kwargs)[0][..., :3] / 2 + 0.5
        error = colour - self.images[rows].flatten(1, 2).gather(1, index) / 255
        edge = math.isqrt(pixels.shape[1])
        square = error.unflatten(1, (edge, edge))
        return (
            error.abs().mean(dim=[1, 2])
            + square.diff(dim=1).abs().mean(dim=[1, 2, 3])
            + square.diff(dim=2).abs().mean(dim=[1, 2, 3])
        )


def fresh_damage(named: torch.Tensor) -> torch.Tensor:
    """Sample coordinates of damage [N, Q] from torch's global generator.

    Together with the 46 coordinates of the ground-truth head they have unit root mean square.
    """
    quality = torch.randn(len(named), 64 - NAMED)
    length = (64 - named.square().sum(dim=1, keepdim=True)).clamp_min(0).sqrt()
    return quality / quality.norm(dim=1, keepdim=True) * length


def planes_of(G: Any, ws: torch.Tensor, size: int) -> torch.Tensor:
    """Return planes [N, 3, C, 128, 128] of ws [N, L, W] from the blocks up to `size` texels, upsampled."""
    network = G.backbone.synthesis
    x: Any = None
    image: Any = None
    start = 0
    for resolution in network.block_resolutions:
        block = getattr(network, f"b{resolution}")
        if resolution > size:
            image = upfirdn2d.upsample2d(image, block.resample_filter)
            continue
        x, image = block(x, image, ws.narrow(1, start, block.num_conv + block.num_torgb))
        start += block.num_conv
    return image.unflatten(1, (3, G.plane_channels))


def _among(wanted: torch.Tensor, count: int) -> torch.Tensor:
    """Sample indices [N, count] of points that are wanted [N, P], then of others where there are too few."""
    # uniform noise below 1 orders points at random, with all wanted ones before the others
    return (wanted + torch.rand(wanted.shape)).topk(count, dim=1, sorted=False).indices


def losses(
    G: Any, batch: tuple[torch.Tensor, ...], empty: torch.Tensor, o: PeopleTraining, edge: float, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the mean absolute errors [N] of density and of colour near the surface, and the planes.

    The error of density is divided by 10. Args: batch: of `Pool.draw`; empty: of `Pool.empty`; edge: depth at
        which a head is fully dense, world units; size: texels of the planes' edge that are trained.
    """
    named, points, distance, colour = batch
    quality = fresh_damage(named)
    z = torch.cat([named, quality], dim=1)
    planes = planes_of(G, G.mapping(z, torch.zeros(len(z), 25), update_emas=True), size)
    decode = functools.partial(
        G.renderer.run_model, planes, G.decoder, sample_directions=None, options=G.rendering_kwargs
    )
    with torch.no_grad():
        scan = damaged(points, distance, quality)
        target = density_of(scan, edge)
        near = _among(scan.abs() < o.reach, o.near)
        back = _among((distance < 0.05) & (points[..., 2] < 0.04) & (points[..., 1] > -0.36), o.behind)
        wrong = (decode(sample_coordinates=points, sigma_only=True)["sigma"].squeeze(2) - target).abs()
        hard = wrong.topk(o.hard, dim=1, sorted=False).indices
        chosen = torch.cat([near, back, hard, torch.randint(points.shape[1], (len(named), o.others))], dim=1)
        free = empty[torch.randint(len(empty), (len(named), o.empty))] + torch.rand(
            len(named), o.empty, 3
        ) * (SIDE / EMPTY_VOXELS)
        dense = (
            decode(sample_coordinates=free, sigma_only=True)["sigma"]
            .squeeze(2)
            .topk(o.debris, dim=1, sorted=False)
            .indices
        )
        points, free = (
            x.gather(1, i.unsqueeze(2).expand(-1, -1, 3)) for x, i in ((points, chosen), (free, dense))
        )
        points = torch.cat([points, free], dim=1)
        target = torch.cat([target.gather(1, chosen), torch.full(dense.shape, OUTSIDE)], dim=1)
        colour = colour.gather(1, near.unsqueeze(2).expand(-1, -1, 3))
        depth = distance.gather(1, near)
        # what rays meet where they become opaque
        seen = torch.where((depth > -o.edge) & (depth < o.edge / 3), 1.0, o.unseen)
        x, y, z = points[:, : o.near].unbind(2)
        seen = seen * torch.where(
            (torch.hypot(x.abs() - UNIT * EYE[0], y - UNIT * EYE[1]) < 0.035) & (z > 0.05), o.eyes, 1.0
        )
    out = decode(sample_coordinates=points)
    density = (out["sigma"].squeeze(2) - target).abs().mean(dim=1) / 10
    error = (out["rgb"][:, : o.near, :3] - colour).abs().mean(dim=2)
    return density, (error * seen).sum(dim=1) / seen.sum(dim=1), planes


@dataclass(frozen=True, kw_only=True)
class Step:
    """Settings of a training step."""

    stage: int
    lr: float
    colour: float  # weights
    images: float
    edge: float  # world units
    planes: int  # texels


def schedule(o: PeopleTraining) -> Iterator[Step]:
    """Yield the settings of all steps in order."""
    for stage, (steps, lr, colour, planes, images) in enumerate(
        zip(o.steps, o.lr, o.colour, o.planes, o.pictures, strict=True)
    ):
        for step in range(steps):
            edge = o.edge * (2 if stage == 0 and step < o.soft * steps else 1)
            yield Step(
                stage=stage,
                lr=cosine(lr, step / steps),
                colour=colour,
                images=images,
                edge=edge,
                planes=planes,
            )


def train(folder: Path, pool: Pool, o: PeopleTraining = PeopleTraining()) -> Path:
    """Train, or resume from the newest complete checkpoint of `folder`; return the network file.

    The folder also gets a log.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = fresh_networks(o.seed)
    G = made.G.requires_grad_(True)
    G_ema = made.G_ema
    optimizer = torch.optim.Adam(G.parameters(), lr=o.lr[0], betas=(0.9, 0.99))
    modules = torch.nn.ModuleDict({"G": G, "G_ema": G_ema})
    begin = 0
    if checkpoint.available(folder):
        held, meta, path = checkpoint.read(folder, fall_back=True)
        storage.load_strict(
            modules, {name: held[name] for name in held if not name.startswith("optim_G.")}, str(path)
        )
        checkpoint.restore_optimizer("optim_G", optimizer, held)
        begin = meta["step"]
    total = sum(o.steps)
    started = time.time()
    sums = np.zeros(4)
    out = folder / "network.safetensors"
    front_images = None
    for number, step in enumerate(schedule(o)):
        if number < begin:
            continue
        optimizer.param_groups[0]["lr"] = step.lr
        # the seed depends on the step alone, so that a resumed run samples what a straight run would
        rng = np.random.default_rng([o.seed, number])
        torch.manual_seed(int(rng.integers(1 << 62)))
        rows = rng.integers(len(pool.z), size=o.heads)
        density, colour, planes = losses(
            G, pool.draw(rng, rows, o.candidates), pool.empty, o, step.edge, step.planes
        )
        loss = density + step.colour * colour
        image_error = torch.zeros(1)
        if step.images > 0:
            front_images = front_images or FrontImages(pool.z, o.seed)
            image_error = front_images.loss(G, planes, rows, front_images.windows(rng, rows, o.window))
            loss = loss + step.images * image_error
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        optimizer.step()
        with torch.no_grad():
            decay = min(o.ema, 1 - 1 / (number + 1))
            for mean, value in zip(G_ema.parameters(), G.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
            for mean, value in zip(G_ema.buffers(), G.buffers(), strict=True):
                mean.copy_(value)
        sums += [*(float(error.detach().mean()) for error in (density, colour, image_error)), 1]
        if (number + 1) % 100 == 0:
            rate = (time.time() - started) / (number + 1 - begin)
            means = {
                name: round(float(value / sums[3]), 4)
                for name, value in zip(("density", "colour", "picture"), sums, strict=False)
            }
            line = {
                "step": number + 1,
                "stage": step.stage,
                "lr": round(step.lr, 5),
                **means,
                "seconds_a_step": round(rate, 3),
                "minutes_left": round(rate * (total - number - 1) / 60, 1),
            }
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
            sums[:] = 0
        if (number + 1) % o.save_every == 0 or number + 1 == total:
            made.cur_nimg = (number + 1) * o.heads
            nets.save(out, made)
            tensors = {**modules.state_dict(), **checkpoint.optimizer_tensors("optim_G", optimizer)}
            checkpoint.write(folder, made.cur_nimg, tensors, {"step": number + 1, "options": asdict(o)})
    return out


@dataclass(frozen=True, kw_only=True)
class FrontTraining:
    """Settings of training the discriminator on front images against a frozen generator."""

    data: str = "synthetic:people64"
    steps: int = 700
    batch: int = 8
    lr: float = 0.002
    gamma: float = 0.2  # weight of R1
    seed: int = 0


def train_discriminator(made: nets.Networks, o: FrontTraining = FrontTraining()) -> list[float]:
    """Train D; return the loss of each step. Fakes are those of G_ema, under cameras of the dataset."""
    config = GanConfig(
        gen_pose_cond=False, gamma=o.gamma, dlr=o.lr, blur_fade_kimg=0, density_reg=0, nrr_initial=PIXELS
    )
    dataset = ImageFolderDataset(resolve_dataset(o.data), resolution=PIXELS, c_dim=25)
    G = copy.deepcopy(made.G_ema)
    D = made.D.requires_grad_(True)
    phases = GanPhases(G, D, config)
    optimizer = lazy_adam(D, config.dlr, config.d_reg_interval)
    losses = []
    for step in range(o.steps):
        rng = np.random.default_rng([o.seed, step])
        torch.manual_seed(int(rng.integers(1 << 62)))
        images, labels = zip(*(dataset[i] for i in rng.integers(len(dataset), size=o.batch)), strict=True)
        cameras = torch.from_numpy(
            np.stack([dataset.get_label(i) for i in rng.integers(len(dataset), size=o.batch)])
        )
        real = torch.from_numpy(np.stack(images)).float() / 127.5 - 1
        batch = Batch(
            real, torch.from_numpy(np.stack(labels)), torch.randn(o.batch, 64), cameras, step * o.batch
        )
        terms = [(phases.d_main, 1)] + [(phases.d_reg, config.d_reg_interval)] * (
            step % config.d_reg_interval == 0
        )
        for term, gain in terms:
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for loss in term(batch):
                (loss.value.mean() * gain).backward()
                total += float(loss.value.detach().mean())
            optimizer.step()
            losses += [total] * (gain == 1)
        if (step + 1) % 50 == 0:
            print(f"D: step {step + 1} of {o.steps}, loss {np.mean(losses[-50:]):.3f}", flush=True)
    made.D.requires_grad_(False)
    return losses
