"""Checks of the errors that a user sees.

Each error ends with exit code 2 and one line that names what is wrong and says what to do. Its wording is not
compared, so that messages can be rewritten.

    rejected(CliRunner().invoke(command, ["--lambda-r=-1"]), "--lambda-r", "-1")

checks the result of a command, and

    with raising("--lambda-r", "-1"):
        RewardConfig(lambda_r=-1)

checks an exception. Choose names that no other error would contain: the value that was given, a value that is
allowed, a number that was computed.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

# A message is of use if it says what is allowed or what to do. Any of these words
# does; which one is up to the author of the message.
REMEDY = re.compile(
    r"\b(?:add|allowed|answer|at least|at most|belongs?|between|cannot|check|choose|close|convert|copy"
    r"|compute|correct|create|delete|do not|download|drop|embed|enlarge|expected|export|fewer|finish|fix|free"
    r"|give|have to|hold|increase|install|keep|label|leave|load|lower|make|merge|move|must|name|needs?|omit"
    r"|one of|only|pass|pick|put|raise|reduce|remove|rename|render|repeat|replace|restart|resume|retry"
    r"|run|sample|save|set|should|shrink|start|stop|supply|take|train|try|turn|unset|update|upgrade|use"
    r"|wait|without|write)\b|[<>]=? ?\d|--\w",
    re.I,
)


def check_message(message: str, names: tuple[str, ...]) -> str:
    """Assert that `message` is one line that names all of `names` and says what is allowed or what to do;
    return it.
    """
    assert message.strip() and len(message.strip().splitlines()) == 1, message
    for name in names:
        assert name in message, f"{name!r} is not named in: {message}"
    rest = message
    for name in names:
        rest = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", " ", rest)
    assert REMEDY.search(rest), f"no remedy in: {message}"
    return message


def rejected(result: Any, *names: str, code: int = 2) -> str:
    """Assert that a command was rejected: `code`, and on standard error one line, which names all of `names`.
    Warnings may come before it.

    Args: result: of click's CliRunner or of subprocess.run with text=True. Returns: the line.
    """
    status = result.exit_code if hasattr(result, "exit_code") else result.returncode
    assert status == code, (status, result.stdout, result.stderr, getattr(result, "exception", None))
    printed_lines = result.stderr.splitlines(keepends=True)
    message = "".join(line for line in printed_lines if not line.startswith("Warning: "))
    assert message.startswith("Error: "), result.stderr
    return check_message(message, names)


@contextlib.contextmanager
def raising(
    *names: str, kind: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> Iterator[pytest.ExceptionInfo]:
    """Assert that the block raises `kind` with one line that names all of `names` and says what is allowed or
    what to do.
    """
    with pytest.raises(kind) as caught:
        yield caught
    check_message(str(caught.value.args[0] if isinstance(caught.value, KeyError) else caught.value), names)
