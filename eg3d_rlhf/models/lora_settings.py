"""Settings of low-rank adapters (lora.py)."""

import functools
from dataclasses import dataclass

from training.config import check_knobs, knob

TARGETS = ("to_qkv", "to_q", "to_kv", "to_out")  # of TRELLIS's flows, both stages
_adapter = functools.partial(knob, group="Training")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Size and place of the adapters."""

    rank: int = _adapter(16, "Of the adapters.", name="lora_rank", low=1)
    alpha: float = _adapter(
        32.0, "Their update is multiplied by alpha / rank.", name="lora_alpha", above=0, rare=True
    )
    dropout: float = _adapter(
        0.0,
        "Share of their inputs that is zeroed while training.",
        name="lora_dropout",
        low=0,
        below=1,
        rare=True,
    )
    # last parts of the names of linear layers; "attn.to_q" is more exact than "to_q"
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        check_knobs(self)
        if not self.targets or not all(self.targets):
            raise ValueError(
                f"LoraConfig.targets: expected names of layers, got {list(self.targets)}. Name one at least."
            )
