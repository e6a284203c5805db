"""Prompts of the CPU test problem (boxes.py). No torch is imported, so that `--help` is quick."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """Features on one side of a box: a coloured nose with eyes, an emblem of a colour, or nothing."""

    nose: str | None = None  # colour
    emblem: tuple[str, str] | None = None  # name, colour


@dataclass(frozen=True)
class Prompt:
    """A prompt and its two modes. The first mode is the face or the preferred emblem."""

    text: str
    kind: str  # "janus" (a head) or "mode" (a box with emblems)
    body: str  # colour
    sides: tuple[Side, Side]  # the two modes of every side


def _janus(body: str, nose: str) -> Prompt:
    """Create a prompt of a head with a nose."""
    # The second mode of a head's side is an empty side.
    return Prompt(f"a {body} head with a {nose} nose", "janus", body, (Side(nose=nose), Side()))


def _mode(body: str, first: tuple[str, str], second: tuple[str, str]) -> Prompt:
    """Create a prompt of a box that prefers one emblem over another."""
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
SEEDS = 5  # per prompt: 22 x 5 = 110 pairs of prompt and seed, as many as GPTEval3D has prompts
_BY_TEXT = {prompt.text: prompt for prompt in PROMPTS}


def prompt_of(text: str) -> Prompt:
    """Return the prompt with this text. Raises: ValueError if the test problem has no such prompt."""
    if text not in _BY_TEXT:
        example = PROMPTS[0].text
        raise ValueError(
            f"--prompt: expected one of the {len(PROMPTS)} prompts of the test problem, got {text!r}. Use"
            f" one of them, for example {example!r}."
        )
    return _BY_TEXT[text]


def pairs(seeds: int = SEEDS) -> list[tuple[str, int]]:
    """Return (prompt, seed) of the default problem.

    Kinds alternate, so that the first n pairs contain both.
    """
    half = len(PROMPTS) // 2
    # Even places take from the first half (heads), odd ones from the second half (boxes).
    order = [PROMPTS[i // 2 + half * (i % 2)] for i in range(len(PROMPTS))]
    return [(prompt.text, seed) for seed in range(seeds) for prompt in order]
