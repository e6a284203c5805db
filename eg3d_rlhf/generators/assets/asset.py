"""Assets under optimisation: a `Field` whose values are parameters. Finished assets form a generator family.

Slabs, depth maps, point clouds, meshes and rewards use an asset like any other field.

Letters: A assets, P points, D, H, W = grid points along z, y, x, M rays, S samples along a ray, r pixels per
edge; of the generator N samples, Z z_dim.
"""

import abc
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch

from eg3d_rlhf.core.field import EMPTY, LEVEL, OWN, Bounds, CameraFamily, Rendering, RenderOptions, march
from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Family, Generator, latents, register
from training import networks
from training.storage import load_strict, read_tensors

ARCHITECTURE = "assets"  # the name of the family in network files
RESOLUTION = 64  # pixels per edge of a render without a given resolution
_EDGE = 1e-4  # tolerance of the bounds, as a fraction of half a side: rays end exactly on the bounds
KINDS: Registry[type["Asset"]] = Registry(
    "kind of asset",
    {
        "voxels": "eg3d_rlhf.generators.assets.grids",
        "planes": "eg3d_rlhf.generators.assets.grids",
        "latents": "eg3d_rlhf.generators.assets.latents",
    },
)


class Asset(torch.nn.Module, abc.ABC):
    """A assets in one module, each with its own parameters: the first axis of every parameter is A.

    The assets fill the unit cube about the origin. Renders have no jitter, are black where space is empty,
    and are differentiable in the parameters.
    """

    kind: ClassVar[str]  # name in files and flags
    level = LEVEL
    bounds = Bounds(border=0.0)

    def __init_subclass__(cls, **more) -> None:
        """Add the subclass to the registry of kinds."""
        super().__init_subclass__(**more)
        KINDS.add(cls.kind, cls)

    @property
    @abc.abstractmethod
    def settings(self) -> dict:
        """Return the constructor's arguments except `assets`, as JSON values."""

    @property
    @abc.abstractmethod
    def samples(self) -> int:
        """Return the samples along a ray of a render that does not specify them."""

    @abc.abstractmethod
    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return raw density [A, P] and colour [A, P, 3] in 0..1 at world points [A, P, 3] inside the
        bounds.
        """

    @abc.abstractmethod
    def regularisers(self) -> dict[str, torch.Tensor]:
        """Return named penalties [A], smaller for simpler assets. A loss adds them with weights."""

    @abc.abstractmethod
    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return the parameters by the learning rate that they need: 'grid', and 'decoder' if there is
        one.
        """

    def __len__(self) -> int:
        return len(next(self.parameters()))

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """Return the raw density, see `Field`. Differentiable in the parameters and the points."""
        points = self._per_asset(points)
        # The cube is centred at the origin, see `bounds`.
        inside = (points.abs() <= self.bounds.side / 2 * (1 + _EDGE)).all(dim=-1)
        # Points outside are decoded as well, and their result is discarded.
        return torch.where(inside, self.decode(points)[0], EMPTY)

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        """Return the raw density at grid points, see `Field`."""
        return self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """Return the colour, see `Field`."""
        return self.decode(self._per_asset(points))[1]

    def _per_asset(self, points: torch.Tensor) -> torch.Tensor:
        """Expand points [P, 3] or [A, P, 3] to [A, P, 3], on the device of the parameters."""
        return points.to(next(self.parameters())).expand(len(self), -1, -1)

    def render(self, cameras: torch.Tensor, options: RenderOptions = OWN) -> Rendering:
        """Render, see `Field`."""
        return march(self, cameras.to(next(self.parameters())), options, RESOLUTION, self.samples)

    def pick(self, indices: list[int]) -> Self:
        """Return a copy of some of the assets; the mesh export needs a single one."""
        # All attributes and buffers, with the parameters replaced below.
        chosen = copy.deepcopy(self)
        for name, parameter in self.named_parameters():
            selected = torch.nn.Parameter(
                parameter.detach()[indices].clone(), requires_grad=parameter.requires_grad
            )
            setattr(chosen, name, selected)
        return chosen

    def save(self, path: str | Path, pairs: Sequence[tuple[str, int]] = ()) -> None:
        """Write a network file, which other commands accept as a generator.

        Args: pairs: prompt and seed of each asset.
        """
        # the same parameter names as in `AssetNetwork`
        network = torch.nn.ModuleDict({"asset": self})
        arguments = {"field": self.kind, "assets": len(self), "settings": self.settings}
        training_set = {"name": "distilled", **({"pairs": [list(pair) for pair in pairs]} if pairs else {})}
        # No G and D: finished assets are not trained further.
        networks.save(
            path,
            networks.Networks(None, None, network, arguments, None, training_set, architecture=ARCHITECTURE),
        )


