"""Interface through which the package uses generators, and the registry of generator families.

A family is an architecture of generators, for example EG3D. It is defined in one file of this folder or of a
plugin (see docs/extending.md), as a network and a class around it that implements `Generator`. A network file
contains the name of its family, by which `load_generator` finds these classes.

Shapes: N is the number of samples, Z is z_dim, L is the number of style vectors of a sample (num_ws), W
is w_dim.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from eg3d_rlhf.core.field import Bounds, CameraFamily, Field
from eg3d_rlhf.core.input_paths import KEPT as KEPT
from eg3d_rlhf.core.input_paths import find_network as find_network
from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.generators import pickles, state_dicts
from training import networks, storage


@runtime_checkable
class Generator(Protocol):
    """Interface to a network that maps latents to 3D shapes (`Field`)."""

    @property
    def architecture(self) -> str:
        """Return the name of the family."""

    @property
    def module(self) -> torch.nn.Module:
        """Return the network itself, with its parameters, buffers and training mode."""

    @property
    def z_dim(self) -> int:
        """Return the number of entries of a latent z."""

    @property
    def w_dim(self) -> int:
        """Return the number of entries of a style vector w."""

    @property
    def num_ws(self) -> int:
        """Return the number of style vectors of a sample, one for each layer."""

    @property
    def img_resolution(self) -> int:
        """Return the number of pixels per edge of the final image."""

    @property
    def bounds(self) -> Bounds:
        """Return the cube that contains all shapes of the generator."""

    @property
    def level(self) -> float:
        """Return the raw density (before the activation) that defines the surface of a shape."""

    @property
    def cameras(self) -> CameraFamily:
        """Return the cameras that the generator was trained with."""

    @property
    def conditioned(self) -> bool:
        """Return True if the mapping network is conditioned on the camera."""

    def mapping(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> torch.Tensor:
        """Map latents to style vectors ws [N, L, W].

        Args:
            z: latents [N, Z].
            c: camera labels [N, 25] that the mapping network is conditioned on.
            truncation_psi: factor in 0..1 on the distance of w to the mean w; 1 changes nothing.
            truncation_cutoff: number of layers, from the first one, that are truncated; None: all layers.
        """

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> Field:
        """Synthesise N shapes. The synthesis network runs once, in this call.

        Args:
            ws: style vectors [N, L, W].
            noise_mode: noise of the synthesis network, 'const', 'random' or 'none', as in StyleGAN.
        """


def shape_count(generator: Generator) -> int | None:
    """Return the number of shapes of a generator with a finite number of shapes, else None.

    Such a generator has an attribute `count`, and only the seeds 0 to count - 1 are valid.
    """
    # Most families have a continuous latent space and no such attribute.
    return getattr(generator, "count", None)


def check_seeds(generator: Generator, largest_seed: int, who: str) -> None:
    """Raise ValueError if a seed is too large for a generator with a finite number of shapes.

    Args:
        generator: the generator; with a continuous latent space every seed is valid.
        largest_seed: largest of the seeds to check.
        who: start of the message, such as a flag.
    """
    generator_shape_count = shape_count(generator)
    if generator_shape_count is not None and largest_seed >= generator_shape_count:
        raise ValueError(
            f"{who}: expected seeds 0 to {generator_shape_count - 1}, one for each shape of this network, got"
            f" {largest_seed}. Use smaller seeds."
        )


# What can be done with a generator. score: rewards and measures of its shapes; label: people compare its
# shapes; steer: choose among its latents or optimise them (best-of-n, inversion), with unchanged weights;
# tune: change its weights, which needs a discriminator.
TASKS = ("score", "label", "steer", "tune")


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of generators: its classes and its name in network files."""

    name: str  # name of the family in network files
    module: type[torch.nn.Module]  # class of G; a network file contains its constructor arguments
    # Class of D. None: the family cannot be trained in this project.
    discriminator: type[torch.nn.Module] | None
    wrap: Callable[[Any], Generator]  # returns a `Generator` around a network of the class `module`
    # Tasks that are possible with files as their authors released them, names in TASKS.
    released_tasks: tuple[str, ...] = TASKS
    # (path, device) -> networks: reader of the family's files if they are no network files. None: they are.
    load_file: Callable[[str | Path, str | torch.device], networks.Networks] | None = None


