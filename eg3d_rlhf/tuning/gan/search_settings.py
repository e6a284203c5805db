"""Settings of the search that improves single samples by a reward. This module does not import torch."""

import dataclasses
import functools
from typing import Literal

from eg3d_rlhf.tuning.gan.presets import BUNDLED_STUDY
from training.config import check_knobs, knob

TITLE = "Search"
AUTO: Literal["auto"] = "auto"  # value of --steps
# The upper bound of the reward in the bundled tuning, "-10,q0.55", is also the gate of the search.
BUNDLED_GATE = float(str(BUNDLED_STUDY["reward_clip"]).rpartition("q")[2])
_rare_knob = functools.partial(knob, group=TITLE, rare=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of the gradient ascent on style vectors, see eg3d_rlhf.tuning.gan.latent_search."""

    # "auto": each sample stops where the held-out reward stops rising; otherwise the number of steps, >= 1
    steps: int | Literal["auto"] = AUTO
    gate: bool = True  # True leaves samples unchanged that score above `gate_quantile`
    gate_quantile: float = knob(
        BUNDLED_GATE,
        "Quantile of the reward's scores on samples of the generator, above which a sample is left unchanged."
        " The samples are those with which tuning standardises the reward (seeds 505000 to 505199, psi 1).",
        TITLE,
        metavar="0..1",
        low=0,
        high=1,
    )
    max_steps: int = _rare_knob(40, "Largest number of steps of a sample with --steps=auto.", low=1)
    patience: int = _rare_knob(
        3,
        "Number of steps without a new highest held-out reward after which a sample stops, with"
        " --steps=auto.",
        low=1,
    )
    learning_rate: float = _rare_knob(0.05, "Learning rate of Adam, in units of w.", above=0, flags=("--lr",))

    def __post_init__(self) -> None:
        check_knobs(self)
        is_count = isinstance(self.steps, int) and not isinstance(self.steps, bool) and self.steps >= 1
        if self.steps != AUTO and not is_count:
            raise ValueError(
                f"--steps={self.steps}: expected auto or a whole number of at least 1, such as 10."
            )

    @property
    def step_count(self) -> int:
        """Return the largest number of steps of a sample."""
        return self.max_steps if self.steps == AUTO else int(self.steps)


def parse_steps(steps_text: str) -> int | Literal["auto"]:
    """Parse the value of --steps: "auto", or a number of steps.

    Raises: ValueError for any other text.
    """
    if steps_text == AUTO:
        return AUTO
    if not steps_text.isdecimal() or int(steps_text) < 1:
        raise ValueError(
            f"--steps={steps_text}: expected auto or a whole number of at least 1. Write --steps=10 for ten"
            " steps of each sample."
        )
    return int(steps_text)
