"""Settings of low-rank adapters (LoRA, Hu et al. 2021). lora.py implements the adapters.

This module does not import torch, so that `--help` stays fast.
"""

import functools
from dataclasses import dataclass

from training.config import check_knobs, knob

POLICY_FILE = "policy.json"  # file in the folder of a tuned stage, which is written last
# Default targets: the ends of the names of the linear layers in the self-attention and the cross-attention of
# both flow models of TRELLIS
TARGETS = ("to_qkv", "to_q", "to_kv", "to_out")
_adapter = functools.partial(knob, group="Training")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Rank, scale, dropout and target layers of the adapters."""

    rank: int = _adapter(
        16,
        "Rank of the LoRA adapters. A larger rank can change the network more, and takes more memory and"
        " larger files.",
        name="lora_rank",
        low=1,
    )
    alpha: float = _adapter(
        32.0,
        "Scale of the LoRA adapters: their update is multiplied by alpha / rank.",
        name="lora_alpha",
        above=0,
        rare=True,
    )
    dropout: float = _adapter(
        0.0,
        "Share of the LoRA adapters' inputs that is set to zero at random during training.",
        name="lora_dropout",
        low=0,
        below=1,
        rare=True,
    )
    # Ends of the names of the linear layers that get adapters. "attn.to_q" matches fewer layers than "to_q".
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        # A list from JSON becomes a tuple, so that the frozen object can be hashed.
        object.__setattr__(self, "targets", tuple(self.targets))
        check_knobs(self)
        if not self.targets or not all(self.targets):
            raise ValueError(
                "LoraConfig.targets: at least one layer must be named, and no name may be empty, got"
                f" {list(self.targets)}. Choose names of linear layers, such as {TARGETS[0]}."
            )
