"""Paths of the generator, rewards and data that belong to the repository. `make assets` regenerates them."""

from eg3d_rlhf.core.cli import ASSETS  # the folder assets/ of the repository

GENERATOR = ASSETS / "generator.safetensors"  # networks G, D and G_ema, trained on synthetic head scans
# Images for the discriminator and for image distances: 1,500 renders of synthetic head scans at 64 x 64
# pixels. They are rendered at their first use, in less than 25 seconds on 2 cores.
DATA = "synthetic:people64@n=1500"
# Reward trained on the bundled labels. A JSON description has the same name with the suffix .json.
REWARD = ASSETS / "reward.safetensors"
# Held-out reward, which no tuning optimises. If its score falls while the score of REWARD rises, the
# generator is over-optimised.
HELDOUT_REWARD = ASSETS / "reward-heldout.safetensors"
# Small diffusion prior of score distillation, trained by builders/view_prior.py.
VIEW_PRIOR = ASSETS / "view-prior.safetensors"
CONTROL = ASSETS / "control-summary.json"  # summary of the lambda_r = 0 run

# Note on the training data, which accompanies all results of the bundled generator.
DAMAGED = (
    "The bundled generator was trained on synthetic head scans. Many of them have damage at the back of the"
    " head, which we added deliberately, because real scans lack surfaces that no camera saw. The generator"
    " reproduces these defects, and preferences remove them."
)
