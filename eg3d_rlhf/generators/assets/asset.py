"""Base class of assets, and the generator family of finished assets.

An asset is a 3D shape (`Field`) whose values are the parameters of a module. Score distillation optimises an
asset. Slabs, depth maps, point clouds, meshes and rewards use it like any other field.

Shapes: A is the number of assets, P of points, and D, H and W are numbers of grid points along z, y and x.
For the generator of finished assets, N is the number of samples and Z is z_dim.
"""

import abc
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch

from eg3d_rlhf.core.field import (
    DEFAULT_OPTIONS,
    EMPTY,
    LEVEL,
    Bounds,
    CameraFamily,
    Rendering,
    RenderOptions,
    march,
)
from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Family, Generator, latents, register
from training import networks
from training.storage import load_strict, read_tensors

ARCHITECTURE = "assets"  # name of the family in network files
RESOLUTION = 64  # default number of pixels per edge of a render
# Relative tolerance of the bounds. Rays end exactly on the bounds, and rounding may move a sample out
# of them.
_EDGE = 1e-4
KINDS: Registry[type["Asset"]] = Registry(
    "kind of asset",
    {
        "voxels": "eg3d_rlhf.generators.assets.grids",
        "planes": "eg3d_rlhf.generators.assets.grids",
        "latents": "eg3d_rlhf.generators.assets.latents",
    },
)


class Asset(torch.nn.Module, abc.ABC):
    """Base class of modules that contain A assets of the same kind.

    Each asset has its own parameters: the first axis of every parameter is A. The bounds of the assets are
    the unit cube about the origin. Renders have no jitter, are black where space is empty, and are
    differentiable in the parameters.
    """

    kind: ClassVar[str]  # name of the kind in files and flags
    level = LEVEL
    bounds = Bounds(border=0.0)

    def __init_subclass__(cls, **class_kwargs) -> None:
        """Add the subclass to the registry of kinds."""
        super().__init_subclass__(**class_kwargs)
        KINDS.add(cls.kind, cls)

    @property
    @abc.abstractmethod
    def settings(self) -> dict:
        """Return the constructor's arguments other than `assets`, as JSON values by name."""

    @property
    @abc.abstractmethod
    def samples(self) -> int:
        """Return the default number of samples along a ray of a render."""

    @abc.abstractmethod
    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the raw density [A, P] and the colour [A, P, 3] in 0..1 at points inside the bounds.

        Args: points: world points [A, P, 3].
        """

    @abc.abstractmethod
    def regularisers(self) -> dict[str, torch.Tensor]:
        """Return penalties by name, each [A]. They are smaller for simpler assets.

        The loss of the optimisation adds them with weights.
        """

    @abc.abstractmethod
    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return the parameters by group: name -> list. The groups have different learning rates.

        The group 'grid' contains the values of the grid or the latents. The group 'decoder' exists only for
        assets with a decoder.
        """

    def __len__(self) -> int:
        return len(next(self.parameters()))

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """Return the raw density [A, P], see `Field`. Differentiable in the parameters and the points."""
        points = self._per_asset(points)
        # The cube is centred at the origin, see `bounds`.
        is_inside = (points.abs() <= self.bounds.side / 2 * (1 + _EDGE)).all(dim=-1)
        # Points outside are decoded, too, and their density is discarded.
        raw_density, _ = self.decode(points)
        return torch.where(is_inside, raw_density, EMPTY)

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        """Return the raw density [A, D, H, W] at grid points, see `Field`."""
        return self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """Return the colour [A, P, 3] in 0..1, see `Field`."""
        return self.decode(self._per_asset(points))[1]

    def _per_asset(self, points: torch.Tensor) -> torch.Tensor:
        """Expand points [P, 3] or [A, P, 3] to [A, P, 3], and move them to the device of the parameters."""
        return points.to(next(self.parameters())).expand(len(self), -1, -1)

    def render(self, cameras: torch.Tensor, options: RenderOptions = DEFAULT_OPTIONS) -> Rendering:
        """Render the assets from cameras, see `Field`."""
        return march(self, cameras.to(next(self.parameters())), options, RESOLUTION, self.samples)

    def select(self, asset_indices: list[int]) -> Self:
        """Return a copy that contains only the assets with the given indices, in their order."""
        # The copy has all attributes and buffers. Its parameters are replaced below.
        selected_assets = copy.deepcopy(self)
        for parameter_name, parameter in self.named_parameters():
            selected_parameter = torch.nn.Parameter(
                parameter.detach()[asset_indices].clone(), requires_grad=parameter.requires_grad
            )
            setattr(selected_assets, parameter_name, selected_parameter)
        return selected_assets

    def save(self, path: str | Path, pairs: Sequence[tuple[str, int]] = ()) -> None:
        """Write a network file, which other commands accept as a generator.

        Args:
            path: path of the file.
            pairs: pair (prompt, seed) of each asset, which is stored for information. Without pairs, the file
                contains no such entry.
        """
        # With the key "asset", the parameters have the names that they have in `AssetNetwork`.
        network = torch.nn.ModuleDict({"asset": self})
        constructor_arguments = {"field": self.kind, "assets": len(self), "settings": self.settings}
        training_set = {"name": "distilled", **({"pairs": [list(pair) for pair in pairs]} if pairs else {})}
        # The file contains no G and no D, because finished assets are not trained further.
        networks.save(
            path,
            networks.Networks(
                None, None, network, constructor_arguments, None, training_set, architecture=ARCHITECTURE
            ),
        )


