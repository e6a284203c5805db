"""Analytic evaluators and yes/no questions; and no file of the repository contains a key."""

import re

import pytest
import torch

from eg3d_rlhf.core.interfaces import PairwiseJudge
from eg3d_rlhf.rewards import boxes as problem
from eg3d_rlhf.rewards.images.analytic import OneFace
from eg3d_rlhf.rewards.images.pairwise_evaluators import (
    AssetEvaluator,
    YesNoEvaluator,
    emblem_sides,
)
from tests.rewards.test_boxes import BOX, FACES, HEAD, render


@pytest.fixture(scope="module")
def seen():
    return render(problem.build(HEAD, FACES)).unflatten(0, (5, 4))


def test_yes_and_no(seen):
    evaluator = YesNoEvaluator()
    assert [evaluator.score(views, HEAD.text) for views in seen] == [2, 3, 2, 2, 2]
    assert isinstance(evaluator, PairwiseJudge)
    pairs = [(seen[1], seen[2]), (seen[4], seen[1]), (seen[0], seen[2])]
    assert evaluator.judge([HEAD.text] * 3, pairs) == [0, 1, -1]
    boxes = render(problem.build(BOX, FACES)).unflatten(0, (5, 4))
    assert [evaluator.score(views, BOX.text) for views in boxes] == [0, 1, 2, 3, 4]


def test_evaluators_may_disagree_with_the_reward(seen):
    painted = seen[1].clone()
    painted[2:, :3] = seen[4][2:, :3]  # faces painted on two more sides, in colour and without depth
    assert YesNoEvaluator().judge([HEAD.text], [(seen[1], painted)]) == [0]
    assert float(OneFace().score(painted, [HEAD.text] * 4)[0]) < float(
        OneFace().score(seen[1], [HEAD.text] * 4)[0]
    )


def test_finished_assets_are_compared_by_their_surface():
    evaluator = AssetEvaluator()
    texts = [HEAD.text] * 5
    heads = problem.build(HEAD, FACES)
    assert evaluator.score(heads, texts).tolist() == [-1, 0, -1, -2, -3]
    painted = heads.select([0, 1, 2, 3, 4])
    for side in range(4):
        painted.shape[:, problem.nose_voxels(16, side)] = problem.EMPTY  # without noses, with all paint
    assert evaluator.score(painted, texts).tolist() == [-1] * 5
    assert evaluator.compare(heads, painted, texts)[1:] == [0, 0, 1, 1]
    boxes = problem.build(BOX, FACES)
    assert emblem_sides(boxes, [BOX.text] * 5).tolist() == [0, 1, 2, 3, 4]
    flipped = problem.build(BOX, 1 - FACES)
    assert evaluator.compare(boxes, flipped, [BOX.text] * 5) == [1, 1, -1, 0, 0]
    worse = heads.select([0, 1, 2, 3, 4])
    worse.paint += torch.randn(worse.paint.shape, generator=torch.Generator().manual_seed(0))
    assert evaluator.compare(heads, worse, texts) == [0] * 5  # equally many noses, but implausible images


def test_no_file_holds_keys(repo):
    key = re.compile(
        r"\b(?:sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}|AIza[A-Za-z0-9_-]{30,}"
        r"|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})"
    )
    assert key.search("api_key='sk-" + "a1" * 12 + "'") and key.search("hf_" + "Ab3" * 10)
    assigned = re.compile(
        r"""(?i)(?:api_?key|secret|token|bearer)['"]?\s*[:=]\s*['"][A-Za-z0-9_\-]{24,}['"]"""
    )
    assert assigned.search('API_KEY = "' + "abcd1234" * 4 + '"')
    kinds = (
        "*.py",
        "*.md",
        "*.toml",
        "*.json",
        "*.jsonl",
        "*.js",
        "*.html",
        "*.cfg",
        "*.yml",
        "*.yaml",
        "*.txt",
    )
    tops = (
        "dnnlib",
        "torch_utils",
        "training",
        "eg3d_rlhf",
        "tools",
        "benchmarks",
        "tests",
        "docs",
        "assets",
    )
    files = [p for top in tops for kind in kinds for p in (repo / top).rglob(kind)] + [
        p for kind in kinds for p in repo.glob(kind)
    ]
    assert len(files) > 300
    leaks = [
        str(path.relative_to(repo))
        for path in files
        for text in [path.read_text(errors="replace")]
        if key.search(text) or assigned.search(text)
    ]
    assert leaks == []
