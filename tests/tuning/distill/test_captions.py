"""Captions of the grid of a distillation run: prompts differ where their captions do."""

import numpy as np
import pytest

from eg3d_rlhf.experiments.media.sheet import Row, sheet
from eg3d_rlhf.tuning.distill.outputs import LONGEST_CAPTION, captions_of

BOX = "a grey box, each side of which has "


@pytest.mark.parametrize(
    "prompts",
    [
        ("a ball", "a box"),
        (f"{BOX}red", f"{BOX}blue"),
        (f"{BOX * 4}red", f"{BOX * 4}blue"),
        (f"red {BOX * 4}one", f"red {BOX * 4}two", "x " * 99),
    ],
)
def test_captions_of_different_prompts_differ(prompts):
    captions = captions_of([(prompt, seed) for prompt in prompts for seed in (0, 1)])
    assert len(set(captions)) == 2 * len(prompts)
    assert all(len(caption) <= LONGEST_CAPTION + 8 for caption in captions)
    if max(map(len, prompts)) <= LONGEST_CAPTION:
        assert captions[0] == f"{prompts[0]}, 0"


def test_long_captions_are_wrapped_below_their_image():
    cell = np.zeros((64, 64, 3), np.uint8)

    def page(caption):
        return sheet("", [Row(cells=[cell, cell], name="arm", captions=[caption, caption])], name_width=60)

    short = page("ball, 0")
    long = page("a grey box, each side of which has a red dot, 0")
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0] + 32
    assert (long[-30:] < 200).any()
