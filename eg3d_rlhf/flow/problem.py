"""What a Circular-DPO run works on, whichever generator it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
