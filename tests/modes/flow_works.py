"""Folders of tiny generators and pictures for the six commands, and how they are called."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image
from sqlalchemy import select

from eg3d_rlhf.modes.jobs import command_of
from eg3d_rlhf.people.label.campaigns import shape_from_row
from eg3d_rlhf.people.label.database import Database, assignments, pairs, shapes
from eg3d_rlhf.people.label.entities import Shape
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests.people.label.browser import Page
from tests.tuning.flow.families.trellis.tiny_trellis import write_hub

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 400_000  # milliseconds that shapes may take to be prepared, on a busy machine
READY = "['label', 'explained', 'finished'].includes(window.labelState?.state)"
NAMES = [
    f"{colour} {shape}" for shape in ("ball", "box", "cup") for colour in ("red", "green", "blue", "pink")
]


def write_images(folder: Path, count: int = 8) -> Path:
    """Objects of different heights and colours before transparent backgrounds."""
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.zeros((40, 50, 4), np.uint8)
        pixels[5 : 15 + 2 * i % 24, 10:30] = (20 * i % 256, (200 - 20 * i) % 256, 90, 255)
        Image.fromarray(pixels).save(folder / f"object{i}.png")
    return folder


def with_encoder(folder: Path, monkeypatch) -> None:
    """A DINOv2 of random weights where TRELLIS looks for it."""
    write_hub(folder / "torch" / "hub" / "checkpoints" / "dinov2_vitl14_reg4_pretrain.pth")
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))


def write_prompts(path: Path, names=NAMES) -> Path:
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def flow(job: str, *flags, code: int = 0) -> str:
    """Run a command and return what it prints; with exit code 2, its only line of error."""
    done = CliRunner().invoke(command_of(f"flow {job}"), [str(flag) for flag in flags])
    assert done.exit_code == code, (job, flags, done.output, done.exception)
    if code:
        assert "Traceback" not in done.output
        (printed,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
        return printed
    return done.output


def sampled_work(folder: Path, names=NAMES) -> Work:
    """A folder WORK of the toy with four assets of each prompt to train and to choose on."""
    prompts = write_prompts(folder / "prompts.txt", names)
    new = ("--pipeline=toy", f"--prompts={prompts}", "--each=4", "--device=cpu")
    flow("new", folder / "WORK", *new, "--set=split=0.4,0.4,0.2")
    flow("sample", folder / "WORK", "--device=cpu")
    return Work.open(folder / "WORK")


@contextlib.contextmanager
def serving(browser, *flags, job: str, cwd: Path) -> Iterator[Page]:
    """The page of `flow label` or `flow study`, served by the command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-m",
        "eg3d_rlhf",
        "flow",
        job,
        *map(str, flags),
        "--port=0",
        "--set=cache=cache",
    ]
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            printed = next((line for line in process.stdout if line.startswith(f"{job} at ")), None)
            assert printed is not None, process.stderr.read()
            page = Page(browser, printed.split()[2].rstrip("/"))
            page.page.goto(page.url)
            page.page.wait_for_selector("#helpDialog[open]", timeout=PATIENCE)
            page.page.keyboard.press("Enter")
            page.wait(READY, timeout=PATIENCE)
            yield page
            assert page.errors == [] and page.strangers == []
            page.context.close()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def answer_all(
    page: Page,
    database: str,
    better: Callable[[Shape, Shape], bool | None],
    most: int = 500,
    enough: int | None = None,
) -> int:
    """Answer pair by pair until there are no more, as a person who prefers the left one where
    `better(left, right)`, None: a tie.

    Args: enough: stop after so many keys.
    """
    for done in range(most):
        page.wait(READY, timeout=PATIENCE)
        if page.state("state") == "finished" or done == enough:
            page.sent()
            return done
        if page.state("state") == "explained":
            page.answer("Enter")
            page.wait("window.labelState.state !== 'explained'")
            continue
        token = page.state("pair.assignment")
        choice = better(*sides_of(database, token))
        page.answer({True: "ArrowLeft", False: "ArrowRight", None: "ArrowDown"}[choice])
        page.wait(
            "before => window.labelState.pair?.assignment !== before || window.labelState.state !== 'label'",
            token,
        )
    raise AssertionError(f"more than {most} answers were asked")


def sides_of(database: str, token: str) -> tuple[Shape, Shape]:
    """The shapes on the left and on the right of an assignment."""
    opened = Database(database, create=False)
    with opened.read() as connection:
        row = connection.execute(select(assignments).where(assignments.c.token == token)).one()
        pair = connection.execute(select(pairs).where(pairs.c.id == row.pair_id)).one()
        numbers = (pair.first_id, pair.second_id) if row.first_is_left else (pair.second_id, pair.first_id)
        sides = [
            shape_from_row(connection.execute(select(shapes).where(shapes.c.id == number)).one())
            for number in numbers
        ]
    opened.close()
    return sides[0], sides[1]
