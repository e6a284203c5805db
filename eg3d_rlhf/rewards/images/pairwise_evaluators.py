"""Analytic judges and yes/no questions that compare two images or finished assets.

`PairwiseJudge` of pictures [V, C, h, w] in 0..1: 0 or 1 for the better one, -1 where there is no answer.
`AssetJudge` compares finished assets by what no reward reads, and is the judge of comparisons. Letters: A
assets, V views, B = A V.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.views import FourViews
from eg3d_rlhf.rewards.box_prompts import prompt_of
from eg3d_rlhf.rewards.boxes import COLOURS, RESOLUTION, SIDES, emblem_points, modes_of, noses

Pair = tuple[torch.Tensor, torch.Tensor]
# (pictures [V, C, h, w], prompt, questions) -> a line for each
Answers = Callable[[torch.Tensor, str, Sequence[str]], str]
_FACE_PIXELS = 8  # of a nose's sixteen
_CLOSE = 0.3  # distance of a pixel to a colour, RGB of 0..1, under which it has it
_PLAUSIBLE = 0.01  # RMS difference to the nearest mode, of pictures in 0..1, that one asset must be ahead by


def verdict(first: float, second: float, margin: float = 0.0) -> int:
    """0 or 1 for the larger number, -1 within the margin."""
    return -1 if abs(first - second) <= margin else int(second > first)


def faces_painted(pictures: torch.Tensor, prompt: str) -> torch.Tensor:
    """Whether each view [V] shows the nose's colour on enough pixels: paint alone, whatever the shape."""
    nose = prompt_of(prompt).sides[0].nose
    if nose is None:
        return torch.zeros(len(pictures), dtype=torch.bool)
    apart = (pictures[:, :3] - pictures.new_tensor(COLOURS[nose])[:, None, None]).norm(dim=1)
    return (apart < _CLOSE).sum(dim=(1, 2)) >= _FACE_PIXELS


def first_emblems(pictures: torch.Tensor, prompt: str) -> torch.Tensor:
    """Whether each view [V] shows the first emblem: by a vote of the pixels on which the two modes differ."""
    first, second = modes_of([prompt] * len(pictures))[:, :, :3].to(pictures).unbind(1)
    differ = (first - second).norm(dim=1) > _CLOSE
    nearer = (pictures[:, :3] - first).norm(dim=1) < (pictures[:, :3] - second).norm(dim=1)
    return (nearer & differ).sum(dim=(1, 2)) * 2 > differ.sum(dim=(1, 2))


QUESTIONS = {
    "janus": ("Does some side show a face?", "Is every other side free of faces?", "Is the object whole?"),
    "mode": tuple(f"Does side {number} show what the prompt prefers?" for number in range(1, SIDES + 1)),
}


def problem_questions(prompt: str) -> Sequence[str]:
    """The questions that belong to a prompt of the test problem."""
    return QUESTIONS[prompt_of(prompt).kind]


def analytic_answers(pictures: torch.Tensor, prompt: str, questions: Sequence[str]) -> str:
    """Answers to `QUESTIONS`, a line each, from colours and counts of pixels."""
    if prompt_of(prompt).kind == "janus":
        faces = int(faces_painted(pictures, prompt).sum())
        whole = bool((pictures.amax(dim=1) > 0.1).double().mean() > 0.6)
        known = dict(zip(QUESTIONS["janus"], (faces >= 1, faces <= 1, whole), strict=True))
    else:
        known = dict(zip(QUESTIONS["mode"], first_emblems(pictures, prompt).tolist(), strict=False))
    return "\n".join(f"{i}. {'Yes' if known[question] else 'No'}" for i, question in enumerate(questions, 1))


@dataclass(frozen=True)
class YesNoJudge:
    """Score of a picture: the lines of its answers that hold "Yes", as DreamDPO's judge counts them; the
    higher score wins.
    """

    answers: Answers = analytic_answers
    questions: Callable[[str], Sequence[str]] = problem_questions

    def score(self, pictures: torch.Tensor, prompt: str) -> int:
        return sum(
            "yes" in line.lower()
            for line in self.answers(pictures, prompt, self.questions(prompt)).splitlines()
        )

    def judge(self, prompts: list[str], pairs: list[Pair], shuffle_order: bool = True) -> list[int]:
        """See `PairwiseJudge`. Each picture is asked about alone, so there is no order."""
        del shuffle_order
        return [
            verdict(*(self.score(side, prompt) for side in pair))
            for prompt, pair in zip(prompts, pairs, strict=True)
        ]


@torch.no_grad()
def plausibility(asset: Asset) -> Callable[[Sequence[str]], torch.Tensor]:
    """Minus the RMS difference [A] of an asset's four pictures to the nearest mode each, as a function of its
    prompts.
    """
    pictures = (
        FourViews().render(asset, FourViews().draw(len(asset), torch.Generator()), torch.zeros(3)).images
    )

    def of(prompts: Sequence[str]) -> torch.Tensor:
        both = modes_of([text for text in prompts for _ in range(SIDES)]).to(pictures)
        apart = (pictures[:, None] - both).square().flatten(2).mean(dim=2).amin(dim=1)  # [B]
        return -apart.unflatten(0, (-1, SIDES)).mean(dim=1).sqrt()

    return of


class AssetJudge:
    """Finished assets, by their surface and its colour: trained by nothing, read by no reward.

    Heads: the number of noses nearer to one, counted on the surface. Boxes: more sides whose floor has the
    first emblem's colours. Then, where one is ahead by 0.01: the smaller RMS difference of its pictures to
    the prior's nearest modes.
    """

    @torch.no_grad()
    def score(self, asset: Asset, prompts: Sequence[str]) -> torch.Tensor:
        """First criterion [A]: 0 is best."""
        kinds = torch.tensor([prompt_of(text).kind == "janus" for text in prompts])
        return torch.where(
            kinds, -(noses(asset).cpu() - 1).abs(), emblem_sides(asset, prompts) - SIDES
        ).double()

    def compare(self, first: Asset, second: Asset, prompts: Sequence[str]) -> list[int]:
        """0, 1 or -1 of each of A pairs of assets with a prompt each."""
        scores = [self.score(asset, prompts).tolist() for asset in (first, second)]
        likely = [plausibility(asset)(prompts).tolist() for asset in (first, second)]
        return [
            verdict(a, b) if a != b else verdict(p, q, _PLAUSIBLE)
            for a, b, p, q in zip(*scores, *likely, strict=True)
        ]


@torch.no_grad()
def emblem_sides(asset: Asset, prompts: Sequence[str]) -> torch.Tensor:
    """Sides [A] whose floor has the first emblem's colours: a vote of the points on which the two emblems
    differ; 0 for heads.
    """
    counts = []
    for i, text in enumerate(prompts):
        prompt = prompt_of(text)
        if prompt.kind != "mode":
            counts.append(0)
            continue
        sides = 0
        for side in range(SIDES):
            points, colours = emblem_points(prompt, side, RESOLUTION)  # [P, 3], [2, P, 3]
            seen = asset.colour(points)[i].cpu()
            nearer = (seen - colours[0]).norm(dim=1) < (seen - colours[1]).norm(dim=1)
            sides += int(nearer.double().mean() > 0.5)
        counts.append(sides)
    return torch.tensor(counts)
