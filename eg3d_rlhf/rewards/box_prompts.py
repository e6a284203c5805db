"""Prompts of the CPU test problem for text-to-3D (boxes.py).

A prompt describes a head with a nose, or a box with emblems on its sides. This module does not import torch,
so that `--help` is quick.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """Features on one side of a box: a coloured nose with eyes, or a coloured emblem, or no feature."""

    nose: str | None = None  # colour of the nose; None for a side without nose and eyes
    emblem: tuple[str, str] | None = None  # name and colour of the emblem


@dataclass(frozen=True)
class Prompt:
    """Prompt of the test problem, with the two modes that the distilled prior has for each side of the box.

    In the first mode, a side is a face or has the preferred emblem. In the second mode, the side is empty or
    has the rejected emblem.
    """

    text: str
    kind: str  # "janus" (a head) or "mode" (a box with emblems)
    body: str  # colour of the box itself
    sides: tuple[Side, Side]  # features in the first and in the second mode, the same for all four sides


def _janus(body: str, nose: str) -> Prompt:
    """Create a prompt that describes a head with a nose; `body` and `nose` are names of colours."""
    # In the second mode, a side of a head is empty.
    return Prompt(f"a {body} head with a {nose} nose", "janus", body, (Side(nose=nose), Side()))


def _mode(body: str, preferred_emblem: tuple[str, str], rejected_emblem: tuple[str, str]) -> Prompt:
    """Create a prompt that describes a box and prefers one emblem (name, colour) over another emblem."""
    preferred_name, preferred_colour = preferred_emblem
    rejected_name, rejected_colour = rejected_emblem
    text = (
        f"a {body} box, each side with a {preferred_colour} {preferred_name} rather than a {rejected_colour}"
        f" {rejected_name}"
    )
    return Prompt(text, "mode", body, (Side(emblem=preferred_emblem), Side(emblem=rejected_emblem)))


_HUES = ("red", "green", "blue", "yellow")
PROMPTS: tuple[Prompt, ...] = (
    *(
        _janus(body, nose)
        for body, nose in [
            ("white", "red"),
            ("white", "green"),
            ("white", "blue"),
            ("grey", "red"),
            ("grey", "green"),
            ("grey", "blue"),
            ("grey", "yellow"),
            ("yellow", "red"),
            ("yellow", "blue"),
            ("blue", "red"),
            ("green", "yellow"),
        ]
    ),
    *(
        _mode("grey", ("disc", preferred_hue), ("disc", rejected_hue))
        for preferred_hue, rejected_hue in [("red", "blue"), ("green", "red"), ("blue", "green")]
    ),
    *(_mode("grey", ("upright bar", hue), ("level bar", hue)) for hue in _HUES),
    *(_mode("grey", ("left half", hue), ("right half", hue)) for hue in _HUES),
)
SEEDS = 5  # number of seeds per prompt; 22 x 5 = 110 samples, as many as GPTEval3D has prompts
_BY_TEXT = {prompt.text: prompt for prompt in PROMPTS}


def prompt_of(text: str) -> Prompt:
    """Return the prompt of the test problem that has this text.

    Raises: ValueError if the test problem has no prompt with this text.
    """
    if text not in _BY_TEXT:
        example = PROMPTS[0].text
        raise ValueError(
            f"--prompt={text!r} is not one of the {len(PROMPTS)} prompts of the bundled test problem. Use one"
            f" of its prompts, for example {example!r}."
        )
    return _BY_TEXT[text]


def pairs(seed_count: int = SEEDS) -> list[tuple[str, int]]:
    """Return the samples of the default problem as pairs (text of the prompt, seed).

    Heads and boxes alternate, so that any two successive pairs contain both kinds of prompts.

    Args: seed_count: number of seeds per prompt; the seeds are 0 to `seed_count` - 1.
    """
    head_count = len(PROMPTS) // 2
    # PROMPTS lists the heads first and the boxes second. Even indices take from the heads, and odd indices
    # from the boxes.
    alternating_prompts = [PROMPTS[i // 2 + head_count * (i % 2)] for i in range(len(PROMPTS))]
    # All prompts come with the first seed before the second seed begins.
    return [(prompt.text, seed) for seed in range(seed_count) for prompt in alternating_prompts]