# Kind of a file, see training.storage -> family that reads it. Other families have network files.
_FAMILY_BY_KIND = {"latents": "stored-latents"}
FAMILIES: Registry[Family] = Registry(
    "generator family",
    {
        "eg3d": "eg3d_rlhf.generators.eg3d",
        "hyplanehead": "eg3d_rlhf.generators.full_heads",
        "panohead": "eg3d_rlhf.generators.full_heads",
        "spherehead": "eg3d_rlhf.generators.full_heads",
        "assets": "eg3d_rlhf.generators.assets.asset",
        "stored-latents": "eg3d_rlhf.generators.stored_latents",
    },
)


def register(family: Family) -> Family:
    """Add a family to the registry `FAMILIES` and return it."""
    return FAMILIES.add(family.name, family)


def network_classes(architecture: str) -> networks.Classes:
    """Return the classes of G and D of a family. The class of D is None if the family has no discriminator.

    Args: architecture: name of the family.
    Raises: ValueError, which lists the existing families, for an unknown name.
    """
    family = FAMILIES[architecture]
    return family.module, family.discriminator


def as_generator(network: Any) -> Generator:
    """Wrap a network in the `Generator` of its family. The class of the network determines the family.

    An object that is no torch module is a `Generator` already, and is returned unchanged.

    Raises: TypeError if the network belongs to no registered family.
    """
    if not isinstance(network, torch.nn.Module):
        return network
    family_by_class = {family.module: family for family in FAMILIES.values()}
    # In the method resolution order a class precedes its base classes. This matters, because the network of a
    # family may extend the network of another family.
    for network_class in type(network).__mro__:
        if network_class in family_by_class:
            return family_by_class[network_class].wrap(network)
    raise TypeError(
        f"generator: expected a network of a registered family ({', '.join(FAMILIES)}), got"
        f" {type(network).__name__}. Register a family for this class, see docs/extending.md."
    )


@dataclasses.dataclass(frozen=True)
class LoadedGenerator:
    """A frozen generator that was read from a file, with the hash that identifies it."""

    generator: Generator  # wrapper of G_ema (moving average of G's weights) in eval mode
    hash: str  # SHA-256 of the state dict of G_ema
    path: Path  # the network file
    nets: networks.Networks  # all networks of the file: G_ema, and G and D if the file contains them

    @property
    def G(self) -> torch.nn.Module:
        """Return the network G_ema itself, without its wrapper."""
        return self.generator.module


# Rendering option of a network that holds the raw density at its surface. EG3D's own code ignores it.
SURFACE_LEVEL = "surface_level"


def set_level(nets: networks.Networks, level: float) -> None:
    """Set the raw density at the surface of a generator's shapes.

    Everything that is computed from a surface uses this level: meshes, renders of shapes, measured crops and
    measures. Files that are written from these networks contain it, so it has to be set only once.

    Args:
        nets: networks of the generator; G, G_ema and their constructor arguments are changed.
        level: raw density at the surface.
    Raises: ValueError if the level is not finite, or if the family of the generator has a fixed level.
    """
    if not math.isfinite(level):
        raise ValueError(f"--set level={level}: the level must be a finite number, such as 10.")
    if as_generator(nets.G_ema).level == level:
        return
    for module in (nets.G, nets.G_ema):
        # modules of other families have no rendering options
        if hasattr(module, "rendering_kwargs"):
            module.rendering_kwargs[SURFACE_LEVEL] = level
    if as_generator(nets.G_ema).level != level:
        raise ValueError(
            f"--set level={level:g}: the surface of a generator of the family {nets.architecture} is fixed at"
            f" the level {as_generator(nets.G_ema).level:g}. Remove --set level."
        )
    rendering_options = {**nets.G_kwargs["rendering_kwargs"], SURFACE_LEVEL: level}
    nets.G_kwargs = {**nets.G_kwargs, "rendering_kwargs": rendering_options}


