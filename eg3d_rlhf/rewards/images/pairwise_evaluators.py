"""Analytic evaluators that compare two images or two finished assets, also by yes/no questions.

`PairwiseJudge` of images [V, C, h, w] in 0..1 returns 0 or 1 for the better one, and -1 if there is no
answer. `AssetJudge` compares finished assets by properties that no reward reads; it is the held-out evaluator
of comparisons. Letters: A assets, V views, B = A V, P points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.views import FourViews
from eg3d_rlhf.rewards.box_prompts import prompt_of
from eg3d_rlhf.rewards.boxes import COLOURS, RESOLUTION, SIDES, emblem_points, modes_of, noses

Pair = tuple[torch.Tensor, torch.Tensor]
# (images [V, C, h, w], prompt, questions) -> text with one line per question
Answers = Callable[[torch.Tensor, str, Sequence[str]], str]
_FACE_PIXELS = 8  # half of the sixteen pixels of a nose
_CLOSE = 0.3  # RGB distance in 0..1 below which a pixel has a colour
_PLAUSIBLE = 0.01  # least difference of two RMS differences to the nearest mode, for images in 0..1


def verdict(first: float, second: float, margin: float = 0.0) -> int:
    """Return 0 or 1, the index of the larger number, or -1 if they differ by at most the margin."""
    return -1 if abs(first - second) <= margin else int(second > first)


def faces_painted(images: torch.Tensor, prompt: str) -> torch.Tensor:
    """Return for each view [V] whether enough pixels have the nose's colour.

    Only paint counts, not the shape.
    """
    # The first mode of a head's side is the face.
    nose = prompt_of(prompt).sides[0].nose
    if nose is None:
        return torch.zeros(len(images), dtype=torch.bool)
    distance = (images[:, :3] - images.new_tensor(COLOURS[nose])[:, None, None]).norm(dim=1)
    # A count and not a share, since all images of the problem have 16 x 16 pixels.
    return (distance < _CLOSE).sum(dim=(1, 2)) >= _FACE_PIXELS


def first_emblems(images: torch.Tensor, prompt: str) -> torch.Tensor:
    """Return for each view [V] whether it shows the first emblem, by a vote of pixels."""
    first, second = modes_of([prompt] * len(images))[:, :, :3].to(images).unbind(1)
    # Elsewhere both modes look alike, so these pixels would vote at random.
    differ = (first - second).norm(dim=1) > _CLOSE
    nearer = (images[:, :3] - first).norm(dim=1) < (images[:, :3] - second).norm(dim=1)
    return (nearer & differ).sum(dim=(1, 2)) * 2 > differ.sum(dim=(1, 2))


QUESTIONS = {
    "janus": ("Does some side show a face?", "Is every other side free of faces?", "Is the object whole?"),
    "mode": tuple(f"Does side {number} show what the prompt prefers?" for number in range(1, SIDES + 1)),
}


def problem_questions(prompt: str) -> Sequence[str]:
    """Return the questions for a prompt of the test problem."""
    return QUESTIONS[prompt_of(prompt).kind]


def analytic_answers(images: torch.Tensor, prompt: str, questions: Sequence[str]) -> str:
    """Answer `QUESTIONS` from colours and counts of pixels, with one line per question."""
    if prompt_of(prompt).kind == "janus":
        faces = int(faces_painted(images, prompt).sum())
        # The body fills most of each image, and the background is black.
        complete = bool((images.amax(dim=1) > 0.1).double().mean() > 0.6)
        known = dict(zip(QUESTIONS["janus"], (faces >= 1, faces <= 1, complete), strict=True))
    else:
        # One question per view; `questions` may be only some of them.
        known = dict(zip(QUESTIONS["mode"], first_emblems(images, prompt).tolist(), strict=False))
    return "\n".join(f"{i}. {'Yes' if known[question] else 'No'}" for i, question in enumerate(questions, 1))


@dataclass(frozen=True)
class YesNoJudge:
    """Evaluator by yes/no questions, as in DreamDPO: an image's score is the number of answers with "Yes".

    The image with the higher score wins.
    """

    answers: Answers = analytic_answers
    questions: Callable[[str], Sequence[str]] = problem_questions

    def score(self, images: torch.Tensor, prompt: str) -> int:
        """Count the lines of the answers that contain "yes"."""
        return sum(
            "yes" in line.lower()
            for line in self.answers(images, prompt, self.questions(prompt)).splitlines()
        )

    def judge(self, prompts: list[str], pairs: list[Pair], shuffle_order: bool = True) -> list[int]:
        """Compare pairs, see `PairwiseJudge`.

        Each image is evaluated separately, so the order does not matter.
        """
        del shuffle_order
        return [
            verdict(*(self.score(side, prompt) for side in pair))
            for prompt, pair in zip(prompts, pairs, strict=True)
        ]


@torch.no_grad()
def plausibility(asset: Asset) -> Callable[[Sequence[str]], torch.Tensor]:
    """Create a function that returns minus the RMS distance [A] of images to their nearest modes.

    The function takes the prompts of the assets. Each of an asset's four images has its own nearest mode.
    """
    images = FourViews().render(asset, FourViews().draw(len(asset), torch.Generator()), torch.zeros(3)).images

    def minus_distance(prompts: Sequence[str]) -> torch.Tensor:
        # [B, 2, 4, R, R], each prompt repeated for the four views
        mode_images = modes_of([text for text in prompts for _ in range(SIDES)]).to(images)
        squared = (images[:, None] - mode_images).square().flatten(2).mean(dim=2).amin(dim=1)  # [B]
        return -squared.unflatten(0, (-1, SIDES)).mean(dim=1).sqrt()

    return minus_distance


class AssetJudge:
    """Held-out evaluator of finished assets by their surface and its colour. It has no trained parts.

    Heads: the better asset has a number of noses closer to one, counted on the surface. Boxes: the better
    asset has more sides whose base has the first emblem's colours. If these are equal, the asset wins whose
    images have the smaller RMS difference to the prior's nearest modes, provided that it is ahead by 0.01.
    """

    @torch.no_grad()
    def score(self, asset: Asset, prompts: Sequence[str]) -> torch.Tensor:
        """Return the first criterion [A]; 0 is best and other values are negative."""
        kinds = torch.tensor([prompt_of(text).kind == "janus" for text in prompts])
        return torch.where(
            kinds, -(noses(asset).cpu() - 1).abs(), emblem_sides(asset, prompts) - SIDES
        ).double()

    def compare(self, first: Asset, second: Asset, prompts: Sequence[str]) -> list[int]:
        """Return 0, 1 or -1 for each of A pairs of assets with one prompt each."""
        # The second criterion decides only between assets with equal first criterion.
        scores = [self.score(asset, prompts).tolist() for asset in (first, second)]
        likely = [plausibility(asset)(prompts).tolist() for asset in (first, second)]
        return [
            verdict(a, b) if a != b else verdict(p, q, _PLAUSIBLE)
            for a, b, p, q in zip(*scores, *likely, strict=True)
        ]


@torch.no_grad()
def emblem_sides(asset: Asset, prompts: Sequence[str]) -> torch.Tensor:
    """Count the sides [A] whose base has the first emblem's colours; 0 for heads.

    Each side is decided by a majority of the points at which the two emblems differ.
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
            # [P] bool, True where the surface's colour is that of the first emblem
            nearer = (seen - colours[0]).norm(dim=1) < (seen - colours[1]).norm(dim=1)
            sides += int(nearer.double().mean() > 0.5)
        counts.append(sides)
    return torch.tensor(counts)
