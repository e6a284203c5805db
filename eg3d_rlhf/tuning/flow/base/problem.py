"""Data of a tuning problem: a generator, preference pairs, prompts and rewards.

A `Problem` does not read files. `open_problem` (families/opening.py) makes it from a `ProblemSource`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, pairs_of_prompts
from eg3d_rlhf.tuning.flow.base.single_labels import Labelled
from eg3d_rlhf.tuning.flow.base.stage import AssetReward, Pipeline
from training.phases import derive_seed

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.base.family import FlowFamily

MAX_CHOOSING_PAIRS = 128  # largest number of pairs on which a network is evaluated while it is trained
# Function from N assets and N prompts to several scores: name -> [N].
Scores = Callable[[Sequence, Sequence[str]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Generator, preference pairs of its stages, split of the prompts, and three rewards.

    `reward` weights or labels pairs, `chooser` chooses checkpoints, and `final` is the held-out evaluator of
    the results table. The mappings of pairs by stage are read-only. To change pairs, for example for a
    control with randomised labels, make another problem with `dataclasses.replace`.

    Raises: ValueError if the stages, the split of the prompts or the rewards do not fit together.
    """

    pipeline: Pipeline  # generator
    # Family of the generator, which can write its assets to files; None: not known, as in tests.
    family: "FlowFamily | None" = None
    train_prompts: Sequence[str]  # prompts of the training split
    held_out_prompts: Sequence[str]  # prompts of the held-out split, which the results table evaluates
    # Prompts on which checkpoints are chosen; (): the held-out prompts are used.
    choosing_prompts: Sequence[str] = ()
    # Name of a stage -> preference pairs of the training prompts.
    train_pairs: Mapping[str, Sequence[PreferencePair]] = field(default_factory=dict)
    # Name of a stage -> preference pairs of the other prompts. None: there are none, and only rewards
    # evaluate a network.
    unseen_pairs: Mapping[str, Sequence[PreferencePair]] | None = None
    # Kind of label ("thumbs" or "ranks") -> assets with one label each. None: there are no such assets.
    labelled: Mapping[str, Labelled] | None = None
    # Reward that scores the assets of the circular loop (Circular-DPO), for the filter w1 and the weight w2
    # of pairs. None: there is no loop, and stages are trained separately.
    reward: AssetReward | None = None
    # Reward of the held-out win rate, by which checkpoints are chosen and training is stopped; None: neither
    # is done.
    chooser: AssetReward | None = None
    final: AssetReward | None = None  # held-out evaluator of the results table, which has no other use
    # Name of a reward's field -> prompts of the pairs to which the reward was fitted.
    fitted_to: Mapping[str, Sequence[str]] = field(default_factory=dict)
    # Function that fits a reward of finished assets. Its arguments are pairs of the last stage and a training
    # seed.
    fit_reward: Callable[[Sequence[PreferencePair], int], AssetReward] | None = None
    parts: Scores | None = None  # sub-scores of the final evaluator, for the results table
    measures: Scores | None = None  # more detailed scores, for the table of online tuning
    # Values for JSON: hashes of all files of the problem. They are part of the names of artefacts.
    identity: Mapping = field(default_factory=dict)

    def __post_init__(self):
        stage_names = [stage.name for stage in self.pipeline.stages]
        # An error and not an assertion, because the pipeline may come from a user's plugin.
        if not stage_names:
            raise ValueError("Problem.pipeline: the pipeline has no stage. Define at least one stage.")
        if len(set(stage_names)) < len(stage_names):
            raise ValueError(
                f"Problem.pipeline: several stages have the same name ({', '.join(stage_names)}). Give each"
                " stage a name of its own."
            )
        # A prompt in two splits would bias the held-out results upwards.
        splits = [set(self.train_prompts), set(self.held_out_prompts), set(self.choosing_prompts)]
        repeated_prompts = sorted(
            prompt
            for first_split, second_split in combinations(splits, 2)
            for prompt in first_split & second_split
        )
        if repeated_prompts:
            raise ValueError(
                f"Problem: the prompts {repeated_prompts[:5]} are in two splits. Put each prompt into only"
                " one of the training, the held-out and the choosing split."
            )
        if not self.train_prompts:
            raise ValueError(
                "Problem.train_prompts: the training split has no prompt. Add at least one prompt to it."
            )
        # Tuning optimises `reward` and `chooser`, so these would overestimate the tuned generator.
        if self.final is not None and any(self.final is reward for reward in (self.reward, self.chooser)):
            raise ValueError(
                "Problem.final: this reward also weights pairs or chooses checkpoints, so it cannot be the"
                " held-out evaluator. Pass a separate reward."
            )

    @property
    def choosing(self) -> Sequence[str]:
        """Prompts on which checkpoints are chosen."""
        return self.choosing_prompts or self.held_out_prompts

    def choosing_pairs(self, stage: str) -> list[PreferencePair]:
        """Return the pairs of a stage on which checkpoints are chosen, at most MAX_CHOOSING_PAIRS."""
        pairs = self._pairs_outside_training(stage, self.choosing)
        # Sorted by a hash of the id, so that the selection is random but does not depend on the order of the
        # pairs.
        return sorted(pairs, key=lambda pair: derive_seed("to choose", pair.id))[:MAX_CHOOSING_PAIRS]

    def held_out_pairs(self, stage: str) -> list[PreferencePair]:
        """Return a stage's pairs for the held-out prompts, on which a network's accuracy is measured."""
        return self._pairs_outside_training(stage, self.held_out_prompts)

    def _pairs_outside_training(self, stage: str, prompts: Sequence[str]) -> list[PreferencePair]:
        """Return the pairs of a stage for the prompts `prompts`, which are not training prompts."""
        return [] if self.unseen_pairs is None else pairs_of_prompts(self.unseen_pairs[stage], prompts)


def chosen_precision(precision: str, device: str | torch.device) -> str:
    """Return the data type of forward passes: "bfloat16" or "float32".

    The call also changes a setting of this process: float32 matrix products and convolutions are computed in
    TF32 on CUDA, unless `precision` is "float32".

    Args:
        precision: "bfloat16", "float32", or "auto" for bfloat16 on CUDA and float32 on a CPU.
        device: device of the networks.
    """
    uses_cuda = torch.device(device).type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
        uses_cuda and precision != "float32"
    )
    if precision != "auto":
        return precision
    return "bfloat16" if uses_cuda else "float32"
