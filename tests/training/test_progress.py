"""A bar in a log leaves one line when it ends, or none; on a terminal it is the library's."""

import io

import pytest

from training.progress import tqdm


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
