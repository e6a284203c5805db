"""Rewards from another process: the server of the guide, failing servers, and a judge of samples."""

import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.modes import ModeCommand
from eg3d_rlhf.people.judge.rig import Rig
from eg3d_rlhf.people.judge.settings import JudgeSettings
from eg3d_rlhf.rewards.score_server import TRIES, ScoredAsset, ScoreServer, parse_scores
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.families.opening import open_problem
from eg3d_rlhf.tuning.flow.training.online.served_rewards import JudgeReward, Presenter, ServerReward
from eg3d_rlhf.tuning.flow.training.online.settings import is_served, parse_weights
from tests.people.judge.fake_server import FakeServer, utilities_of
from tests.rejections import raising, rejected

GUIDE = Path(__file__).resolve().parents[5] / "docs/guides/reward-server.md"
ASSET = ScoredAsset(id="a", prompt="ball", images=[b"png"], mesh=b"glb")


class Server:
    """A server in a thread, whose replies are (status, body, headers), the last one for ever."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.bodies: list[dict] = []

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                outer.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                status, body, headers = reply
                if status == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def client(self, **settings) -> ScoreServer:
        return ScoreServer(url=self.url, backoff=0.001, **settings)


GOOD = (200, b'{"scores": [{"name": "x", "value": 2}, {"name": "y", "value": 4}]}', {})
DROP = (0, b"", {})


@pytest.mark.parametrize(
    "bad",
    [
        (500, b"no", {}),
        (429, b"", {"Retry-After": "0.01"}),
        (200, b"<html>1</html>", {}),
        (200, b'{"scores": [{"name": "x", "val', {}),
        (200, b'{"scores": [{"name": "x", "value": NaN}]}', {}),
        (200, b"\x80\x04K\x01.", {}),  # a pickle is no answer, and is never read as one
        DROP,
    ],
)
def test_a_request_is_repeated_until_the_answer_can_be_read(bad):
    with Server(bad, bad, GOOD) as server:
        client = server.client()
        assert client.score([ASSET]) == [{"x": 2.0, "y": 4.0}]
        assert (client.calls, client.retried, client.failed) == (3, 2, 0)
        assert server.bodies[-1] == {"id": "a", "prompt": "ball", "images": ["cG5n"], "mesh": "Z2xi"}
    with Server(bad) as server:
        client = server.client()
        assert client.score([ASSET]) == [None] and client.calls == TRIES and client.failed == 1


def test_a_rejected_request_ends_the_run_and_a_pause_is_kept():
    with Server((404, b"", {})) as server, raising("--reward", "404"):
        server.client().score([ASSET])
    with Server((429, b"", {"Retry-After": "0.4"}), GOOD) as server:
        start = time.monotonic()
        assert server.client().score([ASSET]) == [{"x": 2.0, "y": 4.0}]
        assert time.monotonic() - start >= 0.4
    with raising("--reward", "http"):
        ScoreServer(url="ftp://x")
    assert parse_scores(b'{"scores": [{"name": "a", "value": true}]}') is None


def test_addresses_and_weights_are_told_apart():
    weights = parse_weights("own:2,http://127.0.0.1:9000/score:0.5,judge:http://h:1/v1,https://h/s")
    assert weights == {
        "own": 2.0,
        "http://127.0.0.1:9000/score": 0.5,
        "judge:http://h:1/v1": 1.0,
        "https://h/s": 1.0,
    }
    assert [is_served(name) for name in weights] == [False, True, True, True]
    with raising("--reward"):
        parse_weights("http://127.0.0.1:9000/score:x")


@pytest.fixture(scope="module")
def toy():
    problem = open_problem(ProblemSource(), "cpu")
    prompts = list(problem.train_prompts[:2])
    return problem, prompts, generate(problem.pipeline, [prompts[0]] * 3 + [prompts[1]], [1, 2, 3, 4])


@pytest.fixture(scope="module")
def presenter():
    return Presenter(family=family_of(Path("toy")), rig=Rig(resolution=32))


class Empty:
    """An asset without a voxel."""

    occupancy = torch.zeros(16, 16, 16, dtype=torch.bool)
    colours = torch.zeros(16, 16, 16, 3)


def test_the_server_of_the_guide_scores_samples(toy, presenter, tmp_path):
    _, prompts, assets = toy
    code = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.S)[1]
    assert len(code.splitlines()) <= 32
    script = tmp_path / "score_server.py"
    script.write_text(
        code.replace('("127.0.0.1", 9000)', '("127.0.0.1", 0)')
        .replace(".serve_forever()", "", 1)
        .replace("ThreadingHTTPServer((", "s = ThreadingHTTPServer((")
        + "    print(s.server_port, flush=True)\n    s.serve_forever()\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline())
        reward = ServerReward(server=ScoreServer(url=f"http://127.0.0.1:{port}/score"), presenter=presenter)
        all_prompts = [prompts[0]] * 3 + [prompts[1]]
        scores = reward([*assets, Empty()], [*all_prompts, prompts[0]])
    finally:
        process.kill()
        process.wait()
    # minus the volume of the bounding box of the voxels, on the grid of one unit; an empty asset is the worst
    extents = []
    for asset in assets:
        voxels = asset.occupancy.nonzero()
        size = (voxels.max(0).values - voxels.min(0).values + 1) / asset.occupancy.shape[0]
        extents.append(-float(size.prod()))
    assert torch.allclose(scores[:4], torch.tensor(extents), atol=1e-4)
    assert scores[4] == scores[:4].min()


def test_a_failed_sample_gets_the_mean_or_ends_the_run(toy, presenter):
    _, prompts, assets = toy
    bad = (500, b"", {})
    with Server(GOOD, *[bad] * TRIES) as server:
        lines: list[str] = []
        reward = ServerReward(server=server.client(parallel=1), presenter=presenter, print_line=lines.append)
        assert reward(assets[:2], [prompts[0]] * 2).tolist() == [3.0, 3.0]
        assert sum(line.startswith("Warning") for line in lines) == 1
    with Server(GOOD, *[bad] * TRIES) as server, raising("--reward", "--resume"):
        ServerReward(server=server.client(parallel=1), presenter=presenter, required=True)(
            assets[:2], [prompts[0]] * 2
        )


def test_a_judge_rewards_samples_that_are_better_than_an_untuned_one(toy, presenter):
    problem, prompts, assets = toy

    def reward_at(url: str, **settings) -> JudgeReward:
        return JudgeReward(
            settings=JudgeSettings(url=url, model="fake", **{"limit": 100, **settings}),
            problem=problem,
            presenter=presenter,
            print_line=lambda line: None,
        )

    renders = {i: presenter.show(asset).renders for i, asset in enumerate(assets)}
    renders["reference"] = reward_at("http://unused")._reference(prompts[0]).renders
    utilities = utilities_of(renders, {0: 0.9, 1: 0.1, 2: 0.6, 3: 0.2, "reference": 0.5})
    with FakeServer(utilities=utilities) as server:
        reward = reward_at(server.url)
        assert reward([*assets[:3], Empty()], [prompts[0]] * 4).tolist() == [1.0, 0.0, 1.0, 0.0]
        assert server.answered() == 6
    with FakeServer(answer="first") as server:
        assert reward_at(server.url)(assets[:2], [prompts[0]] * 2).tolist() == [0.5, 0.5]
    with FakeServer(utilities=utilities) as server:
        limited = reward_at(server.url, limit=2)
        assert limited(assets[:3], [prompts[0]] * 3).tolist() == [1.0, 0.5, 0.5]
        assert server.answered() == 2


@pytest.mark.parametrize(
    "args, names",
    [
        (["--reward=judge:http://h/v1"], ("--judge-model",)),
        (["--reward=judge:http://h/v1", "--judge-model=m"], ("--judge-limit",)),
        (["--judge-model=m"], ("--judge-model",)),
        (["--reward-required"], ("--reward-required",)),
    ],
)
def test_flags_without_effect_are_rejected(args, names):
    rejected(CliRunner().invoke(ModeCommand("train"), ["--mode=online", *args, "--dry-run"]), *names)


def test_an_online_run_asks_the_server(tmp_path):
    with Server(GOOD) as server:
        flags = ["--steps=1", "--no-control", "--set=no_summary=true", "--set=batch=2", "--set=group=2"]
        done = CliRunner().invoke(
            ModeCommand("train"),
            [
                "--mode=online",
                f"--reward=own,{server.url}:0.5",
                "--set=reward_resolution=32",
                f"--outdir={tmp_path}",
                *flags,
            ],
        )
        assert done.exit_code == 0, done.output
        assert len(server.bodies) >= 4 and all(body["mesh"] for body in server.bodies)
