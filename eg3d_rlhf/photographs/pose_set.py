"""A set of crops with camera labels, made from photographs: the job `data poses`.

The folder SET contains

    NAME.png        crops of 512 x 512 pixels
    dataset.json    their labels, {"labels": [[file name, 25 numbers], ...]}, the format of EG3D
    poses.csv       one row for each face, and for each photograph that was left out, with the reason
    poses.jsonl     the same rows with the labels, which are appended while the job runs

and the pages of the contact sheet lie beside it, SET-sheet.png. Both loaders, EG3D's and ours, take every
image in the folder for a part of the set.

A photograph is finished when its line is in poses.jsonl. A job that was killed continues with the other
photographs. Worker processes take one photograph at a time and write its crops themselves, so that the memory
does not depend on the number of photographs, and the result does not depend on the number of workers.
"""

import csv
import functools
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from eg3d_rlhf.experiments.process import LOCK, run_lock
from eg3d_rlhf.photographs.face_geometry import CROP_SIZE, angles_of
from eg3d_rlhf.photographs.poses import FacePose, open_photograph, poses_of_photograph
from training.camera_labels import label_array
from training.dataset import LABELS_FILE, in_order, parse_label_rows
from training.dataset_convert import png
from training.image_reading import split_names
from training.progress import tqdm
from training.rendering.cameras import LABEL_NUMBERS
from training.storage import remove_temporaries, write_atomic

JOURNAL = "poses.jsonl"
TABLE = "poses.csv"
KEPT = "kept"  # result of a face that is in the set
# Version of the results. A journal of another version is not continued.
FORMAT = 1
COLUMNS = (
    "file",  # path of the photograph
    "image",  # file name of the crop in the set; empty if the face was left out
    "faces",  # number of faces found in the photograph; empty if its label was given
    "face",  # number of this face, 1 for the largest one
    "turned_degrees",  # clockwise turn of the face in the photograph: 0, 90, 180 or 270 degrees
    "crop_width",  # pixels of the photograph
    "outside",  # share of the crop outside of the photograph, 0 to 1
    "yaw",  # degrees, as pitch and roll
    "pitch",
    "roll",
    "seconds",  # for the whole photograph
    "result",  # kept, or the reason why not
    "warnings",
)
# Values by column, and "label" for a crop.
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PoseOptions:
    """Options of the job that change its result."""

    face: str = "largest"  # see `parse_face_choice`
    keep_roll: bool = False


@dataclass(frozen=True, kw_only=True)
class Photo:
    """Photograph that the job reads."""

    path: Path
    image_name: str  # name of its crop in the set, without suffix
    label: Any = None  # its label in the dataset.json beside it, as stored; None: there is none


def list_photos(paths: Sequence[Path]) -> tuple[list[Photo], list[Row]]:
    """List the photographs of folders and files, with their names in the set and the labels they have.

    Folders are searched with their subfolders. A label in the dataset.json of a folder, or beside a file,
    replaces an estimate.

    Args: paths: folders and files.
    Returns: the photographs; and a row for each file in a folder that is not read, such as a HEIC image.
    Raises: ValueError for a dataset.json that cannot be read, and if there is no photograph.
    """
    photo_by_path: dict[Path, tuple[str, Any]] = {}  # path -> (name relative to its folder, label)
    skipped_rows = []
    for path in paths:
        folder = path if path.is_dir() else path.parent
        labels_path = folder / LABELS_FILE
        label_by_name = (
            parse_label_rows(labels_path.read_bytes(), str(labels_path)) if labels_path.is_file() else None
        ) or {}
        if path.is_dir():
            names, skipped_names = split_names(
                (entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file()),
                functools.partial(_read_start, path),
            )
            skipped_rows += [
                _row(path / name, result=f"{kind} are not read")
                for kind in skipped_names
                for name in skipped_names[kind]
            ]
        else:
            names = [path.name]
        for name in names:
            # A file that is listed twice, by its folder and by its path, is processed once.
            photo_by_path.setdefault(folder / name, (name, label_by_name.get(name)))
    if not photo_by_path:
        raise ValueError(
            f"no photographs were found in {', '.join(map(str, paths[:3]))}. Name a folder with PNG or JPEG"
            " files."
        )
    image_names = _image_names([name for name, _ in photo_by_path.values()])
    return [
        Photo(path=path, image_name=image_name, label=label)
        for image_name, (path, (_, label)) in zip(image_names, photo_by_path.items(), strict=True)
    ], skipped_rows


