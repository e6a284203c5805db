"""Assets under optimisation: a `Field` whose numbers are parameters. Slabs, depth maps, clouds, meshes and
rewards read it as any other. What is finished is a generator family.

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

ARCHITECTURE = "assets"  # as network files name their family
RESOLUTION = 64  # pixels per edge of a rendering that does not say
_EDGE = 1e-4  # share of half a side by which a point may lie outside: rays end on the bounds
KINDS: Registry[type["Asset"]] = Registry(
    "kind of asset",
    {
        "voxels": "eg3d_rlhf.generators.assets.grids",
        "planes": "eg3d_rlhf.generators.assets.grids",
        "latents": "eg3d_rlhf.generators.assets.latents",
    },
)


class Asset(torch.nn.Module, abc.ABC):
    """A assets at once, each with parameters of its own: the first axis of every parameter is A. Fills the
    unit cube about the origin.

    Renderings are without jitter, black where nothing is, and differentiable in the parameters.
    """

    kind: ClassVar[str]
    level = LEVEL
    bounds = Bounds(border=0.0)

    def __init_subclass__(cls, **more) -> None:
        super().__init_subclass__(**more)
        KINDS.add(cls.kind, cls)

    @property
    @abc.abstractmethod
    def settings(self) -> dict:
        """Arguments of the constructor but for `assets`, as JSON values."""

    @property
    @abc.abstractmethod
    def samples(self) -> int:
        """Samples along a ray that a rendering takes unless it says otherwise."""

    @abc.abstractmethod
    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw density [A, P] and colour [A, P, 3] in 0..1 at world points [A, P, 3] inside the bounds."""

    @abc.abstractmethod
    def regularisers(self) -> dict[str, torch.Tensor]:
        """Named penalties [A], each smaller for simpler assets; a loss adds them with weights."""

    @abc.abstractmethod
    def groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Parameters by the learning rate they want: 'grid', and 'decoder' where there is one."""

    def __len__(self) -> int:
        return len(next(self.parameters()))

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """See `Field`. Differentiable in the parameters and the points."""
        points = self._of_each(points)
        inside = (points.abs() <= self.bounds.side / 2 * (1 + _EDGE)).all(dim=-1)
        return torch.where(inside, self.decode(points)[0], EMPTY)

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        """See `Field`."""
        return self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """See `Field`."""
        return self.decode(self._of_each(points))[1]

    def _of_each(self, points: torch.Tensor) -> torch.Tensor:
        """Points [P, 3] or [A, P, 3] as [A, P, 3]."""
        return points.to(next(self.parameters())).expand(len(self), -1, -1)

    def render(self, cameras: torch.Tensor, options: RenderOptions = OWN) -> Rendering:
        """See `Field`."""
        return march(self, cameras.to(next(self.parameters())), options, RESOLUTION, self.samples)

    def pick(self, indices: list[int]) -> Self:
        """A copy of some of the assets, as meshes want one."""
        chosen = copy.deepcopy(self)
        for name, parameter in self.named_parameters():
            kept = torch.nn.Parameter(
                parameter.detach()[indices].clone(), requires_grad=parameter.requires_grad
            )
            setattr(chosen, name, kept)
        return chosen

    def save(self, path: str | Path, pairs: Sequence[tuple[str, int]] = ()) -> None:
        """Write as a network file, which tools take as a generator.

        Args: pairs: prompt and seed of each asset.
        """
        held = torch.nn.ModuleDict({"asset": self})
        made = {"field": self.kind, "assets": len(self), "settings": self.settings}
        trained = {"name": "distilled", **({"pairs": [list(pair) for pair in pairs]} if pairs else {})}
        networks.save(
            path, networks.Networks(None, None, held, made, None, trained, architecture=ARCHITECTURE)
        )


class AssetNetwork(torch.nn.Module):
    """What a network file of assets holds: the field of a kind, so many assets, the settings of the kind.

    Raises: ValueError.
    """

    def __init__(self, field: str, assets: int, settings: dict):
        super().__init__()
        self.asset = KINDS[field](assets, **settings)


def load_assets(path: str | Path) -> Asset:
    """The assets that `Asset.save` wrote. Raises: ValueError for another kind of file or of field."""
    tensors, meta = read_tensors(path, "network")
    if meta.get("architecture") != ARCHITECTURE:
        got = meta.get("architecture", networks.EG3D)
        raise ValueError(
            f"load_assets({Path(path).name}): expected finished assets, got a generator of {got}. Pass"
            " another file."
        )
    network = AssetNetwork(**meta["G_kwargs"])
    load_strict(
        network,
        {name.removeprefix("G_ema."): value for name, value in tensors.items()},
        f"load_assets({Path(path).name})",
    )
    return network.asset


def sparsity(raw: torch.Tensor, step: float) -> dict[str, torch.Tensor]:
    """Penalties [A] of raw density [A, ...] at points `step` world units apart, on their opacity
    o = 1 - exp(-softplus(raw - 1) step).

    Returns: 'sparsity', the mean of o; 'opacity', its mean binary entropy in nats, which is 0 where all is
        either full or empty.
    """
    free = torch.nn.functional.softplus(raw - 1) * step  # optical depth
    opacity = -torch.expm1(-free)
    entropy = (1 - opacity) * free - opacity * opacity.clamp_min(1e-12).log()
    return {"sparsity": opacity.flatten(1).mean(dim=1), "opacity": entropy.flatten(1).mean(dim=1)}


# Finished assets as a generator family: the file that a run writes for an arm; seeds 0, 1, 2, ... name its
# assets in order. Labelling, the blind study, meshes, pictures and rewards then take it as any generator. It
# cannot be tuned: a shape per seed is all it has.


class AssetGenerator:
    """`Generator` around A assets, which can be counted."""

    architecture = ARCHITECTURE
    conditioned = False
    z_dim = 8
    w_dim = 1
    num_ws = 1
    img_resolution = RESOLUTION
    cameras = CameraFamily(radius=6.0)  # the whole cube, also from its corners, with the lens of portraits

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
        """ws [N, 1, 1], the numbers of the assets whose seeds have the latents z [N, Z]. Camera and
        truncation change nothing.

        Raises: ValueError for the latent of no asset.
        """
        del c, truncation_psi, truncation_cutoff
        known = latents(range(self.count), self.z_dim).to(z)  # [A, Z]
        same = (z[:, None] == known).all(dim=2)  # [N, A]
        if not bool(same.any(dim=1).all()):
            raise ValueError(
                f"assets: expected latents of seeds 0 to {self.count - 1}, got others. This file has"
                f" {self.count} shapes."
            )
        return same.float().argmax(dim=1).view(-1, 1, 1).to(z)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> Asset:
        """The assets of numbers ws [N, 1, 1].

        Raises: ValueError for what is between them: there is nothing.
        """
        del noise_mode
        numbers = ws.flatten().tolist()
        if ws.shape[1:] != (1, 1) or not all(number in range(self.count) for number in numbers):
            got = f"{list(ws.shape)} with {numbers[:4]}"
            wanted = f"ws [N, 1, 1] of whole numbers below {self.count}"
            raise ValueError(f"assets: expected {wanted}, got {got}. There is nothing between two assets.")
        return self.module.asset.pick([int(number) for number in numbers])


def wrap(module: AssetNetwork) -> Generator:
    """What the registry calls."""
    return AssetGenerator(module)


register(Family(ARCHITECTURE, AssetNetwork, None, wrap))
