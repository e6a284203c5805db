"""Settings of a comparison: networks, rewards, data and samples. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eg3d_rlhf.core.seeds import IMAGES, LATENTS

if TYPE_CHECKING:
    import torch


def _cpu() -> "torch.device":
    import torch

    return torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a comparison is made of, besides its networks."""

    psi: float = 0.7
    batch: int = 16  # shapes or images at once
    seed: int = 0
    n: int = 100  # latents
    images: int = 400  # per distance
    device: "torch.device" = field(default_factory=_cpu)
    inception: str | None = None
    lpips: Path | None = None
    identity: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Sources(Sampling):
    """What the user names; None is the default that `load_comparison` finds."""

    before: Path | None = None  # network file or run folder; the bundled generator
    after: Path | None = None  # the newest snapshot of `run`
    # the run of `runs_folder` that differs from `run` in lambda_r = 0 alone, if there is one
    control: Path | None = None
    run: Path | None = None  # folder of the tuning run; the newest in `runs_folder` that began from `before`
    reward_ckpt: Path | None = None  # the run's own, or the bundled one
    # second reward; the run's own, or the bundled one beside the bundled reward
    heldout_reward: Path | None = None
    data: str | None = None  # the run's own, or bundled.DATA for the bundled generator
    runs_folder: Path = Path("runs")

    def __post_init__(self) -> None:
        for flag, wanted, held in (("n", self.n, LATENTS), ("images", self.images, IMAGES)):
            if wanted > held.count:
                raise ValueError(
                    f"--{flag}: expected at most {held.count:,}, the seeds that are held out, got {wanted:,}."
                    " Lower it."
                )
