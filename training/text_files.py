"""Reader of text files that people and other programs write, in UTF-8 or UTF-16.

Spreadsheets and Windows editors write a byte order mark at the start of a file, or UTF-16. Both are
recognised. Any other encoding is an error that names the line, because a wrong guess would change names and
texts without notice.
"""

import codecs
from pathlib import Path

# Byte order marks and their encodings. The codecs in the second column remove the mark.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8 or UTF-16, without its byte order mark. Line ends are kept as they are.

    Raises: ValueError that names the file, the line and the remedy if the file has another encoding.
    """
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    # In UTF-16, the two bytes of a Latin letter or digit include a zero byte, which no text in UTF-8 has.
    if encoding == "utf-8" and b"\0" in data[:4]:
        encoding = "utf-16-be" if data[0] == 0 else "utf-16-le"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line_number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path.name}, line {line_number}: the byte 0x{data[error.start]:02x} is not valid in"
            f" {encoding.removesuffix('-sig').upper()}, so the file has another encoding, probably"
            " Windows-1252. Save it as UTF-8 (in Excel: the file type 'CSV UTF-8'), or convert it: iconv -f"
            f" WINDOWS-1252 -t UTF-8 {path.name} > new-{path.name}"
        ) from None
