"""The images and prompts of `flow new`: encodings of texts, files that are left out, faults in one list."""

import pytest
from PIL import Image

from eg3d_rlhf.modes.distill import read_prompts
from eg3d_rlhf.modes.flow_new import list_images
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests.modes.flow_works import NAMES, flow, with_encoder, write_images
from tests.rejections import check_message, raising
from tests.tuning.flow.families.trellis.tiny_trellis import write_image_trellis


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_encoder(tmp_path, monkeypatch)
    return tmp_path


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_prompts_of_windows_editors_are_read(here, encoding):
    (here / "p.txt").write_bytes("\r\n".join(NAMES).encode(encoding))
    flow("new", "WORK", "--pipeline=toy", "--prompts=p.txt", "--each=2")
    assert sorted(Work.open(here / "WORK").names()) == sorted(NAMES)
    assert read_prompts((str(here / "p.txt"),)) == tuple(NAMES)


def test_prompts_in_another_encoding_or_without_a_line_are_named(here):
    (here / "p.txt").write_bytes("red ball\ngrüner Würfel\n".encode("cp1252"))
    printed = flow("new", "WORK", "--pipeline=toy", "--prompts=p.txt", code=2)
    check_message(printed, ("--prompts", "p.txt", "line 2", "WINDOWS-1252"))
    with raising("--prompt", "p.txt", "line 2"):
        read_prompts((str(here / "p.txt"),))
    (here / "empty.txt").write_text("\n \n")
    printed = flow("new", "WORK", "--pipeline=toy", "--prompts=empty.txt", code=2)
    check_message(printed, ("--prompts", "empty.txt"))
    assert not (here / "WORK").exists()


def test_images_are_checked_before_the_first_is_embedded_and_others_are_named(here):
    root = write_image_trellis(here / "ROOT")
    images = write_images(here / "PICTURES")
    # other formats with an alpha channel are read
    with Image.open(images / "object0.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(images / "turned.tif")
        image.convert("RGB").save(images / "photo.jpg")
        image.save(
            images / "moving.webp",
            save_all=True,
            append_images=[image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)],
        )
        (images / "more").mkdir()
        image.save(images / "more" / "nested.png")
    (images / "._object0.png").write_bytes(b"\x00\x05\x16\x07" + bytes(90))
    (images / "phone.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(90))
    (images / ".DS_Store").write_bytes(b"x")
    arguments = ("new", "WORK", f"--pipeline={root}", f"--images={images}", "--each=2")
    bad = ("opaque1.png", "opaque2.webp", "half.png")
    for name in bad[:2]:
        Image.new("RGB", (9, 9), (len(name), 9, 9)).save(images / name)
    (images / "half.png").write_bytes((images / "object1.png").read_bytes()[:50])
    check_message(flow(*arguments, code=2), ("--images", *bad, "3"))
    assert not (here / "WORK").exists()
    for name in bad:
        (images / name).unlink()
    printed = flow(*arguments)
    for name in ("photo.jpg", "moving.webp", "nested.png", "._object0.png", "phone.heic", ".DS_Store"):
        assert name in printed, printed
    names = Work.open(here / "WORK").names()
    assert sorted(names) == [f"object{i}" for i in range(8)] + ["turned"]


def test_all_repetitions_are_listed_and_a_folder_without_cut_outs_is_explained(tmp_path):
    images = write_images(tmp_path / "A", 3)
    for i in (0, 1):
        (images / f"again{i}.png").write_bytes((images / f"object{i}.png").read_bytes())
    with raising("--images", "again0.png", "object0.png", "again1.png", "object1.png"):
        list_images(images)
    (tmp_path / "B").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "B" / "photo.jpg")
    with raising("--images", str(tmp_path / "B"), "photo.jpg", kind=FileNotFoundError):
        list_images(tmp_path / "B")