def _read_start(folder: Path, name: str) -> bytes:
    """Return the first bytes of a file; b"" if it cannot be read."""
    try:
        with (folder / name).open("rb") as file:
            return file.read(16)  # enough for the signature of an image format
    except OSError:
        return b""


def _image_names(names: Sequence[str]) -> list[str]:
    """Return a distinct name without suffix for each photograph, also on disks that ignore case.

    The name is that of the photograph, with "-" for "/". Where several would share it, the suffix is added
    (a.jpg and a.png become a-jpg and a-png), and then a number.
    """
    # A leading dot would make a hidden file.
    plain_names = [re.sub(r"\.[^./]*$", "", name).replace("/", "-").lstrip(".") or "photo" for name in names]
    # A.png and a.png are one file on most disks of macOS and Windows.
    counts = Counter(name.casefold() for name in plain_names)
    taken: set[str] = set()
    image_names = []
    for name, plain_name in zip(names, plain_names, strict=True):
        if counts[plain_name.casefold()] > 1:
            plain_name += "-" + name.rpartition(".")[2].replace("/", "-")
        image_name = plain_name
        number = 2
        # The suffix is not always enough: x/a.jpg and x-a.jpg both give x-a-jpg.
        while image_name.casefold() in taken:
            image_name = f"{plain_name}-{number}"
            number += 1
        taken.add(image_name.casefold())
        image_names.append(image_name)
    return image_names


def _row(path: Path, **values: Any) -> Row:
    """Return a row of poses.csv. Columns that are not given are empty."""
    return {**dict.fromkeys(COLUMNS, ""), "file": str(path), **values}


def _pose_columns(label: Sequence[float]) -> Row:
    """Return the columns of the angles of a label, in degrees."""
    yaw, pitch, roll = (round(angle, 2) for angle in angles_of(np.array(label, dtype=np.float64)))
    return {"yaw": yaw, "pitch": pitch, "roll": roll}


def process_photo(options: PoseOptions, folder: Path, photo: Photo) -> list[Row]:
    """Write the crops of one photograph into the set, and return its rows.

    The rows of crops have a further key, "label".

    Args:
        options: options of the job.
        folder: folder of the set.
        photo: photograph.
    """
    start = time.perf_counter()
    try:
        # Photographs are listed at the start, and the job may run for hours.
        if not photo.path.is_file():
            raise ValueError("the file does not exist any more")
        photograph = open_photograph(photo.path, photo.path.name)
        if photo.label is not None:
            rows = [_labelled_row(options, folder, photo, photograph)]
        else:
            rows = _estimated_rows(options, folder, photo, photograph)
    except ValueError as error:
        # The reason stands in one cell, and the other photographs are still processed.
        rows = [_row(photo.path, result=re.sub(r"\s+", " ", str(error)).strip())]
    seconds = round(time.perf_counter() - start, 3)
    return [{**row, "seconds": seconds} for row in rows]


def _labelled_row(options: PoseOptions, folder: Path, photo: Photo, photograph: PIL.Image.Image) -> Row:
    """Copy a photograph that has a label, at the size of the set, and return its row.

    The label belongs to the photograph as it is, so the photograph is not cropped.

    Raises: ValueError for a photograph that is not square, and for a label that is no camera label.
    """
    # Only the check is needed: the label is stored as it was given.
    label_array([photo.label], [photo.path.name], LABELS_FILE, LABEL_NUMBERS)
    width, height = photograph.size
    if width != height:
        raise ValueError(
            f"its label in {LABELS_FILE} belongs to a photograph of {width} x {height} pixels, which is not"
            " square; crop it with data convert, or remove the label"
        )
    if width != CROP_SIZE:
        # The intrinsics are divided by the size of the photograph, so that the label stays valid.
        photograph = photograph.resize((CROP_SIZE, CROP_SIZE), PIL.Image.Resampling.LANCZOS)
    image = _image_file(options, photo, 1)
    write_atomic(folder / image, png(photograph))
    return _row(
        photo.path,
        image=image,
        face=1,
        turned_degrees=0,
        crop_width=width,
        outside=0,
        **_pose_columns(photo.label),
        result=KEPT,
        warnings=f"not cropped, because its label in {LABELS_FILE} is kept",
        label=photo.label,
    )


