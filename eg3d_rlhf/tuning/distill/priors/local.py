"""A prior from a path: which of the published layouts it is, what it will need of memory, and the prior itself."""

from pathlib import Path

from eg3d_rlhf.core.memory import Costs, latent_costs
from eg3d_rlhf.core.ranges import CheckedPrior, check_views
from eg3d_rlhf.models.local_files import existing, only_file
from eg3d_rlhf.tuning.distill.priors.mvdream import load_mvdream, meta_mvdream
from eg3d_rlhf.tuning.distill.priors.stable_diffusion import FLAG, PriorOptions, load_stable_diffusion, meta_prior

WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors")


def weights_of(path: Path) -> Path | None:
    """MVDream's file that a path names: the file, or a folder's only one; None for a Stable Diffusion folder. Raises: ValueError."""
    return None if (path / "unet").is_dir() else only_file(path, WEIGHTS, FLAG, "unet/ (Stable Diffusion) or one MVDream file")


def load_prior(path: str | Path, options: PriorOptions | None = None) -> CheckedPrior:
    """Stable Diffusion (a folder) or MVDream (a .pt file), with checks. Nothing is fetched and nothing in a file is run.

    Raises: FileNotFoundError; ValueError: one line with flag and remedy.
    """
    path = existing(path, FLAG)
    file = weights_of(path)
    return CheckedPrior(load_stable_diffusion(path, options) if file is None else load_mvdream(file, options))


def prior_costs(path: str | Path, pictures: int, options: PriorOptions | None = None, noises: int = 1) -> Costs:
    """What a step with this prior will hold in memory, from its shapes alone: print it before `load_prior`.

    Args: pictures: B, views of all assets of a step. noises: K of the method.
    Raises: as `load_prior`.
    """
    path = existing(path, FLAG)
    file = weights_of(path)
    options = options or PriorOptions()
    prior = meta_prior(path, options) if file is None else meta_mvdream(file, options)
    check_views(pictures, prior.views)
    return latent_costs(prior, pictures, noises)
