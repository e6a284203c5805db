"""Camera labels and vanishing files in `data convert`, in training and in other jobs that read a set."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import train
from eg3d_rlhf.core import bundled
from eg3d_rlhf.evaluation.inversion.targets import parse_camera
from eg3d_rlhf.experiments import image_set_warnings
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes import image_sets
from tests import camera_sets
from tests.camera_sets import CURABLE, INCURABLE, good_labels
from tests.pictures import pixels, png, write_zip
from tests.rejections import raising, rejected
from training.camera_conventions import Scene
from training.camera_labels import camera_warning
from training.dataset import ImageFolderDataset

COUNT = 8


def write_set(path, labels, size=16, **more):
    """A set of COUNT images with camera labels [COUNT, 25], and further entries."""
    images = {f"{i}.png": png(pixels(i, size, size)) for i in range(COUNT)}
    rows = [[name, label] for name, label in zip(images, np.asarray(labels).tolist(), strict=True)]
    return write_zip(path, {**images, **more}, rows)


def convert(src, dest, *flags):
    return CliRunner().invoke(
        image_sets.convert, [f"--source={src}", f"--dest={dest}", "--workers=1", *flags]
    )


def stored_labels(path):
    with zipfile.ZipFile(path) as archive:
        return np.array([label for _, label in json.loads(archive.read("dataset.json"))["labels"]])


@pytest.mark.parametrize(
    "mistake", ["pixels", "inverse", "opengl", "millimetres", "all at once", "half size"]
)
def test_convert_names_the_mistake_and_the_flags_that_correct_it(tmp_path, mistake):
    change, cures, scale = CURABLE[mistake]
    good = good_labels("ffhq", COUNT)
    src = write_set(tmp_path / "wrong.zip", change(good))
    flags = [f"--fix-cameras={','.join(cures)}"] if cures else []
    flags += [f"--camera-scale={scale:g}"] if scale != 1 else []
    strict = convert(src, tmp_path / "strict.zip", "--strict-cameras")
    line = rejected(strict, "wrong.zip", " ".join(flags))
    # Without --strict-cameras, numbers that cannot be right are rejected, and others warned of.
    result = convert(src, tmp_path / "warned.zip")
    if "--strict-cameras" in line:
        assert result.exit_code == 0 and all(flag in result.stderr for flag in flags)
        np.testing.assert_array_equal(stored_labels(tmp_path / "warned.zip"), change(good))
    else:
        rejected(result, "wrong.zip", *flags)
    # the proposed flags, as they are typed
    cured = convert(src, tmp_path / "cured.zip", "--strict-cameras", *flags)
    assert cured.exit_code == 0, cured.stderr
    assert "Warning" not in cured.stderr and "2.7" in cured.stdout and "4.26" in cured.stdout
    np.testing.assert_allclose(stored_labels(tmp_path / "cured.zip"), good, atol=1e-9)


@pytest.mark.parametrize("mistake", ["backward", "one pose", "mixed opengl"])
def test_convert_warns_of_mistakes_without_a_cure(tmp_path, mistake):
    src = write_set(tmp_path / "wrong.zip", INCURABLE[mistake](good_labels("ffhq", COUNT)))
    result = convert(src, tmp_path / "out.zip")
    assert result.exit_code == 0 and "wrong.zip" in result.stderr and "--fix-cameras" not in result.stderr
    rejected(convert(src, tmp_path / "strict.zip", "--strict-cameras"), "--strict-cameras", "wrong.zip")
    assert not (tmp_path / "strict.zip").exists()


def test_pixels_follow_the_size_of_each_image_and_the_crop(tmp_path):
    good = good_labels("ffhq", COUNT)
    images = {f"{i}.png": png(pixels(i, 32 + 2 * i, 16)) for i in range(COUNT)}
    wrong = good.copy()
    for i in range(COUNT):
        wrong[i, 16:22] *= np.repeat([32 + 2 * i, 16], 3)
    rows = [[name, label] for name, label in zip(images, wrong.tolist(), strict=True)]
    src = write_zip(tmp_path / "wide.zip", images, rows)
    flags = ["--fix-cameras=pixels", "--transform=center-crop", "--resolution=16x16"]
    result = convert(src, tmp_path / "out.zip", *flags)
    assert result.exit_code == 0, result.stderr
    labels = stored_labels(tmp_path / "out.zip")
    widths = 32 + 2 * np.arange(COUNT)
    np.testing.assert_allclose(labels[:, 16], good[:, 16] * widths / 16, rtol=1e-6)
    np.testing.assert_allclose(labels[:, 20], good[:, 20], rtol=1e-6)
    np.testing.assert_allclose(labels[:, [18, 21]], 0.5, atol=0.05)


def test_flags_without_effect_are_rejected(tmp_path):
    src = write_set(tmp_path / "good.zip", good_labels("ffhq", COUNT))
    for flags, names in (
        (["--fix-cameras=pixels"], ["--fix-cameras", "pixels"]),
        (["--fix-cameras=gl"], ["--fix-cameras", "'gl'", "opengl"]),
        (["--fix-cameras=opengl", "--labels=drop"], ["--fix-cameras", "--labels"]),
        (["--strict-cameras", "--labels=drop"], ["--strict-cameras", "--labels"]),
        (["--camera-scale=0"], ["--camera-scale", "0"]),
        (["--fix-cameras=opengl", "--strict-cameras"], ["good.zip", "--fix-cameras"]),
    ):
        rejected(convert(src, tmp_path / "out.zip", *flags), *names)
    classes = write_zip(
        tmp_path / "classes.zip",
        {f"{i}.png": png(pixels(i)) for i in range(2)},
        [["0.png", 0], ["1.png", 1]],
    )
    rejected(convert(classes, tmp_path / "out.zip", "--fix-cameras=opengl"), "--fix-cameras", "classes.zip")
    assert not (tmp_path / "out.zip").exists()


def test_labels_of_another_length_are_named_at_once(tmp_path):
    src = write_set(tmp_path / "poses.zip", good_labels("ffhq", COUNT)[:, :16])
    rejected(convert(src, tmp_path / "out.zip"), "poses.zip", "25", "16", "--labels=drop")
    assert convert(src, tmp_path / "out.zip", "--labels=drop").exit_code == 0


def test_an_image_that_is_named_twice_is_an_error(tmp_path):
    labels = good_labels("ffhq", COUNT).tolist()
    rows = [*[[f"{i}.png", labels[i]] for i in range(COUNT)], ["3.png", labels[0]]]
    src = write_zip(tmp_path / "twice.zip", {f"{i}.png": png(pixels(i)) for i in range(COUNT)}, rows)
    rejected(convert(src, tmp_path / "out.zip"), "twice.zip", "'3.png'", "2")
    with raising("twice.zip", "'3.png'", "2"):
        ImageFolderDataset(src)


def test_files_that_are_skipped_are_counted_and_named(tmp_path):
    more = {"a.heic": b"", "b/c.HEIC": b"", "._0.png": b"\0\5\x16\7", "notes.txt": b""}
    src = write_set(tmp_path / "mixed.zip", good_labels("ffhq", COUNT), **more)
    result = convert(src, tmp_path / "out.zip")
    assert result.exit_code == 0 and f"{COUNT} images" in result.stdout
    # notes.txt is no image
    assert all(name in result.stderr for name in ("a.heic", "b/c.HEIC", "._0.png"))
    assert "notes" not in result.stderr
    dataset = ImageFolderDataset(src, c_dim=25)
    assert len(dataset) == COUNT and "(2): a.heic" in " ".join(dataset.notes())
    # a label without an image is counted, too
    rows = [[f"{i}.png", label] for i, label in enumerate(good_labels("ffhq", COUNT + 2).tolist())]
    src = write_zip(tmp_path / "partial.zip", {f"{i}.png": png(pixels(i)) for i in range(COUNT)}, rows)
    result = convert(src, tmp_path / "partial-out.zip")
    assert result.exit_code == 0 and " 2, " in result.stderr and "'8.png'" in result.stderr


def test_wrong_sources_are_named_by_their_flag(tmp_path):
    for path, names in ((tmp_path / "none", []), (tmp_path / "sets", ["set.zip"])):
        if names:
            path.mkdir()
            write_set(path / "set.zip", good_labels("ffhq", COUNT))
        line = rejected(convert(path, tmp_path / "out.zip"), "--source", *names)
        assert "--data" not in line


def test_a_set_without_labels_is_announced_as_unfit_for_training(tmp_path):
    src = write_zip(tmp_path / "bare.zip", {"0.png": png(pixels(0))})
    result = convert(src, tmp_path / "out.zip")
    assert result.exit_code == 0 and "train.py" in result.stdout and "docs/guides/cameras.md" in result.stdout


def test_dry_run_shows_the_camera_flags(tmp_path):
    change, _, _ = CURABLE["inverse opengl"]
    src = write_set(tmp_path / "set.zip", change(good_labels("ffhq", COUNT)))
    flags = ["--fix-cameras=opengl,world2cam", "--camera-scale=0.5", "--strict-cameras", "--dry-run"]
    values = json.loads(convert(src, tmp_path / "out.zip", *flags).stdout)
    assert values["fix_cameras"] == ["world2cam", "opengl"] and values["camera_scale"] == 0.5
    assert values["strict_cameras"] is True


def trained(data, outdir, *flags):
    """Train on a set for one iteration, from the bundled generator."""
    sizes = ["--kimg=0.002", "--batch=2", "--mbstd-group=2", "--workers=0"]
    image_set_warnings._printed.clear()
    return CliRunner().invoke(train.main, [f"--data={data}", f"--outdir={outdir}", *sizes, *flags])


def test_training_checks_cameras_against_the_generator(tmp_path):
    change, cures, _ = CURABLE["inverse"]
    wrong = write_set(tmp_path / "inverse.zip", change(good_labels("ffhq-near-pivot", COUNT)), 64)
    result = trained(wrong, tmp_path / "strict", "--strict-cameras")
    rejected(result, "--strict-cameras", "inverse.zip", f"--fix-cameras={cures[0]}")
    pixel_set = write_set(tmp_path / "pixels.zip", CURABLE["pixels"][0](good_labels("ffhq", COUNT)), 64)
    rejected(trained(pixel_set, tmp_path / "pixels"), "--data", "pixels.zip", "--fix-cameras=pixels")


def test_a_warning_is_printed_once_and_is_an_error_if_strict(tmp_path, capsys):
    generator = load_generator(bundled.GENERATOR).generator
    image_set_warnings._printed.clear()
    wrong = write_set(
        tmp_path / "wrong.zip", CURABLE["opengl"][0](good_labels("afhq", COUNT)), 64, **{"x.heic": b""}
    )
    good = write_set(tmp_path / "good.zip", good_labels("afhq", COUNT), 64)
    for path, count in ((wrong, 2), (wrong, 0), (good, 0)):
        image_set_warnings.warn_about_images(ImageFolderDataset(path, c_dim=25), generator, "--init=bundled")
        assert capsys.readouterr().err.count("Warning") == count
    with raising("--strict-cameras", "wrong.zip", "--fix-cameras=opengl"):
        image_set_warnings.warn_about_images(ImageFolderDataset(wrong), generator, "--init=bundled", True)
    image_set_warnings.warn_about_images(ImageFolderDataset(good), generator, "--init=bundled", True)


@pytest.mark.long
def test_training_warns_and_goes_on(tmp_path):
    change, _, _ = CURABLE["inverse"]
    labels = change(good_labels("ffhq-near-pivot", COUNT))
    wrong = write_set(tmp_path / "inverse.zip", labels, 64, **{"x.heic": b""})
    result = trained(wrong, tmp_path / "runs")
    assert result.exit_code == 0, result.output
    assert "--fix-cameras=world2cam" in result.stderr and "x.heic" in result.stderr
    good = write_set(tmp_path / "good.zip", good_labels("ffhq-near-pivot", COUNT), 64)
    result = trained(good, tmp_path / "runs", "--strict-cameras")
    assert result.exit_code == 0 and "Warning" not in result.stderr, result.output


def test_other_jobs_warn_of_the_set(tmp_path):
    change, _, _ = CURABLE["opengl"]
    wrong = write_set(tmp_path / "opengl.zip", change(good_labels("ffhq", COUNT)), 64)
    image_set_warnings._printed.clear()
    result = CliRunner().invoke(image_sets.metrics, [f"--data={wrong}", "--metrics=fid", "--n=8"])
    assert "opengl.zip" in result.stderr and "--fix-cameras=opengl" in result.stderr, result.output


def test_the_camera_of_an_inversion_is_checked(tmp_path, capsys):
    generator = load_generator(bundled.GENERATOR).generator
    good = good_labels("ffhq-near-pivot", 1)
    camera = ",".join(str(number) for number in good[0])
    np.testing.assert_allclose(parse_camera(generator, camera).numpy(), good, atol=1e-6)
    assert capsys.readouterr().err == ""
    backward = camera_sets.change_poses(good, lambda P: P @ camera_sets.OPENGL)[0]
    parse_camera(generator, ",".join(str(number) for number in backward))
    assert "--camera" in capsys.readouterr().err
    with raising("camera", "fx"):
        parse_camera(generator, ",".join([*camera.split(",")[:16], *["0"] * 9]))


def test_the_guide_example_passes_its_own_commands(tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[2] / "docs/guides/cameras.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "cameras.md", "exec"), {})
    result = convert("photos/", "photos.zip", "--strict-cameras")
    assert result.exit_code == 0 and result.stderr.count("Warning") == 0, result.output
    assert all(number in result.stdout for number in ("2.70", "4.26", "0.00"))
    # the label that the page shows is a frontal camera
    shown = json.loads(page.split("```json\n")[1].split("```")[0])["labels"]
    np.testing.assert_allclose(shown[0][1][11], 2.7)
    assert camera_warning(np.array([shown[0][1]]), ["img"], "page", Scene(), "Add") is None