class AssetNetwork(torch.nn.Module):
    """The network in a file of assets: an asset of a kind, with its number of assets and its settings.

    Raises: ValueError.
    """

    def __init__(self, field: str, assets: int, settings: dict):
        super().__init__()
        self.asset = KINDS[field](assets, **settings)


def load_assets(path: str | Path) -> Asset:
    """Read assets that `Asset.save` wrote. Raises: ValueError for another kind of file or of field."""
    tensors, meta = read_tensors(path, "network")
    # Files of EG3D networks have no such entry.
    if meta.get("architecture") != ARCHITECTURE:
        got = meta.get("architecture", networks.EG3D)
        raise ValueError(
            f"load_assets({Path(path).name}): expected finished assets, got a generator of the family {got}."
            " Pass a file of assets."
        )
    network = AssetNetwork(**meta["G_kwargs"])
    load_strict(
        network,
        {name.removeprefix("G_ema."): value for name, value in tensors.items()},
        f"load_assets({Path(path).name})",
    )
    return network.asset


def sparsity(raw: torch.Tensor, step: float) -> dict[str, torch.Tensor]:
    """Compute penalties [A] on the opacity o = 1 - exp(-softplus(raw - 1) step) of grid points.

    Args: raw: density [A, ...] at points that are `step` world units apart.
    Returns: 'sparsity', the mean of o; 'opacity', its mean binary entropy in nats, which is 0 if every point
    is either full or empty.
    """
    optical_depth = torch.nn.functional.softplus(raw - 1) * step
    # 1 - exp(-x), accurate for small x
    opacity = -torch.expm1(-optical_depth)
    # -log(1 - o) is the optical depth; the clamp avoids log(0)
    entropy = (1 - opacity) * optical_depth - opacity * opacity.clamp_min(1e-12).log()
    return {"sparsity": opacity.flatten(1).mean(dim=1), "opacity": entropy.flatten(1).mean(dim=1)}


# Finished assets as a generator family: the file that a run writes for an arm. Seeds 0, 1, 2, ... are its
# assets in order. Labelling, the blind study, meshes, images and rewards then use it like any generator. It
# cannot be tuned, since it has no latent space between its shapes.


class AssetGenerator:
    """A `Generator` around A assets. It has as many shapes as assets (attribute `count`)."""

    architecture = ARCHITECTURE
    conditioned = False
    z_dim = 8  # latents of seeds only identify the asset
    w_dim = 1
    num_ws = 1
    img_resolution = RESOLUTION
    # far enough to show the full cube, corners included, with the focal length of portraits
    cameras = CameraFamily(radius=6.0)

    def __init__(self, module: AssetNetwork):
        self.module = module
        self.count = len(module.asset)
        self.bounds = module.asset.bounds
        self.level = module.asset.level

    def mapping(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> torch.Tensor:
        """Return ws [N, 1, 1], the indices of the assets whose seeds have the latents z [N, Z].

        Camera and truncation have no effect.

        Raises: ValueError for a latent of no asset.
        """
        del c, truncation_psi, truncation_cutoff
        latents_of_assets = latents(range(self.count), self.z_dim).to(z)  # [A, Z]
        # Exact comparison: latents of seeds are reproducible bitwise.
        same = (z[:, None] == latents_of_assets).all(dim=2)  # [N, A]
        if not bool(same.any(dim=1).all()):
            raise ValueError(
                f"assets: expected latents of seeds 0 to {self.count - 1}, the shapes of this file, got"
                " others. Use these seeds."
            )
        return same.float().argmax(dim=1).view(-1, 1, 1).to(z)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> Asset:
        """Return the assets with the indices ws [N, 1, 1].

        Raises: ValueError for values that are no index. Assets cannot be interpolated.
        """
        del noise_mode
        indices = ws.flatten().tolist()
        if ws.shape[1:] != (1, 1) or not all(index in range(self.count) for index in indices):
            got = f"{list(ws.shape)} with {indices[:4]}"
            expected = f"ws [N, 1, 1] of indices below {self.count}"
            raise ValueError(
                f"assets: expected {expected}, got {got}. Assets cannot be interpolated; pass latents of"
                " seeds."
            )
        return self.module.asset.pick([int(index) for index in indices])


def wrap(module: AssetNetwork) -> Generator:
    """Wrap a network as a generator, for the registry."""
    return AssetGenerator(module)


register(Family(ARCHITECTURE, AssetNetwork, None, wrap))
