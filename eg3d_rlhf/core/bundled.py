"""Where the bundled default lives; `make assets` regenerates it."""

from eg3d_rlhf.core.cli import ASSETS

GENERATOR = ASSETS / "generator.safetensors"  # G, D and G_ema that learnt scans of heads of people
# pictures that D sees and image distances compare with: rendered once, in under 25 seconds on 2 cores
DATA = "synthetic:people64@n=1500"
REWARD = ASSETS / "reward.safetensors"  # trained on the bundled labels; its description beside it
WATCH = ASSETS / "reward-heldout.safetensors"  # second reward, for the over-optimisation watch
# the small learned prior of score distillation (builders/view_prior.py)
VIEW_PRIOR = ASSETS / "view-prior.safetensors"
CONTROL = ASSETS / "control-summary.json"  # summary of the lambda_r = 0 run

# Stands wherever the example is shown.
DAMAGED = (
    "Many of the scans that the bundled generator learnt from are broken behind, on purpose, as real scans"
    " are where no camera looked: the defects are in the data, the generator learns them, and preferences"
    " remove them."
)
