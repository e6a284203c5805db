"""The paper's released reward: read from its published files with weights only, and scored on both lattices.

A release is a folder with `best_model.pt` (a plain state dict, or one under 'state_dict') and `release_config.yaml` or `run_config.yaml`.
Layer sizes come from the weights, the transform of the input from the configuration.

Shape letters: N samples, D, H, W = z, y, x.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eg3d_rlhf.cli import file_hash
from eg3d_rlhf.generators import Generator, ws_of_seeds
from eg3d_rlhf.observations.sigma_slab import SigmaSlab
from eg3d_rlhf.reward.model import PAPER, RewardArch, RewardModel
from eg3d_rlhf.reward.release_config import CONFIG_NAMES, ReleaseConfig, read_config
from eg3d_rlhf.reward.reward import Reward, check_state, read_torch
from eg3d_rlhf.sigma.spec import LATTICES, SlabSpec

WEIGHTS = "best_model.pt"
EXAMPLE_ARCH = RewardArch(feature_maps=(4, 8, 16), pool_size=256, trunk=(24, 24), embedding=32, heads=(16, 8))
_EXAMPLE_CONFIG = """\
data:
  dset_dict:
    selected_dtypes: [sigma_field_32]
  augmentations:
    upper_norm: 100
    tune:
      _target_: transforms.normalise_sigma_self
      lower: 0
      upper: ${data.augmentations.upper_norm}
model:
  Conv3DModule: {in_channels: 1, f_maps: [4, 8, 16], num_groups: 8, layer_order: gcr, is_segmentation: false}
  mlp_global: {input_size: 256}
"""


@dataclass(frozen=True, kw_only=True)
class LatticeScores:
    """One sample's reward on both lattices."""

    seed: int
    straight: float
    skewed: float

    @property
    def difference(self) -> float:
        """straight - skewed."""
        return self.straight - self.skewed


def import_release(
    source: str | Path, config: str | Path | None = None, weights: str = WEIGHTS, transform: str = "config", lattice: str = "straight"
) -> Reward:
    """Read a released reward, in eval mode; nothing in its files is executed. Its provenance names both files and their SHA-256.

    Args:
        source: the folder, or the weights file itself (its configuration beside it).
        config: the configuration, where it has another name or place.
        weights: name of the weights inside the folder (`swa_weights.pt` has the same entries).
        transform: see `read_config`; lattice: that the reward reads, see `SlabSpec`.

    Raises: FileNotFoundError; ValueError on damaged or foreign files, entries that do not fit, or a configuration that is not understood.
    """
    source = Path(source)
    file = source / weights if source.is_dir() else source
    state = read_torch(file)
    config = Path(config) if config is not None else find_config(file.parent)
    settings = read_config(config, transform)
    arch = arch_from_state(state, settings)
    model = RewardModel(arch)
    check_state(f"import_release({file.name})", model, state)
    model.load_state_dict(state)
    spec = SlabSpec(resolution=settings.resolution, value_max=settings.value_max, lattice=lattice)
    if min(spec.shape) < arch.smallest_side:
        raise ValueError(
            f"import_release: expected a slab with sides of at least {arch.smallest_side} points, got {list(spec.shape)} from "
            f"{config.name}. Use the configuration that belongs to these weights."
        )
    provenance = {
        "preset": "paper" if arch == PAPER else "release", "weights": file.name, "weights_sha256": file_hash(file),
        "config": config.name, "config_sha256": file_hash(config), "transform": transform, "trained_on_lattice": "skewed",
    }
    return Reward(SigmaSlab(spec), model, provenance).eval().requires_grad_(False)