def _estimated_rows(
    options: PoseOptions, folder: Path, photo: Photo, photograph: PIL.Image.Image
) -> list[Row]:
    """Write the crops of the chosen faces of a photograph, and return a row for each.

    Raises: ValueError with the reason if there is no such face.
    """
    poses = poses_of_photograph(photo.path, photograph, options.face, options.keep_roll)
    if poses.reason:
        return [_row(photo.path, faces=poses.faces, result=poses.reason)]
    rows = []
    for pose in poses.poses:
        row = _row(
            photo.path,
            faces=poses.faces,
            face=pose.number,
            turned_degrees=90 * pose.quarter_turns,
            crop_width=round(pose.frame.width, 1),
            outside=round(pose.outside, 4),
            **_pose_columns(pose.label.tolist()),
            result=pose.reason or KEPT,
            warnings="; ".join((*poses.warnings, *pose.warnings)),
        )
        # A face that is left out has a row with the reason, but no file in the set.
        if not pose.reason:
            row |= _written(options, folder, photo, photograph, pose)
        rows.append(row)
    return rows


def _written(
    options: PoseOptions, folder: Path, photo: Photo, photograph: PIL.Image.Image, pose: FacePose
) -> Row:
    """Write the crop of a face, and return the file name and the label."""
    image = _image_file(options, photo, pose.number)
    # Atomic, so that a killed job leaves no incomplete PNG for the loaders.
    write_atomic(folder / image, png(PIL.Image.fromarray(pose.crop(photograph))))
    return {"image": image, "label": pose.label.tolist()}


def _image_file(options: PoseOptions, photo: Photo, number: int) -> str:
    """Return the file name of a crop in the set."""
    # With several faces, all names have a number, so that they are distinct from those of other photographs.
    return f"{photo.image_name}-face{number}.png" if options.face == "all" else f"{photo.image_name}.png"


@dataclass(frozen=True, kw_only=True)
class PoseSet:
    """Result of the job."""

    rows: list[Row]  # one for each face, and for each photograph without a face, in order
    photos: int  # number of photographs
    reused: int  # number of photographs that an earlier call had finished

    @property
    def kept(self) -> list[Row]:
        """Rows of the crops in the set."""
        return [row for row in self.rows if row["result"] == KEPT]

    def left_out(self) -> list[tuple[str, int]]:
        """Return the reasons for which faces and photographs were left out, the most frequent first.

        Numbers and names are replaced by "#", so that equal reasons are counted together.
        """
        return Counter(_kind_of_reason(row) for row in self.rows if row["result"] != KEPT).most_common()


def _kind_of_reason(row: Row) -> str:
    """Return the reason of a row without the name of the file and without what follows the first clause."""
    reason = row["result"].removeprefix(f"{Path(row['file']).name}: ")
    return re.sub(r"\d+(\.\d+)?", "#", re.split(r"[;(]|\. ", reason)[0]).strip()


def _stamp(photo: Photo) -> list:
    """Return what a photograph must have in common with its record to be finished already, in JSON types."""
    try:
        status = photo.path.stat()
    except OSError:
        # The file is missing. `process_photo` returns a row that states it.
        return [0, 0, photo.image_name, photo.label]
    # Size and time instead of a hash, for which every photograph would be read again.
    return [status.st_size, status.st_mtime_ns, photo.image_name, photo.label]


def _key(photo: Photo) -> str:
    """Return the name of a photograph in the journal, which does not depend on the working directory."""
    return str(photo.path.absolute())


def _header(options: PoseOptions) -> dict:
    """Return the first line of the journal."""
    # Only options that change the result, so that --jobs may differ between calls.
    return {"format": FORMAT, "face": options.face, "keep_roll": options.keep_roll}


def _read_journal(folder: Path, options: PoseOptions) -> list[dict]:
    """Read the records of the photographs that earlier calls have finished, the newest one last.

    Raises: ValueError if the folder contains other files, or if it was made with other options.
    """
    journal = folder / JOURNAL
    if not journal.is_file():
        # This call has created the lock before.
        if any(path.name != LOCK for path in folder.iterdir()):
            raise ValueError(
                f"--outdir: the folder {folder} is not empty, and contains no {JOURNAL} of an earlier call."
                " Name a new or empty folder."
            )
        return []
    # A killed job may have written a part of its last line, which does not end in a line break.
    complete_lines = journal.read_bytes().split(b"\n")[:-1]
    records = [json.loads(line) for line in complete_lines]
    if not records:
        return []
    if records[0] != _header(options):
        raise ValueError(
            f"--outdir: the folder {folder} was made with other settings, {json.dumps(records[0])} instead of"
            f" {json.dumps(_header(options))}. Use the same flags, or name a new folder."
        )
    return records[1:]


