"""The job `data poses`, which makes a training set of crops with camera labels from photographs."""

import functools
import os
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, argument, option
from eg3d_rlhf.modes.shared_flags import FOLDER, PATH, count_option, print_json, shared
from eg3d_rlhf.photographs.settings import parse_face_choice
from training.progress import tqdm

_faces_option = functools.partial(option, group="Faces")


def check_photos(path: Path) -> None:
    """Raise ValueError if there is neither a folder nor a file at a path."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder. Pass a folder of photographs.")


@click.command("poses", cls=GroupedCommand)
@argument("photos", check_photos, metavar="FOLDER|FILE...", nargs=-1, required=True, type=PATH)
@option(
    "--outdir",
    metavar="SET",
    type=FOLDER,
    required=True,
    help=(
        "Folder of the set: new, empty, or of an earlier call with the same flags, which is continued. The"
        " contact sheet is written beside it, as SET-sheet.png."
    ),
)
@_faces_option(
    "--face",
    metavar="largest|all|INT",
    check=parse_face_choice,
    default="largest",
    help="Faces to use of a photograph with several: the largest, all, or one by its rank in size (1, 2).",
)
@_faces_option(
    "--keep-roll",
    is_flag=True,
    help=(
        "Keep crops parallel to the photograph, so that the camera has the roll. Without this flag crops are"
        " turned until the face is upright, as in EG3D's training sets."
    ),
)
@count_option(
    "--jobs",
    show_default="one per core",
    help="Number of processes, each of which takes one photograph at a time. It does not change the result.",
)
@shared("dry-run")
def poses(photos, outdir, face, keep_roll, jobs, dry_run) -> None:
    """Find the faces in photographs, crop them as EG3D does, and write the crops with their cameras as a
    training set: 512 x 512 PNGs, dataset.json, poses.csv and a contact sheet.

    The cameras are estimates with a mean error of about 4 degrees. Look at the contact sheet before you use
    them, and delete photographs whose axes are wrong; a further call removes their crops. Each photograph
    that is left out stands in poses.csv with the reason. A photograph with a label in a dataset.json beside
    it is not cropped, and keeps its label.

    \b
    Example:
        eg3d-rlhf data poses photos/ --outdir=faces
        python train.py --data=faces --cfg=ffhq --gamma=1 --init=ffhq512-128.pkl
    """
    # Imported here, so that --help and errors are printed without loading these modules.
    from eg3d_rlhf.photographs.pose_set import PoseOptions, list_photos, make_pose_set
    from eg3d_rlhf.photographs.pose_sheet import write_sheet

    options = PoseOptions(face=face, keep_roll=keep_roll)
    photo_list, skipped_rows = list_photos(photos)
    # the affinity mask counts the cores this process may use; not all systems have it
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    labelled_count = sum(photo.label is not None for photo in photo_list)
    # The photographs are listed, but no image is decoded, and nothing is written.
    if dry_run:
        print_json(
            {
                "photographs": len(photo_list),
                "labelled": labelled_count,
                "not read": len(skipped_rows),
                "outdir": str(outdir),
                "face": face,
                "keep_roll": keep_roll,
                "jobs": jobs,
            }
        )
        return
    if labelled_count:
        click.echo(
            f"{labelled_count} photographs have a label in dataset.json. They are not cropped, and keep it."
        )

    def make_bar(reused_count: int) -> tqdm:
        """Make the progress bar. Photographs of an earlier call do not count for the speed."""
        return tqdm(total=len(photo_list), initial=reused_count, desc="data poses", unit="photograph")

    pose_set = make_pose_set(photo_list, skipped_rows, outdir, options, jobs, make_bar)
    if pose_set.reused:
        click.echo(f"{pose_set.reused} photographs were finished by an earlier call.")
    kept = pose_set.kept
    for reason, count in pose_set.left_out():
        click.echo(f"left out, {count}: {reason}")
    # The table of reasons is written at this point, so the message can refer to it.
    if not kept:
        raise ValueError(
            f"none of the {pose_set.photos} photographs gave a crop. Read the reasons in {outdir}/poses.csv,"
            " and add photographs of one face each."
        )
    with_warning = sum(bool(row["warnings"]) for row in kept)
    pages = write_sheet(outdir, kept)
    click.echo(f"{outdir}: {len(kept)} crops of 512 x 512 with labels, {with_warning} with a warning")
    click.echo(
        f"Look at {pages[0]}{f' and {len(pages) - 1} further pages' if len(pages) > 1 else ''}: delete the"
        " photographs whose axes are wrong, and run the same command again."
    )
    click.echo(f"next: python train.py --data={outdir} --cfg=ffhq --gamma=1")
