"""Contact sheet of a set of crops, on which a person sees wrong cameras at a glance.

Into each crop, its camera draws the axes of the head and a frame of the canonical face. The red axis points
to the left ear of the person, the green one to the top of the head, the blue one out of the face. With a
right camera, the blue arrow runs through the tip of the nose, and the corners of the frame lie on the outer
corners of the eyes and on the corners of the mouth.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from eg3d_rlhf.experiments.media import sheet
from eg3d_rlhf.photographs.face_geometry import WORLD_CENTRE
from eg3d_rlhf.photographs.pose_set import Row
from eg3d_rlhf.photographs.poses import WARN_WIDTH, WARN_YAW
from training.storage import write_atomic

CELL = 224  # pixels per edge of a crop on the sheet
COLUMNS = 6
ROWS_OF_PAGE = 6
_SUPERSAMPLE = 2  # lines are drawn at twice the size and averaged
# Points of the canonical face in EG3D's world, relative to `WORLD_CENTRE`, in world units: 0.0261 for 1 cm.
_FRAME = np.array(
    [(-0.116, 0.078, 0.020), (0.116, 0.078, 0.020), (0.064, -0.105, 0.049), (-0.064, -0.105, 0.049)]
)  # outer corners of the eyes, corners of the mouth
_ORIGIN = np.array([0.0, -0.004, 0.030])  # of the axes, behind the tip of the nose at z = 0.135
_AXIS_LENGTH = 0.22  # world units
_AXES = {"#e6261f": (1, 0, 0), "#22b14c": (0, 1, 0), "#1f6fff": (0, 0, 1)}  # colour -> direction
_FRAME_COLOUR = "#ffffff"
_WARNING_COLOUR = "#ff8c00"


def project(label: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Project points of the world into a crop.

    Args: label: camera label [25]; points: [P, 3], world units.
    Returns: positions [P, 2] in the crop, whose sides are 0..1.
    """
    pose = label[:16].reshape(4, 4)
    intrinsics = label[16:].reshape(3, 3)
    # Rows times the rotation of cam2world: this applies its inverse, from the world to the camera.
    camera_points = (points - pose[:3, 3]) @ pose[:3, :3]  # x right, y down, z forward
    projected = camera_points @ intrinsics.T
    return projected[:, :2] / projected[:, 2:]


def draw_axes(crop: PIL.Image.Image, label: np.ndarray, has_warning: bool = False) -> np.ndarray:
    """Draw the axes of the head and the frame of the face into a crop, as its camera sees them.

    Args:
        crop: crop of any size.
        label: its camera label [25].
        has_warning: True: the crop gets an orange border.
    Returns: uint8 [CELL, CELL, 3].
    """
    side = _SUPERSAMPLE * CELL
    image = crop.convert("RGB").resize((side, side), PIL.Image.Resampling.LANCZOS)
    canvas = PIL.ImageDraw.Draw(image)
    corners = project(label, WORLD_CENTRE + _FRAME) * side  # [4, 2]
    # The first corner is repeated, so that the line is closed.
    frame = [tuple(point) for point in (*corners, corners[0])]
    # A black outline, because a white line alone disappears on bright skin.
    canvas.line(frame, "#000000", width=7, joint="curve")
    canvas.line(frame, _FRAME_COLOUR, width=3, joint="curve")
    # The farthest arrow is drawn first, so that nearer ones cover it.
    camera_forward = label[:16].reshape(4, 4)[:3, 2]
    arrows = sorted(_AXES.items(), key=lambda arrow: -float(np.dot(arrow[1], camera_forward)))
    for colour, direction in arrows:
        ends = WORLD_CENTRE + _ORIGIN + np.array([(0, 0, 0), direction]) * _AXIS_LENGTH
        _arrow(canvas, project(label, ends) * side, colour)
    if has_warning:
        canvas.rectangle((0, 0, side - 1, side - 1), outline=_WARNING_COLOUR, width=12)
    return np.array(image.resize((CELL, CELL), PIL.Image.Resampling.BOX))


