"""Ranks the images of two noises by a vision-language model behind a chat-completions server, as in DreamDPO
(Zhou et al. 2025, arXiv 2502.04370, which asks such a model yes/no questions).

The views of an asset are one montage. Every pair is asked in both orders; a verdict that changes with the
order is no answer, and the step then uses no preference. Answers are stored in the folder of the run, so a
run that was killed repeats its last steps without calls. All calls of a run count towards one limit, also
those before a resume.

Shapes: V views of an asset; h and w are pixels of images.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eg3d_rlhf.people.judge.judge import Judge, JudgedPair, MemoryRenders
from eg3d_rlhf.people.judge.settings import QUESTIONS, JudgeSettings, Question
from eg3d_rlhf.people.judge.verdicts import FIRST, SECOND
from eg3d_rlhf.tuning.distill.config import SceneConfig

ANSWERS = "judge-answers.jsonl"  # file of answers in the folder of a run
_MODE = "textured"
_LEAST_SIDE = (
    256  # pixels of a view; smaller views are enlarged, because a model sees little in 16 x 16 pixels
)
_CRITERION = "questions"
# function from a prompt to yes/no questions, of which "yes" is always the better answer
QuestionsOf = Callable[[str], Sequence[str]]


def montage_png(images: torch.Tensor) -> bytes:
    """Arrange the views of an asset in two columns, and return the PNG file.

    Args:
        images: views [V, 3, h, w] in 0..1; values outside are clipped.
    """
    views = (images[:, :3].detach().cpu().float().clamp(0, 1) * 255).round().byte()
    # Copies of whole pixels, so that enlarging adds no colours.
    factor = max(1, -(-_LEAST_SIDE // views.shape[-1]))
    pixels = views.permute(0, 2, 3, 1).repeat_interleave(factor, 1).repeat_interleave(factor, 2).numpy()
    columns = min(2, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    side_y, side_x = pixels.shape[1:3]
    # grey where the last row has no view
    sheet = np.full((rows * side_y, columns * side_x, 3), 128, np.uint8)
    for i, view in enumerate(pixels):
        top = i // columns * side_y
        left = i % columns * side_x
        sheet[top : top + side_y, left : left + side_x] = view
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def question_text(questions: Sequence[str]) -> str:
    """Return the question about a pair that yes/no questions and their win/lose criterion make.

    >>> question_text(["Is it whole?"]).partition(": ")[2].partition(" If")[0]
    '(1) Is it whole? The winner is the asset with more answers yes.'
    """
    numbered = " ".join(f"({i}) {question}" for i, question in enumerate(questions, 1))
    return (
        f"Answer each of these questions about both assets with yes or no: {numbered} The winner is the asset"
        " with more answers yes. If both have equally many, the answer is tie."
    )


@dataclass(kw_only=True)
class ServedJudge:
    """A `PairwiseJudge` that asks a vision-language model.

    Args:
        settings: server, model and limit. The questions are those of this class.
        questions: function from a prompt to yes/no questions; None: one question, which asset is better.
        print_line: function that is called with each line for the user.
    """

    settings: JudgeSettings
    questions: QuestionsOf | None = None
    print_line: Callable[[str], None] = field(default=lambda line: print(line, flush=True))
    _judge: Judge | None = None
    _is_limit_announced: bool = False

    def open(self, folder: Path | None) -> None:
        """Open the file of answers in the folder of a run.

        Args:
            folder: folder of the run; None: answers stay in memory.
        """
        answers = None if folder is None else folder / ANSWERS
        self._judge = Judge(replace(self.settings, answers=answers), self._echo)
        # Calls before a resume count towards the limit.
        self._judge.counts.calls = len(self._judge.answers)
        self.print_line(
            f"judge {self.settings.model} at {self.settings.url}: 2 calls per pair of noises and step,"
            f" each with 2 montages of renders and the prompt; at most {self.settings.limit} calls, of"
            f" which {self._judge.counts.calls} are done"
        )

    def close(self) -> None:
        """Close the file of answers, and print what the run has cost."""
        if self._judge is not None:
            self.print_line(f"judge: {self._judge.counts.line()}")
            self._judge.__exit__()
            self._judge = None

    def judge(
        self,
        prompts: list[str],
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        shuffle_order: bool = True,
    ) -> list[int]:
        """Return the index of the better asset of each pair, or -1 for a tie or no answer.

        Args:
            prompts: prompt of each pair.
            pairs: two tensors of images [V, 3, h, w] in 0..1 for each pair.
            shuffle_order: ignored, since both orders are always asked.
        """
        del shuffle_order
        if self._judge is None:
            self.open(None)
        judge = self._judge
        assert judge is not None
        # Prompts with the same questions are asked together.
        indices_by_question: dict[Question, list[int]] = {}
        for i, prompt in enumerate(prompts):
            question = QUESTIONS["overall"]
            if self.questions is not None:
                question = Question(name=_CRITERION, text=question_text(self.questions(prompt)))
            indices_by_question.setdefault(question, []).append(i)
        answers = [-1] * len(prompts)
        for question, indices in indices_by_question.items():
            judge.settings = replace(judge.settings, questions=(question,))
            judged_pairs = [
                JudgedPair(
                    key=str(i),
                    first=MemoryRenders({_MODE: [montage_png(pairs[i][0])]}),
                    second=MemoryRenders({_MODE: [montage_png(pairs[i][1])]}),
                    prompt=prompts[i],
                )
                for i in indices
            ]
            for verdict in judge.compare(judged_pairs):
                answers[int(verdict.pair)] = {FIRST: 0, SECOND: 1}.get(str(verdict.outcome), -1)
        if judge.counts.limit_reached and not self._is_limit_announced:
            self._is_limit_announced = True
            self.print_line(
                f"Warning: the limit of {self.settings.limit} calls of the judge is reached. The"
                " remaining steps use no preference. For a preference in every step, begin a run with a"
                " larger --judge-limit or fewer --steps."
            )
        return answers

    def _echo(self, line: str) -> None:
        """Print warnings. What each step sends is announced once, by `open`."""
        if line.startswith("Warning"):
            self.print_line(line)


def read_questions(path: Path) -> QuestionsOf:
    """Read yes/no questions from a text file, one per line, which are asked about every prompt.

    Raises: FileNotFoundError for a missing file; ValueError if it has no line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--questions={path}: there is no such file. Correct its path.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--questions={path}: the file is empty. Write one yes/no question per line.")
    return lambda prompt: lines


def served_judge(scene: SceneConfig, problem_questions: QuestionsOf | None = None) -> ServedJudge | None:
    """Make the judge of a scene whose --judge is an address; None for any other value.

    Args:
        scene: settings of the scene.
        problem_questions: questions of a bundled problem, which are the default; None: the default is one
            question, which asset is better.

    Raises: OSError or ValueError for a file of questions that cannot be read.
    """
    if not scene.has_served_judge:
        return None
    questions = problem_questions if scene.questions is None else read_questions(Path(scene.questions))
    settings = JudgeSettings(url=str(scene.judge), model=str(scene.judge_model), limit=scene.judge_limit)
    return ServedJudge(settings=settings, questions=questions)