def load_generator(
    source: str | Path | None = None, device: str | torch.device = "cpu", level: float | None = None
) -> LoadedGenerator:
    """Load a frozen generator.

    Args:
        source: path of a network file or a run folder, or None for the bundled generator. The network file is
            a .safetensors or .pt file of this project, or a .pkl file of EG3D, whose code is not executed. In
            a run folder, the snapshot that early stopping selected is loaded if there is one, else the newest
            snapshot.
        device: device of the networks.
        level: raw density at the surface of the shapes; None: the level in the file, else that of the family.
    Raises:
        FileNotFoundError: there is no such file, or the folder contains no snapshot.
        ValueError: the file is no network file, or its family is unknown.

    >>> load_generator().generator.z_dim
    64
    """
    network_path = find_network(source)
    nets = load_networks(network_path, device)
    if level is not None:
        set_level(nets, level)
    return LoadedGenerator(as_generator(nets.G_ema), networks.state_hash(nets.G_ema), network_path, nets)


def load_networks(
    path: str | Path, device: str | torch.device = "cpu", freeze_layers: int | None = None
) -> networks.Networks:
    """Load all networks of a file: a .safetensors or .pt file of this project, or a .pkl file of EG3D.

    A file of latents (`stored_latents`) is loaded as a network with a finite number of shapes.

    Args:
        path: path of the network file.
        device: device of the networks.
        freeze_layers: number of first layers of D that stay frozen; None: the value in the file.
    """
    # No code of the pickle is executed, see `pickles`.
    suffix = Path(path).suffix.lower()
    if suffix == pickles.SUFFIX:
        return pickles.load(path, device, freeze_layers)
    if suffix in state_dicts.SUFFIXES:
        return state_dicts.load(path, device, freeze_layers)
    family_of_kind = _FAMILY_BY_KIND.get(storage.kind_of(path) or "")
    if family_of_kind is not None:
        load_file = FAMILIES[family_of_kind].load_file
        assert load_file is not None  # families in _FAMILY_BY_KIND have a reader
        return load_file(path, device)
    return networks.load(path, device, freeze_layers, network_classes)


def read_description(path: str | Path) -> dict[str, Any]:
    """Describe the networks in a network file of any format, without building them.

    Returns: a dictionary with the name of the 'architecture', the names of the 'networks' in the file ('G',
        'D', 'G_ema'), 'G_kwargs', 'D_kwargs' (None without D), and 'neural_rendering_resolution' if the file
        contains it.
    Raises: FileNotFoundError if there is no such file; ValueError if it is no network file.
    """
    suffix = Path(path).suffix.lower()
    if suffix in state_dicts.SUFFIXES:
        return state_dicts.describe(path)
    if suffix == pickles.SUFFIX:
        # The pickle is parsed; the code in it is not run.
        snapshot = pickles.read(path)
        plan_by_name = pickles.plan(snapshot)
        return {
            "architecture": plan_by_name["G_ema"].architecture,
            "networks": list(plan_by_name),
            "G_kwargs": plan_by_name["G_ema"].kwargs,
            "D_kwargs": plan_by_name["D"].kwargs if "D" in plan_by_name else None,
            networks.RENDERED: pickles.neural_rendering_resolution(snapshot.networks["G_ema"]),
        }
    family_of_kind = _FAMILY_BY_KIND.get(storage.kind_of(path) or "")
    if family_of_kind is not None:
        return {
            "architecture": family_of_kind,
            "networks": ["G_ema"],
            "G_kwargs": storage.read_meta(path),
            "D_kwargs": None,
        }
    meta = storage.read_meta(path, "network")
    tensor_names = storage.read_names(path, "network")
    network_names = {tensor_name.partition(".")[0] for tensor_name in tensor_names}
    return {"architecture": networks.EG3D, **meta, "networks": sorted(network_names)}


def tasks_text(family_name: str, network_names: Sequence[str] | None = None) -> str:
    """Return the tasks of a family or a file as text, such as 'score, label, steer; no tuning'.

    Args:
        family_name: name of the family.
        network_names: networks in a file, 'G', 'D' and 'G_ema'; None: a file as its authors released it.
    """
    family = FAMILIES[family_name]
    task_names = list(family.released_tasks)
    if network_names is not None:
        # A file that this project wrote may have a discriminator where released files have none.
        task_names = [task_name for task_name in task_names if task_name != "tune"]
        if family.discriminator is not None and "D" in network_names:
            task_names.append("tune")
    return ", ".join(task_names) + ("" if "tune" in task_names else "; no tuning")


