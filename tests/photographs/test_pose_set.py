"""The job `data poses`: sets from folders, with bad files, labels of the user, and after it was stopped."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from eg3d_rlhf.modes.jobs import command_of
from eg3d_rlhf.photographs import pose_set
from eg3d_rlhf.photographs.pose_set import PoseOptions, list_photos, make_pose_set
from eg3d_rlhf.photographs.pose_sheet import project, write_sheet
from tests.photographs import heads
from tests.rejections import check_message, raising, rejected
from training.dataset import ImageFolderDataset
from training.image_reading import IMAGE_SUFFIXES


def run(*words):
    return CliRunner().invoke(command_of("data poses"), [*map(str, words), "--jobs=1"])


def table(folder) -> dict[str, dict]:
    """Rows of poses.csv by the file name of the photograph."""
    with (folder / "poses.csv").open(newline="") as file:
        return {row["file"].rpartition("/")[2]: row for row in csv.DictReader(file)}


def labels_of(folder) -> dict[str, list]:
    return dict(json.loads((folder / "dataset.json").read_text())["labels"])


@pytest.fixture(scope="module")
def bad_folder(portraits, tmp_path_factory):
    """Photographs of the kinds that people have, most of them unusable."""
    folder = tmp_path_factory.mktemp("photos")
    photograph, _ = heads.pasted(portraits[0], 1.2, 0, (600, 500), (300, 250))
    photograph.save(folder / "good.jpg", quality=95)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored on its side
    photograph.transpose(PIL.Image.Transpose.ROTATE_90).save(folder / "phone.jpg", exif=exif, quality=95)
    photograph.rotate(180).save(folder / "upside-down.png")
    two = photograph.copy()
    two.paste(portraits[1].resize((170, 170)), (0, 0))
    two.save(folder / "two.png")
    grey = np.array(photograph.convert("L")).astype(np.uint16) * 257
    PIL.Image.fromarray(grey).save(folder / "sixteen.png")
    photograph.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    alpha = photograph.copy()
    alpha.putalpha(255)
    (folder / "sub").mkdir()
    alpha.save(folder / "sub" / "good.png")
    PIL.Image.new("RGB", (200, 200), "teal").save(folder / "no-face.png")
    data = (folder / "good.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 3])
    frames = [PIL.Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "notes.txt").write_text("not a photograph")
    return folder


@pytest.fixture(scope="module")
def bad_set(bad_folder, tmp_path_factory):
    """The set of these photographs, and the output of the command."""
    folder = tmp_path_factory.mktemp("sets") / "set"
    return folder, run(bad_folder, f"--outdir={folder}")


def test_each_photograph_is_kept_or_named_with_its_reason(bad_set):
    folder, result = bad_set
    assert result.exit_code == 0, result.output
    rows = table(folder)
    kept = {name for name, row in rows.items() if row["result"] == "kept"}
    assert kept == {
        *("good.jpg", "phone.jpg", "upside-down.png", "two.png", "sixteen.png", "cmyk.jpg", "good.png")
    }
    left_out = {"no-face.png", "truncated.jpg", "animated.gif", "phone.heic"}
    assert set(rows) == kept | left_out
    assert all(len(rows[name]["result"]) > 10 and not rows[name]["image"] for name in left_out)
    assert rows["upside-down.png"]["turned_degrees"] == "180" and rows["phone.jpg"]["turned_degrees"] == "0"
    assert rows["two.png"]["faces"] == "2" and rows["two.png"]["warnings"]


def test_the_set_is_readable_by_both_loaders(bad_set):
    folder, _ = bad_set
    dataset = ImageFolderDataset(folder, c_dim=25)
    assert len(dataset) == 7 and dataset.resolution == 512
    assert dataset[0][0].shape == (3, 512, 512)
    # EG3D's loader takes each file with the suffix of an image, and looks its relative path up in the labels
    labels = labels_of(folder)
    images = [
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder)
        for name in names
        if name.endswith(IMAGE_SUFFIXES)
    ]
    assert sorted(images) == sorted(labels) and all(len(label) == 25 for label in labels.values())
    assert {PIL.Image.open(folder / name).size for name in images} == {(512, 512)}


def test_photographs_of_one_scene_have_one_label(bad_set):
    """Orientation, colour space, bit depth and alpha change neither the crop nor the camera."""
    rows = table(bad_set[0])
    for name in ("phone.jpg", "upside-down.png", "sixteen.png", "cmyk.jpg", "good.png"):
        for column, tolerance in (("yaw", 2), ("pitch", 2), ("roll", 2), ("crop_width", 6)):
            assert abs(float(rows[name][column]) - float(rows["good.jpg"][column])) < tolerance, (
                name,
                column,
            )


def test_the_sheet_lies_beside_the_set(bad_set):
    folder, _ = bad_set
    with PIL.Image.open(folder.parent / "set-sheet.png") as page:
        assert page.width > 6 * 200 and page.height > 400


def test_a_further_call_continues_and_follows_the_photographs(bad_folder, portraits, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        portraits[0].save(photos / name)
    folder = tmp_path / "set"

    class KilledError(Exception):
        pass

    class KilledBar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            raise KilledError

    photo_list, _ = list_photos([photos])
    with pytest.raises(KilledError):
        make_pose_set(photo_list, [], folder, PoseOptions(), make_bar=lambda _: KilledBar())
    with (folder / pose_set.JOURNAL).open("a") as journal:
        journal.write('{"file": "half of a li')  # what a killed process may leave
    (folder / ".b.png.1.tmp").write_bytes(b"part")
    assert not (folder / "dataset.json").exists()
    finished = make_pose_set(photo_list, [], folder, PoseOptions())
    assert finished.reused == 1 and len(finished.kept) == 2
    straight = make_pose_set(photo_list, [], tmp_path / "straight", PoseOptions())
    assert (folder / "dataset.json").read_bytes() == (tmp_path / "straight" / "dataset.json").read_bytes()
    for row in straight.kept:
        assert (folder / row["image"]).read_bytes() == (tmp_path / "straight" / row["image"]).read_bytes()
    assert not list(folder.glob(".*"))
    # a deleted photograph leaves the set, a new one is added, the others are not processed again
    (photos / "a.png").unlink()
    portraits[1].save(photos / "c.png")
    again = make_pose_set(list_photos([photos])[0], [], folder, PoseOptions())
    assert again.reused == 1 and sorted(labels_of(folder)) == ["b.png", "c.png"]
    assert not (folder / "a.png").exists()
    # a photograph that is not named, but exists, is no reason to delete its crop
    with raising("--outdir", "b.png"):
        make_pose_set(list_photos([photos / "c.png"])[0], [], folder, PoseOptions())
    with raising("--outdir", "keep_roll"):
        make_pose_set(list_photos([photos])[0], [], folder, PoseOptions(keep_roll=True))


def test_several_processes_give_the_same_set(portraits, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        portraits[i % 2].save(photos / f"{i}.png")
    sets = []
    for jobs in (1, 2):
        folder = tmp_path / f"jobs{jobs}"
        make_pose_set(list_photos([photos])[0], [], folder, PoseOptions(), jobs=jobs)
        sets.append(
            {path.name: path.read_bytes() for path in folder.glob("*.png")} | {"labels": labels_of(folder)}
        )
    # Sums of floats depend on the number of threads of a process.
    assert sets[0].keys() == sets[1].keys()
    for name, label in sets[0]["labels"].items():
        assert np.allclose(label, sets[1]["labels"][name], atol=1e-5)


def test_labels_of_the_user_are_kept(portraits, tmp_path):
    label = [*heads.pose_at(33, 5).ravel(), 4.2647, 0, 0.5, 0, 4.2647, 0.5, 0, 0, 1]
    wide = PIL.Image.new("RGB", (200, 100), "white")
    portraits[0].save(tmp_path / "labelled.png")
    portraits[0].save(tmp_path / "new.png")
    portraits[0].save(tmp_path / "damaged.png")
    wide.save(tmp_path / "wide.png")
    rows = [["labelled.png", label], ["wide.png", label], ["damaged.png", label[:16]]]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": rows}))
    for source in (tmp_path, tmp_path / "labelled.png"):
        folder = tmp_path.with_name(f"{tmp_path.name}-{source.name}-set")
        assert run(source, f"--outdir={folder}").exit_code == 0
        assert labels_of(folder)["labelled.png"] == label
    folder = tmp_path.with_name(f"{tmp_path.name}-{tmp_path.name}-set")
    assert set(labels_of(folder)) == {"labelled.png", "new.png"}
    assert table(folder)["wide.png"]["image"] == table(folder)["damaged.png"]["image"] == ""
    # it is the whole photograph and no crop of it
    enlarged = np.array(portraits[0].resize((512, 512), PIL.Image.Resampling.LANCZOS))
    assert np.array_equal(np.array(PIL.Image.open(folder / "labelled.png")), enlarged)


def test_all_faces_have_names_of_their_own(portraits, tmp_path):
    photograph, _ = heads.pasted(portraits[0], 1.2, 0, (700, 400), (500, 200))
    photograph.paste(portraits[1].resize((220, 220)), (10, 60))
    photograph.save(tmp_path / "pair.png")
    folder = tmp_path / "set"
    assert run(tmp_path / "pair.png", f"--outdir={folder}", "--face=all").exit_code == 0
    assert sorted(labels_of(folder)) == ["pair-face1.png", "pair-face2.png"]


def test_names_are_distinct():
    names = ["a.jpg", "a.png", "b/c.png", "b-c.PNG", "d.png", ".e.png", "A-jpg.png"]
    image_names = pose_set._image_names(names)
    assert len({name.casefold() for name in image_names}) == len(names)
    assert image_names[4] == "d" and not any(name.startswith(".") for name in image_names)


def test_nothing_usable_is_an_error(bad_folder, tmp_path):
    folder = tmp_path / "set"
    result = run(bad_folder / "no-face.png", f"--outdir={folder}")
    assert result.exit_code == 2
    check_message(result.stderr.splitlines()[-1], ("poses.csv",))  # after the line of the progress
    assert table(folder)["no-face.png"]["result"]
    (tmp_path / "empty").mkdir()
    rejected(run(tmp_path / "empty", f"--outdir={tmp_path / 'other'}"), "empty")


def test_other_folders_are_not_written_into(bad_folder, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    rejected(run(bad_folder / "good.jpg", f"--outdir={tmp_path}"), "--outdir")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious.txt"]
    rejected(run(bad_folder / "good.jpg", f"--outdir={tmp_path / 'set'}", "--face=first"), "--face")
    rejected(run(tmp_path / "missing.png", f"--outdir={tmp_path / 'set'}"), "missing.png")


def test_a_dry_run_writes_nothing(bad_folder, tmp_path):
    result = run(bad_folder, f"--outdir={tmp_path / 'set'}", "--dry-run")
    assert json.loads(result.output)["photographs"] == 10 and not (tmp_path / "set").exists()


def test_pages_of_the_sheet_follow_the_number_of_crops(portraits, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    portraits[0].resize((512, 512)).save(folder / "a.png")
    label = [*heads.pose_at(10, 0).ravel(), 4.2647, 0, 0.5, 0, 4.2647, 0.5, 0, 0, 1]
    row = {
        "image": "a.png",
        "label": label,
        "yaw": 10.0,
        "pitch": 0.0,
        "roll": 0.0,
        "turned_degrees": 0,
        "crop_width": 300,
    }
    assert len(write_sheet(folder, [row] * 80)) == 3
    assert len(write_sheet(folder, [row])) == 1
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["set-sheet.png"]
    # the centre of the world is in the middle of the image, and +y is up in it
    middle, top = project(np.array(label), np.array([[0, 0, 0], [0, 0.1, 0]]))
    assert np.allclose(middle, 0.5, atol=1e-3) and top[1] < middle[1] - 0.1


@pytest.mark.long
def test_a_killed_job_continues(portraits, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(12):
        portraits[i % 2].save(photos / f"{i:02}.png")
    folder = tmp_path / "set"
    words = [
        sys.executable,
        "-m",
        "eg3d_rlhf",
        "data",
        "poses",
        str(photos),
        f"--outdir={folder}",
        "--jobs=2",
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = folder / pose_set.JOURNAL
    deadline = time.monotonic() + 300
    while not journal.is_file() or journal.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = journal.read_bytes().count(b"\n") - 1
    assert 3 <= done < 12 and not (folder / "dataset.json").exists()
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"{done} photographs" in result.stdout and len(labels_of(folder)) == 12
