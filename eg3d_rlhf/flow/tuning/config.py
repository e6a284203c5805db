"""Settings of one stage's training."""

import math
from dataclasses import dataclass, field

from eg3d_rlhf.flow.dpo import DpoConfig
from eg3d_rlhf.flow.lora import LoraConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run besides its networks and pairs; the defaults suit TRELLIS."""

    dpo: DpoConfig = field(default_factory=DpoConfig)  # what is minimised
    lora: LoraConfig | None = field(default_factory=LoraConfig)  # adapters to train; None trains every parameter
    steps: int = 3000  # updates
    batch: int = 4  # pairs per update, over all processes and passes
    batch_gpu: int | None = None  # pairs per pass and process; None: as many as there are. Decides memory, not the result
    lr: float = 5e-6  # AdamW's learning rate
    warmup: int = 100  # updates over which it rises from 0
    weight_decay: float = 0.01  # apart from the gradient
    clip: float = 1.0  # largest norm of the gradient over all parameters
    bf16: bool = False  # passes in bfloat16 where torch's autocast does so; parameters and sums stay float32
    ema: float | None = None  # decay of a moving average per update, which is then measured and kept; None: the parameters themselves
    draws: int | None = None  # different times and noises per pair, then the first again; None: new ones in every pass over the pairs
    cache_reference: bool = False  # keep the reference's errors per pair and draw; wants `draws`
    held_out_every: int = 100  # updates between win rates, where there is a judge; one is measured before the first
    patience: int = 5  # win rates in a row without a new best, after which training stops
    max_drop: float = 0.2  # below the best win rate, at which it stops at once
    log_every: int = 10  # updates per line of stats.jsonl
    checkpoint_every: int = 200  # updates between resumable states
    seed: int = 0  # adapters, order, times, noises, dropout

    def __post_init__(self):
        least = {
            "steps": 1, "batch": 1, "warmup": 0, "weight_decay": 0, "held_out_every": 1, "patience": 1, "log_every": 1,
            "checkpoint_every": 1, "seed": 0,
        }  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"TrainConfig.{name}: expected at least {low}, got {getattr(self, name)}. Raise it.")
        for name in ("lr", "clip", "max_drop"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"TrainConfig.{name}: expected a positive number, got {getattr(self, name)}. Set it.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"TrainConfig.ema: expected a decay between 0 and 1, got {self.ema}. Use 0.999, or None.")
        if self.batch_gpu is not None and (self.batch_gpu < 1 or self.batch % self.batch_gpu):
            raise ValueError(f"TrainConfig.batch_gpu: expected a divisor of batch={self.batch}, got {self.batch_gpu}. Choose one.")
        if self.draws is not None and self.draws < 1:
            raise ValueError(f"TrainConfig.draws: expected at least 1, got {self.draws}. Raise it, or leave it out for new draws always.")
        if self.cache_reference and self.draws is None:
            raise ValueError("TrainConfig.cache_reference: expected draws that come again, got draws=None. Set draws, to 8 say.")
