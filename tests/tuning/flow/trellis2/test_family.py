"""TRELLIS.2 as a family: surfaces to look at, one DPO step, the folder with adapters merged, and the documented round trip."""

import copy
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eg3d_rlhf.models.lora import LoraConfig, add_lora, lora_parameters
from eg3d_rlhf.models.policies import save_policy
from eg3d_rlhf.models.sparse import SparseSample
from eg3d_rlhf.models.trellis2 import VoxelAsset
from eg3d_rlhf.tuning.flow.conditions import read_conditions
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.families.trellis2 import pipeline as family
from eg3d_rlhf.tuning.flow.families.trellis2.pipeline import load_pipeline, surface_of
from eg3d_rlhf.tuning.flow.generate import generate
from eg3d_rlhf.tuning.flow.pairs import read_pairs
from tests.tuning.flow.documented_commands import run_section
from tests.tuning.flow.one_step import check_one_dpo_step
from tests.tuning.flow.refused import refusal, write_people
from tests.tuning.flow.trellis2.tiny_trellis2 import NAMES, PIPELINE, E, tokens, write_pipeline


def test_a_face_about_every_crossed_edge_that_four_voxels_share():
    coords = torch.cartesian_prod(*[torch.arange(2)] * 3).int()
    crossed = torch.zeros(8, 3, dtype=torch.bool)
    crossed[0, 0] = crossed[0, 2] = crossed[7, 1] = True  # the last lacks its neighbours
    asset = VoxelAsset(coords=coords, resolution=2, vertices=torch.full((8, 3), 0.5), crossed=crossed, split=torch.ones(8))
    vertices, faces = surface_of(asset)
    assert torch.equal(vertices[0], torch.full([3], -0.25)) and torch.equal(vertices[7], torch.full([3], 0.25))
    assert len(faces) == 4 and set(faces.flatten().tolist()) == {0, 1, 2, 3, 4, 6}  # voxels x = 0, and z = 0
    area = torch.linalg.cross(vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]]).norm(dim=1) / 2
    torch.testing.assert_close(area, torch.full([4], 0.125))
    asset.split[[1, 2]] = 9.0  # the other diagonal of the face x = 0
    assert any({1, 2} <= set(face) for face in surface_of(asset)[1].tolist()) and not any({1, 2} <= set(face) for face in faces.tolist())


@pytest.mark.parametrize("name", ["structure", "shape_1024", "texture"])
def test_one_dpo_step(pipeline, name):
    check_one_dpo_step(pipeline, name, NAMES[:2])


