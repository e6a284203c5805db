"""What a Circular-DPO run works on, whichever generator it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from eg3d_rlhf.flow.pairs import PreferencePair
from eg3d_rlhf.flow.stage import AssetReward, Pipeline


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A pipeline, the people's pairs, and the three judges: one labels or learns, one chooses, one is kept for the final table."""

    pipeline: Pipeline
    human_pairs: Callable[[str], list[PreferencePair]]  # by stage name; the same assets at every stage
    reward: AssetReward  # scores the loop's assets for w1 and w2
    chooser: AssetReward | None  # held-out win rate and early stop; None: neither
    final: AssetReward | None  # the table alone
    train_conditions: Sequence[str]
    held_out_conditions: Sequence[str]  # never trained on
    identity: Mapping = field(default_factory=dict)  # JSON: hashes of all files that it came from, for the names of artefacts
    parts: Callable[[Sequence, Sequence[str]], Mapping[str, torch.Tensor]] | None = None  # sub-scores [N] of (assets, conditions), likewise

    def __post_init__(self):
        names = [stage.name for stage in self.pipeline.stages]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"Problem.pipeline: expected two stages or more of different names, got {names}. Give all stages, in order.")
        both = sorted(set(self.train_conditions) & set(self.held_out_conditions))
        if both:
            raise ValueError(f"Problem: expected held-out conditions apart from the trained, got {both[:5]} in both. Divide them.")
        if not self.train_conditions:
            raise ValueError("Problem.train_conditions: expected one condition or more, got none. Name them.")
        if self.final is not None and any(self.final is other for other in (self.reward, self.chooser)):
            raise ValueError("Problem.final: expected a judge of its own, got one that also weighs or chooses. The table would flatter.")
