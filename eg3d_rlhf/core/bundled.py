"""Paths of the bundled generator, rewards and data. `make assets` regenerates the files."""

from eg3d_rlhf.core.cli import ASSETS  # the folder assets/ of the repository

GENERATOR = ASSETS / "generator.safetensors"  # G, D and G_ema, trained on synthetic head scans
# Images for the discriminator and for image distances: rendered once, in under 25 seconds on 2 cores.
DATA = "synthetic:people64@n=1500"
REWARD = ASSETS / "reward.safetensors"  # trained on the bundled labels; a description lies beside it
# Second reward, which no training uses: its score shows over-optimisation of the first.
WATCH = ASSETS / "reward-heldout.safetensors"
# Small diffusion prior of score distillation, trained by builders/view_prior.py.
VIEW_PRIOR = ASSETS / "view-prior.safetensors"
CONTROL = ASSETS / "control-summary.json"  # summary of the lambda_r = 0 run

# Shown wherever results of the bundled generator are shown.
DAMAGED = (
    "The bundled generator was trained on synthetic head scans. Many of them have damage at the back of the"
    " head, which we added deliberately, because real scans lack surfaces that no camera saw. The generator"
    " reproduces these defects, and preferences remove them."
)
