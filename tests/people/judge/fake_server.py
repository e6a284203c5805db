"""A fake chat-completions server in a process of its own, which answers over real HTTP.

    with FakeServer(answer="oracle", utilities={image_sha256: 0.7, ...}, flip=0.15) as server:
        JudgeSettings(url=server.url, model="fake", ...)
        server.requests()  # what it was sent, one dict per request

`answer` decides the verdict:

    oracle     the side with the larger utility wins. A side is known by the SHA-256 of any of its images. A
               share `flip` of the pairs is decided the other way round, alike in both orders; equal
               utilities tie
    first      always the first position
    constant   always the answer `winner` ("first", "second" or "tie")
    prose      "Of the 2 pictures, I prefer number 1."
    coin       a random position by the order in which both are shown, so that orders agree in half of the
               pairs

`fault` decides what happens to some of the requests, those whose number n (from 0) has n % every == 0 and
n < first_n: html, 500, 429 (with Retry-After), truncated (JSON cut off), hang (no answer in time), drop (the
connection breaks), reject (status 400 for a `response_format`), 401. `stop_after=N` ends all answers after N:
the connection breaks from then on. `delay` seconds pass before each answer.

Run as a module, this file is the server: python -m tests.people.judge.fake_server SPEC.json
"""

import base64
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]


@dataclass(kw_only=True)
class Spec:
    """Behaviour of the server."""

    answer: str = "oracle"
    utilities: dict[str, float] = field(default_factory=dict)  # SHA-256 of an image -> utility of its asset
    flip: float = 0.0
    seed: int = 0
    winner: str = "tie"
    fault: str = ""
    every: int = 1
    first_n: int = 10**9
    retry_after: str = "1"
    stop_after: int = 10**9
    delay: float = 0.0
    logprobs: bool = False
    model: str = "fake-vl-1"
    second_model: str = ""  # name that is reported from request `model_change` on
    model_change: int = 10**9
    tokens: tuple[int, int] = (100, 20)
    log: str = ""


