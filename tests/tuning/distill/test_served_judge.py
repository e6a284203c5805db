"""DreamDPO by a vision-language model behind a server: the same ranking as in process, the limit, the
cost."""

import json

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.modes import ModeCommand
from eg3d_rlhf.people.judge.settings import JudgeSettings
from eg3d_rlhf.rewards.images.pairwise_evaluators import YesNoEvaluator, problem_questions
from eg3d_rlhf.tuning.distill.served_judge import ServedJudge, montage_png
from tests.rejections import rejected
from tests.tuning.distill.questions_server import QuestionsServer, views_of


def prompts_of_problem() -> list[str]:
    from eg3d_rlhf.rewards import box_prompts

    kinds: dict[str, str] = {}
    for prompt in box_prompts.PROMPTS:
        kinds.setdefault(prompt.kind, prompt.text)
    return [kinds["janus"], kinds["mode"]]


def modes_with_noise(prompt: str, count: int, seed: int) -> list[torch.Tensor]:
    """Images [4, 3, h, w] of `count` assets: one of the prompt's modes in each view, with noise."""
    from eg3d_rlhf.rewards.boxes import modes_of

    rng = torch.Generator().manual_seed(seed)
    modes = modes_of([prompt] * 4)[:, :, :3]  # [4, 2, 3, h, w]
    images = []
    for _ in range(count):
        choice = torch.randint(2, (4,), generator=rng)
        noise = 0.02 * torch.randn(modes[:, 0].shape, generator=rng)
        images.append((modes[torch.arange(4), choice] + noise).clamp(0, 1))
    return images


def judge_at(server: QuestionsServer, limit: int = 1000) -> ServedJudge:
    return ServedJudge(
        settings=JudgeSettings(url=server.url, model="questions", limit=limit),
        questions=problem_questions,
        print_line=lambda line: None,
    )


def test_a_montage_holds_the_pixels_of_all_views():
    images = modes_with_noise(prompts_of_problem()[1], 1, 0)[0]
    assert torch.allclose(views_of(montage_png(images)), images, atol=0.5 / 255 + 1e-6)


def test_the_served_judge_ranks_as_the_same_questions_in_process():
    prompts = []
    pairs = []
    for prompt in prompts_of_problem():
        assets = modes_with_noise(prompt, 12, 1)
        prompts += [prompt] * 6
        pairs += list(zip(assets[::2], assets[1::2], strict=True))
    expected = YesNoEvaluator().judge(prompts, pairs)
    assert {0, 1} <= set(expected)
    with QuestionsServer() as server:
        judge = judge_at(server)
        assert judge.judge(prompts, pairs) == expected
        # the prompt is sent, with the questions of its kind, and every pair in both orders
        assert len(server.prompts) == 2 * len(pairs) and set(server.prompts) == set(prompts)
        assert all(
            any(q in text for q in problem_questions(p))
            for p, text in zip(server.prompts, server.texts, strict=True)
        )
        # asked again, everything is cached
        assert judge.judge(prompts, pairs) == expected and len(server.prompts) == 2 * len(pairs)


def test_a_judge_of_positions_gives_no_answer_and_the_limit_holds():
    prompt = prompts_of_problem()[1]
    assets = modes_with_noise(prompt, 12, 2)
    pairs = list(zip(assets[::2], assets[1::2], strict=True))
    with QuestionsServer(constant="first") as server:
        assert judge_at(server).judge([prompt] * 6, pairs) == [-1] * 6
    with QuestionsServer() as server:
        lines: list[str] = []
        judge = judge_at(server, limit=6)
        judge.print_line = lines.append
        answers = judge.judge([prompt] * 6, pairs)
        assert len(server.prompts) == 6 and answers[3:] == [-1] * 3
        judge.judge([prompt] * 6, pairs)
        assert len(server.prompts) == 6 and sum(line.startswith("Warning") for line in lines) == 1


def distil(*args: str):
    return CliRunner().invoke(ModeCommand("train"), ["--mode=distill", "--method=dreamdpo", *args])


@pytest.mark.parametrize(
    "args, names",
    [
        (("--judge=http://127.0.0.1:9/v1",), ("--judge-model",)),
        (("--judge=http://127.0.0.1:9/v1", "--judge-model=m"), ("--judge-limit",)),
        (("--judge=questions", "--judge-limit=5"), ("--judge-limit",)),
        (("--judge=nobody",), ("--judge", "nobody")),
    ],
)
def test_flags_of_a_served_judge_are_checked(args, names):
    rejected(distil(*args, "--dry-run") if "nobody" not in args[0] else distil(*args), *names)


def test_a_run_asks_within_its_limit_and_stores_its_answers(tmp_path):
    head, box = prompts_of_problem()
    with QuestionsServer() as server:
        done = distil(
            f"--judge={server.url}",
            "--judge-model=questions",
            "--judge-limit=16",
            f"--prompt={head}",
            f"--prompt={box}",
            "--assets=1",
            "--steps=6",
            f"--outdir={tmp_path}",
        )
        assert done.exit_code == 0, done.output
        assert len(server.prompts) == 16
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    lines = (folder / "judge-answers.jsonl").read_text().splitlines()
    assert len(lines) == 16 and len({json.loads(line)["key"] for line in lines}) == 16


@pytest.mark.long
@pytest.mark.timeout(3600)  # 22,000 calls
def test_dreamdpo_by_a_served_judge_wins_as_often_as_by_the_same_questions_in_process(tmp_path):
    """The win rates over SDS of 110 assets lie in the intervals of each other, and both beat SDS."""
    results = {}
    with QuestionsServer() as server:
        judges = {
            "process": ["--judge=questions"],
            "server": [f"--judge={server.url}", "--judge-model=questions", "--judge-limit=30000"],
        }
        for name, flags in judges.items():
            done = CliRunner().invoke(
                ModeCommand("train"),
                [
                    "--mode=distill",
                    "--compare=sds,dreamdpo",
                    "--show=0",
                    f"--outdir={tmp_path / name}",
                    *flags,
                ],
            )
            assert done.exit_code == 0, done.output
            (folder,) = [path for path in (tmp_path / name).iterdir() if path.is_dir()]
            results[name] = json.loads((folder / "compare.json").read_text())
        calls = len(server.prompts)
    arms = {name: result["arms"]["dreamdpo"] for name, result in results.items()}
    print({name: (arm["win_rate"], *arm["ci95"]) for name, arm in arms.items()}, "calls:", calls)
    assert calls > 1000
    for arm in arms.values():
        low, high = arm["ci95"]
        assert low > 0.5
        assert all(low <= other["win_rate"] <= high for other in arms.values())
