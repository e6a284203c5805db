"""Files of latents: style vectors of single samples, and the generator family that synthesises them.

`generator improve` writes such a file. It holds the style vectors, the seeds that they came from, and the
hash and the path of their generator, but no weights. A command that accepts a network file accepts a file of
latents, too: as a generator with a finite number of shapes, whose seeds 0, 1, 2, ... are the latents in
order. Labelling, studies, samples and rewards therefore need no code of their own for it.

Shapes: N latents in the file, n samples, L style vectors of a sample, W w_dim, Z z_dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.field import Field
from eg3d_rlhf.generators import (
    Family,
    Generator,
    LoadedGenerator,
    as_generator,
    latents,
    load_generator,
    register,
    set_level,
)
from training import networks
from training.storage import read_tensors, write_tensors

ARCHITECTURE = "stored-latents"  # name of the family
KIND = "latents"  # kind of the files, see training.storage


@dataclass(frozen=True, kw_only=True)
class LatentsFile:
    """Content of a file of latents."""

    ws: torch.Tensor  # [N, L, W], after truncation and steering, which do not change them any more
    generator: str  # SHA-256 of the state dict of the generator
    network: str = ""  # absolute path of its network file; "": the bundled generator
    seeds: Sequence[int] = ()  # seeds that the latents came from, [N]; (): they came from elsewhere
    psi: float = 1.0  # truncation of those seeds
    facts: Mapping[str, Any] = field(default_factory=dict)  # how the latents were made, JSON values

    @classmethod
    def of(
        cls, loaded_generator: LoadedGenerator, ws: torch.Tensor, seeds: Sequence[int] = (), **fields: Any
    ) -> "LatentsFile":
        """Return the content of a file with latents ws [N, L, W] of a generator.

        Args:
            loaded_generator: generator to which the latents belong.
            ws: style vectors.
            seeds: seeds that they came from.
            fields: further fields of the class.
        """
        # The path of the bundled generator differs from installation to installation.
        is_bundled = loaded_generator.path == bundled.GENERATOR
        network_path = "" if is_bundled else str(loaded_generator.path.resolve())
        return cls(
            # float32 on the CPU, so that equal latents give equal files on every device.
            ws=ws.detach().float().cpu(),
            generator=loaded_generator.hash,
            network=network_path,
            seeds=tuple(map(int, seeds)),
            **fields,
        )

    def save(self, path: str | Path) -> Path:
        """Write the file atomically, and return its path.

        Raises: ValueError for another ending than .safetensors, by which commands recognise the file, or for
            ws of a wrong shape.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: a file of latents has the ending .safetensors. Add this ending.")
        # The truncation of a seed is already contained in its ws, so psi is only a record.
        if self.ws.ndim != 3 or (self.seeds and len(self.seeds) != len(self.ws)):
            raise ValueError(
                f"{path}: expected ws [N, L, W] and no seeds or N of them, got {list(self.ws.shape)} and"
                f" {len(self.seeds)} seeds. Pass one seed for each latent."
            )
        meta = {
            "generator": self.generator,
            "network": self.network,
            "seeds": list(self.seeds),
            "psi": self.psi,
            "facts": dict(self.facts),
        }
        write_tensors(path, KIND, {"ws": self.ws}, meta)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "LatentsFile":
        """Read a file.

        Raises: FileNotFoundError if there is no such file; ValueError if it is damaged or of another kind.
        """
        tensors, meta = read_tensors(path, KIND)
        ws = tensors.get("ws")
        # Later versions may add fields, so unknown ones are ignored.
        known_names = {"generator", "network", "seeds", "psi", "facts"}
        if ws is None or ws.ndim != 3 or not len(ws) or not known_names <= meta.keys():
            raise ValueError(
                f"{path}: expected the tensor ws [N, L, W] and its description, got {', '.join(tensors)}."
                " Write the file again with eg3d-rlhf generator improve."
            )
        return cls(ws=ws, **{name: meta[name] for name in known_names})


def load_stored(
    path: str | Path, network: str | Path | None = None, device: str | torch.device = "cpu"
) -> tuple[LatentsFile, LoadedGenerator]:
    """Read a file of latents and the generator to which its latents belong.

    Args:
        path: file of latents.
        network: network file or run folder of the generator; None: the network that the file names.
        device: device of the generator.
    Returns: content of the file, and its generator, whose latents are continuous as usual.
    Raises: FileNotFoundError if a file is missing; ValueError if the network has other weights than the
        generator of the latents, or if the latents do not fit it.
    """
    stored = LatentsFile.load(path)
    # A path on the command line wins over the recorded one, which may be of another machine.
    source = network if network is not None else (stored.network or None)
    if network is None and stored.network and not Path(stored.network).exists():
        raise FileNotFoundError(
            f"{path}: the latents belong to the network {stored.network}, which does not exist. Restore it,"
            " or name a copy with --network where the command has that flag."
        )
    loaded_generator = load_generator(source, device)
    # The hash of the weights decides and not the path: a
    # network may be copied or moved, but not trained further.
    if loaded_generator.hash != stored.generator:
        raise ValueError(
            f"{path}: the latents belong to the generator {stored.generator[:12]}..., but"
            f" {loaded_generator.path} holds the generator {loaded_generator.hash[:12]}.... Latents of one"
            " generator mean nothing to another one: name the network with which they were made."
        )
    generator = loaded_generator.generator
    expected_shape = (generator.num_ws, generator.w_dim)
    if tuple(stored.ws.shape[1:]) != expected_shape:
        raise ValueError(
            f"{path}: expected ws [N, {generator.num_ws}, {generator.w_dim}], got {list(stored.ws.shape)}."
            " Write the file again."
        )
    return stored, loaded_generator