class FakeServer:
    """Start the server as a process for the length of a `with` block."""

    def __init__(self, **spec):
        self.folder = Path(tempfile.mkdtemp(prefix="fake-judge-"))
        self.log = self.folder / "requests.jsonl"
        self.spec = Spec(**spec, log=str(self.log))
        self.process: subprocess.Popen | None = None
        self.url = ""

    def __enter__(self) -> "FakeServer":
        spec_path = self.folder / "spec.json"
        spec_path.write_text(json.dumps(asdict(self.spec)))
        self.process = subprocess.Popen(
            [sys.executable, "-S", str(Path(__file__).resolve()), str(spec_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://"), self.url
        return self

    def __exit__(self, *_) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def requests(self) -> list[dict]:
        """Return what the server was sent: texts, SHA-256 of the images by side, status, settings."""
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def answered(self) -> int:
        """Return the number of requests that got a completion."""
        return sum(request["status"] == "answered" for request in self.requests())


def utilities_of(renders_by_asset: dict, utility_by_asset: dict) -> dict[str, float]:
    """Return the utility of every image of assets, for an oracle that knows assets by their renders.

    Args:
        renders_by_asset: asset -> its renders (`eg3d_rlhf.people.judge.judge.Renders`), with all view modes.
        utility_by_asset: asset -> its utility.
    """
    table = {}
    for asset, renders in renders_by_asset.items():
        modes = getattr(renders, "record", None) or renders.images_by_mode
        for mode in modes:
            for image_hash in renders.hashes(mode):
                table[image_hash] = utility_by_asset[asset]
    return table


def oracle_outcome(first: float, second: float, keys: tuple[str, str], flip: float, seed: int) -> str:
    """Return the verdict of the oracle on a pair: by utility, flipped for a share of the pairs.

    Whether a pair is flipped depends on the pair and not on its order.
    """
    if first == second:
        return "tie"
    is_flipped = random.Random(json.dumps([seed, *sorted(keys)])).random() < flip
    return "first" if (first > second) != is_flipped else "second"


# ---- the process


class _State:
    """Counts and log of the server, which its threads share."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.lock = threading.Lock()
        self.count = 0
        self.answered = 0


def _sides(messages: list) -> tuple[list[str], dict[str, list[str]]]:
    """Return all texts, and the SHA-256 of the images after each text, by the text."""
    texts = []
    images: dict[str, list[str]] = {}
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            texts.append(content)
            continue
        text = ""
        for part in content:
            if part["type"] == "text":
                text = part["text"]
                texts.append(text)
            else:
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                images.setdefault(text, []).append(hashlib.sha256(data).hexdigest())
    return texts, images


def _verdict(spec: Spec, images: dict[str, list[str]]) -> str:
    """Return the text of the answer."""
    if spec.answer == "prose":
        return "Of the 2 pictures, I prefer number 1."
    if spec.answer == "oracle":
        first = images["first"]
        second = images["second"]
        # the same asset has another image for each criterion, so an image names the pair for one criterion
        winner = oracle_outcome(
            spec.utilities[first[0]], spec.utilities[second[0]], (first[0], second[0]), spec.flip, spec.seed
        )
    elif spec.answer == "coin":
        shown = json.dumps([spec.seed, images["first"], images["second"]])
        winner = random.Random(shown).choice(["first", "second"])
    else:
        winner = "first" if spec.answer == "first" else spec.winner
    return json.dumps({"winner": winner, "confidence": 0.9, "reason": "by the fake server"})


def _logprobs(text: str) -> dict:
    """Return log-probabilities with a token for each piece of an answer; the winner has P = 0.8."""
    winner = json.loads(text)["winner"]
    other = {"first": "second", "second": "first"}.get(winner, "first")
    tokens = ['{"', "winner", '":', ' "', winner, '",', ' "confidence": 0.9', "}"]
    content = []
    for token in tokens:
        top = [{"token": token, "logprob": -0.01}]
        if token == winner:
            top = [{"token": winner, "logprob": -0.2231435}, {"token": other, "logprob": -1.6094379}]
        content.append({"token": token, "logprob": top[0]["logprob"], "top_logprobs": top})
    return {"content": content}


def _handler(state: _State) -> type[BaseHTTPRequestHandler]:
    """Return the class of handlers of a server."""
    spec = state.spec

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # headers and body are two writes, and Nagle's algorithm would delay the second one by 40 ms
        disable_nagle_algorithm = True

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            texts, images = _sides(body["messages"])
            with state.lock:
                number = state.count
                state.count += 1
            is_faulty = spec.fault and number % spec.every == 0 and number < spec.first_n
            fault = spec.fault if is_faulty else ""
            if fault == "reject" and "response_format" not in body:
                fault = ""
            if spec.delay:
                time.sleep(spec.delay)
            with state.lock:
                if state.answered >= spec.stop_after:
                    fault = "drop"
                if not fault:
                    state.answered += 1
                record = {
                    "number": number,
                    "status": fault or "answered",
                    "path": self.path,
                    "texts": texts,
                    "images": images,
                    "key": self.headers.get("Authorization", ""),
                    "settings": {name: value for name, value in body.items() if name != "messages"},
                    "time": time.monotonic(),
                }
                with open(spec.log, "a") as log:
                    log.write(json.dumps(record) + "\n")
            self.respond(fault, number, images)

        def respond(self, fault: str, number: int, images: dict) -> None:
            if fault == "drop":
                self.close_connection = True
                self.connection.close()
                return
            if fault == "hang":
                time.sleep(5)
            if fault == "html":
                self.send(200, b"<html><body>Bad gateway: verdict 1</body></html>", "text/html")
                return
            if fault in ("500", "429", "401", "reject"):
                status = 400 if fault == "reject" else int(fault)
                headers = {"Retry-After": spec.retry_after} if fault == "429" else {}
                self.send(status, b'{"error": {"message": "no"}}', "application/json", headers)
                return
            text = _verdict(spec, images)
            completion = {
                "id": f"x{number}",
                "object": "chat.completion",
                "model": spec.second_model if number >= spec.model_change else spec.model,
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": text},
                        "finish_reason": "stop",
                        "logprobs": _logprobs(text) if spec.logprobs else None,
                    }
                ],
                "usage": {"prompt_tokens": spec.tokens[0], "completion_tokens": spec.tokens[1]},
            }
            data = json.dumps(completion).encode()
            self.send(200, data[: len(data) // 2] if fault == "truncated" else data, "application/json")

        def send(self, status: int, data: bytes, kind: str, headers: dict | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    return Handler


def main() -> None:
    """Serve until the process is ended."""
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(_State(spec)))
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
