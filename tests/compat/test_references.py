"""tests/references holds the values that it was made with, and each of its tests runs."""

import hashlib

from tests.compat.reference import OURS

WORDS_AND_CODE = {".md", ".py", ".pyc"}


def test_no_value_is_lost_or_changed():
    """After a deliberate change, README.md names the command that writes the sums again."""
    lines = (OURS / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    held = {
        path.relative_to(OURS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in OURS.rglob("*")
        if path.is_file() and path.suffix not in WORDS_AND_CODE and path.name != "SHA256SUMS"
    }
    assert held == listed
