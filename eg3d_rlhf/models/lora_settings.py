"""Settings of low-rank adapters. The adapters themselves are in lora.py.

This file imports no torch, so that `--help` is quick.
"""

import functools
from dataclasses import dataclass

from training.config import check_knobs, knob

# Last parts of the names of the linear layers in both attentions of TRELLIS's flows, in both stages.
TARGETS = ("to_qkv", "to_q", "to_kv", "to_out")
_adapter = functools.partial(knob, group="Training")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Rank, scale and place of the adapters."""

    rank: int = _adapter(16, "Rank of the LoRA adapters.", name="lora_rank", low=1)
    alpha: float = _adapter(
        32.0,
        "Scale of the adapters: their update is multiplied by alpha / rank.",
        name="lora_alpha",
        above=0,
        rare=True,
    )
    dropout: float = _adapter(
        0.0,
        "Share of the adapters' inputs that is set to zero during training.",
        name="lora_dropout",
        low=0,
        below=1,
        rare=True,
    )
    # Last parts of the names of linear layers. "attn.to_q" matches fewer layers than "to_q".
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        # A list from JSON becomes a tuple, so that the frozen object can be hashed.
        object.__setattr__(self, "targets", tuple(self.targets))
        check_knobs(self)
        if not self.targets or not all(self.targets):
            raise ValueError(
                f"LoraConfig.targets: expected names of layers, got {list(self.targets)}. Name at least one"
                " layer."
            )