class StoredNetwork(torch.nn.Module):
    """Network of a file of latents: the generator's network, and the latents as a buffer.

    Args:
        inner: network of the generator.
        ws: style vectors [N, L, W].
    """

    ws: torch.Tensor

    def __init__(self, inner: torch.nn.Module, ws: torch.Tensor):
        super().__init__()
        self.inner = inner
        # A buffer is part of the state dict, so the hash of this network covers the latents, too.
        self.register_buffer("ws", ws)

    @property
    def rendering_kwargs(self) -> dict[str, Any]:
        """Return the rendering options of the generator's network, which contain the surface level.

        Raises: AttributeError if the network has none.
        """
        return self.inner.rendering_kwargs  # type: ignore[return-value]


class StoredGenerator:
    """A `Generator` whose shapes are the latents of a file. Its attribute `count` is their number N."""

    architecture = ARCHITECTURE
    conditioned = False
    z_dim = 8  # a latent z only identifies a stored latent, so its size is arbitrary

    def __init__(self, module: StoredNetwork):
        self.module = module
        self.count = len(module.ws)
        # Set last: from here on, `__getattr__` can forward.
        self._inner = as_generator(module.inner)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the inner generator. Python calls this for attributes not defined here."""
        # Without this test, copying an object that has no attributes yet would recurse forever.
        if name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    @property
    def synthesis_module(self) -> torch.nn.Module:
        """Return the network that synthesises the shapes, on which rewards were trained."""
        return self.module.inner

    def mapping(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> torch.Tensor:
        """Return the stored style vectors ws [n, L, W] of latents.

        The camera and the truncation have no effect, because the style vectors were stored after them.

        Args: z: latents [n, Z] of the seeds 0 to count - 1.
        Raises: ValueError for any other latent.
        """
        del c, truncation_psi, truncation_cutoff
        # The seed i stands for the stored latent i. Jobs that only know seeds can thus use files of latents.
        stored_z = latents(range(self.count), self.z_dim).to(z)  # [N, Z]
        # Latents of seeds are bitwise reproducible: [n, 1, Z] == [N, Z] -> [n, N].
        is_stored = (z[:, None] == stored_z).all(dim=2)
        # A random z has no stored latent. Returning the nearest one would hide the mistake.
        if not bool(is_stored.any(dim=1).all()):
            raise ValueError(
                f"stored latents: {int((~is_stored.any(dim=1)).sum())} of {len(z)} latents are not in the"
                f" file. Use the seeds 0 to {self.count - 1}, or the generator itself where new samples are"
                " needed."
            )
        # argmax is not defined for bool tensors on every device, hence the conversion. [n, N] -> [n]
        return self.module.ws[is_stored.float().argmax(dim=1)]

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> Field:
        """Synthesise shapes, see `Generator`."""
        return self._inner.field(ws, noise_mode)


def load_stored_generator(
    path: str | Path,
    network: str | Path | None = None,
    device: str | torch.device = "cpu",
    level: float | None = None,
) -> LoadedGenerator:
    """Load a file of latents as a generator whose seeds 0, 1, 2, ... are its latents in order.

    Args and errors: as in `load_stored`; `level` as in `load_generator`.
    """
    nets = load_networks(path, device, network)
    if level is not None:
        set_level(nets, level)
    return LoadedGenerator(as_generator(nets.G_ema), networks.state_hash(nets.G_ema), Path(path), nets)


def load_networks(
    path: str | Path, device: str | torch.device = "cpu", network: str | Path | None = None
) -> networks.Networks:
    """Read a file of latents as the networks of its family. Args and errors: as in `load_stored`."""
    # Loaded on the CPU, and moved as one network below.
    stored, loaded_generator = load_stored(path, network)
    # Frozen: the weights belong to the generator, and the latents are data.
    module = StoredNetwork(loaded_generator.G, stored.ws).eval().requires_grad_(False)
    training_set = {
        **loaded_generator.nets.training_set,
        # A study compares two files only if their latents came from the same seeds.
        "pairs": [["latent", seed] for seed in stored.seeds or range(len(stored.ws))],
    }
    constructor_arguments = {"latents": len(stored.ws)}
    return networks.Networks(
        None, None, module, constructor_arguments, None, training_set, architecture=ARCHITECTURE
    ).to(device)


def wrap(module: StoredNetwork) -> Generator:
    """Return a `Generator` around the network of a file of latents."""
    return StoredGenerator(module)


register(
    Family(
        ARCHITECTURE, StoredNetwork, None, wrap, released_tasks=("score", "label"), load_file=load_networks
    )
)