def test_adapters_are_merged_into_the_files_own_types(pipeline, trellis2_root, tmp_path):
    stage = pipeline.stages[-1]
    model = copy.deepcopy(stage.model)
    add_lora(model, LoraConfig(rank=2, targets=stage.lora_targets), seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    save_policy(model, tmp_path / "adapter", {})
    report = family.export(trellis2_root, tmp_path / "out", {"texture": tmp_path / "adapter"})
    assert report["tuned"]["texture"]["file"] == "tex_1024.safetensors" and 0 < report["tuned"]["texture"]["rounding"] < 0.1
    assert report["elsewhere"] == [] and len(report["kept"]) == 7
    old, new = (load_file(root / "ckpts" / "tex_1024.safetensors") for root in (trellis2_root, tmp_path / "out"))
    assert {k: (t.dtype, t.shape) for k, t in old.items()} == {k: (t.dtype, t.shape) for k, t in new.items()}
    changed = {k for k in old if not torch.equal(old[k], new[k])}
    assert changed == {f"blocks.0.{k}.weight" for k in (
        "self_attn.to_qkv", "self_attn.to_out", "cross_attn.to_q", "cross_attn.to_kv", "cross_attn.to_out"
    )}
    opened = load_pipeline(tmp_path / "out", tokens())  # whole, by itself
    runs = (opened, {}), (pipeline, {"texture": model.eval()}), (pipeline, {})
    merged, adapted, base = (generate(p, NAMES[:1], [0], models)[0].materials for p, models in runs)
    assert 10 * (merged - adapted).abs().mean() < (adapted - base).abs().mean()  # rounded to bfloat16
    with pytest.raises(ValueError, match="export: expected stages among structure, .*, got paint"):
        family.export(trellis2_root, tmp_path / "out2", {"paint": tmp_path})


class Encoder:
    """In place of DINOv3's weights."""

    def __init__(self, name, device):
        assert name == PIPELINE["args"]["image_cond_model"]["args"]["model_name"]
        self.name = name

    def __call__(self, picture):
        assert picture.shape[1:] in ((512, 512), (1024, 1024))
        return torch.full((picture.shape[1] // 256, E), float(picture.mean()))


@pytest.mark.long
def test_the_documented_round_trip(trellis2_root, tmp_path, monkeypatch):
    monkeypatch.setattr(family, "PictureEncoder", Encoder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PICTURES").mkdir()
    for i, name in enumerate(NAMES):
        picture = Image.new("RGBA", (40, 40))
        picture.paste((60 * i, 90, 30, 255), (5, 5, 30, 35))
        picture.save(tmp_path / "PICTURES" / f"{name}.png")
    called = run_section("TRELLIS.2", trellis2_root, tmp_path)
    assert called == ["conditions", "draw", "ranking", "train", "export"]
    read = read_conditions(tmp_path / "PAIRS")
    assert set(read.names) == set(NAMES) and read.form == {"1024": [4, E], "512": [2, E]}
    for stage in ("structure", "shape_512", "shape_1024", "texture"):
        assert len(read_pairs(tmp_path / "PAIRS" / stage)[0]) == len(NAMES)
    base, tuned = (load_pipeline(root, read) for root in (trellis2_root, tmp_path / "TUNED"))
    same = [all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
            for one, other in zip(base.stages, tuned.stages, strict=True)]
    assert same == [True, True, True, False]
    assert family_of(tmp_path / "TUNED").name == "trellis2" and generate(tuned, NAMES[:1], [0])[0].materials.isfinite().all()


def test_dinov3_before_its_last_norm(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, patch_size=16, num_register_tokens=4
    )
    torch.manual_seed(0)
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path)
    encoder = family.PictureEncoder(str(tmp_path))
    tokens = encoder(torch.rand(3, 32, 32))
    assert tokens.shape == (1 + 4 + 4, 16)
    torch.testing.assert_close(tokens.mean(1), torch.zeros(9), rtol=0, atol=1e-5)


def test_what_train_refuses(trellis2_root, tmp_path):
    root = shutil.copytree(trellis2_root, tmp_path / "root")
    shutil.copytree(trellis2_root.parent / "trellis", tmp_path / "trellis")
    g = torch.Generator().manual_seed(0)
    coords = torch.tensor([[0, 1, 2], [7, 7, 7]], dtype=torch.int32)
    textures = [SparseSample(coords, torch.randn(2, 4, generator=g), torch.zeros(2, 4)) for _ in range(2)]
    people = write_people(tmp_path / "a", "texture", *textures, tokens())
    others = write_people(tmp_path / "b", "texture", *textures, tokens(size=7))
    assert "expected tokens [L, 6] named '512' for stage 'structure', got {'1024': [5, 7], '512': [3, 7]} of dinov3." in refusal(
        root, others, "texture", tmp_path
    )
    plain = write_people(tmp_path / "c", "texture", *(SparseSample(x.coords, x.feats) for x in textures), tokens())
    assert "preferred: expected 4 given features per voxel, got 0. It is no latent of stage 'texture'" in refusal(
        root, plain, "texture", tmp_path
    )
    write_pipeline(root, shape_slat_sampler={"name": "FlowEulerSampler", "params": {"cfg_strength": 3}})
    assert "expected guidance_strength, of which 1 is none, got cfg_strength" in refusal(root, people, "texture", tmp_path)
    write_pipeline(root)
    state = load_file(root / "ckpts" / "tex_1024.safetensors")
    save_file({name.replace("cross_attn", "attn2"): tensor for name, tensor in state.items()}, root / "ckpts" / "tex_1024.safetensors")
    said = refusal(root, people, "texture", tmp_path)
    names = [f"blocks.0.cross_attn.{part}" for part in (
        "k_rms_norm.gamma", "q_rms_norm.gamma", "to_kv.bias", "to_kv.weight", "to_out.bias", "to_out.weight", "to_q.bias", "to_q.weight"
    )]
    assert f"missing: {', '.join(names)}; unexpected: " in said
