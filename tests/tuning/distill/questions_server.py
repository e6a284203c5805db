"""A chat-completions server that answers the bundled problem's yes/no questions by the pixels that it is
sent.

It reads the montages of both assets from the request, and applies the evaluator that --judge=questions
applies in the process of the run. It can flip the verdicts of a share of the pairs, alike in both orders.
"""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image

from eg3d_rlhf.rewards.images.pairwise_evaluators import YesNoEvaluator

PIXELS = 16  # edge of a view of the bundled problem


def views_of(png: bytes) -> torch.Tensor:
    """Return the four views [4, 3, h, w] in 0..1 of a montage of two columns."""
    sheet = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    factor = sheet.shape[0] // (2 * PIXELS)
    small = torch.tensor(sheet[::factor, ::factor].copy()).float() / 255
    views = [
        small[row : row + PIXELS, column : column + PIXELS] for row in (0, PIXELS) for column in (0, PIXELS)
    ]
    return torch.stack(views).permute(0, 3, 1, 2)


class QuestionsServer:
    """Serve in a thread for the length of a `with` block."""

    def __init__(self, constant: str = ""):
        self.constant = constant
        self.prompts: list[str] = []
        self.texts: list[str] = []

    def __enter__(self) -> "QuestionsServer":
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = {
                    "winner": outer.winner(body["messages"][1]["content"]),
                    "confidence": 1,
                    "reason": "",
                }
                data = json.dumps(
                    {
                        "model": "questions",
                        "choices": [{"message": {"content": json.dumps(answer)}, "finish_reason": "stop"}],
                        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
                    }
                ).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def winner(self, content: list[dict]) -> str:
        """Return the verdict on the two montages of a request."""
        prompt = content[0]["text"].partition("description: ")[2]
        self.prompts.append(prompt)
        self.texts.append(content[0]["text"])
        if self.constant:
            return self.constant
        first, second = (
            views_of(base64.b64decode(part["image_url"]["url"].partition(",")[2]))
            for part in content
            if part["type"] == "image_url"
        )
        result = YesNoEvaluator().judge([prompt], [(first, second)])[0]
        return {0: "first", 1: "second", -1: "tie"}[result]
