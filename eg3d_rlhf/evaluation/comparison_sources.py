"""Settings of a comparison: networks, rewards, data and samples. This module does not import torch, so that
--help is fast.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eg3d_rlhf.core.seeds import IMAGES, LATENTS

if TYPE_CHECKING:
    import torch


# A factory, so that importing this module does not import torch.
def _cpu() -> "torch.device":
    """Return the CPU as the default device."""
    import torch

    return torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of a comparison, without its networks."""

    psi: float = 0.7  # truncation, 0..1
    batch: int = 16  # shapes or images evaluated at once
    seed: int = 0  # shifts the held-out latents; also the seed of bootstraps and permutations
    n: int = 100  # number of held-out latents
    level: float | None = None  # raw density at the surface; None: the level of the networks
    images: int = 400  # images of each generator for one distance
    device: "torch.device" = field(default_factory=_cpu)
    inception: str | None = None  # TorchScript file of the feature detector
    lpips: Path | None = None  # TorchScript file f(a, b), the LPIPS distance of image batches a and b
    identity: Path | None = None  # TorchScript file that embeds images of faces


@dataclass(frozen=True, kw_only=True)
class Sources(Sampling):
    """Networks, rewards and data that the user names. `load_comparison` replaces each None by its default."""

    # network file or run folder of the generator before tuning; default: the generator from which `run` began
    before: Path | None = None
    # network file or run folder of the tuned generator; default: the newest snapshot of `run`
    after: Path | None = None
    # network file or run folder of the control; default: the run of `runs_folder` that differs from `run`
    # only in lambda_r = 0, if there is one
    control: Path | None = None
    # folder of the tuning run; default: the newest run in `runs_folder`, that began from `before` if given
    run: Path | None = None
    reward_ckpt: Path | None = None  # file of the reward; default: the reward of `run`, or the bundled one
    # file of a held-out reward; default: the held-out reward of `run`, or the bundled one that belongs to the
    # bundled reward
    heldout_reward: Path | None = None
    data: str | None = None  # dataset; default: the data of `run`, or bundled.DATA for the bundled generator
    runs_folder: Path = Path("runs")  # folder in which `run` and `control` are searched

    def __post_init__(self) -> None:
        # Beyond the count the seeds would leave the held-out range.
        for flag, requested_count, held_out in (("n", self.n, LATENTS), ("images", self.images, IMAGES)):
            if requested_count > held_out.count:
                raise ValueError(
                    f"--{flag}={requested_count:,} exceeds the {held_out.count:,} seeds that are held out for"
                    f" this purpose. Lower --{flag} to at most {held_out.count:,}."
                )
