"""Settings of a training in WORK. This file imports no torch, so that `--help` is quick."""

from dataclasses import dataclass

from eg3d_rlhf.tuning.flow.training.circular.settings import CircularSettings


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is trained, and with what beside it."""

    circular: CircularSettings  # `human` is how stages learn from people's pairs; the rest is the loop's
    stages: tuple[str, ...] = ()  # none: all that have pairs
    # stages before the last learn from what the one behind made better, in place of people's pairs
    loop: bool = False
    control: bool = True