def find_config(folder: Path) -> Path:
    """release_config.yaml or run_config.yaml in a folder; both may be there if they say the same.

    Raises: FileNotFoundError; ValueError when they disagree.
    """
    found = [folder / name for name in CONFIG_NAMES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"import_release: expected {' or '.join(CONFIG_NAMES)} beside the weights, got neither in {folder}. Name it with --config."
        )
    if len(found) == 2 and read_config(found[0]) != read_config(found[1]):
        names = " and ".join(CONFIG_NAMES)
        raise ValueError(f"import_release: expected one configuration, got two that disagree ({names}). Name one with --config.")
    return found[0]


def arch_from_state(state: Mapping[str, torch.Tensor], settings: ReleaseConfig) -> RewardArch:
    """Architecture whose entries have the shapes of `state`; the paper's where entries are missing, so that a check can name them.

    Half of the last convolution's channels reconstruct, the other half are the feature (4 + 4 in the paper).
    Raises: ValueError when the configuration names other sizes than the weights have.
    """
    try:
        maps = _sizes(state, "Conv3DModule.encoders.{}.basic_module.conv2.conv.weight")
        channels = len(state["Conv3DModule.final_conv.weight"])
        trunk, heads = _hidden(state, "MLP"), _hidden(state, "scalar_rwd_head")
        pool_size, embedding = state["MLP.input_layer.weight"].shape[1], len(state["MLP.output_layer.weight"])
    except (KeyError, IndexError, TypeError):
        return replace(PAPER, groups=settings.groups)
    for name, got, wanted in (("f_maps", maps, settings.feature_maps), ("input_size", pool_size, settings.input_size)):
        if wanted is not None and wanted != got:
            raise ValueError(
                f"import_release: expected weights for the configuration's {name} = {wanted}, got {got}. Use the files of one release."
            )
    return RewardArch(
        feature_maps=maps, groups=settings.groups, recon_channels=channels // 2, feature_channels=channels - channels // 2,
        pool_size=pool_size, trunk=trunk, embedding=embedding, heads=heads,
    )


def _sizes(state: Mapping[str, torch.Tensor], pattern: str) -> tuple[int, ...]:
    """First dimension of the numbered entries, as far as they go."""
    found: list[int] = []
    while pattern.format(len(found)) in state:
        found.append(len(state[pattern.format(len(found))]))
    if not found:
        raise KeyError(pattern)
    return tuple(found)


def _hidden(state: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    return (len(state[f"{name}.input_layer.weight"]), *_sizes(state, f"{name}.hidden_layers.{{}}.0.weight"))


@torch.no_grad()
def compare_lattices(
    reward: Reward, generator: Generator, seeds: Sequence[int], psi: float = 1.0, cutoff: int | None = 14,
    on_seed: Callable[[LatticeScores], None] = lambda scores: None,
) -> list[LatticeScores]:
    """Rewards of a generator's samples on the straight lattice and on the one that the published reward was trained on.

    Args: reward: on either lattice; seeds of z; psi, cutoff: truncation; on_seed: told each result.
    Raises: ValueError for no seeds, and for a reward that reads no slabs.
    """
    if not seeds:
        raise ValueError("compare_lattices: expected at least one seed, got none. Name some, such as 0-3.")
    if not isinstance(reward.observation, SigmaSlab):
        raise ValueError(f"compare_lattices: expected a reward that reads slabs, got one of {reward.observation.kind}. Name another.")
    slabs = {lattice: SigmaSlab(replace(reward.observation.spec, lattice=lattice)) for lattice in LATTICES}
    results = []
    for seed in seeds:
        field = generator.field(ws_of_seeds(generator, [seed], psi, cutoff))
        scores = {lattice: float(reward.score_observed(slab.observe(field))) for lattice, slab in slabs.items()}
        results.append(LatticeScores(seed=seed, **scores))
        on_seed(results[-1])
    return results


def write_example(folder: str | Path, seed: int = 0) -> Path:
    """A small untrained reward in the published layout, to try the import with; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RewardModel(EXAMPLE_ARCH)
    torch.save(model.state_dict(), folder / WEIGHTS)
    (folder / CONFIG_NAMES[0]).write_text(_EXAMPLE_CONFIG)
    return folder