def _reject_other_photos(folder: Path, records: Sequence[dict], photos: Sequence[Photo]) -> None:
    """Raise ValueError if earlier calls have processed photographs that still exist and are not named now.

    Their crops would have to be deleted. Those of photographs that the user has deleted are.
    """
    named = {_key(photo) for photo in photos}
    others = [record["file"] for record in records if record["file"] not in named]
    existing = [path for path in others if Path(path).is_file()]
    if existing:
        raise ValueError(
            f"--outdir: the folder {folder} has crops of {len(set(existing))} photographs that are not named"
            f" now, such as {existing[0]}. Name all photographs of the set, or a new folder."
        )


def make_pose_set(
    photos: Sequence[Photo],
    skipped_rows: Sequence[Row],
    folder: Path,
    options: PoseOptions,
    jobs: int = 1,
    make_bar: Callable[[int], tqdm] = lambda count: tqdm(disable=True),
) -> PoseSet:
    """Write the crops, the labels and the tables of photographs into a folder, or continue an earlier call.

    Args:
        photos: photographs, from `list_photos`.
        skipped_rows: rows of files that are not read.
        folder: folder of the set: new, empty, or of an earlier call with the same options.
        options: options of the job.
        jobs: number of worker processes.
        make_bar: function that makes the progress bar, from the number of photographs that are finished.
    Raises: ValueError for a folder with other files, of other options or of other photographs, and if a
        worker was killed; OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Two jobs in one folder would overwrite each other's journal.
    with run_lock(folder):
        remove_temporaries(folder)  # of a killed call
        records = _read_journal(folder, options)
        _reject_other_photos(folder, records, photos)
        # A later record of the same photograph replaces an earlier one.
        record_by_file = {record["file"]: record for record in records}
        rows_by_file = {}
        for photo in photos:
            record = record_by_file.get(_key(photo))
            if record is not None and record["stamp"] == _stamp(photo) and _has_crops(folder, record["rows"]):
                rows_by_file[_key(photo)] = record["rows"]
        reused = len(rows_by_file)
        pending = [photo for photo in photos if _key(photo) not in rows_by_file]
        # Rewritten, so that a new line never follows a part of a line.
        lines = [_header(options), *records]
        write_atomic(folder / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines).encode())
        death_message = "data poses: a worker process was killed. Free memory, or use --jobs=1."
        # Results come in the order of the photographs, so the journal does not depend on `jobs`.
        results = in_order(functools.partial(process_photo, options, folder), pending, jobs, death_message)
        with make_bar(reused) as bar, (folder / JOURNAL).open("a") as journal, closing(results):
            for photo, rows in zip(pending, results, strict=True):
                rows_by_file[_key(photo)] = rows
                record = {"file": _key(photo), "stamp": _stamp(photo), "rows": rows}
                records.append(record)
                journal.write(json.dumps(record) + "\n")
                journal.flush()  # a killed process loses what it has not flushed
                bar.update()
        pose_set = PoseSet(
            rows=[row for photo in photos for row in rows_by_file[_key(photo)]] + list(skipped_rows),
            photos=len(photos),
            reused=reused,
        )
        _write_tables(folder, pose_set, records)
    return pose_set


def _has_crops(folder: Path, rows: Sequence[Row]) -> bool:
    """Return True if the crops of all rows are in the folder."""
    return all((folder / row["image"]).is_file() for row in rows if row["image"])


def _write_tables(folder: Path, pose_set: PoseSet, records: Sequence[dict]) -> None:
    """Write dataset.json and poses.csv, and delete crops that do not belong to the set any more.

    Args: folder: folder of the set; pose_set: result; records: all records of the journal.
    """
    labels = [[row["image"], row["label"]] for row in pose_set.kept]
    images = {image for image, _ in labels}
    # A photograph was deleted, or has changed and is left out now.
    for image in {row["image"] for record in records for row in record["rows"]} - images - {""}:
        (folder / image).unlink(missing_ok=True)
    # null is EG3D's notation for a set without labels.
    write_atomic(folder / LABELS_FILE, json.dumps({"labels": labels or None}).encode())
    table = io.StringIO()
    # The key "label" is not a column: the 25 numbers stand in dataset.json.
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(pose_set.rows)
    # Names of files may contain bytes that are no text.
    write_atomic(folder / TABLE, table.getvalue().encode(errors="replace"))
