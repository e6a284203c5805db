"""TRELLIS of images in the layout of TRELLIS-image-large: from images to a tuned folder, as documented."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, read_conditioning, write_conditioning
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.base.stage import Sampling
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.families.trellis import FAMILY
from eg3d_rlhf.tuning.flow.families.trellis_files import STRUCTURE
from tests.modes.flow_works import flow
from tests.rejections import check_message
from tests.tuning.flow.documented_commands import run_section
from tests.tuning.flow.families.trellis.tiny_trellis import DINO, write_hub, write_image_trellis

FEW = (
    "--steps=6 --lr=0.02 --set=warmup=0 --set=choose_noises=0 --table-noises=2 --set=loop_pairs=2"
    " --set=roles=reward".split()
)
FEW += ["--set=views=2", "--device=cpu"]
NAMES = ("boat", "chair", "lamp", "tree", "house", "dog")


@pytest.fixture
def root(tmp_path, monkeypatch):
    write_hub(tmp_path / "torch" / "hub" / "checkpoints" / "dinov2_vitl14_reg4_pretrain.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IMAGES").mkdir()
    for i, name in enumerate(NAMES):
        pixels = np.zeros((40, 50, 4), np.uint8)
        pixels[5 : 15 + 3 * i, 10:30] = (40 * i, 200 - 30 * i, 90, 255)
        Image.fromarray(pixels).save(tmp_path / "IMAGES" / f"{name}.png")
    return write_image_trellis(tmp_path / "ROOT")


def test_settings_tokens_and_the_empty_conditioning_are_those_of_image_large(root):
    assert family_of(root).name == "trellis"
    flow("new", "WORK", f"--pipeline={root}", "--images=IMAGES")
    tokens = read_conditioning(Path("WORK"))
    assert tokens.encoder == "dinov2_vitl14_reg" and tokens.form == [1 + 4 + 2 * 2, DINO] and tokens.zero_null
    pipeline = FAMILY.load(root, tokens)
    assert not pipeline.null_conditioning(2, STRUCTURE).any()
    for stage in pipeline.stages:
        assert stage.sampling == Sampling(steps=2, cfg_strength=5.0, cfg_interval=(0.5, 1.0), rescale_t=3.0)
    base_stage = Conditioning(
        tokens={name: torch.zeros(9, 32) for name in NAMES}, encoder="CLIP", zero_null=True
    )
    write_conditioning(Path("OTHER.safetensors"), base_stage)
    flow("new", "OTHER", f"--pipeline={root}", "--conditioning=OTHER.safetensors")
    check_message(flow("sample", "OTHER", code=2), (f"[L, {DINO}]", "'structure'"))


@pytest.mark.long
def test_from_images_to_a_tuned_folder_as_documented(root):
    def look(called, done):
        if called == "calibrate":
            shares = json.loads(done.stdout[done.stdout.index("{") :])
            assert 0 < shares["iou"] <= 1 and [shares["share"], shares["iou"]] in shares["tried"]

    called = run_section("TRELLIS-image-large", "ROOT", Path(), FEW, look)
    assert called == ["new", "sample", "pairs", "train", "export"]
    tokens = read_conditioning(Path("WORK"))
    base, tuned = (FAMILY.load(path, tokens) for path in (root, Path("TUNED")))
    both = zip(base.stages, tuned.stages, strict=True)  # a stage that no update made better stays as it was
    weights = [
        zip(tuned_stage.model.parameters(), base_stage.model.parameters(), strict=True)
        for tuned_stage, base_stage in both
    ]
    assert any(not torch.equal(a, b) for of_stage in weights for a, b in of_stage)
    assert generate(tuned, [tokens.names[0]], [0])[0].means.isfinite().all()
