"""A tuning problem as plain data.

A `Problem` holds a pipeline, preference pairs by stage, the prompts of each split and the rewards. It
reads no files: `open_problem` (families/opening.py) makes it from a `ProblemSource`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch

from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, pairs_of_conditions
from eg3d_rlhf.tuning.flow.base.single_labels import Labelled
from eg3d_rlhf.tuning.flow.base.stage import AssetReward, Pipeline
from training.phases import derive_seed

MOST_TO_CHOOSE = 128  # pairs on which a network is evaluated while it trains
# sub-scores [N] by name, from (assets, their prompts)
Scores = Callable[[Sequence, Sequence[str]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A pipeline, the preference pairs of its stages, the split of the prompts, and three rewards.

    One reward weighs or labels pairs, one chooses checkpoints, and one is kept for the final table. The same
    assets are compared at every stage. Pairs are read-only mappings by stage. To change them, for example for
    a control with randomised labels, make another problem with `dataclasses.replace`.
    """

    pipeline: Pipeline
    train_conditions: Sequence[str]
    held_out_conditions: Sequence[str]  # never trained on; those of the final table
    # never trained on either: checkpoints are chosen on these; none: on the held-out ones
    choosing_conditions: Sequence[str] = ()
    train_pairs: Mapping[str, Sequence[PreferencePair]] = field(default_factory=dict)  # of train_conditions
    # pairs of the other prompts; None: only the rewards measure what was learnt
    unseen_pairs: Mapping[str, Sequence[PreferencePair]] | None = None
    # by kind of label ("thumbs", "ranks"): assets with a label each; None: there are none
    labelled: Mapping[str, Labelled] | None = None
    # scores the assets of the circular loop for w1 and w2; None: no loop, stages are trained one by one
    reward: AssetReward | None = None
    chooser: AssetReward | None = None  # held-out win rate and early stopping; None: neither
    final: AssetReward | None = None  # scores the final table, and is used for nothing else
    fitted_to: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by reward: prompts of its pairs
    # fits a reward of finished assets to (pairs of the last stage, training seed)
    fit_reward: Callable[[Sequence[PreferencePair], int], AssetReward] | None = None
    parts: Scores | None = None  # sub-scores in the final table
    measures: Scores | None = None  # finer ones, in the table of online tuning
    # JSON: hashes of all files that the problem came from; it names artefacts
    identity: Mapping = field(default_factory=dict)

    def __post_init__(self):
        names = [stage.name for stage in self.pipeline.stages]
        # a prompt in two splits would bias the held-out results upwards
        parts = [set(self.train_conditions), set(self.held_out_conditions), set(self.choosing_conditions)]
        if not names or len(set(names)) < len(names):  # a user's plugin may cause it, so it is no assert
            raise ValueError(
                f"Problem.pipeline: expected stages of different names, got {names}. Give all stages, in"
                " order."
            )
        if both := sorted(name for a, b in combinations(parts, 2) for name in a & b):
            raise ValueError(
                f"Problem: expected every prompt in one split, got {both[:5]} in two. Put each prompt either"
                " into the training, the held-out or the choosing split."
            )
        if not self.train_conditions:
            raise ValueError("Problem.train_conditions: expected at least one prompt, got none. Name some.")
        # tuning optimises what weighs or chooses, so the same reward would overrate the tuned generator
        if self.final is not None and any(self.final is other for other in (self.reward, self.chooser)):
            raise ValueError(
                "Problem.final: expected a separate held-out reward, got one that also weighs pairs or"
                " chooses checkpoints. Pass another reward."
            )

    @property
    def choosing(self) -> Sequence[str]:
        """Return the prompts on which checkpoints are chosen."""
        return self.choosing_conditions or self.held_out_conditions

    def choosing_pairs(self, stage: str) -> list[PreferencePair]:
        """Select at most MOST_TO_CHOOSE pairs on which a network is evaluated while it trains."""
        pairs = self._unseen(stage, self.choosing)
        # ordered by a hash of the id: a selection that does not depend on the order of the pairs
        return sorted(pairs, key=lambda pair: derive_seed("to choose", pair.id))[:MOST_TO_CHOOSE]

    def held_out_pairs(self, stage: str) -> list[PreferencePair]:
        """Select the pairs that neither train nor choose. They measure whether the labels were learnt."""
        return self._unseen(stage, self.held_out_conditions)

    def _unseen(self, stage: str, names: Sequence[str]) -> list[PreferencePair]:
        return [] if self.unseen_pairs is None else pairs_of_conditions(self.unseen_pairs[stage], names)


def chosen_precision(precision: str, device: str | torch.device) -> str:
    """Resolve "auto" to bfloat16 on CUDA and to float32 on a CPU; another value is returned as it is.

    Side effect on this process: on CUDA, unless `precision` is float32, the remaining float32 products are
    computed in TF32.
    """
    cuda = torch.device(device).type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cuda and precision != "float32"
    return ("bfloat16" if cuda else "float32") if precision == "auto" else precision
