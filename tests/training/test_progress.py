"""A bar in a log leaves one line when it ends, or none; on a terminal it is the library's."""

import contextlib
import io
import sys
import time

import pytest
import tqdm as library

from training import progress
from training.progress import tqdm

FIRST_LINE = progress.FIRST_LINE  # before tests/conftest.py changes it


@pytest.fixture(autouse=True)
def no_other_bars():
    """Close what tests of failing runs left open: the outermost bar alone writes."""
    for bar in list(library.tqdm._instances):
        with contextlib.suppress(ValueError, OSError):  # its file may be closed
            bar.close()
    progress._open_bars.clear()


class Terminal(io.StringIO):
    """A file that says it is one."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"desc": "surfaces", "unit": "head"}, ["surfaces", "300", "head", "00:00"]),
        ({"total": 400}, ["300", "400", "00:00"]),
        ({"leave": False}, []),
        ({"disable": True}, []),
        ({"disable": None}, []),
    ],
)
def test_one_line_in_a_log(options, words):
    file = io.StringIO()
    with tqdm(file=file, mininterval=0, **{"unit": "it", **options}) as bar:
        for _ in range(300):
            bar.update()
        bar.close()  # twice is once
    assert len(file.getvalue().splitlines()) == bool(words) and "\r" not in file.getvalue()
    assert all(word in file.getvalue() for word in words)


def test_a_terminal_shows_every_step():
    file = Terminal()
    list(tqdm(range(3), file=file, mininterval=0))
    assert file.getvalue().count("\r") >= 4 and "3/3" in file.getvalue()


def wait_for_line(file, count):
    """Wait until the file has `count` lines, at most 10 s."""
    end = time.monotonic() + 10
    while len(file.getvalue().splitlines()) < count and time.monotonic() < end:
        time.sleep(0.05)
    return file.getvalue().splitlines()


def test_a_log_gets_lines_while_a_step_runs(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.1)
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.3)
    file = io.StringIO()
    with tqdm(total=8, desc="surfaces", unit="head", file=file) as bar:
        lines = wait_for_line(file, 2)  # no update was made: a long first step is reported, too
        assert all("0 of 8" in line and "surfaces" in line for line in lines)
        bar.update(4)
        count = len(file.getvalue().splitlines())
        assert "4 of 8" in wait_for_line(file, count + 2)[-1]
    closed = file.getvalue()
    time.sleep(1.2)
    assert file.getvalue() == closed  # a closed bar is silent


def test_only_the_outermost_bar_writes(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.1)
    file = io.StringIO()
    with tqdm(total=2, desc="outer", file=file), tqdm(total=9, desc="inner", leave=False, file=file):
        assert "outer" in wait_for_line(file, 1)[0]
        time.sleep(0.8)
    assert "inner" not in file.getvalue()


def test_work_without_steps_writes_its_time_and_gives_way_to_a_bar_inside(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.1)
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.1)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with progress.working("images"):
        assert "images" in wait_for_line(file, 1)[0]
        with tqdm(total=9, desc="shapes", leave=False, file=file):
            count = len(file.getvalue().splitlines())
            inner_lines = wait_for_line(file, count + 2)[count:]
            assert all("shapes" in line for line in inner_lines)
        count = len(file.getvalue().splitlines())
        assert "images" in wait_for_line(file, count + 1)[-1]
    assert not progress._open_bars


@pytest.mark.parametrize(
    ("file", "enabled", "writes"),
    [(io.StringIO, True, True), (io.StringIO, False, False), (Terminal, True, False)],
)
def test_bar_of_a_loop_with_status_lines_writes_into_logs_alone(monkeypatch, file, enabled, writes):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.1)
    log = file()
    monkeypatch.setattr(sys, "stderr", log)
    with progress.log_bar(100, 40, "stage voxels", "update", enabled) as bar:
        bar.update(10)
        if writes:
            assert "50 of 100 updates" in wait_for_line(log, 1)[0]
        else:
            time.sleep(0.7)
    assert bool(log.getvalue()) == writes


def test_the_default_intervals():
    assert FIRST_LINE <= 2 and progress.LINE_INTERVAL <= 30


def test_lines_of_others_beside_a_bar_bring_no_cursor_codes_into_a_log():
    log = io.StringIO()
    with tqdm(total=2, file=log) as outer, tqdm(total=2, file=log):
        tqdm.write("a line", file=log)
        outer.refresh()
        outer.clear()
    assert "\x1b" not in log.getvalue() and "\r" not in log.getvalue() and "a line" in log.getvalue()
