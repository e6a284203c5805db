"""Settings of the search for faces. This module imports neither torch nor numpy."""

import re

FACE_CHOICES = ("largest", "all")  # other values are numbers from 1 on


def parse_face_choice(text: str) -> str | int:
    """Parse a value of --face: "largest", "all", or the number of a face, 1 for the largest one.

    Raises: ValueError for another text.
    """
    if text in FACE_CHOICES:
        return text
    if re.fullmatch(r"[1-9]\d{0,3}", text):
        return int(text)
    raise ValueError(
        f"--face: expected {', '.join(FACE_CHOICES)} or a number from 1 on, got {text!r}. Write --face=1 for"
        " the largest face, --face=2 for the next one."
    )
