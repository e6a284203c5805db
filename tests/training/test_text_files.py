"""Text files of other programs: byte order marks, UTF-16, and an error for every other encoding."""

import pytest

from tests.rejections import raising
from training.text_files import read_text

TEXT = "größe, naïve\nzweite Zeile\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_are_removed(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode(encoding))
    assert read_text(path) == TEXT


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_recognised(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode(encoding))
    assert read_text(path) == TEXT


def test_line_ends_and_empty_files_are_kept(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\r\nb\rc")
    assert read_text(path) == "a\r\nb\rc"
    path.write_bytes(b"")
    assert read_text(path) == ""


def test_another_encoding_is_named_with_its_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a head\nein Kopf, groß\n".encode("cp1252"))
    with raising("prompts.txt", "line 2", "0xdf", "UTF-8"):
        read_text(path)
