"""What train.py can train, by the name that --mode has: one file each, with its flags, its settings and what they compose."""

from eg3d_rlhf.core.registry import Registry
from eg3d_rlhf.experiments.mode import Mode

MODES: Registry[Mode] = Registry("--mode", {
    "gan": "train",
    "circular-dpo": "eg3d_rlhf.modes.circular_dpo",
    "grpo": "eg3d_rlhf.modes.grpo",
    "distill": "eg3d_rlhf.modes.distilled",
})  # fmt: skip
