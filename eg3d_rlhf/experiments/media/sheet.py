"""Pictures in rows and columns with words beside them, as one PNG: labels at the left, captions above, a scale below.

Letters: H, B = rows and columns of a cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, QUIET = (25, 25, 25), (110, 110, 110)
MARGIN, _PARTED = 12, 22  # pixels; between rows with a line


@dataclass(frozen=True, kw_only=True)
class Row:
    """Cells side by side under a name."""

    cells: Sequence[np.ndarray]  # uint8 [H, B, 3] each, of one size
    name: str = ""
    more: str = ""  # smaller, below the name
    captions: Sequence[str] = ()  # below the cells, one each
    parted: bool = False  # by a line from the row above
    spans: int = 1  # rows beside which the name stands


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A bar of colours with words at its ends and in its middle."""

    colours: np.ndarray  # uint8 [B, 3], from left to right
    words: tuple[str, str, str]
    title: str


def font(size: int):
    """Pillow's own font at so many pixels: it needs no installation."""
    return ImageFont.load_default(size)


def sheet(title: str, rows: Sequence[Row], *, names: int = 0, scale: Scale | None = None, note: str = "") -> np.ndarray:
    """Rows below a title, uint8 [H, B, 3] on white.

    Args: names: width of the column of names, pixels (0: none); scale: drawn at the foot; note: small print at the foot.
    """
    width, columns = rows[0].cells[0].shape[1], max(len(row.cells) for row in rows)
    head, foot = (44 if title else MARGIN), (58 if scale or note else MARGIN)
    page = Image.new("RGB", (names + columns * width + 2 * MARGIN, head + sum(map(_height, rows)) + foot), "white")
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((MARGIN, 10), title, INK, font(24))
    y = head
    for i, row in enumerate(rows):
        top = y + (_PARTED if row.parted else 4)
        below = top + row.cells[0].shape[0]
        if row.parted:
            draw.line([(MARGIN, y + _PARTED // 2), (page.width - MARGIN, y + _PARTED // 2)], (215, 215, 215))
        for j, cell in enumerate(row.cells):
            page.paste(Image.fromarray(cell), (MARGIN + names + j * width, top))
        for j, words in enumerate(row.captions):
            draw.text((MARGIN + names + j * width + width // 2, below + 2), words, QUIET, font(13), anchor="ma")
        middle = top + sum(map(_height, rows[i : i + row.spans])) // 2
        draw.text((MARGIN, middle), row.name, INK, font(26), anchor="lm")
        draw.text((MARGIN, middle + 22), row.more, QUIET, font(15))
        y += _height(row)
    if scale is not None:
        _draw_scale(page, draw, scale, MARGIN + names, y + 10)
    if note:
        draw.text((page.width - MARGIN, y + 20), note, QUIET, font(14), anchor="ra")
    return np.array(page)


def _height(row: Row) -> int:
    return (_PARTED if row.parted else 4) + row.cells[0].shape[0] + (20 if row.captions else 0)


def _draw_scale(page: Image.Image, draw: ImageDraw.ImageDraw, scale: Scale, x: int, y: int) -> None:
    bar = np.repeat(scale.colours[None], 16, axis=0)
    draw.text((x, y + 8), scale.title, INK, font(15), anchor="lm")
    x += int(draw.textlength(scale.title, font(15))) + 16
    page.paste(Image.fromarray(bar), (x, y))
    for share, words, anchor in zip((0, 0.5, 1), scale.words, ("la", "ma", "ra"), strict=True):
        draw.text((x + share * bar.shape[1], y + 20), words, QUIET, font(14), anchor=anchor)


def to_uint8(picture) -> np.ndarray:
    """A picture [H, B, 3] in 0..1, tensor or array, as uint8."""
    return np.rint(np.clip(np.asarray(picture), 0, 1) * 255).astype(np.uint8)

