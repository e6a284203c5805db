"""Where the bundled default lives; `make assets` regenerates it."""

from eg3d_rlhf.core.cli import ASSETS

GENERATOR = ASSETS / "generator.safetensors"  # G, D and G_ema of the early-stopped heads64 GAN
REWARD = ASSETS / "reward.safetensors"  # trained on the bundled labels; its description beside it
WATCH = ASSETS / "reward-watch.safetensors"  # second reward, for the over-optimisation watch
ANNOTATION = ASSETS / "labels.meta.json"  # settings and calibration of the annotator that made the labels
VIEW_PRIOR = ASSETS / "view-prior.safetensors"  # the small learned prior of score distillation (eg3d-rlhf assets view-prior)
CONTROL = ASSETS / "control-summary.json"  # summary of the lambda_r = 0 run