def check_trainable(path: str | Path, description: dict[str, Any]) -> None:
    """Raise ValueError if a network file cannot be tuned, and say what can be done with it instead.

    Args:
        path: path of the file.
        description: description of the file, from `read_description`.
    """
    family_name = description["architecture"]
    family = FAMILIES[family_name]
    if family.discriminator is not None and "D" in description["networks"]:
        return
    tasks = tasks_text(family_name, description["networks"])
    if family.discriminator is None:
        reason = "its family has no discriminator"
    elif "tune" in family.released_tasks:
        reason = "the file has no discriminator D"
    else:
        reason = "discriminators of released files of this family cannot be read"
    # The remedies are commands that accept this file.
    remedies = []
    if "steer" in family.released_tasks:
        remedies += [
            f"choose its best samples by a reward (eg3d-rlhf reward best-of-n --before={path}"
            " --reward-ckpt=REWARD --heldout-reward=SECOND-REWARD)",
            f"fit latents to images with a reward (eg3d-rlhf generator invert --network={path}"
            " --reward-ckpt=REWARD --image=IMAGE --camera=CAMERA)",
        ]
    remedies += [f"compare its shapes (eg3d-rlhf label --network={path})"]
    if "tune" in family.released_tasks:
        remedies.append("name a snapshot of a training run, which has G, D and G_ema")
    raise ValueError(
        f"{path}: a generator of the family {family_name}: {tasks}, because {reason}. Instead, you can"
        f" {'; '.join(remedies)}."
    )


def latents(seeds: Sequence[int], z_dim: int) -> torch.Tensor:
    """Return the latents z [N, Z] of integer seeds, float32.

    The latent of a seed is RandomState(seed).randn(z_dim), as in EG3D's scripts. It must never change,
    because stored labels refer to seeds.
    """
    return torch.from_numpy(
        # The random numbers are float64, and are rounded to float32 as in EG3D's gen_samples.py.
        np.stack([np.random.RandomState(int(seed)).randn(z_dim) for seed in seeds]).astype(np.float32)
    )


def device_of(generator: Generator) -> torch.device:
    """Return the device of the generator's parameters."""
    return next(generator.module.parameters()).device


def camera(
    generator: Any, yaw: float = 0.0, pitch: float = 0.0, n: int = 1, focal: float | None = None
) -> torch.Tensor:
    """Return N equal camera labels [N, 25] of a generator's camera family.

    Args:
        generator: a generator, or its network.
        yaw, pitch: angles in radians; 0 and 0 give a frontal view.
        n: number N of labels.
        focal: focal length divided by the image size; None: the focal length of the camera family.
    """
    generator = as_generator(generator)
    cameras = generator.cameras if focal is None else dataclasses.replace(generator.cameras, focal=focal)
    return cameras.label(yaw, pitch, n, device_of(generator))


@torch.no_grad()
def ws_of_seeds(
    generator: Any, seeds: Sequence[int], truncation_psi: float = 1.0, truncation_cutoff: int | None = 14
) -> torch.Tensor:
    """Map seeds to style vectors ws [N, L, W], conditioned on the frontal camera. Not differentiable.

    Args:
        generator: a generator, or its network.
        seeds: N latent seeds.
        truncation_psi: factor in 0..1 on the distance of w to the mean w; 1 changes nothing.
        truncation_cutoff: number of layers, from the first one, that are truncated; None: all layers.
    Raises: ValueError if the generator has a finite number of shapes and a seed exceeds it.

    >>> ws_of_seeds(load_generator().generator, [1, 2], truncation_psi=0.7).shape[0]
    2
    """
    generator = as_generator(generator)
    # Checked first, because a later error would not name the seeds. 0 is valid for every generator.
    check_seeds(generator, max(seeds, default=0), "seeds")
    z = latents(seeds, generator.z_dim).to(device_of(generator))
    return generator.mapping(
        z, camera(generator, n=len(z)), truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff
    )
