"""What trainings of a stage have in common, whatever they minimise: settings, optimiser, learning rate, the step itself."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from eg3d_rlhf.models.lora import LoraConfig
from eg3d_rlhf.tuning.flow.stage import FlowStage
from training.config import check_knobs, knob
from training.distributed import Ranks
from training.phases import LossNotFiniteError

train_knob = functools.partial(knob, group="Training")


@dataclass(frozen=True, kw_only=True)
class StageTraining:
    """Settings of any training of a stage; the defaults suit TRELLIS."""

    lora: LoraConfig | None = field(default_factory=LoraConfig)  # adapters to train; None trains every parameter
    steps: int = train_knob(3000, "Length of a stage's training.", metavar="UPDATES", low=1)
    lr: float = train_knob(5e-6, "AdamW's learning rate.", above=0)
    warmup: int = train_knob(100, "Over which the learning rate rises from 0.", metavar="UPDATES", low=0)
    weight_decay: float = train_knob(0.01, "AdamW's, apart from the gradient.", low=0)
    clip: float = train_knob(1.0, "Largest norm of the gradient over all parameters.", above=0)
    bf16: bool = False  # passes in bfloat16 where torch's autocast does so; parameters and sums stay float32
    ema: float | None = train_knob(None, "Decay of a moving average per update, which is then measured and kept.", above=0, below=1)
    held_out_every: int = train_knob(100, "Between win rates; one is measured before the first.", metavar="UPDATES", low=1)
    patience: int = train_knob(5, "Win rates in a row without a new best, after which training stops.", low=1)
    max_drop: float = train_knob(0.2, "Below the best win rate, at which it stops at once.", above=0)
    log_every: int = train_knob(10, "Per line of stats.jsonl.", metavar="UPDATES", low=1)
    checkpoint_every: int = train_knob(200, "Between resumable states.", metavar="UPDATES", low=1)
    seed: int = 0  # >= 0: of everything that is drawn

    def __post_init__(self):
        check_knobs(self)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the frozen network."""
        return True


class Descent(ABC):
    """A policy's parameters on their way down; `run`, of what is minimised, is one update.

    Args: policy: the network in training; parameters: of it, those that are trained; ranks: this process among those that train together.
    """

    columns: Sequence[tuple[str, str, str]] = ()  # of the status line: figure, its name there, format

    def __init__(
        self, stage: FlowStage, config: StageTraining, policy: torch.nn.Module, parameters: Iterable[torch.nn.Parameter], ranks: Ranks
    ):
        self.stage, self.training, self.policy, self.parameters, self.ranks = stage, config, policy, list(parameters), ranks
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=config.weight_decay)

    def lr(self, step: int) -> float:
        """Learning rate of the update after `step` updates."""
        return self.training.lr * min(1.0, (step + 1) / max(self.training.warmup, 1))

    @abstractmethod
    def run(self, step: int) -> dict:
        """One update -> loss, grad_norm, how many examples it saw, and what else is logged; see progress.py.

        Raises: LossNotFiniteError for a loss or gradient that is not finite; the parameters are then as they were.
        """

    @abstractmethod
    def signs(self, lines: Sequence[Mapping]) -> dict[str, str]:
        """Warnings by name, as of the last line of stats.jsonl; the caller says each once."""

    def save(self) -> None:  # noqa: B027 most have nothing
        """Write what a resumed run would else compute again."""

    def autocast(self) -> torch.autocast:
        """For passes of the networks."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.bf16)

    def descend(self, step: int, totals: torch.Tensor, seen: str) -> list[float]:
        """Divide the summed gradients by totals[0], their mass, clip and step; totals[1] is the mass times the loss.

        Args: seen: names of what the update saw, for a message. Returns: mass, loss, norm of the gradient, then the other totals.
        """
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= totals[0]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.training.clip)
        mass, loss, *others, length = torch.cat([totals, norm.detach().reshape(1).to(totals)]).tolist()
        loss = loss / mass if mass else math.nan
        if not math.isfinite(loss) or not math.isfinite(length):
            raise LossNotFiniteError(
                f"train_stage({self.stage.name}): expected a finite loss and gradient in update {step + 1}, got {loss:g} and {length:g} "
                f"({seen}, ...). Use a lower lr or a larger beta, and no bf16 if it is on."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.step()
        return [mass, loss, length, *others]
