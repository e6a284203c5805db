"""Judges: analytic ones, yes and no, and a language model behind a server."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from eg3d_rlhf.core.interfaces import PairwiseJudge
from eg3d_rlhf.rewards import boxes as problem
from eg3d_rlhf.rewards.pictures.analytic import OneFace
from eg3d_rlhf.rewards.pictures.judges import (
    KEY_VARIABLE,
    AssetJudge,
    VisionLanguageJudge,
    YesNoJudge,
    emblem_sides,
)
from tests.rejections import raising
from tests.rewards.test_boxes import BOX, FACES, HEAD, pictures


@pytest.fixture(scope="module")
def seen():
    return pictures(problem.build(HEAD, FACES)).unflatten(0, (5, 4))


def test_yes_and_no(seen):
    judge = YesNoJudge()
    assert [judge.score(views, HEAD.text) for views in seen] == [2, 3, 2, 2, 2]
    assert isinstance(judge, PairwiseJudge)
    pairs = [(seen[1], seen[2]), (seen[4], seen[1]), (seen[0], seen[2])]
    assert judge.judge([HEAD.text] * 3, pairs) == [0, 1, -1]
    boxes = pictures(problem.build(BOX, FACES)).unflatten(0, (5, 4))
    assert [judge.score(views, BOX.text) for views in boxes] == [0, 1, 2, 3, 4]


def test_judges_may_disagree_with_the_reward(seen):
    painted = seen[1].clone()
    painted[2:, :3] = seen[4][2:, :3]  # faces painted on two more sides: colour alone, no depth
    assert YesNoJudge().judge([HEAD.text], [(seen[1], painted)]) == [0]
    assert float(OneFace().score(painted, [HEAD.text] * 4)[0]) < float(
        OneFace().score(seen[1], [HEAD.text] * 4)[0]
    )


def test_finished_assets_are_judged_by_their_surface():
    judge = AssetJudge()
    texts = [HEAD.text] * 5
    heads = problem.build(HEAD, FACES)
    assert judge.score(heads, texts).tolist() == [-1, 0, -1, -2, -3]
    painted = heads.pick([0, 1, 2, 3, 4])
    for side in range(4):
        painted.shape[:, problem.nose_voxels(16, side)] = problem.EMPTY  # all noses gone, all paint left
    assert judge.score(painted, texts).tolist() == [-1] * 5
    assert judge.compare(heads, painted, texts)[1:] == [0, 0, 1, 1]
    boxes = problem.build(BOX, FACES)
    assert emblem_sides(boxes, [BOX.text] * 5).tolist() == [0, 1, 2, 3, 4]
    flipped = problem.build(BOX, 1 - FACES)
    assert judge.compare(boxes, flipped, [BOX.text] * 5) == [1, 1, -1, 0, 0]
    worse = heads.pick([0, 1, 2, 3, 4])
    worse.paint += torch.randn(worse.paint.shape, generator=torch.Generator().manual_seed(0))
    assert judge.compare(heads, worse, texts) == [0] * 5  # as many noses, but no likely picture


@pytest.fixture
def server():
    """A chat-completions server that prefers the brighter of two pictures, by their size as PNG, and
    remembers what it was sent.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.seen.append((body, self.headers.get("Authorization")))
            pictures = [
                len(part["image_url"]["url"])
                for part in body["messages"][0]["content"]
                if part["type"] == "image_url"
            ]
            answer = self.server.answer or ("1" if len(pictures) > 1 and pictures[0] > pictures[1] else "2")
            data = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            del args

    made = HTTPServer(("127.0.0.1", 0), Handler)
    made.seen = []
    made.answer = None
    made.status = 200
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def judge_at(server) -> VisionLanguageJudge:
    return VisionLanguageJudge(
        url=f"http://127.0.0.1:{server.server_port}/v1/chat/completions", model="tiny", timeout=10
    )


def test_a_language_model_decides_whatever_the_order(server, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret-of-the-environment")
    rng = torch.Generator().manual_seed(0)
    busy = [torch.rand(4, 3, 16, 16, generator=rng) for _ in range(6)]
    flat = [torch.full((4, 3, 16, 16), i / 6) for i in range(6)]
    pairs = [*zip(busy, flat, strict=True), *zip(flat, busy, strict=True)]
    judge = judge_at(server)
    assert isinstance(judge, PairwiseJudge)
    assert (
        judge.judge(["a head"] * 12, pairs)
        == [0] * 6 + [1] * 6
        == judge.judge(["a head"] * 12, pairs, shuffle_order=False)
    )
    first_shown = [
        "1" if a[0]["messages"][0]["content"][1] == b[0]["messages"][0]["content"][1] else "2"
        for a, b in zip(server.seen[:12], server.seen[12:], strict=True)
    ]
    assert set(first_shown) == {"1", "2"}  # some were exchanged
    body, key = server.seen[0]
    assert (
        key == "Bearer secret-of-the-environment"
        and body["model"] == "tiny"
        and "a head" in body["messages"][0]["content"][0]["text"]
    )


def test_its_answers_to_questions(server, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    server.answer = "1. Yes\n2. no\n3. YES"
    judge = YesNoJudge(judge_at(server).answers, lambda prompt: ["Whole?", "Red?", "Head?"])
    assert judge.score(torch.zeros(4, 3, 8, 8), "a head") == 2
    assert server.seen[0][1] is None and "2. Red?" in server.seen[0][0]["messages"][0]["content"][0]["text"]


@pytest.mark.parametrize(
    ("answer", "status", "reason"), [("neither", 200, None), ("1", 401, "HTTPError 401")]
)
def test_no_answer_is_none(server, answer, status, reason):
    server.answer = answer
    server.status = status
    pair = [(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))]
    if reason is None:
        assert judge_at(server).judge(["a head"], pair) == [-1]
    else:
        with pytest.warns(UserWarning, match=reason):
            assert judge_at(server).judge(["a head"], pair) == [-1]


def test_only_the_environment_holds_keys(repo):
    with raising("--judge", "http"):
        VisionLanguageJudge(url="sk-abc", model="tiny")
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
