"""Analytic evaluators of the bundled test problem, which compare two assets by their images or surfaces.

`YesNoEvaluator` compares images by yes/no questions, as DreamDPO does with a vision-language model (arXiv
2502.04370). `AssetEvaluator` compares finished assets by properties that no reward reads, and is the held-out
evaluator.

Shapes: A is the number of assets, V the number of views of each asset, and B = A V the number of images,
which have C channels and h x w pixels. P is the number of points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.views import FourViews
from eg3d_rlhf.rewards.box_prompts import prompt_of
from eg3d_rlhf.rewards.boxes import COLOURS, RESOLUTION, SIDES, emblem_points, modes_of, noses

Pair = tuple[torch.Tensor, torch.Tensor]  # images [V, C, h, w] of two assets, in 0..1
# Function that answers questions: (images [V, C, h, w], prompt, questions) -> text with one line per question
Answers = Callable[[torch.Tensor, str, Sequence[str]], str]
_FACE_PIXELS = 8  # smallest number of pixels of a visible nose: half of its sixteen pixels
_CLOSE = 0.3  # greatest distance of two RGB colours in 0..1 that count as equal
_PLAUSIBLE = 0.01  # smallest difference of two RMS distances to the nearest mode that decides a comparison


def winner(first_score: float, second_score: float, margin: float = 0.0) -> int:
    """Return 0 if the first of two scores is larger, and 1 if the second is larger.

    Return -1 if the scores differ by at most `margin`.
    """
    return -1 if abs(first_score - second_score) <= margin else int(second_score > first_score)


def faces_painted(images: torch.Tensor, prompt: str) -> torch.Tensor:
    """Return a mask [V] of the views in which enough pixels have the colour of the prompt's nose.

    The mask is False for prompts of boxes. The shape of the asset is not considered.

    Args:
        images: images [V, C, h, w] of one asset, in 0..1.
        prompt: prompt of the asset.
    """
    # The first mode of a head's side is the face.
    nose_colour = prompt_of(prompt).sides[0].nose
    if nose_colour is None:
        return torch.zeros(len(images), dtype=torch.bool)
    colour_distances = (images[:, :3] - images.new_tensor(COLOURS[nose_colour])[:, None, None]).norm(dim=1)
    # A count and not a share, since all images of the problem have 16 x 16 pixels.
    return (colour_distances < _CLOSE).sum(dim=(1, 2)) >= _FACE_PIXELS


def shows_first_emblem(images: torch.Tensor, prompt: str) -> torch.Tensor:
    """Return a mask [V] of the views that show the preferred emblem of the prompt.

    A view counts if most of the pixels at which the two emblems differ are nearer to the preferred emblem.

    Args:
        images: images [V, C, h, w] of one asset, in 0..1.
        prompt: prompt of the asset.
    """
    first_mode, second_mode = modes_of([prompt] * len(images))[:, :, :3].to(images).unbind(1)
    # At all other pixels both modes look alike, so the decision would be random there.
    has_different_modes = (first_mode - second_mode).norm(dim=1) > _CLOSE  # [V, h, w]
    first_distance = (images[:, :3] - first_mode).norm(dim=1)
    second_distance = (images[:, :3] - second_mode).norm(dim=1)
    is_first = first_distance < second_distance
    return (is_first & has_different_modes).sum(dim=(1, 2)) * 2 > has_different_modes.sum(dim=(1, 2))


# Questions by kind of prompt. The answer "Yes" is always the better one.
QUESTIONS = {
    "janus": ("Does some side show a face?", "Is every other side free of faces?", "Is the object whole?"),
    "mode": tuple(f"Does side {number} show what the prompt prefers?" for number in range(1, SIDES + 1)),
}


def problem_questions(prompt: str) -> Sequence[str]:
    """Return the questions for a prompt of the test problem."""
    return QUESTIONS[prompt_of(prompt).kind]


def analytic_answers(images: torch.Tensor, prompt: str, questions: Sequence[str]) -> str:
    """Answer questions about an asset from the colours of pixels.

    Args:
        images: images [V, C, h, w] of the asset, in 0..1.
        prompt: prompt of the asset.
        questions: all or some of the questions of `problem_questions`.
    Returns: one line per question, for example "1. Yes".
    """
    if prompt_of(prompt).kind == "janus":
        face_count = int(faces_painted(images, prompt).sum())
        # The body fills most of each image, and the background is black.
        is_complete = bool((images.amax(dim=1) > 0.1).double().mean() > 0.6)
        answers = dict(zip(QUESTIONS["janus"], (face_count >= 1, face_count <= 1, is_complete), strict=True))
    else:
        # One question per view; there may be fewer than four views.
        answers = dict(zip(QUESTIONS["mode"], shows_first_emblem(images, prompt).tolist(), strict=False))
    return "\n".join(
        f"{i}. {'Yes' if answers[question] else 'No'}" for i, question in enumerate(questions, 1)
    )


@dataclass(frozen=True)
class YesNoEvaluator:
    """Evaluator of images by yes/no questions, as in DreamDPO (arXiv 2502.04370).

    The score of an asset is the number of questions that are answered with "Yes". The asset with the higher
    score wins.
    """

    answers: Answers = analytic_answers  # function that answers the questions
    # Function that returns a prompt's questions
    questions: Callable[[str], Sequence[str]] = problem_questions

    def score(self, images: torch.Tensor, prompt: str) -> int:
        """Count the questions about an asset that are answered with "Yes".

        Args:
            images: images [V, C, h, w] of the asset, in 0..1.
            prompt: prompt of the asset.
        """
        answer_lines = self.answers(images, prompt, self.questions(prompt)).splitlines()
        return sum("yes" in line.lower() for line in answer_lines)

    def judge(self, prompts: list[str], pairs: list[Pair], shuffle_order: bool = True) -> list[int]:
        """Compare pairs of assets, and return 0 or 1 for the better one of each pair, or -1 for equal scores.

        Args:
            prompts: prompt of each pair.
            pairs: for each pair, the images of its first asset and the images of its second asset.
            shuffle_order: ignored, since each asset is evaluated separately and the order has no influence.
        """
        del shuffle_order
        comparison_results = []
        for prompt, (first_images, second_images) in zip(prompts, pairs, strict=True):
            comparison_results.append(
                winner(self.score(first_images, prompt), self.score(second_images, prompt))
            )
        return comparison_results


@torch.no_grad()
def plausibility(asset: Asset) -> Callable[[Sequence[str]], torch.Tensor]:
    """Create a function that scores how similar the images of assets are to the modes of their prompts.

    Args: asset: the assets, [A]; they are rendered only once.
    Returns: function from the prompt of each asset to scores [A]. A score is minus the RMS distance of the
        four images of the asset to the modes. The nearer of the prompt's two modes is chosen for each image
        separately.
    """
    view_images = (
        FourViews().render(asset, FourViews().draw(len(asset), torch.Generator()), torch.zeros(3)).images
    )

    def minus_distance(prompts: Sequence[str]) -> torch.Tensor:
        """Return minus the RMS distance [A] to the modes of the prompts."""
        # [B, 2, 4, R, R]; each prompt is repeated for the four views
        mode_images = modes_of([text for text in prompts for _ in range(SIDES)]).to(view_images)
        squared_distance = (view_images[:, None] - mode_images).square().flatten(2).mean(dim=2)  # [B, 2]
        nearest_distance = squared_distance.amin(dim=1)  # [B]
        return -nearest_distance.unflatten(0, (-1, SIDES)).mean(dim=1).sqrt()

    return minus_distance


class AssetEvaluator:
    """Held-out evaluator of finished assets by their surface and its colour. It has no trained parts.

    Of two heads, the head wins whose number of noses, counted on the surface, is closer to one. Of two boxes,
    the box wins that has more sides with the preferred emblem. If these numbers are equal, the asset wins
    whose images have the smaller RMS distance to the nearest modes, provided that the distances differ by
    more than 0.01. Otherwise the comparison is a tie.
    """

    @torch.no_grad()
    def score(self, asset: Asset, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores [A] of assets by the first criterion: 0 is best, and all other scores are below.

        The score of a head is minus the distance of its number of noses from one. The score of a box is minus
        the number of sides that do not show the preferred emblem.

        Args:
            asset: the assets, [A].
            prompts: prompt of each asset.
        """
        is_head = torch.tensor([prompt_of(text).kind == "janus" for text in prompts])
        return torch.where(
            is_head, -(noses(asset).cpu() - 1).abs(), emblem_sides(asset, prompts) - SIDES
        ).double()

    def compare(self, first: Asset, second: Asset, prompts: Sequence[str]) -> list[int]:
        """Compare pairs of assets, and return 0 or 1 for the better one of each pair, or -1 for a tie.

        Args:
            first: first asset of each pair.
            second: second asset of each pair.
            prompts: prompt of each pair.
        """
        first_scores = self.score(first, prompts).tolist()
        second_scores = self.score(second, prompts).tolist()
        first_plausibilities = plausibility(first)(prompts).tolist()
        second_plausibilities = plausibility(second)(prompts).tolist()
        comparison_results = []
        for i in range(len(prompts)):
            if first_scores[i] != second_scores[i]:
                comparison_results.append(winner(first_scores[i], second_scores[i]))
            else:
                comparison_results.append(
                    winner(first_plausibilities[i], second_plausibilities[i], _PLAUSIBLE)
                )
        return comparison_results


@torch.no_grad()
def emblem_sides(asset: Asset, prompts: Sequence[str]) -> torch.Tensor:
    """Count the sides of each asset that show the preferred emblem: int64 [A], 0 for heads.

    A side counts if most of its points at which the two emblems differ are nearer to the preferred emblem's
    colour.

    Args:
        asset: the assets, [A].
        prompts: prompt of each asset.
    """
    side_counts = []
    for i, text in enumerate(prompts):
        prompt = prompt_of(text)
        if prompt.kind != "mode":
            side_counts.append(0)
            continue
        side_count = 0
        for side in range(SIDES):
            points, emblem_colours = emblem_points(prompt, side, RESOLUTION)  # [P, 3], [2, P, 3]
            asset_colours = asset.colour(points)[i].cpu()  # [P, 3]
            first_distance = (asset_colours - emblem_colours[0]).norm(dim=1)
            second_distance = (asset_colours - emblem_colours[1]).norm(dim=1)
            is_first = first_distance < second_distance
            side_count += int(is_first.double().mean() > 0.5)
        side_counts.append(side_count)
    return torch.tensor(side_counts)