class AssetNetwork(torch.nn.Module):
    """Network that contains finished assets, as stored in a network file.

    Args:
        field: kind of the assets, a name in KINDS.
        assets: number of assets.
        settings: other arguments of the constructor of this kind.
    Raises: ValueError for an unknown kind.
    """

    def __init__(self, field: str, assets: int, settings: dict):
        super().__init__()
        self.asset = KINDS[field](assets, **settings)


def load_assets(path: str | Path) -> Asset:
    """Read assets that `Asset.save` wrote.

    Raises: ValueError for a file of another family, an unknown kind of assets, or missing tensors.
    """
    tensors, meta = read_tensors(path, "network")
    if meta.get("architecture") != ARCHITECTURE:
        # Files of EG3D networks have no entry `architecture`.
        family_of_file = meta.get("architecture", networks.EG3D)
        raise ValueError(
            f"load_assets({Path(path).name}): expected finished assets, got a generator of the family"
            f" {family_of_file}. Pass a file that Asset.save wrote."
        )
    network = AssetNetwork(**meta["G_kwargs"])
    load_strict(
        network,
        {tensor_name.removeprefix("G_ema."): tensor for tensor_name, tensor in tensors.items()},
        f"load_assets({Path(path).name})",
    )
    return network.asset


def sparsity(raw_density: torch.Tensor, grid_spacing: float) -> dict[str, torch.Tensor]:
    """Compute two penalties on the opacity o of grid points.

    The opacity is o = 1 - exp(-softplus(raw_density - 1) grid_spacing), as in EG3D's ray marcher.

    Args:
        raw_density: raw density [A, ...] at the points of a grid.
        grid_spacing: distance of neighbouring grid points, world units.
    Returns: 'sparsity' [A], the mean of o; 'opacity' [A], the mean binary entropy of o in nats, which is 0 if
        every point is either opaque or empty.
    """
    optical_depth = torch.nn.functional.softplus(raw_density - 1) * grid_spacing
    # 1 - exp(-x); expm1 is accurate for small x.
    opacity = -torch.expm1(-optical_depth)
    # Binary entropy -(1 - o) log(1 - o) - o log(o), where -log(1 - o) is the optical depth. The clamp
    # avoids log(0).
    entropy = (1 - opacity) * optical_depth - opacity * opacity.clamp_min(1e-12).log()
    return {"sparsity": opacity.flatten(1).mean(dim=1), "opacity": entropy.flatten(1).mean(dim=1)}


# Finished assets as a generator family. A distillation run writes such a file. The seeds 0, 1, 2, ... are its
# assets in order. Labelling, the blind study, meshes, images and rewards use it like any other generator. It
# cannot be tuned, because it has no continuous latent space.


class AssetGenerator:
    """A `Generator` whose shapes are finished assets. Its attribute `count` is the number A of assets."""

    architecture = ARCHITECTURE
    conditioned = False
    z_dim = 8  # a latent only identifies an asset, so its size is arbitrary
    w_dim = 1
    num_ws = 1
    img_resolution = RESOLUTION
    # At this distance, with the focal length of FFHQ portraits, the image shows the full cube with
    # its corners.
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
        """Return the index of the asset of each latent, in the shape of style vectors ws [N, 1, 1].

        The camera and the truncation have no effect.

        Args: z: latents [N, Z] of the seeds 0 to count - 1.
        Raises: ValueError for any other latent.
        """
        del c, truncation_psi, truncation_cutoff
        latents_of_assets = latents(range(self.count), self.z_dim).to(z)  # [A, Z]
        # Latents of seeds are bitwise reproducible, so they are compared exactly: [N, 1, Z] == [A, Z] ->
        # [N, A].
        is_latent_of_asset = (z[:, None] == latents_of_assets).all(dim=2)
        unknown_count = int((~is_latent_of_asset.any(dim=1)).sum())
        if unknown_count:
            raise ValueError(
                f"assets: {unknown_count} of {len(z)} latents belong to no asset of this file. Use the seeds"
                f" 0 to {self.count - 1}."
            )
        # argmax returns the index of the single True of each row.
        return is_latent_of_asset.float().argmax(dim=1).view(-1, 1, 1).to(z)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> Asset:
        """Return the assets whose indices ws [N, 1, 1] contains.

        Raises: ValueError for values that are no index of an asset, such as interpolated ones.
        """
        del noise_mode
        asset_indices = ws.flatten().tolist()
        if ws.shape[1:] != (1, 1) or not all(
            asset_index in range(self.count) for asset_index in asset_indices
        ):
            raise ValueError(
                f"assets: expected ws [N, 1, 1] with indices from 0 to {self.count - 1}, got"
                f" {list(ws.shape)} with {asset_indices[:4]}. Assets cannot be interpolated; pass ws as"
                " `mapping` returns them."
            )
        return self.module.asset.select([int(asset_index) for asset_index in asset_indices])


def wrap(module: AssetNetwork) -> Generator:
    """Return a `Generator` around a network of finished assets."""
    return AssetGenerator(module)


# A finished asset has no latents that could be optimised.
register(Family(ARCHITECTURE, AssetNetwork, None, wrap, released_tasks=("score", "label")))
