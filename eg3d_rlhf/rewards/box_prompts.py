"""Prompts of the CPU test problem (boxes.py). This file imports no torch, so that `--help` is quick."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """What one side shows: a nose of a colour and eyes, an emblem of a colour, or nothing."""

    nose: str | None = None
    emblem: tuple[str, str] | None = None  # name, colour


@dataclass(frozen=True)
class Prompt:
    """A prompt and its two modes; the first is the face, or the preferred emblem."""

    text: str
    kind: str  # "janus" or "mode"
    body: str  # colour
    sides: tuple[Side, Side]


def _janus(body: str, nose: str) -> Prompt:
    return Prompt(f"a {body} head with a {nose} nose", "janus", body, (Side(nose=nose), Side()))


def _mode(body: str, first: tuple[str, str], second: tuple[str, str]) -> Prompt:
    text = f"a {body} box, each side with a {first[1]} {first[0]} rather than a {second[1]} {second[0]}"
    return Prompt(text, "mode", body, (Side(emblem=first), Side(emblem=second)))


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
        _mode("grey", ("disc", a), ("disc", b))
        for a, b in [("red", "blue"), ("green", "red"), ("blue", "green")]
    ),
    *(_mode("grey", ("upright bar", hue), ("level bar", hue)) for hue in _HUES),
    *(_mode("grey", ("left half", hue), ("right half", hue)) for hue in _HUES),
)
SEEDS = 5  # of each prompt: 22 x 5 = 110 pairs, as many as GPTEval3D's prompts
_BY_TEXT = {prompt.text: prompt for prompt in PROMPTS}


def prompt_of(text: str) -> Prompt:
    """The prompt of a text. Raises: ValueError for one that the problem does not know."""
    if text not in _BY_TEXT:
        example = PROMPTS[0].text
        raise ValueError(
            f"--prompt: expected one of the test problem's {len(PROMPTS)} prompts, got {text!r}. The first is"
            f" {example!r}."
        )
    return _BY_TEXT[text]


def pairs(seeds: int = SEEDS) -> list[tuple[str, int]]:
    """(prompt, seed) of the default problem, kinds in turn so that any first part holds both."""
    half = len(PROMPTS) // 2
    order = [PROMPTS[i // 2 + half * (i % 2)] for i in range(len(PROMPTS))]
    return [(prompt.text, seed) for seed in range(seeds) for prompt in order]
