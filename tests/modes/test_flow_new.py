"""`flow new` and `flow sample`: what they say, write and refuse."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from eg3d_rlhf.modes.flow_new import cost_lines
from eg3d_rlhf.tuning.flow.base.conditioning import read_conditioning
from eg3d_rlhf.tuning.flow.families import family_of, hunyuan3d_files
from eg3d_rlhf.tuning.flow.training import memory_estimate as fit
from eg3d_rlhf.tuning.flow.workspace import estimate
from eg3d_rlhf.tuning.flow.workspace.work_folder import SHOWN, SPLITS, Work
from tests.modes.flow_works import NAMES, flow, with_encoder, write_images, write_prompts
from tests.rejections import check_message, raising
from tests.tuning.flow.families.hunyuan3d.tiny_hunyuan3d import write_hunyuan3d
from tests.tuning.flow.families.trellis.tiny_trellis import write_image_trellis, write_trellis


def command(*words: str) -> str:
    """The command that a message asks to run next."""
    return " ".join(("eg3d-rlhf", "flow", *words))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_encoder(tmp_path, monkeypatch)
    return tmp_path


def test_the_toy_brings_its_prompts_or_takes_some_of_them(here):
    printed = flow("new", "WORK", "--pipeline=toy")
    assert {"192", "116", "38"} <= set(re.findall(r"\d+", printed)) and printed.rstrip().endswith(
        command("plan", "WORK")
    )
    work = Work.open(here / "WORK")
    assert [len(work.splits[split]) for split in SPLITS] == [116, 38, 38]
    assert work.up == "z" and work.precision == "float32"
    assert len((here / "WORK" / "inputs" / "prompts.txt").read_text().splitlines()) == 192
    printed = flow(
        "new",
        "FEW",
        "--pipeline=toy",
        f"--prompts={write_prompts(here / 'p.txt')}",
        "--each=2",
        "--set=seed=3",
    )
    few = Work.open(here / "FEW")
    assert sorted(few.names()) == sorted(NAMES) and few.each == 2 and few.seed == 3
    assert set(read_conditioning(few.conditions_file).names) == set(NAMES)


def test_images_of_trellis_are_embedded_kept_and_shown_beside_the_samples(here):
    root = write_image_trellis(here / "ROOT")
    images = write_images(here / "PICTURES")
    printed = flow("new", "WORK", f"--pipeline={root}", f"--images={images}", "--each=2")
    for words in ("structure", "latent", "huggingface.co/microsoft"):
        assert words in printed, printed
    work = Work.open(here / "WORK")
    assert [len(work.splits[split]) for split in SPLITS] == [4, 2, 2]
    assert work.kind == "pictures" and work.up == "z" and sorted(work.inputs) == sorted(work.names())
    printed = flow("sample", "WORK")
    assert "12 assets" in printed and "2 prompts" in printed
    prompts = {
        line["prompt"]: line["image"]
        for line in map(json.loads, (work.asset_folder() / "prompts.jsonl").read_text().splitlines())
    }
    assert set(prompts) == set(work.names(*SHOWN))
    assert all(
        (work.asset_folder() / image).read_bytes() == (images / f"{name}.png").read_bytes()
        for name, image in prompts.items()
    )
    assert {"structure", "latent", "look_at"} < set(work.lines()[0])
    weights = next(root.rglob("*flow*.safetensors"))
    shutil.copyfile(weights, here / "copy")
    weights.write_bytes((here / "copy").read_bytes()[:-1] + b"\1")
    check_message(flow("sample", "WORK", code=2), (str(root), weights.name, "WORK"))


def test_inputs_that_do_not_fit_the_generator_are_rejected(here, monkeypatch):
    root = write_image_trellis(here / "ROOT")
    images = write_images(here / "PICTURES")
    prompts = write_prompts(here / "p.txt")
    shapes = write_hunyuan3d(here / "SHAPES")
    (here / "hunyuan3d-2.1").mkdir()
    odd = write_prompts(here / "odd.txt", [NAMES[0], "red lamp"])
    two = write_prompts(here / "two.txt", NAMES[:2])
    asked = [  # flags, what the line names
        (("--pipeline=nothing", f"--prompts={prompts}"), ("pipeline", "nothing", "huggingface.co/")),
        (
            (f"--pipeline={here / 'hunyuan3d-2.1'}", f"--images={images}"),
            ("pipeline", str(here / "hunyuan3d-2.1"), "huggingface.co/tencent/Hunyuan3D-2.1"),
        ),
        ((f"--pipeline={root}",), ("--prompts", "--images")),
        ((f"--pipeline={shapes}", f"--prompts={prompts}"), ("--prompts", "--images", "hunyuan3d")),
        (("--pipeline=toy", f"--images={images}"), ("--images", "--prompts", "toy")),
        ((f"--pipeline={root}", f"--prompts={prompts}"), ("--images", "--prompts")),
        (("--pipeline=toy", f"--prompts={odd}"), ("--prompts", "'red lamp'", "192")),
        (("--pipeline=toy", f"--prompts={two}"), ("--set split=", "0 to")),
        (
            ("--pipeline=toy", f"--prompts={prompts}", "--set=split=0.8,0.2,0"),
            ("--set split=", "10 to", "0 to"),
        ),
        (
            ("--pipeline=toy", f"--prompts={prompts}", "--set=split=0.8,0.8,0.1"),
            ("--set split=", "0.8, 0.8, 0.1"),
        ),
    ]
    for flags, names in asked:
        check_message(flow("new", "WORK", *flags, code=2), names)
        assert not (here / "WORK").exists()
    Image.open(images / "object1.png").save(images / "again.png")
    # the same image would be in two splits
    printed = flow("new", "WORK", f"--pipeline={root}", f"--images={images}", code=2)
    check_message(printed, ("--images", "again.png", "object1.png"))
    (images / "again.png").unlink()
    Image.fromarray(np.full((9, 9, 3), 200, np.uint8)).save(images / "opaque.png")
    printed = flow("new", "WORK", f"--pipeline={root}", f"--images={images}", code=2)
    check_message(printed, (str(images / "opaque.png"), "RGB"))


def test_what_is_missing_is_named_with_its_address(here, monkeypatch):
    root = write_image_trellis(here / "ROOT")
    images = write_images(here / "PICTURES")
    shutil.rmtree(here / "torch")
    printed = flow("new", "WORK", f"--pipeline={root}", f"--images={images}", code=2)
    check_message(printed, ("dinov2_vitl14_reg", str(here / "torch"), "facebook/dinov2-with-registers-large"))
    texts = write_trellis(here / "TEXTS")
    prompts = write_prompts(here / "p.txt")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "transformers", None)
        printed = flow("new", "WORK", f"--pipeline={texts}", f"--prompts={prompts}", code=2)
    check_message(printed, ("transformers", "'eg3d-rlhf[vision]'"))
    shapes = write_hunyuan3d(here / "SHAPES")
    sections = {
        name: dict(tensors)
        for name, tensors in hunyuan3d_files.read_sections(shapes / "model.fp16.ckpt").items()
    }
    held = {
        name: {n: x.clone() for n, x in of.items() if not n.startswith(hunyuan3d_files.ENCODER_HALF)}
        for name, of in sections.items()
    }
    torch.save(held, shapes / "model.fp16.ckpt")
    printed = flow("new", "WORK", f"--pipeline={shapes}", f"--images={images}")
    assert all(word in printed for word in ("missing", "autoencoder", "European Union"))
    assert (here / "WORK" / "work.json").is_file()
    del held["model"]["x_embedder.weight"]
    torch.save(held, shapes / "model.fp16.ckpt")
    printed = flow("new", "OTHER", f"--pipeline={shapes}", f"--images={images}", code=2)
    check_message(printed, ("x_embedder.weight", "model.fp16.ckpt", "huggingface.co/tencent"))


def test_a_folder_is_made_once_and_the_next_commands_ask_for_it(here):
    flow("new", "WORK", "--pipeline=toy", f"--prompts={write_prompts(here / 'p.txt')}")
    check_message(flow("new", "WORK", "--pipeline=toy", code=2), ("WORK", "work.json"))
    check_message(flow("sample", "NOWHERE", code=2), ("NOWHERE", "work.json", command("new")))
    check_message(flow("label", "WORK", code=2), ("WORK", "ranking.jsonl", command("sample", "WORK")))
    check_message(flow("study", "WORK", code=2), ("WORK", command("tune", "WORK")))
    work = Work.open(here / "WORK")
    assert {name for split in SPLITS for name in work.splits[split]} == set(NAMES)
    (here / "WORK" / "tune-00").mkdir()
    check_message(flow("study", "WORK", code=2), ("WORK/tune-00",))


@pytest.mark.long
def test_memory_and_time_are_estimated_and_a_device_too_small_is_rejected(tmp_path, monkeypatch):
    root = write_hunyuan3d(tmp_path / "ROOT")
    cpu = torch.device("cpu")
    family = family_of(root, print_line=lambda text: None)
    small = list(cost_lines(family, root, cpu, "float32", [1]))
    assert len(small) == 1 and not any("sample" in line or "lora" in line for line in small)
    monkeypatch.setattr(fit, "LARGE", 1)
    monkeypatch.setattr(estimate, "speed", lambda device, precision: 1e9)
    lines = list(cost_lines(family, root, cpu, "float32", [1, 2]))
    assert sum("sample" in line for line in lines) == 2 and sum("lora" in line for line in lines) == 4
    monkeypatch.setattr(fit, "free_bytes", lambda device: 1 << 10)
    with raising("GiB", "'shape'"):
        list(cost_lines(family, root, cpu, "float32", [1]))