def _arrow(canvas: PIL.ImageDraw.ImageDraw, ends: np.ndarray, colour: str) -> None:
    """Draw an arrow with a black outline. Its head has a fixed size, also if it points at the viewer."""
    start, end = ends
    length = float(np.linalg.norm(end - start))
    # An arrow towards the viewer has almost no length in the image.
    direction = (end - start) / max(length, 1e-9)
    across = np.array([-direction[1], direction[0]])
    head = 26.0  # pixels at twice the size of a cell
    neck = end - direction * head * 0.9
    points = [end, neck + across * head / 2, neck - across * head / 2]
    for width, fill, grown in ((13, "#000000", 3.0), (7, colour, 0.0)):
        canvas.line([tuple(start), tuple(neck)], fill, width=width)
        middle = np.mean(points, axis=0)
        canvas.polygon([tuple(point + (point - middle) / head * 1.5 * grown) for point in points], fill)
    canvas.ellipse((*(start - 8), *(start + 8)), fill="#000000")
    canvas.ellipse((*(start - 5), *(start + 5)), fill="#ffffff")


def write_sheet(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write the pages of the contact sheet beside the folder of a set, and delete pages of earlier calls.

    Args: folder: folder of the set; rows: rows of its crops, see `pose_set`.
    Returns: paths of the pages, NAME-sheet.png, NAME-sheet-2.png and so on.
    """
    page_size = COLUMNS * ROWS_OF_PAGE
    page_rows = [rows[start : start + page_size] for start in range(0, len(rows), page_size)]
    paths = [sheet_path(folder, number) for number in range(1, len(page_rows) + 1)]
    for number, (path, crops) in enumerate(zip(paths, page_rows, strict=True), 1):
        title = f"{folder.name}: {len(rows)} crops" + (
            f", page {number} of {len(paths)}" if len(paths) > 1 else ""
        )
        page = sheet.sheet(title, list(_sheet_rows(folder, crops)), note=_NOTE)
        write_atomic(path, _compressed(page))
    number = len(paths) + 1
    # An earlier call may have had more photographs, and therefore more pages.
    while (old_path := sheet_path(folder, number)).is_file():
        old_path.unlink()
        number += 1
    return paths


_NOTE = (
    "A right camera: the blue arrow runs through the tip of the nose, the green one points to the top of the"
    " head; the white frame joins the outer corners of the eyes and the corners of the mouth. Numbers: yaw,"
    " pitch, roll in degrees. Orange: look twice (yaw above 45, crop below 256 pixels, turned photograph)."
)


def sheet_path(folder: Path, number: int) -> Path:
    """Return the path of a page of the sheet, from 1 on. It lies beside the folder, not in it.

    The loaders of EG3D and of this project take every image in the folder for a part of the set.
    """
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}-sheet{'' if number == 1 else f'-{number}'}.png")


def _sheet_rows(folder: Path, crops: Sequence[Row]) -> Iterator[sheet.Row]:
    """Read the crops of a page, and yield its rows of cells."""
    for start in range(0, len(crops), COLUMNS):
        row = crops[start : start + COLUMNS]
        cells = []
        captions = []
        for crop in row:
            with PIL.Image.open(folder / crop["image"]) as image:
                cells.append(draw_axes(image, np.array(crop["label"]), _is_marked(crop)))
            angles = ", ".join(f"{crop[name]:+.0f}" for name in ("yaw", "pitch", "roll"))
            name = Path(crop["image"]).stem
            # A longer name would overlap the caption of the next cell.
            captions.append(f"{name if len(name) <= 18 else '...' + name[-15:]}: {angles}")
        yield sheet.Row(cells=cells, captions=captions)


def _is_marked(crop: Row) -> bool:
    """Return True if a person should look at a crop twice: nearly a profile, enlarged, or turned."""
    return abs(crop["yaw"]) > WARN_YAW or crop["crop_width"] < WARN_WIDTH or bool(crop["turned_degrees"])


def _compressed(page: np.ndarray) -> bytes:
    """Encode a page [H, W, 3] as PNG."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(page).save(buffer, format="png")
    return buffer.getvalue()
